//! When to poll, when to sleep and when to rest, and where to run.
//!
//! Waking a sleeping thread on an idle virtual CPU costs more than the request it wakes for, so a short
//! poll before sleeping is what makes depth 1 fast. It pays only where the next request comes within the
//! time of the poll; each [`Poller`] finds that out from its own history. It yields the CPU at each look, so
//! that polling uses only time that nobody else wants.

use std::cell::Cell;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::sys::{self, CpuSet};

/// How long a poll lasts at most: it must outlast the client's own wake-up and its next submission, or it meets
/// nobody and unlearns itself.
const POLL: Duration = Duration::from_micros(100);
/// How long a thread polls, times [`POLL`], ...
const PRESENT_POLLS: u32 = 10;
/// ... and then sleeps, while its client is on another CPU and had better stay there. The kernel wakes the client on this
/// one only if it is idle just then, and does not even look for an idle one while the CPUs with a common cache are more
/// than 60 % busy together (`SIS_UTIL` in kernel/sched/fair.c). Of two CPUs, one is busy with the client, so a good
/// fifth of the other's time will do.
const ABSENT: Duration = Duration::from_millis(3);
/// The time slice of a thread that polls, the shortest that the scheduler has: a yield gives up the rest of a slice
/// (`yield_task_fair` in kernel/sched/fair.c), and the thread's turn comes again the sooner, the less that is.
const SLICE: Duration = Duration::from_micros(100);
/// Score limits: a poll that meets a request adds one, one in vain takes two away.
const BEST: i32 = 16;
const WORST: i32 = -8;
/// While polling does not pay, one sleep in so many is preceded by a poll all the same, to learn whether
/// times have changed.
const PROBE: u32 = 64;

/// How long a thread goes without a [`Rest`], ...
const WORK: Duration = Duration::from_millis(50);
/// ... and how long that is at least.
const REST: Duration = Duration::from_micros(100);

/// Average numbers of requests at once, times 16, at which a thread is pinned and let go.
const SMALL_BATCH: usize = 2 * 16;
/// See [`SMALL_BATCH`].
const LARGE_BATCH: usize = 4 * 16;
/// A queue has several clients if two of so many requests that follow each other came from different ones.
const SHARED_WITHIN: usize = 256;

/// Decides for one thread, whenever it has nothing to do, whether to look again or to sleep.
#[derive(Debug)]
pub struct Poller {
    enabled: bool,
    score: i32,
    sleeps: u32,
    under_way: Option<Poll>,
    /// The last poll has met nobody here, but others have met requests meanwhile.
    is_elsewhere: bool,
    /// The next poll is to keep the client there.
    is_absent: bool,
}

/// A poll under way.
#[derive(Debug)]
struct Poll {
    until: Instant,
    /// How many requests others have met when it has not been in vain.
    enough_elsewhere: usize,
}

/// Gives the calling thread the shortest time slice.
///
/// Not to one whose backend waits for a server or a disk: with a slice shorter than theirs it takes the CPU from those that
/// are about to complete more, at each completion, and does with one at a time what costs hardly more by the dozen.
pub fn take_short_turns() {
    if let Err(e) = sys::set_time_slice(SLICE) {
        log::debug!("sched_setattr: {e}");
    }
}

impl Poller {
    /// For the calling thread: one that polls if `enabled`, and else always sleeps.
    pub fn new(enabled: bool) -> Poller {
        Poller {
            enabled,
            score: 0,
            sleeps: 0,
            under_way: None,
            is_elsewhere: false,
            is_absent: false,
        }
    }

