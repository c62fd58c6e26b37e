//! How long a shard may take before others are asked for the same.
//!
//! Learned from what shards of about as many rows took lately. It does not know whether there is anybody else to ask.

use std::time::Duration;

/// Never shorter, so that a busy core is not taken for a dead worker.
const LEAST: Duration = Duration::from_millis(20);
/// Before anything is known.
const UNKNOWN: Duration = Duration::from_millis(150);
/// Many times the usual.
const TIMES: f64 = 8.0;
const CLASSES: usize = 32;
/// Share of the newest in what is remembered.
const NEWEST: f64 = 1.0 / 16.0;

/// Seconds that shards took, smoothed, by the logarithm of their rows.
#[derive(Debug, Default)]
pub(super) struct Patience {
    took: [Option<f64>; CLASSES],
}

impl Patience {
    pub(super) fn of(&self, rows: usize) -> Duration {
        let took = self.took.get(class(rows)).copied().flatten();
        took.map_or(UNKNOWN, |took| Duration::from_secs_f64(took * TIMES).max(LEAST))
    }

    pub(super) fn observe(&mut self, rows: usize, took: Duration) {
        let Some(known) = self.took.get_mut(class(rows)) else { return };
        let took = took.as_secs_f64();
        *known = Some(known.map_or(took, |known| known + (took - known) * NEWEST));
    }
}

const fn class(rows: usize) -> usize {
    (usize::BITS - rows.leading_zeros()) as usize
}
