//! One connection in transmission: any number of callers, one driver.
//!
//! ```text
//!  caller ── Ask ──> table + send queue ──sendmsg──> socket        (send loop)
//!  caller <─ wake ── table <── replies  <──recvmsg── socket        (receive loop)
//! ```
//!
//! A request is put into the table and the send queue, and wakes the send loop; that lets the
//! handlers that can run do so, so that their requests leave with the same system call, and sends.
//! The receive loop waits for readiness, receives, and wakes those whose answers are complete.
//!
//! Both loops are the *driver*, a task of one lane's thread. All state is under one mutex, held for
//! moments and for the (non-blocking) system calls. Where each lane has a connection of its own, it
//! is never contended. Where lanes share one, each of them brings a [`Driver`]; the first to come
//! drives, and when its lane ends the next one takes over where it stopped.
//!
//! A connection that is lost stays lost: whatever is in flight and comes later fails with
//! [`Failure::Lost`], and goes by another one ([`super::connections`]). It is reset first, so that
//! the server gets nothing more of it.

#![allow(unsafe_code)]

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use event_listener::Event;
use smol::Timer;
use smol::future::{or, yield_now};
use smol::lock::Semaphore;
use socket2::Socket;

use self::load::{Load, Speed};
use super::abandoned::Abandoned;
use super::dial::{Agreed, Opened};
use super::inflight::{Ask, Cookie, Extent, Failure, MAX_IN_FLIGHT, Payload, Request, Table};
use super::replies::Replies;
use super::requests::Requests;
use super::stream::{Stream, SystemCalls};
use super::wire::{Command, Headers, RequestHeader};
use crate::io::{Io, Watched};

mod driver;
mod load;

pub use self::driver::Driver;
pub use self::load::BUSY;

/// After so many receives in a row the other tasks of the thread have a turn.
const RECEIVES_IN_A_ROW: usize = 16;

/// A connection to an export, shared by the lanes that use it.
pub struct Connection {
    /// Whose it is, for the log.
    name: String,
    /// For readiness only: the bytes go through [`State::stream`].
    socket: Arc<Socket>,
    agreed: Agreed,
    /// Those of the disk.
    abandoned: Arc<Abandoned>,
    /// One permit for each free slot of the table; callers beyond that wait here.
    permits: Semaphore,
    /// The number of the [`Driver`] that runs the loops; zero for none.
    driving: AtomicU64,
    /// Notified when the driver has gone.
    driver_left: Event,
    /// See [`Connection::load`].
    load: AtomicUsize,
    /// Set under the lock of the state.
    is_lost: AtomicBool,
    is_slow: AtomicBool,
    has_answered: AtomicBool,
    state: Mutex<State>,
}

/// Everything that changes.
pub struct State {
    headers: Headers,
    stream: Stream,
    /// What is in flight.
    pub(super) table: Table,
    requests: Requests,
    replies: Replies,
    /// The socket was found empty: wait for readiness before the next receive.
    drained: bool,
    speed: Speed,
    /// The send loop, asleep.
    sender: Option<Waker>,
}

impl State {
    /// Appends a request, which is in the table, to the send queue.
    pub(super) fn enqueue(
        &mut self,
        command: Command,
        flags: u16,
        cookie: Cookie,
        offset: u64,
        length: u64,
    ) {
        let header = RequestHeader::new(self.headers, command, flags, cookie.0, offset, length);
        self.requests.push(header, cookie);
    }

    fn wants_to_send(&self) -> bool {
        !self.requests.is_empty() || self.stream.wants_flush()
    }

    fn send(&mut self) -> io::Result<bool> {
        self.requests.send(&mut self.stream, &mut self.table)
    }

    fn receive(&mut self, wakers: &mut Vec<Waker>) -> io::Result<()> {
        let received = self.replies.receive(&mut self.stream, &mut self.table, wakers)?;
        self.drained = received.drained;
        Ok(())
    }
}

