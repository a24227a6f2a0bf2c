//! One export, or a directory of them, from its beginning to its end: source → mount → session →
//! stop → unmount → flush.
//!
//! This is the control thread; `supervise` is what it does while others serve. It is also the only
//! one that unmounts: the kernel holds an unmount until no request waits, so a thread that serves
//! may not.

mod control;
mod descriptors;
mod loss;
mod stop;
mod supervise;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::{configure_io_flusher_behavior, getegid, geteuid, is_io_flusher};

use crate::backend::Backend;
use crate::backend::file::{self, FileBackend};
use crate::backend::nbd::{Exports, Found, NbdBackend, Uri};
use crate::backend::part::Part;
use crate::directory::Directory;
use crate::export::report::Reporter;
use crate::export::{Cache, Export, Policy, Served};
use crate::mount::{self, Mount, Mountpoint, Shape};
use crate::partitions::{self};
use crate::program::cli::{CacheWish, Config, Source, Switch};
use crate::program::daemon::{Background, Pidfile};
use crate::program::own_folder::OwnFolder;
use crate::program::server::Server;
use crate::program::{hints, logging, privileges};
use crate::session::{self, Session};
use crate::stats::{Stats, Transport};
use crate::sys;
use crate::transport::cpus::Cpus;

use super::failure::{Failure, local_failure, no_thread, not_opened, path_failure, remote_failure};
use control::Control;
use descriptors::{allow_connected, allow_open_files};
use supervise::Ended;

