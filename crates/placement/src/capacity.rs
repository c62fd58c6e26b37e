//! How many workers of which memory hold a model's experts.
//!
//! Experts are placed whole, and a worker holds no expert twice. With experts of one size that decides it: workers that hold
//! `c` experts each hold `r` copies of all of `n` exactly if the `min(c, n)` add up to `r * n`, since copies can then be
//! dealt out in turn. A plan that starts from a placement in force does not always find that last place: it always gives every
//! expert an owner, and always finds all copies with `r - 1` workers more. All experts count as large as the largest, so a
//! model whose layers differ may need less.

/// Experts to place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Number of experts in all layers.
    pub experts: u64,
    /// Bytes of the largest; above 0.
    pub bytes_each: u64,
    /// Replicas of each, on different workers.
    pub replicas: u32,
}

impl Demand {
    /// Copies to be placed.
    #[must_use]
    pub const fn copies(&self) -> u64 {
        self.experts.saturating_mul(self.replicas as u64)
    }

    /// Different experts that a worker with so many bytes for them can hold.
    #[must_use]
    pub fn held_by(&self, bytes: u64) -> u64 {
        (bytes / self.bytes_each.max(1)).min(self.experts)
    }

    /// Copies that these workers, given by their bytes, cannot hold; 0 when all have a place.
    #[must_use]
    pub fn missing(&self, workers: impl IntoIterator<Item = u64>) -> u64 {
        let held = workers.into_iter().map(|bytes| self.held_by(bytes));
        held.fold(self.copies(), u64::saturating_sub)
    }

    /// Number of further workers of this size that hold all copies, beside these; `None` when one cannot hold a single expert.
    #[must_use]
    pub fn workers_of(&self, bytes: u64, beside: impl IntoIterator<Item = u64>) -> Option<u64> {
        let each = self.held_by(bytes);
        (each > 0).then(|| self.missing(beside).div_ceil(each))
    }

    /// Number of whole copies of the model that these workers hold.
    #[must_use]
    pub fn whole_copies(&self, workers: impl IntoIterator<Item = u64>) -> u64 {
        let held = workers.into_iter().map(|bytes| self.held_by(bytes));
        held.fold(0, u64::saturating_add) / self.experts.max(1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::num::NonZero;

    use muster_types::{Numerics, NumericsClass, Speed, WorkerId};
    use proptest::prelude::*;

    use super::*;
    use crate::{Binding, ExpertSizes, Goals, Loads, Member, Shape, plan};

    #[test]
    fn experts_are_placed_whole() {
        let demand = Demand { experts: 256, bytes_each: 10, replicas: 1 };
        assert_eq!(demand.held_by(99), 9);
        assert_eq!(demand.held_by(1 << 40), 256);
        assert_eq!(demand.workers_of(99, []), Some(29));
        assert_eq!(demand.workers_of(99, [1000, 1000]), Some(7));
        assert_eq!((demand.workers_of(9, []), demand.missing([9; 100])), (None, 256));
        assert_eq!(demand.workers_of(99, [2560]), Some(0));
    }

    #[test]
    fn no_worker_counts_for_two_copies() {
        let demand = Demand { experts: 4, bytes_each: 1, replicas: 3 };
        assert_eq!(demand.workers_of(1 << 30, []), Some(3));
        assert_eq!((demand.missing([100, 100]), demand.whole_copies([100, 3])), (4, 1));
    }

    proptest! {
        #[test]
        fn a_plan_manages_with_as_many_workers_as_counted(
            layers in 1_usize..4,
            experts in 1_u32..9,
            replicas in 1_u32..4,
            size in 1_u64..5,
            memory in 1_u64..60,
        ) {
            let shape = Shape::new(vec![experts; layers]);
            let demand = Demand { experts: shape.total(), bytes_each: size, replicas };
            let Some(count) = demand.workers_of(memory, []) else {
                prop_assert!(memory < size);
                return Ok(());
            };
            prop_assert!(demand.missing((1..count).map(|_| memory)) > 0);
            let member = Member {
                class: NumericsClass::CpuCanonical,
                capacity: memory,
                speed: Speed::ONE,
                domain: None,
                draining: false,
                held: BTreeSet::new(),
            };
            let target = |workers: u64| {
                let id = |at| WorkerId::new(&format!("w{at}")).unwrap();
                let members: BTreeMap<_, _> = (0..workers).map(|at| (id(at), member.clone())).collect();
                let sizes = ExpertSizes::uniform(&shape, size).unwrap();
                let goals = Goals { min_replicas: NonZero::new(replicas).unwrap(), ..Goals::default() };
                plan(&shape, &sizes, &members, &Loads::new(&shape), &goals, &Binding::new(Numerics::Exact, &shape))
            };
            prop_assert_eq!(target(count).figures.uncovered, vec![]);
            let spare = target(count + u64::from(replicas) - 1);
            prop_assert_eq!(spare.figures.under_replicated, vec![]);
        }
    }
}
