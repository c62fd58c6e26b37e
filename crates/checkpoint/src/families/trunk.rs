//! Tensor names that the families share: embedding, head, norms, attention, and experts, one by one or in stacks.

use crate::error::CheckpointError;
use crate::plan::{Kind, PlanBuilder, View};
use crate::spec::{
    AttentionSpec, ExpertRole, LatentSpec, LayerRole, ModelSpec, MoeSpec, NormKind, Role, SharedSpec,
};

/// How a family names what is neither embedding nor experts.
pub(super) struct TrunkNames {
    /// The dense MLP, below the layer.
    pub dense: &'static str,
    /// The norms of queries and keys, below attention.
    pub qk_norms: [&'static str; 2],
}

impl TrunkNames {
    /// Those of most families.
    pub(super) const USUAL: Self = Self { dense: "mlp", qk_norms: ["q_norm", "k_norm"] };
}

/// Embedding, final norm and head.
pub(super) fn outer(plan: &mut PlanBuilder<'_>, spec: &ModelSpec) -> Result<(), CheckpointError> {
    let vocab = spec.vocab as usize;
    plan.matrix(Role::Embedding, "model.embed_tokens.weight", vocab, spec.hidden)?;
    plan.vector(Role::FinalNorm, "model.norm.weight", spec.hidden)?;
    if spec.norm == NormKind::Layer {
        plan.vector(Role::FinalNormBias, "model.norm.bias", spec.hidden)?;
    }
    if !spec.tied_head {
        plan.matrix(Role::Head, "lm_head.weight", vocab, spec.hidden)?;
    }
    if spec.head_bias {
        plan.vector(Role::HeadBias, "lm_head.bias", vocab)?;
    }
    Ok(())
}

/// Attention of one layer, and both of the layer's norms.
pub(super) fn layer(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    spec: &ModelSpec,
    attention: &AttentionSpec,
    names: &TrunkNames,
) -> Result<(), CheckpointError> {
    let norms = [
        ([LayerRole::AttentionNorm, LayerRole::AttentionNormBias], "input_layernorm"),
        ([LayerRole::MlpNorm, LayerRole::MlpNormBias], "post_attention_layernorm"),
    ];
    for ([weight, bias], norm) in norms {
        let name = |part: &str| format!("model.layers.{layer}.{norm}.{part}");
        plan.vector(Role::Layer(layer, weight), &name("weight"), spec.hidden)?;
        if spec.norm == NormKind::Layer {
            plan.vector(Role::Layer(layer, bias), &name("bias"), spec.hidden)?;
        }
    }
    match &attention.latent {
        Some(latent) => latent_attention(plan, layer, spec.hidden, attention, latent),
        None => grouped_attention(plan, layer, spec.hidden, attention, names),
    }
}

fn grouped_attention(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    attention: &AttentionSpec,
    names: &TrunkNames,
) -> Result<(), CheckpointError> {
    let q = attention.heads * attention.head_dim;
    let kv = attention.kv_heads * attention.head_dim;
    let role = |role| Role::Layer(layer, role);
    let name = |name: &str| format!("model.layers.{layer}.{name}");
    plan.matrix(role(LayerRole::Q), &name("self_attn.q_proj.weight"), q, hidden)?;
    plan.matrix(role(LayerRole::K), &name("self_attn.k_proj.weight"), kv, hidden)?;
    plan.matrix(role(LayerRole::V), &name("self_attn.v_proj.weight"), kv, hidden)?;
    plan.matrix(role(LayerRole::O), &name("self_attn.o_proj.weight"), hidden, q)?;
    if attention.qkv_bias {
        plan.vector(role(LayerRole::QBias), &name("self_attn.q_proj.bias"), q)?;
        plan.vector(role(LayerRole::KBias), &name("self_attn.k_proj.bias"), kv)?;
        plan.vector(role(LayerRole::VBias), &name("self_attn.v_proj.bias"), kv)?;
    }
    if attention.o_bias {
        plan.vector(role(LayerRole::OBias), &name("self_attn.o_proj.bias"), hidden)?;
    }
    if attention.sinks {
        plan.vector(role(LayerRole::Sinks), &name("self_attn.sinks"), attention.heads)?;
    }
    let norms = attention.qk_norm.weights(attention.heads, attention.kv_heads, attention.head_dim);
    let roles = [LayerRole::QNorm, LayerRole::KNorm];
    for ((norm, length), of) in roles.into_iter().zip(norms.into_iter().flatten()).zip(names.qk_norms) {
        plan.vector(role(norm), &name(&format!("self_attn.{of}.weight")), length)?;
    }
    Ok(())
}

fn latent_attention(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    attention: &AttentionSpec,
    latent: &LatentSpec,
) -> Result<(), CheckpointError> {
    let LatentSpec { q_rank, kv_rank, plain_dim, value_dim, down_bias, .. } = *latent;
    let role = |role| Role::Layer(layer, role);
    let name = |name: &str| format!("model.layers.{layer}.{name}");
    let queries = attention.heads * (plain_dim + attention.rotated());
    match q_rank {
        None => plan.matrix(role(LayerRole::Q), &name("self_attn.q_proj.weight"), queries, hidden)?,
        Some(rank) => {
            plan.matrix(role(LayerRole::QDown), &name("self_attn.q_a_proj.weight"), rank, hidden)?;
            if down_bias {
                plan.vector(role(LayerRole::QDownBias), &name("self_attn.q_a_proj.bias"), rank)?;
            }
            plan.vector(role(LayerRole::QDownNorm), &name("self_attn.q_a_layernorm.weight"), rank)?;
            plan.matrix(role(LayerRole::Q), &name("self_attn.q_b_proj.weight"), queries, rank)?;
        }
    }
    let cached = kv_rank + attention.rotated();
    plan.matrix(role(LayerRole::KvDown), &name("self_attn.kv_a_proj_with_mqa.weight"), cached, hidden)?;
    if down_bias {
        plan.vector(role(LayerRole::KvDownBias), &name("self_attn.kv_a_proj_with_mqa.bias"), cached)?;
    }
    plan.vector(role(LayerRole::KvDownNorm), &name("self_attn.kv_a_layernorm.weight"), kv_rank)?;
    let both = attention.heads * (plain_dim + value_dim);
    plan.matrix(role(LayerRole::KvUp), &name("self_attn.kv_b_proj.weight"), both, kv_rank)?;
    let out = attention.output_width();
    plan.matrix(role(LayerRole::O), &name("self_attn.o_proj.weight"), hidden, out)?;
    if attention.o_bias {
        plan.vector(role(LayerRole::OBias), &name("self_attn.o_proj.bias"), hidden)?;
    }
    Ok(())
}

/// How a family names the tensors of experts that are stored one by one, and what comes with them.
pub(super) struct SplitNames {
    /// The block, below the layer.
    pub block: &'static str,
    pub router: &'static str,
    pub selection_bias: Option<SelectionBias>,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub shared: &'static str,
    pub shared_scale: &'static str,
}

/// The tensor of the selection bias.
pub(super) enum SelectionBias {
    /// `[experts]`.
    Vector(&'static str),
    /// `[1, experts]`.
    Row(&'static str),
}

impl SplitNames {
    /// Those of most families.
    pub(super) const USUAL: Self = Self {
        block: "mlp",
        router: "gate",
        selection_bias: None,
        gate: "gate_proj",
        up: "up_proj",
        down: "down_proj",
        shared: "shared_experts",
        shared_scale: "shared_expert_gate",
    };
    /// Those of Mixtral and families after it.
    pub(super) const NUMBERED: Self =
        Self { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2", ..Self::USUAL };
}

/// The gate of one layer, its experts, each in three tensors of its own, and its shared expert.
pub(super) fn split_experts(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    moe: &MoeSpec,
    names: &SplitNames,
) -> Result<(), CheckpointError> {
    let block = format!("model.layers.{layer}.{}", names.block);
    let of_layer = |role| Role::Layer(layer, role);
    let count = moe.experts as usize;
    plan.gate(of_layer(LayerRole::Gate), &format!("{block}.{}.weight", names.router), count, hidden)?;
    if moe.gate.selection_bias {
        let role = of_layer(LayerRole::SelectionBias);
        match names.selection_bias {
            Some(SelectionBias::Vector(name)) => plan.vector(role, &format!("{block}.{name}"), count)?,
            Some(SelectionBias::Row(name)) => plan.row(role, &format!("{block}.{name}"), count)?,
            None => {}
        }
    }
    if plan.has(&format!("{block}.experts.gate_up_proj")) {
        let names = ["gate_up_proj", "down_proj"].map(|name| format!("{block}.experts.{name}"));
        stacked_experts(plan, layer, hidden, moe, &names)?;
    } else {
        for expert in 0..moe.experts {
            let role = |role| Role::Expert(layer, expert, role);
            let name = |name: &str| format!("{block}.experts.{expert}.{name}.weight");
            plan.matrix(role(ExpertRole::Gate), &name(names.gate), moe.intermediate, hidden)?;
            plan.matrix(role(ExpertRole::Up), &name(names.up), moe.intermediate, hidden)?;
            plan.matrix(role(ExpertRole::Down), &name(names.down), hidden, moe.intermediate)?;
        }
    }
    if let Some(width) = moe.shared.intermediate() {
        let name = |name: &str| format!("{block}.{}.{name}.weight", names.shared);
        plan.matrix(of_layer(LayerRole::SharedGate), &name(names.gate), width, hidden)?;
        plan.matrix(of_layer(LayerRole::SharedUp), &name(names.up), width, hidden)?;
        plan.matrix(of_layer(LayerRole::SharedDown), &name(names.down), hidden, width)?;
    }
    if let SharedSpec::SigmoidGated { .. } = moe.shared {
        let name = format!("{block}.{}.weight", names.shared_scale);
        plan.matrix(of_layer(LayerRole::SharedScale), &name, 1, hidden)?;
    }
    Ok(())
}

/// Experts in two tensors: `[experts, 2 * intermediate, hidden]`, an expert's gate rows before its up rows, and
/// `[experts, hidden, intermediate]`. So GraniteMoE publishes them, and transformers holds them since version 5.
pub(super) fn stacked_experts(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    moe: &MoeSpec,
    [input, output]: &[String; 2],
) -> Result<(), CheckpointError> {
    let (count, width) = (moe.experts as usize, moe.intermediate);
    for (expert, index) in (0..moe.experts).zip(0..) {
        let parts = [
            (ExpertRole::Gate, input, [count, 2 * width, hidden], 0, width),
            (ExpertRole::Up, input, [count, 2 * width, hidden], width, width),
            (ExpertRole::Down, output, [count, hidden, width], 0, hidden),
        ];
        for (part, name, shape, first, rows) in parts {
            let view = View::rows(index * shape[1] + first, rows, shape[2]);
            plan.view(Role::Expert(layer, expert, part), name, &shape, Kind::Matrix, view)?;
        }
    }
    Ok(())
}

/// The three tensors of a dense MLP.
pub(super) fn dense(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    intermediate: usize,
    names: &TrunkNames,
) -> Result<(), CheckpointError> {
    let role = |role| Role::Layer(layer, role);
    let name = |name: &str| format!("model.layers.{layer}.{}.{name}.weight", names.dense);
    plan.matrix(role(LayerRole::DenseGate), &name("gate_proj"), intermediate, hidden)?;
    plan.matrix(role(LayerRole::DenseUp), &name("up_proj"), intermediate, hidden)?;
    plan.matrix(role(LayerRole::DenseDown), &name("down_proj"), hidden, intermediate)
}
