//! Conversions of enums and names both ways, and the error of all parsers.

use std::fmt;
use std::sync::Arc;

use muster_types::{
    Combine, Compute, DType, InvalidWorkerId, NumericsClass, OutOfRange, ParseFingerprintError, WeightDType,
};

use crate::expert::v1;

/// A message that breaks a rule of the protocol. Names the field, its value and the rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A required field is missing.
    #[error("field {0} is missing")]
    Missing(&'static str),
    /// An enum number unknown to this build.
    #[error("field {field} has the unknown value {value}")]
    UnknownValue {
        /// The field.
        field: &'static str,
        /// Its number on the wire.
        value: i32,
    },
    /// An index outside the model.
    #[error("field {field}: {source}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// The broken rule.
        source: OutOfRange,
    },
    /// A name with a character or a length that is not allowed.
    #[error("field {field}: {reason}")]
    Name {
        /// The field.
        field: &'static str,
        /// The broken rule.
        reason: String,
    },
    /// A fingerprint of the wrong length.
    #[error("field fingerprint: {0}")]
    Fingerprint(#[from] ParseFingerprintError),
    /// Any other rule.
    #[error("field {field}: {reason}")]
    Rule {
        /// The field.
        field: &'static str,
        /// The broken rule.
        reason: String,
    },
}

impl WireError {
    pub(crate) fn rule(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Rule { field, reason: reason.into() }
    }
}

/// Name of a router as it appears in a worker's logs: 1 to 128 bytes of `[A-Za-z0-9._:/-]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RouterName(Arc<str>);

