//! Tensor names that the families share: embedding, head, norms, attention, and experts stored one by one.

use crate::error::CheckpointError;
use crate::plan::PlanBuilder;
use crate::spec::{
    AttentionSpec, ExpertRole, LatentSpec, LayerRole, ModelSpec, MoeSpec, QkNorm, Role, SharedSpec,
};

/// Embedding, final norm and head.
pub(super) fn outer(plan: &mut PlanBuilder<'_>, spec: &ModelSpec) -> Result<(), CheckpointError> {
    let vocab = spec.vocab as usize;
    plan.matrix(Role::Embedding, "model.embed_tokens.weight", vocab, spec.hidden)?;
    plan.vector(Role::FinalNorm, "model.norm.weight", spec.hidden)?;
    if spec.tied_head { Ok(()) } else { plan.matrix(Role::Head, "lm_head.weight", vocab, spec.hidden) }
}

/// Attention of one layer, and both of the layer's norms.
pub(super) fn attention(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    attention: &AttentionSpec,
) -> Result<(), CheckpointError> {
    if let Some(latent) = &attention.latent {
        return latent_attention(plan, layer, hidden, attention, latent);
    }
    let q = attention.heads * attention.head_dim;
    let kv = attention.kv_heads * attention.head_dim;
    let role = |role| Role::Layer(layer, role);
    let name = |name: &str| format!("model.layers.{layer}.{name}");
    plan.vector(role(LayerRole::AttentionNorm), &name("input_layernorm.weight"), hidden)?;
    plan.vector(role(LayerRole::MlpNorm), &name("post_attention_layernorm.weight"), hidden)?;
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
    let (q_norm, k_norm) = match attention.qk_norm {
        QkNorm::None => return Ok(()),
        QkNorm::PerHead => (attention.head_dim, attention.head_dim),
        QkNorm::FullWidth => (q, kv),
    };
    plan.vector(role(LayerRole::QNorm), &name("self_attn.q_norm.weight"), q_norm)?;
    plan.vector(role(LayerRole::KNorm), &name("self_attn.k_norm.weight"), k_norm)
}

/// Attention over compressed rows of one layer, and both of the layer's norms.
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
    plan.vector(role(LayerRole::AttentionNorm), &name("input_layernorm.weight"), hidden)?;
    plan.vector(role(LayerRole::MlpNorm), &name("post_attention_layernorm.weight"), hidden)?;
    let queries = attention.heads * (plain_dim + attention.rope.dim);
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
    let cached = kv_rank + attention.rope.dim;
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
    plan.matrix(of_layer(LayerRole::Gate), &format!("{block}.{}.weight", names.router), count, hidden)?;
    if moe.gate.selection_bias {
        let role = of_layer(LayerRole::SelectionBias);
        match names.selection_bias {
            Some(SelectionBias::Vector(name)) => plan.vector(role, &format!("{block}.{name}"), count)?,
            Some(SelectionBias::Row(name)) => plan.row(role, &format!("{block}.{name}"), count)?,
            None => {}
        }
    }
    for expert in 0..moe.experts {
        let role = |role| Role::Expert(layer, expert, role);
        let name = |name: &str| format!("{block}.experts.{expert}.{name}.weight");
        plan.matrix(role(ExpertRole::Gate), &name(names.gate), moe.intermediate, hidden)?;
        plan.matrix(role(ExpertRole::Up), &name(names.up), moe.intermediate, hidden)?;
        plan.matrix(role(ExpertRole::Down), &name(names.down), hidden, moe.intermediate)?;
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

/// The three tensors of a dense MLP.
pub(super) fn dense(
    plan: &mut PlanBuilder<'_>,
    layer: u32,
    hidden: usize,
    intermediate: usize,
) -> Result<(), CheckpointError> {
    let role = |role| Role::Layer(layer, role);
    let name = |name: &str| format!("model.layers.{layer}.mlp.{name}.weight");
    plan.matrix(role(LayerRole::DenseGate), &name("gate_proj"), intermediate, hidden)?;
    plan.matrix(role(LayerRole::DenseUp), &name("up_proj"), intermediate, hidden)?;
    plan.matrix(role(LayerRole::DenseDown), &name("down_proj"), hidden, intermediate)
}
