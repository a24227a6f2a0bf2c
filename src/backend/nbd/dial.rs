//! From a URI to an open export: socket, TLS, option negotiation, and the older servers.
//!
//! All of it blocks, bounded by the connect time-out for the whole of it: name resolution, each
//! address, TLS and the handshake, however slowly the server's bytes come. Nothing of it runs while
//! requests are served, except that a serving thread opens its own connection at its start.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use socket2::Socket;

use super::Options;
use super::connect::{connect_tcp, connect_unix, connect_vsock, left_until};
use super::error::Error;
use super::handshake::{
    BlockSizes, ExportReply, Greeting, Haggling, Older, check_block_sizes, sane_flags, stream_error,
};
use super::stream::Stream;
use super::tls;
use super::uri::{Address, Uri};
use super::wire::{DEFAULT_MAX_PAYLOAD, Headers, transmission_flag};

/// What was agreed on with a server, fixed for the life of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// In bytes: never zero, and no more than a file can have.
    pub size: u64,
    /// See [`transmission_flag`]; zero for what an older server might have.
    pub flags: u16,
    /// The server's, or the protocol's defaults.
    pub block_sizes: BlockSizes,
    /// How requests and replies are framed.
    pub headers: Headers,
    /// The id of `base:allocation`, where the server has it. It may differ between connections.
    pub base_allocation: Option<u32>,
}

impl Agreed {
    fn new(
        reply: ExportReply,
        headers: Headers,
        base_allocation: Option<u32>,
    ) -> Result<Agreed, Error> {
        // "Block size constraints": what to assume where the server says nothing.
        let block_sizes = match reply.block_sizes {
            Some(sizes) => check_block_sizes(sizes)?,
            None => BlockSizes { minimum: 1, preferred: 4096, maximum: DEFAULT_MAX_PAYLOAD },
        };
        Ok(Agreed {
            size: reply.size,
            flags: sane_flags(reply.flags),
            block_sizes,
            headers,
            base_allocation,
        })
    }

    /// Whether the server set `flag`.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Why a request for this one cannot go to the `other`, if it cannot: how they talk is all that
    /// they may differ in, and what the other has more.
    pub fn difference(&self, other: &Agreed) -> Option<String> {
        if self.size != other.size {
            return Some(format!("it had {} bytes and has {}", self.size, other.size));
        }
        if self.has(transmission_flag::READ_ONLY) != other.has(transmission_flag::READ_ONLY) {
            let now =
                if other.has(transmission_flag::READ_ONLY) { "read-only" } else { "writable" };
            return Some(format!("it is {now} now"));
        }
        let (ours, theirs) = (self.block_sizes, other.block_sizes);
        if theirs.minimum > ours.minimum || theirs.maximum < ours.maximum {
            return Some(format!(
                "it took requests of {} to {} bytes and takes {} to {}",
                ours.minimum, ours.maximum, theirs.minimum, theirs.maximum
            ));
        }
        let needed = [
            ("FLUSH", transmission_flag::SEND_FLUSH),
            ("FUA", transmission_flag::SEND_FUA),
            ("WRITE_ZEROES", transmission_flag::SEND_WRITE_ZEROES),
        ];
        let lacks = needed.iter().find(|(_, flag)| self.has(*flag) && !other.has(*flag));
        match lacks {
            Some((name, _)) => Some(format!("it had {name} and has not")),
            None if self.base_allocation.is_some() && other.base_allocation.is_none() => {
                Some("it told of holes and does not".into())
            }
            None => None,
        }
    }
}

/// An open export, its socket not blocking.
pub struct Opened {
    /// The byte stream, at the first byte of transmission.
    pub stream: Stream,
    /// The socket under the stream: for readiness.
    pub socket: Arc<Socket>,
    /// What was agreed on.
    pub agreed: Agreed,
}

/// Opens connections to one export; keeps what all of them share.
#[derive(Clone)]
pub struct Dialer {
    uri: Uri,
    time_limit: Duration,
    tls: Option<Arc<ClientConfig>>,
}

/// How far a connection came before an export was chosen.
pub enum Haggled {
    /// Options can be sent.
    Options(Haggling<Handshake>, Headers),
    /// It is of no use: see [`Dialer::open`].
    Older(Older),
}

/// A blocking socket of which each call ends at the deadline.
pub struct Timed {
    socket: Socket,
    deadline: Instant,
}

impl Timed {
    /// Lets the next call take what is left.
    fn socket(&mut self) -> io::Result<&mut Socket> {
        let left = left_until(self.deadline)?;
        self.socket.set_read_timeout(Some(left))?;
        self.socket.set_write_timeout(Some(left))?;
        Ok(&mut self.socket)
    }
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.socket()?.read(buf)
    }
}

