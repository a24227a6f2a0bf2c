//! Mountpoints, the end, and that the bytes are those of the image.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::common::export::Export;
use crate::common::image::patchy;
use crate::common::seccomp;
use crate::common::suite::{Case, SIZE};
use crate::common::{eventually, is_root, mounts, noise, program, succeed};

pub fn missing_mountpoint_is_created_and_removed(case: &Case) {
    let image = case.patchy();
    let before = case.sandbox.names();
    let mut export = case.export(&image, &[]);
    assert!(export.is_mounted());
    assert_eq!(fs::metadata(export.file()).unwrap().len(), SIZE as u64);
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert_eq!(case.sandbox.names(), before);
}

pub fn mountpoint_gets_its_own_content_back(case: &Case) {
    let mountpoint = case.sandbox.join("disk");
    fs::write(&mountpoint, "mine").unwrap();
    let image = case.patchy();
    let mut export = case.export(&image, &[]);
    assert_eq!(fs::metadata(&mountpoint).unwrap().len(), SIZE as u64);
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert_eq!(fs::read(&mountpoint).unwrap(), b"mine");
}

pub fn served_mountpoint_says_already(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let second = Export::try_start("mem:1M", export.file(), &case.options(&[])[..1], |_| ());
    let ended = second.err().expect("two exports in one place");
    ended.assert(4, &["disk", "already"]);
    assert_eq!(fs::read(export.file()).unwrap(), case.patchy_bytes(), "the first serves on");
}

pub fn export_equals_the_image(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["-r"]);
    assert_eq!(fs::read(export.file()).unwrap(), patchy(SIZE));
    succeed(&mut program("cmp", [export.file(), image.path()]));
    let copy = case.sandbox.join("copy");
    succeed(&mut program("cp", [export.file(), &copy]));
    assert_eq!(fs::read(&copy).unwrap(), patchy(SIZE));
    let raw = ["compare", "-f", "raw", "-F", "raw"];
    succeed(program("qemu-img", raw).args([export.file(), image.path()]));
}

pub fn odd_size_ends_in_a_short_read(case: &Case) {
    let bytes = noise(2, 100_003);
    let image = case.image(&bytes);
    let export = case.export(&image, &[]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    let mut buf = vec![0; 8192];
    assert_eq!(file.read_at(&mut buf, 100_000).unwrap(), 3);
    assert_eq!(buf[..3], bytes[100_000..]);
    assert_eq!(file.read_at(&mut buf, 100_003).unwrap(), 0, "at the end");
    assert_eq!(file.read_at(&mut buf, 1 << 40).unwrap(), 0, "far behind the end");
    drop(file);
    assert_eq!(fs::read(export.file()).unwrap(), bytes);
    if case.kind.visible {
        assert_eq!(image.bytes(), bytes);
    }
}

pub fn image_is_mounted_over_itself(case: &Case) {
    let image = case.patchy();
    let options = case.options(&[]);
    let mut export = Export::try_start(&image.source, image.path(), &options, |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log))
        .only_by(case.transport);
    let mut expected = patchy(SIZE);
    assert_eq!(fs::read(export.file()).unwrap(), expected);
    let file = File::options().write(true).open(export.file()).unwrap();
    file.write_all_at(b"through the export", 12_345).unwrap();
    drop(file);
    expected[12_345..][..18].copy_from_slice(b"through the export");
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert_eq!(image.bytes(), expected);
}

pub fn second_writable_export_is_refused(case: &Case) {
    let image = case.patchy();
    let mut first = case.export(&image, &[]);
    let again = |options: &[&str]| {
        let second = case.sandbox.join("second");
        Export::try_start(&image.source, &second, &case.options(options), |_| ())
    };
    again(&[]).err().expect("it is exported twice").assert(3, &["already", "-r"]);
    let reader = again(&["-r"]).unwrap_or_else(|ended| panic!("{}", ended.log));
    assert_eq!(fs::read(reader.file()).unwrap(), patchy(SIZE));
    drop(reader);
    first.stop(libc::SIGTERM).assert(0, &[]);
    // The lock has gone with it.
    drop(again(&[]).unwrap_or_else(|ended| panic!("{}", ended.log)));
}

