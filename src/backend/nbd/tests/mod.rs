//! The client against real servers and against peers that misbehave, without FUSE.

mod ahead;
mod commands;
mod ends;
mod errors;
mod extents;
mod hostile;
mod peer;
mod returns;
mod servers;
mod tls;
mod transmission;

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use smol::LocalExecutor;

use super::{NbdBackend, NbdLane, Options, Uri};
use crate::backend::Backend;
use crate::io::Io;
use crate::transport::ring::Ring;

fn options() -> Options {
    // A server that is gone is gone: what is tested here is not its return.
    let (connect_timeout, reconnect_timeout) = (Duration::from_secs(5), Duration::ZERO);
    Options { connect_timeout, reconnect_timeout, ..Options::default() }
}

fn connect(uri: &str) -> Arc<NbdBackend> {
    let uri: Uri = uri.parse().unwrap();
    NbdBackend::connect(&uri, &options()).unwrap_or_else(|e| panic!("{uri}: {e}"))
}

/// Runs `work` with a lane of its own on the calling thread, as a serving thread would.
fn on_lane<R>(
    backend: &Arc<NbdBackend>,
    work: impl AsyncFnOnce(Rc<NbdLane>, Rc<LocalExecutor<'static>>) -> R,
) -> R {
    let executor = Rc::new(LocalExecutor::new());
    let io = Io::of_a_test(None, executor.clone());
    let lane = Rc::new(backend.lane(&io).unwrap());
    smol::block_on(executor.run(work(lane, executor.clone())))
}

/// As [`on_lane`], over a ring that the thread sleeps in; `None` where io_uring cannot be used.
fn on_lane_in_ring<R: 'static>(
    backend: &Arc<NbdBackend>,
    work: impl AsyncFnOnce(Rc<NbdLane>, Rc<LocalExecutor<'static>>) -> R,
) -> Option<R> {
    let ring = Ring::new(64).inspect_err(|e| println!("skipped: no io_uring here: {e}")).ok()?;
    let executor = Rc::new(LocalExecutor::new());
    let io = Io::of_a_test(Some(ring.clone()), executor.clone());
    let lane = Rc::new(backend.lane(&io).unwrap());
    let mut work = pin!(executor.run(work(lane, executor.clone())));
    loop {
        // Everything here happens on this thread: it may sleep once nothing can run.
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        if let Poll::Ready(result) = work.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(result);
        }
        let wait = !woken.0.load(Ordering::SeqCst);
        ring.enter(wait).unwrap();
        ring.reap(|_, _| unreachable!("there is no FUSE entry"));
    }
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A small random number generator: the tests must be repeatable.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}
