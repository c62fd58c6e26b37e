//! Group-quantised weights: eight or four bits and a scale for every 32 input features.
//!
//! What must hold: weights are kept quantised alone; the inputs of a quantised linear are quantised to signed bytes in
//! groups of the same 32 features ([`rows`]); products within a group are added exactly as integers, and the groups'
//! totals in one fixed order ([`dot`]). So a row's bits depend on that row alone here as well, on every instruction set.
//! It does not know what a weight is for.

mod bytes;
mod dot;
mod ffn;
mod pack;
mod rows;

pub(crate) use ffn::{Buffers, Stages};
pub use pack::Quantisation;
pub(crate) use pack::Quantised;

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::linear::Output;
use crate::matrix::Matrix;
use crate::tile::{panels_per_task, rows_per_task};
use bytes::Body;
use dot::Work;
use pack::{Block, Panels};
use rows::{QRows, blocks_of, quantise, room};

/// [`crate::linear()`] of a quantised weight.
pub(crate) fn linear(cpu: &Cpu, w: &Matrix, weights: &Quantised, x: &[f32], out: &mut [f32]) {
    let mut inputs = Vec::new();
    let inputs = room(&mut inputs, x.len() / w.k() * blocks_of(w.k()));
    quantise(cpu, x, w.k(), inputs);
    let x = QRows::new(inputs, w.k());
    let rows = inputs.len() / blocks_of(w.k());
    match weights {
        Quantised::Q8(panels) => run(cpu, w, panels, x, rows, out),
        Quantised::Q4(panels) => run(cpu, w, panels, x, rows, out),
    }
}

fn run<B: Block>(cpu: &Cpu, w: &Matrix, weights: &Panels<B>, x: QRows<'_>, rows: usize, out: &mut [f32]) {
    let work = rows * w.k() * w.n();
    let per_rows = rows_per_task(w.k());
    let per_panels = panels_per_task(w.panels(), cpu.threads_for(work));
    let columns = w.panels().div_ceil(per_panels);
    let out = Disjoint::new(out);
    cpu.run(rows.div_ceil(per_rows) * columns, work, &|task| {
        let (row, panel) = (task / columns * per_rows, task % columns * per_panels);
        let work = Work {
            weights: [weights],
            x,
            sink: Output { out: &out, first_row: 0, n: w.n() },
            rows: row..rows.min(row + per_rows),
            panels: panel..w.panels().min(panel + per_panels),
        };
        bytes::dispatch(Body::of(cpu.isa()), work);
    });
}
