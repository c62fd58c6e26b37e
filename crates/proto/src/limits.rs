//! Sizes of messages, from the model's dimensions. Both ends compute them by the same rule.

use std::num::NonZeroU32;

use muster_types::{DType, WeightDigest};

/// Bytes allowed for a message's other fields, beside its payload and its lists of numbers.
const SLACK: usize = 64 << 10;
/// Most bytes of a 32-bit varint.
const VARINT: usize = 5;
/// Bytes of a weight.
const FLOAT: usize = 4;
/// Greatest length that the protocol's length prefix can carry.
const CEILING: usize = u32::MAX as usize;

/// Bounds on the messages of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageLimits {
    /// Largest request, bytes.
    pub request_bytes: usize,
    /// Largest reply, bytes.
    pub reply_bytes: usize,
}

impl MessageLimits {
    /// Bounds for shards of at most `max_rows` rows, each routed to at most `top_k` of at most `experts` experts.
    #[must_use]
    pub fn new(hidden: u32, wire: DType, max_rows: NonZeroU32, top_k: u32, experts: u32) -> Self {
        let row = (hidden as usize).saturating_mul(wire.size());
        let rows = max_rows.get() as usize;
        let entries = rows.saturating_mul(top_k as usize);
        // An index and a weight for each entry.
        let entry = entries.saturating_mul(VARINT + FLOAT);
        let numbers = entry.saturating_add((experts as usize * 2).saturating_mul(VARINT));
        let request = rows.saturating_mul(row).saturating_add(numbers).saturating_add(SLACK);
        let reply = entries.saturating_mul(row.saturating_add(VARINT)).saturating_add(SLACK);
        Self { request_bytes: request.min(CEILING), reply_bytes: reply.min(CEILING) }
    }

    /// Most bytes of a worker's description, for a model with this many routed experts in all.
    #[must_use]
    pub const fn description_bytes(experts: usize) -> usize {
        experts.saturating_mul(VARINT * 3 + WeightDigest::BYTES).saturating_add(SLACK)
    }

    /// Most bytes of an order to a worker, for a model with this many routed experts in all: each expert with some
    /// peers, and the most peers allowed.
    #[must_use]
    pub const fn assignment_bytes(experts: usize) -> usize {
        experts.saturating_mul(VARINT * 13 + WeightDigest::BYTES).saturating_add(1 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expert::v1;
    use prost::Message;

    #[test]
    fn the_largest_shard_and_its_reply_just_fit() {
        let (hidden, rows, top_k, experts) = (64u32, 300u32, 8u32, 128u32);
        let limits = MessageLimits::new(hidden, DType::Bf16, NonZeroU32::new(rows).unwrap(), top_k, experts);
        let shard = v1::LayerShard {
            id: u64::MAX,
            layer: u32::MAX,
            epoch: u64::MAX,
            deadline_ms: u32::MAX,
            rows,
            data: vec![0; (rows * hidden * 2) as usize].into(),
            experts: vec![u32::MAX; experts as usize],
            counts: vec![u32::MAX; experts as usize],
            indices: vec![u32::MAX; (rows * top_k) as usize],
            weights: vec![1.0; (rows * top_k) as usize],
        };
        let request = v1::DispatchRequest { body: Some(v1::dispatch_request::Body::Shard(shard)) };
        assert!(request.encoded_len() <= limits.request_bytes);
        assert!(request.encoded_len() + SLACK > limits.request_bytes);
        let data = vec![0; (rows * top_k * hidden * 2) as usize].into();
        let body = v1::dispatch_reply::Body::Rows(v1::ExpertRows {
            rows: rows * top_k,
            data,
            not_finite: vec![u32::MAX; (rows * top_k) as usize],
        });
        let reply = v1::DispatchReply { id: 1, body: Some(body), compute_us: 1, queue_us: 1 };
        assert!(reply.encoded_len() <= limits.reply_bytes);
        assert!(reply.encoded_len() + SLACK > limits.reply_bytes);
    }

    #[test]
    fn absurd_dimensions_saturate() {
        let limits = MessageLimits::new(u32::MAX, DType::F32, NonZeroU32::MAX, u32::MAX, u32::MAX);
        assert_eq!(limits.request_bytes, CEILING);
        assert_eq!(limits.reply_bytes, CEILING);
    }
}
