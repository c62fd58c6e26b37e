//! The trunk's operations on this machine's cores: each calls one kernel.

use std::ops::Range;
use std::sync::Arc;

use muster_checkpoint::spec::AttentionSpec;
use muster_engine::dispatch::{Rows, RowsMut, UnevenRows};
use muster_kernels::math::sigmoid;
use muster_kernels::{
    Angles, AttentionShape, Cpu, Expert, ExpertRows, FfnScratch, KvCache, KvShape, KvSlot, Matrix, Rope,
    add_scaled, all_finite, attention, grouped_ffn, layer_norm, linear, rms_norm, rms_norm_in_place, rotate,
    round_bf16, to_bf16,
};
use muster_types::{Compute, DType, ExpertId, TokenId};

use super::device::{Choice, Device, DeviceError, Gate, Head, HeadColumns, Norm, Projection, Unusable};
use crate::gate::{self, GateScratch};

/// This machine's cores and memory.
pub struct CpuDevice {
    cpu: Arc<Cpu>,
    compute: Compute,
}

/// Buffers reused between calls.
#[derive(Default)]
pub struct CpuScratch {
    ffn: FfnScratch,
    gate: GateScratch,
    /// Logits of gates, scales of shared experts, inputs of one head.
    inputs: Vec<f32>,
    /// Outputs of one head.
    outputs: Vec<f32>,
    /// `0 .. rows`, for an MLP applied to all rows.
    every_row: Vec<u32>,
}

impl CpuDevice {
    /// A device of these threads and this compute mode.
    #[must_use]
    pub fn new(cpu: Arc<Cpu>, compute: Compute) -> Arc<Self> {
        Arc::new(Self { cpu, compute })
    }

    /// The threads.
    #[must_use]
    pub const fn cpu(&self) -> &Arc<Cpu> {
        &self.cpu
    }

    fn is_bf16(&self) -> bool {
        self.compute.wire_dtype() == DType::Bf16
    }
}

impl From<muster_kernels::KernelError> for DeviceError {
    fn from(error: muster_kernels::KernelError) -> Self {
        Self(error.to_string())
    }
}

impl Device for CpuDevice {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Mlp = Expert;
    type Kv = KvCache;
    type Buffer = Vec<f32>;
    type Wire = Vec<u16>;
    type Angles = Angles;
    type Scratch = CpuScratch;

    fn compute(&self) -> Compute {
        self.compute
    }

