//! What is said to people: on stderr, or to syslog once the process is in the background.
//!
//! Where many programs' lines stand beside each other, in syslog and in the journal, each has its
//! level; the time and the process are theirs to add. Each has the name of the export, wherever it
//! goes: there may be many on one machine, and one file for the stderr of all. (What RUST_LOG asks
//! for on stderr is for whoever watches one.)
//!
//! Nobody waits for a reader. A pipe that nobody drains, or a stuck /dev/log, blocks whoever writes
//! to it, so as soon as there is something to serve one thread does all the writing
//! ([`write_from_a_thread`]), and the others hand it their lines through a bounded queue; what
//! finds it full is counted and not said.
//!
//! What servers, paths and other programs have put into a message is shown, not carried out: see
//! [`printable`].
//!
//! What happens for each request of a broken disk would fill a log, so a warning or an error from
//! one place in the code is said the first time, and after that once a second at most, with how
//! often it was left out.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use log::Level;

use crate::printable::printable;
use crate::sys;

/// Lines that wait for the writing thread at most.
const WAITING_LINES: usize = 1024;
/// How long the end waits for the last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(1);
/// One place in the code is heard no more often than this.
const INTERVAL: Duration = Duration::from_secs(1);

/// Where lines go: one of the three below.
static SINK: AtomicU8 = AtomicU8::new(STDERR);
const STDERR: u8 = 0;
/// What systemd(1) takes from stderr.
const JOURNAL: u8 = 1;
const SYSLOG: u8 = 2;
static NAME: OnceLock<String> = OnceLock::new();
static WRITER: OnceLock<SyncSender<Line>> = OnceLock::new();
/// Lines that found the queue full.
static LOST: AtomicU64 = AtomicU64::new(0);
static REPEATS: OnceLock<Mutex<Repeats>> = OnceLock::new();

/// What the writing thread is given.
enum Line {
    Say(Level, String),
    /// Below all others, on a terminal.
    Show(String),
    /// Everything before has been written.
    Written(SyncSender<()>),
}

/// From here on messages go to syslog.
pub fn to_syslog() {
    sys::open_syslog();
    SINK.store(SYSLOG, Ordering::Release);
}

/// Names the export, for lines that do not.
pub fn set_name(name: &str) {
    let _ = NAME.set(printable(name).into_owned());
}

/// Whether stderr is the journal's, as systemd says of the one that it has given (systemd.exec(5)).
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let here = rustix::fs::fstat(io::stderr().as_fd());
    here.is_ok_and(|here| stream == format!("{}:{}", here.st_dev, here.st_ino))
}

/// Says something to whoever listens, on one line.
pub fn say(level: Level, message: &str) {
    let message = printable(message);
    let Some(writer) = WRITER.get() else { return write(level, &message) };
    if let Err(TrySendError::Full(_)) = writer.try_send(Line::Say(level, message.into_owned())) {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

fn write(level: Level, message: &str) {
    let named = named(message, NAME.get().map(String::as_str));
    // stderr may be closed; there is nobody else to tell.
    match SINK.load(Ordering::Acquire) {
        SYSLOG => sys::syslog(priority(level), &named),
        JOURNAL => _ = writeln!(io::stderr(), "<{}>{named}", priority(level)),
        _ if level <= Level::Warn => _ = writeln!(io::stderr(), "diskfuse: {named}"),
        _ => _ = writeln!(io::stderr(), "diskfuse: {message}"),
    }
}

/// The message with the export's name in it.
fn named<'a>(message: &'a str, name: Option<&str>) -> Cow<'a, str> {
    match name.filter(|name| !has_word(message, name)) {
        Some(name) => Cow::Owned(format!("{name}: {message}")),
        None => Cow::Borrowed(message),
    }
}

/// Whether the text has the name as a word of its own: `disk` is not in `/mnt/disk2: lost`.
fn has_word(text: &str, name: &str) -> bool {
    let is_end = |c: Option<char>| c.is_none_or(|c| c.is_whitespace() || ":,;()'\"".contains(c));
    text.match_indices(name).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + name.len()..]);
        is_end(before.chars().next_back()) && is_end(after.chars().next())
    })
}

/// As syslog(3) counts.
fn priority(level: Level) -> libc::c_int {
    match level {
        Level::Error => libc::LOG_ERR,
        Level::Warn => libc::LOG_WARNING,
        Level::Info => libc::LOG_INFO,
        Level::Debug | Level::Trace => libc::LOG_DEBUG,
    }
}

/// Starts the thread that writes. Not before a fork, which takes no thread along.
pub fn write_from_a_thread() -> io::Result<()> {
    let (sender, lines) = mpsc::sync_channel(WAITING_LINES);
    std::thread::Builder::new().name("log".into()).spawn(move || {
        let mut shown = String::new();
        for line in lines {
            match line {
                Line::Show(text) => {
                    if !(text.is_empty() && shown.is_empty()) {
                        draw(&text);
                    }
                    shown = text;
                }
                Line::Say(level, message) => {
                    if !shown.is_empty() {
                        draw("");
                    }
                    write(level, &message);
                    match LOST.swap(0, Ordering::Relaxed) {
                        0 => {}
                        lost => {
                            let why = format!("{lost} messages were lost: nobody read them");
                            write(Level::Warn, &why);
                        }
                    }
                    if !shown.is_empty() {
                        draw(&shown);
                    }
                }
                Line::Written(done) => _ = done.try_send(()),
            }
        }
    })?;
    let _ = WRITER.set(sender);
    Ok(())
}

