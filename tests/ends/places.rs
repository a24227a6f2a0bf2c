//! Where a mount is: taken by another, moved, copied, or in use.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Signal, kill_process};

use crate::common::export::{Export, binary, pid};
use crate::common::image::write_sparse;
use crate::common::nbd::{Address, Server};
use crate::common::suite::{Case, SIZE};
use crate::common::{eventually, is_root, mounts, noise, program, succeed, within};

/// For what takes an instant on an idle machine, and the old program took eight seconds for.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Continues a process when it is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(export: &Export) -> Stopped {
        export.kill(libc::SIGSTOP);
        Stopped(export.pid())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(pid(self.0), Signal::CONT);
    }
}

fn image(case: &Case, name: &str, seed: u64) -> String {
    let path = case.sandbox.join(name);
    write_sparse(&path, &noise(seed, SIZE));
    path.to_str().unwrap().to_owned()
}

fn start(case: &Case, source: &str, options: &[&str]) -> Export {
    let mountpoint = case.sandbox.join("disk");
    Export::try_start(source, &mountpoint, &case.options(options), |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log))
}

/// The first is unmounted and slow to end; the second begins meanwhile. The kernel gives its mount
/// the same number.
pub fn next_disk_in_the_same_place_is_not_taken_for_the_first(case: &Case) {
    let (one, two) = (image(case, "one", 1), image(case, "two", 2));
    for content in [None, Some("mine")] {
        let place = case.sandbox.join("disk");
        if let Some(content) = content {
            fs::write(&place, content).unwrap();
        }
        let mut first = start(case, &one, &[]);
        let stopped = Stopped::new(&first);
        unmount(&place, UnmountFlags::DETACH).unwrap();
        let mut second = start(case, &two, &[]);
        drop(stopped);
        first.wait_whatever_is_left().assert(0, &[]);
        assert!(second.is_mounted(), "the first has taken the second's mount away");
        assert!(fs::read(second.file()).unwrap() == noise(2, SIZE));
        second.kill(libc::SIGTERM);
        second.wait_whatever_is_left().assert(0, &[]);
        assert_eq!(fs::read_to_string(&place).ok().as_deref(), content);
    }
}

pub fn next_disk_may_have_the_same_pidfile(case: &Case) {
    let (one, two) = (image(case, "one", 1), image(case, "two", 2));
    let path = case.sandbox.join("pid");
    let pidfile = format!("--pidfile={}", path.display());
    let mut first = start(case, &one, &[&pidfile]);
    eventually("a pidfile", || fs::read_to_string(&path).is_ok_and(|text| !text.is_empty()));
    let stopped = Stopped::new(&first);
    unmount(first.file(), UnmountFlags::DETACH).unwrap();
    let continues = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        drop(stopped);
    });
    let mut second = start(case, &two, &[&pidfile]);
    continues.join().unwrap();
    first.wait_whatever_is_left().assert(0, &[]);
    let number = format!("{}\n", second.pid());
    eventually("its number", || fs::read_to_string(&path).is_ok_and(|text| text == number));
    assert!(fs::read(second.file()).unwrap() == noise(2, SIZE));
    second.kill(libc::SIGTERM);
    second.wait_whatever_is_left().assert(0, &[]);
    assert!(!path.exists() && !case.sandbox.join("disk").exists());
}

pub fn folder_that_was_moved_is_found(case: &Case) {
    let one = image(case, "one", 1);
    let (here, there) = (case.sandbox.join("here"), case.sandbox.join("there"));
    fs::create_dir(&here).unwrap();
    let options = case.options(&[]);
    let mut export = Export::try_start(&one, &here.join("disk"), &options, |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log));
    fs::rename(&here, &there).unwrap();
    assert!(fs::read(there.join("disk")).unwrap() == noise(1, SIZE));
    export.kill(libc::SIGTERM);
    let ended = export.ended_within(AT_ONCE);
    ended.assert(0, &[]);
    assert_eq!(ended.warnings(), [""; 0]);
    assert!(mounts::mounts_at(&there.join("disk")).is_empty(), "a dead mount is left");
    assert_eq!(fs::read_dir(&there).unwrap().count(), 0, "the mountpoint is left");
}

/// A process with mounts of its own, as every service with PrivateTmp.
struct Namespace(Child);

impl Namespace {
    fn new() -> Namespace {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "echo; read x"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0];
        let mut stdout = child.stdout.take().unwrap();
        std::io::Read::read_exact(&mut stdout, &mut ready).unwrap();
        Namespace(child)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn copy_in_another_namespace_keeps_nothing_alive(case: &Case) {
    let one = image(case, "one", 1);
    for by_umount in [true, false] {
        let mut export = start(case, &one, &[]);
        let _namespace = Namespace::new();
        match by_umount {
            true => mounts::unmount(&["umount"], export.file()),
            false => export.kill(libc::SIGTERM),
        }
        let ended = export.ended_within(AT_ONCE);
        ended.assert(0, &[]);
        assert_eq!(ended.warnings(), [""; 0]);
        // The lock has gone with it.
        start(case, &one, &[]).stop(libc::SIGTERM).assert(0, &[]);
    }
    // Who has it open is served until it is closed.
    let mut export = start(case, &one, &[]);
    let file = File::open(export.file()).unwrap();
    let _namespace = Namespace::new();
    unmount(export.file(), UnmountFlags::DETACH).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..] == noise(1, SIZE)[..4096]);
    drop(file);
    export.ended_within(AT_ONCE).assert(0, &[]);
}

