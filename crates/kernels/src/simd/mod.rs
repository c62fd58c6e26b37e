//! Sixteen-lane vectors, the language of all kernel bodies.
//!
//! A kernel is one generic body over [`Simd`]; [`crate::kernel::run_on`] compiles it once per instruction set. What
//! must hold: each operation gives the same bits in every implementation, NaN payloads aside, so that a kernel's bits
//! follow from its body alone. That is why `min`, `max` and `fma` are pinned below and no approximate instruction
//! (`rsqrt`, `rcp`) appears. The native bf16 dot product gives the same bits as its default implementation only where
//! subnormal numbers are flushed ([`crate::kernel::run_flushing`]).
//!
//! A value of an implementing type is the proof that the machine has the instructions; where the target does not imply
//! them, it is made in one place, after detection. Everything is `inline(always)`: a body must end up whole inside the
//! function that enables the feature.

use crate::e2m1;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod flush;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::{Avx2, V16};
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) use flush::FlushMode;
pub(crate) use flush::PortableFlush;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::{Portable, Scalar};

/// Lanes of a vector, which is also the width of a panel of weights and of a KV block.
pub(crate) const LANES: usize = 16;

/// IEEE single-compute arithmetic, lane by lane.
pub(crate) trait Arith: Copy {
    /// The operand: one lane or sixteen.
    type V: Copy;
    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::V;
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`, rounded once.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a < b ? a : b`; so `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a > b ? a : b`; so `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? yes : no`; so `no` where either is NaN.
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// 2 to the power of `n`, an integer in [-126, 127]; unspecified for another `n`.
    fn pow2(self, n: Self::V) -> Self::V;
}

/// Arithmetic on sixteen lanes, with the loads and stores that the kernels need.
pub(crate) trait Simd: Arith {
    /// Number of sixteen-lane vectors that the registers hold.
    const REGISTERS: usize;
    /// Sixteen numbers.
    fn load(self, from: &[f32; LANES]) -> Self::V;
    /// Sixteen bf16 numbers, widened exactly.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V;
    /// The low (even) and the high (odd) halves of sixteen bf16 pairs, widened exactly.
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (Self::V, Self::V);
    /// `total` plus the dot products of the bf16 pair `x` with sixteen pairs: first the odd (high) product is added,
    /// then the even one, each with a fused multiply-add.
    #[inline(always)]
    fn dot_pairs(self, x: u32, w: &[u32; LANES], total: Self::V) -> Self::V {
        let (even, odd) = self.load_bf16_pairs(w);
        let total = self.fma(self.splat(f32::from_bits(x & 0xffff_0000)), odd, total);
        self.fma(self.splat(f32::from_bits(x << 16)), even, total)
    }
    /// Writes MXFP4 weights as bf16 pairs. Of each of sixteen outputs, pair `4 q + j` has its even code in bits `4 j..`
    /// of the low half of word `q` and its odd one in the same bits of the high half.
    #[inline(always)]
    fn decode_e2m1(
        self,
        codes: &[[u32; LANES]; e2m1::LINES],
        scales: &[u8; LANES],
        to: &mut [[u32; LANES]; 4 * e2m1::LINES],
    ) {
        for (words, to) in codes.iter().zip(to.as_chunks_mut::<4>().0) {
            for (j, to) in to.iter_mut().enumerate() {
                for ((to, word), scale) in to.iter_mut().zip(words).zip(scales) {
                    let half = |shift: usize| u32::from(e2m1::decode(word >> (shift + 4 * j), *scale));
                    *to = half(0) | half(16) << 16;
                }
            }
        }
    }
    /// Lane `j` of result `i` is lane `i` of `rows[j]`.
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut from = [[0.0; LANES]; LANES];
        for (to, row) in from.iter_mut().zip(rows) {
            self.store(row, to);
        }
        let mut out = rows;
        for (i, out) in out.iter_mut().enumerate() {
            let mut column = [0.0; LANES];
            for (to, row) in column.iter_mut().zip(&from) {
                *to = row[i];
            }
            *out = self.load(&column);
        }
        out
    }
    /// Prefetches the cache line at `line`, which may be any address; changes no result.
    #[inline(always)]
    fn prefetch(self, _line: *const u8) {}
    /// Writes the lanes.
    fn store(self, v: Self::V, to: &mut [f32; LANES]);
    /// Rounds every lane to bf16, as [`crate::round_bf16`] does.
    fn round_bf16(self, v: Self::V) -> Self::V;
}

/// The lanes of `v`.
#[inline(always)]
pub(crate) fn lanes<S: Simd>(s: S, v: S::V) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    s.store(v, &mut out);
    out
}

/// Up to sixteen numbers, padded with zeros.
#[inline(always)]
pub(crate) fn load_part<S: Simd>(s: S, from: &[f32]) -> S::V {
    match from.try_into() {
        Ok(whole) => s.load(whole),
        Err(_) => s.load(&padded(from, 0.0)),
    }
}

/// Writes as many of the lanes as `to` is long.
#[inline(always)]
pub(crate) fn store_part<S: Simd>(s: S, v: S::V, to: &mut [f32]) {
    match to.try_into() {
        Ok(whole) => s.store(v, whole),
        Err(_) => to.copy_from_slice(&lanes(s, v)[..to.len()]),
    }
}

/// Rounds every lane to bf16 and writes the lanes in pairs, the even one in the low half.
#[inline(always)]
pub(crate) fn store_bf16_pairs<S: Simd>(s: S, v: S::V, to: &mut [u32; LANES / 2]) {
    let rounded = lanes(s, s.round_bf16(v));
    for (word, [low, high]) in to.iter_mut().zip(rounded.as_chunks().0) {
        *word = low.to_bits() >> 16 | high.to_bits() & 0xffff_0000;
    }
}

/// Sum of sixteen lanes in one fixed order: halves are added until one lane is left.
#[inline(always)]
pub(crate) fn tree_sum(v: [f32; LANES]) -> f32 {
    tree(v, |a, b| a + b)
}

/// Greatest of sixteen lanes in the same fixed order; a NaN may or may not win.
#[inline(always)]
pub(crate) fn tree_max(v: [f32; LANES]) -> f32 {
    tree(v, |a, b| if a > b { a } else { b })
}

#[inline(always)]
fn tree(v: [f32; LANES], both: impl Fn(f32, f32) -> f32) -> f32 {
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for i in 0..8 {
        eight[i] = both(v[i], v[i + 8]);
    }
    for i in 0..4 {
        four[i] = both(eight[i], eight[i + 4]);
    }
    both(both(four[0], four[2]), both(four[1], four[3]))
}

/// Up to sixteen numbers in an array, padded with `fill`.
#[inline(always)]
pub(crate) fn padded(from: &[f32], fill: f32) -> [f32; LANES] {
    let mut out = [fill; LANES];
    out[..from.len()].copy_from_slice(from);
    out
}
