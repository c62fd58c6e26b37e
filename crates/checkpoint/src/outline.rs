//! What a model's sizes follow from, and every matrix that it has by what it is for: no file is needed for it.
//!
//! Always holds: the outline of a [`ModelSpec`] has exactly the parameters that a checkpoint of that spec must have. Does
//! not know how weights are packed in memory.

use muster_types::{DType, Reach};

use crate::spec::{AttentionSpec, LatentSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormKind, SharedSpec};
use crate::stored::StoredAs;

/// Dimensions of a model, as far as they are dimensions of weights or of the KV cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    /// Rows of embedding and head.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Longest sequence, tokens.
    pub context: usize,
    /// The head is the embedding.
    pub tied_head: bool,
    /// Norms have biases, those of queries, keys and compressed rows excepted.
    pub norm_biases: bool,
    /// The head has a bias.
    pub head_bias: bool,
    /// How embedding, head and gates are stored.
    pub stored: StoredAs,
    /// How attention's linears, dense MLPs and shared experts are stored.
    pub linears: StoredAs,
    /// How routed experts are stored.
    pub experts: StoredAs,
    /// Layers in order.
    pub layers: Vec<LayerOutline>,
}

/// One layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerOutline {
    /// Its attention.
    pub attention: AttentionOutline,
    /// Which positions it sees.
    pub reach: Reach,
    /// Width of the gated MLP that every token passes, a dense layer's or shared experts'; 0 without one.
    pub dense: usize,
    /// Shared experts are weighted by a linear layer with one output.
    pub shared_scale: bool,
    /// Its routed experts.
    pub experts: Option<ExpertsOutline>,
}

/// What attention has for weights, and keeps per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionOutline {
    /// Grouped queries: keys and values are kept.
    Grouped {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
        /// Width of a head.
        head_dim: usize,
        /// Elements of norms, biases and sinks.
        vectors: usize,
    },
    /// Multi-head latent attention (DeepSeek-V2, section 2.1): the compressed latent and the rotated key are kept.
    Latent {
        /// Query heads.
        heads: usize,
        /// Width of the queries' latent; `None` where they come from the hidden row.
        q_rank: Option<usize>,
        /// Width of the keys' and values' latent.
        kv_rank: usize,
        /// Width of a head's key that is not rotated.
        nope: usize,
        /// Width of the rotated key, which heads share.
        rope: usize,
        /// Width of a head's value.
        value: usize,
        /// Elements of biases.
        biases: usize,
    },
}

/// Routed experts of a layer: gated MLPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsOutline {
    /// How many.
    pub count: u32,
    /// How many of them a token passes.
    pub top_k: u32,
    /// Width of one.
    pub intermediate: usize,
    /// All three of its projections have biases.
    pub biases: bool,
    /// The gate has a bias.
    pub gate_bias: bool,
    /// Experts are selected by their scores and a bias.
    pub selection_bias: bool,
}

/// A weight of the trunk, by how it is held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[vocab, hidden]`; absent when tied.
    Head,
    /// A projection of attention, of a dense MLP or of a shared expert.
    Linear,
    /// What makes keys and values of a compressed row, held head by head: for each, rows for a key that is not rotated and
    /// rows for a value.
    HeadByHead {
        /// How many.
        heads: usize,
        /// Rows of one for a key.
        key: usize,
        /// Rows of one for a value.
        value: usize,
    },
    /// `[experts, hidden]`, or `[1, hidden]` of a shared expert.
    Gate,
    /// Norms and biases.
    Vector,
    /// The bias that experts are selected by, which is stored in f32.
    SelectionBias,
}

/// A matrix `[rows, cols]`; a vector has one column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// What it is for.
    pub used_as: Use,
    /// Output features, or length.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl Piece {
    fn elements(&self) -> u64 {
        self.rows as u64 * self.cols as u64
    }
}

impl ExpertsOutline {
    /// Gate, up and down projection of one expert.
    #[must_use]
    pub const fn matrices(&self, hidden: usize) -> [(usize, usize); 3] {
        [(self.intermediate, hidden), (self.intermediate, hidden), (hidden, self.intermediate)]
    }

