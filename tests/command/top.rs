//! `--top`: what it shows as lines, as JSON and on a terminal, and how it ends.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use libtest_mimic::Trial;
use rustix::process::{Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;

use crate::common::export::{Export, Transport, binary, pid};
use crate::common::sandbox::Sandbox;
use crate::common::suite::{needs_of, trial};
use crate::common::{SOON, eventually, number, program, within};

pub fn trials() -> Vec<Trial> {
    let each = |transport: Transport| {
        let name = format!("{}/top_shows_figures_and_ends_with_its_exports", transport.name());
        trial(name, needs_of(transport, &["fuse"]), move || figures_are_shown(transport))
    };
    let one = |name: &str, test: fn()| trial(name.into(), vec!["fuse"], test);
    let others = [
        one("top_prints_lines_without_a_terminal", lines_are_printed),
        one("top_follows_what_is_exported", what_is_exported_is_followed),
        one("top_is_for_those_that_are_served", dead_ones_are_refused),
        one("top_ends_when_nobody_reads", it_ends_when_nobody_reads),
        one("top_draws_on_a_terminal", it_draws_on_a_terminal),
        one("top_gives_the_terminal_back_at_signals", the_terminal_is_given_back),
        one("top_can_be_stopped_and_continued", it_can_be_stopped_and_continued),
    ];
    Transport::ALL.map(each).into_iter().chain(others).collect()
}

fn export(sandbox: &Sandbox, name: &str, options: &[&str]) -> Export {
    Export::try_start("mem:64K", &sandbox.join(name), options, |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log))
}

/// Reads, writes and flushes a file until it is dropped.
struct Load {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn start(file: &Path) -> Load {
        let file = File::options().read(true).write(true).open(file).unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = is_over.clone();
        let thread = thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                file.read_exact_at(&mut [0; 4096], 0).unwrap();
                file.write_all_at(&[1; 4096], 4096).unwrap();
                file.sync_data().unwrap();
                thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        Load { is_over, thread: Some(thread) }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let result = self.thread.take().expect("it is taken here").join();
        assert!(result.is_ok() || thread::panicking(), "the load has failed");
    }
}

/// A running `--top`; killed when it is dropped.
struct Top {
    child: Child,
    /// All that it has written on standard output, or on the terminal.
    said: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
    /// That of the terminal, if it has one.
    master: Option<File>,
}

impl Top {
    /// Its standard output and error are pipes.
    fn start(words: &[&str]) -> Top {
        let mut command = Command::new(binary());
        command.arg("--top").args(words).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (said, reader) = collect(child.stdout.take().unwrap());
        Top { child, said, reader: Some(reader), master: None }
    }

    /// Runs a command in a session of its own that has the terminal.
    fn on_terminal(terminal: &Terminal, words: &[&str]) -> Top {
        let stdio = || Stdio::from(terminal.slave.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command.arg("--ctty").args(words).env("TERM", "xterm");
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        let child = command.spawn().unwrap();
        let master = File::from(terminal.master.try_clone().unwrap());
        let (said, reader) = collect(master.try_clone().unwrap());
        Top { child, said, reader: Some(reader), master: Some(master) }
    }

    fn said(&self) -> String {
        let said = self.said.lock().unwrap();
        // The rest of the last character may be on its way.
        let whole = std::str::from_utf8(&said).map_or_else(|e| e.valid_up_to(), str::len);
        String::from_utf8_lossy(&said[..whole]).into_owned()
    }

    /// Waits for words after the first `from` bytes, and gives what is said then.
    #[track_caller]
    fn says(&self, from: usize, words: &str) -> String {
        let has = within(SOON, || self.said()[from..].contains(words));
        assert!(has, "{words:?} is missing: {:?}", self.said());
        self.said()
    }

    fn press(&mut self, key: u8) {
        self.master.as_mut().expect("it has a terminal").write_all(&[key]).unwrap();
    }

    fn kill(&self, signal: Signal) {
        kill_process(pid(self.child.id()), signal).expect("it has not been waited for");
    }

    /// Its JSON about a file, from the first `from` bytes on.
    fn objects(&self, from: usize, file: &Path) -> Vec<Value> {
        let said = self.said();
        let whole = said.rfind('\n').map_or(0, |end| end + 1);
        let objects = said[from..whole.max(from)].lines();
        let objects = objects.map(|line| serde_json::from_str(line).expect(line));
        objects.filter(|o: &Value| o["file"] == file.to_str().unwrap()).collect()
    }

    /// Waits for an object about a file that is so.
    #[track_caller]
    fn shows(&self, file: &Path, is_so: impl Fn(&Value) -> bool) -> Value {
        let from = self.said().rfind('\n').map_or(0, |end| end + 1);
        let mut found = None;
        let has = within(SOON, || {
            found = self.objects(from, file).into_iter().find(&is_so);
            found.is_some()
        });
        assert!(has, "{file:?}: {}", self.said());
        found.unwrap()
    }

    #[track_caller]
    fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the end of --top", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Its end, and what it has said on standard error.
    #[track_caller]
    fn ended_with(&mut self) -> (Option<i32>, String) {
        let status = self.ended();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.code(), said)
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A reader of a terminal ends with that.
        if self.master.is_none() {
            let _ = self.reader.take().expect("it is taken here").join();
        }
    }
}

