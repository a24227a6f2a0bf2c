//! Mounting on a regular file, and leaving no trace of it.
//!
//! root mounts by mount(2); everybody else asks `fusermount3`. [`Mountpoint::prepare`] makes all the checks
//! that can fail before anything is changed, [`Mountpoint::mount`] gives a [`Mount`], and that one unmounts
//! when dropped, whatever happens in between.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
    path: PathBuf,
    /// Device and inode of the file if it was created here: it is removed in the end.
    created: Option<(u64, u64)>,
}

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
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
                let metadata = file.and_then(|f| f.metadata()).map_err(|e| match e.kind() {
                    io::ErrorKind::NotFound => {
                        fail("cannot be created: its folder does not exist (make it with mkdir -p)")
                    }
                    io::ErrorKind::AlreadyExists => {
                        fail("is a symbolic link to nowhere: remove it, or make its target")
                    }
                    _ => fail(&format!("cannot be created as a mountpoint: {e}")),
                })?;
                created = Some((metadata.dev(), metadata.ino()));
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
        let mut mountpoint = Mountpoint { path: path.to_owned(), created };
        if metadata.is_dir() {
            return Err(fail(
                "is a directory: the mountpoint must be a regular file (it is created if missing)",
            ));
        }
        if !metadata.is_file() {
            return Err(fail("is not a regular file: the mountpoint must be one"));
        }
        // mount(2) follows links and umount2(2) is told not to, so both get the path without any.
        mountpoint.path = fs::canonicalize(path).map_err(|e| fail(&e.to_string()))?;
        match mountinfo_entry(&mountpoint.path).map_err(|e| fail(&e.to_string()))? {
            Some(entry) if entry.fs_type == FS_TYPE => {
                return Err(fail(&format!("already served, as {}", entry.source)));
            }
            Some(entry) => {
                return Err(fail(&format!("already a mountpoint ({})", entry.fs_type)));
            }
            None => {}
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
        &self.path
    }

    /// Mounts, and returns the connection's descriptor (not blocking). The kernel's INIT request waits
    /// there already.
    pub fn mount(self, options: &Options) -> Result<(Mount, OwnedFd), MountError> {
        let fail = |why: &str| MountError(format!("{}: {why}", self.path.display()));
        let is_root = sys::effective_ids().0 == 0;
        let by_root = is_root.then(|| mount_as_root(&self.path, options)).transpose();
        let (device, by_helper) = match by_root {
            Ok(Some(device)) => (device, false),
            // root of a user namespace, say: the helper may be allowed what we are not.
            Ok(None) => (mount_by_helper(&self.path, options).map_err(|e| fail(&e))?, true),
            Err(e) if e.errno == Some(libc::EPERM) => {
                let device = mount_by_helper(&self.path, options)
                    .map_err(|helper| fail(&format!("{} ({helper})", e.text)))?;
                (device, true)
            }
            Err(e) => return Err(fail(&e.text)),
        };
        let id = mountinfo_entry(&self.path).ok().flatten().map(|entry| entry.id);
        let mount = Mount { mountpoint: self, id, by_helper };
        sys::set_nonblocking(&device).map_err(|e| MountError(format!("/dev/fuse: {e}")))?;
        Ok((mount, device))
    }
}

impl Drop for Mountpoint {
    /// Removes the file if it was created here, and is still that empty file.
    fn drop(&mut self) {
        let Some(created) = self.created else { return };
        let same = fs::symlink_metadata(&self.path)
            .is_ok_and(|m| m.is_file() && m.len() == 0 && (m.dev(), m.ino()) == created);
        if same && let Err(e) = fs::remove_file(&self.path) {
            log::warn!("{}: cannot be removed: {e}", self.path.display());
        }
    }
}

/// A mount; unmounted when dropped, by force if need be.
#[derive(Debug)]
pub struct Mount {
    mountpoint: Mountpoint,
    /// The kernel's number for it, by which it is told from a later mount in the same place. Empty if it could
    /// not be found out.
    id: Option<u64>,
    by_helper: bool,
}

/// How far an unmount got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// It is gone.
    Gone,
    /// Somebody has the file open.
    Busy,
}

