//! GLM-4 MoE: sigmoid scores with a bias to select by, groups of experts, part of each head rotated, the first layers
//! dense.

use muster_types::DType;

use super::base::{Base, intermediate, shared_experts};
use super::defaults::{Defaults, Habits, Rotary};
use super::family::{ExpertTensors, Family};
use super::trunk::{SelectionBias, SplitNames};
use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, GroupWorth, ModelSpec, MoeSpec, QkNorm, Renormalise, Score};

pub(super) const FAMILY: Family = Family::new("glm4_moe", spec, ExpertTensors::Split(&NAMES));

const DEFAULTS: Defaults = Defaults {
    vocab: 151_552,
    hidden: 4096,
    layers: 46,
    heads: 96,
    kv_heads: Some(8),
    context: 131_072,
    norm_eps: 1e-5,
    rope_theta: 10000.0,
    bos: None,
    eos: None,
    experts: 128,
    top_k: 8,
    habits: Habits {
        experts: &["n_routed_experts", "num_local_experts"],
        rotary: Rotary::Partial(0.5),
        ..Habits::USUAL
    },
};

pub(super) const NAMES: SplitNames = SplitNames {
    selection_bias: Some(SelectionBias::Vector("gate.e_score_correction_bias")),
    ..SplitNames::USUAL
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_set("sliding_window", "this family attends to the whole sequence")?;
    let qk_norm = if config.flag("use_qk_norm", false)? { QkNorm::PerHead } else { QkNorm::None };
    let qkv_bias = config.flag("attention_bias", false)?;
    let attention = AttentionSpec { qk_norm, qkv_bias, ..base.attention() };
    let gate = GateRecipe {
        groups: base.groups(config, GroupWorth::BestTwo, [1, 1])?,
        ..sigmoid_gate(config, 1.0)?
    };
    let width = intermediate(config, "moe_intermediate_size", 1408)?;
    let shared = shared_experts(config, "n_shared_experts", 1, width)?;
    let moe = MoeSpec { shared, ..base.moe(width, gate) };
    let dense_layers = config.count("first_k_dense_replace", 1, 1 << 20)?;
    let dense = intermediate(config, "intermediate_size", 10944)?;
    let layers = base.mixed_layers(&attention, &moe, dense, |number| number >= dense_layers);
    let unused = base.prediction_layers(config)?;
    Ok(ModelSpec { unused, ..base.model(FAMILY.model_type, dtype, layers) })
}

/// Sigmoid scores, selected by score and bias, divided by their sum unless told otherwise, times a scale.
pub(super) fn sigmoid_gate(config: &Config, scale: f64) -> Result<GateRecipe, ConfigError> {
    let normed = config.flag("norm_topk_prob", true)?;
    // 1e-20, which the reference adds against a division by zero, is a normal number in f32.
    let renormalise = if normed { Renormalise::Sum { plus: 1e-20 } } else { Renormalise::None };
    Ok(GateRecipe {
        selection_bias: true,
        scale: config.positive("routed_scaling_factor", scale)? as f32,
        ..GateRecipe::plain(Score::SigmoidThenTopK, renormalise)
    })
}
