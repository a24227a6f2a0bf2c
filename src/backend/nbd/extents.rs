//! Remembers the extents that BLOCK_STATUS has reported, so that a walk by `SEEK_DATA` and
//! `SEEK_HOLE` costs a round trip for each thousand extents and not for each one.
//!
//! # What is believed, and for how long
//! Other hosts may write to the disk, so an extent is believed for [`LIFE`] after it was *asked*
//! for, and asked for again after that. Writes of our own are exact: a seek that begins after a
//! write was acknowledged never sees what was there before it. [`Extents::changing`] forgets the
//! range when the write begins and again when it has ended, in whatever way; and an answer that was
//! asked for before the write ended is not remembered there:
//!
//! ```text
//! ask    ├────────────────────┤              the write's end leaves its range with the ask: left out of the answer
//! write     ├────────┤
//!
//! ask         ├────┤
//! write  ├──────────────┤                    the write's end forgets what the ask has brought
//! ```
//!
//! A write that was given up ([`super::abandoned`]) has ended in this sense. If the server carries
//! it out later, that is as if another host wrote.
//!
//! # Cost and bounds
//! Seeks share a mutex. A write reads one atomic, and takes the mutex only while something is
//! remembered or asked for. At most [`MAX_REMEMBERED`] extents are remembered (some 3 MiB), and
//! [`MAX_WRITTEN`] ranges for each ask under way.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use slab::Slab;

use super::inflight::{Extent, MAX_EXTENTS};
use crate::backend::{RemoteStats, Seek};

/// How long an answer is believed, counted from its question.
const LIFE: Duration = Duration::from_secs(1);

/// How many extents are remembered. With one more all are forgotten, which is simple: a walk does
/// not come back to what is behind it, and asks once more for what is ahead.
const MAX_REMEMBERED: usize = 64 << 10;

/// How many written ranges an ask under way keeps apart; the last one grows to hold the rest.
const MAX_WRITTEN: usize = 256;

/// How many readers that go in order are told apart.
const READERS: usize = 64;

/// How far the first BLOCK_STATUS asks, in bytes.
const FIRST_REACH: u64 = 64 << 20;
/// No less is asked for, in bytes: full of single sectors it has twice as many extents as are kept
/// of an answer.
const MIN_REACH: u64 = 1 << 20;
/// An answer with fewer extents than this lets the next one reach twice as far.
const FEW_EXTENTS: usize = MAX_EXTENTS / 4;

/// The extents of one disk, shared by all its lanes.
#[derive(Debug, Default)]
pub struct Extents {
    /// Something is remembered or asked for. It changes under the mutex only.
    watched: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// By their first bytes. They do not overlap, and neighbours differ.
    known: BTreeMap<u64, Piece>,
    /// When the oldest of them was asked for.
    oldest: Option<Instant>,
    /// What was written since each ask under way began.
    asks: Slab<Vec<Range<u64>>>,
    /// How far the next one asks, in bytes.
    reach: u64,
    /// How many there were.
    asked: u64,
    /// Reads that known holes were left out of, and how much of them, in bytes.
    left_out: (u64, u64),
    /// Where the last reads have ended, so that reads in order are told from others.
    ends: [u64; READERS],
    next_end: usize,
}

/// An extent, but for its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    end: u64,
    zero: bool,
}

/// What is known of a range that is to be read.
#[derive(Debug, PartialEq, Eq)]
pub struct Look {
    /// What has to be read: the rest, before and behind it, is zeroes. It is empty if all is.
    pub read: Range<u64>,
    /// It is one of several reads in order, and nothing is known from here on.
    pub ask_from: Option<u64>,
}

/// Where a search has come to.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// It is here.
    At(u64),
    /// It is not before here, and what follows is not known.
    NotBefore(u64),
}

impl Extents {
    /// Looks for `what` at or after `from` in what is remembered.
    pub fn find(&self, from: u64, what: Seek) -> Found {
        self.with(|state| state.find(from, what))
    }

