//! The configuration keys that every family shares, with their allowed ranges.
//!
//! The ranges are several times what any published model has, and small enough that no product of them overflows and
//! no plan grows past some hundred thousand entries. A key that is absent means what it means to transformers: the
//! default of the family's configuration class.

use muster_types::DType;
use serde_json::Value;

use crate::config::{Config, ConfigError};
use crate::spec::{
    AttentionSpec, ExpertGroups, GateRecipe, GroupWorth, LayerSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm,
    RopePairs, RopeSpec, SharedSpec, YarnSpec,
};

/// Most elements of the residual stream.
const WIDEST: usize = 1 << 17;
/// Widest MLP.
pub(super) const WIDEST_MLP: usize = 1 << 20;
const MOST_LAYERS: usize = 1024;
const MOST_EXPERTS: usize = 4096;
/// Most experts of all layers together.
const MOST_EXPERTS_IN_ALL: usize = 1 << 17;
const MOST_HEADS: usize = 1024;
pub(super) const WIDEST_HEAD: usize = 1024;
const LONGEST_CONTEXT: usize = 1 << 30;
const MOST_EXTRA_LAYERS: usize = 16;
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
    pub habits: Habits,
}

/// What most families have in common and some do otherwise.
pub(super) struct Habits {
    /// Names of the number of experts; any of them is taken.
    pub experts: &'static [&'static str],
    /// Names of the number of experts per token.
    pub top_k: &'static [&'static str],
    /// What an absent `tie_word_embeddings` means.
    pub tied_head: bool,
    pub rotary: Rotary,
    /// Modules of code that come with published models of the family and do what this build does without them.
    pub modules: &'static [&'static str],
}

