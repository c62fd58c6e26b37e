//! Meaning of a status for the next attempt.

use std::error::Error;
use std::time::Duration;

use tonic::{Code, Status};

/// Milliseconds that a router asks a client to wait; it is on every status that passes.
const RETRY_AFTER: &str = "retry-after-ms";

/// Why an attempt failed.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// Another attempt may succeed, after this pause when the same router is asked again.
    Passing { reason: String, hint: Option<Duration> },
    /// This router will never accept it.
    Final(Status),
}

impl Trouble {
    pub(crate) fn passing(reason: impl Into<String>) -> Self {
        Self::Passing { reason: reason.into(), hint: None }
    }
}

impl From<Status> for Trouble {
    fn from(status: Status) -> Self {
        let hint = status.metadata().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let hint = hint.map(Duration::from_millis);
        let passes = match status.code() {
            // A status with a source is no router's: the connection broke, or there was none.
            _ if status.source().is_some() => true,
            // This client cancels nothing that it waits for: the router did not answer in time.
            Code::Unavailable | Code::Cancelled => true,
            Code::ResourceExhausted => hint.is_some(),
            _ => false,
        };
        if !passes {
            return Self::Final(status);
        }
        Self::Passing { reason: cause_of(&status), hint }
    }
}

/// The error, in the words of the router or of the system.
pub(crate) fn cause_of(status: &Status) -> String {
    status.source().map_or_else(|| status.message().to_owned(), root_cause)
}

/// The innermost error of a chain.
pub(crate) fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_hint(mut status: Status) -> Status {
        status.metadata_mut().insert(RETRY_AFTER, 250.into());
        status
    }

    #[test]
    fn only_what_can_pass_is_tried_again() {
        let hint = |status: Status| match Trouble::from(status) {
            Trouble::Passing { hint, .. } => Some(hint),
            Trouble::Final(_) => None,
        };
        let asked = Some(Duration::from_millis(250));
        assert_eq!(hint(with_hint(Status::unavailable("a worker was lost"))), Some(asked));
        assert_eq!(hint(Status::unavailable("no connection")), Some(None));
        assert_eq!(hint(Status::cancelled("timeout expired")), Some(None));
        assert_eq!(hint(with_hint(Status::resource_exhausted("the queue is full"))), Some(asked));
        assert_eq!(hint(Status::resource_exhausted("message too large")), None);
        assert_eq!(hint(Status::invalid_argument("max_tokens: is 0")), None);
        assert_eq!(hint(Status::failed_precondition("not finite")), None);
        assert_eq!(hint(Status::internal("internal error")), None);
        let broken = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "connection reset");
        assert_eq!(hint(Status::from_error(Box::new(broken))), Some(None));
    }
}
