//! The attributes of the file: mode, owner, times, and the extended ones by which it tells of itself.

use std::ffi::CStr;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::{Cache, Export, Policy, Served};
use crate::backend::{Backend, Lane, Stat};
use crate::errno::Errno;
use crate::fuse::abi::{Attr, SetattrIn, StatfsOut, fattr};
use crate::fuse::reply::Reply;

/// The extended attributes of the file. There are no others: what sets or removes one is not
/// answered (ENOSYS), so that the kernel says `EOPNOTSUPP`.
pub const ATTRIBUTE_SOURCE: &CStr = c"user.diskfuse.source";

/// See [`Export::report`].
pub const ATTRIBUTE_STATS: &CStr = c"user.diskfuse.stats";

/// The counters may be so much longer, in bytes, when who has asked for the length asks for the
/// value.
pub(crate) const STATS_GROWTH: usize = 1024;

/// Puts the value of an extended attribute, or the list of names, into the payload if there is
/// `room` for it. Who asks for its length is told `growth` bytes more.
pub(crate) fn xattr(
    value: &[u8],
    growth: usize,
    room: u32,
    payload: &mut [u8],
) -> Result<Reply, Errno> {
    match room as usize {
        0 => Ok(Reply::XattrLen((value.len() + growth) as u32)),
        room if room < value.len() => Err(Errno::ERANGE),
        _ => {
            payload[..value.len()].copy_from_slice(value);
            Ok(Reply::Data(value.len()))
        }
    }
}

/// The name of the extended attribute that is asked for, which a GETXATTR has in its payload.
pub(crate) fn asked_attribute(payload: &[u8]) -> Option<&CStr> {
    const LONGEST: usize = 255;
    CStr::from_bytes_until_nul(&payload[..=LONGEST]).ok()
}

/// So many bytes in so many files, see [`Export::statfs`].
pub(crate) fn statfs(size: u64, files: u64) -> StatfsOut {
    const BLOCK: u32 = 4096;
    let blocks = size.div_ceil(u64::from(BLOCK));
    StatfsOut {
        blocks,
        bfree: blocks,
        bavail: blocks,
        files,
        bsize: BLOCK,
        frsize: BLOCK,
        namelen: 255,
        ..Default::default()
    }
}

/// What the export itself keeps of a file's attributes.
#[derive(Clone, Debug)]
pub struct Attributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) atime: Time,
    pub(super) mtime: Time,
    pub(super) ctime: Time,
}

/// Seconds and nanoseconds since 1970.
pub(super) type Time = (i64, u32);

/// The clock by which the kernel's own file systems tell the time of a write: it takes the time of
/// a tick, and a file that is touched after a write is never the older one.
pub(super) fn now() -> Time {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    (now.tv_sec, now.tv_nsec as u32)
}

/// One number for each tick of the clock.
pub(super) fn tick((seconds, nanoseconds): Time) -> u64 {
    (seconds as u64).wrapping_mul(1_000_000_000).wrapping_add(nanoseconds.into())
}

/// The bounds of `st_blksize`, in bytes.
pub(super) const MIN_BLKSIZE: u32 = 512;

pub(super) const MAX_BLKSIZE: u32 = 1 << 20;

pub(super) const WRITE_BITS: u32 = 0o222;

pub(super) const OTHERS_BITS: u32 = 0o077;

pub(super) const SPECIAL_BITS: u32 = 0o7000;

impl Attributes {
    /// Those of a file that comes into being now.
    pub fn new(policy: &Policy) -> Attributes {
        let now = now();
        Attributes {
            mode: if policy.writable { 0o600 } else { 0o400 },
            uid: policy.uid,
            gid: policy.gid,
            atime: now,
            mtime: now,
            ctime: now,
        }
    }

    /// As `stat` shows them, of a regular file.
    pub fn of_file(&self) -> Attr {
        Attr {
            atime: self.atime.0 as u64,
            mtime: self.mtime.0 as u64,
            ctime: self.ctime.0 as u64,
            atimensec: self.atime.1,
            mtimensec: self.mtime.1,
            ctimensec: self.ctime.1,
            mode: libc::S_IFREG | self.mode,
            nlink: 1,
            uid: self.uid,
            gid: self.gid,
            blksize: 4096,
            ..Default::default()
        }
    }
}

impl<B: Backend> Export<B> {
    /// What it keeps of the file's attributes, now.
    pub fn kept_attributes(&self) -> Attributes {
        self.attributes().clone()
    }

    /// The value of the extended attribute of which `payload` has the name, and how many bytes it
    /// may grow soon.
    pub(super) fn attribute(&self, payload: &[u8]) -> Option<(String, usize)> {
        match asked_attribute(payload)? {
            name if name == ATTRIBUTE_SOURCE => Some((self.reporter.get()?.source.clone(), 0)),
            name if name == ATTRIBUTE_STATS => Some((self.report()?, STATS_GROWTH)),
            _ => None,
        }
    }

    /// The disk's size, all of it free: every byte of it can be written. Whether its bytes are in
    /// use is known to whoever uses the disk. With none free df would show a file system that is
    /// full for ever, which monitoring takes for an emergency, and programs that look for room
    /// first would not write.
    pub(super) fn statfs(&self) -> StatfsOut {
        statfs(self.backend.size(), 1)
    }

    pub(super) async fn attr(&self, lane: &B::Lane) -> Result<Reply, Errno> {
        // The source's size may have been changed by others; `stat` is where that is noticed.
        let stat = lane.stat().await?;
        let (attr, valid) = self.attr_of(stat);
        Ok(Reply::Attr { attr, valid })
    }

    /// What `stat` shows, and for how long that holds, where the source is asked so.
    pub fn attr_of(&self, stat: Stat) -> (Attr, Duration) {
        let attr = Attr {
            ino: self.node,
            size: self.backend.size(),
            blocks: stat.allocated_bytes.div_ceil(512),
            // Programs take buffers of that size. A server may prefer up to 2 GiB.
            blksize: self.capabilities.preferred_io_bytes.clamp(MIN_BLKSIZE, MAX_BLKSIZE),
            ..self.attributes().of_file()
        };
        // A size may change behind the kernel's back, and a stat is cheap. Where it does not, or
        // the kernel owns it, the kernel need not ask before each read and write by the page cache.
        // (After a write it asks for the times.)
        let valid = match self.policy.cache {
            Cache::Writeback => Duration::from_secs(1),
            Cache::Writethrough if self.capabilities.fixed_size => Duration::from_secs(1),
            Cache::None | Cache::Writethrough => Duration::ZERO,
        };
        (attr, valid)
    }

    pub(super) async fn setattr(&self, lane: &B::Lane, change: SetattrIn) -> Result<Reply, Errno> {
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
            // Nobody but the owner gets through to the file: giving it away would shut everyone
            // out.
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

    pub(super) fn check_mode(&self, mode: u32) -> Result<(), Errno> {
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

    pub(super) fn note_modified(&self) {
        if self.written_at.load(Ordering::Relaxed) == tick(now()) {
            return;
        }
        let mut kept = self.attributes();
        // Read under the lock, the time never goes back.
        let now = now();
        (kept.mtime, kept.ctime) = (now, now);
        self.written_at.store(tick(now), Ordering::Relaxed);
    }

    pub(super) fn attributes(&self) -> MutexGuard<'_, Attributes> {
        self.attributes.lock().expect("no code panics while it holds the attributes")
    }
}
