//! The router's own experts: read from the checkpoint when they are needed, for rows that no worker can take.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_dispatch_grpc::Digests;
use muster_engine::compute::{ComputeError, ExpertCompute, Segment, SegmentAnswer};
use muster_engine::dispatch::Rows;
use muster_kernels::Cpu;
use muster_model::experts::{self, CpuExperts, CpuStore, ExpertSet, ExpertStore, PackedExpert};
use muster_types::{Compute, ExpertKey, LayerId, WeightDType};

/// Bytes of experts kept between steps.
const KEPT: u64 = 1 << 30;

/// Experts of this router, with those used last kept in memory.
pub(crate) struct ColdExperts {
    checkpoint: Arc<Checkpoint>,
    compute: Compute,
    dtype: WeightDType,
    store: Arc<CpuStore>,
    experts: CpuExperts,
    /// Call in which each expert was used last.
    used: HashMap<ExpertKey, u64>,
    calls: u64,
    /// Expected digests of the weights, checked here as on workers.
    digests: Digests,
}

impl ColdExperts {
    pub(crate) fn new(
        checkpoint: Arc<Checkpoint>,
        cpu: Arc<Cpu>,
        compute: Compute,
        dtype: WeightDType,
        digests: Digests,
    ) -> Self {
        let set = ExpertSet::new(checkpoint.spec().hidden, compute, dtype);
        let store = Arc::new(CpuStore::new(set, u64::MAX));
        let experts = CpuExperts::new(cpu, Arc::clone(&store));
        Self { checkpoint, compute, dtype, store, experts, used: HashMap::new(), calls: 0, digests }
    }

    /// Loads missing experts and evicts the least recently used.
    fn warm(&mut self, keys: &BTreeSet<ExpertKey>) -> Result<(), ComputeError> {
        self.calls += 1;
        for &key in keys {
            self.used.insert(key, self.calls);
        }
        let cold: Vec<ExpertKey> = keys.iter().copied().filter(|&key| !self.store.holds(key)).collect();
        if cold.is_empty() {
            return Ok(());
        }
        while self.store.resident_bytes() > KEPT {
            // Experts of this call are never evicted.
            let oldest = self.used.iter().filter(|(_, at)| **at < self.calls).min_by_key(|(_, at)| **at);
            let Some((&oldest, _)) = oldest else { break };
            self.used.remove(&oldest);
            self.store.remove(oldest);
            self.store.reclaim();
        }
        let (store, digests, mut failed) = (&self.store, &self.digests, None);
        let take = &mut |key: ExpertKey, expert: PackedExpert| {
            let taken = match digests.expected(key) {
                Some(ours) if ours != expert.digest() => Err(format!(
                    "the router's own weights of {key} are no longer what their digest says; see `muster check-model`"
                )),
                _ => store.insert(key, expert).map_err(|error| error.to_string()),
            };
            if let Err(reason) = taken {
                failed = Some(reason);
            }
        };
        experts::read(&self.checkpoint, &cold, self.compute, self.dtype, &mut |_| {}, take)
            .map_err(|error| ComputeError::Internal(error.to_string()))?;
        failed.map_or(Ok(()), |reason| Err(ComputeError::Internal(reason)))
    }
}

impl ExpertCompute for ColdExperts {
    fn answer(
        &mut self,
        layer: LayerId,
        rows: Rows<'_>,
        segments: &[Segment<'_>],
    ) -> Result<Vec<SegmentAnswer>, ComputeError> {
        let groups = segments.iter().flat_map(|segment| &segment.groups);
        let keys: BTreeSet<ExpertKey> = groups.map(|&(expert, _)| ExpertKey { layer, expert }).collect();
        self.warm(&keys)?;
        self.experts.answer(layer, rows, segments)
    }
}
