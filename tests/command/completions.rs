//! Whether --help, the man page, the completions and the tests know the same options.

use std::fs;
use std::path::{Path, PathBuf};

use libtest_mimic::Trial;

use crate::common::export::binary;
use crate::common::suite::trial;
use crate::common::{program, succeed};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("options/stand_everywhere".into(), vec![], stand_everywhere),
        trial("options/bash_completes_them".into(), vec![], bash_completes_them),
        trial("options/zsh_reads_its_completion".into(), vec!["zsh"], || reads("zsh", "_diskfuse")),
        trial("options/fish_reads_its_completion".into(), vec!["fish"], || {
            reads("fish", "diskfuse.fish")
        }),
    ]
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn completion(name: &str) -> PathBuf {
    repository("configs/completions").join(name)
}

/// The options of --help, without their dashes: of `-r, --read-only`, both.
fn options() -> Vec<String> {
    let help = succeed(&mut program(binary(), ["--help"]));
    let lines = help.lines().filter(|line| line.trim_start().starts_with('-'));
    let words =
        lines.flat_map(|line| line.split([' ', ',']).take_while(|word| !word.starts_with('<')));
    let options = words.filter_map(|word| word.strip_prefix("--").or(word.strip_prefix('-')));
    let mut options: Vec<String> = options.map(str::to_owned).collect();
    options.sort();
    options.dedup();
    assert!(options.len() > 25, "{options:?}");
    options
}

/// The options of a text, by what is before their names; single letters by another.
fn named<'a>(text: &'a str, long: &str, short: &str) -> Vec<&'a str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let name = |at: usize| {
        let rest = &text[at..];
        &rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())]
    };
    let all = |before: &str, is_short: bool| {
        let found = text.match_indices(before).map(|(at, _)| name(at + before.len()));
        let found =
            found.filter(move |name| !name.starts_with('-') && (name.len() == 1) == is_short);
        found.collect::<Vec<_>>()
    };
    [all(long, false), all(short, true)].concat()
}

fn stand_everywhere() {
    let read =
        |path: PathBuf| fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    let options = options();
    let places = [
        (repository("man/diskfuse.1"), "Fl -", "Fl "),
        (completion("diskfuse.bash"), "--", "-"),
        (completion("_diskfuse"), "--", "-"),
        (completion("diskfuse.fish"), "-l ", "-s "),
    ];
    for (path, long, short) in places {
        let text = read(path.clone());
        let there = named(&text, long, short);
        let missing: Vec<_> = options.iter().filter(|o| !there.contains(&o.as_str())).collect();
        assert!(missing.is_empty(), "{path:?} lacks {missing:?}");
    }
    // And the other way round.
    let fish = read(completion("diskfuse.fish"));
    for line in fish.lines().filter(|line| line.starts_with("complete ")) {
        let more: Vec<_> = named(line, "-l ", "-s ").into_iter().collect();
        assert!(
            more.iter().all(|more| options.iter().any(|o| o == more)),
            "{more:?} are no options"
        );
    }
    let mut tests = read(repository("src/program/cli/tests.rs"));
    for folder in ["tests/acceptance", "tests/command", "tests/ends", "tests/nbd"] {
        for entry in fs::read_dir(repository(folder)).unwrap() {
            tests += &read(entry.unwrap().path());
        }
    }
    for option in options {
        let is_tested = [format!("-{option}"), format!("{option}="), format!("{option},")];
        assert!(is_tested.iter().any(|word| tests.contains(word)), "no test has {option}");
    }
}

fn bash_completes_them() {
    let complete = |words: &[&str]| {
        let script = r#"source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _diskfuse; echo "${COMPREPLY[*]}""#;
        let mut bash = program("bash", ["-euc", script, "bash"]);
        bash.arg(completion("diskfuse.bash")).arg("diskfuse").args(words);
        succeed(bash.current_dir(repository("man"))).trim_end().to_owned()
    };
    for option in options() {
        let word = if option.len() == 1 { format!("-{option}") } else { format!("--{option}") };
        let completed = complete(&[&word]);
        assert!(completed.split(' ').any(|w| w == word), "{word}: {completed}");
    }
    assert_eq!(complete(&["--ca"]), "--cache");
    assert_eq!(complete(&["--cache", "write"]), "writethrough writeback");
    assert_eq!(complete(&["--cache", "=", "none"]), "none");
    assert_eq!(complete(&["--io-uring", "="]), "auto on off");
    assert_eq!(complete(&["diskf"]), "diskfuse.1");
    assert_eq!(complete(&["--size", "1"]), "");
}

fn reads(shell: &str, name: &str) {
    assert_eq!(succeed(program(shell, ["-n"]).arg(completion(name))), "");
}
