//! Parts of a disk: what is done to one leaves the others alone.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use libc::{ENOSPC, ENXIO, EOPNOTSUPP, O_DIRECT};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use crate::clients::{Mounted, assert_same_tree, make_tree};
use crate::common::image::{LoopDevice, write_sparse};
use crate::common::sandbox::Sandbox;
use crate::common::suite::{Case, SIZE};
use crate::common::{Aligned, assert_errno, noise, program, succeed};

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// A table for sfdisk, and its partitions but the extended ones, in MiB.
type Layout = (&'static str, &'static [(u32, Range<usize>)]);

const MIB: usize = 1 << 20;
/// The size of the disks with partitions, in bytes.
const DISK: usize = 32 * MIB;
const GPT: Layout =
    ("label: gpt\nstart=1MiB, size=12MiB\nstart=13MiB, size=14MiB\n", &[(1, 1..13), (2, 13..27)]);
/// With a logical partition
const MBR: Layout = (
    "label: dos\nstart=1MiB, size=12MiB\nstart=13MiB, size=18MiB, type=E\nstart=14MiB, size=16MiB\n",
    &[(1, 1..13), (5, 14..30)],
);

/// A file in the folder: a disk with these partitions, and nothing in them.
fn partitioned(folder: &Sandbox, (table, _): Layout) -> PathBuf {
    let path = folder.join("disk");
    write_sparse(&path, &vec![0; DISK]);
    fs::write(folder.join("table"), table).unwrap();
    let table = File::open(folder.join("table")).unwrap();
    succeed(program("sfdisk", ["--quiet", "--no-tell-kernel"]).arg(&path).stdin(table));
    path
}

/// A disk with these partitions, and an ext4 in each.
fn formatted(layout: Layout) -> Vec<u8> {
    let folder = Sandbox::new();
    let path = partitioned(&folder, layout);
    // What is beside them is to be told from zeroes.
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&noise(9, MIB / 2), MIB as u64 / 4).unwrap();
    for (number, place) in layout.1 {
        let offset = format!("offset={},nodiscard", place.start * MIB);
        let label = format!("part-{number}");
        let size = format!("{}k", place.len() * 1024);
        let options = ["-q", "-F", "-L", &label, "-E", &offset];
        succeed(program("mkfs.ext4", options).arg(&path).arg(size));
    }
    fs::read(path).unwrap()
}

fn keep_to_themselves(case: &Case, layout: Layout) {
    let tree = Sandbox::new();
    make_tree(tree.path());
    let image = case.image(&formatted(layout));
    for (number, place) in layout.1 {
        let place = place.start * MIB..place.end * MIB;
        let before = image.bytes();
        let export = case.export(&image, &[&format!("--partition={number}")]);
        assert!(fs::read(export.file()).unwrap() == before[place.clone()], "partition {number}");
        let device = LoopDevice::new(export.file(), &[]);
        let mounted = Mounted::new("rw", &device.0);
        succeed(program("cp", ["-a", "-T"]).args([tree.path(), mounted.0.path()]));
        drop(mounted);
        let mounted = Mounted::new("ro", &device.0);
        assert_same_tree(tree.path(), mounted.0.path());
        drop((mounted, device));
        let checked = succeed(program("e2fsck", ["-f", "-n"]).arg(export.file()));
        assert!(checked.contains(&format!("part-{number}")), "{checked}");
        drop(export);
        let after = image.bytes();
        assert!(after[place.clone()] != before[place.clone()], "nothing was written");
        assert!(after[..place.start] == before[..place.start], "{number}: what is before it");
        assert!(after[place.end..] == before[place.end..], "{number}: what is behind it");
        let alone = Sandbox::new();
        write_sparse(&alone.join("part"), &after[place]);
        succeed(program("e2fsck", ["-f", "-n"]).arg(alone.join("part")));
    }
}

pub fn gpt_partitions_keep_to_themselves(case: &Case) {
    keep_to_themselves(case, GPT);
}

pub fn mbr_partitions_keep_to_themselves(case: &Case) {
    keep_to_themselves(case, MBR);
}

