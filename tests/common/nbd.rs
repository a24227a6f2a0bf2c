//! NBD servers.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Shutdown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use rustix::process::{Signal, kill_process};
use socket2::SockRef;

use super::sandbox::Sandbox;
use super::{eventually, program, succeed};

const PORT: u16 = 10809;

/// Where a server listens.
pub enum Address {
    Unix(PathBuf),
    /// An address of loopback that no other test has, so that the port can be the usual one.
    Tcp(Ipv4Addr),
}

impl Address {
    pub fn unix(sandbox: &Sandbox) -> Address {
        Address::Unix(sandbox.join("nbd.socket"))
    }

    pub fn tcp() -> Address {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed) % 250 + 2;
        let [_, _, high, low] = std::process::id().to_be_bytes();
        Address::Tcp(Ipv4Addr::new(127, number as u8, high, low))
    }

    pub fn uri(&self, export: &str) -> String {
        match self {
            Address::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Address::Tcp(host) => format!("nbd://{host}/{export}"),
        }
    }

    /// How many clients a server on a Unix socket has.
    pub fn clients(path: &Path) -> usize {
        const CONNECTED: &str = "03";
        let path = path.to_str().expect("UTF-8");
        let unix = std::fs::read_to_string("/proc/net/unix").expect("/proc is mounted");
        let is_one =
            |line: &&str| line.ends_with(path) && line.split_whitespace().nth(5) == Some(CONNECTED);
        unix.lines().filter(is_one).count()
    }

    /// Whether somebody listens there. Not tried by connecting: that would be a client more, and
    /// nbd-server may hang when one goes while the next one comes.
    fn is_served(&self) -> bool {
        const LISTENS: &str = "0A";
        let lines = |file: &str| std::fs::read_to_string(file).expect("/proc is mounted");
        match self {
            Address::Unix(path) => {
                let path = path.to_str().expect("UTF-8");
                let listens = |line: &str| line.split_whitespace().nth(3) == Some("00010000");
                let unix = lines("/proc/net/unix");
                unix.lines().any(|line| line.ends_with(path) && listens(line))
            }
            Address::Tcp(host) => {
                let address = u32::from_ne_bytes(host.octets());
                let local = format!("{address:08X}:{PORT:04X}");
                lines("/proc/net/tcp").lines().any(|line| {
                    let fields: Vec<&str> = line.split_whitespace().collect();
                    fields.get(1) == Some(&local.as_str()) && fields.get(3) == Some(&LISTENS)
                })
            }
        }
    }
}

/// A server that is ready; ended when dropped.
pub struct Server {
    pid: u32,
    /// Unless it has gone to the background
    child: Option<Child>,
}

impl Server {
    pub fn start(command: &mut Command, address: &Address) -> Server {
        Server::start_until(command, || address.is_served())
    }

    /// With a check of the caller's own for whether it is ready.
    pub fn start_until(command: &mut Command, mut is_ready: impl FnMut() -> bool) -> Server {
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = quiet.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut server = Server { pid: child.id(), child: Some(child) };
        eventually("an NBD server", || {
            assert!(server.is_running(), "{command:?}: it has ended");
            is_ready()
        });
        server
    }

    pub fn kill(&mut self) {
        self.end_by(Signal::KILL);
    }

    pub fn end_by(&mut self, signal: Signal) {
        kill_process(super::export::pid(self.pid), signal).expect("it runs");
        eventually("the end of a server", || !self.is_running());
    }

    fn is_running(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => Path::new("/proc").join(self.pid.to_string()).exists(),
        }
    }

    /// `words`: filters, then a plugin and its parameters.
    pub fn nbdkit<S: AsRef<std::ffi::OsStr>>(
        address: &Address,
        words: impl IntoIterator<Item = S>,
    ) -> Server {
        let mut command = Command::new("nbdkit");
        match address {
            Address::Unix(path) => command.arg("--unix").arg(path),
            Address::Tcp(host) => {
                command.args(["--ip-addr", &host.to_string(), "--port", &PORT.to_string()])
            }
        };
        Server::start(command.arg("--foreground").args(words), address)
    }

    pub fn qemu_nbd(address: &Address, disk: &Path) -> Server {
        let mut command = Command::new("qemu-nbd");
        match address {
            Address::Unix(path) => command.arg("--socket").arg(path),
            Address::Tcp(host) => {
                command.args(["--bind", &host.to_string(), "--port", &PORT.to_string()])
            }
        };
        let options = ["--format=raw", "--persistent", "--shared=0", "--discard=unmap"];
        Server::start(command.args(options).arg(disk), address)
    }

    /// Its export is named `disk`, and not listed.
    pub fn nbd_server(sandbox: &Sandbox, address: &Address, disk: &Path) -> Server {
        Server::nbd_server_with("", sandbox, address, disk)
    }

    /// The same, with more lines of its configuration.
    pub fn nbd_server_with(
        more: &str,
        sandbox: &Sandbox,
        address: &Address,
        disk: &Path,
    ) -> Server {
        let listen = match address {
            // It listens on TCP as well.
            Address::Unix(path) => {
                let Address::Tcp(host) = Address::tcp() else { unreachable!() };
                format!("unixsock = {}\nlistenaddr = {host}\n", path.display())
            }
            Address::Tcp(host) => format!("listenaddr = {host}\n"),
        };
        let config = sandbox.join("nbd-server.conf");
        let export = format!("[disk]\nexportname = {}\nflush = true\nfua = true\n", disk.display());
        let generic = format!("[generic]\nport = {PORT}\n{more}{listen}");
        std::fs::write(&config, format!("{generic}{export}")).unwrap();
        let pidfile = sandbox.join("nbd-server.pid");
        // In the foreground it would serve one connection only.
        succeed(program("nbd-server", ["-C"]).arg(&config).arg("-p").arg(&pidfile));
        let mut pid = None;
        eventually("nbd-server's pidfile", || {
            pid = std::fs::read_to_string(&pidfile).ok().and_then(|text| text.trim().parse().ok());
            pid.is_some()
        });
        let server = Server { pid: pid.expect("it was there"), child: None };
        eventually("nbd-server", || address.is_served());
        server
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Stops it until what is returned is dropped: it takes no notice of anything, and is still
    /// there.
    pub fn pause(&self) -> Paused {
        let pid = super::export::pid(self.pid);
        kill_process(pid, Signal::STOP).expect("it runs");
        Paused(pid)
    }
}

