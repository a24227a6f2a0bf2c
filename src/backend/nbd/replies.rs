//! From received bytes to answers: the receiving half of a connection.
//!
//! Bytes arrive in the *staging area*, except the payload of a large READ, which goes on straight
//! to the caller's buffer as soon as its header is known. One system call asks for the rest of such
//! a payload and, behind it, for what follows in the staging area; so many small replies, or the
//! end of one large and the beginning of the next, cost one call. While a large payload may be
//! next, little is read ahead, so that little of it is copied.

use std::io::{self, ErrorKind, IoSliceMut};
use std::task::Waker;

use super::inflight::{Cookie, Extent, SHUTTING_DOWN, Table};
use super::stream::{Received, Stream};
use super::wire::{
    self, ChunkKind, Headers, MAX_REPLY_HEADER, ReplyHeader, Violation, be_u16, be_u32, be_u64,
};

/// What one system call can bring of small replies: those of 62 reads of 4 KiB.
const STAGING_BYTES: usize = 256 << 10;
/// How much is read ahead while a large payload may be next: enough for a dozen acknowledgements.
const SHORT_BYTES: usize = 512;
/// The longest payload of an error chunk that is believed: number, string, offset.
const MAX_ERROR_PAYLOAD: u64 = 4 + 2 + 65535 + 8;

const _: () = assert!(SHORT_BYTES >= MAX_REPLY_HEADER + 8);
const _: () = assert!(STAGING_BYTES as u64 > MAX_ERROR_PAYLOAD + MAX_REPLY_HEADER as u64);

/// What comes next on the stream.
#[derive(Clone, Copy, Debug)]
enum Expect {
    Header,
    /// The fixed part of a chunk's payload, or all of it.
    Chunk {
        cookie: Cookie,
        done: bool,
        kind: ChunkKind,
        length: u64,
    },
    /// Data of a READ: `left` bytes, for the buffer from `at` on, or to be drained.
    Data {
        cookie: Cookie,
        done: bool,
        at: Option<u64>,
        left: u64,
    },
    /// Extents of a BLOCK_STATUS, of 16 bytes each with extended headers, else of 8.
    Extents {
        cookie: Cookie,
        done: bool,
        left: u64,
    },
}

/// The receiving half of a connection.
pub struct Replies {
    headers: Headers,
    base_allocation: Option<u32>,
    /// Received and not yet understood: `start..end`.
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    expect: Expect,
}

impl Replies {
    /// At the first byte of transmission.
    pub fn new(headers: Headers, base_allocation: Option<u32>) -> Replies {
        Replies {
            headers,
            base_allocation,
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            expect: Expect::Header,
        }
    }

    /// Receives once and takes in what came. Callers whose answers are complete go to `wakers`. An
    /// error ends the connection.
    pub fn receive(
        &mut self,
        stream: &mut Stream,
        table: &mut Table,
        wakers: &mut Vec<Waker>,
    ) -> io::Result<Received> {
        // What is left over is less than a header or an error's text.
        self.staging.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let limit = match table.awaits_direct_read() {
            true => (self.end + SHORT_BYTES).max(self.needed()),
            false => STAGING_BYTES,
        };
        let received = match self.expect {
            // The staging area is empty here: `parse` has moved all of it to the buffer.
            Expect::Data { cookie, done, at: Some(at), left } => {
                match table.destination(cookie, at, left) {
                    Some(buf) => {
                        let behind = &mut self.staging[..limit];
                        let mut parts = [IoSliceMut::new(buf), IoSliceMut::new(behind)];
                        let received = stream.receive(&mut parts)?;
                        let direct = left.min(received.bytes as u64);
                        self.end = received.bytes - direct as usize;
                        let (at, left) = (Some(at + direct), left - direct);
                        self.expect = Expect::Data { cookie, done, at, left };
                        received
                    }
                    None => self.receive_staged(stream, STAGING_BYTES)?,
                }
            }
            Expect::Data { .. } => self.receive_staged(stream, STAGING_BYTES)?,
            _ => self.receive_staged(stream, limit)?,
        };
        self.parse(table, wakers).map_err(|violation| match violation {
            end if end == SHUTTING_DOWN => io::Error::new(ErrorKind::ConnectionAborted, end),
            violation => io::Error::new(ErrorKind::InvalidData, violation.into_owned()),
        })?;
        Ok(received)
    }