/// Not at the border of any block: whatever is asked of the part, the bytes around it are as they
/// were.
pub fn range_keeps_to_itself(case: &Case) {
    const START: usize = 1_000_001;
    const LEN: usize = 1_500_007;
    let image = case.patchy();
    let mut expected = case.patchy_bytes();
    let options = [format!("--offset={START}"), format!("--size={LEN}")];
    let mut export = case.export(&image, &[&options[0], &options[1]]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let part = &mut expected[START..START + LEN];
    assert_eq!(file.metadata().unwrap().len(), LEN as u64);
    assert!(fs::read(export.file()).unwrap() == *part, "at the begin");
    let writes = [(0, 5000), (LEN - 5000, 5000), (100_001, 700_000), (65_536, 4096), (LEN - 1, 1)];
    for (seed, (at, len)) in (10..).zip(writes) {
        let data = noise(seed, len);
        file.write_all_at(&data, at as u64).unwrap();
        part[at..at + len].copy_from_slice(&data);
    }
    if !case.kind.writeback {
        for flags in [0, O_DIRECT] {
            let mut options = File::options();
            let file = options.write(true).custom_flags(flags).open(export.file()).unwrap();
            let data = Aligned::of(&noise(3, 8192));
            let at = LEN / 4096 * 4096;
            assert_eq!(file.write_at(&data, at as u64).unwrap(), LEN - at, "across the end");
            part[at..].copy_from_slice(&data[..LEN - at]);
            assert_errno(file.write_at(&data, LEN.next_multiple_of(4096) as u64), ENOSPC);
        }
    }
    for (at, len) in [(0, 70_000), (900_001, 9), (LEN - 70_000, 100_000), (LEN, 4096)] {
        fallocate(&file, ZERO, at as u64, len as u64).unwrap();
        part[at..LEN.min(at + len)].fill(0);
        match case.kind.punches {
            true => fallocate(&file, PUNCH, at as u64 / 2, len as u64).unwrap(),
            // No space can be given back.
            false => continue,
        }
        part[at / 2..LEN.min(at / 2 + len)].fill(0);
    }
    // It ends where it ends.
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, LEN as u64 + 4096).unwrap();
    if case.kind.regular {
        let allocated = image.allocated().expect("a file tells");
        assert!(allocated >= LEN as u64, "its space is not reserved: {allocated}");
    }
    assert_errno(fallocate(&file, FallocateFlags::empty(), 0, LEN as u64 + 1), ENOSPC);
    assert_errno(file.set_len(LEN as u64 - 1), EOPNOTSUPP);
    assert_errno(file.set_len(LEN as u64 + 1), EOPNOTSUPP);
    assert_errno(seek(&file, SeekFrom::Data(LEN as u64)), ENXIO);
    assert!(seek(&file, SeekFrom::Hole(LEN as u64 - 1)).unwrap() <= LEN as u64);
    file.sync_all().unwrap();
    assert!(fs::read(export.file()).unwrap() == *part, "at the end");
    drop(file);
    export.stop(libc::SIGTERM).assert(0, &[]);
    if case.kind.visible {
        assert!(image.bytes() == expected, "the whole disk");
        assert_eq!(expected.len(), SIZE);
    }
}

/// A truncation that zeroes ends at the part's end too.
pub fn truncation_zeroes_no_neighbour(case: &Case) {
    let image = case.patchy();
    let mut expected = case.patchy_bytes();
    let options = ["--offset=64K", "--size=512K", "--truncate=zero"];
    let mut export = case.export(&image, &options);
    File::options().write(true).open(export.file()).unwrap().set_len(1000).unwrap();
    assert_eq!(fs::metadata(export.file()).unwrap().len(), 512 << 10);
    expected[(64 << 10) + 1000..(64 + 512) << 10].fill(0);
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert!(image.bytes() == expected);
}

/// What has no such part says what it has.
pub fn part_that_is_not_there_is_refused(case: &Case) {
    let folder = Sandbox::new();
    let image = case.image(&fs::read(partitioned(&folder, MBR)).unwrap());
    let behind = format!("--offset={DISK}");
    let refusals: [(&[&str], &str); 6] = [
        (&["--partition=3"], "no partition 3"),
        (&["--partition=6"], "no partition 6"),
        (&["--partition=2"], "partition 2 is an extended one"),
        (&[&behind], "--offset 32M is not before its end, it has 32M"),
        (&["--offset=9000000000000000000"], "not before its end"),
        (&["--offset=31M", "--size=2M"], "--size 2M from 31M on reaches past its end"),
    ];
    for (options, says) in refusals {
        let refused = case.try_export(&image, options).err().expect("a refusal");
        refused.assert(3, &[says, "its MBR has 1 (12M at 1M), 2 (18M at 13M), 5 (16M at 14M)"]);
        assert_eq!(refused.warnings().len(), 1, "{}", refused.log);
    }
    drop(image);
    let other = Sandbox::new();
    let image = case.kind.image(&other, &vec![0; SIZE]);
    let refused = case.try_export(&image, &["--partition=1"]).err().expect("a refusal");
    refused.assert(3, &["no partition table, neither GPT nor MBR"]);
}

/// Of any source, as text and as JSON.
pub fn info_shows_the_partitions(case: &Case) {
    for (layout, kind) in [(GPT, "gpt"), (MBR, "mbr")] {
        let folder = Sandbox::new();
        let bytes = fs::read(partitioned(&Sandbox::new(), layout)).unwrap();
        let image = case.kind.image(&folder, &bytes);
        let info = |options: &[&str]| {
            let program = program(crate::common::export::binary(), ["--info", &image.source]);
            let output = { program }.args(options).output().unwrap();
            assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let text = info(&[]);
        assert!(text.contains(&format!("\npartition table:\n  kind: {kind}\n")), "{text}");
        let json: serde_json::Value = serde_json::from_str(&info(&["--json"])).unwrap();
        let partitions = json["partition_table"]["partitions"].as_array().expect("a list");
        for (number, place) in layout.1 {
            let mut all = partitions.iter();
            let found = all.find(|partition| partition["number"] == *number).expect("it is there");
            assert_eq!(found["offset"], place.start * MIB);
            assert_eq!(found["size"], place.len() * MIB);
        }
    }
}