fn collect(mut from: impl Read + Send + 'static) -> (Arc<Mutex<Vec<u8>>>, JoinHandle<()>) {
    let said = Arc::<Mutex<Vec<u8>>>::default();
    let to = said.clone();
    let thread = thread::spawn(move || {
        let mut buffer = [0; 4096];
        // A terminal that nobody has open any more is an error.
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            to.lock().unwrap().extend_from_slice(&buffer[..len]);
        }
    });
    (said, thread)
}

struct Terminal {
    master: OwnedFd,
    slave: File,
    before: Termios,
}

impl Terminal {
    fn new(columns: u16) -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC);
        let master = master.unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let slave = options.open(name.to_str().unwrap()).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let terminal = Terminal { master, slave, before };
        terminal.resize(columns);
        terminal
    }

    fn resize(&self, columns: u16) {
        let size = Winsize { ws_col: columns, ws_row: 24, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
    }

    #[track_caller]
    fn is_as_before(&self) -> bool {
        let now = tcgetattr(&self.slave).unwrap();
        (now.local_modes, now.input_modes) == (self.before.local_modes, self.before.input_modes)
    }
}

/// Taken for drawing.
const ENTER: &str = "\u{1b}[?1049h";
/// Given back.
const LEAVE: &str = "\u{1b}[?25h\u{1b}[?1049l";

/// By the marks of the rest: what has ended, one that is stopped, and one that goes on.
fn figures_are_shown(transport: Transport) {
    let sandbox = Sandbox::new();
    let [mut a, mut b] = ["a", "b"].map(|name| export(&sandbox, name, &[transport.option()]));
    let files: [PathBuf; 2] = [&a, &b].map(|export| export.file().to_owned());
    let [file_a, file_b] = files.each_ref().map(|file| file.to_str().unwrap());
    let load = Load::start(&files[0]);
    let mut top = Top::start(&["--json", file_a, file_b]);
    let busy = top.shows(&files[0], |object| object["flush"]["p99_us"].is_u64());
    assert_eq!((&busy["state"], number(&busy["pid"])), (&"served".into(), u64::from(a.pid())));
    let title = if transport == Transport::Uring { "io_uring" } else { "/dev/fuse" };
    assert_eq!((&busy["transport"], &busy["source"]), (&title.into(), &"mem:64K".into()));
    for name in ["read", "write", "flush"] {
        let rates = &busy[name];
        assert!(rates["requests_per_second"].as_f64() > Some(0.0), "{busy}");
        let [p50, p99] = ["p50_us", "p99_us"].map(|field| number(&rates[field]));
        assert!(p50.is_power_of_two() && p99.is_power_of_two() && p50 <= p99, "{busy}");
        assert_eq!(number(&rates["errors"]), 0);
        // One may arrive while they are told.
        let pages = rates["bytes_per_second"].as_f64().unwrap() / 4096.0;
        let wanted =
            if name == "flush" { 0.0 } else { rates["requests_per_second"].as_f64().unwrap() };
        assert!((pages - wanted).abs() < 2.5, "{busy}");
    }
    // It is asked itself: that is of the other kind.
    let idle = top.shows(&files[1], |object| object["seconds"].as_f64() > Some(0.0));
    assert_eq!(idle["read"]["requests_per_second"], 0.0);

    b.kill(libc::SIGSTOP);
    let silent = top.shows(&files[1], |object| object["state"] == "no answer");
    assert!(silent["read"].is_null() && silent["pid"].is_null(), "{silent}");
    // The other goes on.
    top.shows(&files[0], |object| object["read"]["requests_per_second"].as_f64() > Some(0.0));
    b.kill(libc::SIGCONT);
    top.shows(&files[1], |object| object["state"] == "served" && object["read"].is_object());

    b.stop(libc::SIGTERM);
    top.shows(&files[1], |object| object["state"] == "ended");
    top.shows(&files[0], |object| object["state"] == "served");
    drop(load);
    a.stop(libc::SIGTERM);
    let said = "diskfuse: all exports that were shown have ended\n";
    assert_eq!(top.ended_with(), (Some(0), said.into()));
}

