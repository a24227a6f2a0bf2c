//! Mounting on a regular file, and leaving no trace of it.
//!
//! root mounts by mount(2); everybody else asks `fusermount3`. [`Mountpoint::prepare`] makes all the checks
//! that can fail before anything is changed, [`Mountpoint::mount`] gives a [`Mount`], and that one unmounts
//! when dropped, whatever happens in between.
//!
//! Nothing here asks whoever serves a file: this process may be the one, and other diskfuses come and go in the same
//! place. What is there is looked at without I/O, and told from what else could be there by numbers that are never
//! given out twice.

use std::ffi::{CString, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::thread::LinkNameSpaceType;

use crate::errands::{Errand, Running};
use crate::place::{Place, Seen};
use crate::sys;

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

/// A regular file to mount on, checked and, if it was missing, created.
#[derive(Debug)]
pub struct Mountpoint {
    place: Place,
    /// The file, if it was created here or by a diskfuse that has not ended yet: it is removed in the end. As long as it
    /// is open its inode's number means no other file.
    created: Option<File>,
}

/// Locked, by all of those that will remove it, in an empty file that was created as a mountpoint. A process that comes
/// while the one before it is still ending has to know: the file was not there before either of them.
const CREATED_LOCK: u64 = i64::MAX as u64 - 3;

impl Mountpoint {
    /// Checks that `path` is a regular file that nothing is mounted on; creates it if it is missing, and
    /// clears away what a killed diskfuse left mounted there.
    pub fn prepare(path: &Path) -> Result<Mountpoint, MountError> {
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
                let (file, metadata) = create(path).map_err(|e| match e.kind() {
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
                return Err(fail("already mounted by another user"));
            }
            Err(e) => return Err(fail(&e.to_string())),
        };
        if metadata.is_dir() {
            return Err(fail(&format!(
                "is a directory: the mountpoint must be a regular file (systemd makes a directory of one that is \
                 missing: rmdir {0} && touch {0})",
                path.display()
            )));
        }
        if !metadata.is_file() {
            return Err(fail("is not a regular file: the mountpoint must be one"));
        }
        // mount(2) follows links and umount2(2) is told not to, so both get the place without any.
        let place = fs::canonicalize(path).and_then(|path| Place::of(&path));
        let place = place.map_err(|e| fail(&e.to_string()))?;
        let mut mountpoint = Mountpoint { place, created };
        match mountinfo_entry(mountpoint.place.path()).map_err(|e| fail(&e.to_string()))? {
            Some(entry) if entry.fs_type == FS_TYPE => {
                return Err(fail(&format!("already served, as {}", entry.source)));
            }
            Some(entry) => {
                return Err(fail(&format!("already a mountpoint ({})", entry.fs_type)));
            }
            None => {}
        }
        if mountpoint.created.is_none() && metadata.len() == 0 {
            mountpoint.created = created_by_others(&mountpoint.place);
        }
        // fusermount3 would refuse it with a message of its own; this one says what to do.
        if sys::effective_ids().0 != 0 && OpenOptions::new().write(true).open(path).is_err() {
            return Err(fail(
                "not writable: an ordinary user may mount only on a file that is his to write (chmod u+w)",
            ));
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

    /// Mounts, and returns the connection's descriptor (not blocking). The kernel's INIT request waits
    /// there already. The mountpoint is given back if it cannot be.
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

    fn try_mount(&self, options: &Options) -> Result<(OwnedFd, bool), String> {
        let is_root = sys::effective_ids().0 == 0;
        let by_root = is_root.then(|| mount_as_root(&self.place, options)).transpose();
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
        sys::set_nonblocking(&device).map_err(|e| format!("/dev/fuse: {e}"))?;
        Ok((device, by_helper))
    }
}

fn create(path: &Path) -> io::Result<(File, Metadata)> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
    if let Err(e) = sys::share_byte(&file, CREATED_LOCK) {
        log::debug!("{}: {e}", path.display());
    }
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

impl Drop for Mountpoint {
    /// Removes the file if it was created here, and is still that empty file.
    fn drop(&mut self) {
        let Some(created) = &self.created else { return };
        let ours = created.metadata().map(|m| (m.dev(), m.ino()));
        let is_ours = |seen: Seen| {
            seen.is_file
                && seen.len == 0
                && ours.is_ok_and(|ours| ours == (seen.device, seen.inode))
        };
        if !self.place.seen().is_ok_and(is_ours) {
            return;
        }
        match self.place.remove() {
            Ok(()) => {}
            // Somebody has mounted on it meanwhile, and removes it in turn.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) => log::warn!("{}: cannot be removed: {e}", self.path().display()),
        }
    }
}

/// The file, if one is there that others have created as a mountpoint and are about to remove. From here on this process
/// is one of them.
fn created_by_others(place: &Place) -> Option<File> {
    let file = place.open(OFlags::RDWR, 0).ok()?;
    let theirs = sys::byte_is_locked(&file, CREATED_LOCK);
    (theirs && sys::share_byte(&file, CREATED_LOCK).is_ok()).then_some(file)
}

/// A mount; unmounted when dropped, by force if need be.
#[derive(Debug)]
pub struct Mount {
    mountpoint: Mountpoint,
    /// What it was told from others by, a later mount in the same place for example. Empty if it could not be found
    /// out.
    seen: Option<Seen>,
    /// Ends the connection: of this mount only, since the kernel forgets with the connection what the open file means.
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

/// More than anybody mounts on top of another. While they are taken away somebody may go on mounting.
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
        match sys::umount(&self.mountpoint.place.path_by_folder(), 0) {
            Ok(()) => Ok(Unmounted::Gone),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(Unmounted::Busy),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(Unmounted::Gone),
            Err(e) => Err(e),
        }
    }

    /// Ends the connection where that is possible, and takes the file out of sight, used or not. Requests in flight and
    /// all later ones fail. Also where the mount is in other namespaces only.
    pub fn force_unmount(&self) -> io::Result<()> {
        // Before the end of the connection, by which the mount would be known no longer.
        let uncovered = self.uncover(true);
        let aborted = self.abort.as_ref().is_some_and(|abort| sys::write(abort, b"1").is_ok());
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
        if !aborted && sys::umount(&path, libc::MNT_FORCE).is_ok() {
            return Ok(());
        }
        match sys::umount(&path, libc::MNT_DETACH) {
            // It went by itself.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            unmounted => unmounted,
        }
    }

    /// Unmounts what others have mounted on top: no system call reaches a mount below another. What is used stays, unless it
    /// is `by_force`, and is named.
    pub fn uncover(&self, by_force: bool) -> io::Result<Option<String>> {
        let place = &self.mountpoint.place;
        for _ in 0..MOST_ABOVE {
            let Some(top) = self.above().pop() else { return Ok(None) };
            let name = format!("{} ({})", top.source, top.fs_type);
            let flags = if by_force { libc::MNT_DETACH } else { 0 };
            let unmounted = match sys::umount(&place.path_by_folder(), flags) {
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

    /// What is mounted on top of this mount, the topmost last.
    fn above(&self) -> Vec<Entry> {
        let place = &self.mountpoint.place;
        let (Some(then), Ok(now)) = (&self.seen, place.seen()) else { return Vec::new() };
        // The device's number is ours as long as the connection lives; then another file system may get it.
        let lives = self.device.as_ref().is_some_and(|device| !sys::connection_ended(device));
        if !lives || now.mount == then.mount {
            return Vec::new();
        }
        let mountinfo = fs::read(MOUNTINFO).unwrap_or_default();
        entries_above(&entries_at(&mountinfo, &place.path_now()), then.device)
    }

    /// Lets the kernel read so many bytes ahead of those that read in order through the page cache. Root's to do.
    pub fn set_read_ahead(&self, bytes: u64) -> io::Result<()> {
        let seen = self.seen.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let (major, minor) = (rustix::fs::major(seen.device), rustix::fs::minor(seen.device));
        let setting = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        fs::write(setting, (bytes >> 10).to_string())
    }

    /// Whether the mount is still in its place, in this namespace. If that cannot be found out, an unmount will.
    pub fn is_there(&self) -> bool {
        let is_missing =
            |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR));
        match (self.mountpoint.place.seen(), &self.seen) {
            (Err(e), _) => !is_missing(&e),
            (Ok(_), None) => true,
            (Ok(now), Some(then)) => {
                let same = (now.device, now.mount) == (then.device, then.mount);
                // Without unique numbers it may be a later mount that was given the same ones (before Linux 6.8).
                same && (then.is_unique || self.is_dead_or_served_here())
                    || !self.above().is_empty()
            }
        }
    }

    /// For kernels without unique numbers: a later mount is served by somebody else, who answers.
    fn is_dead_or_served_here(&self) -> bool {
        let serves = self.device.as_ref().is_some_and(|device| !sys::connection_ended(device));
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

/// The file of the fusectl file system by whose writing the connection of the superblock `device` ends. It belongs to
/// the user who has mounted.
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

struct Refused {
    errno: Option<i32>,
    text: String,
}

fn mount_as_root(place: &Place, options: &Options) -> Result<OwnedFd, Refused> {
    let device = sys::open_fuse_device().map_err(|e| {
        let cure = match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "the kernel has no FUSE: try modprobe fuse, or give the container --device /dev/fuse"
            }
            _ => "is this container allowed to use it?",
        };
        Refused { errno: None, text: format!("/dev/fuse cannot be opened: {e} ({cure})") }
    })?;
    let (uid, gid) = sys::effective_ids();
    let data = format!(
        "fd={},rootmode={:o},user_id={uid},group_id={gid},default_permissions{}",
        device.as_raw_fd(),
        libc::S_IFREG,
        if options.allow_other { ",allow_other" } else { "" },
    );
    let mut flags = libc::MS_NOSUID | libc::MS_NODEV;
    if options.read_only {
        flags |= libc::MS_RDONLY;
    }
    let c = |text: &str| CString::new(text.replace('\0', "?")).expect("it has no zero byte");
    let mounted = place.file().and_then(|target| {
        let target = PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()));
        sys::mount(&c(&options.source), &target, &c(FS_TYPE), flags, &c(&data))
    });
    mounted.map_err(|e| Refused {
        errno: e.raw_os_error(),
        text: match e.raw_os_error() {
            Some(libc::EPERM) => "mount: permission denied: CAP_SYS_ADMIN is missing".into(),
            Some(libc::ENODEV) => "mount: the kernel has no FUSE: try modprobe fuse".into(),
            _ => format!("mount: {e}"),
        },
    })?;
    Ok(device)
}

fn mount_by_helper(path: &Path, options: &Options) -> Result<OwnedFd, String> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
    // Commas part options, and a backslash quotes.
    let source = options.source.replace('\\', "\\\\").replace(',', "\\,");
    let mut mount_options = format!("fsname={source},subtype=diskfuse,default_permissions");
    mount_options.push_str(if options.read_only { ",ro" } else { ",rw" });
    if options.allow_other {
        mount_options.push_str(",allow_other");
    }
    let mut command = Command::new("fusermount3");
    command
        .arg("-o")
        .arg(mount_options)
        .arg("--")
        .arg(path)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    sys::inherit(&mut command, theirs.as_raw_fd());
    let mut child = command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            "mounting as an ordinary user needs fusermount3: install the package fuse3".to_owned()
        }
        _ => format!("fusermount3: {e}"),
    })?;
    drop(theirs);
    let device = sys::receive_fd(&ours).map_err(|e| format!("fusermount3: {e}"))?;
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // What it says is a help, not a need.
        let _ = stderr.read_to_string(&mut said);
    }
    let status = child.wait().map_err(|e| format!("fusermount3: {e}"))?;
    match device {
        Some(device) if status.success() => Ok(device),
        _ => Err(match said.trim() {
            "" => format!("fusermount3 failed: {status}"),
            said if said.contains("user_allow_other") => {
                format!("{said} (or leave out --allow-other)")
            }
            said => said.to_owned(),
        }),
    }
}