    /// Nothing is there `now`: whether to look again, rather than sleep. `elsewhere` counts the requests that other threads
    /// have met so far.
    ///
    /// A poll is not in vain if the client has only moved to another CPU: it is the poll that keeps it there, as no CPU
    /// is idle for it to be woken on. Were it held against polling, no thread would poll any more, and the client
    /// would move with each request.
    pub fn idle(&mut self, now: Instant, elsewhere: impl Fn() -> usize) -> bool {
        if let Some(Poll { until, enough_elsewhere }) = self.under_way {
            if now < until {
                // The client may be waiting for this very CPU: a poll that kept it would meet nobody. On an idle
                // CPU this is a short system call.
                std::thread::yield_now();
                return true;
            }
            self.under_way = None;
            self.is_elsewhere = elsewhere().wrapping_sub(enough_elsewhere) as isize >= 0;
            self.score = if self.is_elsewhere {
                self.score.max((self.score + 1).min(0))
            } else {
                (self.score - 2).max(WORST)
            };
            return false;
        }
        self.sleeps = self.sleeps.wrapping_add(1);
        let keeps_away = std::mem::take(&mut self.is_absent);
        if keeps_away || self.enabled && (self.score >= 0 || self.sleeps.is_multiple_of(PROBE)) {
            let polls = if keeps_away { PRESENT_POLLS } else { 1 };
            self.under_way = Some(Poll {
                until: now + POLL * polls,
                enough_elsewhere: elsewhere().wrapping_add(polls as usize),
            });
            return true;
        }
        false
    }

    /// The sleep that [`Poller::idle`] has advised should be no longer than this, and a poll follow it: the client is
    /// elsewhere, and each time that it moves costs more than three requests.
    pub fn absence(&mut self) -> Option<Duration> {
        self.is_absent = std::mem::take(&mut self.is_elsewhere);
        self.is_absent.then_some(ABSENT)
    }

    /// A request is there.
    pub fn busy(&mut self) {
        (self.is_elsewhere, self.is_absent) = (false, false);
        if self.under_way.take().is_some() {
            self.score = (self.score + 1).min(BEST);
        }
    }
}

/// Sees to it that the threads of a queue and its clients leave their CPU to others now and then.
///
/// Clients that wait for each answer wake the thread before they sleep, and it wakes them before it does, so there is
/// always one of them to run. If they are in a task group (a session, where `sched_autogroup_enabled` is set, or a
/// cgroup) that is busy on several CPUs, Linux 6.18 may then not run what is in none, that is the kernel's workers, for
/// a minute and more: the group's share of a CPU changes each time one of its tasks wakes or sleeps, and with it its
/// place in line is calculated anew (`reweight_entity` in kernel/sched/fair.c), and stays ahead of theirs. Write-back
/// stands still, and who waits for it hangs. When this thread does not answer for a moment, all of them sleep, and the
/// others' turn comes.
#[derive(Debug)]
pub struct Rest {
    /// When it last rested, or had no reason to.
    last: Instant,
    /// The requests that had arrived here, and elsewhere, when it was last due.
    here: usize,
    elsewhere: usize,
}

impl Rest {
    /// For a thread that begins to work.
    pub fn starting_now() -> Rest {
        Rest { last: Instant::now(), here: 0, elsewhere: 0 }
    }

    /// Nothing is there: rests if it is time for that, and says whether it did. `here` and `elsewhere` count the
    /// requests that have arrived on this thread and on others so far.
    pub fn if_due(
        &mut self,
        now: Instant,
        here: impl FnOnce() -> usize,
        elsewhere: impl FnOnce() -> usize,
    ) -> bool {
        if now.saturating_duration_since(self.last) < WORK {
            return false;
        }
        self.last = now;
        let (here, elsewhere) = (here(), elsewhere());
        let here_since = here.wrapping_sub(std::mem::replace(&mut self.here, here));
        let elsewhere_since =
            elsewhere.wrapping_sub(std::mem::replace(&mut self.elsewhere, elsewhere));
        // A single client is on one CPU at a time.
        let others_are_busy = elsewhere_since > here_since / 4;
        if others_are_busy {
            std::thread::sleep(REST);
        }
        others_are_busy
    }

