//! Programs that no one here wrote.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};

use crate::common::image::LoopDevice;
use crate::common::sandbox::Sandbox;
use crate::common::suite::Case;
use crate::common::{is_root, noise, program, succeed};

/// A mounted file system, unmounted when dropped.
pub struct Mounted(pub Sandbox);

impl Mounted {
    pub fn new(options: &str, device: &str) -> Mounted {
        let folder = Sandbox::new();
        succeed(program("mount", ["-o", options, device]).arg(folder.path()));
        Mounted(folder)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(e) = unmount(self.0.path(), UnmountFlags::empty()) {
            eprintln!("{}: {e}", self.0.path().display());
            let _ = unmount(self.0.path(), UnmountFlags::DETACH);
        }
    }
}

/// A few folders and files with odd lengths.
pub fn make_tree(root: &Path) {
    for i in 0..40_usize {
        let folder = root.join(format!("folder {}", i % 5));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("file-{i}")), noise(i as u64, i * i * 97)).unwrap();
    }
    std::os::unix::fs::symlink("folder 1", root.join("link")).unwrap();
}

pub fn assert_same_tree(a: &Path, b: &Path) {
    succeed(program("diff", ["-r", "--no-dereference", "--exclude=lost+found"]).args([a, b]));
}

pub fn loop_device_carries_a_file_system(case: &Case) {
    let tree = Sandbox::new();
    make_tree(tree.path());
    let image = case.image(&vec![0; 32 << 20]);
    let export = case.export(&image, &[]);
    let exported = export.file().to_owned();
    for direct in ["on", "off"] {
        let device = LoopDevice::new(&exported, &[&format!("--direct-io={direct}")]);
        succeed(&mut program("mkfs.ext4", ["-q", "-E", "nodiscard", &device.0]));
        let mounted = Mounted::new("rw", &device.0);
        succeed(program("cp", ["-a", "-T"]).args([tree.path(), mounted.0.path()]));
        assert_same_tree(tree.path(), mounted.0.path());
        drop(mounted);
        let mounted = Mounted::new("ro", &device.0);
        assert_same_tree(tree.path(), mounted.0.path());
        drop(mounted);
        succeed(&mut program("e2fsck", ["-f", "-n", &device.0]));
    }
    succeed(program("e2fsck", ["-f", "-n"]).arg(&exported));
    drop(export);
    if case.kind.visible {
        succeed(program("e2fsck", ["-f", "-n"]).arg(image.path()));
        let device = LoopDevice::new(image.path(), &["--read-only"]);
        let mounted = Mounted::new("ro", &device.0);
        assert_same_tree(tree.path(), mounted.0.path());
    }
}

pub fn qemu_img_agrees(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let raw = ["compare", "-f", "raw", "-F", "raw"];
    succeed(program("qemu-img", raw).args([export.file(), image.path()]));
    let map =
        |file: &Path| succeed(program("qemu-img", ["map", "-f", "raw", "--output=json"]).arg(file));
    if case.kind.shows_holes {
        assert!(map(export.file()).contains("\"data\": false"), "{}", map(export.file()));
        assert_eq!(map(export.file()), map(image.path()));
    } else {
        assert!(!map(export.file()).contains("\"data\": false"), "{}", map(export.file()));
    }
    let copy = case.sandbox.join("copy");
    succeed(
        program("qemu-img", ["convert", "-f", "raw", "-O", "raw"]).args([export.file(), &copy]),
    );
    assert!(fs::read(copy).unwrap() == image.bytes());
}

/// `fsx` writes, maps, truncates and punches at random, and checks each read against its own model.
pub fn fsx_finds_no_mismatch(case: &Case) {
    let operations = if case.kind.name == "file" && is_root() { "30000" } else { "10000" };
    let image = case.image(&vec![0; 256 << 10]);
    let export = case.export(&image, &["--growable"]);
    // What is rare flushes the disk, which takes a hundred times as long as the rest.
    let config = format!(
        "flen = 262144\nblockmode = {}\n[opsize]\nmax = 65536\n[weights]\n{}\
         read = 10\nwrite = 10\nmapread = 5\npunch_hole = {}\ninvalidate = 1\nsendfile = 1\n\
         posix_fadvise = 1\ncopy_file_range = 1\nmapwrite = 0.5\nfsync = 0.1\nfdatasync = 0.1\n",
        !case.kind.resizable,
        if case.kind.resizable {
            "truncate = 5\nposix_fallocate = 1\nclose_open = 0.1\n"
        } else {
            "truncate = 0\nposix_fallocate = 0\nclose_open = 0\n"
        },
        if case.kind.punches { 5 } else { 0 },
    );
    let path = case.sandbox.join("fsx.toml");
    fs::write(&path, config).unwrap();
    // Long enough for a busy machine: only what hangs is to be ended.
    let mut fsx = Command::new("timeout");
    fsx.args(["-k", "2", "900", "fsx", "-N", operations, "-S", "7", "-f"]).arg(&path);
    fsx.arg("-P").arg(case.sandbox.path()).arg(export.file());
    let said = succeed(&mut fsx);
    assert!(said.contains("All operations completed"), "{said}");
}
