//! A weight packed for the kernels.
//!
//! What must hold: the packed bytes depend on the weight and its [`Packing`] alone, not on the instruction set, and a
//! matrix made from the bytes of another equals it. Bytes are little-endian, as are all machines that this crate
//! supports. [`crate::panels`] says where an element lies.

use std::fmt;

use muster_types::Packing;

use crate::convert::{from_bf16, to_bf16};
use crate::error::KernelError;
use crate::mxfp4::Mxfp4Block;
use crate::panels::{BLOCK_K, Bf16Block, F32Block, Packed, Panels, check_shape};
use crate::quant::pack::{Q4Block, Q8Block};
use crate::simd::LANES;

const _: () = assert!(cfg!(target_endian = "little"), "packed weights are little-endian");

/// The packed elements.
pub(crate) enum Elements {
    F32(Panels<F32Block>),
    Bf16(Panels<Bf16Block>),
    Q8(Panels<Q8Block>),
    Q4(Panels<Q4Block>),
    Mxfp4(Panels<Mxfp4Block>),
}

/// Evaluates an expression with panels of any kind.
macro_rules! of_any {
    ($elements:expr, $panels:ident => $value:expr) => {
        match $elements {
            Elements::F32($panels) => $value,
            Elements::Bf16($panels) => $value,
            Elements::Q8($panels) => $value,
            Elements::Q4($panels) => $value,
            Elements::Mxfp4($panels) => $value,
        }
    };
}

/// A weight `[n, k]`: `n` output features of `k` input features each, packed and read-only.
pub struct Matrix {
    n: usize,
    k: usize,
    pub(crate) elements: Elements,
}

impl Matrix {
    /// Packs a row-major bf16 weight `[n, k]`.
    ///
    /// # Errors
    /// If a size is zero, `w` does not hold `n * k` elements, or memory is short.
    pub fn pack_bf16(n: usize, k: usize, w: &[u16]) -> Result<Self, KernelError> {
        let panels = Panels::pack(n, k, w.len(), |place, block: &mut Bf16Block| {
            for lane in 0..place.n {
                for (line, pair) in block.iter_mut().zip(place.row(w, lane).chunks(2)) {
                    let odd = pair.get(1).copied().unwrap_or(0);
                    line[lane] = u32::from(pair[0]) | u32::from(odd) << 16;
                }
            }
            Ok(())
        })?;
        Ok(Self { n, k, elements: Elements::Bf16(panels) })
    }

    /// Packs a row-major f32 weight `[n, k]`.
    ///
    /// # Errors
    /// As for [`Matrix::pack_bf16`].
    pub fn pack_f32(n: usize, k: usize, w: &[f32]) -> Result<Self, KernelError> {
        let panels = Panels::pack(n, k, w.len(), |place, block: &mut F32Block| {
            for lane in 0..place.n {
                for (line, value) in block.iter_mut().zip(place.row(w, lane)) {
                    line[lane] = *value;
                }
            }
            Ok(())
        })?;
        Ok(Self { n, k, elements: Elements::F32(panels) })
    }

    /// Packs a row-major weight `[n, k]` in MXFP4: `blocks` holds its codes, two to a byte and the lower half first,
    /// and `scales` one exponent for every 32 inputs of a row. Linears give the bits that they give on the same values
    /// in bf16.
    ///
    /// # Errors
    /// As for [`Matrix::pack_bf16`], and if `k` is no multiple of 32; [`KernelError::Scales`] and
    /// [`KernelError::Scale`].
    pub fn pack_mxfp4(n: usize, k: usize, blocks: &[u8], scales: &[u8]) -> Result<Self, KernelError> {
        Ok(Self { n, k, elements: Elements::Mxfp4(Panels::of_codes(n, k, blocks, scales)?) })
    }

