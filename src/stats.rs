//! Counters: what was served, by which transport, and how long it took.
//!
//! Each serving thread has its own, and only it writes them, so the data path pays plain adds.
//! Anyone may read them; the values are exact once the thread has ended, and to whoever has had the
//! answer to a request.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

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

/// How many latencies are told apart. The last bucket has all from 2^30 µs (18 minutes) on.
const BUCKETS: usize = 32;

/// How often which latency was met. Bucket 0 is for less than a microsecond, bucket n for 2^(n-1)
/// to 2^n microseconds.
#[derive(Debug, Default)]
pub struct Histogram([Counter; BUCKETS]);

impl Histogram {
    fn add(&self, micros: u64) {
        let bits = (u64::BITS - micros.leading_zeros()) as usize;
        self.0[bits.min(BUCKETS - 1)].add(1);
    }
}

/// What one serving thread did of one kind of operation.
#[derive(Debug, Default)]
pub struct Operation {
    requests: Counter,
    bytes: Counter,
    errors: Counter,
    micros: Counter,
    latencies: Histogram,
}

impl Operation {
    /// A request has arrived, for so many bytes.
    pub fn arrived(&self, bytes: u32) {
        self.requests.add(1);
        self.bytes.add(u64::from(bytes));
    }

    /// It is about to be answered, so long after its arrival.
    pub fn answered(&self, latency: Duration, has_failed: bool) {
        let micros = latency.as_secs() * 1_000_000 + u64::from(latency.subsec_micros());
        self.micros.add(micros);
        self.latencies.add(micros);
        if has_failed {
            self.errors.add(1);
        }
    }
}

/// What one serving thread did. Aligned to a pair of cache lines, so that threads do not share one.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ThreadStats {
    /// READ
    pub read: Operation,
    /// WRITE
    pub write: Operation,
    /// FSYNC and FLUSH: fsync(2), and close(2) of a file that was open for writing
    pub flush: Operation,
    /// All others that are answered
    pub other: Operation,
    /// Requests that had to wait for the backend, and so became a task of their own
    pub waited: Counter,
    /// Requests handed over to another thread
    pub handed_over: Counter,
    /// Times the thread went to sleep
    pub sleeps: Counter,
}

/// A way for requests to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Transport {
    /// /dev/fuse
    #[serde(rename = "/dev/fuse")]
    Legacy,
    /// FUSE over io_uring
    #[serde(rename = "io_uring")]
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

/// The transport that carries all but stragglers, and the most requests in flight for each of its
/// threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    /// Which one.
    pub transport: Transport,
    /// How many.
    pub queue_depth: usize,
}

/// The counters of all serving threads.
#[derive(Debug, Default)]
pub struct Stats {
    threads: Mutex<Vec<(Transport, Arc<ThreadStats>)>>,
    serving: OnceLock<Serving>,
}

/// The sums over the threads of a transport, of one kind of operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OperationSums {
    /// How many have arrived.
    pub requests: u64,
    /// ... and not been answered.
    pub in_flight: u64,
    /// What they were for; nothing but READ and WRITE is for any.
    pub bytes: u64,
    /// How many were answered with an error.
    pub errors: u64,
    /// How long those that were answered took, together, in microseconds.
    pub total_us: u64,
    /// By the bound below which it was, in microseconds, a power of two: how many took so long.
    pub latency_us: Map<String, Value>,
}

/// The sums over the threads of a transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TransportSums {
    /// How many threads.
    pub threads: usize,
    /// READ
    pub read: OperationSums,
    /// WRITE
    pub write: OperationSums,
    /// FSYNC and FLUSH
    pub flush: OperationSums,
    /// All others
    pub other: OperationSums,
    /// See [`ThreadStats`].
    pub waited: u64,
    /// See [`ThreadStats`].
    pub handed_over: u64,
    /// See [`ThreadStats`].
    pub sleeps: u64,
}

impl Stats {
    /// Counters for a new serving thread.
    pub fn thread(&self, transport: Transport) -> Arc<ThreadStats> {
        let stats = Arc::new(ThreadStats::default());
        self.lock().push((transport, stats.clone()));
        stats
    }

    /// It is served from now on.
    pub fn set_serving(&self, serving: Serving) {
        let _ = self.serving.set(serving);
    }

    /// How it is served, once it is.
    pub fn serving(&self) -> Option<Serving> {
        self.serving.get().copied()
    }

    /// The sums over the threads of each transport that has any.
    pub fn sums(&self) -> BTreeMap<Transport, TransportSums> {
        let threads = self.lock();
        let transports = [Transport::Uring, Transport::Legacy].into_iter();
        transports.filter_map(|transport| Some((transport, sums(&threads, transport)?))).collect()
    }