fn lines_are_printed() {
    let sandbox = Sandbox::new();
    let export = export(&sandbox, "a \u{1b}[2Jb", &[]);
    let _load = Load::start(export.file());
    let mut top = Top::start(&[export.file().to_str().unwrap()]);
    let is_busy = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        line.ends_with(r"/a \u{1b}[2Jb") && fields[0].parse::<u64>().is_ok_and(|rate| rate > 0)
    };
    eventually("a line with a rate", || top.said().lines().any(is_busy));
    eventually("more of them", || top.said().lines().count() >= 3);
    let said = top.said();
    assert!(said.starts_with("  r/s  rB/s  rp50  rp99 ") && !said.contains('\u{1b}'), "{said}");
    assert_eq!(said.matches("FILE").count(), 1, "{said}");
    top.kill(Signal::INT);
    assert_eq!(top.ended_with(), (Some(0), String::new()));
}

/// Without a FILE.
fn what_is_exported_is_followed() {
    let sandbox = Sandbox::new();
    let mut first = export(&sandbox, "first", &[]);
    let top = Top::start(&["--json"]);
    top.shows(first.file(), |object| object["seconds"].is_f64());
    let second = export(&sandbox, "second", &[]);
    top.shows(second.file(), |object| object["seconds"].is_f64());
    let file = first.file().to_owned();
    first.stop(libc::SIGTERM);
    eventually("an interval without the first", || {
        let from = top.said().rfind('\n').map_or(0, |end| end + 1);
        top.shows(second.file(), |object| object["state"] == "served");
        top.shows(second.file(), |object| object["state"] == "served");
        top.objects(from, &file).is_empty()
    });
}

fn dead_ones_are_refused() {
    let sandbox = Sandbox::new();
    let mut dead = export(&sandbox, "dead", &[]);
    dead.kill(libc::SIGKILL);
    dead.wait_whatever_is_left();
    let top = program(binary(), ["--top"]).arg(dead.file()).output().unwrap();
    let said = String::from_utf8_lossy(&top.stderr);
    assert_eq!(top.status.code(), Some(3), "{said}");
    assert!(said.contains("/dead: nobody serves it any more: umount it"), "{said}");
}

