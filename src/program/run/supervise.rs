//! What the control thread does while others serve.
//!
//! ```text
//!  phase         event                                        what follows
//!  Mounted       a signal, the command's end, a loss of the   a Stop begins: it unmounts, by force
//!                source (--on-loss exit)                      when its time is up
//!                a thread fails                               a Stop that is forced
//!                others unmount it, a file is still open,     Detached
//!                or they have moved or bound it
//!                ... none is (other namespaces have a copy)   a Stop that is forced
//!  Detached      as while mounted; or the last close          a Stop; one that is forced
//!  either        the Stop is forced, or the connection ends   LastRequests
//!  LastRequests  its time is up, or another signal            the end, threads are abandoned
//!  any           all threads have ended                       no mount: waits for the command
//!  no mount      no command, or its end                       the end
//! ```
//!
//! While there is a command, signals go to it, and its end begins the Stop.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::control::{AWAY, Control, SAME_WISH};
use super::stop::{RETRY, Stop};
use crate::export::Served;
use crate::mount::Mount;
use crate::mount::errands::{Errand, Running};
use crate::session::Session;
use crate::sys;

/// How long serving threads may take to end once the connection has ended, before the process ends
/// without them.
const LAST_REQUESTS: Duration = Duration::from_secs(5);

/// How a session ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// A thread failed.
    pub(super) failed: bool,
    /// Threads are still there; the mount is out of sight.
    pub(super) abandoned: bool,
    /// The exit status of the command of `--run`, or 0.
    pub(super) status: u8,
}

/// How far a session is, as long as there is its mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It is served, or about to be unmounted.
    Mounted,
    /// It was unmounted, and whoever has it open is served.
    Detached,
    /// Nobody is served any more. Threads that still wait for the source then are given up.
    LastRequests { until: Instant },
}

impl Control {
    /// Watches over a session until it has ended and its mount is gone, and the command of `--run`
    /// has ended too.
    pub(super) fn supervise<S: Served>(
        &mut self,
        mut session: Session,
        mount: Mount,
        export: &S,
    ) -> Ended {
        let mut failed = false;
        let mut status = 0;
        let mut mount = Some(mount);
        let mut phase = Phase::Mounted;
        loop {
            if let Some(ended) = self.command_status() {
                status = ended;
                self.stop.get_or_insert_with(|| Stop::now(&self.closed));
            }
            let next_look = self.follow_source(export);
            if session.has_failed()
                && !std::mem::replace(&mut failed, true)
                && let Some(mount) = &mount
            {
                self.stop.get_or_insert_with(|| Stop::now(&self.closed)).force(mount);
            }
            if session.has_ended() {
                // Unmounts, if the end came otherwise: an abort leaves the mount in its place.
                mount = None;
                if self.command.is_none() {
                    failed |= self.stop.as_ref().is_some_and(|stop| stop.has_failed);
                    return Ended { failed, abandoned: false, status };
                }
            }
            if self.stop.is_some() {
                self.service.stopping();
            }
            if let Some(mounted) = &mount {
                self.keep_size(mounted, export);
                if let Some(stop) = &mut self.stop {
                    if stop.is_by_signal && stop.began.elapsed() >= AWAY {
                        export.hurry();
                    }
                    stop.go_on(mounted, export.is_open(), export.cache());
                }
                if session.connection_has_ended() || self.stop.as_ref().is_some_and(Stop::is_forced)
                {
                    if !matches!(phase, Phase::LastRequests { .. }) {
                        phase = Phase::LastRequests { until: Instant::now() + LAST_REQUESTS };
                    }
                } else if !mounted.is_there() {
                    let elsewhere = mounted.elsewhere();
                    if phase == Phase::Mounted {
                        phase = Phase::Detached;
                        let path = mounted.path().display();
                        match elsewhere.first() {
                            Some(other) => log::info!("{path}: is at {} now", other.display()),
                            None => log::info!("{path}: unmounted"),
                        }
                    }
                    // Where others have moved or bound it, it is served as before, and whoever has
                    // it open is until the last close. Else only other mount namespaces have it, by
                    // a copy that nobody asked for.
                    if elsewhere.is_empty() && !export.is_open() {
                        self.stop.get_or_insert_with(|| Stop::now(&self.closed)).force(mounted);
                    }
                }
                let is_hurried = self.stop.as_ref().is_some_and(|stop| stop.is_hurried);
                if let Phase::LastRequests { until } = phase
                    && (is_hurried || Instant::now() >= until)
                {
                    let path = mounted.path().display();
                    log::warn!("{path}: requests in flight are abandoned");
                    drop(mount);
                    failed |= self.stop.as_ref().is_some_and(|stop| stop.has_failed);
                    return Ended { failed, abandoned: true, status };
                }
            }
            let looks = self.stop.is_some() || phase != Phase::Mounted;
            let retry = (looks && mount.is_some()).then_some(RETRY);
            let timeout = retry.or(next_look);
            let signal = self.wait(timeout).unwrap_or_else(|e| {
                log::error!("the control thread cannot wait: {e}");
                std::thread::sleep(RETRY);
                None
            });
            if let Some(signal) = signal {
                self.on_signal(signal, mount.as_ref());
            }
        }
    }

    /// Undoes what the kernel has made of the size for a write past the end.
    fn keep_size<S: Served>(&mut self, mount: &Mount, export: &S) {
        if let Some(outcome) = self.sizing.as_mut().and_then(Running::end) {
            self.sizing = None;
            match outcome {
                // It was unmounted meanwhile.
                Err(e) if e.raw_os_error() == Some(libc::ESTALE) => {}
                Err(e) => {
                    log::error!("{}: the kernel shows a wrong size: {e}", mount.path().display())
                }
                Ok(()) => {}
            }
        }
        if self.sizing.is_none()
            && let Some(size) = export.take_exceeded_size()
        {
            self.sizing = mount
                .begin(Errand::Size(size))
                .inspect_err(|e| log::error!("{}: its size: {e}", mount.path().display()))
                .ok();
        }
    }

    fn on_signal(&mut self, signal: sys::Signal, mount: Option<&Mount>) {
        log::info!("signal {}", signal.number);
        if let Some(command) = &self.command {
            // The command's end is ours; it may have something to tidy up. It has had the
            // terminal's Ctrl-C itself.
            if !signal.is_of_terminal()
                && let Some(number) = Signal::from_named_raw(signal.number)
                && let Err(e) = kill_process(Pid::from_child(command), number)
            {
                log::warn!("the command cannot be signalled: {e}");
            }
            return;
        }
        match (&mut self.stop, mount) {
            // A service manager, or timeout(1), signals a whole group: the same wish may come
            // twice.
            (Some(stop), _) if stop.is_by_signal && stop.began.elapsed() < SAME_WISH => {}
            (Some(stop), Some(mount)) if stop.is_by_signal => stop.force(mount),
            (stop, _) => {
                let stop = stop.get_or_insert_with(|| Stop::now(&self.closed));
                (stop.is_by_signal, stop.began) = (true, Instant::now());
            }
        }
    }

    /// The command's exit status, once, as a shell has it.
    fn command_status(&mut self) -> Option<u8> {
        let ended = self.command.as_mut()?.try_wait();
        let status = match ended {
            Ok(None) => return None,
            Ok(Some(status)) => {
                status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)) as u8
            }
            Err(e) => {
                log::error!("the command cannot be waited for: {e}");
                1
            }
        };
        self.command = None;
        Some(status)
    }
}
