//! One export from its beginning to its end: source → mount → session → stop → unmount → flush.
//!
//! This is the control thread. It waits for a signal or the end of the serving threads in a [`Poller`] of
//! its own: it must go on working whatever the serving threads and their reactors do. It is also the only
//! one that unmounts: the kernel holds an unmount until no request waits, so a thread that serves may not.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use polling::{Event, Events, Poller};

use crate::backend::Backend;
use crate::backend::file::{self, FileBackend};
use crate::backend::nbd::info::ExportInfo;
use crate::backend::nbd::{self, NbdBackend, Uri};
use crate::backend::part::Part;
use crate::cli::{CacheWish, Config, Source, When};
use crate::daemon::{Background, Pidfile};
use crate::errands::{Errand, Running};
use crate::export::{Cache, Export, Policy};
use crate::info::{self, Listing, LocalInfo, RemoteInfo};
use crate::mount::{self, Mount, Mountpoint, Unmounted};
use crate::own_folder::OwnFolder;
use crate::partitions::{self, Table};
use crate::report::Reporter;
use crate::server::Server;
use crate::service::Service;
use crate::session::{self, Session};
use crate::signals::{Signals, Wish};
use crate::stats::{Stats, Transport};
use crate::{hints, logging, privileges, sys};

/// How long clients may go on after the first signal, before their file is taken away.
const GRACE: Duration = Duration::from_secs(3);
/// Signals that come within this time of the first are one.
const SAME_WISH: Duration = Duration::from_millis(100);
/// How often an unmount is tried again meanwhile.
const RETRY: Duration = Duration::from_millis(100);
/// How long serving threads may take to end once the connection has ended, before the process ends
/// without them.
const LAST_REQUESTS: Duration = Duration::from_secs(5);
/// How long a source that is away is waited for after a signal.
const AWAY: Duration = Duration::from_millis(500);
/// A server's time for the last flush once it can be reached, and some more.
const FLUSH: Duration = Duration::from_secs(150);
/// A last flush that takes longer is reported.
const LONG_FLUSH: Duration = Duration::from_secs(2);

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
    logging::set_name(&config.words);
    // Before any thread is started, as what follows: they inherit it.
    let io_flusher = sys::become_io_flusher();
    // It is a program like any other, with what this one was started with.
    let server = match &config.source {
        Source::Server(command) => {
            let server = Server::start(command, config.words.clone());
            Some(server.map_err(Failure::Source)?)
        }
        Source::Nbd(_) | Source::Path(_) | Source::Memory(_) => None,
    };
    let given_up = privileges::give_up(config.run.is_some(), server.is_some());
    // So that all of them leave these signals to the control thread.
    let mut control = Control::new(config.words.clone(), matches!(io_flusher, Ok(true)))
        .map_err(|e| Failure::Serving(format!("signals: {e}")))?;
    control.server = server;
    // Nothing is logged before this: it might not be read.
    logging::write_from_a_thread().map_err(|e| Failure::Serving(format!("the log: {e}")))?;
    if let Err(e) = io_flusher {
        log::info!("clients in this memory cgroup can come to wait for memory for ever: {e}");
    }
    if let Err(e) = given_up {
        log::warn!("privileges that are not needed could not be given up: {e}");
    }
    if let Some(server) = &mut control.server {
        server.show_words().map_err(|e| Failure::Serving(format!("no thread: {e}")))?;
    }
    let stopped = |signal| stopped_while_opened(&config.words, signal);
    let connect = |to: Uri| {
        let options = config.remote.clone();
        move || NbdBackend::connect(&to, &options)
    };
    match config.source.clone() {
        Source::Nbd(uri) => {
            let mut to = uri.clone();
            if config.daemonize {
                // It goes on connecting when it has left its folder. (Certificates are read once, before that.)
                let anywhere = to.from_anywhere();
                to = anywhere.map_err(|e| Failure::Source(format!("{uri}: its socket: {e}")))?;
            }
            let backend = control.unless_signalled("connect", connect(to)).map_err(stopped)?;
            serve_part(config, backend.map_err(|e| remote_failure(&uri, &e))?, control, background)
        }
        Source::Server(_) => {
            let uri = control.server().uri();
            let backend = control.unless_signalled("connect", connect(uri)).map_err(stopped)?;
            let backend = backend.map_err(|e| Failure::Source(control.server().failure(&e)))?;
            serve_part(config, backend, control, background)
        }
        Source::Path(path) => {
            let options = file::Options { read_only: config.read_only, direct: config.direct };
            let named = path.clone();
            let open = move || {
                let backend = FileBackend::open(&path, options)?;
                Ok((backend, hints::other_format(&path)))
            };
            let opened = control.unless_signalled("open", open).map_err(stopped)?;
            let (backend, warning) = opened.map_err(|e| path_failure(&named, &e))?;
            if let Some(warning) = warning {
                log::warn!("{warning}");
            }
            serve_part(config, backend, control, background)
        }
        Source::Memory(size) => {
            let backend = FileBackend::memory(size, config.read_only);
            serve_part(config, backend.map_err(local_failure)?, control, background)
        }
    }
}