fn helper_unmount(path: &Path, lazy: bool) -> Result<(), String> {
    let output = Command::new("fusermount3")
        .args(if lazy { ["-u", "-q", "-z"].as_slice() } else { &["-u"] })
        .arg("--")
        .arg(path)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("fusermount3: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// Makes what is mounted at `path` read-only, or writable again, in this place. The kernel alone does it: the process that
/// serves goes on as it was.
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

/// Whether a file cannot be looked at because nobody serves it: ECONNABORTED while the kernel is still ending the
/// connection of a process killed just now.
fn is_dead(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// Unmounts what a killed diskfuse left behind: nobody serves it any more, so nothing is lost by that.
fn clear_dead_mount(path: &Path) {
    let dead = fs::metadata(path).is_err_and(|e| is_dead(&e));
    let Some(place) = dead.then(|| Place::named(path).ok()).flatten() else { return };
    let mounted = mountinfo_entry(place.path()).ok().flatten();
    if mounted.is_some_and(|entry| entry.fs_type == FS_TYPE) {
        log::warn!("{}: unmounting what a killed diskfuse left there", path.display());
        if sys::umount(&place.path_by_folder(), libc::MNT_DETACH).is_err() {
            // An ordinary user's mounts are the helper's to end; the check that follows reports a failure.
            let _ = helper_unmount(place.path(), true);
        }
    }
}

/// Unmounts what a diskfuse that is known to have ended has left at `path`, which has no links in it. Nothing there is
/// touched before.
pub fn take_away(path: &Path) -> io::Result<()> {
    match mountinfo_entry(path)? {
        Some(entry) if entry.fs_type == FS_TYPE => sys::umount(path, libc::MNT_DETACH)
            .or_else(|_| helper_unmount(path, true).map_err(io::Error::other)),
        _ => Ok(()),
    }
}

fn is_mounted(path: &Path) -> bool {
    Place::named(path).is_ok_and(|place| matches!(mountinfo_entry(place.path()), Ok(Some(_))))
}

/// A mount of this program, of whichever process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The file.
    pub path: PathBuf,
    /// The source, in the words of whoever has exported it.
    pub source: String,
    /// Something is mounted on top of it, so that its path leads there.
    pub is_covered: bool,
}

/// All of them in this mount namespace.
pub fn all() -> io::Result<Vec<Mounted>> {
    let text = fs::read(MOUNTINFO);
    let text = text.map_err(|e| io::Error::new(e.kind(), format!("{MOUNTINFO}: {e}")))?;
    Ok(all_in(&text))
}

fn all_in(mountinfo: &[u8]) -> Vec<Mounted> {
    let entries = entries(mountinfo);
    let covers = |below: &Entry| {
        entries.iter().any(|entry| entry.parent == below.id && entry.path == below.path)
    };
    let ours = entries.iter().filter(|entry| entry.fs_type == FS_TYPE);
    let mounted = ours.map(|entry| Mounted {
        path: entry.path.clone(),
        source: entry.source.clone(),
        is_covered: covers(entry),
    });
    mounted.collect()
}

/// A line of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    path: PathBuf,
    id: u64,
    /// What it is mounted on.
    parent: u64,
    /// Of the file system.
    device: u64,
    fs_type: String,
    source: String,
    /// The file system, not only the mount: as when it is exported read-only.
    is_read_only: bool,
}

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// What is mounted on `path`, the topmost if several are.
fn mountinfo_entry(path: &Path) -> io::Result<Option<Entry>> {
    let text = fs::read(MOUNTINFO);
    let text = text.map_err(|e| io::Error::new(e.kind(), format!("{MOUNTINFO}: {e}")))?;
    Ok(entries_at(&text, path).pop())
}

/// All that is mounted on `path`, in the order of mountinfo: what is mounted on top of another comes after it.
fn entries_at(mountinfo: &[u8], path: &Path) -> Vec<Entry> {
    entries(mountinfo).into_iter().filter(|entry| entry.path == path).collect()
}

fn entries(mountinfo: &[u8]) -> Vec<Entry> {
    let parse = |line: &[u8]| {
        let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
        let separator = fields.iter().position(|f| *f == b"-")?;
        let text = |i: usize| Some(String::from_utf8_lossy(&unescape(fields.get(i)?)).into_owned());
        let device = text(2)?;
        let (major, minor) = device.split_once(':')?;
        Some(Entry {
            path: OsString::from_vec(unescape(fields.get(4)?)).into(),
            id: text(0)?.parse().ok()?,
            parent: text(1)?.parse().ok()?,
            device: rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?),
            fs_type: text(separator + 1)?,
            source: text(separator + 2)?,
            is_read_only: text(separator + 3)?.split(',').any(|option| option == "ro"),
        })
    };
    mountinfo.split(|&b| b == b'\n').filter_map(parse).collect()
}

