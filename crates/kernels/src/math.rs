//! Elementary functions as fixed polynomials, so that their bits depend on neither libm nor the instruction set.
//!
//! What must hold: a scalar function and its sixteen-lane form give the same bits. Errors against the exact value
//! stay within 2 units in the last place ([`silu`] and [`sigmoid`]: 3), subnormal results included; the one exception
//! is [`silu`] below -87, whose results (above -1e-36) are exact to 1e-42.

use crate::isa::Isa;
use crate::kernel::{Kernel, run_on};
use crate::simd::{Arith, LANES, Scalar, Simd, lanes, padded, tree_max, tree_sum};

/// Rounding constant: adding and subtracting it rounds a number below 2^22 to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;
/// Natural logarithm of 2 in two parts; the first has trailing zeros enough that small multiples are exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// e to the power of each lane. x = n ln 2 + r; a polynomial in r (Cephes' `expf`), scaled by 2^n in two steps so
/// that subnormal results are rounded once.
#[inline(always)]
pub(crate) fn exp_lanes<A: Arith>(s: A, x: A::V) -> A::V {
    // Beyond these ends the result is 0 or infinite anyway. The constant comes first so that a NaN passes through.
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let round = s.splat(ROUND);
    let n = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), round), round);
    let r = s.fma(n, s.splat(-LN_2_HIGH), x);
    let r = s.fma(n, s.splat(-LN_2_LOW), r);
    let mut p = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let y = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    let half = s.sub(s.fma(n, s.splat(0.5), round), round);
    s.mul(s.mul(y, s.pow2(half)), s.pow2(s.sub(n, half)))
}

/// [`exp`] for use inside a kernel body.
#[inline(always)]
pub(crate) fn exp_scalar(x: f32) -> f32 {
    exp_lanes(Scalar, x)
}

/// `numerator / (1 + exp(-x))`, by way of exp(-|x|) so that neither end loses accuracy.
#[inline(always)]
fn logistic<A: Arith>(s: A, x: A::V, numerator: A::V) -> A::V {
    let negated = s.sub(s.splat(0.0), x);
    let e = exp_lanes(s, s.min(x, negated));
    let factor = s.select_lt(x, s.splat(0.0), e, s.splat(1.0));
    s.div(s.mul(numerator, factor), s.add(s.splat(1.0), e))
}

/// x times its logistic in each lane.
#[inline(always)]
pub(crate) fn silu_lanes<A: Arith>(s: A, x: A::V) -> A::V {
    logistic(s, x, x)
}

/// 1 over 1 + exp(-x) in each lane.
#[inline(always)]
pub(crate) fn sigmoid_lanes<A: Arith>(s: A, x: A::V) -> A::V {
    logistic(s, x, s.splat(1.0))
}

/// A scalar function of a number, compiled where the hardware's fused multiply-add can be used.
enum OfScalar {
    Exp(f32),
    Sigmoid(f32),
    Silu(f32),
    Ln(f32),
}

impl Kernel for OfScalar {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        match self {
            Self::Exp(x) => exp_lanes(Scalar, x),
            Self::Sigmoid(x) => sigmoid_lanes(Scalar, x),
            Self::Silu(x) => silu_lanes(Scalar, x),
            Self::Ln(x) => ln_scalar(x),
        }
    }
}

/// e to the power of `x`: 0 at negative infinity and below about -104, infinite above about 88.7, NaN for NaN.
#[must_use]
pub fn exp(x: f32) -> f32 {
    run_on(Isa::detect(), OfScalar::Exp(x))
}

/// `1 / (1 + exp(-x))`.
#[must_use]
pub fn sigmoid(x: f32) -> f32 {
    run_on(Isa::detect(), OfScalar::Sigmoid(x))
}

/// `x / (1 + exp(-x))`. NaN at negative infinity, as in the usual frameworks: an overflow stays visible.
#[must_use]
pub fn silu(x: f32) -> f32 {
    run_on(Isa::detect(), OfScalar::Silu(x))
}

/// Natural logarithm: negative infinity at zero of either sign, NaN below it and for NaN.
#[must_use]
pub fn ln(x: f32) -> f32 {
    run_on(Isa::detect(), OfScalar::Ln(x))
}

/// x = 2^e m with m in [√½, √2); a polynomial in m - 1 (Cephes' `logf`).
#[inline(always)]
fn ln_scalar(x: f32) -> f32 {
    if x.is_nan() || x < 0.0 {
        return f32::NAN;
    }
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x.is_infinite() {
        return x;
    }
    // Subnormals are brought into the normal range first.
    let (x, shift) = if x < f32::MIN_POSITIVE { (x * 8_388_608.0, -23) } else { (x, 0) };
    let offset = x.to_bits().wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits()) as i32;
    let exponent = offset >> 23;
    let m = f32::from_bits(x.to_bits().wrapping_sub((exponent << 23) as u32));
    let (r, e) = (m - 1.0, (exponent + shift) as f32);
    let mut p: f32 = 7.037_683_6e-2;
    for coefficient in [
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ] {
        p = p.mul_add(r, coefficient);
    }
    let square = r * r;
    let tail = e.mul_add(LN_2_LOW, p * (square * r));
    e.mul_add(LN_2_HIGH, square.mul_add(-0.5, tail) + r)
}

