//! The seam between a router's trunk and its experts, wherever those are.
//!
//! A micro-batch's rows leave through [`ExpertDispatch::submit`], which returns at once, and their weighted sum
//! comes back through [`ExpertDispatch::collect`]. Between the two the caller is free to compute attention for
//! the other micro-batch. All transports pass one conformance kit and give identical bits.
//!
//! Rows are a handle ([`Rows`], [`RowsMut`]): a shape and the memory, of the host or of a device.

use std::time::Instant;

use muster_types::{BindingName, ClassSet, ExpertId, LayerId, Retry, WorkerId};

pub use crate::rows::{At, AtMut, DeviceSlice, Place, Rows, RowsMut, UnevenRows};

/// What the gate chose for a micro-batch: `k` experts and weights per row, in ascending expert id.
#[derive(Debug, Clone, PartialEq)]
pub struct Choices {
    k: usize,
    experts: Vec<ExpertId>,
    weights: Vec<f32>,
}

/// A gate's output that must not leave the router.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InvalidChoices {
    /// The arrays do not fit together.
    #[error("{experts} expert ids and {weights} weights do not make rows of {k}")]
    Shape {
        /// Expert ids given.
        experts: usize,
        /// Weights given.
        weights: usize,
        /// Experts per row.
        k: usize,
    },
    /// Ids of a row are not strictly ascending: out of order or chosen twice.
    #[error("row {row}: expert ids are not strictly ascending")]
    Order {
        /// The row.
        row: usize,
    },
    /// A weight is NaN or infinite.
    #[error("row {row}: weight {weight} is not finite")]
    Weight {
        /// The row.
        row: usize,
        /// The weight.
        weight: f32,
    },
}

impl Choices {
    /// Checks that every row has `k` distinct experts in ascending order with finite weights.
    ///
    /// # Errors
    /// Names the first row that breaks the rule.
    pub fn new(k: usize, experts: Vec<ExpertId>, weights: Vec<f32>) -> Result<Self, InvalidChoices> {
        if k == 0 || experts.len() != weights.len() || !experts.len().is_multiple_of(k) {
            return Err(InvalidChoices::Shape { experts: experts.len(), weights: weights.len(), k });
        }
        for (row, ids) in experts.chunks_exact(k).enumerate() {
            if ids.windows(2).any(|pair| pair[0] >= pair[1]) {
                return Err(InvalidChoices::Order { row });
            }
        }
        if let Some(at) = weights.iter().position(|w| !w.is_finite()) {
            return Err(InvalidChoices::Weight { row: at / k, weight: weights[at] });
        }
        Ok(Self { k, experts, weights })
    }

    /// Experts per row.
    #[must_use]
    pub const fn k(&self) -> usize {
        self.k
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.experts.len() / self.k
    }

    /// All ids, `[rows, k]`, ascending within a row.
    #[must_use]
    pub fn experts(&self) -> &[ExpertId] {
        &self.experts
    }

    /// All weights, `[rows, k]`, in the order of [`Self::experts`].
    #[must_use]
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The memory of ids and weights, to be used again.
    #[must_use]
    pub fn into_parts(self) -> (Vec<ExpertId>, Vec<f32>) {
        (self.experts, self.weights)
    }
}

/// One micro-batch at one MoE layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerBatch<'a> {
    /// The layer.
    pub layer: LayerId,
    /// Which of the two micro-batch lanes it travels in: 0 or 1.
    pub lane: usize,
    /// Hidden rows `[choices.rows(), hidden]`, already in the wire dtype.
    pub rows: Rows<'a>,
    /// The experts of each row.
    pub choices: &'a Choices,
}

/// Names a submitted micro-batch until it is collected or cancelled.
#[derive(Debug, PartialEq, Eq, Hash, Clone, Copy, PartialOrd, Ord)]
pub struct Ticket(u64);

