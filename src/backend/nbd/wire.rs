//! The bytes of the transmission phase: requests out, reply headers in.
//!
//! Section names are those of `doc/proto.md` in NetworkBlockDevice/nbd. All numbers on the wire are
//! big-endian. Nothing here does I/O or keeps state, so all of it is tested on byte strings.

use std::borrow::Cow;

/// How the server broke the protocol. It ends the connection: the stream's framing cannot be
/// trusted.
pub type Violation = Cow<'static, str>;

const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The longest request header, that of extended headers, in bytes.
pub const MAX_REQUEST_HEADER: usize = 32;
/// The longest reply header, that of extended headers, in bytes.
pub const MAX_REPLY_HEADER: usize = 32;

/// The payload that every server accepts where it tells no maximum, in bytes ("Block size
/// constraints").
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;

/// Transmission flags: what the server says about an export ("Transmission flags").
pub mod transmission_flag {
    // The names are the protocol's, and the list is complete.
    #![allow(missing_docs, dead_code)]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_RESIZE: u16 = 1 << 9;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// The commands that this client sends ("Request types"). TRIM is missing on purpose: what it
/// leaves behind need not read as zeroes, so no file operation can stand on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// `NBD_CMD_READ`
    Read = 0,
    /// `NBD_CMD_WRITE`
    Write = 1,
    /// `NBD_CMD_DISC`; it has no reply.
    Disc = 2,
    /// `NBD_CMD_FLUSH`
    Flush = 3,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes = 6,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus = 7,
}

impl Command {
    /// Whether it changes bytes of the disk: one that nobody waits for any more is an abandoned
    /// write ([`super::abandoned`]), and one that comes later waits for those.
    pub fn changes_the_disk(self) -> bool {
        match self {
            Command::Write | Command::WriteZeroes => true,
            Command::Read | Command::Disc | Command::Flush | Command::BlockStatus => false,
        }
    }
}

/// `NBD_CMD_FLAG_FUA`: durable before it is acknowledged.
pub const FLAG_FUA: u16 = 1 << 0;
/// `NBD_CMD_FLAG_NO_HOLE`: the zeroed range stays allocated.
pub const FLAG_NO_HOLE: u16 = 1 << 1;
/// `NBD_CMD_FLAG_PAYLOAD_LEN`: with extended headers, the length is that of a payload.
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// `NBD_STATE_ZERO` of `base:allocation`: the range reads as zeroes.
pub const STATE_ZERO: u64 = 1 << 1;

/// Which headers both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// Simple replies only.
    Simple,
    /// `NBD_OPT_STRUCTURED_REPLY`: READ and BLOCK_STATUS are answered in chunks, the rest either
    /// way.
    Structured,
    /// `NBD_OPT_EXTENDED_HEADERS`: 64-bit lengths, and every reply is a chunk.
    Extended,
}

/// A request's header, encoded.
#[derive(Clone, Copy, Debug)]
pub struct RequestHeader {
    bytes: [u8; MAX_REQUEST_HEADER],
    len: u8,
}

impl RequestHeader {
    /// Encodes a request ("Request message", "Extended request message").
    ///
    /// # Panics
    /// When `length` exceeds 32 bits without extended headers: callers split long before.
    pub fn new(
        headers: Headers,
        command: Command,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u64,
    ) -> RequestHeader {
        let mut header = RequestHeader { bytes: [0; MAX_REQUEST_HEADER], len: 0 };
        if headers == Headers::Extended {
            let payload = if command == Command::Write { FLAG_PAYLOAD_LEN } else { 0 };
            header.put(&NBD_EXTENDED_REQUEST_MAGIC.to_be_bytes());
            header.put(&(flags | payload).to_be_bytes());
        } else {
            header.put(&NBD_REQUEST_MAGIC.to_be_bytes());
            header.put(&flags.to_be_bytes());
        }
        header.put(&(command as u16).to_be_bytes());
        header.put(&cookie.to_be_bytes());
        header.put(&offset.to_be_bytes());
        if headers == Headers::Extended {
            header.put(&length.to_be_bytes());
        } else {
            let length = u32::try_from(length).expect("callers split long before");
            header.put(&length.to_be_bytes());
        }
        header
    }

