//! Where a disk ends, and what moves its end.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{ENOSPC, EOPNOTSUPP, O_DIRECT};
use rustix::fs::{FallocateFlags, fallocate};

use crate::common::export::Export;
use crate::common::image::{Image, patchy, write_sparse};
use crate::common::suite::{Case, SIZE};
use crate::common::{Aligned, assert_errno, fail, noise, program, succeed};

/// The length of the export, which must be that of the image.
#[track_caller]
fn len(case: &Case, export: &Export, image: &Image) -> usize {
    let len = fs::metadata(export.file()).unwrap().len() as usize;
    if case.kind.writeback {
        File::open(export.file()).unwrap().sync_all().unwrap();
    }
    if case.kind.visible {
        assert_eq!(image.bytes().len(), len, "the image's length is another");
    }
    len
}

pub fn fixed_disk_ends_where_it_ends(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    for flags in [0, O_DIRECT] {
        let mut options = File::options();
        let file = options.read(true).write(true).custom_flags(flags).open(export.file()).unwrap();
        let data = Aligned::of(&noise(3, 8192));
        assert_errno(file.write_at(&data, SIZE as u64), ENOSPC);
        assert_errno(file.write_at(&data, 2 * SIZE as u64), ENOSPC);
        assert_eq!(file.write_at(&data, SIZE as u64 - 4096).unwrap(), 4096, "across the end");
        let mut buf = Aligned::new(8192);
        assert_eq!(file.read_at(&mut buf, SIZE as u64 - 4096).unwrap(), 4096);
        assert_eq!(buf[..4096], data[..4096]);
        assert_eq!(len(case, &export, &image), SIZE);
    }
    let append = File::options().append(true).open(export.file()).unwrap();
    assert_errno(std::io::Write::write(&mut &append, b"x"), ENOSPC);
    let said = fail(
        program("dd", ["if=/dev/zero", "bs=64k", "count=1", "conv=notrunc", "oflag=append"])
            .arg(format!("of={}", export.file().display())),
    );
    assert!(said.contains("No space left") && said.contains("\n0+0 records out"), "{said}");
}

pub fn growable_disk_grows(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["--growable"]);
    let mut expected = case.patchy_bytes();
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    // At the end, across it, and behind it so that a hole is left.
    for (seed, offset) in [(1, SIZE), (2, SIZE + 900), (3, SIZE + 3_000_001)] {
        let data = noise(seed, 1000);
        assert_eq!(file.write_at(&data, offset as u64).unwrap(), data.len());
        expected.resize(offset + data.len(), 0);
        expected[offset..].copy_from_slice(&data);
        assert_eq!(len(case, &export, &image), expected.len());
    }
    let mut append = File::options().append(true).open(export.file()).unwrap();
    std::io::Write::write_all(&mut append, b"at the end").unwrap();
    expected.extend(b"at the end");
    assert!(fs::read(export.file()).unwrap() == expected);
    drop((file, append));
    let mut export = export;
    export.stop(libc::SIGTERM).assert(0, &[]);
    if case.kind.visible {
        assert!(image.bytes() == expected);
    }
}

pub fn truncate_keeps_both_lengths_equal(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["--growable"]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let mut expected = case.patchy_bytes();
    for size in [SIZE + 4096, 1_234_567, 4096, 0, 4096, SIZE] {
        file.set_len(size as u64).unwrap();
        expected.resize(size, 0);
        assert_eq!(len(case, &export, &image), size);
        assert!(fs::read(export.file()).unwrap() == expected, "after truncate to {size}");
    }
    succeed(program("truncate", ["-s", "8192"]).arg(export.file()));
    assert_eq!(len(case, &export, &image), 8192);
    // The size changes by itself too, where somebody else changes the image.
    if case.kind.regular && !case.kind.writeback {
        File::options().write(true).open(image.path()).unwrap().set_len(12_288).unwrap();
        assert_eq!(len(case, &export, &image), 12_288);
        assert_eq!(fs::read(export.file()).unwrap().len(), 12_288);
    }
}

