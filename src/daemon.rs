//! What scripts need: a background process that says when it is ready, and a file with its number.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys;

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
        TO_SYSLOG.store(true, Ordering::Release);
        self.ready.write_all(&[1])
    }
}

static TO_SYSLOG: AtomicBool = AtomicBool::new(false);

/// Says something to whoever listens: stderr, or syslog once the process is in the background.
pub fn say(message: &str) {
    if TO_SYSLOG.load(Ordering::Acquire) {
        sys::syslog(message);
    } else {
        // stderr may be closed; there is nobody else to tell.
        let _ = writeln!(io::stderr(), "diskfuse: {message}");
    }
}

/// A file with the number of this process, locked as long as it runs, and removed when dropped.
#[derive(Debug)]
pub struct Pidfile {
    path: PathBuf,
    file: File,
}

impl Pidfile {
    /// Makes the file, still empty, and locks it. The error says what to do about it.
    pub fn lock(path: &Path) -> Result<Pidfile, String> {
        let fail = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
        // The process changes its folder later.
        let path = std::path::absolute(path).map_err(|e| fail(&e))?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(&path)
            .map_err(|e| fail(&format!("the pidfile cannot be written: {e}")))?;
        match sys::lock_byte(&file, 0) {
            Ok(()) => Ok(Pidfile { path, file }),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                Err(fail(&format!("the pidfile is in use by process {}", pid.trim())))
            }
            Err(e) => Err(fail(&format!("the pidfile cannot be locked: {e}"))),
        }
    }

    /// Writes the number.
    pub fn write(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        writeln!(self.file, "{}", std::process::id())
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // Only our own: somebody may have put another in its place.
        let ours = self.file.metadata().is_ok_and(|ours| {
            std::fs::metadata(&self.path)
                .is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()))
        });
        if ours && let Err(e) = std::fs::remove_file(&self.path) {
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
}
