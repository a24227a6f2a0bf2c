//! Which of the queues' threads serves a request.
//!
//! The thread that commits an entry gets the entry's next request, whichever queue it is of: the kernel
//! completes an entry on the ring of its last commit, and copies the payload there
//! (`fuse_uring_commit_fetch` in fs/fuse/dev_uring.c). So requests are shared by handing an entry over once,
//! and not by a hop for each:
//!
//! * **Large requests** are all copying, twice. A queue with more of them than another gives one away, and the
//!   other thread's CPU does both copies of it, and of those that follow it in its entry.
//! * **Small requests** are served by their queue's own thread, near the client. One that arrives in an entry
//!   that was given away takes it home. The kernel takes the entry that was committed last, so few have to.
//!
//! A thread keeps one of its own: without any entry it would hear of nothing, the end of the connection included.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicUsize};

use smol::channel::{self, Receiver, Sender};

use super::slot::Memory;
use crate::fuse::abi::{InHeader, ReadWriteIn, opcode, uring_header};

/// A request of this length in bytes, or one for so many, costs more to copy than to hand over.
pub const LARGE: u32 = 256 << 10;
/// How many other threads one shares with: as many as one client's copies can use.
const NEIGHBOURS: usize = 3;

/// The queues' threads, each with the channel that its handlers read.
pub struct Peers(Vec<Peer>);

/// Aligned to a pair of cache lines, so that threads do not share one.
#[repr(align(128))]
struct Peer {
    requests: Sender<Memory>,
    /// Its queue's entries that have not been given away.
    own: AtomicUsize,
    /// Large requests that it has been given and has not answered.
    load: AtomicUsize,
    /// Requests that have arrived on its ring. Only it writes.
    arrivals: AtomicUsize,
    /// It serves on its queue's CPU. Only it writes.
    is_at_home: AtomicBool,
}

impl Peers {
    /// For `queues` threads of `depth` entries each, with the handlers' ends of their channels. A channel has room
    /// for all entries there are, so a send never fails for want of it.
    pub fn new(queues: usize, depth: usize) -> (Arc<Peers>, Vec<Receiver<Memory>>) {
        let (peers, receivers) = (0..queues)
            .map(|_| {
                let (requests, receiver) = channel::bounded(queues * depth);
                (
                    Peer {
                        requests,
                        own: AtomicUsize::new(0),
                        load: AtomicUsize::new(0),
                        arrivals: AtomicUsize::new(0),
                        is_at_home: AtomicBool::new(false),
                    },
                    receiver,
                )
            })
            .unzip();
        (Arc::new(Peers(peers)), receivers)
    }

    /// Takes the request that has arrived in `memory` at the thread of queue `here` to the thread that serves
    /// it. Whether that is another one.
    pub fn route(&self, here: usize, memory: Memory) -> bool {
        let arrivals = &self.0[here].arrivals;
        arrivals.store(arrivals.load(Relaxed).wrapping_add(1), Relaxed);
        let large = is_large(&memory);
        let queue = usize::from(memory.queue());
        let is_last = queue == here && self.0[here].own.load(Acquire) <= 1;
        let there = if large && !is_last { self.least_loaded(here) } else { queue };
        let Err(memory) = self.send(there, memory, large) else {
            if there != here && queue == here {
                self.0[here].own.fetch_sub(1, Relaxed);
            }
            if there != here && queue == there {
                // Only now that it is there: the thread may give another one away for it.
                self.0[there].own.fetch_add(1, Release);
            }
            return there != here;
        };
        // That thread has ended; the connection is about to.
        let delivered = self.send(here, memory, large);
        debug_assert!(delivered.is_ok(), "a thread reads its channel as long as it reaps");
        false
    }

    /// The thread of queue `here` has registered so many entries.
    pub fn registered(&self, here: usize, entries: usize) {
        self.0[here].own.fetch_add(entries, Release);
    }

    /// The thread of queue `here` answers the request in `memory`.
    pub fn answered(&self, here: usize, memory: &Memory) {
        if is_large(memory) {
            self.0[here].load.fetch_sub(1, Relaxed);
        }
    }

    /// How many requests have arrived so far on the ring of queue `here`.
    pub fn arrivals(&self, here: usize) -> usize {
        self.0[here].arrivals.load(Relaxed)
    }

    /// How many requests have arrived so far on the rings of the other threads than that of queue `here`.
    pub fn arrivals_elsewhere(&self, here: usize) -> usize {
        let others = (0..self.0.len()).filter(|peer| *peer != here);
        others.map(|peer| self.arrivals(peer)).fold(0, usize::wrapping_add)
    }

