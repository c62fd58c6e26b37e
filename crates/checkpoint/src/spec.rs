//! What a model is, as data: dimensions, attention, norms, rope, multipliers, and how its gate picks experts.
//!
//! A family file turns `config.json` into a [`ModelSpec`]; everything downstream reads only this. No family is
//! named outside `families/`, and a value that this build cannot compute never gets this far.

use std::fmt;

use muster_types::DType;

/// A whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the configuration. For people to read; nothing branches on it.
    pub family: &'static str,
    /// Dtype of the stored linear weights.
    pub dtype: DType,
    /// Vocabulary size: rows of embedding and head.
    pub vocab: u32,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Longest sequence the model was made for, tokens.
    pub context: usize,
    /// Decoder layers in order; at least one.
    pub layers: Vec<LayerSpec>,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Factor on the embedding's output; 1 where the family has none.
    pub embedding_multiplier: f32,
    /// Factor on what attention and MLP add to the residual stream; 1 where the family has none.
    pub residual_multiplier: f32,
    /// Logits are divided by this; 1 where the family has none.
    pub logits_divisor: f32,
    /// The head is the embedding; there is no head tensor.
    pub tied_head: bool,
    /// Begin-of-text token, if the configuration names one.
    pub bos: Option<u32>,
    /// End-of-text tokens; generation stops at any of them. May be empty.
    pub eos: Vec<u32>,
}

/// One decoder layer: norm, attention, residual, norm, MLP, residual.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// What follows attention.
    pub mlp: MlpSpec,
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Factor on query-key products before softmax.
    pub scale: f32,
    /// RMS norm on queries and keys, before rotation.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to plus or minus this, after the norm.
    pub clip_qkv: Option<f32>,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub o_bias: bool,
    /// Rotary embedding.
    pub rope: RopeSpec,
    /// A query sees this many positions, itself included; `None` sees all.
    pub window: Option<usize>,
}

/// Where queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Nowhere.
    None,
    /// Each head by itself; the weight has `head_dim` elements.
    PerHead,
    /// Across the whole projection; the weight is as long as the projection is wide.
    FullWidth,
}

/// Rotary position embedding: element `i` of a head is paired with element `i + head_dim / 2`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
}

/// The part of a layer after attention.
#[derive(Debug, Clone, PartialEq)]
pub enum MlpSpec {
    /// Routed experts.
    Moe(MoeSpec),
    /// One gated MLP, kept in the router.
    Dense {
        /// Its width.
        intermediate: usize,
    },
}

/// A layer's routed experts: gated MLPs `down(silu(gate(x)) * up(x))` without biases.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// Routed experts.
    pub experts: u32,
    /// Experts per token; at least 1, at most `experts`.
    pub top_k: u32,
    /// Width of one expert.
    pub intermediate: usize,
    /// How experts are picked and weighted.
    pub gate: GateRecipe,
}

/// How a gate turns logits into experts and weights. Equal scores: the lowest expert id wins.
#[derive(Debug, Clone, PartialEq)]
pub struct GateRecipe {
    /// What scores are made of.
    pub score: Score,
    /// What is done to the weights of the selected experts.
    pub renormalise: Renormalise,
}

/// Scores, from gate logits in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts, then top-k.
    SoftmaxThenTopK,
    /// Top-k of the logits, then softmax over those selected.
    TopKThenSoftmax,
}

/// Renormalisation of selected weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renormalise {
    /// As they are.
    None,
    /// Divided by their sum.
    Sum,
}

impl ModelSpec {
    /// Layers that have routed experts, with their numbers.
    pub fn moe_layers(&self) -> impl Iterator<Item = (u32, &MoeSpec)> {
        self.layers.iter().zip(0u32..).filter_map(|(layer, index)| match &layer.mlp {
            MlpSpec::Moe(moe) => Some((index, moe)),
            MlpSpec::Dense { .. } => None,
        })
    }

    /// The experts of one layer; `None` for a dense layer or one that does not exist.
    #[must_use]
    pub fn moe(&self, layer: usize) -> Option<&MoeSpec> {
        match &self.layers.get(layer)?.mlp {
            MlpSpec::Moe(moe) => Some(moe),
            MlpSpec::Dense { .. } => None,
        }
    }
}

/// A weight by what it does, whatever a family calls its tensor. Matrices are `[out, in]`, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[hidden]`.
    FinalNorm,
    /// `[vocab, hidden]`; absent when the head is tied.
    Head,
    /// Of one layer.
    Layer(u32, LayerRole),
    /// Of one routed expert: layer, expert.
    Expert(u32, u32, ExpertRole),
}

/// Weights of a layer that stay in the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerRole {
    /// `[hidden]`, before attention.
    AttentionNorm,
    /// `[heads * head_dim, hidden]`.
    Q,
    /// `[kv_heads * head_dim, hidden]`.
    K,
    /// `[kv_heads * head_dim, hidden]`.
    V,
    /// `[hidden, heads * head_dim]`.
    O,
    /// `[heads * head_dim]`.
    QBias,
    /// `[kv_heads * head_dim]`.
    KBias,
    /// `[kv_heads * head_dim]`.
    VBias,
    /// `[hidden]`.
    OBias,
    /// `[head_dim]` or `[heads * head_dim]`, as [`QkNorm`] says.
    QNorm,
    /// `[head_dim]` or `[kv_heads * head_dim]`.
    KNorm,
    /// `[hidden]`, before the MLP.
    MlpNorm,
    /// `[experts, hidden]`.
    Gate,
    /// `[intermediate, hidden]` of a dense layer.
    DenseGate,
    /// `[intermediate, hidden]` of a dense layer.
    DenseUp,
    /// `[hidden, intermediate]` of a dense layer.
    DenseDown,
}

/// Weights of a routed expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExpertRole {
    /// `[intermediate, hidden]`.
    Gate,
    /// `[intermediate, hidden]`.
    Up,
    /// `[hidden, intermediate]`.
    Down,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::FinalNorm => f.write_str("final norm"),
            Self::Head => f.write_str("head"),
            Self::Layer(layer, role) => write!(f, "layer {layer} {role}"),
            Self::Expert(layer, expert, role) => write!(f, "layer {layer} expert {expert} {role}"),
        }
    }
}

impl fmt::Display for LayerRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AttentionNorm => "attention norm",
            Self::Q => "query projection",
            Self::K => "key projection",
            Self::V => "value projection",
            Self::O => "output projection",
            Self::QBias => "query bias",
            Self::KBias => "key bias",
            Self::VBias => "value bias",
            Self::OBias => "output bias",
            Self::QNorm => "query norm",
            Self::KNorm => "key norm",
            Self::MlpNorm => "MLP norm",
            Self::Gate => "gate",
            Self::DenseGate => "dense gate projection",
            Self::DenseUp => "dense up projection",
            Self::DenseDown => "dense down projection",
        })
    }
}

impl fmt::Display for ExpertRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gate => "gate projection",
            Self::Up => "up projection",
            Self::Down => "down projection",
        })
    }
}
