//! Packings of weights, and the activation between an expert's linears.

use std::fmt;

/// Storage of a packed weight's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Packing {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// One byte per element, -127 to 127, times a bf16 scale for every 32 inputs of a row.
    Q8,
    /// Four bits per element, -8 to 7, times a bf16 scale for every 32 inputs of a row; scales may be negative.
    Q4,
    /// OCP Microscaling: four bits per element, and a byte of scale for every 32 inputs of a row.
    Mxfp4,
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            Self::Mxfp4 => "mxfp4",
        })
    }
}

/// The activation between an expert's gate and up projections and its down projection.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Gating {
    /// `silu(gate) * up`.
    #[default]
    Silu,
    /// `(up + 1) * (gate * sigmoid(alpha * gate))`, with gate at most `limit` and up within `-limit..=limit`.
    ClampedSwish {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Bound on gate and up, above 0.
        limit: f32,
    },
}
