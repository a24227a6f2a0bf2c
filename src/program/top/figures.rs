//! What lies between two reports of an export: rates, and how long its requests took.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::Value;

/// The kinds of operation, as a report names them.
pub const OPERATIONS: [&str; 4] = ["read", "write", "flush", "other"];
/// Two answers that came so soon after each other tell nothing of a rate, in seconds.
const SHORTEST: f64 = 0.05;

/// By the bound below which they took, in microseconds: so many requests.
type Histogram = BTreeMap<u64, u64>;

/// What an export had counted at a moment, over all its transports.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    at: Instant,
    pid: Option<u64>,
    /// In the order of [`OPERATIONS`].
    counted: [Counted; OPERATIONS.len()],
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counted {
    requests: u64,
    in_flight: u64,
    bytes: u64,
    errors: u64,
    total_us: u64,
    latencies: Histogram,
}

/// What it did between two of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// How long that was.
    pub seconds: f64,
    /// In the order of [`OPERATIONS`].
    pub rates: [Rates; OPERATIONS.len()],
}

/// What it did of one kind of operation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rates {
    /// Requests that arrived, for each second.
    pub requests: f64,
    /// What they asked for, for each second.
    pub bytes: f64,
    /// Answers that were errors, in all.
    pub errors: u64,
    /// Requests that are not yet answered, at the end.
    pub in_flight: u64,
    /// How long those that were answered took together, in microseconds.
    pub total_us: u64,
    latencies: Histogram,
}

impl Sample {
    /// What a report says. A counter that it lacks is 0.
    pub fn of(report: &Value, at: Instant) -> Sample {
        let transports = report["transports"].as_object();
        let transports = || transports.into_iter().flat_map(|transports| transports.values());
        let counted = OPERATIONS.map(|name| {
            let mut sum = Counted::default();
            for operation in transports().map(|transport| &transport[name]) {
                let number = |field: &str| operation[field].as_u64().unwrap_or(0);
                sum.requests += number("requests");
                sum.in_flight += number("in_flight");
                sum.bytes += number("bytes");
                sum.errors += number("errors");
                sum.total_us = sum.total_us.saturating_add(number("total_us"));
                for (bound, n) in operation["latency_us"].as_object().into_iter().flatten() {
                    if let (Ok(bound), Some(n)) = (bound.parse(), n.as_u64()) {
                        *sum.latencies.entry(bound).or_default() += n;
                    }
                }
            }
            sum
        });
        Sample { at, pid: report["pid"].as_u64(), counted }
    }

    /// What was done from `before` to this one. None where that tells nothing: another process
    /// serves now, or no time has passed.
    pub fn since(&self, before: &Sample) -> Option<Figures> {
        let seconds = self.at.saturating_duration_since(before.at).as_secs_f64();
        if self.pid != before.pid || seconds < SHORTEST {
            return None;
        }
        let rates = std::array::from_fn(|i| self.counted[i].since(&before.counted[i], seconds));
        Some(Figures { seconds, rates })
    }
}

impl Counted {
    fn since(&self, before: &Counted, seconds: f64) -> Rates {
        let more = |counter: fn(&Counted) -> u64| counter(self).saturating_sub(counter(before));
        let latencies = self.latencies.iter().filter_map(|(&bound, n)| {
            let more = n.saturating_sub(before.latencies.get(&bound).copied().unwrap_or(0));
            (more > 0).then_some((bound, more))
        });
        Rates {
            requests: more(|c| c.requests) as f64 / seconds,
            bytes: more(|c| c.bytes) as f64 / seconds,
            errors: more(|c| c.errors),
            in_flight: self.in_flight,
            total_us: more(|c| c.total_us),
            latencies: latencies.collect(),
        }
    }
}

impl Figures {
    /// What several did together.
    pub fn sum<'a>(all: impl IntoIterator<Item = &'a Figures>) -> Figures {
        let mut sum = Figures::default();
        for figures in all {
            sum.seconds = sum.seconds.max(figures.seconds);
            for (sum, rates) in sum.rates.iter_mut().zip(&figures.rates) {
                sum.requests += rates.requests;
                sum.bytes += rates.bytes;
                sum.errors += rates.errors;
                sum.in_flight += rates.in_flight;
                sum.total_us = sum.total_us.saturating_add(rates.total_us);
                for (&bound, n) in &rates.latencies {
                    *sum.latencies.entry(bound).or_default() += n;
                }
            }
        }
        sum
    }

    /// Requests of all kinds, for each second.
    pub fn requests(&self) -> f64 {
        self.rates.iter().map(|rates| rates.requests).sum()
    }

    /// Requests of all kinds that are not yet answered.
    pub fn in_flight(&self) -> u64 {
        self.rates.iter().map(|rates| rates.in_flight).sum()
    }

    /// Answers of all kinds that were errors.
    pub fn errors(&self) -> u64 {
        self.rates.iter().map(|rates| rates.errors).sum()
    }
}

