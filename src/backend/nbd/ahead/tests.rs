//! Readers of a disk in memory that answers when it is told to.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::time::Duration;

use event_listener::Event;
use smol::LocalExecutor;
use smol::future::{block_on, poll_once, yield_now};

use super::table::SPARE;
use super::*;

const READ: u64 = 128 << 10;

/// Every byte is told by its place and the disk's version. A READ sees the version at which it was
/// asked.
#[derive(Default)]
struct Disk {
    version: Cell<u8>,
    reads: RefCell<Vec<Range<u64>>>,
    /// READs that come now are answered later.
    hangs: Cell<bool>,
    answers: Event,
    fails: Cell<bool>,
}

impl Disk {
    fn fill(&self, offset: u64, mut buf: &mut [u8]) {
        let mut at = offset;
        while !buf.is_empty() {
            let (sector, rest) = buf.split_at_mut(buf.len().min((512 - at % 512) as usize));
            sector.fill((at / 512 % 251) as u8 ^ self.version.get());
            at += sector.len() as u64;
            buf = rest;
        }
    }

    fn answer(&self) {
        self.hangs.set(false);
        self.answers.notify(usize::MAX);
    }

    /// How often it has been asked for these bytes.
    fn asked(&self, range: Range<u64>) -> usize {
        let reads = self.reads.borrow();
        reads.iter().filter(|read| read.start < range.end && range.start < read.end).count()
    }
}

