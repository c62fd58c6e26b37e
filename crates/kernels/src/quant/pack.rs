//! Weights in groups of 32 input features that share a scale, and how they are rounded.
//!
//! What must hold: a weight is `scale * (stored - zero)`, stored in a byte (zero at 128) or in four bits (zero at 8);
//! the scale is a bf16 value. A panel is sixteen output features; it is a run of blocks of two groups. A line of 64
//! bytes holds four consecutive input features of each of the sixteen outputs. In a block of bytes, line `i` holds
//! features `4 i` to `4 i + 3`; in a block of nibbles line `i` of a group holds `4 i..` in the low and `16 + 4 i..` in
//! the high ones. The two groups' scales follow the lines, so a panel is one stream of whole cache lines. Rounding is
//! the same on every instruction set.

use super::bytes::{Bytes, LINE};
use crate::convert::bf16_to_f32;
use crate::error::KernelError;
use crate::isa::Isa;
use crate::kernel::{Kernel, run_on};
use crate::memory::{Buffer, Zeroed};
use crate::panels::{Packed, Panels};
use crate::simd::{LANES, Simd, lanes};

/// Input features that share a scale.
pub(crate) const GROUP: usize = 32;
/// Groups of a block.
pub(crate) const GROUPS: usize = 2;
/// Input features of a block.
pub(crate) const BLOCK_K: usize = GROUP * GROUPS;

type Scales = [[u16; LANES]; GROUPS];

/// Two groups of sixteen outputs in bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Q8Block {
    lines: [[u8; LINE]; 16],
    scales: Scales,
}

/// Two groups of sixteen outputs in nibbles.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Q4Block {
    lines: [[u8; LINE]; 8],
    scales: Scales,
}

// SAFETY: bytes and 16-bit numbers, together a multiple of the alignment of 64, so that there is no padding.
unsafe impl Zeroed for Q8Block {}
// SAFETY: as above.
unsafe impl Zeroed for Q4Block {}

/// A block of weights that share their format.
pub(crate) trait Block: Zeroed + Send + Sync {
    /// Stored value of a weight of zero.
    const ZERO: i32;
    /// Least and greatest weight, in scales.
    const RANGE: [i32; 2];

    /// Two vectors of stored weights of a group; `pair` is 0 to 3.
    fn pair<S: Simd, B: Bytes<S>>(&self, b: B, group: usize, pair: usize) -> [B::I; 2];
    /// Place of such a vector's input features: the first byte is feature `4 * place` of the group.
    fn place(pair: usize, half: usize) -> usize;
    /// The products of such a vector with inputs, added to `acc`.
    fn dot<S: Simd, B: Bytes<S>>(b: B, acc: B::I, w: B::I, x: B::I) -> B::I;
    /// The sixteen outputs' scales of a group.
    fn scales(&self, group: usize) -> &[u16; LANES];
    /// Scale and stored weight of input feature `k` of the block, of output `lane`.
    fn stored(&self, k: usize, lane: usize) -> (f32, u8);
    /// Sets a stored weight.
    fn set(&mut self, k: usize, lane: usize, stored: u8);
    /// Sets the scales of a group.
    fn set_scales(&mut self, group: usize, scales: [u16; LANES]);
    /// Scales of a group, one per output; `group` is input features by outputs.
    fn choose<S: Simd>(s: S, group: &Lines) -> S::V;
}

impl<B: Block> Packed for B {
    const DEPTH: usize = BLOCK_K;
    fn weight(&self, k: usize, lane: usize) -> f32 {
        let (scale, stored) = self.stored(k, lane);
        scale * (i32::from(stored) - B::ZERO) as f32
    }
    fn is_finite(&self) -> bool {
        (0..GROUPS).all(|group| self.scales(group).iter().all(|scale| scale & 0x7f80 != 0x7f80))
    }
}

/// A group's weights before they are rounded: a line per input feature.
pub(crate) type Lines = [[f32; LANES]; GROUP];

/// A byte's place in its line.
fn in_line(k: usize, lane: usize) -> usize {
    4 * lane + k % 4
}

const _: () = assert!(size_of::<Q8Block>() == 17 * LINE && size_of::<Q4Block>() == 9 * LINE);

