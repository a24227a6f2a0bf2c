//! The program under test, running.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::mounts::{self, Seen};
use super::{SOON, eventually};

/// After this the connection of an export is cut, whatever the test does: a test that hangs fails.
const LIFETIME: Duration = Duration::from_secs(300);

/// The program: `DISKFUSE_BINARY`, or what cargo built.
pub fn binary() -> &'static str {
    static BINARY: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    BINARY.get_or_init(|| {
        std::env::var("DISKFUSE_BINARY").unwrap_or(env!("CARGO_BIN_EXE_diskfuse").into())
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Legacy,
    Uring,
}

impl Transport {
    pub const ALL: [Transport; 2] = [Transport::Legacy, Transport::Uring];

    pub fn name(self) -> &'static str {
        match self {
            Transport::Legacy => "legacy",
            Transport::Uring => "uring",
        }
    }

    pub fn option(self) -> &'static str {
        match self {
            Transport::Legacy => "--io-uring=off",
            Transport::Uring => "--io-uring=on",
        }
    }

    /// As the program's log has it.
    fn title(self) -> &'static str {
        match self {
            Transport::Legacy => "served by /dev/fuse: ",
            Transport::Uring => "served by io_uring: ",
        }
    }
}

/// Requests that a transport carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    pub reads: u64,
    pub writes: u64,
    /// From one queue's thread to another's
    pub handed_over: u64,
}

/// How an export ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    /// What it wrote on standard error
    pub log: String,
}

impl Ended {
    pub fn served(&self, transport: Transport) -> Served {
        let line = self.log.lines().find_map(|line| Some(line.split_once(transport.title())?.1));
        let count = |what: &str| {
            let words: Vec<&str> = line?.split([' ', ',']).filter(|w| !w.is_empty()).collect();
            words.windows(2).find(|pair| pair[1] == what)?[0].parse().ok()
        };
        Served {
            reads: count("reads").unwrap_or(0),
            writes: count("writes").unwrap_or(0),
            handed_over: count("handed").unwrap_or(0),
        }
    }

    /// What is told to everybody, whatever RUST_LOG says: warnings and failures.
    pub fn warnings(&self) -> Vec<&str> {
        let is_more = |line: &str| line.contains(" info: ") || line.contains(" debug: ");
        self.log.lines().filter(|line| !is_more(line)).collect()
    }

    /// Asserts the exit status and that each of `words` is in the message.
    #[track_caller]
    pub fn assert(&self, status: i32, words: &[&str]) {
        assert_eq!(self.status.code(), Some(status), "{}", self.log);
        for word in words {
            assert!(self.log.contains(word), "{word:?} is missing in: {}", self.log);
        }
    }
}

/// A running diskfuse with its file. When it is dropped, it is stopped by SIGTERM and has to end
/// well: status 0, no mount, the mountpoint as it was, all reads and writes carried by the
/// transport that was asked for. When a test fails, it is killed.
pub struct Export {
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    file: PathBuf,
    mount: Seen,
    /// The mountpoint's own content, if it had any; unknown where something was mounted on it
    /// already, or where it is the image.
    before: Option<Option<Vec<u8>>>,
    transport: Option<Transport>,
    has_ended: bool,
    /// Its end ends the watch.
    watch: Option<Sender<()>>,
}

impl Export {
    /// Starts the program and waits until its file is mounted, or until it has ended. `tune` may
    /// change the command.
    pub fn try_start(
        source: &str,
        file: &Path,
        options: &[&str],
        tune: impl FnOnce(&mut Command),
    ) -> Result<Export, Ended> {
        let link = file.is_symlink().then(|| file.canonicalize().expect("a link to something"));
        let (given, file) = (file, link.as_deref().unwrap_or(file));
        // What is mounted there may be dead: do not touch it.
        let mounted_before = mounts::mounts_at(file);
        let is_its_own = mounted_before.is_empty() && file != Path::new(source);
        let before = is_its_own.then(|| std::fs::read(file).ok());
        let mut command = Command::new(binary());
        command.args(options).arg(source).arg(given).env("RUST_LOG", "info");
        tune(&mut command);
        let mut running = Running::start(&mut command);
        let deadline = Instant::now() + SOON;
        let mount = loop {
            // Said once it serves. Till then it may be mounted, and yet be refused.
            if running.log().contains(" is at ")
                && let Some(mount) = mounts::mounts_at(file).pop()
            {
                break mount;
            }
            if let Some(status) = running.try_wait() {
                return Err(Ended { status, log: running.whole_log() });
            }
            assert!(Instant::now() < deadline, "no mount, and no end: {}", running.log());
            std::thread::sleep(Duration::from_millis(2));
        };
        let child = running.child.take().expect("it runs");
        let watch = watch(child.id(), mount.connection);
        Ok(Export {
            child,
            log: running.log.clone(),
            reader: running.reader.take(),
            file: file.to_owned(),
            mount,
            before,
            transport: None,
            has_ended: false,
            watch: Some(watch),
        })
    }

    /// From now on only this transport may carry reads and writes.
    pub fn only_by(mut self, transport: Transport) -> Export {
        self.transport = Some(transport);
        self
    }

    /// The exported file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The number of its FUSE connection.
    pub fn connection(&self) -> u64 {
        self.mount.connection
    }

