//! Attention whose cache holds one compressed row per position instead of keys and values of every head.
//!
//! What makes keys of a compressed row is applied to queries instead, and what makes values of it to the output: with
//! `k = A c`, `q k = (transposed A q) c`, and a mix of values `B c` is `B` of the mix of `c`. So a head's query becomes
//! as wide as the cached row, all heads share one cached key, `[rotated part, compressed row]`, and their value is its
//! end, the compressed row. Knows nothing about the cache.

use muster_checkpoint::spec::{AttentionSpec, LatentSpec};
use muster_kernels::{Cpu, Matrix, linear, rms_norm_in_place};

use super::Trunk;
use super::attention::{self, Projection};
use crate::experts::precision;

/// Weights of attention over compressed rows.
pub(super) struct Latent {
    pub(super) spec: LatentSpec,
    /// Projection down and norm, where queries come from a compressed row.
    pub(super) q_down: Option<(Projection, Vec<f32>)>,
    pub(super) q: Projection,
    pub(super) kv_down: Projection,
    pub(super) kv_norm: Vec<f32>,
    /// Per head `[kv_rank, plain_dim]`: from a query's plain part to what meets a compressed row.
    pub(super) absorb: Vec<Matrix>,
    /// Per head `[value_dim, kv_rank]`.
    pub(super) values: Vec<Matrix>,
}

/// Buffers of one lane.
#[derive(Default)]
pub(super) struct Buffers {
    compressed: Vec<f32>,
    normed: Vec<f32>,
    queries: Vec<f32>,
    of_head: Vec<f32>,
    made: Vec<f32>,
}

impl Latent {
    pub(super) fn bytes(&self) -> usize {
        let heads = self.absorb.iter().chain(&self.values);
        self.q_down.as_ref().map_or(0, |(down, _)| down.weight.bytes())
            + self.q.weight.bytes()
            + self.kv_down.weight.bytes()
            + heads.map(|matrix| matrix.bytes()).sum::<usize>()
    }

    /// Queries and keys of the rows of `x`, as the cache has them; values are the ends of keys.
    pub(super) fn project(
        &self,
        cpu: &Cpu,
        trunk: &Trunk,
        spec: &AttentionSpec,
        x: &[f32],
        buffers: &mut attention::Buffers,
    ) {
        let attention::Buffers { q, k, v, latent, .. } = buffers;
        let Buffers { compressed, normed, queries, of_head, made } = latent;
        let LatentSpec { kv_rank, plain_dim, norm_eps, .. } = self.spec;
        let (precision, rotated) = (precision(trunk.compute), spec.rotated());
        match &self.q_down {
            None => self.q.apply(cpu, x, precision, queries),
            Some((down, norm)) => {
                down.apply(cpu, x, precision, compressed);
                rms_norm_in_place(cpu, compressed, norm, norm_eps);
                trunk.round(compressed);
                self.q.apply(cpu, compressed, precision, queries);
            }
        }
        let rows = queries.len() / self.q.weight.n();
        q.resize(rows * spec.heads * spec.head_dim, 0.0);
        for (head, absorb) in self.absorb.iter().enumerate() {
            of_head.clear();
            for row in queries.chunks_exact(self.q.weight.n()) {
                of_head.extend_from_slice(&row[head * (plain_dim + rotated)..][..plain_dim]);
            }
            trunk.round(of_head);
            made.resize(rows * kv_rank, 0.0);
            linear(cpu, absorb, of_head, precision, made);
            let queries = queries.chunks_exact(self.q.weight.n());
            let to = q.chunks_exact_mut(spec.heads * spec.head_dim);
            for ((to, query), made) in to.zip(queries).zip(made.chunks_exact(kv_rank)) {
                let (first, rest) = to[head * spec.head_dim..][..spec.head_dim].split_at_mut(rotated);
                first.copy_from_slice(&query[head * (plain_dim + rotated) + plain_dim..][..rotated]);
                rest.copy_from_slice(made);
            }
        }
        self.kv_down.apply(cpu, x, precision, compressed);
        normed.clear();
        for row in compressed.chunks_exact(kv_rank + rotated) {
            normed.extend_from_slice(&row[..kv_rank]);
        }
        rms_norm_in_place(cpu, normed, &self.kv_norm, norm_eps);
        v.clear();
        k.clear();
        for (row, normed) in compressed.chunks_exact(kv_rank + rotated).zip(normed.chunks_exact(kv_rank)) {
            k.extend_from_slice(&row[kv_rank..]);
            k.extend_from_slice(normed);
        }
    }

    /// Turns each head's mix of compressed rows into its mix of values, rounded.
    pub(super) fn expand(
        &self,
        cpu: &Cpu,
        trunk: &Trunk,
        spec: &AttentionSpec,
        buffers: &mut attention::Buffers,
    ) {
        let attention::Buffers { mixed, latent, .. } = buffers;
        let Buffers { queries: whole, of_head, made, .. } = latent;
        let LatentSpec { kv_rank, value_dim, .. } = self.spec;
        let rows = mixed.len() / (spec.heads * kv_rank);
        whole.resize(rows * spec.heads * value_dim, 0.0);
        for (head, values) in self.values.iter().enumerate() {
            of_head.clear();
            for row in mixed.chunks_exact(spec.heads * kv_rank) {
                of_head.extend_from_slice(&row[head * kv_rank..][..kv_rank]);
            }
            made.resize(rows * value_dim, 0.0);
            linear(cpu, values, of_head, precision(trunk.compute), made);
            let to = whole.chunks_exact_mut(spec.heads * value_dim);
            for (to, made) in to.zip(made.chunks_exact(value_dim)) {
                to[head * value_dim..][..value_dim].copy_from_slice(made);
            }
        }
        trunk.round(whole);
        std::mem::swap(mixed, whole);
    }
}