/// Replaces `x` by its softmax. Entries at negative infinity become 0; a NaN, or nothing above negative infinity,
/// makes all of it NaN. An empty slice stays empty.
pub fn softmax_in_place(x: &mut [f32]) {
    run_on(Isa::detect(), Softmax(x));
}

/// The logarithm of the sum of the exponentials of `x`: negative infinity for an empty slice or one of negative
/// infinities, positive infinity if that occurs, NaN if a NaN does.
#[must_use]
pub fn log_sum_exp(x: &[f32]) -> f32 {
    let max = run_on(Isa::detect(), Max(x));
    if max.is_infinite() {
        return if x.iter().any(|v| v.is_nan()) { f32::NAN } else { max };
    }
    max + ln(run_on(Isa::detect(), SumExp { x, max }))
}

/// The greatest element, negative infinity for none. A NaN may or may not win.
struct Max<'a>(&'a [f32]);

impl Kernel for Max<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut max = s.splat(f32::NEG_INFINITY);
        let (chunks, rest) = self.0.as_chunks();
        for chunk in chunks {
            max = s.max(max, s.load(chunk));
        }
        max = s.max(max, s.load(&padded(rest, f32::NEG_INFINITY)));
        tree_max(lanes(s, max))
    }
}

/// The sum of exp(x - max): lane by lane in ascending order, then over the lanes.
struct SumExp<'a> {
    x: &'a [f32],
    max: f32,
}

impl Kernel for SumExp<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (mut sum, max) = (s.splat(0.0), s.splat(self.max));
        let (chunks, rest) = self.x.as_chunks();
        for chunk in chunks {
            sum = s.add(sum, exp_lanes(s, s.sub(s.load(chunk), max)));
        }
        let rest = s.load(&padded(rest, f32::NEG_INFINITY));
        sum = s.add(sum, exp_lanes(s, s.sub(rest, max)));
        tree_sum(lanes(s, sum))
    }
}

struct Softmax<'a>(&'a mut [f32]);

