//! The failures of the program, with the exit status of each.

use std::io;
use std::path::Path;

use super::hints;
use crate::backend::file;
use crate::backend::nbd::{self, Uri};
use crate::session;
use crate::sys;

/// The program's failures; each has an exit status.
#[derive(Debug)]
pub enum Failure {
    /// Status 1
    Serving(String),
    /// Status 2
    Usage(String),
    /// Status 3
    Source(String),
    /// Status 4
    Mount(String),
}

impl Failure {
    /// The exit status that scripts rely on.
    pub fn status(&self) -> u8 {
        match self {
            Failure::Serving(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Source(_) => 3,
            Failure::Mount(_) => 4,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Serving(why)
            | Failure::Usage(why)
            | Failure::Source(why)
            | Failure::Mount(why) => f.write_str(why),
        }
    }
}

/// Why something was not done to its end.
#[derive(Debug)]
pub enum NotDone {
    /// A signal has come.
    Stopped(sys::Signal),
    /// There was no thread to do it.
    NoThread(io::Error),
}

/// A thread that is needed cannot be started.
pub fn no_thread(e: io::Error) -> Failure {
    Failure::Serving(NotDone::NoThread(e).to_string())
}

impl std::fmt::Display for NotDone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NotDone::Stopped(signal) => write!(f, "stopped by signal {}", signal.number),
            NotDone::NoThread(e) => f.write_str(&session::no_thread(e)),
        }
    }
}

/// A source was not opened, and nothing is mounted yet.
pub fn not_opened(source: &str, why: &NotDone) -> Failure {
    Failure::Source(format!("{source}: {why} while it was opened"))
}

/// A local source cannot be opened.
pub fn local_failure(e: file::OpenError) -> Failure {
    Failure::Source(e.to_string())
}

/// The same, where the path may have been meant as another host's disk.
pub fn path_failure(path: &Path, e: &file::OpenError) -> Failure {
    Failure::Source(match hints::remote(path).filter(|_| !path.exists()) {
        Some(uri) => format!("{e}; for another host's disk say {uri}"),
        None => e.to_string(),
    })
}

/// A server cannot be reached, or has no such export.
pub fn remote_failure(uri: &Uri, e: &nbd::Error) -> Failure {
    Failure::Source(format!("{uri}: {e}"))
}
