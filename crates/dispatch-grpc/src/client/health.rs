//! One worker's health, as other threads see it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_proto::description::Description;

/// Whether a worker can be sent rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerState {
    /// Connected and serving.
    Connected,
    /// Draining: it gets only rows of experts without another owner.
    Draining,
    /// Not connected.
    Down {
        /// Since when.
        since: Instant,
        /// The last error.
        reason: String,
    },
}

/// One of the workers.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerHealth {
    /// Where it is.
    pub address: String,
    /// Whether it can be sent rows.
    pub state: WorkerState,
    /// Number of its session, another for each connection; `None` without one.
    pub session: Option<u64>,
    /// Its last announcement.
    pub announced: Option<Arc<Description>>,
    /// Failure domain: as the worker announces it, else as its discovery or join says.
    pub domain: Option<String>,
    /// Shards that are overdue.
    pub late_shards: usize,
    /// Remaining time of its ban.
    pub banned: Duration,
}
