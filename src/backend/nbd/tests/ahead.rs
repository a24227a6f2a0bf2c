//! Reading ahead of readers, beside writes, on a real server.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use smol::LocalExecutor;
use smol::future::{or, yield_now};

use super::super::{NbdBackend, NbdLane};
use super::servers::nbdkit;
use super::{Random, connect, on_lane};
use crate::backend::{Backend, Lane, Zero};

const BLOCK: u64 = 4096;
const READ: u64 = 128 << 10;

/// Each block is full of the number of its last write. Block by block, the last that was
/// acknowledged.
type Acknowledged = Arc<Vec<AtomicU64>>;

fn blocks(range: &Range<u64>) -> impl Iterator<Item = usize> + use<> {
    (range.start / BLOCK) as usize..(range.end / BLOCK) as usize
}

async fn read_in_order(lane: Rc<NbdLane>, acknowledged: Acknowledged, until: Instant) {
    let mut buf = vec![0; READ as usize];
    while Instant::now() < until {
        for at in (0..lane.backend.size()).step_by(READ as usize) {
            let before: Vec<u64> =
                blocks(&(at..at + READ)).map(|b| acknowledged[b].load(Ordering::SeqCst)).collect();
            lane.read_cached(at, &mut buf).await.unwrap();
            let (bytes, _) = buf.as_chunks::<8>();
            for (words, before) in bytes.chunks((BLOCK / 8) as usize).zip(before) {
                let words = words.iter().map(|word| u64::from_ne_bytes(*word));
                let oldest = words.min().unwrap();
                assert!(oldest >= before, "{oldest} at {at}, after {before} was acknowledged");
            }
        }
    }
}

/// Writes the blocks of one thread: of each 16, the first or the last 8. Some writes are given up
/// half-way.
async fn write_some(
    lane: Rc<NbdLane>,
    acknowledged: Acknowledged,
    number: &AtomicU64,
    thread: u64,
    until: Instant,
) {
    let mut random = Random(thread + 1);
    while Instant::now() < until {
        let first = random.below(lane.backend.size() / BLOCK / 16) * 16 + thread * 8;
        let range = first * BLOCK..(first + 1 + random.below(8)) * BLOCK;
        let number = number.fetch_add(1, Ordering::SeqCst);
        let data = number.to_ne_bytes().repeat(((range.end - range.start) / 8) as usize);
        let write = async {
            lane.write(range.start, &data, false).await.unwrap();
            for block in blocks(&range) {
                acknowledged[block].fetch_max(number, Ordering::SeqCst);
            }
        };
        match random.below(4) {
            0 => or(write, async { yield_now().await }).await,
            _ => write.await,
        }
        yield_now().await;
    }
}

/// Two threads that read all of the disk in order, again and again, and write to it.
fn reads_beside_writes(backend: &Arc<NbdBackend>) {
    backend.set_read_ahead(2 << 20);
    let acknowledged: Acknowledged =
        Arc::new((0..backend.size() / BLOCK).map(|_| AtomicU64::new(0)).collect());
    let number = &AtomicU64::new(1);
    let until = Instant::now() + Duration::from_secs(2);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let acknowledged = acknowledged.clone();
            scope.spawn(move || {
                let work = async |lane: Rc<NbdLane>, executor: Rc<LocalExecutor<'static>>| {
                    let read = read_in_order(lane.clone(), acknowledged.clone(), until);
                    let reading = executor.spawn(read);
                    write_some(lane, acknowledged, number, thread, until).await;
                    reading.await;
                };
                on_lane(backend, work);
            });
        }
    });
    assert!(backend.ahead.used_bytes() > 4 * backend.size(), "{:?}", backend.ahead);
    let stats = backend.stats().unwrap();
    assert_eq!(stats.read_ahead_hit_bytes, backend.ahead.used_bytes());
    assert!(stats.read_ahead_hits > 0 && stats.read_ahead_bytes > 0, "{stats:?}");
    backend.last_flush(Duration::ZERO).unwrap();
}

#[test]
fn no_read_is_older_than_a_write_acknowledged_before() {
    let Some(server) = nbdkit(&["--filter=delay", "memory", "8M", "rdelay=1ms"]) else { return };
    reads_beside_writes(&connect(&server.uri("")));
    let Some(server) = nbdkit(&[
        "--filter=blocksize-policy",
        "--filter=multi-conn",
        "memory",
        "8M",
        "multi-conn-mode=disable",
        "blocksize-minimum=64K",
        "blocksize-preferred=64K",
        "blocksize-error-policy=error",
    ]) else {
        return;
    };
    reads_beside_writes(&connect(&server.uri("")));
}

#[test]
fn zeroes_and_forgetting_take_out_what_was_read_ahead() {
    let Some(server) = nbdkit(&["memory", "8M"]) else { return };
    let (backend, other) = (connect(&server.uri("")), connect(&server.uri("")));
    backend.set_read_ahead(1 << 20);
    on_lane(&backend, async |lane, executor| {
        let mut buf = vec![0; READ as usize];
        let mut read = async |at: u64| {
            assert_eq!(lane.read_cached(at, &mut buf).await.unwrap(), READ as usize);
            // What it has begun to fetch arrives.
            smol::Timer::after(Duration::from_millis(50)).await;
            buf[0]
        };
        lane.write(0, &vec![1; 8 << 20], false).await.unwrap();
        for at in (0..READ * 16).step_by(READ as usize) {
            assert_eq!(read(at).await, 1);
        }
        lane.zero(READ * 16, READ * 2, Zero::Keep).await.unwrap();
        assert_eq!(read(READ * 16).await, 0);
        assert_eq!(read(READ * 17).await, 0);
        // Another host, of which this one does not know.
        let written = std::thread::scope(|scope| {
            let write = async |lane: Rc<NbdLane>, _| lane.write(0, &vec![2; 8 << 20], false).await;
            scope.spawn(move || on_lane(&other, write)).join().unwrap()
        });
        written.unwrap();
        assert_eq!(read(READ * 18).await, 1, "read ahead");
        backend.forget();
        assert_eq!(read(READ * 19).await, 2);
        drop(executor);
    });
    assert!(backend.ahead.used_bytes() > 0);
}
