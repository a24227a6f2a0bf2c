//! Servers that end, change or delay what they say, byte by byte, and those that say far too much.
//!
//! Whatever they do, the client has an error or an answer soon, and goes on.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::{NbdBackend, Options, Uri};
use super::on_lane;
use super::servers::Directory;
use crate::backend::{Backend, Lane, Seek};

/// What is done to the bytes that a good server sends.
#[derive(Clone, Copy, Debug)]
enum Harm {
    CloseAfter(usize),
    Flip(usize, u8),
    Dribble,
}

/// A good server's words, harmed on their way.
struct Mouth<'a> {
    stream: &'a UnixStream,
    harm: Harm,
    said: usize,
}

impl Mouth<'_> {
    fn say(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let mut bytes = bytes.to_vec();
        let from = self.said;
        self.said += bytes.len();
        match self.harm {
            Harm::CloseAfter(at) if at < self.said => {
                self.stream.write_all(&bytes[..at - from])?;
                return Err(std::io::ErrorKind::ConnectionAborted.into());
            }
            Harm::Flip(at, mask) if (from..self.said).contains(&at) => bytes[at - from] ^= mask,
            Harm::Dribble => {
                for byte in bytes {
                    self.stream.write_all(&[byte])?;
                }
                return Ok(());
            }
            _ => {}
        }
        self.stream.write_all(&bytes)
    }
}

const SIZE: u64 = 1 << 20;

/// Speaks with structured replies and extents; ends when the client does. How many bytes it had to
/// say.
fn converse(mut stream: &UnixStream, harm: Harm) -> std::io::Result<usize> {
    let mut mouth = Mouth { stream, harm, said: 0 };
    mouth.say(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let option = u32::from_be_bytes(header[8..12].try_into().unwrap());
        let length = u32::from_be_bytes(header[12..].try_into().unwrap());
        stream.read_exact(&mut vec![0; length as usize])?;
        let reply = |kind: u32, data: &[u8]| {
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes
        };
        match option {
            // STRUCTURED_REPLY
            8 => mouth.say(&reply(1, &[]))?,
            // SET_META_CONTEXT
            10 => {
                mouth.say(&reply(4, b"\0\0\0\x05base:allocation"))?;
                mouth.say(&reply(1, &[]))?;
            }
            // GO
            7 => {
                let mut export = vec![0, 0];
                export.extend(SIZE.to_be_bytes());
                // FLUSH, FUA, WRITE_ZEROES
                export.extend(0x4d_u16.to_be_bytes());
                mouth.say(&reply(3, &export))?;
                mouth.say(&reply(3, &[0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 0, 16, 0, 0]))?;
                mouth.say(&reply(1, &[]))?;
                break;
            }
            _ => mouth.say(&reply(0x8000_0001, &[]))?,
        }
    }
    loop {
        let mut header = [0; 28];
        if stream.read_exact(&mut header).is_err() {
            return Ok(mouth.said);
        }
        let (offset, length) = (&header[16..24], &header[24..]);
        let count = u32::from_be_bytes(length.try_into().unwrap()) as usize;
        let chunk = |kind: u16, done: u16, payload: &[u8]| {
            let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
            bytes.extend(done.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(&header[8..16]);
            bytes.extend((payload.len() as u32).to_be_bytes());
            bytes.extend(payload);
            bytes
        };
        match header[7] {
            0 => {
                mouth.say(&chunk(1, 0, &[offset, &vec![7; count]].concat()))?;
                mouth.say(&chunk(0, 1, &[]))?;
            }
            1 => {
                stream.read_exact(&mut vec![0; count])?;
                mouth.say(&chunk(0, 1, &[]))?;
            }
            2 => return Ok(mouth.said),
            7 => mouth.say(&chunk(5, 1, &[&[0, 0, 0, 5][..], length, &[0; 4]].concat()))?,
            _ => mouth.say(&chunk(0, 1, &[]))?,
        }
    }
}

/// Meets such a server with each kind of request. Whether all went well, and how many bytes it had
/// to say.
fn meet(harm: Harm) -> (bool, usize) {
    let directory = Directory::new();
    let path = directory.0.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (over, said) = (AtomicBool::new(false), AtomicUsize::new(0));
    let begun = Instant::now();
    let went_well = std::thread::scope(|scope| {
        scope.spawn(|| {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::SeqCst) {
                    break;
                }
                if let Ok(bytes) = converse(&stream, harm) {
                    said.store(bytes, Ordering::SeqCst);
                }
            }
        });
        let uri: Uri = format!("nbd+unix:///?socket={}", path.display()).parse().unwrap();
        let options = Options {
            connect_timeout: Duration::from_millis(200),
            timeout: Some(Duration::from_millis(200)),
            reconnect_timeout: Duration::ZERO,
            ..Options::default()
        };
        let went_well = match NbdBackend::connect(&uri, &options) {
            Err(_) => false,
            Ok(backend) => all_requests(&backend),
        };
        over.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&path);
        went_well
    });
    assert!(begun.elapsed() < Duration::from_secs(10), "{harm:?}: {:?}", begun.elapsed());
    (went_well, said.load(Ordering::SeqCst))
}

fn all_requests(backend: &Arc<NbdBackend>) -> bool {
    let done = on_lane(backend, async |lane, _| {
        let mut buf = [0; 100];
        let read =
            lane.read(0, &mut buf).await.is_ok_and(|length| length == 100 && buf == [7; 100]);
        let wrote = lane.write(100, &[1; 50], false).await.is_ok();
        let found = lane.seek(0, Seek::Data).await.is_ok_and(|data| data == 0);
        read && wrote && found && lane.flush().await.is_ok()
    });
    done & backend.last_flush(Duration::ZERO).is_ok()
}

/// Meets those that do harm at each byte of so many, some at a time: they are mostly waited for.
fn meet_at_each(length: usize, harm: impl Fn(usize) -> Harm + Sync) -> Vec<bool> {
    const AT_ONCE: usize = 16;
    let next = AtomicUsize::new(0);
    let met = Mutex::new(vec![false; length]);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::SeqCst);
                    if at >= length {
                        break;
                    }
                    let (went_well, _) = meet(harm(at));
                    met.lock().unwrap()[at] = went_well;
                }
            });
        }
    });
    met.into_inner().unwrap()
}

#[test]
fn a_server_that_hangs_up_after_each_byte_of_a_conversation() {
    let (went_well, length) = meet(Harm::Dribble);
    assert!(went_well && length > 300, "{length}");
    for (at, went_well) in meet_at_each(length, Harm::CloseAfter).into_iter().enumerate() {
        assert!(!went_well, "after {at} of {length} bytes");
    }
    assert!(meet(Harm::CloseAfter(length)).0);
}

#[test]
fn a_server_that_says_something_else_at_each_byte_of_a_conversation() {
    let (_, length) = meet(Harm::Dribble);
    let met = meet_at_each(length, |at| Harm::Flip(at, 1 << (at % 8)));
    let bad = met.iter().filter(|went_well| !**went_well).count();
    // Some bytes are of no importance: a handshake flag, the block size that is preferred.
    assert!(bad > length * 3 / 4, "{bad} of {length}");
}
