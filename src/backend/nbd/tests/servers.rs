//! Servers for the tests: real programs on loopback or Unix sockets, ended with the test.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A directory of its own, removed at the end.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new() -> Directory {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("nbd-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().into()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server program; it is killed when this is dropped, also by a panic.
pub struct Server {
    child: Child,
    pub directory: Directory,
    /// Without the export's name.
    address: Address,
}

enum Address {
    Unix(String),
    Tcp(u16),
}

impl Server {
    /// The URI of one of its exports.
    pub fn uri(&self, export: &str) -> String {
        match &self.address {
            Address::Unix(path) => format!("nbd+unix:///{export}?socket={path}"),
            Address::Tcp(port) => format!("nbd://127.0.0.1:{port}/{export}"),
        }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn start(mut command: Command, directory: Directory, address: Address) -> Option<Server> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = match command.stdin(Stdio::null()).stdout(Stdio::null()).spawn() {
            Ok(child) => child,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                println!("skipped: {program} is not installed");
                return None;
            }
            Err(e) => panic!("{program}: {e}"),
        };
        let mut server = Server { child, directory, address };
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let reached = match &server.address {
                Address::Unix(path) => UnixStream::connect(path).is_ok(),
                Address::Tcp(port) => TcpStream::connect(("127.0.0.1", *port)).is_ok(),
            };
            if reached {
                return Some(server);
            }
            match server.child.try_wait().unwrap() {
                Some(status) if !status.success() => panic!("{program} ended: {status}"),
                _ => {}
            }
            assert!(Instant::now() < deadline, "{program} does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // nbdkit clears away what it keeps in /tmp, if it is asked to end.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        for _ in 0..200 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Of a server that went to the background.
        if let Ok(pid) = std::fs::read_to_string(self.directory.path("pid")) {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}

/// A port that nobody listens on. The system would give the same one to two tests at the same time.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = 10_000 + std::process::id() % 10_000;
    loop {
        let port = (first + NEXT.fetch_add(1, Ordering::Relaxed)) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// `nbdkit` on a Unix socket.
pub fn nbdkit(arguments: &[&str]) -> Option<Server> {
    let directory = Directory::new();
    let socket = directory.path("socket");
    let mut command = Command::new("nbdkit");
    command.args(["-f", "--exit-with-parent", "-U", &socket]).args(arguments);
    Server::start(command, directory, Address::Unix(socket))
}

/// `nbdkit` on TCP.
pub fn nbdkit_tcp(arguments: &[&str]) -> Option<Server> {
    let port = free_port();
    let mut command = Command::new("nbdkit");
    command.args(["-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", &port.to_string()]);
    command.args(arguments);
    Server::start(command, Directory::new(), Address::Tcp(port))
}

/// `qemu-nbd` with an empty image of `size` bytes as the export `disk`.
pub fn qemu_nbd(size: u64, arguments: &[&str]) -> Option<Server> {
    let directory = Directory::new();
    let (socket, image) = (directory.path("socket"), directory.path("image"));
    File::create(&image).unwrap().set_len(size).unwrap();
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-f", "raw", "-x", "disk", "-k", &socket]).args(arguments).arg(&image);
    Server::start(command, directory, Address::Unix(socket))
}

/// `nbd-server` with an empty image of `size` bytes as the export `disk`.
pub fn nbd_server(size: u64) -> Option<Server> {
    let (directory, port) = (Directory::new(), free_port());
    let (image, config) = (directory.path("image"), directory.path("config"));
    File::create(&image).unwrap().set_len(size).unwrap();
    let text = format!(
        "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nallowlist = true\n\
         [disk]\nexportname = {image}\nflush = true\nfua = true\n"
    );
    std::fs::write(&config, text).unwrap();
    // It goes to the background: with -d it would serve one connection and end.
    let pid_file = directory.path("pid");
    let mut command = Command::new("nbd-server");
    command.args(["-C", &config, "-p", &pid_file]).stderr(Stdio::null());
    Server::start(command, directory, Address::Tcp(port))
}

/// The server of the crate `nbd`: EXPORT_NAME, simple replies, one request at a time. It serves
/// connections until the process ends; the URI.
pub fn crate_server(size: u64) -> String {
    format!("nbd://127.0.0.1:{}/disk", crate_server_port(size, false))
}

/// As [`crate_server`], in the old style.
pub fn oldstyle_server(size: u64) -> String {
    format!("nbd://127.0.0.1:{}/", crate_server_port(size, true))
}

fn crate_server_port(size: u64, oldstyle: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let directory = Directory::new();
    let path = Path::new(&directory.path("image")).to_owned();
    let image =
        File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    image.set_len(size).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            stream.set_nodelay(true).unwrap();
            let image = FileData(image.try_clone().unwrap());
            std::thread::spawn(move || {
                let export = |name: &str| match name {
                    "" | "disk" => {
                        Ok(nbd::Export::<()> { size, send_flush: true, ..Default::default() })
                    }
                    _ => Err(std::io::ErrorKind::NotFound.into()),
                };
                let greeted = match oldstyle {
                    // HAS_FLAGS and SEND_FLUSH
                    true => nbd::server::oldstyle_header(&stream, size, 5),
                    false => nbd::server::handshake(&stream, export),
                };
                if greeted.is_ok() {
                    let _ = nbd::server::transmission(&stream, image);
                }
            });
        }
    });
    port
}

/// A server of the old style that tells this size to whoever connects, and no more than that; the
/// URI.
pub fn telling_server(size: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut streams = Vec::new();
        for stream in listener.incoming().map_while(Result::ok) {
            // The client may have gone.
            let _ = nbd::server::oldstyle_header(&stream, size, 5);
            streams.push(stream);
        }
    });
    format!("nbd://127.0.0.1:{port}/")
}

struct FileData(File);

impl Read for FileData {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for FileData {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.sync_data()
    }
}

impl Seek for FileData {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0.seek(to)
    }
}
