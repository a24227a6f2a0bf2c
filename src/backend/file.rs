//! A local source: a regular file, a block device, or memory.
//!
//! A request is served on its own thread as long as that does not wait: memory always, the page
//! cache where `RWF_NOWAIT` finds the data there. Only what would block goes to the thread's ring
//! or to the pool.
//!
//! With direct I/O (`--direct`) the file is open twice. Requests that are aligned use the O_DIRECT
//! descriptor; the others, and those that touch a last partial block, use the page cache and write
//! it out before they end. The two may not overlap in one block, or the cache could write older
//! neighbours over a direct write: a [`RangeLock`] keeps them apart.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{
    AtFlags, MemfdFlags, SeekFrom, StatxFlags, ioctl_blksszget, memfd_create, seek, statx,
};

pub use self::lane::FileLane;
use super::length::Length;
use super::range_lock::RangeLock;
use super::{Backend, Capabilities, Stat, WaitsFor};
use crate::io::Io;
use crate::{locks, sys};

mod lane;

/// One byte far behind any data stands for "exported writable". Other programs' locks are
/// elsewhere: qemu's tools lock bytes 100 to 299.
const WRITER_LOCK: u64 = i64::MAX as u64 - 1;
/// The byte that says that the export is about to end.
const ENDING_LOCK: u64 = i64::MAX as u64 - 2;

/// How to open a local source.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Never write, and do not ask for permission to.
    pub read_only: bool,
    /// Bypass the page cache.
    pub direct: bool,
    /// Warn if it cannot be written.
    pub wants_writes: bool,
}

/// A local source could not be opened: what, why, and what to do about it.
#[derive(Debug)]
pub struct OpenError(pub String);

impl std::fmt::Display for OpenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OpenError {}

/// Where the bytes are, which says what may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    /// tmpfs and memfd: never waits.
    Memory,
    /// A file system or a block device, through the page cache.
    Cached,
}

/// File systems that answer `stat` of an open file from memory, without asking anybody
/// (linux/magic.h): ext4, XFS, Btrfs, tmpfs, F2FS, ramfs and devtmpfs. Others may be another
/// host's, or another process's.
const STAT_FROM_MEMORY: [i64; 6] =
    [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0xf2f5_2010, 0x8584_58f6];

/// A regular file, a block device or memory.
#[derive(Debug)]
pub struct FileBackend {
    file: Arc<File>,
    direct: Option<Direct>,
    medium: Medium,
    /// Looking at it takes no time.
    stat_from_memory: bool,
    is_device: bool,
    /// Nobody else can see it, and nothing of it lasts.
    is_memory: bool,
    capabilities: Capabilities,
    length: Length,
    unheard: Unheard,
}

/// Whether nobody has heard of an error of a sync. The kernel tells it once, and the client that
/// waits for that may be killed meanwhile: then it is told to the next.
#[derive(Debug, Default)]
struct Unheard(AtomicBool);

impl Unheard {
    /// Whoever still waits for the outcome passes it through [`Unheard::hear`].
    fn note(&self, synced: io::Result<()>) -> io::Result<()> {
        synced.inspect_err(|_| self.0.store(true, Ordering::SeqCst))
    }

    fn hear(&self, synced: io::Result<()>) -> io::Result<()> {
        match (synced, self.0.swap(false, Ordering::SeqCst)) {
            (Ok(()), true) => Err(io::Error::from_raw_os_error(libc::EIO)),
            (synced, _) => synced,
        }
    }
}

/// The second descriptor, for direct I/O.
#[derive(Debug)]
struct Direct {
    /// The kernel tells each open file once of data that was lost, whoever wrote it. No flush is
    /// made by this one.
    file: Arc<File>,
    memory_align: usize,
    offset_align: u64,
    lock: RangeLock,
}

