//! A FUSE session: the INIT exchange, and the threads that serve afterwards.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use crate::backend::WaitsFor;
use crate::export::{Cache, Served};
use crate::fuse::abi::init as flag;
use crate::fuse::abi::{InitIn, Plain};
use crate::fuse::notify::Notifier;
use crate::program::cli::Switch;
use crate::stats::{Serving, Stats, Transport};
use crate::sys;
use crate::transport::cpus::Cpus;
use crate::transport::interrupts::Interrupts;
use crate::transport::legacy::{ReaderToken, Worker};
use crate::transport::queues::Queues;
use crate::transport::uring::{Depths, Progress, RingThread};
use polling::Poller;

mod init;

/// More /dev/fuse workers than this only get in each other's way at the one queue.
const MOST_WORKERS: usize = 8;
/// Requests in flight for each worker, unless the user says otherwise.
const WORKER_DEPTH: usize = 128;
/// Entries of all ring queues together, unless the user says otherwise. Each maps 1 MiB, of which
/// pages become resident when they are used.
const RING_REQUESTS: usize = 1024;
/// Entries that one queue may have of them, unless the user says otherwise. The kernel's queue is
/// that of the submitter's CPU and spills to no other, so this is what one client can keep in
/// flight.
const QUEUE_DEPTH: usize = 128;
/// Entries that a queue begins with where the backend only copies: few large buffers stay in the
/// cache.
const FIRST_COPIES: usize = 4;
/// Those where requests wait for a disk or a server: a part of all that there may be, and no more
/// than this. An entry that is registered late takes new requests only; those that the kernel keeps
/// already wait until others are answered.
const FIRST_WAITING: usize = 64;

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

/// The completion threads, waiting for INIT to be answered.
struct Rings {
    proceed: Vec<mpsc::Sender<()>>,
    progress: mpsc::Receiver<Progress>,
    /// How many requests may be in flight, in all and for each thread.
    in_flight: usize,
    depth: usize,
}

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
        let mut workers = Workers {
            device: &device,
            export,
            stats,
            ended,
            depth: worker_depth,
            reader_token: ReaderToken::default(),
            started: 0,
        };
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

    /// Starts a completion thread for each CPU, and waits until all have their rings.
    fn start_rings<S: Served>(
        &mut self,
        device: &OwnedFd,
        offer: &InitIn,
        export: &Arc<S>,
        options: &Options,
        stats: &Stats,
        ended: &Arc<Poller>,
    ) -> Result<Rings, String> {
        if init::flags(offer) & flag::OVER_IO_URING == 0 {
            return Err(not_offered());
        }
        let cpus = options.cpus.as_ref()?;
        let threads = cpus.usable.len();
        let waits_for = export.waits_for();
        let (depths, in_flight) = share_entries(options.queue_depth, waits_for, threads);
        let (report, progress) = mpsc::channel();
        let mut proceed = Vec::new();
        let (queues, receivers) = Queues::new(cpus, in_flight);
        for (number, (requests, &cpu)) in receivers.into_iter().zip(&cpus.usable).enumerate() {
            let (sender, may_proceed) = mpsc::channel();
            proceed.push(sender);
            // Of its own: the kernel counts each command in what is open, and threads would take
            // turns with that counter.
            let device = sys::clone_fuse_device(device).or_else(|_| device.try_clone());
            let thread = RingThread {
                device: device.map_err(|e| e.to_string())?,
                number,
                cpu,
                depths,
                queues: queues.clone(),
                requests,
                export: export.clone(),
                stats: stats.thread(Transport::Uring),
                connection_end: self.connection_end.clone(),
                interrupts: self.interrupts.clone(),
            };
            let report = report.clone();
            self.spawn(format!("ring-{cpu}"), ended, move || thread.run(report, may_proceed))
                .map_err(|e| no_thread(&e))?;
        }
        drop(report);
        // The first failure ends it: dropping `proceed` ends the threads that are ready.
        for _ in 0..threads {
            match progress.recv() {
                Ok(Progress::Ready) => {}
                Ok(Progress::NoRing(e)) => return Err(no_ring(&e)),
                other => return Err(format!("a thread has ended early: {other:?}")),
            }
        }
        Ok(Rings { proceed, progress, in_flight, depth: depths.most })
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

/// What the workers at /dev/fuse have in common.
struct Workers<'a, S> {
    device: &'a OwnedFd,
    export: &'a Arc<S>,
    stats: &'a Stats,
    ended: &'a Arc<Poller>,
    depth: usize,
    reader_token: ReaderToken,
    started: usize,
}

