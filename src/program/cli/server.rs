//! `[ COMMAND ]` among the words: several of them, or one, as mount(8), fstab(5) and a variable of
//! a systemd unit can have it.

use super::args::takes_next_word;
use super::{UsageError, usage};

/// Stands for the server's command between the other words: where it is an operand, no other word
/// can be it.
pub(super) const SERVER: &str = "[";

/// A server's command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GivenServer {
    /// Its program and the words of that.
    pub(super) command: Vec<String>,
    /// The one word that it was given as, if it was.
    pub(super) word: Option<String>,
}

/// The words without the server's command, and that: it may hold options of its own. It stands
/// where a SOURCE may, and [`SERVER`] in its place.
pub(super) fn take_server(
    words: &[String],
) -> Result<(Vec<String>, Option<GivenServer>), UsageError> {
    let mut others = Vec::new();
    let mut server = None;
    let mut options_end = false;
    let mut rest = words;
    while let Some((word, behind)) = rest.split_first() {
        rest = behind;
        let given = if word == SERVER {
            let end = rest.iter().position(|word| word == "]").ok_or_else(no_end)?;
            let command = rest[..end].to_vec();
            rest = &rest[end + 1..];
            Some(GivenServer { command, word: None })
        } else if word.starts_with("[ ") {
            Some(GivenServer { command: split(word)?, word: Some(word.clone()) })
        } else {
            None
        };
        if let Some(given) = given {
            if given.command.first().is_none_or(String::is_empty) {
                return Err(usage(
                    "[ ]: the server's command is missing: [ qemu-nbd -f qcow2 FILE ]",
                ));
            }
            if server.replace(given).is_some() {
                return Err(usage("one SOURCE, not two servers"));
            }
            others.push(SERVER.into());
            continue;
        }
        others.push(word.clone());
        if word == "--" {
            options_end = true;
        } else if !options_end
            && takes_next_word(word)
            && !["--info", "--list"].contains(&word.as_str())
            && let Some((value, behind)) = rest.split_first()
        {
            others.push(value.clone());
            rest = behind;
        }
    }
    Ok((others, server))
}

fn no_end() -> UsageError {
    usage("the ] that ends the server's command is missing (for a file of that name: ./[)")
}

/// The words of `[ COMMAND ]`, parted as sh(1) does: by white space, where no quote or backslash is
/// before it.
fn split(word: &str) -> Result<Vec<String>, UsageError> {
    let inner = word.trim_end().strip_prefix("[ ").and_then(|rest| rest.strip_suffix(']'));
    let command = inner.filter(|inner| inner.is_empty() || inner.ends_with(char::is_whitespace));
    shlex::split(command.ok_or_else(no_end)?)
        .ok_or_else(|| usage(format!("{word}: a quote is not closed")))
}

/// The words in one line, which [`split`] parts again.
pub(super) fn quoted(command: &[String]) -> String {
    let is_plain = |word: &str| {
        let is_special = |c: char| c.is_whitespace() || "\\'\"#".contains(c);
        !word.is_empty() && !word.contains(is_special)
    };
    let quote = |word: &String| match is_plain(word) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    command.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn one_word_is_parted_as_by_a_shell() {
        for (text, expected) in [
            ("[ a ]", &["a"][..]),
            ("[  a\t-f \n b ] ", &["a", "-f", "b"]),
            ("[ a 'b  c' \"d ]\" e\\ f \\ ]", &["a", "b  c", "d ]", "e f", " "]),
            ("[ a u=http://h/#x '' [ ] ]", &["a", "u=http://h/#x", "", "[", "]"]),
            ("[ ]", &[]),
        ] {
            assert_eq!(split(text).unwrap(), expected, "{text}");
        }
        for (text, part) in [
            ("[ a", "the ] that ends"),
            ("[ a]", "the ] that ends"),
            ("[ a ] b", "the ] that ends"),
            ("[ a 'b ]", "a quote"),
        ] {
            match split(text) {
                Err(UsageError(why)) => assert!(why.contains(part), "{text}: {why}"),
                Ok(words) => panic!("{text}: {words:?}"),
            }
        }
    }

    #[test]
    fn what_is_shown_can_be_given_again() {
        for command in [
            &["qemu-nbd", "-f", "qcow2", "--x=y", "/srv/vm.qcow2"][..],
            &["a", "", "b c", "d'e\"f", "g\\", "#h", "ü\u{a0}", "i\nj", "]"],
        ] {
            let command = words(command);
            assert_eq!(split(&format!("[ {} ]", quoted(&command))).unwrap(), command);
        }
        assert_eq!(quoted(&words(&["a", "-f", "--x=y"])), "a -f --x=y");
    }
}
