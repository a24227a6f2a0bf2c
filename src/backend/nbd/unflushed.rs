//! What the server has acknowledged and not yet made durable.
//!
//! A server that crashes forgets it, and the FLUSH of the server that comes after it succeeds all
//! the same. So it is kept here, and written again before anything else ([`super::connections`]):
//!
//! ```text
//!   acknowledged ──copied──> current log ┐                          FLUSH answered: what was acknowledged
//!                                        ├── extents, by offset     before it began is dropped
//!                         the other log ─┘
//! ```
//!
//! The extents are disjoint: a later write, zeroing or FUA cuts the earlier. So they can be written
//! again in any order, and an extent that is written twice in the same log stays in its place. A
//! log is filled once, and is empty again when none of its extents is left; so memory has a bound
//! that no pattern of writes can break. When the current log, half of the bound, is full, a FLUSH
//! is due; when both are, writers wait for it.
//!
//! Writes that overlap and are in flight together may have been carried out in either order, and it
//! is not known in which.
//!
//! Where nothing is kept, because the user wants that or the server has no FLUSH, a loss is told:
//! the next fsync fails.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_listener::{Event, Listener};
use smol::lock::Mutex as AsyncMutex;

use super::stream_copy::copy_past_the_caches;
use crate::backend::Zero;

/// One extent for so many bytes of the bound, on average: what they cost beside their data stays
/// small.
const BYTES_OF_AN_EXTENT: usize = 512;
/// A write cuts at most one extent in two, and may lie in both logs.
const EXTENTS_OF_A_WRITE: usize = 3;

/// What a log keeps of its memory between two users of the file, in bytes: small writes do not pay
/// for it each time.
const KEPT_BYTES: usize = 4 << 20;

/// The least that can be kept, in bytes: a request of 1 MiB has room in each log.
pub const LEAST: usize = 4 << 20;

/// Acknowledged and not yet made durable, of one disk.
#[derive(Debug)]
pub struct Unflushed {
    /// How many writes were acknowledged, and how many of them are known to be durable. Both only
    /// grow.
    acknowledged: AtomicU64,
    flushed: AtomicU64,
    /// Writes on their way, see [`Unflushed::begin`].
    writing: AtomicUsize,
    written: Event,
    losses: AtomicU64,
    /// Nobody has been told of the last loss.
    untold: AtomicBool,
    /// None: nothing is kept.
    kept: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    state: Mutex<State>,
    /// Whoever makes room by a FLUSH.
    turn: AsyncMutex<()>,
    /// That is due; told without the lock.
    is_due: AtomicBool,
}

#[derive(Debug)]
struct State {
    store: Store,
    /// It is being written again: there is no room meanwhile.
    is_taken: bool,
    taken_bytes: u64,
    reserved_bytes: usize,
    reserved_writes: usize,
}

impl State {
    fn reserve(&mut self, bytes: usize) -> bool {
        let writes = self.reserved_writes + 1;
        if self.is_taken || !self.store.has_room(self.reserved_bytes, bytes, writes) {
            return false;
        }
        self.reserved_bytes += bytes;
        self.reserved_writes += 1;
        true
    }

    fn release(&mut self, bytes: usize) {
        self.reserved_bytes -= bytes;
        self.reserved_writes -= 1;
    }
}

/// What a write has changed.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// It wrote this.
    Data(&'a [u8]),
    /// It zeroed so many bytes.
    Zero(u64, Zero),
    /// It made so many bytes durable at once (FUA).
    Durable(u64),
}

impl Change<'_> {
    /// How many bytes.
    pub fn length(&self) -> u64 {
        match self {
            Change::Data(data) => data.len() as u64,
            Change::Zero(length, _) | Change::Durable(length) => *length,
        }
    }
}

impl Unflushed {
    /// Keeps up to `bytes`, or nothing if that is zero.
    pub fn new(bytes: usize) -> Arc<Unflushed> {
        let kept = (bytes > 0).then(|| Kept {
            state: Mutex::new(State {
                store: Store::new(bytes.max(LEAST)),
                is_taken: false,
                taken_bytes: 0,
                reserved_bytes: 0,
                reserved_writes: 0,
            }),
            turn: AsyncMutex::new(()),
            is_due: AtomicBool::new(false),
        });
        Arc::new(Unflushed {
            acknowledged: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            writing: AtomicUsize::new(0),
            written: Event::new(),
            losses: AtomicU64::new(0),
            untold: AtomicBool::new(false),
            kept,
        })
    }