impl<S: Served> Workers<'_, S> {
    /// Starts workers until there are so many; one after the other, and no more once there is not
    /// enough of something. An error if there is none.
    fn start_until(&mut self, count: usize, session: &mut Session) -> Result<(), String> {
        while self.started < count {
            match self.start_one(session) {
                Ok(()) => self.started += 1,
                Err(why) if self.started == 0 => return Err(why),
                Err(why) => {
                    log::warn!("served by {} threads instead of {count}: {why}", self.started);
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

impl Rings {
    /// Has all threads register their entries, and waits until they have.
    fn register(self) -> Result<(), String> {
        let threads = self.proceed.len();
        for proceed in self.proceed {
            // A thread that has ended reports nothing below.
            let _ = proceed.send(());
        }
        let mut refused = None;
        for _ in 0..threads {
            match self.progress.recv() {
                Ok(Progress::Registered) => {}
                Ok(Progress::Refused(e)) => refused = Some(e.to_string()),
                other => refused = Some(format!("{other:?}")),
            }
        }
        match refused {
            Some(why) => Err(format!("the kernel refused the ring's entries: {why}")),
            None => Ok(()),
        }
    }
}

/// Goes on without rings, unless the user insists on them.
fn give_up_rings(when: Switch, why: &str) -> Result<(), String> {
    if when == Switch::On {
        return Err(format!("no FUSE over io_uring: {why}, or use --io-uring off"));
    }
    log::warn!("serving by /dev/fuse, no FUSE over io_uring: {why}");
    Ok(())
}

/// Switches FUSE over io_uring on; only kernels that have it have this.
const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// Whether the kernel has FUSE over io_uring, be it switched off. Where it has none there is no
/// choice to warn about.
fn has_over_io_uring(offer: &InitIn) -> bool {
    init::flags(offer) & flag::OVER_IO_URING != 0 || Path::new(PARAMETER).exists()
}

/// Why the kernel did not offer io_uring, and the cure.
fn not_offered() -> String {
    match std::fs::read_to_string(PARAMETER) {
        Ok(value) if value.trim() == "N" => {
            format!("it is switched off (echo Y > {PARAMETER} as root)")
        }
        Ok(_) => "the kernel did not offer it".into(),
        Err(_) => "this kernel has none (Linux 6.14 with CONFIG_FUSE_IO_URING is needed)".into(),
    }
}

/// Why there is no thread, and the cure.
pub fn no_thread(e: &io::Error) -> String {
    format!("a thread cannot be started: {e} (a larger ulimit -u or -v, or pids.max of its cgroup)")
}

/// Why there is no ring, and the cure.
fn no_ring(e: &io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden here (sysctl kernel.io_uring_disabled=0, or a container's seccomp profile that allows it)".into()
        }
        Some(libc::ENOSYS) => {
            "io_uring is not there (a kernel with CONFIG_IO_URING, or a seccomp profile that allows it)".into()
        }
        Some(libc::ENOMEM) => {
            "not enough memory for the rings (a larger ulimit -l or -v, or a smaller --queue-depth)".into()
        }
        Some(libc::EMFILE) => "not enough open files for the rings (a larger ulimit -n)".into(),
        _ => format!("a ring cannot be set up ({e})"),
    }
}

/// How many workers there are to be.
pub fn worker_count() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get()).min(MOST_WORKERS)
}

/// How many entries each queue may have, and all together, with so many threads.
fn share_entries(wished: Option<usize>, waits_for: WaitsFor, threads: usize) -> (Depths, usize) {
    let most = wished.unwrap_or(QUEUE_DEPTH);
    let all = RING_REQUESTS.max(wished.unwrap_or(0) * threads);
    let first = match waits_for {
        WaitsFor::Memory => FIRST_COPIES,
        WaitsFor::Disk | WaitsFor::Server => (all / 2 / threads).clamp(FIRST_COPIES, FIRST_WAITING),
    };
    (Depths { first: first.min(most), most }, all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_share_what_may_be_in_flight() {
        let of = |threads| share_entries(None, WaitsFor::Server, threads);
        assert_eq!(of(2), (Depths { first: 64, most: 128 }, 1024));
        assert_eq!(of(64).0, Depths { first: 8, most: 128 });
        let wished = share_entries(Some(2), WaitsFor::Memory, 4);
        assert_eq!(wished, (Depths { first: 2, most: 2 }, 1024));
        assert_eq!(share_entries(Some(1000), WaitsFor::Server, 4).1, 4000);
    }
}
