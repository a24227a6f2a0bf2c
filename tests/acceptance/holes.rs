//! Holes: making them, seeing them, and what they cost.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek, statfs};

use crate::common::suite::{Case, SIZE};
use crate::common::{assert_errno, noise, program, succeed};

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// Ranges inside, at both ends, across the end, behind it; aligned and not; and everything last.
const RANGES: [(usize, usize); 7] = [
    (65_536, 131_072),
    (0, 4096),
    (1_000_001, 70_003),
    (2_200_000, 7),
    (SIZE - 4096, 4096),
    (SIZE - 1000, 10_000),
    (0, SIZE),
];

fn zeroes_ranges(case: &Case, mode: FallocateFlags) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let mut expected = noise(4, SIZE);
    file.write_all_at(&expected, 0).unwrap();
    file.sync_all().unwrap();
    let full = image.allocated();
    for (offset, len) in RANGES {
        fallocate(&file, mode, offset as u64, len as u64).unwrap();
        let end = SIZE.min(offset + len);
        expected[offset..end].fill(0);
        assert!(fs::read(export.file()).unwrap() == expected, "{len} bytes at {offset}");
        if case.kind.visible {
            assert!(image.bytes() == expected, "{len} bytes at {offset}: the image");
        }
    }
    if mode == PUNCH
        && case.kind.frees
        && let Some(full) = full
    {
        file.sync_all().unwrap();
        assert!(image.allocated().unwrap() < full / 8, "its space is not given back");
    }
}

pub fn punch_hole_zeroes_and_frees(case: &Case) {
    zeroes_ranges(case, PUNCH);
}

pub fn zero_range_zeroes(case: &Case) {
    zeroes_ranges(case, ZERO);
}

pub fn punch_hole_is_refused_where_it_cannot_be(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    for _ in 0..2 {
        assert_errno(fallocate(&file, PUNCH, 0, 65_536), libc::EOPNOTSUPP);
    }
    assert!(fs::read(export.file()).unwrap() == case.patchy_bytes(), "refused, and done");
    fallocate(&file, ZERO, 0, 4096).unwrap();
}

/// They need no memory; in a file of a file system in memory their space is kept.
pub fn zeroes_in_memory_need_none(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &["--growable"]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let allocated = || file.metadata().unwrap().blocks() * 512;
    let kept = |len: usize| if case.kind.name == "mem" { 0 } else { len as u64 };
    file.write_all_at(&noise(4, SIZE), 0).unwrap();
    file.sync_all().unwrap();
    assert_eq!(allocated(), SIZE as u64);
    for mode in [ZERO, FallocateFlags::ZERO_RANGE, FallocateFlags::empty()] {
        fallocate(&file, mode, 0, SIZE as u64).unwrap();
        assert_eq!(allocated(), kept(SIZE), "{mode:?}");
    }
    assert!(fs::read(export.file()).unwrap() == vec![0; SIZE]);
    for (mode, len) in [(FallocateFlags::ZERO_RANGE, 2 * SIZE), (FallocateFlags::empty(), 3 * SIZE)]
    {
        fallocate(&file, mode, 0, len as u64).unwrap();
        assert_eq!((file.metadata().unwrap().len(), allocated()), (len as u64, kept(len)));
    }
}

pub fn other_fallocate_modes_are_refused(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    for mode in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        assert_errno(fallocate(&file, mode, 0, 4096), libc::EOPNOTSUPP);
    }
    // The kernel has not taken it for an ENOSYS: others still work.
    fallocate(&file, ZERO, 0, 4096).unwrap();
    assert_eq!(fs::read(export.file()).unwrap()[..4096], [0; 4096]);
}

/// Where data begins and ends, as SEEK_DATA and SEEK_HOLE say.
fn data(file: &File) -> Vec<(u64, u64)> {
    let mut extents = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        assert!(at > start, "a hole in the data at {start}");
        extents.push((start, at));
    }
    extents
}

pub fn seek_shows_the_images_holes(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let quarter = SIZE as u64 / 4;
    if !case.kind.visible {
        assert_eq!(data(&file), [], "an empty disk is a hole");
        file.write_all_at(&noise(1, 4096), quarter).unwrap();
        assert_eq!(data(&file), [(quarter, quarter + 4096)]);
    } else if case.kind.shows_holes {
        assert_eq!(data(&file), [(0, quarter), (2 * quarter, 3 * quarter)]);
        assert_eq!(data(&file), data(&File::open(image.path()).unwrap()));
        fallocate(&file, PUNCH, 4096, 4096).unwrap();
        assert_eq!(data(&file), [(0, 4096), (8192, quarter), (2 * quarter, 3 * quarter)]);
    } else {
        assert_eq!(data(&file), [(0, SIZE as u64)], "all is data");
    }
    for from in [SeekFrom::Data(SIZE as u64), SeekFrom::Hole(SIZE as u64)] {
        assert_errno(seek(&file, from), libc::ENXIO);
    }
    assert_eq!(seek(&file, SeekFrom::End(0)).unwrap(), SIZE as u64);
}

pub fn copies_keep_the_holes(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let copy = case.sandbox.join("copy");
    succeed(program("cp", ["--sparse=auto"]).args([export.file(), &copy]));
    let copied = File::open(&copy).unwrap();
    copied.sync_all().unwrap();
    assert_eq!(data(&copied), data(&File::open(image.path()).unwrap()));
    assert!(fs::read(&copy).unwrap() == image.bytes());
}

pub fn stat_and_statfs_are_sensible(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let stat = fs::metadata(export.file()).unwrap();
    assert!(stat.is_file());
    assert_eq!(stat.nlink(), 1);
    assert!(stat.blksize() >= 512 && stat.blksize().is_power_of_two(), "{}", stat.blksize());
    if case.kind.regular {
        assert_eq!(stat.blocks(), fs::metadata(image.path()).unwrap().blocks());
    }
    if case.kind.counts_blocks {
        assert!(stat.blocks() * 512 < SIZE as u64, "{} blocks", stat.blocks());
    } else {
        assert_eq!(stat.blocks() * 512, SIZE as u64);
    }
    let statfs = statfs(export.file()).unwrap();
    assert_eq!(statfs.f_blocks * statfs.f_bsize as u64, SIZE as u64);
    assert!(statfs.f_bfree == statfs.f_blocks && statfs.f_bavail == statfs.f_blocks);
    assert!(statfs.f_namelen >= 255, "{statfs:?}");
    let df = succeed(program("df", ["--output=pcent"]).arg(export.file()));
    assert_eq!(df.split_whitespace().last(), Some("0%"), "{df}");
}
