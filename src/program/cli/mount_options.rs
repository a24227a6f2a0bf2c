//! `-o`: the words of mount(8) and fstab(5), and any long option of the program as one of them.

use super::args::{Args, SWITCHES, WITH_VALUE};
use super::{UsageError, no_such_option, usage};

/// Args of mount(8) and fstab(5) that mean nothing here, or are so anyway.
pub(super) const MOUNT_WORDS: [&str; 35] = [
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

/// What `-o` says that no other option does.
#[derive(Default)]
pub(super) struct MountOptions {
    /// Unknown ones are left out.
    pub(super) is_sloppy: bool,
    /// What is mounted already is to be read-only, or writable again.
    pub(super) remount: bool,
    /// An option that the kernel shows of a mount, which mount(8) gives back to remount it.
    pub(super) of_kernel: Option<String>,
    /// The last of ro and rw, if there is one. It cannot take back --read-only.
    pub(super) read_only: Option<bool>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

impl Args {
    pub(super) fn mount_option(
        &mut self,
        option: &str,
        mount: &mut MountOptions,
    ) -> Result<(), UsageError> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        // The last number is nobody's: to system calls it says that there is none.
        let number = |value: &str| match value.parse() {
            Ok(u32::MAX) => Err(usage(format!("-o {option}: {value} is nobody's number"))),
            Ok(number) => Ok(number),
            Err(_) => Err(usage(format!("-o {option}: {value} is not a number"))),
        };
        match (name, value) {
            ("ro", None) => mount.read_only = Some(true),
            ("rw", None) => mount.read_only = Some(false),
            ("remount", None) => mount.remount = true,
            ("allow_other", None) => self.allow_other = Some("on".into()),
            ("uid", Some(value)) => mount.uid = Some(number(value)?),
            ("gid", Some(value)) => mount.gid = Some(number(value)?),
            ("all", None) => self.all = true,
            ("read-only", None) => self.read_only = true,
            ("growable", None) => self.growable = true,
            ("direct", None) => self.direct = true,
            ("kernel-cache", None) => self.kernel_cache = true,
            ("partition", Some(value)) => self.partition = Some(value.into()),
            // mount(8) takes `offset` for itself, to make a loop device.
            ("offset" | "start", Some(value)) => self.offset = Some(value.into()),
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
            ("on-loss", Some(value)) => self.on_loss = Some(value.into()),
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
            (name, None)
                if WITH_VALUE.contains(&name) || ["uid", "gid", "start"].contains(&name) =>
            {
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
                let ours = ["ro", "rw", "remount", "allow_other", "uid", "gid", "start"];
                let known = [&ours[..], &WITH_VALUE, &SWITCHES, &MOUNT_WORDS].concat();
                let UsageError(why) = no_such_option(name, known);
                return Err(usage(format!("-o {why}")));
            }
        }
        Ok(())
    }
}

/// Parts a list of `-o` at its commas, as libfuse does: after a backslash three octal digits are a
/// byte, and any other character is itself.
pub(super) fn split_options(list: &str) -> Result<Vec<String>, UsageError> {
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
