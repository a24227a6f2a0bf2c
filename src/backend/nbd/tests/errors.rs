//! What a user reads when an export cannot be reached, and what `--list` and `--info` are made of.

use std::io::Write;
use std::net::TcpListener;
use std::time::Duration;

use super::super::info::{info, list};
use super::super::{BlockSizes, Error, NbdBackend, Options, Uri};
use super::servers::{
    crate_server, nbd_server, nbdkit, nbdkit_tcp, oldstyle_server, qemu_nbd, telling_server,
};
use super::{connect, options};
use crate::backend::Backend;

fn error(uri: &str) -> Error {
    let uri: Uri = uri.parse().unwrap();
    match NbdBackend::connect(&uri, &options()) {
        Ok(_) => panic!("{uri}: it connects"),
        Err(error) => error,
    }
}

#[track_caller]
fn assert_says(uri: &str, parts: &[&str]) {
    let error = error(uri).to_string();
    for part in parts {
        assert!(error.contains(part), "'{part}' is missing: {error}");
    }
}

#[test]
fn nobody_listens() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    assert_says(&format!("nbd://127.0.0.1:{port}/"), &["connection refused", "NBD server"]);
    assert_says("nbd+unix:///?socket=/nonexistent", &["/nonexistent", "no such"]);
    assert_says("nbd://no-such-host.invalid/", &["no-such-host.invalid:10809"]);
}

#[test]
fn somebody_else_listens_or_says_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let greeter = std::thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        first.write_all(b"220 mail.example ESMTP\r\n").unwrap();
        let (second, _) = listener.accept().unwrap();
        std::thread::sleep(Duration::from_millis(800));
        drop(second);
    });
    let uri: Uri = format!("nbd://127.0.0.1:{port}/").parse().unwrap();
    let options = Options { connect_timeout: Duration::from_millis(300), ..options() };
    let error = NbdBackend::connect(&uri, &options).err().unwrap();
    assert!(error.to_string().contains("no NBD server"), "{error}");
    let error = NbdBackend::connect(&uri, &options).err().unwrap();
    assert!(
        error.to_string().contains("has not answered, or not to the end, within 0.3 s"),
        "{error}"
    );
    greeter.join().unwrap();
}

/// Each byte comes in time, and there is no end of them.
#[test]
fn a_server_that_dribbles_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        for byte in b"NBDMAGICIHAVEOPT\0\x03".iter().cycle() {
            if client.write_all(&[*byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let uri: Uri = format!("nbd://127.0.0.1:{port}/").parse().unwrap();
    let options = Options { connect_timeout: Duration::from_millis(300), ..options() };
    let error = NbdBackend::connect(&uri, &options).err().unwrap();
    assert!(error.to_string().contains("within 0.3 s"), "{error}");
}

#[test]
fn no_such_export() {
    if let Some(server) = qemu_nbd(1 << 20, &[]) {
        assert_says(&server.uri("other"), &["no export named 'other'", "it has 'disk'"]);
    }
    if let Some(server) = nbd_server(1 << 20) {
        assert_says(&server.uri("other"), &["no export named 'other'", "it has 'disk'"]);
    }
    let crates = crate_server(1 << 20).replace("/disk", "/other");
    assert_says(&crates, &["no export named 'other'"]);
    assert_says(&format!("{}other", oldstyle_server(1 << 20)), &["no export named 'other'"]);
}

#[test]
fn a_size_that_no_file_can_have() {
    let most = i64::MAX as u64;
    assert_eq!(connect(&telling_server(most)).size(), most);
    for size in [most + 1, u64::MAX] {
        assert_says(&telling_server(size), &[&size.to_string(), &most.to_string(), "a file"]);
    }
}

#[test]
fn sizes_that_cannot_be_served() {
    let Some(server) = nbdkit(&["memory", "0"]) else { return };
    assert_says(&server.uri(""), &["size zero"]);
    let Some(server) = nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "1000000",
        "blocksize-minimum=4096",
        "blocksize-error-policy=error",
    ]) else {
        return;
    };
    assert_says(&server.uri(""), &["1000000", "4096", "last 576 bytes"]);
}

#[test]
fn plain_servers_behind_nbds() {
    let Some(server) = nbdkit_tcp(&["--tls=off", "memory", "1M"]) else { return };
    let uri = server.uri("").replace("nbd://", "nbds://");
    assert_says(&uri, &["no TLS", "never falls back"]);
    let uri = crate_server(1 << 20).replace("nbd://", "nbds://");
    // The crate's server hangs up instead of answering.
    assert_says(&uri, &["closed the connection"]);
}

#[test]
fn info_tells_what_the_server_tells() {
    let Some(server) = nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "1M",
        "blocksize-minimum=512",
        "blocksize-preferred=8K",
        "blocksize-maximum=1M",
    ]) else {
        return;
    };
    let found = info(&server.uri("").parse().unwrap(), &options()).unwrap();
    assert_eq!(found.size, 1 << 20);
    let sizes = BlockSizes { minimum: 512, preferred: 8192, maximum: 1 << 20 };
    assert_eq!(found.block_sizes, Some(sizes));
    assert!(found.can_multi_conn && found.can_fua && found.can_write_zeroes && !found.read_only);
    assert!(found.has_base_allocation() && !found.tls && !found.older);
    assert_eq!(found.headers, "structured");
}

#[test]
fn info_of_qemu() {
    let Some(server) = qemu_nbd(1 << 20, &["-r", "--description=for people"]) else { return };
    let uri: Uri = server.uri("disk").parse().unwrap();
    let found = info(&uri, &options()).unwrap();
    assert!(found.read_only);
    assert_eq!(found.description.as_deref(), Some("for people"));
    assert_eq!(list(&uri, &options()).unwrap(), [found]);
}

#[test]
fn info_of_older_servers() {
    let uri: Uri = crate_server(1 << 20).parse().unwrap();
    let found = info(&uri, &options()).unwrap();
    assert!(found.older && found.size == 1 << 20 && found.headers == "simple");
}

#[test]
fn exports_are_listed() {
    let arguments = ["eval", "get_size=echo 1M", "list_exports=echo NAMES; echo a; echo b c"];
    let Some(server) = nbdkit(&arguments) else { return };
    let found = list(&server.uri("").parse().unwrap(), &options()).unwrap();
    let names: Vec<_> = found.iter().map(|info| (info.name.as_str(), info.size)).collect();
    assert_eq!(names, [("a", 1 << 20), ("b c", 1 << 20)]);
    if let Some(server) = nbd_server(1 << 20) {
        let found = list(&server.uri("").parse().unwrap(), &options()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].size), ("disk", 1 << 20));
    }
}