    /// Sleeps by `sleep`, which is a rest as well if it lasts.
    pub fn during<T>(&mut self, sleep: impl FnOnce() -> T) -> T {
        let before = Instant::now();
        let slept = sleep();
        let after = Instant::now();
        if after - before >= REST {
            self.last = after;
        }
        slept
    }
}

/// Where this process may run; known before the first thread is pinned.
static ANYWHERE: OnceLock<Option<CpuSet>> = OnceLock::new();

fn anywhere() -> Option<&'static CpuSet> {
    ANYWHERE.get_or_init(|| CpuSet::current().ok()).as_ref()
}

/// Lets this thread run anywhere, if the one that started it was pinned.
pub fn unpin() {
    thread_local!(static UNPINNED: Cell<bool> = const { Cell::new(false) });
    if !UNPINNED.replace(true)
        && let Some(anywhere) = ANYWHERE.get().and_then(Option::as_ref)
        && let Err(e) = anywhere.apply()
    {
        log::debug!("sched_setaffinity: {e}");
    }
}

/// Decides where a queue's thread runs: on its queue's CPU while it has a request or two at a time, since
/// there the client's data is in the cache and no other CPU has to be woken; anywhere once there are more, so
/// that the client goes on submitting while they are served.
///
/// But busy clients that share a CPU say that there is none idle, or the scheduler would have moved one there. Then all
/// threads stay at home: one that left would take another CPU's time and drive its clients away, and one queue
/// would have all the work while its clients' data is in another CPU's cache. Clients that sleep until a disk
/// or a server answers say nothing of the kind.
pub struct Pin {
    home: CpuSet,
    anywhere: Option<&'static CpuSet>,
    pinned: bool,
    /// A moving average of the requests at once, times 16.
    average: usize,
    /// The thread that made the last request, and how many it has made since another's.
    client: u32,
    in_a_row: usize,
}

impl Pin {
    /// For the queue of `cpu`; never pins where this thread may not run there.
    pub fn new(cpu: usize) -> Pin {
        let anywhere = anywhere().filter(|set| set.contains(cpu));
        Pin {
            home: CpuSet::only(cpu),
            anywhere,
            pinned: false,
            average: 16,
            client: 0,
            in_a_row: SHARED_WITHIN,
        }
    }

    /// The thread `client` has made a request that does not wait for anything.
    pub fn request_of(&mut self, client: u32) {
        if client == self.client {
            self.in_a_row = self.in_a_row.saturating_add(1);
        } else {
            (self.client, self.in_a_row) = (client, 0);
        }
    }

