//! The end of an export: the last flush, and NBD_CMD_DISC.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use super::super::connection::Connection;
use super::super::connections::Connections;
use super::super::dial::Dialer;
use super::super::unflushed::Change;
use super::super::wire::{Headers, transmission_flag};
use super::super::{LAST_FLUSH_LIMIT, NbdBackend};
use super::on_lane;
use super::options;
use super::peer::{connection, connection_with, one_of_several};
use crate::backend::Lane;
use crate::export::{Cache, Export, Policy, Served, Truncate};

/// A disk behind these connections, the first of which tells what it is.
pub fn disk(connections: &[Arc<Connection>]) -> Arc<NbdBackend> {
    let dialer = Dialer::new(&"nbd://peer/".parse().unwrap(), &options()).unwrap();
    let all = Connections::new(dialer, connections[0].clone(), &options()).unwrap();
    connections[1..].iter().for_each(|connection| all.add(connection.clone(), 0));
    NbdBackend::over(all)
}

#[test]
fn the_server_of_a_read_only_export_is_disconnected_and_no_flush() {
    let (connection, peer) =
        connection(Headers::Structured, |mut peer| assert!(peer.sees_disconnect()));
    let policy = Policy {
        writable: false,
        growable: false,
        truncate: Truncate::Refuse,
        cache: Cache::None,
        keep_cache: false,
        allow_other: false,
        uid: 0,
        gid: 0,
    };
    let export = Export::new(disk(&[connection]), policy, Arc::default()).unwrap();
    export.last_flush(Duration::ZERO).unwrap();
    drop(export);
    peer.join().unwrap();
}

#[test]
fn a_server_that_hangs_costs_the_time_of_the_last_flush_once() {
    let (silent, first) = one_of_several(|mut peer| while peer.request().is_some() {});
    let (untried, second) = one_of_several(|mut peer| assert!(peer.sees_disconnect()));
    let connections = [silent, untried];
    let backend = disk(&connections);
    backend.unflushed().begin().acknowledged(0, Change::Data(&[1]));
    let flushed = backend.flush_over_any(&connections, Duration::from_millis(100));
    assert_eq!(flushed.unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(connections[0].is_lost() && !connections[1].is_lost());
    assert!(backend.unflushed().any());
    connections[1].disconnect();
    first.join().unwrap();
    second.join().unwrap();
}

#[test]
fn a_connection_that_fails_leaves_the_last_flush_to_another() {
    let (failing, first) = one_of_several(|mut peer| drop(peer.request()));
    let (working, second) = one_of_several(|mut peer| {
        let flush = peer.request().unwrap();
        peer.done(flush.cookie);
        assert!(peer.sees_disconnect());
    });
    let connections = [failing, working];
    let backend = disk(&connections);
    backend.unflushed().begin().acknowledged(0, Change::Data(&[1]));
    backend.flush_over_any(&connections, LAST_FLUSH_LIMIT).unwrap();
    assert!(connections[0].is_lost() && !backend.unflushed().any());
    connections[1].disconnect();
    first.join().unwrap();
    second.join().unwrap();
}

/// It may be told once over all connections.
#[test]
fn an_error_of_the_last_flush_is_not_made_good_by_another_connection() {
    let (failing, first) = one_of_several(|mut peer| {
        let flush = peer.request().unwrap();
        peer.error(flush.cookie, true, 0x8001, 5, "");
        assert!(peer.sees_disconnect());
    });
    let (untried, second) = one_of_several(|mut peer| assert!(peer.sees_disconnect()));
    let connections = [failing, untried];
    let backend = disk(&connections);
    backend.unflushed().begin().acknowledged(0, Change::Data(&[1]));
    let flushed = backend.flush_over_any(&connections, LAST_FLUSH_LIMIT);
    assert_eq!(flushed.unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(backend.unflushed().any());
    connections.iter().for_each(|connection| connection.disconnect());
    first.join().unwrap();
    second.join().unwrap();
}

/// The server tells it once, in the answer to a flush whose client was killed.
#[test]
fn an_error_of_a_flush_that_nobody_waits_for_is_told_by_the_next() {
    let (seen, is_seen) = smol::channel::bounded(1);
    let (connection, peer) = connection(Headers::Structured, move |mut peer| {
        let write = peer.request().unwrap();
        peer.done(write.cookie);
        let given_up = peer.request().unwrap();
        seen.send_blocking(()).unwrap();
        let next = peer.request().unwrap();
        peer.done(next.cookie);
        // The next one waits for it.
        std::thread::sleep(Duration::from_millis(50));
        peer.error(given_up.cookie, true, 0x8001, 5, "");
        while peer.request().is_some() {}
    });
    let backend = disk(std::slice::from_ref(&connection));
    on_lane(&backend, async |lane, _| {
        lane.write(0, &[1; 512], false).await.unwrap();
        let given_up = async { lane.flush().await.map(|()| unreachable!("it is not answered")) };
        let killed = async {
            is_seen.recv().await.unwrap();
            Ok(())
        };
        smol::future::or(given_up, killed).await.unwrap();
        assert_eq!(lane.flush().await.unwrap_err().raw_os_error(), Some(libc::EIO));
        lane.flush().await.unwrap();
    });
    connection.disconnect();
    peer.join().unwrap();
}

/// What it had acknowledged may be gone with it.
#[test]
fn without_a_flush_an_fsync_fails_once_the_server_is_gone() {
    let flags = transmission_flag::HAS_FLAGS;
    let (connection, peer) = connection_with(flags, Headers::Structured, |mut peer| {
        let write = peer.request().unwrap();
        peer.done(write.cookie);
        // The connection ends with it.
        peer.request();
    });
    let backend = disk(std::slice::from_ref(&connection));
    on_lane(&backend, async |lane, _| {
        lane.write(0, &[1; 512], false).await.unwrap();
        lane.flush().await.unwrap();
        lane.read(0, &mut [0; 512]).await.unwrap_err();
        lane.flush().await.unwrap_err();
    });
    peer.join().unwrap();
}
