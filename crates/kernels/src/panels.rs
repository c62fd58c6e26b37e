//! Panels: how the elements of a weight lie in memory.
//!
//! What must hold: a panel is sixteen output features; it is a run of blocks of some input features; both sizes are
//! padded with zeros. A bf16 block holds sixteen lines, one per pair of input features, each with the sixteen outputs'
//! pairs (the even feature in the low half). That is also the layout of AMX's B operand. An f32 block holds 32 lines,
//! one per input feature; [`crate::quant`] has the quantised ones, [`crate::mxfp4`] those that are decoded to bf16
//! blocks for use. It does not know how the products are added; [`crate::tile`] does.

use crate::error::KernelError;
use crate::memory::{Buffer, Zeroed};
use crate::simd::{LANES, Simd};

/// Input features of a block.
pub(crate) const BLOCK_K: usize = 32;

/// A block of a bf16 panel.
pub(crate) type Bf16Block = [[u32; LANES]; BLOCK_K / 2];
/// A block of an f32 panel.
pub(crate) type F32Block = [[f32; LANES]; BLOCK_K];

/// 32 input features by 16 output features of a weight, as stored.
pub(crate) trait Stored: Zeroed + Send + Sync {
    /// The block that it is decoded to for multiplication.
    type Block: Block;
    /// The blocks themselves, if they need no decoding.
    fn plain(blocks: &[Self]) -> Option<&[Self::Block]>;
    /// Decodes the block for multiplication.
    fn decode<S: Simd>(&self, s: S, to: &mut Self::Block);
}

/// A block ready for multiplication.
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

/// A block as sent from one process to another.
pub(crate) trait Packed: Zeroed {
    /// Its input features.
    const DEPTH: usize;
    /// Input feature `k` of output `lane`, widened.
    fn weight(&self, k: usize, lane: usize) -> f32;
    /// Whether every weight and every scale is a number.
    fn is_finite(&self) -> bool;
}

impl Packed for Bf16Block {
    const DEPTH: usize = BLOCK_K;
    fn weight(&self, k: usize, lane: usize) -> f32 {
        let pair = self[k / 2][lane];
        f32::from_bits(if k.is_multiple_of(2) { pair << 16 } else { pair & 0xffff_0000 })
    }
    fn is_finite(&self) -> bool {
        let finite = |half: u32| half & 0x7f80 != 0x7f80;
        self.as_flattened().iter().all(|&pair| finite(pair) && finite(pair >> 16))
    }
}

impl Packed for F32Block {
    const DEPTH: usize = BLOCK_K;
    fn weight(&self, k: usize, lane: usize) -> f32 {
        self[k][lane]
    }
    fn is_finite(&self) -> bool {
        self.as_flattened().iter().all(|value| value.is_finite())
    }
}

/// Panels of one element type and one length.
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

/// Place of a block in the row-major weight.
pub(crate) struct Place {
    pub(crate) first_n: usize,
    pub(crate) n: usize,
    pub(crate) first_k: usize,
    k: usize,
    pub(crate) stride: usize,
}

impl Place {
    /// The block's part of output feature `lane`.
    pub(crate) fn row<'w, T>(&self, w: &'w [T], lane: usize) -> &'w [T] {
        let from = (self.first_n + lane) * self.stride + self.first_k;
        &w[from..from + self.k]
    }
}

impl<B: Packed> Panels<B> {
    /// Row `n` of the packed weight, widened, rounding errors included.
    pub(crate) fn row(&self, n: usize, out: &mut [f32]) {
        for (part, block) in out.chunks_mut(B::DEPTH).zip(self.panel(n / LANES)) {
            part.iter_mut().enumerate().for_each(|(k, value)| *value = block.weight(k, n % LANES));
        }
    }

    /// Panels from `bytes`, which are whole blocks; `None` when one has a value that is not finite.
    pub(crate) fn of_bytes(k: usize, bytes: &[u8]) -> Result<Option<Self>, KernelError> {
        let mut blocks: Buffer<B> = Buffer::zeroed("weight", bytes.len() / size_of::<B>())?;
        blocks.as_bytes_mut().copy_from_slice(bytes);
        let finite = blocks.iter().all(B::is_finite);
        Ok(finite.then(|| Self { blocks, per_panel: k.div_ceil(B::DEPTH) }))
    }
}
