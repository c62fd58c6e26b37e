//! Memory of a loaded model, computed before loading from its outline and the requested dtypes.
//!
//! Always holds: for a model that this build loads, the trunk's bytes equal
//! [`Trunk::bytes`](crate::trunk::Trunk::bytes), an expert's [`ExpertForm::bytes`](crate::experts::ExpertForm::bytes),
//! and a token's keys and values those in the KV cache.

use std::num::NonZero;

use muster_checkpoint::StoredAs;
use muster_checkpoint::outline::{AttentionOutline, ExpertsOutline, Outline, Use};
use muster_engine::reach::{LayerGroups, most_held};
use muster_kernels::{BLOCK_TOKENS, KvCache, KvShape, KvValues, Matrix};
use muster_types::{Compute, WeightDType};

use crate::weights::packing;

/// Bytes of a loaded model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    /// Packed weights of everything but routed experts: what every router holds. Norms and biases are not counted.
    pub trunk_bytes: u64,
    /// Bytes of one routed expert, by layer; 0 in a dense layer.
    pub expert_bytes: Vec<u64>,
    /// Keys and values of one token, in all layers.
    pub kv_token_bytes: u64,
    /// Layers that share KV blocks.
    pub kv_groups: LayerGroups,
}

impl Footprint {
    /// Footprint of a model in this compute mode, with experts and trunk in these dtypes; `None` on overflow.
    #[must_use]
    pub fn of(outline: &Outline, compute: Compute, experts: WeightDType, trunk: WeightDType) -> Option<Self> {
        let embedded = if outline.tied_head { trunk } else { WeightDType::Native };
        let piece_bytes = |(used_as, rows, cols)| match used_as {
            Use::Embedding => packed(outline.stored, compute, embedded, rows, cols),
            Use::Head => packed(outline.stored, compute, trunk, rows, cols),
            Use::Linear => packed(outline.linears, compute, trunk, rows, cols),
            // The key projection is applied to queries, so it is transposed.
            Use::HeadByHead { heads, key, value } => {
                let [key, value] =
                    [(cols, key), (value, cols)].map(|(n, k)| packed(outline.linears, compute, trunk, n, k));
                key?.checked_add(value?)?.checked_mul(heads as u64)
            }
            // Gates choose experts, so they are not quantised.
            Use::Gate => packed(outline.stored, compute, WeightDType::Native, rows, cols),
            Use::Vector | Use::SelectionBias => Some(0),
        };
        let mut pieces = outline.trunk().map(|piece| piece_bytes((piece.used_as, piece.rows, piece.cols)));
        let expert = |moe: &ExpertsOutline| {
            let matrices = moe.matrices(outline.hidden).into_iter();
            let mut bytes =
                matrices.map(|(rows, cols)| packed(outline.experts, compute, experts, rows, cols));
            let biases = moe.bias_elements(outline.hidden) * size_of::<f32>() as u64;
            bytes.try_fold(biases, |sum, bytes| sum.checked_add(bytes?))
        };
        Some(Self {
            trunk_bytes: pieces.try_fold(0_u64, |sum, bytes| sum.checked_add(bytes?))?,
            expert_bytes: outline
                .layers
                .iter()
                .map(|layer| layer.experts.as_ref().map_or(Some(0), expert))
                .collect::<Option<_>>()?,
            kv_token_bytes: outline.layers.iter().map(|layer| kv_bytes(&layer.attention, compute)).sum(),
            kv_groups: LayerGroups::of(outline.layers.iter().map(|layer| layer.reach)),
        })
    }

    /// Most bytes of keys and values that one sequence of `tokens` tokens holds at once, in whole blocks, where a step
    /// computes at most `chunk` tokens. Layers with a window count only positions still in it.
    #[must_use]
    pub fn kv_sequence_bytes(&self, tokens: u64, chunk: u32) -> u64 {
        let reaches = self.kv_groups.reaches();
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        let blocks = most_held(reaches, BLOCK, chunk, tokens);
        let all = self.kv_token_bytes.saturating_mul(u64::from(BLOCK.get()));
        // Groups are equally large.
        blocks.saturating_mul(all / reaches.len().max(1) as u64)
    }
}

const BLOCK: NonZero<u32> = match NonZero::new(BLOCK_TOKENS as u32) {
    Some(block) => block,
    None => panic!("a block has tokens"),
};

/// Bytes of a packed matrix `[rows, cols]`, from its stored and requested dtype.
fn packed(stored: StoredAs, compute: Compute, dtype: WeightDType, rows: usize, cols: usize) -> Option<u64> {
    Matrix::packed_bytes(packing(stored, compute, dtype), rows, cols).map(|bytes| bytes as u64)
}

/// KV bytes of one token in one layer.
fn kv_bytes(attention: &AttentionOutline, compute: Compute) -> u64 {
    let shape = match *attention {
        AttentionOutline::Grouped { kv_heads, head_dim, .. } => {
            KvShape { layers: 1, kv_heads, head_dim, value_dim: head_dim, values: KvValues::Apart }
        }
        // The compressed row, which is the value, is the end of the key.
        AttentionOutline::Latent { kv_rank, rope, .. } => KvShape {
            layers: 1,
            kv_heads: 1,
            head_dim: kv_rank + rope,
            value_dim: kv_rank,
            values: KvValues::EndOfKey,
        },
    };
    (KvCache::bytes_per_block(shape, compute) / BLOCK_TOKENS) as u64
}
