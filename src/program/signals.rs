//! Signals: which of them the program takes over, and what each asks it for.
//!
//! A process that a signal kills leaves a dead mount behind. So every signal that would kill it and
//! is no sign of a fault in the program itself (SIGSEGV, SIGABRT and their like) is blocked in all
//! threads, and read by the control thread from a descriptor. What was ignored, or had a handler,
//! when the program was started stays as it was.

use std::io;
use std::os::fd::OwnedFd;

use crate::sys;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To end.
    End,
    /// A line with the counters.
    Statistics,
    /// Nothing; or a child has ended, which is looked for after every wake-up.
    Nothing,
}

/// Also taken where they were ignored: shells ignore SIGINT for what they start in the background,
/// and a descriptor reads it all the same.
const ALWAYS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGCHLD];
/// Besides those of a terminal: a timer that whoever has executed the program has set as a limit
/// (alarm(2) outlives execve(2)), the limit of CPU time, and the power's failure.
const ENDS: [libc::c_int; 7] = [
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGXCPU,
    libc::SIGPWR,
];
const STATISTICS: libc::c_int = libc::SIGUSR1;
/// Nobody means the end of this program by them. The real-time signals are of their kind.
const IGNORED: [libc::c_int; 3] = [libc::SIGUSR2, libc::SIGIO, libc::SIGSTKFLT];

/// The signals of this process that are taken over.
pub struct Signals {
    descriptor: OwnedFd,
    before: sys::SignalsBefore,
}

impl Signals {
    /// Takes the signals over, for this thread and all that it starts from now on.
    pub fn take() -> io::Result<Signals> {
        Signals::take_and(&[])
    }

    /// The same with more of them, each of which asks for [`Wish::Nothing`].
    pub fn take_and(more: &[libc::c_int]) -> io::Result<Signals> {
        let others = ENDS.into_iter().chain([STATISTICS]).chain(IGNORED);
        let others = others.chain(more.iter().copied());
        let others = others.chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
        let others = others.filter(|signal| sys::is_default(*signal));
        let taken: Vec<_> = ALWAYS.into_iter().chain(others).collect();
        let (descriptor, before) = sys::signal_fd(&taken)?;
        Ok(Signals { descriptor, before })
    }

    /// Polls readable when one is pending.
    pub fn descriptor(&self) -> &OwnedFd {
        &self.descriptor
    }

    /// How they were before, for a command that is started in turn.
    pub fn before(&self) -> sys::SignalsBefore {
        self.before
    }

    /// The next one that is pending.
    pub fn next(&self) -> io::Result<Option<sys::Signal>> {
        sys::next_signal(&self.descriptor)
    }
}

impl sys::Signal {
    /// What it asks for.
    pub fn wish(self) -> Wish {
        match self.number {
            libc::SIGINT | libc::SIGTERM => Wish::End,
            number if ENDS.contains(&number) => Wish::End,
            STATISTICS => Wish::Statistics,
            _ => Wish::Nothing,
        }
    }

    /// Whether the terminal has sent it, to the whole foreground process group.
    pub fn is_of_terminal(self) -> bool {
        let is_one = [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP].contains(&self.number);
        is_one && self.by_kernel
    }
}
