//! File operations on every server there is, compared with a model in memory.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smol::LocalExecutor;

use super::super::{NbdBackend, NbdLane};
use super::servers::{
    Directory, crate_server, nbd_server, nbdkit, nbdkit_tcp, oldstyle_server, qemu_nbd,
};
use super::{Random, connect, on_lane, on_lane_in_ring};
use crate::backend::{Backend, Lane, Seek, Zero};

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    // As the client sees it.
    -crate::errno::Errno::from(result.unwrap_err()).wire()
}

/// Rounds of operations that run at the same time on neighbouring ranges, cut at any byte.
async fn model_test(
    lane: Rc<NbdLane>,
    executor: Rc<LocalExecutor<'static>>,
    region: std::ops::Range<u64>,
    seed: u64,
) {
    const ROUNDS: usize = 12;
    let mut random = Random(seed);
    let mut model = vec![0; (region.end - region.start) as usize];
    lane.zero(region.start, model.len() as u64, Zero::Keep).await.unwrap();
    for round in 0..ROUNDS {
        let mut cuts: Vec<u64> = (0..40).map(|_| random.below(model.len() as u64)).collect();
        cuts.extend([0, model.len() as u64]);
        if random.below(2) == 0 {
            cuts.iter_mut().for_each(|cut| *cut -= *cut % 512);
        }
        cuts.sort_unstable();
        let mut tasks = Vec::new();
        for pair in cuts.windows(2).filter(|pair| pair[0] < pair[1]) {
            let (from, to) = (pair[0] as usize, pair[1] as usize);
            let (offset, length) = (region.start + pair[0], to - from);
            let lane = lane.clone();
            match random.below(5) {
                0 | 1 => {
                    let expected = model[from..to].to_vec();
                    tasks.push(executor.spawn(async move {
                        let mut buf = vec![0xaa; length];
                        assert_eq!(lane.read(offset, &mut buf).await.unwrap(), length);
                        assert!(buf == expected, "round {round}: {length} bytes at {offset}");
                    }));
                }
                2 | 3 => {
                    let data = random.bytes(length);
                    model[from..to].copy_from_slice(&data);
                    let durable = random.below(8) == 0;
                    tasks.push(executor.spawn(async move {
                        lane.write(offset, &data, durable).await.unwrap();
                    }));
                }
                _ => {
                    let how = if random.below(2) == 0 { Zero::Keep } else { Zero::Punch };
                    let data = vec![0; length];
                    model[from..to].copy_from_slice(&data);
                    tasks.push(executor.spawn(async move {
                        match lane.zero(offset, length as u64, how).await {
                            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                                assert_eq!(how, Zero::Punch);
                                lane.write(offset, &data, false).await.unwrap();
                            }
                            zeroed => zeroed.unwrap(),
                        }
                    }));
                }
            }
        }
        for task in tasks {
            task.await;
        }
        if random.below(3) == 0 {
            lane.flush().await.unwrap();
        }
    }
    let mut buf = vec![0xaa; model.len()];
    lane.read(region.start, &mut buf).await.unwrap();
    assert!(buf == model);
}

pub fn model_tests(uri: &str, threads: u64) -> Arc<NbdBackend> {
    model_tests_over(uri, threads, 1)
}

/// As [`model_tests`]; `connections` are there in the end, of which all but the first are opened in
/// the background.
fn model_tests_over(uri: &str, threads: u64, connections: usize) -> Arc<NbdBackend> {
    let backend = connect(uri);
    // Neither aligned nor apart: threads meet in the middle of a block.
    let share = (backend.size() / threads).min(600_000) - 77;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let backend = &backend;
            scope.spawn(move || {
                on_lane(backend, async |lane, executor| {
                    let region = thread * share..(thread + 1) * share;
                    model_test(lane, executor, region, thread + 1).await;
                });
            });
        }
    });
    let begun = Instant::now();
    while backend.connections() < connections && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(10));
    }
    backend.last_flush(Duration::ZERO).unwrap();
    if connections > 1 {
        assert_eq!(backend.connections(), connections);
    }
    backend
}

#[test]
fn model_nbdkit() {
    let Some(server) = nbdkit(&["memory", "64M"]) else { return };
    model_tests_over(&server.uri(""), 2, 2);
    let Some(server) = nbdkit_tcp(&["memory", "64M"]) else { return };
    model_tests(&server.uri(""), 1);
}

