//! Servers of the program's own: `[ COMMAND ]`, from their start to their end.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use libc::{EIO, O_DIRECT, SIGTERM};
use rustix::process::{Signal, kill_process, kill_process_group};

use crate::common::export::{Ended, Export, Running, binary, pid};
use crate::common::nbd::{Address, Server};
use crate::common::{Aligned, SOON, assert_errno, eventually, mounts, noise, program, succeed};
use crate::refusals::assert_refused;
use crate::{Bench, SIZE, open};

/// Exports what `[ words ]` serves. The operands are the command and the file, whatever a test's
/// export has.
fn export(bench: &Bench, words: &[&str], options: &[&str]) -> Export {
    try_export(bench, words, options).unwrap_or_else(|ended| panic!("{}", ended.log))
}

fn try_export(bench: &Bench, words: &[&str], options: &[&str]) -> Result<Export, Ended> {
    let options = [&[bench.transport.option()], options, &["["], words].concat();
    // The bracket that ends it is the source, for the test's export.
    Export::try_start("]", &bench.sandbox.join("disk"), &options, |command| {
        command.current_dir(bench.sandbox.path()).process_group(0);
    })
    .map(|export| export.only_by(bench.transport))
}

/// The one process that it has started.
fn server_of(export: &Export) -> u32 {
    let pid = export.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.trim().parse().unwrap_or_else(|_| panic!("one server, not {children:?}"))
}

fn is_alive(process: u32) -> bool {
    fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.trim().starts_with('Z')))
}

/// An image of these bytes, in the folder.
fn convert(bench: &Bench, format: &str, bytes: &[u8]) -> PathBuf {
    let raw = bench.disk(bytes);
    let path = bench.sandbox.join(&format!("vm.{format}"));
    let options = ["convert", "-f", "raw", "-O", format];
    succeed(program("qemu-img", options).args([&raw, &path]));
    path
}

fn content(bench: &Bench, format: &str, path: &Path) -> Vec<u8> {
    let raw = bench.sandbox.join("content");
    let options = ["convert", "-f", format, "-O", "raw"];
    succeed(program("qemu-img", options).args([path, &raw]));
    fs::read(raw).unwrap()
}

pub fn images_show_their_content(bench: &Bench) {
    for format in ["qcow2", "vmdk"] {
        let mut bytes = noise(1, SIZE);
        let image = convert(bench, format, &bytes);
        // As in the man page.
        let name = image.file_name().unwrap().to_str().unwrap();
        let mut export = export(bench, &["qemu-nbd", "-f", format, name], &[]);
        let server = server_of(&export);
        assert!(fs::read(export.file()).unwrap() == bytes, "{format}");
        let file = open(export.file(), 0);
        file.write_all_at(b"written", 77_777).unwrap();
        bytes[77_777..][..7].copy_from_slice(b"written");
        drop(file);
        export.stop(SIGTERM).assert(0, &[]);
        assert!(!is_alive(server), "{format}");
        assert!(content(bench, format, &image) == bytes, "{format}");
        if format == "qcow2" {
            let said = succeed(program("qemu-img", ["check", "-q"]).arg(&image));
            assert_eq!(said, "");
        }
        fs::remove_file(bench.sandbox.join("disk.img")).unwrap();
    }
}

pub fn read_only_image_is_served_read_only(bench: &Bench) {
    convert(bench, "qcow2", &noise(2, SIZE));
    let server = ["qemu-nbd", "-r", "-f", "qcow2", "vm.qcow2"];
    for (server, options) in [(&server[..], &[][..]), (&["nbdkit", "memory", "1M"], &["-r"])] {
        let export = export(bench, server, options);
        let mode = fs::metadata(export.file()).unwrap().permissions();
        assert!(mode.readonly(), "{server:?}");
    }
}

