//! `--top`: what exports do, each second, on a terminal, as lines or as JSON.
//!
//! An export tells of itself; a second process asks it ([`Asker`]), so that nothing here waits for
//! one that is stopped. This one has a single thread that draws, and waits for the next interval, a
//! signal or a key, whichever comes first.

mod drawing;
mod figures;
mod terminal;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use log::Level;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::mount::table;
use crate::program::ask::{Asker, Told};
use crate::program::failure::Failure;
use crate::program::signals::{Signals, Wish};
use crate::program::{logging, mounts};
use crate::sys;
use drawing::{Row, SERVED, SERVER_AWAY};
use figures::Sample;
use terminal::Terminal;

/// From one row of figures to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the first answer may take, as with --mounts, and each later one.
const FIRST_LIMIT: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_millis(800);
/// What a pipe that polls writable takes without waiting (PIPE_BUF), in bytes.
const PIECE: usize = 4096;

/// Shows what the exports at `files` do, or all that are here if it names none, until it is ended,
/// or all of them have.
pub fn run(files: &[PathBuf], json: bool) -> Result<(), Failure> {
    let is_drawn = !json && Terminal::is_there();
    let more = [libc::SIGTSTP, libc::SIGWINCH];
    let signals = Signals::take_and(if is_drawn { &more } else { &[] });
    let signals = signals.map_err(|e| Failure::Serving(format!("signals: {e}")))?;
    let Some((mut watch, rows)) = Watch::start(files)? else {
        logging::say(Level::Info, "nothing is exported here");
        return Ok(());
    };
    let terminal = if is_drawn { Terminal::take().map(Some) } else { Ok(None) };
    let terminal = terminal.map_err(|e| Failure::Serving(format!("the terminal: {e}")))?;
    let show = Show { signals, terminal, json, has_head: false, reads_keys: true };
    let ended = show.go(&mut watch, rows);
    // The terminal is as it was: there it can be read.
    if ended? == End::Exports {
        logging::say(Level::Info, "all exports that were shown have ended");
    }
    Ok(())
}

/// The files that are asked.
struct Watch {
    /// The user has named them; else they are all that are here.
    are_named: bool,
    files: Vec<Watched>,
    asker: Asker,
}

struct Watched {
    file: PathBuf,
    /// What it has told last.
    before: Option<Sample>,
}

impl Watch {
    /// Asks for the first time; none: there is nothing to ask.
    fn start(named: &[PathBuf]) -> Result<Option<(Watch, Vec<Row>)>, Failure> {
        let are_named = !named.is_empty();
        let files = if are_named { named.to_vec() } else { all_here().map_err(cannot_ask)? };
        if files.is_empty() {
            return Ok(None);
        }
        let asker = Asker::start(files.iter().map(PathBuf::as_path)).map_err(cannot_ask)?;
        let files = files.into_iter().map(|file| Watched { file, before: None }).collect();
        let mut watch = Watch { are_named, files, asker };
        let told = watch.asker.ask(FIRST_LIMIT).map_err(cannot_ask)?;
        let errno = |told: &Option<Told>| told.as_ref().and_then(|told| told.answer.clone().err());
        if are_named {
            let refused = watch.files.iter().zip(&told);
            let mut refused = refused.filter_map(|(file, told)| Some((file, errno(told)?)));
            if let Some((watched, errno)) = refused.next() {
                return Err(refusal(&watched.file, errno));
            }
        } else if told.iter().all(|told| errno(told).is_some()) {
            let why = "nothing that is exported here can be asked: see diskfuse --mounts";
            return Err(Failure::Source(why.into()));
        }
        let rows = watch.rows(told);
        Ok(Some((watch, rows)))
    }

    /// What they do now, and whether one of them at least may have more to tell.
    fn look(&mut self) -> io::Result<(Vec<Row>, bool)> {
        if !self.are_named {
            self.follow(all_here()?)?;
        }
        let told = self.asker.ask(LIMIT)?;
        let goes_on = told.iter().any(|told| match told.as_ref().map(|told| &told.answer) {
            Some(Err(errno)) => !is_end(*errno),
            Some(Ok(_)) | None => true,
        });
        Ok((self.rows(told), goes_on))
    }