    /// Elements of one expert's biases.
    #[must_use]
    pub const fn bias_elements(&self, hidden: usize) -> u64 {
        if self.biases { 2 * self.intermediate as u64 + hidden as u64 } else { 0 }
    }

    /// Parameters of one expert.
    #[must_use]
    pub fn parameters(&self, hidden: usize) -> u64 {
        let matrices = self.matrices(hidden).map(|(rows, cols)| rows as u64 * cols as u64);
        matrices.iter().sum::<u64>() + self.bias_elements(hidden)
    }

    /// Bytes of one expert as stored.
    #[must_use]
    pub fn stored_bytes(&self, hidden: usize, stored: StoredAs) -> u64 {
        let matrices = self.matrices(hidden).map(|(rows, cols)| stored.bytes(rows, cols));
        matrices.iter().sum::<u64>() + stored.vector_bytes(self.bias_elements(hidden))
    }
}

impl Outline {
    /// That of a model which this build can compute.
    #[must_use]
    pub fn of(spec: &ModelSpec) -> Self {
        Self {
            vocab: spec.vocab as usize,
            hidden: spec.hidden,
            context: spec.context,
            tied_head: spec.tied_head,
            norm_biases: spec.norm == NormKind::Layer,
            head_bias: spec.head_bias,
            stored: spec.stored.tables,
            linears: spec.stored.linears,
            experts: spec.stored.experts,
            layers: spec.layers.iter().map(|layer| LayerOutline::of(layer, spec.hidden)).collect(),
        }
    }

    /// Every weight of the trunk.
    pub fn trunk(&self) -> impl Iterator<Item = Piece> + '_ {
        let table = |used_as| Piece { used_as, rows: self.vocab, cols: self.hidden };
        let head = (!self.tied_head).then(|| table(Use::Head));
        let head = head.into_iter().chain(self.head_bias.then(|| vector(self.vocab)));
        let norm = vector(if self.norm_biases { 2 * self.hidden } else { self.hidden });
        let outer = [table(Use::Embedding), norm].into_iter().chain(head);
        let norms = [norm, norm].into_iter();
        outer.chain(self.layers.iter().flat_map(move |layer| norms.clone().chain(layer.trunk(self.hidden))))
    }

    /// Layers that have routed experts.
    pub fn moe_layers(&self) -> impl Iterator<Item = &ExpertsOutline> {
        self.layers.iter().filter_map(|layer| layer.experts.as_ref())
    }

    /// Parameters of everything but routed experts.
    #[must_use]
    pub fn trunk_parameters(&self) -> u64 {
        self.trunk().map(|piece| piece.elements()).sum()
    }

    /// Parameters in all.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let experts = self.moe_layers().map(|moe| u64::from(moe.count) * moe.parameters(self.hidden));
        self.trunk_parameters() + experts.sum::<u64>()
    }

    /// Parameters that one token uses: the trunk, and `top_k` experts of every layer that has them.
    #[must_use]
    pub fn active_parameters(&self) -> u64 {
        let experts = self.moe_layers().map(|moe| u64::from(moe.top_k) * moe.parameters(self.hidden));
        self.trunk_parameters() + experts.sum::<u64>()
    }

    /// Bytes as stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let experts =
            self.moe_layers().map(|moe| u64::from(moe.count) * moe.stored_bytes(self.hidden, self.experts));
        let trunk = self.trunk().map(|piece| match piece.used_as {
            Use::Linear | Use::HeadByHead { .. } => self.linears.bytes(piece.rows, piece.cols),
            Use::Vector => self.stored.vector_bytes(piece.elements()),
            Use::SelectionBias => StoredAs::Plain(DType::F32).vector_bytes(piece.elements()),
            Use::Embedding | Use::Head | Use::Gate => self.stored.bytes(piece.rows, piece.cols),
        });
        trunk.sum::<u64>() + experts.sum::<u64>()
    }
}

