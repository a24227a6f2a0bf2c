//! Mounts, seen from outside: never by touching a file that may be dead.

use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

use super::sandbox::Sandbox;

/// A mount, as /proc/self/mountinfo has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The kernel's number of the mount
    pub id: u64,
    /// The number of a FUSE connection is the minor number of its device.
    pub connection: u64,
    pub fs_type: String,
}

/// All that is mounted at `path`, which has no links in it.
pub fn mounts_at(path: &Path) -> Vec<Seen> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let dash = fields.iter().position(|f| *f == "-")?;
        let here = unescape(fields.get(4)?) == path.to_string_lossy();
        here.then_some(Seen {
            id: fields[0].parse().ok()?,
            connection: fields[2].split_once(':')?.1.parse().ok()?,
            fs_type: fields.get(dash + 1)?.to_string(),
        })
    };
    text.lines().filter_map(parse).collect()
}

fn unescape(field: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(field.to_owned(), |text, (code, char)| text.replace(code, char))
}

/// Takes a mount away, dead or alive, used or not.
pub fn take_away(path: &Path) {
    for seen in mounts_at(path) {
        abort(seen.connection);
        if super::is_root() {
            // It may have gone meanwhile.
            let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
        } else {
            let _ = super::program("fusermount3", ["-u", "-q", "-z"]).arg("--").arg(path).output();
        }
    }
}

/// Ends a FUSE connection whatever its state; only root can, others leave it as it is.
pub fn abort(connection: u64) -> bool {
    if !super::is_root() {
        return false;
    }
    let folder = Sandbox::new();
    rustix::mount::mount("none", folder.path(), "fusectl", MountFlags::empty(), None)
        .expect("fusectl can be mounted wherever FUSE is");
    let written = std::fs::write(folder.join(&connection.to_string()).join("abort"), "1");
    if let Err(e) = rustix::mount::unmount(folder.path(), UnmountFlags::DETACH) {
        eprintln!("{}: left mounted: {e}", folder.path().display());
    }
    written.is_ok()
}