    /// Asks these from now on.
    fn follow(&mut self, files: Vec<PathBuf>) -> io::Result<()> {
        if self.files.iter().map(|watched| &watched.file).eq(&files) {
            return Ok(());
        }
        self.asker = Asker::start(files.iter().map(PathBuf::as_path))?;
        let mut known = std::mem::take(&mut self.files);
        let watched = files.into_iter().map(|file| {
            let before = known.iter_mut().find(|watched| watched.file == file);
            Watched { before: before.and_then(|watched| watched.before.take()), file }
        });
        self.files = watched.collect();
        Ok(())
    }

    fn rows(&mut self, told: Vec<Option<Told>>) -> Vec<Row> {
        self.files.iter_mut().zip(told).map(|(watched, told)| watched.row(told)).collect()
    }
}

impl Watched {
    fn row(&mut self, told: Option<Told>) -> Row {
        let file = self.file.display().to_string();
        let (at, report) = match told {
            Some(Told { at, answer: Ok(report) }) => (at, report),
            told => {
                let state = match told.and_then(|told| told.answer.err()) {
                    Some(errno) if is_away(errno) => "ended".into(),
                    errno => mounts::what_is_wrong(errno),
                };
                return Row { file, state, ..Row::default() };
            }
        };
        let sample = Sample::of(&report, at);
        let figures = self.before.as_ref().and_then(|before| sample.since(before));
        self.before = Some(sample);
        let is_away = report["nbd"]["connections"].as_u64() == Some(0);
        let state = if is_away { SERVER_AWAY } else { SERVED }.into();
        Row { file, state, report, figures }
    }
}

/// The files that `--mounts` shows, but those that another mount covers.
fn all_here() -> io::Result<Vec<PathBuf>> {
    let mounts = table::all()?.into_iter().filter(|mount| !mount.is_covered);
    Ok(mounts.map(|mount| mount.path).collect())
}

/// Nothing of this program's is there.
fn is_away(errno: i32) -> bool {
    [libc::ENOENT, libc::ENOTDIR, libc::ENODATA, libc::EOPNOTSUPP].contains(&errno)
}

/// No report will come.
fn is_end(errno: i32) -> bool {
    let others = [libc::ENOTCONN, libc::ECONNABORTED, libc::EACCES, libc::EPERM];
    is_away(errno) || others.contains(&errno)
}

/// Why a file that the user has named is not shown.
fn refusal(file: &Path, errno: i32) -> Failure {
    let file = file.display();
    match errno {
        libc::ENODATA | libc::EOPNOTSUPP => {
            Failure::Usage(format!("{file}: no file of diskfuse: see diskfuse --mounts"))
        }
        errno if is_away(errno) => {
            let e = io::Error::from_raw_os_error(errno);
            Failure::Usage(format!("{file}: {e}: see diskfuse --mounts"))
        }
        libc::ENOTCONN | libc::ECONNABORTED => {
            Failure::Source(format!("{file}: nobody serves it any more: umount it"))
        }
        libc::EACCES | libc::EPERM => Failure::Source(format!(
            "{file}: its report is for the user who serves it, and with --allow-other for others"
        )),
        errno => Failure::Source(format!("{file}: {}", io::Error::from_raw_os_error(errno))),
    }
}

fn cannot_ask(e: io::Error) -> Failure {
    Failure::Serving(format!("the exports cannot be asked: {e}"))
}

/// Why it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// A signal, a key, or nobody reads.
    Wished,
    /// All exports have ended.
    Exports,
}

/// What has come while it waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Nothing,
    /// The terminal's content is no longer what was drawn, or has another size.
    Redraw,
    End,
}

/// Where it is shown, and what can end it.
struct Show {
    signals: Signals,
    terminal: Option<Terminal>,
    json: bool,
    /// The names of the columns have been written.
    has_head: bool,
    reads_keys: bool,
}

impl Show {
    /// From the rows of the first answers on, which have no figures: only a screen has them.
    fn go(mut self, watch: &mut Watch, mut rows: Vec<Row>) -> Result<End, Failure> {
        let lost = |e: io::Error| Failure::Serving(format!("standard output: {e}"));
        let mut next = Instant::now() + INTERVAL;
        let mut goes_on = true;
        let mut is_shown = self.terminal.is_some();
        loop {
            if is_shown && self.show(&rows).map_err(lost)? == Event::End {
                return Ok(End::Wished);
            }
            if !goes_on {
                return Ok(End::Exports);
            }
            is_shown = true;
            match self.wait(next).map_err(lost)? {
                Event::End => return Ok(End::Wished),
                Event::Redraw => {}
                Event::Nothing => {
                    (rows, goes_on) = watch.look().map_err(cannot_ask)?;
                    next += INTERVAL;
                    if next < Instant::now() {
                        next = Instant::now() + INTERVAL;
                    }
                }
            }
        }
    }

