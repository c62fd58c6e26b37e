//! Whether tokens really come: when the engine computed the last one, and why the last test token did not come.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// When the engine computed its last token.
pub struct Pulse {
    origin: Instant,
    /// Milliseconds since the origin, and one; 0 before the first token.
    last: AtomicU64,
    /// Why the last test token did not come.
    trouble: Mutex<Option<String>>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { origin: Instant::now(), last: AtomicU64::new(0), trouble: Mutex::new(None) }
    }
}

impl Pulse {
    /// A token was computed.
    pub(crate) fn beat(&self) {
        let now = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now.saturating_add(1), Ordering::Relaxed);
    }

    /// How long ago that was; `None` before the first.
    pub(crate) fn since(&self) -> Option<Duration> {
        let last = self.last.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.origin.elapsed().saturating_sub(Duration::from_millis(last)))
    }

    /// Why tokens do not come, if they do not.
    pub(crate) fn trouble(&self) -> Option<String> {
        if self.since().is_none() {
            return Some("no token was computed yet".into());
        }
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records what came of a test token.
    pub(crate) fn tried(&self, outcome: Result<(), String>) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(reason) = &outcome {
            tracing::warn!(reason, "a test token did not come");
            metrics::counter!("muster_canary_failures_total").increment(1);
        }
        *trouble = outcome.err();
    }

    /// One whose last token was computed so long ago.
    #[cfg(test)]
    pub(crate) fn beaten(ago: Duration) -> Self {
        Self { origin: Instant::now() - ago, last: AtomicU64::new(1), trouble: Mutex::new(None) }
    }
}
