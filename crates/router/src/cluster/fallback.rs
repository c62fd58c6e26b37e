//! The router's own experts: read from the checkpoint when they are needed, for rows that no worker can take.

use std::collections::HashMap;
use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_dispatch_grpc::{ComputeError, Digests, ExpertCompute, Rows};
use muster_kernels::Cpu;
use muster_model::digests::digest;
use muster_model::experts::{self, ExpertError, ExpertScratch, ExpertSet};
use muster_types::{Compute, ExpertId, ExpertKey, LayerId, WeightDType};

/// Bytes of experts that are kept from one step to the next.
const KEPT: u64 = 1 << 30;

/// See the module. Keeps those that were used last.
pub(crate) struct ColdExperts {
    checkpoint: Arc<Checkpoint>,
    cpu: Arc<Cpu>,
    set: ExpertSet,
    scratch: ExpertScratch,
    /// When each was used last.
    used: HashMap<ExpertKey, u64>,
    calls: u64,
    /// What the weights must be, here as anywhere.
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
        Self {
            checkpoint,
            cpu,
            set,
            scratch: ExpertScratch::default(),
            used: HashMap::new(),
            calls: 0,
            digests,
        }
    }

    /// Reads what is not there, and makes room for it.
    fn warm(&mut self, keys: &[ExpertKey]) -> Result<(), ComputeError> {
        self.calls += 1;
        for &key in keys {
            self.used.insert(key, self.calls);
        }
        let cold: Vec<ExpertKey> = keys.iter().copied().filter(|&key| !self.set.holds(key)).collect();
        if cold.is_empty() {
            return Ok(());
        }
        while self.set.bytes() > KEPT {
            // Those of this call are the latest.
            let oldest = self.used.iter().filter(|(_, at)| **at < self.calls).min_by_key(|(_, at)| **at);
            let Some((&oldest, _)) = oldest else { break };
            self.used.remove(&oldest);
            self.set.remove(oldest);
        }
        let (compute, dtype) = (self.set.compute(), self.set.dtype());
        let (set, digests, mut wrong) = (&mut self.set, &self.digests, None);
        let take = &mut |key, expert| match digests.expected(key) {
            Some(ours) if ours != digest(&expert) => wrong = Some(key),
            _ => set.insert(key, expert),
        };
        experts::read(&self.checkpoint, &cold, compute, dtype, &mut |_| {}, take)
            .map_err(|error| ComputeError::Internal(error.to_string()))?;
        match wrong {
            None => Ok(()),
            Some(key) => Err(ComputeError::Internal(format!(
                "the router's own weights of {key} are no longer what their digest says; see `muster check-model`"
            ))),
        }
    }
}

impl ExpertCompute for ColdExperts {
    fn forward(
        &mut self,
        layer: LayerId,
        groups: &[(ExpertId, &[u32])],
        rows: Rows<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), ComputeError> {
        let keys: Vec<ExpertKey> = groups.iter().map(|&(expert, _)| ExpertKey { layer, expert }).collect();
        self.warm(&keys)?;
        let Self { cpu, set, scratch, .. } = self;
        set.forward(cpu, scratch, layer, groups, rows, out).map_err(|error| match error {
            ExpertError::NotHeld(key) => ComputeError::NotHeld(key),
            ExpertError::Shape(reason) => ComputeError::Internal(reason),
        })
    }
}
