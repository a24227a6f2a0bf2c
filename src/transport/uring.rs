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
//! Large requests are shared with other queues' threads, see [`super::peers`]: then an entry moves to another
//! thread's channel, and is committed on that thread's ring.
//!
//! At the end of the connection every entry completes with an error once (`-ENOTCONN`; for one that was with
//! us, its commit does). The thread goes on until all of them have, so no memory is freed that the kernel
//! might still use. It never unmounts: the kernel would wait for this very thread.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Context, Waker};
use std::time::Instant;

use smol::LocalExecutor;
use smol::channel::Receiver;

use super::Server;
use super::doorbell::Doorbell;
use super::entries::Entries;
use super::pace::{self, Pin, Poller, Rest};
use super::peers::{self, Peers};
use super::ring::Ring;
use super::slot::{BURST_OVER, Home, Memory, Slot};
use crate::backend::Backend;
use crate::errno::Errno;
use crate::export::Export;
use crate::fuse::abi::{InHeader, OutHeader, UringEntInOut, uring_header};
use crate::interrupts::Interrupts;
use crate::io::Io;
use crate::session::ConnectionEnd;
use crate::stats::ThreadStats;

/// Entries of a queue to begin with, where the backend only copies: it gets more when it runs dry, and few large buffers
/// stay in the cache. A backend that waits has all from the start: an entry that is registered late takes new
/// requests only, and those that the kernel keeps already wait until others are answered.
const FIRST_ENTRIES: usize = 4;

/// Waiting requests that are resumed in one turn, before what they pushed goes out: all that are ready ...
const LONG_TURN: usize = 256;
/// ... or few, where the thread's ring does the backend's I/O. A disk that completes a whole queue at once idles until it
/// is given something again, so answers must not leave in one large batch, and clients must have the time to ask.
const SHORT_TURN: usize = 4;
/// What a large request counts for a thread's place, in small ones.
const MANY: usize = 16;
/// A backend with less than so much I/O in flight is given more at once.
const HUNGRY: usize = 8;

/// What one queue's thread needs.
pub struct Queue<B: Backend> {
    /// The queue's own descriptor of the connection.
    pub device: OwnedFd,
    /// The kernel's queue: the number of its CPU.
    pub qid: u16,
    /// How many entries it may have: the most requests in flight.
    pub depth: usize,
    /// All queues' threads.
    pub peers: Arc<Peers>,
    /// The requests that are for this one.
    pub requests: Receiver<Memory>,
    /// What it serves.
    pub export: Arc<Export<B>>,
    /// Its counters.
    pub stats: Arc<ThreadStats>,
    /// To be told.
    pub connection_end: Arc<ConnectionEnd>,
    /// Those of all threads of the connection.
    pub interrupts: Interrupts,
}

/// Whom a queue's thread tells how far it has come. Also that it has panicked: the others are still there, so the
/// channel stays open.
struct Reporter(mpsc::Sender<Progress>);

impl Reporter {
    fn report(&self, progress: Progress) {
        // A session that has gone away does not listen; `proceed` says the same.
        let _ = self.0.send(progress);
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.report(Progress::Refused(io::Error::other("its thread has panicked")));
        }
    }
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
        let reporter = Reporter(progress);
        let waits = self.export.backend().capabilities().waits;
        let first = if waits { self.depth } else { self.depth.min(FIRST_ENTRIES) };
        let executor = Rc::new(LocalExecutor::new());
        let set_up = || {
            let ring = Ring::new(self.depth as u32)?;
            let memory = Memory::allocate(self.qid, first)?;
            let lane = self.export.backend().lane(&Io::in_ring(ring.clone(), executor.clone()))?;
            io::Result::Ok((ring, memory, lane, Doorbell::new()?))
        };
        let (ring, memory, lane, doorbell) = match set_up() {
            Ok(done) => done,
            Err(e) => {
                reporter.report(Progress::NoRing(e));
                return Ok(());
            }
        };
        let server =
            Server::new(self.export, lane, executor.clone(), self.stats.clone(), self.interrupts);
        reporter.report(Progress::Ready);
        if proceed.recv().is_err() {
            return Ok(());
        }

        let entries = Rc::new(Entries::new(ring.clone(), self.device));
        if let Err(e) = entries.register(memory) {
            reporter.report(Progress::Refused(io::Error::new(e.kind(), e.to_string())));
            return Err(e);
        }
        let here = usize::from(self.qid);
        self.peers.registered(here, first);
        let mut refused = None;
        entries.reap(|completed| match completed {
            Ok(memory) => drop(self.peers.route(here, memory)),
            Err(e) => refused = Some(e),
        });
        reporter.report(match refused {
            Some(e) => Progress::Refused(e),
            None => Progress::Registered,
        });

        executor.spawn(doorbell.clone().answer(ring.clone())).detach();
        let home = Committer {
            ring: ring.clone(),
            entries: entries.clone(),
            peers: self.peers.clone(),
            here,
        };
        let arrivals = serve(server.clone(), self.requests, Rc::new(home));
        let handlers = in_turns(ring.clone(), executor, arrivals, waits);
        Loop {
            ring,
            entries,
            registered: first,
            depth: self.depth,
            server,
            peers: self.peers,
            here,
            waits,
            doorbell,
            stats: self.stats,
            connection_end: self.connection_end,
        }
        .run(handlers)
    }
}

