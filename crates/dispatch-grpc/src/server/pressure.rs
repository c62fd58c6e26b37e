//! How busy a worker is: the part of the time in which its experts' thread computed.
//!
//! That thread computes one call after the other, so that a part of 1 means that shards wait. It is what more workers help
//! against, whatever the reason; the processor's load is not, for threads that wait for messages poll.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Time that was worked, to be looked at from time to time.
#[derive(Debug, Default)]
pub struct Pressure {
    nanos: AtomicU64,
}

impl Pressure {
    pub(super) fn worked(&self, time: Duration) {
        self.nanos.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Time that was worked since the start.
    #[must_use]
    pub fn worked_so_far(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }
}

/// Smooths what is looked at every now and then: an average in which what is long ago counts less.
#[derive(Debug)]
pub struct Smoothed {
    over: Duration,
    worked: Duration,
    part: f64,
}

impl Smoothed {
    /// Over about that time.
    #[must_use]
    pub const fn new(over: Duration) -> Self {
        Self { over, worked: Duration::ZERO, part: 0.0 }
    }

    /// Counts what was worked so far, `elapsed` after the last time. Gives the part, from 0 to 1.
    pub fn look(&mut self, worked: Duration, elapsed: Duration) -> f64 {
        if elapsed.is_zero() {
            return self.part;
        }
        let now = (worked.saturating_sub(self.worked).as_secs_f64() / elapsed.as_secs_f64()).min(1.0);
        self.worked = worked;
        let weight = 1.0 - (-elapsed.as_secs_f64() / self.over.as_secs_f64()).exp();
        self.part += (now - self.part) * weight;
        self.part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_follows_what_is_worked() {
        let (second, mut smoothed) = (Duration::from_secs(1), Smoothed::new(Duration::from_secs(15)));
        let mut worked = Duration::ZERO;
        for _ in 0..15 {
            worked += second;
            smoothed.look(worked, second);
        }
        let busy = smoothed.look(worked, Duration::ZERO);
        assert!((busy - 0.632).abs() < 0.001, "{busy}");
        for _ in 0..60 {
            worked += second / 2;
            smoothed.look(worked, second);
        }
        let half = smoothed.look(worked, Duration::ZERO);
        assert!((half - 0.5).abs() < 0.01, "{half}");
        // A call that was counted late cannot make more than all of the time.
        assert!(smoothed.look(worked + 100 * second, second) <= 1.0);
    }
}
