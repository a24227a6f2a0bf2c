//! The threads of FUSE over io_uring, until they serve.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, mpsc};

use polling::Poller;

use super::{Options, Session, init, no_thread};
use crate::backend::WaitsFor;
use crate::export::Served;
use crate::fuse::abi::InitIn;
use crate::fuse::abi::init as flag;
use crate::program::cli::Switch;
use crate::stats::{Stats, Transport};
use crate::sys;
use crate::transport::queues::Queues;
use crate::transport::uring::{Depths, Progress, RingThread};

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

/// The completion threads, waiting for INIT to be answered.
pub struct Rings {
    proceed: Vec<mpsc::Sender<()>>,
    progress: mpsc::Receiver<Progress>,
    /// How many requests may be in flight, in all and for each thread.
    pub in_flight: usize,
    pub depth: usize,
}

impl Rings {
    /// Has all threads register their entries, and waits until they have.
    pub fn register(self) -> Result<(), String> {
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

impl Session {
    /// Starts a completion thread for each CPU, and waits until all have their rings.
    pub fn start_rings<S: Served>(
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
}

/// Goes on without rings, unless the user insists on them.
pub fn give_up_rings(when: Switch, why: &str) -> Result<(), String> {
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
pub fn has_over_io_uring(offer: &InitIn) -> bool {
    init::flags(offer) & flag::OVER_IO_URING != 0 || Path::new(PARAMETER).exists()
}

/// Why the kernel did not offer io_uring, and the cure.
pub fn not_offered() -> String {
    match std::fs::read_to_string(PARAMETER) {
        Ok(value) if value.trim() == "N" => {
            format!("it is switched off (echo Y > {PARAMETER} as root)")
        }
        Ok(_) => "the kernel did not offer it".into(),
        Err(_) => "this kernel has none (Linux 6.14 with CONFIG_FUSE_IO_URING is needed)".into(),
    }
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
