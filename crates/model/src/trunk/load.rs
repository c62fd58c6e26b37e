//! A checkpoint's trunk weights, read and packed.

use muster_checkpoint::Checkpoint;
use muster_checkpoint::spec::{
    self, AttentionSpec, LatentSpec, LayerRole, LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormKind, QkNorm,
    Role, RopeSpec, SharedSpec,
};
use muster_kernels::{Expert, KernelError, Llama3, Rope, RopePairs, RopeScaling, Yarn};
use muster_types::{Compute, WeightDType};

use super::attention::{Attention, Heads, Projection, Source};
use super::latent::Latent;
use super::moe::{Moe, Shared};
use super::norm::Norm;
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
        let mut ropes = Vec::new();
        let layers = spec
            .layers
            .iter()
            .zip(0u32..)
            .map(|(layer, index)| load_layer(&mut loader, &spec, layer, index, &mut ropes, dtype))
            .collect::<Result<Vec<_>, _>>()?;
        let final_norm = load_norm(&mut loader, &spec, [Role::FinalNorm, Role::FinalNormBias])?;
        let head = if spec.tied_head { None } else { Some(loader.matrix_as(Role::Head, dtype)?) };
        let head_bias = loader.vector_if(spec.head_bias, Role::HeadBias)?;
        let bytes = embedding.bytes()
            + head.as_ref().map_or(0, |head| head.bytes())
            + layers.iter().map(Layer::bytes).sum::<usize>();
        let kv_groups = crate::kv::groups(spec.layers.iter().map(|layer| layer.attention.sees));
        let bytes = bytes as u64;
        Ok(Self {
            spec,
            kv_groups,
            compute,
            dtype,
            embedding,
            ropes,
            layers,
            final_norm,
            head,
            head_bias,
            bytes,
        })
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        let mlp = match &self.mlp {
            Mlp::Moe(moe) => moe.bytes(),
            Mlp::Dense(expert) => expert.bytes(),
        };
        self.attention.bytes() + mlp
    }
}

fn load_norm(
    loader: &mut Loader<'_>,
    spec: &ModelSpec,
    [weight, bias]: [Role; 2],
) -> Result<Norm, ModelError> {
    let weight = loader.vector(weight)?;
    let bias = loader.vector_if(spec.norm == NormKind::Layer, bias)?;
    Ok(Norm { weight, bias, eps: spec.norm_eps })
}

/// `ropes` are the rotary embeddings of the layers before, to which a new one is added.
fn load_layer(
    loader: &mut Loader<'_>,
    model: &ModelSpec,
    spec: &LayerSpec,
    index: u32,
    ropes: &mut Vec<Rope>,
    dtype: WeightDType,
) -> Result<Layer, ModelError> {
    let role = |role| Role::Layer(index, role);
    let attention = &spec.attention;
    let source = match &attention.latent {
        None => Source::Heads(Box::new(load_heads(loader, attention, index, dtype)?)),
        Some(latent) => Source::Latent(Box::new(load_latent(loader, attention, latent, index, dtype)?)),
    };
    let o = projection(loader, index, [LayerRole::O, LayerRole::OBias], attention.o_bias, dtype)?;
    let mlp = match &spec.mlp {
        MlpSpec::Moe(moe) => Mlp::Moe(Box::new(load_moe(loader, moe, index, dtype)?)),
        MlpSpec::Dense { .. } => {
            let roles = [LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown];
            Mlp::Dense(Box::new(load_mlp(loader, index, roles, "dense MLP", dtype)?))
        }
    };
    let rope = match &attention.rope {
        None => None,
        Some(spec) => {
            let rope = rope(spec)?;
            let known = ropes.iter().position(|known| *known == rope);
            Some(known.unwrap_or_else(|| {
                ropes.push(rope);
                ropes.len() - 1
            }))
        }
    };
    Ok(Layer {
        attention: Attention {
            norm: load_norm(
                loader,
                model,
                [LayerRole::AttentionNorm, LayerRole::AttentionNormBias].map(role),
            )?,
            source,
            rope,
            sinks: loader.vector_if(attention.sinks, role(LayerRole::Sinks))?,
            spec: attention.clone(),
            o,
        },
        mlp_norm: load_norm(loader, model, [LayerRole::MlpNorm, LayerRole::MlpNormBias].map(role))?,
        mlp,
    })
}

fn projection(
    loader: &mut Loader<'_>,
    index: u32,
    [weight, bias]: [LayerRole; 2],
    has_bias: bool,
    dtype: WeightDType,
) -> Result<Projection, ModelError> {
    let weight = loader.matrix_as(Role::Layer(index, weight), dtype)?;
    Ok(Projection { weight, bias: loader.vector_if(has_bias, Role::Layer(index, bias))? })
}

