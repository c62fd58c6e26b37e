//! The experts that are held, behind the server's trait.

use std::sync::Arc;

use muster_dispatch_grpc::{ComputeError, ExpertCompute, Rows};
use muster_kernels::Cpu;
use muster_model::experts::{ExpertError, ExpertScratch};
use muster_types::{ExpertId, LayerId};

use crate::holder::Holder;

/// The experts of this worker, with the buffers of the one thread that runs them.
pub(crate) struct Experts {
    cpu: Arc<Cpu>,
    holder: Arc<Holder>,
    scratch: ExpertScratch,
}

impl Experts {
    pub(crate) fn new(cpu: Arc<Cpu>, holder: Arc<Holder>) -> Self {
        Self { cpu, holder, scratch: ExpertScratch::default() }
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
        let experts = self.holder.experts();
        experts.forward(&self.cpu, &mut self.scratch, layer, groups, rows, out).map_err(|error| match error {
            ExpertError::NotHeld(key) => ComputeError::NotHeld(key),
            ExpertError::Shape(reason) => ComputeError::Internal(reason),
        })
    }
}
