//! The operations with AVX-512: sixteen lanes are one register.

use std::arch::x86_64::*;

use super::{Arith, LANES, Simd};
use crate::e2m1;

/// Proof that the machine has AVX-512 F and BW (and AVX2 with FMA); with `BF16`, AVX512-BF16 too.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    /// # Safety
    /// The machine must have AVX-512 F and BW, and AVX512-BF16 where `BF16` is true.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

/// Evaluates an intrinsic; `self` is the proof that it may be.
macro_rules! avx512 {
    ($e:expr) => {
        // SAFETY: an `Avx512` exists, so the machine has AVX-512 F and BW (and AVX512-BF16 where its branch is taken);
        // loads and stores go through references to arrays of sixteen elements and touch exactly those.
        unsafe { $e }
    };
}

impl<const BF16: bool> Arith for Avx512<BF16> {
    type V = __m512;
    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        avx512!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        avx512!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        avx512!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes))
    }
    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        avx512!({
            let biased = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    const REGISTERS: usize = 32;
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        avx512!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> __m512 {
        avx512!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (__m512, __m512) {
        avx512!({
            let pairs = _mm512_loadu_si512(from.as_ptr().cast());
            let even = _mm512_slli_epi32::<16>(pairs);
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
        })
    }
    #[inline(always)]
    fn dot_pairs(self, x: u32, w: &[u32; LANES], total: __m512) -> __m512 {
        if BF16 {
            return avx512!({
                let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(x as i32));
                let w: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.as_ptr().cast()));
                _mm512_dpbf16_ps(total, x, w)
            });
        }
        let (even, odd) = self.load_bf16_pairs(w);
        let total = self.fma(self.splat(f32::from_bits(x & 0xffff_0000)), odd, total);
        self.fma(self.splat(f32::from_bits(x << 16)), even, total)
    }
    #[inline(always)]
    fn decode_e2m1(
        self,
        codes: &[[u32; LANES]; e2m1::LINES],
        scales: &[u8; LANES],
        to: &mut [[u32; LANES]; 4 * e2m1::LINES],
    ) {
        avx512!({
            // The table twice, so that the fifth bit of an index does not matter.
            let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(e2m1::CODES.as_ptr().cast()));
            let scale = _mm512_slli_epi32::<7>(_mm512_cvtepu8_epi32(_mm_loadu_si128(scales.as_ptr().cast())));
            let scale = _mm512_or_si512(scale, _mm512_slli_epi32::<16>(scale));
            for (words, to) in codes.iter().zip(to.as_chunks_mut::<4>().0) {
                let mut words = _mm512_loadu_si512(words.as_ptr().cast());
                for to in to {
                    let unscaled = _mm512_permutexvar_epi16(words, table);
                    let some = _mm512_test_epi16_mask(words, _mm512_set1_epi16(7));
                    let pairs = _mm512_mask_add_epi16(unscaled, some, unscaled, scale);
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs);
                    words = _mm512_srli_epi32::<4>(words);
                }
            }
        });
    }
    #[inline(always)]
    fn transpose(self, rows: [__m512; LANES]) -> [__m512; LANES] {
        let (mut blocks, mut out) = (rows, rows);
        avx512!({
            // Within groups of four rows, element 4 i + j of each goes to quarter i of register j.
            for group in [0, 4, 8, 12] {
                let [a, b, c, d] = [rows[group], rows[group + 1], rows[group + 2], rows[group + 3]];
                let low =
                    [_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d))];
                let high =
                    [_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d))];
                blocks[group] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
                blocks[group + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
                blocks[group + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
                blocks[group + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
            }
            // Gathers the quarters of the four groups.
            for j in 0..4 {
                let [a, b, c, d] = [blocks[j], blocks[4 + j], blocks[8 + j], blocks[12 + j]];
                let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
                let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
                out[j] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
                out[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
                out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
                out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
            }
        });
        out
    }
    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        avx512!(_mm_prefetch::<_MM_HINT_T0>(line.cast()));
    }
    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; LANES]) {
        avx512!(_mm512_storeu_ps(to.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn round_bf16(self, v: __m512) -> __m512 {
        avx512!({
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            // The carry of the rounding could turn a NaN into an infinity: it is made quiet and cut instead.
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
            _mm512_castsi512_ps(_mm512_and_si512(chosen, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
        })
    }
}
