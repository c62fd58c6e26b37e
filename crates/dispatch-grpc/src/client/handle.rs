//! What others may see of the dispatch: which workers are there, and where its time goes.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use muster_proto::description::Description;
use muster_types::{ExpertKey, LayerId};

use super::board::Board;

/// Layer dispatches remembered for [`StatsHandle::snapshot`].
const SAMPLES: usize = 16 << 10;

/// Whether a worker can be sent rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerState {
    /// It can.
    Connected,
    /// It was asked to stop, and is sent only what no other holds.
    Draining,
    /// It cannot.
    Down {
        /// Since when.
        since: Instant,
        /// What was last seen of it.
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
    /// Its connection, which has another number each time; `None` when there is none.
    pub session: Option<u64>,
    /// What it said of itself last.
    pub announced: Option<Arc<Description>>,
    /// What it shares its fate with: as it announces, else as whoever made it known says.
    pub domain: Option<String>,
    /// Shards that are overdue.
    pub late_shards: usize,
    /// For how long it is still left alone, because it broke the protocol.
    pub banned: Duration,
}

/// One layer of one micro-batch, from `submit` to the end of `collect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// The layer.
    pub layer: LayerId,
    /// Rows of the micro-batch.
    pub rows: usize,
    /// From the start of `submit` until the engine thread had the last answer.
    pub round_trip: Duration,
    /// Of that, the time between `submit` and `collect`, in which the engine thread computed something else.
    pub away: Duration,
    /// Time in the experts, as reported: that of the worker that took longest. Waiting for the experts is not in it.
    pub compute: Duration,
    /// Checking and adding in `collect`.
    pub combine: Duration,
}

impl Sample {
    /// What dispatch and combine cost the engine thread beside the experts' computation. Of that computation, and of all
    /// else, what went on while the engine thread was busy elsewhere cost it nothing.
    #[must_use]
    pub fn overhead(&self) -> Duration {
        self.round_trip.saturating_sub(self.away.max(self.compute)) + self.combine
    }
}

/// Where time went lately.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DispatchStats {
    /// The latest layer dispatches that came to their end, oldest first.
    pub samples: Vec<Sample>,
    /// Replies that came after nobody waited for them any more.
    pub late_replies: u64,
}

/// Tells any thread how the workers of a dispatch are.
#[derive(Clone)]
pub struct HealthHandle(pub(super) Arc<Board>);

impl HealthHandle {
    /// Every worker, in the order of the configuration.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerHealth> {
        self.0.health()
    }

    /// The experts that no connected worker holds, ascending. Empty: every row can be dispatched.
    #[must_use]
    pub fn missing(&self) -> Vec<ExpertKey> {
        self.0.routes().elsewhere.missing()
    }

    /// How many experts are on fewer connected workers than that.
    #[must_use]
    pub fn fewer_copies_than(&self, copies: NonZeroU32) -> usize {
        self.0.routes().elsewhere.fewer_copies_than(copies)
    }

    /// Changes with who holds what.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.0.version()
    }

    /// How many there are of [`Self::missing`].
    #[must_use]
    pub fn missing_experts(&self) -> usize {
        self.fewer_copies_than(NonZeroU32::MIN)
    }
}

/// Tells any thread where the time of a dispatch goes.
#[derive(Clone)]
pub struct StatsHandle {
    pub(super) board: Arc<Board>,
    pub(super) samples: Arc<Samples>,
}

impl StatsHandle {
    /// Where time went lately.
    #[must_use]
    pub fn snapshot(&self) -> DispatchStats {
        DispatchStats { samples: self.samples.snapshot(), late_replies: self.board.late_replies() }
    }
}

/// The latest samples, a bounded number of them.
#[derive(Default)]
pub(super) struct Samples(Mutex<VecDeque<Sample>>);

impl Samples {
    pub(super) fn push(&self, sample: Sample) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    fn snapshot(&self) -> Vec<Sample> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}
