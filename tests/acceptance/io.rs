//! Reads and writes of all kinds of clients.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::Mode;

use crate::common::export::Transport;
use crate::common::suite::{Case, SIZE};
use crate::common::{Aligned, Random, noise, program, succeed};

/// The kernel has a queue for each.
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";

/// Reads and writes, as one writes them.
fn open(path: &std::path::Path, flags: i32) -> File {
    File::options().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

pub fn many_reads_at_depth_64_complete(case: &Case) {
    let image = case.patchy();
    let mut export = case.export(&image, &[]);
    let fio = [
        "--name=reads",
        "--rw=randread",
        "--bs=4k",
        "--iodepth=64",
        "--ioengine=libaio",
        "--direct=1",
        "--numjobs=4",
        "--thread",
        "--group_reporting",
        "--norandommap",
        "--allow_file_create=0",
    ];
    let jobs = 4;
    let bytes = format!("--io_size={}", 75_000 / jobs * 4096);
    let file = format!("--filename={}", export.file().display());
    let said = succeed(program("fio", fio).args([&bytes, &file, "--size=4M"]));
    assert!(said.contains("total=75000,0,0,0"), "{said}");
    let ended = export.stop(libc::SIGTERM);
    ended.assert(0, &[]);
    assert!(ended.served(case.transport).reads >= 75_000, "{}", ended.log);
}

pub fn shared_mapping_reaches_the_image(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let mut expected = case.patchy_bytes();
    // A page of data, a page of a hole, and the last page.
    let script = "
import mmap, sys
with open(sys.argv[1], 'r+b') as f, mmap.mmap(f.fileno(), 0) as m:
    sys.stdout.buffer.write(m[:])
    for at in (100, len(m) // 4 + 5000, len(m) - 4):
        m[at:at + 4] = b'mmap'
    m.flush()
    sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())
";
    let output = program("python3", ["-c", script]).arg(export.file()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout[..SIZE] == expected, "what the mapping shows");
    for at in [100, SIZE / 4 + 5000, SIZE - 4] {
        expected[at..at + 4].copy_from_slice(b"mmap");
    }
    assert!(output.stdout[SIZE..] == expected, "what the file shows after msync");
    if case.kind.visible {
        assert!(image.bytes() == expected, "the image after msync");
    }
}

pub fn clients_of_all_kinds_read_what_they_wrote(case: &Case) {
    verify(
        case,
        &[
            "--ioengine=psync --direct=1 --bs=4k",
            "--ioengine=psync --direct=0 --bsrange=512-200k --bs_unaligned",
            "--ioengine=libaio --direct=1 --bs=16k --iodepth=32",
            "--ioengine=io_uring --direct=1 --bs=4k --iodepth=32",
            "--ioengine=io_uring --direct=0 --bsrange=512-2M --bs_unaligned --iodepth=8",
        ],
    );
}

pub fn clients_that_map_read_what_they_wrote(case: &Case) {
    verify(case, &["--ioengine=mmap --bs=4k"]);
}

/// Each of these clients, options of fio, writes the disk and reads it again.
fn verify(case: &Case, clients: &[&str]) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = format!("--filename={}", export.file().display());
    for client in clients {
        let verified = [
            "--name=verify",
            "--rw=randwrite",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--size=4M",
            "--thread",
            "--allow_file_create=0",
            "--verify_state_save=0",
        ];
        let said = succeed(program("fio", verified).args(client.split(' ')).arg(&file));
        assert!(said.contains("err= 0"), "{client:?}: {said}");
        assert!(said.contains("read: IOPS") && said.contains("write: IOPS"), "{client:?}: {said}");
    }
}