    fn receive_staged(&mut self, stream: &mut Stream, limit: usize) -> io::Result<Received> {
        let mut parts = [IoSliceMut::new(&mut self.staging[self.end..limit])];
        let received = stream.receive(&mut parts)?;
        self.end += received.bytes;
        Ok(received)
    }

    /// How many staged bytes the next step of [`Self::parse`] needs at most.
    fn needed(&self) -> usize {
        match self.expect {
            Expect::Header | Expect::Data { .. } => MAX_REPLY_HEADER,
            Expect::Chunk { kind, length, .. } => fixed_part(kind, length) as usize,
            Expect::Extents { .. } => 16,
        }
    }

    /// Takes from the staging area until it is empty or holds only part of something.
    fn parse(&mut self, table: &mut Table, wakers: &mut Vec<Waker>) -> Result<(), Violation> {
        while self.step(table, wakers)? {}
        Ok(())
    }

    /// One step; false if it needs more bytes.
    fn step(&mut self, table: &mut Table, wakers: &mut Vec<Waker>) -> Result<bool, Violation> {
        let staged = &self.staging[self.start..self.end];
        match self.expect {
            Expect::Header => {
                let Some((header, length)) = wire::decode_reply(self.headers, staged)? else {
                    return Ok(false);
                };
                self.start += length;
                self.expect = match header {
                    ReplyHeader::Simple { cookie, error } => {
                        self.simple(Cookie(cookie), error, table, wakers)?
                    }
                    ReplyHeader::Chunk { cookie, done, kind, length } => {
                        Expect::Chunk { cookie: Cookie(cookie), done, kind, length }
                    }
                };
                Ok(true)
            }
            Expect::Chunk { cookie, done, kind, length } => {
                let fixed = fixed_part(kind, length) as usize;
                if staged.len() < fixed {
                    return Ok(false);
                }
                let payload = &staged[..fixed];
                self.expect = match self.chunk(table, cookie, done, kind, payload, length)? {
                    Some(next) => next,
                    None => finish(table, cookie, done, wakers)?,
                };
                self.start += fixed;
                Ok(true)
            }
            Expect::Data { cookie, done, at, left } => {
                let n = left.min(staged.len() as u64);
                if let Some(at) = at
                    && let Some(buf) = table.destination(cookie, at, n)
                {
                    buf.copy_from_slice(&staged[..n as usize]);
                }
                self.start += n as usize;
                let left = left - n;
                if left > 0 {
                    self.expect = Expect::Data { cookie, done, at: at.map(|at| at + n), left };
                    return Ok(false);
                }
                self.expect = finish(table, cookie, done, wakers)?;
                Ok(true)
            }
            Expect::Extents { cookie, done, left } => {
                let wide = self.headers == Headers::Extended;
                let size: u64 = if wide { 16 } else { 8 };
                if left == 0 {
                    self.expect = finish(table, cookie, done, wakers)?;
                    return Ok(true);
                }
                if (staged.len() as u64) < size {
                    return Ok(false);
                }
                let (length, state) = match wide {
                    true => (be_u64(staged, 0), be_u64(staged, 8)),
                    false => (be_u32(staged, 0).into(), be_u32(staged, 4).into()),
                };
                table.extent(cookie, Extent { length, zero: state & wire::STATE_ZERO != 0 })?;
                self.start += size as usize;
                self.expect = Expect::Extents { cookie, done, left: left - size };
                Ok(true)
            }
        }
    }

