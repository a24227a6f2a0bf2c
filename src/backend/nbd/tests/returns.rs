//! A server that crashes, forgets, and comes back: random steps against a model of what may be
//! lost.
//!
//! `DISKFUSE_CASES` says how many cases there are; `scripts/crashes` asks for many.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use smol::LocalExecutor;

use super::super::{NbdBackend, NbdLane, Options, Uri};
use super::on_lane;
use super::servers::Directory;
use crate::backend::{Backend, Lane, Zero};
use forgetful::{End, Forgetful, Kind, Moment};

// The tests of the whole program use the rest.
#[allow(dead_code)]
#[path = "../../../../tests/common/forgetful.rs"]
mod forgetful;

const SECTOR: u64 = 512;
const SECTORS: u64 = 24;
const SIZE: u64 = SECTOR * SECTORS;

#[derive(Clone, Debug)]
enum Step {
    /// All at the same time; what overlaps an earlier one is left out.
    Together(Vec<Change>),
    Flush,
    Read,
    /// After so many requests more, something ends.
    Trap(u32, Moment, End),
}

#[derive(Clone, Copy, Debug)]
struct Change {
    offset: u64,
    length: u64,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Write,
    WriteDurably,
    Zero,
}

#[derive(Clone, Copy, Debug)]
struct Setting {
    several: bool,
    has_fua: bool,
    has_flush: bool,
    seed: u64,
}

