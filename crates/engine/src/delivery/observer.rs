//! Events of micro-batches, for metrics and logs.

use std::time::Duration;

use muster_types::{LayerId, WorkerId};

/// Something that happened.
#[derive(Debug)]
pub enum Note<'a> {
    /// A micro-batch completed with at least one sum.
    Summed(Summed),
    /// A shard failed, for the reason with this short name.
    Fault(&'static str),
    /// A worker's answer is a lie.
    Lied {
        /// The worker.
        worker: &'a WorkerId,
        /// The layer, if the lie concerns one.
        layer: Option<LayerId>,
        /// What was wrong.
        reason: &'a str,
    },
    /// A shard is late.
    Late {
        /// The worker.
        worker: &'a WorkerId,
        /// The layer.
        layer: LayerId,
    },
    /// Stand-ins were sent.
    StandIns {
        /// How many.
        shards: usize,
        /// Whether the shard that they stand in for may still be answered.
        is_hedge: bool,
    },
    /// An answer came after its flight was over.
    TooLate,
    /// A micro-batch's deadline passed.
    Expired,
}

/// One layer of one micro-batch, from `submit` to the end of `collect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summed {
    /// The layer.
    pub layer: LayerId,
    /// Rows of the micro-batch.
    pub rows: usize,
    /// From the start of `submit` until the last answer was handled.
    pub round_trip: Duration,
    /// Of that, the time between `submit` and `collect`.
    pub away: Duration,
    /// Time in the experts, as reported: that of the worker that took longest.
    pub compute: Duration,
    /// Checking and adding in `collect`.
    pub combine: Duration,
}

impl Summed {
    /// Time that dispatch and combine cost the engine thread, without the experts' computation. Work of others while the
    /// engine thread was busy elsewhere costs it nothing.
    #[must_use]
    pub fn overhead(&self) -> Duration {
        self.round_trip.saturating_sub(self.away.max(self.compute)) + self.combine
    }
}

/// Counts events. Must not take long.
pub trait Observer: Send {
    /// Counts an event.
    fn note(&mut self, note: Note<'_>);
}

/// Counts nothing.
impl Observer for () {
    fn note(&mut self, _: Note<'_>) {}
}