impl Block for Q8Block {
    const ZERO: i32 = 128;
    const RANGE: [i32; 2] = [-127, 127];

    #[inline(always)]
    fn pair<S: Simd, B: Bytes<S>>(&self, b: B, group: usize, pair: usize) -> [B::I; 2] {
        [0, 1].map(|half| b.load(&self.lines[8 * group + Self::place(pair, half)]))
    }

    #[inline(always)]
    fn place(pair: usize, half: usize) -> usize {
        2 * pair + half
    }

    #[inline(always)]
    fn dot<S: Simd, B: Bytes<S>>(b: B, acc: B::I, w: B::I, x: B::I) -> B::I {
        b.dot(acc, w, x)
    }

    #[inline(always)]
    fn scales(&self, group: usize) -> &[u16; LANES] {
        &self.scales[group]
    }

    fn stored(&self, k: usize, lane: usize) -> (f32, u8) {
        (bf16_to_f32(self.scales[k / GROUP][lane]), self.lines[k / 4][in_line(k, lane)])
    }

    fn set(&mut self, k: usize, lane: usize, stored: u8) {
        self.lines[k / 4][in_line(k, lane)] = stored;
    }

    fn set_scales(&mut self, group: usize, scales: [u16; LANES]) {
        self.scales[group] = scales;
    }

    /// The greatest magnitude is 127 scales.
    #[inline(always)]
    fn choose<S: Simd>(s: S, group: &Lines) -> S::V {
        s.div(largest(s, group).0, s.splat(127.0))
    }
}

impl Block for Q4Block {
    const ZERO: i32 = 8;
    const RANGE: [i32; 2] = [-8, 7];

    #[inline(always)]
    fn pair<S: Simd, B: Bytes<S>>(&self, b: B, group: usize, pair: usize) -> [B::I; 2] {
        let both = b.load(&self.lines[4 * group + pair]);
        [b.low(both), b.high(both)]
    }

    #[inline(always)]
    fn place(pair: usize, half: usize) -> usize {
        4 * half + pair
    }

    #[inline(always)]
    fn dot<S: Simd, B: Bytes<S>>(b: B, acc: B::I, w: B::I, x: B::I) -> B::I {
        b.dot_small(acc, w, x)
    }

    #[inline(always)]
    fn scales(&self, group: usize) -> &[u16; LANES] {
        &self.scales[group]
    }

    fn stored(&self, k: usize, lane: usize) -> (f32, u8) {
        let (group, k) = (k / GROUP, k % GROUP);
        let both = self.lines[4 * group + k % 16 / 4][in_line(k, lane)];
        (bf16_to_f32(self.scales[group][lane]), if k < 16 { both & 15 } else { both >> 4 })
    }

    fn set(&mut self, k: usize, lane: usize, stored: u8) {
        let (group, k) = (k / GROUP, k % GROUP);
        let both = &mut self.lines[4 * group + k % 16 / 4][in_line(k, lane)];
        *both = if k < 16 { *both & 0xf0 | stored } else { *both & 0x0f | stored << 4 };
    }

    fn set_scales(&mut self, group: usize, scales: [u16; LANES]) {
        self.scales[group] = scales;
    }

    /// Nine candidates put the weight of the greatest magnitude at -7 to -9 scales. For each the group is rounded and
    /// the scale that fits the rounded weights best is found; the one with the least square error is taken.
    #[inline(always)]
    fn choose<S: Simd>(s: S, group: &Lines) -> S::V {
        let (magnitude, extreme) = largest(s, group);
        let zero = s.splat(0.0);
        // Weights are relative to the extreme one, so that squares neither vanish nor overflow.
        let unit = s.select_lt(zero, magnitude, extreme, s.splat(1.0));
        let (mut best, mut least) = (zero, zero);
        for step in 0..9_i16 {
            let level = s.splat(-7.0 - 0.25 * f32::from(step));
            let (mut along, mut square) = (zero, zero);
            for line in group {
                let relative = s.div(s.load(line), unit);
                let rounded = round_within(s, s.mul(relative, level), Self::RANGE);
                along = s.fma(relative, rounded, along);
                square = s.fma(rounded, rounded, square);
            }
            let fit =
                s.round_bf16(s.mul(s.div(along, s.select_lt(zero, square, square, s.splat(1.0))), unit));
            let relative = s.div(fit, unit);
            // The square error less that of a group of zeros: r^2 * square - 2 r * along.
            let error = s.mul(relative, s.sub(s.mul(relative, square), s.add(along, along)));
            best = s.select_lt(error, least, fit, best);
            least = s.select_lt(error, least, error, least);
        }
        best
    }
}

