//! How many descriptors there may be, and what has room in them.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::directory;
use crate::program::cli::{Config, Switch};
use crate::program::failure::Failure;
use crate::session;
use crate::transport::cpus::Cpus;

/// Descriptors that are open whatever is served.
const FILES_IN_ALL: u64 = 32;
/// Those that a serving thread needs.
const FILES_OF_A_THREAD: u64 = 8;

/// How many there are to be for so many serving threads.
fn wanted_for(threads: usize) -> u64 {
    FILES_IN_ALL + FILES_OF_A_THREAD * threads as u64
}

/// Sees to it that `wanted` files can be open at once, as far as the hard limit (`RLIMIT_NOFILE`)
/// allows. How many can be.
fn raise_open_files(wanted: u64) -> io::Result<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // None: no limit.
    let needed = wanted.min(maximum.unwrap_or(u64::MAX));
    match current {
        Some(current) if current < needed => {
            setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum })?;
            Ok(needed)
        }
        current => Ok(current.unwrap_or(u64::MAX)),
    }
}

/// How many files of a directory may be connected at a time, by the descriptors that there may be
/// beside those of the threads. None at all is an error.
pub(super) fn allow_connected(config: &Config) -> Result<usize, Failure> {
    let rings = Cpus::here().map_or(0, |cpus| cpus.usable.len());
    let others = wanted_for(session::worker_count() + rings);
    let each = config.remote.most_connections() as u64;
    let wanted = others + directory::MOST_CONNECTED as u64 * each;
    let allowed = raise_open_files(wanted);
    let allowed = allowed.map_err(|e| Failure::Mount(format!("the limit of open files: {e}")))?;
    match (allowed.saturating_sub(others) / each) as usize {
        0 => Err(Failure::Mount(format!(
            "{allowed} open files are not enough for a connection (a larger ulimit -n)"
        ))),
        most => Ok(most.min(directory::MOST_CONNECTED)),
    }
}

/// Threads that serve need descriptors, and without them would fail one after the other behind a
/// mount. Says whether there are enough for so many threads with rings.
pub(super) fn allow_open_files(config: &Config, ring_threads: usize) -> Result<Switch, Failure> {
    let limit = |threads: usize| {
        let wanted = wanted_for(threads);
        match raise_open_files(wanted) {
            Ok(allowed) if allowed < wanted => {
                Err(format!("{allowed} open files are not enough: {wanted} may be needed"))
            }
            Ok(_) => Ok(()),
            Err(e) => Err(format!("the limit of open files: {e}")),
        }
    };
    let workers = session::worker_count();
    limit(workers).map_err(|why| Failure::Mount(format!("{why} (a larger ulimit -n)")))?;
    if config.io_uring == Switch::Off {
        return Ok(Switch::Off);
    }
    match (limit(workers + ring_threads), config.io_uring) {
        (Ok(()), when) => Ok(when),
        (Err(why), Switch::Auto) => {
            log::warn!("serving by /dev/fuse, no FUSE over io_uring: {why} (a larger ulimit -n)");
            Ok(Switch::Off)
        }
        (Err(why), _) => Err(Failure::Mount(format!(
            "no FUSE over io_uring: {why} (a larger ulimit -n), or use --io-uring off"
        ))),
    }
}
