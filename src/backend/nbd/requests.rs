//! From requests to sent bytes: the sending half of a connection.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};

use super::inflight::{Cookie, MAX_IN_FLIGHT, Table};
use super::stream::Stream;
use super::wire::RequestHeader;

/// Requests whose last byte has not been sent, in order. Each holds a slot of the [`Table`], so
/// there are at most [`MAX_IN_FLIGHT`]; their data stays with their callers until it goes to the
/// socket.
pub struct Requests {
    queue: VecDeque<(RequestHeader, Cookie)>,
    /// How many bytes of the first one have gone.
    front_sent: usize,
}

impl Requests {
    /// An empty queue.
    pub fn new() -> Requests {
        Requests { queue: VecDeque::with_capacity(MAX_IN_FLIGHT), front_sent: 0 }
    }

    /// Appends a request.
    pub fn push(&mut self, header: RequestHeader, cookie: Cookie) {
        self.queue.push_back((header, cookie));
    }

    /// Whether everything has gone.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Forgets everything: the connection is lost.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.front_sent = 0;
    }

    /// Sends what there is, with one system call if the socket has room. False: it has none now,
    /// and the rest must wait for it.
    pub fn send(&mut self, stream: &mut Stream, table: &mut Table) -> io::Result<bool> {
        while !self.is_empty() {
            match self.send_some(stream, table) {
                Ok((0, _)) => return Err(ErrorKind::WriteZero.into()),
                Ok((sent, full)) => {
                    self.advance(sent, table);
                    // Asking again would only bring EAGAIN.
                    if full {
                        return Ok(false);
                    }
                }
                Err(error) => return not_blocked(Err(error)),
            }
        }
        not_blocked(stream.flush())
    }

    /// How many bytes went, and whether the socket is full now.
    fn send_some(&self, stream: &mut Stream, table: &Table) -> io::Result<(usize, bool)> {
        let mut parts = Vec::with_capacity(2 * self.queue.len());
        for (header, cookie) in &self.queue {
            parts.push(IoSlice::new(header.as_bytes()));
            match table.data_to_send(*cookie) {
                [] => {}
                data => parts.push(IoSlice::new(data)),
            }
        }
        let mut rest = parts.as_mut_slice();
        IoSlice::advance_slices(&mut rest, self.front_sent);
        let length: usize = rest.iter().map(|part| part.len()).sum();
        let sent = stream.send(rest)?;
        Ok((sent, sent < length && stream.short_means_full()))
    }

    fn advance(&mut self, sent: usize, table: &mut Table) {
        self.front_sent += sent;
        while let Some((header, cookie)) = self.queue.front() {
            let length = header.as_bytes().len() + table.data_to_send(*cookie).len();
            if self.front_sent < length {
                break;
            }
            self.front_sent -= length;
            table.sent(*cookie);
            self.queue.pop_front();
        }
    }
}

fn not_blocked(sent: io::Result<()>) -> io::Result<bool> {
    match sent {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}
