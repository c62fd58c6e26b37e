//! Loaded experts behind the server's trait.

use std::sync::Arc;

use muster_dispatch_grpc::{ComputeError, ExpertCompute, Rows};
use muster_kernels::Cpu;
use muster_model::experts::{ExpertError, ExpertScratch, ExpertSet};
use muster_types::{ExpertId, LayerId};

use crate::load::Loaded;

/// The experts of this worker, with the buffers of the one thread that runs them.
pub(crate) struct Experts {
    cpu: Arc<Cpu>,
    experts: ExpertSet,
    scratch: ExpertScratch,
}

impl Experts {
    pub(crate) fn new(loaded: Loaded) -> Self {
        Self { cpu: loaded.cpu, experts: loaded.experts, scratch: ExpertScratch::default() }
    }
}

impl ExpertCompute for Experts {
    fn forward(
        &mut self,
        layer: LayerId,
        groups: &[(ExpertId, &[u32])],
        rows: Rows<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), ComputeError> {
        self.experts.forward(&self.cpu, &mut self.scratch, layer, groups, rows, out).map_err(|error| {
            match error {
                ExpertError::NotHeld(key) => ComputeError::NotHeld(key),
                ExpertError::Shape(reason) => ComputeError::Internal(reason),
            }
        })
    }
}
