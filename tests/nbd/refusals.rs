//! Remote disks that cannot be had, by exit status and message, and one that can only be read.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::{Command, Stdio};

use libtest_mimic::Trial;

use crate::common::ability::Ability;
use crate::common::export::binary;
use crate::common::nbd::{Address, Server};
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{assert_errno, eventually, fail, noise, program, succeed};
use crate::{Bench, SIZE, in_memory};

/// Runs the program on a mountpoint that is missing: it ends with this status, says each of `says`
/// in one or two lines, and leaves nothing behind.
#[track_caller]
pub fn assert_refused<S: AsRef<std::ffi::OsStr>>(words: &[S], status: i32, says: &[&str]) {
    let sandbox = in_memory();
    let output =
        program(binary(), words).arg(sandbox.join("disk")).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    for word in says {
        assert!(said.contains(word), "{word:?} is missing: {said}");
    }
    assert!(said.starts_with("diskfuse: ") && said.lines().count() <= 2, "{said}");
    assert!(said.chars().all(|c| c == '\n' || !c.is_control()), "{said:?}");
    assert!(output.stdout.is_empty());
    assert_eq!(sandbox.names(), [""; 0], "what it made is left");
}

/// A URI, and what has to live as long as it is used.
type Made = (String, Option<Box<dyn Send>>);

/// A source that is refused.
struct Refusal {
    name: &'static str,
    /// Makes it.
    make: fn(&Sandbox) -> Made,
    options: &'static [&'static str],
    needs: &'static [Ability],
    status: i32,
    says: &'static [&'static str],
}

const SOURCE: Refusal = Refusal {
    name: "",
    make: |_| (String::new(), None),
    options: &[],
    needs: &["nbd"],
    status: 3,
    says: &[],
};

fn nbdkit(sandbox: &Sandbox, words: &[&str]) -> (String, Option<Box<dyn Send>>) {
    let address = Address::unix(sandbox);
    (address.uri(""), Some(Box::new(Server::nbdkit(&address, words))))
}

/// Something on TCP that says this to whoever connects, and then waits for the test's end.
fn says(bytes: impl Into<Vec<u8>>) -> (String, Option<Box<dyn Send>>) {
    let bytes = bytes.into();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}/", listener.local_addr().unwrap());
    let streams = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = streams.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // The program may have gone.
            let _ = stream.write_all(&bytes);
            kept.lock().unwrap().push(stream);
        }
    });
    (uri, Some(Box::new(streams)))
}

