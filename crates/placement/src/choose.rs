//! Which replica computes an expert for one micro-batch.
//!
//! Owns the choice. All rows of an expert go to one owner, because what a worker does for a few rows is mostly to
//! read the expert's weights; the time that the busiest worker will take is kept as short as a greedy choice can.
//! Workers that may not be sent to are never chosen, and one that is to show that it is well gets one expert that
//! others could compute too. Nothing is allocated once the scratch space has grown to the size of a layer.

use muster_types::{ExpertId, ExpertKey, LayerId};

use crate::breaker::Preference;
use crate::{Placement, Speed, WorkerIx};

/// Rows of an expert whose arithmetic takes as long as reading its weights.
const ROWS_PER_READ: f64 = 64.0;

/// How much slower a doubtful worker is taken to be.
const DOUBT: f64 = 4.0;

/// An expert that is needed, and by how many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// The expert.
    pub expert: ExpertId,
    /// Rows that want it.
    pub rows: u32,
}

impl Demand {
    /// What it takes to compute it, in reads of one expert's weights.
    fn cost(self) -> f64 {
        1.0 + f64::from(self.rows) / ROWS_PER_READ
    }
}

/// What is known of a worker at the moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Condition {
    /// How fast it is.
    pub speed: Speed,
    /// Work it was given and has not answered yet, in experts; one more for every 64 rows of each.
    pub outstanding: f64,
    /// How gladly it is sent to.
    pub preference: Preference,
}

impl Default for Condition {
    /// A worker like any other, with nothing to do.
    fn default() -> Self {
        Self { speed: Speed::ONE, outstanding: 0.0, preference: Preference::Normal }
    }
}

/// No worker that holds the expert may be sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no worker that holds {0} can be sent to")]
pub struct NoReplica(pub ExpertKey);

/// Chooses replicas; keeps the space it needs for that.
#[derive(Debug, Clone, Default)]
pub struct Chooser {
    /// What there is to choose, the least free first.
    order: Vec<Turn>,
    /// Work of each worker, in reads over speed.
    busy: Vec<f64>,
    chosen: Vec<WorkerIx>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    /// Owners that may be chosen.
    owners: usize,
    rows: std::cmp::Reverse<u32>,
    /// Index of the demand.
    at: usize,
}

impl Chooser {
    /// One with no space yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The owner for each of `demands`, which are of one layer.
    ///
    /// `conditions` are those of the placement's workers; one that is not there is like any other. Experts with the
    /// fewest owners choose first, then those with the most rows; each chooses the owner that would be done first,
    /// of equals the one with the lowest index. A doubtful owner is taken to be four times as slow; one to be
    /// avoided is chosen only if there is no other, and a probe only if there is not even such a one. Then each
    /// worker that waits for its probe and was not chosen gets the expert with the fewest rows that it holds and no
    /// other probe was given.
    ///
    /// # Errors
    /// When nobody who holds an expert may be sent to.
    pub fn choose(
        &mut self,
        layer: LayerId,
        demands: &[Demand],
        placement: &Placement,
        conditions: &[Condition],
    ) -> Result<&[WorkerIx], NoReplica> {
        let view = View { layer, demands, placement, conditions };
        self.take_order(&view);
        self.busy.clear();
        self.busy.extend((0..placement.workers().len()).map(|worker| view.condition(worker).backlog()));
        self.chosen.clear();
        self.chosen.resize(demands.len(), WorkerIx::FIRST);
        for n in 0..self.order.len() {
            let at = self.order[n].at;
            let owner = self.earliest(&view, at).ok_or(NoReplica(view.key(at)))?;
            self.busy[owner.index()] += view.time(at, owner);
            self.chosen[at] = owner;
        }
        self.probe(&view);
        Ok(&self.chosen)
    }

    fn take_order(&mut self, view: &View<'_>) {
        let turn = |(at, demand): (usize, &Demand)| Turn {
            owners: view.usable(at).count(),
            rows: std::cmp::Reverse(demand.rows),
            at,
        };
        self.order.clear();
        self.order.extend(view.demands.iter().enumerate().map(turn));
        self.order.sort_unstable();
    }

