//! `--mounts`: what is served here, by whomever.

use std::io;
use std::time::Duration;

use serde::Serialize;

use crate::mount::table::{self, Mounted};
use crate::printable::printable;
use crate::program::ask::{Answer, Asker};
use crate::program::info;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(3);

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Line {
    source: String,
    file: String,
    /// The serving process, in its own words.
    pid: Option<u64>,
    transport: Option<String>,
    state: String,
}

/// All mounts of this program in this mount namespace, as text or JSON.
pub fn list(json: bool) -> io::Result<String> {
    let mounts = table::all()?;
    let asked = mounts.iter().filter(|mount| !mount.is_covered);
    let mut asker = Asker::start(asked.map(|mount| mount.path.as_path()))?;
    let mut answers = asker.ask(LIMIT)?.into_iter().map(|told| told.map(|told| told.answer));
    let mut answer = |mount: &Mounted| match mount.is_covered {
        true => line(mount, "covered by another mount".into()),
        false => told(mount, answers.next().flatten()),
    };
    let lines: Vec<_> = mounts.iter().map(&mut answer).collect();
    match json {
        true => Ok(info::text(&serde_json::json!({ "mounts": lines }), true)?),
        false => Ok(table(&lines)),
    }
}

fn line(mount: &Mounted, state: String) -> Line {
    let file = mount.path.display().to_string();
    Line { source: mount.source.clone(), file, pid: None, transport: None, state }
}

fn told(mount: &Mounted, answer: Option<Answer>) -> Line {
    match answer {
        Some(Ok(report)) => Line {
            pid: report["pid"].as_u64(),
            transport: report["transport"].as_str().map(str::to_owned),
            ..line(mount, "served".into())
        },
        other => line(mount, what_is_wrong(other.and_then(Result::err))),
    }
}

/// Why there is no report, by the errno, if one came.
pub fn what_is_wrong(errno: Option<i32>) -> String {
    match errno {
        None => "no answer".into(),
        Some(libc::ENOTCONN | libc::ECONNABORTED) => "dead: nobody serves it".into(),
        Some(libc::EACCES | libc::EPERM) => "another user's".into(),
        Some(libc::ENODATA | libc::EOPNOTSUPP) => "tells nothing".into(),
        Some(errno) => io::Error::from_raw_os_error(errno).to_string(),
    }
}

/// Columns, with their names above. Nothing in it moves a terminal.
fn table(lines: &[Line]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let none = || "-".to_owned();
    let cells = lines.iter().map(|line| {
        [
            printable(&line.source).into_owned(),
            printable(&line.file).into_owned(),
            line.pid.map_or_else(none, |pid| pid.to_string()),
            line.transport.as_deref().map_or_else(none, |name| printable(name).into_owned()),
            line.state.clone(),
        ]
    });
    let names = ["SOURCE", "FILE", "PID", "TRANSPORT", "STATE"].map(str::to_owned);
    columns(&std::iter::once(names).chain(cells).collect::<Vec<_>>())
}

/// Rows with their cells below each other.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounted(path: &str) -> Mounted {
        Mounted { path: path.into(), source: "nbd://host/\u{1b}vm".into(), is_covered: false }
    }

    #[test]
    fn a_line_for_each_mount_whatever_has_become_of_it() {
        let report = serde_json::json!({ "pid": 77, "transport": "io_uring" });
        let lines = [
            told(&mounted("/srv/a"), Some(Ok(report))),
            told(&mounted("/srv/dead b"), Some(Err(libc::ENOTCONN))),
            told(&mounted("/srv/hung"), None),
        ];
        let text = table(&lines);
        let expected = "\
SOURCE               FILE         PID  TRANSPORT  STATE
nbd://host/\\u{1b}vm  /srv/a       77   io_uring   served
nbd://host/\\u{1b}vm  /srv/dead b  -    -          dead: nobody serves it
nbd://host/\\u{1b}vm  /srv/hung    -    -          no answer
";
        assert_eq!(text, expected);
        assert_eq!(table(&[]), "");
    }
}
