//! Kinds of sources. The suite runs over all of them: a new one is a line in [`KINDS`].

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ability::Ability;
use super::nbd::{Address, CrateServer, Server};
use super::sandbox::Sandbox;
use super::{noise, program, succeed};

/// A kind of source, and what it can do.
pub struct Kind {
    pub name: &'static str,
    /// Makes one of these bytes.
    make: fn(&Sandbox, &[u8]) -> Image,
    /// Options of the program that belong to it
    pub options: &'static [&'static str],
    pub needs: &'static [Ability],
    /// Its bytes can be read without the export.
    pub visible: bool,
    /// It is a regular file on this machine.
    pub regular: bool,
    pub resizable: bool,
    /// Its holes are shown by SEEK_HOLE.
    pub shows_holes: bool,
    /// `stat` shows that it may have holes: less is allocated than its length.
    pub counts_blocks: bool,
    /// Holes can be made in it.
    pub punches: bool,
    /// What is zeroed by a hole needs no space.
    pub frees: bool,
    /// A second writable export of it is refused.
    pub locked: bool,
    /// The kernel owns the size, and keeps writes for a while.
    pub writeback: bool,
}

const FILE: Kind = Kind {
    name: "file",
    make: regular_file,
    options: &[],
    needs: &["fuse"],
    visible: true,
    regular: true,
    resizable: true,
    shows_holes: true,
    counts_blocks: true,
    punches: true,
    frees: true,
    locked: true,
    writeback: false,
};
const LOOP: Kind = Kind {
    name: "loop",
    make: loop_device,
    needs: &["fuse", "loop"],
    regular: false,
    resizable: false,
    shows_holes: false,
    counts_blocks: false,
    ..FILE
};
const NBD: Kind = Kind {
    regular: false,
    resizable: false,
    locked: false,
    needs: &["fuse", "nbd", "nbdkit"],
    ..FILE
};
const NBDKIT: Kind =
    Kind { name: "nbdkit-unix", make: |s, b| nbdkit(s, b, Address::unix(s), &[], &[]), ..NBD };
const QEMU_NBD: Kind = Kind { needs: &["fuse", "nbd", "qemu-nbd"], ..NBD };
const NBD_SERVER: Kind = Kind {
    needs: &["fuse", "nbd", "nbd-server"],
    shows_holes: false,
    counts_blocks: false,
    frees: false,
    ..NBD
};

pub const KINDS: &[Kind] = &[
    FILE,
    Kind { name: "file-direct", options: &["--direct"], needs: &["fuse", "direct"], ..FILE },
    Kind { name: "tmpfs", make: tmpfs_file, ..FILE },
    Kind { name: "mem", make: memory, visible: false, regular: false, locked: false, ..FILE },
    LOOP,
    Kind { name: "loop-direct", options: &["--direct"], ..LOOP },
    NBDKIT,
    Kind { name: "nbdkit-tcp", make: |s, b| nbdkit(s, b, Address::tcp(), &[], &[]), ..NBD },
    // The whole blocks of a disk with large ones
    Kind {
        name: "nbdkit-4k",
        make: |s, b| {
            let sizes = ["minimum=4096", "preferred=4096", "maximum=1M", "error-policy=error"];
            let sizes = sizes.map(|size| format!("blocksize-{size}"));
            nbdkit(s, b, Address::unix(s), &["--filter=blocksize-policy".into()], &sizes)
        },
        ..NBD
    },
    // All that a server need not have
    Kind {
        name: "nbdkit-plain",
        make: |s, b| {
            let without =
                ["filter=nozero", "filter=fua", "filter=noextents", "filter=multi-conn", "no-sr"];
            let without = without.map(|option| format!("--{option}"));
            nbdkit(s, b, Address::unix(s), &without, &["multi-conn-mode=disable".into()])
        },
        shows_holes: false,
        counts_blocks: false,
        punches: false,
        ..NBD
    },
    // Not even NBD_OPT_GO, and one request after the other
    Kind {
        name: "nbd-crate",
        make: nbd_crate,
        needs: &["fuse", "nbd"],
        shows_holes: false,
        counts_blocks: false,
        punches: false,
        ..NBD
    },
    // The page cache in each mode, before a disk that is here and one that is not
    Kind {
        name: "tmpfs-writethrough",
        options: &["--cache=writethrough"],
        make: tmpfs_file,
        ..FILE
    },
    Kind {
        name: "tmpfs-writeback",
        options: &["--cache=writeback", "--kernel-cache"],
        make: tmpfs_file,
        writeback: true,
        ..FILE
    },
    Kind { name: "nbdkit-none", options: &["--cache=none"], ..NBDKIT },
    Kind { name: "nbdkit-writeback", options: &["--cache=writeback"], writeback: true, ..NBDKIT },
    Kind { name: "qemu-nbd-unix", make: |s, b| qemu_nbd(s, b, Address::unix(s)), ..QEMU_NBD },
    Kind { name: "qemu-nbd-tcp", make: |s, b| qemu_nbd(s, b, Address::tcp()), ..QEMU_NBD },
    Kind { name: "nbd-server-unix", make: |s, b| nbd_server(s, b, Address::unix(s)), ..NBD_SERVER },
    Kind { name: "nbd-server-tcp", make: |s, b| nbd_server(s, b, Address::tcp()), ..NBD_SERVER },
];

impl Kind {
    /// The page cache is in front of it.
    pub fn is_cached(&self) -> bool {
        let is_remote = self.needs.contains(&"nbd");
        let asks_for = |mode: &str| self.options.contains(&mode);
        asks_for("--cache=writethrough")
            || asks_for("--cache=writeback")
            || is_remote && !asks_for("--cache=none")
    }

