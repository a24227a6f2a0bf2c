//! File operations as NBD commands: splits what is too long, and emulates what the server lacks.
//!
//! Offsets and lengths are multiples of the server's minimum block size here; [`super::blocks`]
//! sees to it.

#![allow(unsafe_code)]

use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use super::connection::Connection;
use super::connections::LaneConnections;
use super::dial::Agreed;
use super::extents::{Extents, Found};
use super::inflight::{Extent, Failure};
use super::unflushed::Change;
use super::wire::{Command, FLAG_FUA, FLAG_NO_HOLE, Headers, transmission_flag};
use crate::backend::{Seek, Zero};

/// The longest WRITE_ZEROES, in bytes: a longer one could keep the server busy past everyone's
/// patience.
const MAX_ZERO: u64 = 1 << 30;
/// Where halving after `EOVERFLOW` ends, in bytes.
const MIN_ZERO: u64 = 64 << 10;
/// Where zeroes are written, so many bytes are some hundred requests at most.
const WRITTEN_ZERO: u64 = 64 << 20;
/// How far a BLOCK_STATUS asks at most where 64 bits can say it, in bytes: what the server can look
/// through within everyone's patience.
const MAX_STATUS: u64 = 1 << 40;

/// The same where 32 bits have to do. All of them set, nbdkit (1.32) fails an assertion where the
/// answer is one long extent, and is gone for all its clients.
const MAX_STATUS_32: u64 = (4 << 30) - (64 << 10);
/// How many BLOCK_STATUS a search for data or a hole sends at most. By 4 GiB each it would take
/// minutes for petabytes, and for ever for the largest disk there is. A count, not a time: a server
/// that stalls makes no hole look like data.
const LONGEST_SEARCH: usize = 2048;

/// The longest READ and WRITE that are sent as one, in bytes: what is longer goes in pieces at
/// once, of which the server receives or sends one while it stores or fetches another, and by
/// several connections if one is slow.
const PIECE: u32 = 512 << 10;

/// The connections that a command may go by.
#[derive(Clone)]
enum Route {
    /// Whichever of the disk's a lane had best use.
    Lane(Rc<LaneConnections>),
    One(Arc<Connection>),
}

/// The commands to a disk.
#[derive(Clone)]
pub struct Commands {
    route: Route,
    agreed: Agreed,
    /// The longest READ and WRITE, in bytes: a multiple of `minimum`.
    max_payload: usize,
    /// The server's minimum block size in bytes: a power of two.
    minimum: u64,
}

impl Commands {
    /// Over whichever connection a lane had best use.
    pub fn of_lane(ways: Rc<LaneConnections>) -> Commands {
        let agreed = ways.agreed().clone();
        Commands::new(Route::Lane(ways), agreed)
    }

    /// Over `connection` only.
    pub fn over(connection: Arc<Connection>) -> Commands {
        let agreed = connection.agreed().clone();
        Commands::new(Route::One(connection), agreed)
    }

    fn new(route: Route, agreed: Agreed) -> Commands {
        let sizes = agreed.block_sizes;
        let longest = sizes.maximum.min(PIECE);
        let max_payload = (longest - longest % sizes.minimum) as usize;
        Commands { route, agreed, max_payload, minimum: sizes.minimum.into() }
    }

    /// Asks by a connection; if that is lost before it has answered, by another, as soon as there
    /// is one.
    async fn ask<R>(
        &self,
        mut request: impl AsyncFnMut(&Connection) -> Result<R, Failure>,
    ) -> io::Result<R> {
        match &self.route {
            Route::One(connection) => Ok(request(connection).await?),
            Route::Lane(ways) => {
                let (mut first, mut times) = (None, 0);
                loop {
                    let connection = ways.pick().await?;
                    match request(&connection).await {
                        Err(Failure::Lost) => {}
                        answer => return Ok(answer?),
                    }
                    times += 1;
                    ways.try_again(*first.get_or_insert_with(Instant::now), times).await?;
                }
            }
        }
    }

    /// As [`Commands::ask`], for what changes the disk: once it is acknowledged it is kept until it
    /// is durable.
    async fn change(
        &self,
        offset: u64,
        change: Change<'_>,
        mut request: impl AsyncFnMut(&Connection) -> Result<(), Failure>,
    ) -> io::Result<()> {
        let ask = async |connection: &Connection| {
            let writing = match &self.route {
                Route::Lane(ways) => Some(ways.unflushed().begin()),
                Route::One(_) => None,
            };
            request(connection).await?;
            if let Some(writing) = writing {
                writing.acknowledged(offset, change);
            }
            Ok(())
        };
        self.ask(ask).await
    }

    /// The server's minimum block size in bytes.
    pub fn minimum(&self) -> u64 {
        self.minimum
    }

    fn has(&self, flag: u16) -> bool {
        self.agreed.has(flag)
    }

