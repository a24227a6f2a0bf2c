//! What is drawn, and that a panic leaves the terminal as it was.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::tcgetattr;
use serde_json::{Value, json};

use super::drawing::{Row, SERVED, head, json_lines, lines, screen};
use super::figures::Sample;
use super::terminal::{Size, Terminal};

/// An export that has done so many reads of 4 KiB in a second.
fn row(file: &str, reads: u64) -> Row {
    row_below(file, reads, 64)
}

/// The same, each of them in less than `bound` microseconds.
fn row_below(file: &str, reads: u64, bound: u64) -> Row {
    let report = |reads: u64| {
        let bound = bound.to_string();
        let read = json!({ "requests": reads, "in_flight": 3, "bytes": reads * 4096, "errors": reads.min(1),
                           "total_us": reads * 40, "latency_us": { bound: reads } });
        let transports = json!({ "io_uring": { "read": read } });
        json!({ "source": "mem:1M", "pid": 7, "transport": "io_uring", "transports": transports })
    };
    let begin = Instant::now();
    let before = Sample::of(&report(0), begin);
    let figures = Sample::of(&report(reads), begin + Duration::from_secs(1)).since(&before);
    Row { file: file.into(), state: SERVED.into(), report: report(reads), figures }
}

fn silent(file: &str) -> Row {
    Row { file: file.into(), state: "no answer".into(), ..Row::default() }
}

/// The lines of a screen, without what moves the terminal.
fn drawn(rows: &[Row], columns: usize, height: usize) -> Vec<String> {
    let screen = screen(rows, Size { columns, rows: height });
    let text = screen.strip_prefix("\x1b[H").and_then(|text| text.strip_suffix("\x1b[K\x1b[J"));
    let lines = text
        .expect("it begins at the top")
        .split("\x1b[K\r\n")
        .map(|line| line.replace("\x1b[7m", "").replace("\x1b[0m", ""));
    let lines: Vec<_> = lines.collect();
    assert!(lines.len() <= height, "{lines:?}");
    assert!(!lines.concat().contains(char::is_control), "{lines:?}");
    lines
}

#[test]
fn a_line_has_the_same_fields_whatever_the_state() {
    let rows = [row("/srv/a b", 1234), silent("/srv/\u{1b}[2J")];
    let expected =
        "  r/s  rB/s  rp50  rp99   w/s  wB/s  wp50  wp99   f/s  fp50  fp99 queue   err  FILE";
    assert_eq!(head(), expected);
    let [served, silent] = &lines(&rows)[..] else { panic!("two lines") };
    let expected =
        " 1234  4.8M  64us  64us     0     0     -     -     0     -     -     3     1  /srv/a b";
    assert_eq!(served, expected);
    let fields: Vec<_> = silent.split_whitespace().collect();
    assert_eq!(fields[..13], ["-"; 13]);
    assert_eq!(fields[13..].join(" "), r"/srv/\u{1b}[2J: no answer");
}

#[test]
fn numbers_fit_their_columns() {
    for reads in [0, 99_999, 100_000, 999_499, 999_500, 9_949_999, 9_950_000, 1 << 29] {
        let line = &lines(&[row("/a", reads)])[0];
        assert_eq!(line.find("  /a"), Some(head().find("  FILE").unwrap()), "{line}");
    }
    let field = |reads: u64, i: usize| {
        let line = lines(&[row("/a", reads)]).remove(0);
        line.split_whitespace().nth(i).unwrap().to_owned()
    };
    let counts = [99_999, 100_000, 2_500_000, 12_345_678].map(|reads| field(reads, 0));
    assert_eq!(counts, ["99999", "100k", "2.5M", "12M"]);
    let times = [512, 1 << 10, 1 << 14, 1 << 20, 1 << 24, 1 << 30, 1 << 31].map(|bound| {
        let line = lines(&[row_below("/a", 1, bound)]).remove(0);
        line.split_whitespace().nth(3).unwrap().to_owned()
    });
    assert_eq!(times, ["512us", "1.0ms", "16ms", "1.0s", "17s", "1074s", ">17m"]);
    let bytes = [0, 1, 243, 255, 256].map(|reads| field(reads, 1));
    assert_eq!(bytes, ["0", "4.0K", "972K", "1.0M", "1.0M"]);
}

