//! The configuration keys that every family shares, with their allowed ranges.
//!
//! The ranges are several times what any published model has, and small enough that no product of them overflows and
//! no plan grows past some hundred thousand entries. A key that is absent means what it means to transformers: the
//! default of the family's configuration class.

use muster_types::{DType, Gating, Reach};
use serde_json::Value;

use super::defaults::{Defaults, Habits, Rotary};
use super::rope::{LONGEST_CONTEXT, rope};
use crate::config::{Config, ConfigError};
use crate::spec::{
    AttentionSpec, ExpertGroups, GateRecipe, GroupWorth, LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormKind,
    QkNorm, RopeSpec, SharedSpec, WeightOn,
};
use crate::stored::{StoredAs, StoredForms};

/// Most elements of the residual stream.
const WIDEST: usize = 1 << 17;
/// Widest MLP.
pub(super) const WIDEST_MLP: usize = 1 << 20;
const MOST_LAYERS: usize = 1024;
pub(super) const MOST_EXPERTS: usize = 4096;
/// Most experts of all layers together.
pub(super) const MOST_EXPERTS_IN_ALL: usize = 1 << 17;
const MOST_HEADS: usize = 1024;
pub(super) const WIDEST_HEAD: usize = 1024;
const MOST_EXTRA_LAYERS: usize = 16;
const LARGEST_VOCAB: usize = 1 << 24;

