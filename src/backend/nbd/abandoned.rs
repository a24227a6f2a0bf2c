//! Writes and flushes that nobody waits for any more, and that the server may still carry out.
//!
//! The client of a request can be killed ([`crate::transport::interrupts`]). A write of it that has
//! gone to a server that hangs may be executed at any later time, and must not come over bytes that
//! were written after it. So later writes to the same range wait until the server has answered it.
//!
//! A flush of it may be the one that the server tells what it could not store: once, as most do. So
//! later flushes wait for its answer, too, and an error in it is told in place of theirs.
//!
//! There are hardly ever any.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use event_listener::Event;
use slab::Slab;

/// The abandoned writes and flushes of a disk, on all its connections.
#[derive(Debug, Default)]
pub struct Abandoned {
    /// How many there are: that there are none is known without the lock.
    count: AtomicUsize,
    requests: Mutex<Slab<What>>,
    ended: Event,
    /// An error of one that makes durable, which nobody has been told.
    has_failed: AtomicBool,
}

#[derive(Clone, Debug)]
struct What {
    /// The bytes that it writes to; empty: none.
    range: Range<u64>,
    /// It is a flush, or a write with FUA: its error may be that of other writes.
    makes_durable: bool,
}

/// One of them, until it is dropped: answered, or lost with its connection.
#[derive(Debug)]
pub struct AbandonedRequest {
    all: Arc<Abandoned>,
    key: usize,
}

impl Abandoned {
    /// A write to these bytes is abandoned, or a flush, which has none.
    pub fn add(self: &Arc<Self>, range: Range<u64>, makes_durable: bool) -> AbandonedRequest {
        let key = self.requests().insert(What { range, makes_durable });
        self.count.fetch_add(1, Ordering::SeqCst);
        AbandonedRequest { all: self.clone(), key }
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }

    /// Waits until no abandoned write overlaps `range`.
    pub async fn none_in(&self, range: Range<u64>) {
        self.none(|other| other.range.start < range.end && range.start < other.range.end).await;
    }

    /// Waits until none is there whose error may be that of other writes. Whether there was such an
    /// error that nobody has been told: once.
    pub async fn has_failed_to_make_durable(&self) -> bool {
        self.none(|other| other.makes_durable).await;
        self.take_failure()
    }

    /// As [`Abandoned::has_failed_to_make_durable`], of those that have been answered.
    pub fn take_failure(&self) -> bool {
        self.has_failed.load(Ordering::SeqCst) && self.has_failed.swap(false, Ordering::SeqCst)
    }

    async fn none(&self, of: impl Fn(&What) -> bool) {
        let is_there = || self.any() && self.requests().iter().any(|(_, other)| of(other));
        while is_there() {
            // Listen first and look again, or an end in between would be missed.
            let ended = self.ended.listen();
            if !is_there() {
                break;
            }
            ended.await;
        }
    }

    fn requests(&self) -> MutexGuard<'_, Slab<What>> {
        self.requests.lock().expect("no code panics while it holds the requests")
    }
}

impl AbandonedRequest {
    /// The server has answered it with an error.
    pub fn failed(&self) {
        if self.all.requests()[self.key].makes_durable {
            self.all.has_failed.store(true, Ordering::SeqCst);
        }
    }
}

impl Drop for AbandonedRequest {
    fn drop(&mut self) {
        self.all.requests().remove(self.key);
        self.all.count.fetch_sub(1, Ordering::SeqCst);
        self.all.ended.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smol::future::{block_on, poll_once};
    use std::pin::pin;

    #[test]
    fn only_what_overlaps_waits() {
        let abandoned = Arc::<Abandoned>::default();
        let write = abandoned.add(100..200, false);
        assert!(block_on(poll_once(abandoned.none_in(0..100))).is_some());
        assert!(block_on(poll_once(abandoned.none_in(200..300))).is_some());
        let mut waiting = pin!(abandoned.none_in(199..300));
        assert!(block_on(poll_once(waiting.as_mut())).is_none());
        drop(write);
        assert!(block_on(poll_once(waiting.as_mut())).is_some());
    }

    #[test]
    fn an_error_of_a_flush_is_told_once_and_waited_for() {
        let abandoned = Arc::<Abandoned>::default();
        let write = abandoned.add(0..100, false);
        assert_eq!(block_on(poll_once(abandoned.has_failed_to_make_durable())), Some(false));
        write.failed();
        assert!(!abandoned.take_failure());
        let flush = abandoned.add(0..0, true);
        assert!(block_on(poll_once(abandoned.none_in(200..300))).is_some());
        let mut waiting = pin!(abandoned.has_failed_to_make_durable());
        assert!(block_on(poll_once(waiting.as_mut())).is_none());
        flush.failed();
        drop(flush);
        assert_eq!(block_on(poll_once(waiting.as_mut())), Some(true));
        assert!(!abandoned.take_failure() && abandoned.any());
    }
}
