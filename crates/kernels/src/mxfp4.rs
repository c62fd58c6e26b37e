//! Weights in MXFP4 as published: codes of four bits (e2m1), and a scale of eight bits (e8m0) for every 32 inputs of a
//! row.
//!
//! What must hold: a weight is its code's number times `2^(scale - 127)`, which is a bf16 value, and a linear gives the
//! bits that it gives on the same values in bf16: blocks are decoded to those of a bf16 panel right before they are
//! multiplied, into a buffer that stays in the innermost cache. Packing enforces two rules: scales above [`MOST_SCALE`]
//! are refused, and a weight below the least normal number, which linears read as zero, becomes zero. It does not know
//! how products are added.

use crate::convert::bf16_to_f32;
use crate::e2m1::{LINES, decode};
use crate::error::KernelError;
use crate::memory::Zeroed;
use crate::panels::{BLOCK_K, Bf16Block, Packed, Panels, Place, Stored, check_shape};
use crate::simd::{LANES, Simd};

/// The greatest scale with which the greatest code, 6, is a bf16 value.
pub(crate) const MOST_SCALE: u8 = 252;

/// 32 input features by 16 output features.
///
/// Line `q` holds inputs `8 q` to `8 q + 7` of each output: of pair `4 q + j`, the even one in bits `4 j..` of the low
/// half and the odd one in the same bits of the high half.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(crate) struct Mxfp4Block {
    codes: [[u32; LANES]; LINES],
    scales: [u8; LANES],
}

// SAFETY: numbers, 256 and 16 bytes of them, at an alignment of 16: no padding.
unsafe impl Zeroed for Mxfp4Block {}

const _: () = assert!(size_of::<Mxfp4Block>() == 17 * 16 && LINES * 8 == BLOCK_K);

/// Place of input `k` in a block: its line, and the shift of its code in the word.
fn place(k: usize) -> (usize, usize) {
    (k / 8, k % 2 * 16 + k % 8 / 2 * 4)
}

impl Stored for Mxfp4Block {
    type Block = Bf16Block;
    #[inline(always)]
    fn plain(_: &[Self]) -> Option<&[Bf16Block]> {
        None
    }
    #[inline(always)]
    fn decode<S: Simd>(&self, s: S, to: &mut Bf16Block) {
        s.decode_e2m1(&self.codes, &self.scales, to);
    }
}

impl Packed for Mxfp4Block {
    const DEPTH: usize = BLOCK_K;
    fn weight(&self, k: usize, lane: usize) -> f32 {
        let (line, shift) = place(k);
        bf16_to_f32(decode(self.codes[line][lane] >> shift, self.scales[lane]))
    }
    fn is_finite(&self) -> bool {
        let finite = |lane| (0..BLOCK_K).all(|k| self.weight(k, lane).is_finite());
        self.scales.iter().all(|scale| *scale <= MOST_SCALE) && (0..LANES).all(finite)
    }
}

impl Mxfp4Block {
    fn fill(&mut self, at: &Place, codes: &[u8], scales: &[u8]) -> Result<(), KernelError> {
        for lane in 0..at.n {
            let (n, group) = (at.first_n + lane, at.first_k / BLOCK_K);
            let index = n * (at.stride / BLOCK_K) + group;
            let scale = scales[index];
            if scale > MOST_SCALE {
                return Err(KernelError::Scale { n, group, scale });
            }
            self.scales[lane] = scale;
            for (pair, both) in codes[index * BLOCK_K / 2..][..BLOCK_K / 2].iter().enumerate() {
                for (half, code) in [both & 15, both >> 4].into_iter().enumerate() {
                    let (line, shift) = place(2 * pair + half);
                    let vanishes = match scale {
                        0 => code & 7 < 4,
                        1 => code & 7 < 2,
                        _ => false,
                    };
                    let code = if vanishes { code & 8 } else { code };
                    self.codes[line][lane] |= u32::from(code) << shift;
                }
            }
        }
        Ok(())
    }
}

impl Panels<Mxfp4Block> {
    /// Packs codes, two to a byte and the lower half first, and scales, both row after row.
    pub(crate) fn of_codes(n: usize, k: usize, codes: &[u8], scales: &[u8]) -> Result<Self, KernelError> {
        let found = codes.len().saturating_mul(2);
        check_shape(n, k, found)?;
        if !k.is_multiple_of(BLOCK_K) {
            return Err(KernelError::Size { field: "k", value: k, rule: "a multiple of 32" });
        }
        if scales.len() != n * k / BLOCK_K {
            return Err(KernelError::Scales { n, k, found: scales.len() });
        }
        Self::pack(n, k, found, |place, block| block.fill(&place, codes, scales))
    }
}
