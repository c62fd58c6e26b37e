//! A second implementation of the whole model, as plain as it can be, on candle tensors in f32.
//!
//! The oracle for the fast one: no packing, no paging, no batching, no cache, no threads of ours; it computes a
//! whole sequence at once with quadratic attention. It shares only the checkpoint reader with the rest of the
//! crate, so that agreement means something. Bits differ from the kernels' (another order of sums); values agree
//! within float error.

use candle_core::{D, Device, IndexOp, Result as CandleResult, Tensor};
use muster_checkpoint::spec::{
    AttentionSpec, ExpertRole, GroupWorth, LatentSpec, LayerRole, Llama3Spec, MlpSpec, MoeSpec, NormKind,
    QkNorm, Renormalise, Role, RopePairs, RopeScaling, RopeSpec, Score, SharedSpec, WeightOn, YarnSpec,
};
use muster_checkpoint::{Checkpoint, Weight};
use muster_types::{Gating, Reach};

use crate::ModelError;
use crate::weights::widen;

/// The model, read weight by weight during computation: slow, but small in memory.
pub struct Reference<'a> {
    checkpoint: &'a Checkpoint,
}

/// Gate choices of one MoE layer: per token (expert, weight) in ascending expert id.
pub type LayerChoices = Vec<Vec<(u32, f32)>>;

/// Results of the reference.
pub struct ReferenceOutput {
    /// `[tokens, vocab]`, row-major.
    pub logits: Vec<f32>,
    /// Per MoE layer: its number and its choices.
    pub choices: Vec<(u32, LayerChoices)>,
    /// Per layer: the residual stream after it, `[tokens, hidden]`.
    pub hidden: Vec<Vec<f32>>,
}

impl<'a> Reference<'a> {
    /// The reference of this checkpoint.
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
        let (mut choices, mut hidden) = (Vec::new(), Vec::new());
        for (layer, index) in spec.layers.iter().zip(0u32..) {
            let weight = |role| self.read(Role::Layer(index, role));
            let norm =
                |x: &Tensor, roles: [LayerRole; 2]| self.norm(x, roles.map(|role| Role::Layer(index, role)));
            let normed = norm(&x, [LayerRole::AttentionNorm, LayerRole::AttentionNormBias])?;
            let attended = self.attention(&layer.attention, index, &normed)?;
            x = (x + (attended * f64::from(spec.residual_multiplier))?)?;
            let normed = norm(&x, [LayerRole::MlpNorm, LayerRole::MlpNormBias])?;
            let out = match &layer.mlp {
                MlpSpec::Moe(moe) => {
                    let (out, picked) = self.moe(moe, index, &normed)?;
                    choices.push((index, picked));
                    match self.shared(moe, index, &normed)? {
                        Some(shared) => (out + shared)?,
                        None => out,
                    }
                }
                MlpSpec::Dense { .. } => {
                    let [gate, up, down] = [LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown];
                    gated_mlp(&normed, &weight(gate)?, &weight(up)?, &weight(down)?)?
                }
            };
            x = (x + (out * f64::from(spec.residual_multiplier))?)?;
            hidden.push(x.flatten_all()?.to_vec1()?);
        }
        let x = self.norm(&x, [Role::FinalNorm, Role::FinalNormBias])?;
        let head = if spec.tied_head { embedding } else { self.read(Role::Head)? };
        let mut logits = linear(&x, &head)?;
        if spec.head_bias {
            logits = logits.broadcast_add(&self.read(Role::HeadBias)?)?;
        }
        let logits = (logits / f64::from(spec.logits_divisor))?;
        Ok(ReferenceOutput { logits: logits.flatten_all()?.to_vec1()?, choices, hidden })
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

