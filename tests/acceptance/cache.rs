//! The kernel's page cache in front of the file: who sees whose writes, and when they are in the
//! source.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libc::O_DIRECT;
use rustix::fs::{SeekFrom, seek};

use crate::common::suite::{Case, SIZE};
use crate::common::{Aligned, Random, noise, program};

const BLOCK: usize = 4096;

fn open(path: &Path, flags: i32) -> File {
    File::options().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

/// A block full of its version.
fn filled(version: u64) -> Aligned {
    Aligned::of(&version.to_le_bytes().repeat(BLOCK / 8))
}

/// Writers and readers of the same blocks, each with and without the page cache. A read that begins
/// after a write has ended must not be older than it. A page that was read while a direct write was
/// under way could be.
pub fn direct_and_cached_clients_see_each_others_writes(case: &Case) {
    const BLOCKS: usize = 16;
    let image = case.image(&vec![0; SIZE]);
    let mut export = case.export(&image, &[]);
    let done = AtomicBool::new(false);
    let written: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let readers = [0, O_DIRECT].map(|flags| {
            let (done, written, file) = (&done, &written, open(export.file(), flags));
            scope.spawn(move || {
                let mut random = Random(flags as u64 + 1);
                let mut buf = Aligned::new(BLOCK);
                let mut reads = 0_u64;
                while reads < 2 || !done.load(Ordering::SeqCst) {
                    let block = random.below(BLOCKS as u64) as usize;
                    let at_least = written[block].load(Ordering::SeqCst);
                    file.read_exact_at(&mut buf, (block * BLOCK) as u64).unwrap();
                    let versions: Vec<u64> =
                        buf.chunks(8).map(|v| u64::from_le_bytes(v.try_into().unwrap())).collect();
                    let oldest = versions.iter().min().unwrap();
                    assert!(*oldest >= at_least, "block {block}: {oldest}, {at_least} was written");
                    reads += 1;
                }
                reads
            })
        });
        let writers = [0, O_DIRECT].map(|flags| {
            let (done, written, file) = (&done, &written, open(export.file(), flags));
            scope.spawn(move || {
                // Every other block is this one's.
                let first = usize::from(flags != 0);
                let mut version = 0;
                while version < 2 || !done.load(Ordering::SeqCst) {
                    version += 1;
                    for block in (first..BLOCKS).step_by(2) {
                        file.write_all_at(&filled(version), (block * BLOCK) as u64).unwrap();
                        written[block].store(version, Ordering::SeqCst);
                    }
                }
                version
            })
        });
        while begun.elapsed() < Duration::from_millis(700)
            && !readers.iter().any(|reader| reader.is_finished())
        {
            std::thread::sleep(Duration::from_millis(10));
        }
        done.store(true, Ordering::SeqCst);
        writers.into_iter().chain(readers).for_each(|thread| _ = thread.join().unwrap());
    });
    export.stop(libc::SIGTERM).assert(0, &[]);
}

/// Changes the source as another host would, or another program.
fn change_from_outside(path: &Path, bytes: &[u8], at: usize) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at as u64).unwrap();
    file.sync_all().unwrap();
}

pub fn first_open_sees_what_others_wrote(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let mut expected = case.patchy_bytes();
    assert!(fs::read(export.file()).unwrap() == expected);
    // Over data, and over a hole.
    for (seed, at) in [(1, 8192), (2, SIZE / 4 + 8192)] {
        expected[at..at + BLOCK].copy_from_slice(&noise(seed, BLOCK));
        change_from_outside(image.path(), &expected[at..at + BLOCK], at);
        assert!(fs::read(export.file()).unwrap() == expected, "what was written at {at}");
    }
}

pub fn open_file_sees_what_others_wrote(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = File::open(export.file()).unwrap();
    let mut buf = [0; BLOCK];
    for seed in 0..3 {
        file.read_exact_at(&mut buf, 8192).unwrap();
        change_from_outside(image.path(), &noise(seed, BLOCK), 8192);
        file.read_exact_at(&mut buf, 8192).unwrap();
        assert!(buf[..] == noise(seed, BLOCK));
    }
}

pub fn kept_cache_asks_for_nothing_twice(case: &Case) {
    let image = case.patchy();
    let mut export = case.export(&image, &[]);
    let expected = case.patchy_bytes();
    for _ in 0..5 {
        assert!(fs::read(export.file()).unwrap() == expected);
    }
    let ended = export.stop(libc::SIGTERM);
    ended.assert(0, &[]);
    // By 128 KiB and more at a time; each of five readings would take as many.
    let reads = ended.served(case.transport).reads;
    assert!((1..=SIZE as u64 / (128 << 10) + 16).contains(&reads), "{reads}: {}", ended.log);
}