impl Ticket {
    /// For implementors: the ticket with this number.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Rows of a micro-batch that have no sum, for one reason.
#[derive(Debug, Clone, PartialEq)]
pub struct Loss {
    /// Numbers of the rows, ascending.
    pub rows: Vec<u32>,
    /// Why there is none.
    pub error: DispatchError,
}

/// Why expert outputs are missing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DispatchError {
    /// No live worker holds this expert.
    #[error("layer {layer} expert {expert} has no live worker")]
    NoOwner {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
    },
    /// The worker went away or broke its stream.
    #[error("worker {worker} failed: {reason}")]
    WorkerLost {
        /// The worker.
        worker: WorkerId,
        /// The failure, as observed.
        reason: String,
    },
    /// The worker's answer breaks the protocol: wrong shape, non-finite rows, an id nobody asked for.
    #[error("worker {worker} gave a bad reply: {reason}")]
    BadReply {
        /// The worker.
        worker: WorkerId,
        /// What was wrong.
        reason: String,
    },
    /// The worker refused the shard.
    #[error("worker {worker} refused: {reason}")]
    Refused {
        /// The worker.
        worker: WorkerId,
        /// Its reason.
        reason: String,
        /// Whether another try can help.
        retry: Retry,
    },
    /// The deadline passed.
    #[error("layer {layer}: expert outputs did not arrive within the deadline")]
    Deadline {
        /// The layer.
        layer: LayerId,
    },
    /// An expert's output is not finite.
    #[error("layer {layer} expert {expert}: output is not finite")]
    NonFinite {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
    },
    /// Outputs are finite and their weighted sum is not.
    #[error("layer {layer}: the weighted sum of expert outputs is not finite")]
    NonFiniteSum {
        /// The layer.
        layer: LayerId,
    },
    /// The caller broke the contract: wrong shape, unknown layer, unknown or spent ticket.
    #[error("invalid dispatch: {0}")]
    Invalid(String),
    /// Used after `close`.
    #[error("dispatch is closed")]
    Closed,
}

impl From<UnevenRows> for DispatchError {
    fn from(rows: UnevenRows) -> Self {
        Self::Invalid(rows.to_string())
    }
}

impl DispatchError {
    /// Rows, or room for them, in memory that the transport does not take.
    #[must_use]
    pub fn misplaced(what: &str, place: Place, taken: Place) -> Self {
        Self::Invalid(format!("{what} in {place}; this dispatch takes {taken}"))
    }

    /// Whether trying again can help.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoOwner { .. }
            | Self::WorkerLost { .. }
            | Self::BadReply { .. }
            | Self::Deadline { .. } => Retry::Later,
            Self::Refused { retry, .. } => *retry,
            Self::NonFinite { .. } | Self::NonFiniteSum { .. } | Self::Invalid(_) => Retry::Never,
            Self::Closed => Retry::Elsewhere,
        }
    }
}

/// The classes that experts are bound to. Outputs are those of one undisturbed run while this stays the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bound {
    /// Names them.
    pub name: BindingName,
    /// How often they changed: the name may be what it was before.
    pub changes: u64,
}

/// Sends rows to experts and brings back their weighted sum.
///
/// For every row the result is the sum over its experts, in ascending id, of `weight * output`, each product and
/// each sum rounded to f32, starting from zero; outputs are first rounded to the wire dtype. That rule, not the
/// transport, fixes the bits. With [`Combine::Partial`](muster_types::Combine) every worker makes such a sum of its own
/// experts, rounded to the wire dtype, and the result is the sum of the workers' rows in the order of the placement; then
/// the bits depend on which experts are computed together, too.
///
/// Rows stay valid until the ticket is spent: the caller neither changes nor frees the memory of [`LayerBatch::rows`] between
/// [`Self::submit`] and the [`Self::collect`] or [`Self::cancel`] of its ticket, and the dispatch does not read them afterwards.
pub trait ExpertDispatch: Send {
    /// Starts a micro-batch and returns without waiting for it.
    ///
    /// # Errors
    /// `Invalid` when shapes or ids do not fit the model or the rows lie in memory that is not taken here, `NoOwner` when an
    /// expert is nowhere, `Closed` after [`Self::close`]. Nothing is in flight after an error.
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError>;

