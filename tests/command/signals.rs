//! What each signal does to the program: none of them leaves a dead mount, but for SIGKILL, and
//! that only where the user has named the mountpoint.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use libtest_mimic::Trial;
use rustix::process::{Signal, kill_process, kill_process_group};

use crate::common::export::{Export, binary, pid};
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{eventually, mounts, program, succeed};

pub fn trials() -> Vec<Trial> {
    let trial = |name: &str, test: fn()| trial(name.into(), vec!["fuse"], test);
    vec![
        trial("signals_that_ask_for_an_end_end_it", signals_that_ask_for_an_end_end_it),
        trial("other_signals_are_ignored", other_signals_are_ignored),
        trial("ignored_signals_stay_ignored", ignored_signals_stay_ignored),
        trial("timer_of_whoever_executes_it_ends_it", timer_of_whoever_executes_it_ends_it),
        trial("usr1_writes_the_counters", usr1_writes_the_counters),
        trial("killed_run_leaves_no_folder", killed_run_leaves_no_folder),
        trial("killed_run_keeps_what_is_not_its_own", killed_run_keeps_what_is_not_its_own),
    ]
}

/// Takes away what a failed test leaves mounted here.
struct Cleared(PathBuf);

impl Drop for Cleared {
    fn drop(&mut self) {
        mounts::take_away(&self.0);
    }
}

fn export(sandbox: &Sandbox, tune: impl FnOnce(&mut Command)) -> Export {
    Export::try_start("mem:1M", &sandbox.join("disk"), &[], tune)
        .unwrap_or_else(|ended| panic!("{}", ended.log))
}

/// By its name, as those have it that rustix does not know.
fn kill(export: &Export, signal: &str) {
    succeed(program("kill", ["-s", signal]).arg(export.pid().to_string()));
}

fn signals_that_ask_for_an_end_end_it() {
    let sandbox = Sandbox::new();
    for signal in ["INT", "TERM", "HUP", "QUIT", "ALRM", "VTALRM", "PROF", "XCPU", "PWR"] {
        let mut export = export(&sandbox, |_| ());
        kill(&export, signal);
        let ended = export.wait();
        assert_eq!(ended.status.code(), Some(0), "{signal}: {}: {}", ended.status, ended.log);
        assert_eq!(sandbox.names(), [""; 0], "{signal}");
    }
}

fn other_signals_are_ignored() {
    let sandbox = Sandbox::new();
    let mut export = export(&sandbox, |_| ());
    for signal in ["USR1", "USR2", "IO", "STKFLT", "PIPE", "XFSZ", "RTMIN", "RTMIN+3", "64"] {
        kill(&export, signal);
        kill(&export, signal);
        // Killed, it would answer no longer.
        assert_eq!(fs::read(export.file()).unwrap().len(), 1 << 20, "{signal}");
        assert!(!export.has_exited(), "{signal}");
    }
    export.stop(libc::SIGTERM).assert(0, &[]);
}

fn ignored_signals_stay_ignored() {
    let sandbox = Sandbox::new();
    let mut export = export(&sandbox, |command| {
        let mut shell = Command::new("bash");
        shell.args(["-c", "trap '' QUIT ALRM USR1; exec \"$@\"", "bash"]);
        shell.arg(command.get_program()).args(command.get_args()).env("RUST_LOG", "info");
        *command = shell;
    });
    ["QUIT", "ALRM", "USR1"].into_iter().for_each(|signal| kill(&export, signal));
    assert_eq!(fs::read(export.file()).unwrap().len(), 1 << 20);
    let ended = export.stop(libc::SIGTERM);
    ended.assert(0, &["signal 15"]);
    assert!(!ended.log.contains("signal 3\n") && !ended.log.contains("mem:1M: /dev"));
}

/// alarm(2) outlives execve(2): that is how a shell script without timeout(1) limits a command.
fn timer_of_whoever_executes_it_ends_it() {
    let script = "import os, signal, sys; signal.alarm(int(sys.argv[1])); \
                  os.execvp(sys.argv[2], sys.argv[2:])";
    let sandbox = Sandbox::new();
    let _cleared = Cleared(sandbox.join("disk"));
    // Its command is told, and tidies up.
    let run = r#"
        trap 'printf x 1<> "$DISKFUSE_FILE"; exit 9' ALRM
        while kill -0 $PPID 2>/dev/null; do sleep 0.05; done
    "#;
    // The first may go off before there is a command, on a slow machine.
    for seconds in ["1", "4", "16", "64"] {
        let output = program("python3", ["-c", script, seconds, binary(), "--run", run, "mem:1M"])
            .arg(sandbox.join("disk"))
            .output()
            .unwrap();
        assert_eq!(sandbox.names(), [""; 0]);
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(9) => return,
            _ => assert!(said.contains("stopped by signal 14"), "{output:?}"),
        }
    }
    panic!("no command was told");
}

