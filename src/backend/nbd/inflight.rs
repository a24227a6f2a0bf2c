//! The requests in flight on a connection, and the buffers that their callers lend to it.
//!
//! # Who owns a buffer
//! *caller → table → caller*. [`Request::begin`] puts a pointer to the caller's buffer into the
//! table, under the connection's mutex. Whoever drives the connection, on whatever thread, reaches
//! it only through the table and under the same mutex, system calls included. [`Request`]'s end, be
//! it completed or dropped, takes the pointer out of the table under that mutex before the borrow
//! `'a` ends. So:
//!
//! > **Invariant.** While a [`Lent`] is in the table its memory is borrowed by a live
//! > `Request<'a>`, and nobody else uses it.
//!
//! After a request was dropped in flight its reply is still to come: its slot stays; data for it is
//! drained, and a WRITE that is only half sent goes on from a copy. What remains is that a
//! `Request` must not be leaked (`mem::forget`) while `'a` ends: [`Request::begin`] is unsafe, and
//! so are the functions of the connection that pass a buffer to it.
//!
//! # A request's life
//! It is sent, the server replies, and the caller lets go of it: see [`state`]. When all three have
//! happened its slot is free.
//!
//! # A wrong answer
//! `Err`, a [`Violation`], ends the connection: the answer fits no request here, or its length
//! cannot be believed, so neither can what follows it; or the server is about to end
//! ([`SHUTTING_DOWN`]). `Ok` fails at most the request: its answer is well framed, and is an error
//! or not all that was asked for ([`Entry::fault`]).
//!
//! # Bounds
//! The table has [`MAX_IN_FLIGHT`] slots, made at the start; the connection's semaphore lets no
//! more requests in. A cookie is the slot's index and a generation, so it is unique for 2³² uses of
//! a slot.

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use self::state::{State, Step};
use super::abandoned::{Abandoned, AbandonedRequest};
use super::coverage::Coverage;
use super::wire::{Command, FLAG_FUA, Violation};

mod answers;
mod request;
mod state;

pub use self::request::Request;

/// How many requests a connection has in flight at most: more than a FUSE queue has entries, and
/// few enough for one `sendmsg` (`IOV_MAX` is 1024, and each takes two parts).
pub const MAX_IN_FLIGHT: usize = 256;

/// Why a connection ends whose server answers [`super::wire::SHUTTING_DOWN`].
pub const SHUTTING_DOWN: &str = "the server is shutting down";

/// A READ from this size on is received straight into its buffer; below, several replies share one
/// system call and are copied from the staging area.
pub const DIRECT_BYTES: u64 = 16 << 10;

/// How many extents are kept of one BLOCK_STATUS; the rest is as if the server had answered less,
/// and the next question reaches less far ([`super::extents`]). A walk pays a round trip for so
/// many, which is little for each; and if every request in flight were one, they would hold 4 MiB.
pub const MAX_EXTENTS: usize = 1024;

/// A caller's buffer. See the invariant above.
struct Lent {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it stands for a `&mut [u8]` or a `&[u8]`, which may be used from another thread; the
// mutex around the table orders the uses.
unsafe impl Send for Lent {}

impl Lent {
    fn to_fill(buf: &mut [u8]) -> Lent {
        Lent { start: NonNull::from(&mut *buf).cast(), len: buf.len() }
    }

    fn to_send(data: &[u8]) -> Lent {
        Lent { start: NonNull::from(data).cast(), len: data.len() }
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: the invariant; made from a slice of this length.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// # Safety
    /// It was made by [`Lent::to_fill`].
    unsafe fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the invariant, and the caller's promise that the slice was mutable.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// What a request asks for.
#[derive(Debug)]
pub struct Ask<'a> {
    /// The command.
    pub command: Command,
    /// `NBD_CMD_FLAG_*`
    pub flags: u16,
    /// In bytes.
    pub offset: u64,
    /// In bytes; that of the payload where there is one.
    pub length: u64,
    /// What travels with it.
    pub payload: Payload<'a>,
}

/// The caller's buffer.
#[derive(Debug)]
pub enum Payload<'a> {
    /// Neither sent nor received.
    None,
    /// The data of a WRITE.
    Send(&'a [u8]),
    /// Where the data of a READ goes.
    Fill(&'a mut [u8]),
}

/// A piece of BLOCK_STATUS's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// In bytes.
    pub length: u64,
    /// It reads as zeroes.
    pub zero: bool,
}

/// Why a request has no answer.
#[derive(Debug)]
pub enum Failure {
    /// The connection was lost first. What was asked for may have been done or not; it can be asked
    /// for again.
    Lost,
    /// What the server says, or what is wrong with its answer.
    Error(io::Error),
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> io::Error {
        match failure {
            Failure::Lost => io::Error::from_raw_os_error(libc::EIO),
            Failure::Error(error) => error,
        }
    }
}

/// Which request, on the wire and in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie(pub u64);

impl Cookie {
    fn new(index: usize, generation: u32) -> Cookie {
        Cookie(u64::from(generation) << 32 | index as u64)
    }

