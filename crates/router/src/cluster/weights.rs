//! Experts read from the router's checkpoint, for workers that have none.

use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_dispatch_grpc::WeightSource;
use muster_model::ModelError;
use muster_model::experts::{self, Expert};
use muster_types::{Compute, ExpertKey, WeightDType};

/// Reads and packs an expert whenever it is asked for; keeps none.
pub(crate) struct CheckpointWeights {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) compute: Compute,
    pub(crate) dtype: WeightDType,
}

impl WeightSource for CheckpointWeights {
    fn get(&self, key: ExpertKey) -> Option<Arc<Expert>> {
        let failed = |error: &ModelError| {
            tracing::error!(expert = %key, %error, "a worker asked for an expert that cannot be read");
        };
        let read = experts::read_one(&self.checkpoint, key, self.compute, self.dtype);
        read.inspect_err(failed).ok().map(Arc::new)
    }
}