#[test]
fn model_in_a_ring() {
    let Some(server) = nbdkit(&["memory", "64M"]) else { return };
    let backend = connect(&server.uri(""));
    let region = 0..600_000;
    on_lane_in_ring(&backend, async |lane, executor| model_test(lane, executor, region, 1).await);
    backend.last_flush(Duration::ZERO).unwrap();
}

#[test]
fn a_server_without_room_for_more_connections_is_shared() {
    let Some(server) = qemu_nbd(64 << 20, &["--shared=2"]) else { return };
    let begun = Instant::now();
    model_tests_over(&server.uri("disk"), 4, 2);
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn model_one_connection_for_all_lanes() {
    let filter = ["--filter=multi-conn", "memory", "64M", "multi-conn-mode=disable"];
    let Some(server) = nbdkit(&filter) else { return };
    assert_eq!(model_tests(&server.uri(""), 4).connections(), 1);
}

#[test]
fn model_4k_blocks() {
    let Some(server) = nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "64M",
        "blocksize-minimum=4096",
        "blocksize-preferred=64K",
        "blocksize-maximum=128K",
        "blocksize-error-policy=error",
    ]) else {
        return;
    };
    assert_eq!(model_tests(&server.uri(""), 3).capabilities().preferred_io_bytes, 65536);
}

#[test]
fn model_4k_blocks_without_write_zeroes() {
    let Some(server) = nbdkit(&[
        "--filter=blocksize-policy",
        "--filter=nozero",
        "--filter=multi-conn",
        "memory",
        "64M",
        "multi-conn-mode=disable",
        "blocksize-minimum=4096",
        "blocksize-error-policy=error",
    ]) else {
        return;
    };
    model_tests(&server.uri(""), 3);
}

#[test]
fn model_without_structured_replies() {
    let Some(server) = nbdkit(&["--no-sr", "memory", "64M"]) else { return };
    model_tests(&server.uri(""), 1);
}

#[test]
fn model_without_fua() {
    // The filter takes FUA away unless told otherwise.
    let Some(server) = nbdkit(&["--filter=fua", "memory", "64M"]) else { return };
    model_tests(&server.uri(""), 1);
}

#[test]
fn model_old_styles() {
    assert_eq!(model_tests(&oldstyle_server(8 << 20), 2).connections(), 1);
    // Newstyle without "fixed", and fixed newstyle that does not leave out the zeroes.
    for (old, connections) in [("--mask-handshake=0", 1), ("--mask-handshake=1", 2)] {
        let Some(server) = nbdkit(&[old, "memory", "64M"]) else { return };
        model_tests_over(&server.uri(""), 2, connections);
    }
}

#[test]
fn model_qemu_nbd() {
    let Some(server) = qemu_nbd(64 << 20, &["--shared=4"]) else { return };
    model_tests(&server.uri("disk"), 2);
    let Some(server) = qemu_nbd(64 << 20, &["--shared=1"]) else { return };
    model_tests(&server.uri("disk"), 2);
}

#[test]
fn model_nbd_server() {
    let Some(server) = nbd_server(64 << 20) else { return };
    model_tests(&server.uri("disk"), 2);
}

#[test]
fn model_server_of_the_crate() {
    let uri = crate_server(8 << 20);
    assert_eq!(model_tests(&uri, 2).connections(), 1);
}

#[test]
fn sixty_four_requests_take_little_longer_than_one() {
    let filter = ["--filter=delay", "memory", "64M", "rdelay=200ms", "-t", "64"];
    let Some(server) = nbdkit(&filter) else { return };
    let backend = connect(&server.uri(""));
    on_lane(&backend, async |lane, executor| {
        let begun = Instant::now();
        let reads: Vec<_> = (0..64)
            .map(|n| {
                let lane = lane.clone();
                executor.spawn(async move { lane.read(n * 4096, &mut [0; 4096]).await.unwrap() })
            })
            .collect();
        for read in reads {
            assert_eq!(read.await, 4096);
        }
        assert!(begun.elapsed() < Duration::from_millis(1000), "{:?}", begun.elapsed());
    });
}

