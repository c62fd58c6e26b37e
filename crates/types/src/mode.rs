//! Dtypes and modes: small closed sets that travel between crates.

use std::fmt;
use std::str::FromStr;

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

/// Rounding of activations. Determines the wire dtype of hidden rows and the dtype of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    /// Nothing is rounded; weights are widened exactly. The mode of golden outputs.
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

    /// Whether inputs of linears, keys and values are rounded to bf16.
    #[must_use]
    pub const fn rounds(self) -> bool {
        match self {
            Self::F32 => false,
            Self::Bf16 | Self::Bf16Pairs => true,
        }
    }

    /// Default mode for a checkpoint of this dtype.
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

/// Packing of weights in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WeightDType {
    /// The dtype of the compute mode.
    #[default]
    Native,
    /// One byte per weight, with a scale for every 32.
    Q8,
    /// Four bits per weight, with a scale for every 32.
    Q4,
}

impl WeightDType {
    /// All values, the most exact first.
    pub const ALL: [Self; 3] = [Self::Native, Self::Q8, Self::Q4];
}

impl fmt::Display for WeightDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        })
    }
}

/// Text that is not a dtype of weights.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a dtype of weights; use native, q8 or q4")]
pub struct ParseWeightDTypeError(String);

impl FromStr for WeightDType {
    type Err = ParseWeightDTypeError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|dtype| dtype.to_string() == name);
        found.ok_or_else(|| ParseWeightDTypeError(name.chars().take(64).collect()))
    }
}

/// Form in which a worker returns expert outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Combine {
    /// One row per (row, expert); the router adds them in ascending expert id. The bits are the same for every
    /// placement.
    Exact,
    /// One row per row sent: each worker sums the outputs of its own experts, and the router sums the workers' rows.
    /// Fewer bytes; the bits depend on the placement.
    Partial,
}

impl fmt::Display for Combine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Partial => "partial",
        })
    }
}

/// Text that is not a combine mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no combine mode; write exact or partial")]
pub struct ParseCombineError(String);

impl FromStr for Combine {
    type Err = ParseCombineError;

    fn from_str(text: &str) -> Result<Self, ParseCombineError> {
        [Self::Exact, Self::Partial]
            .into_iter()
            .find(|mode| mode.to_string() == text)
            .ok_or_else(|| ParseCombineError(text.chars().take(64).collect()))
    }
}

/// Retry advice: whether and where a retry can help. Every error that crosses a process boundary has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Retry {
    /// Retry at once, on another replica or router.
    Elsewhere,
    /// Retry here, after a pause.
    Later,
    /// Never retry the same input.
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_dtypes_are_read_as_they_are_written_and_others_are_refused() {
        for dtype in WeightDType::ALL {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
        }
        let refused = "Q8".parse::<WeightDType>().unwrap_err().to_string();
        assert_eq!(refused, "\"Q8\" is not a dtype of weights; use native, q8 or q4");
        assert_eq!("x".repeat(1000).parse::<WeightDType>(), Err(ParseWeightDTypeError("x".repeat(64))));
    }
}
