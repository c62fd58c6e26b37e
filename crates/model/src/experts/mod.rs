//! The experts of a process, packed, and their computation.
//!
//! - [`ExpertStore`]: a set of experts that changes during serving, for the worker's holder; [`CpuStore`] is the one in
//!   host memory;
//! - [`CpuExperts`]: computes with the experts of a [`CpuStore`];
//! - [`ExpertSet`]: a fixed set of experts, for [`crate::local::Local`];
//! - [`PackedExpert`], [`ExpertForm`]: experts as bytes.
//!
//! Does not know the callers.

mod answer;
mod packed;
mod store;

use std::collections::BTreeMap;
use std::sync::Arc;

use muster_checkpoint::Checkpoint;
use muster_checkpoint::spec::{ExpertRole, Role};
use muster_engine::dispatch::Rows;
use muster_kernels::{Biases, Cpu, Expert, ExpertRows, FfnScratch, Isa, from_bf16, grouped_ffn};
use muster_types::{Compute, ExpertId, ExpertKey, LayerId, WeightDType};

use crate::weights::Loader;
use crate::{LoadProgress, ModelError};

pub use answer::CpuExperts;
pub use packed::{ExpertForm, PackedExpert};
pub use store::{CpuStore, ExpertStore, StoreError};

/// Loaded experts, in host memory.
#[derive(Clone)]
pub struct ExpertSet {
    compute: Compute,
    dtype: WeightDType,
    hidden: usize,
    experts: BTreeMap<ExpertKey, Arc<PackedExpert>>,
    bytes: u64,
}

/// Buffers that one caller reuses between calls.
#[derive(Default)]
pub struct ExpertScratch {
    widened: Vec<f32>,
    ffn: FfnScratch,
}

/// Rows that could not be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ExpertError {
    /// The expert is not loaded here.
    #[error("{0} is not held here")]
    NotHeld(ExpertKey),
    /// Rows do not fit the model or the groups do not fit the rows.
    #[error("rows do not fit: {0}")]
    Shape(String),
}

impl ExpertSet {
    /// An empty set.
    #[must_use]
    pub const fn new(hidden: usize, compute: Compute, dtype: WeightDType) -> Self {
        Self { compute, dtype, hidden, experts: BTreeMap::new(), bytes: 0 }
    }

    /// Reads, checks and packs the given experts.
    ///
    /// # Errors
    /// As [`read`].
    pub fn load(
        checkpoint: &Checkpoint,
        keys: &[ExpertKey],
        compute: Compute,
        dtype: WeightDType,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let mut set = Self::new(checkpoint.spec().hidden, compute, dtype);
        read(checkpoint, keys, compute, dtype, progress, &mut |key, expert| {
            set.insert(key, expert);
        })?;
        Ok(set)
    }

    /// Adds an expert.
    pub fn insert(&mut self, key: ExpertKey, expert: PackedExpert) {
        self.bytes += expert.bytes() as u64;
        if let Some(before) = self.experts.insert(key, Arc::new(expert)) {
            self.bytes -= before.bytes() as u64;
        }
    }

    /// Removes an expert.
    pub fn remove(&mut self, key: ExpertKey) -> Option<Arc<PackedExpert>> {
        let expert = self.experts.remove(&key)?;
        self.bytes -= expert.bytes() as u64;
        Some(expert)
    }

    /// An expert, if it is loaded.
    #[must_use]
    pub fn get(&self, key: ExpertKey) -> Option<Arc<PackedExpert>> {
        self.experts.get(&key).cloned()
    }

    /// Every routed expert of the model, in ascending order.
    #[must_use]
    pub fn all_keys(checkpoint: &Checkpoint) -> Vec<ExpertKey> {
        let spec = checkpoint.spec();
        LayerId::all(u32::try_from(spec.layers.len()).unwrap_or(u32::MAX))
            .flat_map(|layer| {
                let count = spec.moe(layer.index()).map_or(0, |moe| moe.experts);
                ExpertId::all(count).map(move |expert| ExpertKey { layer, expert })
            })
            .collect()
    }

