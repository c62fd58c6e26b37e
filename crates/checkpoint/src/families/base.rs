//! The configuration keys that every family shares, with their allowed ranges.
//!
//! The ranges are several times what any published model has, and small enough that no product of them overflows and
//! no plan grows past some hundred thousand entries. A key that is absent means what it means to transformers: the
//! default of the family's configuration class.

use muster_types::DType;
use serde_json::Value;

use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, LayerSpec, ModelSpec, MoeSpec, QkNorm, RopeSpec};

/// Most elements of the residual stream.
const WIDEST: usize = 1 << 17;
/// Widest MLP.
const WIDEST_MLP: usize = 1 << 20;
const MOST_LAYERS: usize = 1024;
const MOST_EXPERTS: usize = 4096;
/// Most experts of all layers together.
const MOST_EXPERTS_IN_ALL: usize = 1 << 17;
const MOST_HEADS: usize = 1024;
const WIDEST_HEAD: usize = 1024;
const LONGEST_CONTEXT: usize = 1 << 30;
const LARGEST_VOCAB: usize = 1 << 24;

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
}

/// What the shared keys say.
pub(super) struct Base {
    pub layers: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub hidden: usize,
    vocab: u32,
    kv_heads: usize,
    context: usize,
    norm_eps: f32,
    rope: RopeSpec,
    tied_head: bool,
    bos: Option<u32>,
    eos: Vec<u32>,
    experts: u32,
    top_k: u32,
}

impl Base {
    /// Reads and checks the shared keys.
    pub(super) fn read(config: &Config, defaults: &Defaults) -> Result<Self, ConfigError> {
        refuse_unsupported(config)?;
        let vocab = count(config.size("vocab_size", defaults.vocab, 1..=LARGEST_VOCAB)?);
        let hidden = config.size("hidden_size", defaults.hidden, 1..=WIDEST)?;
        let layers = config.size("num_hidden_layers", defaults.layers, 1..=MOST_LAYERS)?;
        let heads = config.size("num_attention_heads", defaults.heads, 1..=MOST_HEADS)?;
        let (experts, top_k) = experts(config, defaults, layers)?;
        Ok(Self {
            layers,
            heads,
            head_dim: head_dim(config, hidden, heads)?,
            hidden,
            vocab,
            kv_heads: kv_heads(config, defaults, heads)?,
            context: config.size("max_position_embeddings", defaults.context, 1..=LONGEST_CONTEXT)?,
            norm_eps: config.positive("rms_norm_eps", defaults.norm_eps)? as f32,
            rope: rope(config, defaults)?,
            tied_head: config.flag("tie_word_embeddings", false)?,
            bos: bos(config, defaults.bos, vocab)?,
            eos: eos(config, defaults.eos, vocab)?,
            experts,
            top_k,
        })
    }

    /// Attention with nothing special: no norms, no clamp, no biases, no window, scale `1 / sqrt(head_dim)`.
    pub(super) fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f64).sqrt().recip() as f32,
            qk_norm: QkNorm::None,
            clip_qkv: None,
            qkv_bias: false,
            o_bias: false,
            rope: self.rope,
            window: None,
        }
    }

    /// Routed experts of this width.
    pub(super) fn moe(&self, intermediate: usize, gate: GateRecipe) -> MoeSpec {
        MoeSpec { experts: self.experts, top_k: self.top_k, intermediate, gate }
    }

    /// A model of these layers without multipliers.
    pub(super) fn model(self, family: &'static str, dtype: DType, layers: Vec<LayerSpec>) -> ModelSpec {
        ModelSpec {
            family,
            dtype,
            vocab: self.vocab,
            hidden: self.hidden,
            context: self.context,
            layers,
            norm_eps: self.norm_eps,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_divisor: 1.0,
            tied_head: self.tied_head,
            bos: self.bos,
            eos: self.eos,
        }
    }
}

/// The width of an MLP.
pub(super) fn intermediate(config: &Config, key: &str, default: usize) -> Result<usize, ConfigError> {
    config.size(key, default, 1..=WIDEST_MLP)
}

/// A sliding window, if there is one.
pub(super) fn window(config: &Config) -> Result<Option<usize>, ConfigError> {
    config.optional_size("sliding_window", 1..=LONGEST_CONTEXT)
}

/// Begin-of-text. A class default that the vocabulary does not reach names no token; the same holds for [`eos`].
fn bos(config: &Config, default: Option<u32>, vocab: u32) -> Result<Option<u32>, ConfigError> {
    const KEY: &str = "bos_token_id";
    if !config.has(KEY) {
        return Ok(default.filter(|id| *id < vocab));
    }
    Ok(config.optional_size(KEY, 0..=vocab as usize - 1)?.map(count))
}

