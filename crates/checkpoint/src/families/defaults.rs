//! What a family's absent keys mean, and what it does otherwise than most.

/// What absent keys mean.
pub(super) struct Defaults {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    /// `None`: as many as query heads.
    pub kv_heads: Option<usize>,
    pub context: usize,
    pub norm_eps: f64,
    pub rope_theta: f64,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub experts: usize,
    pub top_k: usize,
    pub habits: Habits,
}

/// What most families have in common and some do otherwise.
pub(super) struct Habits {
    /// Names of the number of experts; any of them is taken.
    pub experts: &'static [&'static str],
    /// Names of the number of experts per token.
    pub top_k: &'static [&'static str],
    /// What an absent `head_dim` means; `None`: as wide as the hidden row divided by the heads.
    pub head_dim: Option<usize>,
    /// What an absent `tie_word_embeddings` means.
    pub tied_head: bool,
    pub rotary: Rotary,
    /// Scaling called "dynamic" is by a fixed `alpha`.
    pub alpha: bool,
    /// Layers may differ in what they see; the family reads `layer_types`.
    pub layers_differ: bool,
    /// Routed experts may be stored in MXFP4.
    pub mxfp4: bool,
    /// Modules of code that come with published models of the family and do what this build does without them.
    pub modules: &'static [&'static str],
}

impl Habits {
    pub(super) const USUAL: Self = Self {
        experts: &["num_local_experts", "num_experts"],
        top_k: &["num_experts_per_tok"],
        head_dim: None,
        tied_head: false,
        rotary: Rotary::Whole,
        alpha: false,
        layers_differ: false,
        mxfp4: false,
        modules: &[],
    };
}

/// How much of a head is rotated.
#[derive(Clone, Copy)]
pub(super) enum Rotary {
    /// All of it; `partial_rotary_factor` may say nothing else.
    Whole,
    /// As `partial_rotary_factor` says; its default.
    Partial(f64),
    /// As many elements as this key says, which has a default: they are a head of their own.
    Elements(&'static str, usize),
    /// As many of the head's elements as this key says, or the part that `partial_rotary_factor` says, or all.
    Part(&'static str),
}