pub fn size_that_others_have_changed_is_known(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["--growable"]);
    let file = File::options().write(true).open(export.file()).unwrap();
    let behind = File::options().read(true).write(true).open(image.path()).unwrap();
    // No `stat` comes in between.
    behind.set_len(2 * SIZE as u64).unwrap();
    file.set_len(SIZE as u64).unwrap();
    assert_eq!(behind.metadata().unwrap().len(), SIZE as u64);
    behind.write_all_at(&[1; 8192], SIZE as u64).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, SIZE as u64, 4096).unwrap();
    let mut end = [2; 8192];
    behind.read_exact_at(&mut end, SIZE as u64).unwrap();
    assert!(end[..4096] == [0; 4096] && end[4096..] == [1; 4096]);
}

/// As an image that others make longer.
pub fn device_that_grows_is_seen_to_grow(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let store = File::options().read(true).write(true).open(image.store.as_ref().unwrap()).unwrap();
    let mut expected = case.patchy_bytes();
    for size in [SIZE + 65_536, 2 * SIZE] {
        store.set_len(size as u64).unwrap();
        expected.resize(size, 0);
        succeed(&mut program("losetup", ["--set-capacity", &image.source]));
        assert_eq!(len(case, &export, &image), size);
        let end = noise(size as u64, 4096);
        assert_errno(file.write_at(&end, size as u64), ENOSPC);
        assert_eq!(file.write_at(&end, size as u64 - 4096).unwrap(), end.len());
        expected[size - 4096..].copy_from_slice(&end);
        assert!(fs::read(export.file()).unwrap() == expected);
    }
}

/// Ends another thread's work, also if this one panics.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub fn appends_beside_stat_are_read_back(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["--growable"]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                file.metadata().unwrap();
                // The kernel asks only for what it does not know: a read makes it forget.
                file.read_at(&mut [0], 0).unwrap();
            }
        });
        let _done = Done(&done);
        for at in (0..2000u64).map(|n| SIZE as u64 + n * 512) {
            file.write_all_at(&[7; 512], at).unwrap();
            let mut read = [0; 512];
            let len = file.read_at(&mut read, at).unwrap();
            assert!(len == 512 && read == [7; 512], "{len} bytes at {at}");
        }
    });
}

pub fn fallocate_past_the_end_grows(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["--growable"]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let mut size = SIZE;
    for mode in [FallocateFlags::empty(), FallocateFlags::ZERO_RANGE] {
        fallocate(&file, mode, size as u64 - 4096, 12_288).unwrap();
        size += 8192;
        assert_eq!(len(case, &export, &image), size);
    }
    for keep in [FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE]
    {
        fallocate(&file, keep, size as u64, 65_536).unwrap();
        assert_eq!(len(case, &export, &image), size);
    }
    let mut expected = case.patchy_bytes();
    expected.resize(size, 0);
    expected[SIZE + 4096..].fill(0);
    assert!(fs::read(export.file()).unwrap() == expected);
}

/// How the sizes of disks that cannot grow are asked to change, and those of others without
/// `--growable`.
pub fn disk_of_fixed_size_keeps_it(case: &Case) {
    let image = case.patchy();
    let options: &[&str] = if case.kind.resizable { &[] } else { &["--growable"] };
    let mut export = case.export(&image, options);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    for size in [0, SIZE - 4096, SIZE + 4096] {
        assert_errno(file.set_len(size as u64), EOPNOTSUPP);
    }
    file.set_len(SIZE as u64).unwrap();
    for mode in [FallocateFlags::empty(), FallocateFlags::ZERO_RANGE] {
        assert_errno(fallocate(&file, mode, SIZE as u64 - 4096, 8192), ENOSPC);
    }
    assert_errno(file.write_at(b"x", SIZE as u64), ENOSPC);
    fallocate(&file, FallocateFlags::empty(), 0, SIZE as u64).unwrap();
    fallocate(&file, FallocateFlags::KEEP_SIZE, SIZE as u64, 4096).unwrap();
    fail(program("dd", ["if=/dev/zero", "bs=4k", "count=1"]).arg(of(&export)));
    fail(program("sh", ["-c", ": > \"$1\"", "sh"]).arg(export.file()));
    assert_eq!(len(case, &export, &image), SIZE);
    assert!(fs::read(export.file()).unwrap() == case.patchy_bytes());
    drop(file);
    let ended = export.stop(libc::SIGTERM);
    ended.assert(0, &["conv=notrunc", "1<>", "--truncate zero"]);
    assert_eq!(ended.log.matches("was refused").count(), 1, "{}", ended.log);
    if case.kind.visible {
        assert!(image.bytes() == patchy(SIZE));
    }
}