fn eos(config: &Config, default: Option<u32>, vocab: u32) -> Result<Vec<u32>, ConfigError> {
    const KEY: &str = "eos_token_id";
    if !config.has(KEY) {
        return Ok(default.filter(|id| *id < vocab).into_iter().collect());
    }
    config.numbers(KEY, vocab)
}

fn refuse_unsupported(config: &Config) -> Result<(), ConfigError> {
    config.refuse_unless("hidden_act", "this build computes \"silu\"", |value| value == "silu")?;
    config.refuse_set("rope_scaling", "this build computes unscaled rotary embedding")?;
    config.refuse_unless("partial_rotary_factor", "this build rotates whole heads", |value| {
        value.as_f64() == Some(1.0)
    })?;
    config.refuse_set("quantization_config", "weights must be stored as F32 or BF16")?;
    config.refuse_set(
        "auto_map",
        "it asks for code from the checkpoint, which is never run; remove the key if the model is a plain one",
    )?;
    let full =
        |value: &Value| value.as_array().is_some_and(|types| types.iter().all(|t| t == "full_attention"));
    config.refuse_unless("layer_types", "this build computes \"full_attention\" in every layer", full)
}

fn head_dim(config: &Config, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
    let head_dim = match config.optional_size("head_dim", 2..=WIDEST_HEAD)? {
        Some(head_dim) => head_dim,
        None if !hidden.is_multiple_of(heads) => {
            let reason = format!("it does not divide `hidden_size`, {hidden}, and there is no `head_dim`");
            return Err(config.conflict("num_attention_heads", &heads, reason));
        }
        None => hidden / heads,
    };
    if head_dim % 2 != 0 || head_dim > WIDEST_HEAD {
        let reason = format!("rotary embedding needs an even width, 2 to {WIDEST_HEAD}");
        return Err(config.conflict("head_dim", &head_dim, reason));
    }
    Ok(head_dim)
}

fn kv_heads(config: &Config, defaults: &Defaults, heads: usize) -> Result<usize, ConfigError> {
    const KEY: &str = "num_key_value_heads";
    let given = config.optional_size(KEY, 1..=MOST_HEADS)?;
    // Null means "as many as query heads"; absent means the class default.
    let default = if config.has(KEY) { None } else { defaults.kv_heads };
    let kv_heads = given.or(default).unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let reason = format!("it must divide `num_attention_heads`, {heads}");
        return Err(config.conflict(KEY, &kv_heads, reason));
    }
    Ok(kv_heads)
}

fn rope(config: &Config, defaults: &Defaults) -> Result<RopeSpec, ConfigError> {
    let flat = config.optional_positive("rope_theta")?;
    let nested = match config.nested("rope_parameters")? {
        None => None,
        Some(parameters) => {
            parameters
                .refuse_unless("rope_type", "this build computes \"default\"", |value| value == "default")?;
            parameters.only(&["rope_theta", "rope_type"])?;
            parameters.optional_positive("rope_theta")?
        }
    };
    match (flat, nested) {
        (Some(flat), Some(nested)) if flat != nested => {
            Err(config.conflict("rope_theta", &flat, format!("`rope_parameters.rope_theta` is {nested}")))
        }
        _ => Ok(RopeSpec { theta: nested.or(flat).unwrap_or(defaults.rope_theta) }),
    }
}

/// Experts and experts per token. transformers has two names for the first and takes either.
fn experts(config: &Config, defaults: &Defaults, layers: usize) -> Result<(u32, u32), ConfigError> {
    const KEYS: [&str; 2] = ["num_local_experts", "num_experts"];
    let [local, plain] = KEYS.map(|key| config.optional_size(key, 1..=MOST_EXPERTS));
    let (local, plain) = (local?, plain?);
    if let (Some(local), Some(plain)) = (local, plain)
        && local != plain
    {
        return Err(config.conflict(KEYS[0], &local, format!("`{}` is {plain}", KEYS[1])));
    }
    let key = if local.is_some() { KEYS[0] } else { KEYS[1] };
    let experts = local.or(plain).unwrap_or(defaults.experts);
    if experts * layers > MOST_EXPERTS_IN_ALL {
        let reason =
            format!("`num_hidden_layers` is {layers}; at most {MOST_EXPERTS_IN_ALL} experts in all are read");
        return Err(config.conflict(key, &experts, reason));
    }
    let top_k = config.size("num_experts_per_tok", defaults.top_k, 1..=MOST_EXPERTS)?;
    if top_k > experts {
        let reason = format!("there are {experts} experts (`{key}`)");
        return Err(config.conflict("num_experts_per_tok", &top_k, reason));
    }
    Ok((count(experts), count(top_k)))
}

/// A number that its range keeps within 32 bits.
fn count(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
