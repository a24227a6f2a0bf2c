//! What the test binaries share.
//!
//! A [`suite::Promise`] is a test function; [`suite::run`] runs it over transport × kind of source,
//! each pair a [`suite::Case`]. A case makes an [`image::Image`] in its [`sandbox::Sandbox`] and
//! starts an [`export::Export`] of it: the real program, really mounted. What is dropped leaves
//! nothing behind, also when a test fails.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod ability;
pub mod export;
pub mod forgetful;
pub mod image;
pub mod mounts;
pub mod nbd;
pub mod sandbox;
pub mod seccomp;
pub mod suite;
pub mod writer;

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take that takes an instant when all is well. (Virtual disks stall for many
/// seconds.)
pub const SOON: Duration = Duration::from_secs(60);
/// The ordinary user of tests that run as root: `nobody` of Debian.
pub const USER: u32 = 65534;

/// Polls until `done`; panics at the deadline.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    assert!(within(SOON, &mut done), "not within {SOON:?}: {what}");
}

/// Polls until `done`; false at the deadline.
pub fn within(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A client program that is killed after two minutes.
pub fn program<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "2", "120", name]).args(args).stdin(Stdio::null()).env("LC_ALL", "C");
    command
}

/// Runs a command and returns what it prints; panics if it fails.
#[track_caller]
pub fn succeed(command: &mut Command) -> String {
    let output = output(command);
    let text = said(&output);
    assert!(output.status.success(), "{command:?}: {}: {text}", output.status);
    text
}

/// Runs a command that has to fail, and returns what it prints.
#[track_caller]
pub fn fail(command: &mut Command) -> String {
    let output = output(command);
    let text = said(&output);
    assert!(!output.status.success(), "{command:?} succeeded: {text}");
    text
}

#[track_caller]
fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Asserts that a call failed with this errno.
#[track_caller]
pub fn assert_errno<T: std::fmt::Debug, E: Into<std::io::Error>>(
    result: Result<T, E>,
    expected: i32,
) {
    let result = result.map_err(Into::into);
    let actual = result.as_ref().err().and_then(std::io::Error::raw_os_error);
    let expected_error = std::io::Error::from_raw_os_error(expected);
    assert_eq!(actual, Some(expected), "{expected_error} is expected, not {result:?}");
}

/// What an export tells of itself.
#[track_caller]
pub fn report(file: &std::path::Path) -> serde_json::Value {
    let mut line = vec![0; 64 << 10];
    let len = rustix::fs::getxattr(file, "user.diskfuse.stats", &mut line).expect("it tells");
    serde_json::from_slice(&line[..len]).expect("it is JSON")
}

#[track_caller]
pub fn number(value: &serde_json::Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Whether this process is root's.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Reproducible bytes, different for each seed, with no zero block among them.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend((random.next() | 1).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A small generator of reproducible numbers (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Memory for O_DIRECT: it begins at a page.
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub fn new(len: usize) -> Aligned {
        const PAGE: usize = 4096;
        let memory = vec![0; len + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        Aligned { memory, start, len }
    }

    pub fn of(bytes: &[u8]) -> Aligned {
        let mut aligned = Aligned::new(bytes.len());
        aligned.copy_from_slice(bytes);
        aligned
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..][..self.len]
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.len]
    }
}