    /// Takes in a chunk of which `payload` is the fixed part; what is to follow, if anything is.
    fn chunk(
        &self,
        table: &mut Table,
        cookie: Cookie,
        done: bool,
        kind: ChunkKind,
        payload: &[u8],
        length: u64,
    ) -> Result<Option<Expect>, Violation> {
        let malformed = || Violation::from(format!("a chunk {kind:?} has {length} bytes"));
        match kind {
            ChunkKind::None if length == 0 && done => Ok(None),
            ChunkKind::OffsetData if length > 8 => {
                let left = length - 8;
                let at = table.begin_data(cookie, be_u64(payload, 0), left)?;
                Ok(Some(Expect::Data { cookie, done, at, left }))
            }
            ChunkKind::OffsetHole if length == 12 => {
                table.hole(cookie, be_u64(payload, 0), be_u32(payload, 8).into())?;
                Ok(None)
            }
            ChunkKind::BlockStatus if self.headers == Headers::Extended => {
                Err("extents are told in 32 bits, though extended headers were agreed on".into())
            }
            ChunkKind::BlockStatus if length >= 12 && (length - 4).is_multiple_of(8) => {
                self.check_context(be_u32(payload, 0))?;
                Ok(Some(Expect::Extents { cookie, done, left: length - 4 }))
            }
            ChunkKind::BlockStatusExt if self.headers != Headers::Extended => {
                Err("extents are told in 64 bits, which was not agreed on".into())
            }
            ChunkKind::BlockStatusExt if length >= 24 && (length - 8).is_multiple_of(16) => {
                self.check_context(be_u32(payload, 0))?;
                if u64::from(be_u32(payload, 4)) != (length - 8) / 16 {
                    return Err("a chunk's count of extents is not that of its length".into());
                }
                Ok(Some(Expect::Extents { cookie, done, left: length - 8 }))
            }
            ChunkKind::Error if (6..=MAX_ERROR_PAYLOAD).contains(&length) => {
                let text =
                    payload.get(6..6 + usize::from(be_u16(payload, 4))).ok_or_else(malformed)?;
                if !text.is_empty() {
                    log::debug!("the server reports an error: {}", String::from_utf8_lossy(text));
                }
                table.error(cookie, be_u32(payload, 0))?;
                Ok(None)
            }
            ChunkKind::Unknown(kind) => {
                Err(format!("a chunk has type {kind}, which is unknown").into())
            }
            _ => Err(malformed()),
        }
    }

    fn check_context(&self, id: u32) -> Result<(), Violation> {
        match self.base_allocation {
            Some(own) if own == id => Ok(()),
            _ => Err(format!("extents of context {id}, which was not asked for").into()),
        }
    }

    fn simple(
        &self,
        cookie: Cookie,
        error: u32,
        table: &mut Table,
        wakers: &mut Vec<Waker>,
    ) -> Result<Expect, Violation> {
        if error != 0 {
            table.error(cookie, error)?;
        } else if table.is_read(cookie)? {
            if self.headers != Headers::Simple {
                return Err("a READ is answered without chunks, which were agreed on".into());
            }
            let (offset, length) = table.range(cookie)?;
            let at = table.begin_data(cookie, offset, length)?;
            return Ok(Expect::Data { cookie, done: true, at, left: length });
        }
        finish(table, cookie, true, wakers)
    }
}

/// How many bytes of a chunk's payload are needed before it can be taken in.
fn fixed_part(kind: ChunkKind, length: u64) -> u64 {
    let fixed = match kind {
        ChunkKind::None | ChunkKind::Unknown(_) => 0,
        ChunkKind::OffsetData | ChunkKind::BlockStatusExt => 8,
        ChunkKind::OffsetHole => 12,
        ChunkKind::BlockStatus => 4,
        ChunkKind::Error => MAX_ERROR_PAYLOAD,
    };
    fixed.min(length)
}