impl FileBackend {
    /// Opens `path`; read-only when that is asked for, or when it is all that the path allows.
    pub fn open(path: &Path, options: Options) -> Result<Arc<FileBackend>, OpenError> {
        let fail = |why: &dyn std::fmt::Display| OpenError(format!("{}: {why}", path.display()));
        let metadata = std::fs::metadata(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                fail(&"no such file or device (an empty disk is made with: truncate -s SIZE FILE)")
            }
            io::ErrorKind::PermissionDenied => fail(&"permission denied on the way to it"),
            _ => fail(&e),
        })?;
        check_type(&metadata).map_err(|why| fail(&why))?;

        // A device that is mounted, or part of an array or a volume group, is claimed exclusively:
        // so are its partitions, whatever node they are opened by. (For a regular file the flag
        // would mean nothing.)
        let claim = if metadata.file_type().is_block_device() { libc::O_EXCL } else { 0 };
        let open = |write: bool, flags: libc::c_int| {
            OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
        };
        let mut read_only = options.read_only;
        // It may have been exported until a moment ago.
        let mut opened = match read_only {
            true => open(false, 0),
            false => locks::when_free(|| open(true, claim), || false),
        };
        if let Some(why) = why_not_writable(&opened)
            && !read_only
        {
            let level = if options.wants_writes { log::Level::Warn } else { log::Level::Info };
            log::log!(
                level,
                "{}: shown read-only, it cannot be written: {why} (make it writable, or say -o ro)",
                path.display()
            );
            read_only = true;
            opened = open(false, 0);
        }
        let file = opened.map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => {
                fail(&"permission denied: it must be readable by the user who exports it")
            }
            io::ErrorKind::ResourceBusy => fail(
                &"in use (mounted, a part of an array or a volume group, or already exported writable): end that, or use -r",
            ),
            _ => fail(&e),
        })?;
        if !read_only {
            locks::take(&file, WRITER_LOCK, ENDING_LOCK).map_err(|e| match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => {
                    fail(&"already exported writable; end that export, or use -r")
                }
                _ => fail(&format!("cannot be locked: {e}")),
            })?;
        }
        let direct = options.direct.then(|| Direct::open(&file, read_only)).transpose();
        let direct = direct.map_err(|e| fail(&e))?;
        let backend = FileBackend::new(file, direct, read_only).map_err(|e| fail(&e))?;
        backend.check_end(path, options.read_only).map_err(|why| fail(&why))?;
        Ok(Arc::new(backend))
    }

    /// `size` bytes of sparse memory.
    pub fn memory(size: u64, read_only: bool) -> Result<Arc<FileBackend>, OpenError> {
        let make = || {
            let file = File::from(memfd_create("diskfuse", MemfdFlags::CLOEXEC)?);
            file.set_len(size)?;
            let backend = FileBackend::new(file, None, read_only)?;
            io::Result::Ok(FileBackend { is_memory: true, ..backend })
        };
        make().map(Arc::new).map_err(|e| OpenError(format!("mem:{size}: {e}")))
    }

    /// A block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// What it is, in a word or two.
    pub fn kind(&self) -> &'static str {
        match (self.is_device, self.is_memory) {
            (true, _) => "block device",
            (_, true) => "memory",
            _ => "file",
        }
    }

    fn new(file: File, direct: Option<Direct>, read_only: bool) -> io::Result<FileBackend> {
        const TMPFS_MAGIC: i64 = 0x0102_1994;
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        let file_system = rustix::fs::fstatfs(&file)?.f_type;
        let in_memory = !is_device && file_system == TMPFS_MAGIC;
        let size = size_of(&file, &metadata)?;
        let preferred = match &direct {
            Some(direct) => (metadata.blksize() as u32).max(direct.offset_align as u32),
            None => metadata.blksize() as u32,
        };
        Ok(FileBackend {
            file: Arc::new(file),
            medium: if in_memory { Medium::Memory } else { Medium::Cached },
            stat_from_memory: STAT_FROM_MEMORY.contains(&file_system),
            is_device,
            is_memory: false,
            capabilities: Capabilities {
                read_only,
                resizable: !is_device && !read_only,
                allocates: !is_device && !read_only,
                fixed_size: false,
                preferred_io_bytes: preferred,
                waits_for: if direct.is_some() { WaitsFor::Disk } else { WaitsFor::Memory },
            },
            direct,
            unheard: Unheard::default(),
            length: Length::new(size),
        })
    }

    /// One thread's own opening of `file`, or the common one if there can be none. The kernel
    /// counts each call in what is open, so threads that use a common one take turns with that
    /// counter. What was written is flushed and its errors are found by either.
    fn for_one_thread(&self, file: &Arc<File>, flags: libc::c_int) -> Arc<File> {
        let open = |flags| open_again(file, self.capabilities.read_only, flags);
        // Not for every owner. After a write the next read would update the image's inode; the
        // export has times of its own.
        let own = open(flags | libc::O_NOATIME).or_else(|_| open(flags));
        own.map(Arc::new).unwrap_or_else(|e| {
            log::debug!("the source cannot be opened again: {e}");
            file.clone()
        })
    }

    /// A source that says it has bytes where none can be read would give errors later, in the
    /// middle of somebody's work. Who asks for nothing but reads may be after what can be read of a
    /// disk that fails.
    fn check_end(&self, path: &Path, is_rescue: bool) -> Result<(), String> {
        let size = self.size();
        if size == 0 {
            return Ok(());
        }
        let mut last = [0];
        // By one that leaves the access time alone.
        let file = self.for_one_thread(&self.file, 0);
        match file.read_at(&mut last, size - 1) {
            Ok(1) => Ok(()),
            Ok(_) => Err(format!(
                "shorter than it claims: no byte can be read at {}, the last of {size} (is it a disk image?)",
                size - 1
            )),
            Err(e) if is_rescue => {
                let path = path.display();
                log::warn!(
                    "{path}: the last of its {size} bytes cannot be read, perhaps others: {e}"
                );
                Ok(())
            }
            Err(e) => Err(format!(
                "the last of its {size} bytes cannot be read: {e} (what can be is served with -r)"
            )),
        }
    }
}