fn stopped_while_opened(source: &str, signal: sys::Signal) -> Failure {
    let number = signal.number;
    Failure::Source(format!("{source}: stopped by signal {number} while it was opened"))
}

fn local_failure(e: file::OpenError) -> Failure {
    Failure::Source(e.to_string())
}

fn path_failure(path: &Path, e: &file::OpenError) -> Failure {
    Failure::Source(match hints::remote(path).filter(|_| !path.exists()) {
        Some(uri) => format!("{e}; for another host's disk say {uri}"),
        None => e.to_string(),
    })
}

fn remote_failure(uri: &Uri, e: &nbd::Error) -> Failure {
    Failure::Source(format!("{uri}: {e}"))
}

/// What a source is, as text or JSON.
pub fn info(
    source: &Source,
    words: &str,
    json: bool,
    remote: &nbd::Options,
) -> Result<String, Failure> {
    let remote_info = |uri: &Uri, export| {
        let partition_table = remote_table(uri, words, &export, remote);
        let source = words.into();
        info::text(&RemoteInfo { source, kind: "nbd", export, partition_table }, json)
    };
    let text = match source {
        Source::Nbd(uri) => {
            let export = nbd::info::info(uri, remote);
            remote_info(uri, export.map_err(|e| remote_failure(uri, &e))?)
        }
        Source::Server(command) => {
            let server = Server::start(command, words.into());
            let mut server = server.map_err(Failure::Source)?;
            server.show_words().map_err(|e| Failure::Serving(format!("no thread: {e}")))?;
            let export = nbd::info::info(&server.uri(), remote);
            let export = export.map_err(|e| Failure::Source(server.failure(&e)))?;
            remote_info(&server.uri(), export)
        }
        Source::Path(path) => {
            let info = FileBackend::look_at(path).map_err(|e| path_failure(path, &e))?;
            if let Some(warning) = hints::other_format(path) {
                log::warn!("{warning}");
            }
            info::text(&info, json)
        }
        Source::Memory(size) => {
            let backend = FileBackend::memory(*size, false).map_err(local_failure)?;
            let info = LocalInfo::of(words.into(), &backend);
            let info = info.map_err(|e| Failure::Source(format!("{words}: {e}")))?;
            info::text(&info, json)
        }
    };
    text.map_err(|e| Failure::Source(format!("{words}: {e}")))
}

/// The partition table of an export, for which that has to be opened.
fn remote_table(
    uri: &Uri,
    words: &str,
    export: &ExportInfo,
    remote: &nbd::Options,
) -> Option<Table> {
    if export.size == 0 {
        return None;
    }
    let opened = NbdBackend::connect(uri, remote);
    let opened = opened.inspect_err(|e| log::warn!("{words}: its partition table: {e}")).ok()?;
    let table = info::partition_table(words, &*opened);
    // Nothing was written, so that this only says goodbye.
    let _ = opened.last_flush(Duration::ZERO);
    table
}

/// What a server has, as text or JSON.
pub fn list(uri: &Uri, json: bool, remote: &nbd::Options) -> Result<String, Failure> {
    let exports = nbd::info::list(uri, remote);
    let exports = exports.map_err(|e| remote_failure(uri, &e))?;
    info::text(&Listing { exports }, json).map_err(|e| Failure::Source(format!("{uri}: {e}")))
}

