//! Modes, owners and times.

use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use libc::{EACCES, EPERM, EROFS};
use rustix::fs::{FallocateFlags, fallocate};

use crate::common::export::binary;
use crate::common::suite::Case;
use crate::common::{USER, assert_errno, fail, is_root, program, succeed};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn chmod(path: &Path, mode: u32) -> std::io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
}

pub fn read_only_stays_read_only(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["-r"]);
    let file = export.file();
    assert_eq!(mode(file), 0o400);
    for wrong in [0o600, 0o500, 0o700] {
        assert_errno(chmod(file, wrong), EROFS);
    }
    assert_eq!(mode(file), 0o400);
    let open = |options: &mut fs::OpenOptions| options.open(file);
    // Which of the two comes first is the kernel's choice: it looks at the mode too.
    for result in [
        open(File::options().write(true)),
        open(File::options().read(true).write(true)),
        open(File::options().append(true)),
        open(File::options().write(true).truncate(true)),
    ] {
        let errno = result.unwrap_err().raw_os_error().unwrap();
        assert!([EROFS, EACCES].contains(&errno), "{errno}");
    }
    assert_errno(fallocate(File::open(file).unwrap(), FallocateFlags::empty(), 0, 1), libc::EBADF);
    fail(program("truncate", ["-s", "1"]).arg(file));
    assert_eq!(fs::read(file).unwrap(), case.patchy_bytes());
}

pub fn image_that_cannot_be_written_is_read_only(case: &Case) {
    let image = case.patchy();
    chmod(image.path(), 0o444).unwrap();
    if is_root() {
        // Modes do not stop root; a read-only file system does.
        let path = image.path();
        let mut mount = program("mount", ["--bind"]);
        succeed(mount.args([path, path]));
        let _mount = Unmount(path);
        succeed(program("mount", ["-o", "remount,bind,ro"]).arg(path));
        is_exported_read_only(case, &image);
    } else {
        is_exported_read_only(case, &image);
    }
}

pub fn device_that_cannot_be_written_is_read_only(case: &Case) {
    let image = case.patchy();
    let device = image.source.as_str();
    succeed(&mut program("blockdev", ["--setro", device]));
    let _read_only = ReadOnly(device);
    is_exported_read_only(case, &image);
    let info = succeed(&mut program(binary(), ["--info", device]));
    assert!(info.lines().any(|line| line.contains("read only") && line.contains("yes")), "{info}");
}

fn is_exported_read_only(case: &Case, image: &crate::common::image::Image) {
    let mut export = case.export(image, &[]);
    assert_eq!(mode(export.file()), 0o400);
    assert_errno(chmod(export.file(), 0o600), EROFS);
    assert_eq!(fs::read(export.file()).unwrap(), case.patchy_bytes());
    export.stop(libc::SIGTERM).assert(0, &["read-only"]);
}

/// A device that is switched to read-only, which outlasts what a loop device is attached to.
struct ReadOnly<'a>(&'a str);

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let output = program("blockdev", ["--setrw", self.0]).output();
        if !output.is_ok_and(|o| o.status.success()) {
            eprintln!("{}: left read-only", self.0);
        }
    }
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        crate::common::mounts::take_away(self.0);
    }
}

pub fn chmod_and_chown_within_what_makes_sense(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = export.file();
    assert_eq!(mode(file), 0o600);
    for right in [0o400, 0o700, 0o600] {
        chmod(file, right).unwrap();
        assert_eq!(mode(file), right);
    }
    for wrong in [0o640, 0o604, 0o610, 0o601] {
        assert_errno(chmod(file, wrong), EPERM);
    }
    assert_eq!(mode(file), 0o600);
    let owner = fs::metadata(file).unwrap();
    chown(file, Some(owner.uid()), Some(owner.gid())).unwrap();
    assert_errno(chown(file, Some(owner.uid() + 1), None), EPERM);
    assert_errno(chown(file, None, Some(owner.gid() + 1)), EPERM);
    if !is_root() {
        return;
    }
    drop(export);
    let export = case.export(&image, &["--allow-other=on"]);
    for right in [0o644, 0o666, 0o660, 0o600] {
        chmod(export.file(), right).unwrap();
        assert_eq!(mode(export.file()), right);
    }
    chown(export.file(), Some(7), Some(8)).unwrap();
    let owner = fs::metadata(export.file()).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (7, 8));
}

