//! The version, and what a package of Debian and a crate are made of.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::common::export::binary;
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{fail, program, succeed};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("package/version_names_the_commit".into(), vec![], version_names_the_commit),
        trial("package/every_file_exists".into(), vec![], every_file_exists),
        trial("package/nothing_is_left_out".into(), vec![], nothing_is_left_out),
        trial("package/changelog_has_this_version".into(), vec![], changelog_has_this_version),
        trial("package/rust_that_is_too_old_is_refused".into(), vec![], old_rust_is_refused),
    ]
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

/// What Cargo.toml says of the package, as cargo has understood it.
fn manifest() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version=1", "--no-deps", "--offline"]);
    let mut metadata: Value = serde_json::from_str(&succeed(command.current_dir(root()))).unwrap();
    metadata["packages"][0].take()
}

/// The files that the Debian package takes from here, and the binaries that cargo builds for it.
fn assets(manifest: &Value) -> (Vec<PathBuf>, Vec<String>) {
    let (mut files, mut binaries) = (Vec::new(), Vec::new());
    for asset in manifest["metadata"]["deb"]["assets"].as_array().expect("assets") {
        let Some([source, place, mode]) = asset.as_array().map(Vec::as_slice) else {
            // A link.
            let word = |name: &str| asset[name].as_str().unwrap_or_else(|| panic!("{asset}"));
            assert!(word("dest").starts_with("usr/") && word("link_name").starts_with("/usr/"));
            continue;
        };
        let [source, place, mode] =
            [source, place, mode].map(|word| word.as_str().unwrap_or_else(|| panic!("{asset}")));
        assert!(place.starts_with("usr/"), "{asset}");
        let built = source.strip_prefix("target/release/");
        assert_eq!(mode, if built.is_some() { "755" } else { "644" }, "{asset}");
        match built {
            Some(name) => binaries.push(name.to_owned()),
            None => files.push(root().join(source)),
        }
    }
    (files, binaries)
}

fn every_file_exists() {
    let manifest = manifest();
    let (files, binaries) = assets(&manifest);
    let made = root().join("target");
    for file in files.iter().filter(|file| !file.starts_with(&made)) {
        assert!(file.is_file(), "{}: is in the Debian package, but not here", file.display());
    }
    assert_eq!(binaries, ["diskfuse"]);
    let readme = manifest["readme"].as_str().expect("a readme");
    assert!(root().join(readme).is_file(), "{readme}");
}

/// A man page, a completion or a unit that is new.
fn nothing_is_left_out() {
    let (files, _) = assets(&manifest());
    for folder in ["man", "configs/completions", "configs/systemd", "configs/debian"] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            assert!(files.contains(&path), "{}: not in the Debian package", path.display());
        }
    }
}

fn changelog_has_this_version() {
    let changelog = fs::read_to_string(root().join("CHANGELOG.md")).unwrap();
    let section = concat!("\n## [", env!("CARGO_PKG_VERSION"), "] - ");
    assert!(changelog.contains(section), "{section:?} is missing");
}

/// Before anything is installed or built, and with the cure. Where there is none, too.
fn old_rust_is_refused() {
    let manifest = manifest();
    let wanted = manifest["rust_version"].as_str().expect("a version of Rust");
    for text in ["README.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(root().join(text)).unwrap();
        assert!(text.contains(&format!("Rust {wanted} or later")), "another than {wanted}");
    }
    let sandbox = Sandbox::new();
    let rust = || {
        let mut command = program(root().join("scripts/rust").to_str().unwrap(), [""; 0]);
        command.env("PATH", format!("{}:/usr/bin:/bin", sandbox.path().display()));
        command
    };
    let put = |version: &str| {
        for name in ["cargo", "rustc", "cc"] {
            let text = format!("#!/bin/sh\necho {name} {version} and more\n");
            fs::write(sandbox.join(name), text).unwrap();
            fs::set_permissions(sandbox.join(name), PermissionsExt::from_mode(0o755)).unwrap();
        }
    };
    for version in ["1.63.0", "1.9.0", "unknown"] {
        put(version);
        let said = fail(&mut rust());
        assert!(said.contains(&format!("Rust {wanted} or later")), "{version}: {said}");
        assert!(said.contains("apt-get install cargo-web"), "{version}: {said}");
    }
    for version in [&format!("{wanted}.0"), "1.100.1", "2.0.0-nightly"] {
        put(version);
        succeed(&mut rust());
    }
}
