//! vsock: a server of this machine, by the context identifier 1, where the kernel has that.

use std::fs;
use std::process::Command;

use libc::SIGTERM;
use libtest_mimic::Trial;

use crate::common::export::{Export, binary};
use crate::common::nbd::Server;
use crate::common::suite::trial;
use crate::common::{noise, program, succeed};
use crate::refusals::assert_refused;
use crate::tls::Certificates;
use crate::{SIZE, in_memory};

pub fn trials() -> Vec<Trial> {
    let needs = vec!["fuse", "nbd", "vsock", "nbdkit"];
    vec![
        trial("vsock::killed_server_comes_back".into(), needs.clone(), || {
            killed_server_comes_back("nbd", "", &[])
        }),
        trial(
            "vsock::killed_server_comes_back_inside_tls".into(),
            [&needs[..], &["openssl"]].concat(),
            inside_tls,
        ),
        trial("refused/vsock_of_nobody".into(), vec!["nbd"], nobody_is_there),
    ]
}

/// By `--list`, and by a file that is read and written before and after.
fn killed_server_comes_back(scheme: &str, query: &str, words: &[&str]) {
    let sandbox = in_memory();
    let disk = sandbox.join("disk.img");
    let mut expected = noise(1, SIZE);
    fs::write(&disk, &expected).unwrap();
    let port = 20_000 + std::process::id() % 10_000 + u32::from(scheme == "nbds");
    let pidfile = sandbox.join("nbdkit.pid");
    let start = || {
        let _ = fs::remove_file(&pidfile);
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--vsock", "--port", &port.to_string(), "--pidfile"]);
        command.arg(&pidfile).args(words).arg("file").arg(&disk);
        // It is written once it listens.
        Server::start_until(&mut command, || pidfile.exists())
    };
    let mut server = start();
    let uri = format!("{scheme}+vsock://1:{port}/{query}");
    assert!(succeed(&mut program(binary(), ["--list", &uri])).contains(&SIZE.to_string()));
    let mut export = Export::try_start(&uri, &sandbox.join("disk"), &[], |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log));
    for round in 2..5 {
        assert!(fs::read(export.file()).unwrap() == expected);
        expected = noise(round, SIZE);
        // Not truncated, and not open when the server is started.
        let written = fs::File::options().write(true).open(export.file());
        std::io::Write::write_all(&mut written.unwrap(), &expected).unwrap();
        server.kill();
        server = start();
    }
    assert!(fs::read(export.file()).unwrap() == expected);
    export.stop(SIGTERM).assert(0, &["the server is back"]);
    assert!(fs::read(&disk).unwrap() == expected);
}

fn inside_tls() {
    let certificates = Certificates::new("127.0.0.1");
    let server = certificates.folder("server", "ca", Some("server"));
    let client = certificates.folder("client", "ca", None);
    let query = format!("?tls-certificates={client}&tls-hostname=127.0.0.1");
    let words = ["--tls=require", &format!("--tls-certificates={server}")];
    killed_server_comes_back("nbds", &query, &words);
}

/// Refused, or without an answer, or without vsock: the address is named.
fn nobody_is_there() {
    let words = ["--connect-timeout=1", "nbd+vsock://1:3/disk"];
    assert_refused(&words, 3, &["nbd+vsock://1:3/disk", "cannot connect to vsock 1:3: "]);
}