/// Opens the very file that is open already, whatever its path means by now.
fn open_again(file: &File, read_only: bool, flags: libc::c_int) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)
}

/// Why what was opened for writing cannot be written, if it is that.
pub fn why_not_writable(opened: &io::Result<File>) -> Option<String> {
    match opened {
        Ok(file) => sys::is_read_only_device(file).then(|| "the device is read-only".into()),
        Err(e) => matches!(
            e.raw_os_error(),
            Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY)
        )
        .then(|| e.to_string()),
    }
}

/// In bytes, of a file or a block device.
fn size_of(file: &File, metadata: &Metadata) -> io::Result<u64> {
    match metadata.file_type().is_block_device() {
        // Nobody else uses the position.
        true => Ok(seek(file, SeekFrom::End(0))?),
        false => Ok(metadata.len()),
    }
}

fn check_type(metadata: &Metadata) -> Result<(), &'static str> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else if kind.is_dir() {
        Err("is a directory: a disk image or a block device is wanted")
    } else {
        Err("is neither a regular file nor a block device")
    }
}

impl Direct {
    fn open(file: &File, read_only: bool) -> Result<Direct, String> {
        let direct = open_again(file, read_only, libc::O_DIRECT)
            .map_err(|e| format!("no direct I/O here ({e}): leave out --direct"))?;
        let (memory_align, offset_align) = match direct_io_alignment(&direct) {
            Some((0, _) | (_, 0)) => {
                return Err("its file system has no direct I/O: leave out --direct".into());
            }
            Some((memory, offset)) => (memory, offset),
            // Before Linux 6.1: a device's block size, or what satisfies every file system.
            None => match ioctl_blksszget(&direct) {
                Ok(size) => (size, size),
                Err(_) => (4096, 4096),
            },
        };
        Ok(Direct {
            file: Arc::new(direct),
            memory_align: memory_align as usize,
            offset_align: u64::from(offset_align),
            lock: RangeLock::default(),
        })
    }

