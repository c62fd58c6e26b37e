//! Llama 4, text: a sigmoid of the selected logit weighs the expert's input; a shared expert; chunked attention with
//! neighbouring elements rotated together and normed afterwards, but for some layers that see everything, rotate nothing
//! and have queries that grow with their position.

use muster_types::{DType, Reach};
use serde_json::Value;

use super::base::{Base, intermediate};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family, PartOf};
use super::trunk::TrunkNames;
use crate::config::{Config, ConfigError};
use crate::error::CheckpointError;
use crate::plan::{Kind, PlanBuilder, View};
use crate::spec::{
    AttentionSpec, ExpertRole, GateRecipe, LayerRole, ModelSpec, MoeSpec, QkNorm, Renormalise, Role,
    RopePairs, RopeSpec, Score, SharedSpec, Temperature, WeightOn,
};

pub(super) const TEXT: Family = Family {
    names: &TrunkNames { dense: "feed_forward", ..TrunkNames::USUAL },
    ..Family::new("llama4_text", text, ExpertTensors::Own(experts))
};
/// As it is published, with a part that looks at images, which is left alone.
pub(super) const WHOLE: Family = Family {
    model_type: "llama4",
    spec: whole,
    part_of: Some(PartOf { config: "text_config", prefix: "language_model." }),
    ..TEXT
};

const DEFAULTS: Defaults = Defaults {
    vocab: 202_048,
    hidden: 5120,
    layers: 48,
    heads: 40,
    kv_heads: Some(8),
    context: 131_072,
    norm_eps: 1e-5,
    rope_theta: 500_000.0,
    bos: Some(1),
    eos: Some(2),
    experts: 16,
    top_k: 1,
    habits: Habits { head_dim: Some(128), layers_differ: true, ..Habits::USUAL },
};

fn text(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    described(TEXT.model_type, config, dtype)
}

fn whole(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    described(WHOLE.model_type, config, dtype)
}

fn described(family: &'static str, config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_set("sliding_window", "this family attends to chunks")?;
    let rotates = rotates(config, base.layers)?;
    let chunk = match config.has("attention_chunk_size") {
        true => config.optional_size("attention_chunk_size", 1..=1 << 30)?.map_or(Reach::All, Reach::chunk),
        false => Reach::chunk(8192),
    };
    let words = [("chunked_attention", chunk), ("full_attention", Reach::All)];
    let reach = base.layer_types(config, words, |layer| if rotates[layer] { chunk } else { Reach::All })?;
    let bias = config.flag("attention_bias", false)?;
    let qk_norm = if config.flag("use_qk_norm", true)? { QkNorm::UnweightedRotated } else { QkNorm::None };
    let rotating = AttentionSpec {
        qk_norm,
        qkv_bias: bias,
        o_bias: bias,
        rope: Some(RopeSpec { pairs: RopePairs::Neighbours, ..base.rope.clone() }),
        ..base.attention()
    };
    let still = AttentionSpec {
        qk_norm: QkNorm::None,
        rope: None,
        temperature: temperature(config)?,
        ..rotating.clone()
    };
    let width = intermediate(config, "intermediate_size", 8192)?;
    let gate = GateRecipe::plain(Score::TopKThenSigmoid, Renormalise::None);
    let moe = MoeSpec {
        weight_on: WeightOn::Input,
        shared: SharedSpec::Add { intermediate: width },
        ..base.moe(width, gate)
    };
    let dense = intermediate(config, "intermediate_size_mlp", 16384)?;
    let with_experts = layers_with_experts(config, base.layers)?;
    let mut layers = base.mixed_layers(&rotating, &moe, dense, with_experts);
    for ((layer, reach), rotates) in layers.iter_mut().zip(reach).zip(rotates) {
        if !rotates {
            layer.attention = still.clone();
        }
        layer.attention.reach = reach;
    }
    Ok(base.model(family, dtype, layers))
}

/// Whether each layer rotates: `no_rope_layers`, which has a 1 for those that do, or all but every fourth.
fn rotates(config: &Config, layers: usize) -> Result<Vec<bool>, ConfigError> {
    const KEY: &str = "no_rope_layers";
    let flags = config.numbers(KEY, 2)?;
    if !flags.is_empty() {
        let short =
            || config.conflict(KEY, &flags.len(), format!("a flag is needed for each of {layers} layers"));
        let flags = flags.get(..layers).ok_or_else(short)?;
        return Ok(flags.iter().map(|flag| *flag == 1).collect());
    }
    let interval = config.size("no_rope_layer_interval", 4, 1..=1 << 20)?;
    Ok((1..=layers).map(|number| !number.is_multiple_of(interval)).collect())
}

/// Which layers have experts: `moe_layers`, or one in so many.
fn layers_with_experts(config: &Config, layers: usize) -> Result<impl Fn(usize) -> bool, ConfigError> {
    let listed = config.numbers("moe_layers", u32::try_from(layers).unwrap_or(u32::MAX))?;
    let step = config.size("interleave_moe_layer_step", 1, 1..=1 << 20)?;
    let is_listed = config.get("moe_layers").is_some();
    Ok(move |number: usize| match is_listed {
        true => listed.iter().any(|&layer| layer as usize == number),
        false => (number + 1).is_multiple_of(step),
    })
}

fn temperature(config: &Config) -> Result<Option<Temperature>, ConfigError> {
    const KEY: &str = "attn_temperature_tuning";
    // Some publish a number.
    let on = match config.get(KEY) {
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        _ => config.flag(KEY, true)?,
    };
    let scale = config.positive("attn_scale", 0.1)? as f32;
    let floor = config.positive("floor_scale", 8192.0)? as f32;
    Ok(on.then_some(Temperature { floor, scale }))
}

/// `gate_up_proj` is `[experts, hidden, 2 * intermediate]`, an expert's gate columns before its up columns; `down_proj`
/// is `[experts, intermediate, hidden]`.
fn experts(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    moe: &MoeSpec,
) -> Result<(), CheckpointError> {
    let block = format!("model.layers.{layer}.feed_forward");
    let (count, width) = (moe.experts as usize, moe.intermediate);
    let of_layer = |role| Role::Layer(layer, role);
    plan.gate(of_layer(LayerRole::Gate), &format!("{block}.router.weight"), count, hidden)?;
    let (input, output) = (format!("{block}.experts.gate_up_proj"), format!("{block}.experts.down_proj"));
    for (expert, index) in (0..moe.experts).zip(0..) {
        let role = |part| Role::Expert(layer, expert, part);
        for (part, first) in [(ExpertRole::Gate, 0), (ExpertRole::Up, width)] {
            let first = index * hidden * 2 * width + first;
            let view = View { first, rows: width, cols: hidden, row_step: 1, col_step: 2 * width };
            plan.view(role(part), &input, &[count, hidden, 2 * width], Kind::Matrix, view)?;
        }
        let view = View::transposed(index * width * hidden, hidden, width);
        plan.view(role(ExpertRole::Down), &output, &[count, width, hidden], Kind::Matrix, view)?;
    }
    let name = |name: &str| format!("{block}.shared_expert.{name}.weight");
    let width = moe.shared.intermediate().unwrap_or(width);
    plan.matrix(of_layer(LayerRole::SharedGate), &name("gate_proj"), width, hidden)?;
    plan.matrix(of_layer(LayerRole::SharedUp), &name("up_proj"), width, hidden)?;
    plan.matrix(of_layer(LayerRole::SharedDown), &name("down_proj"), hidden, width)
}