    /// Whether the thread stays on its queue's CPU.
    pub fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// So many requests came, or wait for the backend, at once.
    pub fn batch(&mut self, requests: usize) {
        let Some(anywhere) = self.anywhere else { return };
        self.average = (self.average * 15 + requests * 16) / 16;
        let is_shared = self.in_a_row < SHARED_WITHIN;
        // Two thresholds, or it would move for ever between them.
        let is_small =
            if self.pinned { self.average <= LARGE_BATCH } else { self.average <= SMALL_BATCH };
        let pin = is_small || is_shared;
        if pin != self.pinned {
            let set = if pin { &self.home } else { anywhere };
            // A CPU may go offline: then the thread stays where it is.
            if let Err(e) = set.apply() {
                log::debug!("sched_setaffinity: {e}");
            }
            self.pinned = pin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Polls in vain until it would sleep, while others meet so many requests; whether there was a poll at all.
    fn polls_while_others_meet(poller: &mut Poller, requests: usize) -> bool {
        let now = Instant::now();
        let polled = poller.idle(now, || 0);
        if polled {
            let now = now + POLL * PRESENT_POLLS;
            assert!(!poller.idle(now, || requests));
        }
        polled
    }

    fn polls_in_vain(poller: &mut Poller) -> bool {
        polls_while_others_meet(poller, 0)
    }

    #[test]
    fn stops_polling_when_it_is_in_vain_and_probes_again() {
        let mut poller = Poller::new(true);
        let polls = (0..1000).filter(|_| polls_in_vain(&mut poller)).count();
        assert!((10..30).contains(&polls), "{polls}");
    }

    #[test]
    fn goes_back_to_polling_when_it_pays_again() {
        let mut poller = Poller::new(true);
        (0..100).for_each(|_| _ = polls_in_vain(&mut poller));
        for _ in 0..WORST.unsigned_abs() * PROBE {
            if poller.idle(Instant::now(), || 0) {
                poller.busy();
            }
        }
        for _ in 0..10 {
            assert!(poller.idle(Instant::now(), || 0));
            poller.busy();
        }
    }

    #[test]
    fn a_client_that_moves_keeps_it_polling() {
        let mut poller = Poller::new(true);
        assert!((0..1000).all(|_| polls_while_others_meet(&mut poller, 1)));
    }

    #[test]
    fn a_client_that_moves_is_kept_away_as_long_as_it_is_busy() {
        let mut poller = Poller::new(true);
        let many = PRESENT_POLLS as usize;
        polls_while_others_meet(&mut poller, 1);
        for _ in 0..1000 {
            assert_eq!(poller.absence(), Some(ABSENT));
            assert!(polls_while_others_meet(&mut poller, many));
        }
        assert!(poller.absence().is_some());
        assert!(polls_while_others_meet(&mut poller, many - 1));
        assert_eq!(poller.absence(), None, "a poll here would not pay");
    }

    #[test]
    fn a_client_that_has_come_is_not_kept_away() {
        let mut poller = Poller::new(true);
        polls_while_others_meet(&mut poller, 1);
        assert!(poller.absence().is_some());
        poller.busy();
        assert_eq!(poller.absence(), None);
    }

    #[test]
    fn a_client_that_moves_brings_polling_back() {
        let mut poller = Poller::new(true);
        (0..100).for_each(|_| _ = polls_in_vain(&mut poller));
        for _ in 0..WORST.unsigned_abs() * PROBE {
            polls_while_others_meet(&mut poller, 1);
        }
        assert!(polls_while_others_meet(&mut poller, 1));
    }

    /// Whether the last of so many batches of `requests` leaves the thread pinned, each made by the next of `clients`.
    fn is_pinned_by(requests: usize, clients: &[u32]) -> bool {
        let mut pin = Pin::new(0);
        for client in clients.iter().cycle().take(100) {
            (0..requests).for_each(|_| pin.request_of(*client));
            pin.batch(requests);
        }
        pin.pinned
    }

    #[test]
    fn stays_at_home_for_small_batches_and_for_several_clients() {
        if !CpuSet::current().unwrap().contains(0) {
            return println!("skipped: not allowed on CPU 0");
        }
        // On a thread of its own, which it pins.
        std::thread::spawn(|| {
            assert!(is_pinned_by(1, &[7]));
            assert!(!is_pinned_by(64, &[7]));
            assert!(is_pinned_by(64, &[7, 8]));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn rests_where_several_cpus_are_busy() {
        let mut rest = Rest::starting_now();
        let mut rests = |here, elsewhere| {
            rest.last = Instant::now() - WORK;
            rest.if_due(Instant::now(), || here, || elsewhere)
        };
        assert!(rests(1000, 1000));
        assert!(!rests(2000, 1100), "that is one client, which has moved");
        assert!(rests(3000, 2000));
    }

    #[test]
    fn a_sleep_that_lasts_is_a_rest() {
        let mut rest = Rest::starting_now();
        let begun = Instant::now() - WORK;
        rest.last = begun;
        rest.during(|| ());
        assert_eq!(rest.last, begun);
        rest.during(|| std::thread::sleep(REST));
        assert!(rest.last > begun);
    }

    #[test]
    fn never_polls_when_disabled() {
        let mut poller = Poller::new(false);
        assert!((0..1000).all(|_| !poller.idle(Instant::now(), || 0)));
    }
}
