//! The /dev/fuse path.
//!
//! Each worker thread has a descriptor of its own (`FUSE_DEV_IOC_CLONE`), a smol `LocalExecutor`
//! that multiplexes it through async-io, and a lane. Requests come from one queue that all
//! descriptors share; an answer goes back through the descriptor that its request came from.
//!
//! One worker at a time is *the reader*: it holds the [`ReaderToken`], and only it polls or waits
//! for requests. Waking every worker for each request would cost more than serving it. The reader
//! passes the token on before it begins what takes long (a large copy, a backlog), so that the
//! others help when there is a backlog, and a lone client at depth 1 is served by one thread
//! without a hop.
//!
//! The bound on requests in flight is each worker's slots: it reads only into free memory.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::task::{Poll, Waker};
use std::time::Instant;

use async_io::{Async, Timer};
use rustix::io::Errno as RawErrno;
use smol::lock::Mutex;
use smol::{LocalExecutor, future};

use super::Server;
use super::cpus;
use super::pace::Pace;
use super::slot::{BURST_OVER, HEAD_LEN, Memory, ReplySink, Slot};
use crate::errno::Errno;
use crate::export::Served;
use crate::fuse::abi::{InHeader, OutHeader, Plain, ReadWriteIn, XattrIn, opcode};
use crate::session::ConnectionEnd;
use crate::stats::ThreadStats;
use crate::transport::interrupts::Interrupts;

/// A WRITE's header and arguments end where the payload begins, so that its data is page-aligned.
const READ_AT: usize = HEAD_LEN - size_of::<InHeader>() - size_of::<ReadWriteIn>();
/// An answer's header ends where its data begins, so that one write sends both.
const REPLY_AT: usize = HEAD_LEN - size_of::<OutHeader>();
/// A reader that has found so many requests in a row lets another worker read too.
const BACKLOG: usize = 8;
/// A request of so many bytes takes long enough to let another worker read meanwhile.
const LONG: u32 = 64 << 10;

/// After so many requests served on the spot, those that wait for their backend get their turn.
const FAIRNESS: u32 = 16;

/// A worker begins with memory for so many requests.
const FIRST_DEPTH: usize = 8;

/// The right to wait for requests.
pub type ReaderToken = Arc<Mutex<()>>;

/// What a worker needs.
pub struct Worker<S: Served> {
    /// Its own descriptor of the connection, not blocking.
    pub device: OwnedFd,
    /// What it serves.
    pub export: Arc<S>,
    /// Its counters.
    pub stats: Arc<ThreadStats>,
    /// Shared by the workers of one connection.
    pub reader_token: ReaderToken,
    /// How many requests it may have in flight.
    pub depth: usize,
    /// Told of the end of the connection.
    pub connection_end: Arc<ConnectionEnd>,
    /// Those of all threads of the connection.
    pub interrupts: Interrupts,
}

/// One worker's descriptor and free memory.
struct Channel {
    device: Async<OwnedFd>,
    /// The last one used is used next: its pages are resident and in the cache.
    free: RefCell<Vec<Memory>>,
    /// How many requests there is memory for, ...
    depth: Cell<usize>,
    /// ... and may be.
    most: Cell<usize>,
    /// The reading loop, when it found no free memory.
    starved: RefCell<Option<Waker>>,
}

