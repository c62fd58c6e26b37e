//! Bytes to numbers: one weight, from where the plan says it lies.
//!
//! Always holds: what is returned is finite and has as many elements as the slice; MXFP4 stays as it is stored, FP8 and
//! F16 are widened exactly but for one rounding to f32 where FP8 meets its scale. Knows neither roles nor families.

use std::sync::LazyLock;

use bytemuck::cast_slice_mut;

use crate::catalog::Catalog;
use crate::error::CheckpointError;
use crate::plan::{Form, Grid, Kind, Plain, Scales, Slice};
use crate::stored::{FP8_BLOCK, MXFP4_GROUP};
use crate::weight::WeightData;

/// Bytes of a group of MXFP4.
const GROUP_BYTES: usize = MXFP4_GROUP / 2;
/// The scale that is no number.
const MXFP4_NAN: u8 = 0xff;

/// Why a weight cannot be read.
pub(crate) enum ReadError {
    /// Reading failed.
    File(CheckpointError),
    /// An element is NaN or infinite.
    NonFinite { at: usize, value: f32 },
}

impl From<CheckpointError> for ReadError {
    fn from(error: CheckpointError) -> Self {
        Self::File(error)
    }
}

/// Reads one weight, into the memory of another that is done with where it fits.
pub(crate) fn read(
    catalog: &Catalog,
    slice: &Slice,
    spare: Option<WeightData>,
) -> Result<WeightData, ReadError> {
    let blob = |tensor: usize| &catalog.shards[catalog.tensors[tensor].shard];
    // The plan checked that all ranges lie in their files, so nothing allocates more than a few times what they hold.
    let elements = slice.rows * slice.cols;
    let data = match slice.form {
        Form::Plain(Plain::F32, grid) => {
            let mut data = match spare {
                Some(WeightData::F32(spare)) => spare,
                _ => Vec::new(),
            };
            data.resize(elements, 0.0);
            gather(&mut data, slice, grid, |at, out| blob(slice.tensor).read_at(at, cast_slice_mut(out)))?;
            refuse_non_finite(&data, |value| value)?;
            WeightData::F32(data)
        }
        Form::Plain(Plain::Bf16, grid) => {
            let mut data = match spare {
                Some(WeightData::Bf16(spare)) => spare,
                _ => Vec::new(),
            };
            data.resize(elements, 0_u16);
            gather(&mut data, slice, grid, |at, out| blob(slice.tensor).read_at(at, cast_slice_mut(out)))?;
            refuse_non_finite(&data, widen)?;
            match slice.kind {
                Kind::Matrix | Kind::Gate => WeightData::Bf16(data),
                Kind::Vector => WeightData::F32(data.into_iter().map(widen).collect()),
            }
        }
        Form::Plain(Plain::F16, grid) => {
            let mut data = vec![0_u16; elements];
            gather(&mut data, slice, grid, |at, out| blob(slice.tensor).read_at(at, cast_slice_mut(out)))?;
            let wide = |bits| half::f16::from_bits(bits).to_f32();
            refuse_non_finite(&data, wide)?;
            WeightData::F32(data.into_iter().map(wide).collect())
        }
        Form::Fp8 { offset, scales } => {
            let mut bytes = vec![0_u8; elements];
            blob(slice.tensor).read_at(offset, &mut bytes)?;
            WeightData::F32(scaled(&bytes, slice, &block_scales(catalog, slice, scales)?)?)
        }
        Form::Mxfp4 { groups, scales, scale_bytes } => {
            let count = slice.rows * (slice.cols / MXFP4_GROUP);
            let in_groups = Slice { cols: slice.cols / MXFP4_GROUP, ..*slice };
            let mut blocks = vec![[0_u8; GROUP_BYTES]; count];
            let read =
                |at, out: &mut [[u8; GROUP_BYTES]]| blob(slice.tensor).read_at(at, out.as_flattened_mut());
            gather(&mut blocks, &in_groups, groups, read)?;
            let mut bytes = vec![0_u8; count];
            gather(&mut bytes, &in_groups, scale_bytes, |at, out| blob(scales).read_at(at, out))?;
            if let Some(at) = bytes.iter().position(|&scale| scale == MXFP4_NAN) {
                return Err(ReadError::NonFinite { at: at * MXFP4_GROUP, value: f32::NAN });
            }
            WeightData::Mxfp4 { blocks: blocks.into_flattened(), scales: bytes }
        }
    };
    Ok(data)
}

/// Fills `data` with the elements of a grid: straight from the file where they lie one behind the other, else out of
/// the whole stretch from the first to the last.
fn gather<T: Copy + Default>(
    data: &mut [T],
    slice: &Slice,
    grid: Grid,
    mut read_at: impl FnMut(u64, &mut [T]) -> Result<(), CheckpointError>,
) -> Result<(), ReadError> {
    let Grid { offset, row_step, col_step } = grid;
    let Slice { rows, cols, .. } = *slice;
    if (col_step == 1 || cols == 1) && (row_step == cols || rows == 1) {
        return Ok(read_at(offset, data)?);
    }
    let mut stretch = vec![T::default(); (rows - 1) * row_step + (cols - 1) * col_step + 1];
    read_at(offset, &mut stretch)?;
    for (row, out) in data.chunks_exact_mut(cols).enumerate() {
        let from = stretch[row * row_step..].iter().step_by(col_step);
        out.iter_mut().zip(from).for_each(|(out, from)| *out = *from);
    }
    Ok(())
}

