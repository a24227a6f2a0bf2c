//! The transports, by which requests come from the kernel and replies go back: [`legacy`]
//! (/dev/fuse) and [`uring`].
//!
//! Both hand [`slot::Slot`]s to a [`Server`], which is the same for both.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use smol::{LocalExecutor, Timer, future};

use crate::backend::WaitsFor;
use crate::errno::Errno;
use crate::export::Served;
use crate::fuse::reply::Reply;
use crate::fuse::request::Op;
use crate::io::Io;
use crate::pool;
use crate::stats::{Operation, ThreadStats};
use crate::sys;
use interrupts::{Interrupts, Waiting};
use ring::Ring;
use slot::Slot;

pub mod cpus;
pub mod doorbell;
pub mod entries;
pub mod interrupts;
pub mod legacy;
pub mod pace;
pub mod queues;
pub mod ring;
pub mod slot;
pub mod uring;

/// One thread's handlers: carries requests to the export and their answers back.
pub struct Server<S: Served> {
    export: Arc<S>,
    lane: S::Lane,
    io: Rc<Io>,
    executor: Rc<LocalExecutor<'static>>,
    stats: Arc<ThreadStats>,
    interrupts: Interrupts,
    waiting: Waiting,
    waits_for: WaitsFor,
    in_flight: Cell<usize>,
    /// Wakes [`Server::drain`] when `in_flight` becomes zero.
    drained: RefCell<Option<Waker>>,
}

impl<S: Served> Server<S> {
    /// Handlers with a lane of their own, that wait on `executor` for what it cannot give at once.
    /// The thread sleeps in `ring`, or else in async-io's reactor, see [`Io::new`].
    pub fn new(
        export: Arc<S>,
        ring: Option<Rc<Ring>>,
        executor: Rc<LocalExecutor<'static>>,
        stats: Arc<ThreadStats>,
        interrupts: Interrupts,
    ) -> io::Result<Rc<Server<S>>> {
        // SAFETY: the lane's futures are in those of `answer`, which own the slot that they read
        // into and write from: who leaks one leaks the slot's memory too. Tasks that the lane
        // begins by itself, to read ahead, own their buffers likewise.
        let io = unsafe { Io::new(ring, executor.clone()) };
        let lane = export.lane(&io)?;
        if export.waits_for() != WaitsFor::Memory {
            // The client that has just asked is to go on asking. If this thread preempted it, and a
            // server this thread, each request would make its whole way alone, at the price of four
            // switches, however many the client wants to have in flight.
            if let Err(e) = sys::preempt_nobody() {
                log::debug!("SCHED_BATCH: {e}");
            }
        }
        let interrupted = interrupts.listen();
        let server = Rc::new(Server {
            waits_for: export.waits_for(),
            export,
            lane,
            io,
            executor,
            stats,
            interrupts,
            waiting: Waiting::default(),
            in_flight: Cell::new(0),
            drained: RefCell::new(None),
        });
        // Weak, or the executor would hold the task, and the task the executor.
        let listener = Rc::downgrade(&server);
        let listen = async move {
            while let Ok(unique) = interrupted.recv().await {
                let Some(server) = listener.upgrade() else { return };
                server.waiting.interrupt(unique);
            }
        };
        server.executor.spawn(listen).detach();
        Ok(server)
    }

    /// See [`Io::submit`].
    pub fn submit(&self) {
        self.io.submit();
    }

    /// Serves one request: answers it before it returns where that needs no waiting, else makes it
    /// a task of its own.
    pub async fn serve(self: &Rc<Self>, slot: Slot) {
        // Boxed before it is known whether it waits: a future that was polled cannot move any more.
        // A box is a fiftieth of what a request costs.
        let mut request = Box::pin(self.clone().answer(slot));
        if future::poll_once(&mut request).await.is_some() {
            return;
        }
        self.stats.waited.add(1);
        self.in_flight.set(self.in_flight.get() + 1);
        let server = self.clone();
        self.executor
            .spawn(async move {
                request.await;
                server.in_flight.set(server.in_flight.get() - 1);
                if server.in_flight.get() == 0 {
                    server.drained.take().into_iter().for_each(Waker::wake);
                }
            })
            .detach();
    }

