//! The chunks of a disk: what has been fetched, and what is on its way.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use event_listener::{Event, EventListener};

use super::buffers::{Buffer, Buffers};
use super::streams::Streams;
use super::{CHUNK, MAX_CHUNKS};

/// A chunk that was not used for so long can make room for another. Less, and readers who take
/// turns would take each other's.
pub const SPARE: Duration = Duration::from_millis(100);

/// Everything that changes, under one lock. It is held for look-ups, never while bytes are copied
/// or anybody is woken.
#[derive(Debug, Default)]
pub struct Table {
    streams: Streams,
    /// By their offset.
    chunks: BTreeMap<u64, Chunk>,
    /// How many there have been.
    numbers: u64,
    /// Of the task that expires chunks, while there is one.
    pub expiry: Weak<Expiry>,
}

/// A piece of the disk. Whoever waits for it is woken when it is dropped.
#[derive(Debug)]
pub struct Chunk {
    /// Tells it from others that were or will be in its place.
    number: u64,
    /// `None` while it is on its way.
    content: Option<Arc<Buffer>>,
    /// It is ready, or has been taken out of the table.
    settled: Event,
    /// How many of its bytes have been read.
    read: u64,
    used: Instant,
}

impl Chunk {
    /// It is ready, and was not used for so long.
    pub fn is_idle(&self, now: Instant, limit: Duration) -> bool {
        self.content.is_some() && now - self.used >= limit
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.settled.notify(usize::MAX);
    }
}

/// Where a part of a READ is, within one chunk's place.
pub enum Found {
    Ready(Arc<Buffer>),
    OnItsWay(EventListener),
    Nowhere,
}

/// What a READ leads to.
pub struct Plan {
    /// Its parts, in order.
    pub parts: Vec<(Range<u64>, Found)>,
    /// What to fetch ahead of it.
    pub fetches: Vec<Fetch>,
    /// The task that expires chunks is to be started.
    pub expiry: Option<Arc<Expiry>>,
}

/// The task that expires chunks has this. It can end with its lane while other lanes have chunks:
/// the next fetch then starts another.
#[derive(Debug)]
pub struct Expiry;

/// A chunk that is in the table and has not been asked for yet.
pub struct Fetch {
    pub offset: u64,
    pub number: u64,
    pub buffer: Buffer,
}

impl Table {
    /// Takes note of a READ, tells where its bytes are, and puts in the chunks that are to be
    /// fetched ahead of it.
    pub fn plan(
        &mut self,
        read: Range<u64>,
        size: u64,
        limit: u64,
        buffers: &Arc<Buffers>,
    ) -> Plan {
        let now = Instant::now();
        let reader = self.streams.note(read.clone(), now);
        let parts = self.parts(&read, now);
        let fetches = reader.map_or_else(Vec::new, |reader| {
            let share = MAX_CHUNKS as u64 * CHUNK / reader.readers;
            let window = reader.run.min(share).min(limit);
            let window = reader.next..reader.next.saturating_add(window).min(size);
            self.fetches(window, size, buffers, now)
        });
        let expiry = (!fetches.is_empty() && self.expiry.strong_count() == 0).then(|| {
            let expiry = Arc::new(Expiry);
            self.expiry = Arc::downgrade(&expiry);
            expiry
        });
        Plan { parts, fetches, expiry }
    }

    /// A fetch has succeeded: its chunk is ready. Returns whom to notify; `None`: it was taken out
    /// meanwhile, and the bytes may be old.
    pub fn make_ready(&mut self, offset: u64, number: u64, content: Buffer) -> Option<Event> {
        let chunk = self.chunks.get_mut(&offset).filter(|chunk| chunk.number == number)?;
        chunk.content = Some(Arc::new(content));
        Some(std::mem::take(&mut chunk.settled))
    }

    /// A fetch has ended, in whatever way: takes its chunk out if it is not ready.
    pub fn take_out_unready(&mut self, offset: u64, number: u64) -> Option<Chunk> {
        let chunk = self.chunks.get(&offset)?;
        let has_failed = chunk.number == number && chunk.content.is_none();
        if has_failed { self.chunks.remove(&offset) } else { None }
    }

