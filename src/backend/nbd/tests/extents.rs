//! Seeks, and what they remember: against a peer that counts the questions and chooses when to
//! answer.

use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use smol::LocalExecutor;

use super::super::wire::{Command, Headers};
use super::super::{NbdBackend, NbdLane};
use super::ends::disk;
use super::on_lane;
use super::peer::{CONTEXT, Peer, Seen, connection};
use crate::backend::{Backend, Lane, Seek, Zero};

const MIB: u64 = 1 << 20;
const STATUS: u16 = Command::BlockStatus as u16;
/// Of the peer's export.
const SIZE: u64 = 1 << 30;

/// A disk of 4 MiB holes that end in 1 MiB of data, as its server tells of it for `asked` bytes
/// from `offset` on.
fn tell(peer: &mut Peer, request: &Seen, headers: Headers) {
    let end = (request.offset + request.length).min(SIZE);
    let mut extents = Vec::new();
    let mut at = request.offset;
    while at < end {
        let next = match at % (5 * MIB) {
            within if within < 4 * MIB => (at - within + 4 * MIB, true),
            within => (at - within + 5 * MIB, false),
        };
        extents.push((next.0.min(SIZE) - at, next.1));
        at = next.0;
    }
    tell_extents(peer, request.cookie, headers, &extents);
}

fn tell_extents(peer: &mut Peer, cookie: u64, headers: Headers, extents: &[(u64, bool)]) {
    let mut payload = CONTEXT.to_be_bytes().to_vec();
    if headers == Headers::Extended {
        payload.extend((extents.len() as u32).to_be_bytes());
    }
    for &(length, zero) in extents {
        let state = if zero { 3 } else { 0 };
        match headers {
            Headers::Extended => {
                payload.extend([length, state].map(u64::to_be_bytes).as_flattened())
            }
            _ => payload.extend([length as u32, state as u32].map(u32::to_be_bytes).as_flattened()),
        }
    }
    let kind = if headers == Headers::Extended { 6 } else { 5 };
    peer.chunk(cookie, true, kind, &payload);
}

/// Runs `work` on a disk whose peer follows `script`. The commands that the peer saw, if it tells
/// them.
fn with_peer(
    headers: Headers,
    script: impl FnOnce(&mut Peer, &Sender<Seen>) + Send + 'static,
    work: impl AsyncFnOnce(Rc<NbdLane>, Rc<LocalExecutor<'static>>, &NbdBackend),
) -> Vec<Seen> {
    let (seen, told): (_, Receiver<Seen>) = mpsc::channel();
    let (connection, peer): (_, JoinHandle<()>) =
        connection(headers, move |mut peer| script(&mut peer, &seen));
    let backend = disk(&[connection]);
    on_lane(&backend, async |lane, executor| work(lane, executor, &backend).await);
    backend.last_flush(Duration::ZERO).unwrap();
    peer.join().unwrap();
    told.iter().collect()
}

/// Answers everything at once.
fn obliging(headers: Headers) -> impl FnOnce(&mut Peer, &Sender<Seen>) + Send + 'static {
    move |peer, seen| {
        while let Some(request) = peer.request() {
            match request.command {
                STATUS => tell(peer, &request, headers),
                _ => peer.done(request.cookie),
            }
            seen.send(request).unwrap();
        }
    }
}

/// Nothing else is asked for.
fn last_flush(peer: &mut Peer) {
    let flush = peer.request().unwrap();
    assert_eq!(flush.command, Command::Flush as u16);
    peer.done(flush.cookie);
    assert_eq!(peer.request(), None);
}

fn statuses(seen: &[Seen]) -> Vec<(u64, u64)> {
    let statuses = seen.iter().filter(|request| request.command == STATUS);
    statuses.map(|request| (request.offset, request.length)).collect()
}

#[test]
fn a_walk_asks_once_for_each_reach_and_not_for_each_extent() {
    for headers in [Headers::Structured, Headers::Extended] {
        let seen = with_peer(headers, obliging(headers), async |lane, _, backend| {
            let mut at = 0;
            let mut found = 0;
            while let Ok(data) = lane.seek(at, Seek::Data).await {
                assert_eq!(data, found * 5 * MIB + 4 * MIB);
                at = lane.seek(data, Seek::Hole).await.unwrap();
                assert_eq!(at, (data + MIB).min(SIZE));
                found += 1;
            }
            assert_eq!(found, SIZE.div_ceil(5 * MIB) - 1);
            assert_eq!(backend.extents.asked(), 5);
        });
        // Each from where the one before ended: the last extent was told whole.
        let mut at = 0;
        for (n, (offset, length)) in statuses(&seen).into_iter().enumerate() {
            assert_eq!((offset, length), (at, ((64 * MIB) << n).min(SIZE - at)));
            let end = offset + length;
            at = match end % (5 * MIB) {
                0 => end,
                within if within <= 4 * MIB => end - within + 4 * MIB,
                within => end - within + 5 * MIB,
            };
        }
        assert_eq!(seen.len(), 5);
    }
}