/// Exports until the end, and gives the exit status: that of the command in `--run`, else 0.
pub fn run(config: &Config, background: Option<Background>) -> Result<u8, Failure> {
    logging::set_name(&config.words);
    // Before any thread is started, as what follows: they inherit it.
    let io_flusher = become_io_flusher();
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
    let mut control = Control::new(config, matches!(io_flusher, Ok(true)))
        .map_err(|e| Failure::Serving(format!("signals: {e}")))?;
    control.server = server;
    // Nothing is logged before this: it might not be read.
    logging::write_from_a_thread().map_err(no_thread)?;
    crate::io::start_reactor().map_err(no_thread)?;
    if let Err(e) = io_flusher {
        log::info!("clients in this memory cgroup can come to wait for memory for ever: {e}");
    }
    if let Err(e) = given_up {
        log::warn!("privileges that are not needed could not be given up: {e}");
    }
    if let Some(server) = &mut control.server {
        server.show_words().map_err(no_thread)?;
    }
    let not_done = |why| not_opened(&config.words, &why);
    let connecting = format!("connecting to {}", config.words);
    let connect = |to: Uri| {
        let options = config.remote.clone();
        move || NbdBackend::connect(&to, &options)
    };
    match config.source.clone() {
        Source::Nbd(uri) => {
            let mut to = uri.clone();
            if config.daemonize {
                // It goes on connecting when it has left its folder. (Certificates are read once,
                // before that.)
                let anywhere = to.from_anywhere();
                to = anywhere.map_err(|e| Failure::Source(format!("{uri}: its socket: {e}")))?;
            }
            if config.all {
                let options = config.remote.clone();
                let list = move || {
                    let exports = Exports::new(&to, &options)?;
                    exports.list().map(|found| (exports, found))
                };
                let listed =
                    control.unless_signalled(("list", &connecting), list).map_err(not_done)?;
                let (exports, found) = listed.map_err(|e| remote_failure(&uri, &e))?;
                return serve_all(config, exports, found, control, background);
            }
            let backend = control
                .unless_signalled(("connect", &connecting), connect(to))
                .map_err(not_done)?;
            serve_part(config, backend.map_err(|e| remote_failure(&uri, &e))?, control, background)
        }
        Source::Server(_) => {
            let uri = control.server().uri();
            let backend = control
                .unless_signalled(("connect", &connecting), connect(uri))
                .map_err(not_done)?;
            let backend = backend.map_err(|e| Failure::Source(control.server().failure(&e)))?;
            serve_part(config, backend, control, background)
        }
        Source::Path(path) => {
            let Config { read_only, direct, wants_writes, .. } = *config;
            let options = file::Options { read_only, direct, wants_writes };
            let named = path.clone();
            let open = move || {
                let backend = FileBackend::open(&path, options)?;
                Ok((backend, hints::other_format(&path)))
            };
            let opened = control
                .unless_signalled(("open", &format!("opening {}", config.words)), open)
                .map_err(not_done)?;
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

/// The mountpoint that was asked for, or one of its own in a temporary folder that goes with it.
fn place(config: &Config) -> Result<(PathBuf, Option<OwnFolder>), Failure> {
    if let Some(path) = &config.mountpoint {
        return Ok((path.clone(), None));
    }
    let name = match &config.source {
        Source::Path(path) => path.file_name(),
        Source::Nbd(_) | Source::Memory(_) | Source::Server(_) => None,
    };
    let other_name = if config.all { "disks" } else { "disk" };
    let folder = OwnFolder::new(name.unwrap_or(other_name.as_ref()).as_ref());
    let folder = folder.map_err(|e| Failure::Mount(format!("no temporary folder: {e}")))?;
    Ok((folder.mountpoint().to_owned(), Some(folder)))
}

/// Requests lie in memory at 4 KiB and multiples of it, and a request's longest payload is counted
/// in pages.
fn check_page_size() -> Result<(), Failure> {
    match rustix::param::page_size() {
        4096 => Ok(()),
        size => Err(Failure::Mount(format!(
            "pages of {size} bytes: a kernel with pages of 4096 is needed"
        ))),
    }
}

/// Tells the kernel that this thread, and all that it starts from now on, write out pages of other
/// programs: while they allocate memory, or make pages dirty themselves, they are not to wait for
/// those pages, which would wait for them (`PR_SET_IO_FLUSHER`). Whether that is new: it is
/// inherited, also by a program that is executed. `EPERM` without CAP_SYS_RESOURCE, `EINVAL` before
/// Linux 5.6.
fn become_io_flusher() -> io::Result<bool> {
    let was_one = is_io_flusher()?;
    configure_io_flusher_behavior(true)?;
    Ok(!was_one)
}

/// Serves the part of the source that is wanted, or all of it. A part is another type: what serves
/// whole disks has nothing to add and to compare.
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
        .unless_signalled(("part", "reading the partition table"), find)
        .map_err(|why| not_opened(source, &why))?
        .map_err(|why| Failure::Source(format!("{source}: {why}")))?;
    log::info!("{source}: {part} are shown");
    serve(config, part, control, background)
}

/// Serves one disk.
fn serve<B: Backend>(
    config: &Config,
    backend: Arc<B>,
    control: Control,
    background: Option<Background>,
) -> Result<u8, Failure> {
    let read_only = config.read_only || backend.capabilities().read_only;
    let (closed, poller) = (control.closed.clone(), control.poller.clone());
    let make = move |policy, reporter| {
        let export = Export::new(backend, policy, closed)
            .map_err(|e| Failure::Source(format!("{}: {e}", config.words)))?;
        export.set_control(poller);
        export.set_reporter(reporter);
        Ok(export)
    };
    serve_as(config, Shape::File, read_only, make, control, background)
}

/// Serves a directory of all exports of a server.
fn serve_all(
    config: &Config,
    exports: Exports,
    found: Vec<Found>,
    control: Control,
    background: Option<Background>,
) -> Result<u8, Failure> {
    let most = allow_connected(config)?;
    let closed = control.closed.clone();
    let make =
        move |policy, reporter| Ok(Directory::new(exports, found, policy, most, reporter, closed));
    serve_as(config, Shape::Directory, config.read_only, make, control, background)
}

/// Serves what is made for a policy, which is known when it is mounted.
fn serve_as<S: Served>(
    config: &Config,
    shape: Shape,
    read_only: bool,
    make: impl FnOnce(Policy, Reporter) -> Result<S, Failure>,
    mut control: Control,
    background: Option<Background>,
) -> Result<u8, Failure> {
    let started = start(config, shape, read_only, make, &mut control)?;
    serve_to_the_end(config, started, control, background)
}

/// What is mounted and served.
struct Started<S> {
    session: Session,
    mount: Mount,
    export: Arc<S>,
    stats: Arc<Stats>,
    /// Locked, and not written yet.
    pidfile: Option<Pidfile>,
    /// Of the mountpoint, where the user has named none.
    folder: Option<OwnFolder>,
}

/// Mounts, and starts to serve.
fn start<S: Served>(
    config: &Config,
    shape: Shape,
    read_only: bool,
    make: impl FnOnce(Policy, Reporter) -> Result<S, Failure>,
    control: &mut Control,
) -> Result<Started<S>, Failure> {
    check_page_size()?;
    let cpus = Cpus::here().map_err(|e| format!("the CPUs of this machine: {e}"));
    let ring_threads = cpus.as_ref().map_or(0, |cpus| cpus.usable.len());
    let io_uring = allow_open_files(config, ring_threads)?;
    let (path, folder) = place(config)?;
    let prepare = |path: PathBuf| move || Mountpoint::prepare(&path, shape);
    let mountpoint = control
        .unless_signalled(("mountpoint", "waiting for the mountpoint"), prepare(path.clone()))
        .map_err(|why| Failure::Mount(format!("{}: {why}", path.display())))?
        .map_err(|e| Failure::Mount(e.to_string()))?;
    let lock = config.pidfile.clone().map(|path| move || Pidfile::lock(&path));
    let pidfile = match lock {
        Some(lock) => Some(
            control
                .unless_signalled(("pidfile", "waiting for the pidfile"), lock)
                .map_err(|why| Failure::Serving(format!("pidfile: {why}")))?
                .map_err(Failure::Serving)?,
        ),
        None => None,
    };
    let (mount, device, allow_other) = mount(config, mountpoint, &path, shape, read_only)?;
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    // Local sources have a reason of their own, which was told.
    if config.wants_writes && read_only && !matches!(config.source, Source::Path(_)) {
        log::warn!(
            "{}: shown read-only, the server exports it so (change that there, or say -o ro)",
            config.words
        );
    }
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
    let stats = Arc::<Stats>::default();
    let reporter = Reporter { source: config.words.clone(), stats: stats.clone() };
    let export = Arc::new(make(policy, reporter)?);
    let reporting = export.clone();
    control.report = Box::new(move || reporting.report().unwrap_or_default());
    let options = session::Options {
        io_uring,
        cpus,
        queue_depth: config.queue_depth,
        read_ahead: config.read_ahead,
    };
    let start = {
        let (export, stats, poller) = (export.clone(), stats.clone(), control.poller.clone());
        move || Session::start(device, &export, options, &stats, &poller)
    };
    let started = match control.unless_signalled(("start", "starting to serve"), start) {
        Ok(started) => started,
        Err(why) => Err(why.to_string()),
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
    // A command of --run sees it.
    if config.run.is_none() && mount.is_hidden() {
        log::warn!(
            "{}: seen in this mount namespace only, others have what is beneath it: leave out the unit's PrivateTmp=, \
             ProtectSystem= and their like, or use unshare --propagation unchanged",
            mount.path().display()
        );
    }
    if export.cache() != Cache::None {
        // The kernel's own reads straight into the page cache. Who may not set it has only its
        // default of 128 KiB.
        if let Err(e) = mount.set_read_ahead(config.read_ahead) {
            log::info!("the kernel's read-ahead stays as it is: {e}");
            export.set_read_ahead(config.read_ahead);
        }
    }
    Ok(Started { session, mount, export, stats, pidfile, folder })
}

/// Tells whoever waits for it that the file can be used, watches over what serves it until that has
/// ended, and flushes. Its status is that of [`run`].
fn serve_to_the_end<S: Served>(
    config: &Config,
    started: Started<S>,
    mut control: Control,
    background: Option<Background>,
) -> Result<u8, Failure> {
    // They are dropped in reverse order: the folder once nothing is in it any more.
    let Started { folder, mut pidfile, stats, export, mount, mut session } = started;
    let announced = control
        .tell_size(&mount, &*export, &mut session)
        .inspect(|()| log_place(config, mount.path(), export.writable()))
        .and_then(|()| control.announce(config, &mount, &mut session, &mut pidfile, background));
    if announced.is_err() {
        control.stop_at_once();
    }
    let ended = control.supervise(session, mount, &*export);
    if let Some(pidfile) = &pidfile {
        pidfile.ending();
    }
    for transport in [Transport::Uring, Transport::Legacy] {
        log::info!("served by {}", stats.line(transport));
    }
    // What others have written meanwhile is flushed in every case.
    let flushed = control.last_flush(config, &export);
    control.end_server();
    let served = flushed.and_then(|()| verdict(config, &*export, &ended));
    let lost = control.lost.take().map_or(Ok(()), |why| Err(Failure::Serving(why)));
    let result = match (announced.and(lost), served) {
        (Err(failure), served) => {
            if let Err(also) = served {
                log::error!("{also}");
            }
            Err(failure)
        }
        (Ok(()), served) => served,
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

/// The page cache that is asked for: by default in front of remote disks. A local image's pages are
/// in memory already, and its other users see what is changed here, and the other way round.
fn cache(config: &Config) -> Cache {
    match (config.cache, &config.source) {
        (CacheWish::Auto, Source::Nbd(_) | Source::Server(_)) => Cache::Writethrough,
        (CacheWish::Auto, Source::Path(_) | Source::Memory(_)) => Cache::None,
        (CacheWish::Is(cache), _) => cache,
    }
}

/// Whether all was well.
fn verdict(config: &Config, export: &impl Served, ended: &Ended) -> Result<(), Failure> {
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

/// How often a mount is tried if the mountpoint vanishes: each time a diskfuse before this one has
/// removed it at its end.
const MOUNT_ATTEMPTS: usize = 10;

fn mount(
    config: &Config,
    mountpoint: Mountpoint,
    path: &Path,
    shape: Shape,
    read_only: bool,
) -> Result<(Mount, OwnedFd, bool), Failure> {
    let mut mountpoint = Some(mountpoint);
    let mut attempt = |allow_other| {
        let source = config.words.clone();
        let options = mount::Options { source, read_only, allow_other };
        for attempts_left in (0..MOUNT_ATTEMPTS).rev() {
            let prepared =
                mountpoint.take().map_or_else(|| Mountpoint::prepare(path, shape), Ok)?;
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
        Switch::Off => attempt(false),
        Switch::On => attempt(true),
        Switch::Auto => attempt(true).or_else(|refused| {
            log::info!("allow_other is not to be had: {refused}");
            attempt(false)
        }),
    }
    .map_err(|e| Failure::Mount(e.to_string()))
}