/// Over io_uring, queues' threads share them, and their entries move from ring to ring.
pub fn large_requests_beside_small_ones_arrive_whole(case: &Case) {
    let image = case.image(&vec![0; 32 << 20]);
    let mut export = case.export(&image, &[]);
    let file = format!("--filename={}", export.file().display());
    let all = [
        "--ioengine=libaio",
        "--direct=1",
        "--thread",
        "--allow_file_create=0",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ];
    let large = ["--name=large", "--rw=randwrite", "--bs=1m", "--iodepth=16", "--size=16m"];
    let small = ["--name=small", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=16m"];
    let said = succeed(
        program("fio", all)
            .arg(&file)
            .args(large)
            .args(["--loops=8", "--new_group"])
            .args(small)
            .args(["--offset=16m"]),
    );
    assert!(said.contains("err= 0") && !said.contains("verify:"), "{said}");
    let ended = export.stop(libc::SIGTERM);
    ended.assert(0, &[]);
    if case.transport == Transport::Uring
        && fs::read_to_string(POSSIBLE_CPUS).unwrap().trim() != "0"
    {
        assert!(ended.served(case.transport).handed_over > 0, "{}", ended.log);
    }
}

/// Few entries, and requests of both sizes: a queue's thread may give none of its entries away that
/// is its last.
pub fn threads_outlive_a_mixed_load(case: &Case) {
    let image = case.image(&vec![0; 64 << 20]);
    let mut export = case.export(&image, &["--queue-depth", "2"]);
    let file = format!("--filename={}", export.file().display());
    let all = [
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randread",
        "--allow_file_create=0",
        "--size=64m",
        "--time_based",
        "--runtime=3",
    ];
    let large = ["--name=large", "--bs=1m", "--iodepth=4", "--numjobs=2"];
    let small = ["--name=small", "--bs=4k", "--iodepth=4"];
    succeed(program("fio", all).arg(&file).args(large).args(small));
    let tasks = fs::read_dir(format!("/proc/{}/task", export.pid())).unwrap();
    // One of another kind may end meanwhile.
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    let serving = |name: &String| name.starts_with("ring-") || name.starts_with("fuse-");
    let serving = names.filter(serving).count();
    let log = export.log();
    assert!(log.contains(&format!(", {serving} threads")), "{serving} of: {log}");
    export.stop(libc::SIGTERM).assert(0, &[]);
}

pub fn unaligned_io_matches_a_model(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let mut model = case.patchy_bytes();
    let file = open(export.file(), 0);
    let direct = open(export.file(), libc::O_DIRECT);
    let mut random = Random(5);
    for step in 0..1500 {
        // Mostly short, now and then longer than any single request.
        let longest = if step % 50 == 0 { 3 << 20 } else { 20_000 };
        let len = 1 + random.below(longest) as usize;
        let at = random.below((SIZE - len) as u64) as usize;
        let aligned = step % 5 == 0 && len > 512;
        let (at, len) = if aligned { (at / 512 * 512, len / 512 * 512) } else { (at, len) };
        let file = if aligned { &direct } else { &file };
        if random.below(2) == 0 {
            let data = Aligned::of(&noise(step, len));
            file.write_all_at(&data, at as u64).unwrap();
            model[at..at + len].copy_from_slice(&data);
        } else {
            let mut data = Aligned::new(len);
            file.read_exact_at(&mut data, at as u64).unwrap();
            assert!(data[..] == model[at..at + len], "step {step}: {len} bytes at {at}");
        }
    }
    drop((file, direct));
    assert!(fs::read(export.file()).unwrap() == model);
    if case.kind.visible {
        assert!(image.bytes() == model, "the image");
    }
}

/// Threads write neighbouring ranges that share blocks and pages: none may undo another's.
pub fn parallel_writers_do_not_mix(case: &Case) {
    const WRITERS: usize = 8;
    const LEN: usize = 1000;
    const ROUNDS: usize = 40;
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let byte = |writer: usize, round: usize| (writer * ROUNDS + round) as u8;
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let file = open(export.file(), 0);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let at = (round * WRITERS + writer) * LEN;
                    file.write_all_at(&vec![byte(writer, round); LEN], at as u64).unwrap();
                    let mut back = vec![0; LEN];
                    file.read_exact_at(&mut back, at as u64).unwrap();
                    assert!(back.iter().all(|b| *b == byte(writer, round)), "{writer}, {round}");
                }
            });
        }
    });
    let mut expected = case.patchy_bytes();
    for (i, part) in expected[..WRITERS * ROUNDS * LEN].chunks_mut(LEN).enumerate() {
        part.fill(byte(i % WRITERS, i / WRITERS));
    }
    assert!(fs::read(export.file()).unwrap() == expected);
    if case.kind.visible {
        assert!(image.bytes() == expected, "the image");
    }
}

pub fn durable_writes_reach_the_image(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let mut expected = case.patchy_bytes();
    for (i, flags) in
        [libc::O_SYNC, libc::O_DSYNC, libc::O_SYNC | libc::O_DIRECT].into_iter().enumerate()
    {
        let data = Aligned::of(&noise(i as u64 + 10, 8192));
        let at = SIZE / 4 - 4096 + i * 8192;
        open(export.file(), flags).write_all_at(&data, at as u64).unwrap();
        expected[at..][..8192].copy_from_slice(&data);
        if case.kind.visible {
            assert!(image.bytes() == expected, "the image");
        }
    }
    let file = open(export.file(), 0);
    file.sync_data().unwrap();
    file.sync_all().unwrap();
    // For others, the file cannot be replaced by one of its own name.
    let other = rustix::fs::open(
        export.file(),
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CREATE,
        Mode::RUSR,
    );
    assert!(other.is_ok(), "O_CREAT opens the file that is there");
    assert!(fs::read(export.file()).unwrap() == expected);
}