#[test]
fn writes_of_our_own_are_asked_for_again_and_nothing_else() {
    let headers = Headers::Structured;
    let seen = with_peer(headers, obliging(headers), async |lane, _, backend| {
        let again = async |offset: u64, what: Seek| {
            let before = backend.extents.asked();
            lane.seek(offset, what).await.unwrap();
            backend.extents.asked() - before
        };
        assert_eq!(again(0, Seek::Hole).await, 1);
        assert_eq!(again(0, Seek::Data).await, 0);
        lane.write(20 * MIB + 5, &[1; 10], false).await.unwrap();
        assert_eq!(again(10 * MIB, Seek::Data).await, 0);
        assert_eq!(again(20 * MIB, Seek::Hole).await, 0);
        assert_eq!(again(20 * MIB + 5, Seek::Hole).await, 1);
        lane.write(20 * MIB, &[1; 10], true).await.unwrap();
        assert_eq!(again(20 * MIB, Seek::Hole).await, 1);
        lane.zero(30 * MIB, MIB, Zero::Punch).await.unwrap();
        assert_eq!(again(30 * MIB, Seek::Hole).await, 1);
        lane.flush().await.unwrap();
        assert_eq!(again(30 * MIB, Seek::Data).await, 0);
        backend.forget();
        assert_eq!(again(30 * MIB, Seek::Data).await, 1);
    });
    assert_eq!(statuses(&seen).len(), 5);
}

#[test]
fn a_write_that_fails_or_is_given_up_is_asked_for_again() {
    let headers = Headers::Structured;
    let script = move |peer: &mut Peer, _: &Sender<Seen>| {
        let mut write_fails = true;
        while let Some(request) = peer.request() {
            match request.command {
                STATUS => tell(peer, &request, headers),
                1 if write_fails => {
                    write_fails = false;
                    peer.error(request.cookie, true, 0x8001, 5, "");
                }
                // Never answered.
                1 => {}
                _ => peer.done(request.cookie),
            }
        }
    };
    with_peer(headers, script, async |lane, _, backend| {
        lane.seek(0, Seek::Hole).await.unwrap();
        lane.write(0, &[1; 10], false).await.unwrap_err();
        lane.seek(0, Seek::Hole).await.unwrap();
        assert_eq!(backend.extents.asked(), 2);
        let write = lane.write(0, &[1; 10], false);
        let during = async {
            smol::Timer::after(Duration::from_millis(20)).await;
            lane.seek(0, Seek::Hole).await.unwrap();
            lane.seek(0, Seek::Hole).await.unwrap();
            assert_eq!(backend.extents.asked(), 3);
            Ok(())
        };
        smol::future::or(write, during).await.unwrap();
        lane.seek(0, Seek::Hole).await.unwrap();
        assert_eq!(backend.extents.asked(), 4);
    });
}

#[test]
fn an_answer_that_raced_with_a_write_is_not_remembered() {
    let headers = Headers::Structured;
    let (written, wait) = mpsc::channel();
    let (tell_asked, asked) = smol::channel::bounded(1);
    let script = move |peer: &mut Peer, _: &Sender<Seen>| {
        let status = peer.request().unwrap();
        tell_asked.send_blocking(()).unwrap();
        let write = peer.request().unwrap();
        assert_eq!((status.command, write.command), (STATUS, 1));
        peer.done(write.cookie);
        // The write has ended before the answer goes, which tells of the time before it.
        wait.recv().unwrap();
        tell_extents(peer, status.cookie, headers, &[(64 << 20, true)]);
        let again = peer.request().unwrap();
        assert_eq!((again.command, again.offset), (STATUS, MIB));
        tell_extents(peer, again.cookie, headers, &[(4096, false), (4096, true)]);
        last_flush(peer);
    };
    with_peer(headers, script, async |lane, executor, _| {
        let seek = executor.spawn({
            let lane = lane.clone();
            async move { lane.seek(0, Seek::Hole).await.unwrap() }
        });
        asked.recv().await.unwrap();
        lane.write(MIB, &[1; 4096], false).await.unwrap();
        written.send(()).unwrap();
        assert_eq!(seek.await, 0);
        assert_eq!(lane.seek(0, Seek::Data).await.unwrap(), MIB);
        assert_eq!(lane.seek(MIB, Seek::Hole).await.unwrap(), MIB + 4096);
    });
}

