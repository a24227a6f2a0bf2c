//! The control thread: waits for signals, for the end of the mount and of the command, and acts on
//! them.
//!
//! `impl Control` goes on in `supervise`, which is what it does while others serve, and in `loss`,
//! for a source that is lost meanwhile.
//!
//! It waits in a [`Poller`] of its own: it must go on working whatever the serving threads and
//! their reactors do.

use std::fs::File;
use std::io;
use std::process::{Child, Command};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use polling::{Event, Events, Poller};

use super::loss::Told;
use super::stop::{RETRY, Stop};
use crate::export::{Cache, Served};
use crate::mount::Mount;
use crate::mount::errands::{Errand, Running};
use crate::program::cli::{Config, OnLoss};
use crate::program::daemon::{Background, Pidfile};
use crate::program::failure::{Failure, NotDone};
use crate::program::logging;
use crate::program::progress::Progress;
use crate::program::server::Server;
use crate::program::service::Service;
use crate::program::signals::{Signals, Wish};
use crate::session::Session;
use crate::sys;

/// Signals that come within this time of the first are one.
pub(super) const SAME_WISH: Duration = Duration::from_millis(100);
/// How long a source that is away is waited for after a signal.
pub(super) const AWAY: Duration = Duration::from_millis(500);
/// A server's time for the last flush once it can be reached, and some more.
const FLUSH: Duration = Duration::from_secs(150);
/// A last flush that takes longer is reported.
const LONG_FLUSH: Duration = Duration::from_secs(2);

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
    ) -> Result<T, NotDone> {
        let (sender, receiver) = mpsc::channel();
        let poller = self.poller.clone();
        let work = move || {
            // Nobody listens any more after a signal.
            let _ = sender.send(work());
            let _ = poller.notify();
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(work);
        let thread = thread.map_err(NotDone::NoThread)?;
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
                Ok(Some(signal)) => return Err(NotDone::Stopped(signal)),
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
        // A source that is lost has been waited for already.
        let is_hurried =
            self.lost.is_some() || self.stop.as_ref().is_some_and(|stop| stop.is_by_signal);
        let patience = if is_hurried { AWAY } else { config.remote.reconnect_timeout };
        self.service.flushing(patience + FLUSH);
        let source = &config.words;
        let verdict = |flushed: io::Result<()>| {
            flushed.map_err(|e| {
                Failure::Serving(format!(
                    "{source}: the last flush failed, so writes may be lost: {e}"
                ))
            })
        };
        let (sender, receiver) = mpsc::channel();
        let (flushing, poller) = (export.clone(), self.poller.clone());
        let work = move || {
            let _ = sender.send(flushing.last_flush(patience));
            let _ = poller.notify();
        };
        if let Err(e) = std::thread::Builder::new().name("flush".into()).spawn(work) {
            log::warn!("{source}: no signal can give the last flush up: no thread: {e}");
            return verdict(export.last_flush(patience));
        }
        let began = Instant::now();
        self.progress.wait_for("flushing what was written".into(), began);
        let mut reported = false;
        loop {
            if let Ok(flushed) = receiver.try_recv() {
                self.progress.end();
                return verdict(flushed);
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
        session: &mut Session,
    ) -> Result<(), Failure> {
        if export.cache() != Cache::Writeback {
            return Ok(());
        }
        let told = self.run_errand(Errand::Size(export.size()), mount, session);
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
        session: &mut Session,
        pidfile: &mut Option<Pidfile>,
        background: Option<Background>,
    ) -> Result<(), Failure> {
        let is_awaited = pidfile.is_some() || background.is_some() || config.run.is_some();
        if !is_awaited && !self.service.is_there() {
            return Ok(());
        }
        self.run_errand(Errand::Read, mount, session)
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

    /// Waits for an errand on the mount. A signal ends the wait, and the failure of a thread that
    /// serves: it may have been that which had the request.
    fn run_errand(
        &mut self,
        errand: Errand,
        mount: &Mount,
        session: &mut Session,
    ) -> io::Result<()> {
        let mut running = mount.begin(errand)?;
        self.progress.wait_for("waiting for the source's first answer".into(), Instant::now());
        loop {
            if let Some(outcome) = running.end() {
                self.progress.end();
                return outcome;
            }
            if session.has_failed() {
                running.give_up();
                return Err(io::Error::other("a thread that serves has failed"));
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
}

impl Drop for Control {
    fn drop(&mut self) {
        let deleted = self.poller.delete(self.signals.descriptor());
        if let Err(e) = deleted.and(self.poller.delete(&self.mounts)) {
            log::error!("signals: {e}");
        }
    }
}