    /// The owner that would be done first with one more demand.
    fn earliest(&self, view: &View<'_>, at: usize) -> Option<WorkerIx> {
        let end = |owner: WorkerIx| {
            let tier = match view.condition(owner.index()).preference {
                Preference::Normal | Preference::Doubtful => 0,
                Preference::Avoid => 1,
                Preference::Probe | Preference::Never => 2,
            };
            (tier, self.busy[owner.index()] + view.time(at, owner))
        };
        let better = |a: (u8, f64), b: (u8, f64)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1));
        view.usable(at).min_by(|&a, &b| better(end(a), end(b)))
    }

    /// Gives workers on probation something to do that another worker could do as well.
    fn probe(&mut self, view: &View<'_>) {
        let is_probe = |worker: WorkerIx| view.condition(worker.index()).preference == Preference::Probe;
        for n in 0..view.placement.workers().len().min(view.conditions.len()) {
            if view.condition(n).preference != Preference::Probe || self.chosen.iter().any(|c| c.index() == n)
            {
                continue;
            }
            // What a probe has got already is for it alone.
            let free = (0..view.demands.len()).filter(|&at| !is_probe(self.chosen[at]));
            let mine =
                free.filter_map(|at| view.usable(at).find(|owner| owner.index() == n).map(|ix| (at, ix)));
            if let Some((at, owner)) = mine.min_by_key(|&(at, _)| (view.demands[at].rows, at)) {
                self.chosen[at] = owner;
            }
        }
    }
}

/// What is chosen from.
struct View<'a> {
    layer: LayerId,
    demands: &'a [Demand],
    placement: &'a Placement,
    conditions: &'a [Condition],
}

impl View<'_> {
    fn key(&self, at: usize) -> ExpertKey {
        ExpertKey { layer: self.layer, expert: self.demands[at].expert }
    }

    fn condition(&self, worker: usize) -> Condition {
        self.conditions.get(worker).copied().unwrap_or_default()
    }

    /// Owners that may be chosen, ascending.
    fn usable(&self, at: usize) -> impl Iterator<Item = WorkerIx> {
        let owners = self.placement.owners(self.key(at)).iter().copied();
        owners.filter(|owner| self.condition(owner.index()).preference != Preference::Never)
    }

    /// What a demand takes of a worker's time.
    fn time(&self, at: usize, owner: WorkerIx) -> f64 {
        self.demands[at].cost() / self.condition(owner.index()).pace()
    }
}

impl Condition {
    /// The speed it is taken to have.
    fn pace(self) -> f64 {
        let doubt = if self.preference == Preference::Doubtful { DOUBT } else { 1.0 };
        self.speed.get() / doubt
    }

    /// The time that its outstanding work takes.
    fn backlog(self) -> f64 {
        let outstanding = if self.outstanding.is_finite() { self.outstanding.max(0.0) } else { 0.0 };
        outstanding / self.pace()
    }
}

#[cfg(test)]
mod tests {
    use muster_types::{Epoch, WorkerId};
    use proptest::prelude::*;

    use super::*;
    use crate::Shape;

    fn layer() -> LayerId {
        LayerId::new(1, 2).unwrap()
    }

    fn expert(number: usize) -> ExpertId {
        ExpertId::new(u32::try_from(number).unwrap(), u32::MAX).unwrap()
    }

    /// Layer 1 of two has the experts; `owners[e]` are the workers that hold expert e.
    fn placement(workers: usize, owners: &[Vec<usize>]) -> Placement {
        let holding = |worker: usize| {
            let mine = (0..owners.len()).filter(|&e| owners[e].contains(&worker));
            let keys = mine.map(|e| ExpertKey { layer: layer(), expert: expert(e) }).collect();
            (WorkerId::new(&format!("w{worker}")).unwrap(), keys)
        };
        let holdings: Vec<_> = (0..workers).map(holding).collect();
        let shape = Shape::new(vec![0, u32::try_from(owners.len()).unwrap()]);
        Placement::from_holdings(Epoch::new(1), &shape, &holdings).unwrap()
    }

    fn demands(rows: &[u32]) -> Vec<Demand> {
        rows.iter().enumerate().map(|(e, &rows)| Demand { expert: expert(e), rows }).collect()
    }