impl Mount {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.mountpoint.path
    }

    /// Unmounts if nobody uses the file. Not to be called by a thread that serves requests.
    pub fn try_unmount(&self) -> io::Result<Unmounted> {
        if !self.is_there() {
            return Ok(Unmounted::Gone);
        }
        if self.by_helper {
            return match helper_unmount(self.path(), false) {
                Ok(()) => Ok(Unmounted::Gone),
                Err(e) if e.contains("busy") => Ok(Unmounted::Busy),
                Err(e) => Err(io::Error::other(e)),
            };
        }
        match sys::umount(self.path(), 0) {
            Ok(()) => Ok(Unmounted::Gone),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(Unmounted::Busy),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(Unmounted::Gone),
            Err(e) => Err(e),
        }
    }

    /// Ends the connection where that is possible (only root may), and takes the file out of sight, used or
    /// not. Requests in flight and all later ones fail.
    pub fn force_unmount(&self) -> io::Result<()> {
        if !self.is_there() {
            return Ok(());
        }
        if self.by_helper {
            return helper_unmount(self.path(), true).map_err(io::Error::other);
        }
        // MNT_FORCE ends a FUSE connection, used or not, and then says EBUSY.
        match sys::umount(self.path(), libc::MNT_FORCE) {
            Ok(()) => Ok(()),
            Err(_) => sys::umount(self.path(), libc::MNT_DETACH),
        }
    }

    /// Whether the mount is still in its place. If that cannot be found out, an unmount will.
    fn is_there(&self) -> bool {
        match (mountinfo_entry(self.path()), self.id) {
            (Ok(Some(entry)), Some(id)) => entry.id == id,
            (Ok(Some(entry)), None) => entry.fs_type == FS_TYPE,
            (Ok(None), _) => false,
            (Err(_), _) => true,
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(e) = self.force_unmount() {
            log::error!("{}: still mounted: {e}", self.path().display());
        }
    }
}

struct Refused {
    errno: Option<i32>,
    text: String,
}

fn mount_as_root(path: &Path, options: &Options) -> Result<OwnedFd, Refused> {
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
    sys::mount(&c(&options.source), path, &c(FS_TYPE), flags, &c(&data)).map_err(|e| Refused {
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

/// Whether a file cannot be looked at because nobody serves it: ECONNABORTED while the kernel is still ending the
/// connection of a process killed just now.
fn is_dead(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// Unmounts what a killed diskfuse left behind: nobody serves it any more, so nothing is lost by that.
fn clear_dead_mount(path: &Path) {
    let dead = fs::metadata(path).is_err_and(|e| is_dead(&e));
    let Some(full) = dead.then(|| lexical_path(path)).flatten() else { return };
    let mounted = mountinfo_entry(&full).ok().flatten();
    if mounted.is_some_and(|entry| entry.fs_type == FS_TYPE) {
        log::warn!("{}: unmounting what a killed diskfuse left there", path.display());
        if sys::umount(&full, libc::MNT_DETACH).is_err() {
            // An ordinary user's mounts are the helper's to end; the check that follows reports a failure.
            let _ = helper_unmount(&full, true);
        }
    }
}

/// A path without links in its folder; the last part is not looked at.
fn lexical_path(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some(fs::canonicalize(folder).ok()?.join(name))
}

fn is_mounted(path: &Path) -> bool {
    lexical_path(path).is_some_and(|path| matches!(mountinfo_entry(&path), Ok(Some(_))))
}

/// A line of /proc/self/mountinfo.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    id: u64,
    fs_type: String,
    source: String,
}

/// What is mounted on `path`, the topmost if several are.
fn mountinfo_entry(path: &Path) -> io::Result<Option<Entry>> {
    const MOUNTINFO: &str = "/proc/self/mountinfo";
    let text = fs::read(MOUNTINFO);
    let text = text.map_err(|e| io::Error::new(e.kind(), format!("{MOUNTINFO}: {e}")))?;
    Ok(find_entry(&text, path))
}

fn find_entry(mountinfo: &[u8], path: &Path) -> Option<Entry> {
    use std::os::unix::ffi::OsStrExt;
    let wanted = path.as_os_str().as_bytes();
    mountinfo.split(|&b| b == b'\n').rev().find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
        if unescape(fields.get(4)?) != wanted {
            return None;
        }
        let separator = fields.iter().position(|f| *f == b"-")?;
        let text = |i: usize| {
            fields.get(separator + i).map(|f| String::from_utf8_lossy(&unescape(f)).into_owned())
        };
        Some(Entry {
            id: std::str::from_utf8(fields.first()?).ok()?.parse().ok()?,
            fs_type: text(1)?,
            source: text(2)?,
        })
    })
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

    const MOUNTINFO: &[u8] = b"\
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
40 22 0:50 / /tmp/a\\040b rw,nosuid,nodev - fuse.diskfuse /img\\040x rw,user_id=0
41 22 0:51 / /tmp/c rw shared:1 master:2 - tmpfs tmpfs rw
42 22 0:52 / /tmp/c rw - fuse.diskfuse top rw
";

    #[test]
    fn finds_a_mount_by_its_path_with_spaces() {
        let entry = find_entry(MOUNTINFO, Path::new("/tmp/a b")).unwrap();
        assert_eq!(entry, Entry { id: 40, fs_type: FS_TYPE.into(), source: "/img x".into() });
    }

    #[test]
    fn the_topmost_mount_counts() {
        assert_eq!(find_entry(MOUNTINFO, Path::new("/tmp/c")).unwrap().id, 42);
        assert_eq!(find_entry(MOUNTINFO, Path::new("/tmp")), None);
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
