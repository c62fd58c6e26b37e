//! The vocabulary of all crates: ids, dtypes, modes, fingerprints, limits, retry advice, and the nearest known name to
//! an unknown one.
//!
//! Owns the checked newtypes. An id in hand is in range for the model it was made for, because the only
//! constructors check. Knows nothing about files, wires, tensors or threads; depends on `std`,
//! `thiserror` for error text, `blake3` for digests and `strsim` for edit distances alone.

mod digest;
mod fault;
mod fingerprint;
mod ids;
mod limits;
mod mode;
mod nearest;
mod numerics;
mod reach;
mod speed;
mod term;
mod weights;

pub use digest::{ParseDigestError, WeightDigest, WeightHasher};
pub use fault::{Fault, FaultKind};
pub use fingerprint::{Fingerprint, ParseFingerprintError};
pub use ids::{Epoch, ExpertId, ExpertKey, InvalidWorkerId, LayerId, OutOfRange, SeqId, TokenId, WorkerId};
pub use limits::Limits;
pub use mode::{Combine, Compute, DType, ParseCombineError, ParseWeightDTypeError, Retry, WeightDType};
pub use nearest::nearest;
pub use numerics::{
    BindingName, ClassSet, Numerics, NumericsClass, ParseNumericsClassError, ParseNumericsError,
};
pub use reach::Reach;
pub use speed::{Speed, SpeedError};
pub use term::{Term, terms_by_row};
pub use weights::{Gating, Packing};