/// The scales of an FP8 matrix, `[row blocks, column blocks]`.
fn block_scales(catalog: &Catalog, slice: &Slice, scales: Scales) -> Result<Vec<f32>, ReadError> {
    let Slice { rows, cols, .. } = *slice;
    let tensor = &catalog.tensors[scales.tensor];
    let shape = Slice {
        tensor: scales.tensor,
        rows: rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK),
        cols: 1,
        kind: Kind::Vector,
        form: Form::Plain(scales.element, Grid { offset: tensor.offset, row_step: 1, col_step: 1 }),
    };
    match read(catalog, &shape, None)? {
        WeightData::F32(scales) => Ok(scales),
        // A vector is always widened.
        WeightData::Bf16(_) | WeightData::Mxfp4 { .. } => Ok(Vec::new()),
    }
}

/// Bytes times their block's scales, in f32.
fn scaled(bytes: &[u8], slice: &Slice, scales: &[f32]) -> Result<Vec<f32>, ReadError> {
    let Slice { cols, .. } = *slice;
    let mut data = Vec::with_capacity(bytes.len());
    for (row, bytes) in bytes.chunks_exact(cols).enumerate() {
        let scales = &scales[row / FP8_BLOCK * cols.div_ceil(FP8_BLOCK)..];
        for (bytes, scale) in bytes.chunks(FP8_BLOCK).zip(scales) {
            data.extend(bytes.iter().map(|&byte| E4M3[usize::from(byte)] * scale));
        }
    }
    refuse_non_finite(&data, |value| value)?;
    Ok(data)
}

/// The numbers that bytes of FP8 E4M3 stand for (OCP 8-bit floating point, revision 1.0): four bits of exponent with a
/// bias of 7, three of mantissa, no infinity, NaN where all bits but the sign are set.
static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| {
    std::array::from_fn(|byte| {
        let (exponent, mantissa) = (byte as u8 >> 3 & 0xf, (byte & 7) as f32);
        let magnitude = match (exponent, byte & 7) {
            (0xf, 7) => f32::NAN,
            (0, _) => mantissa / 512.0,
            // Two to the power of the exponent less its bias; that of f32 is 127.
            _ => (1.0 + mantissa / 8.0) * f32::from_bits((u32::from(exponent) + 120) << 23),
        };
        if byte >= 0x80 { -magnitude } else { magnitude }
    })
});

/// The value of bits of bf16.
fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn refuse_non_finite<T: Copy>(data: &[T], value: impl Fn(T) -> f32) -> Result<(), ReadError> {
    // Blocks without an early exit inside, so that the common case is vectorised.
    const BLOCK: usize = 4096;
    let damaged = |block: &[T]| block.iter().fold(false, |bad, &element| bad | !value(element).is_finite());
    let Some(block) = data.chunks(BLOCK).position(damaged) else { return Ok(()) };
    let rest = data.iter().enumerate().skip(block * BLOCK);
    match rest.map(|(at, &e)| (at, value(e))).find(|(_, v)| !v.is_finite()) {
        Some((at, value)) => Err(ReadError::NonFinite { at, value }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_fp8_are_what_the_format_says() {
        // Least and greatest of each kind (OCP 8-bit floating point, table 2).
        for (byte, value) in
            [(0x00, 0.0), (0x01, 0.001_953_125), (0x07, 0.013_671_875), (0x08, 0.015_625), (0x7e, 448.0)]
        {
            assert_eq!((E4M3[byte], E4M3[byte | 0x80]), (value, -value));
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
        assert_eq!(E4M3.iter().filter(|value| value.is_nan()).count(), 2);
    }

    #[test]
    fn elements_are_gathered_from_where_they_lie() {
        let stored: Vec<u8> = (0..60).collect();
        let read = |at: u64, out: &mut [u8]| {
            out.copy_from_slice(&stored[at as usize..][..out.len()]);
            Ok(())
        };
        let gathered = |rows, cols, offset, row_step, col_step| {
            let grid = Grid { offset, row_step, col_step };
            let slice =
                Slice { tensor: 0, rows, cols, kind: Kind::Matrix, form: Form::Plain(Plain::F32, grid) };
            let mut data = vec![0; rows * cols];
            assert!(gather(&mut data, &slice, grid, read).is_ok());
            data
        };
        assert_eq!(gathered(2, 3, 4, 3, 1), [4, 5, 6, 7, 8, 9]);
        assert_eq!(gathered(2, 3, 1, 20, 1), [1, 2, 3, 21, 22, 23]);
        // Transposed, every second column.
        assert_eq!(gathered(2, 3, 1, 2, 10), [1, 11, 21, 3, 13, 23]);
        assert_eq!(gathered(3, 1, 2, 7, 1), [2, 9, 16]);
    }
}
