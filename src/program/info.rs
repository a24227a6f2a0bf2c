//! `--info` and `--list`: what a source is, and what a server has, for people and for scripts.

use std::fs::OpenOptions;
use std::path::Path;

use serde::Serialize;

use crate::backend::Backend;
use crate::backend::file::{FileBackend, OpenError, Options, why_not_writable};
use crate::backend::nbd::info::ExportInfo;
use crate::partitions::{self, Table};
use crate::printable::{escaped_json, printable};

/// What is known of a local source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocalInfo {
    /// As it was named.
    pub source: String,
    /// "file", "block device" or "memory".
    pub kind: &'static str,
    /// In bytes.
    pub size: u64,
    /// Space in use, in bytes.
    pub allocated: u64,
    /// Nothing can be written.
    pub read_only: bool,
    /// It can be truncated, and grow.
    pub resizable: bool,
    /// The I/O size it prefers, in bytes.
    pub preferred_block_size: u32,
    /// If it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition_table: Option<Table>,
}

impl LocalInfo {
    /// Says what `path` is, without locking out who wants to write.
    pub fn look_at(path: &Path) -> Result<LocalInfo, OpenError> {
        let options = Options { read_only: true, ..Options::default() };
        let backend = FileBackend::open(path, options)?;
        let name = path.display().to_string();
        let info = LocalInfo::of(name, &backend)
            .map_err(|e| OpenError(format!("{}: {e}", path.display())))?;
        let writer = OpenOptions::new().write(true).open(path);
        let read_only = why_not_writable(&writer).is_some();
        Ok(LocalInfo { read_only, resizable: !read_only && !backend.is_device(), ..info })
    }

    /// Asks an open source.
    pub fn of(source: String, backend: &FileBackend) -> std::io::Result<LocalInfo> {
        let capabilities = backend.capabilities();
        Ok(LocalInfo {
            partition_table: partition_table(&source, backend),
            source,
            kind: backend.kind(),
            size: backend.size(),
            allocated: backend.stat()?.allocated_bytes,
            read_only: capabilities.read_only,
            resizable: capabilities.resizable,
            preferred_block_size: capabilities.preferred_io_bytes,
        })
    }
}

/// What is known of a remote source.
#[derive(Clone, Debug, Serialize)]
pub struct RemoteInfo {
    /// As it was named.
    pub source: String,
    /// "nbd"
    pub kind: &'static str,
    /// What the server tells.
    #[serde(flatten)]
    pub export: ExportInfo,
    /// If it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition_table: Option<Table>,
}

/// What a source has; one that is of no use is told of in the log.
pub fn partition_table<B: Backend>(name: &str, source: &B) -> Option<Table> {
    partitions::read(source).unwrap_or_else(|why| {
        log::warn!("{name}: {why}");
        None
    })
}

/// What a server has.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    /// Its exports.
    pub exports: Vec<ExportInfo>,
}

/// One `name: value` a line, or one JSON object; both from the same fields. Nothing in it moves a
/// terminal.
pub fn text(info: &impl Serialize, json: bool) -> Result<String, serde_json::Error> {
    if json {
        return Ok(escaped_json(&serde_json::to_string_pretty(info)?) + "\n");
    }
    Ok(lines(&serde_json::to_value(info)?, ""))
}

/// A value as indented lines.
fn lines(value: &serde_json::Value, indent: &str) -> String {
    use serde_json::Value;
    let one = |name: &str, value: &Value| match value {
        Value::Object(_) => format!("{indent}{name}:\n{}", lines(value, &format!("{indent}  "))),
        Value::Array(items) if items.iter().any(Value::is_object) => {
            let items = items.iter().map(|item| lines(item, &format!("{indent}  ")));
            format!("{indent}{name}:\n{}", items.collect::<Vec<_>>().join("\n"))
        }
        Value::Array(items) => {
            let items = items.iter().map(plain).collect::<Vec<_>>();
            format!("{indent}{name}: {}\n", items.join(", "))
        }
        value => format!("{indent}{name}: {}\n", plain(value)),
    };
    match value {
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| one(&name.replace('_', " "), value)).collect()
        }
        Value::Array(items) => {
            items.iter().map(|item| lines(item, indent)).collect::<Vec<_>>().join("\n")
        }
        value => format!("{indent}{}\n", plain(value)),
    }
}

fn plain(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::String(text) => printable(text).into_owned(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::Null => "unknown".into(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> LocalInfo {
        let backend = FileBackend::memory(65536, false).unwrap();
        LocalInfo::of("mem:64K".into(), &backend).unwrap()
    }

    #[test]
    fn text_has_a_line_for_each_field() {
        let text = text(&info(), false).unwrap();
        assert!(text.contains("source: mem:64K\n") && text.contains("size: 65536\n"), "{text}");
        assert!(text.contains("read only: no\n"), "{text}");
        assert_eq!(text.lines().count(), 7);
    }

    #[test]
    fn what_a_server_says_is_shown_and_not_carried_out() {
        let info = LocalInfo { source: "a\nsize: 1\u{1b}[2J\u{9b}2J\u{202e}".into(), ..info() };
        let shown = text(&info, false).unwrap();
        assert!(shown.starts_with("source: a\\nsize: 1\\u{1b}[2J\\u{9b}2J\\u{202e}\n"), "{shown}");
        let json = text(&info, true).unwrap();
        assert!(json.chars().all(|c| c == '\n' || !crate::printable::is_unprintable(c)), "{json}");
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["source"], info.source);
    }

    #[test]
    fn json_is_one_object() {
        let value: serde_json::Value = serde_json::from_str(&text(&info(), true).unwrap()).unwrap();
        assert_eq!(value["size"], 65536);
        assert_eq!(value["resizable"], true);
    }
}
