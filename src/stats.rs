//! Counters: what was served, by which transport.
//!
//! Each serving thread has its own, and only it writes them, so the data path pays a plain add. Anyone may
//! read them; the values are exact once the thread has ended.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it; only from the thread that the counter belongs to.
    pub fn add(&self, n: u64) {
        // Not a fetch_add: there is one writer, and this is cheaper.
        self.0.store(self.get() + n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one serving thread did. Aligned to a pair of cache lines, so that threads do not share one.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ThreadStats {
    /// READ requests
    pub reads: Counter,
    /// WRITE requests
    pub writes: Counter,
    /// All other requests
    pub others: Counter,
    /// Bytes of READ requests
    pub read_bytes: Counter,
    /// Bytes of WRITE requests
    pub write_bytes: Counter,
    /// Requests answered with an error
    pub errors: Counter,
    /// Requests that had to wait for the backend, and so became a task of their own
    pub waited: Counter,
    /// Requests handed over to another thread
    pub handed_over: Counter,
    /// Times the thread went to sleep
    pub sleeps: Counter,
}

/// A way for requests to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// /dev/fuse
    Legacy,
    /// FUSE over io_uring
    Uring,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Transport::Legacy => "/dev/fuse",
            Transport::Uring => "io_uring",
        })
    }
}

/// The counters of all serving threads.
#[derive(Debug, Default)]
pub struct Stats {
    threads: Mutex<Vec<(Transport, Arc<ThreadStats>)>>,
}

impl Stats {
    /// Counters for a new serving thread.
    pub fn thread(&self, transport: Transport) -> Arc<ThreadStats> {
        let stats = Arc::new(ThreadStats::default());
        self.lock().push((transport, stats.clone()));
        stats
    }

    /// The sums over the threads of one transport, as one line for the log.
    pub fn line(&self, transport: Transport) -> String {
        let threads = self.lock();
        let sum = |counter: fn(&ThreadStats) -> &Counter| -> u64 {
            threads.iter().filter(|(t, _)| *t == transport).map(|(_, s)| counter(s).get()).sum()
        };
        format!(
            "{transport}: {} reads ({} bytes), {} writes ({} bytes), {} others, {} errors, {} waited, {} handed over, {} sleeps",
            sum(|s| &s.reads),
            sum(|s| &s.read_bytes),
            sum(|s| &s.writes),
            sum(|s| &s.write_bytes),
            sum(|s| &s.others),
            sum(|s| &s.errors),
            sum(|s| &s.waited),
            sum(|s| &s.handed_over),
            sum(|s| &s.sleeps),
        )
    }

    /// The sums over the threads of each transport, as one line.
    pub fn summary(&self) -> String {
        let transports = [Transport::Uring, Transport::Legacy];
        let is_there = |transport: &Transport| self.lock().iter().any(|(t, _)| t == transport);
        let lines: Vec<_> = transports.into_iter().filter(is_there).map(|t| self.line(t)).collect();
        if lines.is_empty() { "nothing is served yet".into() } else { lines.join("; ") }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Transport, Arc<ThreadStats>)>> {
        self.threads.lock().expect("no code panics while it holds the list")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_sums_the_threads_of_its_transport() {
        let stats = Stats::default();
        stats.thread(Transport::Uring).reads.add(2);
        stats.thread(Transport::Uring).reads.add(3);
        stats.thread(Transport::Legacy).writes.add(7);
        assert!(stats.line(Transport::Uring).starts_with("io_uring: 5 reads (0 bytes), 0 writes"));
        assert!(
            stats.line(Transport::Legacy).starts_with("/dev/fuse: 0 reads (0 bytes), 7 writes")
        );
    }

    #[test]
    fn the_summary_has_the_transports_that_serve() {
        let stats = Stats::default();
        assert_eq!(stats.summary(), "nothing is served yet");
        stats.thread(Transport::Legacy).reads.add(1);
        assert_eq!(stats.summary(), stats.line(Transport::Legacy));
        stats.thread(Transport::Uring);
        let both = [Transport::Uring, Transport::Legacy].map(|t| stats.line(t));
        assert_eq!(stats.summary(), both.join("; "));
    }
}
