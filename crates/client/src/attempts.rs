//! Retry policy over several routers. Pure: the time comes in as an argument.
//!
//! Always holds: each of several routers is tried once before any is tried again, after a growing pause. Attempts in a row
//! without progress are bounded in number, and in time while no router accepts the request.

use std::time::{Duration, Instant};

use crate::policy::Policy;

/// The first pause; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause, unless a router asks for a longer one.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Times that each router may accept a request and then give it up itself: each time it has waited for its experts.
const GIVEN_UP: usize = 3;
/// Longest pause that a router may ask for.
const LONGEST_HINT: Duration = Duration::from_secs(10);

/// The attempts at one request.
#[derive(Debug)]
pub(crate) struct Attempts {
    routers: usize,
    patience: Duration,
    most: u32,
    in_a_row: u32,
    /// Attempts among these in which a router accepted the request and gave it up itself.
    given_up: usize,
    /// Time without a router so far, since the last progress.
    waited: Duration,
    /// Start of the time without a router.
    lost_at: Option<Instant>,
}

impl Attempts {
    pub(crate) fn new(routers: usize, policy: &Policy) -> Self {
        let Policy { patience, attempts: most, .. } = *policy;
        let (in_a_row, given_up, waited) = (0, 0, Duration::ZERO);
        Self { routers: routers.max(1), patience, most, in_a_row, given_up, waited, lost_at: None }
    }

    /// Records that a router accepted the request: no time counts until it is lost again.
    pub(crate) fn admitted(&mut self, now: Instant) {
        if let Some(since) = self.lost_at.take() {
            self.waited += now.saturating_duration_since(since);
        }
    }

    /// Records progress.
    pub(crate) const fn progressed(&mut self) {
        (self.in_a_row, self.given_up) = (0, 0);
        (self.waited, self.lost_at) = (Duration::ZERO, None);
    }

    /// Records that the router gave the request up.
    pub(crate) const fn given_up(&mut self) {
        self.given_up += 1;
    }

    /// Records a failed attempt, for which the router asks for a pause of `hint`. Returns the time of the next attempt, or `None`
    /// after the last.
    pub(crate) fn failed(&mut self, now: Instant, hint: Option<Duration>) -> Option<Instant> {
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.admitted(now);
        self.lost_at = Some(now);
        let pause = self.pause(hint);
        let may = self.in_a_row < self.most && self.given_up < GIVEN_UP * self.routers;
        (may && self.waited + pause <= self.patience).then(|| now + pause)
    }

    fn pause(&self, hint: Option<Duration>) -> Duration {
        let in_a_row = self.in_a_row as usize;
        if !in_a_row.is_multiple_of(self.routers) {
            return Duration::ZERO;
        }
        let rounds = u32::try_from(in_a_row / self.routers).unwrap_or(u32::MAX);
        let doubled = FIRST_PAUSE.saturating_mul(1 << (rounds - 1).min(10));
        doubled.min(LONGEST_PAUSE).max(hint.unwrap_or_default().min(LONGEST_HINT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy { patience: Duration::from_secs(3), attempts: 20, ..Policy::default() }
    }

    #[test]
    fn every_router_is_asked_before_a_pause_that_grows() {
        let now = Instant::now();
        let mut attempts = Attempts::new(3, &policy());
        let pauses: Vec<u128> =
            (0..9).map(|_| (attempts.failed(now, None).unwrap() - now).as_millis()).collect();
        assert_eq!(pauses, [0, 0, 50, 0, 0, 100, 0, 0, 200]);
        attempts.progressed();
        assert_eq!(attempts.failed(now, None), Some(now));
    }

    #[test]
    fn a_hint_is_followed_within_reason() {
        let now = Instant::now();
        let mut attempts = Attempts::new(1, &policy());
        assert_eq!(attempts.failed(now, Some(Duration::from_secs(2))), Some(now + Duration::from_secs(2)));
        assert_eq!(attempts.failed(now, Some(Duration::from_secs(9999))), None, "longer than patience");
    }

    #[test]
    fn time_without_a_router_is_bounded() {
        let mut now = Instant::now();
        let began = now;
        let mut attempts = Attempts::new(1, &policy());
        while let Some(next) = attempts.failed(now, None) {
            now = next;
        }
        let waited = now - began;
        assert!((Duration::from_secs(2)..=Duration::from_secs(3)).contains(&waited), "{waited:?}");
        // Long in a queue is not long without a router.
        let mut attempts = Attempts::new(1, &policy());
        assert!(attempts.failed(now, None).is_some());
        attempts.admitted(now);
        assert!(attempts.failed(now + Duration::from_secs(60), None).is_some());
        // But what passes between losing and finding one adds up.
        now += Duration::from_secs(63);
        attempts.admitted(now);
        assert!(attempts.failed(now, None).is_none());
    }

    #[test]
    fn routers_that_give_up_by_their_own_word_are_asked_a_few_times() {
        let now = Instant::now();
        let mut attempts = Attempts::new(2, &policy());
        let mut tries = 0;
        loop {
            attempts.given_up();
            tries += 1;
            if attempts.failed(now, None).is_none() {
                break;
            }
            attempts.admitted(now);
        }
        assert_eq!(tries, 2 * GIVEN_UP);
        attempts.progressed();
        attempts.given_up();
        assert!(attempts.failed(now, None).is_some());
    }

    #[test]
    fn routers_that_admit_and_break_are_not_asked_for_ever() {
        let now = Instant::now();
        let mut attempts = Attempts::new(1, &policy());
        let mut tries = 0;
        while attempts.failed(now, None).is_some() {
            attempts.admitted(now);
            tries += 1;
        }
        assert_eq!(tries, 19);
    }
}
