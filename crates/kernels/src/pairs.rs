//! Linears whose weights and inputs are both bf16, the inputs packed in pairs as the weights are.
//!
//! What must hold: a [`DotOrder`] gives each output element one fixed order of operations, whatever the rows and panels
//! around it. It does not know where rows come from nor where results go; [`Sink`] does.

use std::ops::Range;

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::kernel::Kernel;
use crate::panels::{BLOCK_K, Bf16Block, Panels, Stored};
use crate::simd::{LANES, Simd};
use crate::tile::{Ahead, CHUNK_BLOCKS, DECODED_BLOCKS, Decoded, MAX_ROWS, Sink, panels_at, plain};

/// Rows of memory that must follow the last row: tiles are loaded whole.
const SPARE_ROWS: usize = LANES - 1;

/// Words of a row of `k` inputs: one per pair, padded to whole blocks.
pub(crate) fn words_per_row(k: usize) -> usize {
    k.div_ceil(BLOCK_K) * (BLOCK_K / 2)
}

/// A cache line of pairs.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; LANES]);

/// Memory for packed rows, grown to the largest use. Its content between uses is meaningless.
#[derive(Debug, Default)]
pub(crate) struct PairBuffer(Vec<Line>);

impl PairBuffer {
    /// No memory yet.
    pub(crate) const EMPTY: Self = Self(Vec::new());

    /// Room for at least `words` words in front of spare rows of at most `per_row` words.
    pub(crate) fn words(&mut self, words: usize, per_row: usize) -> &mut [u32] {
        let lines = (words + SPARE_ROWS * per_row).div_ceil(LANES);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; LANES]));
        }
        let start = self.0.as_mut_ptr().cast();
        // SAFETY: a line is sixteen words without padding, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(start, self.0.len() * LANES) }
    }
}

/// Consecutive rows of pairs, with memory for [`SPARE_ROWS`] more behind them.
#[derive(Clone, Copy)]
pub(crate) struct PairRows<'a> {
    pub(crate) words: &'a [u32],
    pub(crate) per_row: usize,
}

impl<'a> PairRows<'a> {
    /// The rows from `first` on.
    pub(crate) fn from(self, first: usize) -> Self {
        Self { words: &self.words[first * self.per_row..], ..self }
    }

    /// `count` rows from row `first` on.
    #[inline(always)]
    pub(crate) fn rows(&self, first: usize, count: usize) -> &'a [u32] {
        &self.words[first * self.per_row..(first + count) * self.per_row]
    }
}

/// Packs `rows` rows of bf16 values; `row` gives each as `k` numbers.
pub(crate) fn pack<'x>(
    cpu: &Cpu,
    words: &mut [u32],
    rows: usize,
    k: usize,
    row: &(dyn Fn(usize) -> &'x [f32] + Sync),
) {
    const ROWS: usize = 16;
    let per_row = words_per_row(k);
    let words = Disjoint::new(words);
    cpu.run(rows.div_ceil(ROWS), rows * k, &|task| {
        for index in task * ROWS..rows.min((task + 1) * ROWS) {
            // SAFETY: every row has its own piece.
            pack_row(row(index), unsafe { words.piece(index * per_row, per_row) });
        }
    });
}

fn pack_row(x: &[f32], out: &mut [u32]) {
    let (pairs, rest) = x.as_chunks::<2>();
    let (whole, padding) = out.split_at_mut(pairs.len());
    for (word, [low, high]) in whole.iter_mut().zip(pairs) {
        *word = low.to_bits() >> 16 | high.to_bits() & 0xffff_0000;
    }
    padding.fill(0);
    if let [last] = rest {
        padding[0] = last.to_bits() >> 16;
    }
}

/// Rows `rows` (at most [`MAX_ROWS`]) times panels `panels` of `M` matrices.
pub(crate) struct PairWork<'a, B, K, const M: usize> {
    pub(crate) weights: [&'a Panels<B>; M],
    pub(crate) x: PairRows<'a>,
    pub(crate) sink: K,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
}

/// Weights multiplied as bf16 blocks.
pub(crate) trait Paired: Stored<Block = Bf16Block> {}

impl<B: Stored<Block = Bf16Block>> Paired for B {}

/// An order of operations and its implementation.
pub(crate) trait DotOrder: Copy + Sync {
    /// Computes all of `work`.
    fn run<S: Simd, B: Paired, K: Sink<M>, const M: usize>(self, s: S, work: &PairWork<'_, B, K, M>);
}

/// Work in one order.
pub(crate) struct PairTask<'a, E, B, K, const M: usize>(pub(crate) E, pub(crate) PairWork<'a, B, K, M>);

impl<E: DotOrder, B: Paired, K: Sink<M>, const M: usize> Kernel for PairTask<'_, E, B, K, M> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run(s, &self.1);
    }
}

/// The order of `vdpbf16ps`: one running total over the pairs of K in ascending order; of each pair the odd product is
/// added first, then the even one, each with a fused multiply-add.
#[derive(Clone, Copy)]
pub(crate) struct InPairs;

