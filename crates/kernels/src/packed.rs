//! Packed weights as plain bytes, to be handed from one process to another.
//!
//! What must hold: the bytes depend on the weight and its [`Packing`] alone, not on the instruction set, and a matrix
//! made of the bytes of another is that matrix. They are little-endian, as every machine is that this crate runs on.

use crate::error::KernelError;
use crate::matrix::{BLOCK_K, Bf16Block, Elements, F32Block, Matrix, Panels};
use crate::memory::{Buffer, Zeroed};
use crate::mxfp4::Mxfp4Block;
use crate::quant::{Q4Block, Q8Block, QUANTISED_BLOCK_K, Quantisation, Quantised};
use crate::simd::LANES;

const _: () = assert!(cfg!(target_endian = "little"), "packed weights are little-endian");

/// How the elements of a packed weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Packing {
    /// bf16.
    Bf16,
    /// f32.
    F32,
    /// MXFP4: four bits, and eight for every 32 inputs of a row.
    Mxfp4,
    /// Few bits and scales.
    Quantised(Quantisation),
}

impl Packing {
    /// Bytes of a packed weight `[n, k]`, padding included; `None` when there is no such weight or its bytes cannot be
    /// counted.
    #[must_use]
    pub fn bytes(self, n: usize, k: usize) -> Option<usize> {
        if n == 0 || k == 0 {
            return None;
        }
        if self == Self::Mxfp4 && !k.is_multiple_of(BLOCK_K) {
            return None;
        }
        let (block, depth) = match self {
            Self::Bf16 => (size_of::<Bf16Block>(), BLOCK_K),
            Self::F32 => (size_of::<F32Block>(), BLOCK_K),
            Self::Mxfp4 => (size_of::<Mxfp4Block>(), BLOCK_K),
            Self::Quantised(Quantisation::Q8) => (size_of::<Q8Block>(), QUANTISED_BLOCK_K),
            Self::Quantised(Quantisation::Q4) => (size_of::<Q4Block>(), QUANTISED_BLOCK_K),
        };
        n.div_ceil(LANES).checked_mul(k.div_ceil(depth))?.checked_mul(block)
    }
}

impl Matrix {
    /// How the elements are stored.
    #[must_use]
    pub fn packing(&self) -> Packing {
        match &self.elements {
            Elements::Bf16(_) => Packing::Bf16,
            Elements::F32(_) => Packing::F32,
            Elements::Mxfp4(_) => Packing::Mxfp4,
            Elements::Quantised(weights) => Packing::Quantised(weights.kind()),
        }
    }

    /// The packed weight; as many bytes as [`Packing::bytes`] says.
    #[must_use]
    pub fn packed(&self) -> &[u8] {
        match &self.elements {
            Elements::Bf16(panels) => panels.blocks.as_bytes(),
            Elements::F32(panels) => panels.blocks.as_bytes(),
            Elements::Mxfp4(panels) => panels.blocks.as_bytes(),
            Elements::Quantised(Quantised::Q8(panels)) => panels.blocks.as_bytes(),
            Elements::Quantised(Quantised::Q4(panels)) => panels.blocks.as_bytes(),
        }
    }

    /// The matrix `[n, k]` with these packed bytes.
    ///
    /// # Errors
    /// [`KernelError::Packed`] when they are not as many as there must be or have a value that is not finite; and when
    /// memory is short.
    pub fn from_packed(packing: Packing, n: usize, k: usize, bytes: &[u8]) -> Result<Self, KernelError> {
        let want = packing.bytes(n, k);
        if want != Some(bytes.len()) {
            return Err(KernelError::Packed { n, k, bytes: bytes.len() });
        }
        let elements = match packing {
            Packing::Bf16 => Elements::Bf16(panels(k, BLOCK_K, bytes)?),
            Packing::F32 => Elements::F32(panels(k, BLOCK_K, bytes)?),
            Packing::Mxfp4 => Elements::Mxfp4(panels(k, BLOCK_K, bytes)?),
            Packing::Quantised(Quantisation::Q8) => {
                Elements::Quantised(Quantised::Q8(panels(k, QUANTISED_BLOCK_K, bytes)?))
            }
            Packing::Quantised(Quantisation::Q4) => {
                Elements::Quantised(Quantised::Q4(panels(k, QUANTISED_BLOCK_K, bytes)?))
            }
        };
        let finite = match &elements {
            Elements::Bf16(panels) => panels.blocks.iter().flatten().flatten().all(|&pair| {
                let finite = |half: u32| half & 0x7f80 != 0x7f80;
                finite(pair) && finite(pair >> 16)
            }),
            Elements::F32(panels) => panels.blocks.iter().flatten().flatten().all(|value| value.is_finite()),
            Elements::Mxfp4(panels) => panels.blocks.iter().all(Mxfp4Block::is_finite),
            Elements::Quantised(weights) => weights.is_finite(),
        };
        if finite {
            Ok(Self::of(n, k, elements))
        } else {
            Err(KernelError::Packed { n, k, bytes: bytes.len() })
        }
    }
}

/// Panels of these bytes, which are whole blocks.
fn panels<B: Zeroed>(k: usize, depth: usize, bytes: &[u8]) -> Result<Panels<B>, KernelError> {
    let mut blocks: Buffer<B> = Buffer::zeroed("weight", bytes.len() / size_of::<B>())?;
    blocks.as_bytes_mut().copy_from_slice(bytes);
    Ok(Panels { blocks, per_panel: k.div_ceil(depth) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Packing; 5] = [
        Packing::Bf16,
        Packing::F32,
        Packing::Mxfp4,
        Packing::Quantised(Quantisation::Q8),
        Packing::Quantised(Quantisation::Q4),
    ];

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
            Packing::Quantised(kind) => Matrix::quantise_f32(kind, n, k, &wide),
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
                assert_eq!(Some(matrix.bytes()), packing.bytes(n, k));
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
            // A NaN wherever it can be.
            let bad = vec![0xff; bytes.len()];
            let text = Matrix::from_packed(packing, 17, k, &bad).unwrap_err().to_string();
            assert!(text.contains("not finite"), "{text}");
        }
    }
}
