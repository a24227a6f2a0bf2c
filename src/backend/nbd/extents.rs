//! The extents that BLOCK_STATUS has told of, so that a walk by `SEEK_DATA` and `SEEK_HOLE` costs a round trip for
//! each thousand extents and not for each one.
//!
//! # What is believed, and for how long
//! Other hosts may write to the disk, so an extent is believed for [`LIFE`] after it was *asked* for, and asked for
//! again after that. Writes of our own are exact: a seek that begins after a write was acknowledged never sees what was
//! there before it. [`Extents::changing`] forgets the range when the write begins and again when it has ended, in whatever
//! way; and an answer that was asked for before the write ended is not remembered there:
//!
//! ```text
//! ask    ├────────────────────┤              the write's end leaves its range with the ask: left out of the answer
//! write     ├────────┤
//!
//! ask         ├────┤
//! write  ├──────────────┤                    the write's end forgets what the ask has brought
//! ```
//!
//! A write that was given up ([`super::abandoned`]) has ended in this sense. If the server carries it out later, that is
//! as if another host wrote.
//!
//! # Cost and bounds
//! Seeks share a mutex. A write reads one atomic, and takes the mutex only while something is remembered or asked for.
//! At most [`MAX_REMEMBERED`] extents are remembered (some 3 MiB), and [`MAX_WRITTEN`] ranges for each ask under way.

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

/// How many extents are remembered. With one more all are forgotten, which is simple: a walk does not come back to what
/// is behind it, and asks once more for what is ahead.
const MAX_REMEMBERED: usize = 64 << 10;

/// How many written ranges an ask under way keeps apart; the last one grows to hold the rest.
const MAX_WRITTEN: usize = 256;

/// How many readers that go in order are told apart.
const READERS: usize = 64;

