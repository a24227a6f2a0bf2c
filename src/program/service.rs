//! What systemd is told: that the file can be used, what becomes of it, and that somebody is still
//! there to act.
//!
//! Without a service manager (`NOTIFY_SOCKET`) nothing is done. Only the control thread tells
//! anything: a watchdog that is fed by it says that signals, unmounts and the end will be acted
//! upon. It does not say that a server far away answers: to be killed would help nobody who waits
//! for that.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// The service manager, if there is one.
#[derive(Debug)]
pub struct Service {
    is_there: bool,
    /// How often it wants to hear, and when next.
    watchdog: Option<(Duration, Instant)>,
    is_stopping: bool,
}

impl Service {
    /// As the environment has it.
    pub fn of_environment() -> Service {
        let is_there = std::env::var_os("NOTIFY_SOCKET").is_some();
        let limit = sd_notify::watchdog_enabled().filter(|limit| is_there && !limit.is_zero());
        // Half of what would be too late, as sd_watchdog_enabled(3) has it.
        let watchdog = limit.map(|limit| (limit / 2, Instant::now()));
        Service { is_there, watchdog, is_stopping: false }
    }

    /// Whether somebody waits for [`Service::ready`].
    pub fn is_there(&self) -> bool {
        self.is_there
    }

    /// The file can be used.
    pub fn ready(&self, status: &str) {
        // With --daemonize this is not the process that was started.
        let process = NotifyState::MainPid(std::process::id());
        self.tell(&[NotifyState::Ready, process, NotifyState::Status(status)]);
    }

    /// How it stands.
    pub fn status(&self, status: &str) {
        self.tell(&[NotifyState::Status(status)]);
    }

    /// It is about to end.
    pub fn stopping(&mut self) {
        if !std::mem::replace(&mut self.is_stopping, true) {
            self.tell(&[NotifyState::Stopping, NotifyState::Status("ending")]);
        }
    }

    /// What was written is flushed, which takes so long at most.
    pub fn flushing(&mut self, limit: Duration) {
        self.stopping();
        let limit = limit.as_micros().try_into().unwrap_or(u32::MAX);
        let status = NotifyState::Status("flushing what was written");
        self.tell(&[status, NotifyState::ExtendTimeoutUsec(limit)]);
    }

    /// How long at most until [`Service::feed`] has to be called again, if ever.
    pub fn patience(&self) -> Option<Duration> {
        self.watchdog.map(|(_, next)| next.saturating_duration_since(Instant::now()))
    }

    /// Says, if it is time, that this thread still acts.
    pub fn feed(&mut self) {
        let now = Instant::now();
        if let Some((interval, next)) = &mut self.watchdog
            && *next <= now
        {
            *next = now + *interval;
            self.tell(&[NotifyState::Watchdog]);
        }
    }

    fn tell(&self, state: &[NotifyState]) {
        if self.is_there
            && let Err(e) = sd_notify::notify(state)
        {
            log::info!("the service manager cannot be told: {e}");
        }
    }
}
