//! Loading of a checkpoint's trunk weights: read, packed and uploaded to the device.

use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_checkpoint::spec::{
    self, AttentionSpec, LatentSpec, LayerRole, LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormKind, QkNorm,
    Role, RopeSpec, SharedSpec,
};
use muster_engine::reach::LayerGroups;
use muster_kernels::{Expert, KernelError, Llama3, Matrix, Rope, RopePairs, RopeScaling, Yarn};
use muster_types::WeightDType;

use super::attention::{Attention, Heads, Source};
use super::device::{Device, Gate, Norm, Projection};
use super::latent::Latent;
use super::moe::{Moe, Shared};
use super::{Layer, Mlp, Trunk};
use crate::weights::Loader;
use crate::{LoadProgress, ModelError};

impl<D: Device> Trunk<D> {
    /// Reads, checks and packs everything but the routed experts. `dtype` is that of the linears: attention's
    /// projections, dense MLPs and the head, which may be the embedding too. Gates choose experts and are not
    /// quantised.
    ///
    /// # Errors
    /// When bytes are unreadable or not finite, or the device is out of memory.
    pub fn load(
        device: &Arc<D>,
        checkpoint: &Checkpoint,
        dtype: WeightDType,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let spec = checkpoint.spec().clone();
        let trunk_roles = checkpoint.roles().filter(|role| !matches!(role, Role::Expert(..)));
        let loader = Loader::new(checkpoint, device.compute(), trunk_roles, progress);
        let mut loading = Loading { device: &**device, loader, dtype, bytes: 0, ropes: Vec::new() };
        let embedded = if spec.tied_head { dtype } else { WeightDType::Native };
        let embedding = loading.matrix_as(Role::Embedding, embedded)?;
        let layers = spec.layers.iter().zip(0u32..);
        let layers = layers.map(|(layer, index)| loading.layer(&spec, layer, index));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let final_norm = loading.norm(&spec, [Role::FinalNorm, Role::FinalNormBias])?;
        let head = if spec.tied_head { None } else { Some(loading.matrix(Role::Head)?) };
        let head_bias = loading.vector_if(spec.head_bias, Role::HeadBias)?;
        let kv_groups = LayerGroups::of(spec.layers.iter().map(|layer| layer.attention.reach));
        let Loading { bytes, ropes, .. } = loading;
        Ok(Self {
            device: Arc::clone(device),
            spec,
            kv_groups,
            dtype,
            embedding,
            ropes,
            layers,
            final_norm,
            head,
            head_bias,
            bytes: bytes as u64,
        })
    }
}

/// State of a load.
struct Loading<'a, D> {
    device: &'a D,
    loader: Loader<'a>,
    /// Dtype of linears.
    dtype: WeightDType,
    /// Bytes of packed weights so far.
    bytes: usize,
    /// The rotary embeddings of the layers so far, each once.
    ropes: Vec<Rope>,
}

