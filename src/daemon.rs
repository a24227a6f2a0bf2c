//! What scripts need: a background process that says when it is ready, and a file with its number.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::{locks, logging, sys};

/// In the background process: tells the one that the user started that the file can be used.
#[derive(Debug)]
pub struct Background {
    ready: File,
}

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Process {
    /// The one that the user started; it is to end with this status.
    Foreground(ExitCode),
    /// The one that serves.
    Background(Background),
}

/// Splits the process in two. The first waits until the second is ready, or carries its exit status if it
/// ends before that. Call it while there is one thread only.
pub fn split() -> io::Result<Process> {
    let (mut ready, writer) = std::io::pipe()?;
    let Some(child) = sys::fork()? else {
        return Ok(Process::Background(Background {
            ready: File::from(std::os::fd::OwnedFd::from(writer)),
        }));
    };
    drop(writer);
    let mut byte = [0];
    Ok(Process::Foreground(match ready.read(&mut byte)? {
        1 => ExitCode::SUCCESS,
        _ => ExitCode::from(sys::wait_for(child)?),
    }))
}

impl Background {
    /// Leaves the terminal and lets the foreground process end. From here on messages go to syslog.
    pub fn ready(mut self) -> io::Result<()> {
        sys::new_session()?;
        // Not to keep anybody's file system busy.
        std::env::set_current_dir("/")?;
        sys::standard_streams_to_null()?;
        logging::to_syslog();
        self.ready.write_all(&[1])
    }
}

/// A file with the number of this process, locked as long as it runs, and removed when dropped.
#[derive(Debug)]
pub struct Pidfile {
    path: PathBuf,
    file: File,
    /// We made the file, or wrote it. Else what is in it is not ours to remove.
    ours: bool,
}

/// The byte that is locked as long as the process runs.
const IN_USE: u64 = 0;
/// The byte that is locked when it is about to end.
const ENDING: u64 = 1;

const NO_PIDFILE: &str =
    "is not a pidfile: choose a path where nothing is, or a file with only a number in it";
/// More than any number and the white space around it.
const PIDFILE_BYTES: usize = 64;

impl Pidfile {
    /// Makes the file, still empty, or takes one that a process left, as it is, and locks it. The error says
    /// what to do about it.
    pub fn lock(path: &Path) -> Result<Pidfile, String> {
        let fail = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
        let not_one = || fail(&NO_PIDFILE);
        loop {
            let there = std::fs::metadata(path).ok();
            // Not even opened: that may do something to a device.
            if there.as_ref().is_some_and(|there| !there.is_file()) {
                return Err(not_one());
            }
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .open(path)
                .map_err(|e| fail(&format!("the pidfile cannot be written: {e}")))?;
            // The process changes its folder later.
            let canonical = path.canonicalize();
            let locked = locks::take(&file, IN_USE, ENDING);
            let number = number_in(&file).ok_or_else(not_one)?;
            match locked {
                // Who had it has removed it at its end.
                Ok(()) if !is_at(&file, path) => {}
                Ok(()) => {
                    let path = canonical.map_err(|e| fail(&e))?;
                    return Ok(Pidfile { path, file, ours: there.is_none() });
                }
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                    return Err(fail(&format!("the pidfile is in use by process {number}")));
                }
                Err(e) => return Err(fail(&format!("the pidfile cannot be locked: {e}"))),
            }
        }
    }

    /// The process is about to end: whoever waits for the file may go on waiting.
    pub fn ending(&self) {
        locks::say_ending(&self.file, ENDING);
    }

    /// Writes the number.
    pub fn write(&mut self) -> io::Result<()> {
        self.ours = true;
        self.file.set_len(0)?;
        writeln!(self.file, "{}", std::process::id())
    }
}

/// The number in a pidfile, empty if there is none yet; none if it holds anything else.
fn number_in(file: &File) -> Option<String> {
    let mut bytes = [0; PIDFILE_BYTES];
    let len = file.read_at(&mut bytes, 0).ok()?;
    // The kernel's own files, whose numbers mean something, are not as long as they claim.
    if file.metadata().ok()?.len() != len as u64 {
        return None;
    }
    let number = std::str::from_utf8(&bytes[..len]).ok()?.trim();
    number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.to_owned())
}

/// Whether `path` is this very file.
fn is_at(file: &File, path: &Path) -> bool {
    let inode = |found: io::Result<Metadata>| found.map(|there| (there.dev(), there.ino())).ok();
    let ours = inode(file.metadata());
    ours.is_some() && inode(std::fs::metadata(path)) == ours
}

/// Whether two paths name one file, be it there or not.
pub fn is_same_file(one: &Path, other: &Path) -> bool {
    let inode = |path| std::fs::metadata(path).map(|there| (there.dev(), there.ino())).ok();
    one == other || inode(one).is_some_and(|one| inode(other) == Some(one))
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // Somebody may have put another in its place.
        if self.ours
            && is_at(&self.file, &self.path)
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            log::warn!("{}: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pidfile_is_locked_written_and_removed() {
        let path = std::env::temp_dir().join(format!("diskfuse-pid-{}", std::process::id()));
        let mut pidfile = Pidfile::lock(&path).unwrap();
        pidfile.write().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
        let error = Pidfile::lock(&path).unwrap_err();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn a_pidfile_that_was_left_is_used_again_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        for left in ["", "\n", "123", " 4567\n"] {
            std::fs::write(&path, left).unwrap();
            drop(Pidfile::lock(&path).unwrap());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), left, "it was not written");
            let mut pidfile = Pidfile::lock(&path).unwrap();
            pidfile.write().unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(text, format!("{}\n", std::process::id()));
            drop(pidfile);
            assert!(!path.exists());
        }
        let long = "1".repeat(PIDFILE_BYTES + 1);
        for precious in ["x", "12 34", "-1", "1\0", long.as_str()] {
            std::fs::write(&path, precious).unwrap();
            let error = Pidfile::lock(&path).unwrap_err();
            assert!(error.contains("is not a pidfile"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), precious);
        }
        // A number, but not one to overwrite.
        for other in [folder.path(), "/proc/sys/kernel/pid_max".as_ref()] {
            let error = Pidfile::lock(other).unwrap_err();
            assert!(error.contains("pidfile"), "{error}");
        }
    }

    #[test]
    fn a_pidfile_may_be_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("pid"), folder.path().join("link"));
        std::os::unix::fs::symlink("pid", &link).unwrap();
        let pidfile = Pidfile::lock(&link).unwrap();
        assert!(is_same_file(&path, &link));
        drop(pidfile);
        assert!(link.is_symlink() && !path.exists());
    }
}
