//! What a running export tells of itself: one line of JSON, in the log at SIGUSR1 and as an
//! attribute of the file.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use crate::backend::RemoteStats;
use crate::printable::escaped_json;
use crate::stats::{Stats, Transport, TransportSums};

/// Where it is known from.
#[derive(Clone, Debug)]
pub struct Reporter {
    /// The source, as the user has named it.
    pub source: String,
    /// The counters of the threads that serve.
    pub stats: Arc<Stats>,
}

/// The line. Numbers count from the start of the process, but for those that say how it stands now.
#[derive(Serialize)]
struct Report<'a> {
    source: &'a str,
    pid: u32,
    size: u64,
    transport: Option<Transport>,
    /// The most requests in flight for each thread of that transport.
    queue_depth: Option<usize>,
    transports: BTreeMap<Transport, TransportSums>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exports: Option<Exports>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nbd: Option<RemoteStats>,
}

/// What a directory of exports has.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Exports {
    /// Files in it.
    pub listed: usize,
    /// Those that are connected to now.
    pub connected: usize,
}

impl Reporter {
    /// The line, without its end, of so many bytes: how it stands with the server, and with the
    /// directory, if it is one.
    pub fn line(&self, size: u64, nbd: Option<RemoteStats>, exports: Option<Exports>) -> String {
        let serving = self.stats.serving();
        let report = Report {
            source: &self.source,
            pid: std::process::id(),
            size,
            transport: serving.map(|serving| serving.transport),
            queue_depth: serving.map(|serving| serving.queue_depth),
            transports: self.stats.sums(),
            exports,
            nbd,
        };
        escaped_json(&serde_json::to_string(&report).expect("all its keys are strings"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Serving;

    #[test]
    fn report_is_one_line_of_json() {
        let stats = Arc::new(Stats::default());
        let source = "a\n\u{9b}\u{202e}\"b".to_owned();
        let reporter = Reporter { source: source.clone(), stats: stats.clone() };
        let report = || {
            let line = reporter.line(65536, None, None);
            assert!(!line.contains(crate::printable::is_unprintable), "{line}");
            serde_json::from_str::<serde_json::Value>(&line).unwrap()
        };
        assert!(report()["transport"].is_null());
        stats.set_serving(Serving { transport: Transport::Uring, queue_depth: 128 });
        stats.thread(Transport::Uring).read.arrived(4096);
        let report = report();
        assert_eq!(report["source"], source);
        assert_eq!((&report["size"], &report["queue_depth"]), (&65536.into(), &128.into()));
        assert_eq!(report["transport"], "io_uring");
        assert_eq!(report["transports"]["io_uring"]["read"]["bytes"], 4096);
        assert!(report["transports"].get("/dev/fuse").is_none());
        assert!(report.get("nbd").is_none() && report.get("exports").is_none());
    }
}
