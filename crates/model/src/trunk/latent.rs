//! Attention whose cache holds one compressed row per position instead of keys and values of every head.
//!
//! The projection from a compressed row to keys is applied to queries instead, and the projection to values to the
//! output: with `k = A c`, `q k = (transposed A q) c`, and a weighted sum of values `B c` is `B` times that of `c`. So
//! a head's query becomes as wide as the cached row, all heads share one cached key, `[rotated part, compressed row]`,
//! and their value is its end, the compressed row. Knows nothing about the cache.

use muster_checkpoint::spec::{AttentionSpec, LatentSpec};

use super::device::{Device, HeadColumns, Projection};

/// Weights of attention over compressed rows.
pub(super) struct Latent<D: Device> {
    pub(super) spec: LatentSpec,
    /// Projection down and norm, where queries come from a compressed row.
    pub(super) q_down: Option<(Projection<D>, D::Vector)>,
    pub(super) q: Projection<D>,
    pub(super) kv_down: Projection<D>,
    pub(super) kv_norm: D::Vector,
    /// Per head `[kv_rank, plain_dim]`: from a query's plain part to its product partner of a compressed row.
    pub(super) absorb: Vec<D::Matrix>,
    /// Per head `[value_dim, kv_rank]`: from compressed rows to values.
    pub(super) values: Vec<D::Matrix>,
}

/// Buffers of one lane.
pub(super) struct Buffers<D: Device> {
    compressed: D::Buffer,
    normed: D::Buffer,
    queries: D::Buffer,
    values: D::Buffer,
}

impl<D: Device> Default for Buffers<D> {
    fn default() -> Self {
        Self {
            compressed: D::Buffer::default(),
            normed: D::Buffer::default(),
            queries: D::Buffer::default(),
            values: D::Buffer::default(),
        }
    }
}

impl<D: Device> Latent<D> {
    /// Projects the rows of `x` to queries and keys in the cache's form; values are the ends of keys.
    pub(super) fn project(
        &self,
        device: &D,
        spec: &AttentionSpec,
        x: &D::Buffer,
        [q, k]: [&mut D::Buffer; 2],
        buffers: &mut Buffers<D>,
        scratch: &mut D::Scratch,
    ) {
        let Buffers { compressed, normed, queries, .. } = buffers;
        let LatentSpec { kv_rank, plain_dim, norm_eps, .. } = self.spec;
        let rotated = spec.rotated();
        match &self.q_down {
            None => device.linear(&self.q, x, queries),
            Some((down, norm)) => {
                device.linear(down, x, compressed);
                device.norm_heads(norm, norm_eps, compressed);
                device.round(compressed);
                device.linear(&self.q, compressed, queries);
            }
        }
        let columns = |width, first| HeadColumns { width, first };
        let query = plain_dim + rotated;
        let plain = (&*queries, columns(query, 0));
        device.linear_heads(&self.absorb, plain, (q, columns(spec.head_dim, rotated)), scratch);
        device.copy_columns((queries, columns(query, plain_dim)), rotated, (q, columns(spec.head_dim, 0)));

        device.linear(&self.kv_down, x, compressed);
        let stored = kv_rank + rotated;
        device.copy_columns((compressed, columns(stored, 0)), kv_rank, (normed, columns(kv_rank, 0)));
        device.norm_heads(&self.kv_norm, norm_eps, normed);
        device.copy_columns((compressed, columns(stored, kv_rank)), rotated, (k, columns(stored, 0)));
        device.copy_columns((normed, columns(kv_rank, 0)), kv_rank, (k, columns(stored, rotated)));
    }

    /// Projects each head's weighted sum of compressed rows, in `mixed`, to that of values, rounded.
    pub(super) fn expand(
        &self,
        device: &D,
        mixed: &mut D::Buffer,
        buffers: &mut Buffers<D>,
        scratch: &mut D::Scratch,
    ) {
        let values = &mut buffers.values;
        let whole = |width| HeadColumns { width, first: 0 };
        let LatentSpec { kv_rank, value_dim, .. } = self.spec;
        device.linear_heads(&self.values, (mixed, whole(kv_rank)), (values, whole(value_dim)), scratch);
        device.round(values);
        std::mem::swap(mixed, values);
    }
}
