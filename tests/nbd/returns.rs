//! Servers that are killed and started again, and connections that end, under clients who write.
//!
//! `DISKFUSE_KILLS` says how often a server dies in each test; `scripts/crashes` asks for many.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use libc::{EIO, O_DIRECT, SIGTERM};
use rustix::process::Signal;

use crate::common::export::{Export, Running, binary};
use crate::common::forgetful::{Forgetful, Kind};
use crate::common::nbd::{Address, Server, Starter};
use crate::common::{Aligned, SOON, assert_errno, eventually, noise};
use crate::tls::Certificates;
use crate::{Bench, open};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;
const WRITERS: usize = 4;
const SIZE: usize = WRITERS * BLOCKS * BLOCK;

fn kills() -> usize {
    std::env::var("DISKFUSE_KILLS").map_or(4, |n| n.parse().expect("a number"))
}

/// A small random number generator.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

/// What is promised.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Promise {
    /// Every write that was acknowledged is there.
    Acknowledged,
    /// Every write whose fsync has succeeded; the loss of others is told by an fsync.
    Synced,
}

/// Has blocks of its own, and knows what must be in them.
struct Writer {
    file: File,
    first: usize,
    random: Random,
    promise: Promise,
    number: u64,
    /// By block: the number of the last write ...
    latest: Vec<u64>,
    /// ... and what else may be there after a loss.
    possible: Vec<BTreeSet<u64>>,
    writes: u64,
    told: u64,
}

fn fill(buf: &mut [u8], block: usize, number: u64) {
    for (at, word) in buf.chunks_exact_mut(16).enumerate() {
        word[..8].copy_from_slice(&number.to_le_bytes());
        word[8..].copy_from_slice(&((block << 16 | at) as u64).to_le_bytes());
    }
}

impl Writer {
    fn new(path: &Path, flags: i32, which: usize, promise: Promise) -> Writer {
        Writer {
            file: open(path, flags),
            first: which * BLOCKS,
            random: Random(which as u64 * 77 + 5),
            promise,
            number: 0,
            latest: vec![0; BLOCKS],
            possible: vec![BTreeSet::from([0]); BLOCKS],
            writes: 0,
            told: 0,
        }
    }

    /// The number of the write that a block holds: all of it, and of no other block.
    fn read(&self, block: usize) -> u64 {
        let mut buf = Aligned::new(BLOCK);
        let at = ((self.first + block) * BLOCK) as u64;
        self.file.read_exact_at(&mut buf, at).expect("the server comes back");
        let number = u64::from_le_bytes(buf[..8].try_into().unwrap());
        let mut expected = vec![0; BLOCK];
        if number > 0 {
            fill(&mut expected, self.first + block, number);
        }
        assert!(buf[..] == expected[..], "block {} is torn", self.first + block);
        number
    }

    fn step(&mut self) {
        let block = self.random.below(BLOCKS);
        match self.random.below(16) {
            0 => self.sync(),
            1 | 2 if self.promise == Promise::Acknowledged => {
                assert_eq!(self.read(block), self.latest[block], "block {}", self.first + block);
            }
            _ => {
                let blocks = (1 + self.random.below(8)).min(BLOCKS - block);
                let mut data = Aligned::new(blocks * BLOCK);
                self.number += 1;
                for (n, part) in data.chunks_exact_mut(BLOCK).enumerate() {
                    fill(part, self.first + block + n, self.number);
                    self.possible[block + n].insert(self.number);
                }
                let at = ((self.first + block) * BLOCK) as u64;
                self.file.write_all_at(&data, at).expect("the server comes back");
                self.latest[block..block + blocks].fill(self.number);
                self.writes += 1;
            }
        }
    }

    fn sync(&mut self) {
        let synced = self.file.sync_all();
        if self.promise == Promise::Acknowledged {
            return synced.expect("nothing is lost");
        }
        let is_told = synced.is_err();
        if is_told {
            assert_errno(synced, EIO);
            self.told += 1;
        }
        for block in 0..BLOCKS {
            let now = self.read(block);
            if is_told {
                assert!(self.possible[block].contains(&now), "block {}", self.first + block);
                self.latest[block] = now;
            } else {
                assert_eq!(now, self.latest[block], "block {}, after an fsync", self.first + block);
                self.possible[block] = BTreeSet::from([now]);
            }
        }
    }
}

