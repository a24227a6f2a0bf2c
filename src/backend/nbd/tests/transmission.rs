//! Transmission against a scripted peer: orders and mistakes that real servers seldom show.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use smol::future::{or, poll_once, zip};
use smol::{LocalExecutor, Timer};
use socket2::Socket;

use super::super::connection::Connection;
use super::super::dial::{Agreed, Opened};
use super::super::handshake::BlockSizes;
use super::super::inflight::{Extent, Failure};
use super::super::stream::Stream;
use super::super::wire::{Command, Headers};
use super::peer::{self, CONTEXT, Peer, Seen, chunk, drive};
use crate::io::Io;

/// A connection of these tests, which leak no future.
#[derive(Clone)]
struct Client(Arc<Connection>);

impl Client {
    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        // SAFETY: see above.
        unsafe { self.0.read(offset, buf) }.await
    }

    async fn write(&self, offset: u64, data: &[u8], flags: u16) -> Result<(), Failure> {
        // SAFETY: see above.
        unsafe { self.0.write(offset, data, flags) }.await
    }
}

impl Deref for Client {
    type Target = Arc<Connection>;

    fn deref(&self) -> &Arc<Connection> {
        &self.0
    }
}

fn connection(
    headers: Headers,
    script: impl FnOnce(Peer) + Send + 'static,
) -> (Client, JoinHandle<()>) {
    let (connection, peer) = peer::connection(headers, script);
    (Client(connection), peer)
}

fn errno(result: Result<(), Failure>) -> i32 {
    std::io::Error::from(result.unwrap_err()).raw_os_error().unwrap()
}

#[test]
fn replies_may_come_in_any_order() {
    let (connection, peer) = connection(Headers::Simple, |mut peer| {
        let requests: Vec<_> = (0..64).map(|_| peer.request().unwrap()).collect();
        for seen in requests.iter().rev() {
            peer.simple(seen.cookie, 0, &vec![seen.offset as u8; seen.length as usize]);
        }
    });
    drive(&connection, async |executor| {
        let reads: Vec<_> = (0..64)
            .map(|n| {
                let connection = connection.clone();
                executor.spawn(async move {
                    let mut buf = vec![0xff; 1000 + n];
                    connection.read(n as u64, &mut buf).await.unwrap();
                    assert!(buf.iter().all(|byte| *byte == n as u8));
                })
            })
            .collect();
        for read in reads {
            read.await;
        }
    });
    peer.join().unwrap();
}

#[test]
fn chunks_interleave_across_cookies_and_arrive_byte_by_byte() {
    for headers in [Headers::Structured, Headers::Extended] {
        let (connection, peer) = connection(headers, move |mut peer| {
            let (a, b) = (peer.request().unwrap(), peer.request().unwrap());
            let mut bytes = Vec::new();
            let mut data = |cookie, offset: u64, data: &[u8]| {
                let payload = [&offset.to_be_bytes(), data].concat();
                bytes.extend(chunk(headers, cookie, false, 1, &payload));
            };
            data(a.cookie, a.offset + 50, &[1; 50]);
            data(b.cookie, b.offset, &[2; 10]);
            data(a.cookie, a.offset + 10, &[3; 40]);
            data(b.cookie, b.offset + 20, &[4; 80]);
            let hole = |at: u64| [&at.to_be_bytes()[..], &10_u32.to_be_bytes()].concat();
            bytes.extend(chunk(headers, a.cookie, true, 2, &hole(a.offset)));
            bytes.extend(chunk(headers, b.cookie, false, 2, &hole(b.offset + 10)));
            bytes.extend(chunk(headers, b.cookie, true, 0, &[]));
            for byte in bytes {
                peer.send(&[byte]);
            }
        });
        let (mut a, mut b) = ([9; 100], [9; 100]);
        drive(&connection, async |_| {
            let (a, b) = zip(connection.read(0, &mut a), connection.read(1000, &mut b)).await;
            a.and(b).unwrap();
        });
        assert_eq!(a[..], [&[0; 10][..], &[3; 40], &[1; 50]].concat());
        assert_eq!(b[..], [&[2; 10][..], &[0; 10], &[4; 80]].concat());
        peer.join().unwrap();
    }
}