    /// Whether this expert is loaded.
    #[must_use]
    pub fn holds(&self, key: ExpertKey) -> bool {
        self.experts.contains_key(&key)
    }

    /// Keys of the loaded experts, ascending.
    #[must_use]
    pub fn keys(&self) -> Vec<ExpertKey> {
        self.experts.keys().copied().collect()
    }

    /// Resident bytes of packed weights.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Width of a hidden row, elements.
    #[must_use]
    pub const fn hidden(&self) -> usize {
        self.hidden
    }

    /// Rounding of activations.
    #[must_use]
    pub const fn compute(&self) -> Compute {
        self.compute
    }

    /// Packing of the weights.
    #[must_use]
    pub const fn dtype(&self) -> WeightDType {
        self.dtype
    }

    /// Experts of one layer to compute with: later changes of the set do not affect them.
    ///
    /// # Errors
    /// The first expert that is not loaded.
    pub fn pick(
        &self,
        layer: LayerId,
        experts: impl Iterator<Item = ExpertId>,
    ) -> Result<Picked, ExpertError> {
        let pick = |expert| {
            let key = ExpertKey { layer, expert };
            self.get(key).ok_or(ExpertError::NotHeld(key))
        };
        let experts = experts.map(pick).collect::<Result<_, _>>()?;
        Ok(Picked { compute: self.compute, hidden: self.hidden, experts })
    }

    /// [`Self::pick`], then [`Picked::forward`].
    ///
    /// # Errors
    /// See [`ExpertError`]; `out` is unspecified then.
    pub fn forward(
        &self,
        cpu: &Cpu,
        scratch: &mut ExpertScratch,
        layer: LayerId,
        groups: &[(ExpertId, &[u32])],
        rows: Rows<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), ExpertError> {
        let picked = self.pick(layer, groups.iter().map(|&(expert, _)| expert))?;
        picked.forward(cpu, scratch, groups, rows, out)
    }
}

/// Experts of one layer, in the order of the request.
pub struct Picked {
    compute: Compute,
    hidden: usize,
    experts: Vec<Arc<PackedExpert>>,
}

impl Picked {
    /// Runs the experts over hidden rows in the wire dtype.
    ///
    /// `groups` has the row numbers of each picked expert. `out` is set to one row `[hidden]` per (expert, row), group
    /// after group, neither rounded to the wire dtype nor checked: the reader of a row does both.
    ///
    /// # Errors
    /// [`ExpertError::Shape`]; `out` is unspecified then.
    pub fn forward(
        &self,
        cpu: &Cpu,
        scratch: &mut ExpertScratch,
        groups: &[(ExpertId, &[u32])],
        rows: Rows<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), ExpertError> {
        let x = match (rows.f32(), rows.bf16(), self.compute) {
            (Some(x), _, Compute::F32) => x,
            (_, Some(bits), Compute::Bf16 | Compute::Bf16Pairs) => {
                scratch.widened.resize(bits.len(), 0.0);
                from_bf16(bits, &mut scratch.widened);
                &scratch.widened
            }
            _ => {
                let (dtype, place) = (rows.dtype(), rows.place());
                let reason = format!("{dtype} in {place}; this process computes in {}", self.compute);
                return Err(ExpertError::Shape(reason));
            }
        };
        let count = rows.count();
        if rows.hidden() != self.hidden {
            return Err(ExpertError::Shape(format!("rows of {} instead of {}", rows.hidden(), self.hidden)));
        }
        if groups.len() != self.experts.len() {
            return Err(ExpertError::Shape(format!(
                "{} groups for {} experts",
                groups.len(),
                self.experts.len()
            )));
        }
        let mut total = 0;
        let work = groups
            .iter()
            .zip(&self.experts)
            .map(|(&(_, rows), expert)| {
                if let Some(&bad) = rows.iter().find(|&&row| row as usize >= count) {
                    return Err(ExpertError::Shape(format!("row {bad} of {count}")));
                }
                total += rows.len();
                Ok(ExpertRows { expert: expert.weights(), rows })
            })
            .collect::<Result<Vec<_>, _>>()?;
        out.resize(total * self.hidden, 0.0);
        grouped_ffn(cpu, &work, x, self.compute, &mut scratch.ffn, out);
        Ok(())
    }
}

