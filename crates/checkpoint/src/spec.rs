//! A model as data: dimensions, attention, norms, rope, multipliers, and its gate's recipe.
//!
//! A family file turns `config.json` into a [`ModelSpec`]; everything downstream reads only this. No family is
//! named outside `families/`, and a value that this build cannot compute never gets this far.

use std::fmt;
use std::sync::Arc;

use muster_types::{DType, Gating, Reach};

use crate::stored::StoredForms;

/// A whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the configuration. For people to read; nothing branches on it.
    pub family: &'static str,
    /// Dtype that linear weights come in, but for those stored in few bits.
    pub dtype: DType,
    /// How weights are stored.
    pub stored: StoredForms,
    /// Vocabulary size: rows of embedding and head.
    pub vocab: u32,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Longest sequence the model was made for, tokens.
    pub context: usize,
    /// Decoder layers in order; at least one.
    pub layers: Vec<LayerSpec>,
    /// What norms before attention, MLP and head are.
    pub norm: NormKind,
    /// Epsilon of every norm, those of compressed rows excepted.
    pub norm_eps: f32,
    /// Factor on the embedding's output; 1 where the family has none.
    pub embedding_multiplier: f32,
    /// Factor on what attention and MLP add to the residual stream; 1 where the family has none.
    pub residual_multiplier: f32,
    /// Logits are divided by this; 1 where the family has none.
    pub logits_divisor: f32,
    /// The head is the embedding; there is no head tensor.
    pub tied_head: bool,
    /// The head has a bias.
    pub head_bias: bool,
    /// Prefixes of stored tensors that no output needs, such as layers that predict more tokens ahead.
    pub unused: Vec<String>,
    /// Begin-of-text token, if the configuration names one.
    pub bos: Option<u32>,
    /// End-of-text tokens; generation stops at any of them. May be empty.
    pub eos: Vec<u32>,
}

/// What a norm does with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Divides by the root of the mean square, multiplies by a weight.
    Rms,
    /// Takes the mean away, divides by the standard deviation, multiplies by a weight, adds a bias.
    Layer,
}

/// One decoder layer: norm, attention, residual, norm, MLP, residual.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// What follows attention.
    pub mlp: MlpSpec,
}

/// Grouped-query attention, or attention over compressed rows.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads that are cached; divides `heads`. 1 for compressed rows.
    pub kv_heads: usize,
    /// Width of one cached key: of a head, even; or of the rotated part and the compressed row together.
    pub head_dim: usize,
    /// Factor on query-key products before softmax.
    pub scale: f32,
    /// RMS norm on queries and keys.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to plus or minus this, after the norm.
    pub clip_qkv: Option<f32>,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub o_bias: bool,
    /// Rotary embedding; `None` rotates nothing. Compressed rows have one.
    pub rope: Option<RopeSpec>,
    /// Queries are multiplied by something that grows with their position.
    pub temperature: Option<Temperature>,
    /// How far queries look back.
    pub reach: Reach,
    /// Every query head has a score of its own that takes part in the softmax and brings no value.
    pub sinks: bool,
    /// What is cached per position is one compressed row; `None` caches keys and values head by head.
    pub latent: Option<LatentSpec>,
}

/// A factor on queries: `ln(1 + floor((position + 1) / floor)) * scale + 1`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// Positions with the same factor.
    pub floor: f32,
    /// How much the factor grows.
    pub scale: f32,
}

/// Keys and values of all heads compressed into one row per position, and one rotated key that all heads share.
///
/// A head's query has `plain_dim` elements that meet a key made of the compressed row, then `rope.dim` rotated ones
/// that meet the shared key. Queries, too, may come from a compressed row. Compressed rows are RMS-normed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentSpec {
    /// Width of the row that queries come from; `None` where they come from the hidden row.
    pub q_rank: Option<usize>,
    /// Width of the row that keys and values come from.
    pub kv_rank: usize,
    /// Elements of a head's query that are not rotated.
    pub plain_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Epsilon of the norms of compressed rows.
    pub norm_eps: f32,
    /// The projections down, to compressed rows, have biases.
    pub down_bias: bool,
}

