//! DeepSeek V2 and V3: attention over compressed rows, the first layers dense, shared experts as one MLP. V2 scores by
//! softmax and keeps the groups with the best expert; V3 scores by sigmoid with a bias to select by, as GLM-4 does.

use muster_types::DType;

use super::base::{Base, WIDEST_HEAD, intermediate, shared_experts};
use super::defaults::{Defaults, Habits, Rotary};
use super::family::{ExpertTensors, Family};
use super::glm4_moe::{NAMES, sigmoid_gate};
use super::rope::yarn_scale;
use crate::config::{Config, ConfigError};
use crate::spec::{
    AttentionSpec, GateRecipe, GroupWorth, LatentSpec, ModelSpec, MoeSpec, Renormalise, RopePairs,
    RopeScaling, RopeSpec, Score,
};

pub(super) const V2: Family = Family::new("deepseek_v2", v2, ExpertTensors::Split(&NAMES));
pub(super) const V3: Family = Family::new("deepseek_v3", v3, ExpertTensors::Split(&NAMES));
/// Kimi K2 is a DeepSeek-V3 with other sizes.
pub(super) const KIMI_K2: Family = Family::new("kimi_k2", kimi_k2, ExpertTensors::Split(&NAMES));

const V2_DEFAULTS: Defaults = Defaults {
    vocab: 102_400,
    hidden: 4096,
    layers: 32,
    heads: 32,
    kv_heads: None,
    context: 2048,
    norm_eps: 1e-6,
    rope_theta: 10000.0,
    bos: Some(1),
    eos: Some(2),
    experts: 64,
    top_k: 6,
    habits: Habits {
        experts: &["n_routed_experts", "num_experts"],
        rotary: Rotary::Elements("qk_rope_head_dim", 64),
        modules: &["configuration_deepseek", "modeling_deepseek"],
        ..Habits::USUAL
    },
};

const V3_DEFAULTS: Defaults = Defaults {
    vocab: 129_280,
    hidden: 7168,
    layers: 61,
    heads: 128,
    context: 4096,
    bos: Some(0),
    eos: Some(1),
    experts: 256,
    top_k: 8,
    habits: Habits { experts: &["n_routed_experts", "num_local_experts"], ..V2_DEFAULTS.habits },
    ..V2_DEFAULTS
};

/// What both have.
struct Common {
    intermediate: usize,
    moe_intermediate: usize,
    shared: usize,
    dense_layers: usize,
}

fn v2(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &V2_DEFAULTS)?;
    config.refuse_unless("norm_topk_prob", "this family's weights are not renormalised", |v| v == false)?;
    config.refuse_unless("scoring_func", "this build computes \"softmax\"", |value| value == "softmax")?;
    config.refuse_unless("mlp_bias", "this build reads MLPs without biases", |value| value == false)?;
    let limited = config.get("topk_method").is_some_and(|value| value == "group_limited_greedy");
    config.refuse_unless(
        "topk_method",
        "this build computes \"greedy\" and \"group_limited_greedy\"",
        |value| limited || value == "greedy",
    )?;
    let groups = if limited { base.groups(config, GroupWorth::Best, [1, 1])? } else { None };
    let gate = GateRecipe {
        groups,
        scale: config.positive("routed_scaling_factor", 1.0)? as f32,
        ..GateRecipe::plain(Score::SoftmaxThenTopK, Renormalise::None)
    };
    let common = Common { intermediate: 11008, moe_intermediate: 1407, shared: 2, dense_layers: 0 };
    model(V2.model_type, config, dtype, base, RopePairs::Neighbours, gate, &common)
}

fn v3(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    v3_called(V3.model_type, config, dtype)
}

fn kimi_k2(config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    v3_called(KIMI_K2.model_type, config, dtype)
}