    /// Requests that wait for their backend.
    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// Waits until no request waits for its backend.
    pub async fn drain(&self) {
        std::future::poll_fn(|cx| {
            if self.in_flight.get() == 0 {
                return Poll::Ready(());
            }
            *self.drained.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    async fn answer(self: Rc<Self>, mut slot: Slot) {
        let arrived = slot.arrived();
        let op = match slot.op() {
            Ok(op) => op,
            Err(errno) => {
                log::debug!("opcode {}: {errno:?}", slot.opcode());
                let counts = &self.stats.other;
                counts.arrived(0);
                counts.answered(arrived.elapsed(), errno.is_failure());
                return slot.reply(Err(errno));
            }
        };
        let counts = self.count(op);
        if let Op::Interrupt { unique } = op {
            self.interrupts.interrupt(unique);
        }
        let (node, unique, client) = (slot.node(), slot.unique(), slot.client());
        let answer = {
            // Pinned here: a future that is passed on is copied.
            let mut handled = pin!(self.export.handle(&self.lane, node, op, slot.payload_mut()));
            match self.waits_for {
                WaitsFor::Server => {
                    self.unless_interrupted(op, unique, client, handled.as_mut()).await
                }
                WaitsFor::Memory | WaitsFor::Disk => handled.await,
            }
        };
        // Before the answer goes: whoever has it finds it counted.
        if let Some(counts) = counts {
            let has_failed = answer.as_ref().is_err_and(|errno| errno.is_failure());
            counts.answered(arrived.elapsed(), has_failed);
        }
        match answer {
            Ok(Reply::Unanswered) => slot.discard(),
            Ok(reply) => {
                let len = reply.encode(slot.payload_mut());
                slot.reply(Ok(len));
            }
            Err(errno) => {
                log::debug!("{op:?}: {errno:?}");
                slot.reply(Err(errno));
            }
        }
    }

    /// Counts its arrival; where its answer is to be counted, if it has one.
    fn count(&self, op: Op) -> Option<&Operation> {
        let (operation, bytes) = match op {
            Op::Read { size, .. } => (&self.stats.read, size),
            Op::Write { size, .. } => (&self.stats.write, size),
            Op::Fsync { .. } | Op::Flush { .. } => (&self.stats.flush, 0),
            Op::Interrupt { .. } | Op::Unanswered => return None,
            _ => (&self.stats.other, 0),
        };
        operation.arrived(bytes);
        Some(operation)
    }

    /// Drops `handled`, and answers EINTR, when its client is being killed.
    async fn unless_interrupted(
        &self,
        op: Op,
        unique: u64,
        client: u32,
        handled: Pin<&mut impl Future<Output = Result<Reply, Errno>>>,
    ) -> Result<Reply, Errno> {
        let given_up = async {
            // By the pool: /proc makes whoever asks wait for a process that executes a program, and
            // the close in that may be what is asked about.
            let was_killed = move || interrupts::was_killed(client);
            // The close in the exit of a client that was killed: nobody hears its answer, and it
            // cannot be interrupted.
            if matches!(op, Op::Flush { .. }) && pool::run(was_killed).await {
                return;
            }
            let mut place = None;
            std::future::poll_fn(|cx| {
                let place = place.get_or_insert_with(|| self.waiting.begin(unique, cx));
                if place.is_interrupted(cx) { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            let is_ending = move || interrupts::is_ending(client) || was_killed();
            while !pool::run(is_ending).await {
                Timer::after(interrupts::LOOK).await;
            }
        };
        let given_up = async {
            given_up.await;
            log::debug!("{op:?} of {client}: given up");
            Err(Errno::EINTR)
        };
        future::or(handled, given_up).await
    }
}