impl QkNorm {
    /// Elements of the weights for queries and for keys, where there are weights.
    #[must_use]
    pub const fn weights(self, heads: usize, kv_heads: usize, head_dim: usize) -> Option<[usize; 2]> {
        match self {
            Self::None | Self::UnweightedRotated => None,
            Self::PerHead | Self::PerHeadRotated => Some([head_dim, head_dim]),
            Self::FullWidth => Some([heads * head_dim, kv_heads * head_dim]),
        }
    }
}

impl AttentionSpec {
    /// Elements of a head that are rotated.
    #[must_use]
    pub fn rotated(&self) -> usize {
        self.rope.as_ref().map_or(0, |rope| rope.dim)
    }

    /// Elements of a cached value.
    #[must_use]
    pub fn cached_value(&self) -> usize {
        self.latent.map_or(self.head_dim, |latent| latent.kv_rank)
    }

    /// Elements that the output projection takes.
    #[must_use]
    pub fn output_width(&self) -> usize {
        self.heads * self.latent.map_or(self.head_dim, |latent| latent.value_dim)
    }
}

/// Where queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Nowhere.
    None,
    /// Each head by itself, before rotation; the weight has `head_dim` elements.
    PerHead,
    /// Across the whole projection, before rotation; the weight is as long as the projection is wide.
    FullWidth,
    /// Each head by itself, after rotation; the weight has `head_dim` elements.
    PerHeadRotated,
    /// Each head by itself, after rotation, without a weight.
    UnweightedRotated,
}

/// Rotary position embedding of a head's first elements; the rest of the head stays as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements that are rotated; even, at least 2, at most `head_dim`.
    pub dim: usize,
    /// Which of them are pairs.
    pub pairs: RopePairs,
    /// Change of the frequencies, for contexts longer than those trained on.
    pub scaling: RopeScaling,
}

/// What is done to the frequencies of a rotary embedding, and to its sines and cosines.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Nothing.
    None,
    /// All frequencies are divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// Slow frequencies are divided, fast ones stay, those between are mixed by their number.
    Yarn(YarnSpec),
    /// Slow frequencies are divided, fast ones stay, those between are mixed by their wavelength.
    Llama3(Llama3Spec),
    /// Every frequency is divided by a number of its own.
    Each {
        /// One divisor per pair.
        divisors: Arc<[f32]>,
        /// Factor on sines and cosines.
        amplitude: f32,
    },
}

/// YaRN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnSpec {
    /// What slow frequencies are divided by.
    pub factor: f64,
    /// Length of the context trained on.
    pub original_context: usize,
    /// What turns more often than this in that context stays.
    pub beta_fast: f64,
    /// What turns less often than this is divided.
    pub beta_slow: f64,
    /// The bounds between fast, mixed and slow are whole numbers.
    pub truncate: bool,
    /// Factor on sines and cosines.
    pub amplitude: f32,
}

/// Llama 3's scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Spec {
    /// What slow frequencies are divided by.
    pub factor: f64,
    /// Length of the context trained on.
    pub original_context: usize,
    /// Slow is what turns less often than this in that context.
    pub low: f64,
    /// Fast is what turns more often than this in that context.
    pub high: f64,
}

/// Which elements turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// `i` and `i + dim / 2`.
    Halves,
    /// `2i` and `2i + 1`.
    Neighbours,
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

/// A layer's routed experts: gated MLPs.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// Routed experts.
    pub experts: u32,
    /// Experts per token; at least 1, at most `experts`.
    pub top_k: u32,
    /// Width of one expert.
    pub intermediate: usize,
    /// What an expert makes of the outputs of its gate and up projections.
    pub gating: Gating,
    /// All three projections of an expert have biases.
    pub biases: bool,
    /// How experts are picked and weighted.
    pub gate: GateRecipe,
    /// What the weights multiply.
    pub weight_on: WeightOn,
    /// What every token gets beside its routed experts. Kept in the router.
    pub shared: SharedSpec,
}

