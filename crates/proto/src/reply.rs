//! Replies on a stream: the acknowledgement, rows, or a typed fault.

use std::num::NonZeroU64;
use std::time::Duration;

use bytes::Bytes;
use muster_types::{Epoch, Fault, FaultKind, WorkerId};

use crate::convert::{WireError, worker_id_error};
use crate::expert::v1;
use crate::expert::v1::shard_error::Code;

/// Longest fault message kept, in characters. The router logs it.
const MESSAGE_CHARS: usize = 256;

/// The wire's name of a kind of fault.
const fn code(kind: FaultKind) -> Code {
    match kind {
        FaultKind::NotHeld => Code::NotHeld,
        FaultKind::Draining => Code::Draining,
        FaultKind::Overloaded => Code::Overloaded,
        FaultKind::BadRequest => Code::BadRequest,
        FaultKind::Deadline => Code::Deadline,
        FaultKind::NonFinite => Code::NonFinite,
        FaultKind::Internal => Code::Internal,
    }
}

fn kind(code: i32) -> Result<FaultKind, WireError> {
    match Code::try_from(code) {
        Ok(Code::NotHeld) => Ok(FaultKind::NotHeld),
        Ok(Code::Draining) => Ok(FaultKind::Draining),
        Ok(Code::Overloaded) => Ok(FaultKind::Overloaded),
        Ok(Code::BadRequest) => Ok(FaultKind::BadRequest),
        Ok(Code::Deadline) => Ok(FaultKind::Deadline),
        Ok(Code::NonFinite) => Ok(FaultKind::NonFinite),
        Ok(Code::Internal) => Ok(FaultKind::Internal),
        Ok(Code::Unspecified) => Err(WireError::Missing("error.code")),
        Err(_) => Err(WireError::UnknownValue { field: "error.code", value: code }),
    }
}

fn fault(error: &v1::ShardError) -> Result<Fault, WireError> {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let message = error.message.chars().take(MESSAGE_CHARS).map(printable).collect();
    Ok(Fault { kind: kind(error.code)?, message, expert: error.expert })
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self::new(FaultKind::BadRequest, error.to_string())
    }
}

/// Time of a shard inside the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timing {
    /// Time in the experts.
    pub compute: Duration,
    /// Time in the queue.
    pub queue: Duration,
}

impl Timing {
    /// Sum of both.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.compute.saturating_add(self.queue)
    }
}

/// The outputs of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OutputRows {
    /// Claimed number of rows, not yet compared with the request.
    pub rows: u32,
    /// Their payload, not yet compared with `rows`.
    pub data: Bytes,
    /// Rows with a value that is not finite: zeros in `data`. Strictly ascending, below `rows`.
    pub not_finite: Vec<u32>,
}

impl OutputRows {
    fn parse(rows: v1::ExpertRows) -> Result<Self, WireError> {
        let v1::ExpertRows { rows, data, not_finite } = rows;
        let is_sound =
            not_finite.is_sorted_by(|a, b| a < b) && not_finite.last().is_none_or(|&last| last < rows);
        if !is_sound {
            let reason = format!("its entries must be strictly ascending and below rows ({rows})");
            return Err(WireError::rule("rows.not_finite", reason));
        }
        Ok(Self { rows, data, not_finite })
    }
}

/// One reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Acknowledges an open stream.
    Ack {
        /// Name of the worker.
        worker: WorkerId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Answers a shard.
    Answer {
        /// Id of the shard.
        id: NonZeroU64,
        /// Its outputs, or its fault.
        outcome: Result<OutputRows, Fault>,
        /// Its time inside the worker.
        timing: Timing,
    },
}

impl Reply {
    /// Converts to a message.
    #[must_use]
    pub fn into_wire(self) -> v1::DispatchReply {
        use v1::dispatch_reply::Body;
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        match self {
            Self::Ack { worker, epoch } => {
                let ack = v1::HelloAck { worker_id: worker.as_str().to_owned(), epoch: epoch.get() };
                v1::DispatchReply { id: 0, body: Some(Body::Ack(ack)), compute_us: 0, queue_us: 0 }
            }
            Self::Answer { id, outcome, timing } => {
                let body = match outcome {
                    Ok(OutputRows { rows, data, not_finite }) => {
                        Body::Rows(v1::ExpertRows { rows, data, not_finite })
                    }
                    Err(Fault { kind, message, expert }) => {
                        Body::Error(v1::ShardError { code: code(kind).into(), message, expert })
                    }
                };
                v1::DispatchReply {
                    id: id.get(),
                    body: Some(body),
                    compute_us: micros(timing.compute),
                    queue_us: micros(timing.queue),
                }
            }
        }
    }

