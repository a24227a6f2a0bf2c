//! A remote disk over NBD, the network block device protocol.
//!
//! ```text
//! uri ── dial ┬ connect                                             start-up, blocking
//!          │  └ handshake (over socket or tls)
//!   NbdLane ┬ blocks ─ commands ─ connections ┬ connection ┬ requests ─┐     serving, asynchronous
//!           └ ahead ─ holes ─ extents         │            ├ inflight  ├ stream
//!                                             │            └ replies  ─┘
//!                                             └ unflushed                  what a server that crashes forgets
//! ```
//!
//! Where the server allows several connections (`CAN_MULTI_CONN`) a lane that has much to send gets
//! some of its own, driven on its own thread; otherwise lanes share them (`connections.rs`).
//! Transmission is ours, because requests have to be pipelined; servers too old for `NBD_OPT_GO`
//! are opened by the crate `nbd`.
//!
//! What the server lacks: without FLUSH, `fsync` succeeds and promises no more than the server
//! does; without FUA a synchronous write is a write and a FLUSH; without WRITE_ZEROES zeroes are
//! written, or `EOPNOTSUPP` where space was to be freed; without `base:allocation` everything is
//! data. TRIM is never sent.

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use polling::Poller;
use smol::Task;

use self::ahead::{Ahead, Reads, Source};
use self::blocks::Blocks;
use self::commands::Commands;
use self::connection::Connection;
use self::connections::Connections;
use self::dial::{Agreed, Dialer};
use self::extents::Extents;
use self::holes::Sparse;
use self::unflushed::{Reserved, Unflushed};
use self::wire::transmission_flag;
use super::range_lock::RangeLock;
use super::{Backend, Capabilities, Lane, Outage, RemoteStats, Seek, Stat, WaitsFor, Zero};
use crate::io::Io;

pub use self::error::Error;
pub use self::exports::{Exports, Found};
pub use self::handshake::BlockSizes;
pub use self::stream::SystemCalls;
pub use self::uri::Uri;

mod abandoned;
mod ahead;
mod blocks;
mod commands;
mod connect;
mod connection;
mod connections;
mod coverage;
mod dial;
pub mod error;
mod exports;
mod extents;
mod handshake;
mod holes;
mod inflight;
pub mod info;
mod replies;
mod requests;
mod stream;
mod stream_copy;
mod tls;
mod unflushed;
pub mod uri;
mod wire;

#[cfg(test)]
mod tests;

/// How long the last flush may take, over all connections together. The server may have much to
/// write; a server that is gone is found out sooner, by the socket.
const LAST_FLUSH_LIMIT: Duration = Duration::from_secs(120);

/// How long a read may take before anybody is served: of a partition table.
const READ_AT_START_LIMIT: Duration = Duration::from_secs(60);

/// How to reach a server, and what to do when it is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The directory with `ca-cert.pem` and perhaps `client-cert.pem` and `client-key.pem`, unless
    /// the URI names one. Without either the system's roots count.
    pub tls_certificates: Option<PathBuf>,
    /// For connecting and the whole handshake.
    pub connect_timeout: Duration,
    /// For how long a server that cannot be reached is tried again at the start.
    pub open_timeout: Duration,
    /// After so long without an answer to a request a connection counts as lost; none: a server may
    /// take its time.
    pub timeout: Option<Duration>,
    /// How long requests wait for a server that is gone; zero: it is gone for good.
    pub reconnect_timeout: Duration,
    /// How much of what is acknowledged and not yet durable is kept, to be written again after a
    /// server's crash, in bytes; zero: the next fsync tells of the loss.
    pub unflushed: usize,
    /// How many connections there may be; none: chosen from the number of CPUs.
    pub connections: Option<usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            tls_certificates: None,
            connect_timeout: Duration::from_secs(10),
            open_timeout: Duration::ZERO,
            timeout: None,
            reconnect_timeout: Duration::from_secs(300),
            unflushed: 64 << 20,
            connections: None,
        }
    }
}

impl Options {
    /// How many connections there may be to an export.
    pub fn most_connections(&self) -> usize {
        self.connections.unwrap_or_else(connections::default_most)
    }
}

/// A remote disk.
pub struct NbdBackend {
    connections: Arc<Connections>,
    connected: (i64, u32),
    /// Over all lanes: see [`blocks`].
    lock: Arc<RangeLock>,
    extents: Arc<Extents>,
    ahead: Arc<Ahead>,
}

impl NbdBackend {
    /// Connects to the export, blocking; the connection becomes the first lane's.
    pub fn connect(uri: &Uri, options: &Options) -> Result<Arc<NbdBackend>, Error> {
        let dialer = Dialer::new(uri, options)?;
        let opened = dialer.open_until(Instant::now() + options.open_timeout)?;
        let connection = Connection::new(uri.to_string(), opened, Arc::default());
        Ok(NbdBackend::over(Connections::new(dialer, connection, options)?))
    }

