//! Rows of activations in groups of 32 signed bytes that share a scale.
//!
//! What must hold: `scale = max |x| / 127` in f32, an element is `x / scale` rounded to the nearest integer, ties to
//! even, within [-127, 127]; a group of zeros, or one so small that its scale is zero, has zeros and scale zero; a
//! group with an element that is not finite has scale NaN, so that every result from it is NaN. A row depends on itself
//! alone.

use super::pack::{BLOCK_K, GROUP, GROUPS};
use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::kernel::{Kernel, run_on};
use crate::simd::Simd;

/// Two groups of a row.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct RowBlock {
    /// Four elements per word, the first in the lowest byte.
    pub(crate) words: [i32; BLOCK_K / 4],
    /// The groups' scales.
    pub(crate) scales: [f32; GROUPS],
    /// Sums of the groups' elements.
    pub(crate) sums: [i32; GROUPS],
}

impl RowBlock {
    const ZERO: Self = Self { words: [0; BLOCK_K / 4], scales: [0.0; GROUPS], sums: [0; GROUPS] };
}

/// Consecutive quantised rows.
#[derive(Clone, Copy)]
pub(crate) struct QRows<'a> {
    blocks: &'a [RowBlock],
    per_row: usize,
}

impl<'a> QRows<'a> {
    /// Rows of `k` elements in `blocks`.
    pub(crate) fn new(blocks: &'a [RowBlock], k: usize) -> Self {
        Self { blocks, per_row: blocks_of(k) }
    }

    #[inline(always)]
    pub(crate) fn row(&self, index: usize) -> &'a [RowBlock] {
        &self.blocks[index * self.per_row..(index + 1) * self.per_row]
    }
}

/// Blocks of a row of `k` elements.
pub(crate) fn blocks_of(k: usize) -> usize {
    k.div_ceil(BLOCK_K)
}

/// Makes room for `blocks` blocks.
pub(crate) fn room(scratch: &mut Vec<RowBlock>, blocks: usize) -> &mut [RowBlock] {
    if scratch.len() < blocks {
        scratch.resize(blocks, RowBlock::ZERO);
    }
    &mut scratch[..blocks]
}

/// Quantises rows of `k` elements each.
pub(crate) fn quantise(cpu: &Cpu, x: &[f32], k: usize, out: &mut [RowBlock]) {
    let (rows, per_row) = (x.len() / k, blocks_of(k));
    debug_assert_eq!(out.len(), rows * per_row);
    // A group costs about as much as a thousand multiply-adds of the kernels that use it.
    let work = x.len() * 32;
    let per_task = rows.div_ceil(cpu.threads_for(work) * 4).max(1);
    let out = Disjoint::new(out);
    cpu.run(rows.div_ceil(per_task), work, &|task| {
        let (from, to) = (task * per_task, rows.min((task + 1) * per_task));
        // SAFETY: tasks share no row.
        let out = unsafe { out.piece(from * per_row, (to - from) * per_row) };
        run_on(cpu.isa(), QuantiseRows { x: &x[from * k..to * k], k, out });
    });
}

struct QuantiseRows<'a> {
    x: &'a [f32],
    k: usize,
    out: &'a mut [RowBlock],
}

impl Kernel for QuantiseRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, out) in self.x.chunks_exact(self.k).zip(self.out.chunks_exact_mut(blocks_of(self.k))) {
            for (x, out) in x.chunks(BLOCK_K).zip(out) {
                match x.try_into() {
                    Ok(whole) => block(whole, out),
                    Err(_) => {
                        let mut last = [0.0; BLOCK_K];
                        last[..x.len()].copy_from_slice(x);
                        block(&last, out);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn block(x: &[f32; BLOCK_K], out: &mut RowBlock) {
    let (groups, _) = x.as_chunks::<GROUP>();
    let (words, _) = out.words.as_chunks_mut::<{ GROUP / 4 }>();
    for (index, (group, words)) in groups.iter().zip(words).enumerate() {
        let (scale, bytes) = group_of(group);
        out.scales[index] = scale;
        out.sums[index] = bytes.iter().map(|&byte| i32::from(byte)).sum();
        for (word, four) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = i32::from_le_bytes(four.map(i8::cast_unsigned));
        }
    }
}

/// Scale and elements of one group. Element by element and with integer maxima, so that vectorisation cannot change the
/// result.
#[inline(always)]
fn group_of(x: &[f32; GROUP]) -> (f32, [i8; GROUP]) {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    // Magnitudes compare as their bits do, NaN above all.
    let largest = x.iter().fold(0, |largest: u32, value| largest.max(value.to_bits() & 0x7fff_ffff));
    let scale = if largest < INFINITY { f32::from_bits(largest) / 127.0 } else { f32::NAN };
    let divisor = if scale > 0.0 { scale } else { f32::INFINITY };
    (
        scale,
        x.map(|value| {
            let value = value / divisor;
            let value = if value < 127.0 { value } else { 127.0 };
            let value = if value > -127.0 { value } else { -127.0 };
            // Adding 2^23 + 2^22 leaves no bits for a fraction, and the low byte is the integer.
            (value + 12_582_912.0).to_bits() as i8
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(x: &[f32; GROUP]) -> (f32, [i8; GROUP]) {
        let largest = x.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let scale = largest / 127.0;
        let element = |value: f32| (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
        (scale, if scale == 0.0 { [0; GROUP] } else { x.map(element) })
    }

    #[test]
    fn elements_are_rounded_to_the_nearest_and_ties_to_even() {
        let mut x = [0.0; GROUP];
        x[..8].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.0]);
        let (scale, bytes) = group_of(&x);
        assert_eq!(scale, 1.0);
        assert_eq!(bytes[..8], [127, 0, 2, 2, 0, -2, 126, -127]);
    }

    #[test]
    fn any_magnitude_follows_the_rule() {
        for exponent in -149..128 {
            let unit = 2.0_f64.powi(exponent) as f32;
            let x: [f32; GROUP] = std::array::from_fn(|i| {
                unit * (1.0 - (i * 7 % GROUP) as f32 / 16.0) * (1.0 + i as f32 / 97.0)
            });
            let (scale, bytes) = group_of(&x);
            assert_eq!((scale.to_bits(), bytes), (plain(&x).0.to_bits(), plain(&x).1), "2^{exponent}");
        }
        assert_eq!(group_of(&[0.0; GROUP]), (0.0, [0; GROUP]));
        assert_eq!(group_of(&[-f32::MAX; GROUP]).1, [-127; GROUP]);
    }

    #[test]
    fn what_is_not_finite_shows_in_the_scale() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; GROUP];
            x[17] = bad;
            assert!(group_of(&x).0.is_nan());
        }
    }
}