/// `--partition` of what is inside, and `--info`.
pub fn partition_of_an_image_is_shown(bench: &Bench) {
    let raw = bench.disk(&vec![0; 2 * SIZE]);
    let mut sfdisk = program("sfdisk", ["--quiet", "--no-tell-kernel"]);
    let table = bench.sandbox.join("table");
    fs::write(&table, "label: gpt\nstart=1MiB, size=2MiB\nstart=4MiB, size=3MiB\n").unwrap();
    succeed(sfdisk.arg(&raw).stdin(fs::File::open(table).unwrap()));
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    let image = convert(bench, "qcow2", &bytes);
    let server = ["qemu-nbd", "-f", "qcow2", "vm.qcow2"];
    let info = [&["--info", "["], &server[..], &["]"]].concat();
    let said = succeed(program(binary(), info).current_dir(bench.sandbox.path()));
    assert!(said.starts_with("source: [ qemu-nbd -f qcow2 vm.qcow2 ]\nkind: nbd\n"), "{said}");
    assert!(said.contains("number: 2\n    offset: 4194304\n    size: 3145728\n"), "{said}");
    let mut export = export(bench, &server, &["--partition=2"]);
    let data = noise(3, 3 << 20);
    open(export.file(), 0).write_all_at(&data, 0).unwrap();
    export.stop(SIGTERM).assert(0, &[]);
    let mut expected = bytes;
    expected[4 << 20..7 << 20].copy_from_slice(&data);
    assert!(content(bench, "qcow2", &image) == expected);
}

/// A web server in Python, which knows ranges; ended when dropped.
struct Web(Child, String);

impl Web {
    fn start(folder: &Path) -> Web {
        const SCRIPT: &str = r#"
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_HEAD(self):
        self.answer(False)
    def do_GET(self):
        self.answer(True)
    def answer(self, body):
        try:
            data = open(os.path.basename(self.path), "rb").read()
        except OSError:
            self.send_error(404)
            return
        status, wanted = 200, self.headers.get("Range")
        size = len(data)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            first, last = int(first), int(last)
            data, status = data[first:last + 1], 206
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if body:
            self.wfile.write(data)
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_port, flush=True)
server.serve_forever()
"#;
        let mut python = Command::new("python3");
        python.args(["-c", SCRIPT]).current_dir(folder);
        let mut child = python.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut port = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut port).unwrap();
        Web(child, format!("http://127.0.0.1:{}", port.trim()))
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn image_on_a_web_server_is_shown(bench: &Bench) {
    let bytes = noise(4, SIZE);
    bench.disk(&bytes);
    let web = Web::start(bench.sandbox.path());
    let url = format!("url={}/disk.img", web.1);
    let mut export = export(bench, &["nbdkit", "-r", "curl", &url], &[]);
    assert!(fs::read(export.file()).unwrap() == bytes);
    let mut buf = Aligned::new(4096);
    let direct = fs::File::open(export.file()).unwrap();
    direct.read_exact_at(&mut buf, 12_288).unwrap();
    assert!(buf[..] == bytes[12_288..][..4096]);
    drop(direct);
    export.stop(SIGTERM).assert(0, &[]);
    // A page that is not there: the server says why, and we that it has.
    let missing = format!("url={}/missing.img", web.1);
    let ended = try_export(bench, &["nbdkit", "-r", "curl", &missing], &[]).err().expect("a 404");
    ended.assert(3, &["404", "nbdkit: "]);
}

pub fn compressed_image_is_shown(bench: &Bench) {
    let bytes = noise(5, SIZE);
    bench.disk(&bytes);
    succeed(program("xz", ["disk.img"]).current_dir(bench.sandbox.path()));
    let server = ["nbdkit", "-r", "--filter=xz", "file", "disk.img.xz"];
    let export = export(bench, &server, &[]);
    assert!(fs::read(export.file()).unwrap() == bytes);
}

