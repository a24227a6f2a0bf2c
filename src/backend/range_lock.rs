//! Locks over byte ranges.
//!
//! A read-modify-write of a block must exclude every write that overlaps it, or the older bytes that
//! it read come back over newer ones. Plain writes share: they may overlap each other, as on any
//! disk. The kernel sends direct writes in parallel, so this is needed even for a single client.
//!
//! Requests are kept in the order of their arrival, and one is granted when no earlier one conflicts
//! with it: nobody starves. The list is bounded by the requests in flight and short, so it is searched
//! from the front; the mutex is held for that search, never across I/O.

use std::ops::Range;
use std::sync::Mutex;

use event_listener::Event;

/// Shared and exclusive locks over byte ranges, for any number of threads.
#[derive(Debug, Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
    released: Event,
}

#[derive(Debug, Default)]
struct Queue {
    next_ticket: u64,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    ticket: u64,
    range: Range<u64>,
    exclusive: bool,
}

impl Queue {
    fn granted(&self, ticket: u64) -> bool {
        let Some(at) = self.entries.iter().position(|e| e.ticket == ticket) else { return false };
        let own = &self.entries[at];
        self.entries[..at].iter().all(|earlier| {
            !(earlier.exclusive || own.exclusive)
                || earlier.range.end <= own.range.start
                || own.range.end <= earlier.range.start
        })
    }
}

/// Holds a place in the lock, and gives it back when dropped.
#[derive(Debug)]
#[must_use = "the range is unlocked when the guard is dropped"]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl RangeLock {
    /// Waits until no exclusive lock overlaps `range`.
    pub async fn shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range, false).await
    }

    /// Waits until no lock at all overlaps `range`.
    pub async fn exclusive(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range, true).await
    }

    async fn acquire(&self, range: Range<u64>, exclusive: bool) -> RangeGuard<'_> {
        let guard = {
            let mut queue = self.queue();
            let ticket = queue.next_ticket;
            queue.next_ticket += 1;
            queue.entries.push(Entry { ticket, range, exclusive });
            RangeGuard { lock: self, ticket }
        };
        while !self.queue().granted(guard.ticket) {
            // Listen first and look again, or a release in between would be missed.
            let released = self.released.listen();
            if self.queue().granted(guard.ticket) {
                break;
            }
            released.await;
        }
        guard
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().expect("no code panics while it holds the queue")
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.queue().entries.retain(|e| e.ticket != self.ticket);
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
        assert!(lock.queue().entries.is_empty());
    }
}
