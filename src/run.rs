//! One export from its beginning to its end: source → mount → session → stop → unmount → flush.
//!
//! This is the control thread. It waits for a signal or the end of the serving threads in a [`Poller`] of
//! its own: it must go on working whatever the serving threads and their reactors do. It is also the only
//! one that unmounts: the kernel holds an unmount until no request waits, so a thread that serves may not.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polling::{Event, Events, Poller};

use crate::backend::Backend;
use crate::backend::file::{self, FileBackend};
use crate::cli::{Config, Source, When};
use crate::export::{Export, Policy};
use crate::mount::{self, Mount, Mountpoint, Unmounted};
use crate::session::{self, Session};
use crate::stats::{Stats, Transport};
use crate::sys;

/// How long clients may go on after the first signal, before their file is taken away.
const GRACE: Duration = Duration::from_secs(3);
/// How often an unmount is tried again meanwhile.
const RETRY: Duration = Duration::from_millis(100);
/// How long serving threads may take to end once the connection has ended, before the process ends
/// without them.
const LAST_REQUESTS: Duration = Duration::from_secs(5);

/// The program's failures; each has an exit status.
#[derive(Debug)]
pub enum Failure {
    /// Status 1
    Serving(String),
    /// Status 3
    Source(String),
    /// Status 4
    Mount(String),
}

impl Failure {
    /// The exit status that scripts rely on.
    pub fn status(&self) -> u8 {
        match self {
            Failure::Serving(_) => 1,
            Failure::Source(_) => 3,
            Failure::Mount(_) => 4,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Serving(why) | Failure::Source(why) | Failure::Mount(why) => f.write_str(why),
        }
    }
}

/// Exports until the end.
pub fn run(config: &Config) -> Result<(), Failure> {
    // Before any thread is started, so that all of them leave these signals to the control thread.
    let control = Control::new().map_err(|e| Failure::Serving(format!("signals: {e}")))?;
    let options = file::Options { read_only: config.read_only, direct: config.direct };
    let backend = match &config.source {
        Source::Path(path) => FileBackend::open(path, options),
        Source::Memory(size) => FileBackend::memory(*size, options),
    };
    serve(config, backend.map_err(|e| Failure::Source(e.to_string()))?, control)
}

fn serve<B: Backend>(config: &Config, backend: Arc<B>, mut control: Control) -> Result<(), Failure> {
    let (uid, gid) = sys::effective_ids();
    let mountpoint = Mountpoint::prepare(&config.mountpoint).map_err(mount_failure)?;
    let read_only = config.read_only || backend.capabilities().read_only;
    let policy = |allow_other| Policy {
        writable: !read_only,
        growable: config.growable,
        allow_other,
        uid: config.uid.unwrap_or(uid),
        gid: config.gid.unwrap_or(gid),
    };
    let options = |allow_other| mount::Options {
        source: config.source.to_string(),
        read_only,
        allow_other,
    };
    let (mount, device, allow_other) = match config.allow_other {
        When::Off => mountpoint.mount(&options(false)).map(|(m, d)| (m, d, false)),
        When::On => mountpoint.mount(&options(true)).map(|(m, d)| (m, d, true)),
        When::Auto => match mountpoint.mount(&options(true)) {
            Ok((m, d)) => Ok((m, d, true)),
            Err(refused) => {
                log::info!("allow_other is not to be had: {refused}");
                let mountpoint = Mountpoint::prepare(&config.mountpoint).map_err(mount_failure)?;
                mountpoint.mount(&options(false)).map(|(m, d)| (m, d, false))
            }
        },
    }
    .map_err(mount_failure)?;

    let export = Export::new(backend, policy(allow_other))
        .map_err(|e| Failure::Source(format!("{}: {e}", config.source)))?;
    let export = Arc::new(export);
    let stats = Stats::default();
    let session_options = session::Options { io_uring: config.io_uring, queue_depth: config.queue_depth };
    let session = Session::start(device, &export, session_options, &stats, &control.poller)
        .map_err(|e| Failure::Mount(format!("{}: {e}", mount.path().display())))?;
    log::info!(
        "{} is at {}{}",
        config.source,
        mount.path().display(),
        if export.writable() { "" } else { ", read-only" }
    );

    let ended = control.supervise(session, mount);
    for transport in [Transport::Uring, Transport::Legacy] {
        log::info!("served by {}", stats.line(transport));
    }
    let flushed = export.last_flush();
    if let Err(e) = &flushed {
        log::debug!("last flush: {e}");
    }
    let result = match (ended, flushed) {
        (_, Err(e)) => Err(Failure::Serving(format!(
            "{}: the last flush failed, so writes may be lost: {e}",
            config.source
        ))),
        (Ended::Failed, _) => Err(Failure::Serving("it stopped serving, see above".into())),
        _ if export.flush_failed() => Err(Failure::Serving(format!(
            "{}: a flush failed while it was served, so writes may be lost",
            config.source
        ))),
        _ => Ok(()),
    };
    if ended == Ended::Abandoned {
        // Threads still use the lane and the connection: leave without their destructors.
        if let Err(failure) = &result {
            eprintln!("diskfuse: {failure}");
        }
        sys::exit_now(result.map_or_else(|failure| i32::from(failure.status()), |()| 0));
    }
    result
}