#[test]
fn dropped_requests_do_not_disturb_others() {
    let filter = ["--filter=delay", "memory", "16M", "rdelay=3ms", "wdelay=3ms", "-t", "64"];
    let Some(server) = nbdkit_tcp(&filter) else { return };
    let backend = connect(&server.uri(""));
    on_lane(&backend, async |lane, executor| {
        let mut random = Random(7);
        let data = random.bytes(16 << 20);
        lane.write(0, &data, false).await.unwrap();
        let data = Rc::new(data);
        let mut tasks = Vec::new();
        for n in 0..400_u64 {
            let length = if n % 3 == 0 { 100_000 } else { 4096 } as usize;
            let offset = random.below((16 << 20) - 100_000);
            let patience = match n % 5 {
                0 => Duration::from_secs(60),
                _ => Duration::from_micros(random.below(60_000)),
            };
            let (lane, data) = (lane.clone(), data.clone());
            tasks.push(executor.spawn(async move {
                let mut buf = vec![0xee; length];
                let expected = &data[offset as usize..][..length];
                let access = async {
                    match n % 2 {
                        0 => lane.read(offset, &mut buf).await.map(drop),
                        // The bytes that are there anyway: dropped or not, it changes nothing.
                        _ => lane.write(offset, expected, false).await.map(drop),
                    }
                };
                let timeout = async {
                    smol::Timer::after(patience).await;
                    Err(std::io::ErrorKind::TimedOut.into())
                };
                let ended = smol::future::or(access, timeout).await;
                if ended.is_ok() && n % 2 == 0 {
                    assert!(buf == expected, "{n}");
                }
                ended.is_ok()
            }));
        }
        let mut completed = 0;
        for task in tasks {
            completed += u32::from(task.await);
        }
        assert!((80..400).contains(&completed), "{completed}");
        let mut buf = vec![0; 16 << 20];
        lane.read(0, &mut buf).await.unwrap();
        assert!(buf == *data);
    });
    backend.last_flush(Duration::ZERO).unwrap();
}

#[test]
fn an_error_fails_the_touched_range_alone() {
    let sh = "cat >/dev/null; case $4 in 8192) echo ENOSPC >&2; exit 1;; *) exit 0;; esac";
    let Some(server) = nbdkit(&[
        "eval",
        "get_size=echo 1M",
        "pread=if [ $4 -eq 8192 ]; then echo EIO >&2; exit 1; fi; head -c $3 /dev/zero",
        &format!("pwrite={sh}"),
        "can_write=exit 0",
    ]) else {
        return;
    };
    let backend = connect(&server.uri(""));
    on_lane(&backend, async |lane, _| {
        lane.read(4096, &mut [0; 4096]).await.unwrap();
        assert_eq!(errno(lane.read(8192, &mut [0; 4096]).await), libc::EIO);
        lane.read(12288, &mut [0; 4096]).await.unwrap();
        lane.write(4096, &[1; 512], false).await.unwrap();
        assert_eq!(errno(lane.write(8192, &[1; 512], false).await), libc::ENOSPC);
        lane.write(12288, &[1; 512], false).await.unwrap();
    });
}

#[test]
fn random_errors_reach_only_their_requests() {
    let filter = ["--filter=error", "memory", "64M", "error=ENOSPC", "error-rate=50%"];
    let Some(server) = nbdkit(&filter) else { return };
    let backend = connect(&server.uri(""));
    on_lane(&backend, async |lane, _| {
        let mut failed = 0;
        for n in 0..100 {
            match lane.read(n * 512, &mut [0; 512]).await {
                Ok(_) => {}
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
                    failed += 1;
                }
            }
        }
        assert!((10..90).contains(&failed), "{failed}");
    });
}

