//! What stores the bytes.
//!
//! A [`Backend`] is shared by all serving threads. Each of them makes a [`Lane`] for itself: its
//! own way to the bytes (a ring, a connection), used by that thread only, so that no lock and no
//! hop stands between a request and its I/O. A lane serves any number of operations at once and may
//! complete them in any order.
//!
//! Ranges are checked above ([`crate::export`]): they never reach past [`Backend::size`], except
//! where an operation says so. Errors are plain [`io::Error`]s; the export maps them to what FUSE
//! may say.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polling::Poller;
use serde::Serialize;

use crate::io::Io;

pub mod file;
pub mod length;
pub mod nbd;
pub mod part;
pub mod range_lock;

/// What a source is and what it allows, fixed while it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Nothing may be written.
    pub read_only: bool,
    /// [`Lane::resize`] works, and a write past the end: a regular file or memory, as a whole.
    pub resizable: bool,
    /// [`Lane::allocate`] works: a regular file or memory.
    pub allocates: bool,
    /// The size stays what it is, whoever else uses the source.
    pub fixed_size: bool,
    /// The I/O size that the source prefers, in bytes; reported as `st_blksize`.
    pub preferred_io_bytes: u32,
    /// What requests wait for.
    pub waits_for: WaitsFor,
}

/// What the requests to a source wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitsFor {
    /// Hardly anything: they are copies within this machine's memory, mostly.
    Memory,
    /// A disk, past the page cache.
    Disk,
    /// Another host, which may never answer. What a lane does may be dropped before its end, and
    /// the buffer used again.
    Server,
}

/// The time stamps and the allocation of a source, as `stat` shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Space in use, in bytes; where the source cannot tell, the whole size, or a little less where
    /// it has holes.
    pub allocated_bytes: u64,
    /// Last read, last write and last change of the source itself: seconds and nanoseconds.
    pub atime: (i64, u32),
    /// See `atime`.
    pub mtime: (i64, u32),
    /// See `atime`.
    pub ctime: (i64, u32),
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// `SEEK_DATA`
    Data,
    /// `SEEK_HOLE`; the end counts as a hole.
    Hole,
}

/// Whether a zeroed range gives its space back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// `FALLOC_FL_PUNCH_HOLE`: free the space where that is possible.
    Punch,
    /// `FALLOC_FL_ZERO_RANGE`: keep or make the space allocated.
    Keep,
}

/// How it stands with a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RemoteStats {
    /// Connections that there are; none: it is away.
    pub connections: usize,
    /// Connections that were lost.
    pub lost_connections: u64,
    /// How often all were lost, and it came back.
    pub reconnects: u64,
    /// Requests that wait for it to come back.
    pub waiting: usize,
    /// What of acknowledged data is kept, to be written again after its crash, in bytes; none:
    /// nothing is kept.
    pub unflushed_bytes: Option<u64>,
    /// Reads that were answered, in part at least, by what was read ahead, ...
    pub read_ahead_hits: u64,
    /// ... with so many bytes ...
    pub read_ahead_hit_bytes: u64,
    /// ... of so many that were read ahead.
    pub read_ahead_bytes: u64,
    /// Reads that were answered, in part at least, by what is known of holes, ...
    pub hole_hits: u64,
    /// ... with so many bytes.
    pub hole_hit_bytes: u64,
    /// How often it was asked for holes.
    pub hole_requests: u64,
}

impl RemoteStats {
    /// The sums of both.
    #[must_use]
    pub fn plus(self, other: RemoteStats) -> RemoteStats {
        let unflushed_bytes = match (self.unflushed_bytes, other.unflushed_bytes) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        };
        RemoteStats {
            connections: self.connections + other.connections,
            lost_connections: self.lost_connections + other.lost_connections,
            reconnects: self.reconnects + other.reconnects,
            waiting: self.waiting + other.waiting,
            unflushed_bytes,
            read_ahead_hits: self.read_ahead_hits + other.read_ahead_hits,
            read_ahead_hit_bytes: self.read_ahead_hit_bytes + other.read_ahead_hit_bytes,
            read_ahead_bytes: self.read_ahead_bytes + other.read_ahead_bytes,
            hole_hits: self.hole_hits + other.hole_hits,
            hole_hit_bytes: self.hole_hit_bytes + other.hole_hit_bytes,
            hole_requests: self.hole_requests + other.hole_requests,
        }
    }

    /// What is over when the connections are gone, without what there is now.
    #[must_use]
    pub fn in_the_past(self) -> RemoteStats {
        RemoteStats { connections: 0, waiting: 0, unflushed_bytes: None, ..self }
    }
}

