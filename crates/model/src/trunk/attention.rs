//! One layer's attention: project, norm, clip, rotate, norm, cache, attend, project back.

use muster_checkpoint::spec::{AttentionSpec, QkNorm, Temperature};
use muster_kernels::KvSlot;

use super::device::{Device, Norm, Projection};
use super::latent::{self, Latent};

/// Weights of one layer's attention.
pub(super) struct Attention<D: Device> {
    pub(super) spec: AttentionSpec,
    pub(super) norm: Norm<D>,
    pub(super) source: Source<D>,
    pub(super) o: Projection<D>,
    /// Number of its rotary embedding in the trunk.
    pub(super) rope: Option<usize>,
    /// Sinks: one score per query head, without a value.
    pub(super) sinks: Option<D::Vector>,
}

/// Source of queries, keys and values.
pub(super) enum Source<D: Device> {
    /// Each from its own projection.
    Heads(Box<Heads<D>>),
    /// From compressed rows.
    Latent(Box<Latent<D>>),
}

/// Projections of heads.
pub(super) struct Heads<D: Device> {
    pub(super) q: Projection<D>,
    pub(super) k: Projection<D>,
    pub(super) v: Projection<D>,
    /// Norms of queries and keys.
    pub(super) norms: Option<[D::Vector; 2]>,
    pub(super) norm_eps: f32,
}

/// Buffers of one lane.
pub(super) struct Buffers<D: Device> {
    pub(super) q: D::Buffer,
    pub(super) k: D::Buffer,
    pub(super) v: D::Buffer,
    pub(super) mixed: D::Buffer,
    pub(super) latent: latent::Buffers<D>,
    out: D::Buffer,
    /// Factor on the query of each row.
    factors: Vec<f32>,
}

/// Positions and caches of rows.
pub(super) struct At<'a, D: Device> {
    pub(super) kv: &'a mut D::Kv,
    /// The layer's number in its group.
    pub(super) layer: usize,
    /// Positions of the rows, with the block tables of that group.
    pub(super) slots: &'a [KvSlot<'a>],
    /// Angles of every rotary embedding.
    pub(super) angles: &'a [D::Angles],
}

impl<D: Device> Default for Buffers<D> {
    fn default() -> Self {
        Self {
            q: D::Buffer::default(),
            k: D::Buffer::default(),
            v: D::Buffer::default(),
            mixed: D::Buffer::default(),
            latent: latent::Buffers::default(),
            out: D::Buffer::default(),
            factors: Vec::new(),
        }
    }
}

impl<D: Device> Attention<D> {
    /// Runs the layer's attention: normed and rounded `[rows, hidden]` in, `[rows, hidden]` out, before the residual
    /// multiplier.
    pub(super) fn run<'b>(
        &self,
        device: &D,
        at: &mut At<'_, D>,
        x: &D::Buffer,
        buffers: &'b mut Buffers<D>,
        scratch: &mut D::Scratch,
    ) -> &'b D::Buffer {
        match &self.source {
            Source::Heads(heads) => heads.project(device, &self.spec, x, buffers),
            Source::Latent(latent) => {
                let Buffers { q, k, latent: own, .. } = &mut *buffers;
                latent.project(device, &self.spec, x, [q, k], own, scratch);
            }
        }
        let Buffers { q, k, v, mixed, latent: own, factors, out } = buffers;
        if let Some(angles) = self.rope.and_then(|rope| at.angles.get(rope)) {
            device.rotate(angles, self.spec.head_dim, q);
            device.rotate(angles, self.spec.head_dim, k);
        }
        if let Source::Heads(heads) = &self.source
            && matches!(self.spec.qk_norm, QkNorm::PerHeadRotated | QkNorm::UnweightedRotated)
        {
            heads.norm(device, q, k);
        }
        if let Some(temperature) = &self.spec.temperature {
            factors.clear();
            factors.extend(at.slots.iter().map(|slot| heat(temperature, slot.position)));
            device.scale_rows(factors, q);
        }
        device.append(at.kv, at.layer, at.slots, k, v);
        device.attend((&self.spec, self.sinks.as_ref()), at.kv, at.layer, q, at.slots, mixed);
        if let Source::Latent(latent) = &self.source {
            latent.expand(device, mixed, own, scratch);
        }
        device.linear(&self.o, mixed, out);
        out
    }
}

impl<D: Device> Heads<D> {
    fn project(&self, device: &D, spec: &AttentionSpec, x: &D::Buffer, buffers: &mut Buffers<D>) {
        let Buffers { q, k, v, .. } = buffers;
        device.linear(&self.q, x, q);
        device.linear(&self.k, x, k);
        device.linear(&self.v, x, v);
        if matches!(spec.qk_norm, QkNorm::PerHead | QkNorm::FullWidth) {
            self.norm(device, q, k);
        }
        if let Some(limit) = spec.clip_qkv {
            for x in [q, k, v] {
                device.clamp(limit, x);
            }
        }
    }

    fn norm(&self, device: &D, q: &mut D::Buffer, k: &mut D::Buffer) {
        if let Some([of_q, of_k]) = &self.norms {
            device.norm_heads(of_q, self.norm_eps, q);
            device.norm_heads(of_k, self.norm_eps, k);
        }
    }
}

/// Factor on the query at a position.
fn heat(temperature: &Temperature, position: u32) -> f32 {
    let passed = ((position as f32 + 1.0) / temperature.floor).floor();
    libm::log1p(f64::from(passed)) as f32 * temperature.scale + 1.0
}
