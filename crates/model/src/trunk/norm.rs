//! The norm before attention, MLP and head.

use muster_kernels::{Cpu, layer_norm, rms_norm};

/// A norm's weights.
pub(super) struct Norm {
    pub(super) weight: Vec<f32>,
    /// With a bias it takes the mean away, too.
    pub(super) bias: Option<Vec<f32>>,
    pub(super) eps: f32,
}

impl Norm {
    /// The rows of `x` normed, into `out`.
    pub(super) fn apply(&self, cpu: &Cpu, x: &[f32], out: &mut Vec<f32>) {
        out.resize(x.len(), 0.0);
        match &self.bias {
            None => rms_norm(cpu, x, &self.weight, self.eps, out),
            Some(bias) => layer_norm(cpu, x, &self.weight, bias, self.eps, out),
        }
    }
}