fn it_ends_when_nobody_reads() {
    let sandbox = Sandbox::new();
    let export = export(&sandbox, "a", &[]);
    let mut top = program(binary(), ["--top", "--json"]);
    let top = top.arg(export.file()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut top = top.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(top.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(serde_json::from_str::<Value>(&line).unwrap()["state"] == "served", "{line}");
    let output = top.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");

    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = program(binary(), ["--top"]).arg(export.file()).stdout(full).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("diskfuse: standard output: No space left on device"), "{said}");

    // A reader that does not read keeps nobody from ending it.
    let (reader, writer) = std::io::pipe().unwrap();
    (&writer).write_all(&[b'x'; 64 << 10]).unwrap();
    let mut top = Command::new(binary());
    top.args(["--top"]).arg(export.file()).stdin(Stdio::null()).stdout(writer);
    let child = top.stderr(Stdio::piped()).spawn().unwrap();
    drop(top);
    let (said, thread) = collect(std::io::empty());
    let mut top = Top { child, said, reader: Some(thread), master: None };
    thread::sleep(std::time::Duration::from_millis(1500));
    top.kill(Signal::TERM);
    assert_eq!(top.ended_with(), (Some(0), String::new()));
    drop(reader);
}

fn it_draws_on_a_terminal() {
    let sandbox = Sandbox::new();
    let [a, b] = ["a\u{1b}[31m", "b"].map(|name| export(&sandbox, name, &[]));
    let _load = Load::start(a.file());
    let terminal = Terminal::new(150);
    let files = [&a, &b].map(|export| export.file().to_str().unwrap());
    let mut top = Top::on_terminal(&terminal, &[binary(), "--top", files[0], files[1]]);
    let said = top.says(0, "2 exports, each second; q ends");
    assert!(said.starts_with(ENTER), "{said:?}");
    top.says(0, r"/a\u{1b}[31m");
    // Each interval is drawn over the one before.
    eventually("a second drawing", || top.said().matches("2 exports").count() > 1);
    assert!(top.said().contains("rp50") && !top.said().contains("\u{1b}[31m"));
    assert!(!terminal.is_as_before());
    let from = top.said().len();
    terminal.resize(80);
    eventually("a narrower drawing", || {
        let said = top.said();
        said[from..]
            .split("2 exports")
            .skip(1)
            .any(|drawn| drawn.contains("rp99") && !drawn.contains("rp50") && drawn.contains("…"))
    });
    top.press(b'q');
    assert_eq!(top.ended().code(), Some(0));
    let said = top.says(from, LEAVE);
    assert!(said.ends_with(LEAVE) && terminal.is_as_before(), "{said:?}");
}

fn the_terminal_is_given_back() {
    let sandbox = Sandbox::new();
    let mut export = export(&sandbox, "a", &[]);
    let file = export.file().to_str().unwrap().to_owned();
    // The first is Ctrl-C.
    for end in [|top: &mut Top| top.press(3), |top: &mut Top| top.kill(Signal::TERM)] {
        let terminal = Terminal::new(80);
        let mut top = Top::on_terminal(&terminal, &[binary(), "--top", &file]);
        top.says(0, "1 export, each second");
        assert!(!terminal.is_as_before());
        end(&mut top);
        assert_eq!(top.ended().code(), Some(0));
        let said = top.says(0, LEAVE);
        assert!(said.ends_with(LEAVE) && terminal.is_as_before(), "{said:?}");
    }
    let terminal = Terminal::new(80);
    let mut top = Top::on_terminal(&terminal, &[binary(), "--top", &file]);
    top.says(0, "1 export, each second");
    export.stop(libc::SIGTERM);
    assert_eq!(top.ended().code(), Some(0));
    let end = format!("{LEAVE}diskfuse: all exports that were shown have ended\r\n");
    assert!(top.says(0, &end).ends_with(&end) && terminal.is_as_before());
}

/// By Ctrl-Z, as a job of a shell.
fn it_can_be_stopped_and_continued() {
    let sandbox = Sandbox::new();
    let export = export(&sandbox, "a", &[]);
    let terminal = Terminal::new(80);
    let script = r#""$@"; echo "it is $?"; fg >/dev/null; echo "it is $?""#;
    let file = export.file().to_str().unwrap();
    let words = ["bash", "-mc", script, "bash", binary(), "--top", file];
    let mut top = Top::on_terminal(&terminal, &words);
    top.says(0, "1 export, each second");
    top.press(0x1a);
    // 128 and SIGTSTP.
    let said = top.says(0, "it is 148");
    let (drawn, _) = said.split_once("it is").unwrap();
    assert!(drawn.contains(LEAVE), "{said:?}");
    let said = top.says(said.len(), "1 export, each second");
    assert_eq!(said.matches(ENTER).count(), 2, "{said:?}");
    top.press(b'q');
    assert_eq!(top.ended().code(), Some(0));
    top.says(said.len(), "it is 0");
    assert!(terminal.is_as_before());
}