fn load_heads(
    loader: &mut Loader<'_>,
    spec: &AttentionSpec,
    index: u32,
    dtype: WeightDType,
) -> Result<Heads, ModelError> {
    let mut qkv = |roles| projection(loader, index, roles, spec.qkv_bias, dtype);
    let q = qkv([LayerRole::Q, LayerRole::QBias])?;
    let k = qkv([LayerRole::K, LayerRole::KBias])?;
    let v = qkv([LayerRole::V, LayerRole::VBias])?;
    let mut norm = |role| match spec.qk_norm {
        QkNorm::None => Ok(None),
        // Times one changes no bit.
        QkNorm::UnweightedRotated => Ok(Some(vec![1.0; spec.head_dim])),
        QkNorm::PerHead | QkNorm::FullWidth | QkNorm::PerHeadRotated => {
            loader.vector(Role::Layer(index, role)).map(Some)
        }
    };
    let (q_norm, k_norm) = (norm(LayerRole::QNorm)?, norm(LayerRole::KNorm)?);
    Ok(Heads { q, k, v, q_norm, k_norm })
}

fn load_latent(
    loader: &mut Loader<'_>,
    spec: &AttentionSpec,
    latent: &LatentSpec,
    index: u32,
    dtype: WeightDType,
) -> Result<Latent, ModelError> {
    let role = |role| Role::Layer(index, role);
    let LatentSpec { q_rank, kv_rank, plain_dim, value_dim, down_bias, .. } = *latent;
    let q_down = match q_rank {
        None => None,
        Some(_) => {
            let roles = [LayerRole::QDown, LayerRole::QDownBias];
            let down = projection(loader, index, roles, down_bias, dtype)?;
            Some((down, loader.vector(role(LayerRole::QDownNorm))?))
        }
    };
    let q = Projection { weight: loader.matrix_as(role(LayerRole::Q), dtype)?, bias: None };
    let kv_down = projection(loader, index, [LayerRole::KvDown, LayerRole::KvDownBias], down_bias, dtype)?;
    let kv_norm = loader.vector(role(LayerRole::KvDownNorm))?;
    // Per head first the rows that make a key, then those that make a value.
    let first_row = move |head: usize| head * (plain_dim + value_dim);
    let up = role(LayerRole::KvUp);
    let absorb = (0..spec.heads).map(|head| {
        (kv_rank, plain_dim, move |row: usize, col: usize| (first_row(head) + col) * kv_rank + row)
    });
    let absorb = loader.parts_as(up, absorb, dtype)?;
    let values = (0..spec.heads).map(|head| {
        (value_dim, kv_rank, move |row: usize, col: usize| {
            (first_row(head) + plain_dim + row) * kv_rank + col
        })
    });
    let values = loader.parts_as(up, values, dtype)?;
    Ok(Latent { spec: *latent, q_down, q, kv_down, kv_norm, absorb, values })
}

fn rope(spec: &RopeSpec) -> Result<Rope, KernelError> {
    let pairs = match spec.pairs {
        spec::RopePairs::Halves => RopePairs::Halves,
        spec::RopePairs::Neighbours => RopePairs::Neighbours,
    };
    let scaling = match &spec.scaling {
        spec::RopeScaling::None => RopeScaling::None,
        spec::RopeScaling::Linear { factor } => RopeScaling::Linear(*factor),
        spec::RopeScaling::Yarn(yarn) => RopeScaling::Yarn(Yarn {
            factor: yarn.factor,
            original_context: yarn.original_context as f64,
            beta_fast: yarn.beta_fast,
            beta_slow: yarn.beta_slow,
            truncate: yarn.truncate,
            amplitude: yarn.amplitude,
        }),
        spec::RopeScaling::Llama3(scaling) => RopeScaling::Llama3(Llama3 {
            factor: scaling.factor,
            original_context: scaling.original_context as f64,
            low: scaling.low,
            high: scaling.high,
        }),
        spec::RopeScaling::Each { divisors, amplitude } => {
            RopeScaling::Each { divisors, amplitude: *amplitude }
        }
    };
    Rope::new(spec.theta, spec.dim, pairs, &scaling)
}

fn load_moe(
    loader: &mut Loader<'_>,
    spec: &MoeSpec,
    index: u32,
    dtype: WeightDType,
) -> Result<Moe, ModelError> {
    let role = |role| Role::Layer(index, role);
    let gate = Projection {
        weight: loader.gate(role(LayerRole::Gate))?,
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
