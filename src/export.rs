//! The handler: what each operation means for an exported disk.
//!
//! It knows no transport and no wire format: an [`Op`] and a payload come in, a [`Reply`] or an
//! [`Errno`] goes out. Any number of operations run at once, on any thread.

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use event_listener::Event;
use polling::Poller;
use rustix::time::{ClockId, clock_gettime};
use smol::{Timer, future};

use crate::backend::{Backend, Capabilities, Lane, Seek, Zero};
use crate::errno::Errno;
use crate::fuse::abi::{self, Attr, SetattrIn, StatfsOut, fattr};
use crate::fuse::notify::Notifier;
use crate::fuse::reply::Reply;
use crate::fuse::request::Op;
use crate::open_files::{Access, Flushes, OpenFiles};
use crate::report::Reporter;

/// What a truncation does to a disk whose size is fixed.
///
/// A program that truncates relies on reading zeroes behind what it then writes (`cp` skips what it takes for
/// zeroes), so it must not be told that it was done when nothing was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truncate {
    /// `EOPNOTSUPP`, and nothing is changed.
    Refuse,
    /// Zeroes what would be cut off, and keeps the size.
    Zero,
}

/// What the kernel's page cache does for files that are opened without O_DIRECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: every read and write is a request.
    None,
    /// It serves reads. A write ends when the source has it.
    Writethrough,
    /// It also keeps writes until fsync, close or memory pressure (`FUSE_WRITEBACK_CACHE`). The kernel then owns the size
    /// and the time stamps.
    Writeback,
}

/// What the user asked of an export.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Writes are allowed; implies that the source allows them.
    pub writable: bool,
    /// A write past the end makes the source longer, and a truncation sets its length. Else the size is fixed.
    pub growable: bool,
    /// What a truncation does where the size is fixed.
    pub truncate: Truncate,
    /// The page cache in front of it.
    pub cache: Cache,
    /// What the page cache holds stays from the last close to the next open: nobody else writes to the source.
    pub keep_cache: bool,
    /// Other users may use the file, as far as its mode lets them.
    pub allow_other: bool,
    /// The file's owner.
    pub uid: u32,
    /// The file's group.
    pub gid: u32,
}

/// The extended attributes of the file. There are no others: what sets or removes one is not answered (ENOSYS), so that the
/// kernel says `EOPNOTSUPP`.
pub const ATTRIBUTE_SOURCE: &CStr = c"user.diskfuse.source";
/// See [`Export::report`].
pub const ATTRIBUTE_STATS: &CStr = c"user.diskfuse.stats";
/// The counters may be so much longer, in bytes, when who has asked for the length asks for the value.
const STATS_GROWTH: usize = 1024;

/// Puts the value of an extended attribute, or the list of names, into the payload if there is `room` for it. Who asks for
/// its length is told `growth` bytes more.
fn xattr(value: &[u8], growth: usize, room: u32, payload: &mut [u8]) -> Result<Reply, Errno> {
    match room as usize {
        0 => Ok(Reply::XattrLen((value.len() + growth) as u32)),
        room if room < value.len() => Err(Errno::ERANGE),
        _ => {
            payload[..value.len()].copy_from_slice(value);
            Ok(Reply::Data(value.len()))
        }
    }
}

/// One exported disk.
pub struct Export<B> {
    backend: Arc<B>,
    capabilities: Capabilities,
    policy: Policy,
    /// Off the data path: `stat`, `chmod` and the like, and the first write in each tick of the clock.
    attributes: Mutex<Attributes>,
    /// The tick that `attributes` has for the last write; 0 if somebody has set the time since. It changes with them only,
    /// so that writers share a cache line which hardly ever changes.
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
    /// A write that its client believes done has failed, and the kernel tells who asks (fsync, close).
    write_back_failed: AtomicBool,
    /// The log has been told that a truncation was refused, and of the cure.
    truncation_refused: AtomicBool,
}

/// With write-back the kernel takes writes past the end of a disk of fixed size, which fail when they get here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SizeExceeded {
    No,
    /// Somebody is at it, and would never hear of it if he went on for ever.
    BeingWritten,
    /// It is over. The kernel has to be given the size back.
    Written,
}

/// What the export itself keeps of a file's attributes.
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    atime: Time,
    mtime: Time,
    ctime: Time,
}

/// Seconds and nanoseconds since 1970.
type Time = (i64, u32);

/// The clock by which the kernel's own file systems tell the time of a write: it takes the time of a tick, and a file that is
/// touched after a write is never the older one.
fn now() -> Time {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    (now.tv_sec, now.tv_nsec as u32)
}

