//! Experts read from the router's checkpoint, for workers that have none.

use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_dispatch_grpc::WeightSource;
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
        let mut found = None;
        let take = &mut |_, expert| found = Some(Arc::new(expert));
        if let Err(error) =
            experts::read(&self.checkpoint, &[key], self.compute, self.dtype, &mut |_| {}, take)
        {
            tracing::error!(expert = %key, %error, "a worker asked for an expert that cannot be read");
        }
        found
    }
}
