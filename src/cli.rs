//! The command line: words become one validated [`Config`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use argh::{ArgsInfo, EarlyExit, FromArgs};

use crate::backend::nbd::{self, Uri};
use crate::export::{Cache, Truncate};
use crate::partitions::Wanted;
use crate::{help, hints};

/// Show a disk as a file.
///
/// SOURCE is a remote disk (nbd://HOST[:PORT]/[EXPORT], nbd+unix:///[EXPORT]?socket=PATH, or nbds and nbds+unix
/// for TLS), the path of a disk image or a block device, mem:SIZE for a sparse disk in memory, or [ COMMAND... ], an
/// NBD server that is started for it. MOUNTPOINT is a regular file; it is created if it is missing, and removed again at
/// the end.
#[derive(FromArgs, ArgsInfo, Debug)]
// The text is for --help.
#[allow(rustdoc::broken_intra_doc_links)]
#[argh(
    name = "diskfuse",
    example = "Show another host's disk:\n  {command_name} nbd://storage/vm1 ./vm1.img\nServe an image while a command runs:\n  {command_name} --run 'e2fsck -f \"$DISKFUSE_FILE\"' disk.img",
    // Without the word "help", which may be a file.
    help_triggers("-h", "--help"),
    note = "Ends on SIGINT, SIGTERM and their like, or when MOUNTPOINT is unmounted. More in the man page: diskfuse(1).",
    error_code(0, "Clean"),
    error_code(1, "It failed while serving, or the last flush failed"),
    error_code(2, "Usage"),
    error_code(3, "The source cannot be opened or reached"),
    error_code(4, "It cannot be mounted")
)]
struct Words {
    /// never write to the source
    #[argh(switch, short = 'r')]
    read_only: bool,

    /// options as mount(8) has them: ro, rw, allow_other, uid=, gid=, and any long option of this
    /// program as name[=value]; may be repeated
    #[argh(option, short = 'o', arg_name = "opt[,opt...]")]
    options: Vec<String>,

    /// show this partition only, by its number in the disk's GPT or MBR
    #[argh(option, arg_name = "n")]
    partition: Option<String>,

    /// show only what is behind so many bytes (K, M, G and T may follow)
    #[argh(option, arg_name = "bytes")]
    offset: Option<String>,

    /// show only so many bytes, from --offset on
    #[argh(option, arg_name = "bytes")]
    size: Option<String>,

    /// FUSE over io_uring: auto, on or off (auto)
    #[argh(option, arg_name = "when")]
    io_uring: Option<String>,

    /// requests in flight for each serving thread (chosen from the number of CPUs)
    #[argh(option, arg_name = "n")]
    queue_depth: Option<String>,

    /// a write past the end makes the source longer, and a truncation is one
    #[argh(switch)]
    growable: bool,

    /// what a truncation does to a disk of fixed size: refuse it, or zero what it cuts off (refuse)
    #[argh(option, arg_name = "what")]
    truncate: Option<String>,

    /// the kernel's page cache in front of the file: auto, none, writethrough or writeback (auto: writethrough for a
    /// remote disk, none for a local one)
    #[argh(option, arg_name = "mode")]
    cache: Option<String>,

    /// keep the page cache from one open to the next: for a disk that nobody else writes
    #[argh(switch)]
    kernel_cache: bool,

    /// bytes to read ahead of a client that reads in order through the page cache; 0: none (4M)
    #[argh(option, arg_name = "size")]
    read_ahead: Option<String>,

    /// bypass the page cache of the source (O_DIRECT)
    #[argh(switch)]
    direct: bool,

    /// let other users use the file, as far as its mode allows: off, on, or auto if that is permitted (off)
    #[argh(option, arg_name = "when")]
    allow_other: Option<String>,

    /// go to the background once the file can be used; until then, and if it fails, as in the foreground
    #[argh(switch)]
    daemonize: bool,

    /// a file for the process id: written once the file can be used, locked, and removed at the end
    #[argh(option, arg_name = "path")]
    pidfile: Option<String>,

    /// serve while this shell command runs, and exit with its status; $DISKFUSE_FILE names the file, and
    /// MOUNTPOINT may be left out
    #[argh(option, arg_name = "cmd")]
    run: Option<String>,

    /// for nbds: a folder with ca-cert.pem, client-cert.pem and client-key.pem, where they are needed (the
    /// system's certificates)
    #[argh(option, arg_name = "dir")]
    tls_certificates: Option<String>,

    /// connections to an NBD server at most, opened when they are needed (chosen from the number of CPUs)
    #[argh(option, arg_name = "n")]
    connections: Option<String>,

    /// seconds until a server that does not answer counts as unreachable (10)
    #[argh(option, arg_name = "s")]
    connect_timeout: Option<String>,

    /// seconds for which an NBD server that cannot be reached is tried again at the start (0)
    #[argh(option, arg_name = "s")]
    open_timeout: Option<String>,

    /// seconds after which a connection on which a request has had no answer counts as lost; 0: never (0)
    #[argh(option, arg_name = "s")]
    timeout: Option<String>,

    /// seconds for which requests wait for an NBD server that is gone, and fail then; 0: they fail at once and for
    /// good (300)
    #[argh(option, arg_name = "s")]
    reconnect_timeout: Option<String>,

    /// bytes of acknowledged writes to keep until the NBD server has made them durable, and to write again if it
    /// crashes; 0: fsync tells of the loss (64M)
    #[argh(option, arg_name = "size")]
    unflushed: Option<String>,

    /// print what the NBD server at this URI exports, and end
    #[argh(option, arg_name = "uri")]
    list: Option<String>,

    /// print what SOURCE is, and end
    #[argh(option, arg_name = "source")]
    info: Option<String>,

    /// print what is exported here, and end
    #[argh(switch)]
    mounts: bool,

    /// print --info, --list or --mounts as JSON
    #[argh(switch)]
    json: bool,

    /// print the version
    #[argh(switch, short = 'V')]
    version: bool,

    /// SOURCE and MOUNTPOINT
    #[argh(positional, arg_name = "SOURCE MOUNTPOINT")]
    operands: Vec<String>,
}

/// Off, on, or on if it can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// If it can be had.
    Auto,
    /// Or fail.
    On,
    /// Never.
    Off,
}

/// What is asked of the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheWish {
    /// What fits the source.
    Auto,
    /// This.
    Is(Cache),
}

