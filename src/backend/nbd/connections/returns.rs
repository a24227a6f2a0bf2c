//! Connections that are lost, and a server that comes back.
//!
//! # When one is lost
//! It is reset, and its requests go by the others. A server that was started anew has never had
//! what it had acknowledged and not made durable, so a new connection counts only once an older one
//! has answered after it was opened: then both are to the same server.
//!
//! # When all are lost
//! Requests wait, for a time. A thread dials until the server is there again, and has the same
//! disk; it writes what was acknowledged and not durable again, and flushes it
//! ([`crate::backend::nbd::unflushed`]); then what was in flight goes out again, and what has
//! waited.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use smol::Timer;

use super::super::LAST_FLUSH_LIMIT;
use super::super::commands::{Commands, all};
use super::super::connection::Connection;
use super::super::unflushed::{Again, Change};
use super::super::wire::transmission_flag;
use super::backoff::Backoff;
use super::{Connections, Member, Shared};
use crate::backend::{Failure, Outage};

/// So often a request is sent again without a pause.
const FREE_ATTEMPTS: u32 = 3;
/// For so long a request is sent again at least, if others of several connections are lost too.
const LOST_AGAIN: Duration = Duration::from_secs(10);
/// How many of the writes that are made again are on their way at once, ...
const AGAIN_AT_ONCE: usize = 64;
/// ... and of how many bytes: the last one may be longer.
const BYTES_AT_ONCE: u64 = 8 << 20;

/// Why a server is not back.
enum Absence {
    /// Another attempt may help.
    NotYet(String),
    /// It has another disk.
    Another(String),
    /// Nobody needs it any more.
    Over,
}

impl Connections {
    /// A connection is lost: it has been reset, and its requests look for another.
    pub(super) fn lost(self: &Arc<Self>, connection: &Arc<Connection>, reason: &str) {
        let mut shared = self.shared();
        shared.lost += 1;
        shared.all.retain(|member| !Arc::ptr_eq(&member.connection, connection));
        shared.system_calls = shared.system_calls.plus(connection.system_calls());
        self.version.fetch_add(1, Ordering::Release);
        if shared.is_closed {
            return;
        }
        if !shared.all.is_empty() {
            let left = shared.all.len();
            let name = self.name();
            log::warn!("{name}a connection is lost, {left} more go on: {reason}");
            return self.may_open.store(shared.most > left, Ordering::Release);
        }
        let outage = Outage { since: Instant::now(), waiting: 0, writing_again: 0, failure: None };
        shared.outage.get_or_insert(outage);
        if self.reconnect_timeout.is_zero() || shared.is_hurried {
            return self.fail(&mut shared, "the connection is lost", reason, true);
        }
        let limit = self.reconnect_timeout.as_secs_f32();
        log::warn!(
            "{}the connection is lost, requests wait up to {limit} s for the server: {reason}",
            self.name()
        );
        let pause = if connection.has_answered() {
            shared.backoff = Backoff::default();
            Duration::ZERO
        } else {
            shared.backoff.next_pause()
        };
        let connections = self.clone();
        let dial = move || connections.dial_until_it_is_back(pause);
        if let Err(e) = std::thread::Builder::new().name("redial".into()).spawn(dial) {
            let what = "there is no thread to reach the server again";
            self.fail(&mut shared, what, &e.to_string(), true);
        }
        self.wake_control();
    }

    /// For the log, where there is no control thread that follows this disk: it is one of several,
    /// and the log does not name it.
    fn name(&self) -> String {
        match self.control.get() {
            Some(_) => String::new(),
            None => format!("{}: ", self.dialer.uri()),
        }
    }

    /// Requests fail, and the control thread tells why, if there is one.
    fn fail(&self, shared: &mut Shared, what: &str, why: &str, for_good: bool) {
        if self.control.get().is_none() {
            log::error!("{}{what}, requests fail: {why}", self.name());
        }
        if let Some(outage) = &mut shared.outage {
            let (what, why) = (what.into(), why.into());
            outage.failure = Some(Failure { what, why, for_good });
        }
        self.refuse();
        self.wake_control();
    }