fn finish(
    table: &mut Table,
    cookie: Cookie,
    done: bool,
    wakers: &mut Vec<Waker>,
) -> Result<Expect, Violation> {
    if done {
        table.complete(cookie, wakers)?;
    }
    Ok(Expect::Header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use crate::backend::nbd::inflight::tests::{begin_read, begin_status};

    /// Any bytes at all must end in answers or in a violation: never in a panic, nor in a loop.
    #[test]
    fn garbage_is_survived() {
        let mut seed = 1_u64;
        let mut random = move |bound: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % bound
        };
        let mut violations = 0;
        for case in 0..3000_u64 {
            let headers =
                [Headers::Simple, Headers::Structured, Headers::Extended][case as usize % 3];
            let mut table = Table::new(Default::default());
            let mut bufs = vec![vec![0; 100]; 4];
            bufs.push(vec![0; 20_000]);
            let mut cookies: Vec<_> =
                bufs.iter_mut().map(|buf| begin_read(&mut table, 4096, buf)).collect();
            cookies.push(begin_status(&mut table));
            cookies.iter().for_each(|cookie| table.sent(*cookie));

            let mut bytes = Vec::new();
            for _ in 0..random(20) {
                let cookie = cookies[random(6) as usize].0 + random(50) / 49;
                let kind = [0, 1, 1, 1, 2, 2, 5, 6, 0x8001, 0x8002, 0xffff, 9][random(12) as usize];
                let mut payload = match kind {
                    1 => {
                        [&(4096 + 10 * random(11)).to_be_bytes()[..], &vec![1; random(60) as usize]]
                            .concat()
                    }
                    2 => [&(4096 + random(101)).to_be_bytes()[..], &[0, 0, 0, random(100) as u8]]
                        .concat(),
                    5 => [0, 0, 0, 5, 0, 0, 0, 9, 0, 0, 0, 3].to_vec(),
                    0x8001 | 0x8002 => [0, 0, 0, 5, 0, random(4) as u8, b'a', b'b', b'c'].to_vec(),
                    _ => vec![0; random(30) as usize],
                };
                if random(10) == 0 {
                    payload.truncate(random(10) as usize);
                }
                let done = random(2) as u16;
                let magic: u32 = match (headers, random(30)) {
                    (_, 0) => random(1 << 31) as u32,
                    (Headers::Simple, _) => 0x6744_6698,
                    (Headers::Structured, 1..10) => 0x6744_6698,
                    (Headers::Structured, _) => 0x668e_33ef,
                    (Headers::Extended, _) => 0x6e8a_278c,
                };
                bytes.extend(magic.to_be_bytes());
                if magic == 0x6744_6698 {
                    bytes.extend([0, 0, 0, random(2) as u8 * 5]);
                    bytes.extend(cookie.to_be_bytes());
                    bytes.extend(vec![2; random(2) as usize * 100]);
                    continue;
                }
                bytes.extend(done.to_be_bytes());
                bytes.extend((kind as u16).to_be_bytes());
                bytes.extend(cookie.to_be_bytes());
                if headers == Headers::Extended {
                    bytes.extend([0; 8]);
                    bytes.extend((payload.len() as u64).to_be_bytes());
                } else {
                    bytes.extend((payload.len() as u32).to_be_bytes());
                }
                bytes.extend(payload);
            }

            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.write_all(&bytes).unwrap();
            drop(theirs);
            let mut stream = Stream::plain(Arc::new(ours.into()));
            let mut replies = Replies::new(headers, Some(5));
            let mut wakers = Vec::new();
            let error = loop {
                if let Err(error) = replies.receive(&mut stream, &mut table, &mut wakers) {
                    break error;
                }
            };
            match error.kind() {
                ErrorKind::InvalidData => violations += 1,
                kind => assert_eq!(kind, ErrorKind::UnexpectedEof),
            }
            table.fail_all(&mut wakers);
        }
        // The cases are worth something: neither all good nor all bad.
        assert!((500..2900).contains(&violations), "{violations}");
    }
}
