//! The options as words: what argh reads, what `-o` adds to it, and the command that comes of both.

use std::path::PathBuf;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};

use super::mount_options::{MountOptions, split_options};
use super::server::{GivenServer, SERVER};
use super::values::{
    parse_cache, parse_connections, parse_depth, parse_on_loss, parse_path, parse_read_ahead,
    parse_seconds, parse_shown_source, parse_size, parse_source, parse_switch, parse_truncate,
    parse_unflushed,
};
use super::{CacheWish, Command, Config, OnLoss, Source, Switch, UsageError, usage};
use crate::backend::nbd;
use crate::export::{Cache, Truncate};
use crate::partitions::Wanted;

/// Show a disk as a file.
///
/// SOURCE is a remote disk (nbd://HOST[:PORT]/[EXPORT], nbd+unix:///[EXPORT]?socket=PATH,
/// nbd+vsock://[CID][:PORT]/[EXPORT], or nbds for nbd for TLS), the path of a disk image or a block
/// device, mem:SIZE for a sparse disk in memory, or [ COMMAND... ], an NBD server that is started
/// for it. MOUNTPOINT is a regular file, or with --all an empty directory; it is created if it is
/// missing, and removed again at the
/// end.
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
pub(super) struct Args {
    /// never write to the source
    #[argh(switch, short = 'r')]
    pub(super) read_only: bool,

    /// options as mount(8) has them: ro, rw, allow_other, uid=, gid=, and any long option of this
    /// program as name[=value]; may be repeated
    #[argh(option, short = 'o', arg_name = "opt[,opt...]")]
    pub(super) options: Vec<String>,

    /// show all exports of the NBD server at SOURCE, each as a file of the directory MOUNTPOINT
    #[argh(switch)]
    pub(super) all: bool,

    /// show this partition only, by its number in the disk's GPT or MBR
    #[argh(option, arg_name = "n")]
    pub(super) partition: Option<String>,

    /// show only what is behind so many bytes (K, M, G and T may follow)
    #[argh(option, arg_name = "bytes")]
    pub(super) offset: Option<String>,

    /// show only so many bytes, from --offset on
    #[argh(option, arg_name = "bytes")]
    pub(super) size: Option<String>,

    /// FUSE over io_uring: auto, on or off (auto)
    #[argh(option, arg_name = "when")]
    pub(super) io_uring: Option<String>,

    /// requests in flight for each serving thread (chosen from the number of CPUs)
    #[argh(option, arg_name = "n")]
    pub(super) queue_depth: Option<String>,

    /// a write past the end makes the source longer, and a truncation is one
    #[argh(switch)]
    pub(super) growable: bool,

    /// what a truncation does to a disk of fixed size: refuse it, or zero what it cuts off (refuse)
    #[argh(option, arg_name = "what")]
    pub(super) truncate: Option<String>,

    /// the kernel's page cache in front of the file: auto, none, writethrough or writeback (auto:
    /// writethrough for a remote disk, none for a local one)
    #[argh(option, arg_name = "mode")]
    pub(super) cache: Option<String>,

    /// keep the page cache from one open to the next: for a disk that nobody else writes
    #[argh(switch)]
    pub(super) kernel_cache: bool,

    /// bytes to read ahead of a client that reads in order through the page cache; 0: none (4M)
    #[argh(option, arg_name = "size")]
    pub(super) read_ahead: Option<String>,

    /// bypass the page cache of the source (O_DIRECT)
    #[argh(switch)]
    pub(super) direct: bool,

    /// let other users use the file, as far as its mode allows: off, on, or auto if that is
    /// permitted (off)
    #[argh(option, arg_name = "when")]
    pub(super) allow_other: Option<String>,

    /// go to the background once the file can be used; until then, and if it fails, as in the
    /// foreground
    #[argh(switch)]
    pub(super) daemonize: bool,

    /// a file for the process id: written once the file can be used, locked, and removed at the end
    #[argh(option, arg_name = "path")]
    pub(super) pidfile: Option<String>,

    /// serve while this shell command runs, and exit with its status; $DISKFUSE_FILE names the
    /// file, and MOUNTPOINT may be left out
    #[argh(option, arg_name = "cmd")]
    pub(super) run: Option<String>,

    /// for nbds: a folder with ca-cert.pem, client-cert.pem and client-key.pem, where they are
    /// needed (the system's certificates)
    #[argh(option, arg_name = "dir")]
    pub(super) tls_certificates: Option<String>,

    /// connections to an NBD server at most, opened when they are needed (chosen from the number of
    /// CPUs)
    #[argh(option, arg_name = "n")]
    pub(super) connections: Option<String>,

    /// seconds until a server that does not answer counts as unreachable (10)
    #[argh(option, arg_name = "s")]
    pub(super) connect_timeout: Option<String>,

    /// seconds for which an NBD server that cannot be reached is tried again at the start (0)
    #[argh(option, arg_name = "s")]
    pub(super) open_timeout: Option<String>,

    /// seconds after which a connection on which a request has had no answer counts as lost; 0:
    /// never (0)
    #[argh(option, arg_name = "s")]
    pub(super) timeout: Option<String>,

    /// seconds for which requests wait for an NBD server that is gone, and fail then; 0: they fail
    /// at once and for good (300)
    #[argh(option, arg_name = "s")]
    pub(super) reconnect_timeout: Option<String>,

    /// what to do when requests would fail because the server is lost: wait, and let them fail until
    /// it is back, or exit with status 1, so that a supervisor starts anew (wait)
    #[argh(option, arg_name = "what")]
    pub(super) on_loss: Option<String>,