impl<D: Device> Loading<'_, D> {
    fn place(&mut self, packed: Matrix) -> Result<D::Matrix, ModelError> {
        self.bytes += packed.bytes();
        Ok(self.device.matrix(packed)?)
    }

    fn matrix_as(&mut self, role: Role, dtype: WeightDType) -> Result<D::Matrix, ModelError> {
        let packed = self.loader.matrix_as(role, dtype)?;
        self.place(packed)
    }

    fn matrix(&mut self, role: Role) -> Result<D::Matrix, ModelError> {
        self.matrix_as(role, self.dtype)
    }

    /// Matrices from parts of a stored one, as by [`Loader::parts_as`].
    fn parts(
        &mut self,
        role: Role,
        parts: impl Iterator<Item = (usize, usize, impl Fn(usize, usize) -> usize)>,
    ) -> Result<Vec<D::Matrix>, ModelError> {
        let packed = self.loader.parts_as(role, parts, self.dtype)?;
        packed.into_iter().map(|part| self.place(part)).collect()
    }

    fn vector(&mut self, role: Role) -> Result<D::Vector, ModelError> {
        let values = self.loader.vector(role)?;
        Ok(self.device.vector(values)?)
    }

    /// A vector that the model may lack.
    fn vector_if(&mut self, present: bool, role: Role) -> Result<Option<D::Vector>, ModelError> {
        present.then(|| self.vector(role)).transpose()
    }

    fn norm(&mut self, spec: &ModelSpec, [weight, bias]: [Role; 2]) -> Result<Norm<D>, ModelError> {
        let weight = self.vector(weight)?;
        let bias = self.vector_if(spec.norm == NormKind::Layer, bias)?;
        Ok(Norm { weight, bias, eps: spec.norm_eps })
    }

    fn projection(
        &mut self,
        index: u32,
        [weight, bias]: [LayerRole; 2],
        has_bias: bool,
    ) -> Result<Projection<D>, ModelError> {
        let weight = self.matrix(Role::Layer(index, weight))?;
        Ok(Projection { weight, bias: self.vector_if(has_bias, Role::Layer(index, bias))? })
    }

    fn layer(&mut self, model: &ModelSpec, spec: &LayerSpec, index: u32) -> Result<Layer<D>, ModelError> {
        let role = |role| Role::Layer(index, role);
        let attention = &spec.attention;
        let source = match &attention.latent {
            None => Source::Heads(Box::new(self.heads(attention, model.norm_eps, index)?)),
            Some(latent) => Source::Latent(Box::new(self.latent(attention, latent, index)?)),
        };
        let o = self.projection(index, [LayerRole::O, LayerRole::OBias], attention.o_bias)?;
        let mlp = match &spec.mlp {
            MlpSpec::Moe(moe) => Mlp::Moe(Box::new(self.moe(moe, index)?)),
            MlpSpec::Dense { .. } => {
                let roles = [LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown];
                Mlp::Dense(Box::new(self.mlp(index, roles, "dense MLP")?))
            }
        };
        let rope = attention.rope.as_ref().map(|spec| self.rope(spec)).transpose()?;
        let attention_norm = [LayerRole::AttentionNorm, LayerRole::AttentionNormBias].map(role);
        Ok(Layer {
            attention: Attention {
                norm: self.norm(model, attention_norm)?,
                source,
                rope,
                sinks: self.vector_if(attention.sinks, role(LayerRole::Sinks))?,
                spec: attention.clone(),
                o,
            },
            mlp_norm: self.norm(model, [LayerRole::MlpNorm, LayerRole::MlpNormBias].map(role))?,
            mlp,
        })
    }

    /// The index of a rotary embedding in `ropes`.
    fn rope(&mut self, spec: &RopeSpec) -> Result<usize, ModelError> {
        let rope = rope(spec)?;
        let known = self.ropes.iter().position(|known| *known == rope);
        Ok(known.unwrap_or_else(|| {
            self.ropes.push(rope);
            self.ropes.len() - 1
        }))
    }

    fn heads(&mut self, spec: &AttentionSpec, norm_eps: f32, index: u32) -> Result<Heads<D>, ModelError> {
        let mut qkv = |roles| self.projection(index, roles, spec.qkv_bias);
        let q = qkv([LayerRole::Q, LayerRole::QBias])?;
        let k = qkv([LayerRole::K, LayerRole::KBias])?;
        let v = qkv([LayerRole::V, LayerRole::VBias])?;
        let norms = match spec.qk_norm {
            QkNorm::None => None,
            QkNorm::UnweightedRotated => {
                // Multiplying by one changes no bit.
                let ones = || self.device.vector(vec![1.0; spec.head_dim]);
                Some([ones()?, ones()?])
            }
            QkNorm::PerHead | QkNorm::FullWidth | QkNorm::PerHeadRotated => {
                let mut norm = |role| self.vector(Role::Layer(index, role));
                Some([norm(LayerRole::QNorm)?, norm(LayerRole::KNorm)?])
            }
        };
        Ok(Heads { q, k, v, norms, norm_eps })
    }

    fn latent(
        &mut self,
        spec: &AttentionSpec,
        latent: &LatentSpec,
        index: u32,
    ) -> Result<Latent<D>, ModelError> {
        let role = |role| Role::Layer(index, role);
        let LatentSpec { q_rank, kv_rank, plain_dim, value_dim, down_bias, .. } = *latent;
        let q_down = match q_rank {
            None => None,
            Some(_) => {
                let down = self.projection(index, [LayerRole::QDown, LayerRole::QDownBias], down_bias)?;
                Some((down, self.vector(role(LayerRole::QDownNorm))?))
            }
        };
        let q = Projection { weight: self.matrix(role(LayerRole::Q))?, bias: None };
        let kv_down = self.projection(index, [LayerRole::KvDown, LayerRole::KvDownBias], down_bias)?;
        let kv_norm = self.vector(role(LayerRole::KvDownNorm))?;
        // Each head has first the rows for keys, then those for values.
        let first_row = move |head: usize| head * (plain_dim + value_dim);
        let up = role(LayerRole::KvUp);
        let absorb = (0..spec.heads).map(|head| {
            (kv_rank, plain_dim, move |row: usize, col: usize| (first_row(head) + col) * kv_rank + row)
        });
        let absorb = self.parts(up, absorb)?;
        let values = (0..spec.heads).map(|head| {
            (value_dim, kv_rank, move |row: usize, col: usize| {
                (first_row(head) + plain_dim + row) * kv_rank + col
            })
        });
        let values = self.parts(up, values)?;
        Ok(Latent { spec: *latent, q_down, q, kv_down, kv_norm, absorb, values })
    }

    fn moe(&mut self, spec: &MoeSpec, index: u32) -> Result<Moe<D>, ModelError> {
        let role = |role| Role::Layer(index, role);
        let gate = self.loader.gate(role(LayerRole::Gate))?;
        let projection = Projection {
            weight: self.place(gate)?,
            bias: self.vector_if(spec.gate.bias, role(LayerRole::GateBias))?,
        };
        let has_selection_bias = spec.gate.selection_bias;
        let selection_bias = self.loader.vector_if(has_selection_bias, role(LayerRole::SelectionBias))?;
        let shared = match spec.shared {
            SharedSpec::None => None,
            SharedSpec::Add { .. } | SharedSpec::SigmoidGated { .. } => {
                let roles = [LayerRole::SharedGate, LayerRole::SharedUp, LayerRole::SharedDown];
                let mlp = self.mlp(index, roles, "shared expert")?;
                let gated = matches!(spec.shared, SharedSpec::SigmoidGated { .. });
                let scale = role(LayerRole::SharedScale);
                let scale = gated.then(|| self.matrix_as(scale, WeightDType::Native)).transpose()?;
                Some(Shared { mlp, scale })
            }
        };
        let gate = Gate {
            projection,
            selection_bias: selection_bias.unwrap_or_default(),
            recipe: spec.gate,
            experts: spec.experts,
            top_k: spec.top_k,
        };
        Ok(Moe { gate, weight_on: spec.weight_on, shared })
    }

    fn mlp(&mut self, index: u32, roles: [LayerRole; 3], what: &str) -> Result<D::Mlp, ModelError> {
        let mut matrix = |role| self.loader.matrix_as(Role::Layer(index, role), self.dtype);
        let [gate, up, down] = roles;
        let packed = Expert::new(matrix(gate)?, matrix(up)?, matrix(down)?)
            .map_err(|source| ModelError::Pack { what: format!("layer {index} {what}"), source })?;
        self.bytes += packed.bytes();
        Ok(self.device.mlp(packed)?)
    }
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
