//! The command line: what it refuses, by which exit status and with which words.

#[path = "../common/mod.rs"]
mod common;
mod completions;
mod daemon;
mod helper;
mod hidden;
mod logs;
mod mounts;
mod package;
mod processes;
mod read_only;
mod service;
mod signals;
mod terminal;
mod top;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, ExitCode, Stdio};

use common::ability::Ability;
use common::export::{Export, binary};
use common::nbd::{Address, Server};
use common::sandbox::Sandbox;
use common::suite::{as_user, run_trials, trial};
use common::{USER, program, succeed};
use libtest_mimic::Trial;

/// A command line that is refused.
struct Refusal {
    name: &'static str,
    /// `{}` is the test's folder.
    words: &'static [&'static str],
    status: i32,
    /// In the message
    says: &'static [&'static str],
    needs: &'static [Ability],
    /// Prepares the folder.
    prepare: fn(&Sandbox),
    /// Who runs it, and where
    by: fn(&Sandbox) -> Command,
}

const USAGE: Refusal = Refusal {
    name: "",
    words: &[],
    status: 2,
    says: &["--help"],
    needs: &[],
    prepare: |_| (),
    by: |_| program("env", [""; 0]),
};
const PIDFILE: Refusal = Refusal { status: 1, says: &["not a pidfile"], ..USAGE };
const SOURCE: Refusal = Refusal { status: 3, ..USAGE };
const MOUNT: Refusal = Refusal { status: 4, ..USAGE };
const AS_USER: fn(&Sandbox) -> Command = |sandbox| {
    fs::copy(binary(), sandbox.join("diskfuse")).expect("there is space");
    sandbox.give_to(USER);
    as_user(sandbox)
};

