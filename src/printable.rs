//! Text of others (servers, paths, programs) made fit to be shown.

use std::borrow::Cow;

/// The text with escapes for what a terminal would carry out and a reader not see: control
/// characters, line ends among them, and those that turn the direction of writing. What a server
/// says must not pass for something else.
///
/// It is for where text leaves: until then the names of exports are what the server knows them by.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unprintable) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_unprintable(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// See [`printable`].
pub fn is_unprintable(c: char) -> bool {
    let ends_line = matches!(c, '\u{2028}' | '\u{2029}');
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || ends_line || turns
}

/// JSON leaves some in strings that are no control characters to it. Its own line ends are.
pub fn escaped_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c != '\n' && is_unprintable(c) {
            // None of them is beyond 16 bits.
            text.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            text.push(c);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_one_line_without_control_characters() {
        let evil = "a\nb\r\t\u{1b}[31mred\u{7f}\u{9b}2J \u{202e}txt.exe";
        let shown = printable(evil);
        assert_eq!(shown, r"a\nb\r\t\u{1b}[31mred\u{7f}\u{9b}2J \u{202e}txt.exe");
        let harmless = "größer als 'ein \\ Wort' \u{1f600}";
        assert!(matches!(printable(harmless), Cow::Borrowed(text) if text == harmless));
    }
}
