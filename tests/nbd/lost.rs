//! A server that is gone from one moment to the next.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{EIO, O_DIRECT, O_RDONLY, SIGTERM};

use crate::common::export::Export;
use crate::common::nbd::{Address, Server, Starter};
use crate::common::{Aligned, SOON, assert_errno, eventually, noise, program, succeed};
use crate::{Bench, SIZE, open};

const CLIENTS: usize = 8;
const BLOCK: usize = 4096;

/// Clients read and write without end, until their first error, which has to be EIO. In the middle
/// of it the server is killed.
fn killed_under_load(export: &Export, server: &mut Server) {
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let file = open(export.file(), O_DIRECT);
                let done = &done;
                scope.spawn(move || {
                    let mut buf = Aligned::of(&noise(client as u64, BLOCK));
                    let begun = std::time::Instant::now();
                    for round in 0.. {
                        assert!(begun.elapsed() < SOON, "no error, {round} rounds");
                        let at = ((client * 64 + round % 64) * BLOCK) as u64;
                        let result = match client % 2 {
                            0 => file.write_at(&buf, at),
                            _ => file.read_at(&mut buf, at),
                        };
                        if result.is_err() {
                            assert_errno(result, EIO);
                            break;
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    // And so are all others.
                    assert_errno(file.read_at(&mut buf, 0), EIO);
                    assert_errno(file.write_at(&buf, 0), EIO);
                    assert_errno(file.sync_all(), EIO);
                })
            })
            .collect();
        eventually("requests", || done.load(Ordering::Relaxed) > 200);
        server.kill();
        for client in clients {
            client.join().unwrap();
        }
    });
    assert!(export.is_mounted(), "it is served on, if only with errors");
}

pub fn killed_server_fails_all_requests(bench: &Bench) {
    let disk = bench.disk(&vec![0; SIZE]);
    let (mut server, uri) = bench.nbdkit(&["file", disk.to_str().unwrap()]);
    let mut export = bench.try_export(&uri, &["--reconnect-timeout=0"]).unwrap();
    killed_under_load(&export, &mut server);
    export.stop(SIGTERM).assert(1, &["flush", "may be lost"]);
}

pub fn killed_server_over_tcp_fails_all_requests(bench: &Bench) {
    let disk = bench.disk(&vec![0; SIZE]);
    let address = Address::tcp();
    let mut server = Server::qemu_nbd(&address, &disk);
    let mut export = bench.try_export(&address.uri(""), &["--reconnect-timeout=0"]).unwrap();
    killed_under_load(&export, &mut server);
    export.stop(SIGTERM).assert(1, &["flush", "may be lost"]);
}

/// What was written has been flushed: the loss of the server loses nothing.
pub fn killed_server_of_a_flushed_disk_costs_nothing(bench: &Bench) {
    let disk = bench.disk(&vec![0; SIZE]);
    let (mut server, uri) = bench.nbdkit(&["file", disk.to_str().unwrap()]);
    let mut export = bench.try_export(&uri, &["--reconnect-timeout=0"]).unwrap();
    let data = noise(5, SIZE / 2);
    // By another process: a child that another trial forks would inherit the file, and close it
    // when the server is gone.
    let copy = disk.with_file_name("data");
    fs::write(&copy, &data).unwrap();
    let dd = ["bs=1M", "seek=77", "oflag=seek_bytes", "conv=notrunc", "status=none"];
    let (from, to) = (format!("if={}", copy.display()), format!("of={}", export.file().display()));
    succeed(program("dd", dd).args([from, to]));
    server.kill();
    let file = fs::File::options().read(true).open(export.file()).unwrap();
    let direct = rustix::fs::OFlags::from_bits_retain(O_RDONLY as u32) | rustix::fs::OFlags::DIRECT;
    rustix::fs::fcntl_setfl(&file, direct).unwrap();
    assert_errno(file.read_at(&mut Aligned::new(BLOCK), 0), EIO);
    drop(file);
    export.stop(SIGTERM).assert(0, &[]);
    assert!(fs::read(&disk).unwrap()[77..][..data.len()] == data);
}