impl Kernel for Softmax<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let max = Max(self.0).run(s);
        let sum = s.splat(SumExp { x: self.0, max }.run(s));
        let max = s.splat(max);
        let (chunks, rest) = self.0.as_chunks_mut::<LANES>();
        for chunk in chunks {
            let e = exp_lanes(s, s.sub(s.load(chunk), max));
            s.store(s.div(e, sum), chunk);
        }
        let e = exp_lanes(s, s.sub(s.load(&padded(rest, f32::NEG_INFINITY)), max));
        let len = rest.len();
        rest.copy_from_slice(&lanes(s, s.div(e, sum))[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance from the exact value in units of the result's last place.
    fn error_in_ulps(found: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        if nearest.is_infinite() || found.is_infinite() {
            return if nearest == found { 0.0 } else { f64::INFINITY };
        }
        let ulp = f64::from(nearest.abs().next_up()) - f64::from(nearest.abs());
        ((f64::from(found) - exact) / ulp).abs()
    }

    /// Finite numbers of all exponents and both signs.
    fn sweep() -> impl Iterator<Item = f32> {
        (0..u32::MAX).step_by(9973).map(f32::from_bits).filter(|x| x.is_finite())
    }

    fn worst(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64, inputs: impl Iterator<Item = f32>) -> f64 {
        inputs.map(|x| error_in_ulps(f(x), exact(f64::from(x)))).fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_close_to_exact_everywhere() {
        let dense = || (-110_000..110_000).map(|i| i as f32 * 1e-3);
        let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (name, found, bound) in [
            ("exp", worst(exp, f64::exp, sweep().chain(dense())), 2.0),
            ("sigmoid", worst(sigmoid, logistic, sweep().chain(dense())), 3.0),
            ("silu", worst(silu, |x| x * logistic(x), sweep().chain(dense()).filter(|&x| x > -87.0)), 3.0),
            ("ln", worst(ln, f64::ln, sweep().chain(dense()).filter(|&x| x > 0.0)), 2.0),
        ] {
            println!("{name}: {found:.3} ulp");
            assert!(found < bound, "{name} is {found} ulp off");
        }
        for x in sweep().chain(dense()).filter(|&x| x <= -87.0) {
            let exact = f64::from(x) * logistic(f64::from(x));
            assert!((f64::from(silu(x)) - exact).abs() < 1e-42, "silu({x})");
        }
    }

    #[test]
    fn ends_and_special_values() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        assert_eq!(
            [exp(-inf), exp(-1e30), exp(0.0), exp(-0.0), exp(89.0), exp(inf)],
            [0.0, 0.0, 1.0, 1.0, inf, inf]
        );
        assert!(exp(nan).is_nan() && exp(88.7).is_finite() && exp(-103.0) > 0.0);
        assert_eq!([sigmoid(-inf), sigmoid(0.0), sigmoid(inf)], [0.0, 0.5, 1.0]);
        assert_eq!([silu(-1e30), silu(0.0), silu(1e30), silu(inf)], [0.0, 0.0, 1e30, inf]);
        assert!(sigmoid(nan).is_nan() && silu(nan).is_nan() && silu(-inf).is_nan());
        assert_eq!([ln(0.0), ln(-0.0), ln(1.0), ln(inf)], [-inf, -inf, 0.0, inf]);
        assert!(ln(-1e-40).is_nan() && ln(-inf).is_nan() && ln(nan).is_nan());
    }

    /// The lane form of every function on sixteen numbers.
    struct AllLanes<'a>(&'a [f32; LANES]);

    impl Kernel for AllLanes<'_> {
        type Output = [[f32; LANES]; 3];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let x = s.load(self.0);
            [exp_lanes(s, x), sigmoid_lanes(s, x), silu_lanes(s, x)].map(|v| lanes(s, v))
        }
    }

    #[test]
    fn lanes_and_scalars_agree_to_the_bit_on_every_instruction_set() {
        let mut inputs: Vec<f32> = (0..u32::MAX).step_by(99_991).map(f32::from_bits).collect();
        inputs.extend((-7000..7000).map(|i| i as f32 * 0.015));
        let bits = |v: f32| if v.is_nan() { u32::MAX } else { v.to_bits() };
        for isa in Isa::available() {
            for x in inputs.as_chunks().0 {
                let found = run_on(isa, AllLanes(x));
                for (f, found) in [exp, sigmoid, silu].iter().zip(found) {
                    assert_eq!(found.map(bits), x.map(f).map(bits), "{isa} {x:?}");
                }
            }
        }
    }

    struct Round<'a>(&'a [f32; LANES]);

    impl Kernel for Round<'_> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            lanes(s, s.round_bf16(s.load(self.0)))
        }
    }

    #[test]
    fn rounding_of_lanes_is_that_of_slices() {
        let inputs: Vec<f32> = (0..u32::MAX).step_by(7919).map(f32::from_bits).collect();
        for isa in Isa::available() {
            for x in inputs.as_chunks().0 {
                let mut want = *x;
                crate::round_bf16(&mut want);
                assert_eq!(run_on(isa, Round(x)).map(f32::to_bits), want.map(f32::to_bits), "{isa} {x:?}");
            }
        }
    }

    #[test]
    fn softmax_and_log_sum_exp_match_f64() {
        for len in [1, 2, 15, 16, 17, 128, 1000] {
            let x: Vec<f32> = (0..len).map(|i| ((i * 7919) % 1013) as f32 * 0.03 - 11.0).collect();
            let max = f64::from(x.iter().copied().fold(f32::MIN, f32::max));
            let sum: f64 = x.iter().map(|&x| (f64::from(x) - max).exp()).sum();
            let mut found = x.clone();
            softmax_in_place(&mut found);
            for (found, &x) in found.iter().zip(&x) {
                let exact = (f64::from(x) - max).exp() / sum;
                assert!((f64::from(*found) - exact).abs() <= 4e-6 * exact, "{found} {exact}");
            }
            assert!((f64::from(log_sum_exp(&x)) - (max + sum.ln())).abs() < 2e-6);
        }
    }

    #[test]
    fn softmax_and_log_sum_exp_at_the_ends() {
        let inf = f32::INFINITY;
        let softmax = |mut x: Vec<f32>| {
            softmax_in_place(&mut x);
            x
        };
        assert_eq!(softmax(vec![-inf, 3e38, 3e38, -3e38]), [0.0, 0.5, 0.5, 0.0]);
        assert_eq!(softmax(vec![-1e30]), [1.0]);
        assert_eq!(softmax(vec![]), []);
        assert!(softmax(vec![0.0, f32::NAN]).iter().all(|v| v.is_nan()));
        assert!(softmax(vec![-inf, -inf]).iter().all(|v| v.is_nan()));
        assert_eq!(
            [log_sum_exp(&[]), log_sum_exp(&[-inf, -inf]), log_sum_exp(&[1.0, inf])],
            [-inf, -inf, inf]
        );
        assert!(log_sum_exp(&[f32::NAN, inf]).is_nan() && log_sum_exp(&[f32::NAN, 0.0]).is_nan());
        assert_eq!(log_sum_exp(&[-200.0]), -200.0);
    }
}