    /// Packs a row-major f32 weight `[n, k]`, rounded to `packing`.
    ///
    /// # Errors
    /// As for [`Matrix::pack_bf16`]; [`KernelError::NonFinite`] for a weight to be quantised that is not finite, and
    /// [`KernelError::Unrounded`] for MXFP4, which is only packed as published.
    pub fn round_f32(packing: Packing, n: usize, k: usize, w: &[f32]) -> Result<Self, KernelError> {
        match packing {
            Packing::F32 => Self::pack_f32(n, k, w),
            Packing::Bf16 => {
                let mut bits = vec![0; w.len()];
                to_bf16(w, &mut bits);
                Self::pack_bf16(n, k, &bits)
            }
            _ => Self::round(packing, n, k, w.len(), |from, out| {
                out.copy_from_slice(&w[from..from + out.len()]);
            }),
        }
    }

    /// Packs a row-major bf16 weight `[n, k]`, rounded to `packing`.
    ///
    /// # Errors
    /// As for [`Matrix::round_f32`].
    pub fn round_bf16(packing: Packing, n: usize, k: usize, w: &[u16]) -> Result<Self, KernelError> {
        match packing {
            Packing::F32 => {
                let mut wide = vec![0.0; w.len()];
                from_bf16(w, &mut wide);
                Self::pack_f32(n, k, &wide)
            }
            Packing::Bf16 => Self::pack_bf16(n, k, w),
            _ => Self::round(packing, n, k, w.len(), |from, out| from_bf16(&w[from..from + out.len()], out)),
        }
    }

    fn round(
        packing: Packing,
        n: usize,
        k: usize,
        found: usize,
        widen: impl Fn(usize, &mut [f32]),
    ) -> Result<Self, KernelError> {
        check_shape(n, k, found)?;
        let elements = match packing {
            Packing::Q8 => Elements::Q8(Panels::quantise(n, k, widen)?),
            Packing::Q4 => Elements::Q4(Panels::quantise(n, k, widen)?),
            Packing::F32 | Packing::Bf16 | Packing::Mxfp4 => return Err(KernelError::Unrounded(packing)),
        };
        Ok(Self { n, k, elements })
    }

    /// The matrix `[n, k]` with these packed bytes.
    ///
    /// # Errors
    /// [`KernelError::Packed`] when their number is wrong or a value is not finite; [`KernelError::OutOfMemory`].
    pub fn from_packed(packing: Packing, n: usize, k: usize, bytes: &[u8]) -> Result<Self, KernelError> {
        let refused = || KernelError::Packed { n, k, bytes: bytes.len() };
        if Self::packed_bytes(packing, n, k) != Some(bytes.len()) {
            return Err(refused());
        }
        let elements = match packing {
            Packing::F32 => Panels::of_bytes(k, bytes)?.map(Elements::F32),
            Packing::Bf16 => Panels::of_bytes(k, bytes)?.map(Elements::Bf16),
            Packing::Q8 => Panels::of_bytes(k, bytes)?.map(Elements::Q8),
            Packing::Q4 => Panels::of_bytes(k, bytes)?.map(Elements::Q4),
            Packing::Mxfp4 => Panels::of_bytes(k, bytes)?.map(Elements::Mxfp4),
        };
        Ok(Self { n, k, elements: elements.ok_or_else(refused)? })
    }

    /// Bytes of a packed weight `[n, k]`, padding included; `None` when there is no such weight or its size overflows.
    #[must_use]
    pub fn packed_bytes(packing: Packing, n: usize, k: usize) -> Option<usize> {
        if n == 0 || k == 0 || (packing == Packing::Mxfp4 && !k.is_multiple_of(BLOCK_K)) {
            return None;
        }
        const fn block<B: Packed>() -> (usize, usize) {
            (size_of::<B>(), B::DEPTH)
        }
        let (block, depth) = match packing {
            Packing::F32 => block::<F32Block>(),
            Packing::Bf16 => block::<Bf16Block>(),
            Packing::Q8 => block::<Q8Block>(),
            Packing::Q4 => block::<Q4Block>(),
            Packing::Mxfp4 => block::<Mxfp4Block>(),
        };
        n.div_ceil(LANES).checked_mul(k.div_ceil(depth))?.checked_mul(block)
    }

