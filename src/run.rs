//! One export from its beginning to its end: source → mount → session → stop → unmount → flush.
//!
//! This is the control thread. It waits for a signal or the end of the serving threads in a [`Poller`] of
//! its own: it must go on working whatever the serving threads and their reactors do. It is also the only
//! one that unmounts: the kernel holds an unmount until no request waits, so a thread that serves may not.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use polling::{Event, Events, Poller};
use tempfile::TempDir;

use crate::backend::Backend;
use crate::backend::file::{self, FileBackend};
use crate::backend::nbd::{self, NbdBackend, Uri};
use crate::cli::{Config, Remote, Source, When};
use crate::daemon::{self, Background, Pidfile};
use crate::export::{Export, Policy};
use crate::info::{self, Listing, LocalInfo, RemoteInfo};
use crate::mount::{self, Mount, Mountpoint, Unmounted};
use crate::session::{self, Session};
use crate::stats::{Stats, Transport};
use crate::sys;

/// How long clients may go on after the first signal, before their file is taken away.
const GRACE: Duration = Duration::from_secs(3);
/// Signals that come within this time of the first are one.
const SAME_WISH: Duration = Duration::from_millis(100);
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

/// Exports until the end, and gives the exit status: that of the command in `--run`, else 0.
pub fn run(config: &Config, background: Option<Background>) -> Result<u8, Failure> {
    // Before any thread is started, so that all of them leave these signals to the control thread.
    let control = Control::new(config.run.is_some())
        .map_err(|e| Failure::Serving(format!("signals: {e}")))?;
    match &config.source {
        Source::Nbd(uri) => {
            let backend = NbdBackend::connect(uri, &nbd_options(&config.remote));
            serve(config, backend.map_err(|e| remote_failure(uri, &e))?, control, background)
        }
        Source::Path(path) => {
            let options = file::Options { read_only: config.read_only, direct: config.direct };
            let backend = FileBackend::open(path, options);
            serve(config, backend.map_err(local_failure)?, control, background)
        }
        Source::Memory(size) => {
            let backend = FileBackend::memory(*size, config.read_only);
            serve(config, backend.map_err(local_failure)?, control, background)
        }
    }
}

fn nbd_options(remote: &Remote) -> nbd::Options {
    nbd::Options {
        tls_certificates: remote.tls_certificates.clone(),
        connect_timeout: remote.connect_timeout,
    }
}

fn local_failure(e: file::OpenError) -> Failure {
    Failure::Source(e.to_string())
}

fn remote_failure(uri: &Uri, e: &nbd::Error) -> Failure {
    Failure::Source(format!("{uri}: {e}"))
}

/// What a source is, as text or JSON.
pub fn info(source: &Source, json: bool, remote: &Remote) -> Result<String, Failure> {
    let text = match source {
        Source::Nbd(uri) => {
            let export = nbd::info::info(uri, &nbd_options(remote));
            let export = export.map_err(|e| remote_failure(uri, &e))?;
            info::text(&RemoteInfo { source: uri.to_string(), kind: "nbd", export }, json)
        }
        Source::Path(path) => {
            let info = FileBackend::look_at(path).map_err(local_failure)?;
            info::text(&info, json)
        }
        Source::Memory(size) => {
            let backend = FileBackend::memory(*size, false).map_err(local_failure)?;
            let info = LocalInfo::of(source.to_string(), &backend);
            let info = info.map_err(|e| Failure::Source(format!("{source}: {e}")))?;
            info::text(&info, json)
        }
    };
    text.map_err(|e| Failure::Source(format!("{source}: {e}")))
}

/// What a server has, as text or JSON.
pub fn list(uri: &Uri, json: bool, remote: &Remote) -> Result<String, Failure> {
    let exports = nbd::info::list(uri, &nbd_options(remote));
    let exports = exports.map_err(|e| remote_failure(uri, &e))?;
    info::text(&Listing { exports }, json).map_err(|e| Failure::Source(format!("{uri}: {e}")))
}

