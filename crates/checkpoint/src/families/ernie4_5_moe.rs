//! ERNIE 4.5 MoE: softmax with a bias to select by, neighbouring elements rotated together, layers with experts by
//! range and interval, shared experts as one MLP.

use muster_types::DType;

use super::base::{Base, intermediate, shared_experts};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use super::trunk::{SelectionBias, SplitNames};
use crate::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateRecipe, ModelSpec, MoeSpec, Renormalise, RopePairs, RopeSpec, Score};

pub(super) const FAMILY: Family = Family::new("ernie4_5_moe", spec, ExpertTensors::Split(&NAMES));

const DEFAULTS: Defaults = Defaults {
    vocab: 103_424,
    hidden: 2560,
    layers: 28,
    heads: 20,
    kv_heads: Some(4),
    context: 131_072,
    norm_eps: 1e-5,
    rope_theta: 500_000.0,
    bos: Some(1),
    eos: Some(2),
    experts: 64,
    top_k: 6,
    habits: Habits {
        experts: &["moe_num_experts", "num_experts"],
        top_k: &["moe_k", "num_experts_per_tok"],
        tied_head: true,
        modules: &["configuration_ernie4_5_moe", "modeling_ernie4_5_moe"],
        ..Habits::USUAL
    },
};

const NAMES: SplitNames = SplitNames {
    selection_bias: Some(SelectionBias::Row("moe_statics.e_score_correction_bias")),
    ..SplitNames::USUAL
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config
        .refuse_unless("use_bias", "this build reads this family without biases", |value| value == false)?;
    config.refuse_unless("moe_gate", "this build computes \"topk\"", |value| value == "topk")?;
    config.refuse_unless(
        "moe_use_aux_free",
        "this build selects by the bias that comes with it",
        |value| value == true,
    )?;
    config.refuse_set("sliding_window", "this family attends to the whole sequence")?;
    let rope = RopeSpec { pairs: RopePairs::Neighbours, ..base.rope.clone() };
    let attention = AttentionSpec { rope: Some(rope), ..base.attention() };
    let floor = config.positive("moe_norm_min", 1e-12)? as f32;
    let gate = GateRecipe {
        selection_bias: true,
        ..GateRecipe::plain(Score::SoftmaxThenTopK, Renormalise::SumAtLeast { floor })
    };
    let width = intermediate(config, "moe_intermediate_size", 1536)?;
    let shared = shared_experts(config, "moe_num_shared_experts", 2, width)?;
    let moe = MoeSpec { shared, ..base.moe(width, gate) };
    let interval = config.size("moe_layer_interval", 1, 1..=1 << 20)?;
    let first = config.count("moe_layer_start_index", 1, 1 << 20)?;
    let last = match config.get("moe_layer_end_index") {
        Some(value) if value == -1 => base.layers - 1,
        _ => config.count("moe_layer_end_index", base.layers - 1, 1 << 20)?,
    };
    let dense = intermediate(config, "intermediate_size", 12288)?;
    let layers = base.mixed_layers(&attention, &moe, dense, |number| {
        (first..=last).contains(&number) && (number + 1).is_multiple_of(interval)
    });
    // Layers that predict more tokens ahead have names of their own.
    let unused = vec!["model.mtp_".to_owned()];
    Ok(ModelSpec { unused, ..base.model(FAMILY.model_type, dtype, layers) })
}