impl Connection {
    /// Takes over an open export of the disk with these `abandoned` writes; `name` is what the log
    /// calls it.
    pub fn new(name: String, opened: Opened, abandoned: Arc<Abandoned>) -> Arc<Connection> {
        let Opened { stream, socket, agreed } = opened;
        let state = State {
            headers: agreed.headers,
            stream,
            table: Table::new(abandoned.clone()),
            requests: Requests::new(),
            replies: Replies::new(agreed.headers, agreed.base_allocation),
            drained: true,
            speed: Speed::default(),
            sender: None,
        };
        Arc::new(Connection {
            name,
            socket,
            agreed,
            abandoned,
            permits: Semaphore::new(MAX_IN_FLIGHT),
            driving: AtomicU64::new(0),
            driver_left: Event::new(),
            load: AtomicUsize::new(0),
            is_lost: AtomicBool::new(false),
            is_slow: AtomicBool::new(false),
            has_answered: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    /// What was agreed on with the server.
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// The writes to its disk that nobody waits for any more.
    pub fn abandoned(&self) -> &Arc<Abandoned> {
        &self.abandoned
    }

    /// The system calls on its socket so far.
    pub fn system_calls(&self) -> SystemCalls {
        self.lock().stream.system_calls()
    }

    /// Whether it was lost, or has been disconnected.
    pub fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Relaxed)
    }

    /// Whether the server takes long for its answers although it has enough to do: what is more had
    /// better go by another connection.
    pub fn is_slow(&self) -> bool {
        self.is_slow.load(Ordering::Relaxed)
    }

    /// Whether the server has answered a request by it.
    pub fn has_answered(&self) -> bool {
        self.has_answered.load(Ordering::Relaxed)
    }

    /// How much is in flight, by [`super::inflight::weight`].
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Fills `buf` from `offset`. The lengths of payloads are the caller's concern, here and below.
    ///
    /// # Safety
    /// The future may be dropped, but it is not leaked while `buf`'s borrow ends: the driver writes
    /// until then.
    pub async unsafe fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        let length = buf.len() as u64;
        let payload = Payload::Fill(buf);
        let ask = Ask { command: Command::Read, flags: 0, offset, length, payload };
        // SAFETY: the caller's promise.
        unsafe { self.ask(ask) }.await.map(drop)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Safety
    /// As for [`Connection::read`]: the driver reads `data` until then.
    pub async unsafe fn write(&self, offset: u64, data: &[u8], flags: u16) -> Result<(), Failure> {
        let length = data.len() as u64;
        let payload = Payload::Send(data);
        let ask = Ask { command: Command::Write, flags, offset, length, payload };
        // SAFETY: the caller's promise.
        unsafe { self.ask(ask) }.await.map(drop)
    }

    /// A command without a payload.
    pub async fn command(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u64,
    ) -> Result<Vec<Extent>, Failure> {
        // SAFETY: there is no buffer.
        unsafe { self.ask(Ask { command, flags, offset, length, payload: Payload::None }) }.await
    }

    /// # Safety
    /// The future is not leaked while the borrow of the buffer in `ask` ends.
    async unsafe fn ask(&self, ask: Ask<'_>) -> Result<Vec<Extent>, Failure> {
        if ask.command.changes_the_disk() {
            let range = ask.offset..ask.offset.saturating_add(ask.length);
            self.abandoned.none_in(range).await;
        }
        let _load = Load::add(&self.load, &ask);
        let permit = self.permits.acquire().await;
        // SAFETY: the request is a part of this future, which is not leaked.
        unsafe { Request::begin(self, permit, ask) }?.await
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds the state")
    }

    /// Works on the state, and wakes afterwards, unlocked, whoever has to know.
    pub(super) fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        let (result, freed, sender) = {
            let mut state = self.lock();
            let result = work(&mut state);
            let wants_to_send = !self.is_lost() && state.wants_to_send();
            let sender = if wants_to_send { state.sender.take() } else { None };
            (result, state.table.take_freed(), sender)
        };
        if freed > 0 {
            self.permits.add_permits(freed);
        }
        if let Some(sender) = sender {
            sender.wake();
        }
        result
    }

    /// Offers to drive the connection from the calling thread, until the [`Driver`] is dropped. If
    /// the connection is lost meanwhile, `on_loss` gets the reason. It counts as lost, too, if a
    /// request is not answered within `timeout`.
    pub fn driver(
        self: &Arc<Self>,
        io: &Rc<Io>,
        timeout: Option<Duration>,
        on_loss: impl FnOnce(&str) + 'static,
    ) -> Driver {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Weak, or the executor would hold the task, and the task the executor.
        let drive = self.clone().drive(number, Rc::downgrade(io), timeout);
        let task = io.spawn(async move {
            if let Some(reason) = drive.await {
                on_loss(&reason);
            }
        });
        Driver { connection: self.clone(), number, _task: task, _io: io.clone() }
    }

    /// Waits until nobody drives, then runs the loops; ends when the connection is lost, and says
    /// why if it was lost here.
    async fn drive(
        self: Arc<Self>,
        number: u64,
        io: Weak<Io>,
        timeout: Option<Duration>,
    ) -> Option<String> {
        while !self.become_driver(number) {
            let free = self.driver_left.listen();
            if self.become_driver(number) {
                break;
            }
            free.await;
        }
        let watch = || {
            let io = io.upgrade().ok_or(io::ErrorKind::NotConnected)?;
            // A descriptor of its own: the last driver's may still be registered.
            io.watch(self.socket.try_clone()?)
        };
        let ended = match watch() {
            Ok(watched) => {
                let loops = or(self.receive_loop(&watched), self.send_loop(&watched));
                or(loops, self.watch_loop(timeout)).await
            }
            Err(error) => Err(error),
        };
        self.lose(&ended.err()?)
    }