/// A command of another user.
fn other(name: &str, args: &[&str], file: &Path) -> Command {
    let mut command = program(name, args);
    command.arg(file).uid(USER).gid(USER);
    command
}

pub fn other_user_is_shut_out_unless_allowed(case: &Case) {
    let image = case.patchy();
    fs::set_permissions(case.sandbox.path(), Permissions::from_mode(0o755)).unwrap();
    let export = case.export(&image, &[]);
    for client in ["cat", "stat"] {
        let said = fail(&mut other(client, &[], export.file()));
        assert!(said.contains("Permission denied"), "{said}");
    }
    drop(export);

    let export = case.export(&image, &["--allow-other=on"]);
    let cat = || other("cat", &[], export.file());
    let write = || other("sh", &["-c", ": 1<>\"$1\"", "sh"], export.file());
    succeed(&mut other("stat", &[], export.file()));
    fail(&mut cat());
    chmod(export.file(), 0o604).unwrap();
    succeed(&mut cat());
    fail(&mut write());
    chmod(export.file(), 0o606).unwrap();
    succeed(&mut write());
}

pub fn owner_can_be_chosen(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["-o", "uid=7,gid=8"]);
    let owner = fs::metadata(export.file()).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (7, 8));
}

pub fn times_can_be_set(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = File::options().write(true).open(export.file()).unwrap();
    let then = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    file.set_times(FileTimes::new().set_accessed(then).set_modified(then)).unwrap();
    let times = |at: &Path| {
        let metadata = fs::metadata(at).unwrap();
        (metadata.accessed().unwrap(), metadata.modified().unwrap())
    };
    assert_eq!(times(export.file()), (then, then));
    let before = SystemTime::now() - Duration::from_secs(1);
    succeed(&mut program("touch", [export.file()]));
    assert!(times(export.file()).1 > before);
    file.set_modified(then).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    drop(file);
    assert!(times(export.file()).1 > before, "a write sets the time");
}

/// Not that of the first look at it: a file that is touched after the write is the newer one.
pub fn modification_time_is_that_of_the_write(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let open = |flags| {
        File::options().read(true).write(true).custom_flags(flags).open(export.file()).unwrap()
    };
    let (file, durable) = (open(0), open(libc::O_DSYNC));
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    let ways: [(&str, &dyn Fn()); 3] = [
        ("write", &|| file.write_all_at(b"x", 0).unwrap()),
        ("durable write", &|| durable.write_all_at(b"x", 0).unwrap()),
        ("zeroing", &|| fallocate(&file, zero, 0, 4096).unwrap()),
    ];
    let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    // More than a tick of the kernel's clock.
    let wait = || std::thread::sleep(Duration::from_millis(30));
    let mut older = modified(export.file());
    for (way, change) in ways {
        wait();
        change();
        wait();
        let stamp = case.sandbox.join("stamp");
        fs::write(&stamp, "").unwrap();
        wait();
        let written = modified(export.file());
        assert!(written < modified(&stamp), "{way}: the time of the stat");
        assert!(written > older, "{way}: no time at all");
        older = modified(&stamp);
    }
}

pub fn reads_leave_the_images_access_time(case: &Case) {
    let image = case.patchy();
    let accessed = || fs::metadata(image.path()).unwrap().accessed().unwrap();
    // Long ago: most file systems update it once a day only.
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    File::open(image.path()).unwrap().set_times(FileTimes::new().set_accessed(then)).unwrap();
    let mut export = case.export(&image, &["-r"]);
    fs::read(export.file()).unwrap();
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert_eq!(accessed(), then);
}