/// Writers go on until `interrupt` has ended; then all they know must be true. How often a loss was
/// told.
fn write_beside(export: &Export, promise: Promise, interrupt: impl FnOnce(&AtomicU64)) -> u64 {
    let (over, steps) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|which| {
                // Only what is direct is seen by the server at once; the last one writes by the
                // page cache, whatever there is.
                let flags =
                    if which == 0 && promise == Promise::Acknowledged { 0 } else { O_DIRECT };
                let mut writer = Writer::new(export.file(), flags, which, promise);
                let (over, steps) = (&over, &steps);
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        writer.step();
                        steps.fetch_add(1, Ordering::Relaxed);
                    }
                    writer.sync();
                    for block in 0..BLOCKS {
                        assert_eq!(writer.read(block), writer.latest[block]);
                    }
                    (writer.writes, writer.told)
                })
            })
            .collect();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| interrupt(&steps)));
        over.store(true, Ordering::Relaxed);
        let ends: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        ended.unwrap();
        let (writes, told) = ends.iter().fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        println!("{writes} writes, all where they belong; {told} times an fsync told of a loss");
        told
    })
}

/// Kills the server and starts it again, at random moments.
fn kill_and_start(server: &mut Server, steps: &AtomicU64, mut start: impl FnMut() -> Server) {
    let mut random = Random(std::process::id().into());
    for _ in 0..kills() {
        let before = steps.load(Ordering::Relaxed);
        eventually("some steps", || steps.load(Ordering::Relaxed) > before + 20);
        std::thread::sleep(Duration::from_millis(random.below(200) as u64));
        server.kill();
        std::thread::sleep(Duration::from_millis(random.below(200) as u64));
        *server = start();
    }
}

fn killed_and_started(bench: &Bench, address: &Address, options: &[&str], words: &[&str]) {
    killed_and_started_at(bench, address, &address.uri(""), options, words);
}

fn killed_and_started_at(
    bench: &Bench,
    address: &Address,
    uri: &str,
    options: &[&str],
    words: &[&str],
) {
    let disk = bench.disk(&vec![0; SIZE]);
    let words = [words, &["file", disk.to_str().unwrap()]].concat();
    let mut starter = Starter::new(&bench.sandbox);
    let mut start = || starter.nbdkit(address, &words);
    let mut server = start();
    let mut export = bench.try_export(uri, options).unwrap();
    write_beside(&export, Promise::Acknowledged, |steps| {
        kill_and_start(&mut server, steps, &mut start);
    });
    let shown = fs::read(export.file()).unwrap();
    export.stop(SIGTERM).assert(0, &["the server is back"]);
    assert!(fs::read(&disk).unwrap() == shown);
}

pub fn killed_server_comes_back_on_a_unix_socket(bench: &Bench) {
    killed_and_started(bench, &Address::unix(&bench.sandbox), &[], &[]);
}

pub fn killed_server_comes_back_over_tcp(bench: &Bench) {
    killed_and_started(bench, &Address::tcp(), &["--cache=writeback"], &[]);
}

pub fn killed_server_comes_back_to_one_connection(bench: &Bench) {
    killed_and_started(bench, &Address::unix(&bench.sandbox), &["--connections=1"], &[]);
}

/// nbdkit, asked to end, goes on until its clients have left, and answers them with ESHUTDOWN.
pub fn server_that_shuts_down_comes_back(bench: &Bench) {
    let address = Address::unix(&bench.sandbox);
    let disk = bench.disk(&vec![0; SIZE]);
    let words = ["file", disk.to_str().unwrap()];
    let mut starter = Starter::new(&bench.sandbox);
    let mut server = starter.nbdkit(&address, &words);
    let mut export = bench.export(&address.uri(""));
    write_beside(&export, Promise::Acknowledged, |steps| {
        for _ in 0..kills() {
            let before = steps.load(Ordering::Relaxed);
            eventually("steps", || steps.load(Ordering::Relaxed) > before + 50);
            server.end_by(Signal::TERM);
            server = starter.nbdkit(&address, &words);
        }
    });
    let shown = fs::read(export.file()).unwrap();
    export.stop(SIGTERM).assert(0, &["is shutting down", "the server is back"]);
    assert!(fs::read(&disk).unwrap() == shown);
}

pub fn killed_server_comes_back_inside_tls(bench: &Bench) {
    let address = Address::tcp();
    let Address::Tcp(host) = &address else { unreachable!() };
    let certificates = Certificates::new(&host.to_string());
    let server = certificates.folder("server", "ca", Some("server"));
    let client = certificates.folder("client", "ca", None);
    let words = ["--tls=require", &format!("--tls-certificates={server}")];
    let uri = format!("nbds://{host}/?tls-certificates={client}");
    killed_and_started_at(bench, &address, &uri, &[], &words);
}

