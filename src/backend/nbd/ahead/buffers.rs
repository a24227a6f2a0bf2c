//! The memory of chunks.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{CHUNK, MAX_CHUNKS};
use crate::sys;

/// At most [`MAX_CHUNKS`] buffers of [`CHUNK`] bytes. They are kept for the next chunk until they
/// are given back.
#[derive(Debug, Default)]
pub struct Buffers {
    taken: AtomicUsize,
    /// As many as were taken at once, less those that are.
    free: Mutex<Vec<Vec<u8>>>,
}

/// One of them, free again when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    all: Arc<Buffers>,
}

impl Buffers {
    /// Takes one of `length` bytes; `None`: all are taken, or there is no memory. Only one thread
    /// at a time may call this.
    pub fn take(self: &Arc<Self>, length: usize) -> Option<Buffer> {
        if self.taken.load(Ordering::SeqCst) >= MAX_CHUNKS {
            return None;
        }
        let free = self.free().pop();
        let bytes = free.or_else(|| {
            let mut new = Vec::new();
            new.try_reserve_exact(CHUNK as usize).ok()?;
            new.resize(CHUNK as usize, 0);
            Some(new)
        })?;
        self.taken.fetch_add(1, Ordering::SeqCst);
        Some(Buffer { bytes, length, all: self.clone() })
    }

    /// Whether any is taken, told without a lock.
    pub fn any_taken(&self) -> bool {
        self.taken.load(Ordering::SeqCst) > 0
    }

    /// Gives the memory of free ones back to the kernel.
    pub fn give_back(&self) {
        drop(std::mem::take(&mut *self.free()));
        sys::trim_heap();
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.free.lock().expect("no code panics while it holds the buffers")
    }
}

impl Buffer {
    /// What it holds.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// To be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.all.free().push(std::mem::take(&mut self.bytes));
        self.all.taken.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
impl Buffers {
    pub fn has_room_for(&self, more: usize) -> bool {
        self.taken.load(Ordering::SeqCst) + more <= MAX_CHUNKS
    }

    /// As `give_back`; how many there were, those that are taken included.
    pub fn give_back_counted(&self) -> usize {
        let free = std::mem::take(&mut *self.free()).len();
        free + self.taken.load(Ordering::SeqCst)
    }
}
