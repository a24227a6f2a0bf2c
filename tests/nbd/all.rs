//! `--all`: a directory with all exports of a server.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use libc::{EIO, ENFILE, ENOENT, ENOTEMPTY, EPERM, EROFS, O_DIRECT, SIGTERM};
use libtest_mimic::Trial;

use crate::common::export::{Export, Transport, binary};
use crate::common::nbd::{Address, Server, Starter};
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::writer::Holder;
use crate::common::{
    Aligned, assert_errno, eventually, fail, mounts, noise, number, program, report, succeed,
};
use crate::{Bench, in_memory, open};

/// Images in a folder, each of which nbdkit exports by its name.
struct Images(PathBuf);

impl Images {
    fn new(sandbox: &Sandbox) -> Images {
        let folder = sandbox.join("images");
        fs::create_dir(&folder).unwrap();
        Images(folder)
    }

    /// So many, of different sizes and contents.
    fn of(sandbox: &Sandbox, number: usize) -> Images {
        let images = Images::new(sandbox);
        (0..number).for_each(|n| images.add(&format!("vm{n}"), n));
        images
    }

    fn add(&self, name: &str, number: usize) {
        fs::write(self.path(name), noise(number as u64 + 1, 4096 * (number % 7 + 1))).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn words(&self) -> [String; 2] {
        ["file".into(), format!("dir={}", self.0.display())]
    }

    fn serve(&self, address: &Address) -> Server {
        Server::nbdkit(address, self.words())
    }
}

fn try_start(
    sandbox: &Sandbox,
    address: &Address,
    options: &[&str],
    tune: impl FnOnce(&mut Command),
) -> Export {
    let options = [&["--all"], options].concat();
    let export = Export::try_start(&address.uri(""), &sandbox.join("all"), &options, tune);
    export.unwrap_or_else(|ended| panic!("{}: {}", ended.status, ended.log))
}

/// A directory of them, named `all`.
fn start(bench: &Bench, address: &Address, options: &[&str]) -> Export {
    let options = [&[bench.transport.option()], options].concat();
    try_start(&bench.sandbox, address, &options, |_| ()).only_by(bench.transport)
}

/// What is in a directory, with sizes.
fn listed(folder: &Path) -> BTreeMap<String, u64> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let entry = |entry: fs::DirEntry| {
        assert!(entry.file_type().unwrap().is_file());
        (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len())
    };
    entries.map(entry).collect()
}

fn connected(export: &Export) -> u64 {
    number(&report(export.file())["exports"]["connected"])
}

pub fn hundred_exports_are_listed_read_and_written(bench: &Bench) {
    let images = Images::of(&bench.sandbox, 100);
    let address = Address::unix(&bench.sandbox);
    let _server = images.serve(&address);
    let mut export = start(bench, &address, &[]);
    let folder = export.file().to_owned();
    let sizes = listed(&folder);
    assert_eq!(sizes, listed(&images.0));
    assert_eq!((sizes.len(), connected(&export)), (100, 0), "nothing is connected to for that");
    for name in sizes.keys() {
        assert!(fs::read(folder.join(name)).unwrap() == images.bytes(name), "{name}");
    }
    for (number, name) in ["vm3", "vm70", "vm71"].into_iter().enumerate() {
        let file = open(&folder.join(name), if number == 0 { O_DIRECT } else { 0 });
        file.write_all_at(&Aligned::of(&[number as u8; 4096]), 0).unwrap();
    }
    for (number, name) in ["vm3", "vm70", "vm71"].into_iter().enumerate() {
        assert_eq!(images.bytes(name)[..4096], [number as u8; 4096], "{name}");
    }
    let of_file = report(&folder.join("vm3"));
    assert_eq!(of_file["size"], sizes["vm3"]);
    assert_eq!(of_file["source"], address.uri("vm3"));
    assert!(number(&of_file["nbd"]["connections"]) > 0, "{of_file}");
    let of_all = report(&folder);
    assert_eq!(of_all["size"], sizes.values().sum::<u64>());
    assert_eq!(
        (&of_all["exports"]["listed"], &of_all["source"]),
        (&100.into(), &address.uri("").into())
    );
    let mounted = succeed(&mut program(binary(), ["--mounts"]));
    let line = mounted.lines().find(|line| line.contains(folder.to_str().unwrap())).unwrap();
    assert!(line.ends_with("served") && line.contains(&export.pid().to_string()), "{line}");
    mounts::unmount(&["umount"], &folder);
    export.wait().assert(0, &[]);
    assert!(!folder.exists(), "it was missing before");
}

