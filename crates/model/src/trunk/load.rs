//! A checkpoint's trunk weights, read and packed.

use muster_checkpoint::Checkpoint;
use muster_checkpoint::spec::{
    self, LayerRole, LayerSpec, MlpSpec, MoeSpec, QkNorm, Role, RopeSpec, SharedSpec,
};
use muster_kernels::{Expert, KernelError, Rope, RopePairs};
use muster_types::{Compute, WeightDType};

use super::attention::{Attention, Projection};
use super::moe::{Moe, Shared};
use super::{Layer, Mlp, Trunk};
use crate::weights::Loader;
use crate::{LoadProgress, ModelError};

impl Trunk {
    /// Reads, checks and packs everything but the routed experts. `dtype` is that of the linears: attention's
    /// projections, dense MLPs and the head, which may be the embedding too. Gates choose experts and stay as they are.
    ///
    /// # Errors
    /// When bytes are unreadable or not finite.
    pub fn load(
        checkpoint: &Checkpoint,
        compute: Compute,
        dtype: WeightDType,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let spec = checkpoint.spec().clone();
        let trunk_roles = checkpoint.roles().filter(|role| !matches!(role, Role::Expert(..)));
        let mut loader = Loader::new(checkpoint, compute, trunk_roles, progress);
        let embedded = if spec.tied_head { dtype } else { WeightDType::Native };
        let embedding = loader.matrix_as(Role::Embedding, embedded)?;
        let layers = spec
            .layers
            .iter()
            .zip(0u32..)
            .map(|(layer, index)| load_layer(&mut loader, layer, index, dtype))
            .collect::<Result<Vec<_>, _>>()?;
        let final_norm = loader.vector(Role::FinalNorm)?;
        let head = if spec.tied_head { None } else { Some(loader.matrix_as(Role::Head, dtype)?) };
        let bytes = embedding.bytes()
            + head.as_ref().map_or(0, |head| head.bytes())
            + layers.iter().map(Layer::bytes).sum::<usize>();
        Ok(Self { spec, compute, dtype, embedding, layers, final_norm, head, bytes: bytes as u64 })
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        let attention = &self.attention;
        let projections = [&attention.q, &attention.k, &attention.v, &attention.o];
        let mlp = match &self.mlp {
            Mlp::Moe(moe) => moe.bytes(),
            Mlp::Dense(expert) => expert.bytes(),
        };
        projections.iter().map(|p| p.weight.bytes()).sum::<usize>() + mlp
    }
}

fn load_layer(
    loader: &mut Loader<'_>,
    spec: &LayerSpec,
    index: u32,
    dtype: WeightDType,
) -> Result<Layer, ModelError> {
    let role = |role| Role::Layer(index, role);
    let attention = &spec.attention;
    let has_norm = attention.qk_norm != QkNorm::None;
    let mut projection = |weight, bias, present| -> Result<Projection, ModelError> {
        let weight = loader.matrix_as(role(weight), dtype)?;
        Ok(Projection { weight, bias: loader.vector_if(present, role(bias))? })
    };
    let q = projection(LayerRole::Q, LayerRole::QBias, attention.qkv_bias)?;
    let k = projection(LayerRole::K, LayerRole::KBias, attention.qkv_bias)?;
    let v = projection(LayerRole::V, LayerRole::VBias, attention.qkv_bias)?;
    let o = projection(LayerRole::O, LayerRole::OBias, attention.o_bias)?;
    let mlp = match &spec.mlp {
        MlpSpec::Moe(moe) => Mlp::Moe(Box::new(load_moe(loader, moe, index, dtype)?)),
        MlpSpec::Dense { .. } => {
            let roles = [LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown];
            Mlp::Dense(load_mlp(loader, index, roles, "dense MLP", dtype)?)
        }
    };
    Ok(Layer {
        attention: Attention {
            norm: loader.vector(role(LayerRole::AttentionNorm))?,
            q_norm: loader.vector_if(has_norm, role(LayerRole::QNorm))?,
            k_norm: loader.vector_if(has_norm, role(LayerRole::KNorm))?,
            rope: rope(&attention.rope)?,
            spec: attention.clone(),
            q,
            k,
            v,
            o,
        },
        mlp_norm: loader.vector(role(LayerRole::MlpNorm))?,
        mlp,
    })
}

fn rope(spec: &RopeSpec) -> Result<Rope, KernelError> {
    let pairs = match spec.pairs {
        spec::RopePairs::Halves => RopePairs::Halves,
        spec::RopePairs::Neighbours => RopePairs::Neighbours,
    };
    Rope::new(spec.theta, spec.dim, pairs)
}

fn load_moe(
    loader: &mut Loader<'_>,
    spec: &MoeSpec,
    index: u32,
    dtype: WeightDType,
) -> Result<Moe, ModelError> {
    let role = |role| Role::Layer(index, role);
    let gate = Projection {
        weight: loader.matrix(role(LayerRole::Gate))?,
        bias: loader.vector_if(spec.gate.bias, role(LayerRole::GateBias))?,
    };
    let selection_bias = loader.vector_if(spec.gate.selection_bias, role(LayerRole::SelectionBias))?;
    let shared = match spec.shared {
        SharedSpec::None => None,
        SharedSpec::Add { .. } | SharedSpec::SigmoidGated { .. } => {
            let roles = [LayerRole::SharedGate, LayerRole::SharedUp, LayerRole::SharedDown];
            let expert = load_mlp(loader, index, roles, "shared expert", dtype)?;
            let gated = matches!(spec.shared, SharedSpec::SigmoidGated { .. });
            let scale = gated.then(|| loader.matrix(role(LayerRole::SharedScale))).transpose()?;
            Some(Shared { expert, scale })
        }
    };
    Ok(Moe { spec: spec.clone(), gate, selection_bias: selection_bias.unwrap_or_default(), shared })
}

fn load_mlp(
    loader: &mut Loader<'_>,
    index: u32,
    roles: [LayerRole; 3],
    what: &str,
    dtype: WeightDType,
) -> Result<Expert, ModelError> {
    let mut matrix = |role| loader.matrix_as(Role::Layer(index, role), dtype);
    let [gate, up, down] = roles;
    Expert::new(matrix(gate)?, matrix(up)?, matrix(down)?)
        .map_err(|source| ModelError::Pack { what: format!("layer {index} {what}"), source })
}
