//! GraniteMoE: top-k of the logits, then softmax over those; four multipliers; a layer's experts in two fused tensors.
//! GraniteMoE-Shared adds a shared MLP in two tensors of the same form.

use muster_types::DType;

use super::base::{Base, WIDEST_MLP, intermediate};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use super::trunk::stacked_experts;
use crate::config::{Config, ConfigError};
use crate::error::CheckpointError;
use crate::plan::{Kind, PlanBuilder, View};
use crate::spec::{
    AttentionSpec, GateRecipe, LayerRole, LayerSpec, MlpSpec, ModelSpec, MoeSpec, Renormalise, Role, Score,
    SharedSpec,
};

pub(super) const FAMILY: Family = Family::new("granitemoe", spec, ExpertTensors::Own(experts));
pub(super) const SHARED: Family = Family::new("granitemoeshared", with_shared, ExpertTensors::Own(experts));

const DEFAULTS: Defaults = Defaults {
    vocab: 32000,
    hidden: 4096,
    layers: 32,
    heads: 32,
    kv_heads: None,
    context: 2048,
    norm_eps: 1e-6,
    rope_theta: 10000.0,
    bos: Some(1),
    eos: Some(2),
    experts: 8,
    top_k: 2,
    habits: Habits::USUAL,
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    described(&FAMILY, config, dtype, SharedSpec::None)
}

fn with_shared(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    const KEY: &str = "shared_intermediate_size";
    let shared = match config.count(KEY, 0, WIDEST_MLP)? {
        0 => SharedSpec::None,
        intermediate => SharedSpec::Add { intermediate },
    };
    described(&SHARED, config, dtype, shared)
}

fn described(
    family: &Family,
    config: &Config,
    dtype: DType,
    shared: SharedSpec,
) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_set("sliding_window", "this family attends to the whole sequence")?;
    let bias = config.flag("attention_bias", false)?;
    let scale = config.positive("attention_multiplier", 1.0)? as f32;
    let attention = AttentionSpec { scale, qkv_bias: bias, o_bias: bias, ..base.attention() };
    let gate = GateRecipe::plain(Score::TopKThenSoftmax, Renormalise::None);
    let moe = MoeSpec { shared, ..base.moe(intermediate(config, "intermediate_size", 11008)?, gate) };
    let layers = vec![LayerSpec { attention, mlp: MlpSpec::Moe(moe) }; base.layers];
    Ok(ModelSpec {
        embedding_multiplier: config.positive("embedding_multiplier", 1.0)? as f32,
        residual_multiplier: config.positive("residual_multiplier", 1.0)? as f32,
        logits_divisor: config.positive("logits_scaling", 1.0)? as f32,
        ..base.model(family.model_type, dtype, layers)
    })
}

/// `input_linear` is `[experts, 2 * intermediate, hidden]`, an expert's gate rows before its up rows;
/// `output_linear` is `[experts, hidden, intermediate]`.
fn experts(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    moe: &MoeSpec,
) -> Result<(), CheckpointError> {
    let block = format!("model.layers.{layer}.block_sparse_moe");
    let gate = Role::Layer(layer, LayerRole::Gate);
    plan.gate(gate, &format!("{block}.router.layer.weight"), moe.experts as usize, hidden)?;
    let names = ["input_linear", "output_linear"].map(|name| format!("{block}.{name}.weight"));
    stacked_experts(plan, layer, hidden, moe, &names)?;
    if let Some(width) = moe.shared.intermediate() {
        let role = |role| Role::Layer(layer, role);
        let name = |name: &str| format!("model.layers.{layer}.shared_mlp.{name}_linear.weight");
        let halves = [2 * width, hidden];
        for (part, first) in [(LayerRole::SharedGate, 0), (LayerRole::SharedUp, width)] {
            let view = View::rows(first, width, hidden);
            plan.view(role(part), &name("input"), &halves, Kind::Matrix, view)?;
        }
        plan.matrix(role(LayerRole::SharedDown), &name("output"), hidden, width)?;
    }
    Ok(())
}
