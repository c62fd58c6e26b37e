//! Errors of a client.

use std::time::Duration;

use muster_net::Mismatch;
use muster_types::Retry;
use tonic::{Code, Status};

/// An error of this crate. Messages are for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// An address cannot be used.
    #[error("{address:?}: {reason}; write http://host:port or https://host:port")]
    Address {
        /// As it was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The API key cannot be sent.
    #[error("the API key has characters that no key has; is there a line break in it?")]
    Key,
    /// There is no connection.
    #[error("no router answers at {routers} ({reason})")]
    Unreachable {
        /// The addresses tried.
        routers: String,
        /// The last error.
        reason: String,
    },
    /// A router refused the request as invalid.
    #[error("{message}")]
    Refused {
        /// The router's words: the field, what is wrong and what would be right.
        message: String,
    },
    /// Something else listens there.
    #[error("what answers at {router} is not a muster router; check the address")]
    NotMuster {
        /// Where.
        router: String,
    },
    /// Another protocol is spoken there.
    #[error("what answers at {router} {mismatch}; {}", remedy(*mismatch))]
    Mismatch {
        /// Where.
        router: String,
        /// Which.
        mismatch: Mismatch,
    },
    /// A router failed, and a retry will not help.
    #[error("the router failed: {message} ({code})")]
    Failed {
        /// Name of the gRPC status code.
        code: String,
        /// The router's words.
        message: String,
    },
    /// A router broke the protocol.
    #[error("{router} breaks the protocol: {violation}; is it another version?")]
    Protocol {
        /// Which.
        router: String,
        /// The breach.
        violation: String,
    },
    /// No router accepted the request, or resumed the stream.
    #[error("gave up after {tokens} tokens: {reason}")]
    Lost {
        /// Tokens that had been handed out.
        tokens: usize,
        /// The error of the last attempt.
        reason: String,
    },
    /// The deadline passed.
    #[error("not done within {limit:?}")]
    Deadline {
        /// The time limit.
        limit: Duration,
    },
}

impl ClientError {
    /// Whether a later retry can help. Immediate retries have been made already.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Unreachable { .. } | Self::Lost { .. } | Self::Deadline { .. } => Retry::Later,
            Self::Address { .. }
            | Self::Key
            | Self::Refused { .. }
            | Self::NotMuster { .. }
            | Self::Mismatch { .. }
            | Self::Failed { .. }
            | Self::Protocol { .. } => Retry::Never,
        }
    }

    /// A status that no further attempt will change.
    pub(crate) fn of(status: &Status, router: &str) -> Self {
        match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::OutOfRange
            | Code::Unauthenticated
            | Code::PermissionDenied => Self::Refused { message: status.message().to_owned() },
            Code::Unimplemented => Self::NotMuster { router: router.to_owned() },
            code => Self::Failed { code: format!("{code:?}"), message: status.message().to_owned() },
        }
    }
}

const fn remedy(mismatch: Mismatch) -> &'static str {
    match mismatch {
        Mismatch::Tls => "write https:// in its URL",
        Mismatch::Plain => "write http:// in its URL",
        Mismatch::Http => {
            "give the address of its --grpc, which is http://127.0.0.1:50051 unless told otherwise"
        }
    }
}
