//! Asks files of exports for their reports, in bounded time.
//!
//! Whoever waits for an answer of a process that is stopped, or hangs, cannot always be killed, and
//! a process ends when all its threads have. So another process asks, with a thread for each file;
//! it is left behind where one of them waits on.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::export::ATTRIBUTE_STATS;

/// The name by which this program is called to ask.
const NAME: &str = "diskfuse-ask";
/// As long as the value of an attribute can be, in bytes.
const LONGEST: usize = 64 << 10;
/// The stack of a thread that asks, in bytes.
const STACK: usize = 64 << 10;

/// A report, or the errno instead of it.
pub type Answer = Result<Value, i32>;

/// What a file has told.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// When it has come.
    pub at: Instant,
    /// What it is.
    pub answer: Answer,
}

/// The process that asks.
#[derive(Debug)]
pub struct Asker {
    child: Child,
    /// Two for each file and round at most; each round takes out all.
    answers: Receiver<(usize, Told)>,
    /// For each file, whether the last round got nothing from it.
    silent: Vec<bool>,
}

impl Asker {
    /// Starts it for these files.
    pub fn start<'a>(files: impl IntoIterator<Item = &'a Path>) -> io::Result<Asker> {
        let files: Vec<_> = files.into_iter().collect();
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).args(&files).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn()?;
        let stdout = child.stdout.take().expect("it is piped");
        let (sender, answers) = mpsc::channel();
        thread::Builder::new().name("answers".into()).spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            let told = lines.filter_map(|line| {
                let (file, answer) = parse(&line)?;
                Some((file, Told { at: Instant::now(), answer }))
            });
            // Nobody listens any more at the end.
            { told }.try_for_each(|told| sender.send(told))
        })?;
        Ok(Asker { child, answers, silent: vec![false; files.len()] })
    }

    /// Asks for all of them, and gives what has come within the limit, in their order; none: no
    /// answer. A file that had none the last time is not waited for: its answer may come with
    /// the next round. An error where the process has ended.
    pub fn ask(&mut self, limit: Duration) -> io::Result<Vec<Option<Told>>> {
        let until = Instant::now() + limit;
        let mut all = vec![None; self.silent.len()];
        for (file, late) in self.answers.try_iter() {
            if let Some(place) = all.get_mut(file) {
                *place = Some(late);
            }
        }
        let is_waited_for = |(silent, late): (&bool, &Option<_>)| !silent || late.is_some();
        let mut waited: Vec<_> = self.silent.iter().zip(&all).map(is_waited_for).collect();
        self.child.stdin.as_mut().expect("it is piped").write_all(b"\n")?;
        while waited.contains(&true) {
            let left = until.saturating_duration_since(Instant::now());
            let (file, told) = match self.answers.recv_timeout(left) {
                Ok(told) => told,
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the process that asks the files has ended"));
                }
            };
            if let Some(place) = all.get_mut(file) {
                *place = Some(told);
                waited[file] = false;
            }
        }
        self.silent = all.iter().map(Option::is_none).collect();
        Ok(all)
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // Not for long: a thread of it may wait on.
        for _ in 0..20 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// `NUMBER REPORT`, or `NUMBER ERRNO`.
fn parse(line: &str) -> Option<(usize, Answer)> {
    let (file, answer) = line.split_once(' ')?;
    let answer = match answer.parse() {
        Ok(errno) => Err(errno),
        Err(_) => serde_json::from_str(answer).map_err(|_| libc::EPROTO),
    };
    Some((file.parse().ok()?, answer))
}

/// In the process that was started to ask: does so for each line on standard input, and gives the
/// exit status. None if this is not one.
pub fn run_if_called() -> Option<ExitCode> {
    let mut words = std::env::args_os();
    if words.next()? != NAME {
        return None;
    }
    let files = words.map(|word: OsString| PathBuf::from(OsString::from_vec(word.into_vec())));
    let threads: Vec<_> = files
        .enumerate()
        .map(|(number, file)| {
            // One round may wait for the end of the one before; the others are left out then.
            let (ask, rounds) = mpsc::sync_channel::<()>(1);
            let thread = thread::Builder::new().stack_size(STACK);
            let asking = thread.spawn(move || rounds.iter().for_each(|()| tell(number, &file)));
            if let Err(e) = asking {
                say(number, &e.raw_os_error().unwrap_or(libc::EAGAIN).to_string());
            }
            ask
        })
        .collect();
    for _ in io::stdin().lines().map_while(Result::ok) {
        for ask in &threads {
            let _ = ask.try_send(());
        }
    }
    Some(ExitCode::SUCCESS)
}

fn tell(number: usize, file: &Path) {
    let mut value = vec![0; LONGEST];
    match rustix::fs::getxattr(file, ATTRIBUTE_STATS, &mut value) {
        Ok(len) => say(number, &String::from_utf8_lossy(&value[..len])),
        Err(e) => say(number, &e.raw_os_error().to_string()),
    }
}

fn say(number: usize, answer: &str) {
    // Whoever does not listen any more has ended this process, or will.
    let _ = writeln!(io::stdout().lock(), "{number} {answer}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_reports_or_errors() {
        assert_eq!(parse("3 {\"pid\":7}").unwrap(), (3, Ok(serde_json::json!({ "pid": 7 }))));
        assert_eq!(parse("0 107").unwrap(), (0, Err(libc::ENOTCONN)));
        assert_eq!(parse("1 {\"pid\":").unwrap(), (1, Err(libc::EPROTO)));
        assert!(parse("{}").is_none() && parse("x {}").is_none());
    }
}
