//! The handler: what each operation means for an exported disk.
//!
//! It knows no transport and no wire format: an [`Op`] and a payload come in, a [`Reply`] or an
//! [`Errno`] goes out. Any number of operations run at once, on any thread.

mod attributes;
pub mod open_files;
mod policy;
pub mod report;
mod served;
mod size;

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use event_listener::Event;
use polling::Poller;

use crate::backend::{Backend, Capabilities, Lane, Outage, Seek, WaitsFor, Zero};
use crate::errno::Errno;
use crate::export::open_files::{Access, Flushes, OpenFiles};
use crate::export::report::Reporter;
use crate::fuse::abi::{self};
use crate::fuse::notify::Notifier;
use crate::fuse::reply::Reply;
use crate::fuse::request::Op;
use crate::io::Io;
use attributes::WRITE_BITS;
pub use attributes::{ATTRIBUTE_SOURCE, ATTRIBUTE_STATS, Attributes};
pub(crate) use attributes::{STATS_GROWTH, asked_attribute, statfs, xattr};
pub use policy::{Cache, Policy, Truncate};
pub use served::Served;
use size::SizeExceeded;

/// One exported disk.
pub struct Export<B> {
    backend: Arc<B>,
    capabilities: Capabilities,
    policy: Policy,
    /// The kernel's number of it.
    node: u64,
    /// Off the data path: `stat`, `chmod` and the like, and the first write in each tick of the
    /// clock.
    attributes: Mutex<Attributes>,
    /// The tick that `attributes` has for the last write; 0 if somebody has set the time since. It
    /// changes with them only, so that writers share a cache line which hardly ever changes.
    written_at: AtomicU64,
    open_files: OpenFiles,
    flushes: Flushes,
    closed: Arc<AtomicBool>,
    notifier: OnceLock<Notifier>,
    reporter: OnceLock<Reporter>,
    /// The control thread, see [`Export::take_exceeded_size`].
    control: OnceLock<Arc<Poller>>,
    size_exceeded: Mutex<SizeExceeded>,
    /// The kernel, which owns the size, begins with zero.
    size_unknown: AtomicBool,
    size_told: Event,
    /// A write that its client believes done has failed, and the kernel tells who asks (fsync,
    /// close).
    write_back_failed: AtomicBool,
    /// The log has been told that a truncation was refused, and of the cure.
    truncation_refused: AtomicBool,
}

impl<B: Backend> Export<B> {
    /// An export of `backend`; its times are the source's to begin with. Once `closed` is set,
    /// whoever still has the file gets EIO: the last flush must come to an end even if the
    /// connection does not.
    pub fn new(
        backend: Arc<B>,
        policy: Policy,
        closed: Arc<AtomicBool>,
    ) -> std::io::Result<Export<B>> {
        let capabilities = backend.capabilities();
        let policy = Policy {
            writable: policy.writable && !capabilities.read_only,
            growable: policy.growable && capabilities.resizable,
            cache: match policy.cache {
                // There is nothing to write, and a size that nobody could tell the kernel.
                Cache::Writeback if !policy.writable || capabilities.read_only => {
                    Cache::Writethrough
                }
                cache => cache,
            },
            ..policy
        };
        let stat = backend.stat()?;
        let attributes = Attributes {
            atime: stat.atime,
            mtime: stat.mtime,
            ctime: stat.ctime,
            ..Attributes::new(&policy)
        };
        Ok(Export {
            backend,
            capabilities,
            policy,
            node: abi::ROOT_ID,
            attributes: Mutex::new(attributes),
            written_at: AtomicU64::new(0),
            open_files: OpenFiles::default(),
            flushes: Flushes::default(),
            closed,
            notifier: OnceLock::new(),
            reporter: OnceLock::new(),
            control: OnceLock::new(),
            size_exceeded: Mutex::new(SizeExceeded::No),
            size_unknown: AtomicBool::new(policy.cache == Cache::Writeback),
            size_told: Event::new(),
            write_back_failed: AtomicBool::new(false),
            truncation_refused: AtomicBool::new(false),
        })
    }

