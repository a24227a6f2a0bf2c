//! FUSE over io_uring.
//!
//! The kernel has a queue for each possible CPU, and each queue has a completion thread here. Who owns an
//! entry: *kernel → slot → handler → kernel*. The thread reaps completions into slots and puts those into
//! a bounded async channel; the handlers behind it run on a `LocalExecutor` on this very thread (a hop to
//! another thread costs more than a request), use the same ring for their backend, and push commits. What
//! a batch of handlers pushed goes out with the enter that also waits for the next requests.
//!
//! ```text
//!            enter ── reap ── channel ── handlers ── commits, backend I/O ──┐
//!              └──────────────────────────────────────────────────────────-─┘
//! ```
//!
//! The channel's bound is the number of entries, so a send never fails for want of room: each entry is in the
//! kernel, in the channel or with a handler.
//!
//! At the end of the connection every entry completes with an error once (`-ENOTCONN`; for one that was with
//! us, its commit does). The thread goes on until all of them have, so no memory is freed that the kernel
//! might still use. It never unmounts: the kernel would wait for this very thread.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Context, Waker};

use smol::LocalExecutor;
use smol::channel::{self, Receiver, Sender};

use super::Server;
use super::doorbell::Doorbell;
use super::entries::Entries;
use super::pace::{Pin, Poller};
use super::ring::Ring;
use super::slot::{BURST_OVER, Home, Memory, Slot};
use crate::backend::Backend;
use crate::errno::Errno;
use crate::export::Export;
use crate::fuse::abi::{InHeader, OutHeader, UringEntInOut, uring_header};
use crate::io::Io;
use crate::stats::ThreadStats;

/// Answers of so many bytes, or to so many, are submitted at once.
const LARGE: u32 = 64 << 10;

/// What one queue's thread needs.
pub struct Queue<B: Backend> {
    /// The connection's descriptor.
    pub device: Arc<OwnedFd>,
    /// The kernel's queue: the number of its CPU.
    pub qid: u16,
    /// How many entries it has: the most requests in flight.
    pub depth: usize,
    /// What it serves.
    pub export: Arc<Export<B>>,
    /// Its counters.
    pub stats: Arc<ThreadStats>,
}

/// How far a queue has come. INIT's reply must not promise io_uring before all rings exist (the kernel
/// would wait for them for ever), and no entry can be registered before INIT is answered.
#[derive(Debug)]
pub enum Progress {
    /// The ring and its memory exist.
    Ready,
    /// The ring could not be had.
    NoRing(io::Error),
    /// All entries are with the kernel.
    Registered,
    /// The kernel refused an entry; it serves /dev/fuse from now on.
    Refused(io::Error),
}

impl<B: Backend> Queue<B> {
    /// Serves until the connection ends. Reports to `progress`; registers when `proceed` says so, and ends
    /// at once when that is closed.
    pub fn run(
        self,
        progress: mpsc::Sender<Progress>,
        proceed: mpsc::Receiver<()>,
    ) -> io::Result<()> {
        // A session that has gone away does not listen; `proceed` says the same.
        let report = |p| drop(progress.send(p));
        let set_up = || Ok((Ring::new(self.depth as u32)?, Memory::allocate(self.depth)?));
        let (ring, memory) = match set_up() {
            Ok(done) => done,
            Err(e) => {
                report(Progress::NoRing(e));
                return Ok(());
            }
        };
        let executor = Rc::new(LocalExecutor::new());
        let io = Io::in_ring(ring.clone(), executor.clone());
        let lane = self.export.backend().lane(&io)?;
        let server = Server::new(self.export, lane, executor.clone(), self.stats.clone());
        let doorbell = Doorbell::new()?;
        report(Progress::Ready);
        if proceed.recv().is_err() {
            return Ok(());
        }

        let entries = match Entries::register(ring.clone(), self.device, self.qid, memory) {
            Ok(entries) => entries,
            Err(e) => {
                report(Progress::Refused(io::Error::new(e.kind(), e.to_string())));
                return Err(e);
            }
        };
        let home = Rc::new(Committer { ring: ring.clone(), entries: entries.clone() });
        let (sender, receiver) = channel::bounded(self.depth);
        let mut refused = None;
        entries.reap(|completed| match completed {
            Ok(memory) => send(&sender, slot(memory, &home)),
            Err(e) => refused = Some(e),
        });
        report(match refused {
            Some(e) => Progress::Refused(e),
            None => Progress::Registered,
        });

        executor.spawn(doorbell.clone().answer(ring.clone())).detach();
        let handlers = executor.run(serve(server.clone(), receiver));
        Loop { ring, home, server, sender, doorbell, stats: self.stats, qid: self.qid }
            .run(handlers)
    }
}