    /// Whether anything is not known to be durable.
    pub fn any(&self) -> bool {
        self.flushed.load(Ordering::SeqCst) < self.mark()
    }

    /// How much data is kept, in bytes; none: nothing is.
    pub fn bytes(&self) -> Option<u64> {
        let state = self.kept.as_ref()?.state();
        Some(state.store.bytes + state.taken_bytes)
    }

    /// What a FLUSH that begins now will cover.
    pub fn mark(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// A FLUSH has succeeded that began at `mark`.
    pub fn flushed_to(&self, mark: u64) {
        self.flushed.fetch_max(mark, Ordering::SeqCst);
        if let Some(kept) = &self.kept {
            kept.drop_to(mark);
        }
    }

    /// Makes room for `bytes` more, unless there is not enough; then a FLUSH has to make it.
    pub fn reserve(&self, bytes: usize) -> Option<Reserved<'_>> {
        let Some(kept) = &self.kept else { return Some(Reserved { kept: None, bytes }) };
        let has_room = kept.state().reserve(bytes);
        has_room.then(|| Reserved { kept: Some(kept), bytes })
    }

    /// The turn of one that makes room by a FLUSH. Whoever has waited for it looks again first.
    pub async fn turn(&self) -> Option<smol::lock::MutexGuard<'_, ()>> {
        match &self.kept {
            Some(kept) => Some(kept.turn.lock().await),
            None => None,
        }
    }

    /// The turn, if nobody has it.
    pub fn turn_if_free(&self) -> Option<smol::lock::MutexGuard<'_, ()>> {
        self.kept.as_ref()?.turn.try_lock()
    }

    /// Whether it is time to make room.
    pub fn is_due(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.is_due.load(Ordering::Relaxed))
    }

    /// A write is on its way from here until what it gives is dropped, or has noted its end. What
    /// is lost with a server is not certain before none is.
    pub fn begin(&self) -> Writing<'_> {
        self.writing.fetch_add(1, Ordering::SeqCst);
        Writing { all: self }
    }

    fn note(&self, offset: u64, change: Change<'_>) {
        match &self.kept {
            // The number is given under the lock: what has a number below a mark is in the store.
            Some(kept) => {
                let mut state = kept.state();
                let number = match change {
                    Change::Durable(_) => 0,
                    _ => self.acknowledged.fetch_add(1, Ordering::SeqCst) + 1,
                };
                state.store.note(offset, change, number);
                if state.store.is_half_full() && !self.is_due() {
                    kept.is_due.store(true, Ordering::Relaxed);
                }
            }
            None if matches!(change, Change::Durable(_)) => {}
            None => _ = self.acknowledged.fetch_add(1, Ordering::SeqCst),
        }
    }

    /// Waits, blocking, until no write is on its way. All connections are lost, so that none stays
    /// there.
    fn until_none_is_written(&self) {
        while self.writing.load(Ordering::SeqCst) > 0 {
            // Listen first and look again, or the end in between would be missed.
            let written = self.written.listen();
            if self.writing.load(Ordering::SeqCst) > 0 {
                let _ = written.wait_deadline(Instant::now() + Duration::from_secs(1));
            }
        }
    }

    /// The server is gone, with what it had not made durable: what has to be written again. It
    /// comes back here by [`Unflushed::made_durable`], [`Unflushed::put_back`] or
    /// [`Unflushed::give_up`]. Blocks. Where nothing is kept, what is gone counts as lost, and
    /// nothing is given.
    pub fn take(&self) -> Option<Again> {
        self.until_none_is_written();
        let mark = self.mark();
        match &self.kept {
            _ if !self.any() => None,
            Some(kept) => {
                let mut state = kept.state();
                state.is_taken = true;
                state.taken_bytes = state.store.bytes;
                let empty = state.store.empty();
                Some(Again { store: std::mem::replace(&mut state.store, empty), mark })
            }
            None => {
                self.lose(mark);
                None
            }
        }
    }

    /// It was written again and flushed.
    pub fn made_durable(&self, mut again: Again) {
        again.store.drop_to(again.mark);
        self.give_back(again.store);
        self.flushed.fetch_max(again.mark, Ordering::SeqCst);
    }

    /// It was not written again: another attempt is to come.
    pub fn put_back(&self, again: Again) {
        self.give_back(again.store);
    }

    /// It cannot be written again.
    pub fn give_up(&self, again: Again) {
        let mark = again.mark;
        self.give_back(again.store);
        self.lose(mark);
    }

    fn give_back(&self, store: Store) {
        if let Some(kept) = &self.kept {
            let mut state = kept.state();
            (state.store, state.is_taken, state.taken_bytes) = (store, false, 0);
            kept.is_due.store(state.store.is_half_full(), Ordering::Relaxed);
        }
    }

    /// What was acknowledged up to `mark` may be gone for ever. It does not count as flushed: some
    /// of it may still be in a server's cache, and the next fsync is to send a FLUSH.
    pub fn lose(&self, mark: u64) {
        self.untold.store(true, Ordering::SeqCst);
        self.losses.fetch_add(1, Ordering::SeqCst);
        if let Some(kept) = &self.kept {
            kept.drop_to(mark);
        }
    }

    /// How often something was lost.
    pub fn losses(&self) -> u64 {
        self.losses.load(Ordering::SeqCst)
    }

    /// Whether something was lost that nobody has been told of: once.
    pub fn tell(&self) -> bool {
        self.untold.load(Ordering::SeqCst) && self.untold.swap(false, Ordering::SeqCst)
    }

    /// Gives unused memory back.
    pub fn give_memory_back(&self) {
        if let Some(kept) = &self.kept
            && !self.any()
        {
            kept.state().store.give_memory_back();
        }
    }
}

