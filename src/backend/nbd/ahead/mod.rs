//! Reading ahead of readers that go in order, where the kernel cannot be told to.
//!
//! The kernel's page cache asks for 128 KiB at a time, twice at once at most, and only root can
//! change that. So what a reader will ask for next is fetched into *chunks*, pieces of the disk on
//! a fixed grid:
//!
//! ```text
//!  READ ─> streams ── in order: begins fetches ──> source ──> chunk
//!    └───> chunks: ready: copied │ on its way: waited for │ none: read from the source
//! ```
//!
//! As much is fetched ahead as the reader has read in order, up to the limit of one reader and its
//! share of [`MAX_CHUNKS`]. A chunk is freed when it has been read wholly, when room is needed and
//! it is the one that was used longest ago, or when it has not been used for a second, which a task
//! sees to that runs only while there are chunks. What a reader is about to read counts as used by
//! it.
//!
//! All lanes share the chunks. A fetch is a task of the lane that began it; it reads from that
//! lane's source. Nobody sees an error of it: whoever waits for the chunk reads for himself then,
//! and hears his own.
//!
//! # What is read is never older than a write that was acknowledged before
//!
//! A chunk is put into the table *before* its fetch is sent, and a write takes what it overlaps out
//! of the table before it is sent ([`Ahead::writing`]) and again when it has ended, before it is
//! acknowledged. A fetch whose chunk is not in the table any more (told by its number, there may be
//! a later one) is thrown away. A read that began after the acknowledgement looks into the table
//! after that. So, for a fetch and a write W:
//!
//! - The chunk was put in before W's end: W's end takes it out, on its way or ready. No later read
//!   finds it.
//! - It was put in after W's end: it was sent when the server had carried out W, and has its bytes.
//! - A read found the chunk, or began to wait for it, before W's end took it out: the read began
//!   before the acknowledgement, and may return either. One that waits looks again, finds nothing,
//!   and reads from the source.
//! - W fails, or is dropped because its client was killed: it may or may not be carried out, now or
//!   later. Its end takes chunks out as well. It is never acknowledged; a later write to the same
//!   bytes waits for it ([`super::abandoned`]) and then takes out what was fetched in between.
//! - W's end sees that no buffer is taken, and looks no further ([`Buffers::any_taken`]): one is
//!   taken before its chunk is put in, and so before its fetch is sent. So the fetch is sent after
//!   W's end.
//!
//! Taking chunks out before W is sent is not needed for that. It keeps what was ready from being
//! found by a read that follows one that has met W at the source. (What is fetched just then can
//! still be found so, until W ends.)

use std::future::Future;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use smol::Timer;

use self::buffers::{Buffer, Buffers};
use self::streams::STOPPED;
use self::table::{Chunk, Expiry, Fetch, Found, Plan, Table};
use super::commands::all;
use crate::backend::RemoteStats;
use crate::io::Io;

mod buffers;
mod streams;
mod table;
#[cfg(test)]
mod tests;

/// The length of a chunk, in bytes; that at the end of the disk may be shorter.
const CHUNK: u64 = 256 << 10;
/// The most chunks of all readers, ready or on their way: 32 MiB. A server that takes a chunk's
/// READ whole has half of a connection's requests in flight left for what clients have asked for
/// ([`super::inflight::MAX_IN_FLIGHT`]).
const MAX_CHUNKS: usize = 128;

/// Where the bytes come from.
pub trait Source: 'static {
    /// Fills `buf` from `offset`.
    fn read(&self, offset: u64, buf: &mut [u8]) -> impl Future<Output = io::Result<()>>;
}

/// What is read ahead of all readers of a disk.
#[derive(Debug, Default)]
pub struct Ahead {
    /// How much is fetched ahead of one reader, in bytes; zero: nothing is.
    limit: AtomicU64,
    buffers: Arc<Buffers>,
    table: Mutex<Table>,
    fetched_bytes: AtomicU64,
    used_bytes: AtomicU64,
    /// How often.
    used: AtomicU64,
}

