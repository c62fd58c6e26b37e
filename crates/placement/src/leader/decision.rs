//! What a leader has others do.

use muster_types::{Epoch, WorkerId};

use super::PlanRequest;
use crate::lease::Term;
use crate::{Orders, Transition};

/// What to do now.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Nothing: this router does not lead, or workers are still coming.
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
    /// What all workers shall do.
    pub transition: Transition,
    /// What they do not know yet. Of each [`Leader::obeyed`](super::Leader::obeyed) or [`Leader::failed`](super::Leader::failed) shall tell.
    pub send: Vec<Order>,
}

/// Orders for one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Which they are.
    pub id: OrderId,
    /// The last announcement of which all counted. What the worker announced after it, it keeps on these orders.
    pub seen: Epoch,
    /// What it shall do.
    pub orders: Orders,
}

/// Tells orders from all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderId {
    /// Whom they are for.
    pub worker: WorkerId,
    /// On which connection.
    pub session: u64,
    /// In which term.
    pub term: Term,
    /// Greater than that of all orders to this worker before, in this term; that of orders that are repeated.
    pub number: u64,
}
