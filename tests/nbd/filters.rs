//! nbdkit's filters and plugins as servers that can less, or do worse.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use libc::{EIO, ENOSPC, EOPNOTSUPP, O_DIRECT};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use crate::common::export::Export;
use crate::common::image::patchy;
use crate::common::nbd::{Address, Server};
use crate::common::{Aligned, Random, assert_errno, noise, program, succeed};
use crate::{Bench, SIZE, open};

pub fn fsx_passes_through_blocks_of_4096(bench: &Bench) {
    const LEN: usize = 256 << 10;
    let disk = bench.disk(&vec![0; LEN]);
    let (_server, uri) = bench.nbdkit(&[
        "--filter=blocksize-policy",
        "file",
        disk.to_str().unwrap(),
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ]);
    let export = bench.export(&uri);
    let config = bench.sandbox.join("fsx.toml");
    let text = format!(
        "flen = {LEN}\nblockmode = true\n[opsize]\nmax = 65536\n[weights]\n\
         read = 10\nwrite = 10\nmapread = 5\nmapwrite = 1\npunch_hole = 5\ninvalidate = 1\n\
         sendfile = 1\nposix_fadvise = 1\ncopy_file_range = 1\nfsync = 0.1\nfdatasync = 0.1\n\
         truncate = 0\nposix_fallocate = 0\nclose_open = 0\n"
    );
    fs::write(&config, text).unwrap();
    let mut fsx = Command::new("timeout");
    fsx.args(["-k", "2", "120", "fsx", "-N", "20000", "-S", "11", "-f"]).arg(&config);
    fsx.arg("-P").arg(bench.sandbox.path()).arg(export.file());
    let said = succeed(&mut fsx);
    assert!(said.contains("All operations completed"), "{said}");
    assert!(fs::read(export.file()).unwrap() == fs::read(&disk).unwrap());
}

/// Reads of one range fail with EIO, and writes to another with ENOSPC.
pub fn errors_hit_only_the_range_they_are_in(bench: &Bench) {
    const READS: std::ops::Range<usize> = 1 << 20..2 << 20;
    const WRITES: std::ops::Range<usize> = 3 << 20..SIZE;
    const BLOCK: usize = 4096;
    let bytes = noise(1, SIZE);
    let disk = bench.disk(&bytes);
    // A write is read though it is refused: else nbdkit meets a closed pipe.
    let fails = |range: &std::ops::Range<usize>, drain: &str, errno: &str| {
        format!(
            "if [ $4 -lt {} ] && [ $(($4 + $3)) -gt {} ]; then {drain} echo {errno} >&2; exit 1; fi",
            range.end, range.start
        )
    };
    let file = disk.display();
    let read = format!(
        "pread={}; dd if={file} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
        fails(&READS, "", "EIO")
    );
    let write = format!(
        "pwrite={}; dd of={file} oflag=seek_bytes seek=$4 conv=notrunc bs=1M status=none",
        fails(&WRITES, "cat >/dev/null;", "ENOSPC")
    );
    let size = format!("get_size=echo {SIZE}");
    let (_server, uri) = bench.nbdkit(&["eval", &size, &read, &write, "flush=true"]);
    let mut export = bench.export(&uri);
    let file = open(export.file(), O_DIRECT);
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (file, bytes) = (&file, &bytes);
            scope.spawn(move || {
                let mut random = Random(client);
                for _ in 0..25 {
                    let at = random.below((SIZE / BLOCK) as u64) as usize * BLOCK;
                    let mut buf = Aligned::new(BLOCK);
                    let read = file.read_at(&mut buf, at as u64);
                    if READS.contains(&at) {
                        assert_errno(read, EIO);
                    } else {
                        assert_eq!(read.unwrap(), BLOCK);
                        assert!(buf[..] == bytes[at..][..BLOCK], "at {at}");
                    }
                    // What is there already, so that the others need not know.
                    let written = file.write_at(&Aligned::of(&bytes[at..][..BLOCK]), at as u64);
                    if WRITES.contains(&at) {
                        assert_errno(written, ENOSPC);
                    } else {
                        assert_eq!(written.unwrap(), BLOCK);
                    }
                }
            });
        }
    });
    // The edges: one block to each side of the range, and one that is half in it.
    let mut buf = Aligned::new(BLOCK);
    for at in [READS.start - BLOCK, READS.end] {
        assert_eq!(file.read_at(&mut buf, at as u64).unwrap(), BLOCK);
    }
    assert_errno(file.read_at(&mut buf, (READS.start - BLOCK / 2) as u64), EIO);
    drop(file);
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert!(fs::read(&disk).unwrap() == bytes);
}

