//! The inputs of a plan, apart from the leader, so that another thread can make it.

use std::collections::BTreeMap;
use std::sync::Arc;

use muster_types::WorkerId;

use crate::{Binding, ExpertSizes, Figures, Goals, Loads, Member, Shape, Target, plan};

/// Why a plan is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The leader is new.
    First,
    /// Workers joined, left or changed.
    Members,
    /// The last plan was not reached in time.
    Age,
    /// Loads were counted.
    Loads,
}

/// All inputs of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanRequest {
    pub(super) number: u64,
    pub(super) cause: Cause,
    pub(super) shape: Shape,
    pub(super) sizes: ExpertSizes,
    pub(super) goals: Goals,
    pub(super) loads: Loads,
    pub(super) members: BTreeMap<WorkerId, Member>,
    pub(super) binding: Arc<Binding>,
}

/// Result of a [`PlanRequest`].
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub(super) number: u64,
    pub(super) target: Target,
}

impl PlanRequest {
    /// Reason of the plan.
    #[must_use]
    pub const fn cause(&self) -> Cause {
        self.cause
    }

    /// Makes the plan, which takes long for a large cluster.
    #[must_use]
    pub fn plan(&self) -> Plan {
        let target = plan(&self.shape, &self.sizes, &self.members, &self.loads, &self.goals, &self.binding);
        Plan { number: self.number, target }
    }

    /// In place of a plan that cannot be made: everything stays where it is.
    #[must_use]
    pub fn stay(&self) -> Plan {
        let held = |(name, member): (&WorkerId, &Member)| (name.clone(), member.held.clone());
        let figures = Figures {
            imbalance: 1.0,
            layer_imbalance: 1.0,
            first_bytes: 0,
            moved_bytes: 0,
            uncovered: Vec::new(),
            under_replicated: Vec::new(),
        };
        Plan {
            number: self.number,
            target: Target { hold: self.members.iter().map(held).collect(), figures },
        }
    }
}

impl Plan {
    /// The target placement.
    #[must_use]
    pub const fn target(&self) -> &Target {
        &self.target
    }
}
