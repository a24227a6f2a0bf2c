//! The program as a process: what it takes over from whoever starts it, and what it passes on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use libtest_mimic::Trial;

use crate::common::export::{Export, binary};
use crate::common::sandbox::Sandbox;
use crate::common::suite::{as_uid, trial};
use crate::common::{assert_errno, program};

pub fn trials() -> Vec<Trial> {
    let root = |name: &str, test: fn()| trial(name.into(), vec!["fuse", "root"], test);
    let as_user = |name: &str, test: fn()| trial(name.into(), vec!["fuse", "user"], test);
    let trial = |name: &str, test: fn()| trial(name.into(), vec!["fuse"], test);
    vec![
        trial("command_waits_for_its_children", command_waits_for_its_children),
        trial("command_can_be_signalled", command_can_be_signalled),
        trial("hangup_is_ignored_under_nohup", hangup_is_ignored_under_nohup),
        trial("file_size_limit_fails_the_write", file_size_limit_fails_the_write),
        trial("too_few_open_files_are_refused", too_few_open_files_are_refused),
        trial("rings_are_given_up_for_want_of_open_files", rings_are_given_up),
        trial("open_files_are_allowed_up_to_the_hard_limit", open_files_are_allowed),
        root("proc_that_is_missing_is_named", proc_that_is_missing_is_named),
        trial("empty_tmpdir_is_none", empty_tmpdir_is_none),
        trial("mountpoint_whose_path_is_too_long_is_not_left", too_long_a_path_is_not_left),
        trial("too_little_memory_is_refused_before_it_is_served", too_little_memory_is_refused),
        as_user("too_few_processes_are_refused_before_it_is_served", too_few_processes_are_refused),
        root("privileges_that_are_not_needed_are_given_up", privileges_are_given_up),
        root("command_has_the_privileges_of_whoever_starts_it", command_keeps_privileges),
    ]
}

/// `--run command`, in memory, ended by timeout(1) if it hangs.
fn run(command: &str) -> Output {
    program("timeout", ["--kill-after=1", "30", binary(), "--run", command, "mem:1M"])
        .output()
        .unwrap()
}

/// Has `shell` said before the program is started by the same process.
fn after(shell: &str, command: &mut Command) {
    let mut shelled = program("bash", ["-c", &format!("{shell}; exec \"$@\""), "bash"]);
    shelled.arg(command.get_program()).args(command.get_args()).env("RUST_LOG", "info");
    *command = shelled;
}

fn export(sandbox: &Sandbox, source: &str, shell: &str) -> Export {
    Export::try_start(source, &sandbox.join("disk"), &[], |command| after(shell, command))
        .unwrap_or_else(|ended| panic!("{}", ended.log))
}

/// The shell waits for SIGCHLD, which the program itself blocks.
fn command_waits_for_its_children() {
    let output = run("sleep 0.1 & wait; echo waited");
    assert!(output.status.success() && output.stdout == b"waited\n", "{output:?}");
}

fn command_can_be_signalled() {
    let output = run("kill -TERM $$; echo still here");
    assert!(output.status.code() == Some(143) && output.stdout.is_empty(), "{output:?}");
    // By the program, which was signalled; and there is no shell in between.
    let output = run("kill -TERM $PPID; exec sleep 60");
    assert_eq!(output.status.code(), Some(143), "{output:?}");
}

fn hangup_is_ignored_under_nohup() {
    let sandbox = Sandbox::new();
    let mut export = export(&sandbox, "mem:1M", "trap '' HUP");
    export.kill(libc::SIGHUP);
    let ended = export.stop(libc::SIGTERM);
    ended.assert(0, &["signal 15"]);
    assert!(!ended.log.contains("signal 1\n"), "{}", ended.log);
}

fn file_size_limit_fails_the_write() {
    let sandbox = Sandbox::new();
    let image = sandbox.join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    // In units of 1024 bytes.
    let mut export = export(&sandbox, image.to_str().unwrap(), "ulimit -f 512");
    let file = File::options().write(true).open(export.file()).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    assert_errno(file.write_all_at(&[1; 4096], 768 << 10), libc::EFBIG);
    drop(file);
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert_eq!(fs::read(&image).unwrap()[..4096], [1; 4096]);
}

fn too_few_open_files_are_refused() {
    let sandbox = Sandbox::new();
    let disk = sandbox.join("disk");
    let refused = Export::try_start("mem:1M", &disk, &[], |command| after("ulimit -n 16", command));
    refused.err().expect("a refusal").assert(4, &["ulimit -n"]);
    assert_eq!(sandbox.names(), [""; 0]);
}

fn rings_are_given_up() {
    let sandbox = Sandbox::new();
    let workers = std::thread::available_parallelism().unwrap().get().min(8);
    let shell = format!("ulimit -n {}", 32 + 8 * workers);
    let mut export = export(&sandbox, "mem:1M", &shell);
    assert_eq!(fs::read(export.file()).unwrap(), vec![0; 1 << 20]);
    export.stop(libc::SIGTERM).assert(0, &["serving by /dev/fuse", "ulimit -n"]);
    let disk = sandbox.join("disk");
    let tune = |command: &mut Command| after(&shell, command);
    let refused = Export::try_start("mem:1M", &disk, &["--io-uring=on"], tune);
    refused.err().expect("a refusal").assert(4, &["ulimit -n", "--io-uring off"]);
}

