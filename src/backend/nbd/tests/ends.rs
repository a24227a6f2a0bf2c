//! The end of an export: the last flush, and NBD_CMD_DISC.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use super::super::connection::Connection;
use super::super::connections::Connections;
use super::super::dial::Dialer;
use super::super::unflushed::Change;
use super::super::wire::Headers;
use super::super::{LAST_FLUSH_LIMIT, NbdBackend};
use super::options;
use super::peer::connection;
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
    let (silent, first) =
        connection(Headers::Structured, |mut peer| while peer.request().is_some() {});
    let (untried, second) =
        connection(Headers::Structured, |mut peer| assert!(peer.sees_disconnect()));
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
    let (failing, first) = connection(Headers::Structured, |mut peer| drop(peer.request()));
    let (working, second) = connection(Headers::Structured, |mut peer| {
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
