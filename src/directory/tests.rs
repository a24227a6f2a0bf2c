use std::io::ErrorKind;

use smol::LocalExecutor;
use smol::future::block_on;

use super::*;
use crate::backend::nbd;
use crate::export::Truncate;
use crate::fuse::abi::{Dirent, Plain};

/// A directory of exports with these names, of a server that nobody can reach.
fn directory(names: &[&str]) -> Directory {
    let uri = "nbd+unix:///?socket=/nowhere/socket".parse().unwrap();
    let exports = Exports::new(&uri, &nbd::Options::default()).unwrap();
    let found = names.iter().enumerate().map(|(number, name)| Found {
        name: (*name).into(),
        size: 512 * number as u64,
        read_only: number == 1,
    });
    let policy = Policy {
        writable: true,
        growable: false,
        truncate: Truncate::Refuse,
        cache: Cache::Writethrough,
        keep_cache: false,
        allow_other: false,
        uid: 7,
        gid: 8,
    };
    let reporter = Reporter { source: "nbd://host".into(), stats: Arc::default() };
    Directory::new(exports, found.collect(), policy, 2, reporter, Arc::default())
}

/// The entries, read with so much room each time.
fn entries(directory: &Directory, room: usize) -> Vec<(u64, String)> {
    let (mut all, mut next) = (Vec::new(), 0);
    loop {
        let mut room = vec![0xff; room];
        let len = directory.readdir(next, &mut room);
        if len == 0 {
            return all;
        }
        let mut rest = &room[..len];
        while !rest.is_empty() {
            let head = Dirent::read(rest);
            let name = &rest[size_of::<Dirent>()..][..head.namelen as usize];
            all.push((head.ino, String::from_utf8(name.to_vec()).unwrap()));
            next = head.off;
            rest = &rest[(size_of::<Dirent>() + name.len()).next_multiple_of(8)..];
        }
    }
}

fn handle(
    directory: &Arc<Directory>,
    node: u64,
    op: Op,
    payload: &mut [u8],
) -> Result<Reply, Errno> {
    let lanes = directory.lane(&Io::of_a_test(None, Rc::new(LocalExecutor::new()))).unwrap();
    block_on(directory.handle(&lanes, node, op, payload))
}

#[test]
fn each_entry_is_read_once_whatever_the_room() {
    let long = "x".repeat(1000);
    let directory = directory(&["a", "", "b/c", &long]);
    let expected = ["a".into(), "%".into(), "b%2Fc".into(), names::file_name(&long)];
    for room in [300, 512, 65536] {
        let entries = entries(&directory, room);
        assert_eq!(entries[..2], [(1, ".".into()), (1, "..".into())]);
        let files: Vec<_> = (2..).zip(expected.clone()).collect();
        assert_eq!(entries[2..], files, "{room}");
    }
}

#[test]
fn files_are_found_by_their_names_and_shown_as_the_server_told() {
    let directory = Arc::new(directory(&["a", "b/c"]));
    let lookup = |name: &str| {
        let mut payload = [0xff; 512];
        payload[..name.len()].copy_from_slice(name.as_bytes());
        payload[name.len()] = 0;
        match handle(&directory, ROOT_ID, Op::Lookup, &mut payload) {
            Ok(Reply::Entry { attr, .. }) => Ok(attr),
            other => Err(other.unwrap_err()),
        }
    };
    let file = lookup("b%2Fc").unwrap();
    assert_eq!((file.ino, file.size, file.mode), (3, 512, libc::S_IFREG | 0o400));
    assert_eq!((file.uid, file.gid), (7, 8));
    assert_eq!(lookup("a").unwrap().mode, libc::S_IFREG | 0o600);
    assert_eq!(lookup("b/c").unwrap_err(), Errno::ENOENT);
    assert_eq!(lookup(&"y".repeat(300)).unwrap_err(), Errno::ENOENT);
}

#[test]
fn nothing_is_made_or_removed_in_it() {
    let directory = Arc::new(directory(&["a"]));
    for op in [Op::ChangeDirectory, Op::Setattr(Default::default())] {
        assert_eq!(handle(&directory, ROOT_ID, op, &mut []).unwrap_err(), Errno::EPERM);
    }
    let stat = Op::Getattr { handle: None };
    assert_eq!(handle(&directory, 3, stat, &mut []).unwrap_err(), Errno::ENOENT);
}

/// A file that cannot be connected to takes no place of another.
#[test]
fn failed_connections_leave_their_places() {
    let directory = Arc::new(directory(&["a", "b", "c"]));
    for node in [2, 3, 4, 2] {
        let open = Op::Open { flags: 0 };
        assert_eq!(handle(&directory, node, open, &mut []).unwrap_err(), Errno::EIO);
    }
    assert!(directory.connected().nodes.is_empty() && !directory.is_open());
    directory.last_flush(Duration::ZERO).unwrap();
    assert!(!directory.flush_failed());
}

#[test]
fn a_server_that_cannot_be_reached_lists_nothing() {
    let directory = directory(&[]);
    let Err(Error::Connect { source, .. }) = directory.exports.list() else { panic!() };
    assert_eq!(source.kind(), ErrorKind::NotFound);
}