fn v3_called(family: &'static str, config: &Config, dtype: DType) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(config, &V3_DEFAULTS)?;
    config.refuse_unless("scoring_func", "this build computes \"sigmoid\"", |value| value == "sigmoid")?;
    config.refuse_unless("topk_method", "this build computes \"noaux_tc\"", |value| value == "noaux_tc")?;
    let gate = GateRecipe {
        groups: base.groups(config, GroupWorth::BestTwo, [8, 4])?,
        ..sigmoid_gate(config, 2.5)?
    };
    let interleaved = config.flag("rope_interleave", true)?;
    let pairs = if interleaved { RopePairs::Neighbours } else { RopePairs::Halves };
    let common = Common { intermediate: 18432, moe_intermediate: 2048, shared: 1, dense_layers: 3 };
    model(family, config, dtype, base, pairs, gate, &common)
}

fn model(
    family: &'static str,
    config: &Config,
    dtype: DType,
    base: Base,
    pairs: RopePairs,
    gate: GateRecipe,
    defaults: &Common,
) -> Result<ModelSpec, ConfigError> {
    config.refuse_unless("moe_layer_freq", "this build reads experts in every layer", |value| value == 1)?;
    config.refuse_set("sliding_window", "this family attends to the whole sequence")?;
    let attention = attention(config, &base, pairs)?;
    let width = intermediate(config, "moe_intermediate_size", defaults.moe_intermediate)?;
    let shared = shared_experts(config, "n_shared_experts", defaults.shared, width)?;
    let moe = MoeSpec { shared, ..base.moe(width, gate) };
    let dense_layers = config.count("first_k_dense_replace", defaults.dense_layers, 1 << 20)?;
    let dense = intermediate(config, "intermediate_size", defaults.intermediate)?;
    let layers = base.mixed_layers(&attention, &moe, dense, |number| number >= dense_layers);
    let unused = base.prediction_layers(config)?;
    Ok(ModelSpec { unused, ..base.model(family, dtype, layers) })
}

fn attention(config: &Config, base: &Base, pairs: RopePairs) -> Result<AttentionSpec, ConfigError> {
    const WIDEST_ROW: usize = 1 << 16;
    let plain = base.attention();
    if plain.kv_heads != base.heads {
        let reason = format!("keys and values are expanded for {} heads (`num_attention_heads`)", base.heads);
        return Err(config.conflict("num_key_value_heads", &plain.kv_heads, reason));
    }
    let default_q_rank = if config.has("q_lora_rank") { None } else { Some(1536) };
    let latent = LatentSpec {
        q_rank: config.optional_size("q_lora_rank", 1..=WIDEST_ROW)?.or(default_q_rank),
        kv_rank: config.size("kv_lora_rank", 512, 1..=WIDEST_ROW)?,
        plain_dim: config.size("qk_nope_head_dim", 128, 1..=WIDEST_HEAD)?,
        value_dim: config.size("v_head_dim", 128, 1..=WIDEST_HEAD)?,
        // Not `rms_norm_eps`: the reference gives these norms its class default.
        norm_eps: 1e-6,
        down_bias: config.flag("attention_bias", false)?,
    };
    let rope = RopeSpec { pairs, ..base.rope.clone() };
    let all_dim = match (config.nested("rope_scaling")?, config.nested("rope_parameters")?) {
        (Some(scaling), _) | (None, Some(scaling)) => scaling.optional_positive("mscale_all_dim")?,
        (None, None) => None,
    };
    let longer = match (&rope.scaling, all_dim) {
        (RopeScaling::Yarn(yarn), Some(all)) => yarn_scale(yarn.factor, all),
        _ => 1.0,
    };
    let width = latent.plain_dim + rope.dim;
    let scale = (width as f64).sqrt().recip() * longer * longer;
    Ok(AttentionSpec {
        kv_heads: 1,
        head_dim: rope.dim + latent.kv_rank,
        scale: scale as f32,
        o_bias: latent.down_bias,
        rope: Some(rope),
        latent: Some(latent),
        ..plain
    })
}