impl Write for Timed {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.socket()?.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// A blocking stream for the handshake.
pub enum Handshake {
    /// nbd
    Plain(Timed),
    /// nbds
    Tls(Box<rustls::StreamOwned<rustls::ClientConnection, Timed>>),
}

impl Read for Handshake {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Handshake::Plain(socket) => socket.read(buf),
            Handshake::Tls(stream) => stream.read(buf),
        }
    }
}

impl Write for Handshake {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Handshake::Plain(socket) => socket.write(data),
            Handshake::Tls(stream) => stream.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Handshake::Plain(socket) => socket.flush(),
            Handshake::Tls(stream) => stream.flush(),
        }
    }
}

impl Dialer {
    /// For `uri`; reads the certificates if it needs any.
    pub fn new(uri: &Uri, options: &Options) -> Result<Dialer, Error> {
        let directory = uri.tls_certificates.as_ref().or(options.tls_certificates.as_ref());
        let tls = match uri.tls {
            true => Some(tls::client_config(directory.map(|path| path.as_path()))?),
            false => None,
        };
        Ok(Dialer { uri: uri.clone(), time_limit: options.connect_timeout, tls })
    }

    /// The URI that is dialled.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Opens a connection to the export, ready for transmission.
    pub fn open(&self) -> Result<Opened, Error> {
        let deadline = Instant::now() + self.time_limit;
        let (mut haggling, headers) = match self.haggle_until(deadline)? {
            Haggled::Options(haggling, headers) => (haggling, headers),
            Haggled::Older(older) => return self.open_older(older, deadline),
        };
        let base_allocation = match headers {
            Headers::Simple => None,
            Headers::Structured | Headers::Extended => {
                haggling.set_base_allocation(&self.uri.export)?
            }
        };
        match haggling.go(&self.uri.export)? {
            Some(reply) => {
                let agreed = Agreed::new(reply, headers, base_allocation)?;
                self.opened(haggling.into_stream(), agreed)
            }
            None => self.open_older(Older::FixedNewstyle, deadline),
        }
    }

    /// The same server and certificates, for another export.
    pub fn to_export(&self, name: &str) -> Dialer {
        Dialer { uri: Uri { export: name.to_owned(), ..self.uri.clone() }, ..self.clone() }
    }

    /// As [`Dialer::open`]; a server that cannot be reached is tried again until then.
    pub fn open_until(&self, deadline: Instant) -> Result<Opened, Error> {
        self.tried_until(deadline, || self.open())
    }

    /// An attempt to reach the server, made again until then.
    pub fn tried_until<T>(
        &self,
        deadline: Instant,
        attempt: impl Fn() -> Result<T, Error>,
    ) -> Result<T, Error> {
        const PAUSE: Duration = Duration::from_millis(200);
        let mut told = false;
        loop {
            match attempt() {
                Err(e @ (Error::Connect { .. } | Error::Silent { .. } | Error::Broken(_)))
                    if Instant::now() + PAUSE < deadline =>
                {
                    if !std::mem::replace(&mut told, true) {
                        log::warn!("{}: {e}; trying again", self.uri);
                    }
                    std::thread::sleep(PAUSE);
                }
                opened => return opened,
            }
        }
    }

    /// As [`Dialer::open`], giving up after `limit`.
    pub fn open_within(&self, limit: Duration) -> Result<Opened, Error> {
        Dialer { time_limit: limit.min(self.time_limit), ..self.clone() }.open()
    }

    /// Connects and agrees on headers, inside TLS if the URI says so.
    pub fn haggle(&self) -> Result<Haggled, Error> {
        self.haggle_until(Instant::now() + self.time_limit)
    }

    fn haggle_until(&self, deadline: Instant) -> Result<Haggled, Error> {
        let socket = self.connect(deadline)?;
        let mut haggling = Haggling::new(Handshake::Plain(socket), self.time_limit);
        if let Greeting::Older(older) = haggling.greet()? {
            return Ok(Haggled::Older(older));
        }
        let Some(config) = &self.tls else {
            let headers = haggling.headers()?;
            return Ok(Haggled::Options(haggling, headers));
        };
        haggling.start_tls()?;
        let Handshake::Plain(mut socket) = haggling.into_stream() else {
            unreachable!("TLS begins once")
        };
        let name = self.uri.server_name();
        let session = tls::connect(config.clone(), name, &mut socket, self.time_limit)?;
        let stream = Handshake::Tls(Box::new(rustls::StreamOwned::new(session, socket)));
        let mut haggling = Haggling::new(stream, self.time_limit);
        let headers = haggling.headers().map_err(tls::explain_hang_up)?;
        Ok(Haggled::Options(haggling, headers))
    }

