//! The operations with AVX2 and FMA: sixteen lanes are two registers.

use std::arch::x86_64::*;

use super::{Arith, LANES, Simd};
use crate::e2m1;

/// Proof that the machine has AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The machine must have AVX2 and FMA.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

/// Eight low and eight high lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct V16(pub(crate) __m256, pub(crate) __m256);

/// Evaluates an intrinsic; `self` is the proof that it may be.
macro_rules! avx2 {
    ($e:expr) => {
        // SAFETY: an `Avx2` exists, so the machine has AVX2 and FMA; loads and stores go through references to arrays
        // of sixteen elements and touch eight of them at offset 0 or 8, or all where they are bytes.
        unsafe { $e }
    };
}

#[inline(always)]
unsafe fn select_lt_half(a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
    avx2!(_mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
}

#[inline(always)]
unsafe fn pow2_half(n: __m256) -> __m256 {
    avx2!({
        let biased = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    })
}

#[inline(always)]
unsafe fn widen_half(from: *const u16) -> __m256 {
    avx2!({
        let halves = _mm_loadu_si128(from.cast());
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    })
}

#[inline(always)]
unsafe fn pairs_half(from: *const u32) -> (__m256, __m256) {
    avx2!({
        let pairs = _mm256_loadu_si256(from.cast());
        let even = _mm256_slli_epi32::<16>(pairs);
        let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        (_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd))
    })
}

#[inline(always)]
unsafe fn round_half(v: __m256) -> __m256 {
    avx2!({
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        // The carry of the rounding could turn a NaN into an infinity: it is made quiet and cut instead.
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let chosen = _mm256_blendv_epi8(rounded, quiet, nan);
        _mm256_castsi256_ps(_mm256_and_si256(chosen, _mm256_set1_epi32(0xffff_0000_u32 as i32)))
    })
}

/// Lane `j` of result `i` is lane `i` of `rows[j]`.
#[inline(always)]
unsafe fn transpose_eight(rows: [__m256; 8]) -> [__m256; 8] {
    let (mut blocks, mut out) = (rows, rows);
    avx2!({
        // Within groups of four rows, element 4 i + j of each goes to half i of register j.
        for group in [0, 4] {
            let [a, b, c, d] = [rows[group], rows[group + 1], rows[group + 2], rows[group + 3]];
            let low =
                [_mm256_castps_pd(_mm256_unpacklo_ps(a, b)), _mm256_castps_pd(_mm256_unpacklo_ps(c, d))];
            let high =
                [_mm256_castps_pd(_mm256_unpackhi_ps(a, b)), _mm256_castps_pd(_mm256_unpackhi_ps(c, d))];
            blocks[group] = _mm256_castpd_ps(_mm256_unpacklo_pd(low[0], low[1]));
            blocks[group + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low[0], low[1]));
            blocks[group + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high[0], high[1]));
            blocks[group + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high[0], high[1]));
        }
        for j in 0..4 {
            out[j] = _mm256_permute2f128_ps::<0x20>(blocks[j], blocks[4 + j]);
            out[4 + j] = _mm256_permute2f128_ps::<0x31>(blocks[j], blocks[4 + j]);
        }
    });
    out
}

/// The codes' bytes at `shift`.
const fn half_codes(shift: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = (e2m1::CODES[i] >> shift) as u8;
        i += 1;
    }
    bytes
}

