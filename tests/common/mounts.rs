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
    // Another test's mountpoint may have any name.
    let text = std::fs::read("/proc/self/mountinfo").expect("/proc is mounted");
    let text = String::from_utf8_lossy(&text);
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

/// Unmounts as a client would, by `umount` or another command. A process that another test starts
/// has this test's files open until its exec, so that the mount may be busy for a moment.
#[track_caller]
pub fn unmount(command: &[&str], path: &Path) {
    super::eventually("an unmount", || {
        let mut unmount = super::program(command[0], &command[1..]);
        unmount.arg(path).current_dir("/").output().unwrap().status.success()
    });
}

/// Takes away all that is mounted below a folder: what served it ends.
pub fn take_away_below(folder: &Path) {
    let text = std::fs::read("/proc/self/mountinfo").expect("/proc is mounted");
    let text = String::from_utf8_lossy(&text);
    let places = text.lines().filter_map(|line| Some(unescape(line.split(' ').nth(4)?)));
    for place in places.filter(|place| Path::new(place).starts_with(folder)) {
        eprintln!("{place}: left mounted");
        take_away(Path::new(&place));
    }
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

/// Ends a FUSE connection whatever its state; false where that is not to be had.
pub fn abort(connection: u64) -> bool {
    let abort = |folder: &Path| std::fs::write(folder.join("abort"), "1").is_ok();
    at_connection(connection, abort).unwrap_or(false)
}

/// How many requests of a connection wait for their answers.
pub fn waiting(connection: u64) -> Option<u64> {
    let text = |folder: &Path| std::fs::read_to_string(folder.join("waiting")).ok();
    at_connection(connection, text)??.trim().parse().ok()
}

/// Whether the kernel has this connection still; `None` where that cannot be told.
pub fn is_connected(connection: u64) -> Option<bool> {
    at_connection(connection, Path::exists)
}

/// Does something in a connection's folder of the fusectl file system, which others than root need
/// to find mounted.
fn at_connection<T>(connection: u64, act: impl FnOnce(&Path) -> T) -> Option<T> {
    const USUAL: &str = "/sys/fs/fuse/connections";
    let name = connection.to_string();
    if !super::is_root() {
        let is_there = !mounts_at(Path::new(USUAL)).is_empty();
        return is_there.then(|| act(&Path::new(USUAL).join(name)));
    }
    let folder = Sandbox::new();
    rustix::mount::mount("none", folder.path(), "fusectl", MountFlags::empty(), None)
        .expect("fusectl can be mounted wherever FUSE is");
    let done = act(&folder.join(&name));
    if let Err(e) = rustix::mount::unmount(folder.path(), UnmountFlags::DETACH) {
        eprintln!("{}: left mounted: {e}", folder.path().display());
    }
    Some(done)
}
