//! Liveness of token generation: time of the last token, and the error of the last test token.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time of the last token, and the error of the last test token.
pub struct Pulse {
    origin: Instant,
    /// Milliseconds since the origin, plus one; 0 before the first token.
    last: AtomicU64,
    /// Error of the last test token, if it failed.
    trouble: Mutex<Option<String>>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { origin: Instant::now(), last: AtomicU64::new(0), trouble: Mutex::new(None) }
    }
}

impl Pulse {
    /// Records that a token was computed.
    pub(crate) fn beat(&self) {
        let now = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now.saturating_add(1), Ordering::Relaxed);
    }

    /// Age of the last token; `None` before the first.
    pub(crate) fn since(&self) -> Option<Duration> {
        let last = self.last.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.origin.elapsed().saturating_sub(Duration::from_millis(last)))
    }

    /// Error of the last test token, if it failed.
    pub(crate) fn trouble(&self) -> Option<String> {
        if self.since().is_none() {
            return Some("no token was computed yet".into());
        }
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records the outcome of a test token.
    pub(crate) fn tried(&self, outcome: Result<(), String>) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(reason) = &outcome {
            tracing::warn!(reason, "a test token did not come");
            metrics::counter!("muster_canary_failures_total").increment(1);
        }
        *trouble = outcome.err();
    }

    /// A pulse whose last token has the given age.
    #[cfg(test)]
    pub(crate) fn beaten(ago: Duration) -> Self {
        Self { origin: Instant::now() - ago, last: AtomicU64::new(1), trouble: Mutex::new(None) }
    }
}
