//! The open files: which of them have yet to hear of a failed flush, and whether the page cache is
//! in use.
//!
//! A source tells once that written data was lost, to whichever flush comes first. That may be the
//! close of a descriptor which a forked child has inherited, and at whose result nobody looks. So
//! every file that was open then is told at its next `fsync`, once each, as the kernel does for its
//! own files (`errseq_t`, Documentation/core-api/errseq.rst).

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_listener::Event;
use smol::{Timer, future};

use crate::errno::Errno;

/// After this time the kernel has come to the end of an open, which is when it drops what its page
/// cache holds.
const SETTLED: Duration = Duration::from_millis(100);
/// How long an open for writing waits for that, unless it is known earlier.
const WAIT_FOR_DROPS: Duration = Duration::from_millis(20);

/// All open files of an export. Off the data path: only open, close, flushes and failed durable
/// writes come here, and [`OpenFiles::any_cached`].
#[derive(Debug, Default)]
pub struct OpenFiles {
    state: Mutex<State>,
    /// How many go through the page cache.
    cached: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    last_number: u64,
    files: HashMap<u64, OpenFile>,
    failures: u64,
    last_failure: Option<Errno>,
}

#[derive(Debug)]
struct OpenFile {
    since: Instant,
    /// Whether it can be written to.
    writes: bool,
    /// Somebody has closed a descriptor of it. It may have been the last, of which the kernel tells
    /// (RELEASE) when it comes to it.
    may_be_closed: bool,
    /// Its open drops what the page cache holds. It is over once something is heard of the file.
    drops: bool,
    /// How many flushes had failed when it was opened, or last told.
    told: u64,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Without the page cache (`FOPEN_DIRECT_IO`).
    Direct,
    /// Through it.
    Cached,
}

impl Access {
    /// That of the open file with this handle: the lowest bit tells.
    pub fn of(handle: u64) -> Access {
        if handle & 1 == 0 { Access::Cached } else { Access::Direct }
    }
}

/// A file that was just opened.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// Its number, which is never zero.
    pub handle: u64,
    /// Nobody is known to have had it open: what is remembered of the disk may be older than its
    /// last close.
    pub is_first: bool,
}

impl State {
    fn untold(&self, handle: u64) -> Result<(), Errno> {
        match (self.files.get(&handle), self.last_failure) {
            (Some(file), Some(errno)) if file.told < self.failures => Err(errno),
            _ => Ok(()),
        }
    }
}

impl OpenFiles {
    /// A new file. What failed before is none of its concern.
    pub fn open(&self, access: Access, writes: bool) -> Opened {
        let mut state = self.lock();
        state.last_number += 1;
        let handle = state.last_number << 1 | u64::from(access == Access::Direct);
        // While somebody may write nothing is dropped: a page whose write is under way would be
        // read again, and stay as it was before the write.
        let keeps =
            |file: &OpenFile| file.writes || !file.may_be_closed && file.since.elapsed() >= SETTLED;
        let is_first = !state.files.values().any(keeps);
        let told = state.failures;
        let (since, drops) = (Instant::now(), is_first);
        let file = OpenFile { since, writes, may_be_closed: false, drops, told };
        state.files.insert(handle, file);
        if access == Access::Cached {
            self.cached.fetch_add(1, Ordering::SeqCst);
        }
        Opened { handle, is_first }
    }

    /// For an open for writing: waits until the kernel has dropped what it was told to by the opens
    /// before.
    pub async fn dropped(&self) {
        loop {
            let under_way = |file: &OpenFile| {
                WAIT_FOR_DROPS.checked_sub(file.since.elapsed()).filter(|_| file.drops)
            };
            let left = self.lock().files.values().filter_map(under_way).max();
            let Some(left) = left else { return };
            Timer::after(left.min(Duration::from_millis(1))).await;
        }
    }

    /// Whether any is open.
    pub fn any_open(&self) -> bool {
        !self.lock().files.is_empty()
    }

    /// Whether any is open that can be written to.
    pub fn any_writes(&self) -> bool {
        self.lock().files.values().any(|file| file.writes)
    }

    /// Whether this one can be written to.
    pub fn is_writable(&self, handle: u64) -> bool {
        self.lock().files.get(&handle).is_some_and(|file| file.writes)
    }

    /// Whether any goes through the page cache.
    pub fn any_cached(&self) -> bool {
        self.cached.load(Ordering::SeqCst) > 0
    }

    /// A descriptor of it is being closed; whether it can be written to.
    pub fn closing(&self, handle: u64) -> bool {
        self.lock().files.get_mut(&handle).is_none_or(|file| {
            (file.may_be_closed, file.drops) = (true, false);
            file.writes
        })
    }

