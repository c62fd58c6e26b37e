//! A weight packed for the kernels.
//!
//! What must hold: a [`Matrix`] is made of panels of sixteen output features; a panel is a run of blocks of 32 input
//! features; both sizes are padded with zeros. A bf16 block holds sixteen lines, one per pair of input features, each
//! with the sixteen outputs' pairs (the even feature in the low half). That is also the layout of AMX's B operand.
//! An f32 block holds 32 lines, one per input feature; [`crate::quant`] has the quantised ones, [`crate::mxfp4`] those
//! that become bf16 blocks when they are used. It does not know how the products are added; [`crate::tile`] does.

use std::fmt;

use crate::convert::from_bf16;
use crate::error::KernelError;
use crate::memory::{Buffer, Zeroed};
use crate::mxfp4::Mxfp4Block;
use crate::quant::{Quantisation, Quantised};
use crate::simd::{LANES, Simd};

/// Input features of a block.
pub(crate) const BLOCK_K: usize = 32;

/// A block of a bf16 panel.
pub(crate) type Bf16Block = [[u32; LANES]; BLOCK_K / 2];
/// A block of an f32 panel.
pub(crate) type F32Block = [[f32; LANES]; BLOCK_K];

/// 32 input features by 16 output features of a weight, as they are kept.
pub(crate) trait Stored: Zeroed + Send + Sync {
    /// As what they are multiplied.
    type Block: Block;
    /// The blocks themselves, if they are multiplied as they are.
    fn plain(blocks: &[Self]) -> Option<&[Self::Block]>;
    /// Writes the block as it is multiplied.
    fn decode<S: Simd>(&self, s: S, to: &mut Self::Block);
}

/// A block that is multiplied as it is.
pub(crate) trait Block: Zeroed + Send + Sync {
    /// A block of zeros.
    const ZERO: Self;
    /// The weights of input features `2 * pair` and `2 * pair + 1`.
    fn pair<S: Simd>(&self, s: S, pair: usize) -> (S::V, S::V);
}

impl<B: Block> Stored for B {
    type Block = B;
    #[inline(always)]
    fn plain(blocks: &[B]) -> Option<&[B]> {
        Some(blocks)
    }
    #[inline(always)]
    fn decode<S: Simd>(&self, _: S, to: &mut B) {
        *to = *self;
    }
}

impl Block for Bf16Block {
    const ZERO: Self = [[0; LANES]; BLOCK_K / 2];
    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, pair: usize) -> (S::V, S::V) {
        s.load_bf16_pairs(&self[pair])
    }
}

impl Block for F32Block {
    const ZERO: Self = [[0.0; LANES]; BLOCK_K];
    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, pair: usize) -> (S::V, S::V) {
        (s.load(&self[2 * pair]), s.load(&self[2 * pair + 1]))
    }
}

/// The panels of one element type, which are as long as each other.
pub(crate) struct Panels<B> {
    pub(crate) blocks: Buffer<B>,
    pub(crate) per_panel: usize,
}

impl<B> Panels<B> {
    /// The blocks of panel `index` in ascending K.
    #[inline(always)]
    pub(crate) fn panel(&self, index: usize) -> &[B] {
        &self.blocks[index * self.per_panel..(index + 1) * self.per_panel]
    }
}

impl<B: Stored> Panels<B> {
    pub(crate) fn pack(
        n: usize,
        k: usize,
        found: usize,
        mut fill: impl FnMut(Place, &mut B) -> Result<(), KernelError>,
    ) -> Result<Self, KernelError> {
        check_shape(n, k, found)?;
        let per_panel = k.div_ceil(BLOCK_K);
        // No overflow: n and k are at least 1 and n * k elements exist, so the padded sizes stay within a small factor.
        let mut blocks = Buffer::zeroed("weight", n.div_ceil(LANES) * per_panel)?;
        for (index, block) in blocks.iter_mut().enumerate() {
            let (first_n, first_k) = (index / per_panel * LANES, index % per_panel * BLOCK_K);
            let place =
                Place { first_n, n: LANES.min(n - first_n), first_k, k: BLOCK_K.min(k - first_k), stride: k };
            fill(place, block)?;
        }
        Ok(Self { blocks, per_panel })
    }
}

pub(crate) fn check_shape(n: usize, k: usize, found: usize) -> Result<(), KernelError> {
    for (field, value) in [("n", n), ("k", k)] {
        if value == 0 {
            return Err(KernelError::Size { field, value, rule: "at least 1" });
        }
    }
    if n.checked_mul(k) != Some(found) {
        return Err(KernelError::Elements { n, k, found });
    }
    Ok(())
}

/// Where a block lies in the row-major weight.
pub(crate) struct Place {
    pub(crate) first_n: usize,
    pub(crate) n: usize,
    pub(crate) first_k: usize,
    k: usize,
    pub(crate) stride: usize,
}

