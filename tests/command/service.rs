//! What systemd is told, and the units that are there for it.

use std::fs;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Command, Stdio};

use libtest_mimic::Trial;

use crate::common::export::{Export, binary};
use crate::common::nbd::{Address, Starter};
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{SOON, eventually, program, succeed};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("systemd/is_told_the_beginning_and_the_end".into(), vec!["fuse"], told),
        trial("systemd/is_told_of_a_lost_server".into(), vec!["fuse", "nbd", "nbdkit"], lost),
        trial("systemd/watchdog_is_fed_while_connecting".into(), vec!["nbd"], fed),
        trial("systemd/units_are_well_formed".into(), vec!["systemd-analyze"], well_formed),
        trial("systemd/unit_hides_no_mount".into(), vec![], hides_nothing),
    ]
}

/// A service manager's socket.
struct Manager(UnixDatagram);

impl Manager {
    fn new(sandbox: &Sandbox) -> Manager {
        let socket = UnixDatagram::bind(sandbox.join("notify")).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        Manager(socket)
    }

    fn tune(sandbox: &Sandbox, command: &mut Command) {
        command.env("NOTIFY_SOCKET", sandbox.join("notify")).env("WATCHDOG_USEC", "100000");
    }

    /// The lines of the next message.
    fn hear(&self) -> Vec<String> {
        let mut message = [0; 4096];
        let len = self.0.recv(&mut message).expect("a message");
        let text = String::from_utf8(message[..len].to_vec()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// The next message that has this line, and what came before it.
    fn hear_of(&self, line: &str) -> (Vec<String>, Vec<String>) {
        let mut before = Vec::new();
        loop {
            let message = self.hear();
            if message.iter().any(|l| l == line) {
                return (message, before);
            }
            before.extend(message);
        }
    }
}

fn told() {
    let sandbox = Sandbox::new();
    let manager = Manager::new(&sandbox);
    let tune = |command: &mut Command| Manager::tune(&sandbox, command);
    let mut export = Export::try_start("mem:1M", &sandbox.join("disk"), &[], tune)
        .unwrap_or_else(|ended| panic!("{}", ended.log));
    let (ready, _) = manager.hear_of("READY=1");
    assert!(ready.contains(&format!("MAINPID={}", export.pid())), "{ready:?}");
    let status = ready.iter().find_map(|line| line.strip_prefix("STATUS=")).unwrap();
    assert_eq!(status, format!("mem:1M is at {}", export.file().display()));
    // It goes on.
    for _ in 0..3 {
        let (_, before) = manager.hear_of("WATCHDOG=1");
        assert!(before.is_empty(), "{before:?}");
    }
    let file = fs::File::open(export.file()).unwrap();
    export.kill(libc::SIGTERM);
    manager.hear_of("STOPPING=1");
    drop(file);
    let (message, _) = manager.hear_of("STATUS=flushing what was written");
    assert!(message.iter().any(|line| line.starts_with("EXTEND_TIMEOUT_USEC=")), "{message:?}");
    export.wait().assert(0, &[]);
}

/// The server's loss, its lasting, that requests fail, and its return.
fn lost() {
    let sandbox = Sandbox::new();
    let manager = Manager::new(&sandbox);
    let address = Address::unix(&sandbox);
    let mut starter = Starter::new(&sandbox);
    let mut server = starter.nbdkit(&address, &["memory", "1M"]);
    let tune = |command: &mut Command| Manager::tune(&sandbox, command);
    let options = ["--reconnect-timeout=1"];
    let mut export = Export::try_start(&address.uri(""), &sandbox.join("disk"), &options, tune)
        .unwrap_or_else(|ended| panic!("{}", ended.log));
    let serving = format!("{} is at {}", address.uri(""), export.file().display());
    manager.hear_of("READY=1");
    server.kill();
    let hear_status = || loop {
        let message = manager.hear();
        if let Some(status) = message.iter().find_map(|line| line.strip_prefix("STATUS=")) {
            assert_eq!(message.len(), 1, "{message:?}");
            return status.to_owned();
        }
    };
    // How many seconds it is ago.
    let seconds = |status: &str, what: &str| {
        let rest = status.strip_prefix("server lost ").and_then(|s| s.strip_suffix(what));
        rest.unwrap_or_else(|| panic!("{status}")).parse::<u64>().unwrap()
    };
    seconds(&hear_status(), " s ago, 0 requests wait");
    let mut status = hear_status();
    while status.ends_with(" wait") {
        status = hear_status();
    }
    let first = seconds(&status, " s ago, requests fail");
    // It is told again while it lasts.
    assert!(seconds(&hear_status(), " s ago, requests fail") > first);
    let _server = starter.nbdkit(&address, &["memory", "1M"]);
    while hear_status() != serving {}
    export.stop(libc::SIGTERM).assert(0, &["is back after"]);
}

/// By a server that says nothing.
fn fed() {
    let sandbox = Sandbox::new();
    let manager = Manager::new(&sandbox);
    let socket = sandbox.join("socket");
    let server = UnixListener::bind(&socket).unwrap();
    let mut command = Command::new(binary());
    command.arg("--connect-timeout=100").arg(format!("nbd+unix:///?socket={}", socket.display()));
    command.arg(sandbox.join("disk")).stderr(Stdio::null());
    Manager::tune(&sandbox, &mut command);
    let mut child = command.spawn().unwrap();
    let _client = server.accept().unwrap();
    for _ in 0..3 {
        assert_eq!(manager.hear(), ["WATCHDOG=1"]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the mountpoint is left alone", || !sandbox.join("disk").exists());
}

fn units() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/systemd");
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let unit = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read_to_string(path).unwrap())
    };
    let units: Vec<_> = entries.map(unit).collect();
    assert!(units.len() >= 2, "{units:?}");
    units
}

fn well_formed() {
    let sandbox = Sandbox::new();
    for (name, text) in units() {
        let path = sandbox.join(&name);
        fs::write(&path, text.replace("/usr/bin/diskfuse", binary())).unwrap();
        let said = succeed(program("systemd-analyze", ["verify", "--man=no"]).arg(&path));
        assert!(!said.contains(&*name), "{said}");
    }
}

/// In a mount namespace of its own a service shows its mounts to nobody else: systemd.exec(5) names
/// the options that make one.
fn hides_nothing() {
    const NAMESPACE: [&str; 26] = [
        "RootDirectory",
        "RootImage",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "PrivateIPC",
        "PrivatePIDs",
        "PrivateUsers",
        "ProtectSystem",
        "ProtectHome",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "ProtectProc",
        "ProcSubset",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "InaccessiblePaths",
        "ExecPaths",
        "NoExecPaths",
        "TemporaryFileSystem",
        "BindPaths",
        "BindReadOnlyPaths",
        "MountAPIVFS",
        "DynamicUser",
    ];
    for (name, text) in units() {
        for line in text.lines() {
            let option = line.split_once('=').map_or("", |(option, _)| option);
            assert!(!NAMESPACE.contains(&option), "{name}: {line}");
            // It would allow no other device, /dev/fuse among them.
            assert!(!["ProtectClock", "DevicePolicy"].contains(&option), "{name}: {line}");
        }
    }
}