    /// Packing of the elements.
    #[must_use]
    pub const fn packing(&self) -> Packing {
        match &self.elements {
            Elements::F32(_) => Packing::F32,
            Elements::Bf16(_) => Packing::Bf16,
            Elements::Q8(_) => Packing::Q8,
            Elements::Q4(_) => Packing::Q4,
            Elements::Mxfp4(_) => Packing::Mxfp4,
        }
    }

    /// The packed weight, [`Matrix::packed_bytes`] long.
    #[must_use]
    pub fn packed(&self) -> &[u8] {
        of_any!(&self.elements, panels => panels.blocks.as_bytes())
    }

    /// Output features.
    #[must_use]
    pub const fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    #[must_use]
    pub const fn k(&self) -> usize {
        self.k
    }

    /// Bytes that the packed weight keeps in memory, padding included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.packed().len()
    }

    /// Writes row `n` of the weight to `out`, widened: an embedding's vector, without a second copy of the table.
    ///
    /// # Panics
    /// If `n` is out of range or `out` is not `[k]`.
    pub fn row(&self, n: usize, out: &mut [f32]) {
        assert!(n < self.n, "row {n} of a matrix of {} rows", self.n);
        assert_eq!(out.len(), self.k, "out is [k]");
        of_any!(&self.elements, panels => panels.row(n, out));
    }

    /// Panels of sixteen output features.
    pub(crate) const fn panels(&self) -> usize {
        self.n.div_ceil(LANES)
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix({} [{}, {}])", self.packing(), self.n, self.k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_comes_back_as_it_was_packed() {
        for (n, k) in [(1, 1), (17, 33), (40, 95)] {
            let wide: Vec<f32> = (0..n * k).map(|i| i as f32).collect();
            // Small integers are exact in bf16.
            let bits: Vec<u16> = (0..n * k).map(|i| (((i % 200) as f32).to_bits() >> 16) as u16).collect();
            let (f32s, bf16s) =
                (Matrix::pack_f32(n, k, &wide).unwrap(), Matrix::pack_bf16(n, k, &bits).unwrap());
            let mut out = vec![f32::NAN; k];
            for row in 0..n {
                f32s.row(row, &mut out);
                assert_eq!(out, wide[row * k..(row + 1) * k]);
                bf16s.row(row, &mut out);
                let want: Vec<f32> = (row * k..(row + 1) * k).map(|i| (i % 200) as f32).collect();
                assert_eq!(out, want);
            }
        }
    }

    #[test]
    fn every_element_lies_where_the_layout_says_and_the_rest_is_zero() {
        for (n, k) in [(1, 1), (16, 32), (17, 33), (40, 95)] {
            let w: Vec<u16> = (1..=u16::try_from(n * k).unwrap()).collect();
            let matrix = Matrix::pack_bf16(n, k, &w).unwrap();
            let Elements::Bf16(panels) = &matrix.elements else { panic!("bf16 expected") };
            let mut sum = 0;
            for panel in 0..matrix.panels() {
                for (b, block) in panels.panel(panel).iter().enumerate() {
                    for (line, pairs) in block.iter().enumerate() {
                        for (lane, pair) in pairs.iter().enumerate() {
                            for (half, found) in [pair & 0xffff, pair >> 16].into_iter().enumerate() {
                                let (row, column) = (panel * 16 + lane, b * 32 + line * 2 + half);
                                let inside = row < n && column < k;
                                let want = if inside { u32::from(w[row * k + column]) } else { 0 };
                                assert_eq!(found, want, "[{row}, {column}]");
                                sum += u64::from(found);
                            }
                        }
                    }
                }
            }
            assert_eq!(sum, w.iter().map(|&v| u64::from(v)).sum());
            assert_eq!(matrix.bytes(), n.next_multiple_of(16) * k.next_multiple_of(32) * 2);
        }
    }

    #[test]
    fn f32_lines_follow_the_input_features() {
        let w: Vec<f32> = (0..18 * 35_u16).map(f32::from).collect();
        let matrix = Matrix::pack_f32(18, 35, &w).unwrap();
        let Elements::F32(panels) = &matrix.elements else { panic!("f32 expected") };
        assert_eq!(panels.panel(1)[1][2][1], w[17 * 35 + 34]);
        assert_eq!(panels.panel(1)[1][3], [0.0; 16]);
        assert_eq!(panels.panel(1)[1][2][2..], [0.0; 14]);
    }

    #[test]
    fn wrong_sizes_are_named() {
        let message = |error: Result<Matrix, KernelError>| error.unwrap_err().to_string();
        assert_eq!(message(Matrix::pack_bf16(0, 4, &[])), "n is 0: it must be at least 1");
        assert_eq!(message(Matrix::pack_f32(4, 0, &[])), "k is 0: it must be at least 1");
        let wrong = message(Matrix::pack_bf16(2, 3, &[0; 5]));
        assert_eq!(wrong, "weight of shape [2, 3] has 5 elements: it must have n * k");
        assert!(Matrix::pack_f32(usize::MAX, 2, &[]).is_err());
    }

    const KINDS: [Packing; 5] = [Packing::Bf16, Packing::F32, Packing::Mxfp4, Packing::Q8, Packing::Q4];

    fn matrix(packing: Packing, n: usize, k: usize) -> Matrix {
        let wide: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let bits: Vec<u16> = wide.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
        match packing {
            Packing::Bf16 => Matrix::pack_bf16(n, k, &bits),
            Packing::F32 => Matrix::pack_f32(n, k, &wide),
            Packing::Mxfp4 => {
                let codes: Vec<u8> = (0..n * k / 2).map(|i| (i * 37) as u8).collect();
                let scales: Vec<u8> = (0..n * k / 32).map(|i| (i * 11 % 253) as u8).collect();
                Matrix::pack_mxfp4(n, k, &codes, &scales)
            }
            Packing::Q8 | Packing::Q4 => Matrix::round_f32(packing, n, k, &wide),
        }
        .unwrap()
    }

    #[test]
    fn bytes_make_the_same_matrix_again() {
        for packing in KINDS {
            for (n, k) in [(1, 1_usize), (16, 32), (17, 33), (40, 95), (64, 64)] {
                let k = if packing == Packing::Mxfp4 { k.next_multiple_of(32) } else { k };
                let matrix = matrix(packing, n, k);
                assert_eq!(matrix.packing(), packing);
                assert_eq!(Some(matrix.bytes()), Matrix::packed_bytes(packing, n, k));
                let again = Matrix::from_packed(packing, n, k, matrix.packed()).unwrap();
                assert_eq!(again.packed(), matrix.packed());
                let (mut before, mut after) = (vec![0.0; k], vec![1.0; k]);
                for row in 0..n {
                    matrix.row(row, &mut before);
                    again.row(row, &mut after);
                    assert_eq!(before, after);
                }
            }
        }
    }

    #[test]
    fn bytes_that_cannot_be_the_weight_are_refused() {
        for packing in KINDS {
            let k = if packing == Packing::Mxfp4 { 64 } else { 33 };
            let good = matrix(packing, 17, k);
            let bytes = good.packed();
            assert!(Matrix::from_packed(packing, 17, k, &bytes[1..]).is_err());
            assert!(Matrix::from_packed(packing, 170, k, bytes).is_err());
            assert!(Matrix::from_packed(packing, 0, k, &[]).is_err());
            assert!(Matrix::from_packed(packing, usize::MAX, usize::MAX, bytes).is_err());
            // NaN in every place that can hold one.
            let bad = vec![0xff; bytes.len()];
            let text = Matrix::from_packed(packing, 17, k, &bad).unwrap_err().to_string();
            assert!(text.contains("not finite"), "{text}");
        }
    }
}
