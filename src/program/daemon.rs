//! What scripts need: a background process that says when it is ready, and a file with its number.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::mount::place::Place;
use crate::program::logging;
use crate::{locks, sys};

/// In the background process: tells the one that the user started that the file can be used.
#[derive(Debug)]
pub struct Background {
    ready: File,
}

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Process {
    /// The one that the user started; it is to end with this status.
    Foreground(u8),
    /// The one that serves.
    Background(Background),
}

/// Splits the process in two. The first waits until the second is ready, or carries its exit status
/// if it ends before that; if the first is ended by a signal meanwhile, the second is too.
///
/// The second keeps no descriptors that the program was started with, whose other ends somebody may
/// wait for, or which hold a lock; but for the standard streams, until it is ready, and those that
/// `paths` name.
///
/// # Safety
/// There is one thread only, and nothing is open but what the program was started with.
pub unsafe fn split<'a>(paths: impl IntoIterator<Item = &'a Path>) -> io::Result<Process> {
    let (mut ready, writer) = std::io::pipe()?;
    let foreground = rustix::process::getpid();
    // SAFETY: there is one thread, as the caller promises.
    let Some(child) = unsafe { sys::fork() }? else {
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        if rustix::process::getppid() != Some(foreground) {
            return Err(io::Error::other("the foreground process has ended"));
        }
        let named = paths.into_iter().filter_map(descriptor_in);
        let kept: Vec<_> = named.chain([ready.as_raw_fd(), writer.as_raw_fd()]).collect();
        // SAFETY: the pipe is kept, and nothing else is open, as the caller promises.
        unsafe { sys::close_inherited(&kept) }?;
        return Ok(Process::Background(Background {
            ready: File::from(std::os::fd::OwnedFd::from(writer)),
        }));
    };
    drop(writer);
    let mut byte = [0];
    Ok(Process::Foreground(match ready.read(&mut byte)? {
        1 => 0,
        _ => status_of(child)?,
    }))
}

/// Waits for a child to end, and gives its exit status as a shell has it: 128 and the signal that
/// killed it.
fn status_of(child: Pid) -> io::Result<u8> {
    loop {
        let ended = match waitpid(Some(child), WaitOptions::empty()) {
            Err(Errno::INTR) => continue,
            ended => ended?,
        };
        if let Some((_, status)) = ended {
            let signal = status.terminating_signal().unwrap_or_default();
            return Ok(status.exit_status().unwrap_or(128 + signal) as u8);
        }
    }
}

/// The descriptor that a path such as /dev/fd/9 names, or leads through.
fn descriptor_in(path: &Path) -> Option<RawFd> {
    let folders = ["/dev/fd", "/proc/self/fd", "/proc/thread-self/fd"];
    let rest = folders.into_iter().find_map(|folder| path.strip_prefix(folder).ok())?;
    rest.components().next()?.as_os_str().to_str()?.parse().ok()
}

impl Background {
    /// Leaves the terminal and lets the foreground process end. From here on messages go to syslog.
    pub fn ready(mut self) -> io::Result<()> {
        rustix::process::setsid()?;
        // Not to keep anybody's file system busy.
        std::env::set_current_dir("/")?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        logging::to_syslog();
        // The end of the foreground process is what is wanted from here on.
        rustix::process::set_parent_process_death_signal(None)?;
        self.ready.write_all(&[1])
    }
}

/// A file with the number of this process, locked as long as it runs, and removed when dropped.
#[derive(Debug)]
pub struct Pidfile {
    place: Place,
    file: File,
    /// We made the file, or wrote it. Else what is in it is not ours to remove.
    ours: bool,
}

/// The byte that is locked as long as the process runs.
const IN_USE: u64 = 0;
/// The byte that is locked when it is about to end.
const ENDING: u64 = 1;

const NO_PIDFILE: &str = "is not a pidfile: choose a path where nothing is, or a regular file (no link) with only a number in it";
/// More than any number and the white space around it.
const PIDFILE_BYTES: usize = 64;

