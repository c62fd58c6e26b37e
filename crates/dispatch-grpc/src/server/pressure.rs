//! A worker's pressure: the share of time in which its experts' thread computed.
//!
//! That thread computes one call after the other, so a share of 1 means that shards wait. More workers relieve it, whatever
//! its cause. The processor's load is no such measure, since threads that wait for messages poll.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Accumulated computing time.
#[derive(Debug, Default)]
pub struct Pressure {
    nanos: AtomicU64,
}

impl Pressure {
    pub(super) fn worked(&self, time: Duration) {
        self.nanos.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Computing time since the start.
    #[must_use]
    pub fn worked_so_far(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }
}

/// Decaying average of periodic samples.
#[derive(Debug)]
pub struct Smoothed {
    over: Duration,
    worked: Duration,
    part: f64,
}

impl Smoothed {
    /// An average over about the last `over`.
    #[must_use]
    pub const fn new(over: Duration) -> Self {
        Self { over, worked: Duration::ZERO, part: 0.0 }
    }

    /// Adds a sample: the computing time so far, `elapsed` after the last sample. Returns the share, from 0 to 1.
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