/// A file that was never written, and one of which every write was durable: neither fsync nor close
/// needs the server, nor does the end.
pub fn loss_with_nothing_unflushed_costs_nothing(bench: &Bench) {
    const CLIENT: &str = "
import mmap, os, sys
untouched = os.open(sys.argv[1], os.O_RDWR)
durable = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
assert os.pwritev(durable, [mmap.mmap(-1, 4096)], 0) == 4096
print(flush=True)
sys.stdin.read()
for file in untouched, durable:
    os.fsync(file)
    os.close(file)
";
    // With FUA, and with a FLUSH behind the write instead.
    let filters: [&[&str]; 2] = [&[], &["--filter=fua"]];
    let gone: &[&str] = &["--reconnect-timeout=0"];
    for (filter, options) in filters.into_iter().flat_map(|filter| [(filter, gone), (filter, &[])])
    {
        let (mut server, uri) = bench.nbdkit(&[filter, &["memory", "4M"]].concat());
        let mut export = bench.try_export(&uri, options).unwrap();
        // Another process: a child that another trial forks would inherit the files.
        let mut client = program("python3", ["-c", CLIENT]);
        client.arg(export.file()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = client.spawn().unwrap();
        client.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        server.kill();
        drop(client.stdin.take());
        assert!(client.wait().unwrap().success(), "{filter:?} {options:?}");
        export.stop(SIGTERM).assert(0, &[]);
        fs::remove_file(bench.sandbox.join("nbd.socket")).unwrap();
    }
}

/// With `--on-loss exit` the export ends where it would go on with errors only: for a supervisor.
pub fn lost_server_ends_the_export_if_that_is_wished(bench: &Bench) {
    let disk = bench.disk(&vec![0; SIZE]);
    let address = Address::unix(&bench.sandbox);
    let words = ["file", disk.to_str().unwrap()];
    let mut starter = Starter::new(&bench.sandbox);
    let exits = |options: &[&'static str]| [&["--on-loss=exit", "--cache=none"], options].concat();

    // Somebody has the file open, and what he has written is not durable.
    let mut server = starter.nbdkit(&address, &words);
    let options = exits(&["--reconnect-timeout=1"]);
    let mut export = bench.try_export(&address.uri(""), &options).unwrap();
    let client = open(export.file(), 0);
    client.write_all_at(b"acknowledged", 100).unwrap();
    server.kill();
    assert!(client.read_at(&mut [0; 8], 0).is_err());
    let ended = export.wait();
    drop(client);
    let reasons = ["lost for 1 s", "--on-loss exit", "cannot connect", "writes may be lost"];
    ended.assert(1, &reasons);
    assert_eq!(ended.log.matches("--on-loss exit").count(), 1, "{}", ended.log);
    assert!(!ended.log.contains("requests fail"), "{}", ended.log);
    // Each line says of which export it is, and none is a terminal's.
    let uri = address.uri("");
    assert!(ended.warnings().iter().all(|line| line.contains(&uri)), "{}", ended.log);
    assert!(!ended.log.contains('\x1b'), "{}", ended.log);

    // Another disk comes back, and nothing is lost.
    let mut server = starter.nbdkit(&address, &words);
    let mut export = bench.try_export(&address.uri(""), &exits(&[])).unwrap();
    server.kill();
    fs::write(&disk, vec![0; SIZE / 2]).unwrap();
    let mut server = starter.nbdkit(&address, &words);
    let ended = export.wait();
    ended.assert(1, &["another disk is there", "--on-loss exit", "it had"]);
    assert!(!ended.log.contains("may be lost"), "{}", ended.log);

    // A command is asked to end first.
    let command =
        "trap 'printf tidied > tidied; exit 9' TERM; : > ready; while :; do sleep 0.05; done";
    let command = format!("cd {}; {command}", bench.sandbox.path().display());
    let options = exits(&["--reconnect-timeout=0"]);
    let options: Vec<&str> = options.into_iter().chain(["--run", &command]).collect();
    let mut export = bench.try_export(&address.uri(""), &options).unwrap();
    eventually("the command", || bench.sandbox.join("ready").exists());
    server.kill();
    export.wait().assert(1, &["the connection is lost", "--on-loss exit"]);
    assert_eq!(fs::read(bench.sandbox.join("tidied")).unwrap(), b"tidied");
}

/// A server that comes back in time is not lost.
pub fn server_that_comes_back_in_time_does_not_end_the_export(bench: &Bench) {
    let disk = bench.disk(&noise(8, SIZE));
    let address = Address::unix(&bench.sandbox);
    let words = ["file", disk.to_str().unwrap()];
    let mut starter = Starter::new(&bench.sandbox);
    let mut server = starter.nbdkit(&address, &words);
    let mut export = bench.try_export(&address.uri(""), &["--on-loss=exit"]).unwrap();
    server.kill();
    let _server = starter.nbdkit(&address, &words);
    assert!(fs::read(export.file()).unwrap() == fs::read(&disk).unwrap());
    export.stop(SIGTERM).assert(0, &["is back after"]);
}