    /// Waits for a micro-batch and writes its combined rows to `out`. Spends the ticket, whatever the outcome.
    ///
    /// Gives the rows that have no sum, each in one [`Loss`]; what `out` has for them is unspecified. The others are whole:
    /// a failure costs only rows that were sent to an expert which failed.
    ///
    /// # Errors
    /// `Invalid` when `out` has the wrong size or lies in memory that is not taken here, or the ticket is unknown or already
    /// spent, `Closed` after [`Self::close`]. `out` is unspecified then.
    fn collect(
        &mut self,
        ticket: Ticket,
        deadline: Instant,
        out: RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError>;

    /// Version of the fleet: changes when a worker joins or holds more, so that a failed micro-batch may succeed now.
    fn version(&self) -> u64 {
        0
    }

    /// What experts are bound to now. Takes in what became of workers meanwhile, as [`Self::submit`] does.
    fn bound(&mut self) -> Bound {
        Bound::default()
    }

    /// Numerics classes of the workers that outputs came from since this was last asked.
    fn take_classes(&mut self) -> ClassSet {
        ClassSet::EMPTY
    }

    /// Gives a micro-batch up, which spends its ticket; replies that still come are dropped. Unknown tickets are ignored.
    fn cancel(&mut self, ticket: Ticket);

    /// Ends all streams. May be called twice.
    fn close(&mut self);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(k: usize, experts: &[u32], weights: &[f32]) -> Result<Choices, InvalidChoices> {
        let experts = experts.iter().map(|&number| ExpertId::new(number, 8).unwrap()).collect();
        Choices::new(k, experts, weights.to_vec())
    }

    #[test]
    fn whole_rows_in_ascending_order_are_taken() {
        let choices = choices(2, &[0, 7, 3, 4], &[0.5, -1.0, 0.0, 2.0]).unwrap();
        assert_eq!((choices.rows(), choices.k()), (2, 2));
        assert_eq!(Choices::new(4, vec![], vec![]).map(|none| none.rows()), Ok(0));
    }

    #[test]
    fn arrays_that_make_no_rows_are_refused() {
        for (k, experts, weights) in [(0, 0, 0), (2, 3, 3), (2, 2, 4), (2, 4, 2)] {
            let refused = choices(k, &[0, 1, 2, 3][..experts], &[1.0; 4][..weights]);
            assert_eq!(refused, Err(InvalidChoices::Shape { experts, weights, k }));
        }
    }

    #[test]
    fn the_first_bad_row_is_named() {
        // Order matters within a row only: 7 before 0 is fine across rows.
        for bad in [[3, 3], [4, 3]] {
            let refused = choices(2, &[0, 7, bad[0], bad[1]], &[1.0; 4]);
            assert_eq!(refused, Err(InvalidChoices::Order { row: 1 }));
        }
        for weight in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let refused = choices(2, &[0, 7, 3, 4], &[1.0, 1.0, 1.0, weight]);
            assert!(matches!(refused, Err(InvalidChoices::Weight { row: 1, .. })), "{refused:?}");
        }
    }

    #[test]
    fn only_what_another_try_can_mend_is_retried() {
        let refused = |retry| DispatchError::Refused {
            worker: WorkerId::new("w0").unwrap(),
            reason: "full".into(),
            retry,
        };
        assert_eq!(refused(Retry::Elsewhere).retry(), Retry::Elsewhere);
        assert_eq!(refused(Retry::Never).retry(), Retry::Never);
        assert_eq!(DispatchError::Invalid("unknown ticket".into()).retry(), Retry::Never);
    }
}
