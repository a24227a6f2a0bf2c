//! The entries on one thread's ring, and who has their memory.
//!
//! An entry's [`Memory`] is moved in here when it goes to the kernel ([`Entries::register`],
//! [`Entries::commit`]) and out again when its completion is reaped ([`Entries::reap`]): while the
//! kernel may use it, nobody else can name it.
//!
//! An entry is of the queue that it was registered with, and on the ring of its last commit.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use slab::Slab;

use super::ring::Ring;
use super::slot::Memory;
use crate::fuse::abi::{UringEntInOut, uring_header};

/// The entries on one ring.
pub struct Entries {
    ring: Rc<Ring>,
    device: OwnedFd,
    in_kernel: RefCell<InKernel>,
}

/// The memory of entries that are with the kernel, and what is known of it without looking at each.
struct InKernel {
    memory: Slab<Memory>,
    /// How many are of each queue.
    of_queue: Vec<u32>,
    /// How many hold pages that a large request has left.
    with_burst_pages: usize,
}

impl InKernel {
    fn insert(&mut self, memory: Memory) -> usize {
        self.of_queue[usize::from(memory.queue())] += 1;
        self.with_burst_pages += usize::from(memory.has_burst_pages());
        self.memory.insert(memory)
    }

    fn remove(&mut self, key: usize) -> Option<Memory> {
        let memory = self.memory.try_remove(key)?;
        self.of_queue[usize::from(memory.queue())] -= 1;
        self.with_burst_pages -= usize::from(memory.has_burst_pages());
        Some(memory)
    }
}

impl Entries {
    /// None yet. `device` is the connection's, which has so many `queues`.
    pub fn new(ring: Rc<Ring>, device: OwnedFd, queues: usize) -> Entries {
        let (memory, of_queue) = (Slab::new(), vec![0; queues]);
        let in_kernel = InKernel { memory, of_queue, with_burst_pages: 0 };
        Entries { ring, device, in_kernel: RefCell::new(in_kernel) }
    }

    /// Registers an entry for each memory with the queue that it is of. One that the kernel refuses
    /// completes with its error.
    pub fn register(&self, memory: Vec<Memory>) -> io::Result<()> {
        // Made to its full length first: a vector that does not grow does not move them.
        let registered: Vec<_> = memory
            .into_iter()
            .map(|mut memory| {
                let (queue, iovecs) = (memory.queue(), memory.iovecs(uring_header::LEN));
                (self.in_kernel.borrow_mut().insert(memory), queue, iovecs)
            })
            .collect();
        for (key, queue, iovecs) in &registered {
            // SAFETY: the iovecs outlive the enters below that submit them; the memory is in
            // `in_kernel`, which gives it out only after the entry's completion.
            unsafe {
                self.ring.register_entry(self.device.as_raw_fd(), *queue, *key as u32, iovecs);
            }
        }
        let mut entered = self.ring.enter(false);
        while entered.is_ok() && self.ring.has_unsubmitted() {
            // There is no memory for a request just now.
            std::thread::yield_now();
            entered = self.ring.enter(false);
        }
        if entered.is_err() {
            // What was not submitted still names them, and the ring may be entered again.
            std::mem::forget(registered);
        }
        entered
    }

    /// Takes the completions that are there: memory that holds a request, or why an entry has
    /// ended. Returns how many completions there were, those of other operations on the ring
    /// included.
    pub fn reap(&self, mut on_entry: impl FnMut(io::Result<Memory>)) -> usize {
        self.ring.reap(|key, result| {
            // The kernel completes what it has, once.
            let Some(memory) = self.in_kernel.borrow_mut().remove(key as usize) else { return };
            on_entry(match result {
                0 => Ok(memory),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            });
        })
    }

    /// Gives an entry back to the kernel with the answer in its memory, and asks for its next
    /// request on this ring, on whichever it was before.
    pub fn commit(&self, memory: Memory) {
        let queue = memory.queue();
        // The entry is named by what its own memory says, and by nobody's word.
        let UringEntInOut { commit_id, .. } = memory.head_struct(uring_header::RING_ENT);
        let key = self.in_kernel.borrow_mut().insert(memory);
        // SAFETY: having the memory means that the entry's completion was reaped and no commit was
        // pushed since; from here on it is in `in_kernel` until the next completion.
        unsafe { self.ring.commit(self.device.as_raw_fd(), queue, key as u32, commit_id) };
    }

    /// Whether the kernel has any.
    pub fn any_in_kernel(&self) -> bool {
        !self.in_kernel.borrow().memory.is_empty()
    }

    /// Whether the kernel has one on this ring for the next request of `queue`.
    pub fn has_one_for(&self, queue: u16) -> bool {
        self.in_kernel.borrow().of_queue[usize::from(queue)] > 0
    }

    /// Whether idle entries hold pages that a burst of large requests left.
    pub fn has_burst_pages(&self) -> bool {
        self.in_kernel.borrow().with_burst_pages > 0
    }

    /// Gives back the pages that a burst of large requests left in idle entries.
    pub fn give_back_pages(&self) {
        // The kernel has these entries, but it writes to them only in task work, which under
        // DEFER_TASKRUN runs on this thread inside an enter. A request that is in the memory
        // already has a completion, and a commit that was not submitted has its answer there.
        if self.ring.has_completions() || self.ring.has_unsubmitted() {
            return;
        }
        let mut in_kernel = self.in_kernel.borrow_mut();
        in_kernel.memory.iter_mut().for_each(|(_, memory)| memory.release());
        in_kernel.with_burst_pages = 0;
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        // Entries that have not completed: the kernel may still use their memory, so it is never
        // freed. This happens only when a thread fails.
        self.in_kernel.get_mut().memory.drain().for_each(std::mem::forget);
    }
}
