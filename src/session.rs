//! A FUSE session: the INIT exchange, and the threads that serve afterwards.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use polling::Poller;

use crate::backend::Backend;
use crate::export::Export;
use crate::fuse::abi::{self, InHeader, InitIn, InitOut, OutHeader, Plain, init, opcode};
use crate::stats::{Stats, Transport};
use crate::sys;
use crate::transport::legacy::{Baton, Worker};
use crate::transport::slot::PAYLOAD_LEN;

/// The kernel sends INIT as soon as the mount exists; this is for a machine that is very busy.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);
/// More /dev/fuse workers than this only get in each other's way at the one queue.
const MOST_WORKERS: usize = 8;
/// Requests in flight for each worker, unless the user says otherwise.
const WORKER_DEPTH: usize = 128;
/// What INIT asks for; the kernel grants what it has of these.
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::ABORT_ERROR
    | init::MAX_PAGES
    // The mode never has set-user-ID bits, so there is nothing to clear on a write.
    | init::HANDLE_KILLPRIV_V2
    | init::INIT_EXT
    | init::DIRECT_IO_ALLOW_MMAP;

/// How to serve.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Requests in flight for each serving thread.
    pub queue_depth: Option<usize>,
}

/// The serving threads of a connection.
pub struct Session {
    threads: Vec<(String, JoinHandle<io::Result<()>>)>,
}

impl Session {
    /// Answers INIT and starts to serve. `ended` is notified whenever a serving thread has ended.
    pub fn start<B: Backend>(
        device: OwnedFd,
        export: &Arc<Export<B>>,
        options: Options,
        stats: &Stats,
        ended: &Arc<Poller>,
    ) -> io::Result<Session> {
        let (request, offer) = read_init(&device)?;
        let depth = options.queue_depth.unwrap_or(WORKER_DEPTH);
        let devices = worker_devices(device);
        let reply = init_reply(&offer, depth * devices.len());
        send_reply(&devices[0], request.unique, reply.as_bytes())?;

        let baton = Baton::default();
        let mut session = Session { threads: Vec::new() };
        for (i, device) in devices.into_iter().enumerate() {
            let worker = Worker {
                device,
                export: export.clone(),
                stats: stats.thread(Transport::Legacy),
                baton: baton.clone(),
                depth,
                polls: true,
            };
            session.spawn(format!("fuse-{i}"), ended, move || worker.run())?;
        }
        log::info!("serving by {}, {} workers", Transport::Legacy, session.threads.len());
        Ok(session)
    }

    fn spawn(
        &mut self,
        name: String,
        ended: &Arc<Poller>,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let ended = NotifyOnDrop(ended.clone());
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            // Dropped last, and also when `work` panics.
            let _ended = ended;
            work()
        })?;
        self.threads.push((name, thread));
        Ok(())
    }

    /// Whether all threads have ended.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().all(|(_, thread)| thread.is_finished())
    }

    /// Takes the threads that have ended; whether one of them failed.
    pub fn reap_failed(&mut self) -> bool {
        let mut failed = false;
        for (name, thread) in self.threads.extract_if(.., |(_, thread)| thread.is_finished()) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(e)) => {
                    log::error!("{name}: {e}");
                    failed = true;
                }
                // The panic's own message is on stderr already.
                Err(_) => failed = true,
            }
        }
        failed
    }
}

struct NotifyOnDrop(Arc<Poller>);

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        if let Err(e) = self.0.notify() {
            log::error!("the control thread cannot be woken: {e}");
        }
    }
}

/// A descriptor for each worker; one worker only, where /dev/fuse cannot be opened again.
fn worker_devices(first: OwnedFd) -> Vec<OwnedFd> {
    let workers = thread::available_parallelism().map_or(1, |n| n.get()).min(MOST_WORKERS);
    let mut devices = vec![first];
    while devices.len() < workers {
        match sys::clone_fuse_device(&devices[0]) {
            Ok(device) => devices.push(device),
            Err(e) => {
                log::info!("/dev/fuse cannot be cloned ({e}): one worker");
                break;
            }
        }
    }
    devices
}

/// Waits for INIT, and settles the major version.
fn read_init(device: &OwnedFd) -> io::Result<(InHeader, InitIn)> {
    let deadline = Instant::now() + INIT_TIMEOUT;
    let mut buf = vec![0; PAYLOAD_LEN + 4096];
    loop {
        let len = match sys::read(device, &mut buf) {
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() || !sys::wait_readable(device, left)? {
                    return Err(io::Error::other("the kernel sent no FUSE_INIT"));
                }
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let header = InHeader::read(&buf[..len]);
        let offer = InitIn::read(&buf[size_of::<InHeader>().min(len)..len]);
        if header.opcode != opcode::INIT {
            return Err(io::Error::other(format!("FUSE_INIT expected, not {}", header.opcode)));
        }
        if offer.major > abi::KERNEL_VERSION {
            // The kernel tries again with the version it is told.
            let ours = InitOut { major: abi::KERNEL_VERSION, ..Default::default() };
            send_reply(device, header.unique, ours.as_bytes())?;
            continue;
        }
        if offer.major < abi::KERNEL_VERSION || offer.minor < abi::OLDEST_MINOR_VERSION {
            return Err(io::Error::other(format!(
                "the kernel's FUSE {}.{} is too old: 7.{} (Linux 5.4) is the least",
                offer.major,
                offer.minor,
                abi::OLDEST_MINOR_VERSION
            )));
        }
        return Ok((header, offer));
    }
}

/// What is asked of the kernel, given its offer and how many requests can be in flight.
fn init_reply(offer: &InitIn, in_flight: usize) -> InitOut {
    let offered = u64::from(offer.flags) | u64::from(offer.flags2) << 32;
    let granted = WANTED & offered;
    // Asynchronous direct I/O counts as background, and the kernel's default of 12 would throttle it.
    let max_background = in_flight.min(usize::from(u16::MAX)) as u16;
    InitOut {
        major: abi::KERNEL_VERSION,
        minor: abi::KERNEL_MINOR_VERSION,
        max_readahead: offer.max_readahead,
        flags: granted as u32,
        flags2: (granted >> 32) as u32,
        max_background,
        congestion_threshold: (u32::from(max_background) * 3 / 4).max(1) as u16,
        max_write: PAYLOAD_LEN as u32,
        time_gran: 1,
        max_pages: (PAYLOAD_LEN / 4096) as u16,
        ..Default::default()
    }
}

fn send_reply(device: &impl AsFd, unique: u64, body: &[u8]) -> io::Result<()> {
    let len = (size_of::<OutHeader>() + body.len()) as u32;
    let header = OutHeader { len, error: 0, unique };
    sys::write_two(&device.as_fd(), header.as_bytes(), body).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_only_for_what_is_offered() {
        let offer = InitIn { flags: init::ASYNC_DIO as u32, ..Default::default() };
        let reply = init_reply(&offer, 256);
        assert_eq!((reply.flags, reply.flags2), (init::ASYNC_DIO as u32, 0));
        assert_eq!((reply.max_background, reply.congestion_threshold), (256, 192));
    }

    #[test]
    fn flags_beyond_bit_31_travel_in_flags2() {
        let offer = InitIn { flags: u32::MAX, flags2: u32::MAX, ..Default::default() };
        let reply = init_reply(&offer, 1_000_000);
        assert_ne!(reply.flags2 & (init::DIRECT_IO_ALLOW_MMAP >> 32) as u32, 0);
        assert_eq!(reply.max_background, u16::MAX);
    }
}
