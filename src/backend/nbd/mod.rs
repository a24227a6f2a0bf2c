//! A remote disk over NBD, the network block device protocol.
//!
//! ```text
//! uri ── dial ── handshake (over socket or tls)                    start-up, blocking
//!          │
//!   NbdLane ┬ blocks ─ commands ─ connections ─ connection ┬ requests ─┐     serving, asynchronous
//!           └ ahead ─ holes ─ extents                      ├ inflight  ├ stream
//!                                                          └ replies  ─┘
//! ```
//!
//! Where the server allows several connections (`CAN_MULTI_CONN`) a lane that has much to send gets some of its own,
//! driven on its own thread; otherwise lanes share them (`connections.rs`).
//! Transmission is ours, because requests have to be pipelined; servers too old for `NBD_OPT_GO`
//! are opened by the crate `nbd`.
//!
//! What the server lacks: without FLUSH, `fsync` succeeds and promises no more than the server
//! does; without FUA a synchronous write is a write and a FLUSH; without WRITE_ZEROES zeroes are
//! written, or `EOPNOTSUPP` where space was to be freed; without `base:allocation` everything is
//! data. TRIM is never sent.

use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::ahead::{Ahead, Reads, Source};
use self::blocks::Blocks;
use self::commands::Commands;
use self::connection::Connection;
use self::connections::Connections;
use self::dial::{Dialer, Export};
use self::extents::Extents;
use self::holes::Sparse;
use self::wire::transmission_flag;
use super::range_lock::RangeLock;
use super::{Backend, Capabilities, Lane, Seek, Stat, Zero};
use crate::io::Io;

pub use self::error::Error;
pub use self::handshake::BlockSizes;
pub use self::stream::SystemCalls;
pub use self::uri::Uri;

mod abandoned;
mod ahead;
mod blocks;
mod commands;
mod connection;
mod connections;
mod coverage;
mod dial;
pub mod error;
mod extents;
mod handshake;
mod holes;
mod inflight;
pub mod info;
mod pages;
mod replies;
mod requests;
mod stream;
mod tls;
pub mod uri;
mod wire;

#[cfg(test)]
mod tests;

/// How long the last flush may take, over all connections together. The server may have much to
/// write; a server that is gone is found out sooner, by the socket.
const LAST_FLUSH_LIMIT: Duration = Duration::from_secs(120);

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory with `ca-cert.pem` and perhaps `client-cert.pem` and `client-key.pem`, unless
    /// the URI names one. Without either the system's roots count.
    pub tls_certificates: Option<PathBuf>,
    /// For connecting and the whole handshake.
    pub connect_timeout: Duration,
    /// How many connections there may be; none: chosen from the number of CPUs.
    pub connections: Option<usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            tls_certificates: None,
            connect_timeout: Duration::from_secs(10),
            connections: None,
        }
    }
}

/// A remote disk.
pub struct NbdBackend {
    connections: Arc<Connections>,
    connected: (i64, u32),
    /// Over all lanes: see [`blocks`].
    lock: Arc<RangeLock>,
    unflushed: Unflushed,
    extents: Arc<Extents>,
    ahead: Arc<Ahead>,
}

/// Whether acknowledged writes await a flush. Counts both, so that a write that completes while a
/// flush is on its way is not taken for flushed.
#[derive(Debug, Default)]
struct Unflushed {
    acknowledged: AtomicU64,
    flushed: AtomicU64,
}

impl Unflushed {
    fn acknowledge(&self) {
        self.acknowledged.fetch_add(1, Ordering::SeqCst);
    }

    /// What a flush that begins now will cover.
    fn mark(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    fn flushed_to(&self, mark: u64) {
        self.flushed.fetch_max(mark, Ordering::SeqCst);
    }

    fn any(&self) -> bool {
        self.flushed.load(Ordering::SeqCst) < self.mark()
    }
}

impl NbdBackend {
    /// Connects to the export, blocking; the connection becomes the first lane's.
    pub fn connect(uri: &Uri, options: &Options) -> Result<Arc<NbdBackend>, Error> {
        let dialer = Dialer::new(uri, options)?;
        let connection = Connection::new(uri.to_string(), dialer.open()?, Arc::default());
        Ok(NbdBackend::over(Connections::new(dialer, connection, options.connections)))
    }

    fn over(connections: Arc<Connections>) -> Arc<NbdBackend> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Arc::new(NbdBackend {
            connections,
            connected: (now.as_secs() as i64, now.subsec_nanos()),
            lock: Arc::default(),
            unflushed: Unflushed::default(),
            extents: Arc::default(),
            ahead: Arc::default(),
        })
    }

    fn export(&self) -> &Export {
        self.connections.export()
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.connections.all().len()
    }

    /// The system calls on all sockets so far.
    pub fn system_calls(&self) -> SystemCalls {
        let each = |connection: &Arc<Connection>| connection.system_calls();
        self.connections.all().iter().map(each).fold(SystemCalls::default(), |sum, one| {
            SystemCalls { sends: sum.sends + one.sends, receives: sum.receives + one.receives }
        })
    }
}

