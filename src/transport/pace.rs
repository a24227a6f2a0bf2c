//! Decides whether an idle thread polls or sleeps.
//!
//! A sleep costs the wake-up, which on an idle virtual CPU is more than the request that it is for.
//! A poll costs CPU time that others may want. So a thread polls where by its own history the next
//! request comes sooner than a wake-up, and for no longer than twice the usual time; and all polls
//! in vain together use at most a fixed part of the time that requests take. Under a quota of CPU
//! time ([`under_quota`](super::cpus::under_quota)) none polls: it would be the client's time.
//!
//! | state | what happens | next state |
//! |---|---|---|
//! | working | nothing is there, the usual gap is short, and there is credit | polling |
//! | working | nothing is there, otherwise | sleeping |
//! | polling | a request | working |
//! | polling | twice the usual gap has passed; its time is taken from the credit | sleeping |
//! | sleeping | a request, or another reason to wake | working |

use std::time::{Duration, Instant};

/// What a sleep and its wake-up cost, roughly. Longer polls do not pay.
const WAKE_UP: Duration = Duration::from_micros(50);
/// A poll lasts this long at least: clocks and gaps are not exact.
const SHORTEST_POLL: Duration = Duration::from_micros(5);
/// A gap counts as no longer than this, so that a pause does not outweigh what came before it.
const LONGEST_GAP: Duration = Duration::from_micros(200);
/// Polls in vain may use the time that requests take, divided by this, ...
const SHARE: u32 = 4;
/// ... of which so much can be saved up.
const MOST_CREDIT: Duration = Duration::from_millis(1);

/// Decides for one thread.
#[derive(Debug)]
pub struct Pace {
    state: State,
    /// A moving average of the time from one request's end to the next one's arrival.
    gap: Duration,
    /// What polls in vain may still use.
    credit: Duration,
    may_poll: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Working { since: Instant },
    Polling { since: Instant, until: Instant },
    Sleeping { since: Instant },
}

impl Pace {
    /// For a thread that begins to work `now`.
    pub fn new(now: Instant, may_poll: bool) -> Pace {
        let state = State::Working { since: now };
        Pace { state, gap: Duration::ZERO, credit: MOST_CREDIT, may_poll }
    }

    /// Nothing is there `now`: whether to look again, rather than sleep. From the second look on
    /// this yields the CPU: a client may wait for this very one. On an idle CPU that is a short
    /// system call.
    pub fn polls_at(&mut self, now: Instant) -> bool {
        if let State::Polling { until, .. } = self.state
            && now < until
        {
            std::thread::yield_now();
            return true;
        }
        self.state = match self.state {
            State::Working { since } => {
                self.credit = (self.credit + (now - since) / SHARE).min(MOST_CREDIT);
                let poll = (self.gap * 2).clamp(SHORTEST_POLL, WAKE_UP);
                if !self.sleeps_at_once() && poll <= self.credit {
                    State::Polling { since: now, until: now + poll }
                } else {
                    State::Sleeping { since: now }
                }
            }
            State::Polling { since, .. } => {
                self.credit = self.credit.saturating_sub(now - since);
                State::Sleeping { since }
            }
            sleeping => sleeping,
        };
        matches!(self.state, State::Polling { .. })
    }

    /// Whether [`Pace::polls_at`] would say no at once: whatever is to be told to the kernel can go
    /// with the system call that begins the sleep.
    pub fn sleeps_at_once(&self) -> bool {
        !self.may_poll || self.gap > WAKE_UP
    }

