//! Waking a thread that sleeps in its ring.
//!
//! The thread's handlers are woken through a [`Doorbell`], mostly by the thread itself: then it is
//! a flag. Another thread (the pool, a connection shared between queues) must also end the sleep:
//! an eventfd does, which a poll armed in the ring watches.
//!
//! No ring is lost: the sleeper sets `sleeping` and then looks at `rung`, the ringer sets `rung`
//! and then looks at `sleeping`, each with a sequentially consistent fence between, so at least one
//! of them sees the other. loom tries every order: `RUSTFLAGS="--cfg diskfuse_loom" cargo test
//! --lib doorbell::every_order`.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Wake;

#[cfg(diskfuse_loom)]
use loom::sync::atomic::{AtomicBool, Ordering::*, fence};
#[cfg(not(diskfuse_loom))]
use std::sync::atomic::{AtomicBool, Ordering::*, fence};

use rustix::event::{EventfdFlags, eventfd};

use super::ring::Ring;

/// The protocol between the sleeper and the ringers.
#[derive(Debug)]
struct Flags {
    rung: AtomicBool,
    sleeping: AtomicBool,
}

impl Flags {
    fn new(rung: bool) -> Flags {
        Flags { rung: AtomicBool::new(rung), sleeping: AtomicBool::new(false) }
    }

    fn is_rung(&self) -> bool {
        self.rung.load(Relaxed)
    }

    fn take(&self) -> bool {
        // A plain look first: it is asked far more often than it is rung.
        self.is_rung() && self.rung.swap(false, AcqRel)
    }

    fn may_sleep(&self) -> bool {
        self.sleeping.store(true, Relaxed);
        fence(SeqCst);
        if self.is_rung() {
            self.sleeping.store(false, Relaxed);
            return false;
        }
        true
    }

    fn awake(&self) {
        self.sleeping.store(false, Relaxed);
    }

    /// Whether a sleep has to be ended.
    fn ring(&self) -> bool {
        // Who finds it rung leaves the rest to who rang it first.
        if self.rung.swap(true, AcqRel) {
            return false;
        }
        fence(SeqCst);
        self.sleeping.load(Relaxed)
    }
}

/// A flag that can end its owner's sleep.
#[derive(Debug)]
pub struct Doorbell {
    flags: Flags,
    event: OwnedFd,
}

impl Doorbell {
    /// One that has been rung: there is something to look at first.
    pub fn new() -> io::Result<Arc<Doorbell>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Doorbell { flags: Flags::new(true), event }))
    }

    /// Whether it was rung since the last call.
    pub fn take(&self) -> bool {
        self.flags.take()
    }

    /// Whether [`Doorbell::take`] would say so.
    pub fn is_rung(&self) -> bool {
        self.flags.is_rung()
    }

    /// Announces a sleep; whether its owner may begin it. Call [`Doorbell::awake`] after it.
    pub fn may_sleep(&self) -> bool {
        self.flags.may_sleep()
    }

    /// The sleep is over.
    pub fn awake(&self) {
        self.flags.awake();
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
            let _ = rustix::io::read(&self.event, &mut count);
        }
    }
}

impl Wake for Doorbell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.flags.ring() {
            // It fails only when the counter is full, which wakes as well.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }
}

#[cfg(all(test, diskfuse_loom))]
mod every_order {
    use super::Flags;
    use loom::sync::{Arc, Condvar, Mutex};

    /// The eventfd, and the sleep that it ends.
    #[derive(Default)]
    struct Event(Mutex<bool>, Condvar);

    #[test]
    fn no_ring_is_lost() {
        loom::model(|| {
            let shared = Arc::new((Flags::new(false), Event(Mutex::new(false), Condvar::new())));
            let ringers: Vec<_> = (0..2)
                .map(|_| {
                    let shared = shared.clone();
                    loom::thread::spawn(move || {
                        let (flags, event) = &*shared;
                        if flags.ring() {
                            *event.0.lock().unwrap() = true;
                            event.1.notify_one();
                        }
                    })
                })
                .collect();
            let (flags, event) = &*shared;
            // It must come to an end: loom reports a sleep that nobody ends as a deadlock.
            while !flags.take() {
                if flags.may_sleep() {
                    let mut rung = event.0.lock().unwrap();
                    while !*rung {
                        rung = event.1.wait(rung).unwrap();
                    }
                    *rung = false;
                    drop(rung);
                    flags.awake();
                }
            }
            ringers.into_iter().for_each(|ringer| ringer.join().unwrap());
        });
    }
}

#[cfg(all(test, not(diskfuse_loom)))]
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
