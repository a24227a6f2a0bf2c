//! What has to be done on this program's own mount, by another process: whoever waits for an answer
//! of a serving process must not be that process, or neither would come to its end.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use crate::sys;

/// The name by which this program is called for an errand.
const NAME: &str = "diskfuse-errand";

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Read the first bytes, or a directory's first entry, as a client would.
    Read,
    /// Have the kernel write what its page cache holds.
    WriteBack,
    /// Tell the kernel the size, in bytes: with write-back it believes no answer but that to a
    /// truncation.
    Size(u64),
}

impl Errand {
    /// Starts a process that does it with the file at `path`, if that is still of the file system
    /// `device`: when the file is unmounted, what is beneath it is the user's. Else it fails with
    /// `ESTALE`.
    pub fn begin(self, path: &Path, device: u64) -> io::Result<Running> {
        let (what, size) = match self {
            Errand::Read => ("read", 0),
            Errand::WriteBack => ("write-back", 0),
            Errand::Size(size) => ("size", size),
        };
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).arg(what).arg(path).args([device.to_string(), size.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().map(Running)
    }

    fn parse(mut words: impl Iterator<Item = OsString>) -> Option<(Errand, PathBuf, u64)> {
        let what = words.next()?;
        let path = words.next()?.into();
        let mut number = || words.next()?.to_str()?.parse().ok();
        let (device, size) = (number()?, number()?);
        let errand = match what.to_str()? {
            "read" => Errand::Read,
            "write-back" => Errand::WriteBack,
            "size" => Errand::Size(size),
            _ => return None,
        };
        Some((errand, path, device))
    }

    fn run(self, path: &Path, device: u64) -> io::Result<()> {
        // The very file, whatever comes to be at the path. It is not opened by this.
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let place = File::options().read(true).custom_flags(flags).open(path)?;
        if place.metadata()?.dev() != device {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        let path = &PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
        match self {
            Errand::Read if place.metadata()?.is_dir() => {
                path.read_dir()?.next().transpose().map(drop)
            }
            Errand::Read => File::open(path)?.read_at(&mut [0; 4096], 0).map(drop),
            Errand::WriteBack => File::open(path)?.sync_all(),
            Errand::Size(size) => sys::truncate(path, size),
        }
    }
}

/// In the process that was started for an errand: does it, and gives the exit status. None if this
/// is not one.
pub fn run_if_called() -> Option<ExitCode> {
    let mut words = std::env::args_os();
    if words.next()? != NAME {
        return None;
    }
    let done = match Errand::parse(words) {
        Some((errand, path, device)) => errand.run(&path, device),
        None => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = write!(io::stderr(), "{}", e.raw_os_error().unwrap_or(0));
            ExitCode::FAILURE
        }
    })
}

/// An errand under way.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// How it has ended, if it has. SIGCHLD tells when to ask.
    pub fn end(&mut self) -> Option<io::Result<()>> {
        match self.0.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(self.outcome(status)),
            Err(e) => Some(Err(e)),
        }
    }

    fn outcome(&mut self, status: ExitStatus) -> io::Result<()> {
        if status.success() {
            return Ok(());
        }
        let mut why = String::new();
        if let Some(stderr) = &mut self.0.stderr {
            // What it says is a help, not a need.
            let _ = stderr.read_to_string(&mut why);
        }
        Err(match why.trim().parse() {
            Ok(errno) => io::Error::from_raw_os_error(errno),
            Err(_) => io::Error::other(format!("its process: {status}")),
        })
    }

    /// Gives it up. It ends with the connection at the latest.
    pub fn give_up(mut self) {
        let _ = self.0.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood_as_they_are_given() {
        let parse = |words: &[&str]| Errand::parse(words.iter().map(OsString::from));
        let path = PathBuf::from("/disk");
        assert_eq!(parse(&["read", "/disk", "7", "0"]), Some((Errand::Read, path.clone(), 7)));
        let write_back = Some((Errand::WriteBack, path.clone(), 7));
        assert_eq!(parse(&["write-back", "/disk", "7", "0"]), write_back);
        assert_eq!(parse(&["size", "/disk", "7", "4096"]), Some((Errand::Size(4096), path, 7)));
        assert_eq!(parse(&["size", "/disk", "7", "much"]), None);
        assert_eq!(parse(&["size", "/disk"]), None);
        assert_eq!(parse(&["nonsense", "/disk"]), None);
    }

    #[test]
    fn each_does_its_work() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let device = folder.path().metadata().unwrap().dev();
        let errno = |errand: Errand, device| errand.run(&path, device).unwrap_err().raw_os_error();
        assert_eq!(errno(Errand::Read, device), Some(libc::ENOENT));
        std::fs::write(&path, [1; 100]).unwrap();
        Errand::Read.run(&path, device).unwrap();
        Errand::WriteBack.run(&path, device).unwrap();
        // What is beneath an unmounted file stays as it is.
        assert_eq!(errno(Errand::Size(10), device + 1), Some(libc::ESTALE));
        assert_eq!(std::fs::read(&path).unwrap(), [1; 100]);
        Errand::Size(10).run(&path, device).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [1; 10]);
    }
}
