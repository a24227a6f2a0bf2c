//! The handshake phase: option negotiation over any byte stream ("Handshake phase", fixed newstyle).
//!
//! It runs once per connection, blocking, with the socket's time-outs as its only clock. The stream
//! is generic: plain sockets, TLS and the scripted peers of the tests share all of this.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::error::Error;
use super::wire::{Headers, be_u16, be_u32, be_u64, transmission_flag};

const NBDMAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const IHAVEOPT: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags, and the client's answer to them: bit for bit the same.
const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
const FLAG_NO_ZEROES: u16 = 1 << 1;

/// The longest option reply that is believed, in bytes: a string of the protocol has at most 4096.
const MAX_OPTION_REPLY: u32 = 64 << 10;
/// The most replies to one option that are believed; a listing has one for each export.
const MAX_OPTION_REPLIES: usize = 100_000;
/// The most bytes of an answer to one option, all replies together with their headers, ...
const MAX_ANSWER: u64 = 16 << 20;
/// ... and of all answers on a connection: a listing asks for the contexts of each export.
const MAX_ANSWERS: u64 = 64 << 20;

/// The metadata context that tells holes from data.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Option types ("Option types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Opt {
    Abort = 2,
    List = 3,
    StartTls = 5,
    Info = 6,
    Go = 7,
    StructuredReply = 8,
    ListMetaContext = 9,
    SetMetaContext = 10,
    ExtendedHeaders = 11,
}

/// Option reply types ("Option reply types").
mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const FLAG_ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = FLAG_ERROR | 1;
    pub const ERR_POLICY: u32 = FLAG_ERROR | 2;
    pub const ERR_INVALID: u32 = FLAG_ERROR | 3;
    pub const ERR_PLATFORM: u32 = FLAG_ERROR | 4;
    pub const ERR_TLS_REQD: u32 = FLAG_ERROR | 5;
    pub const ERR_UNKNOWN: u32 = FLAG_ERROR | 6;
    pub const ERR_SHUTDOWN: u32 = FLAG_ERROR | 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = FLAG_ERROR | 8;
    pub const ERR_TOO_BIG: u32 = FLAG_ERROR | 9;
}

/// `NBD_INFO_*` types.
mod info {
    pub const EXPORT: u16 = 0;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What the server said first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Fixed newstyle: options can be negotiated.
    FixedNewstyle,
    /// Only the crate `nbd` can go on, on a new connection.
    Older(Older),
}

/// Servers without `NBD_OPT_GO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Older {
    /// It knows options, but not this one.
    FixedNewstyle,
    /// Newstyle without "fixed": `NBD_OPT_EXPORT_NAME` only.
    Newstyle,
    /// There are no options, and there is one export without a name.
    Oldstyle,
}

/// The block sizes that the server tells, in bytes ("Block size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BlockSizes {
    /// Offsets and lengths must be multiples of it.
    pub minimum: u32,
    /// What the server is fastest with.
    pub preferred: u32,
    /// The longest payload.
    pub maximum: u32,
}

/// What `NBD_OPT_INFO` and `NBD_OPT_GO` tell about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportReply {
    /// In bytes.
    pub size: u64,
    /// See [`transmission_flag`].
    pub flags: u16,
    /// Missing where the server does not say.
    pub block_sizes: Option<BlockSizes>,
    /// For people.
    pub description: Option<String>,
}

/// How an option that may be refused without harm went.
enum Answer<T> {
    Yes(T),
    /// The error reply's type and the server's own words.
    No(u32, String),
}

/// An entry of `NBD_OPT_LIST`: name and description.
pub type Listed = (String, String);

/// Option haggling on one stream.
pub struct Haggling<S> {
    stream: S,
    time_limit: Duration,
    /// The bytes of all answers so far.
    answered: u64,
}

impl<S: Read + Write> Haggling<S> {
    /// On `stream`, whose reads and writes give up after `time_limit`.
    pub fn new(stream: S, time_limit: Duration) -> Haggling<S> {
        Haggling { stream, time_limit, answered: 0 }
    }