impl Backend for NbdBackend {
    type Lane = NbdLane;

    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> io::Result<NbdLane> {
        let commands = Commands::of_lane(self.connections.lane(io));
        let blocks = Rc::new(Blocks::new(commands, self.lock.clone()));
        let sparse = Rc::new(Sparse::new(blocks.clone(), self.extents.clone(), io));
        let size = self.export().size;
        Ok(NbdLane {
            backend: self.clone(),
            cached: Reads::new(self.ahead.clone(), sparse.clone(), size, io.clone()),
            blocks,
            sparse,
        })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read_only: self.export().has(transmission_flag::READ_ONLY),
            resizable: false,
            preferred_io_bytes: self.export().block_sizes.preferred,
            waits: true,
            may_be_given_up: true,
        }
    }

    fn size(&self) -> u64 {
        self.export().size
    }

    fn stat(&self) -> io::Result<Stat> {
        let time = self.connected;
        let size = self.export().size;
        // cp, tar and others look for holes only in a file that uses less than its length. No server tells how much
        // of it is in use: where it tells of holes, it is as if there were one of a sector.
        let allocated_bytes = match self.export().base_allocation {
            Some(_) => (size / 512).saturating_sub(1) * 512,
            None => size,
        };
        Ok(Stat { allocated_bytes, atime: time, mtime: time, ctime: time })
    }

    fn set_read_ahead(&self, bytes: u64) {
        self.ahead.set_limit(bytes);
    }

    fn forget(&self) {
        self.extents.forget_all();
        self.ahead.forget();
    }

    /// Flushes over any connection that still works, if anything was written, then says goodbye on
    /// all. It fails if acknowledged writes could not be flushed; a lost connection alone is no
    /// failure.
    fn last_flush(&self) -> io::Result<()> {
        match self.extents.asked() {
            0 => {}
            n => log::info!("block status: {n} commands"),
        }
        self.ahead.log_use();
        let connections = self.connections.close();
        let flushed = self.flush_over_any(&connections, LAST_FLUSH_LIMIT);
        connections.iter().for_each(|connection| connection.disconnect());
        flushed
    }
}

impl NbdBackend {
    /// A connection that fails leaves to the others what is left of the time.
    fn flush_over_any(&self, connections: &[Arc<Connection>], limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        let mut result = Err(io::Error::other("the connection to the NBD server was lost"));
        if !self.unflushed.any() {
            return Ok(());
        }
        for connection in connections.iter().filter(|connection| !connection.is_lost()) {
            let mark = self.unflushed.mark();
            let commands = Commands::over(connection.clone());
            result = connection.run_blocking(commands.flush(), deadline);
            if result.is_ok() {
                self.unflushed.flushed_to(mark);
            }
            if result.is_ok() || Instant::now() >= deadline {
                break;
            }
        }
        result.map_err(|error| {
            let text = format!("acknowledged writes could not be made durable: {error}");
            io::Error::new(error.kind(), text)
        })
    }
}

/// One thread's way to the remote disk.
pub struct NbdLane {
    backend: Arc<NbdBackend>,
    blocks: Rc<Blocks>,
    /// Reads for the page cache: as they come, ...
    sparse: Rc<Sparse>,
    /// ... and ahead of them.
    cached: Reads<Sparse>,
}

impl NbdLane {
    /// The part of `offset..offset + length` before the end, in bytes.
    fn before_end(&self, offset: u64, length: u64) -> u64 {
        self.backend.export().size.saturating_sub(offset).min(length)
    }

    /// Ranges past the end are the export's concern; the server must not see one all the same.
    fn check_range(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.before_end(offset, length) < length {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if self.backend.export().has(transmission_flag::READ_ONLY) {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        Ok(())
    }
}

fn unsupported<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
}

impl Lane for NbdLane {
    async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let length = self.before_end(offset, buf.len() as u64) as usize;
        self.blocks.read(offset, &mut buf[..length]).await?;
        Ok(length)
    }

    async fn read_cached(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let length = self.before_end(offset, buf.len() as u64) as usize;
        match self.backend.ahead.is_on() {
            true => self.cached.read(offset, &mut buf[..length]).await?,
            false => self.sparse.read(offset, &mut buf[..length]).await?,
        }
        Ok(length)
    }

    async fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        self.check_range(offset, data.len() as u64)?;
        let _changing = self.backend.extents.changing(offset..offset + data.len() as u64);
        let _writing = self.backend.ahead.writing(offset..offset + data.len() as u64);
        self.blocks.write(offset, data, durable).await?;
        if !durable {
            self.backend.unflushed.acknowledge();
        }
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        // A close after an fsync, or of a file that was never written: there is nothing to make durable.
        if !self.backend.unflushed.any() {
            return Ok(());
        }
        let mark = self.backend.unflushed.mark();
        self.blocks.commands().flush().await?;
        self.backend.unflushed.flushed_to(mark);
        Ok(())
    }

    async fn zero(&self, offset: u64, len: u64, how: Zero) -> io::Result<()> {
        self.check_range(offset, len)?;
        let _changing = self.backend.extents.changing(offset..offset + len);
        let _writing = self.backend.ahead.writing(offset..offset + len);
        self.blocks.zero(offset, len, how).await?;
        self.backend.unflushed.acknowledge();
        Ok(())
    }

    async fn allocate(&self, _offset: u64, _len: u64, _keep_size: bool) -> io::Result<()> {
        unsupported()
    }

    async fn resize(&self, _size: u64) -> io::Result<()> {
        unsupported()
    }

    async fn stat(&self) -> io::Result<Stat> {
        self.backend.stat()
    }

    async fn seek(&self, offset: u64, what: Seek) -> io::Result<u64> {
        self.blocks.commands().seek(offset, what, &self.backend.extents).await
    }
}
