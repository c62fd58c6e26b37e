//! An immutable snapshot of the owners of every expert.

use std::collections::HashSet;
use std::num::NonZero;

use muster_types::{Epoch, ExpertKey, LayerId, Numerics, NumericsClass, WorkerId};

use crate::{Binding, Shape};

/// A worker's position in [`Placement::workers`]. Means nothing for another placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerIx(u16);

impl WorkerIx {
    /// Most workers one placement can name.
    const LIMIT: usize = 1 << 16;

    /// The position as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Holdings that contradict the model or themselves.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// More workers than an index can name.
    #[error("{given} workers are too many for one placement: at most {limit} are allowed")]
    TooManyWorkers {
        /// Workers given.
        given: usize,
        /// Most that are allowed.
        limit: usize,
    },
    /// A worker is listed twice.
    #[error("worker {worker} is listed twice; worker ids must be unique")]
    DuplicateWorker {
        /// The worker.
        worker: WorkerId,
    },
    /// A worker announces an expert that the model does not have.
    #[error("worker {worker} announces {key}, which the model does not have; does it serve the same model?")]
    OutOfShape {
        /// The worker.
        worker: WorkerId,
        /// What it announces.
        key: ExpertKey,
    },
    /// A worker announces an expert twice.
    #[error("worker {worker} announces {key} twice")]
    DuplicateKey {
        /// The worker.
        worker: WorkerId,
        /// What it announces.
        key: ExpertKey,
    },
}

/// What a worker holds, kept elsewhere: its name, its class and its experts.
pub type Held<'a> = (&'a WorkerId, NumericsClass, &'a [ExpertKey]);

/// Which workers hold each expert at one epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    epoch: Epoch,
    workers: Vec<WorkerId>,
    /// By layer and expert; ascending within.
    owners: Vec<Vec<Vec<WorkerIx>>>,
}

impl Placement {
    /// The placement in which each worker holds what it announces. Workers keep the order given here. Experts
    /// that nobody announces are [`missing`](Self::missing), which is no error.
    ///
    /// # Errors
    /// When a worker is listed twice, or announces an expert twice or one that is not in `shape`.
    pub fn from_holdings(
        epoch: Epoch,
        shape: &Shape,
        holdings: &[(WorkerId, Vec<ExpertKey>)],
    ) -> Result<Self, PlacementError> {
        let class = NumericsClass::CpuCanonical;
        let held: Vec<_> = holdings.iter().map(|(worker, keys)| (worker, class, keys.as_slice())).collect();
        Self::bound(epoch, shape, &held, &Binding::new(Numerics::Any, shape))
    }

    /// The placement in which each worker holds what it announces and is of the class that this is bound to.
    ///
    /// # Errors
    /// As [`Self::from_holdings`].
    pub fn bound(
        epoch: Epoch,
        shape: &Shape,
        holdings: &[Held<'_>],
        binding: &Binding,
    ) -> Result<Self, PlacementError> {
        if holdings.len() > WorkerIx::LIMIT {
            return Err(PlacementError::TooManyWorkers { given: holdings.len(), limit: WorkerIx::LIMIT });
        }
        let mut names = HashSet::new();
        let mut owners: Vec<_> =
            shape.experts().iter().map(|&experts| vec![Vec::new(); experts as usize]).collect();
        for (ix, &(worker, class, keys)) in (0..=u16::MAX).map(WorkerIx).zip(holdings) {
            if !names.insert(worker) {
                return Err(PlacementError::DuplicateWorker { worker: worker.clone() });
            }
            for &key in keys {
                if !shape.contains(key) {
                    return Err(PlacementError::OutOfShape { worker: worker.clone(), key });
                }
                if !binding.admits(key, class) {
                    continue;
                }
                let owners = &mut owners[key.layer.index()][key.expert.index()];
                // Workers come in ascending order, so this one can only be the last.
                if owners.last() == Some(&ix) {
                    return Err(PlacementError::DuplicateKey { worker: worker.clone(), key });
                }
                owners.push(ix);
            }
        }
        let workers = holdings.iter().map(|(worker, ..)| (*worker).clone()).collect();
        Ok(Self { epoch, workers, owners })
    }

    /// The version of this snapshot.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// All workers, also those that hold nothing.
    #[must_use]
    pub fn workers(&self) -> &[WorkerId] {
        &self.workers
    }

    /// Routed experts of a layer; 0 when it is dense or not in the model.
    #[must_use]
    pub fn experts(&self, layer: LayerId) -> usize {
        self.owners.get(layer.index()).map_or(0, Vec::len)
    }

    /// The workers that hold this expert, ascending; none when it is missing or not in the model.
    #[must_use]
    pub fn owners(&self, key: ExpertKey) -> &[WorkerIx] {
        self.owners
            .get(key.layer.index())
            .and_then(|layer| layer.get(key.expert.index()))
            .map_or(&[], Vec::as_slice)
    }

    /// The experts that nobody holds, ascending.
    #[must_use]
    pub fn missing(&self) -> Vec<ExpertKey> {
        self.shape().keys().filter(|&key| self.owners(key).is_empty()).collect()
    }

    /// How many experts have fewer owners than that.
    #[must_use]
    pub fn fewer_copies_than(&self, copies: NonZero<u32>) -> usize {
        let copies = copies.get() as usize;
        self.owners.iter().flatten().filter(|owners| owners.len() < copies).count()
    }

    /// Whether every expert of the model has an owner.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.owners.iter().flatten().all(|owners| !owners.is_empty())
    }