/// Whether requests wait for a disk that this thread's ring reads and writes (`--direct`): not for a server, and not for
/// the page cache, which may use the ring as well.
fn drives_disk(ring: &Ring, waits: bool) -> bool {
    waits && ring.does_io()
}

/// Runs the handlers, a turn at each poll: first those of requests that have arrived, then some of those that waited.
async fn in_turns(
    ring: Rc<Ring>,
    executor: Rc<LocalExecutor<'static>>,
    arrivals: impl Future<Output = ()>,
    waits: bool,
) {
    let mut arrivals = pin!(arrivals);
    let mut waited = pin!(executor.tick());
    poll_fn(|cx| {
        let before = ring.io_in_flight();
        let ended = arrivals.as_mut().poll(cx);
        if before < HUNGRY && ring.io_in_flight() > before {
            // An error shows at the loop's own enter.
            let _ = ring.enter(false);
        }
        let turn = if drives_disk(&ring, waits) { SHORT_TURN } else { LONG_TURN };
        for _ in 0..turn {
            if waited.as_mut().poll(cx).is_pending() {
                return ended;
            }
            waited.set(executor.tick());
        }
        // There may be more.
        cx.waker().wake_by_ref();
        ended
    })
    .await
}

/// The handlers' end of the channel.
async fn serve<B: Backend>(server: Rc<Server<B>>, requests: Receiver<Memory>, home: Rc<Committer>) {
    while let Ok(memory) = requests.recv().await {
        let header: InHeader = memory.head_struct(uring_header::IN_OUT);
        let args = (uring_header::OP_IN, uring_header::OP_IN_LEN);
        server.serve(Slot::new(memory, header, args, home.clone())).await;
    }
}

/// The completion thread's loop.
struct Loop<B: Backend> {
    ring: Rc<Ring>,
    entries: Rc<Entries>,
    /// Entries that the queue has, and may have.
    registered: usize,
    depth: usize,
    server: Rc<Server<B>>,
    peers: Arc<Peers>,
    here: usize,
    /// See [`Capabilities::waits`](crate::backend::Capabilities::waits).
    waits: bool,
    doorbell: Arc<Doorbell>,
    stats: Arc<ThreadStats>,
    connection_end: Arc<ConnectionEnd>,
}

impl<B: Backend> Loop<B> {
    fn run(mut self, handlers: impl Future<Output = ()>) -> io::Result<()> {
        let mut handlers = pin!(handlers);
        let waker = Waker::from(self.doorbell.clone());
        let mut cx = Context::from_waker(&waker);
        let mut poller = Poller::new(true);
        if !self.waits {
            pace::take_short_turns();
        }
        let mut rest = Rest::starting_now();
        let mut pin = Pin::new(self.here);
        while self.entries.in_kernel() > 0
            || self.peers.has_requests(self.here)
            || self.server.in_flight() > 0
        {
            if self.doorbell.take() {
                // It has no end of its own: `peers` keeps the channel open.
                let _ = handlers.as_mut().poll(&mut cx);
            }
            // More could wait for the backend at once.
            if self.server.in_flight() > 0 {
                self.grow_if_dry()?;
            }
            // What was pushed goes out first; often the next requests are there already.
            if self.ring.has_unsubmitted() || self.ring.has_work() {
                self.ring.enter(false)?;
                if drives_disk(&self.ring, self.waits) && self.server.in_flight() > 0 {
                    // A client that was just answered may be waiting for this very CPU to ask for more. Only for a
                    // disk: a cached file's clients keep the CPUs busy, and then such yields made others wait longer
                    // for write-back.
                    std::thread::yield_now();
                }
            }
            if self.reap(&mut pin)? {
                poller.busy();
            } else if !self.doorbell.is_rung() {
                let now = Instant::now();
                let here = || self.peers.arrivals(self.here);
                let elsewhere = || self.peers.arrivals_elsewhere(self.here);
                if !rest.if_due(now, here, elsewhere)
                    && !poller.idle(now, elsewhere)
                    && self.doorbell.may_sleep()
                {
                    self.sleep(&mut poller, &mut rest, &mut pin)?;
                }
            }
        }
        Ok(())
    }

