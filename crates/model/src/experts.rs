//! The experts a process holds, packed and ready, and the one thing they do.
//!
//! Used by a worker for its share and by [`crate::local::Local`] for all of them. Knows nothing about who asks.

use std::collections::BTreeMap;

use muster_checkpoint::Checkpoint;
use muster_checkpoint::spec::{ExpertRole, Role};
use muster_engine::dispatch::Rows;
use muster_kernels::{Cpu, Expert, ExpertRows, FfnScratch, Isa, Precision, from_bf16, grouped_ffn};
use muster_types::{Compute, ExpertId, ExpertKey, LayerId, WeightDType};

use crate::weights::Loader;
use crate::{LoadProgress, ModelError};

/// Loaded experts.
pub struct ExpertSet {
    compute: Compute,
    dtype: WeightDType,
    hidden: usize,
    experts: BTreeMap<ExpertKey, Expert>,
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
    /// Reads, checks and packs the given experts, one matrix after another: beside what is packed, no more than one
    /// matrix is ever held as it is stored.
    ///
    /// # Errors
    /// When an expert does not exist, or its bytes are unreadable or not finite.
    pub fn load(
        checkpoint: &Checkpoint,
        keys: &[ExpertKey],
        compute: Compute,
        dtype: WeightDType,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let spec = checkpoint.spec();
        let roles = keys.iter().flat_map(|&key| expert_roles(key));
        let mut loader = Loader::new(checkpoint, compute, roles, progress);
        let mut experts = BTreeMap::new();
        let mut bytes = 0;
        for &key in keys {
            let known = spec.moe(key.layer.index()).is_some_and(|moe| key.expert.get() < moe.experts);
            if !known {
                return Err(ModelError::NoSuchExpert(key));
            }
            let [gate, up, down] = expert_roles(key);
            let mut matrix = |role| loader.matrix_as(role, dtype);
            let expert = Expert::new(matrix(gate)?, matrix(up)?, matrix(down)?)
                .map_err(|source| ModelError::Pack { what: key.to_string(), source })?;
            bytes += expert.bytes() as u64;
            experts.insert(key, expert);
        }
        Ok(Self { compute, dtype, hidden: spec.hidden, experts, bytes })
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

    /// What is loaded, ascending.
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

    /// What activations are rounded to.
    #[must_use]
    pub const fn compute(&self) -> Compute {
        self.compute
    }

    /// How the weights are held.
    #[must_use]
    pub const fn dtype(&self) -> WeightDType {
        self.dtype
    }

    /// Runs experts of one layer over hidden rows in the wire dtype.
    ///
    /// `groups` says which row numbers each expert gets. `out` is set to one row `[hidden]` per (expert, row),
    /// group after group, neither rounded to the wire dtype nor checked: whoever uses a row does both on the way.
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
        let x: &[f32] = match (rows, self.compute) {
            (Rows::HostF32(x), Compute::F32) => x,
            (Rows::HostBf16(bits), Compute::Bf16 | Compute::Bf16Pairs) => {
                scratch.widened.resize(bits.len(), 0.0);
                from_bf16(bits, &mut scratch.widened);
                &scratch.widened
            }
            _ => return Err(ExpertError::Shape(format!("this process computes in {}", self.compute))),
        };
        let count = x.len() / self.hidden;
        if !x.len().is_multiple_of(self.hidden) {
            return Err(ExpertError::Shape(format!("{} values are no rows of {}", x.len(), self.hidden)));
        }
        let mut total = 0;
        let work = groups
            .iter()
            .map(|&(expert, rows)| {
                let key = ExpertKey { layer, expert };
                if let Some(&bad) = rows.iter().find(|&&row| row as usize >= count) {
                    return Err(ExpertError::Shape(format!("row {bad} of {count}")));
                }
                total += rows.len();
                let expert = self.experts.get(&key).ok_or(ExpertError::NotHeld(key))?;
                Ok(ExpertRows { expert, rows })
            })
            .collect::<Result<Vec<_>, _>>()?;
        out.resize(total * self.hidden, 0.0);
        grouped_ffn(cpu, &work, x, precision(self.compute), &mut scratch.ffn, out);
        Ok(())
    }
}

/// What to tell the user where another mode would be faster.
#[must_use]
pub fn faster_mode(compute: Compute, isa: Isa) -> Option<&'static str> {
    (compute == Compute::Bf16 && isa == Isa::Avx512Bf16).then_some(
        "this processor has AVX512-BF16 and no AMX: --compute bf16-pairs, on routers and workers alike, is faster",
    )
}

/// The kernels' word for it.
#[must_use]
pub const fn precision(compute: Compute) -> Precision {
    match compute {
        Compute::F32 => Precision::F32,
        Compute::Bf16 => Precision::Bf16,
        Compute::Bf16Pairs => Precision::Bf16Pairs,
    }
}

fn expert_roles(key: ExpertKey) -> [Role; 3] {
    [ExpertRole::Gate, ExpertRole::Up, ExpertRole::Down]
        .map(|role| Role::Expert(key.layer.get(), key.expert.get(), role))
}
