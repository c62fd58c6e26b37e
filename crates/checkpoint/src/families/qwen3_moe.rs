//! Qwen3-MoE: queries and keys normalised per head, dense layers by number, weights renormalised on request.
//! Also what Qwen2-MoE and OLMoE share with it.

use muster_types::DType;

use super::base::{Base, intermediate};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use super::trunk::SplitNames;
use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, LayerSpec, ModelSpec, MoeSpec, QkNorm, Renormalise, Score};

pub(super) const FAMILY: Family = Family::new("qwen3_moe", spec, ExpertTensors::Split(&SplitNames::USUAL));

const DEFAULTS: Defaults = Defaults {
    vocab: 151_936,
    hidden: 2048,
    layers: 24,
    heads: 32,
    kv_heads: Some(4),
    context: 32768,
    norm_eps: 1e-6,
    rope_theta: 10000.0,
    bos: None,
    eos: None,
    experts: 128,
    top_k: 8,
    habits: Habits::USUAL,
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_unless("use_sliding_window", "this build attends to the whole sequence", |value| {
        value == false
    })?;
    let bias = config.flag("attention_bias", false)?;
    let attention =
        AttentionSpec { qk_norm: QkNorm::PerHead, qkv_bias: bias, o_bias: bias, ..base.attention() };
    let gate = GateRecipe::plain(Score::SoftmaxThenTopK, renormalise(config)?);
    let moe = base.moe(intermediate(config, "moe_intermediate_size", 768)?, gate);
    let layers = layers(config, &base, &attention, &moe, intermediate(config, "intermediate_size", 6144)?)?;
    Ok(base.model(FAMILY.model_type, dtype, layers))
}

/// Layers with experts as `decoder_sparse_step` and `mlp_only_layers` say, which Qwen2-MoE has, too.
pub(super) fn layers(
    config: &Config,
    base: &Base,
    attention: &AttentionSpec,
    moe: &MoeSpec,
    dense: usize,
) -> Result<Vec<LayerSpec>, ConfigError> {
    let sparse_step = config.size("decoder_sparse_step", 1, 1..=1 << 20)?;
    let dense_layers = config.numbers("mlp_only_layers", u32::try_from(base.layers).unwrap_or(u32::MAX))?;
    Ok(base.mixed_layers(attention, moe, dense, |number| {
        let listed = dense_layers.iter().any(|&dense| dense as usize == number);
        !listed && (number + 1).is_multiple_of(sparse_step)
    }))
}

/// `norm_topk_prob`, by which some families say whether selected weights are renormalised; their classes say no.
pub(super) fn renormalise(config: &Config) -> Result<Renormalise, ConfigError> {
    Ok(if config.flag("norm_topk_prob", false)? { Renormalise::SUM } else { Renormalise::None })
}