/// The list is the server's.
pub fn nothing_is_made_or_removed_in_it(bench: &Bench) {
    let images = Images::of(&bench.sandbox, 2);
    let address = Address::unix(&bench.sandbox);
    let _server = images.serve(&address);
    let export = start(bench, &address, &[]);
    let (folder, file) = (export.file(), export.file().join("vm0"));
    assert_errno(File::create(folder.join("new")), EPERM);
    assert_errno(fs::create_dir(folder.join("new")), EPERM);
    assert_errno(fs::remove_file(&file), EPERM);
    assert_errno(fs::rename(&file, folder.join("vm1")), EPERM);
    assert_errno(fs::hard_link(&file, folder.join("new")), EPERM);
    assert_errno(fs::set_permissions(folder, fs::Permissions::from_mode(0o777)), EPERM);
    assert_errno(fs::metadata(folder.join("new")), ENOENT);
    assert_eq!(listed(folder).len(), 2);
}

pub fn names_are_escaped(bench: &Bench) {
    let images = Images::new(&bench.sandbox);
    let long = format!("{}%", "x".repeat(254));
    let cut = format!("{}%~{:08X}", "x".repeat(245), crc32fast::hash(long.as_bytes()));
    let names: [(&str, &str); 5] = [
        ("100%", "100%25"),
        ("a\nb", "a%0Ab"),
        ("größe 2", "größe 2"),
        ("%", "%25"),
        (&long, &cut),
    ];
    names.iter().enumerate().for_each(|(number, (name, _))| images.add(name, number));
    let address = Address::unix(&bench.sandbox);
    {
        let _server = images.serve(&address);
        let export = start(bench, &address, &[]);
        let found: Vec<String> = listed(export.file()).into_keys().collect();
        let mut expected: Vec<_> = names.iter().map(|(_, file)| file.to_string()).collect();
        expected.sort();
        assert_eq!(found, expected);
        for (name, file) in names {
            let file = export.file().join(OsStr::from_bytes(file.as_bytes()));
            assert!(fs::read(file).unwrap() == images.bytes(name), "{name:?}");
        }
    }
    let _ = fs::remove_file(bench.sandbox.join("nbd.socket"));
    // The default export has no name.
    let _server = Server::nbdkit(&address, ["memory", "1M"]);
    let export = start(bench, &address, &[]);
    assert_eq!(listed(export.file()), BTreeMap::from([("%".to_owned(), 1 << 20)]));
    assert_eq!(fs::read(export.file().join("%")).unwrap(), vec![0; 1 << 20]);
}

pub fn one_that_fails_hurts_no_other(bench: &Bench) {
    let images = Images::of(&bench.sandbox, 3);
    let address = Address::unix(&bench.sandbox);
    let _server = images.serve(&address);
    let mut export = start(bench, &address, &[]);
    fs::remove_file(images.path("vm1")).unwrap();
    let failed = File::open(export.file().join("vm1")).unwrap_err();
    assert!([EIO, ENOENT].contains(&failed.raw_os_error().unwrap()), "{failed}");
    for name in ["vm0", "vm2"] {
        assert!(fs::read(export.file().join(name)).unwrap() == images.bytes(name), "{name}");
    }
    assert_eq!(listed(export.file()).len(), 3, "the list is that of the start");
    let ended = export.stop(SIGTERM);
    ended.assert(0, &[]);
    let told: Vec<_> = ended.warnings().into_iter().filter(|line| line.contains("/vm1?")).collect();
    assert_eq!(told.len(), 1, "{}", ended.log);
}