/// The mountpoint that was asked for, or one of its own in a temporary folder that goes with it.
fn place(config: &Config) -> Result<(PathBuf, Option<TempDir>), Failure> {
    if let Some(path) = &config.mountpoint {
        return Ok((path.clone(), None));
    }
    let folder = tempfile::Builder::new().prefix("diskfuse-").tempdir();
    let folder = folder.map_err(|e| Failure::Mount(format!("a temporary folder: {e}")))?;
    let name = match &config.source {
        Source::Path(path) => path.file_name(),
        Source::Nbd(_) | Source::Memory(_) => None,
    };
    Ok((folder.path().join(name.unwrap_or("disk".as_ref())), Some(folder)))
}

/// Requests lie in memory at 4 KiB and multiples of it, and a request's longest payload is counted in pages.
fn check_page_size() -> Result<(), Failure> {
    match sys::page_size() {
        Ok(4096) => Ok(()),
        Ok(size) => Err(Failure::Mount(format!(
            "pages of {size} bytes: a kernel with pages of 4096 is needed"
        ))),
        Err(e) => Err(Failure::Mount(format!("the size of a page: {e}"))),
    }
}

/// Threads that serve need descriptors, and without them would fail one after the other behind a mount. Says whether
/// there are enough for rings.
fn allow_open_files(config: &Config) -> Result<When, Failure> {
    const IN_ALL: u64 = 32;
    const FOR_EACH_THREAD: u64 = 8;
    let limit = |threads: usize| {
        let wanted = IN_ALL + FOR_EACH_THREAD * threads as u64;
        match sys::allow_open_files(wanted) {
            Ok(allowed) if allowed < wanted => {
                Err(format!("{allowed} open files are not enough: {wanted} may be needed"))
            }
            Ok(_) => Ok(()),
            Err(e) => Err(format!("the limit of open files: {e}")),
        }
    };
    let workers = session::worker_count();
    limit(workers).map_err(|why| Failure::Mount(format!("{why} (a larger ulimit -n)")))?;
    if config.io_uring == When::Off {
        return Ok(When::Off);
    }
    match (limit(workers + sys::possible_cpus().unwrap_or(0)), config.io_uring) {
        (Ok(()), when) => Ok(when),
        (Err(why), When::Auto) => {
            log::warn!("serving by /dev/fuse, no FUSE over io_uring: {why} (a larger ulimit -n)");
            Ok(When::Off)
        }
        (Err(why), _) => Err(Failure::Mount(format!(
            "no FUSE over io_uring: {why} (a larger ulimit -n), or use --io-uring off"
        ))),
    }
}

fn serve<B: Backend>(
    config: &Config,
    backend: Arc<B>,
    mut control: Control,
    background: Option<Background>,
) -> Result<u8, Failure> {
    let mut pidfile =
        config.pidfile.as_deref().map(Pidfile::lock).transpose().map_err(Failure::Serving)?;
    check_page_size()?;
    let io_uring = allow_open_files(config)?;
    let (path, folder) = place(config)?;
    let read_only = config.read_only || backend.capabilities().read_only;
    let (mount, device, allow_other) = mount(config, &path, read_only)?;
    let (uid, gid) = sys::effective_ids();
    let policy = Policy {
        writable: !read_only,
        growable: config.growable,
        truncate: config.truncate,
        allow_other,
        uid: config.uid.unwrap_or(uid),
        gid: config.gid.unwrap_or(gid),
    };
    let export = Export::new(backend, policy, control.closed.clone())
        .map_err(|e| Failure::Source(format!("{}: {e}", config.source)))?;
    let export = Arc::new(export);
    let stats = Stats::default();
    let options = session::Options { io_uring, queue_depth: config.queue_depth };
    let session = Session::start(device, &export, options, &stats, &control.poller)
        .map_err(|e| Failure::Mount(format!("{}: {e}", mount.path().display())))?;
    log::info!(
        "{} is at {}{}",
        config.source,
        mount.path().display(),
        if export.writable() { "" } else { ", read-only" }
    );

    let announced = control.announce(config, mount.path(), &mut pidfile, background);
    if announced.is_err() {
        control.stop_at_once();
    }
    let ended = control.supervise(session, mount);
    for transport in [Transport::Uring, Transport::Legacy] {
        log::info!("served by {}", stats.line(transport));
    }
    let result = announced.and_then(|()| verdict(config, &export, &ended)).map(|()| ended.status);
    if ended.abandoned {
        // Threads still use the lane and the connection: leave without their destructors.
        drop((pidfile, folder));
        if let Err(failure) = &result {
            daemon::say(&failure.to_string());
        }
        sys::exit_now(i32::from(result.unwrap_or_else(|failure| failure.status())));
    }
    result
}