    /// Parses a message.
    ///
    /// # Errors
    /// The first field that breaks a rule.
    pub fn parse(message: v1::DispatchReply) -> Result<Self, WireError> {
        use v1::dispatch_reply::Body;
        let timing = Timing {
            compute: Duration::from_micros(message.compute_us.into()),
            queue: Duration::from_micros(message.queue_us.into()),
        };
        let outcome = match message.body.ok_or(WireError::Missing("body"))? {
            Body::Ack(_) if message.id != 0 => {
                return Err(WireError::rule(
                    "id",
                    format!("{} on an acknowledgement; must be 0", message.id),
                ));
            }
            Body::Ack(ack) => {
                let worker = WorkerId::new(&ack.worker_id).map_err(worker_id_error)?;
                return Ok(Self::Ack { worker, epoch: Epoch::new(ack.epoch) });
            }
            Body::Rows(rows) => Ok(OutputRows::parse(rows)?),
            Body::Error(error) => Err(fault(&error)?),
        };
        let id = NonZeroU64::new(message.id).ok_or(WireError::Missing("id"))?;
        Ok(Self::Answer { id, outcome, timing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn answers_survive_the_round_trip(
            id in 1u64..,
            rows in any::<u32>(),
            data in prop::collection::vec(any::<u8>(), 0..64),
            marked in any::<u64>(),
            micros in any::<(u32, u32)>(),
        ) {
            let not_finite = (0..rows.min(64)).filter(|row| marked >> row & 1 == 1).collect();
            let outputs = OutputRows { rows, data: data.into(), not_finite };
            let timing = Timing {
                compute: Duration::from_micros(micros.0.into()),
                queue: Duration::from_micros(micros.1.into()),
            };
            let id = NonZeroU64::new(id).unwrap();
            let before = Reply::Answer { id, outcome: Ok(outputs), timing };
            prop_assert_eq!(Reply::parse(before.clone().into_wire()).unwrap(), before);
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(message) = <v1::DispatchReply as prost::Message>::decode(bytes.as_slice()) {
                let _ = Reply::parse(message);
            }
        }
    }

    #[test]
    fn every_fault_survives_the_round_trip() {
        for kind in FaultKind::ALL {
            let fault = Fault::of_expert(kind, 3, "because");
            let id = NonZeroU64::MIN;
            let before = Reply::Answer { id, outcome: Err(fault), timing: Timing::default() };
            assert_eq!(Reply::parse(before.clone().into_wire()), Ok(before));
        }
    }

    #[test]
    fn absent_fields_are_refused() {
        let parse = |id, body| Reply::parse(v1::DispatchReply { id, body, compute_us: 0, queue_us: 0 });
        assert_eq!(parse(1, None), Err(WireError::Missing("body")));
        let rows = v1::dispatch_reply::Body::Rows(v1::ExpertRows::default());
        assert_eq!(parse(0, Some(rows)), Err(WireError::Missing("id")));
        for not_finite in [vec![2], vec![1, 1], vec![1, 0]] {
            let rows = v1::ExpertRows { rows: 2, not_finite, ..v1::ExpertRows::default() };
            let refused = parse(1, Some(v1::dispatch_reply::Body::Rows(rows)));
            assert!(refused.is_err_and(|error| error.to_string().contains("rows.not_finite")));
        }
        let error = v1::dispatch_reply::Body::Error(v1::ShardError::default());
        assert_eq!(parse(1, Some(error)), Err(WireError::Missing("error.code")));
        let ack = v1::dispatch_reply::Body::Ack(v1::HelloAck { worker_id: "w".into(), epoch: 1 });
        assert!(parse(7, Some(ack)).is_err());
    }

    #[test]
    fn a_fault_message_cannot_flood_or_forge_a_log() {
        let message = format!("a\nb\u{1b}[31m{}", "x".repeat(1 << 20));
        let error = v1::ShardError { code: Code::Internal.into(), message, expert: None };
        let fault = fault(&error).unwrap();
        assert!(fault.message.starts_with("a b [31mx"));
        assert_eq!(fault.message.chars().count(), MESSAGE_CHARS);
    }
}
