//! Ends in the middle of work.

use std::fs::{self, File};
use std::time::Duration;

use crate::common::export::{Export, ended_by};
use crate::common::image::Image;
use crate::common::suite::Case;
use crate::common::writer::{Load, Writers};
use crate::common::{Random, eventually, is_root, mounts, program, succeed, within};

const SIZE: usize = 16 << 20;
const WRITERS: usize = 4;
const BLOCKS: usize = 256;

fn disk(case: &Case) -> Image {
    case.image(&vec![0; SIZE])
}

pub fn sigterm_keeps_every_acknowledged_write(case: &Case) {
    let image = disk(case);
    let mut export = case.export(&image, &[]);
    let mut writers = Writers::start(export.file(), WRITERS, BLOCKS);
    writers.wait_for(1000);
    // They go on writing until the file is taken away.
    export.stop(libc::SIGTERM).assert(0, &["still in use"]);
    writers.finish().assert_is_in(&image.bytes());
}

pub fn unmount_keeps_every_acknowledged_write(case: &Case) {
    let image = disk(case);
    let mut export = case.export(&image, &[]);
    let mut writers = Writers::start(export.file(), WRITERS, BLOCKS);
    writers.wait_for(1000);
    let unmount = || {
        let unmount = if is_root() { &["umount"][..] } else { &["fusermount3", "-u"] };
        let output = program(unmount[0], &unmount[1..]).arg(export.file()).output();
        output.unwrap().status.success()
    };
    assert!(!unmount(), "the file is in use");
    writers.wait_for(1000);
    let written = writers.finish();
    eventually("an unmount", unmount);
    export.wait().assert(0, &[]);
    written.assert_is_in(&image.bytes());
}

pub fn second_signal_ends_it_at_once(case: &Case) {
    let image = disk(case);
    let mut export = case.export(&image, &[]);
    let file = File::open(export.file()).unwrap();
    export.kill(libc::SIGTERM);
    eventually("a report", || export.log().contains("still in use"));
    // Signals that come together count as one.
    eventually("the end", || {
        export.kill(libc::SIGTERM);
        within(Duration::from_millis(200), || export.has_exited())
    });
    let ended = export.wait();
    ended.assert(0, &[]);
    assert!(!ended.log.contains("taken away"), "it waited: {}", ended.log);
    drop(file);
}

/// After SIGKILL a dead mount is left; the next diskfuse takes it away by itself.
fn killed(case: &Case, image: &Image, export: &mut Export) {
    export.kill(libc::SIGKILL);
    let ended = export.wait_whatever_is_left();
    assert!(ended_by(ended.status, libc::SIGKILL), "{}", ended.status);
    assert!(export.is_mounted(), "a killed program cannot unmount");
    let again = case.export(image, &[]);
    assert_eq!(mounts::mounts_at(again.file()).len(), 1, "the dead mount is still there");
    assert_eq!(fs::metadata(again.file()).unwrap().len(), SIZE as u64);
}

pub fn killed_program_is_cleared_away_by_the_next(case: &Case) {
    let image = disk(case);
    let mut export = case.export(&image, &[]);
    killed(case, &image, &mut export);
}

/// `DISKFUSE_ROUNDS` rounds (10), in turn by SIGTERM, umount, umount -l, abort and SIGKILL.
pub fn rounds_of_load_cut_off_leave_nothing(case: &Case) {
    let rounds = std::env::var("DISKFUSE_ROUNDS").map_or(10, |n| n.parse().expect("a number"));
    let mut random = Random(9);
    for round in 0..rounds {
        let image = disk(case);
        let mut export = case.export(&image, &[]);
        let file = export.file().to_owned();
        let mut load = Load::start(&file, SIZE / 2, SIZE / 2);
        let mut writers = Writers::start(&file, WRITERS, BLOCKS);
        writers.wait_for(200);
        // No wait for anything: the moment is random.
        std::thread::sleep(Duration::from_millis(random.below(300)));
        let written = match round % 5 {
            0 => {
                export.stop(libc::SIGTERM).assert(0, &[]);
                writers.finish()
            }
            1 => {
                let output = program("umount", [&file]).output().unwrap();
                assert!(!output.status.success(), "the file is in use");
                load.finish();
                let written = writers.finish();
                eventually("an unmount", || {
                    program("umount", [&file]).output().unwrap().status.success()
                });
                export.wait().assert(0, &[]);
                written
            }
            2 => {
                succeed(program("umount", ["-l"]).arg(&file));
                // The clients that have the file open are served on.
                writers.wait_for(200);
                assert!(!export.has_exited());
                load.finish();
                let written = writers.finish();
                export.wait().assert(0, &[]);
                written
            }
            3 => {
                assert!(mounts::abort(export.connection()));
                let ended = export.wait();
                assert!(ended.status.code().is_some(), "{}: {}", ended.status, ended.log);
                writers.finish()
            }
            _ => {
                killed(case, &image, &mut export);
                writers.finish()
            }
        };
        load.finish();
        written.assert_is_in(&image.bytes());
        drop(export);
        assert!(mounts::mounts_at(&file).is_empty());
        drop(image);
        for name in case.sandbox.names() {
            fs::remove_file(case.sandbox.join(&name)).unwrap();
        }
        if rounds > 10 {
            println!("round {round} of {rounds}");
        }
    }
}

pub fn requests_in_flight_cost_little_memory(case: &Case) {
    const LIMIT_KIB: u64 = 32 << 10;
    let image = disk(case);
    let export = case.export(&image, &[]);
    let fio = [
        "--name=memory",
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=64",
        "--ioengine=libaio",
        "--direct=1",
        "--thread",
        "--io_size=80M",
        "--size=16M",
        "--norandommap",
        "--allow_file_create=0",
    ];
    succeed(program("fio", fio).arg(format!("--filename={}", export.file().display())));
    let status = fs::read_to_string(format!("/proc/{}/status", export.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < LIMIT_KIB, "{peak} KiB were resident");
}
