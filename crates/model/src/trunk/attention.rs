//! One layer's attention: project, norm, clip, rotate, norm, cache, attend, project back.

use muster_checkpoint::spec::{self, AttentionSpec, QkNorm, Temperature};
use muster_kernels::{
    Angles, AttentionShape, Cpu, KvSlot, Matrix, Precision, Sees, attention, linear, rms_norm_in_place,
    rotate,
};

use super::latent::{self, Latent};
use super::norm::Norm;
use super::{StepContext, Trunk};
use crate::experts::precision;

/// Weights of one layer's attention.
pub(super) struct Attention {
    pub(super) spec: AttentionSpec,
    pub(super) norm: Norm,
    pub(super) source: Source,
    pub(super) o: Projection,
    /// Number of its rotary embedding in the trunk.
    pub(super) rope: Option<usize>,
    /// A score per query head that brings no value.
    pub(super) sinks: Option<Vec<f32>>,
}

/// Where queries, keys and values come from.
pub(super) enum Source {
    /// Each from its own projection.
    Heads(Box<Heads>),
    /// From compressed rows.
    Latent(Box<Latent>),
}

/// Projections of heads.
pub(super) struct Heads {
    pub(super) q: Projection,
    pub(super) k: Projection,
    pub(super) v: Projection,
    pub(super) q_norm: Option<Vec<f32>>,
    pub(super) k_norm: Option<Vec<f32>>,
}

/// A linear layer with a bias where the model has one.
pub(super) struct Projection {
    pub(super) weight: Matrix,
    pub(super) bias: Option<Vec<f32>>,
}

/// Buffers of one lane.
#[derive(Default)]
pub(super) struct Buffers {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) mixed: Vec<f32>,
    pub(super) latent: latent::Buffers,
    out: Vec<f32>,
}

impl Attention {
    /// `[rows, hidden]` normed and rounded in, `[rows, hidden]` out, before the residual multiplier. `layer` is its number
    /// in its group, `slots` has the tables of that group.
    #[expect(clippy::too_many_arguments, reason = "one call site; a struct would only rename the same seven")]
    pub(super) fn run<'b>(
        &self,
        trunk: &Trunk,
        ctx: &mut StepContext<'_>,
        layer: usize,
        x: &[f32],
        slots: &[KvSlot<'_>],
        angles: &[Angles],
        buffers: &'b mut Buffers,
    ) -> &'b [f32] {
        let precision = precision(trunk.compute);
        match &self.source {
            Source::Heads(heads) => heads.project(ctx.cpu, trunk, &self.spec, x, buffers),
            Source::Latent(latent) => latent.project(ctx.cpu, trunk, &self.spec, x, buffers),
        }
        let Buffers { q, k, v, mixed, .. } = &mut *buffers;
        if let Some(angles) = self.rope.and_then(|rope| angles.get(rope)) {
            rotate(angles, q, self.spec.head_dim);
            rotate(angles, k, self.spec.head_dim);
        }
        if let Source::Heads(heads) = &self.source
            && matches!(self.spec.qk_norm, QkNorm::PerHeadRotated | QkNorm::UnweightedRotated)
        {
            heads.norm(ctx.cpu, trunk, q, k);
        }
        if let Some(temperature) = &self.spec.temperature {
            heat(temperature, slots, q);
        }
        ctx.kv.write(layer, slots, k, v);
        let shape = AttentionShape {
            heads: self.spec.heads,
            kv_heads: self.spec.kv_heads,
            head_dim: self.spec.head_dim,
            value_dim: self.spec.cached_value(),
            scale: self.spec.scale,
            sees: match self.spec.sees {
                spec::Sees::All => Sees::All,
                spec::Sees::Last(count) => Sees::Last(count),
                spec::Sees::Chunk(length) => Sees::Chunk(length),
            },
            sinks: self.sinks.as_deref(),
        };
        mixed.resize(slots.len() * shape.heads * shape.value_dim, 0.0);
        attention(ctx.cpu, &shape, layer, q, slots, ctx.kv, mixed);
        trunk.round(mixed);
        if let Source::Latent(latent) = &self.source {
            latent.expand(ctx.cpu, trunk, &self.spec, buffers);
        }
        let Buffers { mixed, out, .. } = buffers;
        self.o.apply(ctx.cpu, mixed, precision, out);
        out
    }

    pub(super) fn bytes(&self) -> usize {
        let source = match &self.source {
            Source::Heads(heads) => {
                [&heads.q, &heads.k, &heads.v].iter().map(|projection| projection.weight.bytes()).sum()
            }
            Source::Latent(latent) => latent.bytes(),
        };
        source + self.o.weight.bytes()
    }
}

impl Heads {
    fn project(&self, cpu: &Cpu, trunk: &Trunk, spec: &AttentionSpec, x: &[f32], buffers: &mut Buffers) {
        let Buffers { q, k, v, .. } = buffers;
        let precision = precision(trunk.compute);
        self.q.apply(cpu, x, precision, q);
        self.k.apply(cpu, x, precision, k);
        self.v.apply(cpu, x, precision, v);
        if matches!(spec.qk_norm, QkNorm::PerHead | QkNorm::FullWidth) {
            self.norm(cpu, trunk, q, k);
        }
        if let Some(limit) = spec.clip_qkv {
            for x in [q, k, v] {
                x.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
            }
        }
    }
}

impl Heads {
    fn norm(&self, cpu: &Cpu, trunk: &Trunk, q: &mut [f32], k: &mut [f32]) {
        for (x, norm) in [(q, &self.q_norm), (k, &self.k_norm)] {
            if let Some(weight) = norm {
                rms_norm_in_place(cpu, x, weight, trunk.spec.norm_eps);
            }
        }
    }
}

/// Multiplies queries by what their positions say.
fn heat(temperature: &Temperature, slots: &[KvSlot<'_>], q: &mut [f32]) {
    let width = q.len() / slots.len().max(1);
    for (slot, row) in slots.iter().zip(q.chunks_exact_mut(width)) {
        let passed = ((slot.position as f32 + 1.0) / temperature.floor).floor();
        let factor = libm::log1p(f64::from(passed)) as f32 * temperature.scale + 1.0;
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

impl Projection {
    pub(super) fn apply(&self, cpu: &Cpu, x: &[f32], precision: Precision, out: &mut Vec<f32>) {
        let rows = x.len() / self.weight.k();
        out.resize(rows * self.weight.n(), 0.0);
        linear(cpu, &self.weight, x, precision, out);
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            }
        }
    }
}
