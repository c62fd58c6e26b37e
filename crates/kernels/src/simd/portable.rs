//! The operations in plain Rust: the definition that the other implementations reproduce, and the fallback of machines
//! without them (on x86-64 without FMA it is exact but slow).

use super::{Arith, LANES, Simd};
use crate::convert::{bf16_to_f32, f32_to_bf16};

/// One lane.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

/// Sixteen lanes as an array.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Arith for Scalar {
    type V = f32;
    #[inline(always)]
    fn splat(self, value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    fn div(self, a: f32, b: f32) -> f32 {
        a / b
    }
    #[inline(always)]
    fn fma(self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    fn min(self, a: f32, b: f32) -> f32 {
        if a < b { a } else { b }
    }
    #[inline(always)]
    fn max(self, a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }
    #[inline(always)]
    fn select_lt(self, a: f32, b: f32, yes: f32, no: f32) -> f32 {
        if a < b { yes } else { no }
    }
    #[inline(always)]
    fn pow2(self, n: f32) -> f32 {
        f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23)
    }
}

/// Sixteen lanes as an array, each computed by itself: the operations follow from those of one lane.
pub(super) trait LaneByLane: Copy {
    /// The operations on one lane.
    type One: Arith<V = f32>;
    const ONE: Self::One;
}

impl LaneByLane for Portable {
    type One = Scalar;
    const ONE: Scalar = Scalar;
}

/// `op` lane by lane.
#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], op: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| op(a[i], b[i]))
}

impl<L: LaneByLane> Arith for L {
    type V = [f32; LANES];
    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| L::ONE.add(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| L::ONE.sub(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| L::ONE.mul(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| L::ONE.div(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| L::ONE.fma(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| L::ONE.min(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| L::ONE.max(a, b))
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        std::array::from_fn(|i| L::ONE.select_lt(a[i], b[i], yes[i], no[i]))
    }
    #[inline(always)]
    fn pow2(self, n: Self::V) -> Self::V {
        n.map(|n| L::ONE.pow2(n))
    }
}

impl<L: LaneByLane> Simd for L {
    // Unknown on this target: selects the smaller tiles.
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        *from
    }
    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
        std::array::from_fn(|i| bf16_to_f32(from[i]))
    }
    #[inline(always)]
    fn load_bf16_pairs(self, from: &[u32; LANES]) -> (Self::V, Self::V) {
        let even = std::array::from_fn(|i| f32::from_bits(from[i] << 16));
        let odd = std::array::from_fn(|i| f32::from_bits(from[i] & 0xffff_0000));
        (even, odd)
    }
    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; LANES]) {
        *to = v;
    }
    #[inline(always)]
    fn round_bf16(self, v: Self::V) -> Self::V {
        v.map(|v| bf16_to_f32(f32_to_bf16(v)))
    }
}