#[test]
fn holes_and_data_are_found() {
    for extended in [false, true] {
        let server = match extended {
            false => nbdkit(&["data", "@0x100000 1 @0x7ffff 2 @0x3fffffff 3", "size=1G"]),
            true => qemu_nbd(1 << 30, &["--discard=unmap"]),
        };
        let Some(server) = server else { continue };
        let backend = connect(&server.uri(if extended { "disk" } else { "" }));
        on_lane(&backend, async |lane, _| {
            if extended {
                // 64 KiB pieces, as the file system allocates them.
                lane.write(0x10_0000, &[1; 0x1_0000], true).await.unwrap();
            }
            let data = lane.seek(0, Seek::Data).await.unwrap();
            assert!(data > 0 && data <= 0x10_0000, "{data:#x}");
            assert_eq!(lane.seek(0, Seek::Hole).await.unwrap(), 0);
            let hole = lane.seek(0x10_0000, Seek::Hole).await.unwrap();
            assert!((0x10_0001..0x20_0000).contains(&hole), "{hole:#x}");
            assert_eq!(lane.seek(0x10_0000, Seek::Data).await.unwrap(), 0x10_0000);
            if extended {
                assert_eq!(errno(lane.seek(hole, Seek::Data).await), libc::ENXIO);
                assert_eq!(lane.seek((1 << 30) - 1, Seek::Hole).await.unwrap(), (1 << 30) - 1);
                lane.zero(0x10_0000, 0x1_0000, Zero::Punch).await.unwrap();
                assert_eq!(errno(lane.seek(0, Seek::Data).await), libc::ENXIO);
            } else {
                // The last byte is data, after almost a gigabyte without.
                assert!(lane.seek(hole, Seek::Data).await.unwrap() > 0x20_0000);
                assert_eq!(lane.seek((1 << 30) - 1, Seek::Hole).await.unwrap(), 1 << 30);
            }
        });
    }
}

#[test]
fn without_block_status_everything_is_data() {
    let Some(server) = nbdkit(&["--no-sr", "memory", "1M"]) else { return };
    let backend = connect(&server.uri(""));
    assert_eq!(backend.stat().unwrap().allocated_bytes, 1 << 20);
    on_lane(&backend, async |lane, _| {
        assert_eq!(lane.seek(5000, Seek::Data).await.unwrap(), 5000);
        assert_eq!(lane.seek(5000, Seek::Hole).await.unwrap(), 1 << 20);
    });
}

#[test]
fn zeroing_without_the_servers_help() {
    let Some(server) = nbdkit(&["--filter=nozero", "memory", "16M"]) else { return };
    let backend = connect(&server.uri(""));
    on_lane(&backend, async |lane, _| {
        lane.write(0, &vec![7; 8 << 20], false).await.unwrap();
        assert_eq!(errno(lane.zero(100, 5_000_000, Zero::Punch).await), libc::EOPNOTSUPP);
        let mut buf = vec![0; 8 << 20];
        lane.read(0, &mut buf).await.unwrap();
        assert!(buf.iter().all(|byte| *byte == 7));
        lane.zero(100, 5_000_000, Zero::Keep).await.unwrap();
        lane.read(0, &mut buf).await.unwrap();
        assert!(
            buf.iter()
                .enumerate()
                .all(|(at, byte)| { *byte == if (100..5_000_100).contains(&at) { 0 } else { 7 } })
        );
    });
}

#[test]
fn what_a_remote_disk_cannot_do() {
    let Some(server) = nbdkit(&["-r", "memory", "1M"]) else { return };
    let backend = connect(&server.uri(""));
    assert!(backend.capabilities().read_only);
    let allocated = backend.stat().unwrap().allocated_bytes;
    assert_eq!((backend.size(), allocated), (1 << 20, (1 << 20) - 512), "it may have holes");
    on_lane(&backend, async |lane, _| {
        assert_eq!(errno(lane.write(0, &[1], false).await), libc::EROFS);
        assert_eq!(errno(lane.resize(0).await), libc::EOPNOTSUPP);
        assert_eq!(errno(lane.allocate(0, 10, true).await), libc::EOPNOTSUPP);
        assert_eq!(lane.read(1 << 20, &mut [0; 10]).await.unwrap(), 0);
        assert_eq!(lane.read((1 << 20) - 4, &mut [0; 10]).await.unwrap(), 4);
    });
    let Some(server) = nbdkit(&["memory", "1M"]) else { return };
    let backend = connect(&server.uri(""));
    on_lane(&backend, async |lane, _| {
        assert_eq!(errno(lane.write(1 << 20, &[1], false).await), libc::ENOSPC);
        assert_eq!(errno(lane.write((1 << 20) - 1, &[1, 2], false).await), libc::ENOSPC);
    });
}

