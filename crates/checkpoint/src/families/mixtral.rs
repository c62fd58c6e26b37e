//! Mixtral: softmax over all experts, then top-k, divided by the sum of the selected. Noise on the gate
//! (`router_jitter_noise`) is for training only.

use muster_types::DType;

use super::base::{Base, intermediate, window};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use super::trunk::SplitNames;
use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, LayerSpec, MlpSpec, ModelSpec, Renormalise, Score};

pub(super) const FAMILY: Family = Family::new("mixtral", spec, ExpertTensors::Split(&SplitNames::NUMBERED));

const DEFAULTS: Defaults = Defaults {
    vocab: 32000,
    hidden: 4096,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    context: 131_072,
    norm_eps: 1e-5,
    rope_theta: 1e6,
    bos: Some(1),
    eos: Some(2),
    experts: 8,
    top_k: 2,
    habits: Habits::USUAL,
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    let gate = GateRecipe::plain(Score::SoftmaxThenTopK, Renormalise::SUM);
    let layer = LayerSpec {
        attention: AttentionSpec { reach: window(config)?, ..base.attention() },
        mlp: MlpSpec::Moe(base.moe(intermediate(config, "intermediate_size", 14336)?, gate)),
    };
    let layers = vec![layer; base.layers];
    Ok(base.model(FAMILY.model_type, dtype, layers))
}
