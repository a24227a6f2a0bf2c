//! The size of the file: what lies within it, what a truncation does, and what becomes of writes past the end.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::Duration;

use smol::{Timer, future};

use super::{Cache, Export, Truncate};
use crate::backend::{Backend, Lane, Zero};
use crate::errno::Errno;
use crate::fuse::reply::Reply;

/// How long a truncation waits for the page cache to drop what it has zeroed.
pub(super) const DROP_LIMIT: Duration = Duration::from_secs(1);

/// With write-back the kernel takes writes past the end of a disk of fixed size, which fail when
/// they get here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SizeExceeded {
    No,
    /// Somebody is at it, and would never hear of it if he went on for ever.
    BeingWritten,
    /// It is over. The kernel has to be given the size back.
    Written,
}

impl<B: Backend> Export<B> {
    pub(super) async fn until_size_is_known(&self) {
        while self.size_unknown.load(Ordering::SeqCst) {
            // Listen first and look again, or the news would be missed.
            let told = self.size_told.listen();
            if self.size_unknown.load(Ordering::SeqCst) {
                told.await;
            }
        }
    }

    /// A write of what the page cache held must be whole: the kernel does not write the rest.
    pub(super) fn note_write_back(&self, offset: u64, size: u32, written: &Result<Reply, Errno>) {
        let why = match written {
            Ok(Reply::Written(len)) if *len == size => return,
            Ok(_) => Errno::ENOSPC,
            Err(errno) => *errno,
        };
        let end = offset.saturating_add(u64::from(size));
        if !self.policy.growable && end > self.backend.size() {
            let mut state = self.size_exceeded();
            if *state == SizeExceeded::No {
                *state = SizeExceeded::BeingWritten;
            }
        }
        log::error!("{size} bytes at {offset} from the page cache could not be written: {why:?}");
        self.write_back_failed.store(true, Ordering::Relaxed);
    }

    /// Writes past the end that have gone to the page cache, if there were any, count as over:
    /// `ENOSPC` tells of them. The kernel asks for the attributes before it takes more.
    pub(super) fn stop_exceeding(&self) -> Result<(), Errno> {
        if self.policy.cache != Cache::Writeback {
            return Ok(());
        }
        let mut state = self.size_exceeded();
        if *state != SizeExceeded::BeingWritten {
            return Ok(());
        }
        *state = SizeExceeded::Written;
        if let Some(Err(e)) = self.control.get().map(|control| control.notify()) {
            log::error!("the control thread cannot be woken: {e}");
        }
        Err(Errno::ENOSPC)
    }

    pub(super) fn size_exceeded(&self) -> MutexGuard<'_, SizeExceeded> {
        self.size_exceeded.lock().expect("no code panics while it holds the state")
    }

    /// How many of `len` bytes at `offset` lie before the end.
    pub(super) fn within(&self, offset: u64, len: usize) -> usize {
        (len as u64).min(self.backend.size().saturating_sub(offset)) as usize
    }

    /// The source's size, which others may have changed; `stat` is where that is noticed.
    pub(super) async fn size_now(&self, lane: &B::Lane) -> Result<u64, Errno> {
        lane.stat().await?;
        Ok(self.backend.size())
    }

    /// Sets the length to `size` bytes, as far as that can be done.
    pub(super) async fn truncate(&self, lane: &B::Lane, size: u64) -> Result<(), Errno> {
        let now = self.size_now(lane).await?;
        if size == now {
            return Ok(());
        }
        if self.policy.growable {
            i64::try_from(size).map_err(|_| Errno::EFBIG)?;
            lane.resize(size).await?;
        } else if size < now && self.policy.truncate == Truncate::Zero {
            let zeroed = self.zero_whatever_it_takes(lane, size, now - size).await;
            // To the kernel nothing is cut off. It holds what is dirty back until it has the
            // answer, and then would be waited for in vain: that is of a shared mapping, and is
            // written after the zeroes in any case.
            let limit = async { _ = Timer::after(DROP_LIMIT).await };
            future::or(self.drop_cached(size, now - size), limit).await;
            zeroed?;
        } else {
            if !self.truncation_refused.swap(true, Ordering::Relaxed) {
                log::warn!(
                    "a truncation to {size} bytes was refused: the disk has {now}, and keeps them (write without \
                     truncating, as dd conv=notrunc and the shell's 1<> do, or have it zero what is cut off: --truncate zero)"
                );
            }
            return Err(Errno::EOPNOTSUPP);
        }
        self.note_modified();
        Ok(())
    }

    /// Zeroes a range: as a hole if there can be one, and else by whatever way the source has.
    pub(super) async fn zero_whatever_it_takes(
        &self,
        lane: &B::Lane,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        match lane.zero(offset, len, Zero::Punch).await {
            Err(e) if Errno::from_ref(&e) == Errno::EOPNOTSUPP => {
                Ok(lane.zero(offset, len, Zero::Keep).await?)
            }
            zeroed => Ok(zeroed?),
        }
    }

    /// Drops from the page cache what was just changed past it.
    ///
    /// The kernel has done so before the change; but a page that somebody has read since then may
    /// be older than it, and only recent kernels do so afterwards as well (6.18 does).
    pub(super) async fn drop_cached(&self, offset: u64, len: u64) {
        let Some(notifier) = self.notifier.get() else { return };
        if let Err(e) = notifier.invalidate(offset, len).await {
            log::debug!("the page cache keeps {len} bytes at {offset}: {e}");
        }
    }
}