impl<S: Served> Worker<S> {
    /// Serves until the connection ends. First it tells `can_serve` whether it has what it needs;
    /// where it has not it ends. An error is one of /dev/fuse itself.
    pub fn run(self, can_serve: mpsc::Sender<io::Result<()>>) -> io::Result<()> {
        let executor = Rc::new(LocalExecutor::new());
        let stats = self.stats.clone();
        let depth = self.depth.min(FIRST_DEPTH);
        let set_up = || {
            let server = Server::new(self.export, None, executor.clone(), stats, self.interrupts)?;
            let channel = Channel {
                device: Async::new_nonblocking(self.device)?,
                free: RefCell::new(Memory::allocate(&vec![0; depth])?),
                depth: Cell::new(depth),
                most: Cell::new(self.depth),
                starved: RefCell::new(None),
            };
            io::Result::Ok((server, Rc::new(channel)))
        };
        let (made, told) = match set_up() {
            Ok(made) => (Some(made), Ok(())),
            Err(e) => (None, Err(e)),
        };
        // Nobody listens where the session has panicked.
        let _ = can_serve.send(told);
        let Some((server, channel)) = made else { return Ok(()) };
        let reading = async {
            let result =
                channel.clone().read_requests(&server, &self.reader_token, &self.stats).await;
            self.connection_end.note();
            server.drain().await;
            result
        };
        let mut run = pin!(executor.run(reading));
        async_io::block_on(std::future::poll_fn(|cx| {
            let polled = run.as_mut().poll(cx);
            // Everything that can run has run: what it asked of the ring goes out in one batch.
            server.submit();
            polled
        }))
    }
}

impl Channel {
    async fn read_requests<S: Served>(
        self: Rc<Self>,
        server: &Rc<Server<S>>,
        reader_token: &ReaderToken,
        stats: &ThreadStats,
    ) -> io::Result<()> {
        let mut pace = Pace::new(Instant::now(), !cpus::under_quota());
        loop {
            // Not while it holds the token: another worker may have memory.
            self.wait_for_memory().await;
            let turn = self.wait(server, reader_token.lock()).await;
            let mut in_a_row = 0;
            let long = loop {
                let Some(memory) = self.take_free() else { break None };
                match self.read(memory) {
                    Ok(slot) => {
                        pace.work_at(slot.arrived());
                        in_a_row += 1;
                        if in_a_row == BACKLOG || slot.request_len() >= LONG {
                            break Some(slot);
                        }
                        server.serve(slot).await;
                    }
                    Err(Stop::Empty) => {
                        in_a_row = 0;
                        // Those that wait for their backend get their turn.
                        future::yield_now().await;
                        if pace.polls_at(Instant::now()) {
                            continue;
                        }
                        stats.sleeps.add(1);
                        self.wait(server, self.device.readable()).await?;
                    }
                    Err(Stop::Ended) => return Ok(()),
                    Err(Stop::Failed(e)) => return Err(e),
                }
            };
            drop(turn);
            let Some(long) = long else { continue };
            server.serve(long).await;
            match self.help(server).await {
                Stop::Empty => {}
                Stop::Ended => return Ok(()),
                Stop::Failed(e) => return Err(e),
            }
        }
    }

    /// Serves, beside the reader, what there is.
    async fn help<S: Served>(self: &Rc<Self>, server: &Rc<Server<S>>) -> Stop {
        let mut served = 0_u32;
        loop {
            let memory = self.free_memory().await;
            match self.read(memory) {
                Ok(slot) => server.serve(slot).await,
                Err(stop) => return stop,
            }
            served += 1;
            if served.is_multiple_of(FAIRNESS) {
                future::yield_now().await;
            }
        }
    }

    /// Memory for one more request, if there may be any. When none is left, as much again is
    /// allocated.
    fn take_free(&self) -> Option<Memory> {
        let more = self.depth.get().min(self.most.get() - self.depth.get());
        if self.free.borrow().is_empty() && more > 0 {
            match Memory::allocate(&vec![0; more]) {
                Ok(memory) => {
                    self.free.borrow_mut().extend(memory);
                    self.depth.set(self.depth.get() + more);
                }
                Err(e) => {
                    log::warn!("no more than {} requests at once: {e}", self.depth.get());
                    self.most.set(self.depth.get());
                }
            }
        }
        self.free.borrow_mut().pop()
    }

    async fn free_memory(&self) -> Memory {
        loop {
            self.wait_for_memory().await;
            // None if more could not be allocated.
            if let Some(memory) = self.take_free() {
                return memory;
            }
        }
    }