    /// Looks what of `range` is known to be zeroes, before a read of it.
    pub fn look(&self, range: Range<u64>) -> Look {
        self.with(|state| {
            let length = range.end - range.start;
            let look = state.look(range);
            let left_out = length - (look.read.end - look.read.start);
            if left_out > 0 {
                state.left_out.0 += 1;
                state.left_out.1 += left_out;
            }
            look
        })
    }

    /// A BLOCK_STATUS is about to be sent. It must not ask for more than `longest` bytes.
    pub fn ask(&self, longest: u64) -> Asking<'_> {
        self.with(|state| {
            state.asked += 1;
            let (reach, key) = (state.reach.min(longest), state.asks.insert(Vec::new()));
            Asking { extents: self, key, begun: Instant::now(), reach, longest }
        })
    }

    /// A write, or a zeroing, of `range` is about to be sent; it ends when the guard is dropped,
    /// which must be before it is acknowledged. (Forgetting at the end is what counts. At the
    /// beginning it is for those who read the new bytes meanwhile, and then look whether there are
    /// any.)
    pub fn changing(&self, range: Range<u64>) -> Changing<'_> {
        self.forget(&range);
        Changing { extents: self, range }
    }

    /// Forgets everything.
    pub fn forget_all(&self) {
        self.forget(&(0..u64::MAX));
    }

    /// Adds what is known here.
    pub fn add_stats(&self, stats: &mut RemoteStats) {
        let state = self.lock();
        (stats.hole_hits, stats.hole_hit_bytes) = state.left_out;
        stats.hole_requests = state.asked;
    }

    /// How many BLOCK_STATUS there have been.
    pub fn asked(&self) -> u64 {
        self.lock().asked
    }

    fn forget(&self, range: &Range<u64>) {
        // If this says no, any ask begins later, and so is sent after the write has ended: its
        // answer is right. That takes one order of this load and the store in `with`. Such a load
        // costs no more than one that acquires.
        if self.watched.load(Ordering::SeqCst) {
            self.with(|state| state.forget(range));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds the extents")
    }

    fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.lock();
        state.expire(Instant::now());
        let result = work(&mut state);
        if state.known.len() > MAX_REMEMBERED {
            state.clear();
        }
        let watched = !state.known.is_empty() || !state.asks.is_empty();
        self.watched.store(watched, Ordering::SeqCst);
        result
    }
}

/// A BLOCK_STATUS under way, until it is dropped.
#[derive(Debug)]
pub struct Asking<'a> {
    extents: &'a Extents,
    key: usize,
    begun: Instant,
    reach: u64,
    longest: u64,
}

impl Asking<'_> {
    /// How far it should ask, in bytes.
    pub fn reach(&self) -> u64 {
        self.reach
    }

    /// Takes in the answer to what was `asked` for: the extents from its start on. They may end
    /// early, or late, even beyond the disk's `size`.
    pub fn answered(self, asked: &Range<u64>, told: &[Extent], size: u64) {
        self.extents.with(|state| {
            let written = std::mem::take(&mut state.asks[self.key]);
            // It may have taken longer than it is believed.
            let believed = self.begun.elapsed() < LIFE;
            let mut at = asked.start;
            for extent in told {
                let end = at.saturating_add(extent.length).min(size);
                if believed {
                    state.insert(at..end, extent.zero);
                }
                at = end;
            }
            written.iter().for_each(|range| state.cut(range));
            if believed {
                state.oldest = Some(state.oldest.map_or(self.begun, |at| at.min(self.begun)));
            }
            state.adapt(asked.end - asked.start, at - asked.start, told.len(), self.longest);
        });
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.extents.with(|state| state.asks.remove(self.key));
    }
}

/// A write under way, until it is dropped.
#[derive(Debug)]
#[must_use = "the write ends when this is dropped"]
pub struct Changing<'a> {
    extents: &'a Extents,
    range: Range<u64>,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.extents.forget(&self.range);
    }
}

impl Default for State {
    fn default() -> State {
        State {
            known: BTreeMap::new(),
            oldest: None,
            asks: Slab::new(),
            reach: FIRST_REACH,
            asked: 0,
            left_out: (0, 0),
            ends: [u64::MAX; READERS],
            next_end: 0,
        }
    }
}

