//! Mounting on a regular file, or an empty directory, and leaving no trace of it.
//!
//! root mounts by mount(2); everybody else asks `fusermount3`. [`Mountpoint::prepare`] makes all
//! the checks that can fail before anything is changed, [`Mountpoint::mount`] gives a [`Mount`],
//! and that one unmounts when dropped, whatever happens in between.
//!
//! Nothing here asks whoever serves a file: this process may be the one, and other diskfuses come
//! and go in the same place. What is there is looked at without I/O, and told from what else could
//! be there by numbers that are never given out twice.

mod calls;
pub mod errands;
pub mod mountpoint;
pub mod place;
pub mod table;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags};
use rustix::thread::LinkNameSpaceType;

use crate::mount::errands::{Errand, Running};
use crate::mount::place::{Place, Seen};
use crate::sys;

use calls::helper_unmount;
pub use mountpoint::Mountpoint;
use table::{Entry, MOUNTINFO, entries, entries_above, entries_at, mountinfo_entry};

/// The file system type that `mount` and mountinfo show.
pub const FS_TYPE: &str = "fuse.diskfuse";

/// Why there is no mount: what, why, and what to do about it.
#[derive(Debug)]
pub struct MountError(String);

impl std::fmt::Display for MountError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for MountError {}

/// What is mounted, and on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One file, on a regular file.
    File,
    /// A directory, on an empty one.
    Directory,
}

/// How to mount.
#[derive(Clone, Debug)]
pub struct Options {
    /// What `mount` shows as the source.
    pub source: String,
    /// Nothing can be written.
    pub read_only: bool,
    /// Other users may use the file, as far as its mode lets them.
    pub allow_other: bool,
}

/// A mount; unmounted when dropped, by force if need be.
#[derive(Debug)]
pub struct Mount {
    mountpoint: Mountpoint,
    /// What it was told from others by, a later mount in the same place for example. Empty if it
    /// could not be found out.
    seen: Option<Seen>,
    /// Ends the connection: of this mount only, since the kernel forgets with the connection what
    /// the open file means.
    abort: Option<OwnedFd>,
    /// The connection's.
    device: Option<OwnedFd>,
    by_helper: bool,
}

/// How far an unmount got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// It is gone from here.
    Gone,
    /// Somebody has the file open.
    Busy,
    /// This is mounted on top of it, and somebody uses that.
    Covered(String),
}

/// More than anybody mounts on top of another. While they are taken away somebody may go on
/// mounting.
const MOST_ABOVE: usize = 64;

impl Mount {
    /// Where it is.
    pub fn path(&self) -> &Path {
        self.mountpoint.path()
    }

    /// Begins something that another process does with the file.
    pub fn begin(&self, errand: Errand) -> io::Result<Running> {
        let seen = self.seen.as_ref().ok_or(io::ErrorKind::NotFound)?;
        errand.begin(&self.mountpoint.place.path_now(), seen.device)
    }

    /// Unmounts if nobody uses the file. Not to be called by a thread that serves requests.
    pub fn try_unmount(&self) -> io::Result<Unmounted> {
        if let Some(above) = self.uncover(false)? {
            return Ok(Unmounted::Covered(above));
        }
        if !self.is_there() {
            return Ok(Unmounted::Gone);
        }
        if self.by_helper {
            return match helper_unmount(&self.mountpoint.place.path_now(), false) {
                Ok(()) => Ok(Unmounted::Gone),
                Err(e) if e.contains("busy") => Ok(Unmounted::Busy),
                Err(e) => Err(io::Error::other(e)),
            };
        }
        match umount(&self.mountpoint.place.path_by_folder(), UnmountFlags::empty()) {
            Ok(()) => Ok(Unmounted::Gone),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(Unmounted::Busy),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(Unmounted::Gone),
            Err(e) => Err(e),
        }
    }

    /// Ends the connection where that is possible, and takes the file out of sight, used or not.
    /// Requests in flight and all later ones fail. Also where the mount is in other namespaces
    /// only.
    pub fn force_unmount(&self) -> io::Result<()> {
        // Before the end of the connection, by which the mount would be known no longer.
        let uncovered = self.uncover(true);
        let elsewhere = self.elsewhere();
        let aborted =
            self.abort.as_ref().is_some_and(|abort| rustix::io::write(abort, b"1").is_ok());
        for path in elsewhere {
            let unmounted = match self.by_helper {
                true => helper_unmount(&path, true).map_err(io::Error::other),
                false => umount(&path, UnmountFlags::DETACH),
            };
            if let Err(e) = unmounted {
                log::warn!("{}: cannot be unmounted: {e}", path.display());
            }
        }
        if let Some(above) = uncovered? {
            return Err(io::Error::other(format!("{above} is mounted on top of it")));
        }
        if !self.is_there() {
            return Ok(());
        }
        let place = &self.mountpoint.place;
        if self.by_helper {
            return helper_unmount(&place.path_now(), true).map_err(io::Error::other);
        }
        let path = place.path_by_folder();
        // MNT_FORCE ends a FUSE connection, used or not, and then says EBUSY.
        if !aborted && umount(&path, UnmountFlags::FORCE).is_ok() {
            return Ok(());
        }
        match umount(&path, UnmountFlags::DETACH) {
            // It went by itself.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            unmounted => unmounted,
        }
    }