impl Rates {
    /// The time, in microseconds and a power of two, below which so many hundredths of the requests
    /// were answered; none: no request was.
    pub fn percentile(&self, hundredths: u64) -> Option<u64> {
        let all: u64 = self.latencies.values().sum();
        // The least number that is no smaller part.
        let wanted = (all * hundredths).div_ceil(100);
        let mut met = 0;
        let mut bounds = self.latencies.iter();
        let reaches = |(_, n): &(&u64, &u64)| {
            met += **n;
            met >= wanted
        };
        bounds.find(reaches).map(|(bound, _)| *bound)
    }

    /// How long a request took in the mean, in microseconds.
    pub fn mean_us(&self) -> Option<f64> {
        let all: u64 = self.latencies.values().sum();
        (all > 0).then(|| self.total_us as f64 / all as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    fn read(requests: u64, bytes: u64, latencies: &Value) -> Value {
        let in_flight = 2;
        json!({ "requests": requests, "in_flight": in_flight, "bytes": bytes, "errors": requests / 10,
                "total_us": requests * 30, "latency_us": latencies })
    }

    fn report(pid: u64, transports: &Value) -> Value {
        json!({ "pid": pid, "transports": transports })
    }

    #[test]
    fn rates_are_of_all_transports_and_of_the_time_between() {
        let at = Instant::now();
        let before = report(
            7,
            &json!({ "io_uring": { "read": read(10, 4096, &json!({ "32": 10 })) },
                     "/dev/fuse": { "read": read(5, 0, &json!({ "64": 5 })) } }),
        );
        let after = report(
            7,
            &json!({ "io_uring": { "read": read(110, 8192, &json!({ "32": 100, "1024": 10 })) },
                     "/dev/fuse": { "read": read(25, 1024, &json!({ "64": 25 })),
                                    "write": read(1, 1, &json!({ "8": 1 })) } }),
        );
        let before = Sample::of(&before, at);
        let after = Sample::of(&after, at + Duration::from_secs(2));
        let figures = after.since(&before).unwrap();
        let [read, write, flush, other] = &figures.rates;
        assert_eq!((figures.seconds, read.requests, read.bytes), (2.0, 60.0, 2560.0));
        assert_eq!((read.errors, read.in_flight, write.in_flight), (12, 4, 2));
        // 90 below 32, 20 below 64, 10 below 1024.
        assert_eq!((read.percentile(50), read.percentile(75)), (Some(32), Some(32)));
        assert_eq!((read.percentile(76), read.percentile(99)), (Some(64), Some(1024)));
        assert_eq!(read.mean_us(), Some(30.0));
        assert_eq!((write.percentile(50), write.percentile(99)), (Some(8), Some(8)));
        assert_eq!((flush, flush.percentile(99)), (other, None));
        assert_eq!((figures.requests(), figures.in_flight(), figures.errors()), (60.5, 6, 12));

        let twice = Figures::sum([&figures, &figures]);
        assert_eq!((twice.seconds, twice.rates[0].requests), (2.0, 120.0));
        assert_eq!((twice.rates[0].percentile(99), twice.errors()), (Some(1024), 24));
    }

    #[test]
    fn another_process_and_no_time_have_no_rate() {
        let at = Instant::now();
        let later = at + Duration::from_secs(1);
        let sample = |pid, at| Sample::of(&report(pid, &json!({})), at);
        assert_eq!(sample(1, later).since(&sample(2, at)), None);
        assert_eq!(sample(1, at + Duration::from_millis(1)).since(&sample(1, at)), None);
        assert_eq!(sample(1, at).since(&sample(1, later)), None);
        assert_eq!(sample(1, later).since(&sample(1, at)).unwrap().requests(), 0.0);
    }

    #[test]
    fn one_slow_request_of_a_hundred_is_no_percentile() {
        let rates = |slow| Rates {
            latencies: Histogram::from([(16, 100 - slow), (4096, slow)]),
            ..Rates::default()
        };
        assert_eq!(rates(1).percentile(99), Some(16));
        assert_eq!(rates(2).percentile(99), Some(4096));
    }
}
