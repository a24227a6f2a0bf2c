//! Writes that nobody waits for any more, and that the server may still carry out.
//!
//! The client of a request can be killed ([`crate::transport::interrupts`]). A write of it that has
//! gone to a server that hangs may be executed at any later time, and must not come over bytes that
//! were written after it. So later writes to the same range wait until the server has answered it.
//! There are hardly ever any.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use event_listener::Event;
use slab::Slab;

/// The abandoned writes of a disk, on all its connections.
#[derive(Debug, Default)]
pub struct Abandoned {
    /// How many there are: that there are none is known without the lock.
    count: AtomicUsize,
    ranges: Mutex<Slab<Range<u64>>>,
    ended: Event,
}

/// One of them, until it is dropped: answered, or lost with its connection.
#[derive(Debug)]
pub struct AbandonedWrite {
    all: Arc<Abandoned>,
    key: usize,
}

impl Abandoned {
    /// A write to these bytes is abandoned.
    pub fn add(self: &Arc<Self>, range: Range<u64>) -> AbandonedWrite {
        let key = self.ranges().insert(range);
        self.count.fetch_add(1, Ordering::SeqCst);
        AbandonedWrite { all: self.clone(), key }
    }

    /// Waits until no abandoned write overlaps `range`.
    pub async fn none_in(&self, range: Range<u64>) {
        while self.overlaps(&range) {
            // Listen first and look again, or an end in between would be missed.
            let ended = self.ended.listen();
            if !self.overlaps(&range) {
                break;
            }
            ended.await;
        }
    }

    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.count.load(Ordering::SeqCst) > 0
            && self.ranges().iter().any(|(_, r)| r.start < range.end && range.start < r.end)
    }

    fn ranges(&self) -> MutexGuard<'_, Slab<Range<u64>>> {
        self.ranges.lock().expect("no code panics while it holds the ranges")
    }
}

impl Drop for AbandonedWrite {
    fn drop(&mut self) {
        self.all.ranges().remove(self.key);
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
        let write = abandoned.add(100..200);
        assert!(block_on(poll_once(abandoned.none_in(0..100))).is_some());
        assert!(block_on(poll_once(abandoned.none_in(200..300))).is_some());
        let mut waiting = pin!(abandoned.none_in(199..300));
        assert!(block_on(poll_once(waiting.as_mut())).is_none());
        drop(write);
        assert!(block_on(poll_once(waiting.as_mut())).is_some());
    }
}