/// One number for each tick of the clock.
fn tick((seconds, nanoseconds): Time) -> u64 {
    (seconds as u64).wrapping_mul(1_000_000_000).wrapping_add(nanoseconds.into())
}

/// How long a truncation waits for the page cache to drop what it has zeroed.
const DROP_LIMIT: Duration = Duration::from_secs(1);

/// The bounds of `st_blksize`, in bytes.
const MIN_BLKSIZE: u32 = 512;
const MAX_BLKSIZE: u32 = 1 << 20;

const WRITE_BITS: u32 = 0o222;
const OTHERS_BITS: u32 = 0o077;
const SPECIAL_BITS: u32 = 0o7000;

impl<B: Backend> Export<B> {
    /// An export of `backend`; its times are the source's to begin with. Once `closed` is set, whoever still has
    /// the file gets EIO: the last flush must come to an end even if the connection does not.
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
            mode: if policy.writable { 0o600 } else { 0o400 },
            uid: policy.uid,
            gid: policy.gid,
            atime: stat.atime,
            mtime: stat.mtime,
            ctime: stat.ctime,
        };
        Ok(Export {
            backend,
            capabilities,
            policy,
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

    /// How the kernel is told of changes that its page cache does not know of; set before the first request.
    pub fn set_notifier(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    /// Where its report comes from; set before the first request.
    pub fn set_reporter(&self, reporter: Reporter) {
        let _ = self.reporter.set(reporter);
    }

    /// What it tells of itself, as one line of JSON. It waits for nobody, whatever the source does.
    pub fn report(&self) -> Option<String> {
        Some(self.reporter.get()?.line(&*self.backend))
    }

    /// With write-back: the kernel has been told the size, and files may be opened.
    pub fn size_is_known(&self) {
        self.size_unknown.store(false, Ordering::SeqCst);
        self.size_told.notify(usize::MAX);
    }

    async fn until_size_is_known(&self) {
        while self.size_unknown.load(Ordering::SeqCst) {
            // Listen first and look again, or the news would be missed.
            let told = self.size_told.listen();
            if self.size_unknown.load(Ordering::SeqCst) {
                told.await;
            }
        }
    }

    /// Who is woken for [`Export::take_exceeded_size`]; set before the first request.
    pub fn set_control(&self, control: Arc<Poller>) {
        let _ = self.control.set(control);
    }

    /// The size, if the kernel has to be given it back: it shows a larger one, for bytes that have no place.
    pub fn take_exceeded_size(&self) -> Option<u64> {
        let mut state = self.size_exceeded();
        if *state != SizeExceeded::Written {
            return None;
        }
        *state = SizeExceeded::No;
        Some(self.backend.size())
    }

    /// The page cache in front of it.
    pub fn cache(&self) -> Cache {
        self.policy.cache
    }

    /// The source of its bytes.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// Whether writes are allowed.
    pub fn writable(&self) -> bool {
        self.policy.writable
    }

    /// Whether its length can change.
    pub fn growable(&self) -> bool {
        self.policy.growable
    }

    /// Whether somebody has the file open, in whatever mount namespace.
    pub fn is_open(&self) -> bool {
        self.open_files.any_open()
    }

    /// Whether a flush has failed: data that a client believes written may be lost, so the exit status
    /// must say so.
    pub fn flush_failed(&self) -> bool {
        self.open_files.any_failure() || self.write_back_failed.load(Ordering::Relaxed)
    }

    /// Carries out `op`. A WRITE's data, and a GETXATTR's name, is at the front of `payload`; a READ's data and an
    /// attribute's value goes there.
    pub async fn handle(&self, lane: &B::Lane, op: Op, payload: &mut [u8]) -> Result<Reply, Errno> {
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
        }
    }

    /// The value of the extended attribute of which `payload` has the name, and how many bytes it may grow soon.
    fn attribute(&self, payload: &[u8]) -> Option<(String, usize)> {
        const LONGEST: usize = 255;
        let name = CStr::from_bytes_until_nul(&payload[..=LONGEST]).ok()?;
        match name {
            _ if name == ATTRIBUTE_SOURCE => Some((self.reporter.get()?.source.clone(), 0)),
            _ if name == ATTRIBUTE_STATS => Some((self.report()?, STATS_GROWTH)),
            _ => None,
        }
    }

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

    /// A write of what the page cache held must be whole: the kernel does not write the rest.
    fn note_write_back(&self, offset: u64, size: u32, written: &Result<Reply, Errno>) {
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

    /// Writes past the end that have gone to the page cache, if there were any, count as over: `ENOSPC` tells of them. The
    /// kernel asks for the attributes before it takes more.
    fn stop_exceeding(&self) -> Result<(), Errno> {
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

    fn size_exceeded(&self) -> MutexGuard<'_, SizeExceeded> {
        self.size_exceeded.lock().expect("no code panics while it holds the state")
    }

    /// Drops from the page cache what was just changed past it.
    ///
    /// The kernel has done so before the change; but a page that somebody has read since then may be older than it, and
    /// only recent kernels do so afterwards as well (6.18 does).
    async fn drop_cached(&self, offset: u64, len: u64) {
        let Some(notifier) = self.notifier.get() else { return };
        if let Err(e) = notifier.invalidate(offset, len).await {
            log::debug!("the page cache keeps {len} bytes at {offset}: {e}");
        }
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

    /// How many of `len` bytes at `offset` lie before the end.
    fn within(&self, offset: u64, len: usize) -> usize {
        (len as u64).min(self.backend.size().saturating_sub(offset)) as usize
    }

    /// The source's size, which others may have changed; `stat` is where that is noticed.
    async fn size_now(&self, lane: &B::Lane) -> Result<u64, Errno> {
        lane.stat().await?;
        Ok(self.backend.size())
    }

    async fn open(&self, lane: &B::Lane, flags: u32) -> Result<Reply, Errno> {
        let writing = flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
        if writing {
            self.check_writable()?;
        }
        // The flag comes only where INIT has promised to mind it (`ATOMIC_O_TRUNC`): where the length can change. Else
        // the kernel sends a SETATTR of size 0 after this, and believes its answer.
        if flags & libc::O_TRUNC as u32 != 0 {
            self.check_writable()?;
            self.truncate(lane, 0).await?;
        }
        self.until_size_is_known().await;
        let direct = flags & libc::O_DIRECT as u32 != 0 || self.policy.cache == Cache::None;
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

    async fn flush(&self, lane: &B::Lane) -> Result<(), Errno> {
        let under_way = self.flushes.begin();
        let flushed = lane.flush().await.map_err(|e| self.flush_has_failed("flush", e));
        drop(under_way);
        // One that began earlier may have met, and used up, the report of what was written before this one.
        self.flushes.told().await;
        flushed
    }

    /// Sees to it that every open file hears of it, and the exit status, if something may be lost.
    fn flush_has_failed(&self, what: &str, error: std::io::Error) -> Errno {
        log::error!("{what}: {error}");
        if error.kind() == std::io::ErrorKind::NotConnected {
            return Errno::from(error);
        }
        let errno = Errno::from(error);
        self.open_files.failed(errno);
        errno
    }

    /// The end, when nobody is served any more: flushes what was written, and takes leave of the source.
    pub fn last_flush(&self, patience: Duration) -> std::io::Result<()> {
        self.backend.last_flush(patience)
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

    /// The disk's size, all of it free: every byte of it can be written. Whether its bytes are in use is known to whoever uses
    /// the disk. With none free df would show a file system that is full for ever, which monitoring takes for an emergency,
    /// and programs that look for room first would not write.
    fn statfs(&self) -> StatfsOut {
        const BLOCK: u32 = 4096;
        let blocks = self.backend.size().div_ceil(u64::from(BLOCK));
        StatfsOut {
            blocks,
            bfree: blocks,
            bavail: blocks,
            files: 1,
            bsize: BLOCK,
            frsize: BLOCK,
            namelen: 255,
            ..Default::default()
        }
    }

    async fn attr(&self, lane: &B::Lane) -> Result<Reply, Errno> {
        // The source's size may have been changed by others; `stat` is where that is noticed.
        let stat = lane.stat().await?;
        let kept = self.attributes();
        let attr = Attr {
            ino: abi::ROOT_ID,
            size: self.backend.size(),
            blocks: stat.allocated_bytes.div_ceil(512),
            atime: kept.atime.0 as u64,
            mtime: kept.mtime.0 as u64,
            ctime: kept.ctime.0 as u64,
            atimensec: kept.atime.1,
            mtimensec: kept.mtime.1,
            ctimensec: kept.ctime.1,
            mode: libc::S_IFREG | kept.mode,
            nlink: 1,
            uid: kept.uid,
            gid: kept.gid,
            // Programs take buffers of that size. A server may prefer up to 2 GiB.
            blksize: self.capabilities.preferred_io_bytes.clamp(MIN_BLKSIZE, MAX_BLKSIZE),
            ..Default::default()
        };
        // A size may change behind the kernel's back, and a stat is cheap. Where it does not, or the kernel owns it, the kernel need
        // not ask before each read and write by the page cache. (After a write it asks for the times.)
        let valid = match self.policy.cache {
            Cache::Writeback => Duration::from_secs(1),
            Cache::Writethrough if self.capabilities.fixed_size => Duration::from_secs(1),
            Cache::None | Cache::Writethrough => Duration::ZERO,
        };
        Ok(Reply::Attr { attr, valid })
    }

    async fn setattr(&self, lane: &B::Lane, change: SetattrIn) -> Result<Reply, Errno> {
        self.check_writable()?;
        let has = |bit| change.valid & bit != 0;
        // All checks first: a change is made whole or not at all.
        if has(fattr::MODE) {
            self.check_mode(change.mode)?;
        }
        if has(fattr::UID) || has(fattr::GID) {
            let kept = self.attributes();
            let uid_changes = has(fattr::UID) && change.uid != kept.uid;
            let gid_changes = has(fattr::GID) && change.gid != kept.gid;
            // Nobody but the owner gets through to the file: giving it away would shut everyone out.
            if (uid_changes || gid_changes) && !self.policy.allow_other {
                return Err(Errno::EPERM);
            }
        }
        if has(fattr::SIZE) {
            self.truncate(lane, change.size).await?;
        }
        {
            let mut kept = self.attributes();
            let now = now();
            kept.ctime = now;
            if has(fattr::MODE) {
                kept.mode = change.mode & 0o777;
            }
            if has(fattr::UID) {
                kept.uid = change.uid;
            }
            if has(fattr::GID) {
                kept.gid = change.gid;
            }
            if has(fattr::ATIME_NOW) {
                kept.atime = now;
            } else if has(fattr::ATIME) {
                kept.atime = (change.atime as i64, change.atimensec);
            }
            if has(fattr::MTIME_NOW) || has(fattr::MTIME) {
                // The next write counts, also within this tick.
                self.written_at.store(0, Ordering::Relaxed);
                kept.mtime = if has(fattr::MTIME_NOW) {
                    now
                } else {
                    (change.mtime as i64, change.mtimensec)
                };
            }
        }
        self.attr(lane).await
    }

    /// Sets the length to `size` bytes, as far as that can be done.
    async fn truncate(&self, lane: &B::Lane, size: u64) -> Result<(), Errno> {
        let now = self.size_now(lane).await?;
        if size == now {
            return Ok(());
        }
        if self.policy.growable {
            i64::try_from(size).map_err(|_| Errno::EFBIG)?;
            lane.resize(size).await?;
        } else if size < now && self.policy.truncate == Truncate::Zero {
            let zeroed = self.zero_whatever_it_takes(lane, size, now - size).await;
            // To the kernel nothing is cut off. It holds what is dirty back until it has the answer, and then would be waited
            // for in vain: that is of a shared mapping, and is written after the zeroes in any case.
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
    async fn zero_whatever_it_takes(
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

    fn check_mode(&self, mode: u32) -> Result<(), Errno> {
        if mode & SPECIAL_BITS != 0 {
            return Err(Errno::EPERM);
        }
        if !self.policy.allow_other && mode & OTHERS_BITS != 0 {
            return Err(Errno::EPERM);
        }
        if !self.policy.writable && mode & WRITE_BITS != 0 {
            return Err(Errno::EROFS);
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if self.policy.writable { Ok(()) } else { Err(Errno::EROFS) }
    }

    fn note_modified(&self) {
        if self.written_at.load(Ordering::Relaxed) == tick(now()) {
            return;
        }
        let mut kept = self.attributes();
        // Read under the lock, the time never goes back.
        let now = now();
        (kept.mtime, kept.ctime) = (now, now);
        self.written_at.store(tick(now), Ordering::Relaxed);
    }

    fn attributes(&self) -> MutexGuard<'_, Attributes> {
        self.attributes.lock().expect("no code panics while it holds the attributes")
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::pin::pin;
    use std::rc::Rc;
    use std::sync::atomic::AtomicUsize;

    use smol::channel::{Receiver, bounded};
    use smol::future::{block_on, poll_once, zip};

    use super::*;
    use crate::backend::{Stat, WaitsFor};
    use crate::io::Io;

    /// A disk that has lost data, and tells the first flush of it, which takes until `told`.
    struct Disk {
        flushes: AtomicUsize,
        told: Receiver<()>,
    }

    impl Backend for Disk {
        type Lane = Arc<Disk>;

        fn lane(self: &Arc<Self>, _: &Rc<Io>) -> io::Result<Arc<Disk>> {
            Ok(self.clone())
        }

        fn capabilities(&self) -> Capabilities {
            Capabilities {
                read_only: false,
                resizable: false,
                allocates: false,
                fixed_size: true,
                preferred_io_bytes: 512,
                waits_for: WaitsFor::Server,
            }
        }

        fn size(&self) -> u64 {
            512
        }

        fn read_at_start(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }

        fn stat(&self) -> io::Result<Stat> {
            Ok(Stat::default())
        }

        fn last_flush(&self, _: Duration) -> io::Result<()> {
            Ok(())
        }
    }

    impl Lane for Arc<Disk> {
        async fn read(&self, _: u64, buf: &mut [u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        async fn write(&self, _: u64, _: &[u8], durable: bool) -> io::Result<()> {
            if durable {
                self.flush().await?;
            }
            Ok(())
        }

        async fn flush(&self) -> io::Result<()> {
            match self.flushes.fetch_add(1, Ordering::Relaxed) {
                0 => {
                    self.told.recv().await.expect("it is told");
                    Err(io::Error::from_raw_os_error(libc::EIO))
                }
                _ => Ok(()),
            }
        }

        async fn zero(&self, _: u64, _: u64, _: Zero) -> io::Result<()> {
            Ok(())
        }

        async fn allocate(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
            Ok(())
        }

        async fn resize(&self, _: u64) -> io::Result<()> {
            Ok(())
        }

        async fn seek(&self, offset: u64, _: Seek) -> io::Result<u64> {
            Ok(offset)
        }

        async fn stat(&self) -> io::Result<Stat> {
            Ok(Stat::default())
        }
    }

    const WRITE: Op =
        Op::Write { handle: 1, offset: 0, size: 512, durable: true, from_cache: false };
    const POLICY: Policy = Policy {
        writable: true,
        growable: false,
        truncate: Truncate::Refuse,
        cache: Cache::None,
        keep_cache: false,
        allow_other: false,
        uid: 0,
        gid: 0,
    };

    /// An fsync that comes while `other` is being told of the loss, and finds none itself.
    fn fsync_beside(other: impl FnOnce(u64) -> Op) {
        let (tell, told) = bounded(1);
        let disk = Arc::new(Disk { flushes: AtomicUsize::new(0), told });
        let export = Export::new(disk.clone(), POLICY, Arc::default()).unwrap();
        block_on(async {
            let flags = libc::O_WRONLY as u32;
            let opened = export.handle(&disk, Op::Open { flags }, &mut []).await;
            let Ok(Reply::Opened { handle, .. }) = opened else { panic!("{opened:?}") };
            let mut payload = [0; 512];
            let mut other = pin!(export.handle(&disk, other(handle), &mut payload));
            assert!(poll_once(&mut other).await.is_none());
            let mut fsync = pin!(export.handle(&disk, Op::Fsync { handle }, &mut []));
            assert!(poll_once(&mut fsync).await.is_none(), "it does not wait");
            tell.send(()).await.unwrap();
            let (other, fsync) = zip(other, fsync).await;
            other.unwrap_err();
            fsync.unwrap_err();
        });
        assert!(export.flush_failed());
    }

    /// What hangs longer than it takes to tell of a loss holds up no other fsync.
    #[test]
    fn a_flush_that_hangs_does_not_hold_up_an_fsync() {
        let (_tell, told) = bounded(1);
        let disk = Arc::new(Disk { flushes: AtomicUsize::new(0), told });
        let export = Export::new(disk.clone(), POLICY, Arc::default()).unwrap();
        block_on(async {
            let mut payload = [0; 512];
            let write = WRITE;
            let mut hangs = pin!(export.handle(&disk, write, &mut payload));
            assert!(poll_once(&mut hangs).await.is_none());
            export.handle(&disk, Op::Fsync { handle: 1 }, &mut []).await.unwrap();
            let mut payload = [0; 512];
            export.handle(&disk, write, &mut payload).await.unwrap();
        });
    }

    #[test]
    fn an_fsync_hears_of_what_a_close_has_met() {
        fsync_beside(|handle| Op::Flush { handle });
    }

    #[test]
    fn an_fsync_hears_of_what_a_durable_write_has_met() {
        fsync_beside(|_| WRITE);
    }
}
