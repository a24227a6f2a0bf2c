use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::AtomicUsize;

use smol::channel::{Receiver, bounded};
use smol::future::{block_on, poll_once, zip};

use super::*;
use crate::backend::{Stat, WaitsFor};
use crate::io::Io;

/// A disk that has lost data, and tells the first flush of it, which takes until `told`.
struct Disk {
    flushes: AtomicUsize,
    told: Receiver<()>,
}

impl Backend for Disk {
    type Lane = Arc<Disk>;

    fn lane(self: &Arc<Self>, _: &Rc<Io>) -> io::Result<Arc<Disk>> {
        Ok(self.clone())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read_only: false,
            resizable: false,
            allocates: false,
            fixed_size: true,
            preferred_io_bytes: 512,
            waits_for: WaitsFor::Server,
        }
    }

    fn size(&self) -> u64 {
        512
    }

    fn read_at_start(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(Stat::default())
    }

    fn last_flush(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }
}

impl Lane for Arc<Disk> {
    async fn read(&self, _: u64, buf: &mut [u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    async fn write(&self, _: u64, _: &[u8], durable: bool) -> io::Result<()> {
        if durable {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        match self.flushes.fetch_add(1, Ordering::Relaxed) {
            0 => {
                self.told.recv().await.expect("it is told");
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            _ => Ok(()),
        }
    }

    async fn zero(&self, _: u64, _: u64, _: Zero) -> io::Result<()> {
        Ok(())
    }

    async fn allocate(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }

    async fn resize(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    async fn seek(&self, offset: u64, _: Seek) -> io::Result<u64> {
        Ok(offset)
    }

    async fn stat(&self) -> io::Result<Stat> {
        Ok(Stat::default())
    }
}

const WRITE: Op = Op::Write { handle: 1, offset: 0, size: 512, durable: true, from_cache: false };
const POLICY: Policy = Policy {
    writable: true,
    growable: false,
    truncate: Truncate::Refuse,
    cache: Cache::None,
    keep_cache: false,
    allow_other: false,
    uid: 0,
    gid: 0,
};

/// An fsync that comes while `other` is being told of the loss, and finds none itself.
fn fsync_beside(other: impl FnOnce(u64) -> Op) {
    let (tell, told) = bounded(1);
    let disk = Arc::new(Disk { flushes: AtomicUsize::new(0), told });
    let export = Export::new(disk.clone(), POLICY, Arc::default()).unwrap();
    block_on(async {
        let flags = libc::O_WRONLY as u32;
        let opened = export.handle(&disk, abi::ROOT_ID, Op::Open { flags }, &mut []).await;
        let Ok(Reply::Opened { handle, .. }) = opened else { panic!("{opened:?}") };
        let mut payload = [0; 512];
        let mut other = pin!(export.handle(&disk, abi::ROOT_ID, other(handle), &mut payload));
        assert!(poll_once(&mut other).await.is_none());
        let mut fsync = pin!(export.handle(&disk, abi::ROOT_ID, Op::Fsync { handle }, &mut []));
        assert!(poll_once(&mut fsync).await.is_none(), "it does not wait");
        tell.send(()).await.unwrap();
        let (other, fsync) = zip(other, fsync).await;
        other.unwrap_err();
        fsync.unwrap_err();
    });
    assert!(export.flush_failed());
}

/// What hangs longer than it takes to tell of a loss holds up no other fsync.
#[test]
fn a_flush_that_hangs_does_not_hold_up_an_fsync() {
    let (_tell, told) = bounded(1);
    let disk = Arc::new(Disk { flushes: AtomicUsize::new(0), told });
    let export = Export::new(disk.clone(), POLICY, Arc::default()).unwrap();
    block_on(async {
        let mut payload = [0; 512];
        let write = WRITE;
        let mut hangs = pin!(export.handle(&disk, abi::ROOT_ID, write, &mut payload));
        assert!(poll_once(&mut hangs).await.is_none());
        export.handle(&disk, abi::ROOT_ID, Op::Fsync { handle: 1 }, &mut []).await.unwrap();
        let mut payload = [0; 512];
        export.handle(&disk, abi::ROOT_ID, write, &mut payload).await.unwrap();
    });
}

#[test]
fn an_fsync_hears_of_what_a_close_has_met() {
    fsync_beside(|handle| Op::Flush { handle });
}

#[test]
fn an_fsync_hears_of_what_a_durable_write_has_met() {
    fsync_beside(|_| WRITE);
}

/// An export is one node of its connection, and knows no other.
#[test]
fn other_nodes_are_not_there() {
    let (_tell, told) = bounded(1);
    let disk = Arc::new(Disk { flushes: AtomicUsize::new(0), told });
    let export = Export::new(disk.clone(), POLICY, Arc::default()).unwrap().at_node(7, None);
    let stat = |node| {
        let reply = block_on(export.handle(&disk, node, Op::Getattr { handle: None }, &mut []));
        reply.map(|reply| matches!(reply, Reply::Attr { attr, .. } if attr.ino == 7))
    };
    assert_eq!(stat(7), Ok(true));
    assert_eq!(stat(abi::ROOT_ID), Err(Errno::ENOENT));
}

/// A file that was connected to once more is the same file, but for what it may not be.
#[test]
fn attributes_are_kept_from_one_export_to_the_next() {
    let (_tell, told) = bounded(1);
    let disk = Arc::new(Disk { flushes: AtomicUsize::new(0), told });
    let export =
        |policy, kept| Export::new(disk.clone(), policy, Arc::default()).unwrap().at_node(7, kept);
    let first = export(POLICY, None);
    let change = crate::fuse::abi::SetattrIn {
        valid: abi::fattr::MODE | abi::fattr::MTIME,
        mode: 0o700,
        mtime: 99,
        ..Default::default()
    };
    block_on(first.handle(&disk, 7, Op::Setattr(change), &mut [])).unwrap();
    let kept = Some(first.kept_attributes());
    let (again, _) = export(POLICY, kept.clone()).attr_of(Stat::default());
    assert_eq!((again.mode & 0o777, again.mtime), (0o700, 99));
    let (read_only, _) =
        export(Policy { writable: false, ..POLICY }, kept).attr_of(Stat::default());
    assert_eq!(read_only.mode & 0o777, 0o500);
}
