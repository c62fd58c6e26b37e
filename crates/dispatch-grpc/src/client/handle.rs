//! Handles for other threads: the workers' health, and timing samples.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metrics::Histogram;
use muster_engine::delivery::{Note, Observer, Summed};
use muster_types::{BindingName, ExpertKey};

use super::health::WorkerHealth;
use super::links::Links;

/// Layer dispatches remembered for [`StatsHandle::snapshot`].
const SAMPLES: usize = 16 << 10;

/// Where time went lately.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DispatchStats {
    /// The latest completed layer dispatches, oldest first.
    pub samples: Vec<Summed>,
    /// Replies that came after their flight was over.
    pub late_replies: u64,
}

/// Health of a dispatch's workers, for any thread.
#[derive(Clone)]
pub struct HealthHandle(pub(super) Arc<Links>);

impl HealthHandle {
    /// Every worker, in the order of the configuration.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerHealth> {
        self.0.health()
    }

    /// The experts that no connected worker holds, ascending. Empty: every row can be dispatched.
    #[must_use]
    pub fn missing(&self) -> Vec<ExpertKey> {
        self.0.elsewhere().missing()
    }

    /// Number of experts with fewer than `copies` connected owners.
    #[must_use]
    pub fn fewer_copies_than(&self, copies: NonZeroU32) -> usize {
        self.0.elsewhere().fewer_copies_than(copies)
    }

    /// The experts that nobody can be asked for, this process included.
    #[must_use]
    pub fn unreachable_experts(&self) -> usize {
        self.0.fleet().placement().fewer_copies_than(NonZeroU32::MIN)
    }

    /// Names the numerics classes that experts are bound to.
    #[must_use]
    pub fn bound(&self) -> BindingName {
        self.0.binding().name()
    }

    /// Changes with who holds what.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.0.version()
    }

    /// Number of [`Self::missing`] experts.
    #[must_use]
    pub fn missing_experts(&self) -> usize {
        self.fewer_copies_than(NonZeroU32::MIN)
    }
}

/// Timing samples of a dispatch, for any thread.
#[derive(Clone)]
pub struct StatsHandle(pub(super) Arc<Samples>);

impl StatsHandle {
    /// Where time went lately.
    #[must_use]
    pub fn snapshot(&self) -> DispatchStats {
        DispatchStats {
            samples: self.0.latest().iter().copied().collect(),
            late_replies: self.0.late_replies.load(Ordering::Relaxed),
        }
    }
}

/// The latest samples, a bounded number of them.
#[derive(Default)]
pub(super) struct Samples {
    latest: Mutex<VecDeque<Summed>>,
    late_replies: AtomicU64,
}

impl Samples {
    fn latest(&self) -> MutexGuard<'_, VecDeque<Summed>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, sample: Summed) {
        let mut latest = self.latest();
        if latest.len() == SAMPLES {
            latest.pop_front();
        }
        latest.push_back(sample);
    }
}

/// Counts delivery's events in metrics, and logs lies.
pub struct Counted {
    samples: Arc<Samples>,
    seconds: Histogram,
    overhead_seconds: Histogram,
}

impl Counted {
    pub(super) fn new(samples: Arc<Samples>) -> Self {
        Self {
            samples,
            seconds: metrics::histogram!("muster_dispatch_seconds"),
            overhead_seconds: metrics::histogram!("muster_dispatch_overhead_seconds"),
        }
    }
}

impl Observer for Counted {
    fn note(&mut self, note: Note<'_>) {
        match note {
            Note::Summed(sample) => {
                self.seconds.record(sample.round_trip);
                self.overhead_seconds.record(sample.overhead());
                self.samples.push(sample);
            }
            Note::Fault(code) => {
                metrics::counter!("muster_dispatch_faults_total", "code" => code).increment(1);
            }
            Note::Lied { worker, layer, reason } => {
                metrics::counter!("muster_dispatch_bad_replies_total").increment(1);
                tracing::warn!(%worker, layer = layer.map(tracing::field::display), reason, "bad reply");
            }
            Note::Late { worker, layer } => tracing::debug!(%worker, %layer, "a shard is late"),
            Note::StandIns { shards, .. } => {
                metrics::counter!("muster_dispatch_resent_shards_total").increment(shards as u64);
            }
            Note::TooLate => {
                self.samples.late_replies.fetch_add(1, Ordering::Relaxed);
                metrics::counter!("muster_dispatch_late_replies_total").increment(1);
            }
            Note::Expired => metrics::counter!("muster_dispatch_deadlines_total").increment(1),
        }
    }
}