/// The last flush, and whether all is well.
fn verdict<B: Backend>(config: &Config, export: &Export<B>, ended: &Ended) -> Result<(), Failure> {
    let source = &config.source;
    if let Err(e) = export.last_flush() {
        return Err(Failure::Serving(format!(
            "{source}: the last flush failed, so writes may be lost: {e}"
        )));
    }
    if export.flush_failed() {
        return Err(Failure::Serving(format!(
            "{source}: a flush failed while it was served, so writes may be lost"
        )));
    }
    if ended.failed {
        return Err(Failure::Serving(format!("{source}: no longer served, see above")));
    }
    Ok(())
}

fn mount(config: &Config, path: &Path, read_only: bool) -> Result<(Mount, OwnedFd, bool), Failure> {
    let attempt = |allow_other| {
        let source = config.source.to_string();
        let options = mount::Options { source, read_only, allow_other };
        let mounted = Mountpoint::prepare(path).and_then(|mountpoint| mountpoint.mount(&options));
        mounted.map(|(mount, device)| (mount, device, allow_other))
    };
    match config.allow_other {
        When::Off => attempt(false),
        When::On => attempt(true),
        When::Auto => attempt(true).or_else(|refused| {
            log::info!("allow_other is not to be had: {refused}");
            attempt(false)
        }),
    }
    .map_err(|e| Failure::Mount(e.to_string()))
}

/// How a session ended.
#[derive(Debug)]
struct Ended {
    /// A thread failed.
    failed: bool,
    /// Threads are still there; the mount is out of sight.
    abandoned: bool,
    /// The exit status of the command of `--run`, or 0.
    status: u8,
}

/// What the control thread waits for.
struct Control {
    poller: Arc<Poller>,
    signals: OwnedFd,
    signals_before: sys::Signals,
    events: Events,
    /// The command of `--run`.
    command: Option<Child>,
    stop: Option<Stop>,
    /// The file was taken away: the export answers nobody any more.
    closed: Arc<AtomicBool>,
}

impl Control {
    fn new(watch_command: bool) -> io::Result<Control> {
        let mut signals = vec![libc::SIGINT, libc::SIGTERM];
        // Under nohup(1) it goes on when the terminal is gone; a descriptor reads even what is ignored.
        signals.extend((!sys::is_ignored(libc::SIGHUP)).then_some(libc::SIGHUP));
        signals.extend(watch_command.then_some(libc::SIGCHLD));
        let (signals, signals_before) = sys::signal_fd(&signals)?;
        let poller = Arc::new(Poller::new()?);
        // Deleted in `Drop`, before it is closed.
        sys::watch(&poller, &signals, Event::readable(0))?;
        Ok(Control {
            poller,
            signals,
            signals_before,
            events: Events::new(),
            command: None,
            stop: None,
            closed: Arc::default(),
        })
    }