impl Kept {
    /// Drops what was acknowledged up to `mark`, and looks if a FLUSH is still due.
    fn drop_to(&self, mark: u64) {
        let mut state = self.state();
        state.store.drop_to(mark);
        self.is_due.store(state.store.is_half_full(), Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds the state")
    }
}

/// Room for a write, until it is dropped.
#[derive(Debug)]
pub struct Reserved<'a> {
    kept: Option<&'a Kept>,
    bytes: usize,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if let Some(kept) = self.kept {
            kept.state().release(self.bytes);
        }
    }
}

/// See [`Unflushed::begin`].
#[derive(Debug)]
pub struct Writing<'a> {
    all: &'a Unflushed,
}

impl Writing<'_> {
    /// The server has acknowledged it.
    pub fn acknowledged(self, offset: u64, change: Change<'_>) {
        self.all.note(offset, change);
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if self.all.writing.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.all.written.notify(usize::MAX);
        }
    }
}

/// What has to be written again. Nothing is noted meanwhile.
#[derive(Debug)]
pub struct Again {
    store: Store,
    mark: u64,
}

impl Again {
    /// All of it, where it belongs; no two overlap.
    pub fn changes(&self) -> impl Iterator<Item = (u64, Change<'_>)> {
        self.store.extents.iter().map(|(&start, extent)| {
            let length = extent.end - start;
            match extent.content {
                Content::In(log, at) => {
                    let bytes = &self.store.logs[log].bytes[at..][..length as usize];
                    (start, Change::Data(bytes))
                }
                Content::Zero(how) => (start, Change::Zero(length, how)),
            }
        })
    }
}

#[derive(Debug, Default)]
struct Store {
    /// By where they start.
    extents: BTreeMap<u64, Extent>,
    /// How much data they have, all together.
    bytes: u64,
    logs: [Log; 2],
    current: usize,
    /// What a log holds at most, in bytes.
    half: usize,
    most_extents: usize,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    end: u64,
    content: Content,
    /// It was acknowledged so late.
    number: u64,
}

#[derive(Clone, Copy, Debug)]
enum Content {
    /// In a log, from there on.
    In(usize, usize),
    Zero(Zero),
}

impl Content {
    /// What follows the first `bytes`.
    fn after(self, bytes: u64) -> Content {
        match self {
            Content::In(log, at) => Content::In(log, at + bytes as usize),
            zero => zero,
        }
    }
}

#[derive(Debug, Default)]
struct Log {
    /// As many as it holds, once it has been used. The kernel gives the memory when it is written
    /// to.
    bytes: Vec<u8>,
    used: usize,
    /// How many of the bytes have been used at all, and so take memory.
    resident: usize,
    /// How many there are in it.
    extents: usize,
}

impl Store {
    fn new(bytes: usize) -> Store {
        Store { half: bytes / 2, most_extents: bytes / BYTES_OF_AN_EXTENT, ..Store::default() }
    }

    /// One that is like it, and empty.
    fn empty(&self) -> Store {
        Store { half: self.half, most_extents: self.most_extents, ..Store::default() }
    }

    fn room(&self) -> usize {
        let other = &self.logs[1 - self.current];
        let of_other = if other.extents == 0 { self.half } else { 0 };
        self.half - self.logs[self.current].used + of_other
    }