    fn become_driver(&self, number: u64) -> bool {
        self.driving.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    async fn send_loop(&self, watched: &Watched<Socket>) -> io::Result<()> {
        loop {
            self.something_to_send().await;
            // The handlers that were woken together with this one's have their turn first.
            yield_now().await;
            while !self.with(|state| state.send())? {
                watched.writable().await?;
            }
        }
    }

    async fn something_to_send(&self) {
        poll_fn(|cx| {
            let mut state = self.lock();
            if state.wants_to_send() {
                return Poll::Ready(());
            }
            match &mut state.sender {
                Some(waker) => waker.clone_from(cx.waker()),
                None => state.sender = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
        .await;
    }

    async fn receive_loop(&self, watched: &Watched<Socket>) -> io::Result<()> {
        let mut wakers = Vec::with_capacity(MAX_IN_FLIGHT);
        let mut in_a_row = 0;
        loop {
            if self.lock().drained {
                watched.readable().await?;
                in_a_row = 0;
            } else if in_a_row == RECEIVES_IN_A_ROW {
                yield_now().await;
                in_a_row = 0;
            }
            in_a_row += 1;
            let load = self.load();
            let received = self.with(|state| {
                let received = state.receive(&mut wakers);
                let answered = state.table.take_answered();
                if answered > 0 && !self.has_answered() {
                    self.has_answered.store(true, Ordering::Relaxed);
                }
                if let Some(is_slow) = state.speed.answered(load, answered) {
                    self.is_slow.store(is_slow, Ordering::Relaxed);
                }
                received
            });
            wakers.drain(..).for_each(Waker::wake);
            received?;
        }
    }

    /// Ends when a request was not answered within `timeout`.
    async fn watch_loop(&self, timeout: Option<Duration>) -> io::Result<()> {
        const LOOKS: u32 = 8;
        let Some(timeout) = timeout else { return std::future::pending().await };
        loop {
            Timer::after(timeout / LOOKS).await;
            // The first look at a request may come at once after it.
            if self.with(|state| state.table.take_age()) > LOOKS {
                let text = format!("no answer to a request within {} s", timeout.as_secs_f32());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
    }

    /// Ends the connection: everything in flight and everything later fails with
    /// [`Failure::Lost`]. The reason, in words, if it was not lost before.
    fn lose(&self, reason: &io::Error) -> Option<String> {
        // First of all: what is asked for again must not be carried out by a server that still gets
        // it from here.
        // By a reset: what was not sent yet stays unsent, however many descriptors there are.
        if let Err(e) = rustix::net::connect_unspec(&*self.socket) {
            log::debug!("{}: not reset: {e}", self.name);
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
        self.end().then(|| match reason.kind() {
            io::ErrorKind::UnexpectedEof => "the server closed it".into(),
            io::ErrorKind::InvalidData => {
                format!("the server does not keep to the protocol: {reason}")
            }
            _ => reason.to_string(),
        })
    }

    /// Marks it as lost, and fails what is in flight. Whether that is new.
    fn end(&self) -> bool {
        let mut wakers = Vec::new();
        let first = self.with(|state| {
            state.requests.clear();
            state.table.fail_all(&mut wakers);
            !self.is_lost.swap(true, Ordering::SeqCst)
        });
        wakers.into_iter().for_each(Waker::wake);
        first
    }

    /// Runs `work`, requests on this connection, on the calling thread alone: all lanes have ended,
    /// and with them their drivers, or it has none yet. Fails with `TimedOut` at the deadline. The
    /// socket blocks from here on, see [`Connection::stop_blocking`].
    pub fn run_blocking<R>(
        &self,
        work: impl Future<Output = io::Result<R>>,
        deadline: Instant,
    ) -> io::Result<R> {
        let mut work = pin!(work);
        let mut wakers = Vec::new();
        loop {
            if let Poll::Ready(result) = work.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                return result;
            }
            let exchanged = self.with(|state| {
                if self.is_lost() {
                    return Err(io::ErrorKind::NotConnected.into());
                }
                // Also after a time-out it is only "not now", so the clock decides.
                self.block_until(deadline)?;
                if state.send()? {
                    self.block_until(deadline)?;
                    state.receive(&mut wakers)?;
                }
                Ok(())
            });
            wakers.drain(..).for_each(Waker::wake);
            if let Err(error) = exchanged {
                self.lose(&error);
                return Err(error);
            }
        }
    }

    /// After [`Connection::run_blocking`]: it can be driven.
    pub fn stop_blocking(&self) -> io::Result<()> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)?;
        self.socket.set_nonblocking(true)
    }

    /// Lets the next system call on the socket wait until then; `TimedOut` if that is past.
    fn block_until(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // What the socket would round down to zero would be no limit at all.
        let left = Some(left.max(Duration::from_millis(1)));
        self.socket.set_read_timeout(left)?;
        self.socket.set_write_timeout(left)?;
        self.socket.set_nonblocking(false)
    }

    /// Disconnects from the server (`NBD_CMD_DISC`), without waiting: the connection is of no more
    /// use.
    pub fn disconnect(&self) {
        self.with(|state| {
            // In the middle of another request the server would take it for that one's data.
            if !self.is_lost() && state.requests.is_empty() {
                let headers = state.headers;
                let header = RequestHeader::new(headers, Command::Disc, 0, u64::MAX, 0, 0);
                state.requests.push(header, Cookie(u64::MAX));
                let _ = state.send();
                state.stream.close();
            }
        });
        self.end();
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }
}
