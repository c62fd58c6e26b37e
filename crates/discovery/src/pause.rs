//! Pauses between retries.

use std::time::Duration;

/// Doubles up to a limit.
#[derive(Debug, Clone)]
pub(crate) struct Pause {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Pause {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// Resets to the first pause, after a success.
    pub(crate) const fn reset(&mut self) {
        self.next = self.first;
    }

    /// The next pause.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause
    }
}