    fn put(&mut self, field: &[u8]) {
        let at = usize::from(self.len);
        self.bytes[at..at + field.len()].copy_from_slice(field);
        self.len += field.len() as u8;
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// A reply's header, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// "Simple reply message"; a successful READ's data follows without a length of its own.
    Simple {
        /// Which request it answers.
        cookie: u64,
        /// The server's error number, zero for success.
        error: u32,
    },
    /// "Structured reply chunk message", "Extended reply chunk message".
    Chunk {
        /// Which request it answers.
        cookie: u64,
        /// `NBD_REPLY_FLAG_DONE`: the request's last chunk.
        done: bool,
        /// What the chunk holds.
        kind: ChunkKind,
        /// The length of the chunk's payload in bytes.
        length: u64,
    },
}

/// Reply types of chunks ("Structured reply types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// `NBD_REPLY_TYPE_NONE`
    None,
    /// `NBD_REPLY_TYPE_OFFSET_DATA`
    OffsetData,
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`
    OffsetHole,
    /// `NBD_REPLY_TYPE_BLOCK_STATUS`
    BlockStatus,
    /// `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`
    BlockStatusExt,
    /// `NBD_REPLY_TYPE_ERROR`, `NBD_REPLY_TYPE_ERROR_OFFSET` and every error type yet to come: they
    /// all begin alike.
    Error,
    /// A type that this client did not ask for.
    Unknown(u16),
}

impl ChunkKind {
    fn from_wire(kind: u16) -> ChunkKind {
        match kind {
            0 => ChunkKind::None,
            1 => ChunkKind::OffsetData,
            2 => ChunkKind::OffsetHole,
            5 => ChunkKind::BlockStatus,
            6 => ChunkKind::BlockStatusExt,
            error if error & (1 << 15) != 0 => ChunkKind::Error,
            unknown => ChunkKind::Unknown(unknown),
        }
    }
}

/// Decodes the reply header at the front of `bytes` and tells its length; `None` while it is
/// incomplete.
pub fn decode_reply(
    headers: Headers,
    bytes: &[u8],
) -> Result<Option<(ReplyHeader, usize)>, Violation> {
    let Some(magic) = bytes.first_chunk::<4>() else { return Ok(None) };
    let (length, chunk) = match (u32::from_be_bytes(*magic), headers) {
        (NBD_SIMPLE_REPLY_MAGIC, Headers::Simple | Headers::Structured) => (16, false),
        (NBD_STRUCTURED_REPLY_MAGIC, Headers::Structured) => (20, true),
        (NBD_EXTENDED_REPLY_MAGIC, Headers::Extended) => (32, true),
        (magic, _) => {
            return Err(
                format!("a reply begins with {magic:#010x}, which was not agreed on").into()
            );
        }
    };
    if bytes.len() < length {
        return Ok(None);
    }
    let reply = if chunk {
        ReplyHeader::Chunk {
            done: be_u16(bytes, 4) & 1 != 0,
            kind: ChunkKind::from_wire(be_u16(bytes, 6)),
            cookie: be_u64(bytes, 8),
            length: match headers {
                Headers::Extended => be_u64(bytes, 24),
                Headers::Simple | Headers::Structured => u64::from(be_u32(bytes, 16)),
            },
        }
    } else {
        ReplyHeader::Simple { error: be_u32(bytes, 4), cookie: be_u64(bytes, 8) }
    };
    Ok(Some((reply, length)))
}

/// What a server answers that is about to end, as long as it has clients (NBD_ESHUTDOWN).
pub const SHUTTING_DOWN: u32 = libc::ESHUTDOWN as u32;

/// The number that the user sees for an error of the server's ("Error values").
///
/// The protocol's numbers are Linux's own. A number outside its list becomes `EIO`: some servers
/// let their `ENOSYS` through, which from FUSE would switch the operation off for good.
pub fn errno(error: u32) -> i32 {
    const KNOWN: [i32; 7] = [
        libc::EPERM,
        libc::EIO,
        libc::ENOMEM,
        libc::EINVAL,
        libc::ENOSPC,
        libc::EOVERFLOW,
        libc::EOPNOTSUPP,
    ];
    KNOWN.into_iter().find(|known| *known as u32 == error).unwrap_or(libc::EIO)
}

/// The big-endian number at `at`.
///
/// # Panics
/// When `bytes` is too short: callers have checked its length.
pub fn be_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

/// See [`be_u16`].
pub fn be_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// See [`be_u16`].
pub fn be_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compact_request_is_28_bytes() {
        let header =
            RequestHeader::new(Headers::Structured, Command::Write, FLAG_FUA, 0x0102, 0x1000, 512);
        let bytes = header.as_bytes();
        assert_eq!(bytes.len(), 28);
        assert_eq!(be_u32(bytes, 0), 0x2560_9513);
        assert_eq!(be_u16(bytes, 4), 1);
        assert_eq!(be_u16(bytes, 6), 1);
        assert_eq!(be_u64(bytes, 8), 0x0102);
        assert_eq!(be_u64(bytes, 16), 0x1000);
        assert_eq!(be_u32(bytes, 24), 512);
    }

    #[test]
    fn an_extended_write_says_that_its_length_is_a_payload() {
        let header = RequestHeader::new(Headers::Extended, Command::Write, 0, 7, 1 << 40, 512);
        let bytes = header.as_bytes();
        assert_eq!(bytes.len(), 32);
        assert_eq!(be_u32(bytes, 0), 0x21e4_1c71);
        assert_eq!(be_u16(bytes, 4), 1 << 5);
        assert_eq!(be_u64(bytes, 16), 1 << 40);
        assert_eq!(be_u64(bytes, 24), 512);
        let read = RequestHeader::new(Headers::Extended, Command::Read, 0, 7, 0, 512);
        assert_eq!(be_u16(read.as_bytes(), 4), 0);
    }

    fn structured(kind: u16, flags: u16, cookie: u64, length: u32) -> Vec<u8> {
        let mut bytes = NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    #[test]
    fn chunk_headers_decode() {
        let bytes = structured(1, 1, 9, 4104);
        assert_eq!(decode_reply(Headers::Structured, &bytes[..19]).unwrap(), None);
        let expected =
            ReplyHeader::Chunk { cookie: 9, done: true, kind: ChunkKind::OffsetData, length: 4104 };
        assert_eq!(decode_reply(Headers::Structured, &bytes).unwrap(), Some((expected, 20)));
        let kind = |wire| match decode_reply(Headers::Structured, &structured(wire, 0, 0, 0)) {
            Ok(Some((ReplyHeader::Chunk { kind, .. }, _))) => kind,
            other => panic!("{other:?}"),
        };
        assert_eq!(kind(0x8002), ChunkKind::Error);
        assert_eq!(kind(0xffff), ChunkKind::Error);
        assert_eq!(kind(3), ChunkKind::Unknown(3));
    }

    #[test]
    fn extended_chunk_headers_decode() {
        let mut bytes = NBD_EXTENDED_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, 1, 0, 6]);
        bytes.extend(9_u64.to_be_bytes());
        bytes.extend(4096_u64.to_be_bytes());
        bytes.extend((1_u64 << 33).to_be_bytes());
        let expected = ReplyHeader::Chunk {
            cookie: 9,
            done: true,
            kind: ChunkKind::BlockStatusExt,
            length: 1 << 33,
        };
        assert_eq!(decode_reply(Headers::Extended, &bytes).unwrap(), Some((expected, 32)));
    }

    #[test]
    fn a_reply_form_that_was_not_agreed_on_is_a_violation() {
        let mut simple = NBD_SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        simple.extend([0; 12]);
        assert!(decode_reply(Headers::Simple, &simple).is_ok());
        assert!(decode_reply(Headers::Structured, &simple).is_ok());
        assert!(decode_reply(Headers::Extended, &simple).is_err());
        assert!(decode_reply(Headers::Simple, &structured(0, 1, 0, 0)).is_err());
        assert!(decode_reply(Headers::Structured, b"HTTP/1.1 400").is_err());
    }

    #[test]
    fn errors_are_the_protocols_or_eio() {
        for known in [1, 5, 12, 22, 28, 75, 95] {
            assert_eq!(errno(known), known as i32);
        }
        for unknown in [2, 38, 0x8000_0005, u32::MAX] {
            assert_eq!(errno(unknown), libc::EIO);
        }
    }
}