    /// Whether this range of this memory can be direct, in a file of `size` bytes whose last
    /// partial block cannot.
    fn fits(&self, offset: u64, memory: &[u8], size: u64) -> bool {
        let len = memory.len() as u64;
        offset.is_multiple_of(self.offset_align)
            && len.is_multiple_of(self.offset_align)
            && (memory.as_ptr() as usize).is_multiple_of(self.memory_align)
            && (size.is_multiple_of(self.offset_align)
                || offset + len <= size - size % self.offset_align)
    }

    /// The pages that a range touches: what the page cache would write.
    fn pages(offset: u64, len: u64) -> std::ops::Range<u64> {
        const PAGE: u64 = 64 << 10; // the largest page of any Linux machine
        offset / PAGE * PAGE..(offset + len).div_ceil(PAGE) * PAGE
    }
}

impl Backend for FileBackend {
    type Lane = FileLane;

    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> io::Result<FileLane> {
        Ok(FileLane {
            backend: self.clone(),
            io: io.clone(),
            file: self.for_one_thread(&self.file, 0),
            direct_file: self
                .direct
                .as_ref()
                .map(|direct| self.for_one_thread(&direct.file, libc::O_DIRECT)),
        })
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn size(&self) -> u64 {
        self.length.get()
    }

    fn read_at_start(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // By one that leaves the access time alone.
        self.for_one_thread(&self.file, 0).read_exact_at(buf, offset)
    }

    fn sector_bytes(&self) -> Option<u32> {
        self.is_device.then(|| ioctl_blksszget(&self.file).ok()).flatten()
    }

    fn stat(&self) -> io::Result<Stat> {
        // A device's changes too: lvextend, losetup -c.
        let look = || {
            let metadata = self.file.metadata()?;
            let size = size_of(&self.file, &metadata)?;
            io::Result::Ok((metadata, size))
        };
        let (metadata, size) = self.length.look(look, |(_, size)| *size)?;
        let allocated = if self.is_device { size } else { metadata.blocks() * 512 };
        Ok(Stat {
            allocated_bytes: allocated,
            atime: (metadata.atime(), metadata.atime_nsec() as u32),
            mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
            ctime: (metadata.ctime(), metadata.ctime_nsec() as u32),
        })
    }

    fn last_flush(&self, _patience: Duration) -> io::Result<()> {
        if self.capabilities.read_only {
            // Nothing was written, and a sync may tell of what others have lost.
            return Ok(());
        }
        if !self.is_memory {
            locks::say_ending(&self.file, ENDING_LOCK);
        }
        self.unheard.hear(self.file.sync_all())
    }
}

/// The alignment that direct I/O needs on this file, for memory and for offsets, in bytes (Linux
/// 6.1); none where the kernel does not say, zeroes where direct I/O is not to be had.
fn direct_io_alignment(file: &File) -> Option<(u32, u32)> {
    let stat = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    told.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of /proc has nothing to sync, and says so.
    #[test]
    fn what_is_read_only_is_not_synced() {
        let options = Options { read_only: true, ..Options::default() };
        let backend = FileBackend::open(Path::new("/proc/self/status"), options).unwrap();
        assert!(backend.file.sync_all().is_err());
        backend.last_flush(Duration::ZERO).unwrap();
    }

    #[test]
    fn an_error_that_nobody_has_heard_is_told_by_the_next_sync_once() {
        let unheard = Unheard::default();
        let failed = || Err(io::Error::from_raw_os_error(libc::ENOSPC));
        let errno = |synced: io::Result<()>| synced.err().and_then(|e| e.raw_os_error());
        let heard = unheard.note(failed());
        assert_eq!(errno(unheard.hear(heard)), Some(libc::ENOSPC));
        assert_eq!(errno(unheard.hear(unheard.note(Ok(())))), None);
        let _killed = unheard.note(failed());
        assert_eq!(errno(unheard.hear(unheard.note(Ok(())))), Some(libc::EIO));
        assert_eq!(errno(unheard.hear(unheard.note(Ok(())))), None);
    }
}