    /// bytes of acknowledged writes to keep until the NBD server has made them durable, and to
    /// write again if it crashes; 0: fsync tells of the loss (64M)
    #[argh(option, arg_name = "size")]
    pub(super) unflushed: Option<String>,

    /// print what the NBD server at this URI exports, and end
    #[argh(option, arg_name = "uri")]
    pub(super) list: Option<String>,

    /// print what SOURCE is, and end
    #[argh(option, arg_name = "source")]
    pub(super) info: Option<String>,

    /// print what is exported here, and end
    #[argh(switch)]
    pub(super) mounts: bool,

    /// show what the exports at the operands FILE... do, each second, or all that are here
    #[argh(switch)]
    pub(super) top: bool,

    /// print --info, --list, --mounts or --top as JSON
    #[argh(switch)]
    pub(super) json: bool,

    /// print the version
    #[argh(switch, short = 'V')]
    pub(super) version: bool,

    /// SOURCE and MOUNTPOINT
    #[argh(positional, arg_name = "SOURCE MOUNTPOINT")]
    pub(super) operands: Vec<String>,
}

/// The options that take a value, for `name=value`.
pub(super) const WITH_VALUE: [&str; 19] = [
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
    "on-loss",
    "unflushed",
];
/// The options that take none.
pub(super) const SWITCHES: [&str; 6] =
    ["all", "read-only", "growable", "kernel-cache", "direct", "daemonize"];

impl Args {
    pub(super) fn into_command(
        mut self,
        server: Option<GivenServer>,
        is_sloppy: bool,
    ) -> Result<Command, UsageError> {
        if self.version {
            return Ok(Command::Print(concat!("diskfuse ", env!("DISKFUSE_VERSION"), "\n").into()));
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
        if self.mounts || self.top {
            if (self.mounts && self.top) || self.info.is_some() || self.list.is_some() {
                return Err(usage("--mounts, --top, --info and --list exclude each other"));
            }
            return match self.operands.first() {
                Some(word) if self.mounts => {
                    Err(usage(format!("--mounts takes no operand {word}")))
                }
                _ if self.mounts => Ok(Command::Mounts { json }),
                _ if server.is_some() => Err(usage("--top takes files, not [ ]")),
                _ => {
                    let files = self.operands.iter().map(|file| parse_path("FILE", file));
                    Ok(Command::Top { files: files.collect::<Result<_, _>>()?, json })
                }
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
                let source = parse_source(uri)?;
                check_certificates(&source, &remote)?;
                return match source {
                    Source::Nbd(uri) => Ok(Command::List { uri, json, remote }),
                    _ => Err(usage(format!("--list wants an NBD URI, not {uri}"))),
                };
            }
            _ if json => return Err(usage("--json goes with --info, --list, --mounts and --top")),
            _ => {}
        }
        let read_only = self.read_only || mount.read_only == Some(true);
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
                let (_, source) = parse_shown_source(source, server)?;
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
        let on_loss = parse_on_loss(self.on_loss.as_deref())?;
        if self.all {
            check_all(&source, part.is_some(), self.growable, cache)?;
            if on_loss == OnLoss::Exit {
                return Err(usage(
                    "--on-loss exit is for one disk: with --all no loss ends the others",
                ));
            }
        }
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
            all: self.all,
            mountpoint,
            read_only,
            wants_writes: !read_only && mount.read_only == Some(false),
            part,
            io_uring: parse_switch("--io-uring", self.io_uring.as_deref(), Switch::Auto)?,
            queue_depth: self.queue_depth.as_deref().map(parse_depth).transpose()?,
            growable: self.growable,
            truncate,
            cache,
            kernel_cache: self.kernel_cache,
            read_ahead: parse_read_ahead(self.read_ahead.as_deref())?,
            direct: self.direct,
            allow_other: parse_switch("--allow-other", self.allow_other.as_deref(), Switch::Off)?,
            uid: mount.uid,
            gid: mount.gid,
            daemonize: self.daemonize,
            pidfile: self.pidfile.map(|path| parse_path("--pidfile", &path)).transpose()?,
            run: self.run,
            on_loss,
            remote,
        }))
    }
}

fn parse_part(words: &Args) -> Result<Option<Wanted>, UsageError> {
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

/// What goes with a directory of all exports.
fn check_all(
    source: &Source,
    has_part: bool,
    growable: bool,
    cache: CacheWish,
) -> Result<(), UsageError> {
    match source {
        Source::Nbd(uri) if !uri.export.is_empty() => {
            return Err(usage(format!(
                "--all shows every export of the server: leave out '{}' in its URI",
                uri.export
            )));
        }
        Source::Nbd(_) => {}
        _ => return Err(usage("--all goes with the URI of an NBD server (nbd://HOST) only")),
    }
    if has_part {
        return Err(usage("--partition, --offset and --size are of one disk: leave out --all"));
    }
    if growable {
        return Err(usage("--growable is for images: exports of a server have a fixed size"));
    }
    // The kernel would own sizes that it is told for one file only.
    if cache == CacheWish::Is(Cache::Writeback) {
        return Err(usage("--cache writeback is for one disk: leave it out, or --all"));
    }
    Ok(())
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

pub(super) fn takes_no_value(name: &str) -> bool {
    SWITCHES.contains(&name) || ["json", "mounts", "top", "help", "version"].contains(&name)
}

pub(super) fn takes_next_word(word: &str) -> bool {
    let also = ["options", "list", "info"];
    let is_one = |name: &str| WITH_VALUE.contains(&name) || also.contains(&name);
    word == "-o" || word.strip_prefix("--").is_some_and(is_one)
}
