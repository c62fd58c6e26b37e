//! Computation of a model: trunk, gate, experts and sampler, over the kernels and a checkpoint.
//!
//! A family is data here ([`muster_checkpoint::spec::ModelSpec`]); no family is named. The trunk runs a step over
//! two micro-batch lanes and reaches its experts only through
//! [`ExpertDispatch`](muster_engine::dispatch::ExpertDispatch), so it does not know whether they are in this
//! process. Everything is synchronous. [`mod@reference`] is a second, plain implementation on candle tensors that
//! shares nothing with the first but the checkpoint, and exists to be compared with.

pub mod card;
pub mod defaults;
pub mod digests;
mod error;
pub mod evaluate;
pub mod experts;
pub mod footprint;
pub mod gate;
pub mod local;
pub mod reference;
pub mod sampler;
pub mod step;
pub mod trunk;
mod weights;

pub use error::ModelError;

/// Progress of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes read, checked and packed.
    pub done_bytes: u64,
    /// Bytes there are to read.
    pub total_bytes: u64,
}
