//! A stop under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::export::Cache;
use crate::mount::errands::{Errand, Running};
use crate::mount::{Mount, Unmounted};

/// How long clients may go on after the first signal, before their file is taken away.
const GRACE: Duration = Duration::from_secs(3);
/// How often an unmount is tried again meanwhile.
pub(super) const RETRY: Duration = Duration::from_millis(100);

/// A stop under way: unmount when nobody uses the file, by force when time is up.
#[derive(Debug)]
pub(super) struct Stop {
    pub(super) began: Instant,
    /// The user has asked for it.
    pub(super) is_by_signal: bool,
    pub(super) force_at: Instant,
    pub(super) is_forced: bool,
    /// Asked for again: not even requests in flight are waited for.
    pub(super) is_hurried: bool,
    /// It is still mounted, dead.
    pub(super) has_failed: bool,
    pub(super) reported: bool,
    pub(super) write_back: WriteBack,
    pub(super) closed: Arc<AtomicBool>,
}

/// Before a file is taken away, what the page cache has of acknowledged writes goes to the source.
#[derive(Debug)]
pub(super) enum WriteBack {
    NotBegun,
    UnderWay(Running),
    Done,
}

impl WriteBack {
    /// Begins it, or looks how far it is; whether it has ended, well or not. However slow the
    /// source is: a second signal ends the wait.
    pub(super) fn go_on(&mut self, mount: &Mount) -> bool {
        let path = mount.path().display();
        match self {
            WriteBack::NotBegun => {
                log::warn!("{path}: still in use, what the page cache holds is written");
                *self = match mount.begin(Errand::WriteBack) {
                    Ok(running) => WriteBack::UnderWay(running),
                    Err(e) => {
                        log::error!("{path}: what the page cache holds is not written: {e}");
                        WriteBack::Done
                    }
                };
            }
            WriteBack::UnderWay(running) => match running.end() {
                None => {}
                Some(outcome) => {
                    if let Err(e) = outcome {
                        log::error!("{path}: not all that the page cache holds was written: {e}");
                    }
                    *self = WriteBack::Done;
                }
            },
            WriteBack::Done => {}
        }
        matches!(self, WriteBack::Done)
    }
}

impl Stop {
    pub(super) fn now(closed: &Arc<AtomicBool>) -> Stop {
        let now = Instant::now();
        Stop {
            began: now,
            is_by_signal: false,
            force_at: now + GRACE,
            is_forced: false,
            is_hurried: false,
            has_failed: false,
            reported: false,
            write_back: WriteBack::NotBegun,
            closed: closed.clone(),
        }
    }

    pub(super) fn by_signal(closed: &Arc<AtomicBool>) -> Stop {
        Stop { is_by_signal: true, ..Stop::now(closed) }
    }

    /// For people.
    pub(super) fn waits_for(&self) -> &'static str {
        match self.write_back {
            WriteBack::UnderWay(_) => "writing what the page cache holds",
            _ if self.is_forced => "waiting for the last requests",
            _ => "waiting for the file to be closed",
        }
    }

    pub(super) fn is_forced(&self) -> bool {
        self.is_forced
    }

    /// Tries again, on a file that somebody has open or not.
    pub(super) fn go_on(&mut self, mount: &Mount, is_open: bool, cache: Cache) {
        if self.is_forced {
            return;
        }
        if Instant::now() >= self.force_at {
            // What the page cache holds is written through the file itself.
            if let Err(e) = mount.uncover(true) {
                log::error!("{}: {e}", mount.path().display());
            }
            if cache == Cache::Writeback && is_open && !self.write_back.go_on(mount) {
                return;
            }
            log::warn!("{}: still in use, taken away", mount.path().display());
            return self.force(mount);
        }
        match mount.try_unmount() {
            // The threads see the end of the connection by themselves, if it ends: it does not
            // where another mount namespace has a copy, or somebody the file.
            Ok(Unmounted::Gone) if !is_open => self.force(mount),
            // It may be on its way.
            Ok(Unmounted::Gone) if self.began.elapsed() < 3 * RETRY => {}
            Ok(unmounted @ (Unmounted::Gone | Unmounted::Busy | Unmounted::Covered(_))) => {
                if !std::mem::replace(&mut self.reported, true) {
                    let by = match unmounted {
                        Unmounted::Covered(above) => format!(", {above} is mounted on top of it"),
                        Unmounted::Gone | Unmounted::Busy => String::new(),
                    };
                    log::warn!(
                        "{} is still in use{by}: waiting {} s for it to be closed (a second signal ends it at once)",
                        mount.path().display(),
                        GRACE.as_secs()
                    );
                }
            }
            Err(e) => {
                log::error!("{}: cannot be unmounted: {e}", mount.path().display());
                self.force(mount);
            }
        }
    }

    pub(super) fn force(&mut self, mount: &Mount) {
        if std::mem::replace(&mut self.is_forced, true) {
            self.is_hurried = true;
            return;
        }
        if let Err(e) = mount.force_unmount() {
            self.has_failed = true;
            log::error!("{}: cannot be unmounted: {e}", mount.path().display());
        }
        // Where the connection cannot be aborted it goes on until the last close; its requests do
        // not.
        self.closed.store(true, Ordering::Release);
    }
}
