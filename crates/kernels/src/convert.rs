//! Element types and elementwise operations: bf16 rounding, widening, scaled addition, finiteness.
//!
//! bf16 rounding is to nearest, ties to even; a NaN stays a NaN; subnormals and infinities are treated like any
//! other number. The loops are plain: the compiler vectorises them, and each element has one operation order.

#[inline(always)]
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // The carry of the rounding could turn a NaN into an infinity, so a NaN is made quiet and cut.
    let chosen = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
    (chosen >> 16) as u16
}

#[inline(always)]
pub(crate) fn bf16_to_f32(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

/// Rounds every element to the nearest bf16 value.
pub fn round_bf16(x: &mut [f32]) {
    for value in x {
        *value = bf16_to_f32(f32_to_bf16(*value));
    }
}

/// Rounds `x` to bf16.
///
/// # Panics
/// If the lengths differ.
pub fn to_bf16(x: &[f32], out: &mut [u16]) {
    assert_eq!(x.len(), out.len(), "out: its length must be that of x");
    for (out, value) in out.iter_mut().zip(x) {
        *out = f32_to_bf16(*value);
    }
}

/// Widens bf16 exactly.
///
/// # Panics
/// If the lengths differ.
pub fn from_bf16(x: &[u16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "out: its length must be that of x");
    for (out, value) in out.iter_mut().zip(x) {
        *out = bf16_to_f32(*value);
    }
}

/// `acc += factor * x`, the product rounded and then the sum rounded, as in frameworks that multiply and then add.
///
/// # Panics
/// If the lengths differ.
pub fn add_scaled(acc: &mut [f32], x: &[f32], factor: f32) {
    assert_eq!(acc.len(), x.len(), "x: its length must be that of acc");
    for (acc, value) in acc.iter_mut().zip(x) {
        *acc += factor * *value;
    }
}

/// Whether no element is infinite or NaN.
#[must_use]
pub fn all_finite(x: &[f32]) -> bool {
    // Whole chunks without an early exit vectorise; the exit between chunks bounds the cost of a bad row.
    x.chunks(1024).all(|chunk| chunk.iter().fold(true, |finite, value| finite & value.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nearest bf16 by search among the two neighbours, in f64: no bit trick in common with the code under test.
    fn nearest(value: f32) -> f32 {
        let low = f32::from_bits(value.to_bits() & 0xffff_0000);
        let high = f32::from_bits((value.to_bits() & 0xffff_0000).wrapping_add(0x1_0000));
        // Beyond the largest bf16 the next step counts as 2^128 for the choice between it and infinity.
        let reach =
            |v: f32| if v.is_infinite() { 2f64.powi(128).copysign(f64::from(v)) } else { f64::from(v) };
        let (down, up) = ((f64::from(value) - reach(low)).abs(), (reach(high) - f64::from(value)).abs());
        let low_is_even = (low.to_bits() >> 16) & 1 == 0;
        if down < up || (down == up && low_is_even) { low } else { high }
    }

    #[test]
    fn rounding_is_to_nearest_even_everywhere() {
        // A stride coprime to 2^16 walks all exponents, both signs and all kinds of tails.
        let mut bits = 0_u32;
        for _ in 0..300_000 {
            bits = bits.wrapping_add(0x0001_3579);
            for candidate in [bits, bits & 0xffff_0000, bits & 0xffff_0000 | 0x8000, bits | 0x7fff] {
                let value = f32::from_bits(candidate);
                let mut rounded = [value];
                round_bf16(&mut rounded);
                if value.is_nan() {
                    assert!(rounded[0].is_nan());
                } else if value.is_infinite() {
                    assert_eq!(rounded[0], value);
                } else {
                    assert_eq!(rounded[0].to_bits(), nearest(value).to_bits(), "{value:e}");
                }
            }
        }
    }

    #[test]
    fn every_bf16_widens_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (mut wide, mut back) = ([0.0], [0]);
            from_bf16(&[bits], &mut wide);
            to_bf16(&wide, &mut back);
            if wide[0].is_nan() {
                assert_eq!(back[0], bits | 0x40);
            } else {
                assert_eq!(back[0], bits);
            }
        }
    }

    #[test]
    fn scaled_addition_rounds_twice() {
        // 1 + 2^-12, squared and added to -1: one rounding would keep the last bit of the square.
        let x = 1.0 + f32::EPSILON * 2048.0;
        let mut acc = [-1.0];
        add_scaled(&mut acc, &[x], x);
        assert_eq!(acc[0], x * x - 1.0);
        assert_ne!(acc[0], x.mul_add(x, -1.0));
    }

    #[test]
    fn finiteness_is_found_at_any_place() {
        for at in [0, 1023, 1024, 2047, 3000] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![f32::MAX; 3001];
                assert!(all_finite(&x));
                x[at] = bad;
                assert!(!all_finite(&x));
            }
        }
        assert!(all_finite(&[]));
    }
}
