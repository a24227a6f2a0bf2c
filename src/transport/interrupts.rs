//! INTERRUPT: gives up requests whose client is being killed.
//!
//! When a signal reaches a client that waits, the kernel sends INTERRUPT, once, and goes on waiting
//! for the answer: until it comes not even `kill -9` works. The server's answer may never come, so
//! a request that waits for another host is answered with `EINTR` as soon as its client is being
//! ended, and what the server says later is dropped.
//!
//! INTERRUPT does not say which signal it was. For a disk most of them had better do nothing: a
//! program with an interval timer, or children, does not expect `EINTR` from a file. So /proc is
//! asked, again and again while the request waits: a later SIGKILL brings no second INTERRUPT.
//!
//! It comes by /dev/fuse, whichever transport its request has come by, and before or after it. Each
//! serving thread keeps its own requests, so it is passed on to all of them: there are few.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use slab::Slab;
use smol::channel::{self, Receiver, Sender};

/// How many INTERRUPTs without a request a thread keeps in mind, and how many wait for it. Most of
/// those that find none are for requests that have just been answered.
const KEPT: usize = 64;
/// How often a client that has had a signal is looked at.
pub const LOOK: Duration = Duration::from_millis(200);

/// Passes INTERRUPTs on to all serving threads.
#[derive(Clone, Debug, Default)]
pub struct Interrupts(Arc<Mutex<Vec<Sender<u64>>>>);

impl Interrupts {
    /// For one more thread: the numbers of interrupted requests come here.
    pub fn listen(&self) -> Receiver<u64> {
        let (sender, receiver) = channel::bounded(KEPT);
        self.lock().push(sender);
        receiver
    }

    /// The client of request `unique` has had a signal.
    pub fn interrupt(&self, unique: u64) {
        for thread in self.lock().iter() {
            // One that has ended, or has that many to look at.
            let _ = thread.try_send(unique);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Sender<u64>>> {
        self.0.lock().expect("no code panics while it holds the list")
    }
}

/// The requests of one thread that wait and may be given up.
#[derive(Debug, Default)]
pub struct Waiting {
    requests: RefCell<Slab<Request>>,
    /// INTERRUPTs that came before their request.
    early: RefCell<VecDeque<u64>>,
}

#[derive(Debug)]
struct Request {
    unique: u64,
    interrupted: bool,
    waker: Waker,
}

impl Waiting {
    /// Request `unique` begins to wait. It is in the list until the guard is dropped.
    pub fn begin(&self, unique: u64, cx: &Context<'_>) -> Guard<'_> {
        let mut early = self.early.borrow_mut();
        let known = early.iter().position(|&came| came == unique);
        let interrupted = known.and_then(|at| early.remove(at)).is_some();
        let request = Request { unique, interrupted, waker: cx.waker().clone() };
        Guard { waiting: self, key: self.requests.borrow_mut().insert(request) }
    }

    /// Notes an INTERRUPT.
    pub fn interrupt(&self, unique: u64) {
        for (_, request) in self.requests.borrow_mut().iter_mut() {
            if request.unique == unique {
                request.interrupted = true;
                return request.waker.wake_by_ref();
            }
        }
        let mut early = self.early.borrow_mut();
        if early.len() == KEPT {
            early.pop_front();
        }
        early.push_back(unique);
    }
}

/// A request's place in the list.
#[derive(Debug)]
pub struct Guard<'a> {
    waiting: &'a Waiting,
    key: usize,
}

impl Guard<'_> {
    /// Whether an INTERRUPT has come for it. If not, `cx` is woken when one comes.
    pub fn is_interrupted(&self, cx: &Context<'_>) -> bool {
        let mut requests = self.waiting.requests.borrow_mut();
        let request = &mut requests[self.key];
        request.waker.clone_from(cx.waker());
        request.interrupted
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.waiting.requests.borrow_mut().remove(self.key);
    }
}

/// Whether thread `pid` is being ended: by a signal that kills it, or by one that asks it to end,
/// which it may catch. May block, as [`was_killed`] may. Of one that this process cannot see (0: of
/// another PID namespace) nothing is known, and it is taken to be.
pub fn is_ending(pid: u32) -> bool {
    pid == 0
        || std::fs::read_to_string(format!("/proc/{pid}/status"))
            .map_or(true, |status| has_fatal_signal(&status))
}

/// Whether thread `pid` is in its exit, and a signal has killed it: no further signal can reach it,
/// and no INTERRUPT will come. Blocks as long as it executes a program, closes of files included.
pub fn was_killed(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    pid != 0 && stat.is_ok_and(|stat| is_killed_stat(&stat))
}

/// From the text of /proc/PID/stat (proc_pid_stat(5)): field 9 holds the flags. (The exit code at
/// its end is shown only to those who might trace the process, which this one may not.)
fn is_killed_stat(stat: &str) -> bool {
    // include/linux/sched.h: in do_exit, and by a signal.
    const PF_EXITING: u64 = 0x4;
    const PF_SIGNALED: u64 = 0x400;
    const BOTH: u64 = PF_EXITING | PF_SIGNALED;
    // The name may have anything in it; what follows has no bracket. It begins with field 3.
    let Some((_, rest)) = stat.rsplit_once(')') else { return false };
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let flags = fields.get(9 - 3).and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & BOTH == BOTH)
}