pub fn server_that_comes_back_is_there_for_open_files(bench: &Bench) {
    let images = Images::of(&bench.sandbox, 3);
    let address = Address::unix(&bench.sandbox);
    let mut server = images.serve(&address);
    let mut starter = Starter::new(&bench.sandbox);
    let mut export = start(bench, &address, &[]);
    // By another process: one that this starts meanwhile, for another test, would have the file until
    // it executes, and its close would flush.
    let holder = Holder::write(&export.file().join("vm0"), "written");
    server.kill();
    eventually("the loss", || report(export.file())["nbd"]["lost_connections"] != 0);
    assert_errno(File::open(export.file().join("vm1")), EIO);
    assert_eq!(listed(export.file()).len(), 3);
    // As if it had forgotten what it had not made durable.
    fs::write(images.path("vm0"), [0; 4096]).unwrap();
    let words = images.words();
    let _server = starter.nbdkit(&address, &[&words[0], &words[1]]);
    let file = File::options().write(true).open(export.file().join("vm0")).unwrap();
    file.sync_all().unwrap();
    assert_eq!(images.bytes("vm0")[..7], *b"written");
    drop((file, holder));
    assert!(fs::read(export.file().join("vm1")).unwrap() == images.bytes("vm1"));
    export.stop(SIGTERM).assert(0, &["/vm0?"]);
}

/// A signal while files are open: what was acknowledged is made durable in each of them, by a FLUSH
/// of its own.
pub fn acknowledged_writes_are_flushed_at_the_end(bench: &Bench) {
    let images = Images::of(&bench.sandbox, 3);
    let (address, log) = (Address::unix(&bench.sandbox), bench.sandbox.join("log"));
    let words = images.words();
    let log_file = format!("logfile={}", log.display());
    let _server = Server::nbdkit(&address, ["--filter=log", &words[0], &words[1], &log_file]);
    let flushes = || fs::read_to_string(&log).unwrap().matches(" Flush ").count();
    let mut export = start(bench, &address, &[]);
    let _holders = ["vm0", "vm2"].map(|name| Holder::write(&export.file().join(name), "written"));
    assert_eq!(flushes(), 0);
    export.kill(SIGTERM);
    thread::sleep(Duration::from_millis(200));
    // At once.
    export.stop(SIGTERM).assert(0, &[]);
    assert_eq!(flushes(), 2, "{}", fs::read_to_string(&log).unwrap());
    for name in ["vm0", "vm2"] {
        assert_eq!(images.bytes(name)[..7], *b"written");
    }
}

/// A server that is gone with what it had not made durable: the exit status says so.
pub fn lost_writes_are_told_at_the_end(bench: &Bench) {
    let images = Images::of(&bench.sandbox, 2);
    let address = Address::unix(&bench.sandbox);
    let mut server = images.serve(&address);
    let mut export = start(bench, &address, &["--reconnect-timeout=0"]);
    let file = open(&export.file().join("vm1"), O_DIRECT);
    let _other = open(&export.file().join("vm0"), O_DIRECT);
    file.write_all_at(&Aligned::of(&[9; 4096]), 0).unwrap();
    server.kill();
    assert_errno(file.sync_all(), EIO);
    export.kill(SIGTERM);
    thread::sleep(Duration::from_millis(200));
    let ended = export.stop(SIGTERM);
    ended.assert(1, &["writes may be lost"]);
    let failures = ended.log.lines().filter(|line| line.contains("last flush failed"));
    assert!(failures.clone().any(|line| line.contains("/vm1?")), "{}", ended.log);
    assert!(!failures.clone().any(|line| line.contains("/vm0?")), "{}", ended.log);
}

pub fn read_only_files_cannot_be_written(bench: &Bench) {
    let images = Images::of(&bench.sandbox, 2);
    let address = Address::unix(&bench.sandbox);
    let server = images.serve(&address);
    {
        let export = start(bench, &address, &["-r"]);
        let file = export.file().join("vm1");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o400);
        assert_errno(File::options().write(true).open(&file), EROFS);
        assert!(fs::read(&file).unwrap() == images.bytes("vm1"));
    }
    drop(server);
    let _ = fs::remove_file(bench.sandbox.join("nbd.socket"));
    // Those that the server has so.
    let words = images.words();
    let _server = Server::nbdkit(&address, ["-r", &words[0], &words[1]]);
    let export = start(bench, &address, &[]);
    let file = export.file().join("vm1");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o400);
    assert_errno(File::options().write(true).open(&file), EROFS);
}

