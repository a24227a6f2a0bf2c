//! What lasts is shown where stderr is a terminal: one line below the log, which says for how long,
//! is written anew every second, and goes when it is over.
//!
//! The control thread says what it waits for; the thread that writes the log keeps the line and the
//! log apart ([`logging::show`]).

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use rustix::process::getpgrp;
use rustix::termios::{tcgetpgrp, tcgetwinsize};

use crate::printable::printable;
use crate::program::logging;

/// What is over before is not shown.
const SHOWN_AFTER: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_secs(1);
/// Where a terminal does not say how many columns it has.
const COLUMNS: usize = 80;

/// The line on the terminal.
#[derive(Debug)]
pub struct Progress {
    is_terminal: bool,
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    /// What is waited for.
    what: String,
    since: Instant,
    /// When it is to be shown next.
    next: Instant,
    is_shown: bool,
}

impl Progress {
    /// On stderr.
    pub fn of_stderr() -> Progress {
        let can_erase = std::env::var("TERM").is_ok_and(|term| !["", "dumb"].contains(&&*term));
        Progress { is_terminal: can_erase && io::stderr().is_terminal(), waiting: None }
    }

    /// This is waited for, since then.
    pub fn wait_for(&mut self, what: String, since: Instant) {
        if !self.is_terminal {
            return;
        }
        match &mut self.waiting {
            Some(waiting) if waiting.since == since => waiting.what = what,
            _ => {
                self.end();
                let next = since + SHOWN_AFTER;
                self.waiting = Some(Waiting { what, since, next, is_shown: false });
            }
        }
    }

    /// It is over.
    pub fn end(&mut self) {
        if self.waiting.take().is_some_and(|waiting| waiting.is_shown) {
            logging::show("");
        }
    }

    /// How long at most until [`Progress::show`] has to be called again, if ever.
    pub fn patience(&self) -> Option<Duration> {
        let waiting = self.waiting.as_ref()?;
        Some(waiting.next.saturating_duration_since(Instant::now()))
    }

    /// Shows, if it is time, what is waited for.
    pub fn show(&mut self) {
        let now = Instant::now();
        let Some(waiting) = self.waiting.as_mut().filter(|waiting| waiting.next <= now) else {
            return;
        };
        waiting.next = now + INTERVAL;
        // In the background of a shell the line is what the user types.
        if tcgetpgrp(io::stderr()).is_ok_and(|foreground| foreground == getpgrp()) {
            let columns = tcgetwinsize(io::stderr()).map_or(0, |size| size.ws_col.into());
            let columns = if columns == 0 { COLUMNS } else { columns };
            let seconds = now.duration_since(waiting.since).as_secs();
            logging::show(&line(&printable(&waiting.what), seconds, columns));
            waiting.is_shown = true;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

/// What fits into a line of the terminal without reaching its end, where it would wrap.
fn line(what: &str, seconds: u64, columns: usize) -> String {
    let (title, time) = ("diskfuse: ", format!(" ({seconds} s)"));
    let room = columns.saturating_sub(title.len() + time.len() + 1);
    let what = match what.char_indices().nth(room) {
        Some(_) => what.chars().take(room.saturating_sub(3)).chain("...".chars()).collect(),
        None => what.to_owned(),
    };
    format!("{title}{what}{time}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_the_terminal() {
        let text = "connecting to nbd://host";
        assert_eq!(line(text, 3, 80), "diskfuse: connecting to nbd://host (3 s)");
        let cut = line(text, 3, 30);
        assert_eq!(cut, "diskfuse: connecting... (3 s)");
        assert_eq!(cut.len(), 29);
        line(text, 3, 0);
    }
}
