//! FUSE over io_uring.
//!
//! Each CPU has a completion thread here ([`super::queues`] says which of the kernel's queues it
//! serves). Who owns an entry: *kernel → slot → handler → kernel*. The thread reaps completions
//! into slots and puts those into a bounded async channel; the handlers behind it run on a
//! `LocalExecutor` on this very thread (a hop to another thread costs more than a request), use the
//! same ring for their backend, and push commits. What a batch of handlers pushed goes out with the
//! enter that also waits for the next requests:
//!
//! ```text
//!   run handlers ── submit ── reap ── idle (poll, or sleep) ──┐
//!        └────────────────────────────────────────────────────┘
//! ```
//!
//! Large requests are shared with other threads: then an entry moves to another thread's channel,
//! and is committed on that thread's ring.
//!
//! At the end of the connection every entry completes with an error once (`-ENOTCONN`; for one that
//! was with us, its commit does). The thread goes on until all of them have, so no memory is freed
//! that the kernel might still use. It never unmounts: the kernel would wait for this very thread.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Context, Waker};
use std::time::Instant;

use smol::LocalExecutor;
use smol::channel::Receiver;

use super::Server;
use super::cpus;
use super::doorbell::Doorbell;
use super::entries::Entries;
use super::pace::Pace;
use super::queues::{self, Queues};
use super::ring::Ring;
use super::slot::{BURST_OVER, Memory, ReplySink, Slot};
use crate::backend::WaitsFor;
use crate::errno::Errno;
use crate::export::Served;
use crate::fuse::abi::{InHeader, OutHeader, UringEntInOut, uring_header};
use crate::session::ConnectionEnd;
use crate::stats::ThreadStats;
use crate::transport::interrupts::Interrupts;

/// Waiting requests that are resumed in one turn, before what they pushed goes out.
const TURN: usize = 256;
/// ... at least, and otherwise no more than a disk still has to do: one that has completed its
/// whole queue idles until it is given something again, so answers must not leave in one large
/// batch.
const DISK_TURN: usize = 4;

/// What one completion thread needs.
pub struct RingThread<S: Served> {
    /// Its own descriptor of the connection.
    pub device: OwnedFd,
    /// Its number among the threads.
    pub number: usize,
    /// The CPU whose queue it serves.
    pub cpu: usize,
    /// Entries that its queue begins with, and may have.
    pub depths: Depths,
    /// Those of all threads.
    pub queues: Arc<Queues>,
    /// The requests that are for this one.
    pub requests: Receiver<Memory>,
    /// What it serves.
    pub export: Arc<S>,
    /// Its counters.
    pub stats: Arc<ThreadStats>,
    /// Told of the end of the connection.
    pub connection_end: Arc<ConnectionEnd>,
    /// Those of all threads of the connection.
    pub interrupts: Interrupts,
}

/// How many requests of one queue may be in flight: the entries that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    /// The queue of a thread's own CPU begins with so many. A queue of which the kernel has no
    /// entry any more gets as many again.
    pub first: usize,
    /// No queue has more.
    pub most: usize,
}

/// Reports a thread's start-up progress to the session. Also that it has panicked: the others are
/// still there, so the channel stays open.
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

/// How far a thread has come. INIT's reply must not promise io_uring before all rings exist (the
/// kernel would wait for them for ever), and no entry can be registered before INIT is answered.
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

impl<S: Served> RingThread<S> {
    /// Serves until the connection ends. Reports to `progress`; registers when `proceed` says so,
    /// and ends at once when that is closed.
    pub fn run(
        self,
        progress: mpsc::Sender<Progress>,
        proceed: mpsc::Receiver<()>,
    ) -> io::Result<()> {
        let reporter = Reporter(progress);
        let waits_for = self.export.waits_for();
        let executor = Rc::new(LocalExecutor::new());
        let set_up = || {
            let ring = Ring::new(self.depths.most as u32)?;
            let memory = self.first_memory()?;
            let server = Server::new(
                self.export.clone(),
                Some(ring.clone()),
                executor.clone(),
                self.stats.clone(),
                self.interrupts.clone(),
            )?;
            io::Result::Ok((ring, memory, server, Doorbell::new()?))
        };
        let (ring, memory, server, doorbell) = match set_up() {
            Ok(done) => done,
            Err(e) => {
                reporter.report(Progress::NoRing(e));
                return Ok(());
            }
        };
        reporter.report(Progress::Ready);
        if proceed.recv().is_err() {
            return Ok(());
        }

        let here = self.number;
        let mut registered = vec![0; self.queues.count()];
        memory.iter().for_each(|memory| registered[usize::from(memory.queue())] += 1);
        let entries = Rc::new(Entries::new(ring.clone(), self.device, self.queues.count()));
        if let Err(e) = entries.register(memory) {
            reporter.report(Progress::Refused(io::Error::new(e.kind(), e.to_string())));
            return Err(e);
        }
        let mut refused = None;
        entries.reap(|completed| match completed {
            Ok(mut memory) => {
                memory.has_arrived(Instant::now());
                self.queues.route(here, memory);
            }
            Err(e) => refused = Some(e),
        });
        reporter.report(match refused {
            Some(e) => Progress::Refused(e),
            None => Progress::Registered,
        });

        executor.spawn(doorbell.clone().answer(ring.clone())).detach();
        let committer = Committer {
            ring: ring.clone(),
            entries: entries.clone(),
            queues: self.queues.clone(),
            here,
        };
        let arrivals = serve(server.clone(), self.requests, Rc::new(committer));
        let handlers = in_turns(ring.clone(), executor, arrivals, waits_for);
        Loop {
            ring,
            entries,
            registered,
            most: self.depths.most,
            server,
            queues: self.queues,
            here,
            waits_for,
            doorbell,
            pace: Pace::new(Instant::now(), !cpus::under_quota()),
            stats: self.stats,
            connection_end: self.connection_end,
        }
        .run(handlers)
    }

