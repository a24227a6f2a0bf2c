//! A remote disk over NBD, the network block device protocol.
//!
//! ```text
//! uri ── dial ── handshake (over socket or tls)                    start-up, blocking
//!          │
//!   NbdLane ─ blocks ─ commands ─ connection ┬ requests ─┐          serving, asynchronous
//!                                            ├ inflight  ├ stream
//!                                            └ replies  ─┘
//! ```
//!
//! Each lane has a connection of its own, driven on its own thread, where the server allows several
//! (`CAN_MULTI_CONN`); otherwise all lanes share one, which the thread of one of them drives.
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
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::abandoned::Abandoned;
use self::blocks::Blocks;
use self::commands::Commands;
use self::connection::{Connection, Driver};
use self::dial::{Dialer, Export};
use self::wire::transmission_flag;
use super::range_lock::RangeLock;
use super::{Backend, Capabilities, Lane, Seek, Stat, Zero};
use crate::io::Io;

pub use self::error::Error;
pub use self::handshake::BlockSizes;
pub use self::stream::SystemCalls;
pub use self::uri::Uri;

mod abandoned;
mod blocks;
mod commands;
mod connection;
mod coverage;
mod dial;
pub mod error;
mod handshake;
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

/// How long a further connection may take: a server with no room for it may simply not
/// answer, and the first connection has shown what is to be expected.
const FURTHER_LIMIT: Duration = Duration::from_secs(2);

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
    dialer: Dialer,
    export: Export,
    connected: (i64, u32),
    pool: Mutex<Pool>,
    /// No further connection is tried: the server has refused one, or allows only one.
    pool_complete: AtomicBool,
    /// Over all lanes: see [`blocks`].
    lock: Arc<RangeLock>,
    abandoned: Arc<Abandoned>,
    unflushed: Unflushed,
}

/// The connections, kept beyond their lanes for the last flush. At most one for each lane.
struct Pool {
    connections: Vec<Arc<Connection>>,
    /// How many lanes there have been.
    lanes: usize,
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
        Ok(NbdBackend::over(dialer, connection))
    }

    fn over(dialer: Dialer, connection: Arc<Connection>) -> Arc<NbdBackend> {
        let export = connection.export().clone();
        let multi = export.has(transmission_flag::CAN_MULTI_CONN);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Arc::new(NbdBackend {
            dialer,
            export,
            connected: (now.as_secs() as i64, now.subsec_nanos()),
            abandoned: connection.abandoned().clone(),
            pool: Mutex::new(Pool { connections: vec![connection], lanes: 0 }),
            pool_complete: AtomicBool::new(!multi),
            lock: Arc::default(),
            unflushed: Unflushed::default(),
        })
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.pool().connections.len()
    }

    /// The system calls on all sockets so far.
    pub fn system_calls(&self) -> SystemCalls {
        let each = |connection: &Arc<Connection>| connection.system_calls();
        self.pool().connections.iter().map(each).fold(SystemCalls::default(), |sum, one| {
            SystemCalls { sends: sum.sends + one.sends, receives: sum.receives + one.receives }
        })
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.pool.lock().expect("no code panics while it holds the pool")
    }

    /// A connection for one more lane: a new one if that can be had, else one that others use too.
    fn connection(&self) -> Arc<Connection> {
        let lane = {
            let mut pool = self.pool();
            pool.lanes += 1;
            pool.lanes - 1
        };
        if lane > 0
            && !self.pool_complete.load(Ordering::Relaxed)
            && let Some(connection) = self.open_another()
        {
            self.pool().connections.push(connection.clone());
            return connection;
        }
        let pool = self.pool();
        let usable: Vec<_> = pool.connections.iter().filter(|c| !c.is_lost()).collect();
        match usable.as_slice() {
            [] => pool.connections[0].clone(),
            usable => usable[lane % usable.len()].clone(),
        }
    }

    fn open_another(&self) -> Option<Arc<Connection>> {
        let problem = match self.dialer.open_further(FURTHER_LIMIT) {
            Ok(opened) if opened.export.same_disk(&self.export) => {
                let (name, abandoned) = (self.dialer.uri().to_string(), self.abandoned.clone());
                return Some(Connection::new(name, opened, abandoned));
            }
            Ok(_) => "the export is another one there".into(),
            Err(error) => error.to_string(),
        };
        if !self.pool_complete.swap(true, Ordering::Relaxed) {
            log::warn!("no further connection, existing ones are shared: {problem}");
        }
        None
    }
}

impl Backend for NbdBackend {
    type Lane = NbdLane;

    /// May block for the connect time-out while it opens the lane's own connection.
    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> io::Result<NbdLane> {
        let connection = self.connection();
        let commands = Commands::new(connection.clone());
        Ok(NbdLane {
            backend: self.clone(),
            blocks: Blocks::new(commands, self.lock.clone()),
            _driver: connection.driver(io),
        })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read_only: self.export.has(transmission_flag::READ_ONLY),
            resizable: false,
            preferred_io_bytes: self.export.block_sizes.preferred,
            waits: true,
            may_be_given_up: true,
        }
    }

    fn size(&self) -> u64 {
        self.export.size
    }

    fn stat(&self) -> io::Result<Stat> {
        let time = self.connected;
        Ok(Stat { allocated_bytes: self.export.size, atime: time, mtime: time, ctime: time })
    }

    /// Flushes over any connection that still works, if anything was written, then says goodbye on
    /// all. It fails if acknowledged writes could not be flushed; a lost connection alone is no
    /// failure.
    fn last_flush(&self) -> io::Result<()> {
        let connections = self.pool().connections.clone();
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
            let commands = Commands::new(connection.clone());
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
    blocks: Blocks,
    /// Drives the connection while no other lane does.
    _driver: Driver,
}

impl NbdLane {
    /// The part of `offset..offset + length` before the end, in bytes.
    fn before_end(&self, offset: u64, length: u64) -> u64 {
        self.backend.export.size.saturating_sub(offset).min(length)
    }

    /// Ranges past the end are the export's concern; the server must not see one all the same.
    fn check_range(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.before_end(offset, length) < length {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if self.backend.export.has(transmission_flag::READ_ONLY) {
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

    async fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        self.check_range(offset, data.len() as u64)?;
        self.blocks.write(offset, data, durable).await?;
        if !durable {
            self.backend.unflushed.acknowledge();
        }
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        let mark = self.backend.unflushed.mark();
        self.blocks.commands().flush().await?;
        self.backend.unflushed.flushed_to(mark);
        Ok(())
    }

    async fn zero(&self, offset: u64, len: u64, how: Zero) -> io::Result<()> {
        self.check_range(offset, len)?;
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
        self.blocks.commands().seek(offset, what).await
    }
}
