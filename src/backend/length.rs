//! The length of a file that may change: read with each request, and hardly ever written.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// The length of a file, in bytes, as far as it is known. The kernel extends and truncates one at a
/// time (it holds the inode's lock), so what is noted after each follows the file. It looks at it
/// (GETATTR) at any time.
#[derive(Debug)]
pub struct Length {
    bytes: AtomicU64,
    /// How often it was changed. Locked for the change only, not for what it follows from.
    changes: Mutex<u64>,
}

impl Length {
    /// A length of `bytes`.
    pub fn new(bytes: u64) -> Length {
        Length { bytes: AtomicU64::new(bytes), changes: Mutex::new(0) }
    }

    /// In bytes.
    pub fn get(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Something was written up to `end`. Others may have cut the file off before that, so to be as
    /// long as it was is a change too.
    pub fn grow_to(&self, end: u64) {
        if end >= self.get() {
            *self.changes() += 1;
            self.bytes.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// The file was cut off, or extended.
    pub fn set(&self, bytes: u64) {
        *self.changes() += 1;
        self.bytes.store(bytes, Ordering::Release);
    }

    /// Has a `look` at the file, and takes over the length that it shows: others may have changed
    /// it. Not if it was changed here meanwhile, since then `look` may have come before that.
    pub fn look<T, E>(
        &self,
        look: impl FnOnce() -> Result<T, E>,
        shown: impl FnOnce(&T) -> u64,
    ) -> Result<T, E> {
        let before = *self.changes();
        let seen = look()?;
        let changes = self.changes();
        if *changes == before {
            self.bytes.store(shown(&seen), Ordering::Release);
        }
        Ok(seen)
    }

    fn changes(&self) -> MutexGuard<'_, u64> {
        self.changes.lock().expect("no code panics while it holds the count")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(length: &Length, look: impl FnOnce() -> u64) {
        length.look(|| Ok::<u64, ()>(look()), |&seen| seen).unwrap();
    }

    #[test]
    fn a_look_shows_what_others_have_changed() {
        let length = Length::new(100);
        look(&length, || 300);
        assert_eq!(length.get(), 300);
        look(&length, || 50);
        assert_eq!(length.get(), 50);
    }

    #[test]
    fn an_old_look_undoes_no_change() {
        let length = Length::new(100);
        // The second time the write ends where the length did.
        for _ in 0..2 {
            look(&length, || {
                length.grow_to(200);
                100
            });
            assert_eq!(length.get(), 200);
        }
        look(&length, || {
            length.set(10);
            200
        });
        assert_eq!(length.get(), 10);
        look(&length, || {
            length.grow_to(20);
            length.set(10);
            20
        });
        assert_eq!(length.get(), 10);
    }
}
