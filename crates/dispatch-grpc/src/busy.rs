//! Busy polling: repeated looks for a bounded time before sleep.
//!
//! Waking a thread that sleeps costs more than a whole message between two processes of one machine. Each look gives up
//! the core to whoever else wants it, so a core is spent only while it would be idle.

use std::time::{Duration, Instant};

/// The rest of a bounded time.
pub(crate) struct BusyPoll {
    until: Option<Instant>,
}

impl BusyPoll {
    pub(crate) fn start(time: Duration) -> Self {
        let until = if time.is_zero() { None } else { Instant::now().checked_add(time) };
        Self { until }
    }

    /// Yields to other threads and the runtime's tasks once; false when the time is up and the caller should sleep.
    pub(crate) async fn pause(&mut self) -> bool {
        let Some(until) = self.until else { return false };
        if Instant::now() >= until {
            self.until = None;
            return false;
        }
        std::thread::yield_now();
        tokio::task::yield_now().await;
        true
    }
}