/// As NFS without a lock service: that is no reason not to serve.
pub fn image_without_locks_is_served_with_a_warning(case: &Case) {
    let image = case.patchy();
    for errno in [libc::ENOLCK, libc::ENOSYS, libc::EOPNOTSUPP, libc::EINVAL] {
        let without_locks = |command: &mut Command| {
            seccomp::deny_if(command, libc::SYS_fcntl, Some(libc::F_OFD_SETLK), errno);
        };
        let mountpoint = case.sandbox.join("disk");
        let options = case.options(&[]);
        let started = Export::try_start(&image.source, &mountpoint, &options, without_locks);
        let mut export = started.unwrap_or_else(|ended| panic!("{errno}: {}", ended.log));
        fs::File::options().write(true).open(export.file()).unwrap().write_all_at(b"x", 0).unwrap();
        let ended = export.stop(libc::SIGTERM);
        ended.assert(0, &[]);
        let says = |line: &&str| line.contains(&image.source) && line.contains("no locks");
        assert_eq!(ended.warnings().into_iter().filter(says).count(), 1, "{}", ended.log);
        assert_eq!(image.bytes()[0], b'x');
    }
}

pub fn every_signal_ends_it_cleanly(case: &Case) {
    let image = case.patchy();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let mut export = case.export(&image, &[]);
        assert_eq!(fs::read(export.file()).unwrap(), case.patchy_bytes());
        export.stop(signal).assert(0, &[]);
    }
}

pub fn unmount_from_outside_ends_it_cleanly(case: &Case) {
    let image = case.patchy();
    let unmounts: &[&[&str]] = if is_root() {
        &[&["umount"], &["umount", "-l"], &["fusermount3", "-u"]]
    } else {
        &[&["fusermount3", "-u"], &["fusermount3", "-u", "-z"]]
    };
    for unmount in unmounts {
        let mut export = case.export(&image, &[]);
        assert_eq!(fs::read(export.file()).unwrap(), case.patchy_bytes());
        mounts::unmount(unmount, export.file());
        export.wait().assert(0, &[]);
    }
}

pub fn file_that_is_in_use_is_reported_and_taken_away(case: &Case) {
    let image = case.patchy();
    let mut export = case.export(&image, &[]);
    let file = File::open(export.file()).unwrap();
    export.kill(libc::SIGTERM);
    eventually("a report", || export.log().contains("still in use"));
    assert!(export.is_mounted() && !export.has_exited(), "clients have some time");
    let ended = export.wait();
    assert!(ended.log.contains("taken away"), "{}", ended.log);
    ended.assert(0, &[]);
    assert!(file.read_at(&mut [0], 0).is_err(), "the file is still served");
}

pub fn awkward_paths_are_served(case: &Case) {
    let image = case.patchy();
    let awkward = image.path().with_file_name("a b,c\\d");
    fs::rename(image.path(), &awkward).unwrap();
    let mountpoint = case.sandbox.join("x y,z\\ =");
    let start = |mountpoint: &std::path::Path| {
        Export::try_start(awkward.to_str().unwrap(), mountpoint, &case.options(&["-r"]), |_| ())
            .unwrap_or_else(|ended| panic!("{}", ended.log))
    };
    assert_eq!(fs::read(start(&mountpoint).file()).unwrap(), patchy(SIZE));
    // A link in the way is followed, and stays.
    let link = case.sandbox.join("link");
    fs::write(&mountpoint, "mine").unwrap();
    std::os::unix::fs::symlink(&mountpoint, &link).unwrap();
    let export = start(&link);
    assert_eq!(export.file(), mountpoint);
    assert_eq!(fs::read(&link).unwrap(), patchy(SIZE));
    drop(export);
    assert!(link.is_symlink());
    fs::rename(&awkward, image.path()).unwrap();
}
