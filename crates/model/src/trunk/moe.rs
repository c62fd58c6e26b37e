//! What a layer with experts has in the router: the gate's weights and shared experts.
//!
//! Shared experts see every row, so they depend on no choice and are computed while the routed ones are away. Knows
//! nothing about dispatch.

use muster_checkpoint::spec::MoeSpec;
use muster_kernels::math::sigmoid;
use muster_kernels::{Cpu, Expert, ExpertRows, FfnScratch, Matrix, Precision, grouped_ffn, linear};

use super::attention::Projection;

/// The router's part of a layer with experts.
pub(super) struct Moe {
    pub(super) spec: MoeSpec,
    pub(super) gate: Projection,
    /// Empty where there is none.
    pub(super) selection_bias: Vec<f32>,
    pub(super) shared: Option<Shared>,
}

/// A shared expert.
pub(super) struct Shared {
    pub(super) expert: Expert,
    /// `[1, hidden]`: its output counts times the sigmoid of this.
    pub(super) scale: Option<Matrix>,
}

impl Moe {
    pub(super) fn bytes(&self) -> usize {
        let shared = self.shared.as_ref().map_or(0, |shared| {
            shared.expert.bytes() + shared.scale.as_ref().map_or(0, |scale| scale.bytes())
        });
        self.gate.weight.bytes() + shared
    }
}

impl Shared {
    /// What every row of `x` gets, `[rows, hidden]`, into `out`.
    #[expect(clippy::too_many_arguments, reason = "one call site; a struct would only rename the same seven")]
    pub(super) fn run(
        &self,
        cpu: &Cpu,
        precision: Precision,
        x: &[f32],
        every_row: &[u32],
        ffn: &mut FfnScratch,
        scales: &mut Vec<f32>,
        out: &mut Vec<f32>,
    ) {
        gated_mlp(cpu, &self.expert, x, every_row, precision, ffn, out);
        let Some(scale) = &self.scale else { return };
        scales.resize(every_row.len(), 0.0);
        linear(cpu, scale, x, precision, scales);
        for (row, scale) in out.chunks_exact_mut(scale.k()).zip(scales.iter()) {
            let scale = sigmoid(*scale);
            row.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

/// One gated MLP for every row of `x`, into `out`.
pub(super) fn gated_mlp(
    cpu: &Cpu,
    expert: &Expert,
    x: &[f32],
    every_row: &[u32],
    precision: Precision,
    ffn: &mut FfnScratch,
    out: &mut Vec<f32>,
) {
    out.resize(x.len(), 0.0);
    grouped_ffn(cpu, &[ExpertRows { expert, rows: every_row }], x, precision, ffn, out);
}