    /// Hands the stream on: to TLS, or to transmission.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// Reads the greeting and answers it.
    pub fn greet(&mut self) -> Result<Greeting, Error> {
        let magic: [u8; 16] = self.receive()?;
        if be_u64(&magic, 0) != NBDMAGIC {
            return Err(Error::Protocol(
                "its first bytes are not NBDMAGIC: this is no NBD server".into(),
            ));
        }
        match be_u64(&magic, 8) {
            IHAVEOPT => {}
            OLDSTYLE_MAGIC => return Ok(Greeting::Older(Older::Oldstyle)),
            _ => return Err(Error::Protocol("it speaks no style of NBD that is known".into())),
        }
        let flags = u16::from_be_bytes(self.receive()?);
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Ok(Greeting::Older(Older::Newstyle));
        }
        let answer = FLAG_FIXED_NEWSTYLE | (flags & FLAG_NO_ZEROES);
        self.send(&u32::from(answer).to_be_bytes())?;
        Ok(Greeting::FixedNewstyle)
    }

    /// `NBD_OPT_STARTTLS`: after `Ok` the next byte on the stream belongs to TLS.
    pub fn start_tls(&mut self) -> Result<(), Error> {
        match self.ask(Opt::StartTls, &[], |_, _| Ok(()))? {
            Answer::Yes(()) => Ok(()),
            Answer::No(kind, words) => Err(Error::TlsRefused(reason(kind, &words))),
        }
    }

    /// Agrees on the richest headers that the server knows.
    pub fn headers(&mut self) -> Result<Headers, Error> {
        for (option, headers) in
            [(Opt::ExtendedHeaders, Headers::Extended), (Opt::StructuredReply, Headers::Structured)]
        {
            if let Answer::Yes(()) = self.ask(option, &[], |_, _| Ok(()))? {
                return Ok(headers);
            }
        }
        Ok(Headers::Simple)
    }

    /// `NBD_OPT_SET_META_CONTEXT` for `base:allocation`: its id, if the server has it. Allowed only
    /// after chunks were agreed on.
    pub fn set_base_allocation(&mut self, export: &str) -> Result<Option<u32>, Error> {
        let mut id = None;
        let request = meta_context_request(export, &[BASE_ALLOCATION]);
        let answer = self.ask(Opt::SetMetaContext, &request, |kind, data| {
            let (context, name) = meta_context(kind, data)?;
            if name == BASE_ALLOCATION {
                id = Some(context);
            }
            Ok(())
        })?;
        // A refusal is no obstacle: if the export does not exist, GO says so next.
        Ok(matches!(answer, Answer::Yes(())).then_some(id).flatten())
    }

    /// `NBD_OPT_LIST_META_CONTEXT`: the names of all contexts; none where the server does not tell.
    pub fn list_meta_contexts(&mut self, export: &str) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        let request = meta_context_request(export, &[]);
        self.ask(Opt::ListMetaContext, &request, |kind, data| {
            names.push(meta_context(kind, data)?.1);
            Ok(())
        })?;
        Ok(names)
    }

    /// `NBD_OPT_GO`: after `Some` transmission begins. `None`: the server does not know the option.
    pub fn go(&mut self, export: &str) -> Result<Option<ExportReply>, Error> {
        self.export(Opt::Go, export, &[info::BLOCK_SIZE])
    }

    /// `NBD_OPT_INFO`: tells about an export without choosing it. `None` as for [`Self::go`].
    pub fn info(&mut self, export: &str) -> Result<Option<ExportReply>, Error> {
        self.export(Opt::Info, export, &[info::BLOCK_SIZE, info::DESCRIPTION])
    }

    /// As [`Self::info`], for one export of many: the size and the flags only, and where there is
    /// no such export it does not ask for all that there are.
    pub fn look(&mut self, export: &str) -> Result<Option<ExportReply>, Error> {
        self.choose(Opt::Info, export, &[])
    }

    fn export(
        &mut self,
        option: Opt,
        export: &str,
        wanted: &[u16],
    ) -> Result<Option<ExportReply>, Error> {
        self.choose(option, export, wanted).map_err(|error| match error {
            Error::NoSuchExport { name, .. } => {
                let existing = self.list().unwrap_or_default();
                let existing = existing.into_iter().map(|(name, _)| name).collect();
                Error::NoSuchExport { name, existing }
            }
            error => error,
        })
    }

    fn choose(
        &mut self,
        option: Opt,
        export: &str,
        wanted: &[u16],
    ) -> Result<Option<ExportReply>, Error> {
        let mut request = Vec::new();
        put_string(&mut request, export);
        request.extend((wanted.len() as u16).to_be_bytes());
        request.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));

        let mut size_and_flags = None;
        let mut block_sizes = None;
        let mut description = None;
        let answer = self.ask(option, &request, |kind, data| {
            if kind != rep::INFO || data.len() < 2 {
                return Err(unexpected(option, kind));
            }
            match (be_u16(data, 0), data.len()) {
                (info::EXPORT, 12) => size_and_flags = Some((be_u64(data, 2), be_u16(data, 10))),
                (info::BLOCK_SIZE, 14) => {
                    block_sizes = Some(BlockSizes {
                        minimum: be_u32(data, 2),
                        preferred: be_u32(data, 6),
                        maximum: be_u32(data, 10),
                    });
                }
                (info::DESCRIPTION, _) => description = Some(text(&data[2..])),
                (info::EXPORT | info::BLOCK_SIZE, length) => {
                    return Err(Error::Protocol(format!("an info reply has {length} bytes")));
                }
                // Servers may send information that nobody asked for.
                _ => {}
            }
            Ok(())
        })?;
        match answer {
            Answer::Yes(()) => {
                let (size, flags) = size_and_flags.ok_or_else(|| {
                    Error::Protocol("it acknowledged an export without telling its size".into())
                })?;
                Ok(Some(ExportReply { size, flags, block_sizes, description }))
            }
            Answer::No(rep::ERR_UNSUP, _) => Ok(None),
            Answer::No(rep::ERR_UNKNOWN, _) => {
                Err(Error::NoSuchExport { name: export.into(), existing: Vec::new() })
            }
            Answer::No(kind, words) => {
                Err(Error::Refused { what: "the export", reason: reason(kind, &words) })
            }
        }
    }

    /// `NBD_OPT_LIST`: all exports that the server tells.
    pub fn list(&mut self) -> Result<Vec<Listed>, Error> {
        let mut exports = Vec::new();
        let answer = self.ask(Opt::List, &[], |kind, data| {
            let length = data.first_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize);
            match length.and_then(|length| data[4..].split_at_checked(length)) {
                Some((name, description)) if kind == rep::SERVER => {
                    exports.push((text(name), text(description)));
                    Ok(())
                }
                _ => Err(unexpected(Opt::List, kind)),
            }
        })?;
        match answer {
            Answer::Yes(()) => Ok(exports),
            Answer::No(kind, words) => {
                Err(Error::Refused { what: "to list its exports", reason: reason(kind, &words) })
            }
        }
    }

    /// `NBD_OPT_ABORT`: disconnects. Whether the server answers does not matter.
    pub fn abort(mut self) {
        if self.send_option(Opt::Abort, &[]).is_ok() {
            let _ = self.receive::<20>();
        }
    }

    /// Sends an option and passes the replies before the last to `each`, with their types.
    fn ask(
        &mut self,
        option: Opt,
        data: &[u8],
        mut each: impl FnMut(u32, &[u8]) -> Result<(), Error>,
    ) -> Result<Answer<()>, Error> {
        self.send_option(option, data)?;
        let most = (self.answered + MAX_ANSWER).min(MAX_ANSWERS);
        for _ in 0..MAX_OPTION_REPLIES {
            let header: [u8; 20] = self.receive()?;
            if be_u64(&header, 0) != OPTION_REPLY_MAGIC || be_u32(&header, 8) != option as u32 {
                return Err(Error::Protocol(format!("it answers {option:?} with something else")));
            }
            let (kind, length) = (be_u32(&header, 12), be_u32(&header, 16));
            if length > MAX_OPTION_REPLY {
                return Err(Error::Protocol(format!("an option reply has {length} bytes")));
            }
            self.answered += header.len() as u64 + u64::from(length);
            if self.answered > most {
                break;
            }
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data).map_err(|e| self.failed(e))?;
            match kind {
                rep::ACK => return Ok(Answer::Yes(())),
                rep::ERR_TLS_REQD if option != Opt::StartTls => return Err(Error::TlsRequired),
                error if error & rep::FLAG_ERROR != 0 => return Ok(Answer::No(error, text(&data))),
                kind => each(kind, &data)?,
            }
        }
        Err(Error::Protocol(format!("its answer to {option:?} has no end")))
    }

    fn send_option(&mut self, option: Opt, data: &[u8]) -> Result<(), Error> {
        let mut message = IHAVEOPT.to_be_bytes().to_vec();
        message.extend((option as u32).to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.send(&message)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let sent = self.stream.write_all(bytes).and_then(|()| self.stream.flush());
        sent.map_err(|e| self.failed(e))
    }

    fn receive<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).map_err(|e| self.failed(e))?;
        Ok(bytes)
    }

    fn failed(&self, error: io::Error) -> Error {
        stream_error(error, self.time_limit)
    }
}