/// Where the bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An export of an NBD server.
    Nbd(Uri),
    /// A regular file or a block device.
    Path(PathBuf),
    /// So many bytes of memory.
    Memory(u64),
    /// An NBD server that is started for it: a program and its words.
    Server(Vec<String>),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Nbd(uri) => write!(f, "{uri}"),
            Source::Path(path) => write!(f, "{}", path.display()),
            Source::Memory(size) => write!(f, "mem:{size}"),
            Source::Server(command) => write!(f, "[ {} ]", command.join(" ")),
        }
    }
}

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the bytes are.
    pub source: Source,
    /// The source in the user's words: they are the mount's source, by which mount(8) knows again what is in fstab.
    pub words: String,
    /// The regular file that shows them; none, with `run`: one in a temporary folder.
    pub mountpoint: Option<PathBuf>,
    /// Never write to the source.
    pub read_only: bool,
    /// The part of the source that is shown; none: all of it.
    pub part: Option<Wanted>,
    /// FUSE over io_uring.
    pub io_uring: When,
    /// Requests in flight for each serving thread; none: chosen from the number of CPUs.
    pub queue_depth: Option<usize>,
    /// A write past the end makes the source longer, and a truncation sets its length.
    pub growable: bool,
    /// What a truncation does where the size is fixed.
    pub truncate: Truncate,
    /// The page cache in front of the file.
    pub cache: CacheWish,
    /// It is kept from one open to the next.
    pub kernel_cache: bool,
    /// How far to read ahead, in bytes.
    pub read_ahead: u64,
    /// Bypass the source's page cache.
    pub direct: bool,
    /// Other users may use the file.
    pub allow_other: When,
    /// The file's owner; none: who runs this.
    pub uid: Option<u32>,
    /// The file's group; none: that of who runs this.
    pub gid: Option<u32>,
    /// Go to the background once the file can be used.
    pub daemonize: bool,
    /// A file for the process id.
    pub pidfile: Option<PathBuf>,
    /// Serve while this shell command runs.
    pub run: Option<String>,
    /// How to reach a remote source.
    pub remote: nbd::Options,
}

impl Config {
    /// All paths that the user has named; any word of a server's command may be one.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let mut command: &[String] = &[];
        let (source, certificates) = match &self.source {
            Source::Path(path) => (Some(path), None),
            Source::Nbd(uri) => (uri.socket(), uri.tls_certificates.as_ref()),
            Source::Memory(_) => (None, None),
            Source::Server(words) => {
                command = words;
                (None, None)
            }
        };
        let others = [&self.mountpoint, &self.pidfile, &self.remote.tls_certificates];
        let others = others.into_iter().filter_map(Option::as_ref);
        let others = others.chain(source).chain(certificates).map(PathBuf::as_path);
        others.chain(command.iter().map(Path::new))
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Export a disk.
    Serve(Config),
    /// Say what a source is.
    Info {
        /// What is asked about.
        source: Source,
        /// The same in the user's words.
        words: String,
        /// As JSON.
        json: bool,
        /// How to reach it.
        remote: nbd::Options,
    },
    /// Say what a server has.
    List {
        /// The server.
        uri: Uri,
        /// As JSON.
        json: bool,
        /// How to reach it.
        remote: nbd::Options,
    },
    /// Say what is exported here.
    Mounts {
        /// As JSON.
        json: bool,
    },
    /// Make what is mounted already read-only, or writable again.
    Remount {
        /// Where it is.
        mountpoint: PathBuf,
        /// Or writable.
        read_only: bool,
    },
    /// Print this and end well.
    Print(String),
}

/// The command line makes no sense: what is wrong with it.
#[derive(Debug, PartialEq, Eq)]
pub struct UsageError(String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (try: diskfuse --help)", self.0)
    }
}

impl std::error::Error for UsageError {}

fn usage(why: impl Into<String>) -> UsageError {
    UsageError(why.into())
}

/// The options that take a value, for `name=value`.
const WITH_VALUE: [&str; 18] = [
    "partition",
    "offset",
    "size",
    "io-uring",
    "queue-depth",
    "truncate",
    "cache",
    "read-ahead",
    "connections",
    "allow-other",
    "pidfile",
    "run",
    "tls-certificates",
    "connect-timeout",
    "open-timeout",
    "timeout",
    "reconnect-timeout",
    "unflushed",
];
/// The options that take none.
const SWITCHES: [&str; 5] = ["read-only", "growable", "kernel-cache", "direct", "daemonize"];
/// Words of mount(8) and fstab(5) that mean nothing here, or are so anyway.
const MOUNT_WORDS: [&str; 35] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "silent",
    "loud",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "noexec",
    "async",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "nomand",
    "iversion",
    "noiversion",
    "symfollow",
    "nosymfollow",
    "default_permissions",
];
/// How far to read ahead unless the user says otherwise, and at most, in bytes: what keeps a wire of 400 MiB/s full at
/// 10 ms, and what one reader may cost in memory.
const READ_AHEADS: (u64, u64) = (4 << 20, 1 << 30);
/// Connections to a server.
const CONNECTIONS: std::ops::RangeInclusive<usize> = 1..=256;
/// What is kept of writes that are not durable, in bytes. Less has no room for a few long requests.
const UNFLUSHED: std::ops::RangeInclusive<usize> = 4 << 20..=64 << 30;
/// Requests in flight: the ring's own limit is far above, memory is not.
const QUEUE_DEPTHS: std::ops::RangeInclusive<usize> = 1..=4096;

/// Understands the words after the program's name.
pub fn parse(words: &[String]) -> Result<Command, UsageError> {
    parse_as(words, false)
}

/// The same; what `-o` has that nobody knows is left out if it `is_sloppy`, as mount(8) may ask its helpers to be.
pub fn parse_as(words: &[String], is_sloppy: bool) -> Result<Command, UsageError> {
    let (words, server) = take_server(words)?;
    // argh has no `--name=value`, which shell users expect.
    let mut split = Vec::new();
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        match word.split_once('=') {
            _ if word == "--" => {
                split.push(word.clone());
                split.extend(rest.by_ref().cloned());
            }
            Some((name, value)) if name.starts_with("--") => {
                // A value would be taken for an operand.
                if name.strip_prefix("--").is_some_and(takes_no_value) {
                    return Err(usage(format!("{name} takes no value")));
                }
                split.extend([name.to_owned(), value.to_owned()]);
            }
            _ => {
                split.push(word.clone());
                // Whatever it looks like, the next word is a value.
                if takes_next_word(word) {
                    split.extend(rest.next().cloned());
                }
            }
        }
    }
    let split: Vec<&str> = split.iter().map(String::as_str).collect();
    match Words::from_args(&["diskfuse"], &split) {
        Ok(words) => words.into_command(server, is_sloppy),
        Err(EarlyExit { status: Ok(()), .. }) => Ok(Command::Print(help_text())),
        Err(EarlyExit { output, .. }) => {
            Err(match output.strip_prefix("Unrecognized argument: ") {
                Some(word) => no_such_option(
                    word.trim(),
                    Words::get_args_info().flags.iter().map(|flag| flag.long),
                ),
                None => usage(output.trim().replace('\n', " ")),
            })
        }
    }
}

