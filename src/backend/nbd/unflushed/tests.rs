use super::store::BYTES_OF_AN_EXTENT;
use super::*;
use crate::backend::nbd::tests::Random;

const SIZE: usize = LEAST;

fn write(all: &Unflushed, offset: u64, data: &[u8]) {
    all.begin().acknowledged(offset, Change::Data(data));
}

/// What is kept, put upon `disk`.
fn apply(all: &Unflushed, disk: &mut [u8]) {
    let kept = all.bytes();
    let Some(again) = all.take() else { return };
    assert_eq!(all.bytes(), kept);
    let data = |(_, change): (u64, Change<'_>)| match change {
        Change::Data(data) => data.len() as u64,
        _ => 0,
    };
    assert_eq!(kept, Some(again.changes().map(data).sum()));
    for (offset, change) in again.changes() {
        let place = &mut disk[offset as usize..][..change.length() as usize];
        match change {
            Change::Data(data) => place.copy_from_slice(data),
            Change::Zero(..) => place.fill(0),
            Change::Durable(_) => unreachable!("it is not kept"),
        }
    }
    all.put_back(again);
}

/// A server that has forgotten all that was not durable gets exactly that back, whatever was
/// written; and no more: what is durable may have been changed by others.
#[test]
fn what_is_kept_makes_good_what_was_forgotten() {
    const LENGTH: u64 = 4 << 10;
    let mut random = Random(7);
    for _ in 0..200 {
        let all = Unflushed::new(SIZE).unwrap();
        let mut acknowledged = vec![1; LENGTH as usize];
        let mut durable = acknowledged.clone();
        // Which bytes are not durable, by the flush that would make them so.
        let mut dirty = vec![false; LENGTH as usize];
        let mut under_way: Option<(u64, Vec<u8>, Vec<bool>)> = None;
        for _ in 0..60 {
            let offset = random.below(LENGTH);
            let most = 1 << random.below(12);
            let length = (1 + random.below(most)).min(LENGTH - offset);
            let range = offset as usize..(offset + length) as usize;
            match random.below(10) {
                0..6 => {
                    let data = random.bytes(length as usize);
                    write(&all, offset, &data);
                    acknowledged[range.clone()].copy_from_slice(&data);
                    dirty[range].fill(true);
                }
                6 => {
                    all.begin().acknowledged(offset, Change::Zero(length, Zero::Keep));
                    acknowledged[range.clone()].fill(0);
                    dirty[range].fill(true);
                }
                7 => {
                    let data = random.bytes(length as usize);
                    all.begin().acknowledged(offset, Change::Durable(length));
                    acknowledged[range.clone()].copy_from_slice(&data);
                    durable[range.clone()].copy_from_slice(&data);
                    dirty[range.clone()].fill(false);
                    if let Some((_, then, is_dirty)) = &mut under_way {
                        then[range.clone()].copy_from_slice(&data);
                        is_dirty[range].fill(false);
                    }
                }
                8 if under_way.is_none() => {
                    let since = std::mem::replace(&mut dirty, vec![false; LENGTH as usize]);
                    under_way = Some((all.mark(), acknowledged.clone(), since));
                }
                _ => {
                    if let Some((mark, then, _)) = under_way.take() {
                        all.flushed_to(mark);
                        durable = then;
                    }
                }
            }
            let mut disk = durable.clone();
            apply(&all, &mut disk);
            assert!(disk == acknowledged);
            // Nothing else is touched.
            let mut marked = vec![2; LENGTH as usize];
            let before = marked.clone();
            apply(&all, &mut marked);
            for (at, byte) in marked.iter().enumerate() {
                let is_dirty =
                    dirty[at] || under_way.as_ref().is_some_and(|(_, _, since)| since[at]);
                assert!(is_dirty || *byte == before[at], "{at} is durable");
            }
        }
    }
}

#[test]
fn a_block_that_is_written_again_costs_nothing() {
    let all = Unflushed::new(SIZE).unwrap();
    for round in 0..10_000_u32 {
        let _room = all.reserve(4096).expect("there is room for ever");
        write(&all, 8192, &[round as u8; 4096]);
    }
    let mut disk = vec![0; 16384];
    apply(&all, &mut disk);
    assert!(disk[8192..12288] == [(9_999_u32 & 255) as u8; 4096]);
}

#[test]
fn the_bound_holds_and_a_flush_makes_room() {
    let all = Unflushed::new(SIZE).unwrap();
    let mut written = 0;
    let mut due = None;
    let data = vec![5; 100_000];
    while let Some(_room) = all.reserve(data.len()) {
        write(&all, written, &data);
        written += data.len() as u64;
        if due.is_none() && all.is_due() {
            due = Some(written);
        }
    }
    assert!((SIZE as u64 - 100_000..=SIZE as u64).contains(&written), "{written}");
    assert!((SIZE as u64 / 2..=SIZE as u64 / 2 + 100_000).contains(&due.unwrap()));
    all.flushed_to(all.mark());
    assert!(!all.any() && all.reserve(data.len()).is_some());
    assert!(!all.is_due());
}

#[test]
fn short_writes_cannot_break_the_bound() {
    let all = Unflushed::new(SIZE).unwrap();
    let mut extents = 0;
    while let Some(_room) = all.reserve(1) {
        write(&all, extents * 2, b"x");
        extents += 1;
    }
    assert!(extents as usize <= SIZE / BYTES_OF_AN_EXTENT, "{extents}");
    let mark = all.mark();
    all.flushed_to(mark);
    assert!(all.reserve(1).is_some());
}

#[test]
fn where_nothing_is_kept_a_loss_is_told_once() {
    let all = Unflushed::new(0).unwrap();
    write(&all, 0, b"lost");
    assert!(all.any() && all.take().is_none());
    assert!(all.any() && all.losses() == 1);
    assert!(all.tell() && !all.tell());
    all.flushed_to(all.mark());
    // Nothing was written since.
    assert!(all.take().is_none() && !all.tell());
    all.begin().acknowledged(0, Change::Durable(4));
    assert!(all.take().is_none() && !all.tell());
}

/// A server refuses what is no whole block.
#[test]
fn writes_are_parted_between_blocks_only() {
    let all = Unflushed::new(LEAST + 1_000_001).unwrap();
    let data = vec![7; 1 << 20];
    for n in 0..4 {
        write(&all, n << 20, &data);
    }
    let again = all.take().unwrap();
    assert!(again.changes().count() > 4, "none was parted");
    for (offset, change) in again.changes() {
        assert_eq!((offset % (64 << 10), change.length() % (64 << 10)), (0, 0));
    }
}
