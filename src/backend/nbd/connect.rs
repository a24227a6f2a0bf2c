//! Connecting a socket, blocking, by a deadline.

use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::mpsc;
use std::task::Poll;
use std::time::{Duration, Instant};

use async_io::Async;
use smol::{Timer, future};
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

use crate::sys;

/// The longest pause between two attempts of TCP's to get data to the server: so soon it goes on
/// after a link was down. With it the kernel gives up after some 100 s without any answer
/// (net.ipv4.tcp_retries2), which a server that has stopped reading still gives.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Where the kernel has no such option (before Linux 6.15): how long data may stay unacknowledged,
/// or unread by the server.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(120);
/// When an idle connection is probed, how often after that, and how many probes without an answer
/// end it.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;

/// How long an address has before the next one is tried beside it.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// How much time there is; `TimedOut` if there is none.
pub fn left_until(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        left if left.is_zero() => Err(io::ErrorKind::TimedOut.into()),
        // What a socket would round down to zero would be no limit at all.
        left => Ok(left.max(Duration::from_millis(1))),
    }
}

/// Connects to whichever address of the host answers first.
pub fn connect_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<Socket> {
    connect_any(&resolve(host, port, deadline)?, deadline)
}

fn connect_any(addresses: &[SocketAddr], deadline: Instant) -> io::Result<Socket> {
    let connect = first_to_connect(addresses);
    let limit = async {
        Timer::at(deadline).await;
        Err(io::ErrorKind::TimedOut.into())
    };
    let socket = smol::block_on(future::or(connect, limit))?;
    socket.set_nonblocking(false)?;
    tune_tcp(&socket)?;
    Ok(socket)
}

/// Tries the addresses in their order, which is the resolver's, the next one when the one before
/// has failed or takes long (RFC 8305): what swallows SYNs costs no more than [`NEXT_ADDRESS`]. The
/// first error tells most.
async fn first_to_connect(addresses: &[SocketAddr]) -> io::Result<Socket> {
    let mut to_come = addresses.iter();
    let mut under_way = Vec::new();
    let mut first_error = None;
    loop {
        under_way.extend(to_come.next().map(|address| Box::pin(connect_to_address(*address))));
        if under_way.is_empty() {
            return Err(first_error.unwrap_or_else(|| io::Error::other("the host has no address")));
        }
        let any_end = poll_fn(|cx| {
            for (at, attempt) in under_way.iter_mut().enumerate() {
                if let Poll::Ready(ended) = attempt.as_mut().poll(cx) {
                    return Poll::Ready(Some((at, ended)));
                }
            }
            Poll::Pending
        });
        let next_is_due = async {
            match to_come.len() {
                0 => future::pending().await,
                _ => Timer::after(NEXT_ADDRESS).await,
            };
            None
        };
        match future::or(any_end, next_is_due).await {
            Some((_, Ok(socket))) => return Ok(socket),
            Some((at, Err(error))) => {
                drop(under_way.swap_remove(at));
                first_error.get_or_insert(error);
            }
            None => {}
        }
    }
}

/// A socket that does not block, connected.
async fn connect_to_address(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => return Err(e),
        _ => {}
    }
    let socket = Async::new_nonblocking(socket)?;
    socket.writable().await?;
    let socket = socket.into_inner()?;
    match socket.take_error()? {
        Some(error) => Err(error),
        None => Ok(socket),
    }
}

/// The resolver has time-outs of its own, so it is asked on a thread that may be left behind.
fn resolve(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    let (sender, answer) = mpsc::channel();
    let host = host.to_owned();
    std::thread::Builder::new().name("resolve".into()).spawn(move || {
        let addresses = (host.as_str(), port).to_socket_addrs();
        // Nobody listens any more after the deadline.
        let _ = sender.send(addresses.map(Iterator::collect));
    })?;
    answer.recv_timeout(left_until(deadline)?).unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, "its name was not resolved in time"))
    })
}

/// A server that is busy may have as many clients waiting as it lets wait: only a socket that
/// blocks waits with them.
pub fn connect_unix(path: &Path, deadline: Instant) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_write_timeout(Some(left_until(deadline)?))?;
    socket.connect(&SockAddr::unix(path)?).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, "too many others wait for the server")
        }
        _ => e,
    })?;
    enlarge_send_buffer(&socket);
    Ok(socket)
}

