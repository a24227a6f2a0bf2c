//! The regular file, or the empty directory, that is mounted on.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::geteuid;

use super::calls::{mount_as_root, mount_by_helper};
use super::place::{Place, Seen};
use super::table::mountinfo_entry;
use super::{
    FS_TYPE, Mount, MountError, Options, Shape, abort_handle, clear_dead_mount, is_dead, is_mounted,
};
use crate::sys;

/// Locked, by all of those that will remove it, in an empty file or directory that was created as a
/// mountpoint.
/// A process that comes while the one before it is still ending has to know: the file was not there
/// before either of them.
const CREATED_LOCK: u64 = i64::MAX as u64 - 3;

/// A regular file, or an empty directory, to mount on, checked and, if it was missing, created.
#[derive(Debug)]
pub struct Mountpoint {
    pub(super) place: Place,
    shape: Shape,
    /// The file, if it was created here or by a diskfuse that has not ended yet: it is removed in
    /// the end. As long as it is open its inode's number means no other file.
    pub(super) created: Option<File>,
}

impl Mountpoint {
    /// Checks that `path` is a regular file, or an empty directory, that nothing is mounted on;
    /// creates it if it is missing, and clears away what a killed diskfuse left mounted there.
    pub fn prepare(path: &Path, shape: Shape) -> Result<Mountpoint, MountError> {
        let fail = |why: &str| MountError(format!("{}: {why}", path.display()));
        clear_dead_mount(path);
        let mut created = None;
        let mut metadata = fs::metadata(path);
        if metadata.as_ref().is_err_and(is_dead) {
            // It died between the two looks.
            clear_dead_mount(path);
            metadata = fs::metadata(path);
        }
        let metadata = match metadata {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (file, metadata) = create(path, shape).map_err(|e| match e.kind() {
                    io::ErrorKind::NotFound => {
                        fail("cannot be created: its folder does not exist (make it with mkdir -p)")
                    }
                    io::ErrorKind::AlreadyExists => {
                        fail("is a symbolic link to nowhere: remove it, or make its target")
                    }
                    _ => fail(&format!("cannot be created as a mountpoint: {e}")),
                })?;
                created = Some(file);
                metadata
            }
            Err(e) if is_dead(&e) => {
                return Err(fail(
                    "a dead FUSE mount is in the way: unmount it (fusermount3 -u, or umount as root)",
                ));
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied && is_mounted(path) => {
                return Err(fail("already mounted by another user: choose another MOUNTPOINT"));
            }
            Err(e) => return Err(fail(&e.to_string())),
        };
        if shape == Shape::Directory && !metadata.is_dir() {
            return Err(fail(
                "is not a directory: for all exports of a server it must be an empty one, or missing",
            ));
        }
        if shape == Shape::File && metadata.is_dir() {
            return Err(fail(&format!(
                "is a directory: the mountpoint must be a regular file (systemd makes a directory of one that is \
                 missing: rmdir {0} && touch {0})",
                path.display()
            )));
        }
        if shape == Shape::File && !metadata.is_file() {
            return Err(fail("is not a regular file: the mountpoint must be one"));
        }
        // mount(2) follows links and umount2(2) is told not to, so both get the place without any.
        let place = fs::canonicalize(path).and_then(|path| Place::of(&path));
        let place = place.map_err(|e| {
            // Its absolute path is too long, say, so that it has no place that could go with it.
            let removed = match (created.is_some(), shape) {
                (false, _) => Ok(()),
                (true, Shape::File) => fs::remove_file(path),
                (true, Shape::Directory) => fs::remove_dir(path),
            };
            removed.err().map_or_else(|| fail(&e.to_string()), |r| fail(&format!("{e}; and {r}")))
        })?;
        let mut mountpoint = Mountpoint { place, shape, created };
        match mountinfo_entry(mountpoint.place.path()).map_err(|e| fail(&e.to_string()))? {
            Some(entry) if entry.fs_type == FS_TYPE => {
                return Err(fail(&format!(
                    "already served, as {} (unmount it first, or choose another MOUNTPOINT)",
                    entry.source
                )));
            }
            Some(entry) => {
                return Err(fail(&format!(
                    "already a mountpoint ({}): unmount it first, or choose another",
                    entry.fs_type
                )));
            }
            None => {}
        }
        let is_empty = match shape {
            Shape::File => metadata.len() == 0,
            Shape::Directory => {
                let first = fs::read_dir(path).map(|mut entries| entries.next());
                if first.map_err(|e| fail(&e.to_string()))?.is_some() {
                    return Err(fail(
                        "is not empty, and what is in it would be hidden: choose another directory, \
                         or one that is missing",
                    ));
                }
                true
            }
        };
        if mountpoint.created.is_none() && is_empty {
            mountpoint.created = created_by_others(&mountpoint.place, shape);
        }
        // fusermount3 would refuse it with a message of its own; this one says what to do.
        let is_writable = || match shape {
            Shape::File => OpenOptions::new().write(true).open(path).is_ok(),
            Shape::Directory => rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok(),
        };
        if !geteuid().is_root() && !is_writable() {
            let what = match shape {
                Shape::File => "file",
                Shape::Directory => "directory",
            };
            return Err(fail(&format!(
                "not writable: an ordinary user may mount only on a {what} that is his to write \
                 (chmod u+w)"
            )));
        }
        Ok(mountpoint)
    }