fn usr1_writes_the_counters() {
    let sandbox = Sandbox::new();
    let cleared = Cleared(sandbox.join("disk"));
    // Also without RUST_LOG.
    let mut run = program(binary(), ["--run"]);
    run.arg("cat \"$DISKFUSE_FILE\" && kill -USR1 $PPID && sleep 0.2").arg("mem:1M");
    let output = run.arg(sandbox.join("disk")).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.lines().count() == 1, "{said}");
    assert!(read_bytes(&said)[0] >= 1 << 20, "{said}");
    drop(cleared);

    let mut export = export(&sandbox, |_| ());
    for times in 1..=2 {
        fs::read(export.file()).unwrap();
        export.kill(libc::SIGUSR1);
        eventually("the counters", || read_bytes(&export.log()).len() == times);
        let read = read_bytes(&export.log())[times - 1];
        assert!(read >= (times as u64) << 20, "{}", export.log());
    }
    export.stop(libc::SIGTERM).assert(0, &[]);
}

/// The bytes that were read, by each line with counters.
fn read_bytes(log: &str) -> Vec<u64> {
    let lines = log.lines().filter_map(|line| line.strip_prefix("diskfuse: {"));
    let sum = |line: &str| {
        let report: serde_json::Value = serde_json::from_str(&format!("{{{line}")).unwrap();
        assert_eq!(report["source"], "mem:1M");
        let transports = report["transports"].as_object().unwrap().values();
        transports.map(|counts| counts["read"]["bytes"].as_u64().unwrap()).sum()
    };
    lines.map(sum).collect()
}

/// `--run` without MOUNTPOINT; its command says where its file is, and sleeps.
struct Run {
    program: Child,
    command: u32,
    file: String,
}

impl Run {
    fn start(sandbox: &Sandbox) -> Run {
        let mut command = Command::new(binary());
        command.args(["--run", "echo $$ $DISKFUSE_FILE; exec sleep 100", "mem:1M"]);
        command.env("TMPDIR", sandbox.path()).process_group(0);
        let mut program = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(program.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let (command, file) = line.trim().split_once(' ').expect("a number and a path");
        Run { command: command.parse().unwrap(), file: file.to_owned(), program }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
        let _ = kill_process(pid(self.command), Signal::KILL);
        mounts::take_away(self.file.as_ref());
    }
}

fn killed_run_leaves_no_folder() {
    for the_whole_group in [false, true] {
        let sandbox = Sandbox::new();
        let mut run = Run::start(&sandbox);
        // Who has it open, and what is in flight, does not keep it.
        let mut file = File::open(&run.file).unwrap();
        file.read_exact(&mut [0; 4096]).unwrap();
        let process = pid(run.program.id());
        match the_whole_group {
            true => kill_process_group(process, Signal::KILL).unwrap(),
            false => kill_process(process, Signal::KILL).unwrap(),
        }
        run.program.wait().unwrap();
        eventually("an empty folder", || sandbox.names().is_empty());
        assert!(mounts::mounts_at(run.file.as_ref()).is_empty());
    }
    // And a clean end leaves no process that waits.
    let sandbox = Sandbox::new();
    let mut run = Run::start(&sandbox);
    let has_cleaner = || {
        let processes = program("ps", ["-e", "-o", "args="]).output().unwrap().stdout;
        String::from_utf8_lossy(&processes)
            .lines()
            .any(|line| line.starts_with("diskfuse-cleaner ") && line.contains(&run.file))
    };
    assert!(has_cleaner());
    kill_process(pid(run.program.id()), Signal::TERM).unwrap();
    eventually("its end", || !has_cleaner());
    assert_eq!(run.program.wait().unwrap().code(), Some(143));
    assert_eq!(sandbox.names(), [""; 0]);
}

fn killed_run_keeps_what_is_not_its_own() {
    let sandbox = Sandbox::new();
    let mut run = Run::start(&sandbox);
    let other = Path::new(&run.file).with_file_name("other");
    fs::write(&other, "of value").unwrap();
    run.program.kill().unwrap();
    run.program.wait().unwrap();
    eventually("no mount", || mounts::mounts_at(run.file.as_ref()).is_empty());
    eventually("no mountpoint", || !fs::exists(&run.file).unwrap_or(true));
    assert_eq!(fs::read(&other).unwrap(), b"of value");
}
