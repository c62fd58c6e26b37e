//! The words every other crate speaks: ids, dtypes, modes, fingerprints, limits and retry advice.
//!
//! Owns the checked newtypes. An id in hand is in range for the model it was made for, because the only
//! constructors check. Knows nothing about files, wires, tensors or threads; depends on `std`,
//! `thiserror` for error text and `blake3` for digests alone.

mod digest;
mod fingerprint;
mod ids;
mod limits;
mod mode;
mod speed;

pub use digest::{ParseDigestError, WeightDigest, WeightHasher};
pub use fingerprint::{Fingerprint, ParseFingerprintError};
pub use ids::{Epoch, ExpertId, ExpertKey, InvalidWorkerId, LayerId, OutOfRange, SeqId, TokenId, WorkerId};
pub use limits::Limits;
pub use mode::{
    Combine, Compute, DType, NumericsClass, ParseCombineError, ParseWeightDTypeError, Retry, WeightDType,
};
pub use speed::{Speed, SpeedError};