/// Shows a line on the terminal that stderr is, below all that is said, until the next such line
/// takes its place; an empty one is none.
pub fn show(line: &str) {
    if let Some(writer) = WRITER.get() {
        // Where lines wait for a reader this one can be done without; one that stays is no harm.
        let _ = writer.try_send(Line::Show(line.into()));
    }
}

/// Writes over the line that the cursor is in, and stays in it.
fn draw(line: &str) {
    if SINK.load(Ordering::Acquire) != SYSLOG {
        let _ = write!(io::stderr(), "\r\x1b[K{line}");
    }
}

/// Says what was left out so far, and waits until all has been written, or cannot be.
pub fn finish() {
    show("");
    for (level, left_out) in repeats().all_left_out() {
        say(level, &left_out);
    }
    let Some(writer) = WRITER.get() else { return };
    let (done, written) = mpsc::sync_channel(1);
    if writer.try_send(Line::Written(done)).is_ok() {
        let _ = written.recv_timeout(LAST_LINES);
    }
}

fn repeats() -> MutexGuard<'static, Repeats> {
    let repeats = REPEATS.get_or_init(Mutex::default);
    repeats.lock().expect("no code panics while it holds them")
}

/// Where in the code a message comes from.
type Place = (&'static str, u32);

/// What has been said lately, by place.
#[derive(Default)]
struct Repeats(HashMap<Place, Said>);

struct Said {
    at: Instant,
    level: Level,
    left_out: u64,
    last: String,
}

impl Repeats {
    /// The message as it is to be said `now`, if it is.
    fn heard(
        &mut self,
        place: Place,
        level: Level,
        message: String,
        now: Instant,
    ) -> Option<String> {
        match self.0.get_mut(&place) {
            Some(said) if now < said.at + INTERVAL => {
                said.left_out += 1;
                said.last = message;
                None
            }
            Some(said) => {
                said.at = now;
                let left_out = std::mem::take(&mut said.left_out);
                Some(with_count(message, left_out))
            }
            None => {
                let said = Said { at: now, level, left_out: 0, last: String::new() };
                self.0.insert(place, said);
                Some(message)
            }
        }
    }

    /// For each place from which messages were left out, the last of them.
    fn all_left_out(&mut self) -> Vec<(Level, String)> {
        let left_out = self.0.values_mut().filter(|said| said.left_out > 0);
        left_out
            .map(|said| {
                let earlier = std::mem::take(&mut said.left_out) - 1;
                (said.level, with_count(std::mem::take(&mut said.last), earlier))
            })
            .collect()
    }
}

fn with_count(message: String, left_out: u64) -> String {
    match left_out {
        0 => message,
        n => format!("{message} (and {n} more like it before)"),
    }
}

/// Warnings and errors are logged; RUST_LOG asks for more.
pub fn start() {
    if stderr_is_journal() {
        SINK.store(JOURNAL, Ordering::Release);
    }
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format(|out, record| {
            let (level, message) = (record.level(), record.args().to_string());
            if level > Level::Warn {
                let is_plain = SINK.load(Ordering::Acquire) == STDERR;
                let title = level.as_str().to_lowercase();
                let stamped = || format!("{} {title}: {message}", out.timestamp_micros());
                say(level, &if is_plain { stamped() } else { message });
                return Ok(());
            }
            let place = (record.file_static().unwrap_or(""), record.line().unwrap_or(0));
            if let Some(message) = repeats().heard(place, level, message, Instant::now()) {
                say(level, &message);
            }
            Ok(())
        })
        // All is said by then.
        .target(env_logger::Target::Pipe(Box::new(io::sink())))
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_place_is_heard_once_a_second_with_a_count() {
        let mut repeats = Repeats::default();
        let start = Instant::now();
        let mut said = Vec::new();
        for n in 0..3000_u64 {
            let now = start + Duration::from_millis(n);
            said.extend(repeats.heard(("here", 1), Level::Warn, format!("failure {n}"), now));
        }
        assert_eq!(
            said,
            [
                "failure 0",
                "failure 1000 (and 999 more like it before)",
                "failure 2000 (and 999 more like it before)"
            ]
        );
        let last = "failure 2999 (and 998 more like it before)".to_owned();
        assert_eq!(repeats.all_left_out(), [(Level::Warn, last)]);
        assert!(repeats.all_left_out().is_empty());
    }

    #[test]
    fn a_line_has_the_name_of_the_export_once() {
        assert_eq!(named("mem:1M: lost", Some("mem:1M")), "mem:1M: lost");
        assert_eq!(named("lost", Some("mem:1M")), "mem:1M: lost");
        assert_eq!(named("lost", None), "lost");
        assert_eq!(named("/mnt/disk: lost", Some("disk")), "disk: /mnt/disk: lost");
        assert_eq!(named("disk2: lost", Some("disk")), "disk: disk2: lost");
        assert_eq!(named("(disk, disk2)", Some("disk")), "(disk, disk2)");
    }

    #[test]
    fn places_do_not_silence_each_other() {
        let mut repeats = Repeats::default();
        let now = Instant::now();
        for line in 0..3 {
            let heard = repeats.heard(("here", line), Level::Error, "x".into(), now);
            assert_eq!(heard, Some("x".into()));
        }
    }
}