/// Tells what a failed read or write of the handshake means: time-outs and TLS alerts come as
/// [`io::Error`]s too.
pub fn stream_error(error: io::Error, time_limit: Duration) -> Error {
    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
        return Error::Silent { after: time_limit };
    }
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(inner) => super::tls::explain(inner, ""),
        None => Error::Broken(error),
    }
}

fn put_string(out: &mut Vec<u8>, string: &str) {
    out.extend((string.len() as u32).to_be_bytes());
    out.extend(string.as_bytes());
}

fn meta_context_request(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut request = Vec::new();
    put_string(&mut request, export);
    request.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| put_string(&mut request, query));
    request
}

fn meta_context(kind: u32, data: &[u8]) -> Result<(u32, String), Error> {
    if kind != rep::META_CONTEXT || data.len() < 4 {
        return Err(unexpected(Opt::SetMetaContext, kind));
    }
    Ok((be_u32(data, 0), text(&data[4..])))
}

fn unexpected(option: Opt, kind: u32) -> Error {
    Error::Protocol(format!("it answers {option:?} with a malformed reply of type {kind}"))
}

/// The protocol's strings are UTF-8; what is not is made visible rather than refused.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn reason(kind: u32, words: &str) -> String {
    let meaning = match kind {
        rep::ERR_UNSUP => "it does not support that",
        rep::ERR_POLICY => "its policy forbids that",
        rep::ERR_INVALID => "it finds the request invalid",
        rep::ERR_PLATFORM => "its platform cannot do that",
        rep::ERR_TLS_REQD => "TLS is required",
        rep::ERR_UNKNOWN => "there is no such export",
        rep::ERR_SHUTDOWN => "it is shutting down",
        rep::ERR_BLOCK_SIZE_REQD => "it insists on its block sizes",
        rep::ERR_TOO_BIG => "the request is too big",
        _ => "unknown error",
    };
    if words.is_empty() { meaning.into() } else { format!("{meaning}: {words}") }
}

/// Checks what a server says about itself, so that transmission can rely on it.
pub fn check_block_sizes(sizes: BlockSizes) -> Result<BlockSizes, Error> {
    let BlockSizes { minimum, preferred, maximum } = sizes;
    let sound = minimum.is_power_of_two()
        && minimum <= 64 << 10
        && preferred.is_power_of_two()
        && preferred >= minimum
        && maximum >= minimum;
    if !sound {
        return Err(Error::Protocol(format!(
            "its block sizes make no sense: minimum {minimum}, preferred {preferred}, maximum \
             {maximum}"
        )));
    }
    Ok(sizes)
}

/// The flags without those whose meaning depends on others ("Transmission flags").
pub fn sane_flags(flags: u16) -> u16 {
    use transmission_flag as f;
    if flags & f::HAS_FLAGS == 0 {
        return 0;
    }
    let without = if flags & f::READ_ONLY != 0 { f::SEND_WRITE_ZEROES | f::SEND_TRIM } else { 0 };
    flags & !without
}

#[cfg(test)]
mod tests;