    fn over(connections: Arc<Connections>) -> Arc<NbdBackend> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Arc::new(NbdBackend {
            connections,
            connected: (now.as_secs() as i64, now.subsec_nanos()),
            lock: Arc::default(),
            extents: Arc::default(),
            ahead: Arc::default(),
        })
    }

    fn agreed(&self) -> &Agreed {
        self.connections.agreed()
    }

    fn unflushed(&self) -> &Arc<Unflushed> {
        self.connections.unflushed()
    }

    /// Whether something was acknowledged that a FLUSH would make durable, or the server has still to
    /// answer what a later request has to know of.
    pub fn is_unsettled(&self) -> bool {
        let has_flush = self.agreed().has(transmission_flag::SEND_FLUSH);
        (has_flush && self.unflushed().any()) || self.connections.abandoned().any()
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.connections.all().len()
    }

    /// The system calls on all sockets so far.
    pub fn system_calls(&self) -> SystemCalls {
        self.connections.system_calls()
    }
}

impl Backend for NbdBackend {
    type Lane = NbdLane;

    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> io::Result<NbdLane> {
        let commands = Commands::of_lane(self.connections.lane(io));
        let blocks = Rc::new(Blocks::new(commands, self.lock.clone()));
        let sparse = Rc::new(Sparse::new(blocks.clone(), self.extents.clone(), io));
        let size = self.agreed().size;
        Ok(NbdLane {
            backend: self.clone(),
            cached: Reads::new(self.ahead.clone(), sparse.clone(), size, io.clone()),
            blocks,
            sparse,
            io: io.clone(),
            making_room: RefCell::default(),
        })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read_only: self.agreed().has(transmission_flag::READ_ONLY),
            resizable: false,
            allocates: false,
            fixed_size: true,
            preferred_io_bytes: self.agreed().block_sizes.preferred,
            waits_for: WaitsFor::Server,
        }
    }

    fn size(&self) -> u64 {
        self.agreed().size
    }

    fn read_at_start(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let Some(connection) = self.connections.all().pop() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        if self.size().checked_sub(offset).is_none_or(|left| left < buf.len() as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let blocks = Blocks::new(Commands::over(connection.clone()), self.lock.clone());
        let deadline = Instant::now() + READ_AT_START_LIMIT;
        connection.run_blocking(blocks.read(offset, buf), deadline)?;
        connection.stop_blocking()
    }

    fn stat(&self) -> io::Result<Stat> {
        let time = self.connected;
        let size = self.agreed().size;
        // cp, tar and others look for holes only in a file that uses less than its length. No
        // server tells how much of it is in use: where it tells of holes, it is as if there were
        // one of a sector.
        let allocated_bytes = match self.agreed().base_allocation {
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
        self.unflushed().give_memory_back();
    }

    fn hurry(&self) {
        self.connections.hurry();
    }

    fn outage(&self) -> Option<Outage> {
        self.connections.outage()
    }

    fn set_control(&self, control: Arc<Poller>) {
        self.connections.set_control(control);
    }

    fn stats(&self) -> Option<RemoteStats> {
        let mut stats = RemoteStats::default();
        self.connections.add_stats(&mut stats);
        self.ahead.add_stats(&mut stats);
        self.extents.add_stats(&mut stats);
        Some(stats)
    }

    /// Flushes over any connection that still works, if anything was written, then disconnects
    /// all. It fails if acknowledged writes could not be flushed, or were lost and nobody has been
    /// told; a lost connection alone is no failure.
    fn last_flush(&self, patience: Duration) -> io::Result<()> {
        match self.extents.asked() {
            0 => {}
            n => log::info!("block status: {n} commands"),
        }
        self.ahead.log_use();
        let connections = self.connections.close();
        let flushed = self.flush_over_any(&connections, LAST_FLUSH_LIMIT).or_else(|error| {
            if connections.iter().any(|connection| !connection.is_lost()) {
                return Err(error);
            }
            self.connections.bring_back_at_the_end(patience)
        });
        connections.iter().for_each(|connection| connection.disconnect());
        flushed.map_err(|error| {
            let text = format!("acknowledged writes could not be made durable: {error}");
            io::Error::new(error.kind(), text)
        })?;
        self.tell_losses()
    }
}

impl NbdBackend {
    /// A connection that fails leaves to the others what is left of the time.
    fn flush_over_any(&self, connections: &[Arc<Connection>], limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        let mut result = Err(io::Error::other("the connection to the NBD server was lost"));
        if !self.unflushed().any() {
            return Ok(());
        }
        for connection in connections.iter().filter(|connection| !connection.is_lost()) {
            let mark = self.unflushed().mark();
            let commands = Commands::over(connection.clone());
            result = connection.run_blocking(commands.flush(), deadline);
            if result.is_ok() {
                self.note_unheard_failure(self.connections.abandoned().take_failure());
                self.unflushed().flushed_to(mark);
            }
            // An error may have been told once, so that another connection would know of none.
            if !connection.is_lost() || Instant::now() >= deadline {
                break;
            }
        }
        result
    }

    /// If a flush that was abandoned has `failed`: what it was to make durable counts as lost.
    fn note_unheard_failure(&self, failed: bool) {
        if failed {
            log::error!("a flush has failed whose client was killed");
            self.unflushed().lose(0);
        }
    }

    /// `EIO`, once, if acknowledged writes were lost.
    fn tell_losses(&self) -> io::Result<()> {
        if self.unflushed().tell() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
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
    io: Rc<Io>,
    /// A FLUSH before there is no room left for what is acknowledged and not durable.
    making_room: RefCell<Option<Task<()>>>,
}

impl NbdLane {
    /// The part of `offset..offset + length` before the end, in bytes.
    fn before_end(&self, offset: u64, length: u64) -> u64 {
        self.backend.agreed().size.saturating_sub(offset).min(length)
    }

    /// Ranges past the end are the export's concern; the server must not see one all the same.
    fn check_range(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.before_end(offset, length) < length {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if self.backend.agreed().has(transmission_flag::READ_ONLY) {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        Ok(())
    }
}

impl NbdLane {
    /// Room for a write: once it is acknowledged, it is kept until it is durable.
    async fn room_for(&self, length: usize) -> io::Result<Reserved<'_>> {
        // What fills only part of a block is written as a block.
        let bytes = length + 2 * self.blocks.commands().minimum() as usize;
        let unflushed = self.backend.unflushed();
        loop {
            if let Some(reserved) = unflushed.reserve(bytes) {
                return Ok(reserved);
            }
            let _turn = unflushed.turn().await;
            if let Some(reserved) = unflushed.reserve(bytes) {
                return Ok(reserved);
            }
            flush_unasked(&self.backend, self.blocks.commands()).await?;
        }
    }

    /// Has a FLUSH made room in time, beside the writes to come.
    fn make_room_in_time(&self) {
        if !self.backend.unflushed().is_due() {
            return;
        }
        let mut making_room = self.making_room.borrow_mut();
        if making_room.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let (backend, commands) = (self.backend.clone(), self.blocks.commands().clone());
        *making_room = Some(self.io.spawn(async move {
            let Some(_turn) = backend.unflushed().turn_if_free() else { return };
            // A writer that needs the room has the error.
            let _ = flush_unasked(&backend, &commands).await;
        }));
    }
}

/// Makes everything acknowledged so far durable.
async fn flush(backend: &NbdBackend, commands: &Commands) -> io::Result<()> {
    let mark = backend.unflushed().mark();
    commands.flush().await?;
    // Without it nothing is known to be durable, ever.
    if backend.agreed().has(transmission_flag::SEND_FLUSH) {
        let abandoned = backend.connections.abandoned();
        backend.note_unheard_failure(abandoned.has_failed_to_make_durable().await);
        backend.unflushed().flushed_to(mark);
    }
    Ok(())
}

/// As [`flush`], where no client has asked for it: if the server could not store something, it may
/// have said so once, and to us.
async fn flush_unasked(backend: &NbdBackend, commands: &Commands) -> io::Result<()> {
    flush(backend, commands).await.inspect_err(|e| {
        if e.kind() != io::ErrorKind::NotConnected {
            log::error!("a flush to bound what is not durable: {e}");
            backend.unflushed().lose(0);
        }
    })
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
        let _room = self.room_for(data.len()).await?;
        let losses = self.backend.unflushed().losses();
        // In this order: at the end holes are forgotten first, or one could be read ahead again.
        let _writing = self.backend.ahead.writing(offset..offset + data.len() as u64);
        let _changing = self.backend.extents.changing(offset..offset + data.len() as u64);
        let fua = durable && self.blocks.commands().has_fua();
        self.blocks.write(offset, data, fua).await?;
        if durable && !fua {
            flush(&self.backend, self.blocks.commands()).await?;
        }
        if durable && self.backend.unflushed().losses() != losses {
            // The server may have crashed between the write and the FLUSH behind it.
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.make_room_in_time();
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        // A close after an fsync, or of a file that was never written, has nothing to make durable.
        if self.backend.unflushed().any() {
            flush(&self.backend, self.blocks.commands()).await?;
        }
        self.backend.tell_losses()
    }

    async fn zero(&self, offset: u64, len: u64, how: Zero) -> io::Result<()> {
        self.check_range(offset, len)?;
        // As in `write`.
        let _writing = self.backend.ahead.writing(offset..offset + len);
        let _changing = self.backend.extents.changing(offset..offset + len);
        let (mut at, end) = (offset, offset + len);
        let step = self.blocks.commands().zero_step();
        while at < end {
            // Each step has room for the extents that it becomes.
            let next = end.min((at / step + 1) * step);
            let _room = self.room_for(0).await?;
            self.blocks.zero(at, next - at, how).await?;
            self.make_room_in_time();
            at = next;
        }
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
