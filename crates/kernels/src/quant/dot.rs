//! The inner product of quantised linears: some rows times some panels, in registers.
//!
//! What must hold: a group's products are added exactly, as integers; its total is taken into the row's by
//! `fma(group, weight scale * input scale, total)` in f32, group after group in ascending K, whatever the tile's shape.

use std::ops::Range;

use super::bytes::{ByteKernel, Bytes};
use super::pack::{Block, GROUP, GROUPS};
use super::rows::{QRows, RowBlock};
use crate::matrix::Panels;
use crate::simd::Simd;
use crate::tile::Sink;

/// Where quantised rows are found.
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

/// Rows picked from others by number.
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

/// Fewer rows than this are bound by memory.
const FEW_ROWS: usize = 4;
/// How far ahead of their use weights are asked for that come from memory.
const AHEAD: usize = 4096;

impl<W: Block, R: Rows, K: Sink<M>, const M: usize> ByteKernel for Work<'_, W, R, K, M> {
    #[inline(always)]
    fn run<S: Simd, B: Bytes<S>>(self, s: S, b: B) {
        let mut panel = self.panels.start;
        let end = self.panels.end;
        if self.rows.len() < FEW_ROWS {
            while panel < end {
                match self.rows.len() {
                    1 => self.stream::<S, B, 1>(s, b, panel),
                    2 => self.stream::<S, B, 2>(s, b, panel),
                    _ => self.stream::<S, B, 3>(s, b, panel),
                }
                panel += 1;
            }
        } else if S::REGISTERS >= 32 {
            if M == 1 {
                while panel + 2 <= end {
                    self.by_rows::<S, B, 4, 2>(s, b, panel);
                    panel += 2;
                }
            }
            while panel < end {
                self.by_rows::<S, B, 4, 1>(s, b, panel);
                panel += 1;
            }
        } else {
            while panel < end {
                self.by_rows::<S, B, 2, 1>(s, b, panel);
                panel += 1;
            }
        }
    }
}

impl<W: Block, R: Rows, K: Sink<M>, const M: usize> Work<'_, W, R, K, M> {
    /// All rows, which are `T`, times one panel of each matrix, one matrix after the other: memory gives most to
    /// who reads in one place at a time.
    #[inline(always)]
    fn stream<S: Simd, B: Bytes<S>, const T: usize>(&self, s: S, b: B, panel: usize) {
        let rows = self.inputs::<T>(self.rows.start);
        let mut totals = [[[s.splat(0.0); 1]; M]; T];
        for (m, weights) in self.weights.iter().enumerate() {
            let one = add_products(s, b, [[weights.panel(panel)]], rows, Some(AHEAD));
            for (totals, [one]) in totals.iter_mut().zip(one) {
                totals[m] = one;
            }
        }
        self.put(s, self.rows.start, panel, &totals);
    }

    /// All rows times `C` panels of each matrix, `T` rows at a time.
    #[inline(always)]
    fn by_rows<S: Simd, B: Bytes<S>, const T: usize, const C: usize>(&self, s: S, b: B, panel: usize) {
        let mut row = self.rows.start;
        let end = self.rows.end;
        while row + T <= end {
            self.tile::<S, B, T, C>(s, b, row, panel);
            row += T;
        }
        if T > 2 && row + 2 <= end {
            self.tile::<S, B, 2, C>(s, b, row, panel);
            row += 2;
        }
        if row < end {
            self.tile::<S, B, 1, C>(s, b, row, panel);
        }
    }

    /// `T` rows times `C` panels of each matrix. Only the first rows find the panels in memory.
    #[inline(always)]
    fn tile<S: Simd, B: Bytes<S>, const T: usize, const C: usize>(
        &self,
        s: S,
        b: B,
        row: usize,
        panel: usize,
    ) {
        let mut weights: [[&[W]; C]; M] = [[&[]; C]; M];
        for (weights, matrix) in weights.iter_mut().zip(self.weights) {
            for (c, weights) in weights.iter_mut().enumerate() {
                *weights = matrix.panel(panel + c);
            }
        }
        let ahead = (row == self.rows.start).then_some(AHEAD);
        let totals = add_products(s, b, weights, self.inputs::<T>(row), ahead);
        self.put(s, row, panel, &totals);
    }

    #[inline(always)]
    fn inputs<const T: usize>(&self, row: usize) -> [&[RowBlock]; T] {
        let mut rows: [&[RowBlock]; T] = [&[]; T];
        for (r, inputs) in rows.iter_mut().enumerate() {
            *inputs = self.x.row(row + r);
        }
        rows
    }

    #[inline(always)]
    fn put<S: Simd, const T: usize, const C: usize>(
        &self,
        s: S,
        row: usize,
        panel: usize,
        totals: &[[[S::V; C]; M]; T],
    ) {
        for (r, totals) in totals.iter().enumerate() {
            for c in 0..C {
                let mut values = [s.splat(0.0); M];
                for (value, totals) in values.iter_mut().zip(totals) {
                    *value = totals[c];
                }
                self.sink.put(s, row + r, panel + c, values);
            }
        }
    }
}