    /// Whether there is room for `bytes` beside those that are reserved, as `writes` in all.
    fn has_room(&self, reserved: usize, bytes: usize, writes: usize) -> bool {
        reserved + bytes <= self.room()
            && self.extents.len() + writes * EXTENTS_OF_A_WRITE <= self.most_extents
    }

    fn is_half_full(&self) -> bool {
        self.logs[1 - self.current].extents > 0
            || self.logs[self.current].used >= self.half
            || self.extents.len() >= self.most_extents / 2
    }

    fn note(&mut self, offset: u64, change: Change<'_>, number: u64) {
        let end = offset + change.length();
        let in_place = self.cut(offset..end);
        match change {
            Change::Durable(_) => {}
            Change::Zero(_, how) => {
                self.put(offset, Extent { end, content: Content::Zero(how), number });
            }
            Change::Data(data) => {
                let (mut at, mut rest) = (offset, data);
                // Appending may change it.
                let log = self.current;
                for (range, place) in in_place {
                    let (new, old) = rest.split_at((range.start - at) as usize);
                    self.append(at, new, number);
                    let (old, behind) = old.split_at((range.end - range.start) as usize);
                    copy_past_the_caches(&mut self.logs[log].bytes[place..][..old.len()], old);
                    let content = Content::In(log, place);
                    self.put(range.start, Extent { end: range.end, content, number });
                    (at, rest) = (range.end, behind);
                }
                self.append(at, rest, number);
            }
        }
    }

    fn append(&mut self, mut offset: u64, mut data: &[u8], number: u64) {
        while !data.is_empty() {
            let half = self.half;
            let log = &mut self.logs[self.current];
            let room = half - log.used;
            if room == 0 {
                self.current = 1 - self.current;
                let log = &mut self.logs[self.current];
                // Reserving has seen to it.
                assert_eq!(log.extents, 0, "both logs are full");
                log.used = 0;
                continue;
            }
            let (part, rest) = data.split_at(data.len().min(room));
            if log.bytes.is_empty() {
                log.bytes = vec![0; half];
            }
            let at = log.used;
            log.used += part.len();
            log.resident = log.resident.max(log.used);
            copy_past_the_caches(&mut log.bytes[at..log.used], part);
            let end = offset + part.len() as u64;
            self.put(offset, Extent { end, content: Content::In(self.current, at), number });
            (offset, data) = (end, rest);
        }
    }

    fn put(&mut self, start: u64, extent: Extent) {
        if let Content::In(log, _) = extent.content {
            self.logs[log].extents += 1;
            self.bytes += extent.end - start;
        }
        self.extents.insert(start, extent);
    }

    fn remove(&mut self, start: u64) -> Option<Extent> {
        let extent = self.extents.remove(&start)?;
        if let Content::In(log, _) = extent.content {
            self.logs[log].extents -= 1;
            self.bytes -= extent.end - start;
        }
        Some(extent)
    }

    /// Takes the range out. What of it was in the current log, and where, from the start to the
    /// end: it can be used again.
    fn cut(&mut self, range: Range<u64>) -> Vec<(Range<u64>, usize)> {
        let mut in_current = Vec::new();
        while let Some((&start, extent)) = self.extents.range(..range.end).next_back()
            && extent.end > range.start
            && let Some(extent) = self.remove(start)
        {
            if extent.end > range.end {
                let content = extent.content.after(range.end - start);
                self.put(range.end, Extent { content, ..extent });
            }
            if start < range.start {
                self.put(start, Extent { end: range.start, ..extent });
            }
            let overlap = start.max(range.start)..extent.end.min(range.end);
            if let Content::In(log, at) = extent.content.after(overlap.start - start)
                && log == self.current
            {
                in_current.push((overlap, at));
            }
        }
        // They were found from the end to the start.
        in_current.reverse();
        in_current
    }

    fn drop_to(&mut self, mark: u64) {
        let (logs, bytes) = (&mut self.logs, &mut self.bytes);
        self.extents.retain(|start, extent| {
            if extent.number > mark {
                return true;
            }
            if let Content::In(log, _) = extent.content {
                logs[log].extents -= 1;
                *bytes -= extent.end - start;
            }
            false
        });
        let current = &mut self.logs[self.current];
        if current.extents == 0 {
            current.used = 0;
        }
    }

    fn give_memory_back(&mut self) {
        if self.logs.iter().all(|log| log.extents == 0) {
            for log in self.logs.iter_mut().filter(|log| log.resident > KEPT_BYTES) {
                *log = Log::default();
            }
        }
    }
}

#[cfg(test)]
mod tests;
