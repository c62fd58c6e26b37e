//! Inputs, contexts and plain restatements that the kernel tests share. Nothing here uses lanes, tiles or packing.

#![allow(dead_code)] // every test binary uses its part

use std::num::NonZeroUsize;

use muster_kernels::{Biases, Cpu, Isa, math};
use muster_types::{Compute, Gating};

/// Numbers that follow from a seed (SplitMix64).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A number between -1 and 1.
    pub(crate) fn f32(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.f32()).collect()
    }

    /// Mostly plain numbers, with zeros of both signs, subnormals, huge numbers and (`ends`) infinities among them.
    pub(crate) fn odd_vec(&mut self, len: usize, ends: bool) -> Vec<f32> {
        (0..len)
            .map(|_| {
                let plain = self.f32();
                match self.below(24) {
                    0 => 0.0,
                    1 => -0.0,
                    2 => plain * 1e-39,
                    3 => f32::from_bits(1).copysign(plain),
                    4 => plain * 1e-20,
                    5 => plain * 1e18,
                    6 if ends => f32::MAX.copysign(plain),
                    7 if ends && self.below(8) == 0 => f32::INFINITY.copysign(plain),
                    _ => plain,
                }
            })
            .collect()
    }
}

/// Rounds to bf16 by adding the rounding bias to the integer form; inputs have no NaN.
pub(crate) fn to_bf16_values(x: &[f32]) -> Vec<f32> {
    x.iter()
        .map(|v| f32::from_bits((v.to_bits() + 0x7fff + ((v.to_bits() >> 16) & 1)) & 0xffff_0000))
        .collect()
}

/// The upper halves of numbers that are bf16 values.
pub(crate) fn bf16_bits(x: &[f32]) -> Vec<u16> {
    x.iter().map(|v| (v.to_bits() >> 16) as u16).collect()
}

/// Bits for comparison: all NaNs are one.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }).collect()
}

/// Fails with the first place where the bits differ.
pub(crate) fn assert_same(found: &[f32], want: &[f32], what: &str) {
    assert_eq!(found.len(), want.len(), "{what}: lengths");
    let (found_bits, want_bits) = (bits(found), bits(want));
    if let Some(i) = (0..found.len()).find(|&i| found_bits[i] != want_bits[i]) {
        panic!("{what}: element {i} is {:e}, should be {:e}", found[i], want[i]);
    }
}

pub(crate) fn cpu(threads: usize, isa: Isa) -> Cpu {
    let threads = NonZeroUsize::new(threads).expect("a context has a thread");
    Cpu::with_isa(threads, isa).expect("tests use what the machine has")
}

/// One context per instruction set of this machine.
pub(crate) fn cpus() -> Vec<Cpu> {
    Isa::available().into_iter().map(|isa| cpu(1, isa)).collect()
}

/// Subnormal numbers become zero.
fn flush(v: f32) -> f32 {
    if v.is_subnormal() { 0.0_f32.copysign(v) } else { v }
}

/// `a * b + c` with subnormal inputs read as zero and subnormal results flushed. Exactly: by way of a sum in two f64
/// parts, which tells whether 24 bits with an unbounded exponent would stay below the least normal number.
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    let (a, b, c) = (flush(a), flush(b), flush(c));
    let rounded = flush(a.mul_add(b, c));
    if rounded.abs() != f32::MIN_POSITIVE {
        return rounded;
    }
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let part = sum - product;
    let rest = (product - (sum - part)) + (c - part);
    let sign = f64::from(rounded.signum());
    let halfway = f64::from(f32::MIN_POSITIVE) * (1.0 - f64::from(f32::EPSILON) / 4.0);
    let below = sum * sign < halfway || (sum * sign == halfway && rest * sign < 0.0);
    if below { 0.0_f32.copysign(rounded) } else { rounded }
}

/// `a + b`, flushed as [`fma`] is.
pub(crate) fn add(a: f32, b: f32) -> f32 {
    flush(flush(a) + flush(b))
}

/// The canonical order, word for word: blocks of 32, even and odd products apart, their sum to the total,
/// every step flushed.
pub(crate) fn dot(x: &[f32], w: &[f32]) -> f32 {
    let padded = x.len().next_multiple_of(32);
    let at = |v: &[f32], i: usize| v.get(i).copied().unwrap_or(0.0);
    let mut total = 0.0_f32;
    for block in (0..padded).step_by(32) {
        let (mut even, mut odd) = (0.0_f32, 0.0_f32);
        for i in (block..block + 32).step_by(2) {
            even = fma(at(x, i), at(w, i), even);
            odd = fma(at(x, i + 1), at(w, i + 1), odd);
        }
        total = add(total, add(even, odd));
    }
    total
}

/// The order of `vdpbf16ps`: one total over the pairs, padded to whole blocks of 32, the odd product before the even
/// one, every step flushed.
pub(crate) fn dot_pairs(x: &[f32], w: &[f32]) -> f32 {
    let at = |v: &[f32], i: usize| v.get(i).copied().unwrap_or(0.0);
    (0..x.len().next_multiple_of(32)).step_by(2).fold(0.0, |total, i| {
        let odd = fma(at(x, i + 1), at(w, i + 1), total);
        fma(at(x, i), at(w, i), odd)
    })
}

/// `[rows, k]` times `[n, k]`, both bf16 where `order` is that of pairs.
pub(crate) fn linear(x: &[f32], w: &[f32], k: usize, order: Compute) -> Vec<f32> {
    let dot = if order == Compute::Bf16Pairs { dot_pairs } else { dot };
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w))).collect()
}

/// The activation between an expert's linears, word for word.
pub(crate) fn gated(gating: Gating, gate: f32, up: f32) -> f32 {
    match gating {
        Gating::Silu => math::silu(gate) * up,
        Gating::ClampedSwish { alpha, limit } => {
            let gate = if gate > limit { limit } else { gate };
            let up = up.clamp(-limit, limit);
            (up + 1.0) * (gate * math::sigmoid(alpha * gate))
        }
    }
}

/// An activation with a limit so low that numbers from [`Numbers`] reach it.
pub(crate) const CLAMPED: Gating = Gating::ClampedSwish { alpha: 1.702, limit: 1.25 };

pub(crate) fn biases(numbers: &mut Numbers, hidden: usize, intermediate: usize) -> Biases {
    let [gate, up, down] = [intermediate, intermediate, hidden].map(|len| numbers.vec(len));
    Biases { gate, up, down }
}

/// Rows of outputs with the bias added.
pub(crate) fn biased(mut rows: Vec<f32>, bias: &[f32]) -> Vec<f32> {
    for row in rows.chunks_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(value, bias)| *value = add(*value, *bias));
    }
    rows
}

/// All compute modes.
pub(crate) const MODES: [Compute; 3] = [Compute::F32, Compute::Bf16, Compute::Bf16Pairs];

/// Sum of sixteen lanes by halves.
pub(crate) fn tree_sum(lanes: [f32; 16]) -> f32 {
    let mut v = lanes.to_vec();
    while v.len() > 1 {
        let half = v.len() / 2;
        v = (0..half).map(|i| v[i] + v[i + half]).collect();
    }
    v[0]
}
