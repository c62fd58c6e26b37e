//! One term of leading: the plan, and the last orders to each worker.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use muster_types::{ExpertKey, WorkerId};

use super::OrderId;
use crate::lease::Term;
use crate::{Orders, Target};

/// One term of leading.
#[derive(Debug, Clone)]
pub(super) struct Reign {
    pub(super) term: Term,
    /// `None` until there is a plan.
    pub(super) target: Option<Target>,
    pub(super) planned: Duration,
    /// Whether workers changed since the plan.
    pub(super) is_stale: bool,
    /// Number of the plan in the making.
    pub(super) making: Option<u64>,
    /// By worker: its last orders.
    pub(super) told: BTreeMap<WorkerId, Told>,
}

#[derive(Debug, Clone)]
pub(super) struct Told {
    pub(super) session: u64,
    pub(super) number: u64,
    pub(super) hold: BTreeSet<ExpertKey>,
    pub(super) at: Duration,
    pub(super) has_answered: bool,
}

impl Reign {
    pub(super) const fn new(term: Term) -> Self {
        Self {
            term,
            target: None,
            planned: Duration::ZERO,
            is_stale: true,
            making: None,
            told: BTreeMap::new(),
        }
    }

    /// Whether a worker got the same orders on this session, and has carried them out or is not due for a repeat.
    pub(super) fn is_told(
        &self,
        now: Duration,
        repeat: Duration,
        subject: (&WorkerId, u64),
        orders: &Orders,
    ) -> bool {
        let (worker, session) = subject;
        self.told.get(worker).is_some_and(|told| {
            let is_done = told.has_answered && orders.load.is_empty();
            let is_recent = now.saturating_sub(told.at) <= repeat;
            told.session == session && told.hold == orders.hold() && (is_done || is_recent)
        })
    }

    /// A worker's last orders, if they are these.
    pub(super) fn told(&mut self, id: &OrderId) -> Option<&mut Told> {
        let is_last = |told: &&mut Told| (told.session, told.number) == (id.session, id.number);
        self.told.get_mut(&id.worker).filter(|_| self.term == id.term).filter(is_last)
    }
}