#[test]
fn large_reads_arrive_whole() {
    let (connection, peer) = connection(Headers::Structured, |mut peer| {
        while let Some(seen) = peer.request() {
            let data: Vec<u8> = (0..seen.length).map(|at| (seen.offset + at) as u8).collect();
            let half = data.len() / 2;
            peer.data(seen.cookie, false, seen.offset + half as u64, &data[half..]);
            peer.data(seen.cookie, true, seen.offset, &data[..half]);
        }
    });
    drive(&connection, async |executor| {
        let reads: Vec<_> = (0..20_u64)
            .map(|n| {
                let connection = connection.clone();
                executor.spawn(async move {
                    let length = if n % 3 == 0 { 700 } else { 300_000 + n };
                    let mut buf = vec![0; length as usize];
                    connection.read(n, &mut buf).await.unwrap();
                    assert!(
                        buf.iter().enumerate().all(|(at, byte)| *byte == (at as u64 + n) as u8)
                    );
                })
            })
            .collect();
        for read in reads {
            read.await;
        }
    });
    connection.disconnect();
    drop(connection);
    peer.join().unwrap();
}

#[test]
fn an_error_fails_its_request_alone() {
    let (connection, peer) = connection(Headers::Structured, |mut peer| {
        let seen = peer.request().unwrap();
        peer.hole(seen.cookie, false, seen.offset + 50, 50);
        peer.data(seen.cookie, false, seen.offset, &[1; 50]);
        peer.error(seen.cookie, false, 0x8001, 28, "the disk is full");
        peer.done(seen.cookie);
        let seen = peer.request().unwrap();
        // An error type from the future, and a number that is on nobody's list.
        peer.error(seen.cookie, true, 0xfffe, 38, "");
        let seen = peer.request().unwrap();
        peer.simple(seen.cookie, 1, &[]);
        let seen = peer.request().unwrap();
        peer.simple(seen.cookie, 0, &[]);
    });
    drive(&connection, async |_| {
        assert_eq!(errno(connection.read(0, &mut [0; 100]).await), libc::ENOSPC);
        assert_eq!(errno(connection.read(0, &mut [0; 100]).await), libc::EIO);
        assert_eq!(errno(connection.write(0, &[0; 100], 0).await), libc::EPERM);
        connection.write(0, &[0; 100], 0).await.unwrap();
    });
    assert!(!connection.is_lost());
    peer.join().unwrap();
}

/// What the first read sees, and whether the connection survives.
fn after(headers: Headers, answer: impl FnOnce(u64) -> Vec<u8> + Send + 'static) -> (i32, bool) {
    let (connection, peer) = connection(headers, |mut peer| {
        let seen = peer.request().unwrap();
        peer.send(&answer(seen.cookie));
        // Stays until the client has hung up or the test ends the connection.
        let _ = peer.request();
    });
    let error = drive(&connection, async |_| errno(connection.read(4096, &mut [0; 100]).await));
    let survives = !connection.is_lost();
    connection.disconnect();
    drop(connection);
    peer.join().unwrap();
    (error, survives)
}

#[test]
fn wrong_contents_fail_the_read_and_wrong_framing_ends_the_connection() {
    let s = Headers::Structured;
    let offset = |at: u64, rest: &[u8]| [&at.to_be_bytes(), rest].concat();
    let eio = libc::EIO;
    // Bytes left out, told twice, out of bounds.
    assert_eq!(after(s, move |c| chunk(s, c, true, 1, &offset(4096, &[0; 99]))), (eio, true));
    assert_eq!(after(s, move |c| chunk(s, c, true, 0, &[])), (eio, true));
    assert_eq!(after(s, move |c| chunk(s, c, true, 1, &offset(4095, &[0; 100]))), (eio, true));
    assert_eq!(after(s, move |c| chunk(s, c, true, 1, &offset(4097, &[0; 100]))), (eio, true));
    let twice = move |c| {
        let both = chunk(s, c, false, 1, &offset(4096, &[0; 60]));
        [both, chunk(s, c, true, 1, &offset(4136, &[0; 60]))].concat()
    };
    assert_eq!(after(s, twice), (eio, true));
    // Unknown chunk, unknown cookie, no length, a form that was not agreed on, no protocol at all.
    assert_eq!(after(s, move |c| chunk(s, c, true, 3, &[])), (eio, false));
    assert_eq!(after(s, move |c| chunk(s, c + 1, true, 0, &[])), (eio, false));
    assert_eq!(after(s, move |c| chunk(s, c, true, 1, &offset(4096, &[]))), (eio, false));
    assert_eq!(after(s, move |c| chunk(s, c, true, 2, &offset(4096, &[0; 4]))), (eio, false));
    assert_eq!(after(s, move |c| chunk(s, c, true, 0x8001, &[0; 5])), (eio, false));
    assert_eq!(after(s, move |c| chunk(s, c, true, 5, &[0; 12])), (eio, false));
    assert_eq!(after(s, move |c| chunk(Headers::Extended, c, true, 0, &[])), (eio, false));
    assert_eq!(after(s, |_| b"HTTP/1.1 400 Bad Request\r\n".to_vec()), (eio, false));
    let simple = |c: u64| [&0x6744_6698_0000_0000_u64.to_be_bytes()[..], &c.to_be_bytes()].concat();
    assert_eq!(after(s, simple), (eio, false));
    assert_eq!(after(Headers::Extended, simple), (eio, false));
}

