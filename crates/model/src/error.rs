//! Why a model could not be loaded.

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
    /// Memory or threads were not to be had.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The device has no room.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The reference implementation failed inside candle.
    #[error("reference computation: {0}")]
    Reference(#[from] candle_core::Error),
    /// An expert that the model does not have.
    #[error("{0} does not exist in this model")]
    NoSuchExpert(ExpertKey),
    /// A tokens list the model cannot run.
    #[error("{0}")]
    Input(String),
}