    /// Sleeps until there is a completion or the doorbell rings, or until it is time for something else.
    /// [`Doorbell::may_sleep`] has said yes.
    fn sleep(&mut self, poller: &mut Poller, rest: &mut Rest, pin: &mut Pin) -> io::Result<()> {
        self.stats.sleeps.add(1);
        // After large requests a first, short sleep; if nothing comes, their pages go.
        let large = self.entries.has_burst_pages();
        let limit = if large {
            Some(BURST_OVER)
        } else if self.peers.other_is_at_home(self.here) {
            poller.absence()
        } else {
            None
        };
        let entered = rest.during(|| match limit {
            Some(limit) => self.ring.enter_for(limit),
            None => self.ring.enter(true),
        });
        self.doorbell.awake();
        entered?;
        if self.reap(pin)? {
            poller.busy();
            return Ok(());
        }
        // An answer that is not submitted is still in its entry's pages.
        if large && self.server.in_flight() == 0 && !self.ring.has_unsubmitted() {
            self.entries.give_back_pages();
        }
        Ok(())
    }

    /// Takes the completions that are there; whether there were any.
    fn reap(&mut self, pin: &mut Pin) -> io::Result<bool> {
        let (mut requests, mut small) = (0, false);
        let reaped = self.entries.reap(|completed| {
            let Ok(memory) = completed else { return self.connection_end.note() };
            // A large one is worth another CPU by itself: its client goes on with what it has.
            requests += if peers::is_large(&memory) { MANY } else { 1 };
            if !self.waits {
                pin.request_of(memory.head_struct::<InHeader>(uring_header::IN_OUT).pid);
            }
            small |= !peers::is_large(&memory);
            if self.peers.route(self.here, memory) {
                self.stats.handed_over.add(1);
            }
        });
        if reaped > 0 {
            pin.batch(requests + self.server.in_flight());
            self.peers.set_at_home(self.here, pin.is_pinned());
        }
        // More could have come at once. Not so with large ones: fewer of them stay in the cache.
        if small {
            self.grow_if_dry()?;
        }
        Ok(reaped > 0)
    }

    /// Gives the queue as many entries again, if the kernel has none for its next request.
    fn grow_if_dry(&mut self) -> io::Result<()> {
        let more = self.registered.min(self.depth - self.registered);
        if more == 0 || self.entries.in_kernel() > 0 {
            return Ok(());
        }
        match Memory::allocate(self.here as u16, more) {
            Ok(memory) => {
                self.registered += more;
                self.peers.registered(self.here, more);
                self.entries.register(memory)
            }
            Err(e) => {
                log::warn!("no more than {} requests at once: {e}", self.registered);
                self.depth = self.registered;
                Ok(())
            }
        }
    }
}

/// Where a queue's slots go back to.
struct Committer {
    ring: Rc<Ring>,
    entries: Rc<Entries>,
    peers: Arc<Peers>,
    here: usize,
}

impl Home for Committer {
    fn answer(&self, mut memory: Memory, unique: u64, result: Result<usize, Errno>) {
        let (error, payload_sz) = match result {
            Ok(len) => (0, len as u32),
            Err(errno) => (errno.wire(), 0),
        };
        let large = peers::is_large(&memory);
        self.peers.answered(self.here, &memory);
        let len = size_of::<OutHeader>() as u32 + payload_sz;
        memory.put_head_struct(uring_header::IN_OUT, &OutHeader { len, error, unique });
        let mut ring_ent: UringEntInOut = memory.head_struct(uring_header::RING_ENT);
        ring_ent.payload_sz = payload_sz;
        memory.put_head_struct(uring_header::RING_ENT, &ring_ent);
        self.entries.commit(memory, ring_ent.commit_id);
        // A batch of large answers would leave the cache before the kernel copies them, and keep the client
        // waiting for all of them: each goes out while it is hot. An error shows at the loop's own enter.
        if large {
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