    fn wake_control(&self) {
        if let Some(Err(e)) = self.control.get().map(|control| control.notify()) {
            log::error!("the control thread cannot be woken: {e}");
        }
    }

    /// Requests fail, those that wait and those that come.
    fn refuse(&self) {
        self.refuses.store(true, Ordering::SeqCst);
        self.changed.notify(usize::MAX);
    }

    /// Nobody is to wait for a server any more: neither now nor if it is lost later.
    pub fn hurry(&self) {
        let mut shared = self.shared();
        shared.is_hurried = true;
        if shared.all.is_empty() {
            self.refuse();
        }
    }

    fn dial_until_it_is_back(self: Arc<Self>, first: Duration) {
        let lost = Instant::now();
        std::thread::sleep(first);
        let mut backoff = Backoff::default();
        loop {
            let left = self.reconnect_timeout.saturating_sub(lost.elapsed());
            let refuses = self.refuses.load(Ordering::SeqCst);
            let limit = if refuses { Duration::MAX } else { left };
            let why = match self.bring_back(limit, lost) {
                Ok(()) | Err(Absence::Over) => return,
                Err(Absence::Another(difference)) => {
                    let mut shared = self.shared();
                    shared.is_another = true;
                    return self.fail(&mut shared, "another disk is there", &difference, true);
                }
                Err(Absence::NotYet(why)) => why,
            };
            log::debug!("not back yet: {why}");
            let left = self.reconnect_timeout.saturating_sub(lost.elapsed());
            if left.is_zero() && !refuses {
                let limit = self.reconnect_timeout.as_secs_f32();
                let what = format!("the connection has been lost for {limit} s");
                self.fail(&mut self.shared(), &what, &why, false);
            }
            let pause = backoff.next_random_pause();
            std::thread::sleep(if left.is_zero() { pause } else { pause.min(left) });
        }
    }

    /// One attempt at it, of at most `limit`.
    fn bring_back(&self, limit: Duration, lost: Instant) -> Result<(), Absence> {
        let over = |shared: &Shared| if shared.is_closed { Err(Absence::Over) } else { Ok(()) };
        over(&self.shared())?;
        // What goes wrong with so little time is not worth a message.
        let limit = limit.max(Duration::from_millis(100));
        let not_yet = |why: &dyn ToString| Absence::NotYet(why.to_string());
        let opened = self.dialer.open_within(limit).map_err(|e| not_yet(&e))?;
        if let Some(difference) = self.agreed.difference(&opened.agreed) {
            return Err(Absence::Another(difference));
        }
        let several = opened.agreed.has(transmission_flag::CAN_MULTI_CONN);
        let connection = self.connection(opened);
        let _bringing_back = self.bringing_back.lock().expect("no code panics while it is held");
        over(&self.shared())?;
        let again = self.write_again(&connection, None).map_err(|e| not_yet(&e))?;
        connection.stop_blocking().map_err(|e| not_yet(&e))?;
        let mut shared = self.shared();
        if !several {
            shared.most = 1;
        }
        self.may_open.store(shared.most > 1, Ordering::Release);
        shared.all.push(Member { connection, home: None });
        shared.returns += 1;
        shared.outage = None;
        shared.find_homes();
        self.version.fetch_add(1, Ordering::Release);
        self.refuses.store(false, Ordering::SeqCst);
        let waiting = self.waiting.load(Ordering::SeqCst);
        log::warn!(
            "{}the server is back after {:.1} s: {again} bytes written again, {waiting} requests have \
             waited",
            self.name(),
            lost.elapsed().as_secs_f32()
        );
        drop(shared);
        self.changed.notify(usize::MAX);
        self.wake_control();
        Ok(())
    }

    /// Writes what was acknowledged and not durable again, and flushes it, over a connection that
    /// nobody uses yet. How many bytes. An error: another attempt may help.
    fn write_again(&self, connection: &Arc<Connection>, until: Option<Instant>) -> io::Result<u64> {
        let Some(again) = self.unflushed.take() else { return Ok(0) };
        let bytes = again.changes().map(|(_, change)| change.length()).sum();
        self.writing_again(bytes);
        let written = carry_out(&again, connection, until);
        self.writing_again(0);
        match written {
            Ok(()) => {
                self.unflushed.made_durable(again);
                Ok(bytes)
            }
            Err(e) if connection.is_lost() => {
                self.unflushed.put_back(again);
                Err(e)
            }
            Err(e) => {
                let name = self.name();
                log::error!("{name}acknowledged writes are lost with the server: {e}");
                self.unflushed.give_up(again);
                Ok(0)
            }
        }
    }