/// Those of the mounts in one place that are on top of the one of this file system, the topmost last.
fn entries_above(entries: &[Entry], device: u64) -> Vec<Entry> {
    let Some(mut below) = entries.iter().find(|entry| entry.device == device) else {
        return Vec::new();
    };
    let mut above = Vec::new();
    while let Some(next) = entries.iter().find(|entry| entry.parent == below.id)
        && above.len() < entries.len()
    {
        above.push(next.clone());
        below = next;
    }
    above
}

/// Undoes mountinfo's `\040` and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let code = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"\
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
40 22 0:50 / /tmp/a\\040b rw,nosuid,nodev - fuse.diskfuse /img\\040x rw,user_id=0
41 22 0:51 / /tmp/c rw shared:1 master:2 - tmpfs tmpfs rw
42 41 0:52 / /tmp/c rw - fuse.diskfuse top rw
43 22 0:53 / /tmp/d rw - tmpfs other rw
44 42 254:1 / /tmp/c rw - ext4 /dev/loop0 rw
";

    #[test]
    fn finds_a_mount_by_its_path_with_spaces() {
        let found = entries_at(MOUNTS, Path::new("/tmp/a b"));
        let (fs_type, source) = (FS_TYPE.to_owned(), "/img x".to_owned());
        let device = rustix::fs::makedev(0, 50);
        let is_read_only = false;
        let path = "/tmp/a b".into();
        let entry = Entry { path, id: 40, parent: 22, device, fs_type, source, is_read_only };
        assert_eq!(found, [entry]);
    }

    #[test]
    fn all_mounts_of_this_program_are_found() {
        let all = all_in(MOUNTS);
        let found: Vec<_> = all.iter().map(|m| (m.path.to_str().unwrap(), m.is_covered)).collect();
        assert_eq!(found, [("/tmp/a b", false), ("/tmp/c", true)]);
        assert_eq!(all[0].source, "/img x");
    }

    #[test]
    fn the_topmost_mount_counts() {
        assert_eq!(entries_at(MOUNTS, Path::new("/tmp/c")).pop().unwrap().id, 44);
        assert_eq!(entries_at(MOUNTS, Path::new("/tmp")), []);
    }

    #[test]
    fn what_is_above_a_mount_is_found_by_its_device() {
        let here = entries_at(MOUNTS, Path::new("/tmp/c"));
        let above = |minor| {
            let found = entries_above(&here, rustix::fs::makedev(0, minor));
            found.iter().map(|entry| entry.id).collect::<Vec<_>>()
        };
        assert_eq!((above(51), above(52), above(53)), (vec![42, 44], vec![44], vec![]));
    }

    #[test]
    fn a_missing_mountpoint_is_created_and_removed() {
        let folder = std::env::temp_dir().join(format!("diskfuse-mount-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let path = folder.join("disk");
        let mountpoint = Mountpoint::prepare(&path).unwrap();
        assert!(path.exists());
        drop(mountpoint);
        assert!(!path.exists());
        // But not when it has become somebody else's.
        let mountpoint = Mountpoint::prepare(&path).unwrap();
        fs::write(&path, "content").unwrap();
        drop(mountpoint);
        assert!(path.exists());
        fs::remove_dir_all(&folder).unwrap();
    }
}