/// nbd-server tells no size of an export that nobody has opened.
pub fn exports_of_nbd_server_have_their_sizes(bench: &Bench) {
    let disk = bench.disk(&noise(1, 65536));
    let address = Address::tcp();
    let _server = Server::nbd_server_with("allowlist = true\n", &bench.sandbox, &address, &disk);
    let export = start(bench, &address, &[]);
    assert_eq!(listed(export.file()), BTreeMap::from([("disk".to_owned(), 65536)]));
    assert!(fs::read(export.file().join("disk")).unwrap() == fs::read(&disk).unwrap());
}

pub fn trials() -> Vec<Trial> {
    let trial = |name: &str, needs: &[_], test: fn()| {
        let needs = [&["fuse", "nbd", "nbdkit"], needs].concat();
        trial(format!("all::{name}"), needs, test)
    };
    vec![
        trial("unused_files_are_disconnected", &[], unused_files_are_disconnected),
        trial("connected_files_are_bounded", &[], connected_files_are_bounded),
        trial("places_that_will_not_do_are_refused", &[], places_that_will_not_do_are_refused),
        trial("command_has_the_directory", &[], command_has_the_directory),
        trial("ordinary_user_has_it_too", &["user", "setpriv"], ordinary_user_has_it_too),
    ]
}

fn unused_files_are_disconnected() {
    let sandbox = in_memory();
    let images = Images::of(&sandbox, 2);
    let address = Address::unix(&sandbox);
    let _server = images.serve(&address);
    let export = try_start(&sandbox, &address, &[], |_| ());
    let Address::Unix(socket) = &address else { unreachable!() };
    let (file, other) = (export.file().join("vm0"), export.file().join("vm1"));
    let open_file = File::open(&other).unwrap();
    fs::write(&file, images.bytes("vm1")).unwrap_err();
    open(&file, 0).write_all_at(b"written", 0).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap_err();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
    let began = Instant::now();
    eventually("one file less", || connected(&export) == 1);
    assert!(began.elapsed() > Duration::from_secs(2), "not while it may be used again");
    eventually("fewer connections", || {
        Address::clients(socket) == number(&report(&other)["nbd"]["connections"]) as usize
    });
    // It is the same file as before.
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::read(&file).unwrap()[..7], *b"written");
    assert_eq!(connected(&export), 2);
    drop(open_file);
}

fn connected_files_are_bounded() {
    let sandbox = in_memory();
    let images = Images::of(&sandbox, 4);
    let address = Address::unix(&sandbox);
    let _server = images.serve(&address);
    let cpus = thread::available_parallelism().unwrap().get();
    let limit = |files: usize| format!("ulimit -n {}", 32 + 8 * (cpus.min(8) + cpus) + files);
    let options = ["--connections=1", Transport::Legacy.option()];
    let export = try_start(&sandbox, &address, &options, |command| {
        *command = after(&limit(2), command);
    });
    let at = |n: usize| export.file().join(format!("vm{n}"));
    let one = File::open(at(0)).unwrap();
    let _other = File::open(at(1)).unwrap();
    assert_errno(File::open(at(2)), ENFILE);
    eventually("the reason in the log", || export.log().contains("/vm2?"));
    drop(one);
    // The one that nobody uses makes room at once.
    eventually("room", || File::open(at(2)).is_ok());
    for n in [3, 2, 0, 3] {
        eventually("its close", || connected(&export) <= 2);
        assert!(fs::read(at(n)).unwrap() == images.bytes(&format!("vm{n}")));
    }
    assert_eq!(connected(&export), 2);
}