    async fn wait_for_memory(&self) {
        std::future::poll_fn(|cx| {
            if !self.free.borrow().is_empty() || self.depth.get() < self.most.get() {
                return Poll::Ready(());
            }
            *self.starved.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn read(self: &Rc<Self>, mut memory: Memory) -> Result<Slot, Stop> {
        loop {
            match rustix::io::read(&self.device, &mut memory.bytes_mut()[READ_AT..]) {
                Ok(len) if len >= size_of::<InHeader>() => {
                    memory.has_arrived(Instant::now());
                    let header: InHeader = memory.head_struct(READ_AT);
                    let args = (READ_AT + size_of::<InHeader>(), len - size_of::<InHeader>());
                    let before_name = match header.opcode {
                        opcode::GETXATTR => Some(size_of::<XattrIn>()),
                        opcode::LOOKUP => Some(0),
                        _ => None,
                    };
                    if let Some(before) = before_name {
                        // Where a ring has it.
                        let end = READ_AT + len;
                        let name = (args.0 + before).min(end)..end;
                        memory.bytes_mut().copy_within(name, HEAD_LEN);
                    }
                    return Ok(Slot::new(memory, header, args, self.clone()));
                }
                Ok(len) => {
                    let text = format!("/dev/fuse gave a request of {len} bytes");
                    return Err(Stop::Failed(io::Error::other(text)));
                }
                // NOENT: the request was taken back while it was being read.
                Err(RawErrno::INTR | RawErrno::NOENT) => {}
                Err(reason) => {
                    self.free.borrow_mut().push(memory);
                    return Err(match reason {
                        RawErrno::AGAIN => Stop::Empty,
                        // Unmounted, or aborted (with FUSE_ABORT_ERROR).
                        RawErrno::NODEV | RawErrno::CONNABORTED => Stop::Ended,
                        e => Stop::Failed(e.into()),
                    });
                }
            }
        }
    }

    /// Waits for `event`: a request, or the turn to wait for one. When a burst of large ones is
    /// over, their pages go.
    async fn wait<S: Served, T>(&self, server: &Server<S>, event: impl Future<Output = T>) -> T {
        let mut event = pin!(event);
        while self.free.borrow().iter().any(Memory::has_burst_pages) {
            let over = async {
                Timer::after(BURST_OVER).await;
                None
            };
            if let Some(done) = future::or(async { Some(event.as_mut().await) }, over).await {
                return done;
            }
            if server.in_flight() == 0 {
                self.free.borrow_mut().iter_mut().for_each(Memory::release);
            }
        }
        event.await
    }

    fn put_back(&self, memory: Memory) {
        self.free.borrow_mut().push(memory);
        self.starved.take().into_iter().for_each(Waker::wake);
    }
}

enum Stop {
    Empty,
    Ended,
    Failed(io::Error),
}

impl ReplySink for Channel {
    fn answer(&self, mut memory: Memory, unique: u64, result: Result<usize, Errno>) {
        let (error, payload) = match result {
            Ok(len) => (0, len),
            Err(errno) => (errno.wire(), 0),
        };
        let len = size_of::<OutHeader>() + payload;
        let header = OutHeader { len: len as u32, error, unique };
        memory.put_head_struct(REPLY_AT, &header);
        let answer = &memory.bytes()[REPLY_AT..REPLY_AT + len];
        if let Err(e) = rustix::io::write(&self.device, answer) {
            match e {
                // The client was interrupted, or the connection has ended: nobody waits for it.
                RawErrno::NOENT | RawErrno::NODEV | RawErrno::PERM | RawErrno::CONNABORTED => {}
                _ => {
                    log::error!("an answer of {payload} bytes was refused: {e}");
                    let failure = OutHeader {
                        len: size_of::<OutHeader>() as u32,
                        error: Errno::EIO.wire(),
                        unique,
                    };
                    if let Err(e) = rustix::io::write(&self.device, failure.as_bytes()) {
                        log::error!("and EIO instead of it: {e}");
                    }
                }
            }
        }
        self.put_back(memory);
    }

    fn discard(&self, memory: Memory) {
        self.put_back(memory);
    }
}