/// Nothing reaches a mount below another: it would stay there, dead.
pub fn what_is_mounted_on_top_goes_first(case: &Case) {
    let one = image(case, "one", 1);
    let other = case.sandbox.join("other");
    fs::write(&other, "other").unwrap();
    let place = case.sandbox.join("disk");
    let cover = || succeed(program("mount", ["--bind"]).args([&other, &place]));
    // It is served below, and is there again.
    let mut export = start(case, &one, &[]);
    let file = File::open(&place).unwrap();
    cover();
    cover();
    assert_eq!(fs::read(&place).unwrap(), b"other");
    drop(file);
    assert!(!within(Duration::from_millis(500), || export.has_exited()), "{}", export.log());
    for _ in 0..2 {
        unmount(&place, UnmountFlags::empty()).unwrap();
    }
    assert!(fs::read(&place).unwrap() == noise(1, SIZE));
    // Nobody uses it.
    cover();
    cover();
    export.kill(libc::SIGTERM);
    let ended = export.ended_within(AT_ONCE);
    ended.assert(0, &["mounted on top", "unmounted too"]);
    assert_eq!(mounts::mounts_at(&place), []);
    // Somebody does, and what the page cache holds of another is written.
    let mut export = start(case, &one, &["--cache=writeback"]);
    let file = File::options().write(true).open(&place).unwrap();
    file.write_all_at(&[7; 4096], 8192).unwrap();
    cover();
    let above = File::open(&place).unwrap();
    export.kill(libc::SIGTERM);
    eventually("a report", || export.log().contains("is mounted on top of it"));
    let ended = export.ended_within(2 * AT_ONCE);
    ended.assert(0, &["still in use", "unmounted too", "taken away"]);
    assert_eq!(mounts::mounts_at(&place), []);
    assert_eq!(fs::read(&one).unwrap()[8192..][..4096], [7; 4096]);
    let mut bytes = [0; 5];
    above.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"other");
    assert_eq!(fs::read(&other).unwrap(), b"other");
}

/// An ordinary user too, where fusectl is mounted.
pub fn owner_takes_his_file_away(case: &Case) {
    let one = image(case, "one", 1);
    let mut export = start(case, &one, &[]);
    let file = File::open(export.file()).unwrap();
    export.kill(libc::SIGTERM);
    eventually("a report", || export.log().contains("still in use"));
    eventually("the end", || {
        export.kill(libc::SIGTERM);
        within(Duration::from_millis(200), || export.has_exited())
    });
    let ended = export.wait();
    ended.assert(0, &[]);
    assert!(!ended.log.contains("abandoned"), "{}", ended.log);
    assert!(file.read_at(&mut [0], 0).is_err());
    drop(file);
    let connection = export.connection();
    eventually("its connection's end", || mounts::is_connected(connection) != Some(true));
}

/// The first read waits for a server that never answers. An ordinary user's process too must not
/// wait for itself.
pub fn first_read_that_never_comes_ends_with_a_signal(case: &Case) {
    let address = Address::unix(&case.sandbox);
    let words = ["--filter=delay", "memory", "4M", "rdelay=3600"];
    let _server = Server::nbdkit(&address, words);
    let pidfile = format!("--pidfile={}", case.sandbox.join("pid").display());
    let mut export = start(case, &address.uri(""), &[&pidfile]);
    eventually("the first read", || mounts::waiting(export.connection()).is_some_and(|n| n > 0));
    export.kill(libc::SIGTERM);
    // Requests in flight have five seconds.
    let ended = export.ended_within(3 * AT_ONCE);
    ended.assert(1, &["stopped by signal 15"]);
    assert_eq!(
        case.sandbox.names().iter().filter(|name| *name == "pid" || *name == "disk").count(),
        0
    );
}

/// Unmounts when dropped.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

pub fn device_that_is_in_use_is_not_exported_writable(case: &Case) {
    assert!(is_root());
    let image = case.image(&vec![0; 32 << 20]);
    let folder = case.sandbox.join("folder");
    fs::create_dir(&folder).unwrap();
    succeed(program("mkfs.ext4", ["-q"]).arg(image.path()));
    succeed(&mut program("mount", [image.path(), &folder]));
    let mounted = Mounted(&folder);
    let refused = case.try_export(&image, &[]).err().expect("it is mounted");
    refused.assert(3, &[&image.source, "in use", "-r"]);
    drop(case.export(&image, &["-r"]));
    drop(mounted);
    let export = case.export(&image, &[]);
    // Another node of the same device.
    let node = case.sandbox.join("node");
    let number = fs::read_to_string(
        Path::new("/sys/class/block").join(image.path().file_name().unwrap()).join("dev"),
    );
    let number = number.unwrap();
    let (major, minor) = number.trim().split_once(':').unwrap();
    succeed(&mut program("mknod", [node.to_str().unwrap(), "b", major, minor]));
    let second = program(binary(), case.options(&[])).arg(&node).arg(&folder).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(3), "{said}");
    assert!(said.contains("in use"), "{said}");
    drop(export);
}