/// How far the first BLOCK_STATUS asks, in bytes.
const FIRST_REACH: u64 = 64 << 20;
/// No less is asked for, in bytes: full of single sectors it has twice as many extents as are kept of an answer.
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

    /// A write, or a zeroing, of `range` is about to be sent; it ends when the guard is dropped, which must be before it
    /// is acknowledged. (Forgetting at the end is what counts. At the beginning it is for those who read the new bytes
    /// meanwhile, and then look whether there are any.)
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
        // If this says no, any ask begins later, and so is sent after the write has ended: its answer is right. That
        // takes one order of this load and the store in `with`. Such a load costs no more than one that acquires.
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

    /// Takes in the answer to what was `asked` for: the extents from its start on. They may end early, or late, even
    /// beyond the disk's `size`.
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
    /// All at once: one time for all is simple, and costs a walk one more question in each [`LIFE`].
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
        // From the end backwards, as far as holes follow each other: neighbours differ, so it is one at most.
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

    /// Makes the next answer carry about as many extents as are kept of one: a server should not list far more.
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
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 50;
    const ALL: Range<u64> = 0..SIZE;

    fn told(lengths: &[u64], first_is_zero: bool) -> Vec<Extent> {
        let kinds = [first_is_zero, !first_is_zero].into_iter().cycle();
        lengths.iter().zip(kinds).map(|(&length, zero)| Extent { length, zero }).collect()
    }

    fn learn(extents: &Extents, start: u64, lengths: &[u64], first_is_zero: bool) {
        extents.ask(SIZE).answered(&(start..SIZE), &told(lengths, first_is_zero), SIZE);
    }

    #[test]
    fn reads_leave_known_holes_out_and_ask_when_they_go_on() {
        let extents = Extents::default();
        let look = |range| extents.look(range);
        assert_eq!(look(0..100), Look { read: 0..100, ask_from: None });
        assert_eq!(look(500..600), Look { read: 500..600, ask_from: None }, "not in order");
        assert_eq!(look(100..200), Look { read: 100..200, ask_from: Some(100) });
        // A hole, data, a hole, and what is not known.
        learn(&extents, 0, &[150, 100, 250], true);
        assert_eq!(look(0..150), Look { read: 150..150, ask_from: None });
        assert_eq!(look(100..300), Look { read: 150..250, ask_from: None });
        assert_eq!(look(200..600), Look { read: 200..600, ask_from: None });
        assert_eq!(look(300..400), Look { read: 400..400, ask_from: None });
        assert_eq!(look(400..600), Look { read: 500..600, ask_from: Some(500) });
        drop(extents.changing(300..301));
        assert_eq!(look(260..400), Look { read: 300..301, ask_from: None });
        let mut stats = RemoteStats::default();
        extents.add_stats(&mut stats);
        assert_eq!((stats.hole_hits, stats.hole_hit_bytes), (5, 150 + 3 * 100 + 139));
        assert_eq!(stats.hole_requests, 1);
    }

    /// What is known, and that neighbours differ.
    fn known(extents: &Extents) -> Vec<(u64, u64, bool)> {
        let state = extents.lock();
        let known: Vec<_> =
            state.known.iter().map(|(&at, piece)| (at, piece.end, piece.zero)).collect();
        for pair in known.windows(2) {
            let ((_, end, zero), (next, _, next_zero)) = (pair[0], pair[1]);
            assert!(end < next || end == next && zero != next_zero, "{known:?}");
        }
        drop(state);
        let watched = extents.watched.load(Ordering::SeqCst);
        assert_eq!(watched, !known.is_empty() || !extents.lock().asks.is_empty());
        known
    }

    #[test]
    fn what_was_told_is_found_and_gaps_are_not_passed() {
        let extents = Extents::default();
        assert_eq!(extents.find(5, Seek::Data), Found::NotBefore(5));
        learn(&extents, 100, &[100, 50, 50], true);
        assert_eq!(extents.find(99, Seek::Hole), Found::NotBefore(99));
        assert_eq!(extents.find(100, Seek::Hole), Found::At(100));
        assert_eq!(extents.find(150, Seek::Hole), Found::At(150));
        assert_eq!(extents.find(150, Seek::Data), Found::At(200));
        assert_eq!(extents.find(200, Seek::Data), Found::At(200));
        assert_eq!(extents.find(249, Seek::Hole), Found::At(250));
        assert_eq!(extents.find(260, Seek::Data), Found::NotBefore(300));
        assert_eq!(extents.find(300, Seek::Data), Found::NotBefore(300));
        learn(&extents, 310, &[10], false);
        assert_eq!(extents.find(260, Seek::Data), Found::NotBefore(300));
    }

    #[test]
    fn neighbours_of_one_kind_are_merged_and_the_last_answer_counts() {
        let extents = Extents::default();
        learn(&extents, 0, &[100], true);
        learn(&extents, 200, &[100], true);
        learn(&extents, 100, &[100], true);
        assert_eq!(known(&extents), [(0, 300, true)]);
        learn(&extents, 150, &[50, 150, 50], false);
        assert_eq!(
            known(&extents),
            [(0, 150, true), (150, 200, false), (200, 350, true), (350, 400, false)]
        );
        learn(&extents, 100, &[250], false);
        assert_eq!(known(&extents), [(0, 100, true), (100, 400, false)]);
    }

    #[test]
    fn nothing_is_known_behind_the_end() {
        let extents = Extents::default();
        let told = told(&[50, 100, u64::MAX, u64::MAX], true);
        extents.ask(100).answered(&(0..100), &told, 100);
        assert_eq!(known(&extents), [(0, 50, true), (50, 100, false)]);
        assert_eq!(extents.find(60, Seek::Hole), Found::NotBefore(100));
    }

    #[test]
    fn writes_forget_what_they_touch() {
        for (written, rest) in [
            (140..160, vec![(100, 140, true), (160, 200, true), (200, 300, false)]),
            (100..200, vec![(200, 300, false)]),
            (50..150, vec![(150, 200, true), (200, 300, false)]),
            (150..250, vec![(100, 150, true), (250, 300, false)]),
            (250..900, vec![(100, 200, true), (200, 250, false)]),
            (0..900, vec![]),
            (0..100, vec![(100, 200, true), (200, 300, false)]),
            (300..400, vec![(100, 200, true), (200, 300, false)]),
            (150..150, vec![(100, 200, true), (200, 300, false)]),
        ] {
            let extents = Extents::default();
            learn(&extents, 100, &[100, 100], true);
            drop(extents.changing(written.clone()));
            assert_eq!(known(&extents), rest, "{written:?}");
        }
    }

    #[test]
    fn pieces_agree_with_a_model() {
        let mut seed = 1_u64;
        let mut below = move |bound: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % bound
        };
        let mut state = State::default();
        let mut model = [None; 100];
        for _ in 0..20_000 {
            let (start, zero) = (below(100), below(2) == 0);
            let range = start..start + below(101 - start);
            let bytes = &mut model[range.start as usize..range.end as usize];
            if below(4) == 0 {
                state.cut(&range);
                bytes.fill(None);
            } else {
                state.insert(range, zero);
                bytes.fill(Some(zero));
            }
            let from = below(100);
            for what in [Seek::Data, Seek::Hole] {
                let rest = (from..).zip(&model[from as usize..]);
                let expected = rest
                    .filter_map(|(at, byte)| match byte {
                        None => Some(Found::NotBefore(at)),
                        Some(zero) => (*zero == (what == Seek::Hole)).then_some(Found::At(at)),
                    })
                    .next();
                assert_eq!(state.find(from, what), expected.unwrap_or(Found::NotBefore(100)));
            }
        }
    }

    #[test]
    fn an_answer_is_not_remembered_where_was_written_since_it_was_asked_for() {
        let extents = Extents::default();
        // Within the ask, and begun before it.
        let before = extents.changing(500..600);
        let ask = extents.ask(SIZE);
        drop(extents.changing(100..200));
        drop(before);
        ask.answered(&ALL, &told(&[1000], true), SIZE);
        assert_eq!(known(&extents), [(0, 100, true), (200, 500, true), (600, 1000, true)]);
        // Begun within the ask, and not yet ended.
        let ask = extents.ask(SIZE);
        let within = extents.changing(0..10);
        ask.answered(&ALL, &told(&[1000], true), SIZE);
        drop(within);
        // Around the ask.
        let around = extents.changing(20..30);
        learn(&extents, 15, &[20], true);
        drop(around);
        assert_eq!(known(&extents), [(10, 20, true), (30, 1000, true)]);
        // Of two asks the later one began after the write.
        let early = extents.ask(SIZE);
        drop(extents.changing(0..1000));
        let late = extents.ask(SIZE);
        early.answered(&ALL, &told(&[1000], true), SIZE);
        assert_eq!(known(&extents), []);
        late.answered(&ALL, &told(&[1000], false), SIZE);
        assert_eq!(known(&extents), [(0, 1000, false)]);
    }

    #[test]
    fn more_writes_than_are_kept_apart_are_not_lost() {
        let extents = Extents::default();
        let ask = extents.ask(SIZE);
        for n in 0..MAX_WRITTEN as u64 {
            drop(extents.changing(n * 10..n * 10 + 1));
        }
        assert!(extents.lock().asks.iter().all(|(_, written)| written.len() == MAX_WRITTEN));
        ask.answered(&ALL, &told(&[SIZE], true), SIZE);
        for n in 0..MAX_WRITTEN as u64 {
            assert_eq!(extents.find(n * 10, Seek::Hole), Found::NotBefore(n * 10));
        }
        assert_eq!(extents.find(5, Seek::Hole), Found::At(5));
    }

    #[test]
    fn answers_are_believed_for_a_second_after_they_were_asked_for() {
        let extents = Extents::default();
        learn(&extents, 0, &[100], true);
        let mut ask = extents.ask(SIZE);
        ask.begun -= LIFE * 9 / 10;
        let begun = ask.begun;
        ask.answered(&(200..300), &told(&[100], true), SIZE);
        assert_eq!(extents.lock().oldest, Some(begun));
        assert_eq!(known(&extents).len(), 2);
        extents.lock().oldest = Some(begun - LIFE / 10);
        assert_eq!(extents.find(250, Seek::Hole), Found::NotBefore(250));
        assert_eq!(known(&extents), []);
        // One that took too long to come takes nothing away either.
        learn(&extents, 0, &[100], true);
        let mut ask = extents.ask(SIZE);
        ask.begun -= LIFE;
        ask.answered(&(200..300), &told(&[100], true), SIZE);
        assert_eq!(known(&extents), [(0, 100, true)]);
    }

    #[test]
    fn a_write_after_a_while_finds_nothing_to_do() {
        let extents = Extents::default();
        learn(&extents, 0, &[100], true);
        extents.lock().oldest = Some(Instant::now() - LIFE);
        drop(extents.changing(5000..5001));
        assert!(!extents.watched.load(Ordering::SeqCst));
    }

    #[test]
    fn memory_is_bounded() {
        let extents = Extents::default();
        let lengths = vec![1; 1000];
        for n in 0..200 {
            learn(&extents, n * 1000, &lengths, true);
            assert!(extents.lock().known.len() <= MAX_REMEMBERED);
        }
        assert!(extents.lock().known.len() > 1000);
        // A write in the middle of an extent makes two of it.
        extents.forget_all();
        learn(&extents, 0, &[SIZE], true);
        // However long this takes, it is not forgotten meanwhile.
        extents.lock().oldest = Some(Instant::now() + Duration::from_secs(3600));
        let mut most = 0;
        for n in 0..MAX_REMEMBERED as u64 + 10 {
            drop(extents.changing(n * 10..n * 10 + 1));
            most = most.max(extents.lock().known.len());
        }
        assert_eq!(most, MAX_REMEMBERED);
    }

    #[test]
    fn everything_is_forgotten_also_what_is_asked_for() {
        let extents = Extents::default();
        learn(&extents, 0, &[100], true);
        let ask = extents.ask(SIZE);
        extents.forget_all();
        ask.answered(&ALL, &told(&[100], true), SIZE);
        assert_eq!(known(&extents), []);
        drop(extents.ask(SIZE));
        assert_eq!(known(&extents), []);
        assert_eq!(extents.asked(), 3);
    }

    #[test]
    fn the_reach_follows_the_answers() {
        let (extents, longest) = (Extents::default(), u64::from(u32::MAX));
        let answer = |length: u64, lengths: &[u64]| {
            let ask = extents.ask(longest);
            let start = ask.reach().min(length);
            ask.answered(&(0..start), &told(lengths, true), SIZE);
            extents.ask(longest).reach()
        };
        let full = vec![4096; MAX_EXTENTS];
        assert_eq!(extents.ask(longest).reach(), FIRST_REACH);
        assert_eq!(extents.ask(1 << 20).reach(), 1 << 20);
        assert_eq!(answer(SIZE, &[SIZE]), 2 * FIRST_REACH);
        for _ in 0..10 {
            answer(SIZE, &[SIZE]);
        }
        assert_eq!(answer(SIZE, &[SIZE]), longest);
        // Little was asked for at the end of the disk: that tells nothing.
        assert_eq!(answer(4096, &[4096]), longest);
        assert_eq!(answer(SIZE, &vec![1 << 20; MAX_EXTENTS / 2]), longest);
        // At once to what was kept, and never to nothing.
        assert_eq!(answer(SIZE, &full), 4 << 20);
        assert_eq!(answer(SIZE, &full), 2 << 20);
        assert_eq!(answer(SIZE, &vec![512; MAX_EXTENTS]), MIN_REACH);
        assert_eq!(answer(SIZE, &vec![512; MAX_EXTENTS]), MIN_REACH);
        assert_eq!(answer(SIZE, &[SIZE]), 2 * MIN_REACH);
    }
}
