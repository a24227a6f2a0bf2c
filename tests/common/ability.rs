//! What this machine can do, found out once.
//!
//! A test that cannot run says why and counts as skipped. `DISKFUSE_REQUIRE` names abilities,
//! parted by commas (`all` is all of them but `vsock`), whose lack is a failure instead.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use super::export::{Export, Transport};
use super::sandbox::Sandbox;
use super::{is_root, program};

/// Switches FUSE over io_uring on and off.
pub const RING_SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// The name of an ability: `fuse`, `uring`, `mmap`, `zero-range`, `root`, `user`, `loop`, `direct`,
/// `nbd`, `netns`, `vsock`, `nbdkit-curl`, or a program's name.
pub type Ability = &'static str;

/// Why it is missing, if it is.
pub fn missing(ability: Ability) -> Option<String> {
    type Answers = HashMap<Ability, Arc<OnceLock<Option<String>>>>;
    static ANSWERS: OnceLock<Mutex<Answers>> = OnceLock::new();
    let cell = ANSWERS
        .get_or_init(Mutex::default)
        .lock()
        .expect("no panic while it is held")
        .entry(ability)
        .or_default()
        .clone();
    cell.get_or_init(|| find_out(ability).err()).clone()
}

/// Whether its lack is a failure.
pub fn is_required(ability: Ability) -> bool {
    // It is a module of its own, which the kernels of many virtual machines are built without.
    let in_all = ability != "vsock";
    std::env::var("DISKFUSE_REQUIRE")
        .is_ok_and(|list| list.split(',').any(|word| word == ability || in_all && word == "all"))
}

fn find_out(ability: Ability) -> Result<(), String> {
    let is_there =
        |path: &str| Path::new(path).exists().then_some(()).ok_or(format!("there is no {path}"));
    match ability {
        "fuse" => {
            is_there("/dev/fuse")?;
            probe(Transport::Legacy)
        }
        "uring" => {
            if !is_root() && std::fs::read_to_string(RING_SWITCH).is_ok_and(|v| v.trim() != "Y") {
                return Err(format!(
                    "FUSE over io_uring is off and only root may write {RING_SWITCH}"
                ));
            }
            is_there(RING_SWITCH)?;
            probe(Transport::Uring)
        }
        // Not tried: it must not be the program's own fault that it is missing.
        "mmap" => needs_linux((6, 6), "a shared mapping past the page cache"),
        "zero-range" => needs_linux((5, 14), "FALLOC_FL_ZERO_RANGE of a FUSE file"),
        "root" => is_root().then_some(()).ok_or("only root can do this".into()),
        "user" => {
            find_out("root")?;
            find_out("fusermount3")
        }
        "loop" => {
            find_out("root")?;
            is_there("/dev/loop-control")?;
            find_out("losetup")
        }
        "direct" => {
            use std::os::unix::fs::OpenOptionsExt;
            let sandbox = Sandbox::new();
            let mut options = std::fs::OpenOptions::new();
            options.write(true).create(true).custom_flags(libc::O_DIRECT);
            let opened = options.open(sandbox.join("x"));
            opened
                .map(drop)
                .map_err(|e| format!("no O_DIRECT in {}: {e}", sandbox.path().display()))
        }
        "nbd" => {
            let help = program(super::export::binary(), ["--help"]).output();
            let help = help.map_err(|e| e.to_string())?;
            let knows = String::from_utf8_lossy(&help.stdout).contains("nbd://");
            knows.then_some(()).ok_or("this diskfuse knows no nbd://".into())
        }
        "netns" => {
            find_out("root")?;
            let unshared = program("unshare", ["--net", "ip", "link"]).output();
            let unshared = unshared.map_err(|e| e.to_string())?;
            let why = String::from_utf8_lossy(&unshared.stderr).trim().to_owned();
            unshared.status.success().then_some(()).ok_or(why)
        }
        "vsock" => {
            // Only with the module vsock_loopback is CID 1 an address.
            let address = socket2::SockAddr::vsock(libc::VMADDR_CID_LOCAL, libc::VMADDR_PORT_ANY);
            let bound = socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM, None)
                .and_then(|socket| socket.bind(&address));
            bound.map_err(|e| format!("the kernel has no vsock_loopback: {e}"))
        }
        "nbdkit-curl" => {
            let dump = program("nbdkit", ["--dump-plugin", "curl"]).output();
            let dump = dump.map_err(|e| e.to_string())?;
            dump.status.success().then_some(()).ok_or("nbdkit has no plugin curl".into())
        }
        name => find_program(name).map(drop).ok_or(format!("{name} is not installed")),
    }
}

pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.exists())
}

/// Tries one read.
fn probe(transport: Transport) -> Result<(), String> {
    let sandbox = Sandbox::new();
    let mut export =
        Export::try_start("mem:1M", &sandbox.join("disk"), &[transport.option()], |_| ())
            .map_err(|ended| format!("diskfuse {}: {}", transport.option(), ended.log.trim()))?;
    let read = std::fs::read(export.file()).map_err(|e| e.to_string());
    let ended = export.stop(libc::SIGTERM);
    read?;
    match ended.served(transport).reads {
        0 => Err(format!("diskfuse {} served otherwise: {}", transport.option(), ended.log.trim())),
        _ => Ok(()),
    }
}

fn needs_linux(least: (u32, u32), what: &str) -> Result<(), String> {
    let release =
        std::fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|e| e.to_string())?;
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse().ok());
    let this = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = least;
    (this >= least).then_some(()).ok_or(format!("{what} needs Linux {major}.{minor}"))
}

/// A setting of the kernel, changed as long as this lives.
pub struct Setting {
    path: &'static str,
    before: Option<String>,
}

impl Setting {
    /// Changes it where that is needed and possible; where it is not possible, an ability tells.
    pub fn set(path: &'static str, value: &str) -> Setting {
        let before = std::fs::read_to_string(path).ok().filter(|before| before.trim() != value);
        let changed = before.is_some() && std::fs::write(path, value).is_ok();
        Setting { path, before: before.filter(|_| changed) }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(e) = std::fs::write(self.path, before)
        {
            eprintln!("{}: was not set back: {e}", self.path);
        }
    }
}
