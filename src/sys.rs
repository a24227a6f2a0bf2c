//! Thin wrappers over libc: descriptors come back owned, errors as [`io::Error`].
//!
//! The one fact behind most blocks: the arguments are values, or references that live for the call,
//! and the kernel writes nothing beyond what their types hold.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use crate::fuse::abi;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_len(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// # Safety
/// `fd` must be a descriptor that nobody else owns.
unsafe fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: the caller's promise.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// A path's file system type, as `statfs(2)` reports it (`TMPFS_MAGIC` and so on).
pub fn file_system_magic(file: &File) -> io::Result<i64> {
    let mut stat = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `stat` has room for the structure, and zeroes are a valid one.
    let stat = unsafe {
        check(libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()))?;
        stat.assume_init()
    };
    Ok(stat.f_type as i64)
}

/// A file in memory, sparse and of size zero.
pub fn memfd(name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: the name is a C string; a descriptor that memfd_create returns is ours.
    unsafe { Ok(File::from(owned(check(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC))?))) }
}

/// Ends a TCP connection at once, by a reset: what was not sent yet stays unsent, however many
/// descriptors there are. Fails on a socket of another kind.
pub fn reset_connection(socket: &impl AsRawFd) -> io::Result<()> {
    let to = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of_val(&to) as libc::socklen_t;
    // SAFETY: the address is as long as it says.
    unsafe { check(libc::connect(socket.as_raw_fd(), &to, length)).map(drop) }
}

/// Bounds the growing pauses between retransmissions, and between probes of a closed window. Since
/// Linux 6.15.
pub fn set_tcp_longest_pause(socket: &impl AsRawFd, pause: Duration) -> io::Result<()> {
    // include/uapi/linux/tcp.h; libc does not have it yet.
    const TCP_RTO_MAX_MS: libc::c_int = 44;
    let ms = libc::c_int::try_from(pause.as_millis()).unwrap_or(libc::c_int::MAX);
    let length = size_of_val(&ms) as libc::socklen_t;
    // SAFETY: the value is as long as it says.
    unsafe {
        let value = (&raw const ms).cast();
        let fd = socket.as_raw_fd();
        check(libc::setsockopt(fd, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, value, length)).map(drop)
    }
}

/// A descriptor that adds up wake-ups; not blocking.
pub fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor is ours.
    unsafe { Ok(owned(check(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK))?)) }
}