/// The greatest magnitude of each output's group, and the weight that has it.
#[inline(always)]
fn largest<S: Simd>(s: S, group: &Lines) -> (S::V, S::V) {
    let zero = s.splat(0.0);
    let (mut magnitude, mut extreme) = (zero, zero);
    for line in group {
        let value = s.load(line);
        let size = s.max(value, s.sub(zero, value));
        extreme = s.select_lt(magnitude, size, value, extreme);
        magnitude = s.max(size, magnitude);
    }
    (magnitude, extreme)
}

/// The nearest integer, ties to even, clamped to the range.
#[inline(always)]
fn round_within<S: Simd>(s: S, v: S::V, [least, most]: [i32; 2]) -> S::V {
    // Within the range, adding it leaves no bits for a fraction.
    let shift = s.splat(12_582_912.0);
    let v = s.max(s.min(v, s.splat(most as f32)), s.splat(least as f32));
    s.sub(s.add(v, shift), shift)
}

/// Rounds one group.
struct Round<'a, B> {
    group: &'a Lines,
    index: usize,
    features: usize,
    outputs: usize,
    block: &'a mut B,
}

impl<B: Block> Kernel for Round<'_, B> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scale = s.round_bf16(B::choose(s, self.group));
        let bits = lanes(s, scale).map(|scale| (scale.to_bits() >> 16) as u16);
        self.block.set_scales(self.index, bits);
        // Zero means that every weight is zero or too small for any scale, and `v / infinity` is zero.
        let (zero, infinite) = (s.splat(0.0), s.splat(f32::INFINITY));
        let square = s.max(scale, s.sub(zero, scale));
        let divisor = s.select_lt(zero, square, scale, infinite);
        for (k, line) in self.group[..self.features].iter().enumerate() {
            let rounded = lanes(s, round_within(s, s.div(s.load(line), divisor), B::RANGE));
            for (lane, value) in rounded[..self.outputs].iter().enumerate() {
                let stored = (*value as i32 + B::ZERO) as u8;
                self.block.set(self.index * GROUP + k, lane, stored);
            }
        }
    }
}

impl<B: Block> Panels<B> {
    /// Rounds and packs a weight `[n, k]` whose sizes are at least 1; `widen` gives some elements in f32.
    pub(crate) fn quantise(
        n: usize,
        k: usize,
        widen: impl Fn(usize, &mut [f32]),
    ) -> Result<Self, KernelError> {
        let per_panel = k.div_ceil(BLOCK_K);
        let mut blocks: Buffer<B> = Buffer::zeroed("weight", n.div_ceil(LANES) * per_panel)?;
        let isa = Isa::detect();
        for (index, block) in blocks.iter_mut().enumerate() {
            let (first_n, first_k) = (index / per_panel * LANES, index % per_panel * BLOCK_K);
            let outputs = LANES.min(n - first_n);
            for (index, from) in (first_k..k.min(first_k + BLOCK_K)).step_by(GROUP).enumerate() {
                let features = GROUP.min(k - from);
                let mut group = [[0.0; LANES]; GROUP];
                let mut row = [0.0; GROUP];
                for lane in 0..outputs {
                    let row = &mut row[..features];
                    widen((first_n + lane) * k + from, row);
                    if !row.iter().all(|value| value.is_finite()) {
                        return Err(KernelError::NonFinite { n: first_n + lane });
                    }
                    group.iter_mut().zip(row).for_each(|(line, value)| line[lane] = *value);
                }
                run_on(isa, Round { group: &group, index, features, outputs, block });
            }
        }
        Ok(Self { blocks, per_panel })
    }
}
