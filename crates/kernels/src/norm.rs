//! RMS and layer normalisation of rows.
//!
//! What must hold: RMS gives `(x * (1 / sqrt(mean(x²) + eps))) * weight`; a layer's gives `(d * (1 / sqrt(mean(d²) +
//! eps))) * weight + bias` with `d = x - mean(x)`. Squares are added with fused multiply-add and numbers with plain
//! additions, in sixteen lanes (element i in lane i % 16, ascending), and the lanes by a fixed tree; every other
//! operation, square root and divisions too, is rounded once. A row that is not finite, or whose squares overflow,
//! becomes NaN. It does not round to bf16; callers do.

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::kernel::{Kernel, run_on};
use crate::simd::{LANES, Simd, lanes, padded, tree_sum};

/// Rows per task.
const ROWS_PER_TASK: usize = 4;

/// Normalises the rows of `x` (each as long as `weight`) into `out`.
///
/// # Panics
/// If `weight` is empty, `x` is no whole number of rows, or `out` is not as long as `x`.
pub fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "out: its length must be that of x");
    over_rows(cpu, out, weight, &|start, out| {
        out.copy_from_slice(&x[start..start + out.len()]);
        run_on(cpu.isa(), Row { x: out, weight, eps });
    });
}

/// [`rms_norm`] where the result takes the place of `x`.
///
/// # Panics
/// If `weight` is empty or `x` is no whole number of rows.
pub fn rms_norm_in_place(cpu: &Cpu, x: &mut [f32], weight: &[f32], eps: f32) {
    over_rows(cpu, x, weight, &|_, x| run_on(cpu.isa(), Row { x, weight, eps }));
}

/// Centres and normalises the rows of `x` (each as long as `weight` and `bias`) into `out`.
///
/// # Panics
/// If `weight` is empty, `bias` is not as long, `x` is no whole number of rows, or `out` is not as long as `x`.
pub fn layer_norm(cpu: &Cpu, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "out: its length must be that of x");
    assert_eq!(bias.len(), weight.len(), "bias: its length must be that of weight");
    over_rows(cpu, out, weight, &|start, out| {
        out.copy_from_slice(&x[start..start + out.len()]);
        run_on(cpu.isa(), CentredRow { x: out, weight, bias, eps });
    });
}

/// Calls `normalise` with each row and the place where it starts.
fn over_rows(cpu: &Cpu, out: &mut [f32], weight: &[f32], normalise: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let width = weight.len();
    assert!(width > 0, "weight: it must not be empty");
    assert!(out.len().is_multiple_of(width), "x: its length must be a multiple of the weight's, {width}");
    let (len, per_task) = (out.len(), width * ROWS_PER_TASK);
    let out = Disjoint::new(out);
    cpu.run(len.div_ceil(per_task), len, &|task| {
        let start = task * per_task;
        // SAFETY: tasks differ in their rows.
        let rows = unsafe { out.piece(start, per_task.min(len - start)) };
        for (index, row) in rows.chunks_exact_mut(width).enumerate() {
            normalise(start + index * width, row);
        }
    });
}

struct Row<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for Row<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.x.len();
        let (chunks, rest) = self.x.as_chunks_mut::<LANES>();
        let factor = inverse_root(sum_of_squares(s, chunks, rest) / len as f32 + self.eps);
        let (weights, weights_rest) = self.weight.as_chunks::<LANES>();
        for (chunk, weight) in chunks.iter_mut().zip(weights) {
            let y = s.mul(s.mul(s.load(chunk), s.splat(factor)), s.load(weight));
            s.store(y, chunk);
        }
        for (x, weight) in rest.iter_mut().zip(weights_rest) {
            *x = (*x * factor) * weight;
        }
    }
}

/// A sum in the order given above.
#[inline(always)]
fn sum_of_squares<S: Simd>(s: S, chunks: &[[f32; LANES]], rest: &[f32]) -> f32 {
    let mut squares = s.splat(0.0);
    for chunk in chunks {
        let x = s.load(chunk);
        squares = s.fma(x, x, squares);
    }
    let x = s.load(&padded(rest, 0.0));
    squares = s.fma(x, x, squares);
    tree_sum(lanes(s, squares))
}

/// Scale of a row. Squares that overflow give NaN: a factor of zero would hide the overflow in a row of zeros.
#[inline(always)]
fn inverse_root(mean: f32) -> f32 {
    let factor = 1.0 / mean.sqrt();
    if factor == 0.0 { f32::NAN } else { factor }
}

struct CentredRow<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
}

impl Kernel for CentredRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.x.len();
        let (chunks, rest) = self.x.as_chunks_mut::<LANES>();
        let mut sum = s.splat(0.0);
        for chunk in chunks.iter() {
            sum = s.add(sum, s.load(chunk));
        }
        sum = s.add(sum, s.load(&padded(rest, 0.0)));
        let mean = tree_sum(lanes(s, sum)) / len as f32;
        for chunk in chunks.iter_mut() {
            s.store(s.sub(s.load(chunk), s.splat(mean)), chunk);
        }
        for x in rest.iter_mut() {
            *x -= mean;
        }
        let factor = inverse_root(sum_of_squares(s, chunks, rest) / len as f32 + self.eps);
        let (weights, weights_rest) = self.weight.as_chunks::<LANES>();
        let (biases, biases_rest) = self.bias.as_chunks::<LANES>();
        for ((chunk, weight), bias) in chunks.iter_mut().zip(weights).zip(biases) {
            let y = s.mul(s.mul(s.load(chunk), s.splat(factor)), s.load(weight));
            s.store(s.add(y, s.load(bias)), chunk);
        }
        for ((x, weight), bias) in rest.iter_mut().zip(weights_rest).zip(biases_rest) {
            *x = (*x * factor) * weight + bias;
        }
    }
}