/// The error filter fails everything as long as a file exists; it is served on afterwards.
pub fn errors_come_and_go(bench: &Bench) {
    let disk = bench.disk(&noise(2, SIZE));
    let bad = |what: &str| bench.sandbox.join(&format!("bad-{what}"));
    let file = |what: &str| format!("error-{what}-file={}", bad(what).display());
    let (_server, uri) = bench.nbdkit(&[
        "--filter=error",
        "file",
        disk.to_str().unwrap(),
        "error-pread=EIO",
        "error-pread-rate=100%",
        &file("pread"),
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        &file("pwrite"),
    ]);
    let mut export = bench.export(&uri);
    let file = open(export.file(), O_DIRECT);
    let mut buf = Aligned::of(&noise(3, 65_536));
    for _ in 0..2 {
        file.write_all_at(&buf, 0).unwrap();
        file.read_exact_at(&mut buf, 0).unwrap();
        fs::write(bad("pwrite"), "").unwrap();
        assert_errno(file.write_at(&buf, 0), ENOSPC);
        file.read_exact_at(&mut buf, 0).unwrap();
        fs::write(bad("pread"), "").unwrap();
        assert_errno(file.read_at(&mut buf, 0), EIO);
        fs::remove_file(bad("pread")).unwrap();
        fs::remove_file(bad("pwrite")).unwrap();
    }
    drop(file);
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert!(fs::read(&disk).unwrap()[..65_536] == noise(3, 65_536));
}

pub fn without_write_zeroes_ranges_are_written_and_holes_refused(bench: &Bench) {
    let mut bytes = noise(4, SIZE);
    let disk = bench.disk(&bytes);
    let (_server, uri) = bench.nbdkit(&["--filter=nozero", "file", disk.to_str().unwrap()]);
    let export = bench.export(&uri);
    let file = open(export.file(), 0);
    let keep = FallocateFlags::KEEP_SIZE;
    for (at, len) in [(0, 4096), (70_001, 2_000_003), (SIZE - 10, 10)] {
        let (offset, length) = (at as u64, len as u64);
        assert_errno(
            fallocate(&file, FallocateFlags::PUNCH_HOLE | keep, offset, length),
            EOPNOTSUPP,
        );
        assert!(fs::read(&disk).unwrap() == bytes, "a refused hole changes nothing");
        fallocate(&file, FallocateFlags::ZERO_RANGE | keep, offset, length).unwrap();
        bytes[at..at + len].fill(0);
        assert!(fs::read(export.file()).unwrap() == bytes, "{len} bytes at {at}");
        assert!(fs::read(&disk).unwrap() == bytes, "{len} bytes at {at}: the disk");
    }
}

/// Connections that a server has.
fn connections(server: &Server) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    let links = fds.map(|fd| fd.unwrap().path().read_link().unwrap_or_default());
    // It listens on one.
    links.filter(|to| to.to_string_lossy().starts_with("socket:")).count() - 1
}

/// The kernel drops a page before a direct write of it. One that is read before the server has
/// written it is old, and has to be dropped too.
pub fn page_read_beside_a_direct_write_is_not_kept(bench: &Bench) {
    let disk = bench.disk(&vec![1; SIZE]);
    let words = ["--filter=delay", "file", disk.to_str().unwrap(), "wdelay=200ms"];
    let (_server, uri) = bench.nbdkit(&words);
    let mut export = bench.export(&uri);
    let (cached, direct) = (open(export.file(), 0), open(export.file(), O_DIRECT));
    let byte = || {
        let mut byte = [0];
        cached.read_exact_at(&mut byte, 5000).unwrap();
        byte[0]
    };
    for version in 2..6 {
        std::thread::scope(|scope| {
            let data = vec![version; 8192];
            let direct = &direct;
            let writer = scope.spawn(move || direct.write_all_at(&Aligned::of(&data), 0).unwrap());
            while !writer.is_finished() {
                byte();
            }
        });
        assert_eq!(byte(), version);
    }
    drop((cached, direct));
    export.stop(libc::SIGTERM).assert(0, &[]);
}