    /// The same as one of several files of a connection: as the one that the kernel knows by this
    /// number, and with the attributes that it had before, if it was there before.
    pub fn at_node(self, node: u64, attributes: Option<Attributes>) -> Export<B> {
        if let Some(mut kept) = attributes {
            if !self.policy.writable {
                kept.mode &= !WRITE_BITS;
            }
            *self.attributes() = kept;
        }
        Export { node, ..self }
    }

    /// Where its report comes from; set before the first request.
    pub fn set_reporter(&self, reporter: Reporter) {
        let _ = self.reporter.set(reporter);
    }

    /// Who is woken for [`Export::take_exceeded_size`] and [`Backend::outage`]; set before the
    /// first request.
    pub fn set_control(&self, control: Arc<Poller>) {
        self.backend.set_control(control.clone());
        let _ = self.control.set(control);
    }

    /// The source of its bytes.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }
}

impl<B: Backend> Served for Export<B> {
    type Lane = B::Lane;

    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> std::io::Result<B::Lane> {
        self.backend.lane(io)
    }

    fn waits_for(&self) -> WaitsFor {
        self.capabilities.waits_for
    }

    fn cache(&self) -> Cache {
        self.policy.cache
    }

    fn writable(&self) -> bool {
        self.policy.writable
    }

    fn growable(&self) -> bool {
        self.policy.growable
    }

    fn size(&self) -> u64 {
        self.backend.size()
    }

