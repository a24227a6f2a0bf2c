//! How much a connection has to do, and whether its server is slow at it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::backend::nbd::inflight::{self, Ask};

/// A connection with so much in flight, by [`inflight::weight`], has enough to do: most servers
/// work on 16 requests of a connection at a time.
pub const BUSY: usize = 16;
/// A server that takes longer for a unit of work, on a connection that is busy, is slow. A thread
/// of ours can do with one in 15 µs: 4 GiB/s, or 65 thousand requests a second.
const SLOW: Duration = Duration::from_micros(40);
/// Over so much work the time is taken: a few times of what one receive brings.
const SAMPLE: usize = 256;
/// So many samples in a row count: one may just have met a pause of this machine.
const SAMPLES: u32 = 4;

/// How fast a server answers while a connection is busy.
#[derive(Debug, Default)]
pub struct Speed {
    since: Option<Instant>,
    answered: usize,
    slow_in_a_row: u32,
}

impl Speed {
    /// So much was `answered` of `load`. Tells from time to time whether it is slow.
    pub fn answered(&mut self, load: usize, answered: usize) -> Option<bool> {
        if load < BUSY {
            self.since = None;
            return None;
        }
        let Some(since) = self.since else {
            (self.since, self.answered) = (Some(Instant::now()), 0);
            return None;
        };
        self.answered += answered;
        if self.answered < SAMPLE {
            return None;
        }
        let now = Instant::now();
        self.since = Some(now);
        let work = std::mem::take(&mut self.answered);
        let is_slow = now - since > SLOW * work as u32;
        self.slow_in_a_row = if is_slow { self.slow_in_a_row + 1 } else { 0 };
        Some(self.slow_in_a_row >= SAMPLES)
    }
}

/// A request's part of the load, until it is dropped.
pub struct Load<'a>(&'a AtomicUsize, usize);

impl<'a> Load<'a> {
    /// Adds what is asked for.
    pub fn add(load: &'a AtomicUsize, ask: &Ask<'_>) -> Load<'a> {
        let weight = inflight::weight(ask.command, ask.length);
        load.fetch_add(weight, Ordering::Relaxed);
        Load(load, weight)
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}
