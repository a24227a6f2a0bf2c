//! A server of our own: the command between `[` and `]`, which serves one disk, and ends with it.
//!
//! It is started as systemd starts a service on a socket: with a socket that listens already as
//! descriptor 3, and `LISTEN_FDS` and `LISTEN_PID` in its environment. So it can be connected to at
//! once, without a port, and without a path: the socket's name is removed as soon as there is a
//! descriptor of it, by which it is reached. Only the server holds what listens, so that nothing
//! waits for one that has ended.
//!
//! ```text
//! control thread ── fork, exec ──▶ diskfuse-server ── exec ──▶ the command
//!                                  a session of its own, SIGTERM when we end, LISTEN_PID
//! ```
//!
//! The number in `LISTEN_PID` is known only in the child, so this very program is executed in
//! between, and becomes the command.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, PipeReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt, parent_id};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::backend::Failure;
use crate::backend::nbd::uri::Address;
use crate::backend::nbd::{self, Uri};
use crate::program::logging;
use crate::sys;

/// The name by which this program is called to become a server.
const NAME: &str = "diskfuse-server";
/// The first descriptor that is passed, by the convention.
const FIRST_FD: i32 = 3;
/// As a shell has it for a command that cannot be started.
const NOT_STARTED: u8 = 127;
/// How long a server may take to end after SIGTERM: it may have a disk's caches to write.
const ENDS: Duration = Duration::from_secs(30);
/// An end that takes longer is reported.
const LONG_END: Duration = Duration::from_secs(2);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(10);
/// From the end of a server's connections to its own, and to that of its words: when it has died
/// both are near.
const NEAR: Duration = Duration::from_secs(1);
/// A longer line of its words is cut, in bytes.
const LONGEST_LINE: u64 = 4096;

/// A server that runs; ended when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// The command as it was given.
    name: String,
    /// Its program's name.
    program: String,
    /// The socket that it listens on, by `O_PATH`.
    socket: File,
    /// Its standard output and error, until somebody shows them.
    words: Option<PipeReader>,
    shown: Option<JoinHandle<()>>,
    status: Option<ExitStatus>,
    /// Its end has been told of.
    told: bool,
}

impl Server {
    /// Starts a command. It is to be called on the thread that lives as long as the process: the
    /// kernel ends the server with that. `name` is for messages.
    pub fn start(command: &[String], name: String) -> Result<Server, String> {
        let program = command.first().map_or("", |path| program_name(path)).to_owned();
        let start = || {
            let (listener, socket) = listen()?;
            let (words, writer) = io::pipe()?;
            let mut child = Command::new("/proc/self/exe");
            child.arg0(NAME).arg(std::process::id().to_string()).args(command);
            child.stdin(listener).stdout(writer.try_clone()?).stderr(writer);
            // What this process has of the socket and the pipe ends with `child`.
            Ok((child.spawn()?, socket, words))
        };
        let started: io::Result<_> = start();
        let (child, socket, words) =
            started.map_err(|e| format!("{name}: the server is not started: {e}"))?;
        let words = Some(words);
        Ok(Server { child, name, program, socket, words, shown: None, status: None, told: false })
    }

    /// Shows what it says, from now on, from a thread. What it says before waits in the pipe.
    pub fn show_words(&mut self) -> io::Result<()> {
        if let Some(words) = self.words.take() {
            let name = self.program.clone();
            let show = move || show(words, &name);
            self.shown = Some(std::thread::Builder::new().name("server".into()).spawn(show)?);
        }
        Ok(())
    }

    /// Where its disk is. Good as long as this lives.
    pub fn uri(&self) -> Uri {
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.socket.as_raw_fd()));
        Uri {
            address: Address::Unix(path),
            tls: false,
            export: String::new(),
            tls_certificates: None,
            tls_hostname: None,
        }
    }

    /// Its end while its disk is served, if it has come. Who asks tells the log.
    pub fn death(&mut self) -> Option<Failure> {
        let status = self.ended()?;
        self.told = true;
        let what = format!("the server has ended ({status})");
        Some(Failure { what, why: "start diskfuse anew".into(), for_good: true })
    }

    /// The same, when it has ended its connections: what has died goes on for a moment.
    pub fn death_soon(&mut self) -> Option<Failure> {
        until(NEAR, || self.ended().is_some());
        self.death()
    }

    /// How it has ended, if it has.
    fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().unwrap_or_else(|e| {
                log::error!("{}: cannot be waited for: {e}", self.name);
                None
            });
        }
        self.status
    }

    /// Why its disk could not be opened. If it has ended that is why, and what it has said comes
    /// first.
    pub fn failure(&mut self, error: &nbd::Error) -> String {
        let lost = matches!(error, nbd::Error::Broken(_) | nbd::Error::Connect { .. });
        if lost {
            until(NEAR, || self.ended().is_some());
        }
        let name = self.name.clone();
        match self.ended() {
            Some(status) => {
                self.told = true;
                self.hear_out();
                format!("{name}: the server has ended before it served ({status})")
            }
            None if matches!(error, nbd::Error::Silent { .. }) => format!(
                "{name}: {error} It has to take its socket from who starts it (LISTEN_FDS), as \
                 qemu-nbd and nbdkit do"
            ),
            None => format!("{name}: {error}"),
        }
    }

    /// Ends it: SIGTERM, and SIGKILL if it takes too long, or `hurry` says so, which waits a
    /// moment.
    pub fn end(&mut self, mut hurry: impl FnMut(Duration) -> bool) {
        let began = Instant::now();
        let mut killed = false;
        let mut reported = false;
        self.signal(Signal::TERM);
        while self.ended().is_none() {
            if began.elapsed() >= LONG_END && !std::mem::replace(&mut reported, true) {
                log::warn!("{}: waiting for the server to end", self.name);
            }
            if !killed && (hurry(LOOK) || began.elapsed() >= ENDS) {
                log::warn!("{}: the server does not end: killed", self.name);
                killed = true;
                self.signal(Signal::KILL);
            } else if killed {
                std::thread::sleep(LOOK);
                // What the kernel itself does not let go is no reason to stay.
                if began.elapsed() >= ENDS + NEAR {
                    log::error!("{}: the server cannot be killed", self.name);
                    return;
                }
            }
        }
        self.hear_out();
        if let Some(status) = self.status
            && !(self.told || killed || is_well(status))
        {
            log::warn!("{}: the server has ended badly ({status})", self.name);
        }
        self.told = true;
    }

    fn signal(&mut self, signal: Signal) {
        if self.ended().is_none()
            && let Err(e) = kill_process(Pid::from_child(&self.child), signal)
        {
            log::warn!("{}: the server cannot be signalled: {e}", self.name);
        }
    }

    /// After its end: waits until its last words have been shown. A process that it has left may
    /// hold the pipe open.
    fn hear_out(&mut self) {
        if let Some(shown) = &self.shown {
            until(NEAR, || shown.is_finished());
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(|moment| {
            std::thread::sleep(moment);
            false
        });
    }
}

