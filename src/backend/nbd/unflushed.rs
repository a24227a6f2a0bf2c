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

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_listener::{Event, Listener};
use smol::lock::Mutex as AsyncMutex;

use self::store::Store;
use crate::backend::Zero;

mod store;

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
    /// None while it is being written again: there is no room meanwhile.
    store: Option<Store>,
    taken_bytes: u64,
    reserved_bytes: usize,
    reserved_writes: usize,
}

impl State {
    fn reserve(&mut self, bytes: usize) -> bool {
        let writes = self.reserved_writes + 1;
        let Some(store) = &self.store else { return false };
        if !store.has_room(self.reserved_bytes, bytes, writes) {
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
    /// Keeps up to `bytes`, or nothing if that is zero. `ENOMEM`: there is not so much memory.
    pub fn new(bytes: usize) -> io::Result<Arc<Unflushed>> {
        let store = if bytes > 0 { Some(Store::new(bytes.max(LEAST))?) } else { None };
        let kept = store.map(|store| Kept {
            state: Mutex::new(State {
                store: Some(store),
                taken_bytes: 0,
                reserved_bytes: 0,
                reserved_writes: 0,
            }),
            turn: AsyncMutex::new(()),
            is_due: AtomicBool::new(false),
        });
        Ok(Arc::new(Unflushed {
            acknowledged: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            writing: AtomicUsize::new(0),
            written: Event::new(),
            losses: AtomicU64::new(0),
            untold: AtomicBool::new(false),
            kept,
        }))
    }

    /// Whether anything is not known to be durable.
    pub fn any(&self) -> bool {
        self.flushed.load(Ordering::SeqCst) < self.mark()
    }

    /// How much data is kept, in bytes; none: nothing is.
    pub fn bytes(&self) -> Option<u64> {
        let state = self.kept.as_ref()?.state();
        Some(state.store.as_ref().map_or(state.taken_bytes, |store| store.bytes))
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
                let store = state.store.as_mut().expect("nothing is acknowledged meanwhile");
                store.note(offset, change, number);
                if store.is_half_full() && !self.is_due() {
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
                let store = state.store.take()?;
                state.taken_bytes = store.bytes;
                Some(Again { store, mark })
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
            kept.is_due.store(store.is_half_full(), Ordering::Relaxed);
            kept.state().store = Some(store);
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
            kept.state().store.iter_mut().for_each(Store::give_memory_back);
        }
    }
}

impl Kept {
    /// Drops what was acknowledged up to `mark`, and looks if a FLUSH is still due.
    fn drop_to(&self, mark: u64) {
        if let Some(store) = &mut self.state().store {
            store.drop_to(mark);
            self.is_due.store(store.is_half_full(), Ordering::Relaxed);
        }
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
        self.store.changes()
    }
}

#[cfg(test)]
mod tests;