const REFUSALS: &[Refusal] = &[
    Refusal {
        name: "nobody_listens",
        make: |_| (Address::tcp().uri("disk"), None),
        says: &["connection refused", ":10809", "NBD server"],
        ..SOURCE
    },
    Refusal {
        name: "no_such_socket",
        make: |sandbox| (Address::unix(sandbox).uri(""), None),
        says: &["nbd.socket", "no such socket"],
        ..SOURCE
    },
    Refusal {
        name: "no_such_host",
        make: |_| ("nbd://no-such-host.invalid/".into(), None),
        says: &["no-such-host.invalid"],
        ..SOURCE
    },
    Refusal {
        name: "silent_server",
        make: |_| says(""),
        options: &["--connect-timeout=1"],
        says: &["not answered", "within 1 s"],
        ..SOURCE
    },
    Refusal {
        name: "other_protocol",
        make: |_| says("220 mail.example ESMTP\r\n"),
        says: &["NBD"],
        ..SOURCE
    },
    Refusal {
        name: "no_such_export_of_qemu_nbd",
        make: |sandbox| {
            let (address, disk) = (Address::unix(sandbox), sandbox.join("disk.img"));
            fs::write(&disk, [0; 65_536]).unwrap();
            let Address::Unix(socket) = &address else { unreachable!() };
            let mut command = Command::new("qemu-nbd");
            command.args(["--persistent", "--format=raw", "--export-name=vm1", "--socket"]);
            let server = Server::start(command.arg(socket).arg(disk), &address);
            (address.uri("vm2"), Some(Box::new(server)))
        },
        needs: &["nbd", "qemu-nbd"],
        says: &["no export named 'vm2'", "it has 'vm1'"],
        ..SOURCE
    },
    Refusal {
        name: "no_such_export_of_nbd_server",
        make: |sandbox| {
            let (address, disk) = (Address::unix(sandbox), sandbox.join("disk.img"));
            fs::write(&disk, [0; 65_536]).unwrap();
            let server = Server::nbd_server(sandbox, &address, &disk);
            (address.uri("other"), Some(Box::new(server)))
        },
        needs: &["nbd", "nbd-server"],
        // By default it does not list what it has.
        says: &["no export named 'other'"],
        ..SOURCE
    },
    Refusal {
        name: "no_such_export_of_many",
        make: |sandbox| {
            let list = "list_exports=echo NAMES; echo a; echo b; echo c";
            let open = r#"open=[ "$3" = a ] || { echo ENOENT >&2; exit 1; }"#;
            let (_, server) = nbdkit(sandbox, &["eval", "get_size=echo 1M", list, open]);
            (Address::unix(sandbox).uri("z"), server)
        },
        needs: &["nbd", "nbdkit"],
        says: &["'z'", "'a', 'b', 'c'"],
        ..SOURCE
    },
    Refusal {
        name: "export_that_is_listed_and_not_opened",
        make: |sandbox| {
            nbdkit(sandbox, &["eval", "get_size=echo 1M", "open=echo ENOENT >&2; exit 1"])
        },
        needs: &["nbd", "nbdkit"],
        says: &["lists its export '' (the default one)", "log"],
        ..SOURCE
    },
    Refusal {
        name: "names_with_control_characters",
        make: |sandbox| {
            let open = "open=echo ENOENT >&2; exit 1";
            let (_, server) = nbdkit(sandbox, &["eval", "get_size=echo 1M", EVIL_LIST, open]);
            (Address::unix(sandbox).uri("z"), server)
        },
        needs: &["nbd", "nbdkit"],
        says: &[r"'\u{1b}[31mred\u{9b}2J\u{202e}'"],
        ..SOURCE
    },
    Refusal {
        name: "size_zero",
        make: |sandbox| nbdkit(sandbox, &["memory", "0"]),
        needs: &["nbd", "nbdkit"],
        says: &["size zero"],
        ..SOURCE
    },
    Refusal {
        name: "larger_than_any_file",
        make: |_| {
            // The old style: two magic numbers, the size, flags and zeroes.
            let magic = [*b"NBDMAGIC", 0x0000_4202_8186_1253_u64.to_be_bytes()];
            let size = (1_u64 << 63).to_be_bytes();
            says([&magic.concat()[..], &size, &[0, 0, 0, 1], &[0; 124]].concat())
        },
        says: &["9223372036854775808", "a file"],
        ..SOURCE
    },
    Refusal {
        name: "tail_out_of_reach",
        make: |sandbox| {
            let sizes = ["blocksize-minimum=4096", "blocksize-error-policy=error"];
            let filter = ["--filter=blocksize-policy", "memory", "1000000"];
            nbdkit(sandbox, &[&filter[..], &sizes].concat())
        },
        needs: &["nbd", "nbdkit"],
        says: &["1000000", "4096", "last 576 bytes"],
        ..SOURCE
    },
    Refusal {
        name: "first_read_fails",
        make: |sandbox| {
            let filter = ["--filter=error", "memory", "1M", "error-pread=EIO"];
            nbdkit(sandbox, &[&filter[..], &["error-pread-rate=100%"]].concat())
        },
        options: &["--run=true"],
        needs: &["fuse", "nbd", "nbdkit"],
        status: 1,
        says: &["cannot be read", "nput/output error"],
    },
    Refusal {
        name: "uri_with_an_unknown_key",
        make: |_| ("nbd://host/disk?nonsense=1".into(), None),
        status: 2,
        says: &["nonsense", "tls-certificates"],
        ..SOURCE
    },
    Refusal {
        name: "uri_without_socket",
        make: |_| ("nbd+unix:///disk".into(), None),
        status: 2,
        says: &["socket"],
        ..SOURCE
    },
];

