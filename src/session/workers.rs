//! The threads at /dev/fuse.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::thread;

use polling::Poller;

use super::{Session, no_thread};
use crate::export::Served;
use crate::stats::{Stats, Transport};
use crate::sys;
use crate::transport::legacy::{ReaderToken, Worker};

/// More /dev/fuse workers than this only get in each other's way at the one queue.
const MOST_WORKERS: usize = 8;
/// Requests in flight for each worker, unless the user says otherwise.
pub const WORKER_DEPTH: usize = 128;

/// How many workers there are to be.
pub fn worker_count() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get()).min(MOST_WORKERS)
}

/// What the workers at /dev/fuse have in common.
pub struct Workers<'a, S> {
    device: &'a OwnedFd,
    export: &'a Arc<S>,
    stats: &'a Stats,
    ended: &'a Arc<Poller>,
    depth: usize,
    reader_token: ReaderToken,
    started: usize,
}

impl<'a, S: Served> Workers<'a, S> {
    /// None yet, each with so many requests in flight.
    pub fn new(
        device: &'a OwnedFd,
        export: &'a Arc<S>,
        stats: &'a Stats,
        ended: &'a Arc<Poller>,
        depth: usize,
    ) -> Workers<'a, S> {
        let reader_token = ReaderToken::default();
        Workers { device, export, stats, ended, depth, reader_token, started: 0 }
    }

    /// Starts workers until there are so many; one after the other, and no more once there is not
    /// enough of something. An error if there is none.
    pub fn start_until(&mut self, count: usize, session: &mut Session) -> Result<(), String> {
        while self.started < count {
            match self.start_one(session) {
                Ok(()) => self.started += 1,
                Err(why) if self.started == 0 => return Err(why),
                Err(why) => {
                    log::warn!("served by {} of {count} threads: {why}", self.started);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Starts one, and waits until it can serve.
    fn start_one(&self, session: &mut Session) -> Result<(), String> {
        let device = match self.started {
            0 => self.device.try_clone(),
            _ => sys::clone_fuse_device(self.device),
        };
        let worker = Worker {
            device: device.map_err(|e| format!("/dev/fuse cannot be opened again: {e}"))?,
            export: self.export.clone(),
            stats: self.stats.thread(Transport::Legacy),
            reader_token: self.reader_token.clone(),
            depth: self.depth,
            connection_end: session.connection_end.clone(),
            interrupts: session.interrupts.clone(),
        };
        let (report, can_serve) = mpsc::channel();
        session
            .spawn(format!("fuse-{}", self.started), self.ended, move || worker.run(report))
            .map_err(|e| no_thread(&e))?;
        match can_serve.recv() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) if e.kind() == io::ErrorKind::OutOfMemory => {
                Err("not enough memory to serve (a larger ulimit -v, or a smaller --queue-depth)"
                    .into())
            }
            Ok(Err(e)) => Err(format!("a thread cannot serve: {e}")),
            Err(_) => Err("a thread has panicked".into()),
        }
    }
}
