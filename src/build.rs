//! Puts the commit into what `--version` prints, where this is built from its git checkout.

use std::path::Path;
use std::process::Command;

fn git(words: &[&str]) -> Option<String> {
    let output = Command::new("git").args(words).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

/// The commit that is checked out. Sources that lie in the checkout of something else have none.
fn commit() -> Option<String> {
    git(&["rev-parse", "--show-prefix"]).filter(String::is_empty)?;
    git(&["rev-parse", "HEAD"])
}

fn main() {
    let mut version = std::env::var("CARGO_PKG_VERSION").expect("cargo sets it");
    println!("cargo::rerun-if-changed=src/build.rs");
    if let Some(commit) = commit() {
        version.push_str(&format!(" ({})", &commit[..7]));
        // A commit changes its branch, which is among the packed ones for a while. A path that is
        // missing would have everything built each time.
        let paths = ["HEAD", "refs/heads", "packed-refs"].into_iter();
        let paths = paths.filter_map(|path| git(&["rev-parse", "--git-path", path]));
        for path in paths.filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    println!("cargo::rustc-env=DISKFUSE_VERSION={version}");
}
