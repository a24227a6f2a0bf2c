//! A client that knows which of its writes were acknowledged.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::{Aligned, Random, eventually};

const BLOCK: usize = 4096;

/// What became of a block: the number of the last write that was acknowledged, and of the last that
/// was tried.
#[derive(Clone, Copy, Default)]
struct Block {
    acknowledged: u64,
    tried: u64,
}

/// Threads that write numbered blocks with O_DIRECT until they are stopped, or their file fails.
pub struct Writers {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<Block>>>,
}

impl Writers {
    /// Each of `threads` has as many blocks of its own at the front of the file.
    pub fn start(path: &Path, threads: usize, blocks: usize) -> Writers {
        let stop = Arc::<AtomicBool>::default();
        let acknowledged = Arc::<AtomicU64>::default();
        let writer = |thread: usize| {
            let mut options = File::options();
            let file = options.write(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
            let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
            std::thread::spawn(move || write(&file, thread * blocks, blocks, &stop, &acknowledged))
        };
        let threads = (0..threads).map(writer).collect();
        Writers { stop, acknowledged, threads }
    }

    /// Waits until so many more writes are acknowledged.
    pub fn wait_for(&self, writes: u64) {
        let enough = self.acknowledged.load(Ordering::Relaxed) + writes;
        eventually("acknowledged writes", || self.acknowledged.load(Ordering::Relaxed) >= enough);
    }

    /// Stops writing and closes the file.
    pub fn finish(&mut self) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut self.threads);
        Written(threads.into_iter().flat_map(|t| t.join().expect("it only writes")).collect())
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn write(
    file: &File,
    first: usize,
    blocks: usize,
    stop: &AtomicBool,
    acknowledged: &AtomicU64,
) -> Vec<Block> {
    let mut written = vec![Block::default(); blocks];
    let mut random = Random(first as u64);
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let block = random.below(blocks as u64) as usize;
        let at = first + block;
        written[block].tried = number;
        if file.write_at(&content(at, number), (at * BLOCK) as u64).ok() != Some(BLOCK) {
            break;
        }
        written[block].acknowledged = number;
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    written
}

/// A block says in all its words where it belongs and which write it is.
fn content(block: usize, number: u64) -> Aligned {
    let mut content = Aligned::new(BLOCK);
    for words in content.chunks_exact_mut(16) {
        words[..8].copy_from_slice(&(block as u64).to_le_bytes());
        words[8..].copy_from_slice(&number.to_le_bytes());
    }
    content
}

/// What was written.
pub struct Written(Vec<Block>);

impl Written {
    /// Asserts that every acknowledged write is in the image, or a later one of the same block.
    #[track_caller]
    pub fn assert_is_in(&self, image: &[u8]) {
        let mut acknowledged = 0;
        for (at, block) in self.0.iter().enumerate().filter(|(_, b)| b.acknowledged > 0) {
            acknowledged += 1;
            for words in image[at * BLOCK..][..BLOCK].chunks_exact(16) {
                let word =
                    |i: usize| u64::from_le_bytes(words[i..i + 8].try_into().expect("8 bytes"));
                let number = word(8);
                assert!(
                    word(0) == at as u64 && (number == block.acknowledged || number == block.tried),
                    "block {at} has {:?}: write {} was acknowledged",
                    (word(0), number),
                    block.acknowledged
                );
            }
        }
        assert!(acknowledged > 0, "nothing was written");
    }
}

/// `fio` with 4 jobs at depth 64 on a part of a file, now and then with a large request; killed
/// when dropped.
pub struct Load(Child);

const JOBS: usize = 4;

impl Load {
    pub fn start(path: &Path, offset: usize, len: usize) -> Load {
        let fio = Command::new("fio")
            .args(["--name=load", "--rw=randrw", "--rwmixread=70"])
            .args(["--bssplit=4k/95:1m/5", "--iodepth=64"])
            .arg(format!("--numjobs={JOBS}"))
            .args(["--thread", "--ioengine=libaio", "--direct=1", "--time_based"])
            .args(["--runtime=60", "--allow_file_create=0", "--filename"])
            .arg(path)
            .args([format!("--offset={offset}"), format!("--size={len}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let load = Load(fio.expect("fio is there"));
        // Not before it has the file open may the file be taken away: it would take the next of
        // that name.
        let fds = format!("/proc/{}/fd", load.0.id());
        eventually("fio's files", || {
            let links = std::fs::read_dir(&fds).into_iter().flatten().flatten();
            links.filter(|fd| fd.path().read_link().is_ok_and(|p| p == path)).count() >= JOBS
        });
        load
    }

    /// Kills it, unless it has ended already; it must not hang.
    pub fn finish(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        eventually("the end of fio", || !matches!(self.0.try_wait(), Ok(None)));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        if !super::within(super::SOON, || !matches!(self.0.try_wait(), Ok(None))) {
            eprintln!("fio, process {}: left behind, cannot be killed", self.0.id());
        }
    }
}

/// A process that has written to a file, and has it open until this is dropped: in this process the
/// child that another trial forks would inherit the file, and its close be a flush that nobody
/// asked for.
pub struct Holder(Child);

impl Holder {
    pub fn write(path: &Path, text: &str) -> Holder {
        // Its standard input ends with this. (A shell duplicates what it writes to, and each close
        // is a flush.)
        let script = "import os, sys; file = os.open(sys.argv[1], os.O_RDWR); \
                      os.write(file, sys.argv[2].encode()); print(flush=True); sys.stdin.read()";
        let mut python = Command::new("python3");
        python.args(["-c", script]).arg(path).arg(text);
        let child = python.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut holder = Holder(child.expect("python3 is there"));
        let mut said = [0];
        let mut stdout = holder.0.stdout.take().expect("it is piped");
        std::io::Read::read_exact(&mut stdout, &mut said).expect("it has written");
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        if !super::within(super::SOON, || !matches!(self.0.try_wait(), Ok(None))) {
            eprintln!("process {}: left behind, cannot be killed", self.0.id());
        }
    }
}