impl Source for Disk {
    async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.borrow_mut().push(offset..offset + buf.len() as u64);
        self.fill(offset, buf);
        let fails = self.fails.get();
        if self.hangs.get() {
            self.answers.listen().await;
        }
        if fails { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

/// A thread that reads from a disk.
struct Lane {
    executor: Rc<LocalExecutor<'static>>,
    disk: Rc<Disk>,
    reads: Reads<Disk>,
}

impl Lane {
    fn new(ahead: &Arc<Ahead>, size: u64) -> Lane {
        let (executor, disk) = (Rc::new(LocalExecutor::new()), Rc::<Disk>::default());
        let io = Io::of_a_test(None, executor.clone());
        let reads = Reads::new(ahead.clone(), disk.clone(), size, io);
        Lane { executor, disk, reads }
    }

    /// Lets the fetches run as far as they can.
    fn turn(&self) {
        while self.executor.try_tick() {}
    }

    /// Reads, and compares with what the disk has now.
    async fn read(&self, range: Range<u64>) {
        let mut buf = vec![0xaa; (range.end - range.start) as usize];
        self.reads.read(range.start, &mut buf).await.unwrap();
        let mut expected = vec![0; buf.len()];
        self.disk.fill(range.start, &mut expected);
        assert!(buf == expected, "{range:?}");
    }

    /// The number-th READ of a reader that goes in order from the start.
    fn read_nth(&self, number: u64) {
        let end = (number + 1) * READ;
        block_on(self.executor.run(self.read(number * READ..end.min(self.reads.size))));
        self.turn();
    }
}

fn ahead() -> Arc<Ahead> {
    let ahead = Arc::<Ahead>::default();
    ahead.set_limit(4 << 20);
    ahead
}

/// A lane whose reader has read `0..CHUNK`; the next chunk is on its way while the disk hangs.
fn lane(ahead: &Arc<Ahead>) -> Lane {
    let lane = Lane::new(ahead, 64 << 20);
    lane.read_nth(0);
    block_on(lane.read(READ..CHUNK));
    lane.disk.hangs.set(true);
    lane.turn();
    assert_eq!(lane.disk.asked(CHUNK..2 * CHUNK), 1);
    lane
}

#[test]
fn a_reader_in_order_is_served_from_chunks() {
    let (ahead, size) = (ahead(), (10 << 20) + 1000);
    let lane = Lane::new(&ahead, size);
    (0..size.div_ceil(READ)).for_each(|number| lane.read_nth(number));
    let mut reads = lane.disk.reads.borrow().clone();
    reads.sort_unstable_by_key(|read| read.start);
    // Each byte is asked for once, and none beyond the end.
    assert!(reads.windows(2).all(|pair| pair[0].end == pair[1].start));
    assert_eq!(reads.last().unwrap().end, size);
    assert_eq!(ahead.used_bytes.load(Ordering::Relaxed), size - CHUNK);
    assert!(!ahead.buffers.any_taken(), "what has been read is freed");
}

#[test]
fn swapped_reads_are_served_from_chunks() {
    let ahead = ahead();
    let lane = Lane::new(&ahead, 64 << 20);
    [0, 1, 2, 4, 3, 6, 5, 8, 7, 10, 9].into_iter().for_each(|number| lane.read_nth(number));
    assert_eq!(lane.disk.asked(0..11 * READ), 2 + 5, "two READs and the chunks");
}

#[test]
fn random_reads_fetch_nothing_and_stay_whole() {
    let lane = Lane::new(&ahead(), 1 << 40);
    for number in 0..200 {
        let at = number * 7919 % 199 * 5_000_011;
        block_on(lane.executor.run(lane.read(at..at + READ)));
        lane.turn();
    }
    assert_eq!(lane.disk.reads.borrow().len(), 200);
}

#[test]
fn many_readers_share_the_buffers() {
    const READERS: u64 = 64;
    let ahead = ahead();
    let lane = Lane::new(&ahead, 1 << 40);
    let begin = |reader: u64| reader << 30;
    for number in 0..32 {
        for reader in 0..READERS {
            let at = begin(reader) + number * READ;
            block_on(lane.executor.run(lane.read(at..at + READ)));
            lane.turn();
        }
    }
    for reader in 0..READERS {
        let asked = lane.disk.asked(begin(reader)..begin(reader) + 32 * READ);
        assert_eq!(asked, 2 + 15, "two READs and the chunks: {reader}");
    }
    let allocated = ahead.buffers.give_back_counted();
    assert!(allocated <= MAX_CHUNKS, "{allocated}");
}

#[test]
fn what_a_reader_has_left_makes_room() {
    let ahead = ahead();
    let lane = Lane::new(&ahead, 1 << 40);
    // Each reads 4 MiB in order, and goes elsewhere.
    for reader in 0..9 {
        if reader == 8 {
            assert!(!ahead.buffers.has_room_for(2), "full");
            std::thread::sleep(SPARE);
        }
        for number in 0..32 {
            let at = (reader << 30) + number * READ;
            block_on(lane.executor.run(lane.read(at..at + READ)));
            lane.turn();
        }
    }
    assert_eq!(lane.disk.asked(8 << 30..(8 << 30) + 32 * READ), 2 + 15);
}

#[test]
fn what_is_on_its_way_is_waited_for_by_whoever_stays() {
    let ahead = ahead();
    let lane = lane(&ahead);
    let mut killed = Box::pin(lane.read(CHUNK..CHUNK + READ));
    let mut stays = pin!(lane.read(CHUNK + READ..2 * CHUNK));
    assert!(block_on(poll_once(&mut killed)).is_none());
    assert!(block_on(poll_once(&mut stays)).is_none());
    drop(killed);
    lane.disk.answer();
    lane.turn();
    block_on(stays);
    assert_eq!(lane.disk.asked(CHUNK..2 * CHUNK), 1);
}

#[test]
fn what_nobody_asked_for_may_fail() {
    let ahead = ahead();
    let lane = Lane::new(&ahead, 64 << 20);
    lane.read_nth(0);
    block_on(lane.read(READ..CHUNK));
    lane.disk.hangs.set(true);
    lane.disk.fails.set(true);
    lane.turn();
    let mut waits = pin!(lane.read(CHUNK..CHUNK + READ));
    assert!(block_on(poll_once(&mut waits)).is_none());
    lane.disk.fails.set(false);
    lane.disk.answer();
    lane.turn();
    // It asks for itself now.
    block_on(waits);
    assert_eq!(lane.disk.asked(CHUNK..2 * CHUNK), 2);
    lane.disk.fails.set(true);
    let error = block_on(lane.reads.read(0, &mut [0; 512])).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "the reader's own");
}

#[test]
fn a_write_takes_out_what_is_ready() {
    let ahead = ahead();
    let lane = lane(&ahead);
    lane.disk.answer();
    lane.turn();
    let writing = ahead.writing(CHUNK + READ - 1..CHUNK + READ);
    lane.disk.version.set(1);
    // Also before it is acknowledged: others may have met it already.
    lane.read_nth(2);
    drop(writing);
    lane.read_nth(3);
}

#[test]
fn a_write_beside_a_chunk_leaves_it() {
    let ahead = ahead();
    let lane = lane(&ahead);
    drop(ahead.writing(0..CHUNK));
    drop(ahead.writing(2 * CHUNK..3 * CHUNK));
    lane.disk.answer();
    lane.turn();
    lane.read_nth(2);
    assert_eq!(lane.disk.asked(CHUNK..2 * CHUNK), 1);
}

#[test]
fn a_write_takes_out_what_is_on_its_way() {
    let ahead = ahead();
    let lane = lane(&ahead);
    let mut waits = pin!(lane.read(CHUNK..CHUNK + READ));
    assert!(block_on(poll_once(&mut waits)).is_none());
    // The fetch was carried out before the write, and is answered after it.
    let writing = ahead.writing(CHUNK..CHUNK + 1);
    lane.disk.version.set(1);
    drop(writing);
    lane.disk.answer();
    lane.turn();
    block_on(waits);
    lane.read_nth(3);
}

#[test]
fn the_end_of_a_write_takes_out_what_was_fetched_beside_it() {
    let ahead = ahead();
    let lane = Lane::new(&ahead, 64 << 20);
    lane.read_nth(0);
    let writing = ahead.writing(0..64 << 20);
    // This fetches what follows, before the write is carried out.
    lane.read_nth(1);
    assert_eq!(lane.disk.asked(CHUNK..2 * CHUNK), 1);
    lane.disk.version.set(1);
    drop(writing);
    lane.read_nth(2);
}

#[test]
fn a_late_answer_does_not_get_into_a_later_chunk() {
    let lane = Lane::new(&ahead(), 64 << 20);
    (0..3).for_each(|number| lane.read_nth(number));
    lane.disk.hangs.set(true);
    // Fetches 3 * CHUNK, as do the bytes that follow the write.
    lane.read_nth(3);
    let writing = lane.reads.ahead.writing(0..64 << 20);
    lane.disk.version.set(1);
    drop(writing);
    lane.disk.hangs.set(false);
    block_on(lane.read(2 * CHUNK..2 * CHUNK + READ));
    lane.disk.hangs.set(true);
    lane.turn();
    assert_eq!(lane.disk.asked(3 * CHUNK..4 * CHUNK), 2);
    // The first of them.
    lane.disk.answers.notify(1);
    lane.turn();
    let mut read = pin!(lane.read(3 * CHUNK..4 * CHUNK));
    assert!(block_on(poll_once(&mut read)).is_none());
    lane.disk.answer();
    lane.turn();
    block_on(read);
    assert_eq!(lane.disk.asked(3 * CHUNK..4 * CHUNK), 2);
}

#[test]
fn forgetting_takes_out_chunks_and_readers() {
    let ahead = ahead();
    let lane = lane(&ahead);
    ahead.forget();
    lane.disk.version.set(1);
    lane.disk.answer();
    lane.turn();
    lane.read_nth(2);
    assert_eq!(
        lane.disk.asked(2 * CHUNK..64 << 20),
        0,
        "it has to show again that it goes in order"
    );
}

#[test]
fn the_end_of_a_lane_leaves_nobody_waiting() {
    let ahead = ahead();
    let ends = lane(&ahead);
    let stays = Lane::new(&ahead, 64 << 20);
    let mut waits = pin!(stays.read(CHUNK..CHUNK + READ));
    assert!(block_on(poll_once(&mut waits)).is_none());
    drop(ends);
    block_on(waits);
    assert_eq!(stays.disk.asked(CHUNK..CHUNK + READ), 1);
}

#[test]
fn chunks_that_are_not_used_are_dropped() {
    let ahead = ahead();
    let lane = lane(&ahead);
    let later = Instant::now() + 2 * STOPPED;
    assert!(!ahead.expire_idle(later), "it is on its way");
    lane.disk.answer();
    lane.turn();
    assert!(!ahead.expire_idle(Instant::now()), "it is new");
    assert!(ahead.expire_idle(later));
    // And by themselves, in a second or two.
    (2..5).for_each(|number| lane.read_nth(number));
    assert!(ahead.buffers.any_taken());
    block_on(lane.executor.run(async {
        let limit = Instant::now() + 4 * STOPPED;
        while ahead.table().expiry.strong_count() > 0 {
            assert!(Instant::now() < limit);
            Timer::after(Duration::from_millis(20)).await;
            yield_now().await;
        }
    }));
    assert!(!ahead.buffers.any_taken());
    assert_eq!(ahead.buffers.give_back_counted(), 0);
}