/// To the context `cid`, by the names that the errors have elsewhere.
pub fn connect_vsock(cid: u32, port: u32, deadline: Instant) -> io::Result<Socket> {
    let connect = || {
        let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        let left = left_until(deadline)?;
        // The kernel's own is two seconds.
        sys::set_vsock_connect_timeout(&socket, left)?;
        socket.connect_timeout(&SockAddr::vsock(cid, port), left)?;
        Ok(socket)
    };
    connect().map_err(|e: io::Error| match e.raw_os_error() {
        Some(libc::ECONNRESET) => io::ErrorKind::ConnectionRefused.into(),
        Some(libc::EAFNOSUPPORT | libc::ENODEV) => io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel has no vsock to it (modules: vsock_loopback for CID 1, in a guest \
             vmw_vsock_virtio_transport, on its host vhost_vsock)",
        ),
        _ => e,
    })
}

/// A Unix socket has room for some 200 KiB, so that a large write takes several calls and a wake-up
/// for each. (TCP finds its own size.) With room for several of them the server is never short of
/// data. Their payloads wait in it by their pages; what is copied, short writes and TLS, takes as
/// much of the kernel's memory as it waits. The kernel doubles the number, and takes less where
/// less is allowed (`net.core.wmem_max`): both are fine.
fn enlarge_send_buffer(socket: &Socket) {
    const SEND_BUFFER: usize = 4 << 20;
    if let Err(e) = socket.set_send_buffer_size(SEND_BUFFER) {
        log::debug!("SO_SNDBUF: {e}");
    }
}

/// No delay: requests are gathered before they are sent. The time-outs tell a dead host from a slow
/// server: a link that is down for a minute ends no connection, and nor does a server that reads
/// nothing for as long as it likes.
fn tune_tcp(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )?;
    match sys::set_tcp_longest_pause(socket, LONGEST_PAUSE) {
        Ok(()) => Ok(()),
        Err(_) => socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Connects until nobody answers any more. What is given has to be kept.
    fn fill(connect: impl Fn() -> io::Result<Socket>) -> Vec<Socket> {
        let connected: Vec<_> = std::iter::from_fn(|| connect().ok()).take(100).collect();
        assert!(connected.len() < 100, "the backlog has no end");
        connected
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(200)
    }

    #[test]
    fn an_address_that_swallows_syns_does_not_cost_the_time_of_the_next() {
        let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        full.bind(&SocketAddr::from(([127, 1, 2, 3], 0)).into()).unwrap();
        full.listen(0).unwrap();
        let swallows = full.local_addr().unwrap().as_socket().unwrap();
        let _waiting = fill(|| connect_any(&[swallows], soon()));
        let listener = TcpListener::bind("127.1.2.3:0").unwrap();
        let answers = listener.local_addr().unwrap();
        let begun = Instant::now();
        let socket = connect_any(&[swallows, answers], begun + LONG).unwrap();
        assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(answers));
        assert!(begun.elapsed() < LONG / 4, "{:?}", begun.elapsed());
        // It blocks, as the handshake needs it.
        assert!(!socket.nonblocking().unwrap());
    }

    #[test]
    fn the_first_error_counts_and_nothing_waits_for_the_next_address() {
        // The listener is gone at once.
        let refuses = TcpListener::bind("127.1.2.3:0").unwrap().local_addr().unwrap();
        let begun = Instant::now();
        let error = connect_any(&[refuses; 100], begun + LONG).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(begun.elapsed() < 100 * NEXT_ADDRESS, "{:?}", begun.elapsed());
    }

    #[test]
    fn a_unix_socket_with_a_full_backlog_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let listener = UnixListener::from(listener);
        let waiting = fill(|| connect_unix(&path, soon()));
        let error = connect_unix(&path, soon()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        let connect = std::thread::spawn({
            let path = path.clone();
            move || connect_unix(&path, Instant::now() + LONG)
        });
        for _ in 0..waiting.len() + 1 {
            listener.accept().unwrap();
        }
        connect.join().unwrap().unwrap();
    }
}