    /// The sums over the threads of one transport, as one line for the log.
    pub fn line(&self, transport: Transport) -> String {
        let threads = self.lock();
        let sum = |counter: fn(&ThreadStats) -> u64| -> u64 {
            threads.iter().filter(|(t, _)| *t == transport).map(|(_, s)| counter(s)).sum()
        };
        format!(
            "{transport}: {} reads ({} bytes), {} writes ({} bytes), {} others, {} errors, {} waited, {} handed over, {} sleeps",
            sum(|s| s.read.requests.get()),
            sum(|s| s.read.bytes.get()),
            sum(|s| s.write.requests.get()),
            sum(|s| s.write.bytes.get()),
            sum(|s| s.flush.requests.get() + s.other.requests.get()),
            sum(|s| [&s.read, &s.write, &s.flush, &s.other].map(|o| o.errors.get()).iter().sum()),
            sum(|s| s.waited.get()),
            sum(|s| s.handed_over.get()),
            sum(|s| s.sleeps.get()),
        )
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Transport, Arc<ThreadStats>)>> {
        self.threads.lock().expect("no code panics while it holds the list")
    }
}

fn sums(all: &[(Transport, Arc<ThreadStats>)], transport: Transport) -> Option<TransportSums> {
    let threads: Vec<_> = all.iter().filter(|(t, _)| *t == transport).map(|(_, s)| s).collect();
    let sum =
        |counter: fn(&ThreadStats) -> &Counter| threads.iter().map(|s| counter(s).get()).sum();
    let operation = |of: fn(&ThreadStats) -> &Operation| OperationSums::of(&threads, of);
    (!threads.is_empty()).then(|| TransportSums {
        threads: threads.len(),
        read: operation(|s| &s.read),
        write: operation(|s| &s.write),
        flush: operation(|s| &s.flush),
        other: operation(|s| &s.other),
        waited: sum(|s| &s.waited),
        handed_over: sum(|s| &s.handed_over),
        sleeps: sum(|s| &s.sleeps),
    })
}

impl OperationSums {
    fn of(threads: &[&Arc<ThreadStats>], operation: fn(&ThreadStats) -> &Operation) -> Self {
        let sum = |counter: &dyn Fn(&Operation) -> &Counter| -> u64 {
            threads.iter().map(|s| counter(operation(s)).get()).sum()
        };
        // Those that were answered first: one that arrives or is answered meanwhile must not make
        // it less than none.
        let latencies: [u64; BUCKETS] = std::array::from_fn(|i| sum(&|o| &o.latencies.0[i]));
        let answered = latencies.iter().sum();
        let requests = sum(&|o| &o.requests);
        let bound = |bucket: usize| (1_u64 << bucket).to_string();
        let met = latencies.iter().enumerate().filter(|(_, n)| **n > 0);
        OperationSums {
            requests,
            in_flight: requests.saturating_sub(answered),
            bytes: sum(&|o| &o.bytes),
            errors: sum(&|o| &o.errors),
            total_us: sum(&|o| &o.micros),
            latency_us: met.map(|(bucket, n)| (bound(bucket), Value::from(*n))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_sums_the_threads_of_its_transport() {
        let stats = Stats::default();
        stats.thread(Transport::Uring).read.arrived(20);
        stats.thread(Transport::Uring).read.arrived(30);
        stats.thread(Transport::Legacy).write.arrived(7);
        assert!(stats.line(Transport::Uring).starts_with("io_uring: 2 reads (50 bytes), 0 writes"));
        assert!(
            stats.line(Transport::Legacy).starts_with("/dev/fuse: 0 reads (0 bytes), 1 writes (7 ")
        );
    }

    #[test]
    fn sums_are_of_the_transports_that_have_threads() {
        let stats = Stats::default();
        assert!(stats.sums().is_empty());
        stats.thread(Transport::Legacy);
        stats.thread(Transport::Uring).flush.arrived(0);
        let sums = stats.sums();
        assert!(sums.keys().eq(&[Transport::Legacy, Transport::Uring]));
        let flush = |transport| sums[&transport].flush.clone();
        assert_eq!((flush(Transport::Uring).requests, flush(Transport::Uring).in_flight), (1, 1));
        assert_eq!(flush(Transport::Legacy), OperationSums::default());
    }

    #[test]
    fn latencies_are_told_apart_by_powers_of_two() {
        let stats = Stats::default();
        let threads = [stats.thread(Transport::Uring), stats.thread(Transport::Uring)];
        let nanos = [0, 999, 1_000, 1_999, 2_000, 3_999, 4_000, 1_000_000_000, u64::MAX];
        for (i, nanos) in nanos.into_iter().enumerate() {
            let operation = &threads[i % 2].read;
            operation.arrived(1);
            operation.answered(Duration::from_nanos(nanos), i == 0);
        }
        threads[0].read.arrived(1);
        let read = stats.sums()[&Transport::Uring].read.clone();
        let met = [("1", 2), ("2", 2), ("4", 2), ("8", 1), ("1048576", 1), ("2147483648", 1)];
        let met = met.map(|(bound, n)| (bound.to_owned(), Value::from(n)));
        assert_eq!(read.latency_us.into_iter().collect::<Vec<_>>(), met);
        assert_eq!((read.requests, read.in_flight, read.errors), (10, 1, 1));
        assert_eq!(read.total_us, 1 + 1 + 2 + 3 + 4 + 1_000_000 + u64::MAX / 1000);
    }
}
