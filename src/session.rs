//! A FUSE session: the INIT exchange, and the threads that serve afterwards.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use polling::Poller;

use crate::export::{Cache, Served};
use crate::fuse::abi::Plain;
use crate::fuse::abi::init as flag;
use crate::fuse::notify::Notifier;
use crate::program::cli::Switch;
use crate::stats::{Serving, Stats, Transport};
use crate::transport::cpus::Cpus;
use crate::transport::interrupts::Interrupts;

use rings::{give_up_rings, has_over_io_uring, not_offered};
pub use workers::worker_count;
use workers::{WORKER_DEPTH, Workers};

mod init;
mod rings;
mod workers;

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// FUSE over io_uring.
    pub io_uring: Switch,
    /// Whose queues it serves; or why they are not known.
    pub cpus: Result<Cpus, String>,
    /// Requests in flight for each serving thread.
    pub queue_depth: Option<usize>,
    /// How far the kernel may read ahead, in bytes, as far as it lets itself be told.
    pub read_ahead: u64,
}

/// Whether the connection has ended, which its threads find out: they may still wait for a source
/// that hangs.
#[derive(Debug)]
pub struct ConnectionEnd {
    has_come: AtomicBool,
    /// Whose waiter has to know.
    poller: Arc<Poller>,
}

impl ConnectionEnd {
    /// It has come.
    pub fn note(&self) {
        if !self.has_come.swap(true, Ordering::AcqRel)
            && let Err(e) = self.poller.notify()
        {
            log::error!("the control thread cannot be woken: {e}");
        }
    }
}

/// The serving threads of a connection.
pub struct Session {
    threads: Vec<JoinHandle<()>>,
    /// Threads whose end has not been taken note of.
    running: usize,
    /// One of them has failed.
    failed: bool,
    ends: (mpsc::Sender<End>, mpsc::Receiver<End>),
    connection_end: Arc<ConnectionEnd>,
    interrupts: Interrupts,
}

/// A thread's name, and what became of it; an error without a reason is a panic, which has given
/// its own.
type End = (String, Result<(), Option<io::Error>>);