#[test]
fn what_was_told_during_a_write_is_forgotten_at_its_end() {
    let headers = Headers::Structured;
    let (seeked, wait) = mpsc::channel();
    let (tell_begun, begun) = smol::channel::bounded(1);
    let script = move |peer: &mut Peer, _: &Sender<Seen>| {
        let write = peer.request().unwrap();
        tell_begun.send_blocking(()).unwrap();
        let status = peer.request().unwrap();
        assert_eq!((write.command, status.command), (1, STATUS));
        tell_extents(peer, status.cookie, headers, &[(64 << 20, true)]);
        wait.recv().unwrap();
        peer.done(write.cookie);
        let again = peer.request().unwrap();
        assert_eq!((again.command, again.offset), (STATUS, 0));
        tell_extents(peer, again.cookie, headers, &[(4096, false), (4096, true)]);
        last_flush(peer);
    };
    with_peer(headers, script, async |lane, executor, _| {
        let write = executor.spawn({
            let lane = lane.clone();
            async move { lane.write(0, &[1; 4096], false).await.unwrap() }
        });
        begun.recv().await.unwrap();
        assert_eq!(lane.seek(0, Seek::Hole).await.unwrap(), 0);
        seeked.send(()).unwrap();
        write.await;
        assert_eq!(lane.seek(0, Seek::Data).await.unwrap(), 0);
    });
}

#[test]
fn a_cut_answer_shortens_the_next_question() {
    let headers = Headers::Structured;
    // Extents of 4 KiB, to the end of what is asked for.
    let script = move |peer: &mut Peer, seen: &Sender<Seen>| {
        while let Some(request) = peer.request() {
            let count = request.length / 4096;
            let extents: Vec<_> = (0..count).map(|n| (4096, n % 2 == 0)).collect();
            tell_extents(peer, request.cookie, headers, &extents);
            seen.send(request).unwrap();
        }
    };
    let seen = with_peer(headers, script, async |lane, _, _| {
        let mut at = 0;
        while at < 32 * MIB {
            at = lane.seek(at, Seek::Data).await.unwrap();
            at = lane.seek(at, Seek::Hole).await.unwrap();
        }
    });
    let lengths: Vec<_> = statuses(&seen).iter().map(|(_, length)| length / MIB).collect();
    // A thousand extents are kept; half as much carries 512 of them, which is neither much nor
    // little.
    assert_eq!(lengths[..4], [64, 4, 2, 2], "{lengths:?}");
}

#[test]
fn reads_in_order_ask_where_they_come_upon_zeroes_and_nowhere_else() {
    let headers = Headers::Structured;
    // Data up to here, and a hole from here on.
    const DATA: u64 = 8 * MIB;
    let script = move |peer: &mut Peer, seen: &Sender<Seen>| {
        while let Some(request) = peer.request() {
            let Seen { cookie, offset, length, .. } = request;
            match request.command {
                STATUS => {
                    let data = DATA.saturating_sub(offset).min(length);
                    let extents = [(data, false), (length - data, true)];
                    let told = extents.iter().filter(|(length, _)| *length > 0);
                    tell_extents(peer, cookie, headers, &told.copied().collect::<Vec<_>>());
                }
                _ => {
                    let byte = u8::from(offset < DATA);
                    peer.data(cookie, true, offset, &vec![byte; length as usize]);
                }
            }
            seen.send(request).unwrap();
        }
    };
    let seen = with_peer(headers, script, async |lane, executor, _| {
        let mut buf = vec![9; MIB as usize];
        for at in (0..4 * DATA).step_by(buf.len()) {
            buf.fill(9);
            assert_eq!(lane.read_cached(at, &mut buf).await.unwrap(), buf.len());
            assert!(buf.iter().all(|byte| *byte == u8::from(at < DATA)), "{at}");
            // The question goes beside the reads: it is to be answered before the next.
            executor.try_tick();
            smol::future::yield_now().await;
        }
    });
    let asked = statuses(&seen);
    assert!(!asked.is_empty() && asked[0].0 >= DATA, "{asked:?}");
    let read = seen.iter().filter(|request| request.command == Command::Read as u16);
    let read: u64 = read.map(|request| request.length).sum();
    assert!((DATA..2 * DATA).contains(&read), "{read} bytes of {} were read", 4 * DATA);
}