#[test]
fn an_answer_that_claims_too_much_ends_the_connection_at_once() {
    for headers in [Headers::Structured, Headers::Extended] {
        let long = |length| [&4096_u64.to_be_bytes()[..], &vec![0; length]].concat();
        let whole = move |c| chunk(headers, c, true, 1, &long(101));
        assert_eq!(after(headers, whole), (libc::EIO, false));
        // The most that can be claimed; none of it ever comes.
        let claim = move |c| {
            let mut bytes = chunk(headers, c, true, 1, &[]);
            let width = if headers == Headers::Extended { 8 } else { 4 };
            let length = bytes.len() - width;
            bytes[length..].fill(0xff);
            [bytes, long(0)].concat()
        };
        assert_eq!(after(headers, claim), (libc::EIO, false));
    }
}

#[test]
fn replies_behind_one_that_claims_too_much_are_not_waited_for() {
    let (connection, peer) = connection(Headers::Structured, |mut peer| {
        let (a, b) = (peer.request().unwrap(), peer.request().unwrap());
        let answer = |seen: &Seen, length| {
            let payload = [&seen.offset.to_be_bytes()[..], &vec![0; length]].concat();
            chunk(Headers::Structured, seen.cookie, true, 1, &payload)
        };
        peer.send(&[answer(&a, 11), answer(&b, 10)].concat());
        assert_eq!(peer.request(), None);
    });
    drive(&connection, async |_| {
        let (mut a, mut b) = ([0; 10], [0; 10]);
        let (a, b) = zip(connection.read(0, &mut a), connection.read(10, &mut b)).await;
        assert_eq!((errno(a), errno(b)), (libc::EIO, libc::EIO));
    });
    assert!(connection.is_lost());
    peer.join().unwrap();
}

#[test]
fn a_dropped_read_is_drained_and_its_buffer_is_not_touched() {
    for length in [1000, 500_000] {
        let (tell, told) = mpsc::channel();
        let (connection, peer) = connection(Headers::Structured, move |mut peer| {
            let seen = peer.request().unwrap();
            let payload = [&seen.offset.to_be_bytes()[..], &vec![7; length]].concat();
            let bytes = chunk(Headers::Structured, seen.cookie, true, 1, &payload);
            // The header and some of the data; the rest once the reader has gone.
            peer.send(&bytes[..400]);
            told.recv().unwrap();
            peer.send(&bytes[400..]);
            let seen = peer.request().unwrap();
            peer.data(seen.cookie, true, seen.offset, &[8; 10]);
        });
        drive(&connection, async |_| {
            let mut buf = vec![1; length];
            let read = connection.read(0, &mut buf);
            let timeout = async {
                Timer::after(Duration::from_millis(50)).await;
                Ok(())
            };
            or(read, timeout).await.unwrap();
            let before = buf.clone();
            tell.send(()).unwrap();
            let mut other = [0; 10];
            connection.read(0, &mut other).await.unwrap();
            assert_eq!(other, [8; 10]);
            assert_eq!(buf, before);
        });
        peer.join().unwrap();
    }
}

/// Begins a long write, and drops it when some of it has been sent.
async fn drop_half_sent<T>(write: impl Future<Output = T>) {
    let mut write = Box::pin(write);
    assert!(poll_once(write.as_mut()).await.is_none());
    // Time for the first part to fill the socket, and the pipe before it.
    Timer::after(Duration::from_millis(50)).await;
}