    /// Opens the export of a server without `NBD_OPT_GO`, through the crate `nbd`: EXPORT_NAME or
    /// the old style. It tells neither FUA nor WRITE_ZEROES nor several connections, so none of
    /// them is used.
    fn open_older(&self, older: Older, deadline: Instant) -> Result<Opened, Error> {
        if self.tls.is_some() {
            return Err(Error::TlsRefused("it is too old".into()));
        }
        let name = self.uri.export.as_bytes();
        if older == Older::Oldstyle && !name.is_empty() {
            let name = self.uri.export.clone();
            return Err(Error::NoSuchExport { name, existing: vec![String::new()] });
        }
        let mut socket = self.connect(deadline)?;
        let found = match older {
            Older::Newstyle => nbd::client::handshake(NoFlags::new(&mut socket), name),
            Older::FixedNewstyle | Older::Oldstyle => nbd::client::handshake(&mut socket, name),
        };
        let found = found.map_err(|error| match error.kind() {
            // Newstyle has no other way to say that it does not know the name.
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Error::NoSuchExport {
                name: self.uri.export.clone(),
                existing: self.names(deadline).unwrap_or_default(),
            },
            io::ErrorKind::InvalidData => Error::Protocol(error.to_string()),
            _ => stream_error(error, self.time_limit),
        })?;
        let mut flags = transmission_flag::HAS_FLAGS;
        if found.readonly {
            flags |= transmission_flag::READ_ONLY;
        }
        if found.send_flush {
            flags |= transmission_flag::SEND_FLUSH;
        }
        let reply = ExportReply { size: found.size, flags, block_sizes: None, description: None };
        let agreed = Agreed::new(reply, Headers::Simple, None)?;
        log::info!("{}: an older server: no FUA, no WRITE_ZEROES, one connection", self.uri);
        self.opened(Handshake::Plain(socket), agreed)
    }

    fn names(&self, deadline: Instant) -> Option<Vec<String>> {
        let Ok(Haggled::Options(mut haggling, _)) = self.haggle_until(deadline) else {
            return None;
        };
        let names = haggling.list().ok()?.into_iter().map(|(name, _)| name).collect();
        haggling.abort();
        Some(names)
    }

    fn opened(&self, stream: Handshake, agreed: Agreed) -> Result<Opened, Error> {
        if agreed.size == 0 {
            return Err(Error::SizeZero { name: self.uri.export.clone() });
        }
        // The protocol allows it; `stat` has no number for it.
        if i64::try_from(agreed.size).is_err() {
            return Err(Error::TooLong { size: agreed.size });
        }
        let minimum = agreed.block_sizes.minimum;
        if !agreed.size.is_multiple_of(minimum.into()) {
            return Err(Error::Tail { size: agreed.size, minimum });
        }
        let (socket, session) = match stream {
            Handshake::Plain(timed) => (timed.socket, None),
            Handshake::Tls(stream) => {
                let (session, timed) = stream.into_parts();
                (timed.socket, Some(session))
            }
        };
        socket
            .set_read_timeout(None)
            .and_then(|()| socket.set_write_timeout(None))
            .and_then(|()| socket.set_nonblocking(true))
            .map_err(Error::Broken)?;
        let socket = Arc::new(socket);
        let stream = match session {
            None => Stream::plain(socket.clone()),
            Some(session) => Stream::tls(socket.clone(), session),
        };
        Ok(Opened { stream, socket, agreed })
    }

    fn connect(&self, deadline: Instant) -> Result<Timed, Error> {
        let (to, socket) = match &self.uri.address {
            Address::Tcp { host, port } => {
                (format!("{host}:{port}"), connect_tcp(host, *port, deadline))
            }
            Address::Unix(path) => (path.display().to_string(), connect_unix(path, deadline)),
            Address::Vsock { cid, port } => {
                (format!("vsock {cid}:{port}"), connect_vsock(*cid, *port, deadline))
            }
        };
        let socket = socket.map_err(|source| Error::Connect { to, source })?;
        Ok(Timed { socket, deadline })
    }
}

/// Takes the client flags out of what the crate sends: it says "fixed newstyle" to every server,
/// and one that did not say so itself may refuse that.
struct NoFlags<'a> {
    socket: &'a mut Timed,
    flag_bytes: usize,
}

impl<'a> NoFlags<'a> {
    fn new(socket: &'a mut Timed) -> NoFlags<'a> {
        NoFlags { socket, flag_bytes: 4 }
    }
}

impl Read for NoFlags<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.socket.read(buf)
    }
}

impl Write for NoFlags<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.flag_bytes == 0 {
            return self.socket.write(data);
        }
        let written = self.socket.write(&[0; 4][..self.flag_bytes.min(data.len())])?;
        self.flag_bytes -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}
