//! What a running export tells of its server.

use std::fs;
use std::os::unix::fs::FileExt;

use libc::O_DIRECT;

use crate::common::nbd::{Address, Server, Starter};
use crate::common::{Aligned, eventually, number, report};
use crate::{Bench, open};

pub fn report_follows_a_server_that_goes_and_comes_back(bench: &Bench) {
    let address = Address::unix(&bench.sandbox);
    let words = ["memory", "4M"];
    let mut server = Server::nbdkit(&address, words);
    let mut starter = Starter::new(&bench.sandbox);
    let export = bench.export(&address.uri(""));
    let file = open(export.file(), O_DIRECT);
    let nbd = || {
        let all = report(export.file())["nbd"].clone();
        ["connections", "lost_connections", "reconnects", "unflushed_bytes"]
            .map(|name| number(&all[name]))
    };
    let write = |at| file.write_all_at(&Aligned::of(&[7; 4096]), at).unwrap();
    assert_eq!(nbd(), [1, 0, 0, 0]);
    // What another test starts has the file open until its exec, and flushes it then.
    eventually("three blocks that are not durable", || {
        [0, 4096, 12288, 4096].into_iter().for_each(write);
        nbd()[3] == 3 * 4096
    });
    file.sync_all().unwrap();
    assert_eq!(nbd(), [1, 0, 0, 0]);
    eventually("one that is not durable", || {
        write(8192);
        nbd()[3] == 4096
    });
    server.kill();
    eventually("the loss", || nbd() == [0, 1, 0, 4096]);
    let _server = starter.nbdkit(&address, &words);
    // What was not durable is written again.
    eventually("its return", || nbd() == [1, 1, 1, 0]);
    drop(file);
    assert_eq!(fs::read(export.file()).unwrap()[8192..12288], [7; 4096]);
}
