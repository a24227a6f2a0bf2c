//! What the control thread does while others serve.

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
        let mut is_detached = false;
        // When those that wait for the source are given up.
        let mut last_requests: Option<Instant> = None;
        loop {
            if let Some(ended) = self.command_status() {
                status = ended;
                self.stop.get_or_insert_with(|| Stop::now(&self.closed));
            }
            let next_look = self.follow_source(export);
            if session.reap_failed() {
                failed = true;
                if let Some(mount) = &mount {
                    self.stop.get_or_insert_with(|| Stop::now(&self.closed)).force(mount);
                }
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
                    last_requests.get_or_insert_with(|| Instant::now() + LAST_REQUESTS);
                } else if !mounted.is_there() {
                    if !std::mem::replace(&mut is_detached, true) {
                        log::info!("{}: unmounted", mounted.path().display());
                    }
                    // Whoever has it open is served until the last close. Else only other mount
                    // namespaces have it, by a copy that nobody asked for.
                    if !export.is_open() {
                        self.stop.get_or_insert_with(|| Stop::now(&self.closed)).force(mounted);
                    }
                }
                let is_hurried = self.stop.as_ref().is_some_and(|stop| stop.is_hurried);
                if last_requests.is_some_and(|at| is_hurried || Instant::now() >= at) {
                    let path = mounted.path().display();
                    log::warn!("{path}: requests in flight are abandoned");
                    drop(mount);
                    failed |= self.stop.as_ref().is_some_and(|stop| stop.has_failed);
                    return Ended { failed, abandoned: true, status };
                }
            }
            let looks = self.stop.is_some() || is_detached || last_requests.is_some();
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