impl DotOrder for InPairs {
    #[inline(always)]
    fn run<S: Simd, B: Paired, K: Sink<M>, const M: usize>(self, s: S, work: &PairWork<'_, B, K, M>) {
        let mut panel = work.panels.start;
        let end = work.panels.end;
        if S::REGISTERS < 32 {
            while panel < end {
                work.by_chunks::<S, 1>(s, panel);
                panel += 1;
            }
            return;
        }
        if M == 1 {
            // Few rows have few totals each, so they take more panels to hide the latency of an addition.
            while work.rows.len() <= 2 && panel + 4 <= end {
                work.by_chunks::<S, 4>(s, panel);
                panel += 4;
            }
        }
        while (M == 1 || work.rows.len() <= 2) && panel + 2 <= end {
            work.by_chunks::<S, 2>(s, panel);
            panel += 2;
        }
        while panel < end {
            work.by_chunks::<S, 1>(s, panel);
            panel += 1;
        }
    }
}

impl<B: Paired, K: Sink<M>, const M: usize> PairWork<'_, B, K, M> {
    /// All rows times `C` panels of each matrix. K is cut into chunks as in [`crate::tile`], for the same reason.
    #[inline(always)]
    fn by_chunks<S: Simd, const C: usize>(&self, s: S, panel: usize) {
        let stored = panels_at::<B, M, C>(self.weights, panel);
        let blocks = stored[0][0].len();
        let mut carried = [[[s.splat(0.0); C]; M]; MAX_ROWS];
        if let Some(weights) = plain(stored) {
            let chunk = if self.rows.len() <= 8 { blocks } else { CHUNK_BLOCKS };
            for start in (0..blocks).step_by(chunk) {
                self.by_rows::<S, C, true>(s, weights, 0, start..blocks.min(start + chunk), &mut carried);
            }
        } else {
            let mut decoded = Decoded::new();
            for start in (0..blocks).step_by(DECODED_BLOCKS) {
                let end = blocks.min(start + DECODED_BLOCKS);
                let weights = decoded.take(s, stored, start..end);
                self.by_rows::<S, C, false>(s, weights, start, 0..end - start, &mut carried);
            }
        }
        for (row, totals) in self.rows.clone().zip(&carried) {
            for c in 0..C {
                self.sink.put(s, row, panel + c, totals.map(|panels| panels[c]));
            }
        }
    }

    /// Adds some blocks of K to the totals of all rows, as many rows at a time as the registers hold. The first of the
    /// weights is block `first` of K; `FETCH` prefetches the blocks that follow.
    #[inline(always)]
    fn by_rows<S: Simd, const C: usize, const FETCH: bool>(
        &self,
        s: S,
        weights: [[&[Bf16Block]; C]; M],
        first: usize,
        blocks: Range<usize>,
        carried: &mut [[[S::V; C]; M]; MAX_ROWS],
    ) {
        let (mut at, rows) = (0, self.rows.len());
        if S::REGISTERS >= 32 && C * M <= 2 {
            while at + 8 <= rows {
                self.add_products::<S, 8, C, FETCH>(s, weights, first, at, blocks.clone(), carried);
                at += 8;
            }
            if at + 4 <= rows {
                self.add_products::<S, 4, C, FETCH>(s, weights, first, at, blocks.clone(), carried);
                at += 4;
            }
        }
        while at + 2 <= rows {
            self.add_products::<S, 2, C, FETCH>(s, weights, first, at, blocks.clone(), carried);
            at += 2;
        }
        if at < rows {
            self.add_products::<S, 1, C, FETCH>(s, weights, first, at, blocks, carried);
        }
    }

    /// Adds some blocks of K to the totals of `T` rows from `self.rows.start + at` on.
    #[inline(always)]
    fn add_products<S: Simd, const T: usize, const C: usize, const FETCH: bool>(
        &self,
        s: S,
        weights: [[&[Bf16Block]; C]; M],
        first: usize,
        at: usize,
        blocks: Range<usize>,
        carried: &mut [[[S::V; C]; M]; MAX_ROWS],
    ) {
        let x: [&[[u32; LANES]]; T] =
            std::array::from_fn(|r| &self.x.rows(self.rows.start + at + r, 1).as_chunks().0[first..]);
        let carried: &mut [[[S::V; C]; M]; T] =
            carried[at..].first_chunk_mut().expect("there are as many totals as rows");
        let mut totals = *carried;
        let ahead = Ahead::new(weights, C);
        for b in blocks {
            let lines: [[&Bf16Block; C]; M] =
                std::array::from_fn(|m| std::array::from_fn(|c| &weights[m][c][b]));
            let inputs: [&[u32; LANES]; T] = std::array::from_fn(|r| &x[r][b]);
            for pair in 0..BLOCK_K / 2 {
                if FETCH {
                    for line in lines.as_flattened() {
                        ahead.fetch(s, *line, b, pair);
                    }
                }
                for r in 0..T {
                    for m in 0..M {
                        for c in 0..C {
                            totals[r][m][c] =
                                s.dot_pairs(inputs[r][pair], &lines[m][c][pair], totals[r][m][c]);
                        }
                    }
                }
            }
        }
        *carried = totals;
    }
}
