//! The version.

use std::path::Path;
use std::process::Command;

use libtest_mimic::Trial;

use crate::common::export::binary;
use crate::common::suite::trial;
use crate::common::{program, succeed};

pub fn trials() -> Vec<Trial> {
    vec![trial("package/version_names_the_commit".into(), vec![], version_names_the_commit)]
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn git(words: &[&str]) -> Option<String> {
    let output = Command::new("git").args(words).current_dir(root()).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

fn version_names_the_commit() {
    let printed = succeed(&mut program(binary(), ["--version"]));
    let version = printed.strip_prefix(concat!("diskfuse ", env!("CARGO_PKG_VERSION")));
    let version = version.unwrap_or_else(|| panic!("{printed:?}"));
    if git(&["rev-parse", "--show-prefix"]).is_some_and(|prefix| prefix.is_empty()) {
        let commit = version.strip_prefix(" (").and_then(|rest| rest.strip_suffix(")\n"));
        let commit = commit.unwrap_or_else(|| panic!("no commit: {printed:?}"));
        assert_eq!(commit.len(), 7, "{printed:?}");
        // Somebody may have committed since it was built.
        let known = git(&["rev-parse", "--verify", &format!("{commit}^{{commit}}")]);
        assert!(known.is_some_and(|hash| hash.starts_with(commit)), "{printed:?}");
    } else {
        assert_eq!(version, "\n");
    }
}
