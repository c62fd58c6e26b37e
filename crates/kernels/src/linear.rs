//! One weight applied to rows.
//!
//! What must hold: an output element is computed whole by one task in the canonical order (see the crate's
//! documentation), so it depends neither on other rows nor on threads and splits. It does not know what the weight is
//! for.

use std::cell::Cell;
use std::ops::Range;

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::kernel::{Kernel, run_flushing};
use crate::matrix::{Elements, Matrix};
use crate::pairs::{
    DotOrder, InPairs, PairBuffer, PairRows, PairTask, PairWork, Paired, pack, words_per_row,
};
use crate::panels::{Panels, Stored};
use crate::path::{Path, path};
use crate::quant;
use crate::simd::{LANES, Simd, load_part, store_part};
use crate::tile::{Dense, Rows, Sink, Work, panels_per_task, rows_per_task};
use muster_types::Compute;

/// `out[r] = w · x[r]`: `x` is `[rows, k]`, `out` is `[rows, n]` and overwritten. For a quantised weight, `x` is
/// quantised into a buffer of the call.
///
/// `x` is rounded by the caller: where `compute` rounds, it holds bf16 values.
///
/// # Panics
/// If `x` or `out` does not fit the weight and each other.
pub fn linear(cpu: &Cpu, w: &Matrix, x: &[f32], compute: Compute, out: &mut [f32]) {
    let rows = x.len() / w.k();
    assert_eq!(x.len(), rows * w.k(), "x: its length must be a multiple of k = {}", w.k());
    assert_eq!(out.len(), rows * w.n(), "out: its length must be rows * n = {rows} * {}", w.n());
    match &w.elements {
        Elements::Bf16(panels) => run_bf16(cpu, w, panels, x, compute, out),
        Elements::Mxfp4(panels) => run_bf16(cpu, w, panels, x, compute, out),
        Elements::F32(panels) => run(cpu, w, panels, x, out),
        Elements::Q8(panels) => run_bytes(cpu, w, panels, x, out),
        Elements::Q4(panels) => run_bytes(cpu, w, panels, x, out),
    }
}

/// [`linear`] on weights that are bf16 values.
fn run_bf16<B: Paired>(
    cpu: &Cpu,
    w: &Matrix,
    weights: &Panels<B>,
    x: &[f32],
    compute: Compute,
    out: &mut [f32],
) {
    match path(cpu.isa(), compute) {
        Path::Lanes => run(cpu, w, weights, x, out),
        Path::Pairs => run_pairs(InPairs, cpu, w, weights, x, out),
        Path::Tiles(order) => run_pairs(order, cpu, w, weights, x, out),
    }
}

/// As [`run`], with the inputs packed in pairs.
fn run_pairs<E: DotOrder, B: Paired>(
    order: E,
    cpu: &Cpu,
    w: &Matrix,
    weights: &Panels<B>,
    x: &[f32],
    out: &mut [f32],
) {
    thread_local! {
        static PACKED: Cell<PairBuffer> = const { Cell::new(PairBuffer::EMPTY) };
    }
    let (k, rows, per_row) = (w.k(), x.len() / w.k(), words_per_row(w.k()));
    let mut buffer = PACKED.take();
    let words = buffer.words(rows * per_row, per_row);
    pack(cpu, words, rows, k, &|row| &x[row * k..(row + 1) * k]);
    let x = PairRows { words, per_row };
    over_tasks(cpu, w, rows, out, |rows, panels, sink| {
        let work = PairWork { weights: [weights], x, sink, rows, panels };
        run_flushing(cpu.isa(), PairTask(order, work));
    });
    PACKED.set(buffer);
}

fn run<B: Stored>(cpu: &Cpu, w: &Matrix, weights: &Panels<B>, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.k();
    let x = Dense { x, k: w.k() };
    over_tasks(cpu, w, rows, out, |rows, panels, sink| {
        run_flushing(cpu.isa(), LinearTask(Work { weights: [weights], x, sink, rows, panels }));
    });
}

fn run_bytes<B: quant::Block>(cpu: &Cpu, w: &Matrix, weights: &Panels<B>, x: &[f32], out: &mut [f32]) {
    let mut memory = quant::Buffers::default();
    let inputs = memory.inputs(cpu, x, w.k());
    over_tasks(cpu, w, x.len() / w.k(), out, |rows, panels, sink| {
        quant::run(cpu, std::array::from_ref(weights), inputs.rows(), sink, rows, panels);
    });
}