#[test]
fn a_dropped_write_still_arrives_whole() {
    let length = 4 << 20;
    let (tell, told) = mpsc::channel();
    let (connection, peer) = connection(Headers::Structured, move |mut peer| {
        told.recv().unwrap();
        let seen = peer.request().unwrap();
        assert!(seen.data == vec![5; length]);
        peer.done(seen.cookie);
        let seen = peer.request().unwrap();
        assert_eq!(seen.data, [6; 3]);
        peer.done(seen.cookie);
    });
    drive(&connection, async |_| {
        let data = vec![5; length];
        drop_half_sent(connection.write(0, &data, 0)).await;
        drop(data);
        tell.send(()).unwrap();
        connection.write(0, &[6; 3], 0).await.unwrap();
    });
    peer.join().unwrap();
}

#[test]
fn long_writes_arrive_whole_and_in_order() {
    let length = 4 << 20;
    let (tell, told) = mpsc::channel();
    let (connection, peer) = connection(Headers::Structured, move |mut peer| {
        told.recv().unwrap();
        for byte in [5, 6, 7, 8] {
            let seen = peer.request().unwrap();
            assert!(seen.data == vec![byte; seen.data.len()] && seen.offset == u64::from(byte));
            peer.done(seen.cookie);
        }
    });
    drive(&connection, async |_| {
        let (dropped, long) = (vec![5; length], vec![6; length]);
        drop_half_sent(connection.write(5, &dropped, 0)).await;
        // What is left of it goes from a copy.
        drop(dropped);
        tell.send(()).unwrap();
        let last = vec![8; length];
        let others = zip(connection.write(7, &[7; 3], 0), connection.write(8, &last, 0));
        let (long, (short, last)) = zip(connection.write(6, &long, 0), others).await;
        long.and(short).and(last).unwrap();
    });
    peer.join().unwrap();
}

#[test]
fn a_write_that_was_not_sent_has_not_succeeded() {
    let (tell, told) = mpsc::channel();
    let (connection, peer) = connection(Headers::Structured, move |mut peer| {
        use std::io::Read;
        let mut header = [0; 28];
        peer.socket.read_exact(&mut header).unwrap();
        peer.done(u64::from_be_bytes(header[8..16].try_into().unwrap()));
        told.recv().unwrap();
    });
    drive(&connection, async |_| {
        let data = vec![5; 4 << 20];
        assert_eq!(errno(connection.write(0, &data, 0).await), libc::EIO);
        assert!(!connection.is_lost());
    });
    tell.send(()).unwrap();
    peer.join().unwrap();
}

#[test]
fn an_answer_before_the_last_byte_was_sent_is_an_answer() {
    let length = 4 << 20;
    let (connection, peer) = connection(Headers::Structured, move |mut peer| {
        // Looks at the header only.
        use std::io::Read;
        let mut header = [0; 28];
        peer.socket.read_exact(&mut header).unwrap();
        let cookie = u64::from_be_bytes(header[8..16].try_into().unwrap());
        peer.error(cookie, true, 0x8001, 28, "full");
        std::thread::sleep(Duration::from_millis(50));
        let mut data = vec![0; length];
        peer.socket.read_exact(&mut data).unwrap();
        assert!(data == vec![5; length]);
        let seen = peer.request().unwrap();
        peer.done(seen.cookie);
    });
    drive(&connection, async |_| {
        let data = vec![5; length];
        assert_eq!(errno(connection.write(0, &data, 0).await), libc::ENOSPC);
        drop(data);
        connection.write(0, &[6; 3], 0).await.unwrap();
    });
    peer.join().unwrap();
}

#[test]
fn a_server_that_hangs_up_fails_all_requests_present_and_future() {
    let (connection, peer) = connection(Headers::Structured, |mut peer| {
        peer.request().unwrap();
        peer.request().unwrap();
    });
    drive(&connection, async |_| {
        let (mut a, mut b) = ([0; 10], [0; 10]);
        let (a, b) = zip(connection.read(0, &mut a), connection.read(0, &mut b)).await;
        assert_eq!((errno(a), errno(b)), (libc::EIO, libc::EIO));
        assert_eq!(errno(connection.write(0, &[1], 0).await), libc::EIO);
    });
    assert!(connection.is_lost());
    peer.join().unwrap();
}