/// The totals of some rows over some panels. Weights are asked for `ahead` bytes before they are used.
#[inline(always)]
fn add_products<S: Simd, B: Bytes<S>, W: Block, const T: usize, const C: usize, const M: usize>(
    s: S,
    b: B,
    weights: [[&[W]; C]; M],
    rows: [&[RowBlock]; T],
    ahead: Option<usize>,
) -> [[[S::V; C]; M]; T] {
    let mut totals = [[[s.splat(0.0); C]; M]; T];
    for k in 0..weights[0][0].len() {
        let mut x = [&rows[0][k]; T];
        for r in 0..T {
            x[r] = &rows[r][k];
        }
        let mut w = [[&weights[0][0][k]; C]; M];
        for m in 0..M {
            for c in 0..C {
                w[m][c] = &weights[m][c][k];
                if let Some(ahead) = ahead {
                    b.prefetch(w[m][c], ahead);
                }
            }
        }
        for group in 0..GROUPS {
            add_group(s, b, &mut totals, w, x, group);
        }
    }
    totals
}

/// Adds one group to the totals.
#[inline(always)]
fn add_group<S: Simd, B: Bytes<S>, W: Block, const T: usize, const C: usize, const M: usize>(
    s: S,
    b: B,
    totals: &mut [[[S::V; C]; M]; T],
    w: [[&W; C]; M],
    x: [&RowBlock; T],
    group: usize,
) {
    // Stored weights are off by `ZERO`, which costs `ZERO` times the sum of the inputs.
    let mut sums = [[[b.splat(0); C]; M]; T];
    for r in 0..T {
        sums[r] = [[b.splat(-W::ZERO * x[r].sums[group]); C]; M];
    }
    for pair in 0..4 {
        let mut halves = [[[b.splat(0); C]; M]; 2];
        for m in 0..M {
            for c in 0..C {
                [halves[0][m][c], halves[1][m][c]] = w[m][c].pair::<S, B>(b, group, pair);
            }
        }
        for (half, lines) in halves.iter().enumerate() {
            for r in 0..T {
                let inputs = b.splat(x[r].words[group * (GROUP / 4) + W::place(pair, half)]);
                for m in 0..M {
                    for c in 0..C {
                        sums[r][m][c] = W::dot::<S, B>(b, sums[r][m][c], lines[m][c], inputs);
                    }
                }
            }
        }
    }
    for m in 0..M {
        for c in 0..C {
            let scales = s.load_bf16(w[m][c].scales(group));
            for r in 0..T {
                let scale = s.mul(scales, s.splat(x[r].scales[group]));
                totals[r][m][c] = s.fma(b.to_f32(sums[r][m][c]), scale, totals[r][m][c]);
            }
        }
    }
}