const REFUSALS: &[Refusal] = &[
    Refusal { name: "no_operands", words: &[], says: &["SOURCE", "--help"], ..USAGE },
    Refusal { name: "no_mountpoint", words: &["mem:1M"], says: &["MOUNTPOINT"], ..USAGE },
    Refusal { name: "too_many", words: &["a", "b", "c"], says: &["c", "--help"], ..USAGE },
    Refusal {
        name: "bad_option",
        words: &["--bad", "mem:1M", "{}/disk"],
        says: &["--bad"],
        ..USAGE
    },
    Refusal {
        name: "misspelled_option",
        words: &["--readonly", "mem:1M", "{}/disk"],
        says: &["--readonly", "did you mean --read-only?", "--help"],
        ..USAGE
    },
    Refusal {
        name: "misspelled_mount_option",
        words: &["-o", "allow-others", "mem:1M", "{}/disk"],
        says: &["-o allow-others", "did you mean allow-other?"],
        ..USAGE
    },
    Refusal {
        name: "bad_io_uring",
        words: &["--io-uring=maybe", "mem:1M", "{}/disk"],
        says: &["--io-uring", "auto, on or off", "maybe"],
        ..USAGE
    },
    Refusal {
        name: "bad_queue_depth",
        words: &["--queue-depth=0", "mem:1M", "{}/disk"],
        says: &["--queue-depth", "from 1 to"],
        ..USAGE
    },
    Refusal {
        name: "bad_on_loss",
        words: &["-o", "on-loss=restart", "mem:1M", "{}/disk"],
        says: &["--on-loss", "wait or exit", "restart"],
        ..USAGE
    },
    Refusal {
        name: "bad_allow_other",
        words: &["--allow-other=x", "mem:1M", "{}/disk"],
        says: &["--allow-other", "auto, on or off"],
        ..USAGE
    },
    Refusal {
        name: "value_of_a_switch",
        words: &["--direct=yes", "mem:1M", "{}/disk"],
        says: &["--direct takes no value"],
        ..USAGE
    },
    Refusal {
        // `true` would be exported at the image.
        name: "value_of_a_switch_before_run",
        words: &["--read-only=true", "--run=true", "{}/image"],
        says: &["--read-only takes no value"],
        prepare: |sandbox| fs::write(sandbox.join("image"), [0; 4096]).unwrap(),
        ..USAGE
    },
    Refusal { name: "empty_source", words: &["", "{}/disk"], says: &["SOURCE"], ..USAGE },
    Refusal { name: "empty_mountpoint", words: &["mem:1M", ""], says: &["MOUNTPOINT"], ..USAGE },
    Refusal {
        name: "empty_pidfile",
        words: &["--pidfile=", "mem:1M", "{}/disk"],
        says: &["--pidfile"],
        ..USAGE
    },
    Refusal {
        name: "bad_mount_option",
        words: &["-o", "ro,nonsense", "mem:1M", "{}/disk"],
        says: &["nonsense"],
        ..USAGE
    },
    Refusal {
        name: "bad_owner",
        words: &["-o", "uid=me", "mem:1M", "{}/disk"],
        says: &["uid", "me"],
        ..USAGE
    },
    Refusal {
        name: "top_of_nothing",
        words: &["--top", "{}/disk"],
        says: &["/disk: No such file", "--mounts"],
        ..USAGE
    },
    Refusal {
        name: "top_of_an_image",
        words: &["--top", "--json", "{}/image"],
        says: &["/image: no file of diskfuse", "--mounts"],
        prepare: |sandbox| fs::write(sandbox.join("image"), [0; 4096]).unwrap(),
        ..USAGE
    },
    Refusal {
        name: "remount_of_nothing",
        words: &["-o", "remount,ro", "mem:1M", "{}/file"],
        says: &["file", "remounted", "nothing is mounted"],
        prepare: |sandbox| fs::write(sandbox.join("file"), "").unwrap(),
        ..MOUNT
    },
    Refusal { name: "bad_size", words: &["mem:lots", "{}/disk"], says: &["mem:SIZE"], ..USAGE },
    Refusal {
        name: "partition_and_offset",
        words: &["--partition=1", "-o", "offset=1M", "mem:4M", "{}/disk"],
        says: &["--partition", "leave out --offset and --size"],
        ..USAGE
    },
    Refusal {
        name: "growable_part",
        words: &["--growable", "--size=1M", "mem:4M", "{}/disk"],
        says: &["--growable", "fixed size"],
        ..USAGE
    },
    Refusal {
        name: "no_partition_table",
        words: &["--partition=1", "mem:1M", "{}/disk"],
        says: &["mem:1M", "no partition table", "--offset"],
        ..SOURCE
    },
    Refusal {
        name: "part_past_the_end",
        words: &["--offset=1M", "mem:1M", "{}/disk"],
        says: &["--offset 1M", "has 1M"],
        ..SOURCE
    },
    Refusal { name: "bad_scheme", words: &["ftp://x/y", "{}/disk"], says: &["ftp://"], ..USAGE },
    Refusal {
        name: "pidfile_is_something_else",
        words: &["--pidfile={}/precious", "--run=true", "mem:1M", "{}/disk"],
        says: &["precious", "not a pidfile"],
        prepare: |sandbox| fs::write(sandbox.join("precious"), "of great value").unwrap(),
        ..PIDFILE
    },
    Refusal {
        name: "pidfile_is_no_regular_file",
        words: &["--pidfile={}/pipe", "--run=true", "mem:1M", "{}/disk"],
        prepare: |sandbox| drop(succeed(&mut program("mkfifo", [sandbox.join("pipe")]))),
        ..PIDFILE
    },
    Refusal {
        name: "pidfile_is_the_source",
        words: &["--pidfile={}/image", "--run=true", "{}/image", "{}/disk"],
        prepare: |sandbox| fs::write(sandbox.join("image"), [0; 4096]).unwrap(),
        ..PIDFILE
    },
    Refusal {
        name: "pidfile_is_an_empty_source",
        words: &["--pidfile={}/link", "--growable", "--run=true", "{}/image", "{}/disk"],
        says: &["link", "SOURCE"],
        prepare: |sandbox| {
            fs::write(sandbox.join("image"), "").unwrap();
            std::os::unix::fs::symlink("image", sandbox.join("link")).unwrap();
        },
        ..PIDFILE
    },
    Refusal {
        name: "pidfile_is_the_mountpoint",
        words: &["--pidfile={}/disk", "--run=true", "mem:1M", "{}/disk"],
        says: &["disk", "MOUNTPOINT"],
        ..PIDFILE
    },
    Refusal {
        name: "pidfile_of_a_failed_start_goes",
        words: &["--pidfile={}/pid", "mem:1M", "{}/folder"],
        says: &["folder"],
        prepare: |sandbox| fs::create_dir(sandbox.join("folder")).unwrap(),
        ..MOUNT
    },
    Refusal {
        name: "pidfile_that_was_not_written_stays",
        words: &["--pidfile={}/pid", "mem:1M", "{}/folder"],
        says: &["folder"],
        prepare: |sandbox| {
            fs::create_dir(sandbox.join("folder")).unwrap();
            fs::write(sandbox.join("pid"), "1234\n").unwrap();
        },
        ..MOUNT
    },
    Refusal {
        name: "no_such_source",
        words: &["{}/missing.img", "{}/disk"],
        says: &["missing.img", "no such file", "truncate"],
        ..SOURCE
    },
    Refusal {
        name: "source_is_a_host_and_a_port",
        words: &["storage.invalid:10809", "{}/disk"],
        says: &["no such file", "nbd://storage.invalid:10809"],
        ..SOURCE
    },
    Refusal {
        name: "source_is_a_host_and_an_export",
        words: &["--info", "storage.invalid/vm1"],
        says: &["no such file", "nbd://storage.invalid/vm1"],
        ..SOURCE
    },
    Refusal { name: "help_is_a_name", words: &["help", "help"], says: &["help"], ..SOURCE },
    Refusal {
        name: "source_is_a_directory",
        words: &["{}", "{}/disk"],
        says: &["directory"],
        ..SOURCE
    },
    Refusal {
        name: "source_is_a_character_device",
        words: &["/dev/null", "{}/disk"],
        says: &["/dev/null", "regular file", "block device"],
        ..SOURCE
    },
    Refusal {
        // To open it would wait for whoever writes to it.
        name: "source_is_a_pipe",
        words: &["{}/pipe", "{}/disk"],
        says: &["pipe", "regular file", "block device"],
        prepare: |sandbox| drop(succeed(&mut program("mkfifo", [sandbox.join("pipe")]))),
        ..SOURCE
    },
    Refusal {
        name: "source_without_permission",
        words: &["{}/image", "{}/disk"],
        says: &["image", "permission denied", "readable"],
        needs: &["user"],
        prepare: |sandbox| {
            use std::os::unix::fs::PermissionsExt;
            fs::write(sandbox.join("image"), "x").unwrap();
            fs::set_permissions(sandbox.join("image"), fs::Permissions::from_mode(0o600)).unwrap();
        },
        by: AS_USER,
        ..SOURCE
    },
    Refusal {
        // Its length is said to be a page; it holds a number.
        name: "source_shorter_than_it_claims",
        words: &["/sys/kernel/uevent_seqnum", "{}/disk"],
        says: &["uevent_seqnum", "shorter than it claims"],
        ..SOURCE
    },
    Refusal {
        name: "mountpoint_is_a_directory",
        words: &["mem:1M", "{}/folder"],
        says: &["folder", "directory", "regular file"],
        prepare: |sandbox| fs::create_dir(sandbox.join("folder")).unwrap(),
        ..MOUNT
    },
    Refusal {
        name: "mountpoint_is_a_device",
        words: &["mem:1M", "/dev/null"],
        says: &["/dev/null", "regular file"],
        ..MOUNT
    },
    Refusal {
        name: "mountpoint_without_folder",
        words: &["mem:1M", "{}/missing/disk"],
        says: &["missing/disk", "folder", "mkdir"],
        ..MOUNT
    },
    Refusal {
        name: "mountpoint_is_a_link_to_nowhere",
        words: &["mem:1M", "{}/link"],
        says: &["link", "nowhere"],
        prepare: |sandbox| std::os::unix::fs::symlink("nowhere", sandbox.join("link")).unwrap(),
        ..MOUNT
    },
    Refusal {
        name: "mountpoint_has_something_else_mounted",
        words: &["mem:1M", "{}/busy"],
        says: &["busy", "already"],
        needs: &["root"],
        prepare: |sandbox| fs::write(sandbox.join("busy"), "").unwrap(),
        by: |sandbox| {
            let mut command = in_own_mounts(r#"mount --bind "$1" "$1" && shift && exec "$@""#);
            command.arg(sandbox.join("busy"));
            command
        },
        ..MOUNT
    },
    Refusal {
        name: "mountpoint_not_writable",
        words: &["mem:1M", "{}/theirs"],
        says: &["theirs", "not writable", "chmod"],
        needs: &["user"],
        prepare: |sandbox| fs::write(sandbox.join("theirs"), "").unwrap(),
        by: AS_USER,
        ..MOUNT
    },
    Refusal {
        name: "mountpoint_cannot_be_created",
        words: &["mem:1M", "/etc/disk"],
        says: &["/etc/disk", "cannot be created"],
        needs: &["user"],
        by: AS_USER,
        ..MOUNT
    },
    Refusal {
        name: "no_dev_fuse",
        words: &["mem:1M", "{}/disk"],
        says: &["/dev/fuse", "modprobe fuse"],
        needs: &["root"],
        by: |_| in_own_mounts(r#"mount -t tmpfs none /dev && exec "$@""#),
        ..MOUNT
    },
    Refusal {
        name: "no_fusermount3",
        words: &["mem:1M", "{}/disk"],
        says: &["fusermount3", "fuse3"],
        needs: &["user"],
        by: |sandbox| {
            let mut command = AS_USER(sandbox);
            command.args(["/usr/bin/env", "PATH=/nowhere"]);
            command
        },
        ..MOUNT
    },
    Refusal {
        name: "allow_other_not_allowed",
        words: &["--allow-other=on", "mem:1M", "{}/disk"],
        says: &["user_allow_other", "--allow-other"],
        needs: &["user"],
        by: |sandbox| {
            fs::write(sandbox.join("conf"), "").unwrap();
            let mut command =
                in_own_mounts(r#"mount --bind "$1" /etc/fuse.conf && shift && exec "$@""#);
            command.arg(sandbox.join("conf"));
            let user = AS_USER(sandbox);
            command.arg(user.get_program()).args(user.get_args());
            command
        },
        ..MOUNT
    },
];

/// Names and contents of all that is in the folder; of what is no regular file, the names.
fn contents(sandbox: &Sandbox) -> Vec<(String, Option<Vec<u8>>)> {
    let content = |name: String| {
        let path = sandbox.join(&name);
        let bytes = path.is_file().then(|| fs::read(path).expect("readable"));
        (name, bytes)
    };
    sandbox.names().into_iter().map(content).collect()
}

/// A command that runs its arguments in a mount namespace that `script` has prepared.
fn in_own_mounts(script: &str) -> Command {
    program("unshare", ["--mount", "bash", "-ec", script, "bash"])
}

fn main() -> ExitCode {
    let refusals = REFUSALS.iter().map(|refusal| {
        let test = move || is_refused(refusal);
        trial(format!("refused/{}", refusal.name), refusal.needs.to_vec(), test)
    });
    let others = [
        trial("help_and_version_are_printed".into(), vec![], help_and_version_are_printed),
        trial("help_names_every_exit_status".into(), vec![], help_names_every_exit_status),
        trial("lost_output_is_a_failure".into(), vec!["nbd", "nbdkit"], lost_output_is_a_failure),
        trial("read_only_outweighs_rw".into(), vec!["fuse"], read_only_outweighs_rw),
        trial(
            "mount_and_fstab_know_it".into(),
            vec!["root", "fuse", "mount.fuse3", "findmnt", "nbdkit"],
            mount_and_fstab_know_it,
        ),
        trial(
            "read_only_export_is_not_remounted_writable".into(),
            vec!["root", "fuse"],
            read_only_export_is_not_remounted_writable,
        ),
        trial("other_names_need_a_link".into(), vec!["fuse"], other_names_need_a_link),
        trial("nothing_is_said_without_need".into(), vec!["fuse"], nothing_is_said_without_need),
        trial(
            "other_formats_are_shown_raw_with_a_warning".into(),
            vec!["fuse", "qemu-img"],
            other_formats_are_shown_raw_with_a_warning,
        ),
    ];
    let elsewhere = processes::trials().into_iter().chain(signals::trials());
    let elsewhere = elsewhere.chain(daemon::trials()).chain(helper::trials());
    let elsewhere = elsewhere.chain(mounts::trials()).chain(hidden::trials());
    let elsewhere = elsewhere.chain(read_only::trials()).chain(terminal::trials());
    let elsewhere = elsewhere.chain(top::trials());
    let elsewhere = elsewhere.chain(logs::trials()).chain(service::trials());
    let elsewhere = elsewhere.chain(completions::trials()).chain(package::trials());
    let trials: Vec<Trial> = refusals.chain(others).chain(elsewhere).collect();
    run_trials(trials)
}

fn is_refused(refusal: &Refusal) {
    let sandbox = Sandbox::new();
    (refusal.prepare)(&sandbox);
    let mut command = (refusal.by)(&sandbox);
    let before = contents(&sandbox);
    let copy = sandbox.join("diskfuse");
    command.arg(if copy.exists() { copy.as_path() } else { binary().as_ref() });
    let folder = sandbox.path().to_str().expect("UTF-8");
    command.args(refusal.words.iter().map(|word| word.replace("{}", folder)));
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(refusal.status), "{said}");
    for word in refusal.says {
        assert!(said.contains(word), "{word:?} is missing: {said}");
    }
    assert!(said.starts_with("diskfuse: ") && said.lines().count() <= 2, "{said}");
    assert!(output.stdout.is_empty());
    assert!(contents(&sandbox) == before, "not as it was: {:?}", sandbox.names());
}

fn help_and_version_are_printed() {
    let print = |option: &str| {
        let output = program(binary(), [option]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let help = print("--help");
    for word in ["SOURCE", "MOUNTPOINT", "mem:SIZE", "--io-uring", "--read-only", "--growable"] {
        assert!(help.contains(word), "{word} is missing: {help}");
    }
    for line in ["Usage: diskfuse ", "  diskfuse nbd://", "  -h, --help  ", "  -V, --version  "] {
        assert!(help.contains(line), "{line} is missing: {help}");
    }
    for usage in ["--info SOURCE", "--list URI", "--mounts", "--top [FILE...]"] {
        assert!(help.contains(&format!("\n       diskfuse {usage} [--json]\n")), "{usage}: {help}");
    }
    assert_eq!((print("-h"), print("-V")), (help, print("--version")));
    assert!(print("--version").starts_with(concat!("diskfuse ", env!("CARGO_PKG_VERSION"))));
}

fn help_names_every_exit_status() {
    let output = program(binary(), ["--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    for status in 0..=4 {
        let line = |line: &str| line.trim_start().starts_with(&format!("{status} "));
        assert!(help.lines().any(line), "{status} is missing: {help}");
    }
}

fn nothing_is_said_without_need() {
    let sandbox = Sandbox::new();
    let run = ["--run", r#"cmp -n 1M "$DISKFUSE_FILE" /dev/zero"#, "mem:1M"];
    let output = program(binary(), run).arg(sandbox.join("disk")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
}

fn other_formats_are_shown_raw_with_a_warning() {
    let sandbox = Sandbox::new();
    for (format, other) in
        [("qcow2", true), ("vmdk", true), ("vhdx", true), ("vdi", true), ("raw", false)]
    {
        let image = sandbox.join(format);
        succeed(program("qemu-img", ["create", "-q", "-f", format]).arg(&image).arg("1M"));
        let cmp = format!(r#"cmp "$DISKFUSE_FILE" "{}""#, image.display());
        for words in [&["-r", "--run", &cmp][..], &["--info"]] {
            let output = program(binary(), words).arg(&image).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.success(), "{words:?}: {said}");
            assert_eq!(said.lines().count(), usize::from(other), "{words:?}: {said}");
            let command =
                format!("diskfuse [ qemu-nbd -f {format} {} ] MOUNTPOINT", image.display());
            assert_eq!(said.contains(&command), other, "{words:?}: {said}");
        }
    }
}

fn read_only_outweighs_rw() {
    let sandbox = Sandbox::new();
    let image = sandbox.join("image");
    fs::write(&image, [7; 4096]).unwrap();
    let write = "! printf x 2>/dev/null 1<>\"$DISKFUSE_FILE\"";
    for options in [["-r", "-o", "rw"], ["-o", "rw", "-r"]] {
        succeed(program(binary(), options).args(["--run", write]).arg(&image));
        assert!(fs::read(&image).unwrap() == [7; 4096], "{options:?}");
    }
}

fn mount_and_fstab_know_it() {
    // mount(8) clears PATH: the program has to be where a shell looks without it.
    const SCRIPT: &str = r#"
        mount -t tmpfs none /usr/local/bin
        ln -s "$1" /usr/local/bin/diskfuse
        cd "$2"
        check() {
            cmp image disk
            umount disk
            for _ in {1..2000}; do [[ -e pid ]] || break; sleep 0.01; done
            [[ ! -e pid ]]
        }
        mount -t fuse.diskfuse -o daemonize,noatime,pidfile="$PWD/pid" "$PWD/image" "$PWD/disk"
        check
        mount -T fstab "$PWD/disk"
        for _ in 1 2; do
            mount -o remount,ro "$PWD/disk"
            ! { echo x 1<> disk; } 2> error
            grep -q 'Read-only file system' error
            cmp image disk
            mount -T fstab -o remount,rw "$PWD/disk"
            printf x 1<> disk
        done
        exec 9<> disk
        ! mount -o remount,ro "$PWD/disk" 2> error
        grep -q 'open for writing' error
        exec 9>&-
        rm error
        check
        # All of it, twice: what is there already is known again.
        mount -T fstabs -a
        for _ in 1 2 3; do mount -T fstabs -a; done
        for disk in memory by-link remote; do
            cmp -n 4096 "$disk" "/dev/zero"
            [[ $(findmnt -n --mountpoint "$disk" | wc -l) == 1 ]]
            umount "$disk"
            for _ in {1..2000}; do [[ -e $disk.pid ]] || break; sleep 0.01; done
            [[ ! -e $disk.pid ]]
        done
    "#;
    let sandbox = Sandbox::new();
    fs::write(sandbox.join("image"), [7; 4096]).unwrap();
    fs::write(sandbox.join("disk"), "").unwrap();
    let manual = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/man/diskfuse.1"));
    let manual = manual.expect("it is in the repository");
    let line = manual.lines().find(|line| line.contains(" fuse.diskfuse ")).expect("an example");
    let folder = sandbox.path().to_str().expect("UTF-8");
    let line = line
        .replace("/srv/vm1.img", &format!("{folder}/image"))
        .replace("/srv/vm1", &format!("{folder}/disk"))
        .replace("nofail", &format!("nofail,pidfile={folder}/pid"));
    fs::write(sandbox.join("fstab"), line + "\n").unwrap();
    let address = Address::unix(&sandbox);
    let _server = Server::nbdkit(&address, ["memory", "1M"]);
    fs::write(sandbox.join("zeroes"), [0; 4096]).unwrap();
    std::os::unix::fs::symlink("zeroes", sandbox.join("link")).unwrap();
    let line = |source: &str, disk: &str| {
        fs::write(sandbox.join(disk), "").unwrap();
        let pid = format!("{folder}/{disk}.pid");
        format!("{source} {folder}/{disk} fuse.diskfuse daemonize,pidfile={pid} 0 0\n")
    };
    // In other words than the program's own.
    let uri = address.uri("").replace("nbd+unix:///?", "nbd+unix://?");
    let lines = [
        line("mem:1M", "memory"),
        line(&format!("{folder}/./link"), "by-link"),
        line(&uri, "remote"),
    ];
    fs::write(sandbox.join("fstabs"), lines.concat()).unwrap();
    // The first process of a PID namespace takes all others with it.
    let unshare = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut command = program("unshare", unshare);
    succeed(command.args(["bash", "-ec", SCRIPT, "bash", binary()]).arg(sandbox.path()));
}

/// The kernel would let it be written, and the program would not.
fn read_only_export_is_not_remounted_writable() {
    let sandbox = Sandbox::new();
    let mut export = Export::try_start("mem:1M", &sandbox.join("disk"), &["-r"], |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log));
    let remount = |options: &str| {
        let mut command = program(binary(), ["-o", options, "mem:1M"]);
        let output = command.arg(export.file()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(remount("remount,ro"), (Some(0), String::new()));
    let (status, said) = remount("remount,rw");
    assert!(status == Some(4) && said.contains("exported read-only"), "{said}");
    export.stop(libc::SIGTERM).assert(0, &[]);
}

fn lost_output_is_a_failure() {
    let sandbox = Sandbox::new();
    let address = Address::unix(&sandbox);
    let _server = Server::nbdkit(&address, ["memory", "1M"]);
    let (info, list) = (["--info", "mem:1M"], ["--list", &address.uri("")]);
    for words in [&info[..], &[&info[..], &["--json"]].concat(), &list, &["--help"]] {
        let full = fs::File::options().write(true).open("/dev/full").expect("every Linux has it");
        let output = program(binary(), words).stdout(full).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        let expected = "diskfuse: standard output: No space left on device";
        assert!(said.starts_with(expected), "{words:?}: {said}");

        // No failure: nobody wants the rest.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = program(binary(), words).stdout(writer).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{words:?}: {output:?}");
    }
}

fn other_names_need_a_link() {
    let sandbox = Sandbox::new();
    let make = |name: &[u8], link: &str, content: &[u8]| {
        let path = sandbox.path().join(OsStr::from_bytes(name));
        fs::write(&path, content).unwrap();
        std::os::unix::fs::symlink(&path, sandbox.join(link)).unwrap();
        path
    };
    let image = make(b"image-\xff", "image", &[7; 4096]);
    let disk = make(b"disk-\xff", "disk", b"");
    for words in [[&image, &sandbox.join("disk")], [&sandbox.join("image"), &disk]] {
        let output = program(binary(), ["--run", "true"]).args(words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("not UTF-8") && said.contains("symbolic link"), "{said}");
    }
    let run = ["--run", r#"cmp image "$DISKFUSE_FILE" && cmp image disk"#, "image", "disk"];
    succeed(program(binary(), run).current_dir(sandbox.path()));
}
