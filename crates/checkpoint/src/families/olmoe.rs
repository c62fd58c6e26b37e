//! OLMoE: queries and keys normalised over the whole projection, then clamped if `clip_qkv` says so.

use muster_types::DType;

use super::base::{Base, intermediate};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use super::qwen3_moe::renormalise;
use super::trunk::SplitNames;
use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, LayerSpec, MlpSpec, ModelSpec, QkNorm, Score};

pub(super) const FAMILY: Family = Family::new("olmoe", spec, ExpertTensors::Split(&SplitNames::USUAL));

const DEFAULTS: Defaults = Defaults {
    vocab: 50304,
    hidden: 2048,
    layers: 16,
    heads: 16,
    kv_heads: None,
    context: 4096,
    norm_eps: 1e-5,
    rope_theta: 10000.0,
    bos: None,
    eos: Some(50279),
    experts: 64,
    top_k: 8,
    habits: Habits::USUAL,
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_set("sliding_window", "this family attends to the whole sequence")?;
    if base.heads * base.head_dim != base.hidden {
        // The reference sizes the query norm by `hidden_size`.
        let reason = format!("{} heads of that width are not `hidden_size`, {}", base.heads, base.hidden);
        return Err(config.conflict("head_dim", &base.head_dim, reason));
    }
    let bias = config.flag("attention_bias", false)?;
    let attention = AttentionSpec {
        qk_norm: QkNorm::FullWidth,
        clip_qkv: config.optional_positive("clip_qkv")?.map(|limit| limit as f32),
        qkv_bias: bias,
        o_bias: bias,
        ..base.attention()
    };
    let gate = GateRecipe::plain(Score::SoftmaxThenTopK, renormalise(config)?);
    let moe = base.moe(intermediate(config, "intermediate_size", 2048)?, gate);
    let layers = vec![LayerSpec { attention, mlp: MlpSpec::Moe(moe) }; base.layers];
    Ok(base.model(FAMILY.model_type, dtype, layers))
}
