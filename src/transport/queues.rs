//! Decides which thread serves a request.
//!
//! The kernel has a queue for each *possible* CPU. A thread runs for each CPU that this process may
//! use, and serves that CPU's queue; the queues of the other CPUs, which hardly ever have a
//! request, are divided between the threads.
//!
//! The thread that commits an entry gets the entry's next request, whichever queue it is of: the
//! kernel completes an entry on the ring of its last commit, and copies the payload there
//! (`fuse_uring_commit_fetch` in fs/fuse/dev_uring.c). So requests are shared by handing an entry
//! over once, and not by a hop for each:
//!
//! * **Large requests** are all copying, twice. A thread that has more of them than another one,
//!   with which it has a cache in common, hands one over, and the other thread's CPU does both
//!   copies of it, and of those that follow it in its entry.
//! * **Small requests** are served by their queue's own thread, near the client. One that arrives
//!   in an entry that was handed over returns with it. The kernel takes the entry that was
//!   committed last, so few have to.
//!
//! Each thread keeps its first entry ([`Memory::is_kept`]): without any it would get no completion,
//! not even that of the end of the connection.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use smol::channel::{self, Receiver, Sender};

use super::cpus::Cpus;
use super::slot::Memory;
use crate::fuse::abi::{InHeader, ReadWriteIn, opcode, uring_header};

/// A request of this length in bytes, or one for so many, costs more to copy than to hand over.
pub const LARGE: u32 = 256 << 10;
/// How many other threads one shares with: as many as one client's copies can use.
const NEIGHBOURS: usize = 3;

/// All queues, and the threads that serve them.
pub struct Queues {
    threads: Vec<Thread>,
    /// The thread that serves a queue, by the queue's number.
    thread_of: Vec<usize>,
    /// Entries that may still be registered, over all queues.
    spare_entries: AtomicUsize,
}

/// Aligned to a pair of cache lines, so that threads do not share one.
#[repr(align(128))]
struct Thread {
    /// To its handlers. There is room for all entries, so a send never fails for want of it.
    requests: Sender<Memory>,
    /// Large requests that it has been given and has not answered.
    load: AtomicUsize,
    sleeps: AtomicBool,
    /// The threads that it hands large requests to.
    neighbours: Vec<usize>,
}

impl Queues {
    /// A thread for each usable CPU, with the handlers' end of its channel; `entries` is the most
    /// that may be registered, and one for each queue at least.
    pub fn new(cpus: &Cpus, entries: usize) -> (Arc<Queues>, Vec<Receiver<Memory>>) {
        let count = cpus.usable.len();
        let entries = entries.max(cpus.possible);
        let (threads, receivers) = (0..count)
            .map(|thread| {
                let (requests, receiver) = channel::bounded(entries);
                let thread = Thread {
                    requests,
                    load: AtomicUsize::new(0),
                    sleeps: AtomicBool::new(false),
                    neighbours: cpus.sharing_cache_with(thread).take(NEIGHBOURS).collect(),
                };
                (thread, receiver)
            })
            .unzip();
        let thread_of = (0..cpus.possible)
            .map(|queue| cpus.usable.binary_search(&queue).unwrap_or(queue % count))
            .collect();
        let queues = Queues { threads, thread_of, spare_entries: AtomicUsize::new(entries) };
        (Arc::new(queues), receivers)
    }

    /// How many queues the kernel has.
    pub fn count(&self) -> usize {
        self.thread_of.len()
    }

    /// The queues that `thread` serves.
    pub fn served_by(&self, thread: usize) -> impl Iterator<Item = u16> {
        let all = self.thread_of.iter().enumerate();
        all.filter(move |(_, server)| **server == thread).map(|(queue, _)| queue as u16)
    }

    /// Whether `thread` serves `queue`.
    pub fn is_served_by(&self, queue: u16, thread: usize) -> bool {
        self.thread_of[usize::from(queue)] == thread
    }

    /// Takes as many as `wanted` from the entries that may still be registered; how many it got.
    pub fn take_entries(&self, wanted: usize) -> usize {
        let take = |spare: usize| Some(spare - spare.min(wanted));
        let spare = self.spare_entries.fetch_update(Relaxed, Relaxed, take);
        spare.unwrap_or_default().min(wanted)
    }

    /// Takes the request that has arrived in `memory` at the thread `here` to the thread that
    /// serves it. Whether that is another one.
    pub fn route(&self, here: usize, memory: Memory) -> bool {
        let large = is_large(&memory);
        let there = match (large, memory.is_kept()) {
            (true, true) => here,
            (true, false) => self.least_loaded(here),
            (false, _) => self.thread_of[usize::from(memory.queue())],
        };
        let Err(memory) = self.send(there, memory, large) else { return there != here };
        // That thread has ended; the connection is about to.
        let delivered = self.send(here, memory, large);
        debug_assert!(delivered.is_ok(), "a thread reads its channel as long as it reaps");
        false
    }

    /// `thread` answers the request in `memory`.
    pub fn answered(&self, thread: usize, memory: &Memory) {
        if is_large(memory) {
            self.threads[thread].load.fetch_sub(1, Relaxed);
        }
    }

    /// `thread` is about to sleep, or has woken.
    pub fn set_sleeps(&self, thread: usize, sleeps: bool) {
        self.threads[thread].sleeps.store(sleeps, Relaxed);
    }

    /// Whether `thread` has been given requests that its handlers have not seen.
    pub fn has_requests(&self, thread: usize) -> bool {
        !self.threads[thread].requests.is_empty()
    }