/// What the weights of the chosen experts multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightOn {
    /// The expert's output.
    Output,
    /// The expert's input, before anything that is not linear: it cannot be moved to the output.
    Input,
}

/// A gated MLP whose output is added to that of the routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedSpec {
    /// There is none.
    None,
    /// Added as it is.
    Add {
        /// Its width.
        intermediate: usize,
    },
    /// Added times the sigmoid of a linear layer with one output.
    SigmoidGated {
        /// Its width.
        intermediate: usize,
    },
}

/// How a gate turns logits into experts and weights. Equal scores: the lowest expert id wins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateRecipe {
    /// The gate's linear layer has a bias.
    pub bias: bool,
    /// What scores are made of.
    pub score: Score,
    /// Experts are selected by score plus a bias of their own; their weights come from the score alone.
    pub selection_bias: bool,
    /// Only experts of the best groups are selected.
    pub groups: Option<ExpertGroups>,
    /// What is done to the weights of the selected experts.
    pub renormalise: Renormalise,
    /// Factor on the weights, last; 1 where the family has none.
    pub scale: f32,
}

/// Scores, from gate logits in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Score {
    /// Softmax over all experts, then top-k.
    SoftmaxThenTopK,
    /// Sigmoid of each expert's logit, then top-k.
    SigmoidThenTopK,
    /// Top-k of the logits, then softmax over those selected.
    TopKThenSoftmax,
    /// Top-k of the logits, then sigmoid of each.
    TopKThenSigmoid,
    /// SparseMixer (Liu et al., 2023) as it is at inference: the best expert of those not picked yet, `top_k` times; each
    /// weighs its part of a softmax over those not picked whose logits come near its own. Weights do not add up to 1.
    SparseMixer {
        /// Near is within twice this of the best, relative to the greater of the best and the other's magnitude.
        jitter: f32,
    },
}

/// Experts in groups of neighbours, of which some take part. What groups and experts are ranked by includes the
/// selection bias. Equal groups: the lowest number wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups; divides the number of experts.
    pub groups: u32,
    /// Groups that take part; they have at least `top_k` experts.
    pub kept: u32,
    /// What a group is worth.
    pub worth: GroupWorth,
}

/// What a group of experts is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupWorth {
    /// As much as its best expert.
    Best,
    /// As much as its two best experts together; it has at least two.
    BestTwo,
}

/// Renormalisation of selected weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Renormalise {
    /// As they are.
    None,
    /// Divided by their sum plus this, which may be 0.
    Sum {
        /// Not negative.
        plus: f32,
    },
    /// Divided by their sum, or by this where the sum is less.
    SumAtLeast {
        /// Above 0.
        floor: f32,
    },
}

impl GateRecipe {
    /// A gate with neither biases nor groups nor a scale.
    #[must_use]
    pub const fn plain(score: Score, renormalise: Renormalise) -> Self {
        Self { bias: false, score, selection_bias: false, groups: None, renormalise, scale: 1.0 }
    }
}

impl Renormalise {
    /// Divided by their sum.
    pub const SUM: Self = Self::Sum { plus: 0.0 };
}

impl SharedSpec {
    /// Its width; `None` where there is none.
    #[must_use]
    pub const fn intermediate(&self) -> Option<usize> {
        match *self {
            Self::None => None,
            Self::Add { intermediate } | Self::SigmoidGated { intermediate } => Some(intermediate),
        }
    }
}

impl ModelSpec {
    /// Layers that have routed experts, with their numbers.
    pub fn moe_layers(&self) -> impl Iterator<Item = (u32, &MoeSpec)> {
        self.layers.iter().zip(0u32..).filter_map(|(layer, index)| match &layer.mlp {
            MlpSpec::Moe(moe) => Some((index, moe)),
            MlpSpec::Dense { .. } => None,
        })
    }