/// Of the plugin eval: an export whose name does things to a terminal.
const EVIL_LIST: &str = r"list_exports=printf 'NAMES\n\033[31mred\302\2332J\342\200\256\n'";
const EVIL: &str = "\u{1b}[31mred\u{9b}2J\u{202e}";

/// They are shown, and a script gets the names as they are.
fn control_characters_are_listed() {
    let sandbox = in_memory();
    let description = r"export_description=printf 'two\tor\r\033]0;title\007'";
    let (uri, _server) = nbdkit(&sandbox, &["eval", "get_size=echo 1M", EVIL_LIST, description]);
    let list = |options: &[&str]| {
        let text = succeed(program(binary(), ["--list", &uri]).args(options));
        assert!(text.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'), "{text:?}");
        text
    };
    let text = list(&[]);
    assert!(text.contains(r"name: \u{1b}[31mred\u{9b}2J\u{202e}"), "{text}");
    assert!(text.contains(r"description: two\tor\r\u{1b}]0;title\u{7}"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&list(&["--json"])).unwrap();
    assert_eq!(json["exports"][0]["name"], EVIL);
}

/// A server without end: its listing is refused, in bounded memory.
fn endless_listing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}/", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        // Its flags, and then it is told of exports whatever it asks.
        std::io::Read::read_exact(&mut stream, &mut [0; 4]).unwrap();
        let mut options = 0;
        loop {
            let mut header = [0; 16];
            if std::io::Read::read_exact(&mut stream, &mut header).is_err() {
                return;
            }
            let option = &header[8..12];
            let reply = |kind: u32, data: &[u8]| {
                let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
                let length = (data.len() as u32).to_be_bytes();
                [&magic[..], option, &kind.to_be_bytes(), &length, data].concat()
            };
            options += 1;
            assert!(options < 10);
            if option != [0, 0, 0, 3] {
                stream.write_all(&reply(0x8000_0001, &[])).unwrap();
                continue;
            }
            let name = vec![b'x'; 60_000];
            let one = reply(2, &[&60_000_u32.to_be_bytes()[..], &name].concat());
            while stream.write_all(&one).is_ok() {}
            return;
        }
    });
    let list = format!("ulimit -v 262144; exec {} --list {uri}", binary());
    let output = program("bash", ["-c", &list]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("has no end"), "{said}");
    server.join().unwrap();
}