impl Pidfile {
    /// Makes the file, still empty, or takes one that a process left, as it is, and locks it. The
    /// error says what to do about it.
    ///
    /// root's pidfile may be in a folder that others can write to: what they put there leads to no
    /// other file.
    pub fn lock(path: &Path) -> Result<Pidfile, String> {
        let fail = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
        let not_written = |e| fail(&format!("the pidfile cannot be written: {e}"));
        let not_one = || fail(&NO_PIDFILE);
        let place = Place::named(path).map_err(not_written)?;
        loop {
            // Not even opened before: that may do something to a device.
            let (file, is_new) = match place.seen() {
                Ok(there) if !there.is_file => return Err(not_one()),
                Ok(_) => (place.open(OFlags::RDWR, 0), false),
                Err(_) => (place.open(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, 0o644), true),
            };
            let file = match file {
                Ok(file) => file,
                // It has come or gone between the two.
                Err(e)
                    if e.raw_os_error()
                        == Some(if is_new { libc::EEXIST } else { libc::ENOENT }) =>
                {
                    continue;
                }
                Err(e) => return Err(not_written(e)),
            };
            let locked = locks::take(&file, IN_USE, ENDING);
            let number = number_in(&file).ok_or_else(not_one)?;
            match locked {
                // Who had it has removed it at its end.
                Ok(()) if !place.has(&file) => {}
                Ok(()) => return Ok(Pidfile { place, file, ours: is_new }),
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                    return Err(fail(&format!(
                        "the pidfile is in use by process {number}: end that, or choose another path"
                    )));
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
    let there = file.metadata().ok()?;
    // The kernel's own files, whose numbers mean something, are not as long as they claim. And what
    // has another name is somebody's.
    if !there.is_file() || there.len() != len as u64 || there.nlink() > 1 {
        return None;
    }
    let number = std::str::from_utf8(&bytes[..len]).ok()?.trim();
    number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.to_owned())
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
            && self.place.has(&self.file)
            && let Err(e) = self.place.remove()
        {
            log::warn!("{}: the pidfile cannot be removed: {e}", self.place.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_name_a_descriptor() {
        let named = |path: &str| descriptor_in(Path::new(path));
        assert_eq!(named("/dev/fd/9"), Some(9));
        assert_eq!(named("//dev//fd/10/disk.img"), Some(10));
        assert_eq!(named("/proc/self/fd/3"), Some(3));
        for other in ["/dev/fd", "/dev/fd/x", "/proc/1/fd/3", "dev/fd/3", "9"] {
            assert_eq!(named(other), None, "{other}");
        }
    }

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
    fn a_pidfile_is_no_link_to_anything() {
        let folder = tempfile::tempdir().unwrap();
        let join = |name| folder.path().join(name);
        // An empty file, or one with a number, may be of value all the same.
        for (target, content) in [("empty", ""), ("number", "17\n")] {
            std::fs::write(join(target), content).unwrap();
            std::os::unix::fs::symlink(target, join("link")).unwrap();
            std::fs::hard_link(join(target), join("name")).unwrap();
            for other in ["link", "name"] {
                let error = Pidfile::lock(&join(other)).unwrap_err();
                assert!(error.contains("is not a pidfile"), "{error}");
                assert_eq!(std::fs::read_to_string(join(target)).unwrap(), content);
                std::fs::remove_file(join(other)).unwrap();
            }
        }
        std::os::unix::fs::symlink("nowhere", join("link")).unwrap();
        assert!(Pidfile::lock(&join("link")).unwrap_err().contains("is not a pidfile"));
        assert!(!join("nowhere").exists());
    }

    #[test]
    fn what_takes_a_pidfiles_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let join = |name| folder.path().join(name);
        let mut pidfile = Pidfile::lock(&join("pid")).unwrap();
        pidfile.write().unwrap();
        std::fs::rename(join("pid"), join("away")).unwrap();
        std::os::unix::fs::symlink("away", join("pid")).unwrap();
        drop(pidfile);
        assert!(join("pid").is_symlink() && join("away").exists());
    }

    #[test]
    fn a_pidfiles_folder_may_be_a_link_and_move() {
        let folder = tempfile::tempdir().unwrap();
        let join = |name| folder.path().join(name);
        std::fs::create_dir(join("run")).unwrap();
        std::os::unix::fs::symlink("run", join("link")).unwrap();
        let mut pidfile = Pidfile::lock(&join("link/pid")).unwrap();
        pidfile.write().unwrap();
        assert!(join("run/pid").exists());
        std::fs::rename(join("run"), join("moved")).unwrap();
        drop(pidfile);
        assert!(!join("moved/pid").exists());
    }
}