/// Reads, checks and packs the given experts and hands each over, one matrix after another: beside packed matrices, at
/// most one matrix is in memory in its stored form.
///
/// # Errors
/// When an expert does not exist, or its bytes are unreadable or not finite. Experts before it were handed over.
pub fn read(
    checkpoint: &Checkpoint,
    keys: &[ExpertKey],
    compute: Compute,
    dtype: WeightDType,
    progress: &mut dyn FnMut(LoadProgress),
    take: &mut dyn FnMut(ExpertKey, PackedExpert),
) -> Result<(), ModelError> {
    let spec = checkpoint.spec();
    let roles = keys.iter().flat_map(|&key| {
        let of = move |part| Role::Expert(key.layer.get(), key.expert.get(), part);
        MATRICES.into_iter().chain(BIASES).map(of)
    });
    let mut loader = Loader::new(checkpoint, compute, roles, progress);
    for &key in keys {
        let moe = spec.moe(key.layer.index()).filter(|moe| key.expert.get() < moe.experts);
        let Some(moe) = moe else { return Err(ModelError::NoSuchExpert(key)) };
        let role = |part| Role::Expert(key.layer.get(), key.expert.get(), part);
        let [gate, up, down] = MATRICES.map(|part| loader.matrix_as(role(part), dtype));
        let biases = match moe.biases {
            false => None,
            true => {
                let [gate, up, down] = BIASES.map(|part| loader.vector(role(part)));
                Some(Biases { gate: gate?, up: up?, down: down? })
            }
        };
        let expert = Expert::new(gate?, up?, down?).and_then(|expert| expert.with(moe.gating, biases));
        let expert = expert.map_err(|source| ModelError::Pack { what: key.to_string(), source })?;
        take(key, expert.into());
    }
    Ok(())
}

/// Reads, checks and packs one expert.
///
/// # Errors
/// As [`read`].
pub fn read_one(
    checkpoint: &Checkpoint,
    key: ExpertKey,
    compute: Compute,
    dtype: WeightDType,
) -> Result<PackedExpert, ModelError> {
    let mut found = None;
    read(checkpoint, &[key], compute, dtype, &mut |_| {}, &mut |_, expert| found = Some(expert))?;
    found.ok_or(ModelError::NoSuchExpert(key))
}

/// Advice to the user where another mode is faster.
#[must_use]
pub fn faster_mode(compute: Compute, isa: Isa) -> Option<&'static str> {
    (compute == Compute::Bf16 && isa == Isa::Avx512Bf16).then_some(
        "this processor has AVX512-BF16 and no AMX: --compute bf16-pairs, on routers and workers alike, is faster",
    )
}

const MATRICES: [ExpertRole; 3] = [ExpertRole::Gate, ExpertRole::Up, ExpertRole::Down];
const BIASES: [ExpertRole; 3] = [ExpertRole::GateBias, ExpertRole::UpBias, ExpertRole::DownBias];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use muster_checkpoint::Source;

    use super::*;

    #[test]
    fn what_is_given_up_is_gone_and_its_bytes_are_free() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden/mixtral");
        let checkpoint = Checkpoint::open(&Source::Directory(path)).unwrap();
        let keys = ExpertSet::all_keys(&checkpoint);
        let load = |keys| {
            ExpertSet::load(&checkpoint, keys, Compute::F32, WeightDType::Native, &mut |_| {}).unwrap()
        };
        let (mut set, one) = (load(&keys[..2]), load(&keys[..1]));
        assert!(set.remove(keys[1]).is_some());
        assert!(set.remove(keys[1]).is_none());
        assert_eq!((set.keys(), set.bytes()), (keys[..1].to_vec(), one.bytes()));
    }
}
