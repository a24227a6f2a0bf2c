//! The INIT exchange: what the kernel offers, and what is asked of it.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::fuse::abi::{self, InHeader, InitIn, InitOut, OutHeader, Plain, init, opcode};
use crate::transport::slot::PAYLOAD_LEN;

/// The kernel sends INIT as soon as the mount exists; this is for a machine that is very busy.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);
/// What INIT asks for; the kernel grants what it has of these.
pub const WANTED: u64 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::ABORT_ERROR
    | init::MAX_PAGES
    // The mode never has set-user-ID bits, so there is nothing to clear on a write.
    | init::HANDLE_KILLPRIV_V2
    | init::INIT_EXT
    | init::DIRECT_IO_ALLOW_MMAP;

/// Requests of the page cache in flight, each of 1 MiB at most, beyond which the kernel does not
/// read ahead: two windows of [`Options::read_ahead`](super::Options::read_ahead) for several readers at once, and 32 MiB of
/// ours.
const READ_AHEAD_REQUESTS: u16 = 32;

/// Waits for INIT, and settles the major version.
pub fn read(device: &OwnedFd) -> io::Result<(InHeader, InitIn)> {
    let deadline = Instant::now() + INIT_TIMEOUT;
    let mut buf = vec![0; PAYLOAD_LEN + 4096];
    loop {
        let len = match rustix::io::read(device, &mut buf[..]) {
            Ok(len) => len,
            Err(Errno::AGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() || !wait_readable(device, left)? {
                    return Err(io::Error::other("the kernel sent no FUSE_INIT"));
                }
                continue;
            }
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        let header = InHeader::read(&buf[..len]);
        let offer = InitIn::read(&buf[size_of::<InHeader>().min(len)..len]);
        if header.opcode != opcode::INIT {
            return Err(io::Error::other(format!("FUSE_INIT expected, not {}", header.opcode)));
        }
        if offer.major > abi::KERNEL_VERSION {
            // The kernel tries again with the version it is told.
            let ours = InitOut { major: abi::KERNEL_VERSION, ..Default::default() };
            send(device, header.unique, ours.as_bytes())?;
            continue;
        }
        if offer.major < abi::KERNEL_VERSION || offer.minor < abi::OLDEST_MINOR_VERSION {
            return Err(io::Error::other(format!(
                "the kernel's FUSE {}.{} is too old: 7.{} (Linux 5.4) is the least",
                offer.major,
                offer.minor,
                abi::OLDEST_MINOR_VERSION
            )));
        }
        return Ok((header, offer));
    }
}

/// Waits until `device` polls readable (or an error), for so long at most; whether it does.
fn wait_readable(device: &OwnedFd, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(timeout).unwrap_or_default();
    match poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

/// The flags that the kernel offers.
pub fn flags(offer: &InitIn) -> u64 {
    u64::from(offer.flags) | u64::from(offer.flags2) << 32
}

/// What is asked of the kernel, given its offer, how many requests can be in flight, what is wanted
/// of it, and how far it may read ahead, in bytes.
pub fn reply(offer: &InitIn, in_flight: usize, wanted: u64, read_ahead: u64) -> InitOut {
    let granted = wanted & flags(offer);
    // Asynchronous direct I/O counts as background, and the kernel's default of 12 would throttle
    // it.
    let max_background = in_flight.min(usize::from(u16::MAX)) as u16;
    InitOut {
        major: abi::KERNEL_VERSION,
        minor: abi::KERNEL_MINOR_VERSION,
        // The kernel takes the smaller of this and its own.
        max_readahead: u32::try_from(read_ahead).unwrap_or(u32::MAX),
        flags: granted as u32,
        flags2: (granted >> 32) as u32,
        max_background,
        // With so many under way it reads no further ahead, and writes nothing back that nobody
        // waits for. Direct I/O, which counts as background too, goes on.
        congestion_threshold: max_background.clamp(1, READ_AHEAD_REQUESTS),
        max_write: PAYLOAD_LEN as u32,
        time_gran: 1,
        max_pages: (PAYLOAD_LEN / 4096) as u16,
        ..Default::default()
    }
}

/// Answers request `unique`.
pub fn send(device: &OwnedFd, unique: u64, body: &[u8]) -> io::Result<()> {
    let len = (size_of::<OutHeader>() + body.len()) as u32;
    let header = OutHeader { len, error: 0, unique };
    let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(body)];
    Ok(rustix::io::writev(device, &parts).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_only_for_what_is_offered() {
        let offer = InitIn { flags: init::ASYNC_DIO as u32, ..Default::default() };
        let reply = super::reply(&offer, 256, WANTED, 0);
        assert_eq!((reply.flags, reply.flags2), (init::ASYNC_DIO as u32, 0));
        assert_eq!((reply.max_background, reply.congestion_threshold), (256, READ_AHEAD_REQUESTS));
    }

    #[test]
    fn flags_beyond_bit_31_travel_in_flags2() {
        let offer = InitIn { flags: u32::MAX, flags2: u32::MAX, ..Default::default() };
        let reply = super::reply(&offer, 1_000_000, WANTED | init::OVER_IO_URING, 1 << 40);
        assert_eq!(reply.max_readahead, u32::MAX);
        assert_ne!(reply.flags2 & (init::DIRECT_IO_ALLOW_MMAP >> 32) as u32, 0);
        assert_ne!(reply.flags2 & (init::OVER_IO_URING >> 32) as u32, 0);
        assert_eq!(reply.max_background, u16::MAX);
    }
}
