//! The states of a request in flight.
//!
//! Three things happen to it ([`Step`]), each once: it is sent, the server replies, and the caller
//! lets go of it, with the answer or because it does not wait any more. They may come in any order;
//! the usual one is the first line.
//!
//! ```text
//!           sent           replied              let go
//! Sending ────────> Sent ────────────> Answered ────────> Free
//!  │  │              │                    ^                ^
//!  │  │              │ let go             │                │
//!  │  │ let go       v           replied  │                │
//!  │  │          Abandoned ───────────────│────────────────┤
//!  │  │              ^                    │                │
//!  │  │              │ sent               │                │
//!  │  └──────> AbandonedSending           │ sent           │
//!  │                 │                    │                │
//!  │ replied         │ replied            │                │
//!  │                 v           sent     │                │
//!  │             Finishing ───────────────│────────────────┘
//!  │                 ^                    │
//!  │                 │ let go             │
//!  └────────> AnsweredEarly ──────────────┘
//! ```

/// What happens to a request: each once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Its last byte has gone to the socket, or never will.
    Sent,
    /// Its reply is complete, or never will be.
    Replied,
    /// Its caller has the answer, or goes without.
    LetGo,
}

/// What has happened to a request so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Some of it waits in the send queue.
    Sending,
    /// The server has it, and the caller waits.
    Sent,
    /// The server has replied before it had all of it. The caller is to take the answer.
    AnsweredEarly,
    /// The caller is to take the answer.
    Answered,
    /// The caller has gone. What is left of it must be sent, and the reply is to come.
    AbandonedSending,
    /// The caller has gone, and the reply is to come.
    Abandoned,
    /// The server has replied and the caller has gone, but what is left of it must be sent: the
    /// server takes what comes for it.
    Finishing,
    /// All is over.
    Free,
}

impl State {
    /// The state after `step`. All there is to a request's life.
    pub fn after(self, step: Step) -> State {
        match (self, step) {
            (State::Sending, Step::Sent) => State::Sent,
            (State::Sending, Step::Replied) => State::AnsweredEarly,
            (State::Sending, Step::LetGo) => State::AbandonedSending,
            (State::Sent, Step::Replied) => State::Answered,
            (State::Sent, Step::LetGo) => State::Abandoned,
            (State::AnsweredEarly, Step::Sent) => State::Answered,
            (State::AnsweredEarly, Step::LetGo) => State::Finishing,
            (State::AbandonedSending, Step::Sent) => State::Abandoned,
            (State::AbandonedSending, Step::Replied) => State::Finishing,
            (State::Answered, Step::LetGo) => State::Free,
            (State::Abandoned, Step::Replied) => State::Free,
            (State::Finishing, Step::Sent) => State::Free,
            (state, step) => unreachable!("{step:?} of a request that is {state:?}"),
        }
    }

    /// Whether [`Step::Sent`] is to come.
    pub fn is_sending(self) -> bool {
        use State::*;
        matches!(self, Sending | AnsweredEarly | AbandonedSending | Finishing)
    }

    /// Whether [`Step::Replied`] is to come.
    pub fn awaits_reply(self) -> bool {
        use State::*;
        matches!(self, Sending | Sent | AbandonedSending | Abandoned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_steps_in_any_order_free_the_slot() {
        use Step::*;
        for steps in [
            [Sent, Replied, LetGo],
            [Sent, LetGo, Replied],
            [Replied, Sent, LetGo],
            [Replied, LetGo, Sent],
            [LetGo, Sent, Replied],
            [LetGo, Replied, Sent],
        ] {
            let mut state = State::Sending;
            for (at, step) in steps.into_iter().enumerate() {
                assert!(state != State::Free, "{steps:?}");
                assert_eq!(state.is_sending(), steps[at..].contains(&Sent), "{steps:?}");
                assert_eq!(state.awaits_reply(), steps[at..].contains(&Replied), "{steps:?}");
                state = state.after(step);
            }
            assert_eq!(state, State::Free, "{steps:?}");
        }
    }

    #[test]
    #[should_panic(expected = "Sent of a request that is Sent")]
    fn no_step_is_taken_twice() {
        State::Sending.after(Step::Sent).after(Step::Sent);
    }
}