/// From the text of /proc/PID/status.
fn has_fatal_signal(status: &str) -> bool {
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
    };
    let bits = |signals: &[libc::c_int]| signals.iter().fold(0, |bits, s| bits | 1_u64 << (s - 1));
    let ask_to_end = bits(&[libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM]);
    let harmless = bits(&[
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGURG,
        libc::SIGWINCH,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
    ]);
    let pending = (mask("SigPnd") | mask("ShdPnd")) & !mask("SigBlk") & !mask("SigIgn");
    let kills = !mask("SigCgt") & !harmless;
    pending & (ask_to_end | kills) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn an_interrupt_wakes_its_request_only() {
        let (waiting, woken) = (Waiting::default(), Arc::new(Woken::default()));
        let waker = Waker::from(woken.clone());
        let cx = Context::from_waker(&waker);
        let (one, other) = (waiting.begin(2, &cx), waiting.begin(4, &cx));
        waiting.interrupt(4);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(!one.is_interrupted(&cx) && other.is_interrupted(&cx));
        drop((one, other));
        assert!(waiting.requests.borrow().is_empty());
    }

    #[test]
    fn an_interrupt_may_come_before_its_request() {
        let waiting = Waiting::default();
        let cx = Context::from_waker(Waker::noop());
        (0..1000).for_each(|unique| waiting.interrupt(unique));
        assert!(waiting.begin(999, &cx).is_interrupted(&cx));
        assert!(!waiting.begin(999, &cx).is_interrupted(&cx), "once");
        assert!(!waiting.begin(1, &cx).is_interrupted(&cx), "forgotten");
        assert!(waiting.early.borrow().len() < KEPT);
    }

    #[test]
    fn only_signals_that_end_a_program_count() {
        let status = |pending: &[i32], caught: &[i32], ignored: &[i32]| {
            let mask = |s: &[i32]| s.iter().fold(0_u64, |bits, s| bits | 1 << (s - 1));
            has_fatal_signal(&format!(
                "Name:\tx\nSigPnd:\t{:016x}\nShdPnd:\t{:016x}\nSigBlk:\t0\nSigIgn:\t{:016x}\nSigCgt:\t{:016x}\n",
                0,
                mask(pending),
                mask(ignored),
                mask(caught)
            ))
        };
        use libc::*;
        assert!(status(&[SIGKILL], &[], &[]));
        assert!(status(&[SIGINT], &[], &[]) && status(&[SIGINT], &[SIGINT], &[]));
        assert!(!status(&[SIGINT], &[], &[SIGINT]));
        assert!(status(&[SIGALRM], &[], &[]) && !status(&[SIGALRM], &[SIGALRM], &[]));
        assert!(!status(&[SIGCHLD, SIGWINCH, SIGURG], &[], &[]) && !status(&[], &[], &[]));
    }

    #[test]
    fn a_killed_process_is_told_from_one_that_ends() {
        let stat = |flags: u64| {
            let behind = "0 ".repeat(52 - 9);
            is_killed_stat(&format!("7 (a) b) R 1 7 7 0 -1 {flags} {behind}\n"))
        };
        assert!(stat(0x404) && stat(0x40_0404));
        assert!(!stat(0x4) && !stat(0x400) && !stat(0));
    }
}
