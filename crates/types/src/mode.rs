//! Dtypes and modes: small closed sets that travel between crates.

use std::fmt;

/// Element type of stored weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
}

impl DType {
    /// Bytes per element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// What activations are rounded to. Decides the wire dtype of hidden rows and the dtype of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    /// Nothing is rounded; weights are widened exactly. What golden outputs are compared with.
    F32,
    /// The input of every linear layer is rounded to bf16, as bf16 engines do; sums stay in f32.
    Bf16,
    /// As [`Compute::Bf16`], but linear layers on bf16 weights add in the order of the instruction `vdpbf16ps`: other
    /// bits, and faster where a processor has it and no AMX.
    Bf16Pairs,
}

impl Compute {
    /// Element type of hidden rows on the wire.
    #[must_use]
    pub const fn wire_dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 | Self::Bf16Pairs => DType::Bf16,
        }
    }

    /// The mode a checkpoint of this dtype is served in when nobody says otherwise.
    #[must_use]
    pub const fn default_for(weights: DType) -> Self {
        match weights {
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
        }
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Bf16Pairs => "bf16-pairs",
        })
    }
}

/// How expert outputs come back from a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Combine {
    /// One row per (row, expert); the router adds them in ascending expert id. The same bits for every placement.
    Exact,
}

impl fmt::Display for Combine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("exact")
    }
}

/// Devices whose kernels give identical bits. Replicas of one expert stay within one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NumericsClass {
    /// Every CPU: all instruction sets reproduce one canonical reduction order.
    CpuCanonical,
}

impl fmt::Display for NumericsClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cpu-canonical")
    }
}

/// Whether trying again can help, and where. Every error that crosses a process boundary answers this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Retry {
    /// At once, on another replica or router.
    Elsewhere,
    /// Here, after a pause.
    Later,
    /// Not with the same input.
    Never,
}
