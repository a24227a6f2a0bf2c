//! The entries on one thread's ring, and who has their memory.
//!
//! An entry's [`Memory`] is moved in here when it goes to the kernel ([`Entries::register`],
//! [`Entries::commit`]) and out again when its completion is reaped ([`Entries::reap`]): while the kernel may
//! use it, nobody else can name it.
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
use crate::fuse::abi::uring_header;

/// The entries on one ring.
pub struct Entries {
    ring: Rc<Ring>,
    device: OwnedFd,
    /// The memory of those that are with the kernel.
    in_kernel: RefCell<Slab<Memory>>,
}

impl Entries {
    /// None yet. `device` is the connection's.
    pub fn new(ring: Rc<Ring>, device: OwnedFd) -> Entries {
        Entries { ring, device, in_kernel: RefCell::default() }
    }

    /// Registers an entry for each memory with the queue that it is of. One that the kernel refuses completes
    /// with its error.
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
            // SAFETY: the iovecs outlive the enters below that submit them; the memory is in `in_kernel`, which
            // gives it out only after the entry's completion.
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

    /// Takes the completions that are there: memory that holds a request, or why an entry has ended.
    /// Returns how many completions there were, those of other operations on the ring included.
    pub fn reap(&self, mut on_entry: impl FnMut(io::Result<Memory>)) -> usize {
        self.ring.reap(|key, result| {
            // The kernel completes what it has, once.
            let Some(memory) = self.in_kernel.borrow_mut().try_remove(key as usize) else { return };
            on_entry(match result {
                0 => Ok(memory),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            });
        })
    }

    /// Gives an entry back to the kernel with the answer in its memory, and asks for its next request on this
    /// ring, on whichever it was before.
    pub fn commit(&self, memory: Memory, commit_id: u64) {
        let queue = memory.queue();
        let key = self.in_kernel.borrow_mut().insert(memory);
        // SAFETY: having the memory means that the entry's completion was reaped and no commit was pushed
        // since; from here on it is in `in_kernel` until the next completion.
        unsafe { self.ring.commit(self.device.as_raw_fd(), queue, key as u32, commit_id) };
    }

    /// How many are with the kernel.
    pub fn in_kernel(&self) -> usize {
        self.in_kernel.borrow().len()
    }

    /// Whether idle entries hold pages that a burst of large requests left.
    pub fn has_burst_pages(&self) -> bool {
        self.in_kernel.borrow().iter().any(|(_, memory)| memory.has_burst_pages())
    }

    /// Gives back the pages that a burst of large requests left in idle entries.
    pub fn give_back_pages(&self) {
        // The kernel has these entries, but it writes to them only in task work, which under DEFER_TASKRUN
        // runs on this thread inside an enter; and a request that is in the memory already has a
        // completion, which must have been reaped.
        debug_assert!(!self.ring.has_completions());
        self.in_kernel.borrow_mut().iter_mut().for_each(|(_, memory)| memory.release());
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        // Entries that have not completed: the kernel may still use their memory, so it is never freed. This
        // happens only when a thread fails.
        self.in_kernel.get_mut().drain().for_each(std::mem::forget);
    }
}