#[test]
fn a_screen_has_what_there_is_room_for() {
    let rows: Vec<_> = (0..50).map(|i| row(&format!("/srv/disk{i:02}"), i)).collect();
    let all = drawn(&rows, 120, 60);
    assert_eq!(all.len(), 2 + 50 + 1);
    assert!(all[0].starts_with("50 exports") && all[2].ends_with("/srv/disk00"), "{all:?}");
    let fields: Vec<_> = all[52].split_whitespace().collect();
    assert_eq!((fields[0], fields[13]), ("1225", "all"));

    let few = drawn(&rows, 120, 10);
    assert_eq!(few.len(), 10);
    assert!(few[2].ends_with("/srv/disk49") && few[7].ends_with("/srv/disk44"), "{few:?}");
    assert_eq!(few[8], "and 44 that do less");
    assert!(few[9].ends_with(" all"), "{few:?}");

    for columns in 1..130 {
        for height in 1..6 {
            drawn(&rows, columns, height);
        }
        for line in drawn(&rows[..1], columns, 4).iter().skip(2) {
            assert!(columns < 50 || line.chars().count() <= columns, "{columns}: {line}");
        }
    }
    assert_eq!(drawn(&[], 80, 24).len(), 2);
}

#[test]
fn a_narrow_screen_has_fewer_numbers_and_the_end_of_names() {
    let rows = [row("/srv/with/a/long/way/to/disk.img", 5)];
    let head = |columns| drawn(&rows, columns, 24).swap_remove(1);
    assert!(head(97).contains("rp50") && head(97).contains("rp99"));
    assert!(!head(96).contains("rp50") && head(96).contains("rp99"));
    assert!(head(79).contains("rp99") && !head(78).contains("rp99"));
    let line = drawn(&rows, 80, 24).swap_remove(2);
    assert!(line.ends_with("     1  …ng/way/to/disk.img"), "{line}");
    assert_eq!(line.chars().count(), 80, "{line}");
}

#[test]
fn json_is_an_object_for_each_export() {
    let text = json_lines(&[row("/srv/a\u{9b}", 100), silent("/srv/b")], 1_796_000_000.123_456);
    assert!(!text.contains('\u{9b}'));
    let objects: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [served, silent] = &objects[..] else { panic!("{text}") };
    assert_eq!((&served["file"], &served["state"]), (&json!("/srv/a\u{9b}"), &json!("served")));
    assert_eq!((&served["pid"], &served["seconds"]), (&json!(7), &json!(1.0)));
    let time = served["time"].as_f64().unwrap();
    assert!((time - 1_796_000_000.123).abs() < 1e-5, "{time}");
    let read = json!({ "requests_per_second": 100.0, "bytes_per_second": 409_600, "errors": 1,
                       "in_flight": 3, "mean_us": 40.0, "p50_us": 64, "p99_us": 64 });
    assert_eq!(served["read"], read);
    assert_eq!(served["write"]["p99_us"], Value::Null);
    assert_eq!((&silent["state"], &silent["read"]), (&json!("no answer"), &Value::Null));
    let names = |object: &Value| object.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(served), names(silent));
}

/// What the process below is to do; without it that test does nothing.
const PANICS: &str = "DISKFUSE_TEST_PANICS";

#[test]
fn panics_on_a_terminal_if_called() {
    if std::env::var_os(PANICS).is_some() {
        let _terminal = Terminal::take().unwrap();
        panic!("here it comes");
    }
}

#[test]
fn a_panic_leaves_the_terminal_as_it_was() {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    let slave = options.open(name.to_str().unwrap()).unwrap();
    let before = tcgetattr(&slave).unwrap();
    let stdio = || Stdio::from(slave.try_clone().unwrap());
    let test = "program::top::tests::panics_on_a_terminal_if_called";
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(PANICS, "1")
        .env_remove("RUST_BACKTRACE");
    let mut child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
    drop(command);
    assert!(!child.wait().unwrap().success());
    let after = tcgetattr(&slave).unwrap();
    assert_eq!(after.local_modes, before.local_modes);
    drop(slave);
    let mut said = Vec::new();
    // It ends with an error: the other side is closed.
    let _ = File::from(master).read_to_end(&mut said);
    let said = String::from_utf8_lossy(&said);
    let (_, drawn) = said.split_once("\x1b[?1049h").expect("it was taken");
    let (_, after) = drawn.split_once("\x1b[?1049l").unwrap_or_else(|| panic!("{said:?}"));
    assert!(after.contains("here it comes"), "{said:?}");
}