fn mount_failure(e: mount::MountError) -> Failure {
    Failure::Mount(e.to_string())
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// All threads have ended.
    Clean,
    /// A thread failed.
    Failed,
    /// Threads are still there; the mount is out of sight.
    Abandoned,
}

/// What the control thread waits for.
struct Control {
    poller: Arc<Poller>,
    signals: OwnedFd,
    events: Events,
}

impl Control {
    fn new() -> io::Result<Control> {
        let signals = sys::signal_fd(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
        let poller = Arc::new(Poller::new()?);
        // Deleted in `Drop`, before it is closed.
        sys::watch(&poller, &signals, Event::readable(0))?;
        Ok(Control { poller, signals, events: Events::new() })
    }

    /// Waits for a signal, a notification or the time-out; the signal if there was one.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Option<i32>> {
        self.events.clear();
        self.poller.wait(&mut self.events, timeout)?;
        // polling watches once only.
        self.poller.modify(&self.signals, Event::readable(0))?;
        sys::next_signal(&self.signals)
    }

    /// Watches over a session until it has ended and its mount is gone.
    fn supervise(&mut self, mut session: Session, mount: Mount) -> Ended {
        let mut failed = false;
        let mut stop: Option<Stop> = None;
        loop {
            if session.reap_failed() {
                failed = true;
                stop.get_or_insert_with(Stop::now).force(&mount);
            }
            if session.has_ended() {
                // Unmounts, if the end came otherwise: an abort leaves the mount in its place.
                drop(mount);
                return if failed { Ended::Failed } else { Ended::Clean };
            }
            if let Some(stop) = &mut stop {
                stop.go_on(&mount);
                if stop.is_over() {
                    log::warn!("{}: requests in flight are abandoned", mount.path().display());
                    drop(mount);
                    return if failed { Ended::Failed } else { Ended::Abandoned };
                }
            }
            let signal = self.wait(stop.is_some().then_some(RETRY)).unwrap_or_else(|e| {
                log::error!("the control thread cannot wait: {e}");
                std::thread::sleep(RETRY);
                None
            });
            if let Some(signal) = signal {
                log::info!("signal {signal}");
                match &mut stop {
                    None => stop = Some(Stop::now()),
                    Some(stop) => stop.force(&mount),
                }
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(e) = self.poller.delete(&self.signals) {
            log::error!("signals: {e}");
        }
    }
}

/// A stop under way: unmount when nobody uses the file, by force when time is up.
struct Stop {
    force_at: Instant,
    forced_at: Option<Instant>,
    reported: bool,
}

impl Stop {
    fn now() -> Stop {
        Stop { force_at: Instant::now() + GRACE, forced_at: None, reported: false }
    }

    fn go_on(&mut self, mount: &Mount) {
        if self.forced_at.is_some() {
            return;
        }
        if Instant::now() >= self.force_at {
            log::warn!("{}: still in use, taken away", mount.path().display());
            return self.force(mount);
        }
        match mount.try_unmount() {
            // The threads see the end of the connection by themselves.
            Ok(Unmounted::Gone) => {}
            Ok(Unmounted::Busy) => {
                if !std::mem::replace(&mut self.reported, true) {
                    log::warn!(
                        "{} is still in use: waiting {} s for it to be closed (a second signal ends it at once)",
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

    fn force(&mut self, mount: &Mount) {
        if self.forced_at.replace(Instant::now()).is_some() {
            // Asked again: do not wait for the requests in flight either.
            self.forced_at = Instant::now().checked_sub(LAST_REQUESTS);
            return;
        }
        if let Err(e) = mount.force_unmount() {
            log::error!("{}: cannot be unmounted: {e}", mount.path().display());
        }
    }

    fn is_over(&self) -> bool {
        self.forced_at.is_some_and(|at| at.elapsed() >= LAST_REQUESTS)
    }
}