    fn norm(&self, x: &Tensor, [weight, bias]: [Role; 2]) -> Result<Tensor, ModelError> {
        let spec = self.checkpoint.spec();
        let weight = self.read(weight)?;
        Ok(match spec.norm {
            NormKind::Rms => rms_norm(x, &weight, spec.norm_eps)?,
            NormKind::Layer => {
                let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
                rms_norm(&centred, &weight, spec.norm_eps)?.broadcast_add(&self.read(bias)?)?
            }
        })
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
        if let Some(latent) = &spec.latent {
            return self.latent_attention(spec, latent, layer, x);
        }
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
        if let Some(rope) = &spec.rope {
            (q, k) = (rotated(&q, rope)?, rotated(&k, rope)?);
        }
        match spec.qk_norm {
            QkNorm::None | QkNorm::PerHead | QkNorm::FullWidth => {}
            QkNorm::PerHeadRotated => {
                q = rms_norm(&q, &self.read(Role::Layer(layer, LayerRole::QNorm))?, eps)?;
                k = rms_norm(&k, &self.read(Role::Layer(layer, LayerRole::KNorm))?, eps)?;
            }
            QkNorm::UnweightedRotated => {
                let ones = Tensor::ones(spec.head_dim, q.dtype(), &Device::Cpu)?;
                (q, k) = (rms_norm(&q, &ones, eps)?, rms_norm(&k, &ones, eps)?);
            }
        }
        if let Some(temperature) = &spec.temperature {
            let factor = |position: usize| {
                let passed = ((position as f32 + 1.0) / temperature.floor).floor();
                passed.ln_1p() * temperature.scale + 1.0
            };
            let factors: Vec<f32> = (0..tokens).map(factor).collect();
            q = q.broadcast_mul(&Tensor::from_vec(factors, (tokens, 1, 1), &Device::Cpu)?)?;
        }
        let sinks = match spec.sinks {
            true => Some(self.read(Role::Layer(layer, LayerRole::Sinks))?.to_vec1::<f32>()?),
            false => None,
        };
        let mask = mask(tokens, spec.reach)?;
        let group = spec.heads / spec.kv_heads;
        let mut heads = Vec::with_capacity(spec.heads);
        for head in 0..spec.heads {
            let q = q.i((.., head))?.contiguous()?;
            let k = k.i((.., head / group))?.contiguous()?;
            let v = v.i((.., head / group))?.contiguous()?;
            let mut scores = ((q.matmul(&k.t()?.contiguous()?)? * f64::from(spec.scale))? + &mask)?;
            if let Some(sinks) = &sinks {
                let sink = Tensor::full(sinks[head], (tokens, 1), &Device::Cpu)?;
                scores = Tensor::cat(&[&scores, &sink], D::Minus1)?;
            }
            let shares = softmax(&scores)?.narrow(D::Minus1, 0, tokens)?.contiguous()?;
            heads.push(shares.matmul(&v)?);
        }
        let mixed = Tensor::cat(&heads, D::Minus1)?;
        self.projected(layer, &mixed, LayerRole::O, spec.o_bias.then_some(LayerRole::OBias))
    }