impl Habits {
    pub(super) const USUAL: Self = Self {
        experts: &["num_local_experts", "num_experts"],
        top_k: &["num_experts_per_tok"],
        tied_head: false,
        rotary: Rotary::Whole,
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
    /// As many elements as this key says, which has a default; and frequencies may be those of YaRN.
    Elements(&'static str, usize),
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
        refuse_unsupported(config, &defaults.habits)?;
        let vocab = count(config.size("vocab_size", defaults.vocab, 1..=LARGEST_VOCAB)?);
        let hidden = config.size("hidden_size", defaults.hidden, 1..=WIDEST)?;
        let layers = config.size("num_hidden_layers", defaults.layers, 1..=MOST_LAYERS)?;
        let heads = config.size("num_attention_heads", defaults.heads, 1..=MOST_HEADS)?;
        let (experts, top_k) = experts(config, defaults, layers)?;
        let head_dim = match defaults.habits.rotary {
            Rotary::Elements(key, default) => config.size(key, default, 2..=WIDEST_HEAD)?,
            Rotary::Whole | Rotary::Partial(_) => head_dim(config, hidden, heads)?,
        };
        Ok(Self {
            layers,
            heads,
            head_dim,
            hidden,
            vocab,
            kv_heads: kv_heads(config, defaults, heads)?,
            context: config.size("max_position_embeddings", defaults.context, 1..=LONGEST_CONTEXT)?,
            norm_eps: config.positive("rms_norm_eps", defaults.norm_eps)? as f32,
            rope: rope(config, defaults, head_dim)?,
            tied_head: config.flag("tie_word_embeddings", defaults.habits.tied_head)?,
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
            latent: None,
        }
    }

    /// Routed experts of this width, and none that are shared.
    pub(super) fn moe(&self, intermediate: usize, gate: GateRecipe) -> MoeSpec {
        MoeSpec { experts: self.experts, top_k: self.top_k, intermediate, gate, shared: SharedSpec::None }
    }

    /// Layers with the same attention, of which those that `has_experts` names have experts and the others a dense MLP.
    pub(super) fn mixed_layers(
        &self,
        attention: &AttentionSpec,
        moe: &MoeSpec,
        dense: usize,
        has_experts: impl Fn(usize) -> bool,
    ) -> Vec<LayerSpec> {
        let mlp = |number| match has_experts(number) {
            true => MlpSpec::Moe(moe.clone()),
            false => MlpSpec::Dense { intermediate: dense },
        };
        (0..self.layers).map(|number| LayerSpec { attention: attention.clone(), mlp: mlp(number) }).collect()
    }

    /// Prefixes of layers stored behind the last one, which predict more tokens ahead: `num_nextn_predict_layers`.
    pub(super) fn prediction_layers(&self, config: &Config) -> Result<Vec<String>, ConfigError> {
        const KEY: &str = "num_nextn_predict_layers";
        let count = config.count(KEY, 0, MOST_EXTRA_LAYERS)?;
        Ok((self.layers..self.layers + count).map(|layer| format!("model.layers.{layer}.")).collect())
    }

    /// `n_group` and `topk_group`: of how many groups of experts how many take part. `None` where all do.
    pub(super) fn groups(
        &self,
        config: &Config,
        worth: GroupWorth,
        defaults: [usize; 2],
    ) -> Result<Option<ExpertGroups>, ConfigError> {
        let (experts, top_k) = (self.experts as usize, self.top_k as usize);
        let groups = config.size("n_group", defaults[0], 1..=MOST_EXPERTS)?;
        let kept = config.size("topk_group", defaults[1], 1..=MOST_EXPERTS)?;
        if !experts.is_multiple_of(groups) {
            return Err(config.conflict("n_group", &groups, format!("it must divide the {experts} experts")));
        }
        if kept > groups {
            return Err(config.conflict(
                "topk_group",
                &kept,
                format!("there are {groups} groups (`n_group`)"),
            ));
        }
        if kept == groups {
            return Ok(None);
        }
        let size = experts / groups;
        if worth == GroupWorth::BestTwo && size < 2 {
            let reason = "groups are ranked by their two best experts and would have only one".to_owned();
            return Err(config.conflict("n_group", &groups, reason));
        }
        if top_k > kept * size {
            let reason = format!("groups have {size} experts, and {top_k} experts are chosen per token");
            return Err(config.conflict("topk_group", &kept, reason));
        }
        Ok(Some(ExpertGroups { groups: count(groups), kept: count(kept), worth }))
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
            unused: Vec::new(),
            bos: self.bos,
            eos: self.eos,
        }
    }
}

/// The width of an MLP.
pub(super) fn intermediate(config: &Config, key: &str, default: usize) -> Result<usize, ConfigError> {
    config.size(key, default, 1..=WIDEST_MLP)
}

/// A shared MLP as wide as some experts together, of which `key` says how many; 0 of them are none.
pub(super) fn shared_experts(
    config: &Config,
    key: &str,
    default: usize,
    intermediate: usize,
) -> Result<SharedSpec, ConfigError> {
    let count = config.count(key, default, MOST_EXPERTS)?;
    match count * intermediate {
        0 => Ok(SharedSpec::None),
        width if width > WIDEST_MLP => {
            let reason = format!("experts are {intermediate} wide; at most {WIDEST_MLP} in all are read");
            Err(config.conflict(key, &count, reason))
        }
        intermediate => Ok(SharedSpec::Add { intermediate }),
    }
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

fn refuse_unsupported(config: &Config, habits: &Habits) -> Result<(), ConfigError> {
    config.refuse_unless("hidden_act", "this build computes \"silu\"", |value| value == "silu")?;
    if !matches!(habits.rotary, Rotary::Elements(..)) {
        config.refuse_set("rope_scaling", "this build computes unscaled rotary embedding for this family")?;
    }
    config.refuse_set("quantization_config", "weights must be stored as F32 or BF16")?;
    config.refuse_unless(
        "auto_map",
        "it asks for code from the checkpoint, which is never run; remove the key if the model is a plain one",
        |value| known_code(value, habits.modules),
    )?;
    let full =
        |value: &Value| value.as_array().is_some_and(|types| types.iter().all(|t| t == "full_attention"));
    config.refuse_unless("layer_types", "this build computes \"full_attention\" in every layer", full)
}

/// Whether `auto_map` names nothing but classes of these modules.
fn known_code(value: &Value, modules: &[&str]) -> bool {
    let known = |class: &Value| {
        let module = class.as_str().and_then(|class| class.split_once('.'));
        module.is_some_and(|(module, _)| modules.contains(&module))
    };
    value.as_object().is_some_and(|map| map.values().all(known))
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

fn rope(config: &Config, defaults: &Defaults, head_dim: usize) -> Result<RopeSpec, ConfigError> {
    const PART: &str = "partial_rotary_factor";
    let nested = config.nested("rope_parameters")?;
    let partial = match defaults.habits.rotary {
        Rotary::Whole | Rotary::Elements(..) => {
            let whole = |value: &Value| value.as_f64() == Some(1.0);
            config.refuse_unless(PART, "this family rotates whole heads", whole)?;
            1.0
        }
        Rotary::Partial(default) => {
            let flat = config.optional_positive(PART)?;
            let inside = nested.as_ref().map(|nested| nested.optional_positive(PART)).transpose()?.flatten();
            agreed(config, PART, flat, inside)?.unwrap_or(default)
        }
    };
    if let Some(nested) = &nested {
        let plain = |value: &Value| value == "default";
        match defaults.habits.rotary {
            Rotary::Whole => {
                nested.refuse_unless("rope_type", "this build computes \"default\"", plain)?;
                nested.only(&["rope_theta", "rope_type"])?;
            }
            Rotary::Partial(_) => {
                nested.refuse_unless("rope_type", "this build computes \"default\"", plain)?;
                nested.only(&["rope_theta", "rope_type", PART])?;
            }
            Rotary::Elements(..) => {}
        }
    }
    let yarn = match (defaults.habits.rotary, config.nested("rope_scaling")?) {
        (Rotary::Elements(..), Some(scaling)) => yarn(&scaling)?,
        (Rotary::Elements(..), None) => nested.as_ref().map(yarn).transpose()?.flatten(),
        _ => None,
    };
    let inside = nested.map(|nested| nested.optional_positive("rope_theta")).transpose()?.flatten();
    let theta = agreed(config, "rope_theta", config.optional_positive("rope_theta")?, inside)?;
    // Rounded down, as the reference does.
    let dim = (head_dim as f64 * partial) as usize;
    if partial > 1.0 || dim < 2 || !dim.is_multiple_of(2) {
        let reason =
            format!("of {head_dim} elements of a head that rotates {dim}; it must be an even number");
        return Err(config.conflict(PART, &partial, reason));
    }
    Ok(RopeSpec { theta: theta.unwrap_or(defaults.rope_theta), dim, pairs: RopePairs::Halves, yarn })
}

/// YaRN, if that is what these parameters describe.
fn yarn(parameters: &Config) -> Result<Option<YarnSpec>, ConfigError> {
    let types = ["rope_type", "type"].map(|key| parameters.get(key).and_then(Value::as_str));
    for key in ["rope_type", "type"] {
        parameters.refuse_unless(key, "this build computes \"default\" and \"yarn\"", |value| {
            value == "default" || value == "yarn"
        })?;
    }
    if !types.contains(&Some("yarn")) {
        parameters.only(&["rope_theta", "rope_type", "type"])?;
        return Ok(None);
    }
    parameters.only(&[
        "rope_theta",
        "rope_type",
        "type",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    ])?;
    let missing = |key: &str| ConfigError::Missing { key: key.to_owned() };
    let factor = parameters.optional_positive("factor")?.ok_or_else(|| missing("factor"))?;
    let original = "original_max_position_embeddings";
    let context =
        parameters.optional_size(original, 1..=LONGEST_CONTEXT)?.ok_or_else(|| missing(original))?;
    let scales = [parameters.optional_positive("mscale")?, parameters.optional_positive("mscale_all_dim")?];
    let amplitude = match (parameters.optional_positive("attention_factor")?, scales) {
        (Some(given), _) => given,
        (None, [Some(scale), Some(all)]) => yarn_scale(factor, scale) / yarn_scale(factor, all),
        (None, _) => yarn_scale(factor, 1.0),
    };
    Ok(Some(YarnSpec {
        factor,
        original_context: context,
        beta_fast: parameters.positive("beta_fast", 32.0)?,
        beta_slow: parameters.positive("beta_slow", 1.0)?,
        amplitude: amplitude as f32,
    }))
}

/// How much larger scores become where the context is `factor` times as long.
pub(super) fn yarn_scale(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// A number that may stand at the top, in `rope_parameters`, or in both.
fn agreed(
    config: &Config,
    key: &str,
    flat: Option<f64>,
    nested: Option<f64>,
) -> Result<Option<f64>, ConfigError> {
    match (flat, nested) {
        (Some(flat), Some(nested)) if flat != nested => {
            Err(config.conflict(key, &flat, format!("`rope_parameters.{key}` is {nested}")))
        }
        _ => Ok(nested.or(flat)),
    }
}

/// Experts and experts per token.
fn experts(config: &Config, defaults: &Defaults, layers: usize) -> Result<(u32, u32), ConfigError> {
    let (key, experts) = one_of(config, defaults.habits.experts, defaults.experts)?;
    if experts * layers > MOST_EXPERTS_IN_ALL {
        let reason =
            format!("`num_hidden_layers` is {layers}; at most {MOST_EXPERTS_IN_ALL} experts in all are read");
        return Err(config.conflict(key, &experts, reason));
    }
    let (top_k_key, top_k) = one_of(config, defaults.habits.top_k, defaults.top_k)?;
    if top_k > experts {
        let reason = format!("there are {experts} experts (`{key}`)");
        return Err(config.conflict(top_k_key, &top_k, reason));
    }
    Ok((count(experts), count(top_k)))
}

/// A number of experts that has one name or several, which must agree; and the name it was found by.
fn one_of(
    config: &Config,
    keys: &[&'static str],
    default: usize,
) -> Result<(&'static str, usize), ConfigError> {
    let mut found: Option<(&'static str, usize)> = None;
    for &key in keys {
        let Some(value) = config.optional_size(key, 1..=MOST_EXPERTS)? else { continue };
        match found {
            Some((first, before)) if before != value => {
                return Err(config.conflict(first, &before, format!("`{key}` is {value}")));
            }
            Some(_) => {}
            None => found = Some((key, value)),
        }
    }
    Ok(found.unwrap_or((keys.first().copied().unwrap_or_default(), default)))
}

/// A number that its range keeps within 32 bits.
fn count(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
