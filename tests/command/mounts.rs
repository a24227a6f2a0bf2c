//! `--mounts`: what is served, dead or hung, in bounded time.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::common::export::{Export, Transport, binary};
use crate::common::sandbox::Sandbox;
use crate::common::suite::{needs_of, trial};
use crate::common::{program, succeed};

pub fn trials() -> Vec<Trial> {
    let each = |transport: Transport| {
        let name = format!("{}/mounts_are_listed", transport.name());
        trial(name, needs_of(transport, &["fuse"]), move || mounts_are_listed(transport))
    };
    let moved = ["--bind", "--move"].map(|how| {
        let name = format!("mounts/{}_is_served_where_it_is", how.trim_matches('-'));
        trial(name, vec!["fuse", "root"], move || is_served_elsewhere(how))
    });
    Transport::ALL.map(each).into_iter().chain(moved).collect()
}

/// What others have moved or bound is served there, and unmounted there at the end.
fn is_served_elsewhere(how: &str) {
    let sandbox = Sandbox::new();
    // A mount below one that is shared cannot be moved.
    let folder = sandbox.join("private");
    std::fs::create_dir(&folder).unwrap();
    succeed(program("mount", ["-t", "tmpfs", "none"]).arg(&folder));
    succeed(program("mount", ["--make-private"]).arg(&folder));
    let (disk, other) = (folder.join("disk"), folder.join("other"));
    std::fs::write(&other, "").unwrap();
    let start = || Export::try_start("mem:64K", &disk, &[], |_| ());
    let mut export = start().unwrap_or_else(|ended| panic!("{}", ended.log));
    succeed(program("mount", [how]).args([&disk, &other]));
    if how == "--bind" {
        succeed(program("umount", [""; 0]).arg(&disk));
    }
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(std::fs::read(&other).unwrap(), vec![0; 64 << 10]);
    export.stop(libc::SIGTERM).assert(0, &["is at"]);
    assert_eq!(std::fs::read(&other).unwrap(), b"");
    // Its end is that of the last one of its mounts.
    let mut export = start().unwrap_or_else(|ended| panic!("{}", ended.log));
    succeed(program("mount", ["--bind"]).args([&disk, &other]));
    succeed(program("umount", [""; 0]).arg(&disk));
    succeed(program("umount", [""; 0]).arg(&other));
    export.ended_within(Duration::from_secs(10)).assert(0, &[]);
    succeed(program("umount", [""; 0]).arg(&folder));
}

fn export(sandbox: &Sandbox, name: &str, transport: Transport) -> Export {
    Export::try_start("mem:64K", &sandbox.join(name), &[transport.option()], |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log))
}

/// Those of this test: others go on beside it.
fn listed(sandbox: &Sandbox) -> Vec<Value> {
    let text = succeed(&mut program(binary(), ["--mounts", "--json"]));
    let all: Value = serde_json::from_str(&text).unwrap();
    let folder = sandbox.path().to_str().unwrap();
    let is_here = |mount: &&Value| mount["file"].as_str().unwrap().starts_with(folder);
    all["mounts"].as_array().unwrap().iter().filter(is_here).cloned().collect()
}

fn mounts_are_listed(transport: Transport) {
    let sandbox = Sandbox::new();
    assert_eq!(listed(&sandbox), [json!(null); 0]);
    let names = ["served one", "dead", "hung"];
    let [served, mut dead, hung] = names.map(|name| export(&sandbox, name, transport));
    dead.kill(libc::SIGKILL);
    dead.wait_whatever_is_left();
    hung.kill(libc::SIGSTOP);
    let begun = Instant::now();
    let listed = listed(&sandbox);
    let text = succeed(&mut program(binary(), ["--mounts"]));
    // Twice three seconds; a thread that asks may wait on.
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    hung.kill(libc::SIGCONT);

    let title = if transport == Transport::Uring { "io_uring" } else { "/dev/fuse" };
    let line = |name: &str, pid: Option<u32>, transport: Option<&str>, state: &str| {
        let file = sandbox.join(name);
        json!({ "source": "mem:64K", "file": file.to_str().unwrap(), "pid": pid,
                "transport": transport, "state": state })
    };
    let expected = [
        line(names[0], Some(served.pid()), Some(title), "served"),
        line(names[1], None, None, "dead: nobody serves it"),
        line(names[2], None, None, "no answer"),
    ];
    assert_eq!(listed, expected);

    let (file, pid) = (sandbox.join(names[0]), served.pid().to_string());
    let is_it = |line: &&str| line.contains(file.to_str().unwrap());
    let words: Vec<_> = text.lines().find(is_it).unwrap().split_whitespace().collect();
    assert_eq!((words[0], &words[words.len() - 3..]), ("mem:64K", &[&pid, title, "served"][..]));
    assert!(text.starts_with("SOURCE") && !text.as_bytes().contains(&0x1b), "{text}");
}
