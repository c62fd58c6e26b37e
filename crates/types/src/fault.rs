//! Reasons why a worker did not compute a shard.

use crate::Retry;

/// Kinds of faults of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// An expert is not held by this worker.
    NotHeld,
    /// The worker is draining.
    Draining,
    /// The worker's queue is full.
    Overloaded,
    /// The shard breaks a rule of the protocol.
    BadRequest,
    /// The deadline passed.
    Deadline,
    /// A row has a value that is not finite.
    NonFinite,
    /// The worker failed internally.
    Internal,
}

impl FaultKind {
    /// Every kind.
    pub const ALL: [Self; 7] = [
        Self::NotHeld,
        Self::Draining,
        Self::Overloaded,
        Self::BadRequest,
        Self::Deadline,
        Self::NonFinite,
        Self::Internal,
    ];

    /// A short name, for metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotHeld => "not_held",
            Self::Draining => "draining",
            Self::Overloaded => "overloaded",
            Self::BadRequest => "bad_request",
            Self::Deadline => "deadline",
            Self::NonFinite => "non_finite",
            Self::Internal => "internal",
        }
    }

    /// Whether sending the shard again can help.
    #[must_use]
    pub const fn retry(self) -> Retry {
        match self {
            Self::NotHeld | Self::Draining | Self::Internal => Retry::Elsewhere,
            Self::Overloaded | Self::Deadline => Retry::Later,
            Self::BadRequest | Self::NonFinite => Retry::Never,
        }
    }
}

/// Reason why a shard was not computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Its kind.
    pub kind: FaultKind,
    /// Human-readable text, one line of at most 256 characters.
    pub message: String,
    /// The expert concerned, by its number on the wire.
    pub expert: Option<u32>,
}

impl Fault {
    /// A fault of the whole shard.
    #[must_use]
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), expert: None }
    }

    /// A fault of one expert.
    #[must_use]
    pub fn of_expert(kind: FaultKind, expert: u32, message: impl Into<String>) -> Self {
        Self { expert: Some(expert), ..Self::new(kind, message) }
    }
}