fn forgetful(bench: &Bench, several: bool) -> (Forgetful, String) {
    let address = Address::unix(&bench.sandbox);
    let Address::Unix(socket) = &address else { unreachable!() };
    let kind = Kind { size: SIZE, sector: BLOCK, several, has_fua: several, has_flush: true };
    (Forgetful::start(socket, kind, std::process::id().into()), address.uri(""))
}

/// The server sets itself traps until it has crashed so often.
fn crash(server: &Forgetful) {
    server.set_mortal(true, Duration::from_millis(30));
    let crashes = kills() as u32;
    let begun = std::time::Instant::now();
    while server.counts().crashes < crashes {
        assert!(begun.elapsed() < Duration::from_secs(20 + 5 * u64::from(crashes)), "no crashes");
        std::thread::sleep(Duration::from_millis(5));
    }
    server.set_mortal(false, Duration::ZERO);
    println!("{:?}", server.counts());
}

fn forgotten_writes_are_made_again(bench: &Bench, several: bool) {
    let (server, uri) = forgetful(bench, several);
    let mut export = bench.export(&uri);
    write_beside(&export, Promise::Acknowledged, |_| crash(&server));
    let shown = fs::read(export.file()).unwrap();
    export.stop(SIGTERM).assert(0, &["written again"]);
    assert!(server.counts().forgotten > 0, "it has forgotten nothing");
    assert!(server.durable() == shown);
}

pub fn forgotten_writes_are_made_again_over_several_connections(bench: &Bench) {
    forgotten_writes_are_made_again(bench, true);
}

pub fn forgotten_writes_are_made_again_over_one_connection(bench: &Bench) {
    forgotten_writes_are_made_again(bench, false);
}

/// With nothing kept the loss is told: to every open file, and by the exit status.
pub fn forgotten_writes_are_told_of_where_none_are_kept(bench: &Bench) {
    let (server, uri) = forgetful(bench, true);
    let mut export = bench.try_export(&uri, &["--unflushed=0", "--cache=none"]).unwrap();
    // A crash may find that all is durable.
    let mut rounds = 0..10;
    let is_told = |_| write_beside(&export, Promise::Synced, |_| crash(&server)) > 0;
    assert!(rounds.any(is_told), "nobody was told");
    export.stop(SIGTERM).assert(1, &["writes may be lost"]);
}

/// One connection of several ends again and again: no client notices.
pub fn connections_that_end_one_by_one_cost_nothing(bench: &Bench) {
    let (server, uri) = forgetful(bench, true);
    let mut export = bench.try_export(&uri, &["--connections=4", "--unflushed=0"]).unwrap();
    write_beside(&export, Promise::Synced, |steps| {
        for _ in 0..4 * kills() {
            let before = steps.load(Ordering::Relaxed);
            eventually("steps", || steps.load(Ordering::Relaxed) > before + 100);
            server.end_one_of_several();
        }
    });
    // By /dev/fuse one thread may have served all.
    let counts = server.counts();
    assert!(counts.ended > 0 || counts.accepted == 1, "{counts:?}");
    export.stop(SIGTERM).assert(0, &[]);
}

