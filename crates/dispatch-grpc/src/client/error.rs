//! The errors of connecting to workers, and what to do about each.

use std::sync::Arc;
use std::time::Duration;

use muster_proto::handshake::{HandshakeError, Term};
use muster_types::{ExpertKey, WeightDigest, WorkerId};

use crate::address::AddressError;
use crate::transport::Instead;

/// Why there is no dispatch.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// An address that cannot be one.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// An address is listed twice.
    #[error("worker address {0} is listed twice; remove one")]
    DuplicateAddress(String),
    /// A size that cannot be one.
    #[error("{what} is {value}; it must be from 1 to 4294967295")]
    Size {
        /// Which of the configuration's sizes.
        what: &'static str,
        /// What was given.
        value: usize,
    },
    /// The router's name cannot be one.
    #[error("router id: {0}")]
    RouterId(muster_proto::WireError),
    /// The network thread could not be started.
    #[error("cannot start the dispatch thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A worker cannot be used.
    #[error("worker at {address}: {source}; {}", .source.remedy())]
    Worker {
        /// Its address.
        address: String,
        /// What is wrong with it.
        source: LinkError,
    },
    /// Every worker is there, but not every expert.
    #[error("no worker holds {}; start workers that do{}", name_some(.missing), .refused.iter().map(|why| format!("; {why}")).collect::<String>())]
    MissingExperts {
        /// The experts, ascending.
        missing: Vec<ExpertKey>,
        /// Why workers were refused that have other weights.
        refused: Vec<String>,
    },
}

/// The first few of `keys`, and how many there are.
fn name_some(keys: &[ExpertKey]) -> String {
    const NAMED: usize = 4;
    let named: Vec<String> = keys.iter().take(NAMED).map(ToString::to_string).collect();
    match keys.len().checked_sub(NAMED) {
        None | Some(0) => named.join(", "),
        Some(more) => format!("{} and {more} more", named.join(", ")),
    }
}

/// What is wrong with one worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Nobody listens, or the network does not get there.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// The connection is open without an answer.
    #[error("gave no answer within {0:?}")]
    Silent(Duration),
    /// Something else listens there.
    #[error("does not answer as an expert worker: {0}")]
    NotAWorker(String),
    /// Another protocol is spoken there.
    #[error("{0}")]
    Other(Instead),
    /// It cannot work with this router.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// It takes too few rows at once.
    #[error("takes at most {theirs} rows in one shard, this router sends up to {ours}")]
    MaxRows {
        /// Rows of the router's largest micro-batch.
        ours: u32,
        /// Rows the worker takes.
        theirs: u32,
    },
    /// The worker refused this router.
    #[error("refused this router: {0}")]
    Refused(String),
    /// Another address has a worker of the same name.
    #[error("calls itself {worker}, as the worker at {other} does")]
    SameName {
        /// The name.
        worker: String,
        /// The other's address.
        other: String,
    },
    /// The same, while the other is asked for a sign of life.
    #[error("calls itself {worker}, as the worker at {other} did, which is asked for a sign of life")]
    Contested {
        /// The name.
        worker: String,
        /// The other's address.
        other: String,
    },
    /// It has other weights.
    #[error(transparent)]
    Weights(Box<OtherWeights>),
    /// Its holdings make no placement.
    #[error("holdings do not fit the others': {0}")]
    Placement(String),
}

impl LinkError {
    /// Whether waiting cannot help, as for a wrong configuration. Damaged weights are not fatal: others may hold the same experts.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        !matches!(self, Self::Unreachable(_) | Self::Silent(_) | Self::Contested { .. } | Self::Weights(_))
    }

    /// What to do about it.
    #[must_use]
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "check that the worker runs and that the address is right",
            Self::Silent(_) => "it may still be loading; check its log, or allow more time to connect",
            Self::NotAWorker(_) => "check the address: another program listens there",
            Self::Other(instead) => instead.remedy(),
            Self::Handshake(HandshakeError::Disagreement(difference)) => match difference.term {
                Term::Version => "run versions of muster that are at most one apart, on both sides",
                Term::Fingerprint | Term::Hidden => "start both with the same model directory",
                Term::Compute => "start both in the same compute mode",
                Term::Experts => "start both with the same --expert-dtype",
                Term::Numerics => "start the worker again: its device is not the one that it described",
            },
            Self::Handshake(HandshakeError::Wire(_)) | Self::Placement(_) => {
                "run the same version of muster and the same model on both sides"
            }
            Self::MaxRows { .. } => "raise the worker's largest shard or lower the router's largest batch",
            Self::Weights(_) => OtherWeights::REMEDY,
            Self::Refused(_) => "see the worker's log",
            Self::SameName { .. } | Self::Contested { .. } => {
                "give every worker a name of its own, and list each only once"
            }
        }
    }
}

/// A worker whose weights differ from the expected ones.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "worker {worker} is refused: its weights of {expert} have digest {theirs}, the router's {ours}{}; compare the files \
     of both, as with sha256sum {files}", more(.others)
)]
pub struct OtherWeights {
    /// Its name.
    pub worker: WorkerId,
    /// The first expert that differs.
    pub expert: ExpertKey,
    /// The expected digest.
    pub ours: WeightDigest,
    /// The worker's digest.
    pub theirs: WeightDigest,
    /// Where its weights lie.
    pub files: Arc<str>,
    /// How many more differ.
    pub others: usize,
}

impl OtherWeights {
    /// What to do about it.
    pub const REMEDY: &str = "replace the damaged one and start its process again";
}

fn more(others: &usize) -> String {
    match others {
        0 => String::new(),
        others => format!(" (and {others} more experts differ)"),
    }
}