/// Starts nbdkit while this process has files of it open. A child of this process would inherit
/// them, and its close at the start of the program would wait for the very server that is to be
/// started.
pub struct Starter {
    shell: Child,
    pidfile: PathBuf,
}

impl Starter {
    /// Before any such file is open.
    pub fn new(sandbox: &Sandbox) -> Starter {
        let mut shell = Command::new("sh");
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let pidfile = sandbox.join("nbdkit.pid");
        Starter { shell: shell.spawn().expect("there is a shell"), pidfile }
    }

    /// As [`Server::nbdkit`]; nobody is served there.
    pub fn nbdkit(&mut self, address: &Address, words: &[&str]) -> Server {
        let to = match address {
            Address::Unix(path) => {
                let _ = std::fs::remove_file(path);
                format!("--unix {}", path.display())
            }
            Address::Tcp(host) => format!("--ip-addr {host} --port {PORT}"),
        };
        let _ = std::fs::remove_file(&self.pidfile);
        let command =
            format!("nbdkit --pidfile {} {to} {}\n", self.pidfile.display(), words.join(" "));
        let stdin = self.shell.stdin.as_mut().expect("it is piped");
        io::Write::write_all(stdin, command.as_bytes()).expect("the shell is there");
        let mut pid = None;
        eventually("nbdkit's pidfile", || {
            let text = std::fs::read_to_string(&self.pidfile).unwrap_or_default();
            pid = text.trim().parse().ok();
            pid.is_some()
        });
        let server = Server { pid: pid.expect("it was there"), child: None };
        eventually("nbdkit", || address.is_served());
        server
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

/// A process that is stopped as long as this lives.
pub struct Paused(pub rustix::process::Pid);

impl Drop for Paused {
    fn drop(&mut self) {
        // It may have been killed.
        let _ = kill_process(self.0, Signal::CONT);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // nbd-server passes it on to the processes of its connections. It may have ended.
        for signal in [Signal::TERM, Signal::KILL] {
            let _ = kill_process(super::export::pid(self.pid), signal);
            if super::within(super::SOON / 4, || !self.is_running()) {
                return;
            }
        }
        eprintln!("process {}: left behind, cannot be killed", self.pid);
    }
}

/// The server of the crate `nbd` on a Unix socket, in threads of this process; ended when dropped.
pub struct CrateServer {
    listener: Arc<UnixListener>,
    thread: Option<JoinHandle<()>>,
}

impl CrateServer {
    pub fn start(socket: &Path, disk: &Path) -> CrateServer {
        let listener = Arc::new(UnixListener::bind(socket).expect("the socket is new"));
        let (shared, disk) = (listener.clone(), disk.to_owned());
        let thread = std::thread::spawn(move || accept(&shared, &disk));
        CrateServer { listener, thread: Some(thread) }
    }
}

impl Drop for CrateServer {
    fn drop(&mut self) {
        SockRef::from(&*self.listener).shutdown(Shutdown::Both).expect("it listens");
        // A panic in there has been printed, and has cost the test a connection.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Serves each connection on a thread of its own, until the listener is shut down.
fn accept(listener: &UnixListener, disk: &Path) {
    // Weak: a client is to see at once that its connection has ended.
    let mut connections: Vec<Weak<UnixStream>> = Vec::new();
    std::thread::scope(|scope| {
        for stream in listener.incoming().map_while(Result::ok).map(Arc::new) {
            connections.push(Arc::downgrade(&stream));
            // It ends with an error when the client just hangs up.
            scope.spawn(move || serve(&stream, disk));
        }
        for stream in connections.iter().filter_map(Weak::upgrade) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    });
}

/// The disk is the export, whatever its name. The flush of a [`File`] does nothing: tests look at
/// the disk through the page cache.
fn serve(stream: &UnixStream, disk: &Path) -> io::Result<()> {
    // Of its own for each connection: a position is kept in it.
    let file = File::options().read(true).write(true).open(disk)?;
    let size = file.metadata()?.len();
    let export = ::nbd::Export::<()> { size, send_flush: true, ..Default::default() };
    ::nbd::server::handshake(stream, |_| Ok(export))?;
    ::nbd::server::transmission(stream, file)
}
