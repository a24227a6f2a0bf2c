//! Which bytes of a READ have arrived: chunks may come in any order, but each byte exactly once.

use std::ops::Range;

/// The most separate runs that are kept track of. A server that scatters one read further than this
/// is taken to be wrong about it.
const MAX_RUNS: usize = 4096;

/// A set of bytes, told in disjoint ranges.
#[derive(Debug, Default)]
pub struct Coverage {
    /// `0..front` has arrived. Almost every read needs no more than this.
    front: u64,
    /// What has arrived beyond: sorted, disjoint, neither empty nor adjacent.
    beyond: Vec<Range<u64>>,
}

impl Coverage {
    /// Adds `range`; false, and nothing is added, if some of it has arrived already. An empty range
    /// adds nothing.
    pub fn add(&mut self, range: Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let at = self.beyond.partition_point(|run| run.end <= range.start);
        let overlaps = range.start < self.front
            || self.beyond.get(at).is_some_and(|next| next.start < range.end);
        if overlaps || self.beyond.len() >= MAX_RUNS {
            return false;
        }
        self.beyond.insert(at, range);
        self.merge_around(at);
        true
    }

    fn merge_around(&mut self, at: usize) {
        if self.beyond.get(at + 1).is_some_and(|next| next.start == self.beyond[at].end) {
            self.beyond[at].end = self.beyond.remove(at + 1).end;
        }
        if at > 0 && self.beyond[at - 1].end == self.beyond[at].start {
            self.beyond[at - 1].end = self.beyond.remove(at).end;
        }
        if self.beyond[0].start == self.front {
            self.front = self.beyond.remove(0).end;
        }
    }

    /// Whether exactly `0..length` has arrived.
    pub fn is_full(&self, length: u64) -> bool {
        self.front == length && self.beyond.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_order_fills() {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]] {
            let mut coverage = Coverage::default();
            for part in order {
                assert!(!coverage.is_full(40));
                assert!(coverage.add(part * 10..part * 10 + 10));
            }
            assert!(coverage.is_full(40), "{order:?}");
            assert!(coverage.beyond.is_empty());
        }
    }

    #[test]
    fn overlaps_are_refused() {
        let mut coverage = Coverage::default();
        assert!(coverage.add(10..20));
        assert!(coverage.add(30..40));
        for range in [9..11, 19..21, 10..20, 12..13, 0..50, 20..31, 39..40] {
            assert!(!coverage.add(range.clone()), "{range:?}");
        }
        assert!(coverage.add(0..10));
        assert!(!coverage.add(0..1));
        assert!(coverage.add(20..30));
        assert!(coverage.is_full(40));
    }

    #[test]
    fn random_sets_agree_with_a_bitmap() {
        let mut coverage = Coverage::default();
        let mut bitmap = [false; 64];
        let mut seed = 1_u64;
        for _ in 0..2000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (seed >> 33) as usize % 64;
            let end = (start + (seed >> 50) as usize % 5).min(64);
            let free = bitmap[start..end].iter().all(|arrived| !arrived);
            assert_eq!(coverage.add(start as u64..end as u64), free);
            if free {
                bitmap[start..end].fill(true);
            }
            assert_eq!(coverage.is_full(64), bitmap.iter().all(|arrived| *arrived));
            if coverage.is_full(64) {
                (coverage, bitmap) = (Coverage::default(), [false; 64]);
            }
        }
    }
}
