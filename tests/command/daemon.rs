//! What a background process takes along, and what it leaves to whoever started it.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use libtest_mimic::Trial;
use rustix::process::{Signal, kill_process};

use crate::common::export::{binary, pid};
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{eventually, mounts, noise, program, succeed};

pub fn trials() -> Vec<Trial> {
    vec![
        trial(
            "daemon_keeps_no_descriptors".into(),
            vec!["fuse", "flock"],
            daemon_keeps_no_descriptors,
        ),
        trial(
            "daemon_may_be_given_its_source_as_a_descriptor".into(),
            vec!["fuse"],
            daemon_may_be_given_its_source_as_a_descriptor,
        ),
        trial(
            "daemon_ends_with_the_process_in_front".into(),
            vec!["fuse", "nbd"],
            daemon_ends_with_the_process_in_front,
        ),
    ]
}

/// Ends what a failed test has left in the background.
struct Daemon<'a>(&'a Sandbox);

impl Daemon<'_> {
    /// A script in the sandbox, which starts the program as `$diskfuse --daemonize --pidfile pid`.
    fn script(&self, text: &str) -> Command {
        let mut command = program("bash", ["-euc", text]);
        command.env("diskfuse", format!("{} --daemonize --pidfile pid", binary()));
        command.current_dir(self.0.path());
        command
    }

    fn end(&self) {
        let process = fs::read_to_string(self.0.join("pid")).unwrap().trim().parse().unwrap();
        kill_process(pid(process), Signal::TERM).unwrap();
        eventually("its end", || !fs::exists(self.0.join("pid")).unwrap());
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        mounts::take_away(&self.0.join("disk"));
    }
}

fn daemon_keeps_no_descriptors() {
    let sandbox = Sandbox::new();
    let daemon = Daemon(&sandbox);
    let text = r#"
        exec 3> three 200> two-hundred
        ( flock -n 9 && $diskfuse mem:1M disk ) 9> lock
        flock -n lock true || echo still locked
        ls -l /proc/$(cat pid)/fd | grep -e /three -e /two-hundred -e /lock || true
    "#;
    assert_eq!(succeed(&mut daemon.script(text)), "");
    assert_eq!(fs::read(sandbox.join("disk")).unwrap().len(), 1 << 20);
    daemon.end();
    assert_eq!(sandbox.names(), ["lock", "three", "two-hundred"]);
}

fn daemon_may_be_given_its_source_as_a_descriptor() {
    let sandbox = Sandbox::new();
    let daemon = Daemon(&sandbox);
    fs::write(sandbox.join("image"), noise(1, 8192)).unwrap();
    for path in ["/dev/fd/9", "/proc/self/fd/9"] {
        // The folder too.
        let text = format!("$diskfuse {path} /dev/fd/8/disk 9<> image 8< . && cmp disk image");
        assert_eq!(succeed(&mut daemon.script(&text)), "");
        daemon.end();
        assert_eq!(sandbox.names(), ["image"]);
    }
}

/// While it connects: it would go on unseen, and mount some time.
fn daemon_ends_with_the_process_in_front() {
    let sandbox = Sandbox::new();
    let socket = sandbox.join("socket");
    let server = UnixListener::bind(&socket).unwrap();
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let mut command = Command::new(binary());
        command.args(["--daemonize", "--connect-timeout=100"]);
        command.arg(format!("nbd+unix:///?socket={}", socket.display()));
        command.arg(sandbox.join("disk")).stderr(Stdio::null());
        let mut in_front = command.spawn().unwrap();
        // It says nothing.
        let (mut client, _) = server.accept().unwrap();
        kill_process(pid(in_front.id()), signal).unwrap();
        in_front.wait().unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let read = client.read(&mut [0]);
        assert!(matches!(read, Ok(0)), "{signal:?}: it is still connected: {read:?}");
        assert_eq!(sandbox.names(), ["socket"]);
    }
}
