//! What is said where many programs' lines stand beside each other: in syslog, and in the journal.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Trial;

use crate::common::export::binary;
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{program, succeed};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("log/journal_gets_levels_and_no_time".into(), vec!["fuse"], journal),
        trial("log/syslog_gets_levels_names_and_processes".into(), vec!["root", "fuse"], syslog),
    ]
}

/// What `diskfuse --run true SOURCE` says on a stderr that JOURNAL_STREAM is told to be, or not.
fn said(source: &str, is_journal: bool) -> Vec<String> {
    let sandbox = Sandbox::new();
    let stderr = File::create(sandbox.join("stderr")).unwrap();
    let there = stderr.metadata().unwrap();
    let inode = there.ino() + u64::from(!is_journal);
    let mut command: Command = program(binary(), ["--run", "true", source]);
    command.env("RUST_LOG", "info").env("JOURNAL_STREAM", format!("{}:{inode}", there.dev()));
    let _ = command.stderr(stderr).status().unwrap();
    let text = fs::read_to_string(sandbox.join("stderr")).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn journal() {
    let lines = said("mem:1M", true);
    assert!(lines.len() > 1, "{lines:?}");
    for line in &lines {
        // Neither a time nor a level in words: both are the journal's to show.
        let rest = line.strip_prefix("<6>").unwrap_or_else(|| panic!("{line}"));
        assert!(rest.contains("mem:1M") && !rest.contains("info:"), "{line}");
        assert!(!rest.starts_with(|c: char| c.is_ascii_digit()), "{line}");
    }
    let last = said("/no/such/image", true).pop().unwrap();
    assert!(last.starts_with("<3>/no/such/image: "), "{last}");
    // It was given to another process, whose stderr it is.
    let last = said("/no/such/image", false).pop().unwrap();
    assert!(last.starts_with("diskfuse: /no/such/image: "), "{last}");
}

fn syslog() {
    // Its file is in use when it is asked to end.
    const SCRIPT: &str = r#"
        mount -t tmpfs none "$1/dev"
        mknod -m 666 "$1/dev/fuse" c 10 229
        mknod -m 666 "$1/dev/null" c 1 3
        ln -s "$1/log" "$1/dev/log"
        mount --bind "$1/dev" /dev
        cd "$1"
        "$2" --daemonize --pidfile pid mem:1M disk
        pid=$(cat pid)
        echo "$pid" > number
        kill -USR1 "$pid"
        exec 9< disk
        kill "$pid"
        for _ in {1..2000}; do [[ -e pid ]] || break; sleep 0.01; done
        [[ ! -e pid ]]
    "#;
    let sandbox = Sandbox::new();
    let log = UnixDatagram::bind(sandbox.join("log")).unwrap();
    log.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    fs::create_dir(sandbox.join("dev")).unwrap();
    let unshare = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut command = program("unshare", unshare);
    command.args(["bash", "-euc", SCRIPT, "bash"]).arg(sandbox.path()).arg(binary());
    succeed(&mut command);
    let mut lines = Vec::new();
    let mut line = [0; 4096];
    while let Ok(len) = log.recv(&mut line) {
        lines.push(String::from_utf8_lossy(&line[..len]).into_owned());
    }
    let number = fs::read_to_string(sandbox.join("number")).unwrap();
    let title = format!(" diskfuse[{}]: ", number.trim());
    // The facility is daemon (3 << 3): counters are information (6), what is in use a warning (4).
    for (priority, words) in [("<30>", "/dev/fuse"), ("<28>", "is still in use")] {
        let line = lines.iter().find(|line| line.contains(words));
        let line = line.unwrap_or_else(|| panic!("{words}: {lines:?}"));
        assert!(line.starts_with(priority) && line.contains(&title), "{line}");
        assert!(line.split_once(&title).unwrap().1.contains("mem:1M"), "{line}");
        assert!(!line.contains("diskfuse: "), "{line}");
    }
}
