//! What happens to micro-batches, for whoever counts it.

use std::time::Duration;

use muster_types::{LayerId, WorkerId};

/// Something that happened.
#[derive(Debug)]
pub enum Note<'a> {
    /// A micro-batch came to its end with at least one sum.
    Summed(Summed),
    /// A shard gave nothing, for the reason with this short name.
    Fault(&'static str),
    /// A worker's answer is a lie.
    Lied {
        /// The worker.
        worker: &'a WorkerId,
        /// The layer, if the lie is of one.
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
    /// Shards were sent to others.
    StandIns {
        /// How many.
        shards: usize,
        /// The one that they stand in for may still be answered.
        is_hedge: bool,
    },
    /// An answer came that nobody waits for any more.
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
    /// From the start of `submit` until the last answer was taken in.
    pub round_trip: Duration,
    /// Of that, the time between `submit` and `collect`.
    pub away: Duration,
    /// Time in the experts, as reported: that of the worker that took longest.
    pub compute: Duration,
    /// Checking and adding in `collect`.
    pub combine: Duration,
}

impl Summed {
    /// What dispatch and combine cost the engine thread beside the experts' computation. Of that computation, and of all
    /// else, what went on while the engine thread was busy elsewhere cost it nothing.
    #[must_use]
    pub fn overhead(&self) -> Duration {
        self.round_trip.saturating_sub(self.away.max(self.compute)) + self.combine
    }
}

/// Whoever counts what happens. Must not take long.
pub trait Observer: Send {
    /// Something happened.
    fn note(&mut self, note: Note<'_>);
}

/// Nobody.
impl Observer for () {
    fn note(&mut self, _: Note<'_>) {}
}
