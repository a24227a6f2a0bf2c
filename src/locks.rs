//! Locks that a process holds for its life, and that the next one may wait for.
//!
//! `umount` returns before the process behind the mount has ended. In `umount d; diskfuse ... d`
//! the second process finds the locks of the first still held, and has to tell one that is about to
//! end from one that serves. So a process locks a second byte when its end begins ([`say_ending`]).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::sys;

/// How long a process may take to find out that it is unmounted, or the kernel to take a killed
/// one's locks away: I/O in flight holds the file.
const FINDS_OUT: Duration = Duration::from_secs(3);
/// How long an end may take: the last flush has two minutes.
const ENDS: Duration = Duration::from_secs(150);
/// How often the lock is tried.
const RETRY: Duration = Duration::from_millis(10);

/// Locks the byte at `in_use`. `EAGAIN` if another process goes on holding it. Where there are no
/// locks it says so, and does without: they keep a mistake from doing harm, and nothing else
/// depends on them.
pub fn take(file: &File, in_use: u64, ending: u64) -> io::Result<()> {
    when_free(|| sys::lock_byte(file, in_use), || sys::byte_is_locked(file, ending)).or_else(|e| {
        if !has_none(&e) {
            return Err(e);
        }
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let path = path.unwrap_or_default();
        let path = path.display();
        log::warn!("{path}: no locks can be had there ({e}): see to it that it is used once only");
        Ok(())
    })
}

/// What a file system without locks says: NFS without a lock service, and others.
fn has_none(e: &io::Error) -> bool {
    use libc::{EFBIG, EINVAL, ENOLCK, ENOSYS, EOPNOTSUPP, EOVERFLOW};
    // The last two: none so far behind the data (NLM before version 4).
    let none = [ENOLCK, ENOSYS, EOPNOTSUPP, EINVAL, EOVERFLOW, EFBIG];
    e.raw_os_error().is_some_and(|errno| none.contains(&errno))
}

/// This process, which has taken the lock, is about to end.
pub fn say_ending(file: &File, ending: u64) {
    if let Err(e) = sys::lock_byte(file, ending) {
        log::debug!("the end is not announced: {e}");
    }
}

/// Tries until it is not in use any more (`EAGAIN`, `EBUSY`), for as long as an end takes at most.
pub fn when_free<T>(
    mut attempt: impl FnMut() -> io::Result<T>,
    is_ending: impl Fn() -> bool,
) -> io::Result<T> {
    let began = Instant::now();
    loop {
        let result = attempt();
        let in_use = result.as_ref().err().and_then(io::Error::raw_os_error);
        if !matches!(in_use, Some(libc::EAGAIN | libc::EBUSY)) {
            return result;
        }
        let limit = if is_ending() { ENDS } else { FINDS_OUT };
        if began.elapsed() >= limit {
            return result;
        }
        std::thread::sleep(RETRY);
    }
}