    fn show(&mut self, rows: &[Row]) -> io::Result<Event> {
        let text = match &self.terminal {
            Some(terminal) => drawing::screen(rows, terminal.size()),
            None if self.json => {
                let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                drawing::json_lines(rows, time.unwrap_or_default().as_secs_f64())
            }
            None => {
                let head = (!self.has_head).then(drawing::head);
                self.has_head = true;
                let lines = head.into_iter().chain(drawing::lines(rows));
                lines.map(|line| line + "\n").collect()
            }
        };
        self.write(text.as_bytes())
    }

    /// Writes it all, unless an end is wished before there is room for it.
    fn write(&mut self, mut text: &[u8]) -> io::Result<Event> {
        let stdout = io::stdout();
        while !text.is_empty() {
            let mut polled = [
                PollFd::new(&stdout, PollFlags::OUT),
                PollFd::new(self.signals.descriptor(), PollFlags::IN),
            ];
            polled_without_end(&mut polled, None)?;
            let [is_writable, is_signalled] = polled.map(|fd| !fd.revents().is_empty());
            if is_signalled && self.signalled()? == Event::End {
                return Ok(Event::End);
            }
            if is_writable {
                let piece = &text[..text.len().min(PIECE)];
                match rustix::io::write(&stdout, piece).map_err(io::Error::from) {
                    Ok(written) => text = &text[written..],
                    // Who closes the pipe does not want the rest.
                    Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Event::End),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(Event::Nothing)
    }

    /// Waits until then, if nothing else comes.
    fn wait(&mut self, until: Instant) -> io::Result<Event> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        loop {
            let keys = self.terminal.is_some() && self.reads_keys;
            let mut polled = [
                PollFd::new(self.signals.descriptor(), PollFlags::IN),
                // Its error: that nobody reads any more.
                PollFd::new(&stdout, PollFlags::empty()),
                PollFd::new(&stdin, PollFlags::IN),
            ];
            let number = if keys { 3 } else { 2 };
            if polled_without_end(&mut polled[..number], Some(until))? == 0 {
                return Ok(Event::Nothing);
            }
            let [is_signalled, is_unread, is_key] = polled.map(|fd| !fd.revents().is_empty());
            let event = match () {
                () if is_signalled => self.signalled()?,
                () if is_unread => Event::End,
                () if keys && is_key => self.key()?,
                () => Event::Nothing,
            };
            if event != Event::Nothing {
                return Ok(event);
            }
        }
    }

    fn key(&mut self) -> io::Result<Event> {
        let mut keys = [0; 64];
        match rustix::io::read(io::stdin(), &mut keys[..]) {
            Ok(number) => {
                self.reads_keys = number > 0;
                let is_end = keys[..number].iter().any(|key| b"qQ".contains(key));
                Ok(if is_end { Event::End } else { Event::Nothing })
            }
            Err(rustix::io::Errno::INTR) => Ok(Event::Nothing),
            // Its own group is not in the foreground, or the terminal is gone.
            Err(_) => {
                self.reads_keys = false;
                Ok(Event::Nothing)
            }
        }
    }

    fn signalled(&mut self) -> io::Result<Event> {
        let mut event = Event::Nothing;
        while let Some(signal) = self.signals.next()? {
            match (signal.wish(), signal.number, &self.terminal) {
                (Wish::End, ..) => return Ok(Event::End),
                (_, libc::SIGTSTP, Some(terminal)) => {
                    terminal::leave();
                    sys::stop()?;
                    terminal.enter()?;
                    event = Event::Redraw;
                }
                (_, libc::SIGWINCH, _) => event = Event::Redraw,
                _ => {}
            }
        }
        Ok(event)
    }
}

/// How many have something; 0: the time has come.
fn polled_without_end(polled: &mut [PollFd], until: Option<Instant>) -> io::Result<usize> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(polled, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return Ok(ready?),
        }
    }
}
