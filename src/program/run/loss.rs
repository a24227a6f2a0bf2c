//! A source that is lost while it is served: the log and the service manager are told of it, and
//! the export is ended for it if that is wished.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::control::Control;
use super::stop::Stop;
use crate::backend::{Failure, Outage};
use crate::export::Served;
use crate::program::cli::OnLoss;

/// How often the service manager is told how long an outage has lasted.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);

/// What has been told of an outage.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// The log knows that requests fail.
    failure: bool,
    /// What the service manager knows, and since when.
    status: Option<(State, Instant)>,
}

/// What becomes of requests in an outage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Wait,
    /// Until so many bytes have been written again.
    WaitForBytes(u64),
    Fail,
}

impl State {
    fn of(outage: &Outage) -> State {
        match (outage.writing_again, &outage.failure) {
            (0, None) => State::Wait,
            (0, Some(_)) => State::Fail,
            (bytes, _) => State::WaitForBytes(bytes),
        }
    }
}

impl Control {
    /// Looks how it stands with the source, and acts on what is new. After how long it is to look
    /// again, if it is not woken before.
    pub(super) fn follow_source<S: Served>(&mut self, export: &S) -> Option<Duration> {
        let outage = export.outage();
        let mut failure = outage.as_ref().and_then(|outage| outage.failure.clone());
        if let Some(server) = &mut self.server {
            // Where its connection has ended it has, too, in a moment, and that says more.
            let is_news = failure.is_some() && !self.told.failure;
            if let Some(death) = if is_news { server.death_soon() } else { server.death() } {
                export.hurry();
                failure = Some(death);
            }
        }
        match failure {
            None => self.told.failure = false,
            Some(_) if std::mem::replace(&mut self.told.failure, true) => {}
            Some(failure) if self.on_loss == OnLoss::Exit && self.stop.is_none() => {
                export.hurry();
                self.end_for(&failure);
            }
            Some(Failure { what, why, for_good }) => {
                let until = if for_good { "from now on" } else { "until the server is back" };
                log::error!("{}: {what}, requests fail {until}: {why}", self.source);
            }
        }
        self.show_progress(outage.as_ref());
        self.tell_status(outage.as_ref())
    }

    /// On the terminal, unless that is the command's.
    fn show_progress(&mut self, outage: Option<&Outage>) {
        match (&self.stop, outage) {
            _ if self.command.is_some() => self.progress.end(),
            (Some(stop), _) => self.progress.wait_for(stop.waits_for().into(), stop.began),
            (None, Some(outage)) => {
                let state = State::of(outage);
                let what = format!("the server is lost, {}", requests(outage, state));
                self.progress.wait_for(what, outage.since);
            }
            (None, None) => self.progress.end(),
        }
    }

    /// Has the service manager know, as long as it is not about to end.
    fn tell_status(&mut self, outage: Option<&Outage>) -> Option<Duration> {
        if !self.service.is_there() || self.stop.is_some() {
            return None;
        }
        let Some(outage) = outage else {
            if self.told.status.take().is_some() {
                self.service.status(&self.serving);
            }
            return None;
        };
        let (state, now) = (State::of(outage), Instant::now());
        let is_known = |(known, at): (State, Instant)| known == state && now < at + STATUS_INTERVAL;
        if !self.told.status.is_some_and(is_known) {
            self.told.status = Some((state, now));
            self.service.status(&status(outage, state));
        }
        Some(STATUS_INTERVAL)
    }

    /// As at a signal: the command of `--run` is asked to end, or the file is taken away.
    fn end_for(&mut self, Failure { what, why, .. }: &Failure) {
        self.lost =
            Some(format!("{}: {what}, and it ends for that (--on-loss exit): {why}", self.source));
        match &self.command {
            Some(command) => {
                if let Err(e) = kill_process(Pid::from_child(command), Signal::TERM) {
                    log::warn!("the command cannot be signalled: {e}");
                }
            }
            None => self.stop = Some(Stop::now(&self.closed)),
        }
    }
}

fn status(outage: &Outage, state: State) -> String {
    let ago = outage.since.elapsed().as_secs();
    format!("server lost {ago} s ago, {}", requests(outage, state))
}

fn requests(outage: &Outage, state: State) -> String {
    let waiting = outage.waiting;
    match state {
        State::Wait => format!("{waiting} requests wait"),
        State::WaitForBytes(bytes) => {
            format!("{bytes} bytes are written again, {waiting} requests wait")
        }
        State::Fail => "requests fail".into(),
    }
}
