//! gpt-oss: top-k of the logits, then softmax over those; experts with biases and a clamped gate, in MXFP4 or bf16, rows
//! of gate and up taking turns; every other layer sees a window; attention sinks; YaRN.

use muster_types::{DType, Gating, Reach};
use serde_json::Value;

use super::base::{Base, intermediate, window};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use crate::config::{Config, ConfigError};
use crate::error::CheckpointError;
use crate::plan::{Kind, PlanBuilder, View};
use crate::spec::{
    AttentionSpec, ExpertRole, GateRecipe, LayerRole, LayerSpec, MlpSpec, ModelSpec, MoeSpec, Renormalise,
    Role, RopeScaling, RopeSpec, Score, YarnSpec,
};
use crate::stored::MXFP4_GROUP;

pub(super) const FAMILY: Family = Family::new("gpt_oss", spec, ExpertTensors::Own(experts));

const DEFAULTS: Defaults = Defaults {
    vocab: 201_088,
    hidden: 2880,
    layers: 36,
    heads: 64,
    kv_heads: Some(8),
    context: 131_072,
    norm_eps: 1e-5,
    rope_theta: 150_000.0,
    bos: None,
    eos: None,
    experts: 128,
    top_k: 4,
    habits: Habits {
        top_k: &["num_experts_per_tok", "experts_per_token"],
        head_dim: Some(64),
        layers_differ: true,
        mxfp4: true,
        ..Habits::USUAL
    },
};

/// The scaling of the family's class, for a configuration that says nothing.
const YARN: YarnSpec = YarnSpec {
    factor: 32.0,
    original_context: 4096,
    beta_fast: 32.0,
    beta_slow: 1.0,
    truncate: false,
    // 0.1 ln 32 + 1
    amplitude: 1.346_573_6,
};

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    let window = match config.has("sliding_window") {
        true => window(config)?,
        false => Reach::last(128),
    };
    let words = [("sliding_attention", window), ("full_attention", Reach::All)];
    let reach = base.layer_types(config, words, |layer| if layer % 2 == 0 { window } else { Reach::All })?;
    let bias = config.flag("attention_bias", true)?;
    let said = ["rope_scaling", "rope_parameters"].iter().any(|key| config.get(key).is_some());
    let scaling = if said { base.rope.scaling.clone() } else { RopeScaling::Yarn(YARN) };
    let rope = RopeSpec { scaling, ..base.rope.clone() };
    let attention =
        AttentionSpec { qkv_bias: bias, o_bias: bias, sinks: true, rope: Some(rope), ..base.attention() };
    let gate = GateRecipe { bias: true, ..GateRecipe::plain(Score::TopKThenSoftmax, Renormalise::None) };
    let gating = Gating::ClampedSwish {
        alpha: config.positive("swiglu_alpha", 1.702)? as f32,
        limit: config.positive("swiglu_limit", 7.0)? as f32,
    };
    let width = intermediate(config, "intermediate_size", 2880)?;
    let moe = MoeSpec { gating, biases: true, ..base.moe(width, gate) };
    let packed = config.nested("quantization_config")?;
    if packed.is_some_and(|packed| packed.get("quant_method").and_then(Value::as_str) == Some("mxfp4")) {
        for (key, size) in [("intermediate_size", width), ("hidden_size", base.hidden)] {
            if !size.is_multiple_of(MXFP4_GROUP) {
                let reason = format!("weights in MXFP4 come in groups of {MXFP4_GROUP}");
                return Err(config.conflict(key, &size, reason));
            }
        }
    }
    let layer = |reach| LayerSpec {
        attention: AttentionSpec { reach, ..attention.clone() },
        mlp: MlpSpec::Moe(moe.clone()),
    };
    let layers = reach.into_iter().map(layer).collect();
    Ok(base.model(FAMILY.model_type, dtype, layers))
}

/// Rows of gate and up take turns. In MXFP4 `gate_up_proj` is `[experts, 2 * intermediate, hidden]` and `down_proj`
/// `[experts, hidden, intermediate]`; in plain numbers both are the other way round.
fn experts(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    moe: &MoeSpec,
) -> Result<(), CheckpointError> {
    let block = format!("model.layers.{layer}.mlp");
    let (count, width) = (moe.experts as usize, moe.intermediate);
    plan.gate(Role::Layer(layer, LayerRole::Gate), &format!("{block}.router.weight"), count, hidden)?;
    plan.vector(Role::Layer(layer, LayerRole::GateBias), &format!("{block}.router.bias"), count)?;
    let (input, output) = (format!("{block}.experts.gate_up_proj"), format!("{block}.experts.down_proj"));
    let packed = plan.has(&format!("{input}_blocks"));
    for (expert, index) in (0..moe.experts).zip(0..) {
        let role = |part| Role::Expert(layer, expert, part);
        let parts = [(ExpertRole::Gate, ExpertRole::GateBias, 0), (ExpertRole::Up, ExpertRole::UpBias, 1)];
        for (matrix, bias, turn) in parts {
            if packed {
                let view = View::alternate_rows(index * 2 * width + turn, width, hidden);
                plan.mxfp4(role(matrix), &input, [count, 2 * width, hidden], view)?;
            } else {
                let first = index * hidden * 2 * width + turn;
                let view = View { first, rows: width, cols: hidden, row_step: 2, col_step: 2 * width };
                plan.view(role(matrix), &input, &[count, hidden, 2 * width], Kind::Matrix, view)?;
            }
            let view = View::vector(index * 2 * width + turn, width, 2);
            plan.view(role(bias), &format!("{input}_bias"), &[count, 2 * width], Kind::Vector, view)?;
        }
        if packed {
            let view = View::rows(index * hidden, hidden, width);
            plan.mxfp4(role(ExpertRole::Down), &output, [count, hidden, width], view)?;
        } else {
            let view = View::transposed(index * width * hidden, hidden, width);
            plan.view(role(ExpertRole::Down), &output, &[count, width, hidden], Kind::Matrix, view)?;
        }
        let view = View::vector(index * hidden, hidden, 1);
        plan.view(
            role(ExpertRole::DownBias),
            &format!("{output}_bias"),
            &[count, hidden],
            Kind::Vector,
            view,
        )?;
    }
    Ok(())
}