fn change() -> impl Strategy<Value = Change> {
    let what =
        prop_oneof![5 => Just(What::Write), 1 => Just(What::WriteDurably), 1 => Just(What::Zero)];
    (0..SIZE, 1..4 * SECTOR, what).prop_map(|(offset, length, what)| Change {
        offset,
        length: length.min(SIZE - offset),
        what,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let moment =
        prop_oneof![Just(Moment::Received), Just(Moment::CarriedOut), Just(Moment::Answered)];
    let end = prop_oneof![3 => Just(End::Crash), 1 => Just(End::Connection)];
    prop_oneof![
        5 => prop::collection::vec(change(), 1..8).prop_map(Step::Together),
        1 => Just(Step::Flush),
        1 => Just(Step::Read),
        2 => (0..12_u32, moment, end).prop_map(|(after, moment, end)| Step::Trap(after, moment, end)),
    ]
}

fn setting() -> impl Strategy<Value = Setting> {
    (any::<bool>(), any::<bool>(), prop::bool::weighted(0.9), any::<u64>()).prop_map(
        |(several, has_fua, has_flush, seed)| Setting { several, has_fua, has_flush, seed },
    )
}

fn run_cases(test: impl Fn(Setting, &[Step]) -> Result<(), TestCaseError>) {
    let cases = std::env::var("DISKFUSE_CASES").map_or(Ok(150), |n| n.parse()).expect("a number");
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let steps = prop::collection::vec(step(), 1..25);
    let ran =
        TestRunner::new(config).run(&(setting(), steps), |(setting, steps)| test(setting, &steps));
    ran.unwrap_or_else(|failure| panic!("{failure}"));
}

/// The lane to a disk of zeroes whose server does what the steps say.
fn with_server(
    setting: Setting,
    unflushed: usize,
    work: impl AsyncFnOnce(
        &Forgetful,
        Rc<NbdLane>,
        Rc<LocalExecutor<'static>>,
    ) -> Result<(), TestCaseError>,
) -> Result<(Forgetful, Arc<NbdBackend>, Directory), TestCaseError> {
    let directory = Directory::new();
    let socket = directory.0.join("socket");
    let Setting { several, has_fua, has_flush, seed } = setting;
    let (size, sector) = (SIZE as usize, SECTOR as usize);
    let kind = Kind { size, sector, several, has_fua, has_flush };
    let server = Forgetful::start(&socket, kind, seed);
    let uri: Uri = format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap();
    let reconnect_timeout = Duration::from_secs(20);
    let options = Options { unflushed, reconnect_timeout, ..Options::default() };
    let backend = NbdBackend::connect(&uri, &options).unwrap();
    on_lane(&backend, async |lane, executor| work(&server, lane, executor).await)?;
    Ok((server, backend, directory))
}

async fn carry_out(
    lane: &NbdLane,
    Change { offset, length, what }: Change,
    value: u8,
) -> std::io::Result<()> {
    match what {
        What::Zero => lane.zero(offset, length, Zero::Keep).await,
        _ => {
            let data = vec![value; length as usize];
            lane.write(offset, &data, what == What::WriteDurably).await.map(drop)
        }
    }
}

/// Runs those that do not overlap at the same time; gives each with its value and its outcome.
async fn together(
    lane: &Rc<NbdLane>,
    executor: &Rc<LocalExecutor<'static>>,
    changes: &[Change],
    value: &mut u8,
) -> Vec<(Change, u8, std::io::Result<()>)> {
    let mut begun: Vec<(Change, u8, smol::Task<_>)> = Vec::new();
    for &change in changes {
        let end = change.offset + change.length;
        let overlaps =
            |other: &Change| change.offset < other.offset + other.length && other.offset < end;
        if begun.iter().any(|(other, ..)| overlaps(other)) {
            continue;
        }
        *value = value.wrapping_add(1).max(1);
        let (lane, value) = (lane.clone(), *value);
        let task = executor.spawn(async move { carry_out(&lane, change, value).await });
        begun.push((change, if change.what == What::Zero { 0 } else { value }, task));
    }
    let mut ended = Vec::new();
    for (change, value, task) in begun {
        ended.push((change, value, task.await));
    }
    ended
}

async fn read_all(lane: &NbdLane) -> Vec<u8> {
    let mut disk = vec![0xaa; SIZE as usize];
    lane.read(0, &mut disk).await.expect("the server comes back");
    disk
}

fn set(server: &Forgetful, step: &Step) {
    if let Step::Trap(after, moment, end) = *step {
        server.set_trap(after, moment, end, Duration::ZERO);
    }
}

/// With what is not durable kept, nobody notices anything, and all of it is durable in the end.
#[test]
fn what_was_acknowledged_is_there_for_ever() {
    run_cases(|setting, steps| {
        let setting = Setting { has_flush: true, ..setting };
        let mut model = vec![0; SIZE as usize];
        let (server, backend, _directory) =
            with_server(setting, 4 << 20, async |server, lane, executor| {
                let mut value = 0;
                for step in steps {
                    match step {
                        Step::Together(changes) => {
                            for (change, value, ended) in
                                together(&lane, &executor, changes, &mut value).await
                            {
                                prop_assert!(ended.is_ok(), "{change:?}: {ended:?}");
                                let range = change.offset as usize
                                    ..(change.offset + change.length) as usize;
                                model[range].fill(value);
                            }
                        }
                        Step::Flush => prop_assert!(lane.flush().await.is_ok()),
                        Step::Read => prop_assert!(read_all(&lane).await == model),
                        Step::Trap(..) => set(server, step),
                    }
                }
                prop_assert!(read_all(&lane).await == model);
                Ok(())
            })?;
        let flushed = backend.last_flush(Duration::from_secs(5));
        prop_assert!(flushed.is_ok(), "{flushed:?}");
        prop_assert!(server.durable() == model, "not durable: {:?}", server.counts());
        Ok(())
    });
}

/// With nothing kept, a flush that succeeds means that everything acknowledged is there; and a loss
/// is told once.
#[test]
fn where_nothing_is_kept_a_flush_tells_of_every_loss() {
    run_cases(|setting, steps| {
        let (_server, backend, _directory) =
            with_server(setting, 0, async |server, lane, executor| {
                let mut value = 0;
                // For each sector: what was written last, and what may be there after a crash.
                let mut latest = vec![0; SECTORS as usize];
                let mut possible: Vec<BTreeSet<u8>> = vec![BTreeSet::from([0]); SECTORS as usize];
                // The end of a connection may be the server's, as far as its client can know.
                let mut ends = 0;
                for step in steps.iter().chain([&Step::Flush]) {
                    match step {
                        Step::Together(changes) => {
                            let whole = changes.iter().map(|change| Change {
                                offset: change.offset - change.offset % SECTOR,
                                length: SECTOR,
                                what: change.what,
                            });
                            let whole: Vec<_> = whole.collect();
                            for (change, value, ended) in
                                together(&lane, &executor, &whole, &mut value).await
                            {
                                let sector = (change.offset / SECTOR) as usize;
                                possible[sector].insert(value);
                                match ended {
                                    Ok(()) => latest[sector] = value,
                                    Err(e) => {
                                        // Only what is to be durable can tell of a loss.
                                        prop_assert!(change.what == What::WriteDurably, "{e}");
                                        prop_assert!(server.counts().ends() > ends);
                                        let now = read_all(&lane).await[change.offset as usize];
                                        prop_assert!(possible[sector].contains(&now));
                                        latest[sector] = now;
                                    }
                                }
                            }
                        }
                        Step::Flush => {
                            // Without FLUSH nothing is ever certain: not even a moment later.
                            let before = server.counts().ends();
                            let now =
                                if setting.has_flush { None } else { Some(read_all(&lane).await) };
                            let flushed = lane.flush().await;
                            let has_ended = server.counts().ends() > ends;
                            let is_certain = setting.has_flush || server.counts().ends() == before;
                            let disk = match now {
                                Some(now) => now,
                                None => read_all(&lane).await,
                            };
                            for (sector, latest) in latest.iter_mut().enumerate() {
                                let bytes = &disk[sector * SECTOR as usize..][..SECTOR as usize];
                                let now = bytes[0];
                                prop_assert!(bytes.iter().all(|byte| *byte == now), "torn");
                                if flushed.is_ok() && is_certain {
                                    prop_assert_eq!(now, *latest, "sector {}", sector);
                                    if setting.has_flush {
                                        possible[sector] = BTreeSet::from([now]);
                                    }
                                } else {
                                    prop_assert!(possible[sector].contains(&now));
                                    *latest = now;
                                }
                            }
                            prop_assert!(flushed.is_ok() || has_ended, "{:?}", flushed);
                            if has_ended && flushed.is_err() {
                                ends = before;
                            }
                        }
                        Step::Read => drop(read_all(&lane).await),
                        Step::Trap(..) => set(server, step),
                    }
                }
                Ok(())
            })?;
        let _ = backend.last_flush(Duration::from_secs(5));
        Ok(())
    });
}
