//! The folder of a `--run` without MOUNTPOINT, which nobody else knows: so nobody else would clear
//! away what is left in it if the program is killed.
//!
//! A second process waits for the end of the first, however that comes: it reads a pipe whose other
//! end only the first has. Then it unmounts what is still there, and removes the file and the
//! folder.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use tempfile::TempDir;

use crate::mount;

/// The name by which this program is called to wait.
const NAME: &str = "diskfuse-cleaner";

/// A new folder, removed when dropped, with the mountpoint that is to be made in it.
#[derive(Debug)]
pub struct OwnFolder {
    mountpoint: PathBuf,
    /// None once it is removed.
    folder: Option<TempDir>,
    cleaner: Child,
}

impl OwnFolder {
    /// Makes the folder, for a file of this name. An error says what to do about it.
    pub fn new(name: &Path) -> Result<OwnFolder, String> {
        let elsewhere = |e: io::Error| format!("{e} (set TMPDIR, or give a MOUNTPOINT)");
        // An empty TMPDIR is none.
        let parent = Some(std::env::temp_dir()).filter(|path| !path.as_os_str().is_empty());
        let parent = parent.unwrap_or_else(|| "/tmp".into());
        let folder = tempfile::Builder::new().prefix("diskfuse-").tempdir_in(parent);
        let folder = folder.map_err(elsewhere)?;
        // As mountinfo has it.
        let mountpoint = folder.path().canonicalize().map_err(elsewhere)?.join(name);
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).arg(&mountpoint);
        // Whoever ends a whole process group does not mean this one.
        command.process_group(0);
        // Its input ends with this process; nobody waits for the end of its output.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let cleaner = command.spawn().map_err(|e| {
            format!("the process that is to remove it cannot be started: {e} (a larger ulimit -u, or pids.max of its cgroup; or give a MOUNTPOINT)")
        })?;
        Ok(OwnFolder { mountpoint, folder: Some(folder), cleaner })
    }

    /// Where the file is to be.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }
}

impl Drop for OwnFolder {
    fn drop(&mut self) {
        let removed = self.folder.take().map_or(Ok(()), TempDir::close);
        if let Err(e) = removed {
            // The other process tries again.
            log::warn!("{}: its folder cannot be removed: {e}", self.mountpoint.display());
        } else if let Err(e) = self.cleaner.kill().and_then(|()| self.cleaner.wait()) {
            log::debug!("{NAME}: {e}");
        }
    }
}

/// In the process that was started to wait: does so, and clears away. None if this is not one.
pub fn run_if_called() -> Option<ExitCode> {
    let mut words = std::env::args_os();
    if words.next()? != NAME {
        return None;
    }
    let mountpoint: Option<OsString> = words.next();
    let cleared = match mountpoint.as_deref().map(Path::new) {
        Some(mountpoint) => wait_for_end().and_then(|()| clear_away(mountpoint)),
        None => Err(io::ErrorKind::InvalidInput.into()),
    };
    Some(if cleared.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Until the pipe has no writer any more.
fn wait_for_end() -> io::Result<()> {
    let mut input = io::stdin().lock();
    while input.read(&mut [0])? > 0 {}
    Ok(())
}

fn clear_away(mountpoint: &Path) -> io::Result<()> {
    mount::take_away(mountpoint)?;
    let folder = mountpoint.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    // It is empty: whatever is not is somebody's, and keeps the folder.
    if mountpoint.symlink_metadata().is_ok_and(|file| file.is_file() && file.len() == 0) {
        gone(std::fs::remove_file(mountpoint))?;
    } else if mountpoint.symlink_metadata().is_ok_and(|folder| folder.is_dir()) {
        gone(std::fs::remove_dir(mountpoint))?;
    }
    gone(std::fs::remove_dir(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_cleared_away_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own");
        let file = own.join("disk");
        clear_away(&file).unwrap();
        std::fs::create_dir(&own).unwrap();
        std::fs::write(&file, "").unwrap();
        clear_away(&file).unwrap();
        assert!(!own.exists());
        std::fs::create_dir(&own).unwrap();
        std::fs::write(&file, "of value").unwrap();
        clear_away(&file).unwrap_err();
        assert!(file.exists());
    }
}
