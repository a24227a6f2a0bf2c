//! What a running export tells of itself, by extended attributes of its file.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use libc::{ENODATA, ENOSPC, EOPNOTSUPP, ERANGE, O_DIRECT};
use rustix::fs::{
    XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query, removexattr, setxattr,
};
use serde_json::Value;

use crate::common::export::Transport;
use crate::common::suite::{Case, SIZE};
use crate::common::{Aligned, assert_errno, number, report};

const NAMES: [&str; 2] = ["user.diskfuse.source", "user.diskfuse.stats"];

/// What the transport of a case has carried of one kind of operation, and that what the test asked
/// was answered.
fn counts(case: &Case, report: &Value, operation: &str) -> [u64; 3] {
    let transport = match case.transport {
        Transport::Legacy => "/dev/fuse",
        Transport::Uring => "io_uring",
    };
    assert_eq!(report["transport"], transport);
    let counts = &report["transports"][transport][operation];
    let [requests, in_flight] = ["requests", "in_flight"].map(|name| number(&counts[name]));
    let latencies = counts["latency_us"].as_object().unwrap();
    assert!(latencies.keys().all(|bound| bound.parse::<u64>().unwrap().is_power_of_two()));
    let answered: u64 = latencies.values().map(number).sum();
    assert_eq!(answered, requests - in_flight, "{counts}");
    // Who asks is among the others. Processes that other tests start meanwhile inherit this one's
    // files, and close them.
    match operation {
        "other" => assert!(in_flight >= 1, "{counts}"),
        "flush" => {}
        _ => assert_eq!(in_flight, 0, "{counts}"),
    }
    [requests, number(&counts["bytes"]), number(&counts["errors"])]
}

pub fn report_counts_what_was_asked(case: &Case) {
    const OPERATIONS: [&str; 3] = ["read", "write", "flush"];
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let all = || {
        let report = report(export.file());
        assert_eq!(report["source"], image.source);
        assert_eq!(
            (number(&report["pid"]), number(&report["size"])),
            (export.pid().into(), SIZE as u64)
        );
        counts(case, &report, "other");
        OPERATIONS.map(|operation| counts(case, &report, operation))
    };
    let file = File::options().read(true).write(true).custom_flags(O_DIRECT).open(export.file());
    let file = file.unwrap();
    let before = all();
    let mut buf = Aligned::new(8192);
    for i in 0..10 {
        file.read_exact_at(&mut buf[..4096], i * 8192).unwrap();
    }
    for i in 0..7 {
        file.write_all_at(&buf, i * 8192).unwrap();
    }
    (0..3).for_each(|_| file.sync_all().unwrap());
    let mut expected = [[10, 10 * 4096, 0], [7, 7 * 8192, 0]];
    // With write-back the kernel takes it.
    if !case.kind.writeback {
        assert_errno(file.write_at(&buf, SIZE as u64), ENOSPC);
        expected[1] = [8, 8 * 8192, 1];
    }
    drop(file);
    let after = all();
    for i in 0..2 {
        let counted = std::array::from_fn(|field| after[i][field] - before[i][field]);
        assert_eq!(counted, expected[i], "{}", OPERATIONS[i]);
    }
    // Also the close, and those of other processes.
    let [flushes, bytes, errors] = after[2];
    assert!(flushes - before[2][0] >= 4 && (bytes, errors) == (0, 0), "{flushes} flushes");
}

pub fn attributes_are_told_and_cannot_be_changed(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = export.file();
    let mut buf = vec![0; 65536];
    // They are not listed: copies of the file would have them, too.
    assert_eq!(listxattr(file, &mut buf).unwrap(), 0);
    assert_eq!(listxattr_query(file).unwrap(), 0);

    let len = getxattr(file, NAMES[0], &mut buf).unwrap();
    assert_eq!(&buf[..len], image.source.as_bytes());
    assert_eq!(getxattr_query(file, NAMES[0]).unwrap(), len);
    // Who asks for the length has room for what it has grown to by then.
    let room = getxattr_query(file, NAMES[1]).unwrap();
    for _ in 0..1000 {
        assert!(getxattr(file, NAMES[1], &mut buf[..room]).unwrap() < room);
    }
    for name in NAMES {
        assert_errno(getxattr(file, name, &mut buf[..3]), ERANGE);
        assert_errno(setxattr(file, name, b"0", XattrFlags::empty()), EOPNOTSUPP);
        assert_errno(removexattr(file, name), EOPNOTSUPP);
    }
    for other in ["user.diskfuse", "user.diskfuse.statistics", "security.capability"] {
        assert_errno(getxattr(file, other, &mut buf), ENODATA);
    }
    assert_errno(setxattr(file, "user.other", b"0", XattrFlags::empty()), EOPNOTSUPP);
    // Nothing of that has gone wrong.
    let report = report(file);
    let errors = |transport: &Value| number(&transport["other"]["errors"]);
    assert_eq!(report["transports"].as_object().unwrap().values().map(errors).sum::<u64>(), 0);
}

/// The kernel asks for what a write may take away (security.capability), and must not do so before
/// each.
pub fn writes_do_not_ask_for_attributes(case: &Case) {
    let image = case.patchy();
    let export = case.export(&image, &[]);
    let file = File::options().write(true).open(export.file()).unwrap();
    let others = || counts(case, &report(export.file()), "other")[0];
    let before = others();
    for i in 0..200 {
        file.write_all_at(&[1; 4096], i * 4096).unwrap();
    }
    assert!(others() - before < 20, "{}", report(export.file()));
}