    /// A request is there `now`.
    pub fn work_at(&mut self, now: Instant) {
        if let State::Polling { since, .. } | State::Sleeping { since } = self.state {
            let gap = (now - since).min(LONGEST_GAP);
            self.gap = (self.gap * 7 + gap) / 8;
            self.state = State::Working { since: now };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: Duration = Duration::from_micros(10);

    /// A thread in simulated time.
    struct Thread {
        pace: Pace,
        now: Instant,
        polled: Duration,
        polls_in_vain: Duration,
    }

    impl Thread {
        fn new() -> Thread {
            let now = Instant::now();
            Thread {
                pace: Pace::new(now, true),
                now,
                polled: Duration::ZERO,
                polls_in_vain: Duration::ZERO,
            }
        }

        /// Serves a request, and gets the next one after `gap`, later by what a wake-up takes if it
        /// sleeps. Whether it slept.
        fn request_after(&mut self, gap: Duration, wake_up: Duration) -> bool {
            const LOOK: Duration = Duration::from_nanos(500);
            self.now += SERVICE;
            let idle = self.now;
            while self.pace.polls_at(self.now) {
                if self.now - idle >= gap {
                    self.polled += self.now - idle;
                    self.pace.work_at(self.now);
                    return false;
                }
                self.now += LOOK;
            }
            self.polled += self.now - idle;
            self.polls_in_vain += self.now - idle;
            self.now = self.now.max(idle + gap) + wake_up;
            self.pace.work_at(self.now);
            true
        }
    }

    fn micros(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    #[test]
    fn polls_where_the_next_request_comes_soon() {
        let mut thread = Thread::new();
        let slept = (0..1000).filter(|_| thread.request_after(micros(15), micros(20))).count();
        assert!(slept < 10, "{slept}");
    }

    #[test]
    fn sleeps_where_it_comes_late() {
        let mut thread = Thread::new();
        (0..1000).for_each(|_| _ = thread.request_after(micros(1000), micros(20)));
        assert!(thread.polled < micros(500), "{:?}", thread.polled);
    }

    #[test]
    fn polls_again_when_requests_come_soon_again() {
        let mut thread = Thread::new();
        (0..1000).for_each(|_| _ = thread.request_after(micros(1000), micros(20)));
        (0..30).for_each(|_| _ = thread.request_after(micros(15), micros(20)));
        assert!(!thread.request_after(micros(15), micros(20)));
    }

    #[test]
    fn polls_in_vain_use_a_fixed_part_of_the_work() {
        let mut thread = Thread::new();
        // Gaps of two kinds that average to one which is worth a poll, so that many polls are in
        // vain.
        for _ in 0..10_000 {
            thread.request_after(micros(5), micros(0));
            thread.request_after(micros(80), micros(0));
        }
        let allowed = SERVICE * 20_000 / SHARE + MOST_CREDIT + WAKE_UP;
        assert!(thread.polls_in_vain <= allowed, "{:?} {allowed:?}", thread.polls_in_vain);
    }

    #[test]
    fn sixty_four_clients_that_read_once_a_millisecond_cost_few_polls() {
        // Each has a thread of its own, or eight threads have eight each.
        for (threads, gap_us) in [(64.0, 1000), (8.0, 125)] {
            let mut thread = Thread::new();
            let begun = thread.now;
            let mut seed = 1_u64;
            while thread.now - begun < Duration::from_secs(1) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                thread.request_after(micros((seed >> 33) % (2 * gap_us)), micros(20));
            }
            let cpus = thread.polled.as_secs_f64() * threads;
            assert!(cpus < 0.1, "gap {gap_us} us: {cpus}");
        }
    }

    #[test]
    fn under_a_quota_no_thread_polls() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now, false);
        for _ in 0..1000 {
            pace.work_at(now);
            now += SERVICE;
            assert!(!pace.polls_at(now));
            now += micros(5);
        }
    }

    #[test]
    fn an_idle_thread_sleeps_until_it_is_woken() {
        let mut pace = Pace::new(Instant::now(), true);
        let later = Instant::now() + Duration::from_secs(1);
        let polling = (0..).take_while(|n| pace.polls_at(later + micros(*n))).count();
        assert!(polling <= 60);
        assert!((0..1000).all(|n| !pace.polls_at(later + micros(100 + n))));
    }
}