    fn chosen(placement: &Placement, rows: &[u32], conditions: &[Condition]) -> Vec<usize> {
        let mut chooser = Chooser::new();
        let owners = chooser.choose(layer(), &demands(rows), placement, conditions).unwrap();
        owners.iter().map(|owner| owner.index()).collect()
    }

    fn with(preference: Preference) -> Condition {
        Condition { preference, ..Condition::default() }
    }

    #[test]
    fn what_has_no_choice_comes_first_and_then_the_heaviest() {
        let placement = placement(2, &[vec![0, 1], vec![0, 1], vec![0], vec![0, 1]]);
        assert_eq!(chosen(&placement, &[1, 1, 1, 1], &[]), [1, 0, 0, 1]);
        assert_eq!(chosen(&placement, &[1, 640, 1, 1], &[]), [0, 1, 0, 0]);
    }

    #[test]
    fn speed_and_outstanding_work_count() {
        let all = placement(2, &vec![vec![0, 1]; 6]);
        let fast = Condition { speed: Speed::new(2.0).unwrap(), ..Condition::default() };
        let share = chosen(&all, &[1; 6], &[fast, Condition::default()]);
        assert_eq!(share.iter().filter(|&&worker| worker == 0).count(), 4);
        let busy = Condition { outstanding: 4.0, ..Condition::default() };
        let share = chosen(&all, &[1; 6], &[Condition::default(), busy]);
        assert_eq!(share.iter().filter(|&&worker| worker == 0).count(), 5);
        for odd in [f64::NAN, f64::INFINITY, -7.0] {
            let odd = Condition { outstanding: odd, ..Condition::default() };
            assert_eq!(chosen(&all, &[1; 2], &[Condition::default(), odd]), [0, 1]);
        }
    }

    #[test]
    fn doubtful_workers_get_less_and_open_ones_nothing() {
        let all = placement(2, &vec![vec![0, 1]; 6]);
        let share = chosen(&all, &[1; 6], &[with(Preference::Doubtful)]);
        assert_eq!(share.iter().filter(|&&worker| worker == 0).count(), 1);
        assert_eq!(chosen(&all, &[1; 6], &[with(Preference::Never)]), [1; 6]);
        let mut chooser = Chooser::new();
        let error = chooser.choose(layer(), &demands(&[1]), &all, &[with(Preference::Never); 2]).unwrap_err();
        assert_eq!(error.to_string(), "no worker that holds layer 1 expert 0 can be sent to");
    }

    #[test]
    fn what_is_to_be_avoided_is_chosen_only_where_there_is_no_other() {
        let some = placement(3, &[vec![0, 1], vec![0, 1], vec![0], vec![0, 2]]);
        let leaving = [with(Preference::Avoid), Condition::default(), with(Preference::Probe)];
        // The probe is for worker 2 all the same.
        assert_eq!(chosen(&some, &[1; 4], &leaving), [1, 1, 0, 2]);
        assert_eq!(chosen(&some, &[1; 4], &leaving[..2]), [1, 1, 0, 2]);
    }

    #[test]
    fn a_probe_gets_one_expert_that_others_hold_too() {
        let all = placement(3, &vec![vec![0, 1, 2]; 4]);
        let probes = [with(Preference::Probe), Condition::default(), with(Preference::Probe)];
        assert_eq!(chosen(&all, &[9, 5, 7, 5], &probes), [1, 0, 1, 2]);
        // It is chosen for what nobody else has, and that is its probe.
        let alone = placement(2, &[vec![0], vec![0, 1]]);
        assert_eq!(chosen(&alone, &[1, 1], &probes[..1]), [0, 1]);
    }

    #[test]
    fn experts_that_nobody_holds_are_named() {
        let placement = placement(1, &[vec![0], vec![]]);
        let mut chooser = Chooser::new();
        let error = chooser.choose(layer(), &demands(&[1, 1]), &placement, &[]).unwrap_err();
        assert_eq!(error.0.expert, expert(1));
        assert_eq!(chooser.choose(layer(), &[], &placement, &[]), Ok(&[][..]));
    }

    fn preference() -> impl Strategy<Value = Preference> {
        prop_oneof![
            4 => Just(Preference::Normal),
            1 => Just(Preference::Doubtful),
            1 => Just(Preference::Avoid),
            1 => Just(Preference::Probe),
            1 => Just(Preference::Never),
        ]
    }

