//! The entries of one FUSE queue, and who has their memory.
//!
//! An entry's [`Memory`] is moved in here when it goes to the kernel ([`Entries::register`],
//! [`Entries::commit`]) and out again when its completion is reaped ([`Entries::reap`]): while the kernel may
//! use it, nobody else can name it.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use super::ring::Ring;
use super::slot::Memory;
use crate::fuse::abi::uring_header;

/// The entries of one queue on one ring.
pub struct Entries {
    ring: Rc<Ring>,
    device: Arc<OwnedFd>,
    qid: u16,
    /// By index: the memory of an entry that is with the kernel.
    in_kernel: RefCell<Vec<Option<Memory>>>,
    /// Entries that have not ended.
    live: Cell<usize>,
}

impl Entries {
    /// Registers an entry for each memory (as made by one [`Memory::allocate`]) with queue `qid`.
    pub fn register(
        ring: Rc<Ring>,
        device: Arc<OwnedFd>,
        qid: u16,
        memory: Vec<Memory>,
    ) -> io::Result<Rc<Entries>> {
        let entries = Entries {
            ring,
            device,
            qid,
            live: Cell::new(memory.len()),
            in_kernel: RefCell::new(memory.into_iter().map(Some).collect()),
        };
        let mut iovecs = Vec::new();
        for (index, memory) in entries.in_kernel.borrow_mut().iter_mut().enumerate() {
            let memory = memory.as_mut().expect("nothing has completed yet");
            debug_assert_eq!(memory.index(), index);
            iovecs.push(memory.iovecs(uring_header::LEN));
        }
        for (index, iovecs) in iovecs.iter().enumerate() {
            // SAFETY: the iovecs outlive the enter below (and a vector that is not changed does not move
            // them); the memory is in `in_kernel`, which gives it out only after the entry's completion.
            unsafe {
                entries.ring.register_entry(entries.device.as_raw_fd(), qid, index as u32, iovecs);
            }
        }
        let entered = entries.ring.enter(false);
        drop(iovecs);
        entered.map(|()| Rc::new(entries))
    }

    /// Takes the completions that are there: memory that holds a request, or why an entry has ended.
    /// Returns how many completions there were, those of other operations on the ring included.
    pub fn reap(&self, mut on_entry: impl FnMut(io::Result<Memory>)) -> usize {
        self.ring.reap(|index, result| {
            let memory = self.in_kernel.borrow_mut()[index as usize].take();
            // The kernel completes what it has, once.
            let Some(memory) = memory else { return };
            on_entry(if result == 0 {
                Ok(memory)
            } else {
                self.live.set(self.live.get() - 1);
                Err(io::Error::from_raw_os_error(-result))
            });
        })
    }

    /// Gives an entry back to the kernel with the answer in its memory, and asks for the next request.
    pub fn commit(&self, memory: Memory, commit_id: u64) {
        let index = memory.index();
        self.in_kernel.borrow_mut()[index] = Some(memory);
        // SAFETY: having the memory means that the entry's completion was reaped and no commit was pushed
        // since; from here on it is in `in_kernel` until the next completion.
        unsafe { self.ring.commit(self.device.as_raw_fd(), self.qid, index as u32, commit_id) };
    }

    /// Entries that have not ended: with the kernel or with us.
    pub fn live(&self) -> usize {
        self.live.get()
    }

    /// Whether idle entries hold pages that a burst of large requests left.
    pub fn has_burst_pages(&self) -> bool {
        self.in_kernel.borrow().iter().flatten().any(Memory::has_burst_pages)
    }

    /// Gives back the pages that a burst of large requests left in idle entries.
    pub fn give_back_pages(&self) {
        // The kernel has these entries, but it writes to them only in task work, which under DEFER_TASKRUN
        // runs on this thread inside an enter; and a request that is in the memory already has a
        // completion, which must have been reaped.
        debug_assert!(!self.ring.has_completions());
        self.in_kernel.borrow_mut().iter_mut().flatten().for_each(Memory::release);
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        // Entries that have not completed: the kernel may still use their memory, so it is never freed. This
        // happens only when a thread fails.
        for memory in self.in_kernel.get_mut().drain(..).flatten() {
            std::mem::forget(memory);
        }
    }
}
