//! HunYuan V1 MoE: softmax, always renormalised; experts per token layer by layer; a shared expert as wide as a routed
//! one; queries and keys normed after rotation.

use muster_types::DType;

use super::base::{Base, MOST_EXPERTS, MOST_EXPERTS_IN_ALL, count, intermediate};
use super::defaults::{Defaults, Habits};
use super::family::{ExpertTensors, Family};
use super::trunk::{SplitNames, TrunkNames};
use crate::config::{Config, ConfigError};
use crate::spec::{
    AttentionSpec, GateRecipe, LayerSpec, MlpSpec, ModelSpec, MoeSpec, QkNorm, Renormalise, Score, SharedSpec,
};

pub(super) const FAMILY: Family = Family {
    names: &TrunkNames { qk_norms: ["query_layernorm", "key_layernorm"], ..TrunkNames::USUAL },
    ..Family::new("hunyuan_v1_moe", spec, ExpertTensors::Split(&NAMES))
};

const DEFAULTS: Defaults = Defaults {
    vocab: 290_943,
    hidden: 4096,
    layers: 32,
    heads: 32,
    kv_heads: None,
    context: 2048,
    norm_eps: 1e-5,
    rope_theta: 10000.0,
    bos: Some(1),
    eos: Some(2),
    experts: 1,
    top_k: 1,
    habits: Habits {
        // Read below, layer by layer.
        experts: &[],
        top_k: &[],
        alpha: true,
        modules: &["configuration_hunyuan", "hunyuan"],
        ..Habits::USUAL
    },
};

const NAMES: SplitNames = SplitNames { router: "gate.wg", shared: "shared_mlp", ..SplitNames::USUAL };

fn spec(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &DEFAULTS)?;
    config.refuse_set("sliding_window", "this family attends to the whole sequence")?;
    config.refuse_unless("use_cla", "layers that share keys and values are not computed", |value| {
        value == false
    })?;
    config.refuse_unless("use_qk_norm", "this build norms queries and keys", |value| value == true)?;
    config.refuse_unless("mlp_bias", "this build reads MLPs without biases", |value| value == false)?;
    config.refuse_unless("moe_layer_num_skipped", "this build reads experts in every layer", |value| {
        value == 0
    })?;
    config.refuse_unless("use_mixed_mlp_moe", "this build adds the shared expert", |value| value == true)?;
    let bias = config.flag("attention_bias", false)?;
    let attention =
        AttentionSpec { qk_norm: QkNorm::PerHeadRotated, qkv_bias: bias, o_bias: bias, ..base.attention() };
    let width = intermediate(config, "intermediate_size", 11008)?;
    for (key, allowed) in [("moe_intermediate_size", width), ("num_shared_expert", 1)] {
        let values = config.per_layer(key, base.layers, allowed, MOST_EXPERTS.max(width))?;
        if let Some(other) = values.iter().find(|value| **value != allowed) {
            return Err(config.conflict(key, other, format!("this build reads {allowed} in every layer")));
        }
    }
    let experts = config.per_layer("num_experts", base.layers, DEFAULTS.experts, MOST_EXPERTS)?;
    let top_k = config.per_layer("moe_topk", base.layers, DEFAULTS.top_k, MOST_EXPERTS)?;
    let total: usize = experts.iter().sum();
    if total > MOST_EXPERTS_IN_ALL {
        let reason = format!("at most {MOST_EXPERTS_IN_ALL} experts in all are read");
        return Err(config.conflict("num_experts", &total, reason));
    }
    let gate = GateRecipe::plain(Score::SoftmaxThenTopK, Renormalise::SUM);
    let shared = SharedSpec::Add { intermediate: width };
    let layer = |(&experts, &top_k): (&usize, &usize)| {
        if top_k > experts {
            return Err(config.conflict(
                "moe_topk",
                &top_k,
                format!("there are {experts} experts (`num_experts`)"),
            ));
        }
        let moe = MoeSpec { experts: count(experts), top_k: count(top_k), shared, ..base.moe(width, gate) };
        Ok(LayerSpec { attention: attention.clone(), mlp: MlpSpec::Moe(moe) })
    };
    let layers = experts.iter().zip(&top_k).map(layer).collect::<Result<Vec<_>, _>>()?;
    Ok(base.model(FAMILY.model_type, dtype, layers))
}