    fn conditions(workers: usize) -> impl Strategy<Value = Vec<Condition>> {
        let condition = (0.1..8.0, 0.0..20.0, preference()).prop_map(|(speed, outstanding, preference)| {
            Condition { speed: Speed::new(speed).unwrap(), outstanding, preference }
        });
        prop::collection::vec(condition, 0..=workers)
    }

    fn problems() -> impl Strategy<Value = (Placement, Vec<u32>, Vec<Condition>)> {
        (1_usize..7, 0_usize..24).prop_flat_map(|(workers, experts)| {
            let owners = prop::sample::subsequence((0..workers).collect::<Vec<_>>(), 1..=workers);
            let owners = prop::collection::vec(owners, experts);
            let rows = prop::collection::vec(1_u32..300, experts);
            (owners.prop_map(move |owners| placement(workers, &owners)), rows, conditions(workers))
        })
    }

    proptest! {
        #[test]
        fn every_expert_gets_one_live_owner((placement, rows, conditions) in problems()) {
            let demands = demands(&rows);
            let preference = |worker: usize| {
                conditions.get(worker).map_or(Preference::Normal, |condition| condition.preference)
            };
            let usable = |demand: &Demand| {
                let key = ExpertKey { layer: layer(), expert: demand.expert };
                let owners = placement.owners(key).iter().map(|owner| owner.index());
                owners.filter(|&owner| preference(owner) != Preference::Never).collect::<Vec<_>>()
            };
            let mut chooser = Chooser::new();
            match chooser.choose(layer(), &demands, &placement, &conditions) {
                Err(NoReplica(key)) => prop_assert!(usable(&demands[key.expert.index()]).is_empty()),
                Ok(owners) => {
                    prop_assert_eq!(owners.len(), demands.len());
                    let mut probed = std::collections::BTreeSet::new();
                    for (demand, owner) in demands.iter().zip(owners) {
                        let usable = usable(demand);
                        prop_assert!(usable.contains(&owner.index()));
                        // A probe gets more than its one only where there is nobody else.
                        if preference(owner.index()) == Preference::Probe
                            && usable.iter().any(|&other| preference(other) != Preference::Probe)
                        {
                            prop_assert!(probed.insert(owner.index()));
                        }
                    }
                }
            }
        }

        #[test]
        fn the_choice_is_the_same_with_used_space(
            (placement, rows, conditions) in problems(), (other, more, _) in problems(),
        ) {
            let mut used = Chooser::new();
            let _ = used.choose(layer(), &demands(&more), &other, &[]);
            let again = used.choose(layer(), &demands(&rows), &placement, &conditions);
            let mut fresh = Chooser::new();
            prop_assert_eq!(again, fresh.choose(layer(), &demands(&rows), &placement, &conditions));
        }

        #[test]
        fn where_all_hold_all_nobody_is_late_by_more_than_one_expert(
            workers in 1_usize..9, rows in prop::collection::vec(1_u32..300, 1..60),
        ) {
            let all = placement(workers, &vec![(0..workers).collect(); rows.len()]);
            let mut busy = vec![0.0; workers];
            for (owner, &rows) in chosen(&all, &rows, &[]).into_iter().zip(&rows) {
                busy[owner] += 1.0 + f64::from(rows) / ROWS_PER_READ;
            }
            let mean = busy.iter().sum::<f64>() / workers as f64;
            let largest = rows.iter().map(|&rows| 1.0 + f64::from(rows) / ROWS_PER_READ).fold(0.0, f64::max);
            let peak = busy.into_iter().fold(0.0, f64::max);
            prop_assert!(peak <= mean + largest + 1e-9, "{peak} over {mean}");
        }

        #[test]
        fn few_rows_are_spread_by_number_of_experts(workers in 1_usize..9, active in 1_usize..60) {
            let all = placement(workers, &vec![(0..workers).collect(); active]);
            let mut counts = vec![0; workers];
            chosen(&all, &vec![1; active], &[]).into_iter().for_each(|owner| counts[owner] += 1);
            prop_assert_eq!(counts.into_iter().max(), Some(active.div_ceil(workers)));
        }
    }
}
