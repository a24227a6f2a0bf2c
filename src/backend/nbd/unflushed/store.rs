//! The extents of what is kept, and the two logs that hold their data.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use memmap2::MmapMut;

use super::Change;
use crate::backend::Zero;
use crate::backend::nbd::stream_copy::copy_past_the_caches;

/// One extent for so many bytes of the bound, on average: what they cost beside their data stays
/// small.
pub const BYTES_OF_AN_EXTENT: usize = 512;
/// A write cuts at most one extent in two, and may lie in both logs.
const EXTENTS_OF_A_WRITE: usize = 3;

/// The largest minimum block size of a server that is accepted, in bytes.
const LARGEST_MINIMUM: usize = 64 << 10;

/// What a log keeps of its memory between two users of the file, in bytes: small writes do not pay
/// for it each time.
const KEPT_BYTES: usize = 4 << 20;

/// The extents, and the logs that their data is in.
#[derive(Debug)]
pub struct Store {
    /// By where they start.
    extents: BTreeMap<u64, Extent>,
    /// How much data they have, all together.
    pub bytes: u64,
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

#[derive(Debug)]
struct Log {
    /// As many as it holds. Had before anything is acknowledged, since there is no good answer
    /// afterwards; the kernel gives the pages when they are written to.
    bytes: MmapMut,
    used: usize,
    /// How many of the bytes have been used at all, and so take memory.
    resident: usize,
    /// How many there are in it.
    extents: usize,
}

impl Log {
    /// For so many bytes. `ENOMEM`: there is no more address space, or that may not be promised.
    fn new(bytes: usize) -> io::Result<Log> {
        Ok(Log { bytes: MmapMut::map_anon(bytes)?, used: 0, resident: 0, extents: 0 })
    }
}

impl Store {
    /// For so many bytes, half of them in each log. `ENOMEM`, see [`Log::new`].
    pub fn new(bytes: usize) -> io::Result<Store> {
        // A write is parted where a log ends: never within a block of the server.
        let half = bytes / 2 / LARGEST_MINIMUM * LARGEST_MINIMUM;
        Ok(Store {
            extents: BTreeMap::new(),
            bytes: 0,
            logs: [Log::new(half)?, Log::new(half)?],
            current: 0,
            half,
            most_extents: bytes / BYTES_OF_AN_EXTENT,
        })
    }

    /// All of it, where it belongs; no two overlap.
    pub fn changes(&self) -> impl Iterator<Item = (u64, Change<'_>)> {
        self.extents.iter().map(|(&start, extent)| {
            let length = extent.end - start;
            match extent.content {
                Content::In(log, at) => {
                    let bytes = &self.logs[log].bytes[at..][..length as usize];
                    (start, Change::Data(bytes))
                }
                Content::Zero(how) => (start, Change::Zero(length, how)),
            }
        })
    }

    fn room(&self) -> usize {
        let other = &self.logs[1 - self.current];
        let of_other = if other.extents == 0 { self.half } else { 0 };
        self.half - self.logs[self.current].used + of_other
    }

    /// Whether there is room for `bytes` beside those that are reserved, as `writes` in all.
    pub fn has_room(&self, reserved: usize, bytes: usize, writes: usize) -> bool {
        reserved + bytes <= self.room()
            && self.extents.len() + writes * EXTENTS_OF_A_WRITE <= self.most_extents
    }

    /// Whether a FLUSH is due.
    pub fn is_half_full(&self) -> bool {
        self.logs[1 - self.current].extents > 0
            || self.logs[self.current].used >= self.half
            || self.extents.len() >= self.most_extents / 2
    }

    /// Takes what a write has changed, which was acknowledged as the `number`th. There must be room.
    pub fn note(&mut self, offset: u64, change: Change<'_>, number: u64) {
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

    /// Drops what was acknowledged up to `mark`.
    pub fn drop_to(&mut self, mark: u64) {
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

    /// Gives memory back, if nothing is in it.
    pub fn give_memory_back(&mut self) {
        if self.logs.iter().all(|log| log.extents == 0) {
            for log in self.logs.iter_mut().filter(|log| log.resident > KEPT_BYTES) {
                // Without a new one it keeps the old, and its pages.
                if let Ok(new) = Log::new(self.half) {
                    *log = new;
                }
            }
        }
    }
}
