//! A server that does not answer: whoever waits for it can be told to end, and ends.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use libc::SIGTERM;
use rustix::process::{Signal, kill_process};

use crate::common::export::{Ended, Export, Running, binary, pid};
use crate::common::nbd::{Address, Server};
use crate::common::sandbox::{Sandbox, Tight};
use crate::common::writer::Holder;
use crate::common::{eventually, mounts, noise, number, program, report, within};
use crate::{Bench, SIZE, open};

/// For an end that waits for nothing.
const AT_ONCE: Duration = Duration::from_secs(5);
/// For an end that gives requests in flight five seconds.
const GIVEN_UP: Duration = Duration::from_secs(15);

/// Processes of the program that have a test's folder in their command line.
fn processes(bench: &Bench) -> Vec<u32> {
    let folder = bench.sandbox.path().to_str().unwrap();
    let is_one = |process: &u32| {
        let words = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words);
        words.split('\0').next().unwrap_or("").contains("diskfuse") && words.contains(folder)
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(is_one).collect()
}

/// Kills what a failed test leaves.
struct Leftovers<'a>(&'a Bench);

impl Drop for Leftovers<'_> {
    fn drop(&mut self) {
        for process in processes(self.0) {
            // It may have ended meanwhile.
            let _ = kill_process(pid(process), Signal::KILL);
        }
        mounts::take_away(&self.0.sandbox.join("disk"));
    }
}

/// The first read, which these options wait for, never ends.
fn first_read_hangs(bench: &Bench, options: &[&str]) {
    let socket = bench.sandbox.join("nbd.socket");
    let (_server, uri) = bench.nbdkit(&["--filter=delay", "memory", "4M", "rdelay=3600"]);
    let _leftovers = Leftovers(bench);
    let mut export = bench.try_export(&uri, options).unwrap_or_else(|e| panic!("{}", e.log));
    eventually("the first read", || mounts::waiting(export.connection()).is_some_and(|n| n > 0));
    // The one that serves may be in the background; the one in front carries its status.
    let children = format!("/proc/{0}/task/{0}/children", export.pid());
    let children = fs::read_to_string(children).unwrap();
    let background = children.split(' ').next().filter(|_| options.contains(&"--daemonize"));
    match background.map(|number| number.parse().unwrap()) {
        Some(process) => kill_process(pid(process), Signal::TERM).unwrap(),
        None => export.kill(SIGTERM),
    }
    export.ended_within(GIVEN_UP).assert(1, &["stopped by signal 15"]);
    eventually("the end of its processes", || processes(bench).is_empty());
    eventually("the end of its connections", || Address::clients(&socket) == 0);
    assert_eq!(bench.sandbox.names(), ["nbd.socket"]);
}

pub fn pidfile_that_waits_for_the_first_read_can_be_given_up(bench: &Bench) {
    let pidfile = format!("--pidfile={}", bench.sandbox.join("pid").display());
    first_read_hangs(bench, &[&pidfile]);
}

pub fn daemon_that_waits_for_the_first_read_can_be_given_up(bench: &Bench) {
    first_read_hangs(bench, &["--daemonize"]);
}

pub fn command_that_waits_for_the_first_read_can_be_given_up(bench: &Bench) {
    let ran = bench.sandbox.join("ran");
    first_read_hangs(bench, &[&format!("--run=touch {}", ran.display())]);
}

/// The server is there, and says nothing any more.
fn stopped_server(bench: &Bench, end: fn(&Export)) {
    let (server, uri) = bench.nbdkit(&["memory", "4M"]);
    let mut export = bench.export(&uri);
    let _paused = server.pause();
    let mut client = waiting_client(&export, &["dd", "if={}", "of=/dev/null", "bs=4k", "count=1"]);
    end(&export);
    let ended = export.ended_within(GIVEN_UP);
    ended.assert(0, &[]);
    assert!(!client.wait().unwrap().success(), "it was answered");
}

