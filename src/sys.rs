//! The system calls that neither the standard library nor rustix has, as thin wrappers over libc:
//! descriptors come back owned, errors as [`io::Error`].
//!
//! The one fact behind most blocks: the arguments are values, or references that live for the call,
//! and the kernel writes nothing beyond what their types hold.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, configure_io_flusher_behavior};

use crate::fuse::abi;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
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

/// How long the connect of a vsock socket may take, whether anybody waits for it or not.
pub fn set_vsock_connect_timeout(socket: &impl AsRawFd, limit: Duration) -> io::Result<()> {
    // include/uapi/linux/vm_sockets.h; libc does not have it.
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;
    let limit = libc::timeval {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: limit.subsec_micros().into(),
    };
    let length = size_of_val(&limit) as libc::socklen_t;
    // SAFETY: the value is as long as it says.
    unsafe {
        let value = (&raw const limit).cast();
        let (fd, level) = (socket.as_raw_fd(), libc::AF_VSOCK);
        let option = SO_VM_SOCKETS_CONNECT_TIMEOUT;
        check(libc::setsockopt(fd, level, option, value, length)).map(drop)
    }
}

/// From now on this thread, when it is woken, waits until whoever runs on its CPU sleeps or has used
/// up its slice, instead of preempting it (`SCHED_BATCH`). An idle CPU takes it at once. Another
/// policy than the usual one was the user's choice (chrt, a unit's CPUSchedulingPolicy), and stays.
pub fn preempt_nobody() -> io::Result<()> {
    // SAFETY: no pointers.
    if check(unsafe { libc::sched_getscheduler(0) })? != libc::SCHED_OTHER {
        return Ok(());
    }
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: it reads one struct.
    check(unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const param) }).map(drop)
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

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
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
    set_byte_lock(file, &byte_lock(libc::F_WRLCK, offset)?)
}

/// Locks one byte together with others who do the same, without waiting.
pub fn share_byte(file: &File, offset: u64) -> io::Result<()> {
    set_byte_lock(file, &byte_lock(libc::F_RDLCK, offset)?)
}

fn set_byte_lock(file: &File, lock: &libc::flock) -> io::Result<()> {
    // SAFETY: the command reads one struct flock.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, lock) }).map(drop)
}

/// Whether somebody else has locked this byte, in either way.
pub fn byte_is_locked(file: &File, offset: u64) -> bool {
    let Ok(mut lock) = byte_lock(libc::F_WRLCK, offset) else { return false };
    // SAFETY: the command reads and writes one struct flock.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    asked == 0 && libc::c_int::from(lock.l_type) != libc::F_UNLCK
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
    let mut options = File::options();
    let options = options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    options.open("/dev/fuse").map(OwnedFd::from)
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
    let path = CString::new(path.as_os_str().as_bytes())?;
    let size = i64::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a C string and a number.
    check(unsafe { libc::truncate(path.as_ptr(), size) }).map(drop)
}

/// Has `fd` stay open in the child that `command` starts: it has no close-on-exec there.
pub fn inherit(command: &mut Command, fd: RawFd) {
    // SAFETY: the closure only calls fcntl, without pointers, which is async-signal-safe.
    unsafe { command.pre_exec(move || check(libc::fcntl(fd, libc::F_SETFD, 0)).map(drop)) };
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
        let fd = OwnedFd::from_raw_fd(check(libc::signalfd(-1, set.as_ptr(), flags))?);
        Ok((fd, SignalsBefore { mask: mask.assume_init(), file_size }))
    }
}

/// Has the child that `command` starts find signals as they were `before`.
pub fn restore_signals(command: &mut Command, before: SignalsBefore) {
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

/// Has the child that `command` starts be no flusher (`PR_SET_IO_FLUSHER`): it is a program like
/// any other.
pub fn end_io_flusher(command: &mut Command) {
    // It was allowed before. If it is not any more, the command runs all the same.
    let end = || configure_io_flusher_behavior(false).or(Ok(()));
    // SAFETY: the closure only makes a system call, which is async-signal-safe.
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

/// Gives the kernel the memory that was freed. glibc keeps large buffers too, once some of their
/// size have been freed: its threshold for mappings of their own adapts.
pub fn trim_heap() {
    // SAFETY: no pointers, and any thread may call it.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
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

/// Stops this process as SIGTSTP does where it is not blocked, until somebody continues it. Where
/// nobody could (`setpgid(2)`: an orphaned process group), nothing happens. Only where SIGTSTP is
/// blocked, and is again afterwards.
pub fn stop() -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that the others read; no handler is installed.
    let errno = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTSTP);
        check(libc::raise(libc::SIGTSTP))?;
        // It is delivered before this returns.
        match libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut()) {
            0 => libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()),
            errno => errno,
        }
    };
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
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
pub fn next_signal(fd: impl AsFd) -> io::Result<Option<Signal>> {
    let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
    match rustix::io::read(fd, &mut info) {
        Ok(_) => {
            // ssi_signo, ssi_errno, ssi_code, ...
            let field = |at: usize| i32::from_ne_bytes([0, 1, 2, 3].map(|i| info[at * 4 + i]));
            Ok(Some(Signal { number: field(0), by_kernel: field(2) == libc::SI_KERNEL }))
        }
        Err(Errno::AGAIN) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// `fork(2)`: the child's number in the parent, none in the child.
///
/// # Safety
/// This process has one thread. Others would be missing in the child, with whatever they had
/// locked, and it could only call what is async-signal-safe until it executes another program.
pub unsafe fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: with one thread, the child is a whole copy, and may do anything.
    Ok(Pid::from_raw(check(unsafe { libc::fork() })?))
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

/// Has `fd` be open as `number` too, also in a program that is executed.
///
/// # Safety
/// Nothing in this process owns `number`.
pub unsafe fn duplicate_to(fd: &impl AsRawFd, number: RawFd) -> io::Result<()> {
    // SAFETY: no pointers; nothing owns what is closed, as the caller promises.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map(drop)
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

    /// The policy of a thread that had `before` and is to preempt nobody.
    fn policy_after(before: libc::c_int) -> libc::c_int {
        let thread = std::thread::spawn(move || {
            let param = libc::sched_param { sched_priority: 0 };
            // SAFETY: it reads one struct.
            check(unsafe { libc::sched_setscheduler(0, before, &raw const param) }).unwrap();
            preempt_nobody().unwrap();
            // SAFETY: no pointers.
            unsafe { libc::sched_getscheduler(0) }
        });
        thread.join().unwrap()
    }

    #[test]
    fn only_the_usual_policy_changes() {
        assert_eq!(policy_after(libc::SCHED_OTHER), libc::SCHED_BATCH);
        assert_eq!(policy_after(libc::SCHED_IDLE), libc::SCHED_IDLE);
    }
}
