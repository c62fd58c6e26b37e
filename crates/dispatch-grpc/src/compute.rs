//! The one thing a server needs from experts. A trait, so that the server is tested with experts whose answers
//! are known.

pub use muster_engine::dispatch::Rows;
use muster_types::{ExpertId, ExpertKey, LayerId};

/// Experts, on the compute thread.
pub trait ExpertCompute: Send {
    /// Runs experts of one layer. `groups` gives each expert's row numbers, all in range of `rows`, which are in
    /// the wire dtype. Sets `out` to one row `[hidden]` per (expert, row), group after group. The server rounds them to
    /// the wire dtype and checks that they are finite.
    ///
    /// # Errors
    /// See [`ComputeError`]; `out` is unspecified then.
    fn forward(
        &mut self,
        layer: LayerId,
        groups: &[(ExpertId, &[u32])],
        rows: Rows<'_>,
        out: &mut Vec<f32>,
    ) -> Result<(), ComputeError>;
}

/// Why experts gave no rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ComputeError {
    /// The expert is not here.
    #[error("{0} is not held here")]
    NotHeld(ExpertKey),
    /// Anything else.
    #[error("experts failed: {0}")]
    Internal(String),
}