    /// The file is closed for good.
    pub fn release(&self, handle: u64) {
        if self.lock().files.remove(&handle).is_some() && Access::of(handle) == Access::Cached {
            self.cached.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// A flush or a durable write has failed: every open file has to know.
    pub fn failed(&self, errno: Errno) {
        let mut state = self.lock();
        state.failures += 1;
        state.last_failure = Some(errno);
    }

    /// Whether there has been any failure, told or not.
    pub fn any_failure(&self) -> bool {
        self.lock().failures > 0
    }

    /// What a close has to say: the failure that the file has not been told of. It does not count
    /// as told.
    pub fn untold(&self, handle: u64) -> Result<(), Errno> {
        self.lock().untold(handle)
    }

    /// What an fsync has to say. From then on the file has been told.
    pub fn tell(&self, handle: u64) -> Result<(), Errno> {
        // Under one lock: a failure that came in between would be taken for told.
        let mut state = self.lock();
        let (untold, failures) = (state.untold(handle), state.failures);
        if let Some(file) = state.files.get_mut(&handle) {
            file.told = failures;
        }
        untold
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds the list")
    }
}

/// How long an fsync waits for others that may have met what was meant for it. What they have met
/// they are just about to tell; one that takes longer hangs for another reason.
const TELLING: Duration = Duration::from_secs(1);

/// The flushes and durable writes under way.
///
/// One that began before an fsync may be the one that the source has told of a loss, and not be
/// done with telling [`OpenFiles`] yet when the fsync comes to its end.
#[derive(Debug, Default)]
pub struct Flushes {
    under_way: Mutex<UnderWay>,
    ended: Event,
}

#[derive(Debug, Default)]
struct UnderWay {
    next: u64,
    tickets: BTreeSet<u64>,
}

/// One flush or durable write, until `open_files` knows if it has failed.
#[derive(Debug)]
pub struct Flush<'a> {
    all: &'a Flushes,
    ticket: u64,
}

impl Flushes {
    /// One begins.
    pub fn begin(&self) -> Flush<'_> {
        let mut under_way = self.lock();
        let ticket = under_way.next;
        under_way.next += 1;
        under_way.tickets.insert(ticket);
        Flush { all: self, ticket }
    }

    /// Waits until those that are under way now have told what they have met, for a second at most.
    pub async fn told(&self) {
        let next = self.lock().next;
        let told = async {
            while self.any_before(next) {
                // Listen first and look again, or an end in between would be missed.
                let ended = self.ended.listen();
                if !self.any_before(next) {
                    break;
                }
                ended.await;
            }
        };
        let limit = async { _ = Timer::after(TELLING).await };
        if self.any_before(next) {
            future::or(told, limit).await;
        }
    }

    fn any_before(&self, ticket: u64) -> bool {
        self.lock().tickets.first().is_some_and(|&first| first < ticket)
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().expect("no code panics while it holds the list")
    }
}

impl Drop for Flush<'_> {
    fn drop(&mut self) {
        self.all.lock().tickets.remove(&self.ticket);
        self.all.ended.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(files: &OpenFiles) -> u64 {
        files.open(Access::Direct, true).handle
    }

    #[test]
    fn every_file_that_was_open_is_told_once() {
        let files = OpenFiles::default();
        let (a, b) = (open(&files), open(&files));
        assert!(files.tell(a).is_ok());
        files.failed(Errno::EIO);
        let later = open(&files);
        assert_eq!(files.tell(a), Err(Errno::EIO));
        assert!(files.tell(a).is_ok() && files.tell(later).is_ok());
        assert_eq!(files.tell(b), Err(Errno::EIO));
    }

    #[test]
    fn a_close_reports_and_does_not_hide_it_from_fsync() {
        let files = OpenFiles::default();
        let file = open(&files);
        files.failed(Errno::EIO);
        assert_eq!(files.untold(file), Err(Errno::EIO));
        assert_eq!(files.tell(file), Err(Errno::EIO));
        assert!(files.untold(file).is_ok());
    }

    #[test]
    fn released_files_are_forgotten() {
        let files = OpenFiles::default();
        let file = open(&files);
        files.failed(Errno::EIO);
        files.release(file);
        assert!(files.tell(file).is_ok() && !files.any_open());
    }

    #[test]
    fn an_open_is_the_first_unless_a_settled_file_is_open_and_nobody_has_closed_it() {
        let files = OpenFiles::default();
        let first = files.open(Access::Cached, false);
        assert!(first.is_first);
        assert!(
            files.open(Access::Cached, false).is_first,
            "the first may not have come to its end"
        );
        std::thread::sleep(SETTLED);
        assert!(!files.open(Access::Direct, false).is_first);
        let all: Vec<u64> = files.lock().files.keys().copied().collect();
        for handle in all {
            files.closing(handle);
        }
        assert!(files.open(Access::Cached, false).is_first, "any close may have been the last");
    }

    #[test]
    fn nothing_is_dropped_while_somebody_may_write() {
        let files = OpenFiles::default();
        let writer = files.open(Access::Cached, true);
        assert!(writer.is_first && !files.open(Access::Cached, false).is_first);
        files.closing(writer.handle);
        assert!(!files.open(Access::Cached, false).is_first, "another descriptor may be open");
        files.release(writer.handle);
        assert!(files.open(Access::Cached, false).is_first);
    }

    #[test]
    fn a_writer_waits_for_what_is_being_dropped() {
        let files = OpenFiles::default();
        let reader = files.open(Access::Cached, false);
        let mut dropped = std::pin::pin!(files.dropped());
        assert!(future::block_on(future::poll_once(dropped.as_mut())).is_none());
        files.closing(reader.handle);
        future::block_on(files.dropped());
        files.open(Access::Cached, false);
        future::block_on(dropped);
    }

    #[test]
    fn handles_tell_the_access_and_cached_ones_are_counted() {
        let files = OpenFiles::default();
        let (direct, cached) =
            (files.open(Access::Direct, true).handle, files.open(Access::Cached, false).handle);
        assert_eq!((Access::of(direct), Access::of(cached)), (Access::Direct, Access::Cached));
        assert!(files.any_cached() && files.any_writes());
        assert!(files.closing(direct) && !files.closing(cached));
        files.release(cached);
        files.release(cached);
        assert!(!files.any_cached() && files.any_open());
        files.release(direct);
        assert!(!files.any_writes());
    }
}
