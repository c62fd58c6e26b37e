//! Decisions of a leader, for its caller to carry out.

use muster_types::{Epoch, WorkerId};

use super::PlanRequest;
use crate::lease::Term;
use crate::{Orders, Transition};

/// The next thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Nothing: this router does not lead, or workers are still joining.
    Wait,
    /// Ask [`Leader::subjects`](super::Leader::subjects) for the rows they counted, then call [`Leader::counted`](super::Leader::counted).
    Count,
    /// Make a plan, then call [`Leader::planned`](super::Leader::planned).
    Plan(PlanRequest),
    /// Send orders.
    Order(Step),
}

/// A step towards the target.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Orders for all workers.
    pub transition: Transition,
    /// Orders to send now. Report each by [`Leader::obeyed`](super::Leader::obeyed) or [`Leader::failed`](super::Leader::failed).
    pub send: Vec<Order>,
}

/// Orders for one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Their identity.
    pub id: OrderId,
    /// Epoch of the last announcement whose copies all counted. On these orders the worker keeps every copy that it announced later.
    pub seen: Epoch,
    /// What to keep and to load.
    pub orders: Orders,
}

/// Identity of orders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderId {
    /// The worker.
    pub worker: WorkerId,
    /// Its session.
    pub session: u64,
    /// The leader's term.
    pub term: Term,
    /// Number, ascending per worker and term; repeated orders keep theirs.
    pub number: u64,
}
