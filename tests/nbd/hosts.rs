//! Three hosts in a row: what one serves, the next shows as a file and serves again.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::Bench;
use crate::common::export::Export;
use crate::common::export::Transport;
use crate::common::nbd::Server;
use crate::common::{mounts, noise, program, succeed};

const SIZE: usize = 16 << 20;

/// A network namespace; deleted when dropped, and with it its ends of the cables.
struct Host(String);

impl Host {
    fn new(name: &str) -> Host {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("diskfuse-{}-{number}-{name}", std::process::id());
        succeed(&mut program("ip", ["netns", "add", &name]));
        let host = Host(name);
        host.ip("link set lo up");
        host
    }

    fn ip(&self, words: &str) {
        succeed(program("ip", ["-netns", &self.0]).args(words.split(' ')));
    }

    /// A cable to another host.
    fn connect(&self, ours: &str, other: &Host, theirs: &str) {
        self.ip(&format!("link add left type veth peer name right netns {}", other.0));
        for (host, device, address) in [(self, "left", ours), (other, "right", theirs)] {
            host.ip(&format!("address add {address}/24 dev {device}"));
            host.ip(&format!("link set {device} up"));
        }
    }

    /// Makes a command run there. What it mounts is seen everywhere.
    fn run(&self, command: &mut Command) {
        let mut inside = Command::new("nsenter");
        inside.arg(format!("--net=/run/netns/{}", self.0)).arg("--");
        inside.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            inside.env(name, value.expect("it is only set"));
        }
        *command = inside;
    }

    /// A server there, that listens at `address`.
    fn serve(&self, address: &str, mut command: Command) -> Server {
        self.run(&mut command);
        Server::start_until(&mut command, || {
            let mut try_it = program("bash", ["-c", &format!("exec 3<>/dev/tcp/{address}/10809")]);
            self.run(&mut try_it);
            try_it.output().unwrap().status.success()
        })
    }

    fn export(&self, bench: &Bench, uri: &str, file: &Path) -> Export {
        Export::try_start(uri, file, &[bench.transport.option()], |command| self.run(command))
            .unwrap_or_else(|ended| panic!("{}: {}", ended.status, ended.log))
            .only_by(bench.transport)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let output = program("ip", ["netns", "delete", &self.0]).output();
        if !output.is_ok_and(|output| output.status.success()) {
            eprintln!("network namespace {}: left behind", self.0);
        }
    }
}

fn qemu_nbd(address: &str, disk: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--bind", address, "--port=10809", "--format=raw", "--persistent", "--shared=0"]);
    command.arg("--export-name=disk").arg(disk);
    command
}

fn nbdkit(address: &str, disk: &Path) -> Command {
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--ip-addr", address, "--port=10809", "file"]).arg(disk);
    command
}

pub fn three_hosts_in_a_row(bench: &Bench) {
    let disk = bench.disk(&noise(1, SIZE));
    let (on_b, on_c) = (bench.sandbox.join("on-b"), bench.sandbox.join("on-c"));
    let (a, b, c) = (Host::new("a"), Host::new("b"), Host::new("c"));
    let names = [&a, &b, &c].map(|host| host.0.clone());
    a.connect("10.99.1.1", &b, "10.99.1.2");
    b.connect("10.99.2.1", &c, "10.99.2.2");

    let first = a.serve("10.99.1.1", qemu_nbd("10.99.1.1", &disk));
    let mut middle = b.export(bench, "nbd://10.99.1.1/disk", &on_b);
    let second = b.serve(
        "10.99.2.1",
        match bench.transport {
            Transport::Legacy => qemu_nbd("10.99.2.1", &on_b),
            Transport::Uring => nbdkit("10.99.2.1", &on_b),
        },
    );
    let mut last = c.export(bench, "nbd://10.99.2.1/disk", &on_c);
    assert!(fs::read(last.file()).unwrap() == noise(1, SIZE));

    let fio = [
        "--name=verify",
        "--rw=randwrite",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--bs=4k",
        "--iodepth=32",
        "--ioengine=libaio",
        "--direct=1",
        "--thread",
        "--size=16M",
        "--allow_file_create=0",
        "--end_fsync=1",
    ];
    let said = succeed(program("fio", fio).arg(format!("--filename={}", last.file().display())));
    assert!(said.contains("err= 0") && said.contains("read: IOPS"), "{said}");
    let seen = bench.sandbox.join("seen");
    fs::copy(last.file(), &seen).unwrap();

    last.stop(libc::SIGTERM).assert(0, &[]);
    drop(second);
    middle.stop(libc::SIGTERM).assert(0, &[]);
    drop(first);
    succeed(&mut program("cmp", [&seen, &disk]));
    assert!(fs::read(&disk).unwrap() != noise(1, SIZE), "fio wrote elsewhere");

    drop((a, b, c));
    for file in [&on_b, &on_c] {
        assert_eq!(mounts::mounts_at(file), []);
        assert!(!file.exists(), "{}: left behind", file.display());
    }
    for name in names {
        assert!(!Path::new("/run/netns").join(&name).exists(), "{name}: left behind");
    }
    let folder = bench.sandbox.path().to_str().unwrap();
    for process in fs::read_dir("/proc").unwrap() {
        let words = fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        assert!(!words.contains(folder), "left behind: {words}");
    }
}