/// Shares out `rows` rows times all panels: `task` takes a range of rows, a range of panels and their destination.
fn over_tasks(
    cpu: &Cpu,
    w: &Matrix,
    rows: usize,
    out: &mut [f32],
    task: impl Fn(Range<usize>, Range<usize>, Output<'_>) + Sync,
) {
    let work = rows * w.k() * w.n();
    let per_rows = rows_per_task(w.k());
    let per_panels = panels_per_task(w.panels(), cpu.threads_for(work));
    let columns = w.panels().div_ceil(per_panels);
    let out = Disjoint::new(out);
    // Panels change fastest, so that the rows of a chunk stay in cache.
    cpu.run(rows.div_ceil(per_rows) * columns, work, &|index| {
        let (row, panel) = (index / columns * per_rows, index % columns * per_panels);
        let (rows, panels) = (row..rows.min(row + per_rows), panel..w.panels().min(panel + per_panels));
        task(rows, panels, Output { out: &out, first_row: 0, n: w.n(), bias: None });
    });
}

/// A task of a linear.
pub(crate) struct LinearTask<'a, B, R>(pub(crate) Work<'a, B, R, Output<'a>, 1>);

impl<B: Stored, R: Rows> Kernel for LinearTask<'_, B, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run(s);
    }
}

/// Rows of `n` outputs; a task's row 0 goes to row `first_row`. A bias, one number per output, is added last.
pub(crate) struct Output<'a> {
    pub(crate) out: &'a Disjoint<'a, f32>,
    pub(crate) first_row: usize,
    pub(crate) n: usize,
    pub(crate) bias: Option<&'a [f32]>,
}

impl Sink<1> for Output<'_> {
    #[inline(always)]
    fn put<S: Simd>(&self, s: S, row: usize, panel: usize, [mut value]: [S::V; 1]) {
        let column = panel * LANES;
        let len = LANES.min(self.n - column);
        if let Some(bias) = self.bias {
            value = s.add(value, load_part(s, &bias[column..column + len]));
        }
        // SAFETY: tasks share no (row, panel), and the piece is dropped before the next.
        let piece = unsafe { self.out.piece((self.first_row + row) * self.n + column, len) };
        store_part(s, value, piece);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::amx::{InTiles, Software};
    use crate::isa::Isa;

    #[test]
    fn the_walk_over_tiles_gives_the_bits_of_lanes() {
        // SAFETY: plain Rust runs anywhere.
        let tiles = unsafe { InTiles::<Software>::new() };
        for threads in [1, 3] {
            let cpu = Cpu::new(NonZeroUsize::new(threads).unwrap()).unwrap();
            let matrices =
                [(1, 1), (16, 32), (17, 33), (48, 64), (100, 257), (64, 288), (33, 95), (80, 31)].map(bf16);
            let decoded = [(1, 32), (16, 32), (17, 64), (48, 160), (100, 288), (33, 96)].map(mxfp4);
            for matrix in matrices.iter().chain(&decoded) {
                let (n, k) = (matrix.n(), matrix.k());
                let x = crate::amx::tests::numbers(130 * k, 2);
                let canonical = Cpu::with_isa(NonZeroUsize::MIN, Isa::Portable).unwrap();
                let mut want = vec![0.0; 130 * n];
                linear(&canonical, matrix, &x, Compute::Bf16, &mut want);
                for rows in (1..=40).chain([47, 48, 49, 63, 64, 65, 66, 80, 96, 97, 128, 129, 130]) {
                    let mut out = vec![f32::NAN; rows * n];
                    let x = &x[..rows * k];
                    match &matrix.elements {
                        Elements::Bf16(panels) => run_pairs(tiles, &cpu, matrix, panels, x, &mut out),
                        Elements::Mxfp4(panels) => run_pairs(tiles, &cpu, matrix, panels, x, &mut out),
                        _ => unreachable!("packed as bf16 or MXFP4"),
                    }
                    let what = format!("{matrix:?} {rows} rows");
                    crate::amx::tests::assert_same(&out, &want[..rows * n], &what);
                }
            }
        }
    }

    fn bf16((n, k): (usize, usize)) -> Matrix {
        let mut bits = vec![0; n * k];
        crate::to_bf16(&crate::amx::tests::numbers(n * k, 1), &mut bits);
        Matrix::pack_bf16(n, k, &bits).unwrap()
    }

    fn mxfp4((n, k): (usize, usize)) -> Matrix {
        let codes: Vec<u8> = (0..n * k / 2).map(|i| (i * 101 / 3) as u8).collect();
        let scales: Vec<u8> = (0..n * k / 32).map(|i| [127, 120, 130, 0, 252, 1, 125][i % 7]).collect();
        Matrix::pack_mxfp4(n, k, &codes, &scales).unwrap()
    }
}