/// What --help prints.
fn help_text() -> String {
    const USAGE: &str = "\
Usage: diskfuse [OPTIONS] SOURCE MOUNTPOINT
       diskfuse [OPTIONS] [ COMMAND... ] MOUNTPOINT
       diskfuse [OPTIONS] --run CMD SOURCE [MOUNTPOINT]
       diskfuse --info SOURCE [--json]
       diskfuse --list URI [--json]
";
    help::text("diskfuse", USAGE, &Words::get_args_info())
}

fn no_such_option<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> UsageError {
    usage(match hints::nearest(word, known) {
        Some(name) => format!("{word}: no such option: did you mean {name}?"),
        None => format!("{word}: no such option"),
    })
}

/// Stands for the server's command between the other words: where it is an operand, no other word can be it.
const SERVER: &str = "[";

/// The words without the server's command, and that: it may hold options of its own. It stands where a SOURCE may, and
/// [`SERVER`] in its place.
fn take_server(words: &[String]) -> Result<(Vec<String>, Option<Vec<String>>), UsageError> {
    let mut others = Vec::new();
    let mut server = None;
    let mut options_end = false;
    let mut rest = words;
    while let Some((word, behind)) = rest.split_first() {
        rest = behind;
        others.push(word.clone());
        if word == SERVER {
            let end = rest.iter().position(|word| word == "]").ok_or_else(|| {
                usage("the ] that ends the server's command is missing (for a file of that name: ./[)")
            })?;
            let command = rest[..end].to_vec();
            rest = &rest[end + 1..];
            if command.first().is_none_or(String::is_empty) {
                return Err(usage(
                    "[ ]: the server's command is missing: [ qemu-nbd -f qcow2 FILE ]",
                ));
            }
            if server.replace(command).is_some() {
                return Err(usage("one SOURCE, not two servers"));
            }
        } else if word == "--" {
            options_end = true;
        } else if !options_end
            && takes_next_word(word)
            && !["--info", "--list"].contains(&word.as_str())
            && let Some((value, behind)) = rest.split_first()
        {
            others.push(value.clone());
            rest = behind;
        }
    }
    Ok((others, server))
}

/// What `-o` says that no other option does.
#[derive(Default)]
struct MountOptions {
    /// Unknown ones are left out.
    is_sloppy: bool,
    /// What is mounted already is to be read-only, or writable again.
    remount: bool,
    /// An option that the kernel shows of a mount, which mount(8) gives back to remount it.
    of_kernel: Option<String>,
    /// The last of ro and rw. It cannot take back --read-only.
    read_only: bool,
    uid: Option<u32>,
    gid: Option<u32>,
}

fn takes_no_value(name: &str) -> bool {
    SWITCHES.contains(&name) || ["json", "mounts", "help", "version"].contains(&name)
}

fn takes_next_word(word: &str) -> bool {
    let also = ["options", "list", "info"];
    let is_one = |name: &str| WITH_VALUE.contains(&name) || also.contains(&name);
    word == "-o" || word.strip_prefix("--").is_some_and(is_one)
}