    /// The thread for one more large request at `here`: another one if it will have no more of them
    /// then than are left here. One that sleeps is not woken for a single request.
    fn least_loaded(&self, here: usize) -> usize {
        let load = |thread: &Thread| thread.load.load(Relaxed);
        let mine = load(&self.threads[here]);
        if mine == 0 {
            return here;
        }
        let cost = |there: &usize| {
            let thread = &self.threads[*there];
            load(thread) + usize::from(thread.sleeps.load(Relaxed))
        };
        let least = self.threads[here].neighbours.iter().copied().min_by_key(cost);
        least.filter(|there| cost(there) < mine).unwrap_or(here)
    }

    fn send(&self, thread: usize, memory: Memory, large: bool) -> Result<(), Memory> {
        let thread = &self.threads[thread];
        if large {
            thread.load.fetch_add(1, Relaxed);
        }
        thread.requests.try_send(memory).map_err(|refused| {
            if large {
                thread.load.fetch_sub(1, Relaxed);
            }
            refused.into_inner()
        })
    }
}

/// Whether copying makes up most of this request. The same as long as the request's header is in
/// the memory.
pub fn is_large(memory: &Memory) -> bool {
    let header: InHeader = memory.head_struct(uring_header::IN_OUT);
    let len = match header.opcode {
        opcode::READ => memory.head_struct::<ReadWriteIn>(uring_header::OP_IN).size,
        _ => header.len,
    };
    len >= LARGE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A READ of `size` bytes that has arrived in an entry of `queue`.
    fn read(queue: u16, size: u32) -> Memory {
        let mut memory = Memory::allocate(&[queue]).unwrap().pop().unwrap();
        let header = InHeader { opcode: opcode::READ, ..Default::default() };
        memory.put_head_struct(uring_header::IN_OUT, &header);
        memory.put_head_struct(uring_header::OP_IN, &ReadWriteIn { size, ..Default::default() });
        memory
    }

    fn queues(possible: usize, usable: usize) -> (Arc<Queues>, Vec<Receiver<Memory>>) {
        Queues::new(&Cpus::simulated(possible, usable), 16)
    }

    /// How many requests each thread has been given.
    fn given(receivers: &[Receiver<Memory>]) -> Vec<usize> {
        receivers.iter().map(Receiver::len).collect()
    }

    #[test]
    fn small_requests_stay_with_their_queue() {
        let (queues, receivers) = queues(2, 2);
        for _ in 0..8 {
            assert!(!queues.route(0, read(0, 4096)));
        }
        assert_eq!(given(&receivers), [8, 0]);
    }

    #[test]
    fn a_small_request_returns_with_its_entry() {
        let (queues, receivers) = queues(2, 2);
        assert!(queues.route(0, read(1, 4096)));
        assert_eq!(given(&receivers), [0, 1]);
    }

    #[test]
    fn large_requests_are_shared_evenly() {
        let (queues, receivers) = queues(2, 2);
        for _ in 0..16 {
            queues.route(0, read(0, LARGE));
        }
        assert_eq!(given(&receivers), [8, 8]);
    }

    #[test]
    fn a_lone_large_request_stays() {
        let (queues, receivers) = queues(2, 2);
        for _ in 0..4 {
            assert!(!queues.route(0, read(0, LARGE)));
            queues.answered(0, &receivers[0].try_recv().unwrap());
        }
    }

    #[test]
    fn a_sleeping_thread_is_woken_for_more_than_one() {
        let (queues, receivers) = queues(2, 2);
        queues.set_sleeps(1, true);
        for handed_over in [false, false, true] {
            assert_eq!(queues.route(0, read(0, LARGE)), handed_over);
        }
        assert_eq!(given(&receivers), [2, 1]);
    }

    #[test]
    fn a_thread_keeps_its_first_entry() {
        let (queues, receivers) = queues(2, 2);
        for _ in 0..4 {
            let mut kept = read(0, LARGE);
            kept.keep();
            assert!(!queues.route(0, kept));
        }
        assert_eq!(given(&receivers), [4, 0]);
        assert!(queues.route(0, read(0, LARGE)));
    }

    #[test]
    fn a_single_thread_keeps_everything() {
        let (queues, receivers) = queues(1, 1);
        for _ in 0..4 {
            assert!(!queues.route(0, read(0, LARGE)));
        }
        assert_eq!(given(&receivers), [4]);
    }

    #[test]
    fn what_an_ended_thread_cannot_take_stays() {
        let (queues, mut receivers) = queues(2, 2);
        receivers.pop();
        for _ in 0..4 {
            assert!(!queues.route(0, read(1, LARGE)));
        }
        assert!(!queues.route(0, read(1, 4096)));
        assert_eq!(given(&receivers), [5]);
    }

    #[test]
    fn every_queue_has_a_thread() {
        let (queues, _) = queues(64, 2);
        let served: Vec<_> = (0..2).map(|thread| queues.served_by(thread).count()).collect();
        assert_eq!(served, [32, 32]);
        assert!(queues.is_served_by(0, 0) && queues.is_served_by(1, 1));
    }

    #[test]
    fn entries_are_given_out_once() {
        let (queues, _) = queues(2, 2);
        assert_eq!([10, 10, 10].map(|wanted| queues.take_entries(wanted)), [10, 6, 0]);
        // Each queue has one, whatever the limit.
        assert_eq!(Queues::new(&Cpus::simulated(64, 2), 16).0.take_entries(100), 64);
    }
}
