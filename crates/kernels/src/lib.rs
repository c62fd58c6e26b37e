//! Batch-invariant compute kernels on plain slices.
//!
//! What always holds:
//!
//! - **A row's result depends on that row alone.** Not on the other rows of the call, the number of threads, how the
//!   call was split, or the instruction set: every element has one fixed order of operations, and each instruction
//!   set performs exactly those operations. Only the sign and payload of a NaN are left open.
//! - **Canonical order of a linear.** An output is a running total over 32-wide blocks of K in ascending order. Inside
//!   a block the even and the odd products are accumulated apart, each from +0.0, in ascending order, with a fused
//!   multiply-add in f32; the block is even + odd; K is padded with zeros to a whole block.
//! - **Order of [`Bf16Pairs`](muster_types::Compute::Bf16Pairs)**, for linears on bf16 weights: a running total over
//!   the pairs of K in ascending order; of each pair the odd product is added first, then the even one, each with a
//!   fused multiply-add in f32; K is padded as above.
//! - Weights are packed once, when they are loaded, into the layout that the kernels read ([`Matrix`]).
//! - Linears, and what an expert does between its linears, flush subnormal numbers: each operation reads them as zero
//!   and gives zero of the same sign instead of one. Hardware with the canonical order does so, whatever the
//!   floating-point environment says. Everything else keeps them. The caller must be in the default environment, and
//!   finds it again.
//!
//! A slice of the wrong size is a mistake of the calling code and panics at the entry with the argument's name. Sizes
//! that come from a checkpoint or a configuration go through constructors, which return [`KernelError`].
//!
//! The crate knows nothing of models, tensors, requests or the wire.

mod amx;
mod attention;
mod combine;
mod convert;
mod cpu;
mod disjoint;
mod e2m1;
mod error;
mod expert;
mod ffn;
mod gating;
mod isa;
mod kernel;
mod kv;
mod linear;
pub mod math;
mod matrix;
mod memory;
mod mxfp4;
mod norm;
mod pairs;
mod panels;
mod path;
mod pool;
mod quant;
mod rope;
mod simd;
mod tile;

pub use attention::{AttentionShape, attention};
pub use combine::{NotFinite, Outputs, combine, combine_to_wire, to_wire};
pub use convert::{add_scaled, all_finite, from_bf16, round_bf16, to_bf16};
pub use cpu::Cpu;
pub use error::KernelError;
pub use expert::{Expert, ExpertRows};
pub use ffn::{FfnScratch, grouped_ffn};
pub use gating::Biases;
pub use isa::{Isa, UnknownIsa};
pub use kv::{BLOCK_TOKENS, KvCache, KvShape, KvSlot, KvValues};
pub use linear::linear;
pub use matrix::Matrix;
pub use norm::{layer_norm, rms_norm, rms_norm_in_place};
pub use rope::{Angles, Llama3, Rope, RopePairs, RopeScaling, Yarn, rotate};