/// The handlers' end of the channel.
async fn serve<B: Backend>(server: Rc<Server<B>>, requests: Receiver<Slot>) {
    while let Ok(slot) = requests.recv().await {
        server.serve(slot).await;
    }
}

fn send(sender: &Sender<Slot>, slot: Slot) {
    // A slot that did not fit would answer EIO when it is dropped here; the bound makes it fit.
    debug_assert!(!sender.is_full());
    drop(sender.try_send(slot));
}

/// The completion thread's loop.
struct Loop<B: Backend> {
    ring: Rc<Ring>,
    home: Rc<Committer>,
    server: Rc<Server<B>>,
    sender: Sender<Slot>,
    doorbell: Arc<Doorbell>,
    stats: Arc<ThreadStats>,
    qid: u16,
}

impl<B: Backend> Loop<B> {
    fn run(self, handlers: impl Future<Output = ()>) -> io::Result<()> {
        let mut handlers = pin!(handlers);
        let waker = Waker::from(self.doorbell.clone());
        let mut cx = Context::from_waker(&waker);
        let mut poller = Poller::new(true);
        let mut pin = Pin::new(usize::from(self.qid));
        let entries = &self.home.entries;
        while entries.live() > 0 || self.server.in_flight() > 0 {
            while self.doorbell.take() {
                // It has no end of its own: the sender lives as long as this loop.
                let _ = handlers.as_mut().poll(&mut cx);
            }
            let mut requests = 0;
            let mut reap = || {
                entries.reap(|completed| {
                    if let Ok(memory) = completed {
                        requests += 1;
                        send(&self.sender, slot(memory, &self.home));
                    }
                })
            };
            // What was pushed goes out first; often the next requests are there already.
            if self.ring.has_unsubmitted() || self.ring.has_work() {
                self.ring.enter(false)?;
            }
            if reap() > 0 {
                poller.busy();
                pin.batch(requests);
            } else if !poller.idle() && self.doorbell.may_sleep() {
                self.stats.sleeps.add(1);
                // After large requests a first, short sleep; if nothing comes, their pages go.
                let large = entries.has_burst_pages();
                let entered =
                    if large { self.ring.enter_for(BURST_OVER) } else { self.ring.enter(true) };
                self.doorbell.awake();
                entered?;
                if reap() > 0 {
                    pin.batch(requests);
                } else if large && self.server.in_flight() == 0 {
                    entries.give_back_pages();
                }
            }
        }
        Ok(())
    }
}

/// Where a queue's slots go back to.
struct Committer {
    ring: Rc<Ring>,
    entries: Rc<Entries>,
}

impl Home for Committer {
    fn answer(&self, mut memory: Memory, unique: u64, result: Result<usize, Errno>) {
        let (error, payload_sz) = match result {
            Ok(len) => (0, len as u32),
            Err(errno) => (errno.wire(), 0),
        };
        let request: InHeader = memory.head_struct(uring_header::IN_OUT);
        let len = size_of::<OutHeader>() as u32 + payload_sz;
        memory.put_head_struct(uring_header::IN_OUT, &OutHeader { len, error, unique });
        let mut ring_ent: UringEntInOut = memory.head_struct(uring_header::RING_ENT);
        ring_ent.payload_sz = payload_sz;
        memory.put_head_struct(uring_header::RING_ENT, &ring_ent);
        self.entries.commit(memory, ring_ent.commit_id);
        // A batch of large answers would leave the cache before the kernel copies them, and keep the client
        // waiting for all of them: each goes out while it is hot. An error shows at the loop's own enter.
        if payload_sz.max(request.len) >= LARGE {
            let _ = self.ring.enter(false);
        }
    }

    fn discard(&self, memory: Memory) {
        // FORGET and INTERRUPT come by /dev/fuse only. If one came this way, its entry must go back all the
        // same, and the kernel has no other way to take it than an answer.
        let header: InHeader = memory.head_struct(uring_header::IN_OUT);
        self.answer(memory, header.unique, Ok(0));
    }
}

/// The slot for a request that has arrived in `memory`.
fn slot(memory: Memory, home: &Rc<Committer>) -> Slot {
    let header: InHeader = memory.head_struct(uring_header::IN_OUT);
    let args = (uring_header::OP_IN, uring_header::OP_IN_LEN);
    Slot::new(memory, header, args, home.clone())
}
