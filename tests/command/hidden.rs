//! Whether it is said where nobody else can see the file.

use std::process::Command;

use libtest_mimic::Trial;

use crate::common::export::binary;
use crate::common::program;
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("hidden/mount_that_stays_in_a_namespace".into(), vec!["root", "fuse"], stays),
        trial("hidden/mount_that_others_see".into(), vec!["root", "fuse"], is_seen),
    ]
}

/// What diskfuse says that is started by `words`. Process 1 is another one's: its mounts are shared
/// in the folder.
fn said(sandbox: &Sandbox, words: &str) -> String {
    const SCRIPT: &str = r#"
        mount --bind "$1" "$1"
        mount --make-shared "$1"
        cd "$1"
        $3 "$2" --pidfile pid mem:1M disk &
        for _ in {1..2000}; do [[ -s pid ]] && break; sleep 0.01; done
        kill "$(cat pid)"
        wait "$!"
    "#;
    let unshare = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut command: Command = program("unshare", unshare);
    command.args(["bash", "-euc", SCRIPT, "bash"]).arg(sandbox.path()).arg(binary()).arg(words);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words}: {said}");
    said
}

fn stays() {
    let sandbox = Sandbox::new();
    let disk = sandbox.join("disk");
    let words = format!("{}: seen in this mount namespace only", disk.display());
    for propagation in ["private", "slave"] {
        let said = said(&sandbox, &format!("unshare --mount --propagation {propagation}"));
        assert!(said.contains(&words) && said.contains("PrivateTmp="), "{propagation}: {said}");
    }
    // Where process 1 cannot be seen: as with ProtectProc= in a unit.
    let script = "mount -t proc -o hidepid=ptraceable none /proc; exec \"$@\"";
    let file = sandbox.join("enter");
    std::fs::write(&file, script).unwrap();
    let enter = format!("unshare --mount --propagation slave bash {}", file.display());
    let said = said(&sandbox, &enter);
    assert!(said.contains(&words), "{said}");
}

fn is_seen() {
    let sandbox = Sandbox::new();
    for words in ["env", "unshare --mount --propagation unchanged"] {
        let said = said(&sandbox, words);
        assert!(!said.contains("namespace"), "{words}: {said}");
    }
}
