//! Qwen2-MoE: biases on queries, keys and values, dense layers by number, and a shared expert times a sigmoid per token.

use muster_types::DType;

use super::base::{Base, intermediate};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use super::qwen3_moe::{layers, renormalise};
use super::trunk::SplitNames;
use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, ModelSpec, MoeSpec, Score, SharedSpec};

pub(super) const FAMILY: Family = Family::new("qwen2_moe", spec, ExpertTensors::Split(&NAMES));

const DEFAULTS: Defaults = Defaults {
    vocab: 151_936,
    hidden: 2048,
    layers: 24,
    heads: 16,
    kv_heads: Some(16),
    context: 32768,
    norm_eps: 1e-6,
    rope_theta: 10000.0,
    bos: None,
    eos: None,
    experts: 60,
    top_k: 4,
    habits: Habits::USUAL,
};

const NAMES: SplitNames = SplitNames { shared: "shared_expert", ..SplitNames::USUAL };

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_unless("use_sliding_window", "this build attends to the whole sequence", |value| {
        value == false
    })?;
    let attention = AttentionSpec { qkv_bias: config.flag("qkv_bias", true)?, ..base.attention() };
    let gate = GateRecipe::plain(Score::SoftmaxThenTopK, renormalise(config)?);
    let shared = intermediate(config, "shared_expert_intermediate_size", 5632)?;
    let moe = MoeSpec {
        shared: SharedSpec::SigmoidGated { intermediate: shared },
        ..base.moe(intermediate(config, "moe_intermediate_size", 1408)?, gate)
    };
    let layers = layers(config, &base, &attention, &moe, intermediate(config, "intermediate_size", 5632)?)?;
    Ok(base.model(FAMILY.model_type, dtype, layers))
}