    /// Fills `buf` from `offset`.
    pub async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // A length of zero is an error to the server.
        if buf.is_empty() {
            return Ok(());
        } else if buf.len() <= self.max_payload {
            return self.read_piece(offset, buf).await;
        }
        let pieces = (offset..).step_by(self.max_payload).zip(buf.chunks_mut(self.max_payload));
        all(pieces.map(|(at, piece)| self.read_piece(at, piece))).await
    }

    async fn read_piece(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // SAFETY: this future is a lane's, and whoever made its `Io` promises that it is not
        // leaked; or it is on the stack of `Connection::run_blocking` or `block_on`.
        self.ask(async |connection| unsafe { connection.read(offset, buf) }.await).await
    }

    /// Whether a write can be durable when it is acknowledged.
    pub fn has_fua(&self) -> bool {
        self.has(transmission_flag::SEND_FUA)
    }

    /// Writes `data` at `offset`; with `fua`, if the server has that, it is on stable storage when
    /// this returns.
    pub async fn write(&self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        // A length of zero is an error to the server.
        if data.is_empty() {
            return Ok(());
        } else if data.len() <= self.max_payload {
            return self.write_piece(offset, data, fua).await;
        }
        let pieces = (offset..).step_by(self.max_payload).zip(data.chunks(self.max_payload));
        all(pieces.map(|(at, piece)| self.write_piece(at, piece, fua))).await
    }

    async fn write_piece(&self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        let (flags, change) = match fua {
            true => (FLAG_FUA, Change::Durable(data.len() as u64)),
            false => (0, Change::Data(data)),
        };
        self.send(offset, data, flags, change).await
    }

    /// `change`, as a WRITE of `data`.
    async fn send(
        &self,
        offset: u64,
        data: &[u8],
        flags: u16,
        change: Change<'_>,
    ) -> io::Result<()> {
        let request = async |connection: &Connection| {
            // SAFETY: as in `read_piece`.
            unsafe { connection.write(offset, data, flags) }.await
        };
        self.change(offset, change, request).await
    }

    /// Makes completed writes durable, on every connection. Nothing where the server has no FLUSH,
    /// once it is there: it may be another one, which knows nothing of them.
    pub async fn flush(&self) -> io::Result<()> {
        if !self.has(transmission_flag::SEND_FLUSH) {
            if let Route::Lane(ways) = &self.route {
                ways.pick().await?;
            }
            return Ok(());
        }
        self.ask(async |connection| connection.command(Command::Flush, 0, 0, 0).await.map(drop))
            .await
    }

    /// Whether ranges can be zeroed without writing zeroes.
    pub fn has_write_zeroes(&self) -> bool {
        self.has(transmission_flag::SEND_WRITE_ZEROES)
    }

    /// A zeroing that reaches no further than the next multiple of this is few requests, in bytes.
    pub fn zero_step(&self) -> u64 {
        if self.has_write_zeroes() { MAX_ZERO } else { WRITTEN_ZERO }
    }

    /// Makes the range read as zeroes. `EOPNOTSUPP` for [`Zero::Punch`] without the server's
    /// WRITE_ZEROES.
    pub async fn zero(&self, offset: u64, length: u64, how: Zero) -> io::Result<()> {
        let unsupported = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        let zeroed = match self.has_write_zeroes() {
            true => self.write_zeroes(offset, length, how).await,
            false => Err(unsupported()),
        };
        match zeroed {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) && how == Zero::Keep => {
                self.written_zeroes(offset, length).await
            }
            zeroed => zeroed,
        }
    }

    async fn write_zeroes(&self, mut offset: u64, mut length: u64, how: Zero) -> io::Result<()> {
        let flags = match how {
            Zero::Punch => 0,
            Zero::Keep => FLAG_NO_HOLE,
        };
        let mut longest = MAX_ZERO;
        while length > 0 {
            let piece = length.min(longest);
            let request = async |connection: &Connection| {
                connection.command(Command::WriteZeroes, flags, offset, piece).await.map(drop)
            };
            match self.change(offset, Change::Zero(piece, how), request).await {
                Ok(()) => {
                    offset += piece;
                    length -= piece;
                }
                Err(error)
                    if error.raw_os_error() == Some(libc::EOVERFLOW) && piece > self.min_zero() =>
                {
                    longest = (piece / 2).next_multiple_of(self.minimum);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn min_zero(&self) -> u64 {
        MIN_ZERO.max(self.minimum)
    }

    async fn written_zeroes(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        // Not touched, so not backed by memory of its own.
        let zeroes = vec![0; length.min(self.max_payload as u64) as usize];
        while length > 0 {
            let piece = &zeroes[..length.min(self.max_payload as u64) as usize];
            let change = Change::Zero(piece.len() as u64, Zero::Keep);
            self.send(offset, piece, 0, change).await?;
            offset += piece.len() as u64;
            length -= piece.len() as u64;
        }
        Ok(())
    }

    /// The next data or hole at or after `offset`, which need not be aligned. `ENXIO`: no data
    /// follows. Where the server does not tell, everything is data, and so is what `LONGEST_SEARCH`
    /// was not enough to look through: whoever walks through the disk goes on from there. What
    /// `extents` remembers is not asked for.
    pub async fn seek(&self, offset: u64, what: Seek, extents: &Extents) -> io::Result<u64> {
        let size = self.agreed.size;
        if self.agreed.base_allocation.is_none() {
            return Ok(if what == Seek::Data { offset } else { size });
        }
        let (mut at, mut asked) = (offset, 0);
        loop {
            let gap = match extents.find(at, what) {
                Found::At(found) => return Ok(found),
                Found::NotBefore(gap) if gap >= size => break,
                Found::NotBefore(gap) if asked == LONGEST_SEARCH => {
                    return Ok(if what == Seek::Data { gap } else { size });
                }
                Found::NotBefore(gap) => gap,
            };
            asked += 1;
            at = match self.ask_status(gap, what, extents).await? {
                Found::At(found) if found < size => return Ok(found),
                Found::At(end) | Found::NotBefore(end) => end,
            };
        }
        if what == Seek::Hole { Ok(size) } else { Err(io::Error::from_raw_os_error(libc::ENXIO)) }
    }

    /// Whether the server tells where its holes are.
    pub fn tells_holes(&self) -> bool {
        self.agreed.base_allocation.is_some()
    }

    /// Asks for the extents from `at` on, for `extents` to remember.
    pub async fn learn(&self, at: u64, extents: &Extents) -> io::Result<()> {
        self.ask_status(at, Seek::Data, extents).await.map(drop)
    }

    /// Asks for the extents from `at` on, and looks for `what` in them. There is progress: what is
    /// not found is not before a place behind `at`.
    async fn ask_status(&self, at: u64, what: Seek, extents: &Extents) -> io::Result<Found> {
        let size = self.agreed.size;
        let start = at - at % self.minimum;
        let asking = extents.ask(longest_status(self.agreed.headers));
        let reach = asking.reach().min(size - start);
        let mut length = 0;
        let request = async |connection: &Connection| {
            // A server that has come back may know shorter headers only.
            let longest = reach.min(longest_status(connection.agreed().headers));
            length = (longest - longest % self.minimum).max(self.minimum).min(size - start);
            connection.command(Command::BlockStatus, 0, start, length).await
        };
        let told = self.ask(request).await?;
        asking.answered(&(start..start + length), &told, size);
        match find(start, &told, at, what) {
            Found::NotBefore(end) if end <= at => {
                log::error!("the server's block status of {length} bytes at {start} is too short");
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            found => Ok(found),
        }
    }
}

/// How far a BLOCK_STATUS may ask, in bytes.
fn longest_status(headers: Headers) -> u64 {
    match headers {
        Headers::Extended => MAX_STATUS,
        Headers::Simple | Headers::Structured => MAX_STATUS_32,
    }
}

/// Runs the pieces of a request at the same time, so that splitting costs no round trips; the first
/// error counts, once all have ended. A request has few pieces: one of FUSE's carries 1 MiB at
/// most.
pub(super) async fn all(
    pieces: impl Iterator<Item = impl Future<Output = io::Result<()>>>,
) -> io::Result<()> {
    let mut pieces: Vec<_> = pieces.map(Box::pin).collect();
    let mut result = Ok(());
    poll_fn(|cx| {
        pieces.retain_mut(|piece| match piece.as_mut().poll(cx) {
            Poll::Ready(ended) => {
                if result.is_ok() {
                    result = ended;
                }
                false
            }
            Poll::Pending => true,
        });
        if pieces.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}

/// Looks for `what` at or after `from` in the extents that begin at `start`. They may end early, or
/// late.
fn find(start: u64, extents: &[Extent], from: u64, what: Seek) -> Found {
    let mut begin = start;
    for extent in extents {
        let end = begin.saturating_add(extent.length);
        if end > from && extent.zero == (what == Seek::Hole) {
            return Found::At(begin.max(from));
        }
        begin = end;
    }
    Found::NotBefore(begin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_may_be_short_or_long() {
        let extents = [
            Extent { length: 100, zero: true },
            Extent { length: 50, zero: false },
            Extent { length: u64::MAX, zero: true },
        ];
        assert_eq!(find(0, &extents, 0, Seek::Hole), Found::At(0));
        assert_eq!(find(0, &extents, 10, Seek::Hole), Found::At(10));
        assert_eq!(find(0, &extents, 10, Seek::Data), Found::At(100));
        assert_eq!(find(0, &extents, 120, Seek::Data), Found::At(120));
        assert_eq!(find(0, &extents, 120, Seek::Hole), Found::At(150));
        assert_eq!(find(0, &extents, 200, Seek::Data), Found::NotBefore(u64::MAX));
        assert_eq!(find(0, &extents[..1], 10, Seek::Data), Found::NotBefore(100));
    }
}