/// A source that cannot be reached, and what becomes of its requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// When it was lost.
    pub since: Instant,
    /// Requests that wait for it to come back.
    pub waiting: usize,
    /// It is there again, and is given so many bytes that it may have forgotten; zero: it is not.
    pub writing_again: u64,
    /// Why requests fail; none: they wait.
    pub failure: Option<Failure>,
}

/// Why requests fail instead of waiting for a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What has happened, in a few words.
    pub what: String,
    /// Its cause.
    pub why: String,
    /// It will not be otherwise again.
    pub for_good: bool,
}

/// A source of bytes, shared by the serving threads.
pub trait Backend: Send + Sync + 'static {
    /// How one thread reaches the bytes.
    type Lane: Lane;

    /// Makes the calling thread's lane. It is called once on each serving thread.
    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> io::Result<Self::Lane>;

    /// What the source allows.
    fn capabilities(&self) -> Capabilities;

    /// The size in bytes, now.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`, blocking: before the first lane is made. `UnexpectedEof` where
    /// the source ends first.
    fn read_at_start(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The size of a sector in bytes, where the source has such a thing: what partition tables
    /// count in.
    fn sector_bytes(&self) -> Option<u32> {
        None
    }

    /// Time stamps and allocation, now; it may block, see [`Lane::stat`].
    fn stat(&self) -> io::Result<Stat>;

    /// From now on [`Lane::read_cached`] may read so many bytes ahead of each reader that goes in
    /// order; zero: none, as at the beginning.
    fn set_read_ahead(&self, _bytes: u64) {}

    /// Nobody has had the file open, so others may have changed the source: what is remembered of
    /// its bytes is forgotten.
    fn forget(&self) {}

    /// The export is about to end: nothing is to wait any more for a source that is away.
    fn hurry(&self) {}

    /// How it stands with the server that the bytes come from, if they come from one. It asks
    /// nobody.
    fn stats(&self) -> Option<RemoteStats> {
        None
    }

    /// How it stands with a source that cannot be reached now; none: it can, as far as is known. It
    /// asks nobody.
    fn outage(&self) -> Option<Outage> {
        None
    }

    /// Who is woken when [`Backend::outage`] changes; set before the first lane is made.
    fn set_control(&self, _control: Arc<Poller>) {}

    /// Makes everything acknowledged durable, blocking, and disconnects from the source; called
    /// once when all serving threads have ended, also where nothing could be written. A source that
    /// is away is waited for as long as `patience`.
    fn last_flush(&self, patience: Duration) -> io::Result<()>;
}

/// One thread's way to the bytes of a [`Backend`].
///
/// A future that was polled must be polled to its end, unless it waits for a [`WaitsFor::Server`]:
/// I/O that the kernel has begun may still use the buffer.
#[allow(async_fn_in_trait)] // lanes stay on their thread, so no caller needs `Send` futures
pub trait Lane: 'static {
    /// Fills `buf` from `offset`. Fewer bytes than asked mean that the source ends there.
    async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// As [`Lane::read`], for the kernel's page cache: what follows may be fetched before it is
    /// asked for ([`Backend::set_read_ahead`]).
    async fn read_cached(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.read(offset, buf).await
    }

    /// Writes all of `data` at `offset`; past the end only where the export is growable. With
    /// `durable` (O_DSYNC) the data is on stable storage when this returns.
    async fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()>;

    /// Makes every write that has completed durable. `NotConnected`: nothing is lost by the
    /// failure, another flush may succeed.
    async fn flush(&self) -> io::Result<()>;

    /// Makes the range read as zeroes, or fails with `EOPNOTSUPP` and changes nothing.
    async fn zero(&self, offset: u64, len: u64, how: Zero) -> io::Result<()>;

    /// Reserves space for the range, and grows the source to its end unless `keep_size`.
    async fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> io::Result<()>;

    /// Sets the size; `EOPNOTSUPP` where the source cannot.
    async fn resize(&self, size: u64) -> io::Result<()>;

    /// Time stamps and allocation, now.
    async fn stat(&self) -> io::Result<Stat>;

    /// The next data or hole at or after `offset` (below the size). `ENXIO`: no data follows.
    async fn seek(&self, offset: u64, what: Seek) -> io::Result<u64>;
}
