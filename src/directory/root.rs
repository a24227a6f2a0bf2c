//! The directory itself: what is in it, and what it and its files tell.

use std::ffi::CStr;
use std::time::Duration;

use super::file::File;
use super::{Directory, FIRST, names};
use crate::backend::RemoteStats;
use crate::errno::Errno;
use crate::export::report::Reporter;
use crate::export::{
    ATTRIBUTE_SOURCE, ATTRIBUTE_STATS, STATS_GROWTH, Served, asked_attribute, statfs, xattr,
};
use crate::fuse::abi::{Attr, Dirent, Plain, ROOT_ID, StatfsOut};
use crate::fuse::reply::Reply;
use crate::fuse::request::Op;

/// For how long the kernel may take the list, and the directory's attributes, for what they were:
/// they stay as they are.
const VALID: Duration = Duration::from_secs(60);

impl Directory {
    pub(super) fn handle_root(&self, op: Op, payload: &mut [u8]) -> Result<Reply, Errno> {
        match op {
            Op::Lookup => self.lookup(payload),
            Op::Getattr { .. } => Ok(Reply::Attr { attr: self.attr(), valid: VALID }),
            Op::Opendir => Ok(Reply::Opened { handle: 0, flags: 0 }),
            Op::Readdir { offset, size } => {
                Ok(Reply::Data(self.readdir(offset, &mut payload[..size as usize])))
            }
            Op::Releasedir => Ok(Reply::Done),
            Op::Statfs => Ok(Reply::Statfs(self.statfs())),
            Op::Getxattr { room } => self.getxattr(None, room, payload),
            // It is the server's list.
            Op::Setattr(_) | Op::ChangeDirectory => Err(Errno::EPERM),
            _ => Err(Errno::EINVAL),
        }
    }

    fn lookup(&self, payload: &[u8]) -> Result<Reply, Errno> {
        let name = CStr::from_bytes_until_nul(&payload[..=names::LONGEST]).ok();
        let name = name.and_then(|name| name.to_str().ok()).ok_or(Errno::ENOENT)?;
        let node = *self.by_name.get(name).ok_or(Errno::ENOENT)?;
        let (attr, valid) = self.file(node).ok_or(Errno::ENOENT)?.attr(node)?;
        Ok(Reply::Entry { attr, valid, entry_valid: VALID })
    }

    /// Nothing can be made or removed in it, and whoever may get to the files sees them.
    fn attr(&self) -> Attr {
        let mode = libc::S_IFDIR | if self.policy.allow_other { 0o555 } else { 0o500 };
        Attr { ino: ROOT_ID, mode, nlink: 2, ..self.attributes.of_file() }
    }

    /// Puts the entries from the one of this number on into `room`, as far as they have room there;
    /// how many bytes they take.
    pub(super) fn readdir(&self, first: u64, room: &mut [u8]) -> usize {
        let mut len = 0;
        for number in first..FIRST + self.files.len() as u64 {
            // The first two are the folder's own; then a file's number is its node's.
            let (ino, kind, name) = match (number, self.file(number)) {
                (0, _) => (ROOT_ID, libc::DT_DIR, ".".into()),
                (1, _) | (_, None) => (ROOT_ID, libc::DT_DIR, "..".into()),
                (node, Some(file)) => (node, libc::DT_REG, names::file_name(&file.name)),
            };
            let (namelen, kind) = (name.len() as u32, u32::from(kind));
            let head = Dirent { ino, off: number + 1, namelen, kind };
            let entry = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
            let Some(place) = room[len..].get_mut(..entry) else { break };
            place.fill(0);
            place[..size_of::<Dirent>()].copy_from_slice(head.as_bytes());
            place[size_of::<Dirent>()..][..name.len()].copy_from_slice(name.as_bytes());
            len += entry;
        }
        len
    }

    pub(super) fn statfs(&self) -> StatfsOut {
        statfs(self.size(), self.files.len() as u64)
    }

    pub(super) fn uri_of(&self, node: u64) -> String {
        self.file(node).map_or_else(String::new, |file| self.exports.uri(&file.name).to_string())
    }

    /// The attributes by which the directory (none), or a file of it, tells of itself.
    pub(super) fn getxattr(
        &self,
        file: Option<&File>,
        room: u32,
        payload: &mut [u8],
    ) -> Result<Reply, Errno> {
        let source = || match file {
            Some(file) => self.exports.uri(&file.name).to_string(),
            None => self.reporter.source.clone(),
        };
        let name = asked_attribute(payload).ok_or(Errno::ENODATA)?;
        let (value, growth) = if name == ATTRIBUTE_SOURCE {
            (source(), 0)
        } else if name == ATTRIBUTE_STATS {
            let report = match file {
                Some(file) => {
                    let connected = file.connected().and_then(|file| file.export.report());
                    connected.unwrap_or_else(|| {
                        let reporter = Reporter { source: source(), ..self.reporter.clone() };
                        reporter.line(file.size(), Some(RemoteStats::default()), None)
                    })
                }
                None => self.report().ok_or(Errno::ENODATA)?,
            };
            (report, STATS_GROWTH)
        } else {
            return Err(Errno::ENODATA);
        };
        xattr(value.as_bytes(), growth, room, payload)
    }
}
