//! Experts read from the router's checkpoint, for workers without one.

use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_dispatch_grpc::{Digests, Handed, WeightSource};
use muster_model::ModelError;
use muster_model::experts;
use muster_types::{Compute, ExpertKey, WeightDType};

/// Reads and packs one expert per request; caches none.
pub(crate) struct CheckpointWeights {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) compute: Compute,
    pub(crate) dtype: WeightDType,
    /// Expected digests: weights with others are not handed out.
    pub(crate) digests: Digests,
}

impl WeightSource for CheckpointWeights {
    fn get(&self, key: ExpertKey) -> Option<Handed> {
        let failed = |error: &ModelError| {
            tracing::error!(expert = %key, %error, "a worker asked for an expert that cannot be read");
        };
        let read = experts::read_one(&self.checkpoint, key, self.compute, self.dtype);
        let expert = Arc::new(read.inspect_err(failed).ok()?);
        Some(Handed { packed: expert.shared(), digest: self.digests.expected(key) })
    }
}