/// The command, by a shell that carries this out before.
fn after(shell: &str, command: &Command) -> Command {
    let mut changed = Command::new("sh");
    changed.args(["-c", &format!("{shell}; exec \"$@\""), "sh"]);
    changed.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        changed.env(name, value.unwrap_or_default());
    }
    changed
}

fn places_that_will_not_do_are_refused() {
    let sandbox = in_memory();
    let images = Images::of(&sandbox, 1);
    let address = Address::unix(&sandbox);
    let _server = images.serve(&address);
    let folder = sandbox.join("folder");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("of value"), "").unwrap();
    let refused = |place: &Path| {
        let mut command = program(binary(), ["--all", &address.uri("")]);
        let output = command.arg(place).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let said = refused(&folder);
    assert!(said.contains("is not empty") && said.contains("choose another"), "{said}");
    let said = refused(&folder.join("of value"));
    assert!(said.contains("is not a directory"), "{said}");
    let said = refused(&sandbox.join("missing/folder"));
    assert!(said.contains("mkdir -p"), "{said}");
    assert_errno(fs::remove_dir(&folder), ENOTEMPTY);
    fs::remove_file(folder.join("of value")).unwrap();
    let options = ["--all"];
    let mut export = Export::try_start(&address.uri(""), &folder, &options, |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log));
    assert_eq!(listed(export.file()).len(), 1);
    let said = refused(&folder);
    assert!(said.contains("already served"), "{said}");
    export.stop(SIGTERM).assert(0, &[]);
    assert!(folder.exists(), "it was there before");
    // A list that is refused has no directory.
    let away = program(binary(), ["--all", "nbd+unix:///?socket=/nowhere"]).arg(&folder).output();
    assert_eq!(away.unwrap().status.code(), Some(3));
}

fn command_has_the_directory() {
    let sandbox = in_memory();
    let images = Images::of(&sandbox, 2);
    let address = Address::unix(&sandbox);
    let _server = images.serve(&address);
    let run = |command: &str| {
        let mut run = program(binary(), ["--all", "--run", command, &address.uri("")]);
        run.current_dir(&images.0);
        run
    };
    let said = succeed(&mut run(
        "cmp \"$DISKFUSE_FILE\"/vm1 vm1 && ls $DISKFUSE_FILE && echo $DISKFUSE_FILE",
    ));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2], ["vm0", "vm1"]);
    assert!(!fs::exists(lines[2]).unwrap(), "{said}: is left");
    fail(&mut run("rm $DISKFUSE_FILE/vm1"));
    // And in the background.
    let folder = sandbox.join("all");
    let pidfile = sandbox.join("pid");
    let mut start = program(binary(), ["--all", "--daemonize", &address.uri("")]);
    start.arg(&folder).arg("--pidfile").arg(&pidfile).env("RUST_LOG", "error");
    succeed(&mut start);
    assert!(fs::read(folder.join("vm1")).unwrap() == images.bytes("vm1"));
    mounts::unmount(&["umount"], &folder);
    eventually("its end", || !folder.exists() && !pidfile.exists());
}

/// By fusermount3.
fn ordinary_user_has_it_too() {
    use crate::common::suite::as_user;
    let sandbox = Sandbox::new();
    let images = Images::of(&sandbox, 2);
    let address = Address::unix(&sandbox);
    let _server = images.serve(&address);
    let Address::Unix(socket) = &address else { unreachable!() };
    fs::set_permissions(socket, fs::Permissions::from_mode(0o666)).unwrap();
    fs::copy(binary(), sandbox.join("diskfuse")).unwrap();
    sandbox.give_to(crate::common::USER);
    let mut command = as_user(&sandbox);
    let script = r#"
        set -e
        ./diskfuse --all --run 'cmp "$DISKFUSE_FILE"/vm1 images/vm1' "$1" all
        test ! -e all
        mkdir all
        ./diskfuse --all --run 'ls all' "$1" all
        rmdir all
    "#;
    command.args(["bash", "-c", script, "bash", &address.uri("")]).current_dir(sandbox.path());
    let said = succeed(&mut command);
    assert!(said.contains("vm0\nvm1\n"), "{said}");
}
