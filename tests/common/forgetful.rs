//! An NBD server in threads of this process that crashes when it is told to, and then has forgotten
//! what was not flushed.
//!
//! Shared by the tests of the client alone and of the whole program, so it stands on the standard
//! library only.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HAS_FLAGS: u16 = 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_FUA: u16 = 1 << 3;
const SEND_WRITE_ZEROES: u16 = 1 << 6;
const CAN_MULTI_CONN: u16 = 1 << 8;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const ZEROES: u16 = 6;
const FUA: u16 = 1;

const EINVAL: u32 = 22;

/// When a connection ends, as seen from a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    Received,
    CarriedOut,
    Answered,
}

/// What ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All connections, and what was not flushed is forgotten, in part.
    Crash,
    /// One connection.
    Connection,
}

/// What a server is asked to be.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub size: usize,
    /// What is forgotten or kept as a whole, in bytes.
    pub sector: usize,
    pub several: bool,
    pub has_fua: bool,
    pub has_flush: bool,
}

/// A server; ended when dropped.
pub struct Forgetful {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    kind: Kind,
    is_over: AtomicBool,
    state: Mutex<State>,
}

struct State {
    /// What is to end after so many requests more, and when.
    trap: Option<(u32, Moment, End)>,
    /// It comes to that by itself, again and again, at random.
    is_mortal: bool,
    /// It can be reached again only then.
    down_until: Instant,
    down: Duration,
    incarnation: u64,
    connections: Vec<Arc<UnixStream>>,
    sector: usize,
    cached: Vec<u8>,
    durable: Vec<u8>,
    random: u64,
    counts: Counts,
}

/// What has happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub crashes: u32,
    /// Single connections that were ended.
    pub ended: u32,
    pub accepted: u32,
    /// Sectors that were forgotten.
    pub forgotten: u64,
    pub flushes: u32,
}

impl Counts {
    /// How often a client has seen an end.
    pub fn ends(&self) -> u32 {
        self.crashes + self.ended
    }
}

impl Forgetful {
    pub fn start(socket: &Path, kind: Kind, seed: u64) -> Forgetful {
        let listener = Arc::new(UnixListener::bind(socket).expect("the socket is new"));
        let state = State {
            trap: None,
            is_mortal: false,
            down_until: Instant::now(),
            down: Duration::ZERO,
            incarnation: 0,
            connections: Vec::new(),
            sector: kind.sector,
            cached: vec![0; kind.size],
            durable: vec![0; kind.size],
            random: seed | 1,
            counts: Counts::default(),
        };
        let state = Mutex::new(state);
        let shared = Arc::new(Shared { kind, is_over: AtomicBool::new(false), state });
        let (for_thread, at) = (shared.clone(), listener.clone());
        let accepting = std::thread::spawn(move || {
            std::thread::scope(|scope| {
                for stream in at.incoming().map_while(Result::ok) {
                    if for_thread.is_over.load(Ordering::SeqCst) {
                        break;
                    }
                    let mut state = for_thread.state();
                    if Instant::now() < state.down_until {
                        continue;
                    }
                    let (stream, incarnation) = (Arc::new(stream), state.incarnation);
                    state.connections.push(stream.clone());
                    state.counts.accepted += 1;
                    drop(state);
                    let shared = &for_thread;
                    scope.spawn(move || {
                        // It ends with an error when either side hangs up.
                        let _ = shared.serve(&stream, incarnation);
                        let _ = stream.shutdown(Shutdown::Both);
                        let mut state = shared.state();
                        state.connections.retain(|other| !Arc::ptr_eq(other, &stream));
                    });
                }
            });
        });
        Forgetful { shared, listener, accepting: Some(accepting) }
    }

    /// After so many requests more, something ends; a crashed server can be reached again after
    /// `down`.
    pub fn set_trap(&self, requests: u32, moment: Moment, end: End, down: Duration) {
        let mut state = self.shared.state();
        (state.trap, state.down) = (Some((requests, moment, end)), down);
    }

    /// From now on, or no longer, it sets itself traps.
    pub fn set_mortal(&self, is_mortal: bool, down: Duration) {
        let mut state = self.shared.state();
        (state.is_mortal, state.trap, state.down) = (is_mortal, None, down);
        if is_mortal {
            state.set_random_trap();
        }
    }

    /// Ends the oldest connection, unless it is the only one.
    pub fn end_one_of_several(&self) {
        let mut state = self.shared.state();
        if state.connections.len() > 1 {
            let _ = state.connections.remove(0).shutdown(Shutdown::Both);
            state.counts.ended += 1;
        }
    }

    pub fn counts(&self) -> Counts {
        self.shared.state().counts
    }

    /// What would be there after a crash that forgets all.
    pub fn durable(&self) -> Vec<u8> {
        self.shared.state().durable.clone()
    }
}

impl Drop for Forgetful {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        let connections = std::mem::take(&mut self.shared.state().connections);
        for stream in connections {
            let _ = stream.shutdown(Shutdown::Both);
        }
        // Ends `accept`. (Any socket can be shut down; the standard library does so with streams
        // only.)
        let listener = self.listener.try_clone().expect("there are descriptors");
        let _ = UnixStream::from(OwnedFd::from(listener)).shutdown(Shutdown::Both);
        // A panic in there has been printed, and has cost the test a connection.
        let _ = self.accepting.take().map(JoinHandle::join);
    }
}