    /// Keys and values are expanded from the compressed rows, head by head.
    fn latent_attention(
        &self,
        spec: &AttentionSpec,
        latent: &LatentSpec,
        layer: u32,
        x: &Tensor,
    ) -> Result<Tensor, ModelError> {
        let weight = |role| self.read(Role::Layer(layer, role));
        let bias = |role| latent.down_bias.then_some(role);
        let (tokens, plain, turning) = (x.dim(0)?, latent.plain_dim, spec.rotated());
        let from = match latent.q_rank {
            None => x.clone(),
            Some(_) => {
                let down = self.projected(layer, x, LayerRole::QDown, bias(LayerRole::QDownBias))?;
                rms_norm(&down, &weight(LayerRole::QDownNorm)?, latent.norm_eps)?
            }
        };
        let q = linear(&from, &weight(LayerRole::Q)?)?.reshape((tokens, spec.heads, plain + turning))?;
        let q_plain = q.narrow(D::Minus1, 0, plain)?;
        let turned = |x: &Tensor| match &spec.rope {
            Some(rope) => rotated(x, rope),
            None => Ok(x.clone()),
        };
        let q_turned = turned(&q.narrow(D::Minus1, plain, turning)?)?;
        let down = self.projected(layer, x, LayerRole::KvDown, bias(LayerRole::KvDownBias))?;
        let row = down.narrow(D::Minus1, 0, latent.kv_rank)?;
        let row = rms_norm(&row, &weight(LayerRole::KvDownNorm)?, latent.norm_eps)?;
        let shared = down.narrow(D::Minus1, latent.kv_rank, turning)?.reshape((tokens, 1, turning))?;
        let shared = turned(&shared)?.squeeze(1)?;
        let kv = linear(&row, &weight(LayerRole::KvUp)?)?;
        let kv = kv.reshape((tokens, spec.heads, plain + latent.value_dim))?;
        let mask = mask(tokens, spec.reach)?;
        let mut heads = Vec::with_capacity(spec.heads);
        for head in 0..spec.heads {
            let q = Tensor::cat(&[q_plain.i((.., head))?, q_turned.i((.., head))?], D::Minus1)?;
            let kv = kv.i((.., head))?;
            let k = Tensor::cat(&[&kv.narrow(D::Minus1, 0, plain)?, &shared], D::Minus1)?;
            let v = kv.narrow(D::Minus1, plain, latent.value_dim)?.contiguous()?;
            let scores = ((q.matmul(&k.t()?.contiguous()?)? * f64::from(spec.scale))? + &mask)?;
            heads.push(softmax(&scores)?.matmul(&v)?);
        }
        let mixed = Tensor::cat(&heads, D::Minus1)?;
        self.projected(layer, &mixed, LayerRole::O, spec.o_bias.then_some(LayerRole::OBias))
    }

    fn moe(&self, spec: &MoeSpec, layer: u32, x: &Tensor) -> Result<(Tensor, LayerChoices), ModelError> {
        let bias = spec.gate.bias.then_some(LayerRole::GateBias);
        let logits = self.projected(layer, x, LayerRole::Gate, bias)?.to_vec2::<f32>()?;
        let selection_bias = match spec.gate.selection_bias {
            true => self.read(Role::Layer(layer, LayerRole::SelectionBias))?.to_vec1::<f32>()?,
            false => vec![0.0; spec.experts as usize],
        };
        let picked: LayerChoices = logits.iter().map(|row| choose(spec, row, &selection_bias)).collect();
        let mut rows: Vec<Tensor> = Vec::with_capacity(picked.len());
        for (token, choices) in picked.iter().enumerate() {
            let x = x.i(token..=token)?;
            let mut sum = x.zeros_like()?;
            for &(expert, weight) in choices {
                let weight = f64::from(weight);
                sum = match spec.weight_on {
                    WeightOn::Output => (sum + (self.expert(spec, layer, expert, &x)? * weight)?)?,
                    WeightOn::Input => (sum + self.expert(spec, layer, expert, &(&x * weight)?)?)?,
                };
            }
            rows.push(sum);
        }
        Ok((Tensor::cat(&rows, 0)?, picked))
    }

    fn expert(&self, spec: &MoeSpec, layer: u32, expert: u32, x: &Tensor) -> Result<Tensor, ModelError> {
        let linear = |x: &Tensor, weight, bias| -> Result<Tensor, ModelError> {
            let y = linear(x, &self.read(Role::Expert(layer, expert, weight))?)?;
            Ok(match spec.biases {
                true => y.broadcast_add(&self.read(Role::Expert(layer, expert, bias))?)?,
                false => y,
            })
        };
        let gate = linear(x, ExpertRole::Gate, ExpertRole::GateBias)?;
        let up = linear(x, ExpertRole::Up, ExpertRole::UpBias)?;
        let between = match spec.gating {
            Gating::Silu => (gate.silu()? * up)?,
            Gating::ClampedSwish { alpha, limit } => {
                let (gate, up) = (gate.minimum(limit)?, up.clamp(-limit, limit)?);
                let swish = (&gate / ((&gate * -f64::from(alpha))?.exp()? + 1.0)?)?;
                ((up + 1.0)? * swish)?
            }
        };
        linear(&between, ExpertRole::Down, ExpertRole::DownBias)
    }