/// 64 requests at a time of each of four clients.
fn load(export: &Export) {
    let fio = ["--name=load", "--rw=randrw", "--bs=4k", "--iodepth=64", "--ioengine=libaio"];
    let said = succeed(
        program("fio", fio)
            .args(["--direct=1", "--numjobs=4", "--thread", "--group_reporting", "--norandommap"])
            .args(["--allow_file_create=0", "--size=4M", "--time_based", "--runtime=2"])
            .arg(format!("--filename={}", export.file().display())),
    );
    assert!(said.contains("err= 0"), "{said}");
}

pub fn connections_are_opened_when_they_are_needed(bench: &Bench) {
    let disk = bench.disk(&patchy(SIZE));
    let words = ["--filter=delay", "file", disk.to_str().unwrap(), "rdelay=2ms", "wdelay=2ms"];
    for (options, most) in [(&["--connections=1"][..], 1), (&["--connections=3"], 3), (&[], 8)] {
        let address = Address::Unix(bench.sandbox.join(&format!("nbd-{most}.socket")));
        let server = Server::nbdkit(&address, words);
        let mut export = bench.try_export(&address.uri(""), options).unwrap();
        open(export.file(), O_DIRECT).read_exact_at(&mut Aligned::new(4096), 0).unwrap();
        assert_eq!(connections(&server), 1, "{options:?}: for one request");
        load(&export);
        let under_load = connections(&server);
        assert!(under_load <= most, "{options:?}: {under_load} connections");
        assert_eq!(under_load > 1, most > 1, "{options:?}: {under_load} connections");
        export.stop(libc::SIGTERM).assert(0, &[]);
    }
}

/// A server that says that it allows several, and has no room for them.
pub fn refused_connections_are_done_without(bench: &Bench) {
    let disk = bench.disk(&patchy(SIZE));
    let delay = ["--filter=limit", "--filter=delay", "file", disk.to_str().unwrap()];
    let words = [&delay[..], &["rdelay=2ms", "wdelay=2ms", "limit=1"]].concat();
    let (server, uri) = bench.nbdkit(&words);
    let mut export = bench.export(&uri);
    load(&export);
    assert_eq!(connections(&server), 1);
    let ended = export.stop(libc::SIGTERM);
    ended.assert(0, &["no more than 1 connections"]);
    assert!(ended.warnings().is_empty(), "{}", ended.log);
}

pub fn one_connection_is_enough(bench: &Bench) {
    const LEN: usize = 1000;
    let mut bytes = patchy(SIZE);
    let disk = bench.disk(&bytes);
    let words = ["--filter=multi-conn", "file", disk.to_str().unwrap(), "multi-conn-mode=disable"];
    let (server, uri) = bench.nbdkit(&words);
    let mut export = bench.export(&uri);
    assert_eq!(connections(&server), 1, "it does not allow more");
    std::thread::scope(|scope| {
        for (client, part) in bytes.chunks_mut(SIZE / 8).enumerate() {
            let file = open(export.file(), 0);
            scope.spawn(move || {
                let mut random = Random(client as u64);
                let start = client * SIZE / 8;
                for step in 0..200 {
                    let at = random.below((part.len() - LEN) as u64) as usize;
                    part[at..at + LEN].copy_from_slice(&noise(step, LEN));
                    file.write_all_at(&part[at..at + LEN], (start + at) as u64).unwrap();
                    let at = random.below((part.len() - LEN) as u64) as usize;
                    let mut back = [0; LEN];
                    file.read_exact_at(&mut back, (start + at) as u64).unwrap();
                    assert!(back == part[at..at + LEN], "step {step}");
                }
            });
        }
    });
    assert_eq!(connections(&server), 1);
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert!(fs::read(&disk).unwrap() == bytes);
}

