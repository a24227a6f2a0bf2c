//! Locks over byte ranges.
//!
//! A read-modify-write of a block must exclude every write that overlaps it, or the older bytes
//! that it read come back over newer ones. Plain writes share: they may overlap each other, as on
//! any disk. The kernel sends direct writes in parallel, so this is needed even for a single
//! client.
//!
//! Requests have numbers in the order of their arrival, and one is granted when no earlier one
//! conflicts with it: nobody starves. A shared one conflicts with exclusive ones only, of which
//! there are hardly ever any, so it does not look at the others. The mutex is held for that look,
//! never across I/O.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use event_listener::Event;

/// Shared and exclusive locks over byte ranges, for any number of threads.
#[derive(Debug, Default)]
pub struct RangeLock {
    requests: Mutex<Requests>,
    released: Event,
}

/// Held or waited for, by their numbers; bounded by the requests in flight.
#[derive(Debug, Default)]
struct Requests {
    next_ticket: u64,
    shared: BTreeMap<u64, Range<u64>>,
    exclusive: BTreeMap<u64, Range<u64>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Shared,
    Exclusive,
}

impl Requests {
    fn of(&mut self, kind: Kind) -> &mut BTreeMap<u64, Range<u64>> {
        match kind {
            Kind::Shared => &mut self.shared,
            Kind::Exclusive => &mut self.exclusive,
        }
    }

    fn is_granted(&self, ticket: u64, kind: Kind, range: &Range<u64>) -> bool {
        let clear = |earlier: &BTreeMap<u64, Range<u64>>| {
            let mut earlier = earlier.range(..ticket);
            earlier.all(|(_, other)| other.end <= range.start || range.end <= other.start)
        };
        clear(&self.exclusive) && (kind == Kind::Shared || clear(&self.shared))
    }
}

/// Holds a place in the lock, and gives it back when dropped.
#[derive(Debug)]
#[must_use = "the range is unlocked when the guard is dropped"]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
    kind: Kind,
}

impl RangeLock {
    /// Waits until no exclusive lock overlaps `range`.
    pub async fn shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range, Kind::Shared).await
    }

    /// Waits until no lock at all overlaps `range`.
    pub async fn exclusive(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range, Kind::Exclusive).await
    }

    async fn acquire(&self, range: Range<u64>, kind: Kind) -> RangeGuard<'_> {
        let (guard, mut granted) = {
            let mut requests = self.requests();
            let ticket = requests.next_ticket;
            requests.next_ticket += 1;
            requests.of(kind).insert(ticket, range.clone());
            let granted = requests.is_granted(ticket, kind, &range);
            (RangeGuard { lock: self, ticket, kind }, granted)
        };
        while !granted {
            // Listen first and look again, or a release in between would be missed.
            let released = self.released.listen();
            granted = self.requests().is_granted(guard.ticket, kind, &range);
            if !granted {
                released.await;
            }
        }
        guard
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().expect("no code panics while it holds the requests")
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.requests().of(self.kind).remove(&self.ticket);
        self.lock.released.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smol::future::{block_on, poll_once};
    use std::pin::pin;

    #[test]
    fn shared_locks_overlap() {
        let lock = RangeLock::default();
        let _a = block_on(lock.shared(0..10));
        assert!(block_on(poll_once(lock.shared(5..15))).is_some());
    }

    #[test]
    fn exclusive_waits_for_an_overlapping_shared_lock_only() {
        let lock = RangeLock::default();
        let held = block_on(lock.shared(0..4096));
        assert!(block_on(poll_once(lock.exclusive(4096..8192))).is_some());
        let mut waiting = pin!(lock.exclusive(4095..4096));
        assert!(block_on(poll_once(waiting.as_mut())).is_none());
        drop(held);
        assert!(block_on(poll_once(waiting.as_mut())).is_some());
    }

    #[test]
    fn a_later_shared_lock_does_not_overtake_a_waiting_exclusive_one() {
        let lock = RangeLock::default();
        let first = block_on(lock.shared(0..10));
        let mut exclusive = pin!(lock.exclusive(0..10));
        assert!(block_on(poll_once(exclusive.as_mut())).is_none());
        let mut late = pin!(lock.shared(0..10));
        assert!(block_on(poll_once(late.as_mut())).is_none());
        drop(first);
        let guard = block_on(poll_once(exclusive.as_mut())).expect("its turn");
        assert!(block_on(poll_once(late.as_mut())).is_none());
        drop(guard);
        assert!(block_on(poll_once(late.as_mut())).is_some());
    }

    #[test]
    fn a_cancelled_waiter_leaves_no_trace() {
        let lock = RangeLock::default();
        let held = block_on(lock.exclusive(0..10));
        assert!(block_on(poll_once(lock.exclusive(0..10))).is_none());
        drop(held);
        let left = lock.requests();
        assert!(left.shared.is_empty() && left.exclusive.is_empty());
    }
}