    fn matrix(&self, packed: Matrix) -> Result<Matrix, DeviceError> {
        Ok(packed)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>, DeviceError> {
        Ok(values)
    }

    fn mlp(&self, packed: Expert) -> Result<Expert, DeviceError> {
        Ok(packed)
    }

    fn kv(&self, shape: KvShape, blocks: usize) -> Result<KvCache, DeviceError> {
        Ok(KvCache::new(shape, blocks, self.compute)?)
    }

    fn embed(&self, table: &Matrix, tokens: &[TokenId], multiplier: f32, out: &mut Vec<f32>) {
        out.resize(tokens.len() * table.k(), 0.0);
        for (token, row) in tokens.iter().zip(out.chunks_exact_mut(table.k())) {
            table.row(token.index(), row);
        }
        if multiplier != 1.0 {
            out.iter_mut().for_each(|x| *x *= multiplier);
        }
    }

    fn norm(&self, Norm { weight, bias, eps }: &Norm<Self>, x: &Vec<f32>, out: &mut Vec<f32>) {
        out.resize(x.len(), 0.0);
        match bias {
            None => rms_norm(&self.cpu, x, weight, *eps, out),
            Some(bias) => layer_norm(&self.cpu, x, weight, bias, *eps, out),
        }
        self.round(out);
    }

    fn norm_heads(&self, weight: &Vec<f32>, eps: f32, x: &mut Vec<f32>) {
        rms_norm_in_place(&self.cpu, x, weight, eps);
    }

    fn round(&self, x: &mut Vec<f32>) {
        if self.compute.rounds() {
            round_bf16(x);
        }
    }

    fn linear(&self, Projection { weight, bias }: &Projection<Self>, x: &Vec<f32>, out: &mut Vec<f32>) {
        out.resize(x.len() / weight.k() * weight.n(), 0.0);
        linear(&self.cpu, weight, x, self.compute, out);
        if let Some(bias) = bias {
            add_to_rows(bias, out);
        }
    }

    fn linear_heads(
        &self,
        weights: &[Matrix],
        (x, from): (&Vec<f32>, HeadColumns),
        (out, to): (&mut Vec<f32>, HeadColumns),
        CpuScratch { inputs, outputs, .. }: &mut CpuScratch,
    ) {
        let rows = x.len() / (weights.len() * from.width);
        out.resize(rows * weights.len() * to.width, 0.0);
        for (head, weight) in weights.iter().enumerate() {
            inputs.clear();
            for row in x.chunks_exact(weights.len() * from.width) {
                inputs.extend_from_slice(&row[head * from.width + from.first..][..weight.k()]);
            }
            self.round(inputs);
            outputs.resize(rows * weight.n(), 0.0);
            linear(&self.cpu, weight, inputs, self.compute, outputs);
            let rows = out.chunks_exact_mut(weights.len() * to.width);
            for (row, output) in rows.zip(outputs.chunks_exact(weight.n())) {
                row[head * to.width + to.first..][..weight.n()].copy_from_slice(output);
            }
        }
    }

    fn copy_columns(
        &self,
        (from, at): (&Vec<f32>, HeadColumns),
        len: usize,
        (to, into): (&mut Vec<f32>, HeadColumns),
    ) {
        to.resize(from.len() / at.width * into.width, 0.0);
        for (from, to) in from.chunks_exact(at.width).zip(to.chunks_exact_mut(into.width)) {
            to[into.first..][..len].copy_from_slice(&from[at.first..][..len]);
        }
    }

    fn clamp(&self, limit: f32, x: &mut Vec<f32>) {
        x.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
    }

    fn scale_rows(&self, factors: &[f32], x: &mut Vec<f32>) {
        let width = x.len() / factors.len().max(1);
        for (factor, row) in factors.iter().zip(x.chunks_exact_mut(width.max(1))) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }

    fn angles(&self, rope: &Rope, positions: &[u32], out: &mut Angles) {
        rope.angles(positions, out);
    }

    fn rotate(&self, angles: &Angles, head_dim: usize, x: &mut Vec<f32>) {
        rotate(angles, x, head_dim);
    }

    fn append(&self, kv: &mut KvCache, layer: usize, slots: &[KvSlot<'_>], k: &Vec<f32>, v: &Vec<f32>) {
        kv.write(layer, slots, k, v);
    }

    fn attend(
        &self,
        (spec, sinks): (&AttentionSpec, Option<&Vec<f32>>),
        kv: &KvCache,
        layer: usize,
        q: &Vec<f32>,
        slots: &[KvSlot<'_>],
        out: &mut Vec<f32>,
    ) {
        let shape = AttentionShape {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            value_dim: spec.cached_value(),
            scale: spec.scale,
            reach: spec.reach,
            sinks: sinks.map(Vec::as_slice),
        };
        out.resize(slots.len() * shape.heads * shape.value_dim, 0.0);
        attention(&self.cpu, &shape, layer, q, slots, kv, out);
        self.round(out);
    }

    fn choose(
        &self,
        gate: &Gate<Self>,
        x: &Vec<f32>,
        scratch: &mut CpuScratch,
        choice: &mut Choice,
    ) -> Result<(), DeviceError> {
        let CpuScratch { inputs: logits, gate: scratch, .. } = scratch;
        self.linear(&gate.projection, x, logits);
        choose_rows(gate, logits, x, scratch, choice);
        Ok(())
    }

    fn gated_mlp(&self, mlp: &Expert, x: &Vec<f32>, scratch: &mut CpuScratch, out: &mut Vec<f32>) {
        let CpuScratch { ffn, every_row, .. } = scratch;
        every_row.clear();
        every_row.extend((0..).take(x.len() / mlp.hidden()));
        out.resize(x.len(), 0.0);
        let rows = [ExpertRows { expert: mlp, rows: every_row }];
        grouped_ffn(&self.cpu, &rows, x, self.compute, ffn, out);
    }

    fn sigmoid_gate(&self, weight: &Matrix, x: &Vec<f32>, scratch: &mut CpuScratch, out: &mut Vec<f32>) {
        let scales = &mut scratch.inputs;
        scales.resize(x.len() / weight.k(), 0.0);
        linear(&self.cpu, weight, x, self.compute, scales);
        for (row, scale) in out.chunks_exact_mut(weight.k()).zip(scales.iter()) {
            let scale = sigmoid(*scale);
            row.iter_mut().for_each(|x| *x *= scale);
        }
    }

    fn add_scaled(&self, from: &Vec<f32>, factor: f32, to: &mut Vec<f32>) {
        add_scaled(to, from, factor);
    }

    fn weigh(&self, x: &Vec<f32>, weights: &[f32], k: usize, out: &mut Vec<f32>) {
        let hidden = x.len() / (weights.len() / k).max(1);
        out.clear();
        for (row, weights) in x.chunks_exact(hidden.max(1)).zip(weights.chunks_exact(k)) {
            for weight in weights {
                out.extend(row.iter().map(|x| x * weight));
            }
        }
    }

    fn sum_copies(&self, copies: usize, hidden: usize, x: &mut Vec<f32>) {
        if copies == 1 {
            return;
        }
        let sums = x.len() / copies / hidden;
        for to in 0..sums {
            let from = to * copies * hidden;
            x.copy_within(from..from + hidden, to * hidden);
            for at in 0..(copies - 1) * hidden {
                x[to * hidden + at % hidden] += x[from + hidden + at];
            }
        }
        x.truncate(sums * hidden);
    }

    fn to_wire(&self, x: &Vec<f32>, wire: &mut Vec<u16>) {
        if self.is_bf16() {
            wire.resize(x.len(), 0);
            to_bf16(x, wire);
        }
    }

    fn rows<'b>(&self, x: &'b Vec<f32>, wire: &'b Vec<u16>, hidden: usize) -> Result<Rows<'b>, UnevenRows> {
        if self.is_bf16() { Rows::of_bf16(wire, hidden) } else { Rows::of_f32(x, hidden) }
    }

    fn rows_mut<'b>(&self, len: usize, out: &'b mut Vec<f32>) -> RowsMut<'b> {
        out.resize(len, 0.0);
        RowsMut::of_f32(out)
    }

    fn keep(&self, kept: &[Range<usize>], width: usize, x: &mut Vec<f32>) {
        super::lane::keep(kept, x.len() / width, width, x);
    }

    fn gather(&self, from: &Vec<f32>, ranges: &[Range<usize>], width: usize, out: &mut Vec<f32>) {
        out.clear();
        for range in ranges {
            out.extend_from_slice(&from[range.start * width..range.end * width]);
        }
    }

    fn head(
        &self,
        Head { weight, bias, divisor }: Head<'_, Self>,
        x: &Vec<f32>,
        _: &mut CpuScratch,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        logits.resize(x.len() / weight.k() * weight.n(), 0.0);
        linear(&self.cpu, weight, x, self.compute, logits);
        if let Some(bias) = bias {
            add_to_rows(bias, logits);
        }
        if divisor != 1.0 {
            logits.iter_mut().for_each(|x| *x /= divisor);
        }
        Ok(())
    }

    fn read(&self, x: &Vec<f32>, host: &mut Vec<f32>) -> Result<(), DeviceError> {
        host.clone_from(x);
        Ok(())
    }
}

fn add_to_rows(bias: &[f32], rows: &mut [f32]) {
    for row in rows.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    }
}

/// Chooses the experts of rows `x` from their gate logits.
pub(super) fn choose_rows<D: Device>(
    gate: &Gate<D>,
    logits: &[f32],
    x: &[f32],
    scratch: &mut GateScratch,
    Choice { experts, weights, unusable }: &mut Choice,
) {
    experts.clear();
    weights.clear();
    unusable.clear();
    let (finite, k) = (all_finite(x), gate.top_k as usize);
    let rows = logits.len() / gate.experts as usize;
    let hidden = x.len() / rows.max(1);
    for (row, logits) in logits.chunks_exact(gate.experts as usize).enumerate() {
        let why = if !finite && !all_finite(&x[row * hidden..][..hidden]) {
            Some(Unusable::Hidden)
        } else {
            let bias = &gate.selection_bias;
            let chosen = gate::choose(&gate.recipe, logits, bias, k, scratch, experts, weights);
            chosen.err().map(Unusable::Gate)
        };
        if let Some(why) = why {
            // Placeholder entries, so that other rows keep their places.
            experts.extend(ExpertId::all(gate.experts).take(k));
            weights.extend(std::iter::repeat_n(0.0, k));
            unusable.push((row, why));
        }
    }
}
