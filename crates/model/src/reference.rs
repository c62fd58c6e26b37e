//! A second implementation of the whole model, as plain as it can be, on candle tensors in f32.
//!
//! The oracle for the fast one: no packing, no paging, no batching, no cache, no threads of ours; it computes a
//! whole sequence at once with quadratic attention. It shares only the checkpoint reader with the rest of the
//! crate, so that agreement means something. Bits differ from the kernels' (another order of sums); values agree
//! within float error.

use candle_core::{D, Device, IndexOp, Result as CandleResult, Tensor};
use muster_checkpoint::spec::{
    AttentionSpec, ExpertRole, LayerRole, MlpSpec, MoeSpec, QkNorm, Renormalise, Role, Score,
};
use muster_checkpoint::{Checkpoint, Weight};

use crate::ModelError;
use crate::weights::widen;

/// The model, read weight by weight as it computes: slow, and needs little memory.
pub struct Reference<'a> {
    checkpoint: &'a Checkpoint,
}

/// Router choices of one MoE layer: per token (expert, weight) in ascending expert id.
pub type LayerChoices = Vec<Vec<(u32, f32)>>;

/// What the reference computed.
pub struct ReferenceOutput {
    /// `[tokens, vocab]`, row-major.
    pub logits: Vec<f32>,
    /// Per MoE layer: its number and its choices.
    pub choices: Vec<(u32, LayerChoices)>,
}

impl<'a> Reference<'a> {
    /// Of this checkpoint.
    #[must_use]
    pub const fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint }
    }

    /// Logits of every position of one sequence.
    ///
    /// # Errors
    /// When `tokens` is empty or names a token the model lacks, or a weight cannot be read.
    pub fn forward(&self, tokens: &[u32]) -> Result<ReferenceOutput, ModelError> {
        let spec = self.checkpoint.spec();
        if tokens.is_empty() {
            return Err(ModelError::Input("the token list is empty".into()));
        }
        if let Some(bad) = tokens.iter().find(|&&id| id >= spec.vocab) {
            return Err(ModelError::Input(format!(
                "token id {bad} is out of range: the vocabulary has {}",
                spec.vocab
            )));
        }
        let embedding = self.read(Role::Embedding)?;
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        let mut x = (embedding.index_select(&ids, 0)? * f64::from(spec.embedding_multiplier))?;
        let mut choices = Vec::new();
        for (layer, index) in spec.layers.iter().zip(0u32..) {
            let weight = |role| self.read(Role::Layer(index, role));
            let normed = rms_norm(&x, &weight(LayerRole::AttentionNorm)?, spec.norm_eps)?;
            let attended = self.attention(&layer.attention, index, &normed)?;
            x = (x + (attended * f64::from(spec.residual_multiplier))?)?;
            let normed = rms_norm(&x, &weight(LayerRole::MlpNorm)?, spec.norm_eps)?;
            let out = match &layer.mlp {
                MlpSpec::Moe(moe) => {
                    let (out, picked) = self.moe(moe, index, &normed)?;
                    choices.push((index, picked));
                    out
                }
                MlpSpec::Dense { .. } => {
                    let [gate, up, down] = [LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown];
                    gated_mlp(&normed, &weight(gate)?, &weight(up)?, &weight(down)?)?
                }
            };
            x = (x + (out * f64::from(spec.residual_multiplier))?)?;
        }
        let x = rms_norm(&x, &self.read(Role::FinalNorm)?, spec.norm_eps)?;
        let head = if spec.tied_head { embedding } else { self.read(Role::Head)? };
        let logits = (linear(&x, &head)? / f64::from(spec.logits_divisor))?;
        Ok(ReferenceOutput { logits: logits.flatten_all()?.to_vec1()?, choices })
    }

    fn read(&self, role: Role) -> Result<Tensor, ModelError> {
        let Weight { rows, cols, data } = self.checkpoint.read(role)?;
        let values = widen(data);
        let tensor = if cols == 1 {
            Tensor::from_vec(values, rows, &Device::Cpu)
        } else {
            Tensor::from_vec(values, (rows, cols), &Device::Cpu)
        };
        Ok(tensor?)
    }

    fn projected(
        &self,
        layer: u32,
        x: &Tensor,
        weight: LayerRole,
        bias: Option<LayerRole>,
    ) -> Result<Tensor, ModelError> {
        let y = linear(x, &self.read(Role::Layer(layer, weight))?)?;
        Ok(match bias {
            Some(bias) => y.broadcast_add(&self.read(Role::Layer(layer, bias))?)?,
            None => y,
        })
    }

    fn attention(&self, spec: &AttentionSpec, layer: u32, x: &Tensor) -> Result<Tensor, ModelError> {
        let bias = |role| spec.qkv_bias.then_some(role);
        let mut q = self.projected(layer, x, LayerRole::Q, bias(LayerRole::QBias))?;
        let mut k = self.projected(layer, x, LayerRole::K, bias(LayerRole::KBias))?;
        let mut v = self.projected(layer, x, LayerRole::V, bias(LayerRole::VBias))?;
        let eps = self.checkpoint.spec().norm_eps;
        if spec.qk_norm == QkNorm::FullWidth {
            q = rms_norm(&q, &self.read(Role::Layer(layer, LayerRole::QNorm))?, eps)?;
            k = rms_norm(&k, &self.read(Role::Layer(layer, LayerRole::KNorm))?, eps)?;
        }
        if let Some(limit) = spec.clip_qkv {
            for x in [&mut q, &mut k, &mut v] {
                *x = x.clamp(-limit, limit)?;
            }
        }
        let tokens = x.dim(0)?;
        let mut q = q.reshape((tokens, spec.heads, spec.head_dim))?;
        let mut k = k.reshape((tokens, spec.kv_heads, spec.head_dim))?;
        let v = v.reshape((tokens, spec.kv_heads, spec.head_dim))?;
        if spec.qk_norm == QkNorm::PerHead {
            q = rms_norm(&q, &self.read(Role::Layer(layer, LayerRole::QNorm))?, eps)?;
            k = rms_norm(&k, &self.read(Role::Layer(layer, LayerRole::KNorm))?, eps)?;
        }
        let (q, k) = (rotated(&q, spec)?, rotated(&k, spec)?);
        let mask = mask(tokens, spec.window)?;
        let group = spec.heads / spec.kv_heads;
        let mut heads = Vec::with_capacity(spec.heads);
        for head in 0..spec.heads {
            let q = q.i((.., head))?.contiguous()?;
            let k = k.i((.., head / group))?.contiguous()?;
            let v = v.i((.., head / group))?.contiguous()?;
            let scores = ((q.matmul(&k.t()?.contiguous()?)? * f64::from(spec.scale))? + &mask)?;
            heads.push(softmax(&scores)?.matmul(&v)?);
        }
        let mixed = Tensor::cat(&heads, D::Minus1)?;
        self.projected(layer, &mixed, LayerRole::O, spec.o_bias.then_some(LayerRole::OBias))
    }

    fn moe(&self, spec: &MoeSpec, layer: u32, x: &Tensor) -> Result<(Tensor, LayerChoices), ModelError> {
        let logits = linear(x, &self.read(Role::Layer(layer, LayerRole::Gate))?)?.to_vec2::<f32>()?;
        let picked: LayerChoices = logits.iter().map(|row| choose(spec, row)).collect();
        let mut rows: Vec<Tensor> = Vec::with_capacity(picked.len());
        for (token, choices) in picked.iter().enumerate() {
            let x = x.i(token..=token)?;
            let mut sum = x.zeros_like()?;
            for &(expert, weight) in choices {
                let read = |role| self.read(Role::Expert(layer, expert, role));
                let [gate, up, down] = [ExpertRole::Gate, ExpertRole::Up, ExpertRole::Down];
                let y = gated_mlp(&x, &read(gate)?, &read(up)?, &read(down)?)?;
                sum = (sum + (y * f64::from(weight))?)?;
            }
            rows.push(sum);
        }
        Ok((Tensor::cat(&rows, 0)?, picked))
    }
}