    /// That of the entries which the thread begins with: one for each queue that it serves, and
    /// more for its own CPU's.
    fn first_memory(&self) -> io::Result<Vec<Memory>> {
        let home = self.cpu as u16;
        let others = self.queues.served_by(self.number).filter(|queue| *queue != home);
        let mut queues = vec![home];
        queues.extend(others);
        self.queues.take_entries(queues.len());
        let more = self.queues.take_entries(self.depths.first - 1);
        queues.extend(std::iter::repeat_n(home, more));
        let mut memory = Memory::allocate(&queues)?;
        memory[0].keep();
        Ok(memory)
    }
}

/// Runs the handlers, a turn at each poll: first those of requests that have arrived, then some of
/// those that waited.
async fn in_turns(
    ring: Rc<Ring>,
    executor: Rc<LocalExecutor<'static>>,
    arrivals: impl Future<Output = ()>,
    waits_for: WaitsFor,
) {
    let mut arrivals = pin!(arrivals);
    let mut waited = pin!(executor.tick());
    poll_fn(|cx| {
        let was_idle = ring.io_in_flight() == 0;
        let ended = arrivals.as_mut().poll(cx);
        if was_idle && ring.io_in_flight() > 0 {
            // A disk that has nothing to do begins at once. An error shows at the loop's own enter.
            let _ = ring.enter(false);
        }
        let turn = match waits_for {
            WaitsFor::Disk => ring.io_in_flight().max(DISK_TURN),
            WaitsFor::Memory | WaitsFor::Server => TURN,
        };
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
async fn serve<S: Served>(server: Rc<Server<S>>, requests: Receiver<Memory>, sink: Rc<Committer>) {
    while let Ok(memory) = requests.recv().await {
        let header: InHeader = memory.head_struct(uring_header::IN_OUT);
        let args = (uring_header::OP_IN, uring_header::OP_IN_LEN);
        server.serve(Slot::new(memory, header, args, sink.clone())).await;
    }
}

/// The completion thread's loop.
struct Loop<S: Served> {
    ring: Rc<Ring>,
    entries: Rc<Entries>,
    /// Entries that this thread has registered, by queue.
    registered: Vec<usize>,
    /// See [`Depths`].
    most: usize,
    server: Rc<Server<S>>,
    queues: Arc<Queues>,
    here: usize,
    waits_for: WaitsFor,
    doorbell: Arc<Doorbell>,
    pace: Pace,
    stats: Arc<ThreadStats>,
    connection_end: Arc<ConnectionEnd>,
}

impl<S: Served> Loop<S> {
    fn run(mut self, handlers: impl Future<Output = ()>) -> io::Result<()> {
        let mut handlers = pin!(handlers);
        let waker = Waker::from(self.doorbell.clone());
        let mut cx = Context::from_waker(&waker);
        while self.entries.any_in_kernel()
            || self.queues.has_requests(self.here)
            || self.server.in_flight() > 0
        {
            self.run_handlers(handlers.as_mut(), &mut cx);
            self.submit()?;
            if !self.reap()? && !self.doorbell.is_rung() {
                self.idle()?;
            }
        }
        Ok(())
    }

    fn run_handlers(&self, handlers: Pin<&mut impl Future<Output = ()>>, cx: &mut Context<'_>) {
        if self.doorbell.take() {
            // It has no end of its own: `queues` keeps the channel open.
            let _ = handlers.poll(cx);
        }
    }

    /// What was pushed goes out; often the next requests are there already. Where they come late it
    /// goes out with the enter that sleeps.
    fn submit(&self) -> io::Result<()> {
        let has_work = self.ring.has_work();
        let sleeps = self.pace.sleeps_at_once()
            && !(has_work || self.ring.has_completions() || self.doorbell.is_rung());
        if (self.ring.has_unsubmitted() && !sleeps) || has_work {
            self.ring.enter(false)?;
        }
        Ok(())
    }

    /// Takes the completions that are there; whether there were any.
    fn reap(&mut self) -> io::Result<bool> {
        let mut may_run_dry = None;
        // One for all that have come together.
        let mut now = None;
        let reaped = self.entries.reap(|completed| {
            let Ok(mut memory) = completed else { return self.connection_end.note() };
            memory.has_arrived(*now.get_or_insert_with(Instant::now));
            let large = queues::is_large(&memory);
            // More could have come at once. Not so with large ones that are copied: fewer of them
            // stay in the cache.
            if !large || self.waits_for != WaitsFor::Memory {
                may_run_dry = Some(memory.queue());
            }
            if self.queues.route(self.here, memory) {
                self.stats.handed_over.add(1);
            }
        });
        if reaped > 0 {
            self.pace.work_at(now.unwrap_or_else(Instant::now));
        }
        if let Some(queue) = may_run_dry {
            self.grow_if_dry(queue)?;
        }
        Ok(reaped > 0)
    }

    /// Nothing is there: looks again, or sleeps until there is a completion or the doorbell rings.
    fn idle(&mut self) -> io::Result<()> {
        if self.pace.polls_at(Instant::now()) {
            return Ok(());
        }
        if !self.doorbell.may_sleep() {
            // Somebody rings just now, perhaps again and again.
            return self.ring.enter(false);
        }
        self.stats.sleeps.add(1);
        self.queues.set_sleeps(self.here, true);
        // After large requests a first, short sleep; if nothing comes, their pages go.
        let entered = match self.entries.has_burst_pages() {
            true => self.ring.enter_for(BURST_OVER),
            false => self.ring.enter(true),
        };
        self.queues.set_sleeps(self.here, false);
        self.doorbell.awake();
        entered?;
        if !self.reap()? && self.server.in_flight() == 0 {
            self.entries.give_back_pages();
        }
        Ok(())
    }

    /// Gives `queue` as many entries again, if the kernel has none for its next request.
    fn grow_if_dry(&mut self, queue: u16) -> io::Result<()> {
        if !self.queues.is_served_by(queue, self.here) || self.entries.has_one_for(queue) {
            return Ok(());
        }
        let registered = &mut self.registered[usize::from(queue)];
        // Another queue may have more than this one got before memory ran out.
        let room = self.most.saturating_sub(*registered);
        let more = self.queues.take_entries((*registered).min(room));
        if more == 0 {
            return Ok(());
        }
        match Memory::allocate(&vec![queue; more]) {
            Ok(memory) => {
                *registered += more;
                self.entries.register(memory)
            }
            Err(e) => {
                log::warn!("no more than {registered} requests at once of a CPU: {e}");
                self.most = *registered;
                Ok(())
            }
        }
    }
}

/// Commits a thread's replies.
struct Committer {
    ring: Rc<Ring>,
    entries: Rc<Entries>,
    queues: Arc<Queues>,
    here: usize,
}

impl ReplySink for Committer {
    fn answer(&self, mut memory: Memory, unique: u64, result: Result<usize, Errno>) {
        let (error, payload_sz) = match result {
            Ok(len) => (0, len as u32),
            Err(errno) => (errno.wire(), 0),
        };
        let large = queues::is_large(&memory);
        self.queues.answered(self.here, &memory);
        let len = size_of::<OutHeader>() as u32 + payload_sz;
        memory.put_head_struct(uring_header::IN_OUT, &OutHeader { len, error, unique });
        let mut ring_ent: UringEntInOut = memory.head_struct(uring_header::RING_ENT);
        ring_ent.payload_sz = payload_sz;
        memory.put_head_struct(uring_header::RING_ENT, &ring_ent);
        self.entries.commit(memory);
        // A batch of large answers would leave the cache before the kernel copies them, and keep
        // the client waiting for all of them: each goes out while it is hot. An error shows at the
        // loop's own enter.
        if large {
            let _ = self.ring.enter(false);
        }
    }

    fn discard(&self, memory: Memory) {
        // FORGET and INTERRUPT come by /dev/fuse only. If one came this way, its entry must go back
        // all the same, and the kernel has no other way to take it than an answer.
        let header: InHeader = memory.head_struct(uring_header::IN_OUT);
        self.answer(memory, header.unique, Ok(0));
    }
}
