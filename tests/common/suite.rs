//! Promises, run over transport × kind of source.

use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use super::ability::{self, Ability, Setting};
use super::export::{Ended, Export, Transport, binary};
use super::image::{Image, KINDS, Kind, patchy};
use super::sandbox::Sandbox;
use super::{USER, is_root};

/// What one test has: a transport, a kind of source, and a folder.
pub struct Case {
    pub transport: Transport,
    pub kind: &'static Kind,
    pub sandbox: Sandbox,
}

/// The size of most tests' disks, in bytes.
pub const SIZE: usize = 4 << 20;

impl Case {
    pub fn new(transport: Transport, kind: &'static Kind) -> Case {
        Case { transport, kind, sandbox: Sandbox::new() }
    }

    /// A disk of these bytes.
    pub fn image(&self, bytes: &[u8]) -> Image {
        self.kind.image(&self.sandbox, bytes)
    }

    /// A disk of [`patchy`] bytes.
    pub fn patchy(&self) -> Image {
        self.image(&patchy(SIZE))
    }

    /// What an export of [`Case::patchy`] shows.
    pub fn patchy_bytes(&self) -> Vec<u8> {
        if self.kind.visible { patchy(SIZE) } else { vec![0; SIZE] }
    }

    /// Exports it as `disk` in the sandbox; it ends when dropped.
    pub fn export(&self, image: &Image, options: &[&str]) -> Export {
        let started = self.try_export(image, options);
        started.unwrap_or_else(|ended| panic!("{}: {}", ended.status, ended.log))
    }

    pub fn try_export(&self, image: &Image, options: &[&str]) -> Result<Export, Ended> {
        let mountpoint = self.sandbox.join("disk");
        Export::try_start(&image.source, &mountpoint, &self.options(options), |_| ())
            .map(|export| export.only_by(self.transport))
    }

    /// With those of the transport and the kind of source.
    pub fn options<'a>(&self, options: &[&'a str]) -> Vec<&'a str> {
        [&[self.transport.option()], self.kind.options, options].concat()
    }
}

/// A test, and where it applies.
pub struct Promise {
    pub name: &'static str,
    pub test: fn(&Case),
    pub applies: fn(&Kind) -> bool,
    pub needs: &'static [Ability],
}

/// A list of promises: `module::test ["needs", ...] if |kind| kind.visible`.
#[macro_export]
macro_rules! promises {
    ($($module:ident :: $test:ident $([$($need:literal),*])? $(if $applies:expr)?),* $(,)?) => {
        vec![$($crate::common::suite::Promise {
            name: stringify!($test),
            test: $module::$test,
            applies: |_kind| true $(&& { let applies: fn(&Kind) -> bool = $applies; applies(_kind) })?,
            needs: &[$($($need),*)?],
        }),*]
    };
}

/// Runs promises over transport × kind; as root also as an ordinary user, by running this very
/// program.
pub fn run(promises: Vec<Promise>) -> ExitCode {
    let mut trials = Vec::new();
    for transport in Transport::ALL {
        for kind in KINDS {
            for promise in promises.iter().filter(|p| (p.applies)(kind)) {
                trials.push(promise.trial(transport, kind));
            }
        }
        if is_root() {
            for promise in promises.iter().filter(|p| p.is_for_users()) {
                trials.push(promise.trial_as_user(transport));
            }
        }
    }
    run_trials(trials)
}

/// Runs trials with FUSE over io_uring switched on.
pub fn run_trials(trials: Vec<Trial>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They wait for each other's disks and for clients' time to be up, more than they compute.
    arguments.test_threads.get_or_insert(4);
    run_with(arguments, trials)
}

/// The same, one after the other.
pub fn run_serially(trials: Vec<Trial>) -> ExitCode {
    run_with(Arguments { test_threads: Some(1), ..Arguments::from_args() }, trials)
}

fn run_with(arguments: Arguments, trials: Vec<Trial>) -> ExitCode {
    let _switch = (!arguments.list).then(|| Setting::set(ability::RING_SWITCH, "Y"));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A trial that is skipped where an ability is missing.
pub fn trial(name: String, needs: Vec<Ability>, test: impl FnOnce() + Send + 'static) -> Trial {
    trial_with(name, needs, || {
        test();
        Ok(Completion::Completed)
    })
}

fn trial_with(
    name: String,
    needs: Vec<Ability>,
    test: impl FnOnce() -> Result<Completion, Failed> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        for need in needs {
            match ability::missing(need) {
                Some(why) if ability::is_required(need) => {
                    return Err(format!("{need} is required: {why}").into());
                }
                Some(why) => return Ok(Completion::ignored_with(why)),
                None => {}
            }
        }
        test()
    })
}