impl LayerOutline {
    // Every field is named, so that a field which is new has to be counted or said to have no weights.
    fn of(layer: &LayerSpec, hidden: usize) -> Self {
        let LayerSpec { attention, mlp } = layer;
        let reach = attention.reach;
        let attention = AttentionOutline::of(attention, hidden);
        match mlp {
            MlpSpec::Dense { intermediate } => {
                Self { attention, reach, dense: *intermediate, shared_scale: false, experts: None }
            }
            MlpSpec::Moe(MoeSpec {
                experts,
                top_k,
                intermediate,
                gating: _,
                biases,
                gate,
                weight_on: _,
                shared,
            }) => {
                let (count, top_k, intermediate, biases) = (*experts, *top_k, *intermediate, *biases);
                let (gate_bias, selection_bias) = (gate.bias, gate.selection_bias);
                let experts =
                    ExpertsOutline { count, top_k, intermediate, biases, gate_bias, selection_bias };
                let shared_scale = matches!(shared, SharedSpec::SigmoidGated { .. });
                let dense = shared.intermediate().unwrap_or(0);
                Self { attention, reach, dense, shared_scale, experts: Some(experts) }
            }
        }
    }

    fn trunk(&self, hidden: usize) -> Vec<Piece> {
        let mut pieces = self.attention.trunk(hidden);
        if self.dense > 0 {
            pieces.extend([
                linear(self.dense, hidden),
                linear(self.dense, hidden),
                linear(hidden, self.dense),
            ]);
        }
        let scale = Piece { used_as: Use::Gate, rows: 1, cols: hidden };
        pieces.extend(self.shared_scale.then_some(scale));
        if let Some(moe) = &self.experts {
            let count = moe.count as usize;
            pieces.push(Piece { used_as: Use::Gate, rows: count, cols: hidden });
            pieces.extend(moe.gate_bias.then(|| vector(count)));
            let bias = Piece { used_as: Use::SelectionBias, ..vector(count) };
            pieces.extend(moe.selection_bias.then_some(bias));
        }
        pieces
    }
}

impl AttentionOutline {
    fn of(attention: &AttentionSpec, hidden: usize) -> Self {
        let AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            scale: _,
            qk_norm,
            clip_qkv: _,
            qkv_bias,
            o_bias,
            rope: _,
            temperature: _,
            reach: _,
            sinks,
            latent,
        } = *attention;
        let o_biases = if o_bias { hidden } else { 0 };
        if let Some(LatentSpec {
            q_rank,
            kv_rank,
            plain_dim: nope,
            value_dim: value,
            norm_eps: _,
            down_bias,
        }) = latent
        {
            // One key, which all heads share.
            let rope = head_dim - kv_rank;
            let down = if down_bias { q_rank.unwrap_or(0) + kv_rank + rope } else { 0 };
            return Self::Latent { heads, q_rank, kv_rank, nope, rope, value, biases: down + o_biases };
        }
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let norms: usize = qk_norm.weights(heads, kv_heads, head_dim).into_iter().flatten().sum();
        let biases = if qkv_bias { q + 2 * kv } else { 0 } + o_biases;
        let sinks = if sinks { heads } else { 0 };
        Self::Grouped { heads, kv_heads, head_dim, vectors: norms + biases + sinks }
    }

    fn trunk(&self, hidden: usize) -> Vec<Piece> {
        match *self {
            Self::Grouped { heads, kv_heads, head_dim, vectors } => {
                let (q, kv) = (heads * head_dim, kv_heads * head_dim);
                let linears =
                    vec![linear(q, hidden), linear(kv, hidden), linear(kv, hidden), linear(hidden, q)];
                linears.into_iter().chain((vectors > 0).then(|| vector(vectors))).collect()
            }
            Self::Latent { heads, q_rank, kv_rank, nope, rope, value, biases } => {
                let mut pieces = match q_rank {
                    None => vec![linear(heads * (nope + rope), hidden)],
                    Some(rank) => {
                        vec![linear(rank, hidden), vector(rank), linear(heads * (nope + rope), rank)]
                    }
                };
                pieces.extend((biases > 0).then(|| vector(biases)));
                pieces.extend([
                    linear(kv_rank + rope, hidden),
                    vector(kv_rank),
                    Piece {
                        used_as: Use::HeadByHead { heads, key: nope, value },
                        ..linear(heads * (nope + value), kv_rank)
                    },
                    linear(hidden, heads * value),
                ]);
                pieces
            }
        }
    }
}

const fn linear(rows: usize, cols: usize) -> Piece {
    Piece { used_as: Use::Linear, rows, cols }
}

const fn vector(rows: usize) -> Piece {
    Piece { used_as: Use::Vector, rows, cols: 1 }
}
