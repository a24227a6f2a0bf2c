//! NBD servers.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Signal, kill_process};

use super::sandbox::Sandbox;
use super::{eventually, program, succeed};

const PORT: u16 = 10809;

/// Where a server listens.
pub enum Address {
    Unix(PathBuf),
    /// An address of loopback that no other test has, so that the port can be the usual one.
    Tcp(String),
}

impl Address {
    pub fn unix(sandbox: &Sandbox) -> Address {
        Address::Unix(sandbox.join("nbd.socket"))
    }

    pub fn tcp() -> Address {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed) % 250 + 2;
        let [_, _, high, low] = std::process::id().to_be_bytes();
        Address::Tcp(format!("127.{number}.{high}.{low}"))
    }

    pub fn uri(&self, export: &str) -> String {
        match self {
            Address::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Address::Tcp(host) => format!("nbd://{host}/{export}"),
        }
    }

    fn answers(&self) -> bool {
        match self {
            Address::Unix(path) => UnixStream::connect(path).is_ok(),
            Address::Tcp(host) => TcpStream::connect((host.as_str(), PORT)).is_ok(),
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
    fn start(command: &mut Command, address: &Address) -> Server {
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = quiet.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut server = Server { pid: child.id(), child: Some(child) };
        eventually("an NBD server", || {
            assert!(server.is_running(), "{command:?}: it has ended");
            address.answers()
        });
        server
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
            Address::Tcp(host) => command.args(["--ip-addr", host, "--port", &PORT.to_string()]),
        };
        Server::start(command.arg("--foreground").args(words), address)
    }

    pub fn qemu_nbd(address: &Address, disk: &Path) -> Server {
        let mut command = Command::new("qemu-nbd");
        match address {
            Address::Unix(path) => command.arg("--socket").arg(path),
            Address::Tcp(host) => command.args(["--bind", host, "--port", &PORT.to_string()]),
        };
        let options = ["--format=raw", "--persistent", "--shared=0", "--discard=unmap"];
        Server::start(command.args(options).arg(disk), address)
    }

    /// Its export is named `disk`.
    pub fn nbd_server(sandbox: &Sandbox, address: &Address, disk: &Path) -> Server {
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
        std::fs::write(&config, format!("[generic]\nport = {PORT}\n{listen}{export}")).unwrap();
        let pidfile = sandbox.join("nbd-server.pid");
        // In the foreground it would serve one connection only.
        succeed(program("nbd-server", ["-C"]).arg(&config).arg("-p").arg(&pidfile));
        let mut pid = None;
        eventually("nbd-server's pidfile", || {
            pid = std::fs::read_to_string(&pidfile).ok().and_then(|text| text.trim().parse().ok());
            pid.is_some()
        });
        let server = Server { pid: pid.expect("it was there"), child: None };
        eventually("nbd-server", || address.answers());
        server
    }

    pub fn pid(&self) -> u32 {
        self.pid
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
