//! Errors of loading a model.

use muster_checkpoint::CheckpointError;
use muster_kernels::KernelError;
use muster_types::ExpertKey;

use crate::trunk::device::DeviceError;

/// A model that could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The checkpoint refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A weight could not be packed.
    #[error("{what}: {source}")]
    Pack {
        /// The weight.
        what: String,
        /// The kernel's reason.
        source: KernelError,
    },
    /// Memory or threads could not be allocated.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The device has no room.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The reference implementation failed inside candle.
    #[error("reference computation: {0}")]
    Reference(#[from] candle_core::Error),
    /// The model has no such expert.
    #[error("{0} does not exist in this model")]
    NoSuchExpert(ExpertKey),
    /// The model cannot run this list of tokens.
    #[error("{0}")]
    Input(String),
}