    fn index(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }
}

/// The caller's buffer, as long as it is needed.
enum Buffer {
    /// None was lent, or it is done with.
    None,
    /// Data of a WRITE that is not fully sent.
    Send(Lent),
    /// The same; its caller has gone.
    SendCopy(Box<[u8]>),
    /// Where the data of a READ goes.
    Fill(Lent),
}

/// Why a request that has its reply, or will have none, has failed.
enum Cause {
    /// The connection was lost before the answer was complete.
    Lost,
    /// The first error.
    Errno(i32),
}

/// One request in flight.
struct Entry {
    command: Command,
    offset: u64,
    length: u64,
    state: State,
    buffer: Buffer,
    coverage: Coverage,
    extents: Vec<Extent>,
    failure: Option<Cause>,
    /// How often the connection's age was taken since it is here.
    age: u32,
    waker: Option<Waker>,
    /// It is a FLUSH, or has FUA.
    makes_durable: bool,
    /// Its caller has gone, and the server may still write, or tell an error of others' writes.
    abandoned: Option<AbandonedRequest>,
}

impl Entry {
    fn fail(&mut self, errno: i32) {
        self.failure.get_or_insert(Cause::Errno(errno));
    }

    /// The server's answer is well framed and still wrong: this request fails, the connection goes
    /// on.
    fn fault(&mut self, what: &str) {
        log::error!(
            "the server's answer to {:?} at {} of {} bytes {what}",
            self.command,
            self.offset,
            self.length
        );
        self.fail(libc::EIO);
    }
}

struct Slot {
    generation: u32,
    entry: Option<Entry>,
}

/// All requests in flight on one connection.
pub struct Table {
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// READs of at least [`DIRECT_BYTES`] whose reply is not complete.
    direct_reads: usize,
    /// Slots that became free since [`Table::take_freed`].
    freed: usize,
    /// What was answered since [`Table::take_answered`], by [`weight`].
    answered: usize,
    /// Those of the disk.
    abandoned: Arc<Abandoned>,
}

impl Table {
    /// An empty table of a connection to the disk with these `abandoned` writes.
    pub fn new(abandoned: Arc<Abandoned>) -> Table {
        Table {
            abandoned,
            slots: (0..MAX_IN_FLIGHT).map(|_| Slot { generation: 0, entry: None }).collect(),
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            direct_reads: 0,
            freed: 0,
            answered: 0,
        }
    }

    fn entry(&mut self, cookie: Cookie) -> Option<&mut Entry> {
        let slot = self.slots.get_mut(cookie.index())?;
        let current = Cookie::new(cookie.index(), slot.generation) == cookie;
        slot.entry.as_mut().filter(|_| current)
    }

    /// The request that a reply names.
    fn awaiting(&mut self, cookie: Cookie) -> Result<&mut Entry, Violation> {
        self.entry(cookie).filter(|entry| entry.state.awaits_reply()).ok_or_else(|| {
            format!("a reply names cookie {:#x}, which is not in flight", cookie.0).into()
        })
    }

    /// Takes the request's next step, and frees the slot after the last one.
    fn step(&mut self, cookie: Cookie, step: Step) {
        let slot = &mut self.slots[cookie.index()];
        let entry = slot.entry.as_mut().expect("a slot is in use until the last step");
        entry.state = entry.state.after(step);
        if entry.state == State::Free {
            slot.entry = None;
            slot.generation = slot.generation.wrapping_add(1);
            self.free.push(cookie.index());
            self.freed += 1;
        }
    }
}

/// For the caller, by its [`Request`].
impl Table {
    /// Takes a free slot; the caller holds a permit for one.
    ///
    /// # Safety
    /// The buffer in `ask` must stay borrowed, and unused by anyone else, until [`Table::let_go`].
    unsafe fn insert(&mut self, ask: Ask<'_>) -> Cookie {
        let index = self.free.pop().expect("the semaphore has as many permits as there are slots");
        let buffer = match ask.payload {
            Payload::None => Buffer::None,
            Payload::Send(data) => Buffer::Send(Lent::to_send(data)),
            Payload::Fill(buf) => Buffer::Fill(Lent::to_fill(buf)),
        };
        let slot = &mut self.slots[index];
        slot.entry = Some(Entry {
            command: ask.command,
            offset: ask.offset,
            length: ask.length,
            state: State::Sending,
            buffer,
            coverage: Coverage::default(),
            extents: Vec::new(),
            failure: None,
            age: 0,
            waker: None,
            makes_durable: ask.command == Command::Flush || ask.flags & FLAG_FUA != 0,
            abandoned: None,
        });
        self.direct_reads += usize::from(is_direct(slot.entry.as_ref().expect("just put there")));
        Cookie::new(index, slot.generation)
    }

