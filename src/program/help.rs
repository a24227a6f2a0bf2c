//! What --help prints: argh's own text has options without their values, and lines of any length.

use std::fmt::Write;

use argh::{CommandInfoWithArgs, FlagInfo, FlagInfoKind};

/// Columns of a terminal.
const WIDTH: usize = 80;
/// Where the descriptions of options begin.
const INDENT: usize = 24;

/// All that is known of the command line, after the lines that say how the program is called.
pub fn text(name: &str, usage: &str, info: &CommandInfoWithArgs) -> String {
    let mut text = format!("{usage}\n");
    wrap(&mut text, info.description, 0);
    text.push('\n');
    text.push_str("\nOptions:\n");
    // argh's own knows one of its two names.
    let help = FlagInfo {
        long: "--help",
        short: Some('h'),
        description: "print this",
        ..FlagInfo::default()
    };
    let others = info.flags.iter().filter(|flag| !flag.hidden && flag.long != help.long);
    for flag in others.chain([&help]) {
        option(&mut text, flag);
    }
    text.push_str("\nExamples:\n");
    for example in info.examples {
        for line in example.lines() {
            let line = format!("  {}", line.replace("{command_name}", name));
            let _ = writeln!(text, "{}", line.trim_end());
        }
    }
    for note in info.notes {
        text.push('\n');
        wrap(&mut text, note, 0);
        text.push('\n');
    }
    text.push_str("\nExit status:\n");
    for status in info.error_codes {
        let _ = writeln!(text, "  {} {}", status.code, status.description);
    }
    text
}

fn option(text: &mut String, flag: &FlagInfo) {
    let mut label = match flag.short {
        Some(short) => format!("  -{short}, {}", flag.long),
        None => format!("      {}", flag.long),
    };
    if let FlagInfoKind::Option { arg_name } = flag.kind {
        let _ = write!(label, " <{arg_name}>");
    }
    // Two spaces at least are between the two.
    if label.len() + 2 > INDENT {
        let _ = write!(text, "{label}\n{:INDENT$}", "");
    } else {
        let _ = write!(text, "{label:INDENT$}");
    }
    wrap(text, flag.description, INDENT);
    text.push('\n');
}

/// Goes on in a line of which `indent` columns are taken, and has as many empty ones in the next.
fn wrap(text: &mut String, words: &str, indent: usize) {
    let mut column = indent;
    for word in words.split_whitespace() {
        let len = word.chars().count();
        if column > indent && column + 1 + len > WIDTH {
            let _ = write!(text, "\n{:indent$}", "");
            column = indent;
        } else if column > indent {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_the_width() {
        let mut text = String::from("  ");
        wrap(&mut text, &"word ".repeat(40), 2);
        let longest = text.lines().map(str::len).max();
        assert_eq!(longest, Some(76));
        assert!(text.lines().all(|line| line.starts_with("  word") && line.ends_with("word")));
        let mut text = String::new();
        wrap(&mut text, &format!("a {} b", "x".repeat(100)), 0);
        assert_eq!(text.lines().count(), 3, "a word is not broken");
    }

    #[test]
    fn options_are_shown_with_their_values() {
        let mut flag = FlagInfo {
            long: "--size",
            short: Some('s'),
            kind: FlagInfoKind::Option { arg_name: "n" },
            description: "how much",
            ..FlagInfo::default()
        };
        let mut text = String::new();
        option(&mut text, &flag);
        assert_eq!(text, "  -s, --size <n>        how much\n");
        (flag.short, flag.kind) = (None, FlagInfoKind::Switch);
        flag.long = "--an-option-of-length";
        text.clear();
        option(&mut text, &flag);
        assert_eq!(text, format!("      --an-option-of-length\n{:24}how much\n", ""));
    }
}
