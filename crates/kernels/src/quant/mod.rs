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
pub(crate) use pack::{BLOCK_K as QUANTISED_BLOCK_K, Q4Block, Q8Block, Quantised};

use crate::cpu::Cpu;
use crate::linear::over_tasks;
use crate::matrix::{Matrix, Panels};
use bytes::Body;
use dot::Work;
use pack::Block;
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
    let body = Body::of(cpu.isa());
    over_tasks(cpu, w, rows, out, |rows, panels, sink| {
        bytes::dispatch(body, Work { weights: [weights], x, sink, rows, panels });
    });
}