    pub fn is_mounted(&self) -> bool {
        mounts::mounts_at(&self.file).contains(&self.mount)
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("no panic while it is held").clone()
    }

    pub fn kill(&self, signal: i32) {
        let signal = Signal::from_named_raw(signal).expect("a signal");
        kill_process(pid(self.child.id()), signal).expect("it has not been waited for");
    }

    pub fn has_exited(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    /// Sends a signal, and waits for the end.
    pub fn stop(&mut self, signal: i32) -> Ended {
        self.kill(signal);
        self.wait()
    }

    /// Waits for the end. Nothing may be mounted then, and the mountpoint is as it was.
    #[track_caller]
    pub fn wait(&mut self) -> Ended {
        let ended = self.wait_whatever_is_left();
        assert!(!self.is_mounted(), "{}: still mounted: {}", self.file.display(), ended.log);
        if let Some(before) = &self.before
            && mounts::mounts_at(&self.file).is_empty()
        {
            let left = std::fs::read(&self.file).ok();
            let lengths = (left.as_ref().map(Vec::len), before.as_ref().map(Vec::len));
            assert!(left == *before, "not as it was: {lengths:?}: {}", ended.log);
        }
        if let Some(transport) = self.transport {
            let others = Transport::ALL.into_iter().filter(|t| *t != transport);
            for other in others {
                assert_eq!(ended.served(other), Served::default(), "by {other:?}: {}", ended.log);
            }
        }
        ended
    }

    /// Its end, which has to come by then. Otherwise as [`Export::wait`].
    #[track_caller]
    pub fn ended_within(&mut self, limit: Duration) -> Ended {
        let has_ended = super::within(limit, || self.has_exited());
        assert!(has_ended, "no end within {limit:?}: {}", self.log());
        self.wait()
    }

    /// Waits for the end, as it is after SIGKILL.
    #[track_caller]
    pub fn wait_whatever_is_left(&mut self) -> Ended {
        let mut status = None;
        eventually("the end of diskfuse", || {
            status = self.child.try_wait().expect("it is our child");
            status.is_some()
        });
        self.has_ended = true;
        self.watch = None;
        if let Some(reader) = self.reader.take() {
            reader.join().expect("it only reads");
        }
        Ended { status: status.expect("it has ended"), log: self.log() }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if self.has_ended {
            mounts::take_away(&self.file);
            return;
        }
        if !std::thread::panicking() {
            let ended = self.stop(libc::SIGTERM);
            assert!(ended.status.success(), "{}: {}", ended.status, ended.log);
            return;
        }
        self.watch = None;
        mounts::take_away(&self.file);
        // It may have ended.
        let _ = self.child.kill();
        if !super::within(SOON, || !matches!(self.child.try_wait(), Ok(None))) {
            eprintln!("process {}: left behind, cannot be killed", self.child.id());
        }
        mounts::take_away(&self.file);
        eprintln!("--- diskfuse said:\n{}---", self.log());
    }
}

/// A process that is not known to serve yet; killed when dropped.
pub struct Running {
    child: Option<Child>,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts a command whose standard error is the log.
    pub fn start(command: &mut Command) -> Running {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let log = Arc::<Mutex<String>>::default();
        Running { reader: Some(collect(&mut child, &log)), child: Some(child), log }
    }

    pub fn kill(&self, signal: i32) {
        let signal = Signal::from_named_raw(signal).expect("a signal");
        let child = self.child.as_ref().expect("it runs");
        kill_process(pid(child.id()), signal).expect("it has not been waited for");
    }

    /// Its end, which has to come by then.
    #[track_caller]
    pub fn ended_within(&mut self, limit: Duration) -> Ended {
        let mut status = None;
        let has_ended = super::within(limit, || {
            status = self.try_wait();
            status.is_some()
        });
        assert!(has_ended, "no end within {limit:?}: {}", self.log());
        Ended { status: status.expect("it has ended"), log: self.whole_log() }
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|c| c.try_wait().expect("it is our child"))
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("no panic while it is held").clone()
    }

    fn whole_log(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("it only reads");
        }
        self.log()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn collect(child: &mut Child, log: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let stderr = BufReader::new(child.stderr.take().expect("it is piped"));
    let log = log.clone();
    std::thread::spawn(move || {
        for line in stderr.split(b'\n') {
            let Ok(line) = line else { return };
            let mut log = log.lock().expect("no panic while it is held");
            log.push_str(&String::from_utf8_lossy(&line));
            log.push('\n');
        }
    })
}

/// Cuts the connection and kills the process unless the sender goes away before.
fn watch(process: u32, connection: u64) -> Sender<()> {
    let (watch, ended) = mpsc::channel();
    std::thread::spawn(move || {
        if ended.recv_timeout(LIFETIME) == Err(RecvTimeoutError::Timeout) {
            eprintln!("process {process} has run for {LIFETIME:?}: its connection is cut");
            mounts::abort(connection);
            // It has not been waited for: the watch ends before that.
            let _ = kill_process(pid(process), Signal::KILL);
        }
    });
    watch
}

pub fn pid(raw: u32) -> Pid {
    Pid::from_raw(raw as i32).expect("a process has a number")
}

/// Whether a status is that of a process ended by this signal.
pub fn ended_by(status: ExitStatus, signal: i32) -> bool {
    status.signal() == Some(signal)
}
