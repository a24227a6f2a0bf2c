//! Each way of not having FUSE over io_uring, with `--io-uring` auto, on and off.
//!
//! These tests change what the kernel allows to all, so they run one after the other, and cargo
//! runs no other test program meanwhile.

#[path = "../common/mod.rs"]
mod common;

use std::fs;
use std::process::{Command, ExitCode};

use common::ability::{self, Setting};
use common::export::{Ended, Export, Transport, binary};
use common::program;
use common::sandbox::Sandbox;
use common::seccomp;
use common::suite::{run_serially, trial};
use libtest_mimic::Trial;

/// A way of not having it.
struct Way {
    name: &'static str,
    /// A setting of the kernel, and its value
    setting: Option<(&'static str, &'static str)>,
    /// A system call, and the errno it gives
    denied: Option<(i64, i32)>,
    /// What the message of `on` names: the cause, or what to do about it
    says: &'static str,
}

const WAYS: &[Way] = &[
    Way {
        name: "switched_off",
        setting: Some((ability::RING_SWITCH, "N")),
        denied: None,
        says: ability::RING_SWITCH,
    },
    Way {
        name: "io_uring_disabled",
        setting: Some(("/proc/sys/kernel/io_uring_disabled", "2")),
        denied: None,
        says: "io_uring_disabled",
    },
    denied("setup_eperm", libc::SYS_io_uring_setup, libc::EPERM),
    denied("setup_enosys", libc::SYS_io_uring_setup, libc::ENOSYS),
    denied("setup_enomem", libc::SYS_io_uring_setup, libc::ENOMEM),
    denied("enter_eperm", libc::SYS_io_uring_enter, libc::EPERM),
];

const fn denied(name: &'static str, call: i64, errno: i32) -> Way {
    Way { name, setting: None, denied: Some((call, errno)), says: "--io-uring" }
}

fn main() -> ExitCode {
    let trials = WAYS.iter().flat_map(|way| {
        [
            way.trial("auto_serves_legacy_and_says_why", auto),
            way.trial("on_stops_with_the_cure", on),
            way.trial("off_never_tries", off),
        ]
    });
    let mut trials: Vec<Trial> = trials.collect();
    let needs = vec!["root", "uring"];
    trials.push(trial("kernel_without_it_is_no_news".into(), needs, kernel_without_it));
    run_serially(trials)
}

impl Way {
    fn trial(&'static self, name: &str, test: fn(&Way)) -> Trial {
        trial(format!("{}/{name}", self.name), vec!["root", "uring"], move || test(self))
    }

    /// Starts an export where this is the case.
    fn start(&self, option: &str, with: impl FnOnce(Result<Export, Ended>)) {
        let _setting = self.setting.map(|(path, value)| Setting::set(path, value));
        let sandbox = Sandbox::new();
        with(Export::try_start(
            "mem:1M",
            &sandbox.join("disk"),
            &[option],
            |command: &mut Command| {
                if let Some((call, errno)) = self.denied {
                    seccomp::deny(command, call, errno);
                }
            },
        ));
    }

    /// Asserts that it serves by /dev/fuse alone, and returns what it says about io_uring.
    fn serves_legacy(&self, option: &str) -> Vec<String> {
        let mut about = Vec::new();
        self.start(option, |started| {
            let export = started.unwrap_or_else(|ended| panic!("{}: {}", ended.status, ended.log));
            let mut export = export.only_by(Transport::Legacy);
            assert_eq!(fs::read(export.file()).unwrap(), [0; 1 << 20]);
            let ended = export.stop(libc::SIGTERM);
            ended.assert(0, &[]);
            assert!(ended.served(Transport::Legacy).reads > 0, "{}", ended.log);
            let lines =
                ended.log.lines().filter(|l| l.contains("uring") && !l.contains("served by"));
            about = lines.map(str::to_owned).collect();
        });
        about
    }
}

fn auto(way: &Way) {
    let about = way.serves_legacy("--io-uring=auto");
    assert_eq!(about.len(), 1, "one line says why: {about:?}");
}

fn on(way: &Way) {
    way.start("--io-uring=on", |started| {
        let ended = started.err().expect("it serves by what is not there");
        ended.assert(4, &[way.says, "io_uring", "--io-uring off"]);
    });
}

fn off(way: &Way) {
    assert_eq!(way.serves_legacy("--io-uring=off"), [""; 0], "it was not asked for");
}

/// A kernel that has none, which has no switch either: there is nothing to warn about.
fn kernel_without_it() {
    const HIDE: &str = r#"mount -t tmpfs none "${0%/*}" && exec "$@""#;
    let _setting = Setting::set(ability::RING_SWITCH, "N");
    let start = |option: &str, level: &str| {
        let mut command = program("unshare", ["--mount", "sh", "-c", HIDE, ability::RING_SWITCH]);
        command.args([binary(), option, "--run=head -c 4096 \"$DISKFUSE_FILE\"", "mem:1M"]);
        let output = command.env("RUST_LOG", level).output().unwrap();
        (output.status.code(), output.stdout.len(), String::from_utf8(output.stderr).unwrap())
    };
    for option in ["--io-uring=auto", "--io-uring=off"] {
        assert_eq!(start(option, "warn"), (Some(0), 4096, String::new()), "{option}");
    }
    let (_, _, told) = start("--io-uring=auto", "info");
    assert_eq!(told.matches("this kernel has none").count(), 1, "{told}");
    let (status, read, told) = start("--io-uring=on", "warn");
    assert_eq!((status, read), (Some(4), 0), "{told}");
    assert!(told.contains("Linux 6.14") && told.contains("--io-uring off"), "{told}");
}