/// What the message about pre-shared keys names, works.
pub fn server_with_keys_is_reached_by_nbdkit(bench: &Bench) {
    const COMMAND: &str = "nbdkit nbd hostname=HOST tls=require tls-psk=FILE tls-username=USER";
    let disk = bench.disk(&noise(7, SIZE));
    let keys = bench.sandbox.join("keys.psk");
    fs::write(&keys, format!("alice:{}\n", "5a".repeat(32))).unwrap();
    let keys = keys.to_str().unwrap();
    let address = Address::tcp();
    let Address::Tcp(host) = &address else { unreachable!() };
    let tls = ["--tls=require", &format!("--tls-psk={keys}"), "file", disk.to_str().unwrap()];
    let _server = Server::nbdkit(&address, tls);
    let uri = format!("nbds://alice@{host}/?tls-psk-file={keys}");
    assert_refused(&[&uri], 2, &["certificates", &format!("[ {COMMAND} ]")]);
    let command = COMMAND.replace("HOST", &host.to_string());
    let command = command.replace("FILE", keys).replace("USER", "alice");
    let mut export = export(bench, &command.split(' ').collect::<Vec<_>>(), &[]);
    assert!(fs::read(export.file()).unwrap() == noise(7, SIZE));
    export.stop(SIGTERM).assert(0, &[]);
}

/// What it says comes first, then that it has ended; and nothing is left.
pub fn server_that_cannot_start_says_why(bench: &Bench) {
    bench.disk(&noise(6, SIZE));
    let failures: [(&[&str], &[&str]); 5] = [
        (
            &["qemu-nbd", "-f", "qcow2", "disk.img"],
            &["not in qcow2 format", "qcow2 disk.img ]: the server has ended", "exit status: 1"],
        ),
        (&["nbdkit", "file", "missing"], &["missing", "No such file", "exit status: 1"]),
        (&["no-such-server"], &["no-such-server: cannot be started: No such file", "127"]),
        (&["sh", "-c", "echo said; echo more >&2; exit 7"], &["sh: said", "sh: more", "status: 7"]),
        (&["true"], &["[ true ]: the server has ended before it served (exit status: 0)"]),
    ];
    for (server, says) in failures {
        let ended = try_export(bench, server, &[]).err().expect("a failure");
        ended.assert(3, says);
    }
    let silent = try_export(bench, &["sleep", "77"], &["--connect-timeout=1"]);
    silent.err().expect("a failure").assert(3, &["has not answered", "LISTEN_FDS"]);
    assert_eq!(bench.sandbox.names(), ["disk.img"]);
}

/// A death is for good: requests fail at once, and the exit status tells of a loss, if there is
/// one.
pub fn server_that_dies_fails_all_requests(bench: &Bench) {
    let disk = bench.disk(&vec![0; SIZE]);
    for loses in [true, false] {
        let mut export = export(bench, &["nbdkit", "file", disk.to_str().unwrap()], &[]);
        let file = open(export.file(), O_DIRECT);
        let mut buf = Aligned::of(&noise(7, 4096));
        file.write_all_at(&buf, 0).unwrap();
        if !loses {
            file.sync_all().unwrap();
        }
        kill_process(pid(server_of(&export)), Signal::KILL).unwrap();
        eventually("the news", || export.log().contains("the server has ended (signal: 9"));
        let begun = std::time::Instant::now();
        assert_errno(file.read_at(&mut buf, 8192), EIO);
        assert_errno(file.write_at(&buf, 8192), EIO);
        assert!(begun.elapsed() < SOON / 4, "it waits for a server");
        assert!(export.is_mounted());
        drop(file);
        let told = export.log().matches("the server has ended").count();
        assert_eq!(told, 1, "{}", export.log());
        match loses {
            true => export.stop(SIGTERM).assert(1, &["may be lost"]),
            false => drop(export.stop(SIGTERM)),
        }
    }
}

