//! Waking a thread that sleeps in its ring.
//!
//! The thread's handlers are woken through a [`Doorbell`], mostly by the thread itself: then it is a flag.
//! Another thread (the pool, a connection shared between queues) must also end the sleep: an eventfd does,
//! which a poll armed in the ring watches.
//!
//! No ring is lost: the sleeper sets `sleeping` and then looks at `rung`, the ringer sets `rung` and then looks
//! at `sleeping`, all in one total order, so at least one of them sees the other.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::Wake;

use super::ring::Ring;
use crate::sys;

/// A flag that can end its owner's sleep.
#[derive(Debug)]
pub struct Doorbell {
    rung: AtomicBool,
    sleeping: AtomicBool,
    event: OwnedFd,
}

impl Doorbell {
    /// One that has been rung: there is something to look at first.
    pub fn new() -> io::Result<Arc<Doorbell>> {
        let (rung, sleeping) = (AtomicBool::new(true), AtomicBool::new(false));
        Ok(Arc::new(Doorbell { rung, sleeping, event: sys::eventfd()? }))
    }

    /// Whether it was rung since the last call.
    pub fn take(&self) -> bool {
        // A plain look first: it is asked far more often than it is rung.
        self.rung.load(SeqCst) && self.rung.swap(false, SeqCst)
    }

    /// Announces a sleep; whether its owner may begin it. Call [`Doorbell::awake`] after it.
    pub fn may_sleep(&self) -> bool {
        self.sleeping.store(true, SeqCst);
        if self.rung.load(SeqCst) {
            self.sleeping.store(false, SeqCst);
            return false;
        }
        true
    }

    /// The sleep is over.
    pub fn awake(&self) {
        self.sleeping.store(false, SeqCst);
    }

    /// Keeps the poll that ends the sleep armed in `ring`, for ever.
    pub async fn answer(self: Arc<Self>, ring: Rc<Ring>) {
        let mut count = [0; 8];
        loop {
            if let Err(e) = ring.poll(&self.event, libc::POLLIN).await {
                log::error!("the wake-up of a queue is lost: {e}");
                return;
            }
            // EAGAIN: a wake-up was counted that another poll has answered.
            let _ = sys::read(&self.event, &mut count);
        }
    }
}

impl Wake for Doorbell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, SeqCst) && self.sleeping.load(SeqCst) {
            // It fails only when the counter is full, which wakes as well.
            let _ = sys::write(&self.event, &1_u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn a_ring_before_the_sleep_prevents_it() {
        let bell = Doorbell::new().unwrap();
        assert!(bell.take() && !bell.take());
        assert!(bell.may_sleep());
        bell.awake();
        Waker::from(bell.clone()).wake();
        assert!(!bell.may_sleep());
        assert!(bell.take());
    }

    #[test]
    fn a_ring_from_another_thread_ends_the_sleep() {
        let Ok(ring) = Ring::new(8) else { return println!("skipped: no io_uring here") };
        let bell = Doorbell::new().unwrap();
        bell.take();
        let executor = smol::LocalExecutor::new();
        executor.spawn(bell.clone().answer(ring.clone())).detach();
        while executor.try_tick() {}
        for _ in 0..1000 {
            let waker = Waker::from(bell.clone());
            let ringer = std::thread::spawn(move || waker.wake());
            while !bell.take() {
                if bell.may_sleep() {
                    ring.enter(true).unwrap();
                    bell.awake();
                }
                ring.reap(|_, _| {});
                while executor.try_tick() {}
            }
            ringer.join().unwrap();
        }
    }
}
