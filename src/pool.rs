//! The pool of blocking threads, and reads and writes there into and from a borrowed buffer.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use smol::Task;

/// Runs `work`, which may block, on another thread.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    begin(work).await
}

/// As [`run`], where nobody waits for the end.
pub fn start(work: impl FnOnce() + Send + 'static) {
    begin(work).detach();
}

fn begin<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Task<T> {
    smol::unblock(work)
}

/// Reads at `offset` on another thread. The future must be polled to its end.
///
/// # Safety
/// The future is not leaked while `buf`'s borrow ends: the other thread writes until it has
/// completed.
pub async unsafe fn read_at(file: &Arc<File>, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let (file, lent) = (file.clone(), Lent(buf.as_mut_ptr(), buf.len()));
    let in_flight = InFlight;
    let work = move || {
        // SAFETY: `buf` stays borrowed until this closure has ended: the future holds the borrow,
        // aborts when it is dropped before, and is not leaked, as the caller promises. Nobody else
        // uses the buffer meanwhile, since the borrow is exclusive.
        file.read_at(unsafe { lent.as_mut() }, offset)
    };
    let result = run(work).await;
    std::mem::forget(in_flight);
    result
}

/// Writes at `offset` on another thread. The future must be polled to its end.
///
/// # Safety
/// As for [`read_at`]: the other thread reads `data` until it has completed.
pub async unsafe fn write_at(file: &Arc<File>, data: &[u8], offset: u64) -> io::Result<usize> {
    let (file, lent) = (file.clone(), Lent(data.as_ptr().cast_mut(), data.len()));
    let in_flight = InFlight;
    let work = move || {
        // SAFETY: as in `read_at`; the data is only read.
        file.write_at(unsafe { lent.as_ref() }, offset)
    };
    let result = run(work).await;
    std::mem::forget(in_flight);
    result
}

/// A buffer on loan to the pool.
struct Lent(*mut u8, usize);

// SAFETY: the memory is plain bytes, and the borrow that it came from outlives the loan.
unsafe impl Send for Lent {}

impl Lent {
    /// # Safety
    /// The bytes must be borrowed, exclusively, for as long as the result is used.
    unsafe fn as_mut<'a>(&self) -> &'a mut [u8] {
        // SAFETY: pointer and length are those of a slice, and the caller promises the borrow.
        unsafe { std::slice::from_raw_parts_mut(self.0, self.1) }
    }

    /// # Safety
    /// The bytes must be borrowed for as long as the result is used.
    unsafe fn as_ref<'a>(&self) -> &'a [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.0, self.1) }
    }
}

/// Aborts when dropped: the pool may still be using the buffer, so going on could corrupt data
/// without a trace. Handlers are polled to their end, so this is a bug.
struct InFlight;

impl Drop for InFlight {
    fn drop(&mut self) {
        log::error!("a pool operation was dropped in flight");
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_was_written() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        smol::block_on(async {
            // SAFETY: it is awaited here, and so is the next one.
            let write = unsafe { write_at(&file, b"pool", 10) };
            assert_eq!(write.await.unwrap(), 4);
            let mut buf = [0; 8];
            // SAFETY: as above.
            let read = unsafe { read_at(&file, &mut buf, 8) };
            assert_eq!(read.await.unwrap(), 6);
            assert_eq!(&buf[..6], b"\0\0pool");
        });
    }
}