impl Words {
    fn into_command(
        mut self,
        server: Option<Vec<String>>,
        is_sloppy: bool,
    ) -> Result<Command, UsageError> {
        if self.version {
            return Ok(Command::Print(
                concat!("diskfuse ", env!("CARGO_PKG_VERSION"), "\n").into(),
            ));
        }
        let mut mount = MountOptions { is_sloppy, ..MountOptions::default() };
        for list in std::mem::take(&mut self.options) {
            for option in split_options(&list)?.iter().filter(|o| !o.is_empty()) {
                self.mount_option(option, &mut mount)?;
            }
        }
        let part = parse_part(&self)?;
        let defaults = match server {
            // What it had not made durable is gone with it, and it is not started again.
            Some(_) => nbd::Options {
                reconnect_timeout: Duration::ZERO,
                unflushed: 0,
                ..nbd::Options::default()
            },
            None => nbd::Options::default(),
        };
        if server.is_some()
            && let Some((name, _)) =
                [("--reconnect-timeout", &self.reconnect_timeout), ("--unflushed", &self.unflushed)]
                    .into_iter()
                    .find(|(_, value)| value.is_some())
        {
            return Err(usage(format!(
                "{name} goes with servers that come back; the one in [ ] is not started again"
            )));
        }
        let remote = nbd::Options {
            tls_certificates: self.tls_certificates.map(PathBuf::from),
            connect_timeout: parse_seconds("connect-timeout", self.connect_timeout.as_deref(), 1)?
                .unwrap_or(defaults.connect_timeout),
            open_timeout: parse_seconds("open-timeout", self.open_timeout.as_deref(), 0)?
                .unwrap_or(defaults.open_timeout),
            timeout: parse_seconds("timeout", self.timeout.as_deref(), 0)?
                .filter(|timeout| !timeout.is_zero()),
            reconnect_timeout: parse_seconds(
                "reconnect-timeout",
                self.reconnect_timeout.as_deref(),
                0,
            )?
            .unwrap_or(defaults.reconnect_timeout),
            unflushed: match self.unflushed.as_deref() {
                Some(value) => parse_unflushed(value)?,
                None => defaults.unflushed,
            },
            connections: self.connections.as_deref().map(parse_connections).transpose()?,
        };
        let json = self.json;
        if self.mounts {
            return match (&self.info, &self.list, self.operands.first()) {
                (None, None, None) => Ok(Command::Mounts { json }),
                (_, _, Some(word)) => Err(usage(format!("--mounts takes no operand {word}"))),
                _ => Err(usage("--mounts, --info and --list exclude each other")),
            };
        }
        match (&self.info, &self.list, self.operands.first()) {
            (Some(_), Some(_), _) => return Err(usage("--info and --list exclude each other")),
            (Some(_), _, Some(word)) => {
                return Err(usage(format!("--info takes one SOURCE, not also {word}")));
            }
            (_, Some(_), Some(word)) => {
                return Err(usage(format!("--list takes one URI, not also {word}")));
            }
            (Some(_), ..) | (_, Some(_), _) if part.is_some() => {
                return Err(usage(
                    "--partition, --offset and --size go with a MOUNTPOINT; --info shows all of them",
                ));
            }
            (Some(word), ..) => {
                let (source, words) = parse_shown_source(word, server)?;
                check_certificates(&source, &remote)?;
                return Ok(Command::Info { source, words, json, remote });
            }
            (_, Some(uri), _) => {
                let source = parse_source(uri, None)?;
                check_certificates(&source, &remote)?;
                return match source {
                    Source::Nbd(uri) => Ok(Command::List { uri, json, remote }),
                    _ => Err(usage(format!("--list wants an NBD URI, not {uri}"))),
                };
            }
            _ if json => return Err(usage("--json goes with --info, --list and --mounts")),
            _ => {}
        }
        let read_only = self.read_only || mount.read_only;
        if mount.remount {
            // mount(8) gives fstab's or the kernel's other options too, which hold already.
            return match (&self.operands[..], &self.run) {
                ([_, mountpoint], None) => {
                    let mountpoint = parse_path("MOUNTPOINT", mountpoint)?;
                    Ok(Command::Remount { mountpoint, read_only })
                }
                _ => Err(usage("-o remount goes with SOURCE and MOUNTPOINT only")),
            };
        }
        if let Some(name) = mount.of_kernel {
            return Err(usage(format!("-o {name}: no such option, but for a remount")));
        }
        if self.daemonize && self.run.is_some() {
            return Err(usage("--daemonize and --run exclude each other"));
        }
        let (source, mountpoint) = match &self.operands[..] {
            [source, mountpoint] => (source, Some(parse_path("MOUNTPOINT", mountpoint)?)),
            [source] if self.run.is_some() => (source, None),
            [] => return Err(usage("SOURCE and MOUNTPOINT are missing")),
            [source] => {
                let source = server.map_or(source.clone(), |s| Source::Server(s).to_string());
                return Err(usage(format!("MOUNTPOINT is missing (SOURCE is {source})")));
            }
            [_, _, more, ..] => {
                return Err(usage(format!("one SOURCE and one MOUNTPOINT, not also {more}")));
            }
        };
        if server.is_some() && source != SERVER {
            return Err(usage("[ ] stands for SOURCE, before MOUNTPOINT"));
        }
        let (source, words) = parse_shown_source(source, server)?;
        check_certificates(&source, &remote)?;
        if self.growable && part.is_some() {
            return Err(usage("--growable is for whole disks: a part of one has a fixed size"));
        }
        let cache = parse_cache(self.cache.as_deref())?;
        let truncate = parse_truncate(self.truncate.as_deref())?;
        match cache {
            CacheWish::Is(Cache::None) if self.kernel_cache => {
                return Err(usage("--kernel-cache goes with --cache writethrough or writeback"));
            }
            CacheWish::Is(Cache::Writeback) if truncate == Truncate::Zero => {
                return Err(usage(
                    "--truncate zero does not go with --cache writeback: writes that the page cache keeps would come \
                     back over the zeroes",
                ));
            }
            _ => {}
        }
        Ok(Command::Serve(Config {
            source,
            words,
            mountpoint,
            read_only,
            part,
            io_uring: parse_when("--io-uring", self.io_uring.as_deref(), When::Auto)?,
            queue_depth: self.queue_depth.as_deref().map(parse_depth).transpose()?,
            growable: self.growable,
            truncate,
            cache,
            kernel_cache: self.kernel_cache,
            read_ahead: parse_read_ahead(self.read_ahead.as_deref())?,
            direct: self.direct,
            allow_other: parse_when("--allow-other", self.allow_other.as_deref(), When::Off)?,
            uid: mount.uid,
            gid: mount.gid,
            daemonize: self.daemonize,
            pidfile: self.pidfile.map(|path| parse_path("--pidfile", &path)).transpose()?,
            run: self.run,
            remote,
        }))
    }

    fn mount_option(&mut self, option: &str, mount: &mut MountOptions) -> Result<(), UsageError> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        let number = |value: &str| {
            value.parse().map_err(|_| usage(format!("-o {option}: {value} is not a number")))
        };
        match (name, value) {
            ("ro", None) => mount.read_only = true,
            ("rw", None) => mount.read_only = false,
            ("remount", None) => mount.remount = true,
            ("allow_other", None) => self.allow_other = Some("on".into()),
            ("uid", Some(value)) => mount.uid = Some(number(value)?),
            ("gid", Some(value)) => mount.gid = Some(number(value)?),
            ("read-only", None) => self.read_only = true,
            ("growable", None) => self.growable = true,
            ("direct", None) => self.direct = true,
            ("kernel-cache", None) => self.kernel_cache = true,
            ("partition", Some(value)) => self.partition = Some(value.into()),
            ("offset", Some(value)) => self.offset = Some(value.into()),
            ("size", Some(value)) => self.size = Some(value.into()),
            ("cache", Some(value)) => self.cache = Some(value.into()),
            ("read-ahead", Some(value)) => self.read_ahead = Some(value.into()),
            ("connections", Some(value)) => self.connections = Some(value.into()),
            ("daemonize", None) => self.daemonize = true,
            ("pidfile", Some(value)) => self.pidfile = Some(value.into()),
            ("run", Some(value)) => self.run = Some(value.into()),
            ("tls-certificates", Some(value)) => self.tls_certificates = Some(value.into()),
            ("connect-timeout", Some(value)) => self.connect_timeout = Some(value.into()),
            ("open-timeout", Some(value)) => self.open_timeout = Some(value.into()),
            ("timeout", Some(value)) => self.timeout = Some(value.into()),
            ("reconnect-timeout", Some(value)) => self.reconnect_timeout = Some(value.into()),
            ("unflushed", Some(value)) => self.unflushed = Some(value.into()),
            ("truncate", Some(value)) => self.truncate = Some(value.into()),
            ("io-uring", Some(value)) => self.io_uring = Some(value.into()),
            ("queue-depth", Some(value)) => self.queue_depth = Some(value.into()),
            ("allow-other", Some(value)) => self.allow_other = Some(value.into()),
            (name, None) if MOUNT_WORDS.contains(&name) => {}
            ("user_id" | "group_id" | "rootmode" | "max_read" | "blksize", Some(_)) => {
                mount.of_kernel.get_or_insert_with(|| name.into());
            }
            // Who may unmount, and notes to others.
            ("user" | "comment", Some(_)) => {}
            (name, _) if name.starts_with("x-") || name.starts_with("X-") => {}
            (name, None) if WITH_VALUE.contains(&name) || ["uid", "gid"].contains(&name) => {
                return Err(usage(format!("-o {name} needs a value: {name}=...")));
            }
            (name, Some(_))
                if SWITCHES.contains(&name)
                    || MOUNT_WORDS.contains(&name)
                    || ["ro", "rw", "remount", "allow_other"].contains(&name) =>
            {
                return Err(usage(format!("-o {name} takes no value")));
            }
            _ if mount.is_sloppy => {}
            _ => {
                let ours = ["ro", "rw", "remount", "allow_other", "uid", "gid"];
                let known = [&ours[..], &WITH_VALUE, &SWITCHES, &MOUNT_WORDS].concat();
                let UsageError(why) = no_such_option(name, known);
                return Err(usage(format!("-o {why}")));
            }
        }
        Ok(())
    }
}

