//! The inner product of quantised linears: some rows times some panels, in registers.
//!
//! What must hold: a group's products are added exactly, as integers; its total is taken into the row's by
//! `fma(group, weight scale * input scale, total)` in f32, group after group in ascending K, whatever the tile's shape.

use std::ops::Range;

use super::bytes::{ByteKernel, Bytes};
use super::pack::{Block, GROUP, GROUPS};
use super::rows::{QRows, RowBlock};
use crate::panels::Panels;
use crate::simd::Simd;
use crate::tile::Sink;

/// Lookup of quantised rows.
pub(crate) trait Rows: Copy {
    /// Row `index`.
    fn row(&self, index: usize) -> &[RowBlock];
}

impl Rows for QRows<'_> {
    #[inline(always)]
    fn row(&self, index: usize) -> &[RowBlock] {
        QRows::row(self, index)
    }
}

/// Rows picked by number.
#[derive(Clone, Copy)]
pub(crate) struct Picked<'a> {
    pub(crate) from: QRows<'a>,
    pub(crate) rows: &'a [u32],
}

impl Rows for Picked<'_> {
    #[inline(always)]
    fn row(&self, index: usize) -> &[RowBlock] {
        self.from.row(self.rows[index] as usize)
    }
}

/// Rows `rows` times panels `panels` of `M` matrices.
pub(crate) struct Work<'a, W, R, K, const M: usize> {
    pub(crate) weights: [&'a Panels<W>; M],
    pub(crate) x: R,
    pub(crate) sink: K,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
}

/// Prefetch distance of weights, in bytes.
const AHEAD: usize = 4096;

impl<W: Block, R: Rows, K: Sink<M>, const M: usize> ByteKernel for Work<'_, W, R, K, M> {
    /// Panel by panel, rows in tiles of four or eight: enough accumulators to hide the latency of an inner product
    /// where the registers allow it.
    #[inline(always)]
    fn run<S: Simd, B: Bytes<S>>(self, s: S, b: B) {
        for panel in self.panels.clone() {
            let mut row = self.rows.start;
            while row < self.rows.end {
                // Only the first rows read the panel from memory; later ones find it in cache.
                let ahead = (row == self.rows.start).then_some(AHEAD);
                row += match self.rows.end - row {
                    1 => self.tile::<S, B, 1>(s, b, row, panel, ahead),
                    2 => self.tile::<S, B, 2>(s, b, row, panel, ahead),
                    3..=4 => self.tile::<S, B, 4>(s, b, row, panel, ahead),
                    _ if S::REGISTERS < 32 => self.tile::<S, B, 4>(s, b, row, panel, ahead),
                    _ => self.tile::<S, B, 8>(s, b, row, panel, ahead),
                };
            }
        }
    }
}

impl<W: Block, R: Rows, K: Sink<M>, const M: usize> Work<'_, W, R, K, M> {
    /// Computes up to `T` rows from `row` on times a panel of each matrix, one matrix after the other, because a single
    /// stream has the most memory bandwidth. Returns the number of rows.
    #[inline(always)]
    fn tile<S: Simd, B: Bytes<S>, const T: usize>(
        &self,
        s: S,
        b: B,
        row: usize,
        panel: usize,
        ahead: Option<usize>,
    ) -> usize {
        let count = T.min(self.rows.end - row);
        // The last row fills the unused places of the tile.
        let mut rows = [self.x.row(row); T];
        for (r, inputs) in rows.iter_mut().enumerate() {
            *inputs = self.x.row(row + r.min(count - 1));
        }
        let mut totals = [[s.splat(0.0); M]; T];
        for (m, weights) in self.weights.iter().enumerate() {
            let of_one = add_products(s, b, weights.panel(panel), rows, ahead);
            for (totals, total) in totals.iter_mut().zip(of_one) {
                totals[m] = total;
            }
        }
        for (r, totals) in totals.into_iter().enumerate().take(count) {
            self.sink.put(s, row + r, panel, totals);
        }
        count
    }
}

/// The totals of `T` rows over a panel. Weights are prefetched `ahead` bytes before use.
#[inline(always)]
fn add_products<S: Simd, B: Bytes<S>, W: Block, const T: usize>(
    s: S,
    b: B,
    weights: &[W],
    rows: [&[RowBlock]; T],
    ahead: Option<usize>,
) -> [S::V; T] {
    let mut totals = [s.splat(0.0); T];
    for (k, w) in weights.iter().enumerate() {
        let mut x = [&rows[0][k]; T];
        for r in 0..T {
            x[r] = &rows[r][k];
        }
        if let Some(ahead) = ahead {
            b.prefetch(w, ahead);
        }
        for group in 0..GROUPS {
            add_group(s, b, &mut totals, w, x, group);
        }
    }
    totals
}

/// Adds one group to the totals.
#[inline(always)]
fn add_group<S: Simd, B: Bytes<S>, W: Block, const T: usize>(
    s: S,
    b: B,
    totals: &mut [S::V; T],
    w: &W,
    x: [&RowBlock; T],
    group: usize,
) {
    // Stored weights are off by `ZERO`, which costs `ZERO` times the sum of the inputs.
    let mut sums = [b.splat(0); T];
    for r in 0..T {
        sums[r] = b.splat(-W::ZERO * x[r].sums[group]);
    }
    for pair in 0..4 {
        for (half, line) in w.pair::<S, B>(b, group, pair).into_iter().enumerate() {
            for r in 0..T {
                let inputs = b.splat(x[r].words[group * (GROUP / 4) + W::place(pair, half)]);
                sums[r] = W::dot::<S, B>(b, sums[r], line, inputs);
            }
        }
    }
    let scales = s.load_bf16(w.scales(group));
    for r in 0..T {
        let scale = s.mul(scales, s.splat(x[r].scales[group]));
        totals[r] = s.fma(b.to_f32(sums[r]), scale, totals[r]);
    }
}