fn open_files_are_allowed() {
    let sandbox = Sandbox::new();
    let mut export = export(&sandbox, "mem:1M", "ulimit -Sn 16");
    assert_eq!(fs::read(export.file()).unwrap(), vec![0; 1 << 20]);
    export.stop(libc::SIGTERM).assert(0, &[]);
}

fn proc_that_is_missing_is_named() {
    let script = "mount -t tmpfs none /proc; exec \"$@\"";
    for option in ["--run=true", "--daemonize"] {
        let sandbox = Sandbox::new();
        let mut command = program("unshare", ["--mount", "bash", "-c", script, "bash"]);
        command.args([binary(), option, "mem:1M"]).arg(sandbox.join("disk"));
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("/proc is not there"), "{said}");
        assert_eq!(sandbox.names(), [""; 0]);
    }
}

fn empty_tmpdir_is_none() {
    let sandbox = Sandbox::new();
    let mut command = program(binary(), ["--run", "echo $DISKFUSE_FILE", "mem:1M"]);
    let output = command.env("TMPDIR", "").current_dir(sandbox.path()).output().unwrap();
    assert!(output.stdout.starts_with(b"/tmp/diskfuse-"), "{output:?}");
}

/// It can be made by a relative name, and not be mounted on.
fn too_long_a_path_is_not_left() {
    let sandbox = Sandbox::new();
    let script = "name=$(printf d%.0s {1..250}); for i in {1..17}; do mkdir $name; cd $name; done
        \"$@\"; echo $?; ls";
    let mut command =
        program("bash", ["-c", script, "bash", binary(), "--run=true", "mem:1M", "m"]);
    let output = command.current_dir(sandbox.path()).output().unwrap();
    assert_eq!(output.stdout, b"4\n", "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("name too long"), "{output:?}");
}

/// Has the program read all of the disk in `--run`, after `shell` has limited it. With so little,
/// serving may have to do with less, but never begins and then fails.
fn is_served_or_refused(mut limited: Command, program: &Path, shell: &str) -> bool {
    // It needs no further process.
    const READ: &str = "exec cat \"$DISKFUSE_FILE\"";
    limited.args(["bash", "-c", &format!("{shell}; exec \"$@\""), "bash"]);
    let output = limited.arg(program).args(["--run", READ, "mem:1M"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let has_run = !output.stdout.is_empty();
    match output.status.code() {
        Some(0) => assert!(output.stdout == vec![0; 1 << 20], "{shell}: {said}"),
        status => {
            assert!(matches!(status, Some(1 | 4)) && !has_run, "{shell}: {status:?} {said}");
            assert!(said.contains("a larger ulimit"), "{shell}: {said}");
        }
    }
    assert!(!said.contains("panicked"), "{shell}: {said}");
    has_run
}

fn too_little_memory_is_refused() {
    // Around what the log, async-io, one thread, several and rings need.
    let limits = (16..64).step_by(4).chain((64..320).step_by(16));
    let served = limits.filter(|mib| {
        let timed = program("timeout", ["--kill-after=1", "30"]);
        is_served_or_refused(timed, binary().as_ref(), &format!("ulimit -v {}", mib << 10))
    });
    assert!(served.count() > 0);
}

fn too_few_processes_are_refused() {
    // Has no others: they would count, too.
    const BIN: u32 = 2;
    let served = (1..16).filter(|processes| {
        let sandbox = Sandbox::new();
        let diskfuse = sandbox.join("diskfuse");
        fs::copy(binary(), &diskfuse).unwrap();
        sandbox.give_to(BIN);
        let mut user = as_uid(&sandbox, BIN);
        user.env("TMPDIR", sandbox.path());
        is_served_or_refused(user, &diskfuse, &format!("ulimit -u {processes}"))
    });
    assert!(served.count() > 0);
}

/// Capabilities of a process by `name` of proc(5).
fn capabilities(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("proc(5) has it");
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).expect("a mask")
}

/// On every thread, and with no way back.
fn privileges_are_given_up() {
    // CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER and CAP_SYS_ADMIN.
    const NEEDED: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 21;
    let sandbox = Sandbox::new();
    let mut export = export(&sandbox, "mem:1M", "true");
    let ours = fs::read_to_string("/proc/self/status").unwrap();
    let expected = capabilities(&ours, "CapEff") & NEEDED;
    // It is a child of timeout(1), which ends it if the test cannot.
    let pid = export.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let tasks = fs::read_dir(format!("/proc/{}/task", children.trim())).unwrap();
    let mut threads = 0;
    for task in tasks {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert_eq!(capabilities(&status, "CapEff"), expected, "{status}");
        assert_eq!(capabilities(&status, "CapPrm"), expected, "{status}");
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        threads += 1;
    }
    assert!(threads > 1);
    export.stop(libc::SIGTERM).assert(0, &[]);
}

fn command_keeps_privileges() {
    let ours = fs::read_to_string("/proc/self/status").unwrap();
    let output = run("cat /proc/self/status");
    let status = String::from_utf8_lossy(&output.stdout);
    assert_eq!(capabilities(&status, "CapEff"), capabilities(&ours, "CapEff"), "{output:?}");
    assert!(status.contains("NoNewPrivs:\t0"), "{status}");
}