impl State {
    fn random(&mut self, bound: u64) -> u64 {
        // xorshift64*
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    fn set_random_trap(&mut self) {
        let requests = 1 + self.random(400) as u32;
        let moment = match self.random(3) {
            0 => Moment::Received,
            1 => Moment::CarriedOut,
            _ => Moment::Answered,
        };
        let end = if self.random(3) == 0 { End::Connection } else { End::Crash };
        self.trap = Some((requests, moment, end));
    }

    fn crash(&mut self) {
        self.counts.crashes += 1;
        self.incarnation += 1;
        self.down_until = Instant::now() + self.down;
        for stream in std::mem::take(&mut self.connections) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        // Some of it happens to be on the disk.
        for at in (0..self.cached.len()).step_by(self.sector) {
            let sector = at..(at + self.sector).min(self.cached.len());
            if self.cached[sector.clone()] == self.durable[sector.clone()] {
                continue;
            }
            if self.random(4) == 0 {
                let State { cached, durable, .. } = self;
                durable[sector.clone()].copy_from_slice(&cached[sector]);
            } else {
                let State { cached, durable, .. } = self;
                cached[sector.clone()].copy_from_slice(&durable[sector]);
                self.counts.forgotten += 1;
            }
        }
    }

    /// Counts a request. Whether this is a moment at which its connection ends.
    fn is_trapped(&mut self, now: Moment) -> Option<End> {
        let (left, moment, end) = self.trap?;
        if now == Moment::Received {
            self.trap = Some((left.saturating_sub(1), moment, end));
        }
        let (left, ..) = self.trap?;
        if left > 0 || now != moment {
            return None;
        }
        self.trap = None;
        if self.is_mortal {
            self.set_random_trap();
        }
        Some(end)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn flags(&self) -> u16 {
        let if_so = |is_so, flag| if is_so { flag } else { 0 };
        HAS_FLAGS
            | SEND_WRITE_ZEROES
            | if_so(self.kind.has_flush, SEND_FLUSH)
            | if_so(self.kind.has_fua, SEND_FUA)
            | if_so(self.kind.several, CAN_MULTI_CONN)
    }

    /// The state, unless the server has crashed since, or this is where it does.
    fn at(&self, moment: Moment, incarnation: u64) -> io::Result<MutexGuard<'_, State>> {
        let gone = || Err(io::ErrorKind::ConnectionAborted.into());
        let mut state = self.state();
        if state.incarnation != incarnation {
            return gone();
        }
        match state.is_trapped(moment) {
            None => Ok(state),
            Some(End::Connection) => {
                state.counts.ended += 1;
                gone()
            }
            Some(End::Crash) => {
                state.crash();
                gone()
            }
        }
    }

    fn serve(&self, mut stream: &UnixStream, incarnation: u64) -> io::Result<()> {
        self.handshake(stream)?;
        loop {
            let mut header = [0; 28];
            stream.read_exact(&mut header)?;
            assert_eq!(header[..4], 0x2560_9513_u32.to_be_bytes());
            let number = |from: usize| u16::from_be_bytes([header[from], header[from + 1]]);
            let (flags, command) = (number(4), number(6));
            let offset = u64::from_be_bytes(header[16..24].try_into().unwrap()) as usize;
            let length = u32::from_be_bytes(header[24..].try_into().unwrap()) as usize;
            let mut data = vec![0; if matches!(command, READ | WRITE) { length } else { 0 }];
            if command == WRITE {
                stream.read_exact(&mut data)?;
            }
            if command == DISC {
                return Ok(());
            }
            let mut state = self.at(Moment::Received, incarnation)?;
            let range = offset..offset + length;
            let mut error = 0;
            if range.end > self.kind.size {
                error = EINVAL;
            } else {
                let State { cached, durable, counts, .. } = &mut *state;
                match command {
                    READ => data.copy_from_slice(&cached[range.clone()]),
                    WRITE => cached[range.clone()].copy_from_slice(&data),
                    ZEROES => cached[range.clone()].fill(0),
                    FLUSH => {
                        durable.copy_from_slice(cached);
                        counts.flushes += 1;
                    }
                    _ => error = EINVAL,
                }
                if flags & FUA != 0 {
                    durable[range.clone()].copy_from_slice(&cached[range]);
                }
            }
            drop(state);
            drop(self.at(Moment::CarriedOut, incarnation)?);
            let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
            reply.extend(error.to_be_bytes());
            reply.extend(&header[8..16]);
            if command == READ && error == 0 {
                reply.extend(&data);
            }
            {
                // A crash is not to come between: what is answered was answered before it.
                let state = self.state();
                if state.incarnation != incarnation {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
            }
            stream.write_all(&reply)?;
            drop(self.at(Moment::Answered, incarnation)?);
        }
    }

    fn handshake(&self, mut stream: &UnixStream) -> io::Result<()> {
        const GO: u32 = 7;
        let mut greeting = b"NBDMAGICIHAVEOPT".to_vec();
        greeting.extend(3_u16.to_be_bytes());
        stream.write_all(&greeting)?;
        stream.read_exact(&mut [0; 4])?;
        loop {
            let mut header = [0; 16];
            stream.read_exact(&mut header)?;
            let option = u32::from_be_bytes(header[8..12].try_into().unwrap());
            let length = u32::from_be_bytes(header[12..].try_into().unwrap());
            stream.read_exact(&mut vec![0; length as usize])?;
            let mut reply = |kind: u32, data: &[u8]| {
                let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
                bytes.extend(option.to_be_bytes());
                bytes.extend(kind.to_be_bytes());
                bytes.extend((data.len() as u32).to_be_bytes());
                bytes.extend(data);
                stream.write_all(&bytes)
            };
            if option != GO {
                reply(0x8000_0001, &[])?;
                continue;
            }
            let mut export = 0_u16.to_be_bytes().to_vec();
            export.extend((self.kind.size as u64).to_be_bytes());
            export.extend(self.flags().to_be_bytes());
            reply(3, &export)?;
            return reply(1, &[]);
        }
    }
}
