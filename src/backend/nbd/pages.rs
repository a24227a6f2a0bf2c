//! Sending a payload by its pages, without copying it to the socket.
//!
//! `vmsplice(2)` puts references to the caller's pages into a pipe, and `splice(2)` moves those to the socket. The server's
//! side of a Unix socket, or the network card, then reads the very pages. Whatever is written to them before
//! it has done so would be sent: [`crate::backend::Lane::write`] tells who sees to that.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys;

/// A pipe's room, in bytes: a payload of FUSE at once. It is what a user may have by default (`fs.pipe-max-size`).
const ROOM: usize = 1 << 20;

/// A pipe between a payload's pages and a socket.
pub struct Pages {
    reader: OwnedFd,
    writer: OwnedFd,
    /// How many bytes of the payload are in the pipe.
    held: usize,
}

impl Pages {
    /// An empty pipe. `EPERM`, `EMFILE` where this user may have no more (of that size).
    pub fn new() -> io::Result<Pages> {
        let (reader, writer) = sys::pipe(ROOM)?;
        Ok(Pages { reader, writer, held: 0 })
    }

    /// Whether the pipe has some of the payload that was sent last.
    pub fn holds_some(&self) -> bool {
        self.held > 0
    }

    /// Sends from the front of `data`, and returns how many bytes went. `WouldBlock`: none for now.
    ///
    /// What the pipe holds counts as the front: call it with what is left of one payload until that has gone.
    pub fn send(&mut self, socket: &impl AsRawFd, data: &[u8]) -> io::Result<usize> {
        if self.held == 0 {
            self.held = sys::vmsplice(&self.writer, data)?;
        }
        let sent = sys::splice(&self.reader, socket, self.held)?;
        self.held -= sent;
        Ok(sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_payload_arrives_whole_through_a_full_socket() {
        let (socket, mut server) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let payload: Vec<u8> = (0..3 * ROOM as u32 / 4).flat_map(u32::to_le_bytes).collect();
        let mut pages = Pages::new().unwrap();
        let (mut sent, mut got, mut waited) = (0, Vec::new(), 0);
        while sent < payload.len() {
            match pages.send(&socket, &payload[sent..]) {
                Ok(n) => sent += n,
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::WouldBlock);
                    waited += 1;
                    let mut some = vec![0; 100_000];
                    let n = server.read(&mut some).unwrap();
                    got.extend_from_slice(&some[..n]);
                }
            }
        }
        drop(socket);
        server.read_to_end(&mut got).unwrap();
        assert!(waited > 0 && !pages.holds_some());
        assert!(got == payload);
    }
}
