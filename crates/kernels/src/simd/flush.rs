//! Portable arithmetic that treats subnormal inputs as zero and flushes subnormal results to zero, signs kept.
//!
//! What must hold: every operation gives the bits that x86-64 gives under [`FlushMode`]. There a result counts as
//! subnormal when it is below the least normal number after rounding to 24 bits with an unbounded exponent, so a result
//! that reaches the least normal number only by the coarser subnormal rounding is flushed too.

use super::portable::LaneByLane;
use super::{Arith, Scalar};

/// Sixteen lanes as an array, flushed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PortableFlush;

/// One lane, flushed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScalarFlush;

impl LaneByLane for PortableFlush {
    type One = ScalarFlush;
    const ONE: ScalarFlush = ScalarFlush;
}

/// A power of two that scales numbers near the least normal one far above it.
const LIFT: f32 = 18_446_744_073_709_551_616.0;

#[inline(always)]
fn zeroed(v: f32) -> f32 {
    if v.abs() < f32::MIN_POSITIVE { v * 0.0 } else { v }
}

/// Flushes `result`; `lifted` returns it times [`LIFT`], rounded as with an unbounded exponent.
#[inline(always)]
fn flushed(result: f32, lifted: impl FnOnce() -> f32) -> f32 {
    let size = result.abs();
    let tiny =
        size < f32::MIN_POSITIVE || (size == f32::MIN_POSITIVE && lifted().abs() < f32::MIN_POSITIVE * LIFT);
    if tiny { result * 0.0 } else { result }
}

impl Arith for ScalarFlush {
    type V = f32;
    #[inline(always)]
    fn splat(self, value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        // A sum near the least normal number is exact.
        zeroed(zeroed(a) + zeroed(b))
    }
    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        zeroed(zeroed(a) - zeroed(b))
    }
    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        let (a, b) = (zeroed(a), zeroed(b));
        flushed(a * b, || if a.abs() < b.abs() { a * LIFT * b } else { b * LIFT * a })
    }
    #[inline(always)]
    fn div(self, a: f32, b: f32) -> f32 {
        let (a, b) = (zeroed(a), zeroed(b));
        flushed(a / b, || a * LIFT / b)
    }
    #[inline(always)]
    fn fma(self, a: f32, b: f32, c: f32) -> f32 {
        let (a, b, c) = (zeroed(a), zeroed(b), zeroed(c));
        flushed(a.mul_add(b, c), || {
            // The smaller factor is scaled, which cannot overflow: the product is near the least normal number.
            let (small, large) = if a.abs() < b.abs() { (a, b) } else { (b, a) };
            (small * LIFT).mul_add(large, c * LIFT)
        })
    }
    #[inline(always)]
    fn min(self, a: f32, b: f32) -> f32 {
        Scalar.min(zeroed(a), zeroed(b))
    }
    #[inline(always)]
    fn max(self, a: f32, b: f32) -> f32 {
        Scalar.max(zeroed(a), zeroed(b))
    }
    #[inline(always)]
    fn select_lt(self, a: f32, b: f32, yes: f32, no: f32) -> f32 {
        Scalar.select_lt(zeroed(a), zeroed(b), yes, no)
    }
    #[inline(always)]
    fn pow2(self, n: f32) -> f32 {
        Scalar.pow2(n)
    }
}

/// While it lives, this thread's SSE and AVX arithmetic rounds to nearest, flushes subnormals both ways and traps
/// nothing.
#[cfg(target_arch = "x86_64")]
pub(crate) struct FlushMode {
    before: u32,
}

#[cfg(target_arch = "x86_64")]
impl FlushMode {
    /// All exceptions masked, nearest, flush-to-zero (bit 15) and denormals-are-zero (bit 6).
    const FLUSHED: u32 = 0x1f80 | 1 << 15 | 1 << 6;

    /// Changes the mode. Between this and the drop, only functions that are never inlined may be called: the compiler
    /// assumes the default mode and could move inlined arithmetic across.
    #[inline(always)]
    pub(crate) fn set() -> Self {
        let (mut before, flushed) = (0_u32, Self::FLUSHED);
        // SAFETY: stores and loads this thread's control register through valid pointers; the value sets no reserved
        // bit and unmasks no exception.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut before, options(nostack, preserves_flags));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const flushed, options(nostack, preserves_flags));
        }
        Self { before }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for FlushMode {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: gives back the value that was read.
        unsafe {
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const self.before, options(nostack, preserves_flags));
        }
    }
}