    /// Unmounts what others have mounted on top: no system call reaches a mount below another. What
    /// is used stays, unless it is `by_force`, and is named.
    pub fn uncover(&self, by_force: bool) -> io::Result<Option<String>> {
        let place = &self.mountpoint.place;
        for _ in 0..MOST_ABOVE {
            let Some(top) = self.above().pop() else { return Ok(None) };
            let name = format!("{} ({})", top.source, top.fs_type);
            let flags = if by_force { UnmountFlags::DETACH } else { UnmountFlags::empty() };
            let unmounted = match umount(&place.path_by_folder(), flags) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                    helper_unmount(&place.path_now(), by_force).map_err(|_| e)
                }
                unmounted => unmounted,
            };
            match unmounted {
                Ok(()) => log::warn!(
                    "{}: {name} was mounted on top of it, and is unmounted too",
                    self.path().display()
                ),
                // It went by itself.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(Some(name)),
                Err(e) => {
                    let why =
                        format!("{name} is mounted on top of it and cannot be unmounted: {e}");
                    return Err(io::Error::other(why));
                }
            }
        }
        Err(io::Error::other("others go on mounting on top of it"))
    }

    /// The device's number is ours as long as the connection lives; then another file system may get
    /// it.
    fn has_its_device(&self) -> bool {
        self.device.as_ref().is_some_and(|device| !connection_ended(device))
    }

    /// Where else in this namespace others have put it, by `mount --move` or `--bind`.
    pub fn elsewhere(&self) -> Vec<PathBuf> {
        let Some(seen) = self.seen.as_ref().filter(|_| self.has_its_device()) else {
            return Vec::new();
        };
        let here = self.mountpoint.place.path_now();
        let all = entries(&fs::read(MOUNTINFO).unwrap_or_default());
        let ours = all.into_iter().filter(|entry| entry.device == seen.device);
        ours.map(|entry| entry.path).filter(|path| *path != here).collect()
    }

    /// What is mounted on top of this mount, the topmost last.
    fn above(&self) -> Vec<Entry> {
        let place = &self.mountpoint.place;
        let (Some(then), Ok(now)) = (&self.seen, place.seen()) else { return Vec::new() };
        if !self.has_its_device() || now.mount == then.mount {
            return Vec::new();
        }
        let mountinfo = fs::read(MOUNTINFO).unwrap_or_default();
        entries_above(&entries_at(&mountinfo, &place.path_now()), then.device)
    }

    /// Whether nobody outside of this mount namespace sees it.
    pub fn is_hidden(&self) -> bool {
        self.seen.as_ref().is_some_and(|seen| table::is_hidden(seen.device))
    }

    /// Lets the kernel read so many bytes ahead of those that read in order through the page cache.
    /// Root's to do.
    pub fn set_read_ahead(&self, bytes: u64) -> io::Result<()> {
        let seen = self.seen.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let (major, minor) = (rustix::fs::major(seen.device), rustix::fs::minor(seen.device));
        let setting = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        fs::write(setting, (bytes >> 10).to_string())
    }

    /// Whether the mount is still in its place, in this namespace. If that cannot be found out, an
    /// unmount will.
    pub fn is_there(&self) -> bool {
        let is_missing =
            |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR));
        match (self.mountpoint.place.seen(), &self.seen) {
            (Err(e), _) => !is_missing(&e),
            (Ok(_), None) => true,
            (Ok(now), Some(then)) => {
                let same = (now.device, now.mount) == (then.device, then.mount);
                // Without unique numbers it may be a later mount that was given the same ones
                // (before Linux 6.8).
                same && (then.is_unique || self.is_dead_or_served_here())
                    || !self.above().is_empty()
            }
        }
    }

    /// For kernels without unique numbers: a later mount is served by somebody else, who answers.
    fn is_dead_or_served_here(&self) -> bool {
        let serves = self.device.as_ref().is_some_and(|device| !connection_ended(device));
        serves || fs::metadata(self.mountpoint.place.path_by_folder()).is_err_and(|e| is_dead(&e))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(e) = self.force_unmount() {
            log::error!("{}: still mounted: {e}", self.path().display());
        }
    }
}

