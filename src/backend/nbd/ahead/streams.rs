//! Which readers go through the disk in order, told from their READs alone.
//!
//! A READ does not say whose it is. A *stream* is a reader that is believed in: where its next READ
//! should begin. READs of one stream may come out of order by one place, since the kernel has two
//! of them on their way and they can be served by different threads; and it leaves out what its
//! page cache has, so a short gap is part of a stream too.

use std::ops::Range;
use std::time::{Duration, Instant};

/// The most streams that are told apart; the one that was read longest ago makes room. A random
/// reader begins one with each READ, so there are more than readers to be expected.
pub const MAX_STREAMS: usize = 128;
/// A READ may be so far from where it should be, in bytes: two of the kernel's default read-ahead.
const TOLERANCE: u64 = 256 << 10;
/// A stream counts once so much has been read in order, in bytes.
const PROVEN: u64 = 256 << 10;
/// A stream has stopped when nothing was read for so long.
pub const STOPPED: Duration = Duration::from_secs(1);

/// The streams of a disk.
#[derive(Debug, Default)]
pub struct Streams(Vec<Stream>);

#[derive(Debug)]
struct Stream {
    /// Everything before this has been read.
    next: u64,
    /// A READ beyond `next` that may be one that overtook another; empty: none.
    early: Range<u64>,
    /// How many bytes were read in order.
    run: u64,
    last: Instant,
}

/// A reader that goes in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reader {
    /// Where its next READ should begin.
    pub next: u64,
    /// How many bytes it has read in order.
    pub run: u64,
    /// How many such readers there are now, this one included.
    pub readers: u64,
}

impl Stream {
    fn continues_with(&self, read: &Range<u64>) -> bool {
        read.start == self.next || !self.early.is_empty() && read.start == self.early.end
    }

    fn is_near(&self, read: &Range<u64>) -> bool {
        self.next.abs_diff(read.start) <= TOLERANCE
    }

    fn goes_on(&mut self, read: Range<u64>, now: Instant) {
        if now - self.last >= STOPPED {
            self.run = 0;
        }
        self.last = now;
        self.run += read.end - read.start;
        let overtaken = read.start == self.next;
        self.next = read.end;
        // Either the one that was overtaken has come, or the gap before the early one will stay.
        if !self.early.is_empty() && (!overtaken || self.early.start <= read.end) {
            self.run += self.early.end - self.early.start;
            self.next = self.next.max(self.early.end);
            self.early = 0..0;
        }
    }

    fn is_reader(&self, now: Instant) -> bool {
        self.run >= PROVEN && now - self.last < STOPPED
    }
}

impl Streams {
    /// Takes note of a READ, which is not empty. Returns the reader that it has brought forward, if
    /// it is one that goes in order.
    pub fn note(&mut self, read: Range<u64>, now: Instant) -> Option<Reader> {
        if let Some(at) = self.0.iter().position(|stream| stream.continues_with(&read)) {
            self.0[at].goes_on(read, now);
            let stream = &self.0[at];
            let readers = self.0.iter().filter(|stream| stream.is_reader(now)).count() as u64;
            return stream.is_reader(now).then_some(Reader {
                next: stream.next,
                run: stream.run,
                readers,
            });
        }
        match self.0.iter_mut().find(|stream| stream.is_near(&read)) {
            Some(stream) if read.start > stream.next => stream.early = read,
            // One that was overtaken and given up.
            Some(_) => {}
            None => self.begin(read, now),
        }
        None
    }

    fn begin(&mut self, read: Range<u64>, now: Instant) {
        let stream = Stream { next: read.end, early: 0..0, run: read.end - read.start, last: now };
        if self.0.len() < MAX_STREAMS {
            self.0.push(stream);
        } else if let Some(oldest) = self.0.iter_mut().min_by_key(|stream| stream.last) {
            *oldest = stream;
        }
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u64 = 128 << 10;

    /// Notes READs of 128 KiB, given by their number; the reader after each of them.
    fn note(streams: &mut Streams, now: Instant, reads: &[u64]) -> Vec<Option<(u64, u64)>> {
        let mut note = |&n: &u64| streams.note(n * READ..(n + 1) * READ, now);
        let told = |reader: Reader| (reader.next / READ, reader.run / READ);
        reads.iter().map(|n| note(n).map(told)).collect()
    }

    #[test]
    fn two_reads_in_order_make_a_reader() {
        let mut streams = Streams::default();
        let readers = note(&mut streams, Instant::now(), &[7, 8, 9, 20, 10]);
        assert_eq!(readers, [None, Some((9, 2)), Some((10, 3)), None, Some((11, 4))]);
    }

    #[test]
    fn swapped_neighbours_are_in_order() {
        let mut streams = Streams::default();
        let readers = note(&mut streams, Instant::now(), &[0, 2, 1, 4, 3, 5]);
        assert_eq!(
            readers,
            [None, None, Some((3, 3)), None, Some((5, 5)), Some((6, 6))],
            "the early one counts when the late one has come"
        );
    }

    #[test]
    fn a_short_gap_is_passed_and_a_long_one_is_not() {
        let mut streams = Streams::default();
        let readers = note(&mut streams, Instant::now(), &[0, 1, 3, 4, 2, 5]);
        assert_eq!(readers[2..], [None, Some((5, 4)), None, Some((6, 5))]);
        let readers = note(&mut streams, Instant::now(), &[9, 10]);
        assert_eq!(readers, [None, Some((11, 2))], "another stream");
    }

    #[test]
    fn random_reads_make_no_reader() {
        let mut streams = Streams::default();
        let mut seed = 1_u64;
        for _ in 0..10_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Within 64 MiB, so that many are near others.
            let at = (seed >> 40) % (16 << 10) * 4096;
            assert_eq!(streams.note(at..at + 4096, Instant::now()), None);
        }
        assert_eq!(streams.0.len(), MAX_STREAMS);
    }

    #[test]
    fn readers_beside_each_other_and_beside_random_reads() {
        let mut streams = Streams::default();
        let now = Instant::now();
        for n in 0..10 {
            for reader in 0..64 {
                // What was read longest ago is the first to be forgotten.
                let now = now + Duration::from_micros(n * 1000 + reader);
                let elsewhere = 100_000 + (n * 64 + reader) * 10;
                let found = note(&mut streams, now, &[reader * 1000 + n, elsewhere]);
                assert_eq!(found[0].is_some(), n > 0, "{reader}");
            }
        }
        let reader = streams.note(10 * READ..11 * READ, now + Duration::from_millis(20)).unwrap();
        assert_eq!(reader.readers, 64);
    }

    #[test]
    fn a_reader_that_stopped_begins_again() {
        let mut streams = Streams::default();
        let now = Instant::now();
        assert!(note(&mut streams, now, &[0, 1])[1].is_some());
        assert_eq!(note(&mut streams, now + STOPPED, &[2, 3]), [None, Some((4, 2))]);
    }
}