pub fn server_that_dies_ends_the_export_if_that_is_wished(bench: &Bench) {
    let mut export = export(bench, &["nbdkit", "memory", "1M"], &["--on-loss=exit"]);
    kill_process(pid(server_of(&export)), Signal::KILL).unwrap();
    let ended = export.wait();
    ended.assert(1, &["[ nbdkit memory 1M ]: the server has ended (signal: 9", "--on-loss exit"]);
    assert_eq!(ended.warnings().len(), 1, "{}", ended.log);
}

/// A way to end an export, and its name.
type End = (&'static str, fn(&mut Export));

/// However the export ends, so does the server.
pub fn server_ends_with_the_export(bench: &Bench) {
    let ends: [End; 3] = [
        ("a signal", |export| drop(export.stop(SIGTERM))),
        ("the terminal's Ctrl-C", |export| {
            let file = open(export.file(), 0);
            file.write_all_at(b"last", 0).unwrap();
            kill_process_group(pid(export.pid()), Signal::INT).unwrap();
            eventually("the wait for the client", || export.log().contains("still in use"));
            // It is flushed now.
            drop(file);
            export.wait().assert(0, &[]);
        }),
        ("umount", |export| {
            mounts::unmount(&["umount"], export.file());
            export.wait().assert(0, &[]);
        }),
    ];
    let disk = bench.disk(&noise(8, SIZE));
    for (how, end) in ends {
        let mut export = export(bench, &["nbdkit", "file", disk.to_str().unwrap()], &[]);
        let server = server_of(&export);
        assert!(is_alive(server));
        end(&mut export);
        eventually(how, || !is_alive(server));
    }
    assert_eq!(fs::read(&disk).unwrap()[..4], *b"last");
}

/// The kernel sees to it. Where the first process of a container ends all orphans, they have to be
/// another's: those of a subreaper. nbdkit asks for it itself, so this is another server; it says
/// nothing, as SIGPIPE would end one that finds nobody to hear it.
pub fn server_ends_when_the_program_is_killed(bench: &Bench) {
    const SCRIPT: &str = r#"
import ctypes, os, signal, subprocess, sys, time
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
def until(done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)
*program, image, disk = sys.argv[1:]
serving = "exec qemu-nbd --persistent -f raw $0 2>/dev/null"
running = subprocess.Popen([*program, "[", "sh", "-c", serving, image, "]", disk])
until(lambda: os.path.exists(disk) and os.stat(disk).st_size == os.stat(image).st_size)
server = int(open(f"/proc/{running.pid}/task/{running.pid}/children").read())
running.kill()
running.wait()
try:
    until(lambda: os.waitpid(server, os.WNOHANG)[0] == server)
except AssertionError:
    os.kill(server, signal.SIGKILL)
    raise
"#;
    let (image, disk) = (bench.disk(&noise(10, SIZE)), bench.sandbox.join("disk"));
    let mut python = program("python3", ["-c", SCRIPT, binary(), bench.transport.option()]);
    let output = python.args([&image, &disk]).output().unwrap();
    mounts::take_away(&disk);
    assert!(output.status.success(), "{output:?}");
}

/// A signal does not wait for it.
pub fn start_of_a_silent_server_can_be_given_up(bench: &Bench) {
    let mut words = Command::new(binary());
    words.args([bench.transport.option(), "[", "sh", "-c", "echo here; exec sleep 77", "]"]);
    let mut running = Running::start(words.arg(bench.sandbox.join("disk")));
    eventually("the server's words", || running.log().contains("sh: here"));
    running.kill(SIGTERM);
    running.ended_within(SOON / 4).assert(3, &["stopped by signal 15 while it was opened"]);
    assert!(bench.sandbox.names().is_empty());
}

/// One that does not mind the SIGTERM; the time for it may be cut short.
pub fn server_that_does_not_end_is_killed(bench: &Bench) {
    let mut export = export(bench, &["nbdkit", "memory", "1M"], &[]);
    let server = server_of(&export);
    kill_process(pid(server), Signal::STOP).unwrap();
    export.kill(SIGTERM);
    eventually("the wait for it", || export.log().contains("waiting for the server to end"));
    assert!(is_alive(server) && !export.has_exited());
    export.kill(SIGTERM);
    export.ended_within(SOON / 4).assert(0, &["the server does not end: killed"]);
    assert!(!is_alive(server));
}

/// A descriptor of whoever starts it does not get in its way, nor do systemd's own words.
pub fn server_has_the_socket_where_it_looks_for_it(bench: &Bench) {
    let text = "exec 3</dev/null 4</dev/null; export LISTEN_FDS=2 LISTEN_PID=$$ LISTEN_FDNAMES=a:b\n\
                exec \"$@\" --run 'cmp -n 1M $DISKFUSE_FILE /dev/zero' [ nbdkit memory 1M ]";
    let mut bash = program("bash", ["-c", text, "bash", binary(), bench.transport.option()]);
    assert_eq!(succeed(&mut bash), "");
}

pub fn daemon_has_a_server(bench: &Bench) {
    convert(bench, "qcow2", &noise(9, SIZE));
    let text = "$diskfuse --daemonize --pidfile pid [ qemu-nbd -f qcow2 vm.qcow2 ] vm\n\
                cmp vm disk.img\n\
                cat /proc/$(cat pid)/task/$(cat pid)/children\n\
                printf x | dd of=vm bs=1 conv=notrunc status=none\n\
                umount vm";
    let mut bash = program("bash", ["-euc", text]);
    bash.env("diskfuse", format!("{} {}", binary(), bench.transport.option()));
    // It waits for the end of what the daemon has of its standard output, which is nothing.
    let said = succeed(bash.current_dir(bench.sandbox.path()));
    let server: u32 = said.trim().parse().unwrap_or_else(|_| panic!("one server: {said:?}"));
    eventually("the server's end", || !is_alive(server));
    eventually("the daemon's end", || !bench.sandbox.join("pid").exists());
    assert_eq!(content(bench, "qcow2", &bench.sandbox.join("vm.qcow2"))[0], b'x');
    // One that cannot be had, from the foreground.
    let text = "$diskfuse --daemonize [ qemu-nbd -f qcow2 disk.img ] vm";
    let mut bash = program("bash", ["-euc", text]);
    bash.env("diskfuse", format!("{} {}", binary(), bench.transport.option()));
    let output = bash.current_dir(bench.sandbox.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("not in qcow2 format"), "{said}");
}

/// The server has what its command names, and keeps nothing else of whoever has started the daemon.
pub fn daemon_gives_its_server_named_descriptors_only(bench: &Bench) {
    bench.disk(&noise(11, SIZE));
    let text = "( flock -n 8 && $diskfuse --daemonize --pidfile pid \
                    [ nbdkit -r file /dev/fd/9 ] vm ) 8> lock 9< disk.img\n\
                flock -n lock true || echo still locked\n\
                cmp vm disk.img\n\
                umount vm";
    let mut bash = program("bash", ["-euc", text]);
    bash.env("diskfuse", format!("{} {}", binary(), bench.transport.option()));
    assert_eq!(succeed(bash.current_dir(bench.sandbox.path())), "");
    eventually("the daemon's end", || !bench.sandbox.join("pid").exists());
}

/// The lines of the man page with a server in brackets are those that are tested here.
pub fn man_page_has_these_examples() {
    let manual =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/man/diskfuse.1")).unwrap();
    for line in [
        "diskfuse [ qemu-nbd -f qcow2 vm.qcow2 ] ./vm",
        "diskfuse [ qemu-nbd -f vmdk vm.vmdk ] ./vm",
        "diskfuse [ nbdkit -r curl url=https://example.org/disk.img ] ./disk",
        "diskfuse [ nbdkit -r --filter=xz file disk.img.xz ] ./disk",
    ] {
        assert!(manual.contains(line), "{line}");
    }
}