    fn shared(&self, spec: &MoeSpec, layer: u32, x: &Tensor) -> Result<Option<Tensor>, ModelError> {
        let read = |role| self.read(Role::Layer(layer, role));
        if spec.shared == SharedSpec::None {
            return Ok(None);
        }
        let [gate, up, down] = [LayerRole::SharedGate, LayerRole::SharedUp, LayerRole::SharedDown];
        let out = gated_mlp(x, &read(gate)?, &read(up)?, &read(down)?)?;
        Ok(Some(match spec.shared {
            SharedSpec::SigmoidGated { .. } => {
                let scale = linear(x, &read(LayerRole::SharedScale)?)?;
                out.broadcast_div(&(scale.neg()?.exp()? + 1.0)?)?
            }
            SharedSpec::Add { .. } | SharedSpec::None => out,
        }))
    }
}

/// The gate's rule, restated plainly.
fn choose(spec: &MoeSpec, logits: &[f32], selection_bias: &[f32]) -> Vec<(u32, f32)> {
    let recipe = &spec.gate;
    let soft = |x: &[f32]| -> Vec<f32> {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f32> = x.iter().map(|v| (v - max).exp()).collect();
        let sum: f32 = e.iter().sum();
        e.iter().map(|v| v / sum).collect()
    };
    let scores = match recipe.score {
        Score::SoftmaxThenTopK => soft(logits),
        Score::SigmoidThenTopK => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Score::TopKThenSoftmax | Score::TopKThenSigmoid | Score::SparseMixer { .. } => logits.to_vec(),
    };
    let ranks: Vec<f32> = scores.iter().zip(selection_bias).map(|(score, bias)| score + bias).collect();
    let best_first = |ids: &mut Vec<usize>| ids.sort_by(|&a, &b| ranks[b].total_cmp(&ranks[a]));
    let mut order: Vec<usize> = (0..scores.len()).collect();
    if let Some(limit) = recipe.groups {
        let worth = |group: &[usize]| -> f32 {
            let mut group = group.to_vec();
            best_first(&mut group);
            match limit.worth {
                GroupWorth::Best => ranks[group[0]],
                GroupWorth::BestTwo => ranks[group[0]] + ranks[group[1]],
            }
        };
        let mut groups: Vec<Vec<usize>> =
            order.chunks(scores.len() / limit.groups as usize).map(<[usize]>::to_vec).collect();
        groups.sort_by(|a, b| worth(b).total_cmp(&worth(a)));
        groups.truncate(limit.kept as usize);
        order = groups.concat();
        order.sort_unstable();
    }
    best_first(&mut order);
    order.truncate(spec.top_k as usize);
    let mut weights: Vec<f32> = order.iter().map(|&expert| scores[expert]).collect();
    match recipe.score {
        Score::SoftmaxThenTopK | Score::SigmoidThenTopK => {}
        Score::TopKThenSoftmax => weights = soft(&weights),
        Score::TopKThenSigmoid => weights.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
        Score::SparseMixer { jitter } => {
            let mut left = logits.to_vec();
            for (weight, &expert) in weights.iter_mut().zip(&order) {
                let best = left[expert];
                let far = |logit: f32| (best - logit) / logit.abs().max(best) > 2.0 * jitter;
                let near = left.iter().filter(|&&logit| !far(logit));
                *weight = 1.0 / near.map(|logit| (logit - best).exp()).sum::<f32>();
                left[expert] = f32::NEG_INFINITY;
            }
        }
    }
    let sum: f32 = weights.iter().sum();
    for weight in &mut weights {
        match recipe.renormalise {
            Renormalise::None => {}
            Renormalise::Sum { plus } => *weight /= sum + plus,
            Renormalise::SumAtLeast { floor } => *weight /= sum.max(floor),
        }
        *weight *= recipe.scale;
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

/// Attention mask: zero at visible positions, minus infinity elsewhere.
fn mask(tokens: usize, reach: Reach) -> CandleResult<Tensor> {
    let seen = |query: usize, key: usize| match reach {
        Reach::All => key <= query,
        Reach::Last(window) => key <= query && query - key < window.get() as usize,
        Reach::Chunk(length) => key <= query && query / length.get() as usize == key / length.get() as usize,
    };
    let values: Vec<f32> = (0..tokens * tokens)
        .map(|at| if seen(at / tokens, at % tokens) { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(values, (tokens, tokens), &Device::Cpu)
}

/// `[tokens, heads, head_dim]` with the pairs among the first elements of every head turned by position *
/// theta^(-2i/dim), where `rope` may scale that frequency.
fn rotated(x: &Tensor, rope: &RopeSpec) -> CandleResult<Tensor> {
    let (tokens, heads, head_dim) = x.dims3()?;
    let (dim, half) = (rope.dim, rope.dim / 2);
    let frequency = |i: usize| {
        let plain = 1.0 / rope.theta.powf(2.0 * i as f64 / dim as f64);
        let scaled = match &rope.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain / factor,
            RopeScaling::Yarn(yarn) => yarn_stretched(plain, i, rope, yarn),
            RopeScaling::Llama3(scaling) => llama3_stretched(plain, scaling),
            RopeScaling::Each { divisors, .. } => plain / f64::from(divisors[i]),
        };
        scaled as f32
    };
    let amplitude = f64::from(match &rope.scaling {
        RopeScaling::Yarn(yarn) => yarn.amplitude,
        RopeScaling::Each { amplitude, .. } => *amplitude,
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3(_) => 1.0,
    });
    let angles: Vec<f32> =
        (0..tokens).flat_map(|position| (0..half).map(move |i| position as f32 * frequency(i))).collect();
    let angles = Tensor::from_vec(angles, (tokens, 1, half), &Device::Cpu)?;
    let (cos, sin) = ((angles.cos()? * amplitude)?, (angles.sin()? * amplitude)?);
    let turning = x.narrow(D::Minus1, 0, dim)?;
    // Pairs lie in the second-to-last dimension, or in the last.
    let (shape, of_pair) = match rope.pairs {
        RopePairs::Halves => ((tokens, heads, 2, half), 2),
        RopePairs::Neighbours => ((tokens, heads, half, 2), 3),
    };
    let pairs = turning.reshape(shape)?;
    let (a, b) =
        (pairs.narrow(of_pair, 0, 1)?.squeeze(of_pair)?, pairs.narrow(of_pair, 1, 1)?.squeeze(of_pair)?);
    let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let turned = Tensor::stack(&[left, right], of_pair)?.reshape((tokens, heads, dim))?;
    Tensor::cat(&[turned, x.narrow(D::Minus1, dim, head_dim - dim)?], D::Minus1)
}

/// A frequency scaled by YaRN: a mix of itself and itself divided, by its turns in the original context.
fn yarn_stretched(frequency: f64, i: usize, rope: &RopeSpec, yarn: &YarnSpec) -> f64 {
    let place = |turns: f64| {
        let wavelength = yarn.original_context as f64 / turns;
        rope.dim as f64 * (wavelength / std::f64::consts::TAU).ln() / (2.0 * rope.theta.ln())
    };
    let round = |x: f64, whole: f64| if yarn.truncate { whole } else { x };
    let (low, high) = (place(yarn.beta_fast), place(yarn.beta_slow));
    let low = round(low, low.floor()).max(0.0);
    let high = round(high, high.ceil()).min(rope.dim as f64 - 1.0);
    let width = if low == high { 0.001 } else { high - low };
    let part = ((i as f64 - low) / width).clamp(0.0, 1.0);
    frequency * (1.0 - part) + frequency / yarn.factor * part
}

/// A frequency scaled as in Llama 3, by its turns in the original context.
fn llama3_stretched(frequency: f64, scaling: &Llama3Spec) -> f64 {
    let turns = scaling.original_context as f64 * frequency / std::f64::consts::TAU;
    if turns < scaling.low {
        frequency / scaling.factor
    } else if turns > scaling.high || scaling.low == scaling.high {
        frequency
    } else {
        let kept = (turns - scaling.low) / (scaling.high - scaling.low);
        frequency / scaling.factor * (1.0 - kept) + frequency * kept
    }
}
