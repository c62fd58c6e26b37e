//! Group-quantised weights: eight or four bits and a scale for every 32 input features.
//!
//! What must hold: weights are kept in quantised form only; the inputs of a quantised linear are quantised to signed
//! bytes in groups of the same 32 features ([`rows`]); products within a group are added exactly as integers, and the
//! groups' totals in one fixed order ([`dot`]). So a row's bits depend on that row alone, on every instruction set. It
//! does not know what a weight is for.

mod buffers;
mod bytes;
mod dot;
pub(crate) mod pack;
mod rows;

use std::ops::Range;

pub(crate) use buffers::{Buffers, Quantised};
pub(crate) use pack::Block;

use crate::cpu::Cpu;
use crate::panels::Panels;
use crate::tile::Sink;
use bytes::{Body, run_as};
use dot::{Rows, Work};

/// Rows `rows` of `x` times panels `panels` of the matrices.
pub(crate) fn run<B: Block, K: Sink<M>, const M: usize>(
    cpu: &Cpu,
    weights: &[Panels<B>; M],
    x: impl Rows,
    sink: K,
    rows: Range<usize>,
    panels: Range<usize>,
) {
    run_as(Body::of(cpu.isa()), Work { weights: weights.each_ref(), x, sink, rows, panels });
}