impl State {
    /// All at once: one time for all is simple, and costs a walk one more question in each
    /// [`LIFE`].
    fn expire(&mut self, now: Instant) {
        if self.oldest.is_some_and(|oldest| now.saturating_duration_since(oldest) >= LIFE) {
            self.clear();
        }
    }

    fn clear(&mut self) {
        self.known.clear();
        self.oldest = None;
    }

    fn find(&self, from: u64, what: Seek) -> Found {
        let before = self.known.range(..=from).next_back();
        match before.filter(|(_, piece)| piece.end > from) {
            None => Found::NotBefore(from),
            Some((_, piece)) if piece.zero == (what == Seek::Hole) => Found::At(from),
            // Neighbours differ.
            Some((_, piece)) if self.known.contains_key(&piece.end) => Found::At(piece.end),
            Some((_, piece)) => Found::NotBefore(piece.end),
        }
    }

    fn look(&mut self, range: Range<u64>) -> Look {
        let goes_on = self.goes_on(&range);
        let (start, unknown) = match self.find(range.start, Seek::Data) {
            Found::At(data) => (data.min(range.end), None),
            Found::NotBefore(at) if at >= range.end => (range.end, None),
            Found::NotBefore(at) => (at, Some(at)),
        };
        let mut end = range.end;
        // From the end backwards, as far as holes follow each other: neighbours differ, so it is
        // one at most.
        if let Some((&at, piece)) = self.known.range(..end).next_back()
            && piece.zero
            && piece.end >= end
        {
            end = at.max(start);
        }
        Look { read: start..end, ask_from: unknown.filter(|_| goes_on) }
    }

    /// Whether a read goes on where another has ended.
    fn goes_on(&mut self, range: &Range<u64>) -> bool {
        match self.ends.iter_mut().find(|end| **end == range.start) {
            Some(end) => {
                *end = range.end;
                true
            }
            None => {
                self.ends[self.next_end] = range.end;
                self.next_end = (self.next_end + 1) % READERS;
                false
            }
        }
    }

    /// Makes the next answer carry about as many extents as are kept of one: a server should not
    /// list far more.
    fn adapt(&mut self, asked: u64, told: u64, extents: usize, longest: u64) {
        if extents >= MAX_EXTENTS {
            self.reach = self.reach.min(asked / 2).min(told).max(MIN_REACH);
        } else if extents < FEW_EXTENTS {
            self.reach = self.reach.max((asked * 2).min(longest));
        }
    }

    /// What is told now counts more than what was told before.
    fn insert(&mut self, range: Range<u64>, zero: bool) {
        if range.is_empty() {
            return;
        }
        self.cut(&range);
        let Range { mut start, mut end } = range;
        let before = self.known.range(..start).next_back();
        if let Some((&at, _)) = before.filter(|(_, p)| p.end == start && p.zero == zero) {
            start = at;
        }
        if let Some(&after) = self.known.get(&end).filter(|piece| piece.zero == zero) {
            self.known.remove(&end);
            end = after.end;
        }
        self.known.insert(start, Piece { end, zero });
    }

    /// Forgets `range`, and has it left out of the answers to come.
    fn forget(&mut self, range: &Range<u64>) {
        self.cut(range);
        for (_, written) in &mut self.asks {
            if written.len() < MAX_WRITTEN {
                written.push(range.clone());
            } else if let Some(last) = written.last_mut() {
                *last = last.start.min(range.start)..last.end.max(range.end);
            }
        }
    }

    /// Takes `range` out of what is known.
    fn cut(&mut self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        if let Some((_, before)) = self.known.range_mut(..range.start).next_back() {
            let piece = *before;
            before.end = piece.end.min(range.start);
            if piece.end > range.end {
                self.known.insert(range.end, piece);
            }
        }
        while let Some((&start, &piece)) = self.known.range(range.clone()).next() {
            self.known.remove(&start);
            if piece.end > range.end {
                self.known.insert(range.end, piece);
            }
        }
    }
}

#[cfg(test)]
mod tests;