#[test]
fn the_last_flush_tells_what_was_lost() {
    for tcp in [false, true] {
        let start = if tcp { nbdkit_tcp } else { nbdkit };
        // With FUA, and without.
        let filter: &[&str] = if tcp { &["--filter=fua"] } else { &[] };
        let Some(mut server) = start(&[filter, &["memory", "1M"]].concat()) else { return };
        let flushed = connect(&server.uri(""));
        let written = connect(&server.uri(""));
        let untouched = connect(&server.uri(""));
        let durable = connect(&server.uri(""));
        on_lane(&flushed, async |lane, _| {
            lane.write(0, &[1; 4096], false).await.unwrap();
            lane.flush().await.unwrap();
        });
        on_lane(&written, async |lane, _| {
            lane.flush().await.unwrap();
            lane.write(0, &[1; 4096], false).await.unwrap();
        });
        on_lane(&durable, async |lane, _| {
            lane.write(0, &[1; 4096], true).await.unwrap();
        });
        server.kill();
        durable.last_flush(Duration::ZERO).unwrap();
        flushed.last_flush(Duration::ZERO).unwrap();
        untouched.last_flush(Duration::ZERO).unwrap();
        let error = written.last_flush(Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("could not be made durable"), "{error}");
    }
}

#[test]
fn the_last_flush_is_sent_and_the_server_is_disconnected() {
    let directory = Directory::new();
    let log = directory.path("log");
    let logging = format!("logfile={log}");
    let Some(server) = nbdkit(&["--filter=log", "memory", "1M", &logging]) else { return };
    let backend = connect(&server.uri(""));
    on_lane(&backend, async |lane, _| lane.write(0, &[1; 4096], false).await.unwrap());
    backend.last_flush(Duration::ZERO).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        if text.contains("Flush") && text.lines().any(|line| line.contains("Disconnect")) {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_server_that_dies_fails_requests_with_eio() {
    let Some(mut server) = nbdkit(&["--filter=delay", "memory", "1M", "rdelay=10"]) else { return };
    let backend = connect(&server.uri(""));
    on_lane(&backend, async |lane, executor| {
        let reads: Vec<_> = (0..10)
            .map(|n| {
                let lane = lane.clone();
                executor.spawn(async move { errno(lane.read(n * 512, &mut [0; 512]).await) })
            })
            .collect();
        smol::Timer::after(Duration::from_millis(50)).await;
        server.kill();
        for read in reads {
            assert_eq!(read.await, libc::EIO);
        }
        assert_eq!(errno(lane.write(0, &[0; 10], false).await), libc::EIO);
        // Nothing was acknowledged that could be lost.
        lane.flush().await.unwrap();
    });
    backend.last_flush(Duration::ZERO).unwrap();
}

/// System calls of `reads` reads of `length` bytes, `depth` at a time, after a warm-up.
fn calls_of_reads(uri: &str, length: usize, depth: u64, reads: u64) -> (f64, f64, Duration) {
    let backend = connect(uri);
    on_lane(&backend, async |lane, executor| {
        let run = async |reads: u64| {
            let workers: Vec<_> = (0..depth)
                .map(|worker| {
                    let lane = lane.clone();
                    executor.spawn(async move {
                        let mut buf = vec![0; length];
                        for n in 0..reads / depth {
                            let offset = (n * depth + worker) * length as u64 % (32 << 20);
                            lane.read(offset, &mut buf).await.unwrap();
                        }
                    })
                })
                .collect();
            for worker in workers {
                worker.await;
            }
        };
        run(depth).await;
        let (before, begun) = (backend.system_calls(), Instant::now());
        run(reads).await;
        let (after, elapsed) = (backend.system_calls(), begun.elapsed());
        let share = |calls: u64| calls as f64 / reads as f64;
        (share(after.sends - before.sends), share(after.receives - before.receives), elapsed)
    })
}

#[test]
fn one_read_costs_one_send_and_one_receive_and_many_share_them() {
    let Some(server) = nbdkit_tcp(&["memory", "64M"]) else { return };
    // With as many reads as there are at a time all are asked for at once; later ones follow the
    // answers, and how many share a call depends on the server's pace.
    for (length, depth, reads) in [
        (4096, 1, 2000),
        (4096, 64, 64),
        (4096, 64, 20_000),
        (131_072, 1, 500),
        (131_072, 16, 2000),
    ] {
        let (sends, receives, elapsed) = calls_of_reads(&server.uri(""), length, depth, reads);
        println!(
            "{length} bytes at depth {depth}: {sends:.3} sends, {receives:.3} receives each, \
             {:.0} reads/s",
            reads as f64 / elapsed.as_secs_f64()
        );
        if length == 4096 {
            let most = if reads == depth { 0.1 } else { 1.0 };
            assert!(sends <= most && receives <= 1.0, "{sends} sends, {receives} receives");
        }
    }
}