impl RouterName {
    /// Checks a name.
    ///
    /// # Errors
    /// `Name` when it is empty, too long, or has a character that is not allowed.
    pub fn new(name: &str) -> Result<Self, WireError> {
        let field = "router_id";
        if name.is_empty() {
            return Err(WireError::Missing(field));
        }
        if name.len() > 128 {
            let reason = format!("{} bytes long; at most 128 are allowed", name.len());
            return Err(WireError::Name { field, reason });
        }
        match name.chars().find(|&c| !(c.is_ascii_alphanumeric() || "._:/-".contains(c))) {
            Some(bad) => {
                let reason = format!("has the character {bad:?}; allowed are letters, digits and . _ : / -");
                Err(WireError::Name { field, reason })
            }
            None => Ok(Self(name.into())),
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RouterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

pub(crate) fn worker_id_error(error: InvalidWorkerId) -> WireError {
    match error {
        InvalidWorkerId::Empty => WireError::Missing("worker_id"),
        other => WireError::Name { field: "worker_id", reason: other.to_string() },
    }
}

/// The wire's name for a dtype.
#[must_use]
pub const fn dtype_to_wire(dtype: DType) -> v1::DType {
    match dtype {
        DType::F32 => v1::DType::F32,
        DType::Bf16 => v1::DType::Bf16,
    }
}

/// A dtype off the wire; `field` is named in the error.
///
/// # Errors
/// `Missing` when unspecified, `UnknownValue` when this build does not know it.
pub fn dtype_from_wire(field: &'static str, value: i32) -> Result<DType, WireError> {
    match v1::DType::try_from(value) {
        Ok(v1::DType::F32) => Ok(DType::F32),
        Ok(v1::DType::Bf16) => Ok(DType::Bf16),
        Ok(v1::DType::Unspecified) => Err(WireError::Missing(field)),
        Err(_) => Err(WireError::UnknownValue { field, value }),
    }
}

/// The wire's name for a compute mode.
#[must_use]
pub const fn compute_to_wire(compute: Compute) -> v1::ComputeMode {
    match compute {
        Compute::F32 => v1::ComputeMode::F32,
        Compute::Bf16 => v1::ComputeMode::Bf16,
        Compute::Bf16Pairs => v1::ComputeMode::Bf16Pairs,
    }
}

/// A compute mode off the wire.
///
/// # Errors
/// `Missing` when unspecified, `UnknownValue` when this build does not know it.
pub fn compute_from_wire(value: i32) -> Result<Compute, WireError> {
    match v1::ComputeMode::try_from(value) {
        Ok(v1::ComputeMode::F32) => Ok(Compute::F32),
        Ok(v1::ComputeMode::Bf16) => Ok(Compute::Bf16),
        Ok(v1::ComputeMode::Bf16Pairs) => Ok(Compute::Bf16Pairs),
        Ok(v1::ComputeMode::Unspecified) => Err(WireError::Missing("compute")),
        Err(_) => Err(WireError::UnknownValue { field: "compute", value }),
    }
}

/// The wire's name for a packing of experts.
#[must_use]
pub const fn expert_dtype_to_wire(dtype: WeightDType) -> v1::ExpertDType {
    match dtype {
        WeightDType::Native => v1::ExpertDType::Native,
        WeightDType::Q8 => v1::ExpertDType::Q8,
        WeightDType::Q4 => v1::ExpertDType::Q4,
    }
}

/// A packing of experts off the wire.
///
/// # Errors
/// `Missing` when unspecified, `UnknownValue` when this build does not know it.
pub fn expert_dtype_from_wire(value: i32) -> Result<WeightDType, WireError> {
    match v1::ExpertDType::try_from(value) {
        Ok(v1::ExpertDType::Native) => Ok(WeightDType::Native),
        Ok(v1::ExpertDType::Q8) => Ok(WeightDType::Q8),
        Ok(v1::ExpertDType::Q4) => Ok(WeightDType::Q4),
        Ok(v1::ExpertDType::Unspecified) => Err(WireError::Missing("expert_dtype")),
        Err(_) => Err(WireError::UnknownValue { field: "expert_dtype", value }),
    }
}

/// The wire's name for a combine mode.
#[must_use]
pub const fn combine_to_wire(combine: Combine) -> v1::CombineMode {
    match combine {
        Combine::Exact => v1::CombineMode::Exact,
        Combine::Partial => v1::CombineMode::Partial,
    }
}

/// A combine mode off the wire.
///
/// # Errors
/// `Missing` when unspecified, `UnknownValue` when this build does not know it.
pub fn combine_from_wire(value: i32) -> Result<Combine, WireError> {
    match v1::CombineMode::try_from(value) {
        Ok(v1::CombineMode::Exact) => Ok(Combine::Exact),
        Ok(v1::CombineMode::Partial) => Ok(Combine::Partial),
        Ok(v1::CombineMode::Unspecified) => Err(WireError::Missing("combine")),
        Err(_) => Err(WireError::UnknownValue { field: "combine", value }),
    }
}

/// The wire's name for a numerics class.
#[must_use]
pub const fn numerics_to_wire(numerics: NumericsClass) -> v1::NumericsClass {
    match numerics {
        NumericsClass::CpuCanonical => v1::NumericsClass::CpuCanonical,
        NumericsClass::CudaMma => v1::NumericsClass::CudaMma,
        NumericsClass::CudaWgmma => v1::NumericsClass::CudaWgmma,
    }
}

/// A numerics class off the wire.
///
/// # Errors
/// `Missing` when unspecified, `UnknownValue` when this build does not know it.
pub fn numerics_from_wire(value: i32) -> Result<NumericsClass, WireError> {
    match v1::NumericsClass::try_from(value) {
        Ok(v1::NumericsClass::CpuCanonical) => Ok(NumericsClass::CpuCanonical),
        Ok(v1::NumericsClass::CudaMma) => Ok(NumericsClass::CudaMma),
        Ok(v1::NumericsClass::CudaWgmma) => Ok(NumericsClass::CudaWgmma),
        Ok(v1::NumericsClass::Unspecified) => Err(WireError::Missing("numerics")),
        Err(_) => Err(WireError::UnknownValue { field: "numerics", value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enums_survive_the_round_trip_and_zero_is_missing() {
        for dtype in [DType::F32, DType::Bf16] {
            assert_eq!(dtype_from_wire("wire_dtype", dtype_to_wire(dtype).into()), Ok(dtype));
        }
        for compute in [Compute::F32, Compute::Bf16, Compute::Bf16Pairs] {
            assert_eq!(compute_from_wire(compute_to_wire(compute).into()), Ok(compute));
        }
        assert_eq!(compute_from_wire(0), Err(WireError::Missing("compute")));
        for dtype in WeightDType::ALL {
            assert_eq!(expert_dtype_from_wire(expert_dtype_to_wire(dtype).into()), Ok(dtype));
        }
        for combine in [Combine::Exact, Combine::Partial] {
            assert_eq!(combine_from_wire(combine_to_wire(combine).into()), Ok(combine));
        }
        for class in NumericsClass::ALL {
            assert_eq!(numerics_from_wire(numerics_to_wire(class).into()), Ok(class));
        }

        assert_eq!(dtype_from_wire("compute", 0), Err(WireError::Missing("compute")));
        assert_eq!(expert_dtype_from_wire(0), Err(WireError::Missing("expert_dtype")));
        let unknown = WireError::UnknownValue { field: "expert_dtype", value: 4 };
        assert_eq!(expert_dtype_from_wire(4), Err(unknown));
        assert_eq!(combine_from_wire(0), Err(WireError::Missing("combine")));
        assert_eq!(numerics_from_wire(0), Err(WireError::Missing("numerics")));
        let unknown = WireError::UnknownValue { field: "compute", value: 77 };
        assert_eq!(unknown.to_string(), "field compute has the unknown value 77");
        assert_eq!(dtype_from_wire("compute", 77), Err(unknown));
    }

    #[test]
    fn router_names_cannot_break_a_log_line() {
        assert!(RouterName::new("router-0").is_ok());
        assert_eq!(RouterName::new(""), Err(WireError::Missing("router_id")));
        for bad in ["a\nb", "a b", "\u{1b}[31m", &"x".repeat(10 << 10)] {
            assert!(matches!(RouterName::new(bad), Err(WireError::Name { .. })), "{bad:?}");
        }
    }
}