impl Session {
    /// Answers INIT and starts to serve. `ended` is notified whenever a serving thread has ended.
    /// An error says what to do about it.
    ///
    /// ```text
    ///   session                       ring threads                  kernel
    ///      │ <── INIT ─────────────────────────────────────────────────┤
    ///      ├── spawn ───────────────────> │                            │
    ///      │ <── Ready or NoRing ─────────┤ have a ring and memory     │
    ///      ├── spawn /dev/fuse's workers: one beside rings             │
    ///      ├── INIT's reply ─────────────────────────────────────────> │
    ///      ├── proceed ─────────────────> │                            │
    ///      │                              ├── register all entries ──> │
    ///      └── Registered or Refused ─────┤ <── requests ──────────────┘
    /// ```
    ///
    /// What serving needs, memory above all, is had before the kernel hears of it. The reply
    /// promises rings if all threads are Ready. After a NoRing `proceed` is dropped, which ends the
    /// threads that are. Then, and after a Refused, everything comes by /dev/fuse, unless the user
    /// insists on rings.
    pub fn start<S: Served>(
        device: OwnedFd,
        export: &Arc<S>,
        options: Options,
        stats: &Stats,
        ended: &Arc<Poller>,
    ) -> Result<Session, String> {
        let fuse = |e: io::Error| format!("/dev/fuse: {e}");
        let (request, offer) = init::read(&device).map_err(fuse)?;
        let connection_end =
            ConnectionEnd { has_come: AtomicBool::new(false), poller: ended.clone() };
        let mut session = Session {
            threads: Vec::new(),
            running: 0,
            failed: false,
            ends: mpsc::channel(),
            connection_end: Arc::new(connection_end),
            interrupts: Interrupts::default(),
        };
        let mut rings = match options.io_uring {
            Switch::Off => None,
            Switch::Auto if !has_over_io_uring(&offer) => {
                log::info!("serving by /dev/fuse, no FUSE over io_uring: {}", not_offered());
                None
            }
            when => match session.start_rings(&device, &offer, export, &options, stats, ended) {
                Ok(rings) => Some(rings),
                Err(why) => {
                    give_up_rings(when, &why)?;
                    // The workers need the memory that its threads had.
                    session.join_all();
                    None
                }
            },
        };
        let worker_depth = options.queue_depth.unwrap_or(WORKER_DEPTH);
        let mut workers = Workers::new(&device, export, stats, ended, worker_depth);
        // Beside rings, only stragglers and what needs no answer come by /dev/fuse: one will do.
        let beside_rings = if rings.is_some() { 1 } else { worker_count() };
        if let Err(why) = workers.start_until(beside_rings, &mut session) {
            if rings.take().is_none() {
                return Err(why);
            }
            give_up_rings(options.io_uring, &why)?;
            session.join_all();
            workers.start_until(worker_count(), &mut session)?;
        }
        let (ring_requests, ring_depth) =
            rings.as_ref().map_or((0, 0), |rings| (rings.in_flight, rings.depth));
        let in_flight = ring_requests.max(worker_depth * worker_count());
        let mut wanted = init::WANTED;
        if rings.is_some() {
            wanted |= flag::OVER_IO_URING;
        }
        // An open with O_TRUNC then makes the kernel believe in a size of 0, whatever the answer to
        // it.
        if export.growable() {
            wanted |= flag::ATOMIC_O_TRUNC;
        }
        if export.cache() == Cache::Writeback {
            wanted |= flag::WRITEBACK_CACHE;
        }
        let reply = init::reply(&offer, in_flight, wanted, options.read_ahead);
        if wanted & !init::flags(&offer) & flag::WRITEBACK_CACHE != 0 {
            return Err(
                "this kernel has no write-back cache for FUSE: use --cache writethrough".into()
            );
        }
        // The flag came with it.
        let coherent = init::flags(&offer) & flag::DIRECT_IO_ALLOW_MMAP != 0;
        export.set_notifier(Notifier::new(device.try_clone().map_err(fuse)?, coherent));
        init::send(&device, request.unique, reply.as_bytes()).map_err(fuse)?;

        let mut by_ring = false;
        if let Some(rings) = rings {
            match rings.register() {
                Ok(()) => by_ring = true,
                Err(why) => {
                    give_up_rings(options.io_uring, &why)?;
                    workers.start_until(worker_count(), &mut session)?;
                }
            }
        }
        let transport = if by_ring { Transport::Uring } else { Transport::Legacy };
        let queue_depth = if by_ring { ring_depth } else { worker_depth };
        stats.set_serving(Serving { transport, queue_depth });
        log::info!("serving by {transport}, {} threads", session.running);
        Ok(session)
    }

    fn spawn(
        &mut self,
        name: String,
        ended: &Arc<Poller>,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let (sender, ended) = (self.ends.0.clone(), ended.clone());
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            let result = std::panic::catch_unwind(AssertUnwindSafe(work));
            let result = result.map_or(Err(None), |result| result.map_err(Some));
            // First the end, then the notification: whoever is woken must find it.
            let _ = sender.send((name, result));
            if let Err(e) = ended.notify() {
                log::error!("the control thread cannot be woken: {e}");
            }
        })?;
        self.running += 1;
        self.threads.push(thread);
        Ok(())
    }

    /// Takes note of the threads that have ended; whether one of them, or an earlier one, failed.
    pub fn has_failed(&mut self) -> bool {
        while let Ok(end) = self.ends.1.try_recv() {
            self.note(end);
        }
        self.failed
    }

    fn note(&mut self, (name, result): End) {
        self.running -= 1;
        if let Err(why) = result {
            self.failed = true;
            match why {
                Some(e) => log::error!("{name}: {e}"),
                None => log::error!("{name} has panicked"),
            }
        }
    }

    /// Waits until all threads have ended, as they are about to.
    fn join_all(&mut self) {
        while self.running > 0
            && let Ok(end) = self.ends.1.recv()
        {
            self.note(end);
        }
        self.has_ended();
    }

    /// Whether the connection has ended: nobody is served any more.
    pub fn connection_has_ended(&self) -> bool {
        self.connection_end.has_come.load(Ordering::Acquire)
    }

    /// Whether all threads have ended, as far as [`Session::has_failed`] has taken note; they are
    /// gone then.
    pub fn has_ended(&mut self) -> bool {
        if self.running == 0 {
            for thread in self.threads.drain(..) {
                // What it had to say was said in its end.
                let _ = thread.join();
            }
        }
        self.running == 0
    }
}

/// Why there is no thread, and the cure.
pub fn no_thread(e: &io::Error) -> String {
    format!("a thread cannot be started: {e} (a larger ulimit -u or -v, or pids.max of its cgroup)")
}