/// A server that is gone for longer than requests wait: they fail, and succeed again when it is
/// back.
pub fn requests_fail_after_the_limit_and_succeed_when_the_server_is_back(bench: &Bench) {
    let disk = bench.disk(&noise(3, SIZE));
    let address = Address::unix(&bench.sandbox);
    let Address::Unix(socket) = &address else { unreachable!() };
    let words = ["file", disk.to_str().unwrap()];
    let mut server = Server::nbdkit(&address, words);
    let options = ["--reconnect-timeout=1", "--cache=none"];
    let mut export = bench.try_export(&address.uri(""), &options).unwrap();
    let file = open(export.file(), 0);
    file.write_all_at(b"acknowledged", 100).unwrap();
    server.kill();
    let begun = std::time::Instant::now();
    assert_errno(file.read_at(&mut [0; 8], 0), EIO);
    assert!((900..2500).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    let begun = std::time::Instant::now();
    assert_errno(file.write_at(b"refused", 0), EIO);
    assert!(begun.elapsed().as_millis() < 500, "{:?}", begun.elapsed());
    fs::remove_file(socket).unwrap();
    let _server = Server::nbdkit(&address, words);
    let mut back = [0; 12];
    eventually("the server", || file.read_exact_at(&mut back, 100).is_ok());
    assert_eq!(&back, b"acknowledged");
    file.sync_all().unwrap();
    drop(file);
    export.stop(SIGTERM).assert(0, &["requests fail until the server is back", "is back after"]);
}

/// Gone for good, with acknowledged writes that are not durable: the end comes soon, and tells of
/// it.
pub fn server_that_is_gone_for_good_does_not_hold_up_the_end(bench: &Bench) {
    let disk = bench.disk(&vec![0; SIZE]);
    let (mut server, uri) = bench.nbdkit(&["file", disk.to_str().unwrap()]);
    let mut export = bench.try_export(&uri, &["--cache=none"]).unwrap();
    let file = open(export.file(), 0);
    file.write_all_at(b"acknowledged", 100).unwrap();
    server.kill();
    let begun = std::time::Instant::now();
    let reader = std::thread::spawn(move || file.read_at(&mut [0; 8], 0));
    std::thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished(), "it did not wait");
    let ended = export.stop(SIGTERM);
    // A second, unless a child of another trial has inherited the file and waits for a server that
    // is stopped there.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_errno(reader.join().unwrap(), EIO);
    ended.assert(1, &["could not be made durable"]);
}

/// Another disk in the place of the old one is not written to.
pub fn another_disk_is_refused(bench: &Bench) {
    let disk = bench.disk(&vec![0; SIZE]);
    let address = Address::unix(&bench.sandbox);
    let words = ["file", disk.to_str().unwrap()];
    let mut starter = Starter::new(&bench.sandbox);
    let mut server = starter.nbdkit(&address, &words);
    let mut export = bench.try_export(&address.uri(""), &["--cache=none"]).unwrap();
    let file = open(export.file(), 0);
    file.write_all_at(b"acknowledged", 100).unwrap();
    server.kill();
    let other = vec![0; SIZE / 2];
    fs::write(&disk, &other).unwrap();
    let _server = starter.nbdkit(&address, &words);
    assert_errno(file.read_at(&mut [0; 8], 0), EIO);
    assert_errno(file.sync_all(), EIO);
    drop(file);
    let difference = format!("it had {SIZE} bytes and has {}", SIZE / 2);
    export.stop(SIGTERM).assert(1, &["another disk is there", &difference]);
    assert!(fs::read(&disk).unwrap() == other);
}

/// A server that stops for a while is not given up, whatever is on its way to it.
pub fn server_that_stops_for_a_while_is_waited_for(bench: &Bench) {
    let disk = bench.disk(&vec![0; SIZE]);
    let address = Address::tcp();
    let server = Server::qemu_nbd(&address, &disk);
    let mut export = bench.export(&address.uri(""));
    let seconds = std::env::var("DISKFUSE_STOP").map_or(2, |n| n.parse().expect("seconds"));
    write_beside(&export, Promise::Acknowledged, |_| {
        std::thread::sleep(Duration::from_millis(300));
        let stopped = server.pause();
        std::thread::sleep(Duration::from_secs(seconds));
        drop(stopped);
        std::thread::sleep(Duration::from_millis(300));
    });
    let ended = export.stop(SIGTERM);
    ended.assert(0, &[]);
    assert!(!ended.log.contains("is lost"), "{}", ended.log);
}

/// The start waits for a server that is not there yet.
pub fn start_waits_for_the_server(bench: &Bench) {
    let disk = bench.disk(&noise(1, SIZE));
    let address = Address::unix(&bench.sandbox);
    let uri = address.uri("");
    let start = std::time::Instant::now();
    let refused = bench.try_export(&uri, &["--open-timeout=1"]).err().expect("nobody is there");
    refused.assert(3, &["cannot connect"]);
    // A child of another trial may have had to wait for a server that is stopped there.
    assert!((700..20_000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    let file = bench.sandbox.join("disk");
    let mut command = Command::new(binary());
    command.args([bench.transport.option(), "--open-timeout=60", &uri]).arg(&file);
    let mut running = Running::start(command.env("RUST_LOG", "info"));
    eventually("a second attempt", || running.log().contains("trying again"));
    let _server = Server::nbdkit(&address, ["file", disk.to_str().unwrap()]);
    eventually("the mount", || running.log().contains(" is at "));
    assert!(fs::read(&file).unwrap() == fs::read(&disk).unwrap());
    running.kill(SIGTERM);
    running.ended_within(SOON).assert(0, &[]);
}