/// The file of the fusectl file system by whose writing the connection of the superblock `device`
/// ends. It belongs to the user who has mounted.
fn abort_handle(device: u64) -> Option<OwnedFd> {
    const FUSECTL_MAGIC: i64 = 0x6573_5543;
    let name = format!("{}/abort", rustix::fs::minor(device));
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    // One that nobody sees, which only root may have: an open file keeps the other busy.
    let unseen = || {
        let context = mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        mount::fsconfig_create(&context)?;
        let attributes = MountAttrFlags::empty();
        let root = mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        rustix::fs::openat(&root, &name, flags, Mode::empty())
    };
    let seen = || {
        let file = rustix::fs::open(
            Path::new("/sys/fs/fuse/connections").join(&name),
            flags,
            Mode::empty(),
        )?;
        let magic = rustix::fs::fstatfs(&file)?.f_type;
        if magic as i64 == FUSECTL_MAGIC { Ok(file) } else { Err(Errno::NOENT) }
    };
    unseen()
        .or_else(|_| seen())
        .inspect_err(|e| log::info!("the connection cannot be aborted: {e} (fusectl)"))
        .ok()
}

/// Makes what is mounted at `path` read-only, or writable again, in this place. The kernel alone
/// does it: the process that serves goes on as it was.
pub fn remount(path: &Path, read_only: bool) -> Result<(), MountError> {
    let fail = |why: &str| MountError(format!("{}: cannot be remounted: {why}", path.display()));
    let failed = |e: io::Error| fail(&e.to_string());
    let place = fs::canonicalize(path).and_then(|path| Place::of(&path)).map_err(failed)?;
    match mountinfo_entry(place.path()).map_err(failed)? {
        Some(entry) if entry.fs_type != FS_TYPE => {
            return Err(fail(&format!("{} is mounted there", entry.fs_type)));
        }
        Some(entry) if entry.is_read_only && !read_only => {
            return Err(fail("it is exported read-only: unmount it, and export it without -r"));
        }
        Some(_) => {}
        None => return Err(fail("nothing is mounted there")),
    }
    let file = place.file().map_err(failed)?;
    sys::set_mount_read_only(&file, read_only).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => fail("it is open for writing: have it closed first (fuser -v)"),
        Some(libc::EPERM) => fail("only root can: unmount it, and export it with or without -r"),
        _ => failed(e),
    })
}

/// Has this process see, and mount in, another mount namespace. While there is one thread only.
pub fn enter(namespace: &Path) -> io::Result<()> {
    let namespace = File::open(namespace)?;
    let kind = Some(LinkNameSpaceType::Mount);
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?)
}

/// Whether a file cannot be looked at because nobody serves it: ECONNABORTED while the kernel is
/// still ending the connection of a process killed just now.
fn is_dead(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// Unmounts what a killed diskfuse left behind: nobody serves it any more, so nothing is lost by
/// that.
fn clear_dead_mount(path: &Path) {
    let dead = fs::metadata(path).is_err_and(|e| is_dead(&e));
    let Some(place) = dead.then(|| Place::named(path).ok()).flatten() else { return };
    let mounted = mountinfo_entry(place.path()).ok().flatten();
    if mounted.is_some_and(|entry| entry.fs_type == FS_TYPE) {
        log::warn!("{}: unmounting what a killed diskfuse left there", path.display());
        if umount(&place.path_by_folder(), UnmountFlags::DETACH).is_err() {
            // An ordinary user's mounts are the helper's to end; the check that follows reports a
            // failure.
            let _ = helper_unmount(place.path(), true);
        }
    }
}

/// Unmounts what a diskfuse that is known to have ended has left at `path`, which has no links in
/// it. Nothing there is touched before.
pub fn take_away(path: &Path) -> io::Result<()> {
    match mountinfo_entry(path)? {
        Some(entry) if entry.fs_type == FS_TYPE => umount(path, UnmountFlags::DETACH)
            .or_else(|_| helper_unmount(path, true).map_err(io::Error::other)),
        _ => Ok(()),
    }
}

/// `umount2(2)`; symbolic links are not followed.
fn umount(target: &Path, flags: UnmountFlags) -> io::Result<()> {
    Ok(mount::unmount(target, flags | UnmountFlags::NOFOLLOW)?)
}

/// Whether the FUSE connection behind `device` has ended: /dev/fuse polls `POLLERR` then.
fn connection_ended(device: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(device, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec::default())).is_ok()
        && polled[0].revents().contains(PollFlags::ERR)
}

fn is_mounted(path: &Path) -> bool {
    Place::named(path).is_ok_and(|place| matches!(mountinfo_entry(place.path()), Ok(Some(_))))
}

#[cfg(test)]
mod tests;
