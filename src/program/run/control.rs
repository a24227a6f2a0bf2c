//! The control thread: waits for signals, for the end of the mount and of the command, and acts on
//! them.
//!
//! It waits in a [`Poller`] of its own: it must go on working whatever the serving threads and
//! their reactors do.

use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use polling::{Event, Events, Poller};
use rustix::process::{Pid, Signal, kill_process};

use super::loss::Told;
use super::stop::{RETRY, Stop};
use crate::export::{Cache, Served};
use crate::mount::Mount;
use crate::mount::errands::{Errand, Running};
use crate::program::cli::{Config, OnLoss};
use crate::program::daemon::{Background, Pidfile};
use crate::program::failure::Failure;
use crate::program::logging;
use crate::program::progress::Progress;
use crate::program::server::Server;
use crate::program::service::Service;
use crate::program::signals::{Signals, Wish};
use crate::session::Session;
use crate::sys;

/// Signals that come within this time of the first are one.
const SAME_WISH: Duration = Duration::from_millis(100);
/// How long serving threads may take to end once the connection has ended, before the process ends
/// without them.
const LAST_REQUESTS: Duration = Duration::from_secs(5);
/// How long a source that is away is waited for after a signal.
const AWAY: Duration = Duration::from_millis(500);
/// A server's time for the last flush once it can be reached, and some more.
const FLUSH: Duration = Duration::from_secs(150);
/// A last flush that takes longer is reported.
const LONG_FLUSH: Duration = Duration::from_secs(2);

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

/// What the control thread waits for.
pub(super) struct Control {
    pub(super) poller: Arc<Poller>,
    pub(super) signals: Signals,
    /// For SIGUSR1.
    pub(super) report: Box<dyn Fn() -> String>,
    pub(super) service: Service,
    pub(super) progress: Progress,
    /// Tells when something is mounted or unmounted here.
    pub(super) mounts: File,
    /// The command of `--run` would inherit it.
    pub(super) became_io_flusher: bool,
    pub(super) events: Events,
    /// The command of `--run`.
    pub(super) command: Option<Child>,
    /// The source's.
    pub(super) server: Option<Server>,
    /// Gives the kernel the size back.
    pub(super) sizing: Option<Running>,
    pub(super) stop: Option<Stop>,
    /// The file was taken away: the export answers nobody any more.
    pub(super) closed: Arc<AtomicBool>,
    /// A thread was left at work that does not come to an end.
    pub(super) is_abandoned: bool,
    /// In the user's words.
    pub(super) source: String,
    pub(super) on_loss: OnLoss,
    /// What is where, for the service manager.
    pub(super) serving: String,
    pub(super) told: Told,
    /// Why the export has been ended, if it was for the loss of its source.
    pub(super) lost: Option<String>,
}

/// The sources that are watched.
const SIGNALS: usize = 0;
const MOUNTS: usize = 1;

impl Control {
    pub(super) fn new(config: &Config, became_io_flusher: bool) -> io::Result<Control> {
        let (source, named) = (config.words.clone(), config.words.clone());
        let signals = Signals::take()?;
        let mounts = File::open("/proc/self/mountinfo")?;
        let poller = Arc::new(Poller::new()?);
        // Deleted in `Drop`, before they are closed.
        sys::watch(&poller, signals.descriptor(), Event::readable(SIGNALS))?;
        sys::watch(&poller, &mounts, Event::none(MOUNTS).with_priority())?;
        Ok(Control {
            poller,
            signals,
            report: Box::new(move || format!("{named}: nothing is served yet")),
            service: Service::of_environment(),
            progress: Progress::of_stderr(),
            mounts,
            became_io_flusher,
            events: Events::new(),
            command: None,
            server: None,
            sizing: None,
            stop: None,
            closed: Arc::default(),
            is_abandoned: false,
            source,
            on_loss: config.on_loss,
            serving: String::new(),
            told: Told::default(),
            lost: None,
        })
    }

