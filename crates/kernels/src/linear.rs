//! One weight applied to rows.
//!
//! What must hold: an output element is computed whole by one task in the canonical order (see the crate's
//! documentation), so rows, threads and splits never show. It does not know what the weight is for.

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::isa::{Kernel, dispatch};
use crate::matrix::{Block, Elements, Matrix, Panels};
use crate::quant;
use crate::simd::{LANES, Simd, store_part};
use crate::tile::{Dense, Rows, Sink, Work, panels_per_task, rows_per_task};

/// `out[r] = w · x[r]`: `x` is `[rows, k]`, `out` is `[rows, n]` and overwritten. A quantised weight reads `x` quantised
/// in its turn, into memory of the call's own.
///
/// # Panics
/// If `x` or `out` does not fit the weight and each other.
pub fn linear(cpu: &Cpu, w: &Matrix, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.k();
    assert_eq!(x.len(), rows * w.k(), "x: its length must be a multiple of k = {}", w.k());
    assert_eq!(out.len(), rows * w.n(), "out: its length must be rows * n = {rows} * {}", w.n());
    match &w.elements {
        Elements::Bf16(panels) => run(cpu, w, panels, x, out),
        Elements::F32(panels) => run(cpu, w, panels, x, out),
        Elements::Quantised(weights) => quant::linear(cpu, w, weights, x, out),
    }
}

fn run<B: Block>(cpu: &Cpu, w: &Matrix, weights: &Panels<B>, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.k();
    let work = x.len() * w.n();
    let per_rows = rows_per_task(w.k());
    let per_panels = panels_per_task(w.panels(), cpu.threads_for(work));
    let columns = w.panels().div_ceil(per_panels);
    let out = Disjoint::new(out);
    let x = Dense { x, k: w.k() };
    // Panels change fastest, so that the rows of a chunk stay in cache.
    cpu.run(rows.div_ceil(per_rows) * columns, work, &|task| {
        let (row, panel) = (task / columns * per_rows, task % columns * per_panels);
        dispatch(
            cpu.isa(),
            LinearTask(Work {
                weights: [weights],
                x,
                sink: Output { out: &out, first_row: 0, n: w.n() },
                rows: row..rows.min(row + per_rows),
                panels: panel..w.panels().min(panel + per_panels),
            }),
        );
    });
}

/// A task of a linear.
pub(crate) struct LinearTask<'a, B, R>(pub(crate) Work<'a, B, R, Output<'a>, 1>);

impl<B: Block, R: Rows> Kernel for LinearTask<'_, B, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run(s);
    }
}

/// Rows of `n` outputs; a task's row 0 goes to row `first_row`.
pub(crate) struct Output<'a> {
    pub(crate) out: &'a Disjoint<'a, f32>,
    pub(crate) first_row: usize,
    pub(crate) n: usize,
}

impl Sink<1> for Output<'_> {
    #[inline(always)]
    fn put<S: Simd>(&self, s: S, row: usize, panel: usize, [value]: [S::V; 1]) {
        let column = panel * LANES;
        // SAFETY: tasks share no (row, panel), and the piece is dropped before the next.
        let piece =
            unsafe { self.out.piece((self.first_row + row) * self.n + column, LANES.min(self.n - column)) };
        store_part(s, value, piece);
    }
}