    /// Waits for a signal, a notification or the time-out; the signal to stop, if there was one.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Option<sys::Signal>> {
        self.events.clear();
        self.poller.wait(&mut self.events, timeout)?;
        // polling watches once only.
        self.poller.modify(&self.signals, Event::readable(0))?;
        let signal = sys::next_signal(&self.signals)?;
        Ok(signal.filter(|signal| signal.number != libc::SIGCHLD))
    }

    /// Tells whoever waits for it that the file can be used: the pidfile, the foreground process, the command
    /// of `--run`.
    fn announce(
        &mut self,
        config: &Config,
        path: &Path,
        pidfile: &mut Option<Pidfile>,
        background: Option<Background>,
    ) -> Result<(), Failure> {
        if pidfile.is_none() && background.is_none() && config.run.is_none() {
            return Ok(());
        }
        self.check_io(path)
            .map_err(|e| Failure::Serving(format!("{} cannot be read: {e}", config.source)))?;
        if let Some(pidfile) = pidfile {
            pidfile.write().map_err(|e| Failure::Serving(format!("pidfile: {e}")))?;
        }
        if let Some(background) = background {
            background.ready().map_err(|e| Failure::Serving(format!("background: {e}")))?;
        }
        if let Some(command) = &config.run {
            let mut shell = std::process::Command::new("/bin/sh");
            shell.arg("-c").arg(command).env("DISKFUSE_FILE", path);
            sys::restore_signals(&mut shell, self.signals_before);
            let child =
                shell.spawn().map_err(|e| Failure::Serving(format!("--run {command}: {e}")))?;
            self.command = Some(child);
        }
        Ok(())
    }

    /// Reads the first bytes as a client would, on another thread: a signal ends the wait.
    fn check_io(&mut self, path: &Path) -> io::Result<()> {
        let (sender, receiver) = mpsc::channel();
        let (path, poller) = (path.to_owned(), self.poller.clone());
        std::thread::Builder::new().name("check".into()).spawn(move || {
            let mut first = [0; 4096];
            let read = File::open(path).and_then(|file| file.read_at(&mut first, 0));
            // Nobody listens any more after a signal.
            let _ = sender.send(read.map(drop));
            let _ = poller.notify();
        })?;
        loop {
            if let Ok(result) = receiver.try_recv() {
                return result;
            }
            if let Some(signal) = self.wait(None)? {
                return Err(io::Error::other(format!("stopped by signal {}", signal.number)));
            }
        }
    }

    fn stop_at_once(&mut self) {
        self.stop = Some(Stop { force_at: Instant::now(), ..Stop::now(&self.closed) });
    }

    /// Watches over a session until it has ended and its mount is gone, and the command of `--run` has
    /// ended too.
    fn supervise(&mut self, mut session: Session, mount: Mount) -> Ended {
        let mut failed = false;
        let mut status = 0;
        let mut mount = Some(mount);
        loop {
            if let Some(ended) = self.command_status() {
                status = ended;
                self.stop.get_or_insert_with(|| Stop::now(&self.closed));
            }
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
                    return Ended { failed, abandoned: false, status };
                }
            }
            if let (Some(stop), Some(mounted)) = (&mut self.stop, &mount) {
                stop.go_on(mounted);
                if stop.is_over() {
                    let path = mounted.path().display();
                    log::warn!("{path}: requests in flight are abandoned");
                    drop(mount);
                    return Ended { failed, abandoned: true, status };
                }
            }
            let timeout = (self.stop.is_some() && mount.is_some()).then_some(RETRY);
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

    fn on_signal(&mut self, signal: sys::Signal, mount: Option<&Mount>) {
        log::info!("signal {}", signal.number);
        if let Some(command) = &self.command {
            // The command's end is ours; it may have something to tidy up. It has had the terminal's Ctrl-C itself.
            if !signal.by_kernel
                && let Err(e) = sys::kill(command.id(), signal.number)
            {
                log::warn!("the command cannot be signalled: {e}");
            }
            return;
        }
        match (&mut self.stop, mount) {
            // A service manager, or timeout(1), signals a whole group: the same wish may come twice.
            (Some(stop), _) if stop.began.elapsed() < SAME_WISH => {}
            (Some(stop), Some(mount)) => stop.force(mount),
            (stop, _) => _ = stop.get_or_insert_with(|| Stop::now(&self.closed)),
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

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(e) = self.poller.delete(&self.signals) {
            log::error!("signals: {e}");
        }
    }
}

/// A stop under way: unmount when nobody uses the file, by force when time is up.
#[derive(Debug)]
struct Stop {
    began: Instant,
    force_at: Instant,
    forced_at: Option<Instant>,
    reported: bool,
    closed: Arc<AtomicBool>,
}

impl Stop {
    fn now(closed: &Arc<AtomicBool>) -> Stop {
        let now = Instant::now();
        Stop {
            began: now,
            force_at: now + GRACE,
            forced_at: None,
            reported: false,
            closed: closed.clone(),
        }
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
        // For an ordinary user the connection goes on until the last close; its requests do not.
        self.closed.store(true, Ordering::Release);
    }

    fn is_over(&self) -> bool {
        self.forced_at.is_some_and(|at| at.elapsed() >= LAST_REQUESTS)
    }
}