impl Arith for Avx2 {
    type V = V16;
    #[inline(always)]
    fn splat(self, value: f32) -> V16 {
        let v = avx2!(_mm256_set1_ps(value));
        V16(v, v)
    }
    #[inline(always)]
    fn add(self, a: V16, b: V16) -> V16 {
        avx2!(V16(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(self, a: V16, b: V16) -> V16 {
        avx2!(V16(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(self, a: V16, b: V16) -> V16 {
        avx2!(V16(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn div(self, a: V16, b: V16) -> V16 {
        avx2!(V16(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn fma(self, a: V16, b: V16, c: V16) -> V16 {
        avx2!(V16(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn min(self, a: V16, b: V16) -> V16 {
        avx2!(V16(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn max(self, a: V16, b: V16) -> V16 {
        avx2!(V16(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn select_lt(self, a: V16, b: V16, yes: V16, no: V16) -> V16 {
        avx2!(V16(select_lt_half(a.0, b.0, yes.0, no.0), select_lt_half(a.1, b.1, yes.1, no.1)))
    }
    #[inline(always)]
    fn pow2(self, n: V16) -> V16 {
        avx2!(V16(pow2_half(n.0), pow2_half(n.1)))
    }
}

impl Simd for Avx2 {
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> V16 {
        avx2!(V16(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))))
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> V16 {
        avx2!(V16(widen_half(from.as_ptr()), widen_half(from.as_ptr().add(8))))
    }
    #[inline(always)]
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (V16, V16) {
        let (low, high) = avx2!((pairs_half(from.as_ptr()), pairs_half(from.as_ptr().add(8))));
        (V16(low.0, high.0), V16(low.1, high.1))
    }
    #[inline(always)]
    fn decode_e2m1(
        self,
        codes: &[[u32; LANES]; e2m1::LINES],
        scales: &[u8; LANES],
        to: &mut [[u32; LANES]; 4 * e2m1::LINES],
    ) {
        const LOW: [u8; 16] = half_codes(0);
        const HIGH: [u8; 16] = half_codes(8);
        avx2!({
            let low = _mm256_broadcastsi128_si256(_mm_loadu_si128(LOW.as_ptr().cast()));
            let high = _mm256_broadcastsi128_si256(_mm_loadu_si128(HIGH.as_ptr().cast()));
            let scales = _mm_loadu_si128(scales.as_ptr().cast());
            let scales = [scales, _mm_srli_si128::<8>(scales)];
            for (part, scale) in scales.into_iter().enumerate() {
                let scale = _mm256_slli_epi32::<7>(_mm256_cvtepu8_epi32(scale));
                let scale = _mm256_or_si256(scale, _mm256_slli_epi32::<16>(scale));
                for (words, to) in codes.iter().zip(to.as_chunks_mut::<4>().0) {
                    let mut words = _mm256_loadu_si256(words.as_ptr().add(8 * part).cast());
                    for to in to {
                        // The upper byte of every half has index 0, whose entry is 0.
                        let code = _mm256_and_si256(words, _mm256_set1_epi16(15));
                        let upper = _mm256_slli_epi16::<8>(_mm256_shuffle_epi8(high, code));
                        let unscaled = _mm256_or_si256(_mm256_shuffle_epi8(low, code), upper);
                        // The scale is zero where the code is zero, of either sign.
                        let scale = _mm256_sign_epi16(scale, _mm256_and_si256(code, _mm256_set1_epi16(7)));
                        let pairs = _mm256_add_epi16(unscaled, scale);
                        _mm256_storeu_si256(to.as_mut_ptr().add(8 * part).cast(), pairs);
                        words = _mm256_srli_epi32::<4>(words);
                    }
                }
            }
        });
    }
    #[inline(always)]
    fn transpose(self, rows: [V16; LANES]) -> [V16; LANES] {
        let (mut out, mut part) = (rows, [rows[0].0; 8]);
        for half in [0, 8] {
            for (to, row) in part.iter_mut().zip(&rows[half..]) {
                *to = row.0;
            }
            let low = avx2!(transpose_eight(part));
            for (to, row) in part.iter_mut().zip(&rows[half..]) {
                *to = row.1;
            }
            let high = avx2!(transpose_eight(part));
            for j in 0..8 {
                if half == 0 {
                    (out[j].0, out[8 + j].0) = (low[j], high[j]);
                } else {
                    (out[j].1, out[8 + j].1) = (low[j], high[j]);
                }
            }
        }
        out
    }
    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        avx2!(_mm_prefetch::<_MM_HINT_T0>(line.cast()));
    }
    #[inline(always)]
    fn store(self, v: V16, to: &mut [f32; LANES]) {
        avx2!({
            _mm256_storeu_ps(to.as_mut_ptr(), v.0);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v.1);
        });
    }
    #[inline(always)]
    fn round_bf16(self, v: V16) -> V16 {
        avx2!(V16(round_half(v.0), round_half(v.1)))
    }
}