pub fn delays_of_many_requests_pass_together(bench: &Bench) {
    const READS: usize = 64;
    const DELAY: Duration = Duration::from_millis(200);
    let (_server, uri) = bench.nbdkit(&[
        "--threads=64",
        "--filter=delay",
        "pattern",
        "4M",
        &format!("rdelay={}ms", DELAY.as_millis()),
    ]);
    let export = bench.export(&uri);
    let file = File::options().read(true).open(export.file()).unwrap();
    rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::DIRECT).unwrap();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for n in 0..READS {
            let file = &file;
            scope.spawn(move || {
                let mut buf = Aligned::new(4096);
                let at = n as u64 * 32_768;
                file.read_exact_at(&mut buf, at).unwrap();
                assert_eq!(buf[..8], at.to_be_bytes(), "the pattern of the plugin");
            });
        }
    });
    let took = start.elapsed();
    assert!(took >= DELAY, "{took:?}: there was no delay");
    // One after the other they take 64 delays.
    assert!(took < 8 * DELAY, "{READS} reads took {took:?}, one takes {DELAY:?}");
}

/// Where data begins and ends, as SEEK_DATA and SEEK_HOLE say.
fn data(path: &Path) -> Vec<(u64, u64)> {
    let file = File::open(path).unwrap();
    let mut extents = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(start)).unwrap();
        extents.push((start, at));
    }
    extents
}

pub fn holes_of_the_server_are_seen(bench: &Bench) {
    const LEN: u64 = 64 << 20;
    let content = "data=@1048576 (0x55)*65536 @50331648 (0xaa)*131072";
    let (_server, uri) = bench.nbdkit(&["data", content, &format!("size={LEN}")]);
    let export = bench.export(&uri);
    let expected = [(1 << 20, (1 << 20) + 65_536), (48 << 20, (48 << 20) + 131_072)];
    assert_eq!(data(export.file()), expected);
    // Not cp: it looks for holes only in a file with fewer blocks than its length.
    let map =
        program("qemu-img", ["map", "-f", "raw", "--output=json"]).arg(export.file()).output();
    let map = String::from_utf8(map.unwrap().stdout).unwrap();
    assert_eq!(map.matches("\"data\": true").count(), 2, "{map}");
    assert_eq!(map.matches("\"data\": false").count(), 3, "{map}");
    // A hole that the server gets from us is one from then on.
    let file = open(export.file(), 0);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 1 << 20, 65_536).unwrap();
    assert_eq!(data(export.file()), expected[1..]);
}

/// The largest disk there is, by BLOCK_STATUS of 4 GiB: each search ends, and the next one goes on
/// from there.
pub fn search_through_an_enormous_extent_ends(bench: &Bench) {
    const WALK: &str = "
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(file).st_size
if sys.argv[2] == 'hole':
    first = os.lseek(file, 0, os.SEEK_DATA)
    second = os.lseek(file, first, os.SEEK_DATA)
    assert 0 < first < second < size, (first, second)
    assert os.lseek(file, first, os.SEEK_HOLE) == first
else:
    assert os.lseek(file, 0, os.SEEK_HOLE) == size
    assert os.lseek(file, 0, os.SEEK_DATA) == 0
";
    for (plugin, is_all) in [("null", "hole"), ("pattern", "data")] {
        let (_server, uri) = bench.nbdkit(&[plugin, "7E"]);
        let export = bench.export(&uri);
        succeed(program("python3", ["-c", WALK]).arg(export.file()).arg(is_all));
        drop(export);
        fs::remove_file(bench.sandbox.join("nbd.socket")).unwrap();
    }
}

/// Programs take buffers of the size that a file prefers.
pub fn preferred_size_of_a_server_is_bounded(bench: &Bench) {
    let sizes = ["blocksize-minimum=512", "blocksize-preferred=32M", "blocksize-maximum=64M"];
    let words = [&["--filter=blocksize-policy", "memory", "64M"], &sizes[..]].concat();
    let (_server, uri) = bench.nbdkit(&words);
    let export = bench.export(&uri);
    assert_eq!(fs::metadata(export.file()).unwrap().blksize(), 1 << 20);
}
