//! A scripted server in transmission: a thread that has the other end of a socket pair.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use smol::LocalExecutor;
use socket2::Socket;

use super::super::connection::Connection;
use super::super::dial::{Agreed, Opened};
use super::super::handshake::BlockSizes;
use super::super::stream::Stream;
use super::super::wire::{Command, Headers, be_u16, be_u32, be_u64, transmission_flag};
use crate::io::Io;

/// The id that the peer gave to `base:allocation`.
pub const CONTEXT: u32 = 5;

const DISC: u16 = Command::Disc as u16;

/// The server's end.
pub struct Peer {
    pub socket: UnixStream,
    headers: Headers,
}

/// A request as the server sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u64,
    pub data: Vec<u8>,
}

impl Peer {
    /// The next request; `None` when the client has hung up, with `NBD_CMD_DISC` or without.
    pub fn request(&mut self) -> Option<Seen> {
        self.request_or_disconnect().filter(|seen| seen.command != DISC)
    }

    /// The next request is `NBD_CMD_DISC`, and the last one.
    pub fn sees_disconnect(&mut self) -> bool {
        let disconnects = self.request_or_disconnect().is_some_and(|seen| seen.command == DISC);
        disconnects && self.request_or_disconnect().is_none()
    }

    fn request_or_disconnect(&mut self) -> Option<Seen> {
        let mut header = vec![0; if self.headers == Headers::Extended { 32 } else { 28 }];
        self.socket.read_exact(&mut header).ok()?;
        let length = match self.headers {
            Headers::Extended => be_u64(&header, 24),
            _ => be_u32(&header, 24).into(),
        };
        let mut seen = Seen {
            flags: be_u16(&header, 4),
            command: be_u16(&header, 6),
            cookie: be_u64(&header, 8),
            offset: be_u64(&header, 16),
            length,
            data: Vec::new(),
        };
        if seen.command == 1 {
            seen.data = vec![0; length as usize];
            self.socket.read_exact(&mut seen.data).unwrap();
        }
        Some(seen)
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn simple(&mut self, cookie: u64, error: u32, data: &[u8]) {
        let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(data);
        self.send(&bytes);
    }

    pub fn chunk(&mut self, cookie: u64, done: bool, kind: u16, payload: &[u8]) {
        let bytes = chunk(self.headers, cookie, done, kind, payload);
        self.send(&bytes);
    }

    pub fn data(&mut self, cookie: u64, done: bool, offset: u64, data: &[u8]) {
        self.chunk(cookie, done, 1, &[&offset.to_be_bytes(), data].concat());
    }

    pub fn hole(&mut self, cookie: u64, done: bool, offset: u64, length: u32) {
        self.chunk(cookie, done, 2, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat());
    }

    pub fn done(&mut self, cookie: u64) {
        self.chunk(cookie, true, 0, &[]);
    }

    pub fn error(&mut self, cookie: u64, done: bool, kind: u16, error: u32, text: &str) {
        let length = (text.len() as u16).to_be_bytes();
        self.chunk(
            cookie,
            done,
            kind,
            &[&error.to_be_bytes()[..], &length, text.as_bytes()].concat(),
        );
    }
}

pub fn chunk(headers: Headers, cookie: u64, done: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
    let magic: u32 = if headers == Headers::Extended { 0x6e8a_278c } else { 0x668e_33ef };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(u16::from(done).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    if headers == Headers::Extended {
        bytes.extend([0; 8]);
        bytes.extend((payload.len() as u64).to_be_bytes());
    } else {
        bytes.extend((payload.len() as u32).to_be_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// A client connection to `script`, which runs on a thread of its own.
pub fn connection(
    headers: Headers,
    script: impl FnOnce(Peer) + Send + 'static,
) -> (Arc<Connection>, JoinHandle<()>) {
    // Writable, with FLUSH, FUA, TRIM and WRITE_ZEROES.
    connection_with(0x7d, headers, script)
}

/// As [`connection`], to a server that allows several.
pub fn one_of_several(
    script: impl FnOnce(Peer) + Send + 'static,
) -> (Arc<Connection>, JoinHandle<()>) {
    connection_with(0x7d | transmission_flag::CAN_MULTI_CONN, Headers::Structured, script)
}

/// As [`connection`], with these transmission flags.
pub fn connection_with(
    flags: u16,
    headers: Headers,
    script: impl FnOnce(Peer) + Send + 'static,
) -> (Arc<Connection>, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let socket = Arc::new(Socket::from(ours));
    let agreed = Agreed {
        size: 1 << 30,
        flags,
        block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 1 << 25 },
        headers,
        base_allocation: Some(CONTEXT),
    };
    let stream = Stream::plain(socket.clone());
    let connection =
        Connection::new("peer".into(), Opened { stream, socket, agreed }, Arc::default());
    let peer = std::thread::spawn(move || script(Peer { socket: theirs, headers }));
    (connection, peer)
}

/// Runs `work` while this thread drives the connection.
pub fn drive<R>(
    connection: &Arc<Connection>,
    work: impl AsyncFnOnce(Rc<LocalExecutor<'static>>) -> R,
) -> R {
    let executor = Rc::new(LocalExecutor::new());
    let io = Io::of_a_test(None, executor.clone());
    let _driver = connection.driver(&io, None, |_| {});
    smol::block_on(executor.run(work(executor.clone())))
}
