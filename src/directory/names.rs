//! File names for exports, whose names may be anything of up to 4096 bytes.
//!
//! A name stays as it is but for what no file name can have, or what moves a terminal: `/`, `.` and
//! `..` as a whole, control characters and their like; and `%`, by which they are escaped, as in a
//! URI. So it can be turned back. The default export, which has no name, is `%`, and what would be
//! longer than a file name is cut, and ends in `%~` and a checksum of it all: neither is an escape,
//! so no other export can have them.

use std::fmt::Write;

use crate::printable::is_unprintable;

/// As long as a file name can be, in bytes.
pub const LONGEST: usize = 255;
/// The file name of the default export.
pub const DEFAULT: &str = "%";

/// The name of an export's file.
pub fn file_name(export: &str) -> String {
    let is_of_folder = matches!(export, "." | "..");
    let escaped = |c: char| matches!(c, '/' | '%') || is_unprintable(c) || is_of_folder;
    let mut name = String::with_capacity(export.len());
    // Up to here it would have room for the end of one that is cut.
    let mut cut = 0;
    for c in export.chars() {
        match escaped(c) {
            true => c.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| {
                write!(name, "%{byte:02X}").expect("a string has room");
            }),
            false => name.push(c),
        }
        if name.len() <= LONGEST - "%~".len() - 8 {
            cut = name.len();
        }
    }
    if name.is_empty() {
        return DEFAULT.into();
    }
    if name.len() > LONGEST {
        name.truncate(cut);
        let checksum = crc32fast::hash(export.as_bytes());
        write!(name, "%~{checksum:08X}").expect("a string has room");
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use percent_encoding::percent_decode_str;

    #[test]
    fn names_that_files_can_have_stay() {
        for name in ["vm1", "größe 2.img", ".hidden", "...", "-r", "a:b\\c*", "~"] {
            assert_eq!(file_name(name), name);
        }
    }

    #[test]
    fn all_others_are_escaped_and_can_be_turned_back() {
        for (export, file) in [
            ("", "%"),
            (".", "%2E"),
            ("..", "%2E%2E"),
            ("/", "%2F"),
            ("a/b", "a%2Fb"),
            ("a%2Fb", "a%252Fb"),
            ("%", "%25"),
            ("%~12345678", "%25~12345678"),
            ("a\nb\0\u{7f}", "a%0Ab%00%7F"),
            ("\u{9b}2J\u{202e}", "%C2%9B2J%E2%80%AE"),
        ] {
            assert_eq!(file_name(export), file);
            let back = percent_decode_str(
                file.strip_prefix(DEFAULT).filter(|s| s.is_empty()).unwrap_or(file),
            );
            assert_eq!(back.decode_utf8().unwrap(), export);
        }
    }

    #[test]
    fn long_names_are_cut_between_characters_and_told_apart() {
        assert_eq!(file_name(&"a".repeat(255)), "a".repeat(255));
        let (one, other) = ("ä".repeat(200), "ä".repeat(201));
        for name in [&one, &other, &"/".repeat(4096), &format!("{}/", "x".repeat(254))] {
            let file = file_name(name);
            assert!(file.len() <= LONGEST && file.len() > LONGEST - 4, "{file}");
            assert_eq!(file.rfind("%~"), Some(file.len() - 10), "{file}");
            assert!(!file.contains('/'));
        }
        assert_ne!(file_name(&one), file_name(&other));
    }
}