impl Ahead {
    /// See [`crate::backend::Backend::set_read_ahead`]; whole chunks count.
    pub fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
        if bytes == 0 {
            self.forget();
        }
    }

    /// Whether anything is read ahead.
    pub fn is_on(&self) -> bool {
        self.limit.load(Ordering::Relaxed) > 0
    }

    /// Takes chunks and streams out: others may have written to the disk.
    pub fn forget(&self) {
        let chunks = self.table().clear();
        drop(chunks);
    }

    /// A write to `range` begins: what was read ahead of it is taken out now, and again when this
    /// is dropped.
    #[must_use = "the write ends when this is dropped"]
    pub fn writing(&self, range: Range<u64>) -> Writing<'_> {
        let writing = Writing { ahead: self, range };
        writing.take_out();
        writing
    }

    /// Adds what is known here.
    pub fn add_stats(&self, stats: &mut RemoteStats) {
        stats.read_ahead_bytes = self.fetched_bytes.load(Ordering::Relaxed);
        stats.read_ahead_hits = self.used.load(Ordering::Relaxed);
        stats.read_ahead_hit_bytes = self.used_bytes.load(Ordering::Relaxed);
    }

    /// Says in the log what it was good for.
    pub fn log_use(&self) {
        let mib = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed) >> 20;
        if self.fetched_bytes.load(Ordering::Relaxed) > 0 {
            let (fetched, used) = (mib(&self.fetched_bytes), mib(&self.used_bytes));
            log::info!("read ahead: {fetched} MiB fetched, {used} MiB used");
        }
    }

    /// How many bytes of READs came out of chunks.
    #[cfg(test)]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    fn plan(&self, read: Range<u64>, size: u64) -> Plan {
        let limit = self.limit.load(Ordering::Relaxed);
        self.table().plan(read, size, limit, &self.buffers)
    }

    fn find(&self, part: &Range<u64>) -> Found {
        self.table().find(part, Instant::now())
    }

    /// Drops chunks once they have not been used for a second, until there are none.
    async fn expire(self: Arc<Self>, _expiry: Arc<Expiry>) {
        loop {
            Timer::after(STOPPED).await;
            if self.expire_idle(Instant::now()) {
                return;
            }
        }
    }

    /// Whether none is left, so that there is nothing more to expire.
    fn expire_idle(&self, now: Instant) -> bool {
        let idle = self.table().take_out(|_, chunk| chunk.is_idle(now, STOPPED));
        drop(idle);
        // Buffers are taken under the table's lock: none can be meanwhile.
        let none_left = self.table().end_expiry(|| !self.buffers.any_taken());
        if none_left {
            self.buffers.give_back();
        }
        none_left
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no code panics while it holds the table")
    }
}

/// A write that has not been acknowledged.
pub struct Writing<'a> {
    ahead: &'a Ahead,
    range: Range<u64>,
}

impl Writing<'_> {
    fn take_out(&self) {
        if self.ahead.buffers.any_taken() {
            let Range { start, end } = self.range;
            let overlaps = |offset, _: &Chunk| offset < end && start < offset + CHUNK;
            let overlapping = self.ahead.table().take_out(overlaps);
            // Not under the lock: it wakes those who wait for them.
            drop(overlapping);
        }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.take_out();
    }
}

/// How one lane reads through the chunks. Its futures may be dropped.
pub struct Reads<S> {
    ahead: Arc<Ahead>,
    source: Rc<S>,
    /// Of the source, in bytes.
    size: u64,
    io: Rc<Io>,
}

impl<S: Source> Reads<S> {
    /// Reads from `source`, which is `size` bytes long; fetches are tasks of `io`'s thread.
    pub fn new(ahead: Arc<Ahead>, source: Rc<S>, size: u64, io: Rc<Io>) -> Reads<S> {
        Reads { ahead, source, size, io }
    }

    /// Fills `buf` from `offset`; all of it lies before the end.
    pub async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let plan = self.ahead.plan(offset..offset + buf.len() as u64, self.size);
        for Fetch { offset, number, buffer } in plan.fetches {
            let arriving = Arriving { ahead: self.ahead.clone(), offset, number };
            self.io.spawn(arriving.fetch(self.source.clone(), buffer)).detach();
        }
        if let Some(expiry) = plan.expiry {
            self.io.spawn(self.ahead.clone().expire(expiry)).detach();
        }
        let mut rest = buf;
        let mut split = |(part, found): (Range<u64>, Found)| {
            let (bytes, after) =
                std::mem::take(&mut rest).split_at_mut((part.end - part.start) as usize);
            rest = after;
            self.part(part, found, bytes)
        };
        let mut parts = plan.parts.into_iter();
        match (parts.next(), parts.len()) {
            (Some(only), 0) => split(only).await,
            (first, _) => all(first.into_iter().chain(parts).map(split)).await,
        }
    }

    async fn part(&self, part: Range<u64>, found: Found, bytes: &mut [u8]) -> io::Result<()> {
        let found = match found {
            Found::OnItsWay(settled) => {
                settled.await;
                self.ahead.find(&part)
            }
            found => found,
        };
        match found {
            Found::Ready(content) => {
                let at = (part.start % CHUNK) as usize;
                bytes.copy_from_slice(&content.bytes()[at..at + bytes.len()]);
                self.ahead.used_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                self.ahead.used.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            // Taken out by a write, or not to be had: then the reader hears the reason himself.
            Found::OnItsWay(_) | Found::Nowhere => self.source.read(part.start, bytes).await,
        }
    }
}

/// A chunk on its way. It is taken out if this is dropped: its fetch has failed, or its lane has
/// ended.
struct Arriving {
    ahead: Arc<Ahead>,
    offset: u64,
    number: u64,
}

impl Arriving {
    async fn fetch(self, source: Rc<impl Source>, mut buffer: Buffer) {
        if source.read(self.offset, buffer.bytes_mut()).await.is_ok() {
            let length = buffer.bytes().len() as u64;
            self.ahead.fetched_bytes.fetch_add(length, Ordering::Relaxed);
            let settled = self.ahead.table().make_ready(self.offset, self.number, buffer);
            // Not under the lock: it wakes those who wait.
            settled.inspect(|settled| _ = settled.notify(usize::MAX));
        }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let failed = self.ahead.table().take_out_unready(self.offset, self.number);
        drop(failed);
    }
}
