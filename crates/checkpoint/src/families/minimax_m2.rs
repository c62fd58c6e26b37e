//! MiniMax-M2: sigmoid with a bias to select by, part of every head rotated, norms across whole projections.

use muster_types::DType;

use super::base::{Base, intermediate};
use super::defaults::{Defaults, Habits, Rotary};
use super::family::{ExpertTensors, Family};
use super::trunk::{SelectionBias, SplitNames};
use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, LayerSpec, MlpSpec, ModelSpec, QkNorm, Renormalise, Score};

pub(super) const FAMILY: Family = Family::new("minimax_m2", spec, ExpertTensors::Split(&NAMES));

const DEFAULTS: Defaults = Defaults {
    vocab: 200_064,
    hidden: 3072,
    layers: 62,
    heads: 48,
    kv_heads: Some(8),
    context: 196_608,
    norm_eps: 1e-6,
    rope_theta: 5e6,
    bos: Some(200_034),
    eos: Some(200_020),
    experts: 256,
    top_k: 8,
    habits: Habits {
        head_dim: Some(128),
        rotary: Rotary::Part("rotary_dim"),
        modules: &["configuration_minimax_m2", "modeling_minimax_m2"],
        ..Habits::USUAL
    },
};

const NAMES: SplitNames = SplitNames {
    selection_bias: Some(SelectionBias::Vector("e_score_correction_bias")),
    ..SplitNames::NUMBERED
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_set("sliding_window", "this family attends to the whole sequence")?;
    config.refuse_unless("scoring_func", "this build computes \"sigmoid\"", |value| value == "sigmoid")?;
    config.refuse_unless(
        "use_routing_bias",
        "this build selects by the bias that comes with it",
        |value| value == true,
    )?;
    config.refuse_unless("use_qk_norm", "this build norms queries and keys", |value| value == true)?;
    config.refuse_unless("qk_norm_type", "this build norms whole projections (\"per_layer\")", |value| {
        value == "per_layer"
    })?;
    config.refuse_unless(
        "attn_type_list",
        "this build computes full attention (1) in every layer",
        |value| value.as_array().is_some_and(|types| types.iter().all(|kind| kind == 1)),
    )?;
    config
        .refuse_unless("shared_intermediate_size", "this family has no shared expert", |value| value == 0)?;
    let attention = AttentionSpec { qk_norm: QkNorm::FullWidth, ..base.attention() };
    let gate =
        GateRecipe { selection_bias: true, ..GateRecipe::plain(Score::SigmoidThenTopK, Renormalise::SUM) };
    let moe = base.moe(intermediate(config, "intermediate_size", 1536)?, gate);
    let layers = vec![LayerSpec { attention, mlp: MlpSpec::Moe(moe) }; base.layers];
    // Layers that predict more tokens ahead have names of their own.
    let unused = vec!["model.mtp".to_owned()];
    Ok(ModelSpec { unused, ..base.model(FAMILY.model_type, dtype, layers) })
}
