//! The end of an export: the last flush, and the goodbye.

use std::sync::Arc;

use super::super::NbdBackend;
use super::super::connection::Connection;
use super::super::dial::Dialer;
use super::super::wire::Headers;
use super::options;
use super::peer::connection;
use crate::export::{Export, Policy};

/// A disk behind these connections, the first of which tells what it is.
fn disk(connections: &[Arc<Connection>]) -> Arc<NbdBackend> {
    let dialer = Dialer::new(&"nbd://peer/".parse().unwrap(), &options()).unwrap();
    let backend = NbdBackend::over(dialer, connections[0].clone());
    backend.pool().connections.extend_from_slice(&connections[1..]);
    backend
}

#[test]
fn the_server_of_a_read_only_export_hears_the_goodbye_and_no_flush() {
    let (connection, peer) =
        connection(Headers::Structured, |mut peer| assert!(peer.hears_goodbye()));
    let policy = Policy { writable: false, growable: false, allow_other: false, uid: 0, gid: 0 };
    let export = Export::new(disk(&[connection]), policy, Arc::default()).unwrap();
    export.last_flush().unwrap();
    drop(export);
    peer.join().unwrap();
}