    fn writing_again(&self, bytes: u64) {
        if let Some(outage) = &mut self.shared().outage {
            outage.writing_again = bytes;
        }
        self.wake_control();
    }

    /// The end: one more attempt to reach a server that is gone, for as long as `patience`, and to
    /// make durable what it had acknowledged.
    pub fn bring_back_at_the_end(&self, patience: Duration) -> io::Result<()> {
        let until = Instant::now() + patience;
        let mut backoff = Backoff::default();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let gone = |why: String| io::Error::other(format!("the server is gone: {why}"));
            let is_another = self.shared().is_another;
            if self.reconnect_timeout.is_zero() || is_another {
                return Err(gone("the connection to it was lost".into()));
            }
            let made_durable = match self.dialer.open_within(left.max(Duration::from_millis(100))) {
                Ok(opened) => match self.agreed.difference(&opened.agreed) {
                    Some(difference) => {
                        return Err(gone(format!("another disk is there: {difference}")));
                    }
                    None => {
                        let connection = self.connection(opened);
                        let limit = Instant::now() + LAST_FLUSH_LIMIT;
                        let again = self.write_again(&connection, Some(limit)).map(drop);
                        connection.disconnect();
                        again
                    }
                },
                Err(e) => Err(gone(e.to_string())),
            };
            if made_durable.is_ok() || left.is_zero() {
                return made_durable;
            }
            std::thread::sleep(backoff.next_pause().min(left));
        }
    }

    /// A connection, once there is one. `NotConnected`: it is not waited for.
    pub(super) async fn returned(&self) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(&self.waiting);
        loop {
            // Listen first and look again, or a change would be missed.
            let changed = self.changed.listen();
            if self.refuses.load(Ordering::SeqCst) {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "the server is away"));
            }
            if self.shared().all.iter().any(|member| !member.connection.is_lost()) {
                return Ok(());
            }
            changed.await;
        }
    }

    /// A request has been lost with its connection once more, the first time at `first`: waits
    /// until it is to be sent again.
    pub(super) async fn try_again(&self, first: Instant, times: u32) -> io::Result<()> {
        // What ends every connection that it goes by must not go on for ever.
        if first.elapsed() > self.reconnect_timeout.max(LOST_AGAIN) {
            let text = "the connections are lost again and again";
            return Err(io::Error::new(io::ErrorKind::NotConnected, text));
        }
        if let Some(pauses) = times.checked_sub(FREE_ATTEMPTS) {
            Timer::after(Backoff::after(pauses).next_pause()).await;
        }
        Ok(())
    }
}

/// Writes it and flushes it, over a connection that nobody uses yet.
fn carry_out(
    again: &Again,
    connection: &Arc<Connection>,
    until: Option<Instant>,
) -> io::Result<()> {
    let commands = Commands::over(connection.clone());
    let write = async |(offset, change)| match change {
        Change::Data(data) => commands.write(offset, data, false).await,
        Change::Zero(length, how) => commands.zero(offset, length, how).await,
        Change::Durable(_) => Ok(()),
    };
    // For each part of it, unless it is the end: there may be ever so much for a slow server.
    let limit = || {
        let limit = Instant::now() + LAST_FLUSH_LIMIT;
        until.map_or(limit, |until| until.min(limit))
    };
    let mut changes = again.changes();
    loop {
        let (mut some, mut bytes) = (Vec::new(), 0);
        while some.len() < AGAIN_AT_ONCE
            && bytes < BYTES_AT_ONCE
            && let Some((offset, change)) = changes.next()
        {
            bytes += change.length();
            some.push((offset, change));
        }
        if some.is_empty() {
            return connection.run_blocking(commands.flush(), limit());
        }
        connection.run_blocking(all(some.into_iter().map(write)), limit())?;
    }
}

/// One that waits, until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
