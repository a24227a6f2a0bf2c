//! A remote disk in a shell script: nothing here waits for what it just started.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Output, Stdio};

use rustix::process::{Signal, kill_process};

use crate::common::export::{binary, pid};
use crate::common::{eventually, fail, mounts, noise, program, succeed};
use crate::{Bench, SIZE};

/// A shell script that stops at its first error. `$diskfuse` is the program with its transport,
/// `$uri` the disk, and `$PWD` the test's folder.
fn script(bench: &Bench, uri: &str, text: &str) -> Command {
    let mut command = program("bash", ["-euc", text]);
    command.env("diskfuse", format!("{} {}", binary(), bench.transport.option()));
    command.env("uri", uri).current_dir(bench.sandbox.path());
    command
}

/// Ends what a failed test has left in the background.
struct Daemon<'a>(&'a Bench);

impl Daemon<'_> {
    fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.0.sandbox.join("pid")).ok()?.trim().parse().ok()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        mounts::take_away(&self.0.sandbox.join("disk"));
        if let Some(number) = self.pid() {
            eprintln!("process {number}: the daemon is still there, killed");
            let _ = kill_process(pid(number), Signal::KILL);
        }
    }
}

fn is_alive(process: u32) -> bool {
    // A zombie has ended: who adopts it may be slow to wait for it.
    fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.trim().starts_with('Z')))
}

pub fn daemon_serves_until_it_is_told_to_end(bench: &Bench) {
    let mut bytes = noise(1, SIZE);
    let disk = bench.disk(&bytes);
    let (_server, uri) = bench.nbdkit(&["file", disk.to_str().unwrap()]);
    let daemon = Daemon(bench);
    let started = "$diskfuse --daemonize --pidfile pid $uri disk\n\
                   cmp disk disk.img\n\
                   kill -0 $(cat pid)\n\
                   printf written | dd of=disk bs=1 seek=5000 conv=notrunc status=none";
    assert_eq!(succeed(&mut script(bench, &uri, started)), "");
    bytes[5000..5007].copy_from_slice(b"written");
    assert!(fs::read(&disk).unwrap() == bytes, "close has flushed it");
    let process = daemon.pid().unwrap();
    assert!(is_alive(process));
    let held = fs::File::options().write(true).open(bench.sandbox.join("disk")).unwrap();
    held.write_all_at(b"last", 0).unwrap();
    drop(held);
    bytes[..4].copy_from_slice(b"last");
    succeed(&mut script(bench, &uri, "kill $(cat pid)"));
    eventually("the end of the daemon", || !is_alive(process));
    assert_eq!(
        bench.sandbox.names(),
        ["disk.img", "nbd.socket"],
        "pidfile and mountpoint are gone"
    );
    assert!(fs::read(&disk).unwrap() == bytes);
}

/// It has left its folder by then.
pub fn daemon_finds_a_socket_by_a_relative_path_again(bench: &Bench) {
    let disk = bench.disk(&noise(4, SIZE));
    let words = ["file", disk.to_str().unwrap()];
    let (mut server, _) = bench.nbdkit(&words);
    let daemon = Daemon(bench);
    let start = "$diskfuse --daemonize --pidfile pid --reconnect-timeout 5 $uri disk";
    succeed(&mut script(bench, "nbd+unix:///?socket=nbd.socket", start));
    let process = daemon.pid().unwrap();
    server.kill();
    // It does not take its place itself.
    let _ = fs::remove_file(bench.sandbox.join("nbd.socket"));
    let (_server, _) = bench.nbdkit(&words);
    succeed(&mut script(bench, "", "cmp disk disk.img; kill $(cat pid)"));
    eventually("the end of the daemon", || !is_alive(process));
    assert_eq!(bench.sandbox.names(), ["disk.img", "nbd.socket"]);
}

pub fn daemon_that_cannot_start_says_so(bench: &Bench) {
    let (server, uri) = bench.nbdkit(&["memory", "0"]);
    let _daemon = Daemon(bench);
    let start = "$diskfuse --daemonize --pidfile pid $uri disk";
    let run = |uri: &str| -> Output { script(bench, uri, start).output().unwrap() };
    let output = run(&uri);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("size zero"), "{said}");
    drop(server);
    let output = run(&uri);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("nbd.socket"), "{said}");
    let left = bench.sandbox.names();
    assert!(left.iter().all(|name| name == "nbd.socket"), "{left:?}");
}

pub fn pidfile_in_use_is_refused(bench: &Bench) {
    let (_server, uri) = bench.nbdkit(&["memory", "1M"]);
    let daemon = Daemon(bench);
    succeed(&mut script(bench, &uri, "$diskfuse --daemonize --pidfile pid $uri disk"));
    let process = daemon.pid().unwrap();
    let second = script(bench, &uri, "$diskfuse --daemonize --pidfile pid $uri disk2").output();
    let second = second.unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains("in use") && said.contains(&process.to_string()), "{said}");
    assert_eq!(daemon.pid(), Some(process), "the first has its pidfile still");
    succeed(&mut script(bench, &uri, "cmp -n 1M disk /dev/zero; test ! -e disk2; umount disk"));
    eventually("the end of the daemon", || !is_alive(process));
    assert_eq!(bench.sandbox.names(), ["nbd.socket"]);
}

pub fn command_has_the_file_and_gives_the_status(bench: &Bench) {
    let disk = bench.disk(&noise(2, SIZE));
    let (_server, uri) = bench.nbdkit(&["file", disk.to_str().unwrap()]);
    let run = |command: &str| {
        let mut script = script(bench, &uri, "exec $diskfuse --run \"$command\" $uri");
        script.env("command", command).stdin(Stdio::null()).output().unwrap()
    };
    let output =
        run("cmp $DISKFUSE_FILE disk.img && echo $DISKFUSE_FILE && echo x 1<> $DISKFUSE_FILE");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    assert!(!fs::exists(said.trim()).unwrap(), "{said}: is left");
    assert_eq!(fs::read(&disk).unwrap()[..2], *b"x\n");
    assert_eq!(run("exit 7").status.code(), Some(7));
    assert_eq!(run("no-such-command-at-all 2>/dev/null").status.code(), Some(127));
    assert_eq!(run("kill -KILL $$").status.code(), Some(137));
    let nothing =
        fail(&mut script(bench, "nbd+unix:///?socket=/nowhere", "$diskfuse --run 'echo ran' $uri"));
    assert!(!nothing.contains("ran\n"), "{nothing}");
    assert_eq!(bench.sandbox.names(), ["disk.img", "nbd.socket"]);
}

/// SIGTERM is for the command, which tidies up; the export ends after it, with its status.
pub fn signals_are_passed_to_the_command(bench: &Bench) {
    let disk = bench.disk(&noise(3, SIZE));
    let (_server, uri) = bench.nbdkit(&["file", disk.to_str().unwrap()]);
    let text = r#"
        mkfifo ready
        $diskfuse --pidfile pid --run '
            trap "printf tidied 1<> \$DISKFUSE_FILE; exit 9" TERM
            echo > ready
            while :; do sleep 0.05; done
        ' $uri disk & 
        cat ready
        kill $(cat pid)
        wait $! || echo "status $?"
    "#;
    assert_eq!(succeed(&mut script(bench, &uri, text)), "\nstatus 9\n");
    assert_eq!(fs::read(&disk).unwrap()[..6], *b"tidied");
    assert_eq!(bench.sandbox.names(), ["disk.img", "nbd.socket", "ready"]);
}