    fn shape(&self) -> Shape {
        // The lengths were 32-bit counts when the lists were made.
        Shape::new(self.owners.iter().map(|layer| layer.len() as u32).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use muster_types::ExpertId;
    use proptest::prelude::*;

    use super::*;

    fn key(layer: u32, expert: u32) -> ExpertKey {
        ExpertKey { layer: LayerId::new(layer, 100).unwrap(), expert: ExpertId::new(expert, 100).unwrap() }
    }

    fn worker(name: &str) -> WorkerId {
        WorkerId::new(name).unwrap()
    }

    fn build(holdings: &[(WorkerId, Vec<ExpertKey>)]) -> Result<Placement, PlacementError> {
        Placement::from_holdings(Epoch::new(7), &Shape::new(vec![0, 2, 2]), holdings)
    }

    #[test]
    fn replicas_are_ascending_and_gaps_are_reported() {
        let placement =
            build(&[(worker("b"), vec![key(2, 0), key(1, 0)]), (worker("a"), vec![key(1, 0), key(1, 1)])])
                .unwrap();
        let owners = |layer, expert| -> Vec<usize> {
            placement.owners(key(layer, expert)).iter().map(|ix| ix.index()).collect()
        };
        assert_eq!(placement.epoch(), Epoch::new(7));
        assert_eq!(placement.workers(), [worker("b"), worker("a")]);
        assert_eq!((owners(1, 0), owners(1, 1), owners(2, 0)), (vec![0, 1], vec![1], vec![0]));
        assert_eq!(placement.missing(), [key(2, 1)]);
        assert!(!placement.is_complete());
    }

    #[test]
    fn keys_outside_the_model_have_no_owner() {
        let placement = build(&[(worker("a"), vec![])]).unwrap();
        assert!([key(0, 0), key(1, 2), key(3, 0)].iter().all(|&key| placement.owners(key).is_empty()));
        assert_eq!(LayerId::all(4).map(|layer| placement.experts(layer)).collect::<Vec<_>>(), [0, 2, 2, 0]);
    }

    #[test]
    fn a_model_without_experts_needs_no_workers() {
        let placement = Placement::from_holdings(Epoch::new(1), &Shape::new(vec![0, 0]), &[]).unwrap();
        assert!(placement.is_complete());
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        let message = |holdings: &[_]| build(holdings).unwrap_err().to_string();
        assert_eq!(
            message(&[(worker("a"), vec![]), (worker("b"), vec![]), (worker("a"), vec![])]),
            "worker a is listed twice; worker ids must be unique"
        );
        assert_eq!(
            message(&[(worker("a"), vec![key(1, 1), key(1, 0), key(1, 1)])]),
            "worker a announces layer 1 expert 1 twice"
        );
        for stray in [key(0, 0), key(1, 2), key(3, 0)] {
            assert_eq!(
                build(&[(worker("a"), vec![stray])]),
                Err(PlacementError::OutOfShape { worker: worker("a"), key: stray })
            );
        }
    }

    #[test]
    fn workers_of_another_class_are_not_owners() {
        let shape = Shape::new(vec![0, 2, 2]);
        let (a, b) = (worker("a"), worker("b"));
        let keys: Vec<_> = shape.keys().collect();
        let held = [(&a, NumericsClass::CudaMma, &keys[..2]), (&b, NumericsClass::CpuCanonical, &keys[1..])];
        let binding = Binding::new(Numerics::Exact, &shape);
        let binding = binding.after([(held[0].1, held[0].2)].into_iter());
        let binding = binding.after(held.iter().map(|&(_, class, keys)| (class, keys)));
        let placement = Placement::bound(Epoch::new(1), &shape, &held, &binding).unwrap();
        let owners = |key: &ExpertKey| placement.owners(*key).iter().map(|ix| ix.index()).collect::<Vec<_>>();
        assert_eq!(keys.iter().map(owners).collect::<Vec<_>>(), [vec![0], vec![0], vec![1], vec![1]]);
        let any = Binding::new(Numerics::Any, &shape);
        let placement = Placement::bound(Epoch::new(1), &shape, &held, &any).unwrap();
        assert_eq!(placement.owners(keys[1]).len(), 2);
    }

    #[test]
    fn more_workers_than_indices_are_refused() {
        let holdings: Vec<_> = (0..=WorkerIx::LIMIT).map(|n| (worker(&format!("w{n}")), vec![])).collect();
        assert!(build(&holdings[..WorkerIx::LIMIT]).is_ok());
        assert!(matches!(build(&holdings), Err(PlacementError::TooManyWorkers { .. })));
    }

    proptest! {
        #[test]
        fn owners_are_those_who_announced(
            experts in prop::collection::vec(0_u32..5, 1..5),
            picks in prop::collection::vec(prop::collection::btree_set((0_u32..5, 0_u32..5), 0..20), 0..6),
        ) {
            let shape = Shape::new(experts);
            let held: Vec<BTreeSet<_>> = picks
                .iter()
                .map(|picks| picks.iter().map(|&(l, e)| key(l, e)).filter(|&k| shape.contains(k)).collect())
                .collect();
            let holdings: Vec<_> = held
                .iter()
                .enumerate()
                .map(|(n, keys)| (worker(&format!("w{n}")), keys.iter().rev().copied().collect()))
                .collect();
            let placement = Placement::from_holdings(Epoch::new(1), &shape, &holdings).unwrap();

            let mut missing = Vec::new();
            for key in shape.keys() {
                let expected: Vec<_> = (0..held.len()).filter(|&n| held[n].contains(&key)).collect();
                let owners: Vec<_> = placement.owners(key).iter().map(|ix| ix.index()).collect();
                prop_assert_eq!(&owners, &expected);
                if owners.is_empty() {
                    missing.push(key);
                }
            }
            prop_assert_eq!(placement.is_complete(), missing.is_empty());
            prop_assert_eq!(placement.missing(), missing);
        }
    }
}