    /// The answer, if it is there.
    fn answer(
        &mut self,
        cookie: Cookie,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Vec<Extent>, Failure>> {
        let entry = self.entry(cookie).expect("a slot is in use until it is let go");
        if entry.state.awaits_reply() {
            match &mut entry.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                None => entry.waker = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        Poll::Ready(match entry.failure.take() {
            Some(Cause::Lost) => Err(Failure::Lost),
            Some(Cause::Errno(errno)) => Err(Failure::Error(io::Error::from_raw_os_error(errno))),
            None => Ok(std::mem::take(&mut entry.extents)),
        })
    }

    /// The caller has its answer, or goes without: its buffer leaves the table.
    fn let_go(&mut self, cookie: Cookie) {
        let abandoned = self.abandoned.clone();
        let entry = self.entry(cookie).expect("a request is let go once");
        if entry.makes_durable || entry.command.changes_the_disk() {
            let range = entry.offset..entry.offset.saturating_add(entry.length);
            if entry.state.awaits_reply() {
                entry.abandoned = Some(abandoned.add(range, entry.makes_durable));
            } else if let Some(Cause::Errno(_)) = entry.failure {
                // Its caller has not seen it.
                abandoned.add(range, entry.makes_durable).failed();
            }
        }
        entry.waker = None;
        match &entry.buffer {
            // The server has had a part of it, or may already wait for it: the rest must follow.
            Buffer::Send(lent) => entry.buffer = Buffer::SendCopy(lent.as_slice().into()),
            Buffer::SendCopy(_) | Buffer::Fill(_) | Buffer::None => entry.buffer = Buffer::None,
        }
        self.step(cookie, Step::LetGo);
    }
}

/// For the sending half, [`super::requests`].
impl Table {
    /// The data that follows the request's header on the wire.
    pub fn data_to_send(&self, cookie: Cookie) -> &[u8] {
        let slot = self.slots.get(cookie.index());
        match slot.and_then(|slot| slot.entry.as_ref()).map(|entry| &entry.buffer) {
            Some(Buffer::Send(lent)) => lent.as_slice(),
            Some(Buffer::SendCopy(copy)) => copy,
            Some(Buffer::Fill(_) | Buffer::None) | None => &[],
        }
    }

    /// The request's last byte has gone to the socket. (DISC has no place in the table.)
    pub fn sent(&mut self, cookie: Cookie) {
        let Some(entry) = self.entry(cookie) else { return };
        if let Buffer::Send(_) | Buffer::SendCopy(_) = entry.buffer {
            entry.buffer = Buffer::None;
        }
        self.step(cookie, Step::Sent);
    }
}

/// For the connection: what it counts, and its end.
impl Table {
    /// How many slots became free since the last call: so many permits go back.
    pub fn take_freed(&mut self) -> usize {
        std::mem::take(&mut self.freed)
    }

    /// How much was answered since the last call, by [`weight`].
    pub fn take_answered(&mut self) -> usize {
        std::mem::take(&mut self.answered)
    }

    /// Takes the age of what is in flight: how often that was done since the oldest came.
    pub fn take_age(&mut self) -> u32 {
        let entries = self.slots.iter_mut().filter_map(|slot| slot.entry.as_mut());
        let ages = entries.filter(|entry| entry.state.awaits_reply()).map(|entry| {
            entry.age += 1;
            entry.age
        });
        ages.max().unwrap_or(0)
    }

    /// The connection is lost: everything in flight has [`Failure::Lost`].
    pub fn fail_all(&mut self, wakers: &mut Vec<Waker>) {
        self.direct_reads = 0;
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            let cookie = Cookie::new(index, slot.generation);
            let Some(entry) = &mut slot.entry else { continue };
            let state = entry.state;
            // What was answered before the end keeps its answer.
            if state.awaits_reply() {
                entry.failure = Some(Cause::Lost);
                wakers.extend(entry.waker.take());
                self.step(cookie, Step::Replied);
            }
            if state.is_sending() {
                self.sent(cookie);
            }
        }
    }
}

/// How much work a request is: one, and one more for each 64 KiB of its payload.
pub fn weight(command: Command, length: u64) -> usize {
    let payload = if matches!(command, Command::Read | Command::Write) { length } else { 0 };
    1 + (payload >> 16) as usize
}

fn is_direct(entry: &Entry) -> bool {
    entry.command == Command::Read && entry.length >= DIRECT_BYTES
}

#[cfg(test)]
pub mod tests;
