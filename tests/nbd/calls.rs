//! What requests cost: system calls on the NBD socket, and turns on a CPU. Counts, not times.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStderr, Command, Stdio};

use libc::O_DIRECT;
use rustix::process::{Signal, kill_process};

use crate::common::export::{Export, pid};
use crate::common::nbd::{Address, Server};
use crate::common::{Aligned, Random, eventually, noise, program};
use crate::{Bench, SIZE, open};

/// strace on all threads of an export; killed when dropped.
struct Strace {
    child: Child,
    /// Open as long as it writes.
    _stderr: BufReader<ChildStderr>,
    trace: std::path::PathBuf,
}

/// Calls on the socket of the connection.
#[derive(Debug, Default)]
struct Calls {
    sends: usize,
    /// With something received
    receives: usize,
    /// With nothing there
    empty: usize,
}

impl Strace {
    fn attach(bench: &Bench, export: &Export) -> Strace {
        let trace = bench.sandbox.join("trace");
        let mut child = Command::new("strace")
            .args(["-f", "-q", "-y", "-s", "0", "-e"])
            .arg("trace=sendmsg,sendto,recvmsg,recvfrom,read,readv,write,writev")
            .arg("-o")
            .arg(&trace)
            .args(["-p", &export.pid().to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let strace = Strace { child, _stderr: stderr, trace };
        // It has them all once each says who traces it.
        let tasks = format!("/proc/{}/task", export.pid());
        let tracer = format!("TracerPid:\t{}\n", strace.child.id());
        eventually("strace", || {
            let statuses = std::fs::read_dir(&tasks).unwrap().map(|task| {
                std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default()
            });
            statuses.into_iter().all(|status| status.contains(&tracer))
        });
        strace
    }

    /// Detaches it, and counts.
    fn finish(mut self) -> Calls {
        kill_process(pid(self.child.id()), Signal::INT).unwrap();
        eventually("the end of strace", || matches!(self.child.try_wait(), Ok(Some(_))));
        let mut calls = Calls::default();
        for line in BufReader::new(File::open(&self.trace).unwrap()).lines() {
            let line = line.unwrap();
            // Of a call that was interrupted in the trace by others there are two lines.
            let resumed = line.contains("resumed>");
            if !resumed
                && !line.contains("<socket:")
                && !line.contains("<UNIX")
                && !line.contains("<TCP")
            {
                continue;
            }
            // The number of the thread comes first.
            let Some((_, call)) = line.split_once(' ') else { continue };
            let name = call.trim_start().trim_start_matches("<... ");
            let begun = line.contains("<unfinished");
            if name.starts_with("sendmsg") || name.starts_with("sendto") {
                calls.sends += usize::from(!begun);
            } else if name.starts_with("recvmsg") || name.starts_with("recvfrom") {
                if line.contains("EAGAIN") {
                    calls.empty += 1;
                } else {
                    calls.receives += usize::from(!begun);
                }
            } else if !resumed {
                panic!("another call on the socket: {line}");
            }
        }
        calls
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn export(bench: &Bench) -> (Server, Export) {
    let disk = bench.disk(&noise(1, SIZE));
    // Over TCP: nbdkit sends an answer's header and its payload with two calls, and what says that
    // the first has more to come (MSG_MORE) counts there only. On a Unix socket the header alone
    // can wake the receiver, which then has to receive twice.
    let address = Address::tcp();
    let server = Server::nbdkit(&address, ["file", disk.to_str().unwrap()]);
    (server, bench.export(&address.uri("")))
}

pub fn one_read_is_one_send_and_one_receive(bench: &Bench) {
    const READS: usize = 400;
    let (_server, export) = export(bench);
    let file = open(export.file(), O_DIRECT);
    let mut buf = Aligned::new(4096);
    let mut random = Random(1);
    file.read_exact_at(&mut buf, 0).unwrap();
    let strace = Strace::attach(bench, &export);
    for _ in 0..READS {
        let at = random.below((SIZE / 4096) as u64) * 4096;
        file.read_exact_at(&mut buf, at).unwrap();
    }
    let calls = strace.finish();
    println!("{READS} reads: {calls:?}");
    let about = READS..=READS + READS / 20;
    assert!(about.contains(&calls.sends), "{calls:?}");
    assert!(about.contains(&(calls.receives + calls.empty)), "{calls:?}");
}

pub fn many_reads_share_their_sends(bench: &Bench) {
    const READS: usize = 6400;
    let (_server, export) = export(bench);
    let strace = Strace::attach(bench, &export);
    let fio = ["--name=reads", "--rw=randread", "--bs=4k", "--iodepth=64", "--ioengine=libaio"];
    let fio = program("fio", fio)
        .args(["--iodepth_batch_submit=16", "--iodepth_batch_complete_min=16"])
        .args(["--direct=1", "--thread", "--norandommap", "--allow_file_create=0", "--size=4M"])
        .arg(format!("--io_size={}", READS * 4096))
        .arg(format!("--filename={}", export.file().display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&fio.stdout);
    assert!(said.contains(&format!("total={READS},0,0,0")), "{said}");
    let calls = strace.finish();
    println!("{READS} reads: {calls:?}");
    assert!(calls.sends > 0 && calls.sends < READS / 2, "{calls:?}");
}

/// The policies of an export's serving threads (`sched(7)`).
fn policies(export: &Export) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", export.pid())).unwrap();
    let stats =
        tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    // The name, in brackets, may have spaces in it.
    let split = stats.map(|stat| {
        let (begin, rest) = stat.rsplit_once(") ").unwrap();
        let policy = rest.split(' ').nth(41 - 3).unwrap().parse().unwrap();
        (begin.split_once('(').unwrap().1.to_owned(), policy)
    });
    split
        .filter(|(name, _)| name.starts_with("ring-") || name.starts_with("fuse-"))
        .map(|(_, policy)| policy)
        .collect()
}

/// A client that goes on asking is not interrupted at each request. Where nobody else has to answer
/// first, serving threads are like all others.
pub fn its_threads_preempt_no_client(bench: &Bench) {
    let (_server, uri) = bench.nbdkit(&["memory", "1M"]);
    for (source, expected) in [(uri.as_str(), libc::SCHED_BATCH), ("mem:1M", libc::SCHED_OTHER)] {
        let export = bench.export(source);
        open(export.file(), O_DIRECT);
        eventually("its serving threads", || {
            let policies = policies(&export);
            !policies.is_empty() && policies.iter().all(|policy| *policy == expected)
        });
    }
}
