//! A name in a folder that is held open: what is looked at, opened, mounted on and removed there is
//! of one folder, whoever renames things or makes links meanwhile. Others may be able to write to
//! the folder.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

/// A name in a folder. The folder is held open, so that the place is the same wherever the folder
/// is moved to.
#[derive(Debug)]
pub struct Place {
    folder: OwnedFd,
    name: OsString,
    path: PathBuf,
}

/// What is at a [`Place`], looked at without asking whoever serves it.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Of the file system.
    pub device: u64,
    /// The file's number there.
    pub inode: u64,
    /// Of regular files.
    pub is_file: bool,
    /// Of directories.
    pub is_directory: bool,
    /// In bytes
    pub len: u64,
    /// The kernel's number of the mount that it is of, ...
    pub mount: u64,
    /// ... which is never given out again (Linux 6.8).
    pub is_unique: bool,
}

impl Place {
    /// Of a path without links. A link that somebody has put into it is not followed.
    pub fn of(path: &Path) -> io::Result<Place> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let folder = path.parent().unwrap_or(Path::new("/"));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let (none, no_links) = (Mode::empty(), ResolveFlags::NO_SYMLINKS);
        let folder = match rustix::fs::openat2(rustix::fs::CWD, folder, flags, none, no_links) {
            // Before Linux 5.6, or where a filter does not know it.
            Err(Errno::NOSYS | Errno::PERM) => rustix::fs::open(folder, flags, none)?,
            folder => folder?,
        };
        Ok(Place { folder, name, path: path.to_owned() })
    }

    /// Of a path whose folder may be reached through links; what is at the name may not be one.
    pub fn named(path: &Path) -> io::Result<Place> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        Place::of(&fs::canonicalize(folder.unwrap_or(Path::new(".")))?.join(name))
    }

    /// Where it was to begin with, without links in its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path for system calls that take no folder: valid wherever the folder is now, in this
    /// process only.
    pub fn path_by_folder(&self) -> PathBuf {
        Path::new(&format!("/proc/self/fd/{}", self.folder.as_raw_fd())).join(&self.name)
    }

    /// Where it is now, for other programs.
    pub fn path_now(&self) -> PathBuf {
        let folder = fs::read_link(format!("/proc/self/fd/{}", self.folder.as_raw_fd()));
        folder.map_or_else(|_| self.path.clone(), |folder| folder.join(&self.name))
    }

    /// What is there now, be it a link.
    pub fn seen(&self) -> io::Result<Seen> {
        // include/uapi/linux/stat.h; kernels that do not know it tell the other number.
        const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        let mask = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::SIZE;
        let mask = mask | StatxFlags::from_bits_retain(STATX_MNT_ID_UNIQUE);
        let seen = rustix::fs::statx(&self.folder, &self.name, flags, mask)?;
        Ok(Seen {
            device: rustix::fs::makedev(seen.stx_dev_major, seen.stx_dev_minor),
            inode: seen.stx_ino,
            is_file: u32::from(seen.stx_mode) & libc::S_IFMT == libc::S_IFREG,
            is_directory: u32::from(seen.stx_mode) & libc::S_IFMT == libc::S_IFDIR,
            len: seen.stx_size,
            mount: seen.stx_mnt_id,
            is_unique: seen.stx_mask & STATX_MNT_ID_UNIQUE != 0,
        })
    }

    /// Whether this very file is there.
    pub fn has(&self, file: &File) -> bool {
        let ours = file.metadata().map(|file| (file.dev(), file.ino()));
        let seen = self.seen().map(|seen| (seen.device, seen.inode));
        ours.is_ok_and(|ours| seen.is_ok_and(|seen| seen == ours))
    }

    /// The very file, which cannot become a link to another meanwhile. It is not opened by this
    /// (`O_PATH`), and it is a regular one or a directory.
    pub fn file(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.folder, &self.name, flags, Mode::empty())?;
        match rustix::fs::fstat(&file)?.st_mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFDIR => Ok(file),
            libc::S_IFLNK => Err(io::Error::other("it is a symbolic link")),
            _ => Err(io::Error::other("it is no regular file")),
        }
    }

    /// Opens what is there, or, by these flags, makes it; links are not followed.
    pub fn open(&self, flags: OFlags, mode: u32) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mode = Mode::from_raw_mode(mode);
        Ok(File::from(rustix::fs::openat(&self.folder, &self.name, flags, mode)?))
    }

    /// Removes what is there, not what a link points to.
    pub fn remove(&self) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty())?)
    }

    /// Removes the directory that is there, if there is nothing in it.
    pub fn remove_directory(&self) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::REMOVEDIR)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_that_come_to_be_in_a_path_are_not_followed() {
        let sandbox = tempfile::tempdir().unwrap();
        let root = sandbox.path().canonicalize().unwrap();
        fs::create_dir(root.join("folder")).unwrap();
        fs::create_dir(root.join("other")).unwrap();
        fs::write(root.join("folder/disk"), "").unwrap();
        fs::write(root.join("other/disk"), "of value").unwrap();
        let path = root.join("folder/disk").canonicalize().unwrap();
        let place = Place::of(&path).unwrap();
        fs::rename(root.join("folder"), root.join("away")).unwrap();
        symlink("other", root.join("folder")).unwrap();
        // The one that was opened before is still itself; a new one is refused.
        assert_eq!((place.seen().unwrap().len, place.path_now()), (0, root.join("away/disk")));
        assert!(Place::of(&path).is_err());
        fs::remove_file(root.join("away/disk")).unwrap();
        symlink("../other/disk", root.join("away/disk")).unwrap();
        assert!(place.file().unwrap_err().to_string().contains("symbolic link"));
        assert!(place.open(OFlags::RDWR, 0).is_err());
        place.remove().unwrap();
        assert_eq!(fs::read(root.join("other/disk")).unwrap(), b"of value");
    }
}
