//! The command line: words become one validated [`Config`].

mod args;
mod mount_options;
mod server;
mod values;

use std::path::{Path, PathBuf};

use argh::{ArgsInfo, EarlyExit, FromArgs};

use crate::backend::nbd::{self, Uri};
use crate::export::{Cache, Truncate};
use crate::partitions::Wanted;
use crate::program::{help, hints};

use args::{Args, takes_next_word, takes_no_value};
use server::take_server;

/// Off, on, or on if it can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// If it can be had.
    Auto,
    /// Or fail.
    On,
    /// Never.
    Off,
}

/// What is done when requests would fail because the source is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// They fail, and succeed again if it comes back.
    Wait,
    /// The export ends.
    Exit,
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
            Source::Server(command) => write!(f, "[ {} ]", server::quoted(command)),
        }
    }
}

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the bytes are.
    pub source: Source,
    /// The source in the user's words: they are the mount's source, by which mount(8) knows again
    /// what is in fstab.
    pub words: String,
    /// All exports of the server are shown, in a directory.
    pub all: bool,
    /// The regular file, or with `all` the directory, that shows them; none, with `run`: one in a temporary folder.
    pub mountpoint: Option<PathBuf>,
    /// Never write to the source.
    pub read_only: bool,
    /// It is said if it cannot be written: `-o rw`, which mount(8) gives by itself.
    pub wants_writes: bool,
    /// The part of the source that is shown; none: all of it.
    pub part: Option<Wanted>,
    /// FUSE over io_uring.
    pub io_uring: Switch,
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
    pub allow_other: Switch,
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
    /// When requests would fail because the source is lost.
    pub on_loss: OnLoss,
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
    /// Show what exports do, live.
    Top {
        /// Those at these files; none: all that are here.
        files: Vec<PathBuf>,
        /// As JSON, a line for each file and interval.
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

/// Understands the words after the program's name.
pub fn parse(words: &[String]) -> Result<Command, UsageError> {
    parse_as(words, false)
}

/// The same; what `-o` has that nobody knows is left out if it `is_sloppy`, as mount(8) may ask its
/// helpers to be.
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
    match Args::from_args(&["diskfuse"], &split) {
        Ok(words) => words.into_command(server, is_sloppy),
        Err(EarlyExit { status: Ok(()), .. }) => Ok(Command::Print(help_text())),
        Err(EarlyExit { output, .. }) => {
            Err(match output.strip_prefix("Unrecognized argument: ") {
                Some(word) => no_such_option(
                    word.trim(),
                    Args::get_args_info().flags.iter().map(|flag| flag.long),
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
       diskfuse [OPTIONS] --all URI DIRECTORY
       diskfuse --info SOURCE [--json]
       diskfuse --list URI [--json]
       diskfuse --mounts [--json]
       diskfuse --top [FILE...] [--json]
";
    help::text("diskfuse", USAGE, &Args::get_args_info())
}

fn no_such_option<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> UsageError {
    usage(match hints::nearest(word, known) {
        Some(name) => format!("{word}: no such option: did you mean {name}?"),
        None => format!("{word}: no such option"),
    })
}

#[cfg(test)]
mod tests;
