//! The operations with NEON: sixteen lanes are four registers.

use std::arch::aarch64::*;

use super::{Arith, LANES, Simd};

/// NEON. Unlike the others it needs no detection: it is part of the target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon;

const _: () = assert!(cfg!(target_feature = "neon"));

/// Sixteen lanes, four to a register.
#[derive(Debug, Clone, Copy)]
pub(crate) struct V16(float32x4_t, float32x4_t, float32x4_t, float32x4_t);

/// Evaluates an intrinsic.
macro_rules! neon {
    ($e:expr) => {
        // SAFETY: the assertion above found NEON in the target; loads and stores go through references to arrays of
        // sixteen elements and touch those alone.
        unsafe { $e }
    };
}

#[inline(always)]
fn map1(a: V16, op: impl Fn(float32x4_t) -> float32x4_t) -> V16 {
    V16(op(a.0), op(a.1), op(a.2), op(a.3))
}

#[inline(always)]
fn map2(a: V16, b: V16, op: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> V16 {
    V16(op(a.0, b.0), op(a.1, b.1), op(a.2, b.2), op(a.3, b.3))
}

#[inline(always)]
fn select_lt_quarter(a: float32x4_t, b: float32x4_t, yes: float32x4_t, no: float32x4_t) -> float32x4_t {
    neon!(vbslq_f32(vcltq_f32(a, b), yes, no))
}

#[inline(always)]
fn round_quarter(v: float32x4_t) -> float32x4_t {
    neon!({
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        // The carry of the rounding could turn a NaN into an infinity: it is made quiet and cut instead.
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        let chosen = vbslq_u32(vceqq_f32(v, v), rounded, quiet);
        vreinterpretq_f32_u32(vandq_u32(chosen, vdupq_n_u32(0xffff_0000)))
    })
}

/// The low (even) halves of four pairs.
#[inline(always)]
fn even_quarter(pairs: uint32x4_t) -> float32x4_t {
    neon!(vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)))
}

/// The high (odd) halves of four pairs.
#[inline(always)]
fn odd_quarter(pairs: uint32x4_t) -> float32x4_t {
    neon!(vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))))
}

impl Arith for Neon {
    type V = V16;
    #[inline(always)]
    fn splat(self, value: f32) -> V16 {
        let v = neon!(vdupq_n_f32(value));
        V16(v, v, v, v)
    }
    #[inline(always)]
    fn add(self, a: V16, b: V16) -> V16 {
        map2(a, b, |a, b| neon!(vaddq_f32(a, b)))
    }
    #[inline(always)]
    fn sub(self, a: V16, b: V16) -> V16 {
        map2(a, b, |a, b| neon!(vsubq_f32(a, b)))
    }
    #[inline(always)]
    fn mul(self, a: V16, b: V16) -> V16 {
        map2(a, b, |a, b| neon!(vmulq_f32(a, b)))
    }
    #[inline(always)]
    fn div(self, a: V16, b: V16) -> V16 {
        map2(a, b, |a, b| neon!(vdivq_f32(a, b)))
    }
    #[inline(always)]
    fn fma(self, a: V16, b: V16, c: V16) -> V16 {
        // The instruction takes the addend first.
        neon!(V16(
            vfmaq_f32(c.0, a.0, b.0),
            vfmaq_f32(c.1, a.1, b.1),
            vfmaq_f32(c.2, a.2, b.2),
            vfmaq_f32(c.3, a.3, b.3),
        ))
    }
    // `vminq` and `vmaxq` would return any NaN and tell the zeros apart.
    #[inline(always)]
    fn min(self, a: V16, b: V16) -> V16 {
        self.select_lt(a, b, a, b)
    }
    #[inline(always)]
    fn max(self, a: V16, b: V16) -> V16 {
        self.select_lt(b, a, a, b)
    }
    #[inline(always)]
    fn select_lt(self, a: V16, b: V16, yes: V16, no: V16) -> V16 {
        V16(
            select_lt_quarter(a.0, b.0, yes.0, no.0),
            select_lt_quarter(a.1, b.1, yes.1, no.1),
            select_lt_quarter(a.2, b.2, yes.2, no.2),
            select_lt_quarter(a.3, b.3, yes.3, no.3),
        )
    }
    #[inline(always)]
    fn pow2(self, n: V16) -> V16 {
        map1(n, |n| {
            neon!({
                let biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
            })
        })
    }
}

impl Simd for Neon {
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> V16 {
        let from = from.as_ptr();
        neon!(V16(vld1q_f32(from), vld1q_f32(from.add(4)), vld1q_f32(from.add(8)), vld1q_f32(from.add(12))))
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> V16 {
        neon!({
            let (low, high) = (vld1q_u16(from.as_ptr()), vld1q_u16(from.as_ptr().add(8)));
            V16(
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(low)),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(high)),
            )
        })
    }
    #[inline(always)]
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (V16, V16) {
        let from = from.as_ptr();
        let (a, b, c, d) =
            neon!((vld1q_u32(from), vld1q_u32(from.add(4)), vld1q_u32(from.add(8)), vld1q_u32(from.add(12))));
        (
            V16(even_quarter(a), even_quarter(b), even_quarter(c), even_quarter(d)),
            V16(odd_quarter(a), odd_quarter(b), odd_quarter(c), odd_quarter(d)),
        )
    }
    #[inline(always)]
    fn store(self, v: V16, to: &mut [f32; LANES]) {
        let to = to.as_mut_ptr();
        neon!({
            vst1q_f32(to, v.0);
            vst1q_f32(to.add(4), v.1);
            vst1q_f32(to.add(8), v.2);
            vst1q_f32(to.add(12), v.3);
        });
    }
    #[inline(always)]
    fn round_bf16(self, v: V16) -> V16 {
        map1(v, round_quarter)
    }
}
