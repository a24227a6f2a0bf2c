//! The two ways to mount: mount(2) for root, and `fusermount3` for everybody else.

use std::ffi::CString;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{getegid, geteuid};

use super::place::Place;
use super::{FS_TYPE, Options, Shape};
use crate::sys;

pub(super) struct Refused {
    pub(super) errno: Option<i32>,
    pub(super) text: String,
}

pub(super) fn mount_as_root(
    place: &Place,
    shape: Shape,
    options: &Options,
) -> Result<OwnedFd, Refused> {
    let device = sys::open_fuse_device().map_err(|e| {
        let cure = match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "the kernel has no FUSE: try modprobe fuse, or give the container --device /dev/fuse"
            }
            _ => "is this container allowed to use it?",
        };
        Refused { errno: None, text: format!("/dev/fuse cannot be opened: {e} ({cure})") }
    })?;
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let data = format!(
        "fd={},rootmode={:o},user_id={uid},group_id={gid},default_permissions{}",
        device.as_raw_fd(),
        match shape {
            Shape::File => libc::S_IFREG,
            Shape::Directory => libc::S_IFDIR,
        },
        if options.allow_other { ",allow_other" } else { "" },
    );
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    let c = |text: &str| CString::new(text.replace('\0', "?")).expect("it has no zero byte");
    let mounted = place.file().and_then(|target| {
        let target = format!("/proc/self/fd/{}", target.as_raw_fd());
        Ok(mount(c(&options.source), target, FS_TYPE, flags, Some(&*c(&data)))?)
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

pub(super) fn mount_by_helper(path: &Path, options: &Options) -> Result<OwnedFd, String> {
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
    let device = receive_fd(&ours).map_err(|e| format!("fusermount3: {e}"))?;
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

/// Receives one byte with a descriptor attached (`SCM_RIGHTS`), as fusermount3 sends it. None when
/// the other side closed without sending one.
fn receive_fd(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let (mut byte, flags) = ([0], RecvFlags::CMSG_CLOEXEC);
    while let Err(e) = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags) {
        if e != Errno::INTR {
            return Err(e.into());
        }
    }
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    }))
}

pub(super) fn helper_unmount(path: &Path, lazy: bool) -> Result<(), String> {
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