pub fn report_is_told_beside_a_stopped_server(bench: &Bench) {
    stopped_server(bench, |export| {
        // What was seen to wait may have been its open.
        eventually("a read in flight", || {
            let report = report(export.file());
            let reads = report["transports"].as_object().unwrap().values();
            reads.map(|counts| number(&counts["read"]["in_flight"])).sum::<u64>() > 0
        });
        assert!(mounts::abort(export.connection()));
    });
}

pub fn abort_ends_it_beside_a_stopped_server(bench: &Bench) {
    stopped_server(bench, |export| assert!(mounts::abort(export.connection())));
}

pub fn forced_unmount_ends_it_beside_a_stopped_server(bench: &Bench) {
    // It ends the connection, and then may say that the file is in use.
    stopped_server(bench, |export| {
        program("umount", ["-f"]).arg(export.file()).output().unwrap();
    });
}

/// The program, connecting to a listener of ours.
fn connecting(bench: &Bench, options: &[&str]) -> (TcpStream, Running) {
    let address = Address::tcp();
    let Address::Tcp(host) = &address else { unreachable!() };
    let listener = TcpListener::bind((*host, 10809)).unwrap();
    let mut command = Command::new(binary());
    command.arg(bench.transport.option()).args(options).env("RUST_LOG", "info");
    command.arg(address.uri("")).arg(bench.sandbox.join("disk"));
    let running = Running::start(&mut command);
    listener.set_nonblocking(true).unwrap();
    let mut client = None;
    eventually("a client", || {
        client = listener.accept().ok();
        client.is_some()
    });
    let stream = client.expect("it came").0;
    stream.set_nonblocking(false).unwrap();
    (stream, running)
}

