//! Checkpoint bytes to packed matrices and f32 vectors.

use muster_checkpoint::spec::Role;
use muster_checkpoint::{Checkpoint, StoredAs, Weight, WeightData, mxfp4};
use muster_kernels::{KernelError, Matrix, from_bf16};
use muster_types::{Compute, DType, Packing, WeightDType};

use crate::{LoadProgress, ModelError};

/// Reads weights one after another and reports progress.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    compute: Compute,
    progress: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
    /// Memory of the last matrix, reused for the next.
    spare: Option<WeightData>,
}

/// Most elements of a matrix whose memory is reused.
const LARGEST_SPARE: usize = 8 << 20;

impl<'a> Loader<'a> {
    /// A loader that will read `roles`.
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        compute: Compute,
        roles: impl Iterator<Item = Role>,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        let total_bytes = roles.filter_map(|role| checkpoint.stored(role)).map(|stored| stored.bytes).sum();
        Self {
            checkpoint,
            compute,
            progress,
            state: LoadProgress { done_bytes: 0, total_bytes },
            spare: None,
        }
    }

    fn read(&mut self, role: Role) -> Result<Weight, ModelError> {
        let weight = self.checkpoint.read_reusing(role, self.spare.take())?;
        self.state.done_bytes += self.checkpoint.stored(role).map_or(0, |stored| stored.bytes);
        (self.progress)(self.state);
        Ok(weight)
    }

    /// A matrix `[out, in]`, packed by `dtype`. Quantised weights are made from the stored ones, whatever the compute
    /// mode. In bf16 an f32 checkpoint is rounded, as in any bf16 engine.
    pub(crate) fn matrix_as(&mut self, role: Role, dtype: WeightDType) -> Result<Matrix, ModelError> {
        let form = self.form(role);
        self.packed_as(role, packing(form, self.compute, dtype))
    }

    /// A gate's matrix, in its stored precision where that is higher than that of the other weights.
    pub(crate) fn gate(&mut self, role: Role) -> Result<Matrix, ModelError> {
        let form = self.form(role);
        let finer = form == StoredAs::Plain(DType::F32) && self.checkpoint.spec().dtype == DType::Bf16;
        let native = packing(form, self.compute, WeightDType::Native);
        self.packed_as(role, if finer { Packing::F32 } else { native })
    }

    fn form(&self, role: Role) -> StoredAs {
        let plain = StoredAs::Plain(self.checkpoint.spec().dtype);
        self.checkpoint.stored(role).map_or(plain, |stored| stored.form)
    }

    /// Matrices from parts of a stored one: for each, `[out, in]` and the place of element (row, column).
    pub(crate) fn parts_as(
        &mut self,
        role: Role,
        parts: impl Iterator<Item = (usize, usize, impl Fn(usize, usize) -> usize)>,
        dtype: WeightDType,
    ) -> Result<Vec<Matrix>, ModelError> {
        let packing = packing(self.form(role), self.compute, dtype);
        // Widened, because quantised groups cannot be split; packing as bf16 restores bf16 values.
        let values = widen(self.read(role)?.data);
        let packed = parts.map(|(rows, cols, place)| {
            let places = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
            let part = places.map(|(row, col)| values[place(row, col)]).collect();
            pack(rows, cols, &WeightData::F32(part), packing)
        });
        let packed: Result<Vec<_>, _> = packed.collect();
        packed.map_err(|source| ModelError::Pack { what: format!("{role:?}"), source })
    }

    /// A packed matrix; the memory it was read into is reused for the next.
    fn packed_as(&mut self, role: Role, packing: Packing) -> Result<Matrix, ModelError> {
        let Weight { rows, cols, data } = self.read(role)?;
        let packed = pack(rows, cols, &data, packing);
        if rows * cols <= LARGEST_SPARE {
            self.spare = Some(data);
        }
        packed.map_err(|source| ModelError::Pack { what: format!("{role:?}"), source })
    }

    /// A vector, widened.
    pub(crate) fn vector(&mut self, role: Role) -> Result<Vec<f32>, ModelError> {
        Ok(widen(self.read(role)?.data))
    }

    /// A vector that the model may lack.
    pub(crate) fn vector_if(&mut self, present: bool, role: Role) -> Result<Option<Vec<f32>>, ModelError> {
        present.then(|| self.vector(role)).transpose()
    }
}

fn pack(rows: usize, cols: usize, data: &WeightData, packing: Packing) -> Result<Matrix, KernelError> {
    match data {
        WeightData::Mxfp4 { blocks, scales } if packing == Packing::Mxfp4 => {
            Matrix::pack_mxfp4(rows, cols, blocks, scales)
        }
        WeightData::Mxfp4 { blocks, scales } => {
            Matrix::round_f32(packing, rows, cols, &mxfp4::widen(blocks, scales))
        }
        WeightData::Bf16(bits) => Matrix::round_bf16(packing, rows, cols, bits),
        WeightData::F32(values) => Matrix::round_f32(packing, rows, cols, values),
    }
}

/// Packing that [`Loader::matrix_as`] gives a matrix, by its stored form. Weights that are widened when read are
/// rounded in bf16.
pub(crate) const fn packing(stored: StoredAs, compute: Compute, dtype: WeightDType) -> Packing {
    match (dtype, stored, compute) {
        (WeightDType::Q8, ..) => Packing::Q8,
        (WeightDType::Q4, ..) => Packing::Q4,
        (WeightDType::Native, StoredAs::Mxfp4, _) => Packing::Mxfp4,
        (WeightDType::Native, StoredAs::Plain(DType::Bf16), _) => Packing::Bf16,
        (WeightDType::Native, _, Compute::F32) => Packing::F32,
        (WeightDType::Native, ..) => Packing::Bf16,
    }
}

/// The values widened to f32, exactly.
pub(crate) fn widen(data: WeightData) -> Vec<f32> {
    match data {
        WeightData::F32(values) => values,
        WeightData::Bf16(bits) => {
            let mut values = vec![0.0; bits.len()];
            from_bf16(&bits, &mut values);
            values
        }
        WeightData::Mxfp4 { blocks, scales } => mxfp4::widen(&blocks, &scales),
    }
}