    /// What the page cache holds outlives the last close.
    pub fn keeps_cache(&self) -> bool {
        self.options.contains(&"--kernel-cache")
    }

    pub fn of(name: &str) -> &'static Kind {
        KINDS.iter().find(|kind| kind.name == name).expect("a kind's name")
    }

    /// A disk of these bytes; blocks of zeroes are holes. (`mem` has zeroes only, whatever the
    /// bytes.)
    pub fn image(&self, sandbox: &Sandbox, bytes: &[u8]) -> Image {
        (self.make)(sandbox, bytes)
    }
}

/// A disk to be exported.
pub struct Image {
    /// What diskfuse is told
    pub source: String,
    /// Where its bytes are, for all to read
    pub path: Option<PathBuf>,
    /// The file whose blocks are the disk's
    pub store: Option<PathBuf>,
    _guards: Vec<Box<dyn Send>>,
}

impl Image {
    fn new(source: impl Into<String>) -> Image {
        Image { source: source.into(), path: None, store: None, _guards: Vec::new() }
    }

    /// Keeps what the disk rests on.
    fn with(mut self, guard: impl Send + 'static) -> Image {
        self._guards.push(Box::new(guard));
        self
    }

    /// The path of a kind that is `visible`.
    pub fn path(&self) -> &Path {
        self.path.as_deref().expect("this kind is visible")
    }

    /// Its bytes, read without the export.
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).expect("a source is readable")
    }

    /// How many bytes it takes, as far as anyone can tell.
    pub fn allocated(&self) -> Option<u64> {
        let store = self.store.as_ref()?;
        // Delayed allocation hides what was written.
        std::fs::File::open(store).and_then(|f| f.sync_all()).expect("the store can be synced");
        Some(std::fs::metadata(store).expect("the store exists").blocks() * 512)
    }
}

/// The bytes as a file with holes.
pub fn write_sparse(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    const BLOCK: usize = 4096;
    let file =
        std::fs::File::create_new(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.set_len(bytes.len() as u64).expect("there is space");
    for (i, block) in bytes.chunks(BLOCK).enumerate() {
        if block.iter().any(|b| *b != 0) {
            file.write_all_at(block, (i * BLOCK) as u64).expect("there is space");
        }
    }
}

fn regular_file(sandbox: &Sandbox, bytes: &[u8]) -> Image {
    let path = sandbox.join("disk.img");
    write_sparse(&path, bytes);
    let text = path.to_str().expect("UTF-8").to_owned();
    Image { path: Some(path.clone()), store: Some(path), ..Image::new(text) }
}

fn tmpfs_file(_: &Sandbox, bytes: &[u8]) -> Image {
    let sandbox = Sandbox::below(Path::new("/dev/shm"));
    let image = regular_file(&sandbox, bytes);
    image.with(sandbox)
}

fn memory(_: &Sandbox, bytes: &[u8]) -> Image {
    Image::new(format!("mem:{}", bytes.len()))
}

fn loop_device(sandbox: &Sandbox, bytes: &[u8]) -> Image {
    let file = regular_file(sandbox, bytes);
    let device = LoopDevice::new(file.path(), &[]);
    let path = Some(PathBuf::from(&device.0));
    Image { path, store: file.store, ..Image::new(&device.0) }.with(device)
}

/// The file plugin behind `filters`, with the filters' `parameters`.
fn nbdkit(
    sandbox: &Sandbox,
    bytes: &[u8],
    address: Address,
    filters: &[String],
    parameters: &[String],
) -> Image {
    let file = regular_file(sandbox, bytes);
    let words = filters.iter().cloned().chain(["file".into(), file.source.clone()]);
    let server = Server::nbdkit(&address, words.chain(parameters.iter().cloned()));
    Image { source: address.uri(""), ..file }.with(server)
}

fn qemu_nbd(sandbox: &Sandbox, bytes: &[u8], address: Address) -> Image {
    let file = regular_file(sandbox, bytes);
    let server = Server::qemu_nbd(&address, file.path());
    Image { source: address.uri(""), ..file }.with(server)
}

fn nbd_server(sandbox: &Sandbox, bytes: &[u8], address: Address) -> Image {
    let file = regular_file(sandbox, bytes);
    let server = Server::nbd_server(sandbox, &address, file.path());
    Image { source: address.uri("disk"), ..file }.with(server)
}

fn nbd_crate(sandbox: &Sandbox, bytes: &[u8]) -> Image {
    let file = regular_file(sandbox, bytes);
    let socket = sandbox.join("nbd.socket");
    let server = CrateServer::start(&socket, file.path());
    Image { source: Address::Unix(socket).uri(""), ..file }.with(server)
}

/// A loop device, detached when dropped.
pub struct LoopDevice(pub String);

impl LoopDevice {
    pub fn new(file: &Path, options: &[&str]) -> LoopDevice {
        let mut losetup = program("losetup", ["--find", "--show"]);
        LoopDevice(succeed(losetup.args(options).arg(file)).trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let output = program("losetup", ["--detach", &self.0]).output();
        if !output.is_ok_and(|o| o.status.success()) {
            eprintln!("{}: left behind", self.0);
        }
    }
}

/// What most tests have on their disk: data, a hole, data, a hole.
pub fn patchy(len: usize) -> Vec<u8> {
    let mut bytes = noise(1, len);
    bytes[len / 4..len / 2].fill(0);
    bytes[len / 4 * 3..].fill(0);
    bytes
}
