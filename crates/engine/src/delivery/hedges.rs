//! When a shard is late, learned from how long each worker took, and how many may be sent twice.

use std::collections::BTreeMap;
use std::time::Duration;

use muster_placement::hedge::{Budget, Hedge, Outcome, Rules};
use muster_types::WorkerId;

use super::flight::Shard;

/// When a shard is late. A busy core must not be taken for a dead worker, and large shards may take long.
const RULES: Rules = Rules {
    floor: Duration::from_millis(20),
    cap: Duration::from_secs(5),
    unknown: Duration::from_millis(150),
    quantile: 0.99,
    factor: 2.0,
};
/// How many times longer a late shard is waited for when no hedge can be afforded.
const DEFERRED: u32 = 4;
/// Workers whose latencies are kept.
const MOST_KNOWN: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Hedges {
    workers: BTreeMap<WorkerId, Hedge>,
    budget: Budget,
}

/// What a shard's time depends on: its outputs.
fn size<L>(shard: &Shard<L>) -> u32 {
    u32::try_from(shard.plan.indices.len()).unwrap_or(u32::MAX)
}

impl Hedges {
    /// How long a shard may take before it is late.
    pub(super) fn patience<L>(&self, shard: &Shard<L>) -> Duration {
        self.workers.get(&shard.worker).map_or(RULES.unknown, |hedge| hedge.deadline(size(shard)))
    }

    /// Time on top of that where no hedge can be afforded.
    pub(super) fn extension<L>(&self, shard: &Shard<L>) -> Duration {
        self.patience(shard) * (DEFERRED - 1)
    }

    /// Takes the place of one more shard that is sent twice, if there is one.
    pub(super) fn afford(&mut self) -> bool {
        self.budget.take()
    }

    /// A worker took so long for a shard, or at least.
    pub(super) fn observe<L>(&mut self, shard: &Shard<L>, took: Duration) {
        // No more than there are workers, but they may change their names.
        if self.workers.len() >= MOST_KNOWN && !self.workers.contains_key(&shard.worker) {
            self.workers.clear();
        }
        let hedge = match self.workers.get_mut(&shard.worker) {
            Some(hedge) => hedge,
            None => self.workers.entry(shard.worker.clone()).or_insert_with(|| Hedge::new(RULES)),
        };
        hedge.observe(size(shard), took);
        self.budget.sent();
    }

    /// Takes note of what came of sending a shard twice.
    pub(super) fn learn<L>(&mut self, shard: &Shard<L>, outcome: Outcome) {
        if let Some(hedge) = self.workers.get_mut(&shard.worker) {
            hedge.hedged(size(shard), outcome);
        }
    }
}