impl Place {
    /// The block's part of output feature `lane`.
    fn row<'w, T>(&self, w: &'w [T], lane: usize) -> &'w [T] {
        let from = (self.first_n + lane) * self.stride + self.first_k;
        &w[from..from + self.k]
    }
}

/// The packed elements.
pub(crate) enum Elements {
    /// bf16 pairs.
    Bf16(Panels<Bf16Block>),
    /// f32.
    F32(Panels<F32Block>),
    /// MXFP4.
    Mxfp4(Panels<Mxfp4Block>),
    /// Few bits and scales.
    Quantised(Quantised),
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

    /// Packs a row-major weight `[n, k]` in MXFP4: `blocks` holds its codes, two to a byte and the lower half first, and
    /// `scales` one exponent for every 32 inputs of a row. Linears give the bits that they give on the same values in bf16.
    ///
    /// # Errors
    /// As for [`Matrix::pack_bf16`], and if `k` is no multiple of 32; [`KernelError::Scales`] and [`KernelError::Scale`].
    pub fn pack_mxfp4(n: usize, k: usize, blocks: &[u8], scales: &[u8]) -> Result<Self, KernelError> {
        Ok(Self { n, k, elements: Elements::Mxfp4(Panels::of_codes(n, k, blocks, scales)?) })
    }

    /// Rounds a row-major f32 weight `[n, k]` to few bits and packs it.
    ///
    /// # Errors
    /// As for [`Matrix::pack_bf16`], and [`KernelError::NonFinite`].
    pub fn quantise_f32(kind: Quantisation, n: usize, k: usize, w: &[f32]) -> Result<Self, KernelError> {
        Self::quantise(kind, n, k, w.len(), |from, out| out.copy_from_slice(&w[from..from + out.len()]))
    }

    /// Rounds a row-major bf16 weight `[n, k]` to few bits and packs it.
    ///
    /// # Errors
    /// As for [`Matrix::quantise_f32`].
    pub fn quantise_bf16(kind: Quantisation, n: usize, k: usize, w: &[u16]) -> Result<Self, KernelError> {
        Self::quantise(kind, n, k, w.len(), |from, out| from_bf16(&w[from..from + out.len()], out))
    }

    fn quantise(
        kind: Quantisation,
        n: usize,
        k: usize,
        found: usize,
        widen: impl Fn(usize, &mut [f32]),
    ) -> Result<Self, KernelError> {
        check_shape(n, k, found)?;
        Ok(Self { n, k, elements: Elements::Quantised(Quantised::pack(kind, n, k, widen)?) })
    }

    /// From its elements, which are those of `[n, k]`.
    pub(crate) fn of(n: usize, k: usize, elements: Elements) -> Self {
        Self { n, k, elements }
    }

    /// Output features.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes that the packed weight keeps in memory, padding included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.elements {
            Elements::Bf16(panels) => panels.blocks.bytes(),
            Elements::F32(panels) => panels.blocks.bytes(),
            Elements::Mxfp4(panels) => panels.blocks.bytes(),
            Elements::Quantised(weights) => weights.bytes(),
        }
    }

    /// Writes row `n` of the weight to `out`, widened: an embedding's vector, without a second copy of the table.
    ///
    /// # Panics
    /// If `n` is out of range or `out` is not `[k]`.
    pub fn row(&self, n: usize, out: &mut [f32]) {
        assert!(n < self.n, "row {n} of a matrix of {} rows", self.n);
        assert_eq!(out.len(), self.k, "out is [k]");
        let (panel, lane) = (n / LANES, n % LANES);
        match &self.elements {
            Elements::Bf16(panels) => {
                for (part, block) in out.chunks_mut(BLOCK_K).zip(panels.panel(panel)) {
                    for (values, line) in part.chunks_mut(2).zip(block) {
                        let pair = line[lane];
                        let halves = [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)];
                        values.iter_mut().zip(halves).for_each(|(value, half)| *value = half);
                    }
                }
            }
            Elements::F32(panels) => {
                for (part, block) in out.chunks_mut(BLOCK_K).zip(panels.panel(panel)) {
                    part.iter_mut().zip(block).for_each(|(value, line)| *value = line[lane]);
                }
            }
            Elements::Mxfp4(panels) => {
                for (part, block) in out.chunks_mut(BLOCK_K).zip(panels.panel(panel)) {
                    part.iter_mut().enumerate().for_each(|(k, value)| *value = block.weight(k, lane));
                }
            }
            Elements::Quantised(weights) => weights.row(n, out),
        }
    }

    /// Panels of sixteen output features.
    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(LANES)
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.elements {
            Elements::Bf16(_) => "bf16",
            Elements::F32(_) => "f32",
            Elements::Mxfp4(_) => "mxfp4",
            Elements::Quantised(weights) => match weights.kind() {
                Quantisation::Q8 => "q8",
                Quantisation::Q4 => "q4",
            },
        };
        write!(f, "Matrix({kind} [{}, {}])", self.n, self.k)
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
}
