//! PhiMoE: SparseMixer, norms that take the mean away, biases of attention and head, frequencies divided one by one.

use muster_types::DType;

use super::base::{Base, intermediate, window};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use super::trunk::SplitNames;
use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, LayerSpec, MlpSpec, ModelSpec, NormKind, Renormalise, Score};

pub(super) const FAMILY: Family = Family::new("phimoe", spec, ExpertTensors::Split(&SplitNames::NUMBERED));

const DEFAULTS: Defaults = Defaults {
    vocab: 32064,
    hidden: 4096,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    context: 131_072,
    norm_eps: 1e-5,
    rope_theta: 1e6,
    bos: Some(1),
    eos: Some(2),
    experts: 16,
    top_k: 2,
    habits: Habits { modules: &["configuration_phimoe", "modeling_phimoe"], ..Habits::USUAL },
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_unless("num_experts_per_tok", "SparseMixer picks 2 experts", |value| value == 2)?;
    let bias = config.flag("attention_bias", false)?;
    let attention =
        AttentionSpec { qkv_bias: bias, o_bias: bias, reach: window(config)?, ..base.attention() };
    // Noise in training only, but the bound that comes from it holds at inference, too.
    let jitter = config.positive("router_jitter_noise", 0.01)? as f32;
    let gate = GateRecipe::plain(Score::SparseMixer { jitter }, Renormalise::None);
    let moe = base.moe(intermediate(config, "intermediate_size", 6400)?, gate);
    let layers = vec![LayerSpec { attention, mlp: MlpSpec::Moe(moe) }; base.layers];
    Ok(ModelSpec {
        norm: NormKind::Layer,
        head_bias: config.flag("lm_head_bias", false)?,
        ..base.model(FAMILY.model_type, dtype, layers)
    })
}