    /// Takes out everything, and forgets the readers.
    pub fn clear(&mut self) -> Vec<Chunk> {
        self.streams.clear();
        std::mem::take(&mut self.chunks).into_values().collect()
    }

    /// The task that expires chunks ends if `none_left`.
    pub fn end_expiry(&mut self, none_left: impl FnOnce() -> bool) -> bool {
        let ends = none_left();
        if ends {
            self.expiry = Weak::new();
        }
        ends
    }

    /// The bytes of `part`, which lies in one chunk's place. What is ready counts as read.
    pub fn find(&mut self, part: &Range<u64>, now: Instant) -> Found {
        let offset = part.start - part.start % CHUNK;
        let Some(chunk) = self.chunks.get_mut(&offset) else { return Found::Nowhere };
        chunk.used = now;
        let Some(content) = chunk.content.clone() else {
            return Found::OnItsWay(chunk.settled.listen());
        };
        chunk.read += part.end - part.start;
        if chunk.read >= content.bytes().len() as u64 {
            self.chunks.remove(&offset);
        }
        Found::Ready(content)
    }

    /// The parts of a READ; neighbours that are nowhere are one part.
    fn parts(&mut self, read: &Range<u64>, now: Instant) -> Vec<(Range<u64>, Found)> {
        let mut parts: Vec<(Range<u64>, Found)> = Vec::new();
        if self.chunks.is_empty() {
            return vec![(read.clone(), Found::Nowhere)];
        }
        let mut at = read.start;
        while at < read.end {
            let end = read.end.min(at - at % CHUNK + CHUNK);
            let found = self.find(&(at..end), now);
            match (parts.last_mut(), &found) {
                (Some((before, Found::Nowhere)), Found::Nowhere) => before.end = end,
                _ => parts.push((at..end, found)),
            }
            at = end;
        }
        parts
    }

    /// Puts in the chunks of `window` that are not there, as far as there are buffers.
    fn fetches(
        &mut self,
        window: Range<u64>,
        size: u64,
        buffers: &Arc<Buffers>,
        now: Instant,
    ) -> Vec<Fetch> {
        let first = window.start.next_multiple_of(CHUNK);
        self.chunks.range_mut(first..window.end.max(first)).for_each(|(_, c)| c.used = now);
        let mut fetches = Vec::new();
        let mut offset = first;
        while offset < size && size.min(offset + CHUNK) <= window.end {
            if !self.chunks.contains_key(&offset) {
                let Some(buffer) = self.buffer((size - offset).min(CHUNK), buffers, now) else {
                    break;
                };
                let number = self.numbers;
                self.numbers += 1;
                let (content, settled) = (None, Event::new());
                let chunk = Chunk { number, content, settled, read: 0, used: now };
                self.chunks.insert(offset, chunk);
                fetches.push(Fetch { offset, number, buffer });
            }
            offset += CHUNK;
        }
        fetches
    }

    /// A free buffer, or that of the ready chunk that was used longest ago, if it can be spared.
    fn buffer(&mut self, length: u64, buffers: &Arc<Buffers>, now: Instant) -> Option<Buffer> {
        buffers.take(length as usize).or_else(|| {
            let idle = self.chunks.iter().filter(|(_, chunk)| chunk.is_idle(now, SPARE));
            let oldest = *idle.min_by_key(|(_, chunk)| chunk.used)?.0;
            self.chunks.remove(&oldest);
            buffers.take(length as usize)
        })
    }

    /// Takes these chunks out. To be dropped when the lock is not held: it wakes those who wait for
    /// them.
    pub fn take_out(&mut self, which: impl Fn(u64, &Chunk) -> bool) -> Vec<Chunk> {
        let all = self.chunks.iter();
        let which: Vec<u64> =
            all.filter(|(at, chunk)| which(**at, chunk)).map(|(at, _)| *at).collect();
        which.iter().filter_map(|at| self.chunks.remove(at)).collect()
    }
}
