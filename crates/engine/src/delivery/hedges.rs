//! When a shard is late, from each worker's latencies, and the budget of hedges.

use std::collections::BTreeMap;
use std::time::Duration;

use muster_placement::hedge::{Budget, Hedge, Outcome, Rules};
use muster_types::WorkerId;

use super::flight::Shard;

/// When a shard is late. The limits leave time for a busy core and for large shards.
const RULES: Rules = Rules {
    floor: Duration::from_millis(20),
    cap: Duration::from_secs(5),
    unknown: Duration::from_millis(150),
    quantile: 0.99,
    factor: 2.0,
};
/// Factor of a late shard's extension when there is no hedge budget.
const DEFERRED: u32 = 4;
/// Workers whose latencies are kept.
const MOST_KNOWN: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Hedges {
    workers: BTreeMap<WorkerId, Hedge>,
    budget: Budget,
}

/// Size that a shard's latency depends on: its outputs.
fn size<L>(shard: &Shard<L>) -> u32 {
    u32::try_from(shard.plan.indices.len()).unwrap_or(u32::MAX)
}

impl Hedges {
    /// Time after which a shard is late.
    pub(super) fn patience<L>(&self, shard: &Shard<L>) -> Duration {
        self.workers.get(&shard.worker).map_or(RULES.unknown, |hedge| hedge.deadline(size(shard)))
    }

    /// Extension of a late shard without hedge budget.
    pub(super) fn extension<L>(&self, shard: &Shard<L>) -> Duration {
        self.patience(shard) * (DEFERRED - 1)
    }

    /// Takes one hedge from the budget, if there is one.
    pub(super) fn afford(&mut self) -> bool {
        self.budget.take()
    }

    /// Records a worker's latency for a shard, or its lower bound.
    pub(super) fn observe<L>(&mut self, shard: &Shard<L>, took: Duration) {
        // One per worker, bounded because workers may change their names.
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

    /// Records the outcome of a hedge.
    pub(super) fn learn<L>(&mut self, shard: &Shard<L>, outcome: Outcome) {
        if let Some(hedge) = self.workers.get_mut(&shard.worker) {
            hedge.hedged(size(shard), outcome);
        }
    }
}