/// Sends a byte a second of what a server says, until the client is gone: each wait for a byte is
/// short, and the whole would be endless. Says when the first is sent.
fn dribble(mut stream: TcpStream) -> Receiver<()> {
    let (begun, begins) = mpsc::channel();
    std::thread::spawn(move || {
        // The greeting with both flags, then the head of an option's reply that never gets
        // anywhere.
        let greeting = b"NBDMAGICIHAVEOPT\0\x03";
        for byte in greeting.iter().chain(std::iter::repeat(&0)) {
            if stream.write_all(&[*byte]).is_err() {
                return;
            }
            let _ = begun.send(());
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    begins
}

fn given_up(bench: &Bench, mut running: Running) {
    running.kill(SIGTERM);
    running.ended_within(AT_ONCE).assert(3, &["signal 15"]);
    assert_eq!(bench.sandbox.names(), [""; 0]);
}

pub fn silent_server_can_be_given_up(bench: &Bench) {
    let (stream, running) = connecting(bench, &["--connect-timeout=60"]);
    given_up(bench, running);
    drop(stream);
}

pub fn dribbling_server_can_be_given_up(bench: &Bench) {
    let (stream, running) = connecting(bench, &["--connect-timeout=60"]);
    dribble(stream).recv().unwrap();
    given_up(bench, running);
}

/// The time is for the whole connecting, not for each byte.
pub fn dribbling_server_has_no_longer_than_others(bench: &Bench) {
    let (stream, mut running) = connecting(bench, &["--connect-timeout=2"]);
    let _begins = dribble(stream);
    running.ended_within(2 * AT_ONCE).assert(3, &["not answered", "within 2 s"]);
    assert_eq!(bench.sandbox.names(), [""; 0]);
}

/// Holds up calls of a server's plugin until it is dropped.
struct Gate(PathBuf);

impl Gate {
    fn new(sandbox: &Sandbox) -> Gate {
        let gate = Gate(sandbox.join("gate"));
        fs::write(&gate.0, "").unwrap();
        gate
    }

    /// Words of a shell: they wait, and say so first in the file `log`.
    fn wait(&self, log: &Path, call: &str) -> String {
        let (gate, log) = (self.0.display(), log.display());
        format!("echo {call} >> {log}; while test -e {gate}; do sleep 0.05; done")
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A server whose reads, or flushes, wait at a gate; what it is asked is in `log`.
fn gated(bench: &Bench, gate: &Gate, log: &Path, gated: &str) -> (Server, String) {
    fs::write(log, "").unwrap();
    let call = |name: &str| match name == gated {
        true => gate.wait(log, name),
        false => format!("echo {name} >> {}", log.display()),
    };
    bench.nbdkit(&[
        "eval",
        "thread_model=echo parallel",
        &format!("get_size=echo {SIZE}"),
        &format!("pread={}; head -c $3 /dev/zero", call("pread")),
        &format!("pwrite=cat > /dev/null; {}", call("pwrite")),
        &format!("flush={}", call("flush")),
    ])
}

pub fn last_flush_can_be_given_up(bench: &Bench) {
    let log = bench.sandbox.join("log");
    let asked = || fs::read_to_string(&log).unwrap();
    // Dropped after the gate is.
    let server_and_uri;
    let gate = Gate::new(&bench.sandbox);
    server_and_uri = gated(bench, &gate, &log, "flush");
    let mut export = bench.export(&server_and_uri.1);
    let holder = Holder::write(export.file(), "written");
    assert!(!asked().contains("flush"), "{}", asked());
    export.kill(SIGTERM);
    // When the file has been taken away.
    eventually("the last flush", || asked().contains("flush"));
    // The file that is in use was reported, and got its time: this signal is not the same wish.
    export.kill(SIGTERM);
    export.ended_within(AT_ONCE).assert(1, &["last flush was given up"]);
    drop((holder, gate));
}

/// The start fails when the file is already there, and others have written to it: what they were
/// told is written is flushed all the same.
pub fn failed_start_flushes_what_others_wrote(bench: &Bench) {
    let log = bench.sandbox.join("log");
    let asked = || fs::read_to_string(&log).unwrap();
    let tight = Tight::new(4096);
    fs::write(tight.join("full"), noise(1, 4096)).unwrap();
    // Dropped after the gate is.
    let server_and_uri;
    let gate = Gate::new(&bench.sandbox);
    server_and_uri = gated(bench, &gate, &log, "pread");
    let pidfile = format!("--pidfile={}", tight.join("pid").display());
    let _leftovers = Leftovers(bench);
    // A write to the page cache would wait for the page that is being read.
    let arguments = ["--cache=none", pidfile.as_str()];
    let mut export = bench.try_export(&server_and_uri.1, &arguments).unwrap();
    // As long as the first read waits, so does the failure.
    eventually("the first read", || asked().contains("pread"));
    let holder = Holder::write(export.file(), "written");
    assert!(asked().contains("pwrite") && !asked().contains("flush"), "{}", asked());
    drop(gate);
    export.ended_within(GIVEN_UP).assert(1, &["pidfile"]);
    assert!(asked().ends_with("flush\n"), "not flushed: {}", asked());
    drop(holder);
}

/// A disk of which everything fails but the first bytes.
fn failing(bench: &Bench) -> (Server, String) {
    bench.nbdkit(&[
        "eval",
        &format!("get_size=echo {SIZE}"),
        "pread=[ $4 -lt 65536 ] || { echo EIO >&2; exit 1; }; head -c $3 /dev/zero",
        "pwrite=cat > /dev/null",
        "flush=echo EIO >&2; exit 1",
    ])
}

pub fn failures_are_counted_and_not_repeated(bench: &Bench) {
    const FAILURES: usize = 200;
    let (_server, uri) = failing(bench);
    let mut export = bench.export(&uri);
    let begun = std::time::Instant::now();
    let file = open(export.file(), 0);
    for _ in 0..FAILURES {
        file.write_all_at(b"x", 0).unwrap();
        file.sync_all().unwrap_err();
    }
    drop(file);
    let ended: Ended = export.stop(SIGTERM);
    ended.assert(1, &["flush"]);
    // From one place one a second.
    let seconds = begun.elapsed().as_secs() as usize;
    let warnings = ended.warnings();
    assert!(warnings.len() < 10 + seconds, "{}", ended.log);
    let more = |line: &&str| -> Option<usize> {
        line.split_once("(and ")?.1.split_once(" more like it")?.0.parse().ok()
    };
    let counted: usize = warnings.iter().filter_map(more).sum();
    assert!(counted + warnings.len() >= FAILURES, "{}", ended.log);
}

/// A pipe at standard error whose reader reads nothing.
pub fn nobody_waits_for_who_reads_the_log(bench: &Bench) {
    let (_server, uri) = failing(bench);
    let (_nobody_reads, mut pipe) = std::io::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&pipe).unwrap();
    rustix::fs::fcntl_setfl(&pipe, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while pipe.write(&[b'.'; 4096]).is_ok() {}
    while pipe.write(b".").is_ok() {}
    rustix::fs::fcntl_setfl(&pipe, flags).unwrap();
    let path = bench.sandbox.join("disk");
    let _leftovers = Leftovers(bench);
    let mut command = Command::new(binary());
    command.arg(bench.transport.option()).arg(&uri).arg(&path).env("RUST_LOG", "debug");
    let mut child = command.stderr(pipe).spawn().unwrap();
    // Else it holds the pipe.
    drop(command);
    let is_mounted = || !mounts::mounts_at(&path).is_empty();
    assert!(within(GIVEN_UP, is_mounted), "it is not mounted");
    let (served, done) = mpsc::channel();
    let reads = path.clone();
    std::thread::spawn(move || {
        let file = fs::File::open(reads).unwrap();
        let mut failed = 0;
        for n in 0..300 {
            failed += usize::from(file.read_at(&mut [0; 512], (1 << 20) + n * 4096).is_err());
        }
        let read = file.read_at(&mut [0; 4096], 0);
        drop(file);
        // The test may have given up.
        let _ = served.send((failed, read.ok()));
    });
    let served = done.recv_timeout(crate::common::SOON).expect("it serves");
    assert_eq!(served, (300, Some(4096)));
    kill_process(pid(child.id()), Signal::TERM).unwrap();
    let mut has_ended = || child.try_wait().unwrap().is_some();
    assert!(within(GIVEN_UP, &mut has_ended), "it waits for its log");
    assert!(!is_mounted());
    assert_eq!(bench.sandbox.names(), ["nbd.socket"]);
}

/// A client in a process of its own, so that it can be killed. Its request waits.
fn waiting_client(export: &Export, words: &[&str]) -> Child {
    let mut client = Command::new(words[0]);
    let path = format!("{}", export.file().display());
    client.args(words[1..].iter().map(|word| word.replace("{}", &path)));
    let quiet = client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let client = quiet.spawn().unwrap();
    eventually("a request", || mounts::waiting(export.connection()).is_some_and(|n| n > 0));
    client
}

/// Readers, writers, and those that flush, by the signals that end a program, whether it catches
/// them or not.
pub fn clients_of_a_stopped_server_can_be_killed(bench: &Bench) {
    let (server, uri) = bench.nbdkit(&["memory", "4M"]);
    // Nobody waits for what the kernel reads ahead, so it cannot be given up.
    let mut export = bench.try_export(&uri, &["--cache=none"]).unwrap();
    // So that there is something to flush.
    let holder = Holder::write(export.file(), "written");
    let paused = server.pause();
    let read: &[&str] = &["dd", "if={}", "of=/dev/null", "bs=4k", "count=1"];
    let write: &[&str] = &["dd", "if=/dev/zero", "of={}", "bs=4k", "count=1", "conv=notrunc"];
    let flush: &[&str] = &["bash", "-c", "exec 3<>\"{}\"; exec 3>&-"];
    let catches: &[&str] = &["python3", "-c", "open('{}', 'rb', buffering=0).read(4096)"];
    let seek: &[&str] =
        &["python3", "-c", "import os; os.lseek(os.open('{}', 0), 0, os.SEEK_DATA)"];
    for (words, signal) in [
        (seek, Signal::KILL),
        (read, Signal::KILL),
        (read, Signal::INT),
        (read, Signal::TERM),
        (write, Signal::KILL),
        (flush, Signal::KILL),
        (catches, Signal::INT),
    ] {
        let mut client = waiting_client(&export, words);
        // The first may come between python's last look for signals and its system call.
        let ended = (0..2).any(|_| {
            kill_process(pid(client.id()), signal).unwrap();
            within(AT_ONCE, || client.try_wait().unwrap().is_some())
        });
        assert!(ended, "{words:?} does not hear {signal:?}");
        eventually("no request", || mounts::waiting(export.connection()) == Some(0));
    }
    drop(paused);
    drop(holder);
    // What the server says to them now is dropped, and the others are served.
    let seen = fs::read(export.file()).unwrap();
    // What the holder wrote, unless the write that was given up has come over it by now.
    assert!(&seen[..7] == b"written" || seen[..7] == [0; 7], "{:?}", &seen[..7]);
    assert_eq!(seen[7..], vec![0; SIZE - 7]);
    export.stop(SIGTERM).assert(0, &[]);
}

/// A signal that a program catches and goes on after does not fail its disk, and does not hide a
/// later one.
pub fn caught_signals_do_not_fail_a_read(bench: &Bench) {
    let (server, uri) = bench.nbdkit(&["memory", "4M"]);
    let export = bench.export(&uri);
    let paused = server.pause();
    let script = "import os, signal\n\
                  signal.signal(signal.SIGALRM, lambda *_: None)\n\
                  signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)\n\
                  data = os.pread(os.open('{}', os.O_RDONLY), 4096, 0)\n\
                  signal.setitimer(signal.ITIMER_REAL, 0)\n\
                  raise SystemExit(len(data) != 4096)";
    let mut killed = waiting_client(&export, &["python3", "-c", script]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(killed.try_wait().unwrap().is_none(), "the read has failed");
    killed.kill().unwrap();
    assert!(within(AT_ONCE, || killed.try_wait().unwrap().is_some()), "it cannot be killed");
    let mut served = waiting_client(&export, &["python3", "-c", script]);
    std::thread::sleep(Duration::from_millis(300));
    drop(paused);
    assert!(served.wait().unwrap().success(), "EINTR, or less than was asked for");
}

/// The source of an export is another export, of a server that has stopped: what waits for it keeps
/// no thread from serving what does not.
pub fn source_that_hangs_holds_up_nobody_else(bench: &Bench) {
    let (server, uri) = bench.nbdkit(&["memory", "4M"]);
    let inner = bench.export(&uri);
    let source = inner.file().to_str().unwrap();
    let file = bench.sandbox.join("outer");
    let outer = Export::try_start(source, &file, &["-r", bench.transport.option()], |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log));
    let paused = server.pause();
    // On one CPU, so that both are of one queue.
    let seek = "import os; os.lseek(os.open('{}', os.O_RDONLY), 0, os.SEEK_HOLE)";
    let mut client = waiting_client(&outer, &["taskset", "-c", "0", "python3", "-c", seek]);
    eventually("a request", || mounts::waiting(inner.connection()).is_some_and(|n| n > 0));
    let mut stat = Command::new("taskset");
    let stat = stat.args(["-c", "0", "stat", "-c", "%s"]).arg(outer.file()).stdout(Stdio::null());
    let mut stat = stat.spawn().unwrap();
    let has_ended = within(AT_ONCE, || stat.try_wait().unwrap().is_some());
    drop(paused);
    assert!(has_ended, "a stat waits for a seek");
    assert!(client.wait().unwrap().success() && stat.wait().unwrap().success());
}
