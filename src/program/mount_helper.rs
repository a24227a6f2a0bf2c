//! Called by mount(8): as its helper `mount.diskfuse`, or through `mount.fuse3`.
//!
//! mount(8) waits for whoever mounts, so the program goes to the background by itself. A helper has
//! arguments of its own, which become those that [`cli`](crate::program::cli) understands.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What mount(8) looks for, by the types `diskfuse` and `fuse.diskfuse`.
const NAMES: [&str; 2] = ["mount.diskfuse", "mount.fuse.diskfuse"];
/// mount(8)'s status for a command line that makes no sense.
pub const USAGE: u8 = 1;
/// mount(8)'s status for a mount that failed.
pub const FAILURE: u8 = 32;
/// Processes between this one and mount(8) at most: shells that mount.fuse3 calls it by.
const GENERATIONS: usize = 3;

/// What the helper is asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// For [`cli::parse`](crate::program::cli::parse).
    pub words: Vec<String>,
    /// Nothing is to be mounted: only looked at.
    pub is_fake: bool,
    /// Options of `-o` that nobody knows are left out.
    pub is_sloppy: bool,
    /// The mount namespace to mount in.
    pub namespace: Option<PathBuf>,
}

/// Whether the program is called as the helper.
pub fn is_called(name: &OsStr) -> bool {
    Path::new(name).file_name().is_some_and(|name| NAMES.iter().any(|helper| name == *helper))
}

/// Understands `SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`. The error says
/// what is wrong.
pub fn parse(words: &[String]) -> Result<Call, String> {
    let mut call = Call { words: vec!["--daemonize".into()], ..Call::default() };
    let mut operands = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut flags = match word.strip_prefix('-') {
            Some("-help" | "-version") => return Ok(Call { words: vec![word.clone()], ..call }),
            Some("-") => {
                operands.extend(words.by_ref().cloned());
                break;
            }
            Some(flags) if !flags.is_empty() => flags.chars(),
            _ => {
                operands.push(word.clone());
                continue;
            }
        };
        while let Some(flag) = flags.next() {
            match flag {
                's' => call.is_sloppy = true,
                'f' => call.is_fake = true,
                // There is no mtab to keep out of, and nothing more to say.
                'n' | 'v' => {}
                'h' | 'V' => return Ok(Call { words: vec![format!("-{flag}")], ..call }),
                'o' | 'N' | 't' => {
                    let value = match flags.as_str() {
                        "" => words.next().cloned(),
                        rest => Some(rest.to_owned()),
                    };
                    let value = value.ok_or_else(|| format!("-{flag} needs a value"))?;
                    match flag {
                        'o' => call.words.extend(["-o".into(), value]),
                        'N' => call.namespace = Some(namespace(&value)),
                        _ => {}
                    }
                    break;
                }
                _ => return Err(format!("{word}: mount(8) has no such option for its helpers")),
            }
        }
    }
    call.words.push("--".into());
    call.words.extend(operands);
    Ok(call)
}

/// A process or a file, as mount(8) has it.
fn namespace(value: &str) -> PathBuf {
    match value.parse::<u32>() {
        Ok(process) => format!("/proc/{process}/ns/mnt").into(),
        Err(_) => value.into(),
    }
}

/// Whether mount(8) has called through mount.fuse3, as for `mount -t fuse.diskfuse`. It adds dev
/// and suid wherever their opposites are not given, and nobody else has a reason to name one of
/// each. But people have habits, so that a process before this one has to be `mount`, too.
pub fn is_called_by_mount_fuse(words: &[String]) -> bool {
    are_of_mount_fuse(words) && descends_from("mount")
}

fn are_of_mount_fuse(words: &[String]) -> bool {
    let lists = words.windows(2).filter(|pair| pair[0] == "-o");
    let options: Vec<&str> = lists.flat_map(|pair| pair[1].split(',')).collect();
    let has_one_of = |pair: [&str; 2]| options.iter().any(|option| pair.contains(option));
    has_one_of(["dev", "nodev"]) && has_one_of(["suid", "nosuid"])
}

/// Whether one of the last processes before this one has the name.
fn descends_from(name: &str) -> bool {
    let mut process = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    for _ in 0..GENERATIONS {
        // The number 0 has none: it is out of this PID namespace.
        let status =
            process.and_then(|id| std::fs::read_to_string(format!("/proc/{id}/status")).ok());
        let Some(status) = status else { return false };
        let field = |field: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(field));
            value.map(|value| value.trim().to_owned())
        };
        if field("Name:").as_deref() == Some(name) {
            return true;
        }
        process = field("PPid:");
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(line: &str) -> Result<Call, String> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn it_is_called_by_its_names() {
        let is_called = |name: &str| super::is_called(name.as_ref());
        assert!(is_called("/sbin/mount.diskfuse") && is_called("mount.fuse.diskfuse"));
        assert!(!is_called("/usr/bin/diskfuse") && !is_called("/x/mount.diskfuse/diskfuse"));
    }

    #[test]
    fn arguments_of_mount_become_options() {
        let plain = call("a b").unwrap();
        assert_eq!(plain.words, ["--daemonize", "--", "a", "b"]);
        assert_eq!((plain.is_fake, plain.is_sloppy, plain.namespace), (false, false, None));
        let all = call("a -b -fn -svo ro,uid=1 -N 17 -t fuse.diskfuse -oallow_other c");
        assert!(all.unwrap_err().contains("-b"));
        let all = call("a b -fn -svo ro,uid=1 -N 17 -t fuse.diskfuse -oallow_other").unwrap();
        assert_eq!(
            all.words,
            ["--daemonize", "-o", "ro,uid=1", "-o", "allow_other", "--", "a", "b"]
        );
        assert!(all.is_fake && all.is_sloppy);
        assert_eq!(all.namespace, Some("/proc/17/ns/mnt".into()));
        assert_eq!(call("a b -N /run/ns").unwrap().namespace, Some("/run/ns".into()));
        assert_eq!(call("-- -a -b").unwrap().words, ["--daemonize", "--", "-a", "-b"]);
        assert_eq!(call("-V").unwrap().words, ["-V"]);
        assert!(call("a b -o").unwrap_err().contains("-o needs a value"));
    }

    #[test]
    fn mount_fuse_leaves_its_mark() {
        let are =
            |line: &str| are_of_mount_fuse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert!(are("a b -o rw,dev,suid") && are("a b -o ro,nosuid,nodev,noexec"));
        assert!(!are("a b -o nodev") && !are("a b -o rw") && !are("a b dev,suid"));
    }

    #[test]
    fn a_process_is_known_by_its_name() {
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero();
        let name = std::fs::read_to_string(format!("/proc/{parent}/comm")).unwrap();
        assert!(descends_from(name.trim()));
        assert!(!descends_from("no-such-name"));
    }
}