/// Parts a list of `-o` at its commas, as libfuse does: after a backslash three octal digits are a byte, and any other character
/// is itself.
fn split_options(list: &str) -> Result<Vec<String>, UsageError> {
    let mut options = vec![Vec::new()];
    let mut rest = list.as_bytes();
    while let [first, tail @ ..] = rest {
        let (byte, len) = match (first, tail) {
            (b',', _) => {
                options.push(Vec::new());
                rest = tail;
                continue;
            }
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                (((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'), 4)
            }
            (b'\\', [quoted, ..]) => (*quoted, 2),
            (byte, _) => (*byte, 1),
        };
        options.last_mut().expect("there is one at least").push(byte);
        rest = &rest[len..];
    }
    let options = options.into_iter().map(String::from_utf8).collect::<Result<_, _>>();
    options.map_err(|_| usage(format!("-o {list}: a part of it is not UTF-8")))
}

fn parse_when(option: &str, value: Option<&str>, default: When) -> Result<When, UsageError> {
    match value {
        None => Ok(default),
        Some("auto") => Ok(When::Auto),
        Some("on") => Ok(When::On),
        Some("off") => Ok(When::Off),
        Some(other) => Err(usage(format!("{option} is auto, on or off, not {other:?}"))),
    }
}

fn parse_part(words: &Words) -> Result<Option<Wanted>, UsageError> {
    let bytes = |option: &str, value: &Option<String>, least: u64| {
        let Some(value) = value else { return Ok(None) };
        parse_size(value).filter(|bytes| *bytes >= least).map(Some).ok_or_else(|| {
            usage(format!(
                "--{option} is a number of bytes from {least} on, or one with K, M, G or T, not {value:?}"
            ))
        })
    };
    let (offset, size) = (bytes("offset", &words.offset, 0)?, bytes("size", &words.size, 1)?);
    match (words.partition.as_deref(), offset, size) {
        (None, None, None) => Ok(None),
        (None, offset, size) => Ok(Some(Wanted::Range { offset: offset.unwrap_or(0), size })),
        (Some(number), None, None) => number
            .parse()
            .ok()
            .filter(|n| *n > 0)
            .map(|n| Some(Wanted::Partition(n)))
            .ok_or_else(|| usage(format!("--partition is a number from 1 on, not {number:?}"))),
        (Some(_), ..) => Err(usage(
            "--partition has an offset and a size of its own: leave out --offset and --size",
        )),
    }
}

fn parse_truncate(value: Option<&str>) -> Result<Truncate, UsageError> {
    match value {
        None | Some("refuse") => Ok(Truncate::Refuse),
        Some("zero") => Ok(Truncate::Zero),
        Some(other) => Err(usage(format!("--truncate is refuse or zero, not {other:?}"))),
    }
}

fn parse_cache(value: Option<&str>) -> Result<CacheWish, UsageError> {
    match value {
        None | Some("auto") => Ok(CacheWish::Auto),
        Some("none") => Ok(CacheWish::Is(Cache::None)),
        Some("writethrough") => Ok(CacheWish::Is(Cache::Writethrough)),
        Some("writeback") => Ok(CacheWish::Is(Cache::Writeback)),
        Some(other) => {
            Err(usage(format!("--cache is auto, none, writethrough or writeback, not {other:?}")))
        }
    }
}

fn parse_read_ahead(value: Option<&str>) -> Result<u64, UsageError> {
    let (default, most) = READ_AHEADS;
    let Some(value) = value else { return Ok(default) };
    parse_size(value).filter(|size| *size <= most).ok_or_else(|| {
        usage(format!("--read-ahead is a number of bytes from 0 to 1G, as 4M, not {value:?}"))
    })
}

fn parse_connections(value: &str) -> Result<usize, UsageError> {
    value.parse().ok().filter(|n| CONNECTIONS.contains(n)).ok_or_else(|| {
        let (least, most) = CONNECTIONS.into_inner();
        usage(format!("--connections is a number from {least} to {most}, not {value:?}"))
    })
}

/// Certificates that nothing would look at: whoever named them expects TLS.
fn check_certificates(source: &Source, remote: &nbd::Options) -> Result<(), UsageError> {
    match (source, &remote.tls_certificates) {
        (Source::Nbd(uri), Some(_)) if uri.tls => Ok(()),
        (Source::Nbd(uri), Some(_)) => Err(usage(format!(
            "--tls-certificates goes with nbds:// and nbds+unix://; {uri} would be without TLS"
        ))),
        (_, Some(_)) => Err(usage("--tls-certificates goes with nbds:// and nbds+unix:// only")),
        (_, None) => Ok(()),
    }
}

fn parse_depth(value: &str) -> Result<usize, UsageError> {
    value.parse().ok().filter(|n| QUEUE_DEPTHS.contains(n)).ok_or_else(|| {
        let (least, most) = QUEUE_DEPTHS.into_inner();
        usage(format!("--queue-depth is a number from {least} to {most}, not {value:?}"))
    })
}

fn parse_seconds(
    option: &str,
    value: Option<&str>,
    least: u64,
) -> Result<Option<Duration>, UsageError> {
    const MOST: u64 = 7 * 24 * 3600;
    let Some(value) = value else { return Ok(None) };
    let seconds = value.parse().ok().filter(|s| (least..=MOST).contains(s));
    seconds.map(|s| Some(Duration::from_secs(s))).ok_or_else(|| {
        usage(format!("--{option} is a number of seconds from {least} to {MOST}, not {value:?}"))
    })
}

fn parse_unflushed(value: &str) -> Result<usize, UsageError> {
    let size = parse_size(value).and_then(|size| usize::try_from(size).ok());
    size.filter(|size| *size == 0 || UNFLUSHED.contains(size)).ok_or_else(|| {
        usage(format!("--unflushed is 0, or a number of bytes from 4M to 64G, not {value:?}"))
    })
}

fn parse_path(what: &str, text: &str) -> Result<PathBuf, UsageError> {
    if text.is_empty() {
        return Err(usage(format!("{what} is empty: it is to be a path")));
    }
    Ok(PathBuf::from(text))
}

/// A source, and the same in the user's words.
fn parse_shown_source(
    text: &str,
    server: Option<Vec<String>>,
) -> Result<(Source, String), UsageError> {
    let source = parse_source(text, server)?;
    let words = match &source {
        Source::Server(_) => source.to_string(),
        Source::Nbd(_) | Source::Path(_) | Source::Memory(_) => text.to_owned(),
    };
    Ok((source, words))
}

fn parse_source(text: &str, server: Option<Vec<String>>) -> Result<Source, UsageError> {
    if let Some(command) = server.filter(|_| text == SERVER) {
        return Ok(Source::Server(command));
    }
    if text.is_empty() {
        return Err(usage("SOURCE is empty: it is to be a path, an NBD URI or mem:SIZE"));
    }
    if let Some(size) = text.strip_prefix("mem:") {
        return Ok(Source::Memory(parse_size(size).ok_or_else(|| {
            usage(format!("mem:SIZE wants bytes, or a number with K, M, G or T, not {size:?}"))
        })?));
    }
    if Uri::is_nbd(text) {
        return text.parse().map(Source::Nbd).map_err(|e| usage(format!("{text}: {e}")));
    }
    // A path may have a colon and even "//" in it, but not in this way.
    if let Some((scheme, _)) = text.split_once("://") {
        return Err(usage(format!(
            "{scheme}:// is no scheme this version knows (for a file of that name: ./{text})"
        )));
    }
    Ok(Source::Path(PathBuf::from(text)))
}

/// A number of bytes: `4096`, `64K`, `1G`. At most what a file's offset can say.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return None,
    };
    let size = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (i64::try_from(size).is_ok() && digits.starts_with(|c: char| c.is_ascii_digit()))
        .then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Command, UsageError> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    fn config(line: &str) -> Config {
        match words(line) {
            Ok(Command::Serve(config)) => config,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn error(line: &str) -> String {
        words(line).expect_err(line).to_string()
    }

    #[test]
    fn defaults() {
        let config = config("disk.img ./disk");
        assert_eq!(config.source, Source::Path("disk.img".into()));
        assert_eq!(config.words, "disk.img");
        assert_eq!(config.mountpoint, Some(PathBuf::from("./disk")));
        assert!(!config.read_only && !config.growable && !config.direct);
        assert_eq!((config.io_uring, config.allow_other), (When::Auto, When::Off));
    }

    #[test]
    fn options_before_between_and_after_the_operands() {
        let a = config("-r --growable --io-uring off a b");
        assert_eq!(a, config("a --io-uring=off b --growable -r"));
        assert_eq!(a, config("a b -o ro,growable -o io-uring=off"));
    }

    #[test]
    fn mount_helpers_words_are_accepted() {
        let words = config("a b -o rw,dev,suid,x-systemd.device-timeout=5,allow_other,uid=7,gid=8");
        assert_eq!((words.uid, words.gid, words.allow_other), (Some(7), Some(8), When::On));
        let plain = config("a b");
        let notes = ["user=joe", "comment=a=b", "comment=", "x-gvfs-show", "X-mount.mkdir=0700"];
        for word in MOUNT_WORDS.into_iter().chain(notes) {
            assert_eq!(config(&format!("a b -o {word}")), plain, "{word}");
        }
        // They ask for what would not happen.
        for word in ["bind", "sync", "context=x", "dev=1"] {
            assert!(error(&format!("a b -o {word}")).contains("-o "), "{word}");
        }
    }

    #[test]
    fn a_backslash_quotes_in_mount_options() {
        let split = |list: &str| split_options(list).unwrap();
        assert_eq!(split("ro,,a=b"), ["ro", "", "a=b"]);
        assert_eq!(split(r"pidfile=/a\,b\\,ro"), [r"pidfile=/a,b\", "ro"]);
        assert_eq!(split(r"\054\040\,\8\"), [r", ,8\"]);
        assert_eq!(split(r"a=\303\274,b=ü\ü"), ["a=ü", "b=üü"]);
        assert!(split_options(r"a=\377").unwrap_err().to_string().contains("not UTF-8"));
        let words = config(r"a b -o pidfile=/run/a\,b,ro");
        assert_eq!((words.pidfile, words.read_only), (Some("/run/a,b".into()), true));
        assert_eq!(config(r"a b -o run=printf\040a\\nb").run, Some(r"printf a\nb".into()));
    }

    #[test]
    fn a_remount_is_another_command() {
        let remount = |line: &str| match words(line) {
            Ok(Command::Remount { mountpoint, read_only }) => (mountpoint, read_only),
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(remount("a b -o rw,remount,ro,daemonize,pidfile=/p"), ("b".into(), true));
        assert_eq!(remount("a b -o ro,remount,rw"), ("b".into(), false));
        assert_eq!(remount("a b -o user_id=0,group_id=0,remount"), ("b".into(), false));
        assert!(error("a b -o user_id=0").contains("user_id: no such option"));
        assert!(error("a -o remount").contains("MOUNTPOINT"));
        assert!(error("a b -o remount --run true").contains("MOUNTPOINT only"));
        assert!(error("a b -o remount=ro").contains("takes no value"));
    }

    #[test]
    fn unknown_mount_options_may_be_left_out() {
        let words = ["a", "b", "-o", "nonsense,ro,more=x"].map(str::to_owned);
        let sloppy = parse_as(&words, true);
        assert!(matches!(sloppy, Ok(Command::Serve(config)) if config == self::config("-r a b")));
        assert!(parse_as(&words, false).is_err());
        // What is known, and wrong, is an error all the same.
        assert!(parse_as(&["a", "b", "-o", "uid=x"].map(str::to_owned), true).is_err());
    }

    #[test]
    fn read_only_outweighs_rw() {
        for line in ["-r -o rw a b", "-o rw -r a b", "a b -o read-only,rw", "a b -o rw,ro"] {
            assert!(config(line).read_only, "{line}");
        }
        for line in ["a b -o ro,rw", "a b -o ro -o rw", "a b"] {
            assert!(!config(line).read_only, "{line}");
        }
    }

    #[test]
    fn a_double_dash_ends_the_options() {
        assert_eq!(config("-- -r=x --b").source, Source::Path("-r=x".into()));
    }

    #[test]
    fn help_is_a_name_as_any_other() {
        let words = config("help --run help");
        assert_eq!((words.source, words.run), (Source::Path("help".into()), Some("help".into())));
        assert_eq!(config("a help").mountpoint, Some("help".into()));
    }

    #[test]
    fn switches_take_no_value() {
        for switch in [
            "read-only",
            "growable",
            "kernel-cache",
            "direct",
            "daemonize",
            "json",
            "help",
            "version",
        ] {
            let expected = format!("--{switch} takes no value");
            assert!(error(&format!("--{switch}=yes b")).contains(&expected), "{switch}");
            assert!(error(&format!("a b --{switch}= ")).contains(&expected), "{switch}");
        }
    }

    #[test]
    fn values_may_look_like_options() {
        let words = config("a b --pidfile --direct=yes --run --x=y");
        assert_eq!(words.pidfile, Some("--direct=yes".into()));
        assert_eq!(words.run, Some("--x=y".into()));
        assert_eq!(config("a b --pidfile -- --growable").pidfile, Some("--".into()));
    }

    #[test]
    fn paths_are_not_empty() {
        let error = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            parse(&words).expect_err("a path is empty").to_string()
        };
        assert!(error(&["", "b"]).contains("SOURCE is empty"));
        assert!(error(&["a", ""]).contains("MOUNTPOINT is empty"));
        assert!(error(&["a", "", "--run", "true"]).contains("MOUNTPOINT is empty"));
        assert!(error(&["a", "b", "--pidfile="]).contains("--pidfile is empty"));
        assert!(error(&["a", "b", "--pidfile", ""]).contains("--pidfile is empty"));
        assert!(error(&["a", "b", "-o", "pidfile="]).contains("--pidfile is empty"));
        assert!(error(&["--info="]).contains("SOURCE is empty"));
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Some(4096));
        assert_eq!(parse_size("64M"), Some(64 << 20));
        assert_eq!(parse_size("1T"), Some(1 << 40));
        for bad in ["", "M", "-1", "+1", "1X", "9223372036854775808", "9999999T", "1.5G"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn errors_name_the_word_and_the_cure() {
        assert!(error("").contains("SOURCE and MOUNTPOINT"));
        assert!(error("a").contains("MOUNTPOINT is missing"));
        assert!(error("a b c").contains("not also c"));
        assert!(error("a b --io-uring maybe").contains("auto, on or off, not \"maybe\""));
        assert!(error("a b --queue-depth 0").contains("from 1 to 4096"));
        assert!(error("a b -o nonsense").contains("nonsense: no such option"));
        assert!(error("a b -o uid=x").contains("x is not a number"));
        assert!(error("a b -o uid").contains("uid=..."));
        assert!(error("a b -o ro=1").contains("takes no value"));
        assert!(error("a b --nonsense").contains("--nonsense: no such option (try"));
        assert!(error("a b --readonly").contains("did you mean --read-only?"));
        assert!(error("a b --io_uring=on").contains("did you mean --io-uring?"));
        assert!(error("a b -o allow-othr=on").contains("did you mean allow-other?"));
        assert!(error("a b -o _netdef").contains("did you mean _netdev?"));
        assert!(error("mem:lots b").contains("mem:SIZE"));
        assert!(error("ftp://x b").contains("ftp://"));
    }

    #[test]
    fn run_may_leave_out_the_mountpoint() {
        assert_eq!(config("a --run true").mountpoint, None);
        assert!(config("a b --run true").mountpoint.is_some());
        assert!(error("a --run true --daemonize").contains("exclude"));
    }

    #[test]
    fn info_takes_a_source() {
        let info = words("--info mem:4K --json");
        let source = Source::Memory(4096);
        assert!(matches!(info, Ok(Command::Info { source: s, json: true, .. }) if s == source));
        assert!(error("--info a b").contains("not also b"));
        assert!(error("--json a b").contains("--info"));
    }

    #[test]
    fn list_takes_an_nbd_uri() {
        assert!(matches!(words("--list nbd://host"), Ok(Command::List { json: false, .. })));
        assert!(error("--list disk.img").contains("NBD URI"));
        assert!(error("--list nbd://host --info a").contains("exclude"));
        assert_eq!(words("--mounts --json"), Ok(Command::Mounts { json: true }));
        assert!(error("--mounts a").contains("takes no operand a"));
        assert!(error("--mounts --list nbd://host").contains("exclude"));
        assert!(error("--mounts=yes").contains("takes no value"));
    }

    #[test]
    fn nbd_uris_are_sources() {
        let config = config("nbds://storage/vm1 b --connect-timeout 3 --tls-certificates /pki");
        assert_eq!(config.source.to_string(), "nbds://storage/vm1");
        assert_eq!(self::config("nbd://h:10809 b").words, "nbd://h:10809");
        assert_eq!(config.remote.connect_timeout, Duration::from_secs(3));
        assert!(error("nbd://storage/vm1?nonsense=1 b").contains("nonsense"));
        assert!(error("nbd://storage/vm1 b --connect-timeout 0").contains("from 1 to 604800"));
        let words = "a b -o timeout=5,reconnect-timeout=0,open-timeout=7,unflushed=8M";
        let remote = self::config(words).remote;
        assert_eq!(remote.timeout, Some(Duration::from_secs(5)));
        assert_eq!(remote.reconnect_timeout, Duration::ZERO);
        assert_eq!((remote.open_timeout, remote.unflushed), (Duration::from_secs(7), 8 << 20));
        assert_eq!(self::config("a b --timeout 0 --unflushed 0").remote.timeout, None);
        assert!(error("a b --unflushed 1M").contains("from 4M to 64G"));
        assert!(error("a b --timeout -1").contains("from 0 to 604800"));
    }

    #[test]
    fn certificates_want_tls() {
        for line in [
            "nbd://storage/vm1 b --tls-certificates /pki",
            "nbd+unix:///?socket=s b -o tls-certificates=/pki",
            "disk.img b --tls-certificates /pki",
            "--list nbd://storage --tls-certificates /pki",
            "--info nbd://storage --tls-certificates /pki",
            "--info disk.img --tls-certificates /pki",
        ] {
            assert!(error(line).contains("nbds://"), "{line}");
        }
        assert!(words("--list nbds://storage --tls-certificates /pki").is_ok());
    }

    #[test]
    fn truncations_are_refused_unless_they_zero() {
        assert_eq!(config("a b").truncate, Truncate::Refuse);
        assert_eq!(config("a b --truncate zero").truncate, Truncate::Zero);
        assert_eq!(config("a b -o truncate=zero --truncate=refuse").truncate, Truncate::Zero);
        assert!(error("a b --truncate cut").contains("refuse or zero, not \"cut\""));
    }

    #[test]
    fn caches() {
        assert_eq!(config("a b").cache, CacheWish::Auto);
        assert_eq!(config("a b").read_ahead, 4 << 20);
        let words = config("a b -o cache=writeback,kernel-cache,read-ahead=64K,connections=3");
        assert_eq!(words.cache, CacheWish::Is(Cache::Writeback));
        assert_eq!((words.kernel_cache, words.read_ahead), (true, 64 << 10));
        assert_eq!(words.remote.connections, Some(3));
        assert_eq!(config("a b --read-ahead 0").read_ahead, 0);
        assert!(error("a b --cache yes").contains("writethrough or writeback, not \"yes\""));
        assert!(error("a b --read-ahead 2G").contains("from 0 to 1G"));
        assert!(error("a b --connections 0").contains("from 1 to 256"));
        assert!(error("a b --cache none --kernel-cache").contains("--kernel-cache goes with"));
        assert!(error("a b --cache writeback --truncate zero").contains("does not go with"));
    }

    #[test]
    fn parts_of_a_disk() {
        assert_eq!(config("a b").part, None);
        assert_eq!(config("a b --partition 5").part, Some(Wanted::Partition(5)));
        assert_eq!(config("a b -o partition=2").part, Some(Wanted::Partition(2)));
        let range = |offset, size| Some(Wanted::Range { offset, size });
        assert_eq!(config("a b --offset=1M").part, range(1 << 20, None));
        assert_eq!(config("a b -o offset=0").part, range(0, None));
        assert_eq!(config("a b --size 4K").part, range(0, Some(4096)));
        assert_eq!(config("a b -o offset=512,size=1T").part, range(512, Some(1 << 40)));
        for line in ["a b --partition 1 --offset 0", "a b -o partition=1 --size 1M"] {
            assert!(error(line).contains("leave out --offset and --size"), "{line}");
        }
        for number in ["0", "-1", "x", "1M", "4294967296"] {
            assert!(error(&format!("a b --partition {number}")).contains("from 1 on"), "{number}");
        }
        assert!(error("a b --offset -1").contains("--offset is a number of bytes from 0 on"));
        assert!(error("a b --size 0").contains("--size is a number of bytes from 1 on"));
        assert!(error("a b --size 1M --growable").contains("fixed size"));
        for line in ["--info a --partition 1", "--list nbd://host --offset 1"] {
            assert!(error(line).contains("go with a MOUNTPOINT"), "{line}");
        }
        assert!(error("a b -o partition").contains("partition=..."));
    }

    #[test]
    fn a_server_is_a_source() {
        let server = |words: &[&str]| Source::Server(words.iter().map(|&w| w.into()).collect());
        let words = config("-r [ qemu-nbd -f qcow2 --x=y -- vm.qcow2 ] ./vm --growable");
        assert_eq!(words.source, server(&["qemu-nbd", "-f", "qcow2", "--x=y", "--", "vm.qcow2"]));
        assert_eq!(words.words, "[ qemu-nbd -f qcow2 --x=y -- vm.qcow2 ]");
        assert_eq!(words.mountpoint, Some("./vm".into()));
        assert!(words.read_only && words.growable);
        assert_eq!((words.remote.reconnect_timeout, words.remote.unflushed), (Duration::ZERO, 0));
        assert_eq!(config("--run true [ nbdkit null ]").source, server(&["nbdkit", "null"]));
        assert_eq!(config("-- [ a --b ] c").source, server(&["a", "--b"]));
        let info = self::words("--json --info [ nbdkit null ]");
        assert!(
            matches!(info, Ok(Command::Info { source, .. }) if source == server(&["nbdkit", "null"]))
        );
        let paths = config("[ a -f /dev/fd/9 ] c");
        assert!(paths.paths().any(|path| path == Path::new("/dev/fd/9")), "it is kept open");
        // Where a value stands it is one.
        assert_eq!(config("a b --pidfile [ --run ]").pidfile, Some("[".into()));
        assert_eq!(config("./[ ./]").source, Source::Path("./[".into()));
        for (line, part) in [
            ("[ a b", "the ] that ends"),
            ("[", "the ] that ends"),
            ("[ ] b", "command is missing"),
            ("[ a ]", "MOUNTPOINT is missing (SOURCE is [ a ])"),
            ("[ a ] [ b ] c", "not two servers"),
            ("b [ a ]", "before MOUNTPOINT"),
            ("[ a ] b c", "not also c"),
            ("[ a ] b --reconnect-timeout 5", "--reconnect-timeout goes with"),
            ("[ a ] b -o unflushed=8M", "--unflushed goes with"),
            ("[ a ] b --tls-certificates /pki", "nbds://"),
            ("--list [ a ]", "NBD URI"),
        ] {
            assert!(error(line).contains(part), "{line}: {}", error(line));
        }
    }

    #[test]
    fn help_and_version_are_printed() {
        for line in ["--help", "--version", "-h", "-V", "a b -h", "-V a"] {
            assert!(matches!(words(line), Ok(Command::Print(_))), "{line}");
        }
    }

    #[test]
    fn help_has_all_options_in_80_columns() {
        let help = help_text();
        let long = help.lines().find(|line| line.chars().count() > 80);
        assert_eq!(long, None);
        for option in WITH_VALUE {
            assert!(help.contains(&format!("--{option} <")), "{option}: {help}");
        }
        for option in SWITCHES.into_iter().chain(["json", "help", "version"]) {
            let is = |line: &str| line.split([' ', ',']).any(|word| word == format!("--{option}"));
            assert!(help.lines().any(is), "{option}: {help}");
        }
    }
}