    /// Waits for a signal, a notification, a change of the mounts or the time-out; the signal to
    /// stop, if there was one.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Option<sys::Signal>> {
        self.events.clear();
        let timeouts = [timeout, self.service.patience(), self.progress.patience()];
        self.poller.wait(&mut self.events, timeouts.into_iter().flatten().min())?;
        self.service.feed();
        self.progress.show();
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
    /// Both are named: the thread, and what is done, for people.
    pub(super) fn unless_signalled<T: Send + 'static>(
        &mut self,
        (name, what): (&str, &str),
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
        self.progress.wait_for(what.into(), Instant::now());
        loop {
            match receiver.try_recv() {
                Ok(result) => {
                    let _ = thread.join();
                    self.progress.end();
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

    /// Flushes what was written and disconnects from the source: when nobody is served any more. A
    /// signal after the one that has ended the export gives it up.
    pub(super) fn last_flush<S: Served>(
        &mut self,
        config: &Config,
        export: &Arc<S>,
    ) -> Result<(), Failure> {
        let (sender, receiver) = mpsc::channel();
        let (flushing, poller) = (export.clone(), self.poller.clone());
        // A source that is lost has been waited for already.
        let is_hurried =
            self.lost.is_some() || self.stop.as_ref().is_some_and(|stop| stop.is_by_signal);
        let patience = if is_hurried { AWAY } else { config.remote.reconnect_timeout };
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
        self.progress.wait_for("flushing what was written".into(), began);
        let mut reported = false;
        loop {
            if let Ok(flushed) = receiver.try_recv() {
                self.progress.end();
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
    pub(super) fn tell_size<S: Served>(
        &mut self,
        mount: &Mount,
        export: &S,
    ) -> Result<(), Failure> {
        if export.cache() != Cache::Writeback {
            return Ok(());
        }
        let told = self.run_errand(Errand::Size(export.size()), mount);
        export.size_is_known();
        told.map_err(|e| {
            let path = mount.path().display();
            Failure::Serving(format!("{path}: --cache writeback: the size cannot be set: {e}"))
        })
    }

    /// Tells whoever waits for it that the file can be used: the pidfile, the foreground process,
    /// the service manager, the command of `--run`.
    pub(super) fn announce(
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
        self.serving = format!("{} is at {}", config.words, mount.path().display());
        self.service.ready(&self.serving);
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
    pub(super) fn run_errand(&mut self, errand: Errand, mount: &Mount) -> io::Result<()> {
        let mut running = mount.begin(errand)?;
        self.progress.wait_for("waiting for the source's first answer".into(), Instant::now());
        loop {
            if let Some(outcome) = running.end() {
                self.progress.end();
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
    pub(super) fn server(&mut self) -> &mut Server {
        self.server.as_mut().expect("it was started before anything else")
    }

    /// After the last flush. A signal after the one that has ended the export ends it at once.
    pub(super) fn end_server(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        self.progress.wait_for("waiting for the server to end".into(), Instant::now());
        server.end(|moment| match (self.wait(Some(moment)), &self.stop) {
            (Ok(Some(_)), Some(stop)) if stop.is_by_signal => stop.began.elapsed() >= SAME_WISH,
            (Ok(Some(_)), _) => {
                self.stop = Some(Stop::by_signal(&self.closed));
                false
            }
            _ => false,
        });
        self.progress.end();
    }

    pub(super) fn stop_at_once(&mut self) {
        let stop = self.stop.take().unwrap_or_else(|| Stop::now(&self.closed));
        self.stop = Some(Stop { force_at: Instant::now(), ..stop });
    }

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
    pub(super) fn keep_size<S: Served>(&mut self, mount: &Mount, export: &S) {
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

    pub(super) fn on_signal(&mut self, signal: sys::Signal, mount: Option<&Mount>) {
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
    pub(super) fn command_status(&mut self) -> Option<u8> {
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
