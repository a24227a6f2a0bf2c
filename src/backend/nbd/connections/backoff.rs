//! How long to wait between attempts that fail: to reach a server again, or to send a request whose
//! connections are lost.

use std::time::Duration;

/// The first pause, and the longest: each is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// So many doublings are more than the longest pause needs.
const DOUBLINGS: u32 = 10;

/// The pauses after attempts in a row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    /// How many pauses there have been.
    pauses: u32,
}

impl Backoff {
    /// As it is when there have been so many pauses.
    pub(super) fn after(pauses: u32) -> Backoff {
        Backoff { pauses }
    }

    /// The pause before the next attempt.
    pub(super) fn next_pause(&mut self) -> Duration {
        let (first, longest) = PAUSES;
        let pause = first * (1 << self.pauses.min(DOUBLINGS));
        self.pauses = self.pauses.saturating_add(1);
        pause.min(longest)
    }

    /// As [`Backoff::next_pause`], and up to half longer or shorter, so that not all clients of a
    /// server come at once.
    pub(super) fn next_random_pause(&mut self) -> Duration {
        self.next_pause().mul_f64(0.5 + fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECTED: [u64; 8] = [50, 100, 200, 400, 800, 1600, 2000, 2000];

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut backoff = Backoff::default();
        for expected in EXPECTED.map(Duration::from_millis) {
            assert_eq!(backoff.next_pause(), expected);
        }
        assert_eq!(Backoff::after(3).next_pause(), Duration::from_millis(EXPECTED[3]));
        let mut late = Backoff::after(u32::MAX);
        assert_eq!([late.next_pause(), late.next_pause()], [PAUSES.1; 2]);
    }

    #[test]
    fn random_pauses_are_half_longer_or_shorter() {
        let mut backoff = Backoff::default();
        for expected in EXPECTED.map(Duration::from_millis) {
            let pause = backoff.next_random_pause();
            assert!((expected / 2..=expected * 3 / 2).contains(&pause), "{pause:?}: {expected:?}");
        }
    }
}