/// The mountpoint that was asked for, or one of its own in a temporary folder that goes with it.
fn place(config: &Config) -> Result<(PathBuf, Option<OwnFolder>), Failure> {
    if let Some(path) = &config.mountpoint {
        return Ok((path.clone(), None));
    }
    let name = match &config.source {
        Source::Path(path) => path.file_name(),
        Source::Nbd(_) | Source::Memory(_) | Source::Server(_) => None,
    };
    let folder = OwnFolder::new(name.unwrap_or("disk".as_ref()).as_ref());
    let folder = folder.map_err(|e| Failure::Mount(format!("a temporary folder: {e}")))?;
    Ok((folder.mountpoint().to_owned(), Some(folder)))
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
    match (limit(workers + session::ring_thread_count()), config.io_uring) {
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

/// Serves the part of the source that is wanted, or all of it. A part is another type: what serves whole disks has nothing
/// to add and to compare.
fn serve_part<B: Backend>(
    config: &Config,
    whole: Arc<B>,
    mut control: Control,
    background: Option<Background>,
) -> Result<u8, Failure> {
    let Some(wanted) = config.part else { return serve(config, whole, control, background) };
    let source = &config.words;
    let find = move || {
        let range = partitions::find(&*whole, wanted)?;
        Part::new(whole, range).map_err(|e| e.to_string())
    };
    let part = control
        .unless_signalled("part", find)
        .map_err(|signal| stopped_while_opened(source, signal))?
        .map_err(|why| Failure::Source(format!("{source}: {why}")))?;
    log::info!("{source}: {part} are shown");
    serve(config, part, control, background)
}

fn serve<B: Backend>(
    config: &Config,
    backend: Arc<B>,
    mut control: Control,
    background: Option<Background>,
) -> Result<u8, Failure> {
    check_page_size()?;
    let io_uring = allow_open_files(config)?;
    let (path, folder) = place(config)?;
    let prepare = |path: PathBuf| move || Mountpoint::prepare(&path);
    let mountpoint = control
        .unless_signalled("mountpoint", prepare(path.clone()))
        .map_err(|signal| Failure::Mount(format!("stopped by signal {}", signal.number)))?
        .map_err(|e| Failure::Mount(e.to_string()))?;
    let lock = config.pidfile.clone().map(|path| move || Pidfile::lock(&path));
    let mut pidfile = match lock {
        Some(lock) => Some(
            control
                .unless_signalled("pidfile", lock)
                .map_err(|signal| Failure::Serving(format!("stopped by signal {}", signal.number)))?
                .map_err(Failure::Serving)?,
        ),
        None => None,
    };
    let read_only = config.read_only || backend.capabilities().read_only;
    let (mount, device, allow_other) = mount(config, mountpoint, &path, read_only)?;
    let (uid, gid) = sys::effective_ids();
    let policy = Policy {
        writable: !read_only,
        growable: config.growable,
        truncate: config.truncate,
        cache: cache(config),
        keep_cache: config.kernel_cache,
        allow_other,
        uid: config.uid.unwrap_or(uid),
        gid: config.gid.unwrap_or(gid),
    };
    let export = Export::new(backend, policy, control.closed.clone())
        .map_err(|e| Failure::Source(format!("{}: {e}", config.words)))?;
    let export = Arc::new(export);
    export.set_control(control.poller.clone());
    let stats = Arc::<Stats>::default();
    export.set_reporter(Reporter { source: config.words.clone(), stats: stats.clone() });
    let reporting = export.clone();
    control.report = Box::new(move || reporting.report().unwrap_or_default());
    let options = session::Options {
        io_uring,
        queue_depth: config.queue_depth,
        read_ahead: config.read_ahead,
    };
    let start = {
        let (export, stats, poller) = (export.clone(), stats.clone(), control.poller.clone());
        move || Session::start(device, &export, options, &stats, &poller)
    };
    let started = match control.unless_signalled("start", start) {
        Ok(started) => started,
        Err(signal) => Err(format!("stopped by signal {}", signal.number)),
    };
    let session = match started {
        Ok(session) => session,
        Err(why) => {
            let failure = Failure::Mount(format!("{}: {why}", mount.path().display()));
            drop(mount);
            // It may have been served for a moment.
            return control.last_flush(config, &export).and(Err(failure));
        }
    };
    if config.kernel_cache && export.cache() == Cache::None {
        log::warn!(
            "--kernel-cache: there is no page cache in front of a local disk (see --cache writethrough)"
        );
    }
    if export.cache() != Cache::None {
        // The kernel's own reads straight into the page cache. Who may not set it has only its default of 128 KiB.
        if let Err(e) = mount.set_read_ahead(config.read_ahead) {
            log::info!("the kernel's read-ahead stays as it is: {e}");
            export.backend().set_read_ahead(config.read_ahead);
        }
    }
    let announced = control
        .tell_size(&mount, &export)
        .inspect(|()| log_place(config, mount.path(), export.writable()))
        .and_then(|()| control.announce(config, &mount, &mut pidfile, background));
    if announced.is_err() {
        control.stop_at_once();
    }
    let ended = control.supervise(session, mount, &export);
    if let Some(pidfile) = &pidfile {
        pidfile.ending();
    }
    for transport in [Transport::Uring, Transport::Legacy] {
        log::info!("served by {}", stats.line(transport));
    }
    // What others have written meanwhile is flushed in every case.
    let flushed = control.last_flush(config, &export);
    control.end_server();
    let result = match (announced, flushed) {
        (Err(failure), flushed) => {
            if let Err(also) = flushed {
                log::error!("{also}");
            }
            Err(failure)
        }
        (Ok(()), flushed) => flushed.and_then(|()| verdict(config, &export, &ended)),
    };
    let result = result.map(|()| ended.status);
    if ended.abandoned || control.is_abandoned {
        // Threads still use the lane and the connection: leave without their destructors.
        drop((pidfile, folder));
        if let Err(failure) = &result {
            logging::say(log::Level::Error, &failure.to_string());
        }
        logging::finish();
        sys::exit_now(i32::from(result.unwrap_or_else(|failure| failure.status())));
    }
    result
}

fn log_place(config: &Config, path: &Path, writable: bool) {
    let read_only = if writable { "" } else { ", read-only" };
    log::info!("{} is at {}{read_only}", config.words, path.display());
}

/// The page cache that is asked for: by default in front of remote disks. A local image's pages are in memory already,
/// and its other users see what is changed here, and the other way round.
fn cache(config: &Config) -> Cache {
    match (config.cache, &config.source) {
        (CacheWish::Auto, Source::Nbd(_) | Source::Server(_)) => Cache::Writethrough,
        (CacheWish::Auto, Source::Path(_) | Source::Memory(_)) => Cache::None,
        (CacheWish::Is(cache), _) => cache,
    }
}

/// Whether all was well.
fn verdict<B: Backend>(config: &Config, export: &Export<B>, ended: &Ended) -> Result<(), Failure> {
    let source = &config.words;
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

/// How often a mount is tried if the mountpoint vanishes: each time a diskfuse before this one has removed it at its end.
const MOUNT_ATTEMPTS: usize = 10;

fn mount(
    config: &Config,
    mountpoint: Mountpoint,
    path: &Path,
    read_only: bool,
) -> Result<(Mount, OwnedFd, bool), Failure> {
    let mut mountpoint = Some(mountpoint);
    let mut attempt = |allow_other| {
        let source = config.words.clone();
        let options = mount::Options { source, read_only, allow_other };
        for attempts_left in (0..MOUNT_ATTEMPTS).rev() {
            let prepared = mountpoint.take().map_or_else(|| Mountpoint::prepare(path), Ok)?;
            match prepared.mount(&options) {
                Ok((mount, device)) => return Ok((mount, device, allow_other)),
                Err((_, prepared)) if prepared.has_vanished() && attempts_left > 0 => {}
                Err((why, prepared)) => {
                    mountpoint = Some(prepared);
                    return Err(why);
                }
            }
        }
        unreachable!("the last attempt returns")
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
    signals: Signals,
    /// For SIGUSR1.
    report: Box<dyn Fn() -> String>,
    service: Service,
    /// Tells when something is mounted or unmounted here.
    mounts: File,
    /// The command of `--run` would inherit it.
    became_io_flusher: bool,
    events: Events,
    /// The command of `--run`.
    command: Option<Child>,
    /// The source's.
    server: Option<Server>,
    /// Gives the kernel the size back.
    sizing: Option<Running>,
    stop: Option<Stop>,
    /// The file was taken away: the export answers nobody any more.
    closed: Arc<AtomicBool>,
    /// A thread was left at work that does not come to an end.
    is_abandoned: bool,
}

/// The sources that are watched.
const SIGNALS: usize = 0;
const MOUNTS: usize = 1;

impl Control {
    fn new(source: String, became_io_flusher: bool) -> io::Result<Control> {
        let signals = Signals::take()?;
        let mounts = File::open("/proc/self/mountinfo")?;
        let poller = Arc::new(Poller::new()?);
        // Deleted in `Drop`, before they are closed.
        sys::watch(&poller, signals.descriptor(), Event::readable(SIGNALS))?;
        sys::watch(&poller, &mounts, Event::none(MOUNTS).with_priority())?;
        Ok(Control {
            poller,
            signals,
            report: Box::new(move || format!("{source}: nothing is served yet")),
            service: Service::of_environment(),
            mounts,
            became_io_flusher,
            events: Events::new(),
            command: None,
            server: None,
            sizing: None,
            stop: None,
            closed: Arc::default(),
            is_abandoned: false,
        })
    }

    /// Waits for a signal, a notification, a change of the mounts or the time-out; the signal to stop, if there was one.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Option<sys::Signal>> {
        self.events.clear();
        let timeout = match (timeout, self.service.patience()) {
            (Some(timeout), Some(patience)) => Some(timeout.min(patience)),
            (timeout, patience) => timeout.or(patience),
        };
        self.poller.wait(&mut self.events, timeout)?;
        self.service.feed();
        // polling watches once only.
        self.poller.modify(self.signals.descriptor(), Event::readable(SIGNALS))?;
        if self.events.iter().any(|event| event.key == MOUNTS) {
            self.poller.modify(&self.mounts, Event::none(MOUNTS).with_priority())?;
        }
        let signal = self.signals.next()?;
        if signal.is_some_and(|signal| signal.wish() == Wish::Statistics) {
            // It was asked for: whatever RUST_LOG says.
            logging::say(log::Level::Info, &(self.report)());
        }
        Ok(signal.filter(|signal| signal.wish() == Wish::End))
    }

    /// Runs `work`, which may block for long, on a thread of its own, and gives it up for a signal.
    fn unless_signalled<T: Send + 'static>(
        &mut self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, sys::Signal> {
        let (sender, receiver) = mpsc::channel();
        let poller = self.poller.clone();
        let work = move || {
            // Nobody listens any more after a signal.
            let _ = sender.send(work());
            let _ = poller.notify();
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(work);
        // What it lacks, a thread that serves would lack as well.
        let thread = thread.unwrap_or_else(|e| panic!("a thread cannot be started: {e}"));
        loop {
            match receiver.try_recv() {
                Ok(result) => {
                    let _ = thread.join();
                    return Ok(result);
                }
                Err(mpsc::TryRecvError::Empty) => {}
                // It has panicked, and said why.
                Err(mpsc::TryRecvError::Disconnected) => {
                    std::panic::resume_unwind(thread.join().expect_err("it has sent nothing"))
                }
            }
            match self.wait(None) {
                Ok(None) => {}
                Ok(Some(signal)) => return Err(signal),
                Err(e) => {
                    log::error!("the control thread cannot wait: {e}");
                    std::thread::sleep(RETRY);
                }
            }
        }
    }

    /// Flushes what was written and disconnects from the source: when nobody is served any more. A signal after the one
    /// that has ended the export gives it up.
    fn last_flush<B: Backend>(
        &mut self,
        config: &Config,
        export: &Arc<Export<B>>,
    ) -> Result<(), Failure> {
        let (sender, receiver) = mpsc::channel();
        let (flushing, poller) = (export.clone(), self.poller.clone());
        let is_by_signal = self.stop.as_ref().is_some_and(|stop| stop.is_by_signal);
        let patience = if is_by_signal { AWAY } else { config.remote.reconnect_timeout };
        let work = move || {
            let _ = sender.send(flushing.last_flush(patience));
            let _ = poller.notify();
        };
        self.service.flushing(patience + FLUSH);
        let source = &config.words;
        if let Err(e) = std::thread::Builder::new().name("flush".into()).spawn(work) {
            return Err(Failure::Serving(format!("{source}: not flushed: no thread: {e}")));
        }
        let began = Instant::now();
        let mut reported = false;
        loop {
            if let Ok(flushed) = receiver.try_recv() {
                return flushed.map_err(|e| {
                    Failure::Serving(format!(
                        "{source}: the last flush failed, so writes may be lost: {e}"
                    ))
                });
            }
            if began.elapsed() >= LONG_FLUSH && !std::mem::replace(&mut reported, true) {
                log::warn!("{source}: the last flush takes long (a second signal gives it up)");
            }
            let timeout = (!reported).then_some(LONG_FLUSH);
            let signal = self.wait(timeout).unwrap_or_else(|e| {
                log::error!("the control thread cannot wait: {e}");
                std::thread::sleep(RETRY);
                None
            });
            if signal.is_none() {
                continue;
            }
            match &self.stop {
                Some(stop) if stop.is_by_signal && stop.began.elapsed() < SAME_WISH => {}
                Some(stop) if stop.is_by_signal => {
                    self.is_abandoned = true;
                    return Err(Failure::Serving(format!(
                        "{source}: the last flush was given up for a signal, so writes may be lost"
                    )));
                }
                _ => {
                    log::warn!("{source}: flushing what was written (a second signal gives it up)");
                    self.stop = Some(Stop::by_signal(&self.closed));
                }
            }
        }
    }

    /// With write-back: lets files be opened once the kernel knows the size.
    fn tell_size<B: Backend>(&mut self, mount: &Mount, export: &Export<B>) -> Result<(), Failure> {
        if export.cache() != Cache::Writeback {
            return Ok(());
        }
        let told = self.run_errand(Errand::Size(export.backend().size()), mount);
        export.size_is_known();
        told.map_err(|e| {
            let path = mount.path().display();
            Failure::Serving(format!("{path}: --cache writeback: the size cannot be set: {e}"))
        })
    }

    /// Tells whoever waits for it that the file can be used: the pidfile, the foreground process, the service manager,
    /// the command of `--run`.
    fn announce(
        &mut self,
        config: &Config,
        mount: &Mount,
        pidfile: &mut Option<Pidfile>,
        background: Option<Background>,
    ) -> Result<(), Failure> {
        let is_awaited = pidfile.is_some() || background.is_some() || config.run.is_some();
        if !is_awaited && !self.service.is_there() {
            return Ok(());
        }
        self.run_errand(Errand::Read, mount)
            .map_err(|e| Failure::Serving(format!("{} cannot be read: {e}", config.words)))?;
        if let Some(pidfile) = pidfile {
            pidfile.write().map_err(|e| Failure::Serving(format!("pidfile: {e}")))?;
        }
        if let Some(background) = background {
            background.ready().map_err(|e| Failure::Serving(format!("background: {e}")))?;
        }
        self.service.ready(&format!("{} is at {}", config.words, mount.path().display()));
        if let Some(command) = &config.run {
            let mut shell = Command::new("/bin/sh");
            shell.arg("-c").arg(command).env("DISKFUSE_FILE", mount.path());
            sys::restore_signals(&mut shell, self.signals.before());
            if self.became_io_flusher {
                sys::end_io_flusher(&mut shell);
            }
            let child =
                shell.spawn().map_err(|e| Failure::Serving(format!("--run {command}: {e}")))?;
            self.command = Some(child);
        }
        Ok(())
    }

    /// Waits for an errand on the mount. A signal ends the wait.
    fn run_errand(&mut self, errand: Errand, mount: &Mount) -> io::Result<()> {
        let mut running = mount.begin(errand)?;
        loop {
            if let Some(outcome) = running.end() {
                return outcome;
            }
            if let Some(signal) = self.wait(None)? {
                running.give_up();
                self.stop = Some(Stop::by_signal(&self.closed));
                return Err(io::Error::other(format!("stopped by signal {}", signal.number)));
            }
        }
    }

    /// Where the source is a server of our own.
    fn server(&mut self) -> &mut Server {
        self.server.as_mut().expect("it was started before anything else")
    }

    /// After the last flush. A signal after the one that has ended the export ends it at once.
    fn end_server(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        server.end(|moment| match (self.wait(Some(moment)), &self.stop) {
            (Ok(Some(_)), Some(stop)) if stop.is_by_signal => stop.began.elapsed() >= SAME_WISH,
            (Ok(Some(_)), _) => {
                self.stop = Some(Stop::by_signal(&self.closed));
                false
            }
            _ => false,
        });
    }

    fn stop_at_once(&mut self) {
        let stop = self.stop.take().unwrap_or_else(|| Stop::now(&self.closed));
        self.stop = Some(Stop { force_at: Instant::now(), ..stop });
    }

    /// Watches over a session until it has ended and its mount is gone, and the command of `--run` has
    /// ended too.
    fn supervise<B: Backend>(
        &mut self,
        mut session: Session,
        mount: Mount,
        export: &Export<B>,
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
            if self.server.as_mut().is_some_and(Server::has_died) {
                export.backend().hurry();
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
                        export.backend().hurry();
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
                    // Whoever has it open is served until the last close. Else only other mount namespaces have it, by a
                    // copy that nobody asked for.
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
            let timeout = (looks && mount.is_some()).then_some(RETRY);
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
    fn keep_size<B: Backend>(&mut self, mount: &Mount, export: &Export<B>) {
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
            // The command's end is ours; it may have something to tidy up. It has had the terminal's Ctrl-C itself.
            if !signal.is_of_terminal()
                && let Err(e) = sys::kill(command.id(), signal.number)
            {
                log::warn!("the command cannot be signalled: {e}");
            }
            return;
        }
        match (&mut self.stop, mount) {
            // A service manager, or timeout(1), signals a whole group: the same wish may come twice.
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

impl Drop for Control {
    fn drop(&mut self) {
        let deleted = self.poller.delete(self.signals.descriptor());
        if let Err(e) = deleted.and(self.poller.delete(&self.mounts)) {
            log::error!("signals: {e}");
        }
    }
}

/// A stop under way: unmount when nobody uses the file, by force when time is up.
#[derive(Debug)]
struct Stop {
    began: Instant,
    /// The user has asked for it.
    is_by_signal: bool,
    force_at: Instant,
    is_forced: bool,
    /// Asked for again: not even requests in flight are waited for.
    is_hurried: bool,
    /// It is still mounted, dead.
    has_failed: bool,
    reported: bool,
    write_back: WriteBack,
    closed: Arc<AtomicBool>,
}

/// Before a file is taken away, what the page cache has of acknowledged writes goes to the source.
#[derive(Debug)]
enum WriteBack {
    NotBegun,
    UnderWay(Running),
    Done,
}

impl WriteBack {
    /// Begins it, or looks how far it is; whether it has ended, well or not. However slow the source is: a second signal
    /// ends the wait.
    fn go_on(&mut self, mount: &Mount) -> bool {
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
    fn now(closed: &Arc<AtomicBool>) -> Stop {
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

    fn by_signal(closed: &Arc<AtomicBool>) -> Stop {
        Stop { is_by_signal: true, ..Stop::now(closed) }
    }

    fn is_forced(&self) -> bool {
        self.is_forced
    }

    /// Tries again, on a file that somebody has open or not.
    fn go_on(&mut self, mount: &Mount, is_open: bool, cache: Cache) {
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
            // The threads see the end of the connection by themselves, if it ends: it does not where another mount namespace
            // has a copy, or somebody the file.
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

    fn force(&mut self, mount: &Mount) {
        if std::mem::replace(&mut self.is_forced, true) {
            self.is_hurried = true;
            return;
        }
        if let Err(e) = mount.force_unmount() {
            self.has_failed = true;
            log::error!("{}: cannot be unmounted: {e}", mount.path().display());
        }
        // Where the connection cannot be aborted it goes on until the last close; its requests do not.
        self.closed.store(true, Ordering::Release);
    }
}