    /// Most routed experts that one token goes to in a layer; 0 without MoE layers.
    #[must_use]
    pub fn most_experts_per_token(&self) -> u32 {
        self.moe_layers().map(|(_, moe)| moe.top_k).max().unwrap_or(0)
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
    /// `[hidden]`.
    FinalNormBias,
    /// `[vocab, hidden]`; absent when the head is tied.
    Head,
    /// `[vocab]`.
    HeadBias,
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
    /// `[hidden]`.
    AttentionNormBias,
    /// `[heads * head_dim, hidden]`, or from the queries' compressed row.
    Q,
    /// `[q_rank, hidden]`.
    QDown,
    /// `[q_rank]`.
    QDownBias,
    /// `[q_rank]`.
    QDownNorm,
    /// `[kv_rank + rope.dim, hidden]`: the compressed row of keys and values, then the shared key.
    KvDown,
    /// `[kv_rank + rope.dim]`.
    KvDownBias,
    /// `[kv_rank]`.
    KvDownNorm,
    /// `[heads * (plain_dim + value_dim), kv_rank]`: per head, what makes keys of a compressed row, then values.
    KvUp,
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
    /// `[heads]`: scores that bring no value.
    Sinks,
    /// `[hidden]`, before the MLP.
    MlpNorm,
    /// `[hidden]`.
    MlpNormBias,
    /// `[experts, hidden]`.
    Gate,
    /// `[experts]`, added to the gate's logits.
    GateBias,
    /// `[experts]`, added to scores to select by.
    SelectionBias,
    /// `[intermediate, hidden]` of a dense layer.
    DenseGate,
    /// `[intermediate, hidden]` of a dense layer.
    DenseUp,
    /// `[hidden, intermediate]` of a dense layer.
    DenseDown,
    /// `[intermediate, hidden]` of a layer's shared expert.
    SharedGate,
    /// `[intermediate, hidden]` of a layer's shared expert.
    SharedUp,
    /// `[hidden, intermediate]` of a layer's shared expert.
    SharedDown,
    /// `[1, hidden]`: how much of the shared expert's output is added.
    SharedScale,
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
    /// `[intermediate]`.
    GateBias,
    /// `[intermediate]`.
    UpBias,
    /// `[hidden]`.
    DownBias,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::FinalNorm => f.write_str("final norm"),
            Self::FinalNormBias => f.write_str("final norm bias"),
            Self::Head => f.write_str("head"),
            Self::HeadBias => f.write_str("head bias"),
            Self::Layer(layer, role) => write!(f, "layer {layer} {role}"),
            Self::Expert(layer, expert, role) => write!(f, "layer {layer} expert {expert} {role}"),
        }
    }
}

impl fmt::Display for LayerRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AttentionNorm => "attention norm",
            Self::AttentionNormBias => "attention norm bias",
            Self::Q => "query projection",
            Self::QDown => "query compression",
            Self::QDownBias => "query compression bias",
            Self::QDownNorm => "compressed query norm",
            Self::KvDown => "key and value compression",
            Self::KvDownBias => "key and value compression bias",
            Self::KvDownNorm => "compressed key and value norm",
            Self::KvUp => "key and value expansion",
            Self::K => "key projection",
            Self::V => "value projection",
            Self::O => "output projection",
            Self::QBias => "query bias",
            Self::KBias => "key bias",
            Self::VBias => "value bias",
            Self::OBias => "output bias",
            Self::QNorm => "query norm",
            Self::KNorm => "key norm",
            Self::Sinks => "attention sinks",
            Self::MlpNorm => "MLP norm",
            Self::MlpNormBias => "MLP norm bias",
            Self::Gate => "gate",
            Self::GateBias => "gate bias",
            Self::SelectionBias => "selection bias",
            Self::DenseGate => "dense gate projection",
            Self::DenseUp => "dense up projection",
            Self::DenseDown => "dense down projection",
            Self::SharedGate => "shared expert gate projection",
            Self::SharedUp => "shared expert up projection",
            Self::SharedDown => "shared expert down projection",
            Self::SharedScale => "shared expert scale",
        })
    }
}

impl fmt::Display for ExpertRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gate => "gate projection",
            Self::Up => "up projection",
            Self::Down => "down projection",
            Self::GateBias => "gate projection bias",
            Self::UpBias => "up projection bias",
            Self::DownBias => "down projection bias",
        })
    }
}