#[test]
fn more_requests_than_slots_wait_their_turn() {
    let (connection, peer) = connection(Headers::Simple, |mut peer| {
        let mut count = 0;
        while let Some(seen) = peer.request() {
            peer.simple(seen.cookie, 0, &vec![1; seen.length as usize]);
            count += 1;
            if count == 2000 {
                return;
            }
        }
    });
    drive(&connection, async |executor| {
        let reads: Vec<_> = (0..2000)
            .map(|_| {
                let connection = connection.clone();
                executor.spawn(async move { connection.read(0, &mut [0; 64]).await.unwrap() })
            })
            .collect();
        for read in reads {
            read.await;
        }
    });
    peer.join().unwrap();
}

#[test]
fn block_status_is_merged_in_both_header_forms() {
    for headers in [Headers::Structured, Headers::Extended] {
        let (connection, peer) = connection(headers, move |mut peer| {
            let seen = peer.request().unwrap();
            assert_eq!((seen.command, seen.length), (7, 1000));
            let extents = [(100_u32, 3_u32), (50, 2), (10, 0), (840, 1), (24, 3)];
            let mut payload = CONTEXT.to_be_bytes().to_vec();
            let wide = headers == Headers::Extended;
            if wide {
                payload.extend((extents.len() as u32).to_be_bytes());
            }
            for (length, state) in extents {
                if wide {
                    payload.extend(u64::from(length).to_be_bytes());
                    payload.extend(u64::from(state).to_be_bytes());
                } else {
                    payload.extend(length.to_be_bytes());
                    payload.extend(state.to_be_bytes());
                }
            }
            peer.chunk(seen.cookie, true, if wide { 6 } else { 5 }, &payload);
        });
        let extents = drive(&connection, async |_| {
            connection.command(Command::BlockStatus, 0, 0, 1000).await.unwrap()
        });
        let extent = |length, zero| Extent { length, zero };
        assert_eq!(extents, [extent(150, true), extent(850, false), extent(24, true)]);
        peer.join().unwrap();
    }
}

#[test]
fn when_the_driving_thread_ends_another_takes_over() {
    let (connection, peer) = connection(Headers::Structured, |mut peer| {
        while let Some(seen) = peer.request() {
            std::thread::sleep(Duration::from_millis(1));
            peer.data(seen.cookie, true, seen.offset, &vec![9; seen.length as usize]);
        }
    });
    let run = |connection: Client, reads: usize| {
        drive(&connection, async |_| {
            for _ in 0..reads {
                let mut buf = vec![0; 5000];
                connection.read(0, &mut buf).await.unwrap();
                assert_eq!(buf, [9; 5000]);
            }
        });
    };
    std::thread::scope(|scope| {
        for reads in [20, 60, 100] {
            scope.spawn({
                let connection = connection.clone();
                move || run(connection, reads)
            });
        }
    });
    connection.disconnect();
    drop(connection);
    peer.join().unwrap();
}

/// A request is sent again once its connection was given up. So no more of it may reach the server
/// then: what has not been received is taken back.
#[test]
fn a_connection_that_is_given_up_takes_back_what_was_not_received() {
    const LENGTH: usize = 32 << 20;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut theirs, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    let socket = Arc::new(Socket::from(ours));
    let block_sizes = BlockSizes { minimum: 1, preferred: 4096, maximum: 1 << 25 };
    let headers = Headers::Simple;
    let agreed = Agreed { size: 1 << 30, flags: 1, block_sizes, headers, base_allocation: None };
    let stream = Stream::plain(socket.clone());
    let opened = Opened { stream, socket, agreed };
    let connection = Client(Connection::new("peer".into(), opened, Arc::default()));
    let executor = Rc::new(LocalExecutor::new());
    let io = Io::of_a_test(None, executor.clone());
    let reason = Rc::new(RefCell::new(None));
    let told = reason.clone();
    let timeout = Some(Duration::from_millis(300));
    let _driver =
        connection.driver(&io, timeout, move |why| *told.borrow_mut() = Some(why.to_owned()));
    let data = vec![1; LENGTH];
    let written = smol::block_on(executor.run(connection.write(0, &data, 0)));
    assert!(matches!(written, Err(Failure::Lost)), "{written:?}");
    assert!(reason.borrow().as_ref().is_some_and(|why| why.contains("no answer")));
    let mut received = 0;
    let mut buf = vec![0; 1 << 20];
    let end = loop {
        match theirs.read(&mut buf) {
            Ok(0) => panic!("it ends politely, after {received} bytes"),
            Ok(bytes) => received += bytes,
            Err(e) => break e,
        }
    };
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(received < LENGTH, "all of it");
}