    /// The thread of queue `here` serves on its queue's CPU, or elsewhere.
    pub fn set_at_home(&self, here: usize, is_at_home: bool) {
        self.0[here].is_at_home.store(is_at_home, Relaxed);
    }

    /// Whether there is only one thread beside that of queue `here`, and it serves on its queue's CPU.
    pub fn other_is_at_home(&self, here: usize) -> bool {
        self.0.len() == 2 && self.0[1 - here].is_at_home.load(Relaxed)
    }

    /// Whether the thread of queue `here` has been given requests that its handlers have not seen.
    pub fn has_requests(&self, here: usize) -> bool {
        !self.0[here].requests.is_empty()
    }

    fn least_loaded(&self, here: usize) -> usize {
        let load = |peer: usize| self.0[peer].load.load(Relaxed);
        let mine = load(here);
        if mine == 0 {
            return here;
        }
        let neighbours = NEIGHBOURS.min(self.0.len() - 1);
        let (least, there) = (1..=neighbours)
            .map(|step| (here + step) % self.0.len())
            .map(|peer| (load(peer), peer))
            .min()
            .unwrap_or((mine, here));
        // With this request there it must still have no more than is left here.
        if least < mine { there } else { here }
    }

    fn send(&self, there: usize, memory: Memory, large: bool) -> Result<(), Memory> {
        let peer = &self.0[there];
        if large {
            peer.load.fetch_add(1, Relaxed);
        }
        peer.requests.try_send(memory).map_err(|refused| {
            if large {
                peer.load.fetch_sub(1, Relaxed);
            }
            refused.into_inner()
        })
    }
}

/// Whether copying makes up most of this request. The same as long as the request's header is in the memory.
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
        let mut memory = Memory::allocate(queue, 1).unwrap().pop().unwrap();
        let header = InHeader { opcode: opcode::READ, ..Default::default() };
        memory.put_head_struct(uring_header::IN_OUT, &header);
        memory.put_head_struct(uring_header::OP_IN, &ReadWriteIn { size, ..Default::default() });
        memory
    }

    /// How many requests each thread has been given.
    fn given(receivers: &[Receiver<Memory>]) -> Vec<usize> {
        receivers.iter().map(Receiver::len).collect()
    }

    #[test]
    fn small_requests_stay_at_home() {
        let (peers, receivers) = Peers::new(2, 8);
        for _ in 0..8 {
            assert!(!peers.route(0, read(0, 4096)));
        }
        assert_eq!(given(&receivers), [8, 0]);
    }

    #[test]
    fn a_small_request_takes_its_entry_home() {
        let (peers, receivers) = Peers::new(2, 8);
        assert!(peers.route(0, read(1, 4096)));
        assert_eq!(given(&receivers), [0, 1]);
    }

    #[test]
    fn large_requests_are_shared_evenly() {
        let (peers, receivers) = Peers::new(2, 16);
        peers.registered(0, 16);
        for _ in 0..16 {
            peers.route(0, read(0, LARGE));
        }
        assert_eq!(given(&receivers), [8, 8]);
    }

    #[test]
    fn a_lone_large_request_stays() {
        let (peers, receivers) = Peers::new(2, 16);
        for _ in 0..4 {
            assert!(!peers.route(0, read(0, LARGE)));
            peers.answered(0, &receivers[0].try_recv().unwrap());
        }
    }

    #[test]
    fn a_thread_keeps_its_last_entry() {
        let (peers, receivers) = Peers::new(2, 16);
        peers.registered(0, 2);
        // One is given away, the other not, though it is just as large.
        for given_away in [false, true, false, false] {
            assert_eq!(peers.route(0, read(0, LARGE)), given_away);
        }
        // When the one is back, it may go again.
        let back = receivers[1].try_recv().unwrap();
        peers.answered(1, &back);
        assert!(peers.route(1, read(0, 4096)));
        assert!(peers.route(0, read(0, LARGE)));
        assert!(!peers.route(0, read(0, LARGE)));
    }

    #[test]
    fn a_single_queue_keeps_everything() {
        let (peers, receivers) = Peers::new(1, 4);
        for _ in 0..4 {
            assert!(!peers.route(0, read(0, LARGE)));
        }
        assert_eq!(given(&receivers), [4]);
    }

    #[test]
    fn what_an_ended_thread_cannot_take_stays() {
        let (peers, mut receivers) = Peers::new(2, 4);
        receivers.pop();
        for _ in 0..4 {
            assert!(!peers.route(0, read(1, LARGE)));
        }
        assert!(!peers.route(0, read(1, 4096)));
        assert_eq!(given(&receivers), [5]);
    }
}