    /// Where it is, without links.
    pub fn path(&self) -> &Path {
        self.place.path()
    }

    /// Whether the file is gone since it was checked: a diskfuse that was ending has removed it.
    pub fn has_vanished(&self) -> bool {
        self.place.seen().is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
    }

    /// Mounts, and returns the connection's descriptor (not blocking). The kernel's INIT request
    /// waits there already. The mountpoint is given back if it cannot be.
    pub fn mount(self, options: &Options) -> Result<(Mount, OwnedFd), (MountError, Mountpoint)> {
        match self.try_mount(options) {
            Ok((device, by_helper)) => {
                let seen = self.place.seen().ok();
                let abort = seen.as_ref().and_then(|seen| abort_handle(seen.device));
                let ours = device.try_clone().ok();
                let mount = Mount { mountpoint: self, seen, abort, device: ours, by_helper };
                Ok((mount, device))
            }
            Err(why) => Err((MountError(format!("{}: {why}", self.path().display())), self)),
        }
    }

    pub(super) fn try_mount(&self, options: &Options) -> Result<(OwnedFd, bool), String> {
        let is_root = geteuid().is_root();
        let by_root = is_root.then(|| mount_as_root(&self.place, self.shape, options)).transpose();
        let path = self.path();
        let (device, by_helper) = match by_root {
            Ok(Some(device)) => (device, false),
            // root of a user namespace, say: the helper may be allowed what we are not.
            Ok(None) => (mount_by_helper(path, options)?, true),
            Err(e) if e.errno == Some(libc::EPERM) => {
                let device = mount_by_helper(path, options)
                    .map_err(|helper| format!("{} ({helper})", e.text))?;
                (device, true)
            }
            Err(e) => return Err(e.text),
        };
        let nonblocking =
            fcntl_getfl(&device).and_then(|flags| fcntl_setfl(&device, flags | OFlags::NONBLOCK));
        nonblocking.map_err(|e| format!("/dev/fuse: {}", io::Error::from(e)))?;
        Ok((device, by_helper))
    }
}

pub(super) fn create(path: &Path, shape: Shape) -> io::Result<(File, Metadata)> {
    let mut options = OpenOptions::new();
    let file = match shape {
        Shape::File => options.read(true).write(true).create_new(true).mode(0o600).open(path)?,
        Shape::Directory => {
            DirBuilder::new().mode(0o700).create(path)?;
            let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
            options.read(true).custom_flags(flags).open(path)?
        }
    };
    if let Err(e) = sys::share_byte(&file, CREATED_LOCK) {
        log::debug!("{}: {e}", path.display());
    }
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

impl Drop for Mountpoint {
    /// Removes the file if it was created here, and is still that empty file; of a directory the
    /// same.
    fn drop(&mut self) {
        let Some(created) = &self.created else { return };
        let ours = created.metadata().map(|m| (m.dev(), m.ino()));
        let is_ours = |seen: Seen| {
            let is_like_ours = match self.shape {
                Shape::File => seen.is_file && seen.len == 0,
                Shape::Directory => seen.is_directory,
            };
            is_like_ours && ours.is_ok_and(|ours| ours == (seen.device, seen.inode))
        };
        if !self.place.seen().is_ok_and(is_ours) {
            return;
        }
        let removed = match self.shape {
            Shape::File => self.place.remove(),
            Shape::Directory => self.place.remove_directory(),
        };
        match removed {
            Ok(()) => {}
            // Somebody has mounted on it meanwhile, and removes it in turn.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            // Somebody has put something into it, which stays.
            Err(e) if e.raw_os_error() == Some(libc::ENOTEMPTY) => {}
            Err(e) => log::warn!("{}: cannot be removed: {e}", self.path().display()),
        }
    }
}

/// The file, if one is there that others have created as a mountpoint and are about to remove. From
/// here on this process is one of them.
pub(super) fn created_by_others(place: &Place, shape: Shape) -> Option<File> {
    let flags = match shape {
        Shape::File => OFlags::RDWR,
        Shape::Directory => OFlags::RDONLY | OFlags::DIRECTORY,
    };
    let file = place.open(flags, 0).ok()?;
    let theirs = sys::byte_is_locked(&file, CREATED_LOCK);
    (theirs && sys::share_byte(&file, CREATED_LOCK).is_ok()).then_some(file)
}
