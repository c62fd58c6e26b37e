//! A time of leading: the plan, and who was told what.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use muster_types::{ExpertKey, WorkerId};

use super::OrderId;
use crate::lease::Term;
use crate::{Orders, Target};

/// A time of leading.
#[derive(Debug, Clone)]
pub(super) struct Reign {
    pub(super) term: Term,
    /// `None` until there is a plan.
    pub(super) target: Option<Target>,
    pub(super) planned: Duration,
    /// Whether workers changed since it was planned.
    pub(super) is_stale: bool,
    /// The plan that is being made.
    pub(super) making: Option<u64>,
    /// By worker: what it was told last.
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

    /// Whether a worker was told the same on this connection, and has done it or had no time to.
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

    /// What was told a worker last, if it is this.
    pub(super) fn told(&mut self, id: &OrderId) -> Option<&mut Told> {
        let is_last = |told: &&mut Told| (told.session, told.number) == (id.session, id.number);
        self.told.get_mut(&id.worker).filter(|_| self.term == id.term).filter(is_last)
    }
}