/// The transport's ability comes first: without it nothing else matters.
pub fn needs_of(transport: Transport, needs: &[Ability]) -> Vec<Ability> {
    let ring: &[Ability] = if transport == Transport::Uring { &["uring"] } else { &[] };
    [ring, needs].concat()
}

impl Promise {
    fn name(&self, transport: Transport, kind: &str) -> String {
        format!("{}/{kind}/{}", transport.name(), self.name)
    }

    fn trial(&self, transport: Transport, kind: &'static Kind) -> Trial {
        // Pages of the cache can always be mapped.
        let applies = |need: &&Ability| !(**need == "mmap" && kind.is_cached());
        let own: Vec<Ability> = self.needs.iter().filter(applies).copied().collect();
        let needs = needs_of(transport, &[kind.needs, &own].concat());
        let test = self.test;
        trial(self.name(transport, kind.name), needs, move || test(&Case::new(transport, kind)))
    }

    fn is_for_users(&self) -> bool {
        (self.applies)(Kind::of("file"))
            && !self.needs.iter().any(|n| ["root", "loop", "user"].contains(n))
    }

    fn trial_as_user(&self, transport: Transport) -> Trial {
        let needs = needs_of(transport, &[self.needs, &["user"]].concat());
        let name = self.name(transport, "file");
        trial_with(self.name(transport, "user-file"), needs, move || run_as_user(&name))
    }
}

/// Runs one trial of this program as [`USER`], who mounts by fusermount3.
fn run_as_user(name: &str) -> Result<Completion, Failed> {
    let sandbox = Sandbox::new();
    // Where cargo builds may be out of the user's reach.
    let copy = |from: &std::path::Path, name: &str| {
        std::fs::copy(from, sandbox.join(name)).map(|_| sandbox.join(name))
    };
    let diskfuse = copy(binary().as_ref(), "diskfuse")?;
    let tests = copy(&std::env::current_exe()?, "tests")?;
    if let Some(fsx) = ability::find_program("fsx") {
        copy(&fsx, "fsx")?;
    }
    let path =
        format!("{}:{}", sandbox.path().display(), std::env::var("PATH").unwrap_or_default());
    sandbox.give_to(USER);
    let mut command = as_user(&sandbox);
    command
        .arg(tests)
        .args(["--exact", name])
        .env("DISKFUSE_BINARY", diskfuse)
        .env("TMPDIR", sandbox.path())
        .env("PATH", path)
        .current_dir(sandbox.path());
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    if said.contains("1 passed; 0 failed") {
        return Ok(Completion::Completed);
    }
    if output.status.success() && said.contains("1 ignored") {
        let why = said.lines().find_map(|line| Some(line.split_once("ignored (")?.1));
        return Ok(Completion::ignored_with(
            why.unwrap_or("it does not say why").trim_end_matches(')'),
        ));
    }
    Err(format!("{said}\n{}", String::from_utf8_lossy(&output.stderr)).into())
}

/// See [`as_uid`].
pub fn as_user(sandbox: &Sandbox) -> Command {
    as_uid(sandbox, USER)
}

/// A command that runs its arguments as an ordinary user, with mounts of its own, where /dev/fuse is open
/// to all: so it is on most machines, but not in containers, and `fusermount3` opens it with the
/// user's rights. And where fusectl is mounted, as on most machines.
pub fn as_uid(sandbox: &Sandbox, uid: u32) -> Command {
    const SCRIPT: &str = r#"
        set -e
        mkdir "$1/dev"
        mount -t tmpfs none "$1/dev"
        mknod -m 666 "$1/dev/fuse" c 10 229
        mount --bind "$1/dev/fuse" /dev/fuse
        umount -l "$1/dev"
        rmdir "$1/dev"
        mount -t fusectl none /sys/fs/fuse/connections
        shift
        exec setpriv --reuid "$1" --regid "$1" --clear-groups -- "${@:2}"
    "#;
    let mut command = Command::new("timeout");
    command.args(["-k", "2", "280", "unshare", "--mount", "bash", "-c", SCRIPT, "bash"]);
    command.arg(sandbox.path()).arg(uid.to_string()).stdin(Stdio::null());
    command
}