/// The gate's rule once more, the long way round.
fn choose(spec: &MoeSpec, logits: &[f32]) -> Vec<(u32, f32)> {
    let soft = |x: &[f32]| -> Vec<f32> {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f32> = x.iter().map(|v| (v - max).exp()).collect();
        let sum: f32 = e.iter().sum();
        e.iter().map(|v| v / sum).collect()
    };
    let scores = match spec.gate.score {
        Score::SoftmaxThenTopK => soft(logits),
        Score::TopKThenSoftmax => logits.to_vec(),
    };
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(spec.top_k as usize);
    let mut weights: Vec<f32> = order.iter().map(|&expert| scores[expert]).collect();
    if spec.gate.score == Score::TopKThenSoftmax {
        weights = soft(&weights);
    }
    if spec.gate.renormalise == Renormalise::Sum {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
    let mut choices: Vec<(u32, f32)> = order.iter().map(|&expert| expert as u32).zip(weights).collect();
    choices.sort_by_key(|&(expert, _)| expert);
    choices
}

fn linear(x: &Tensor, weight: &Tensor) -> CandleResult<Tensor> {
    x.matmul(&weight.t()?)
}

fn gated_mlp(x: &Tensor, gate: &Tensor, up: &Tensor, down: &Tensor) -> CandleResult<Tensor> {
    linear(&(linear(x, gate)?.silu()? * linear(x, up)?)?, down)
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> CandleResult<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)
}

fn softmax(scores: &Tensor) -> CandleResult<Tensor> {
    let shifted = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)
}

/// Zero where a query may look, minus infinity where not.
fn mask(tokens: usize, window: Option<usize>) -> CandleResult<Tensor> {
    let window = window.unwrap_or(tokens);
    let seen = |query: usize, key: usize| key <= query && query - key < window;
    let values: Vec<f32> = (0..tokens * tokens)
        .map(|at| if seen(at / tokens, at % tokens) { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(values, (tokens, tokens), &Device::Cpu)
}

/// `[tokens, heads, head_dim]` with element i and i + head_dim/2 of every head turned by position * theta^(-2i/dim).
fn rotated(x: &Tensor, spec: &AttentionSpec) -> CandleResult<Tensor> {
    let (tokens, _, dim) = x.dims3()?;
    let half = dim / 2;
    let frequency = |i: usize| (1.0 / spec.rope.theta.powf(2.0 * i as f64 / dim as f64)) as f32;
    let angles: Vec<f32> =
        (0..tokens).flat_map(|position| (0..half).map(move |i| position as f32 * frequency(i))).collect();
    let angles = Tensor::from_vec(angles, (tokens, 1, half), &Device::Cpu)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[left, right], D::Minus1)
}