fn of(export: &Export) -> String {
    format!("of={}", export.file().display())
}

/// `cp` skips what its source has no data for: it has made room by truncating.
pub fn o_trunc_never_lets_old_bytes_through(case: &Case) {
    let old = noise(10, SIZE);
    let image = case.image(&old);
    let sparse = case.sandbox.join("sparse");
    // A hole in the middle and at the end; shorter than the disk.
    let new = patchy(SIZE / 2);
    write_sparse(&sparse, &new);
    let copies: &[&[&str]] = &[
        &["cp", "--sparse=auto"],
        &["cp", "--sparse=always"],
        &["cp", "--sparse=never"],
        &["sh", "-c", "cat \"$1\" > \"$2\"", "sh"],
        &["sh", "-c", "dd if=\"$1\" of=\"$2\" bs=64k conv=sparse", "sh"],
    ];
    let copy = |words: &[&str], export: &Export| {
        let mut copy = program(words[0], &words[1..]);
        copy.args([&sparse, export.file()]);
        copy
    };
    let refusing = case.export(&image, &[]);
    for words in copies {
        fail(&mut copy(words, &refusing));
        if case.kind.visible {
            assert!(fs::read(refusing.file()).unwrap() == old, "{words:?}");
        }
    }
    drop(refusing);
    let export = case.export(&image, &["--truncate=zero"]);
    let mut expected = new;
    expected.resize(SIZE, 0);
    let done = AtomicBool::new(false);
    let other = File::open(export.file()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut end = [0; 4096];
            while !done.load(Ordering::Relaxed) {
                assert_eq!(other.metadata().unwrap().len(), SIZE as u64);
                assert_eq!(other.read_at(&mut end, SIZE as u64 - 4096).unwrap(), 4096);
            }
        });
        let _done = Done(&done);
        for words in copies {
            let file = File::options().write(true).open(export.file()).unwrap();
            file.write_all_at(&old, 0).unwrap();
            succeed(&mut copy(words, &export));
            assert!(fs::read(export.file()).unwrap() == expected, "{words:?}");
        }
        let file = File::options().write(true).open(export.file()).unwrap();
        assert_errno(file.set_len(SIZE as u64 + 1), EOPNOTSUPP);
        file.write_all_at(&old, 0).unwrap();
        file.set_len(12_345).unwrap();
    });
    expected.fill(0);
    expected[..12_345].copy_from_slice(&old[..12_345]);
    assert!(fs::read(export.file()).unwrap() == expected);
    assert_eq!(len(case, &export, &image), SIZE);
}

/// A page that somebody else has changed in a mapping is neither dropped, nor is its size
/// forgotten.
pub fn refused_o_trunc_disturbs_nobody(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let script = r#"
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
m = mmap.mmap(fd, 8192, mmap.MAP_SHARED)
m[4096:4104] = b"dirtied!"
try:
    os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC)
    sys.exit("it was truncated")
except OSError:
    pass
assert len(os.pread(fd, 4096, 0)) == 4096
m.flush()
"#;
    succeed(program("python3", ["-c", script]).arg(export.file()));
    let mut expected = case.patchy_bytes();
    expected[4096..4104].copy_from_slice(b"dirtied!");
    assert!(fs::read(export.file()).unwrap() == expected);
}

pub fn growable_disk_is_emptied_by_o_trunc(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["--growable"]);
    drop(File::options().write(true).truncate(true).open(export.file()).unwrap());
    assert_eq!(len(case, &export, &image), 0);
    let mut export = export;
    fs::write(export.file(), "short").unwrap();
    assert_eq!(len(case, &export, &image), 5);
    export.stop(libc::SIGTERM).assert(0, &[]);
}