/// What the shared keys say.
pub(super) struct Base {
    pub layers: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub hidden: usize,
    vocab: u32,
    pub rope: RopeSpec,
    kv_heads: usize,
    context: usize,
    norm_eps: f32,
    tied_head: bool,
    bos: Option<u32>,
    eos: Vec<u32>,
    experts: u32,
    top_k: u32,
    quantised: Option<StoredAs>,
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
            Rotary::Whole | Rotary::Partial(_) | Rotary::Part(..) => {
                head_dim(config, defaults.habits.head_dim, hidden, heads)?
            }
        };
        let context = config.size("max_position_embeddings", defaults.context, 1..=LONGEST_CONTEXT)?;
        let (rope, context) = rope(config, defaults, head_dim, context)?;
        Ok(Self {
            layers,
            heads,
            head_dim,
            hidden,
            vocab,
            kv_heads: kv_heads(config, defaults, heads)?,
            context,
            norm_eps: config.positive("rms_norm_eps", defaults.norm_eps)? as f32,
            rope,
            tied_head: config.flag("tie_word_embeddings", defaults.habits.tied_head)?,
            bos: bos(config, defaults.bos, vocab)?,
            eos: eos(config, defaults.eos, vocab)?,
            experts,
            top_k,
            quantised: quantised(config, &defaults.habits)?,
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
            rope: Some(self.rope.clone()),
            temperature: None,
            reach: Reach::All,
            sinks: false,
            latent: None,
        }
    }

    /// Routed experts of this width, and none that are shared.
    pub(super) fn moe(&self, intermediate: usize, gate: GateRecipe) -> MoeSpec {
        MoeSpec {
            experts: self.experts,
            top_k: self.top_k,
            intermediate,
            gating: Gating::Silu,
            biases: false,
            gate,
            weight_on: WeightOn::Output,
            shared: SharedSpec::None,
        }
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

    /// What each layer reach: `layer_types` in these words, or `default`.
    pub(super) fn layer_types(
        &self,
        config: &Config,
        words: [(&str, Reach); 2],
        default: impl Fn(usize) -> Reach,
    ) -> Result<Vec<Reach>, ConfigError> {
        const KEY: &str = "layer_types";
        let Some(value) = config.get(KEY) else { return Ok((0..self.layers).map(default).collect()) };
        let word = |item: &Value| words.iter().find(|(word, _)| item == word).map(|(_, reach)| *reach);
        let list: Option<Vec<Reach>> = value
            .as_array()
            .and_then(|list| list.iter().map(word).collect())
            .filter(|list: &Vec<_>| list.len() == self.layers);
        let allowed = || format!("a list of {} times \"{}\" or \"{}\"", self.layers, words[0].0, words[1].0);
        list.ok_or_else(|| config.bad(KEY, value, allowed()))
    }

    /// A model of these layers without multipliers.
    pub(super) fn model(self, family: &'static str, dtype: DType, layers: Vec<LayerSpec>) -> ModelSpec {
        let plain = StoredForms::plain(dtype);
        let stored = match self.quantised {
            None => plain,
            Some(StoredAs::Fp8) => StoredForms { linears: StoredAs::Fp8, experts: StoredAs::Fp8, ..plain },
            Some(form) => StoredForms { experts: form, ..plain },
        };
        ModelSpec {
            family,
            dtype,
            stored,
            vocab: self.vocab,
            hidden: self.hidden,
            context: self.context,
            layers,
            norm: NormKind::Rms,
            norm_eps: self.norm_eps,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_divisor: 1.0,
            tied_head: self.tied_head,
            head_bias: false,
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

/// What a sliding window lets a query see, if there is one.
pub(super) fn window(config: &Config) -> Result<Reach, ConfigError> {
    Ok(config.optional_size("sliding_window", 1..=LONGEST_CONTEXT)?.map_or(Reach::All, Reach::last))
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
    const CAPACITY: &str = "experts that take a limited number of tokens and drop the rest are not computed";
    config.refuse_set("expert_capacity", CAPACITY)?;
    for key in ["moe_drop_tokens", "drop_tokens"] {
        config.refuse_unless(key, CAPACITY, |value| value == false)?;
    }
    config.refuse_unless(
        "auto_map",
        "it asks for code from the checkpoint, which is never run; remove the key if the model is a plain one",
        |value| known_code(value, habits.modules),
    )?;
    if habits.layers_differ {
        return Ok(());
    }
    let full =
        |value: &Value| value.as_array().is_some_and(|types| types.iter().all(|t| t == "full_attention"));
    config.refuse_unless("layer_types", "this family's layers all compute \"full_attention\"", full)
}

/// In what form weights are stored that have fewer bits than the rest; which they are, their tensors say.
fn quantised(config: &Config, habits: &Habits) -> Result<Option<StoredAs>, ConfigError> {
    let Some(quantisation) = config.nested("quantization_config")? else { return Ok(None) };
    let method = quantisation.get("quant_method").and_then(Value::as_str);
    match method {
        Some("mxfp4") if habits.mxfp4 => Ok(Some(StoredAs::Mxfp4)),
        Some("fp8") => {
            quantisation.refuse_unless("fmt", "this build reads \"e4m3\"", |value| value == "e4m3")?;
            let blocks = |value: &Value| value == &serde_json::json!([128, 128]);
            let reason = "this build reads scales for blocks of 128 by 128";
            quantisation.refuse_unless("weight_block_size", reason, blocks)?;
            if !quantisation.has("weight_block_size") {
                return Err(ConfigError::Missing { key: "quantization_config.weight_block_size".to_owned() });
            }
            Ok(Some(StoredAs::Fp8))
        }
        _ => {
            let known = if habits.mxfp4 { "\"mxfp4\" and \"fp8\"" } else { "\"fp8\"" };
            let reason = format!("this build reads {known} and plain F32, BF16 and F16 for this family");
            config.refuse_set("quantization_config", &reason).map(|()| None)
        }
    }
}

/// Whether `auto_map` names nothing but classes of these modules.
fn known_code(value: &Value, modules: &[&str]) -> bool {
    let known = |class: &Value| {
        let module = class.as_str().and_then(|class| class.split_once('.'));
        module.is_some_and(|(module, _)| modules.contains(&module))
    };
    value.as_object().is_some_and(|map| map.values().all(known))
}

fn head_dim(
    config: &Config,
    default: Option<usize>,
    hidden: usize,
    heads: usize,
) -> Result<usize, ConfigError> {
    let default = if config.has("head_dim") { None } else { default };
    let head_dim = match config.optional_size("head_dim", 2..=WIDEST_HEAD)?.or(default) {
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
pub(super) fn count(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
