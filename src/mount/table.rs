//! What is mounted, as /proc/self/mountinfo has it.

use std::ffi::OsString;
use std::fs::{self};
use std::io::{self};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::FS_TYPE;

pub(super) const MOUNTINFO: &str = "/proc/self/mountinfo";
/// What the machine sees, or the container: everybody may read it, unlike what tells namespaces
/// apart.
const MOUNTINFO_OF_INIT: &str = "/proc/1/mountinfo";

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

pub(super) fn all_in(mountinfo: &[u8]) -> Vec<Mounted> {
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

/// Whether nobody outside of this process's mount namespace sees the mounts of the file system
/// `device`, which are there for few then: where process 1 sees none of them, as after
/// `unshare --mount`, or in a unit of systemd that is given a namespace of its own. In a container
/// process 1 is the container's. Where that cannot be looked at (`ProtectProc=`), it is so if they
/// are on a mount that has its events from another namespace and sends none back.
pub(super) fn is_hidden(device: u64) -> bool {
    let is_of_device = |entry: &Entry| entry.device == device;
    let seen_by_init = fs::read(MOUNTINFO_OF_INIT).unwrap_or_default();
    if !seen_by_init.is_empty() {
        return !entries(&seen_by_init).iter().any(is_of_device);
    }
    let here = entries(&fs::read(MOUNTINFO).unwrap_or_default());
    let below = here.iter().find(|entry| is_of_device(entry)).map(|entry| entry.parent);
    here.iter().any(|entry| Some(entry.id) == below && entry.is_slave)
}

/// A line of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: PathBuf,
    pub(super) id: u64,
    /// What it is mounted on.
    pub(super) parent: u64,
    /// Of the file system.
    pub(super) device: u64,
    pub(super) fs_type: String,
    pub(super) source: String,
    /// The file system, not only the mount: as when it is exported read-only.
    pub(super) is_read_only: bool,
    /// Mounts come to it from another mount, and none go back.
    pub(super) is_slave: bool,
}

/// What is mounted on `path`, the topmost if several are.
pub(super) fn mountinfo_entry(path: &Path) -> io::Result<Option<Entry>> {
    let text = fs::read(MOUNTINFO);
    let text = text.map_err(|e| io::Error::new(e.kind(), format!("{MOUNTINFO}: {e}")))?;
    Ok(entries_at(&text, path).pop())
}

/// All that is mounted on `path`, in the order of mountinfo: what is mounted on top of another
/// comes after it.
pub(super) fn entries_at(mountinfo: &[u8], path: &Path) -> Vec<Entry> {
    entries(mountinfo).into_iter().filter(|entry| entry.path == path).collect()
}

pub(super) fn entries(mountinfo: &[u8]) -> Vec<Entry> {
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
            is_slave: fields[6..separator.max(6)].iter().any(|f| f.starts_with(b"master:")),
        })
    };
    mountinfo.split(|&b| b == b'\n').filter_map(parse).collect()
}

/// Those of the mounts in one place that are on top of the one of this file system, the topmost
/// last.
pub(super) fn entries_above(entries: &[Entry], device: u64) -> Vec<Entry> {
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
pub(super) fn unescape(field: &[u8]) -> Vec<u8> {
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