    fn set_notifier(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    fn set_read_ahead(&self, bytes: u64) {
        self.backend.set_read_ahead(bytes);
    }

    async fn handle(
        &self,
        lane: &B::Lane,
        node: u64,
        op: Op,
        payload: &mut [u8],
    ) -> Result<Reply, Errno> {
        match op {
            Op::Release { handle } => {
                // Those whose fsync or close has failed in the kernel come here only.
                let _ = self.stop_exceeding();
                self.open_files.release(handle);
                Ok(Reply::Done)
            }
            Op::Destroy => Ok(Reply::Done),
            Op::Unanswered | Op::Interrupt { .. } => Ok(Reply::Unanswered),
            _ if self.closed.load(Ordering::Relaxed) => Err(Errno::EIO),
            _ if node != self.node => Err(Errno::ENOENT),
            Op::Read { handle, offset, size } => {
                let access = Access::of(handle);
                self.read(lane, access, offset, &mut payload[..size as usize]).await
            }
            Op::Write { handle, offset, size, durable, from_cache } => {
                let data = &payload[..size as usize];
                let written = self.write(lane, offset, data, durable).await;
                if from_cache {
                    self.note_write_back(offset, size, &written);
                } else if Access::of(handle) == Access::Direct && self.open_files.any_cached() {
                    self.drop_cached(offset, u64::from(size)).await;
                }
                written
            }
            Op::Getattr { handle } => {
                let in_size = self.stop_exceeding();
                if handle.is_some_and(|handle| self.open_files.is_writable(handle)) {
                    in_size?;
                }
                self.attr(lane).await
            }
            Op::Setattr(change) => self.setattr(lane, change).await,
            Op::Open { flags } => self.open(lane, flags).await,
            Op::Flush { handle } if !self.open_files.closing(handle) => Ok(Reply::Done),
            Op::Flush { handle } => {
                let in_size = self.stop_exceeding();
                let flushed = self.flush(lane).await;
                flushed.and(in_size).and(self.open_files.untold(handle)).map(|()| Reply::Done)
            }
            Op::Fsync { handle } => {
                let in_size = self.stop_exceeding();
                let flushed = self.flush(lane).await;
                // Told in any case, and once.
                let told = self.open_files.tell(handle);
                flushed.and(in_size).and(told).map(|()| Reply::Done)
            }
            Op::Fallocate { offset, len, mode } => self.fallocate(lane, offset, len, mode).await,
            Op::Lseek { offset, whence } => self.lseek(lane, offset, whence).await,
            Op::Statfs => Ok(Reply::Statfs(self.statfs())),
            Op::Getxattr { room } => {
                let (value, growth) = self.attribute(payload).ok_or(Errno::ENODATA)?;
                xattr(value.as_bytes(), growth, room, payload)
            }
            // cp -a, rsync -X and tar --xattrs would keep what is listed with their copies.
            Op::Listxattr { room } => xattr(&[], 0, room, payload),
            Op::Lookup
            | Op::Opendir
            | Op::Readdir { .. }
            | Op::Releasedir
            | Op::ChangeDirectory => Err(Errno::ENOSYS),
        }
    }

    fn is_open(&self) -> bool {
        self.open_files.any_open()
    }

    fn size_is_known(&self) {
        self.size_unknown.store(false, Ordering::SeqCst);
        self.size_told.notify(usize::MAX);
    }

    /// The kernel shows a larger size, for bytes that have no place.
    fn take_exceeded_size(&self) -> Option<u64> {
        let mut state = self.size_exceeded();
        if *state != SizeExceeded::Written {
            return None;
        }
        *state = SizeExceeded::No;
        Some(self.backend.size())
    }

    fn outage(&self) -> Option<Outage> {
        self.backend.outage()
    }

    fn flush_failed(&self) -> bool {
        self.open_files.any_failure() || self.write_back_failed.load(Ordering::Relaxed)
    }

    fn hurry(&self) {
        self.backend.hurry();
    }

    fn last_flush(&self, patience: Duration) -> std::io::Result<()> {
        self.backend.last_flush(patience)
    }

    fn report(&self) -> Option<String> {
        Some(self.reporter.get()?.line(self.backend.size(), self.backend.stats(), None))
    }
}

impl<B: Backend> Export<B> {
    async fn read(
        &self,
        lane: &B::Lane,
        access: Access,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Reply, Errno> {
        let len = self.within(offset, buf.len());
        if len == 0 {
            return Ok(Reply::Data(0));
        }
        let buf = &mut buf[..len];
        Ok(Reply::Data(match access {
            Access::Direct => lane.read(offset, buf).await?,
            Access::Cached => lane.read_cached(offset, buf).await?,
        }))
    }

    async fn write(
        &self,
        lane: &B::Lane,
        offset: u64,
        data: &[u8],
        durable: bool,
    ) -> Result<Reply, Errno> {
        self.check_writable()?;
        let len = if self.policy.growable {
            let end = offset.checked_add(data.len() as u64).and_then(|end| i64::try_from(end).ok());
            end.map(|_| data.len()).ok_or(Errno::EFBIG)?
        } else {
            self.within(offset, data.len())
        };
        if len == 0 && !data.is_empty() {
            return Err(Errno::ENOSPC);
        }
        let _flush = durable.then(|| self.flushes.begin());
        let written = lane.write(offset, &data[..len], durable).await;
        self.note_modified();
        match written {
            // Its own sync may have met, and used up, the report of what others have lost.
            Err(e) if durable => Err(self.flush_has_failed("durable write", e)),
            Err(e) => Err(e.into()),
            Ok(()) => Ok(Reply::Written(len as u32)),
        }
    }

    async fn open(&self, lane: &B::Lane, flags: u32) -> Result<Reply, Errno> {
        let writing = flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        if writing {
            self.check_writable()?;
        }
        // The flag comes only where INIT has promised to mind it (`ATOMIC_O_TRUNC`): where the
        // length can change. Else the kernel sends a SETATTR of size 0 after this, and believes its
        // answer.
        if flags & libc::O_TRUNC as u32 != 0 {
            self.check_writable()?;
            self.truncate(lane, 0).await?;
        }
        self.until_size_is_known().await;
        let direct = match self.policy.cache {
            Cache::None => true,
            // Where the kernel does not write back for such a file, it does so for O_DIRECT on any
            // other.
            Cache::Writeback if !self.writes_back_before_direct() => false,
            Cache::Writethrough | Cache::Writeback => flags & libc::O_DIRECT as u32 != 0,
        };
        let access = if direct { Access::Direct } else { Access::Cached };
        if writing && self.policy.cache != Cache::None && !self.policy.keep_cache {
            self.open_files.dropped().await;
        }
        let opened = self.open_files.open(access, writing);
        let mut flags = match access {
            Access::Direct => abi::FOPEN_DIRECT_IO | abi::FOPEN_PARALLEL_DIRECT_WRITES,
            Access::Cached => 0,
        };
        // With a cache its end has to be known: the next open may be the first.
        if !writing && self.policy.cache == Cache::None {
            flags |= abi::FOPEN_NOFLUSH;
        }
        if !opened.is_first || self.policy.keep_cache {
            flags |= abi::FOPEN_KEEP_CACHE;
        } else {
            self.backend.forget();
        }
        Ok(Reply::Opened { handle: opened.handle, flags })
    }

    fn writes_back_before_direct(&self) -> bool {
        self.notifier.get().is_none_or(Notifier::writes_back_before_direct)
    }

    async fn flush(&self, lane: &B::Lane) -> Result<(), Errno> {
        let under_way = self.flushes.begin();
        let flushed = lane.flush().await.map_err(|e| self.flush_has_failed("flush", e));
        drop(under_way);
        // One that began earlier may have met, and used up, the report of what was written before
        // this one.
        self.flushes.told().await;
        flushed
    }

    /// Sees to it that every open file hears of it, and the exit status, if something may be lost.
    fn flush_has_failed(&self, what: &str, error: std::io::Error) -> Errno {
        match self.reporter.get().filter(|_| self.node != abi::ROOT_ID) {
            // One of several files.
            Some(reporter) => log::error!("{}: {what}: {error}", reporter.source),
            None => log::error!("{what}: {error}"),
        }
        if error.kind() == std::io::ErrorKind::NotConnected {
            return Errno::from(error);
        }
        let errno = Errno::from(error);
        self.open_files.failed(errno);
        errno
    }

    async fn fallocate(
        &self,
        lane: &B::Lane,
        offset: u64,
        len: u64,
        mode: u32,
    ) -> Result<Reply, Errno> {
        const KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE as u32;
        const PUNCH: u32 = libc::FALLOC_FL_PUNCH_HOLE as u32 | KEEP_SIZE;
        const ZERO: u32 = libc::FALLOC_FL_ZERO_RANGE as u32;
        const ZERO_KEEP_SIZE: u32 = ZERO | KEEP_SIZE;

        self.check_writable()?;
        let end = offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or(Errno::EFBIG)?;
        let size = self.size_now(lane).await?;
        let grows = end > size && mode & KEEP_SIZE == 0;
        if grows && !self.policy.growable {
            return Err(Errno::ENOSPC);
        }
        let inside = end.min(size).saturating_sub(offset);
        match mode {
            0 | KEEP_SIZE if self.policy.growable => {
                lane.allocate(offset, len, mode == KEEP_SIZE).await?;
            }
            0 | KEEP_SIZE if self.capabilities.allocates && inside > 0 => {
                lane.allocate(offset, inside, true).await?;
            }
            // A device, or another host's disk, has its space, as far as anyone can tell.
            0 | KEEP_SIZE => {}
            PUNCH if inside > 0 => lane.zero(offset, inside, Zero::Punch).await?,
            ZERO | ZERO_KEEP_SIZE => {
                if inside > 0 {
                    lane.zero(offset, inside, Zero::Keep).await?;
                }
                if grows {
                    let start = offset.max(size);
                    lane.allocate(start, end - start, false).await?;
                }
            }
            PUNCH => {}
            _ => return Err(Errno::EOPNOTSUPP),
        }
        self.note_modified();
        Ok(Reply::Done)
    }

    async fn lseek(&self, lane: &B::Lane, offset: u64, whence: u32) -> Result<Reply, Errno> {
        let what = match whence as i32 {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return Err(Errno::EINVAL),
        };
        if offset >= self.backend.size() {
            return Err(Errno::ENXIO);
        }
        // The kernel does not ask its cache: what looks like a hole may be data that waits there.
        if self.policy.cache == Cache::Writeback && self.open_files.any_writes() {
            let size = self.backend.size();
            return Ok(Reply::Seek(if what == Seek::Data { offset } else { size }));
        }
        Ok(Reply::Seek(lane.seek(offset, what).await?))
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if self.policy.writable { Ok(()) } else { Err(Errno::EROFS) }
    }
}

#[cfg(test)]
mod tests;