/// With so little memory it is refused before it can be opened, or all that is written to it is
/// there.
fn too_little_memory() {
    let sandbox = in_memory();
    let (pattern, disk) = (sandbox.join("pattern"), sandbox.join("image"));
    fs::write(&pattern, noise(3, SIZE)).unwrap();
    let address = Address::unix(&sandbox);
    fs::write(&disk, [0; 512]).unwrap();
    let _server = Server::nbdkit(&address, ["file", disk.to_str().unwrap()]);
    // In MiB, around what a connection, what is not flushed, one thread, several and rings need.
    let limits = (16..512).step_by(16);
    let served = limits.filter(|limit| {
        fs::File::create(&disk).unwrap().set_len(SIZE as u64).unwrap();
        let copy = format!(
            "exec dd if={} of=\"$DISKFUSE_FILE\" bs=1M conv=notrunc,fsync status=none",
            pattern.display()
        );
        let limited = format!("ulimit -v {}; exec \"$@\"", limit << 10);
        let mut shell = program("timeout", ["-k", "1", "30", "bash", "-c", &limited, "bash"]);
        let output = shell.args([binary(), "--run", &copy, &address.uri("")]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let bytes = fs::read(&disk).unwrap();
        if output.status.success() {
            assert!(bytes == fs::read(&pattern).unwrap(), "{limit} MiB: {said}");
        } else {
            let status = output.status.code();
            assert!(matches!(status, Some(1 | 3 | 4)), "{limit} MiB: {status:?} {said}");
            assert!(said.contains("a larger ulimit"), "{limit} MiB: {said}");
            assert!(bytes == vec![0; SIZE], "{limit} MiB: {said}");
        }
        output.status.success()
    });
    assert!(served.count() > 0);
}

pub fn trials() -> Vec<Trial> {
    let trials = REFUSALS.iter().map(|refusal| {
        trial(format!("refused/{}", refusal.name), refusal.needs.to_vec(), || {
            let sandbox = in_memory();
            let (uri, _guard) = (refusal.make)(&sandbox);
            let words = [refusal.options, &[&uri]].concat();
            assert_refused(&words, refusal.status, refusal.says);
        })
    });
    let endless = trial("refused/endless_listing".into(), vec!["nbd"], endless_listing);
    let evil = control_characters_are_listed;
    let evil = trial("refused/control_characters_are_listed".into(), vec!["nbd", "nbdkit"], evil);
    let memory =
        trial("refused/too_little_memory".into(), vec!["fuse", "nbdkit"], too_little_memory);
    trials.chain([endless, evil, memory]).collect()
}

pub fn read_only_server_makes_a_read_only_file(bench: &Bench) {
    let bytes = noise(1, SIZE);
    let disk = bench.disk(&bytes);
    let file = disk.to_str().unwrap();
    let (kit, qemu) = (bench.sandbox.join("kit"), bench.sandbox.join("qemu"));
    let mut qemu_nbd = Command::new("qemu-nbd");
    qemu_nbd.args(["--read-only", "--persistent", "--format=raw", "--socket"]).arg(&qemu).arg(file);
    let (kit, qemu) = (Address::Unix(kit), Address::Unix(qemu));
    let _servers =
        [Server::nbdkit(&kit, ["--read-only", "file", file]), Server::start(&mut qemu_nbd, &qemu)];
    for address in [kit, qemu] {
        let mut export = bench.try_export(&address.uri(""), &["-o", "rw"]).unwrap();
        assert!(export.log().contains("shown read-only, the server"), "{}", export.log());
        let mode = || fs::metadata(export.file()).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(), 0o400);
        fail(program("chmod", ["u+w"]).arg(export.file()));
        assert_eq!(mode(), 0o400);
        let refused = fs::File::options().write(true).open(export.file());
        let written = refused.and_then(|file| file.write_at(&[1], 0));
        assert_errno(written, if crate::common::is_root() { libc::EROFS } else { libc::EACCES });
        assert!(fs::read(export.file()).unwrap() == bytes);
        export.stop(libc::SIGTERM).assert(0, &[]);
    }
    assert!(fs::read(&disk).unwrap() == bytes);
}

pub fn server_of_a_read_only_file_hears_the_goodbye(bench: &Bench) {
    let (address, log) = (Address::unix(&bench.sandbox), bench.sandbox.join("log"));
    let Address::Unix(socket) = &address else { unreachable!() };
    let mut nbdkit = program("sh", ["-c", r#"exec nbdkit "$@" 2>"$0""#]);
    nbdkit.arg(&log).args(["--foreground", "--verbose", "--read-only", "--unix"]).arg(socket);
    let _server = Server::start(nbdkit.args(["memory", "1M"]), &address);
    let mut export = bench.export(&address.uri(""));
    fs::read(export.file()).unwrap();
    export.stop(libc::SIGTERM).assert(0, &[]);
    let mut said = String::new();
    eventually("the end of all connections", || {
        said = String::from_utf8_lossy(&fs::read(&log).unwrap()).into_owned();
        let count = |what| said.matches(what).count();
        count("memory: open readonly") > 0
            && count("memory: open readonly") == count("memory: close")
    });
    assert!(said.contains("client sent NBD_CMD_DISC"), "{said}");
    assert!(!said.contains("client closed input socket"), "{said}");
    assert!(!said.contains("memory: flush"), "{said}");
}