/// Polls until `done`, for as long as `limit`.
fn until(limit: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !done() && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
}

/// It has ended by itself, or for the SIGTERM, which a shell reports as a status.
fn is_well(status: ExitStatus) -> bool {
    const BY_SIGTERM: i32 = 128 + libc::SIGTERM;
    status.signal() == Some(libc::SIGTERM) || matches!(status.code(), Some(0 | BY_SIGTERM))
}

/// A socket that listens, and another way to it. Nobody else finds one: it was in a folder for us
/// only, and is gone from there.
fn listen() -> io::Result<(OwnedFd, File)> {
    let folder = tempfile::Builder::new().prefix("diskfuse-").tempdir()?;
    let path = folder.path().join("nbd.socket");
    let listener = UnixListener::bind(&path)?;
    let socket = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path)?;
    folder.close()?;
    Ok((listener.into(), socket))
}

fn program_name(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path)
}

/// Says line by line what comes, under the program's name.
fn show(words: PipeReader, name: &str) {
    let mut words = BufReader::new(words);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut words).take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) => return log::warn!("{name}: what it says cannot be read: {e}"),
        }
        let text = String::from_utf8_lossy(&line);
        match text.trim_end() {
            "" => {}
            // Most say who they are.
            text if text.starts_with(name) => logging::say(log::Level::Warn, text),
            text => logging::say(log::Level::Warn, &format!("{name}: {text}")),
        }
    }
}

/// In the process that was started to become a server: becomes it. None if this is not one; a
/// status if that fails.
pub fn become_if_called() -> Option<ExitCode> {
    let mut words = std::env::args_os();
    if words.next()? != NAME {
        return None;
    }
    let parent = words.next()?;
    let program = words.next()?;
    let why = become_server(&parent, &program, words);
    // Shown under its name.
    eprintln!("{}: cannot be started: {why}", program.to_string_lossy());
    Some(ExitCode::from(NOT_STARTED))
}

#[allow(unsafe_code)]
fn become_server(
    parent: &OsString,
    program: &OsString,
    words: impl Iterator<Item = OsString>,
) -> io::Error {
    let prepare = || {
        // A terminal's Ctrl-C is for us: the server is needed until everything is flushed.
        rustix::process::setsid()?;
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        let is_orphan = parent_id().to_string() != parent.to_string_lossy();
        if is_orphan {
            return Err(io::Error::other("who has started it has ended"));
        }
        // SAFETY: this process was started for this, and owns nothing but the standard streams.
        unsafe { sys::duplicate_to(&io::stdin(), FIRST_FD) }
    };
    if let Err(e) = prepare() {
        return e;
    }
    Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .env("LISTEN_PID", std::process::id().to_string())
        .env("LISTEN_FDS", "1")
        .env_remove("LISTEN_FDNAMES")
        .exec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_reached_without_a_name() {
        use std::os::unix::net::UnixStream;
        let (listener, socket) = listen().unwrap();
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        let _client = UnixStream::connect(&path).unwrap();
        let (_stream, _) = UnixListener::from(listener).accept().unwrap();
        let refused = UnixStream::connect(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "nobody listens any more");
    }

    #[test]
    fn ends_are_told_apart() {
        let well = |raw| is_well(ExitStatus::from_raw(raw));
        assert!(well(0) && well(libc::SIGTERM) && well((128 + libc::SIGTERM) << 8));
        assert!(!well(1 << 8) && !well(libc::SIGKILL) && !well(libc::SIGSEGV));
    }

    #[test]
    fn programs_are_known_by_their_names() {
        assert_eq!(program_name("/usr/bin/nbdkit"), "nbdkit");
        assert_eq!(program_name("qemu-nbd"), "qemu-nbd");
        assert_eq!(program_name(".."), "..");
    }
}