/// Another process that has the file open, and writes what it is told to.
struct Writer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Writer {
    fn new(path: &Path) -> Writer {
        const SCRIPT: &str = "
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print('open', flush=True)
for line in sys.stdin:
    what, at, byte, length = line.split()
    try:
        if what == 'write': os.pwrite(fd, bytes([int(byte)]) * int(length), int(at))
        if what == 'fsync': os.fsync(fd)
        if what == 'close': os.close(fd)
        print('done', flush=True)
    except OSError as e:
        print(e.strerror, flush=True)
";
        let mut child = program("python3", ["-c", SCRIPT])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut writer = Writer { child, stdin, stdout: BufReader::new(stdout) };
        assert_eq!(writer.answer(), "open");
        writer
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn does(&mut self, what: &str, at: usize, byte: u8, length: usize) -> String {
        writeln!(self.stdin, "{what} {at} {byte} {length}").unwrap();
        self.answer()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// By fsync, by close, and, from a file that stays open, by the end.
pub fn written_pages_reach_the_source_in_time(case: &Case) {
    const LENGTH: usize = 600_000;
    let image = case.patchy();
    let mut export = case.export(&image, &[]);
    let mut expected = case.patchy_bytes();
    let mut write = |writer: &mut Writer, at: usize, byte: u8| {
        assert_eq!(writer.does("write", at, byte, LENGTH), "done");
        expected[at..at + LENGTH].fill(byte);
        expected.clone()
    };
    let mut writer = Writer::new(export.file());
    let expected = write(&mut writer, 5000, 1);
    assert!(image.bytes() != expected, "it was not kept");
    assert_eq!(writer.does("fsync", 0, 0, 0), "done");
    assert!(image.bytes() == expected, "after fsync");
    let expected = write(&mut writer, 1_000_001, 2);
    assert_eq!(writer.does("close", 0, 0, 0), "done");
    assert!(image.bytes() == expected, "after close");
    let mut writer = Writer::new(export.file());
    let expected = write(&mut writer, 2_000_003, 3);
    export.stop(libc::SIGTERM).assert(0, &["still in use", "page cache"]);
    assert!(image.bytes() == expected, "after the end");
    assert_ne!(writer.does("fsync", 0, 0, 0), "done", "its file is gone");
}

/// An abort loses what was not written, and who has the file open hears of it.
pub fn pages_that_are_lost_are_told_of(case: &Case) {
    let image = case.patchy();
    let mut export = case.export(&image, &[]);
    let mut writer = Writer::new(export.file());
    assert_eq!(writer.does("write", 0, 7, 600_000), "done");
    // It says that it is busy, and ends the connection.
    let _ = rustix::mount::unmount(export.file(), rustix::mount::UnmountFlags::FORCE);
    assert_ne!(writer.does("fsync", 0, 0, 0), "done");
    drop(writer);
    export.wait();
}

/// The kernel takes them, for ever. Who writes has to hear of it, and nobody may see a longer disk
/// afterwards.
pub fn writes_past_the_end_come_to_an_end(case: &Case) {
    let image = case.patchy();
    let mut export = case.export(&image, &[]);
    let said = crate::common::fail(
        program("timeout", ["30", "dd", "if=/dev/zero", "bs=64k", "conv=notrunc"])
            .arg(format!("of={}", export.file().display())),
    );
    assert!(said.contains("No space left"), "{said}");
    crate::common::eventually("the size to be what it was", || {
        fs::metadata(export.file()).unwrap().len() == SIZE as u64
    });
    assert!(fs::read(export.file()).unwrap() == vec![0; SIZE]);
    let ended = export.stop(libc::SIGTERM);
    ended.assert(1, &["from the page cache could not be written"]);
    if case.kind.visible {
        assert!(image.bytes() == vec![0; SIZE]);
    }
}

/// What is written may still be in the page cache, where nobody looks for holes.
pub fn holes_are_data_while_somebody_writes(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let hole = SIZE as u64 / 4;
    {
        let reader = File::open(export.file()).unwrap();
        assert_eq!(seek(&reader, SeekFrom::Hole(0)).unwrap(), hole);
        let writer = open(export.file(), 0);
        writer.write_all_at(b"data", hole + 100).unwrap();
        assert_eq!(seek(&reader, SeekFrom::Data(hole)).unwrap(), hole);
        assert_eq!(seek(&reader, SeekFrom::Hole(0)).unwrap(), SIZE as u64);
    }
    let reader = File::open(export.file()).unwrap();
    assert_eq!(seek(&reader, SeekFrom::Data(hole)).unwrap(), hole);
    assert!(seek(&reader, SeekFrom::Hole(hole)).unwrap() < hole + (1 << 20), "it is known again");
}
