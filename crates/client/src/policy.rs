//! Timeouts and retries of a client.

use std::time::Duration;

/// Timeouts and attempts of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// For a connection.
    pub connect: Duration,
    /// For the answer to a call; for a generation, until it is admitted.
    pub answer: Duration,
    /// For a router that accepts a request, after the loss of the last one.
    pub patience: Duration,
    /// Attempts in a row without progress.
    pub attempts: u32,
    /// For the end of a generation. `None` waits as long as it makes progress.
    pub generation: Option<Duration>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(35),
            // A cluster may take 40 s to notice that a machine is gone, and send clients there until then.
            patience: Duration::from_secs(60),
            attempts: 100,
            generation: None,
        }
    }
}