/// Reads into `buf`.
pub fn read(fd: &impl AsRawFd, buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buf` has room for its length.
    check_len(unsafe { libc::read(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) })
}

/// Writes `data`, possibly less than all of it.
pub fn write(fd: &impl AsRawFd, data: &[u8]) -> io::Result<usize> {
    // SAFETY: `data` is readable for its length.
    check_len(unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) })
}

/// Writes `head` and `data` in one call.
pub fn write_two(fd: &impl AsRawFd, head: &[u8], data: &[u8]) -> io::Result<usize> {
    let part = |d: &[u8]| libc::iovec { iov_base: d.as_ptr() as *mut _, iov_len: d.len() };
    let parts = [part(head), part(data)];
    // SAFETY: both parts are readable for their lengths, and writev does not write to them.
    check_len(unsafe { libc::writev(fd.as_raw_fd(), parts.as_ptr(), 2) })
}

/// Reads at `offset` only what needs no waiting; `EAGAIN` otherwise, `EOPNOTSUPP` where the file
/// system cannot tell.
pub fn read_at_nowait(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: the one part is writable for its length.
    check_len(unsafe {
        libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset as i64, libc::RWF_NOWAIT)
    })
}

/// Writes at `offset` only what needs no waiting; errors as for [`read_at_nowait`].
pub fn write_at_nowait(file: &File, data: &[u8], offset: u64) -> io::Result<usize> {
    let part = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    // SAFETY: the one part is readable for its length, and pwritev2 does not write to it.
    check_len(unsafe {
        libc::pwritev2(file.as_raw_fd(), &raw const part, 1, offset as i64, libc::RWF_NOWAIT)
    })
}

/// Writes dirty pages of the range to the device and waits for them (not a durability guarantee).
pub fn write_out(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: no pointers.
    check(unsafe { libc::sync_file_range(file.as_raw_fd(), offset as i64, len as i64, flags) })
        .map(drop)
}

/// `fallocate(2)`
pub fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (signed(offset)?, signed(len)?);
    // SAFETY: no pointers.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }).map(drop)
}

/// `lseek(2)`; the file position itself is used by nobody.
pub fn lseek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    // SAFETY: no pointers.
    let at = unsafe { libc::lseek(file.as_raw_fd(), signed(offset)?, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// A block device's size in bytes (`BLKGETSIZE64`).
pub fn block_device_size(file: &File) -> io::Result<u64> {
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    let mut size = 0_u64;
    // SAFETY: the request writes one u64.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Whether a block device is switched to read-only (`BLKROGET`): it may be opened for writing all
/// the same.
pub fn is_read_only_device(file: &File) -> bool {
    const BLKROGET: libc::c_ulong = 0x125e;
    let mut read_only: libc::c_int = 0;
    // SAFETY: the request writes one int. A file that is no block device refuses it.
    let asked = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut read_only) };
    asked == 0 && read_only != 0
}

/// A block device's logical block size in bytes (`BLKSSZGET`).
pub fn logical_block_size(file: &File) -> io::Result<u32> {
    const BLKSSZGET: libc::c_ulong = 0x1268;
    let mut size: libc::c_int = 0;
    // SAFETY: the request writes one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut size) })?;
    u32::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The alignment that direct I/O needs on this file, for memory and for offsets, in bytes
/// (`STATX_DIOALIGN`, Linux 6.1); none where the kernel does not say, zeroes where direct I/O is
/// not to be had.
pub fn direct_io_alignment(file: &File) -> Option<(u32, u32)> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor itself; zeroes are a valid
    // statx.
    let stat = unsafe {
        check(libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        ))
        .ok()?;
        stat.assume_init()
    };
    (stat.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// An open-file-description lock of one byte.
fn byte_lock(kind: libc::c_int, offset: u64) -> io::Result<libc::flock> {
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: signed(offset)?,
        l_len: 1,
        l_pid: 0,
    })
}

/// Locks one byte for writing, without waiting. `EAGAIN`: somebody has it.
pub fn lock_byte(file: &File, offset: u64) -> io::Result<()> {
    let lock = byte_lock(libc::F_WRLCK, offset)?;
    // SAFETY: the command reads one struct flock.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// Locks one byte together with others who do the same, without waiting.
pub fn share_byte(file: &File, offset: u64) -> io::Result<()> {
    let lock = byte_lock(libc::F_RDLCK, offset)?;
    // SAFETY: the command reads one struct flock.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// Whether somebody else has locked this byte, in either way.
pub fn byte_is_locked(file: &File, offset: u64) -> bool {
    let Ok(mut lock) = byte_lock(libc::F_WRLCK, offset) else { return false };
    // SAFETY: the command reads and writes one struct flock.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    asked == 0 && libc::c_int::from(lock.l_type) != libc::F_UNLCK
}

/// Sets `O_NONBLOCK`.
pub fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)).map(drop)
    }
}

/// A further descriptor of the FUSE connection that `session` belongs to (`FUSE_DEV_IOC_CLONE`).
pub fn clone_fuse_device(session: &impl AsRawFd) -> io::Result<OwnedFd> {
    let device = open_fuse_device()?;
    let session = session.as_raw_fd();
    // SAFETY: the request reads one u32, the session's descriptor.
    check(unsafe { libc::ioctl(device.as_raw_fd(), abi::DEV_IOC_CLONE, &raw const session) })?;
    Ok(device)
}

/// Opens /dev/fuse, not blocking.
pub fn open_fuse_device() -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the path is a C string; the descriptor is ours.
    unsafe { Ok(owned(check(libc::open(c"/dev/fuse".as_ptr(), flags))?)) }
}

/// `mount(2)`
pub fn mount(
    source: &CStr,
    target: &Path,
    kind: &CStr,
    flags: libc::c_ulong,
    data: &CStr,
) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: five C strings and a number.
    check(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    })
    .map(drop)
}

/// Makes one mount read-only, or writable again: that of `file`, whose root it is
/// (`mount_setattr(2)`, Linux 5.12).
pub fn set_mount_read_only(file: &impl AsRawFd, read_only: bool) -> io::Result<()> {
    let (mut set, mut clear) = (libc::MOUNT_ATTR_RDONLY, 0);
    if !read_only {
        std::mem::swap(&mut set, &mut clear);
    }
    let attr = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    let (fd, flags) = (file.as_raw_fd(), libc::AT_EMPTY_PATH);
    let size = size_of_val(&attr);
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor itself; the kernel reads `size`
    // bytes of `attr`.
    let result = unsafe {
        libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, &raw const attr, size)
    };
    check(result as libc::c_int).map(drop)
}

/// `truncate(2)`: sets the length of a file without opening it.
pub fn truncate(path: &Path, size: u64) -> io::Result<()> {
    let path = c_path(path)?;
    let size = i64::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a C string and a number.
    check(unsafe { libc::truncate(path.as_ptr(), size) }).map(drop)
}

/// `umount2(2)`; symbolic links are not followed.
pub fn umount(target: &Path, flags: libc::c_int) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: a C string and a number.
    check(unsafe { libc::umount2(target.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) }).map(drop)
}

/// Whether the FUSE connection behind `device` has ended: /dev/fuse polls `POLLERR` then.
pub fn connection_ended(device: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd { fd: device.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one pollfd, and no waiting.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 && poll.revents & libc::POLLERR != 0 }
}

/// Waits until `fd` polls readable (or an error), for so long at most; whether it does.
pub fn wait_readable(fd: &impl AsRawFd, timeout: std::time::Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let timeout_ms = timeout.as_millis().clamp(1, i32::MAX as u128) as i32;
    // SAFETY: one pollfd.
    match check(unsafe { libc::poll(&raw mut poll, 1, timeout_ms) }) {
        Ok(ready) => Ok(ready > 0),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(true),
        Err(e) => Err(e),
    }
}

/// Receives one byte with a descriptor attached (`SCM_RIGHTS`), as fusermount3 sends it. None when
/// the other side closed without sending one.
pub fn receive_fd(socket: &impl AsRawFd) -> io::Result<Option<OwnedFd>> {
    let mut byte = 0_u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // u64s, for the alignment of cmsghdr; room for one descriptor and more than the macros ask.
    let mut control = [0_u64; 8];
    // SAFETY: all of the header's pointers stay valid for the call, with the lengths given; the
    // control macros walk only what the kernel filled in; a descriptor received is ours.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        loop {
            let got = libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC);
            match check_len(got) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
                Ok(_) => break,
            }
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null()
            || (*header).cmsg_level != libc::SOL_SOCKET
            || (*header).cmsg_type != libc::SCM_RIGHTS
        {
            return Ok(None);
        }
        Ok(Some(owned(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned())))
    }
}

/// Clears close-on-exec, in a child between fork and exec: it is async-signal-safe.
pub fn keep_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }).map(drop)
}

/// Has `fd` stay open in the child that `command` starts.
pub fn inherit(command: &mut std::process::Command, fd: RawFd) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure only calls fcntl, which is async-signal-safe.
    unsafe { command.pre_exec(move || keep_on_exec(fd)) };
}

/// How signals were when this process was started, for a command that it starts in turn.
#[derive(Clone, Copy)]
pub struct SignalsBefore {
    mask: libc::sigset_t,
    /// What SIGXFSZ did.
    file_size: libc::sighandler_t,
}

/// Blocks `signals` in this thread and all threads that it starts, and returns a descriptor that
/// reads them (`signalfd(2)`), not blocking. SIGXFSZ is ignored from then on: a write past the file
/// size limit is to fail, not to kill the program. Also says how all of that was before.
pub fn signal_fd(signals: &[libc::c_int]) -> io::Result<(OwnedFd, SignalsBefore)> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    let mut mask = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that the others read, and pthread_sigmask the former
    // mask; no handler is installed; the descriptor is ours.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), mask.as_mut_ptr()) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        let file_size = libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        if file_size == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        let fd = owned(check(libc::signalfd(-1, set.as_ptr(), flags))?);
        Ok((fd, SignalsBefore { mask: mask.assume_init(), file_size }))
    }
}

/// Has the child that `command` starts find signals as they were `before`.
pub fn restore_signals(command: &mut std::process::Command, before: SignalsBefore) {
    use std::os::unix::process::CommandExt;
    let restore = move || {
        // SAFETY: both are async-signal-safe; the mask is a valid one, and what SIGXFSZ did is no
        // handler of another program.
        unsafe {
            libc::signal(libc::SIGXFSZ, before.file_size);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &before.mask, std::ptr::null_mut()) {
                0 => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    };
    // SAFETY: see above; it allocates nothing.
    unsafe { command.pre_exec(restore) };
}

/// From linux/prctl.h (Linux 5.6); libc has none of them.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
const PR_GET_IO_FLUSHER: libc::c_int = 58;

/// Tells the kernel that this thread, and all that it starts from now on, write out pages of other
/// programs: while they allocate memory, or make pages dirty themselves, they are not to wait for
/// those pages, which would wait for them (`PR_SET_IO_FLUSHER`). Whether that is new: it is
/// inherited, also by a program that is executed. `EPERM` without CAP_SYS_RESOURCE, `EINVAL` before
/// Linux 5.6.
pub fn become_io_flusher() -> io::Result<bool> {
    let none: libc::c_ulong = 0;
    // SAFETY: no pointers.
    let before = check(unsafe { libc::prctl(PR_GET_IO_FLUSHER, none, none, none, none) })?;
    set_io_flusher(true)?;
    Ok(before == 0)
}

fn set_io_flusher(on: bool) -> io::Result<()> {
    let none: libc::c_ulong = 0;
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(PR_SET_IO_FLUSHER, libc::c_ulong::from(on), none, none, none) })
        .map(drop)
}

/// Has the child that `command` starts be no flusher ([`become_io_flusher`]): it is a program like
/// any other.
pub fn end_io_flusher(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // It was allowed before. If it is not any more, the command runs all the same.
    let end = || set_io_flusher(false).or(Ok(()));
    // SAFETY: the closure only calls prctl, which is async-signal-safe.
    unsafe { command.pre_exec(end) };
}

/// Whether `signal` does what it does by default: neither ignored, as by nohup(1), nor handled.
pub fn is_default(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is changed; `action` has room for the structure, and zeroes are a valid one.
    unsafe {
        let asked = libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        asked == 0 && action.assume_init().sa_sigaction == libc::SIG_DFL
    }
}

/// The size of a page in bytes.
pub fn page_size() -> io::Result<u64> {
    // SAFETY: no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).map_err(|_| io::Error::last_os_error())
}

/// Gives the kernel the memory that was freed. glibc keeps large buffers too, once some of their
/// size have been freed: its threshold for mappings of their own adapts.
pub fn trim_heap() {
    // SAFETY: no pointers, and any thread may call it.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Sees to it that `wanted` files can be open at once, as far as the hard limit (`RLIMIT_NOFILE`)
/// allows. How many can be.
pub fn allow_open_files(wanted: u64) -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both only read or fill in the structure.
    unsafe {
        check(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit))?;
        let needed = wanted.min(limit.rlim_max);
        if needed > limit.rlim_cur {
            limit.rlim_cur = needed;
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &limit))?;
        }
    }
    Ok(limit.rlim_cur)
}

/// Watches `source` with `poller`. The caller deletes it from the poller before either is closed,
/// which is polling's rule.
pub fn watch(
    poller: &polling::Poller,
    source: &impl AsRawFd,
    interest: polling::Event,
) -> io::Result<()> {
    // SAFETY: epoll copes with a source that is closed first: it forgets it. So not even a caller
    // that breaks the rule can do worse than lose events.
    unsafe { poller.add(source.as_raw_fd(), interest) }
}

/// A signal that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// `SIGINT` and so on
    pub number: libc::c_int,
    /// The kernel sent it (`SI_KERNEL`): for a terminal's Ctrl-C, a timer or a limit.
    pub by_kernel: bool,
}

/// The next signal of a [`signal_fd`], if one is pending.
pub fn next_signal(fd: &impl AsRawFd) -> io::Result<Option<Signal>> {
    let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
    match read(fd, &mut info) {
        Ok(_) => {
            // ssi_signo, ssi_errno, ssi_code, ...
            let field = |at: usize| i32::from_ne_bytes([0, 1, 2, 3].map(|i| info[at * 4 + i]));
            Ok(Some(Signal { number: field(0), by_kernel: field(2) == libc::SI_KERNEL }))
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

/// The effective user and group.
pub fn effective_ids() -> (u32, u32) {
    // SAFETY: these calls have no arguments and cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Where a thread may run.
#[derive(Clone)]
pub struct CpuSet(libc::cpu_set_t);

impl CpuSet {
    /// Where this thread may run now.
    pub fn current() -> io::Result<CpuSet> {
        let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
        // SAFETY: the call fills the set; zeroes are a valid one.
        unsafe {
            check(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()))?;
            Ok(CpuSet(set.assume_init()))
        }
    }

    /// Whether `cpu` is in it.
    pub fn contains(&self, cpu: usize) -> bool {
        // SAFETY: CPU_ISSET reads the set, and answers no for a number beyond it.
        cpu < libc::CPU_SETSIZE as usize && unsafe { libc::CPU_ISSET(cpu, &self.0) }
    }
}

/// `fork(2)`: the child's number in the parent, none in the child.
///
/// # Safety
/// This process has one thread. Others would be missing in the child, with whatever they had
/// locked, and it could only call what is async-signal-safe until it executes another program.
pub unsafe fn fork() -> io::Result<Option<libc::pid_t>> {
    // SAFETY: with one thread, the child is a whole copy, and may do anything.
    let pid = check(unsafe { libc::fork() })?;
    Ok((pid > 0).then_some(pid))
}

/// Closes all descriptors that were inherited, but for the standard streams and those `kept`.
///
/// # Safety
/// Nothing in this process owns another one.
pub unsafe fn close_inherited(kept: &[RawFd]) -> io::Result<()> {
    let number =
        |entry: io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    // The list's own is closed by its end.
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?.filter_map(number).collect();
    for fd in open.into_iter().filter(|fd| *fd > libc::STDERR_FILENO && !kept.contains(fd)) {
        // SAFETY: no pointers; nobody here owns it, as the caller promises.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Waits for a child to end, and gives its exit status as a shell has it: 128 and the signal that
/// killed it.
pub fn wait_for(child: libc::pid_t) -> io::Result<u8> {
    let mut status = 0;
    loop {
        // SAFETY: the call writes one int.
        match check(unsafe { libc::waitpid(child, &raw mut status, 0) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
            Ok(_) if libc::WIFEXITED(status) => return Ok(libc::WEXITSTATUS(status) as u8),
            Ok(_) => return Ok(128 + libc::WTERMSIG(status) as u8),
        }
    }
}

/// Sends a signal.
pub fn kill(process: u32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::kill(process as libc::pid_t, signal) }).map(drop)
}

/// Leaves the session and its terminal (`setsid(2)`).
pub fn new_session() -> io::Result<()> {
    // SAFETY: no arguments.
    check(unsafe { libc::setsid() }).map(drop)
}

/// Has `fd` be open as `number` too, also in a program that is executed. Nothing of this process
/// may own that number.
pub fn duplicate_to(fd: &impl AsRawFd, number: RawFd) -> io::Result<()> {
    // SAFETY: no pointers; nothing owns what is closed.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map(drop)
}

/// Points the three standard streams at /dev/null.
pub fn standard_streams_to_null() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for stream in 0..=2 {
        // SAFETY: no pointers; the three are never owned by anything that closes them.
        check(unsafe { libc::dup2(null.as_raw_fd(), stream) })?;
    }
    Ok(())
}

/// Has messages to the system's log tell the program and its process.
pub fn open_syslog() {
    // SAFETY: the name is kept, and lives for ever.
    unsafe { libc::openlog(c"diskfuse".as_ptr(), libc::LOG_PID, libc::LOG_DAEMON) };
}

/// One message to the system's log, of a priority as syslog(3) has them.
pub fn syslog(priority: libc::c_int, message: &str) {
    let Ok(message) = CString::new(message.replace('\0', "?")) else { return };
    // SAFETY: the format takes one C string, and there is one.
    unsafe { libc::syslog(libc::LOG_DAEMON | priority, c"%s".as_ptr(), message.as_ptr()) };
}

/// Ends the process without running destructors: the kernel closes everything.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` takes a value and does not return.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_run_somewhere() {
        let set = CpuSet::current().unwrap();
        assert!((0..1024).any(|cpu| set.contains(cpu)) && !set.contains(100_000));
    }
}
