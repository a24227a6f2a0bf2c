//! The byte stream of a connection in transmission, plain or inside TLS. Nothing here blocks.

use std::io::{self, BufRead, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::sync::Arc;

use rustls::ClientConnection;
use socket2::Socket;

/// What one [`Stream::receive`] brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// How many bytes.
    pub bytes: usize,
    /// Nothing more is there now: wait for readiness before asking again. A short read says so
    /// without a second system call that would only return `EAGAIN`.
    pub drained: bool,
}

/// How many system calls a connection has cost: the price of a request is their share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemCalls {
    /// `sendmsg`
    pub sends: u64,
    /// `recvmsg`
    pub receives: u64,
}

impl SystemCalls {
    /// The sum.
    pub fn plus(self, other: SystemCalls) -> SystemCalls {
        SystemCalls { sends: self.sends + other.sends, receives: self.receives + other.receives }
    }
}

/// A byte stream over a non-blocking socket.
pub struct Stream {
    socket: Counted,
    /// Without it payloads go between the socket and the caller's buffers; with it the cryptography
    /// copies them anyway.
    tls: Option<Box<Tls>>,
}

impl Stream {
    /// Without TLS.
    pub fn plain(socket: Arc<Socket>) -> Stream {
        let socket = Counted { socket, calls: SystemCalls::default() };
        Stream { socket, tls: None }
    }

    /// Over an established TLS session.
    pub fn tls(socket: Arc<Socket>, mut session: ClientConnection) -> Stream {
        // Bounded by `Tls::send` instead, which takes nothing while ciphertext waits.
        session.set_buffer_limit(None);
        let ciphertext = vec![0; CIPHERTEXT_BYTES].into_boxed_slice();
        let tls = Tls { session, ciphertext, start: 0, end: 0 };
        Stream { tls: Some(Box::new(tls)), ..Stream::plain(socket) }
    }

    /// The system calls so far.
    pub fn system_calls(&self) -> SystemCalls {
        self.socket.calls
    }

    /// Whether a short [`Stream::send`] means that the socket is full.
    pub fn short_means_full(&self) -> bool {
        self.tls.is_none()
    }

    /// Sends from the front of `parts`; returns how many bytes it took. `WouldBlock`: none for now.
    pub fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.send(parts),
            Some(tls) => tls.send(&mut self.socket, parts),
        }
    }

    /// Sends what TLS still holds back; `WouldBlock` if some of it must wait.
    pub fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => tls.flush(&mut self.socket),
        }
    }

    /// Whether [`Stream::flush`] has something to do.
    pub fn wants_flush(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.session.wants_write())
    }

    /// Receives into `parts`, in their order. `UnexpectedEof` when the server has closed the
    /// connection.
    pub fn receive(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<Received> {
        match &mut self.tls {
            None => self.socket.receive(parts),
            Some(tls) => tls.receive(&mut self.socket, parts),
        }
    }

    /// Ends the stream in order (TLS: close_notify): nothing is sent after this.
    pub fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.session.send_close_notify();
        }
        let _ = self.flush();
    }
}

/// The socket.
struct Counted {
    socket: Arc<Socket>,
    calls: SystemCalls,
}

impl Counted {
    fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            self.calls.sends += 1;
            match self.socket.send_vectored_with_flags(parts, libc::MSG_NOSIGNAL) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                sent => return sent,
            }
        }
    }

    fn receive(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<Received> {
        let room: usize = parts.iter().map(|part| part.len()).sum();
        loop {
            self.calls.receives += 1;
            return match (&*self.socket).read_vectored(parts) {
                Ok(0) if room > 0 => Err(ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => Ok(Received { bytes, drained: bytes < room }),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    Ok(Received { bytes: 0, drained: true })
                }
                Err(error) => Err(error),
            };
        }
    }
}

/// How much ciphertext one system call may bring: rustls alone would ask for 4 KiB at a time.
const CIPHERTEXT_BYTES: usize = 256 << 10;
/// How much plaintext one [`Stream::send`] takes, so that the ciphertext it becomes stays bounded.
const PLAINTEXT_BYTES: usize = 256 << 10;

/// A TLS session.
struct Tls {
    session: ClientConnection,
    /// Received and not yet given to the session: `start..end`.
    ciphertext: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Lets rustls write its records with one system call.
struct Records<'a>(&'a mut Counted);

impl Write for Records<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.send(&[IoSlice::new(data)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Tls {
    fn flush(&mut self, socket: &mut Counted) -> io::Result<()> {
        while self.session.wants_write() {
            self.session.write_tls(&mut Records(socket))?;
        }
        Ok(())
    }

    fn send(&mut self, socket: &mut Counted, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.flush(socket)?;
        let mut taken = 0;
        for part in parts {
            let part = &part[..part.len().min(PLAINTEXT_BYTES - taken)];
            taken += self.session.writer().write(part)?;
            if taken == PLAINTEXT_BYTES {
                break;
            }
        }
        match self.flush(socket) {
            // The plaintext is ours now; `wants_flush` tells that some of it still has to go out.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(taken),
            flushed => flushed.map(|()| taken),
        }
    }

    fn receive(
        &mut self,
        socket: &mut Counted,
        parts: &mut [IoSliceMut<'_>],
    ) -> io::Result<Received> {
        let room: usize = parts.iter().map(|part| part.len()).sum();
        let mut bytes = 0;
        let mut socket_drained = false;
        loop {
            let closed = self.take_plaintext(parts, &mut bytes)?;
            if closed && bytes == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if closed || bytes == room {
                return Ok(Received { bytes, drained: false });
            }
            if self.start == self.end {
                if bytes > 0 || socket_drained {
                    // What was received is used up, and the caller comes back for more unless
                    // drained.
                    return Ok(Received { bytes, drained: socket_drained });
                }
                let mut ciphertext = [IoSliceMut::new(&mut self.ciphertext)];
                let received = socket.receive(&mut ciphertext)?;
                (self.start, self.end) = (0, received.bytes);
                socket_drained = received.drained;
            }
            self.decrypt()?;
        }
    }

    /// Gives the session what was received, until it has plaintext to be taken.
    fn decrypt(&mut self) -> io::Result<()> {
        while self.start < self.end {
            let mut rest = &self.ciphertext[self.start..self.end];
            let before = rest.len();
            self.session.read_tls(&mut rest)?;
            self.start += before - rest.len();
            let state = self
                .session
                .process_new_packets()
                .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
            if state.peer_has_closed() {
                // What follows a close_notify means nothing.
                self.start = self.end;
            }
            if state.plaintext_bytes_to_read() > 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Copies decrypted bytes to `parts` after the `filled` bytes that they hold already, and
    /// counts them there. Tells whether the peer has closed the session and nothing is left.
    fn take_plaintext(
        &mut self,
        parts: &mut [IoSliceMut<'_>],
        filled: &mut usize,
    ) -> io::Result<bool> {
        let mut skip = *filled;
        let mut reader = self.session.reader();
        for part in parts {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            let mut room = &mut part[std::mem::take(&mut skip)..];
            while !room.is_empty() {
                match reader.fill_buf() {
                    Ok([]) => return Ok(true),
                    Ok(plaintext) => {
                        let n = plaintext.len().min(room.len());
                        room[..n].copy_from_slice(&plaintext[..n]);
                        reader.consume(n);
                        room = &mut room[n..];
                        *filled += n;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(false)
    }
}
