//! The open files, and which of them have yet to hear of a failed flush.
//!
//! A source tells once that written data was lost, to whichever flush comes first. That may be the close of a
//! descriptor which a forked child has inherited, and at whose result nobody looks. So every file that was open then is told at
//! its next `fsync`, once each, as the kernel does for its own files (`errseq_t`, Documentation/core-api/errseq.rst).

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use event_listener::Event;
use smol::{Timer, future};

use crate::errno::Errno;

/// All open files of an export. Off the data path: only open, close, flushes and failed durable writes come here.
#[derive(Debug, Default)]
pub struct OpenFiles(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last_handle: u64,
    /// How many flushes had failed when the file was opened, or last told.
    told: HashMap<u64, u64>,
    failures: u64,
    last_failure: Option<Errno>,
}

impl State {
    fn untold(&self, handle: u64) -> Result<(), Errno> {
        match (self.told.get(&handle), self.last_failure) {
            (Some(&told), Some(errno)) if told < self.failures => Err(errno),
            _ => Ok(()),
        }
    }
}

impl OpenFiles {
    /// A new file's handle, which is never zero. What failed before is none of its concern.
    pub fn open(&self) -> u64 {
        let mut state = self.lock();
        state.last_handle += 1;
        let (handle, failures) = (state.last_handle, state.failures);
        state.told.insert(handle, failures);
        handle
    }

    /// Whether any is open.
    pub fn any_open(&self) -> bool {
        !self.lock().told.is_empty()
    }

    /// The file is closed for good.
    pub fn release(&self, handle: u64) {
        self.lock().told.remove(&handle);
    }

    /// A flush or a durable write has failed: every open file has to know.
    pub fn failed(&self, errno: Errno) {
        let mut state = self.lock();
        state.failures += 1;
        state.last_failure = Some(errno);
    }

    /// Whether there has been any failure, told or not.
    pub fn any_failure(&self) -> bool {
        self.lock().failures > 0
    }

    /// What a close has to say: the failure that the file has not been told of. It does not count as told.
    pub fn untold(&self, handle: u64) -> Result<(), Errno> {
        self.lock().untold(handle)
    }

    /// What an fsync has to say. From then on the file has been told.
    pub fn tell(&self, handle: u64) -> Result<(), Errno> {
        // Under one lock: a failure that came in between would be taken for told.
        let mut state = self.lock();
        let (untold, failures) = (state.untold(handle), state.failures);
        if let Some(told) = state.told.get_mut(&handle) {
            *told = failures;
        }
        untold
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no code panics while it holds the list")
    }
}

/// How long an fsync waits for others that may have met what was meant for it. What they have met they are just about to
/// tell; one that takes longer hangs for another reason.
const TELLING: Duration = Duration::from_secs(1);

/// The flushes and durable writes under way.
///
/// One that began before an fsync may be the one that the source has told of a loss, and not be done with telling
/// [`OpenFiles`] yet when the fsync comes to its end.
#[derive(Debug, Default)]
pub struct Flushes {
    under_way: Mutex<UnderWay>,
    ended: Event,
}

#[derive(Debug, Default)]
struct UnderWay {
    next: u64,
    tickets: BTreeSet<u64>,
}

/// One flush or durable write, until `open_files` knows if it has failed.
#[derive(Debug)]
pub struct Flush<'a> {
    all: &'a Flushes,
    ticket: u64,
}

impl Flushes {
    /// One begins.
    pub fn begin(&self) -> Flush<'_> {
        let mut under_way = self.lock();
        let ticket = under_way.next;
        under_way.next += 1;
        under_way.tickets.insert(ticket);
        Flush { all: self, ticket }
    }

    /// Waits until those that are under way now have told what they have met, for a second at most.
    pub async fn told(&self) {
        let next = self.lock().next;
        let told = async {
            while self.any_before(next) {
                // Listen first and look again, or an end in between would be missed.
                let ended = self.ended.listen();
                if !self.any_before(next) {
                    break;
                }
                ended.await;
            }
        };
        let limit = async { _ = Timer::after(TELLING).await };
        if self.any_before(next) {
            future::or(told, limit).await;
        }
    }

    fn any_before(&self, ticket: u64) -> bool {
        self.lock().tickets.first().is_some_and(|&first| first < ticket)
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().expect("no code panics while it holds the list")
    }
}

impl Drop for Flush<'_> {
    fn drop(&mut self) {
        self.all.lock().tickets.remove(&self.ticket);
        self.all.ended.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_that_was_open_is_told_once() {
        let files = OpenFiles::default();
        let (a, b) = (files.open(), files.open());
        assert!(files.tell(a).is_ok());
        files.failed(Errno::EIO);
        let later = files.open();
        assert_eq!(files.tell(a), Err(Errno::EIO));
        assert!(files.tell(a).is_ok() && files.tell(later).is_ok());
        assert_eq!(files.tell(b), Err(Errno::EIO));
    }

    #[test]
    fn a_close_reports_and_does_not_hide_it_from_fsync() {
        let files = OpenFiles::default();
        let file = files.open();
        files.failed(Errno::EIO);
        assert_eq!(files.untold(file), Err(Errno::EIO));
        assert_eq!(files.tell(file), Err(Errno::EIO));
        assert!(files.untold(file).is_ok());
    }

    #[test]
    fn released_files_are_forgotten() {
        let files = OpenFiles::default();
        let file = files.open();
        files.failed(Errno::EIO);
        files.release(file);
        assert!(files.tell(file).is_ok() && files.lock().told.is_empty());
    }
}
