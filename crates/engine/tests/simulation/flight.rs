//! A lane's rows while they are with the workers, as `dispatch-grpc` does it: parts, stand-ins, deadlines.

use std::collections::BTreeMap;

use muster_engine::batcher::{BatchPlan, Rank, ShardPlan, StandIn, stand_ins};
use muster_engine::dispatch::Choices;
use muster_placement::{Placement, WorkerIx};
use muster_types::{ExpertId, LayerId};

use crate::world::Time;

#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) number: u64,
    pub(crate) layer: LayerId,
    pub(crate) choices: Choices,
    plan: BatchPlan,
    pub(crate) parts: Vec<Part>,
    first: usize,
    pub(crate) deadline: Time,
    version: u64,
}

#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) id: u64,
    pub(crate) worker: usize,
    pub(crate) session: u64,
    pub(crate) plan: ShardPlan,
    pub(crate) since: Time,
    pub(crate) due: Time,
    pub(crate) state: State,
    pub(crate) stand_ins: Vec<usize>,
    pub(crate) alone: bool,
    pub(crate) hedged: bool,
    pub(crate) deferred: bool,
    pub(crate) of: Option<(usize, Vec<u32>)>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum State {
    Waiting,
    Arrived(Vec<u64>),
    Failed,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Complete,
    Open,
    /// A part will not come, nor a stand-in.
    Lost,
}

impl Flight {
    pub(crate) fn new(
        number: u64,
        layer: LayerId,
        choices: Choices,
        plan: BatchPlan,
        deadline: Time,
        version: u64,
    ) -> Self {
        let first = plan.shards.len();
        Self { number, layer, choices, plan, parts: Vec::new(), first, deadline, version }
    }

    pub(crate) fn first_shards(&self) -> Vec<ShardPlan> {
        self.plan.shards.clone()
    }

    pub(crate) fn standing(&self) -> Standing {
        let mut complete = true;
        for part in 0..self.first {
            if !self.is_resolved(part) {
                complete = false;
                if self.is_lost(part) {
                    return Standing::Lost;
                }
            }
        }
        if complete { Standing::Complete } else { Standing::Open }
    }

    fn is_resolved(&self, part: usize) -> bool {
        let Part { state, stand_ins, .. } = &self.parts[part];
        matches!(state, State::Arrived(_))
            || (!stand_ins.is_empty() && stand_ins.iter().all(|&other| self.is_resolved(other)))
    }

    fn is_lost(&self, part: usize) -> bool {
        let Part { state, stand_ins, .. } = &self.parts[part];
        *state == State::Failed
            && (stand_ins.is_empty() || stand_ins.iter().any(|&other| self.is_lost(other)))
    }

    pub(crate) fn look_again(&mut self, version: u64) {
        if std::mem::replace(&mut self.version, version) != version {
            self.parts.iter_mut().for_each(|part| part.alone = false);
        }
    }

    /// Parts that are not there, that nobody stands in for, and that others might.
    fn open(&self) -> impl Iterator<Item = usize> {
        (0..self.parts.len()).filter(|&part| {
            let Part { state, stand_ins, alone, .. } = &self.parts[part];
            let is_there = matches!(state, State::Arrived(_));
            !is_there && stand_ins.is_empty() && !alone && !self.is_settled(part)
        })
    }

    fn is_settled(&self, part: usize) -> bool {
        let mut at = part;
        while let Some((of, _)) = &self.parts[at].of {
            if matches!(self.parts[*of].state, State::Arrived(_)) {
                return true;
            }
            at = *of;
        }
        false
    }

    pub(crate) fn to_replace(&self, now: Time) -> Vec<usize> {
        let is_due = |&part: &usize| self.parts[part].state != State::Waiting || now >= self.parts[part].due;
        self.open().filter(is_due).collect()
    }

    pub(crate) fn next_due(&self) -> Option<Time> {
        let waiting = self.open().filter(|&part| self.parts[part].state == State::Waiting);
        waiting.map(|part| self.parts[part].due).min()
    }

    /// Stand-ins on workers that were not asked for these pairs; `names` are those of the placement.
    pub(crate) fn plan_stand_ins(
        &mut self,
        part: usize,
        placement: &Placement,
        names: &[usize],
        rank: &dyn Fn(WorkerIx) -> Rank,
    ) -> Option<Vec<StandIn>> {
        let asked = self.asked(part);
        let of_others = |worker: WorkerIx| {
            if asked.contains(&names[worker.index()]) { Rank::Unusable } else { rank(worker) }
        };
        let plan = &self.parts[part].plan;
        let places: Vec<u32> = (0..plan.indices.len() as u32).collect();
        let planned = stand_ins(self.layer, plan, &places, placement, &of_others);
        self.parts[part].alone = !planned.orphans.is_empty();
        planned.orphans.is_empty().then_some(planned.plans)
    }

    /// Workers that were asked for the pairs of a part.
    pub(crate) fn asked(&self, part: usize) -> Vec<usize> {
        let next = |&at: &usize| self.parts[at].of.as_ref().map(|(of, _)| *of);
        std::iter::successors(Some(part), next).map(|at| self.parts[at].worker).collect()
    }

    /// The outputs of every row, in the order of its experts. Checks that each pair was computed by the part it is
    /// taken from, and is taken once.
    pub(crate) fn outputs(&self) -> Vec<Vec<u64>> {
        let mut sources = Vec::new();
        (0..self.first).for_each(|part| self.gather(part, &mut sources));
        let mut found: Vec<BTreeMap<u32, (u64, u32, ExpertId)>> = vec![BTreeMap::new(); self.first];
        for part in sources {
            let State::Arrived(values) = &self.parts[part].state else {
                unreachable!("only what arrived is a source")
            };
            let plan = &self.parts[part].plan;
            let mut places: Vec<u32> = (0..plan.indices.len() as u32).collect();
            let mut at = part;
            while let Some((of, there)) = &self.parts[at].of {
                places.iter_mut().for_each(|place| *place = there[*place as usize]);
                at = *of;
            }
            for ((place, &value), (row, expert)) in places.into_iter().zip(values).zip(pairs(plan)) {
                let before = found[at].insert(place, (value, row, expert));
                assert!(before.is_none(), "every-pair-once: row {row} expert {expert} is counted twice");
            }
        }
        let k = self.choices.k();
        let mut taken = 0;
        let outputs = self.choices.experts().chunks(k).enumerate().map(|(row, experts)| {
            let pair = |(j, &expert): (usize, &ExpertId)| {
                let slot = self.plan.slots[row * k + j];
                let got = found[slot.shard as usize].get(&slot.position);
                let &(value, of_row, of_expert) =
                    got.unwrap_or_else(|| panic!("every-pair-once: row {row} expert {expert} is missing"));
                assert_eq!(
                    (of_row, of_expert),
                    (row as u32, expert),
                    "every-pair-once: another pair's output"
                );
                taken += 1;
                value
            };
            experts.iter().enumerate().map(pair).collect()
        });
        let outputs = outputs.collect();
        let all: usize = found.iter().map(BTreeMap::len).sum();
        assert_eq!(taken, all, "every-pair-once: outputs that no row wants");
        outputs
    }

    fn gather(&self, part: usize, sources: &mut Vec<usize>) {
        let Part { state, stand_ins, .. } = &self.parts[part];
        if matches!(state, State::Arrived(_)) {
            sources.push(part);
        } else {
            stand_ins.iter().for_each(|&other| self.gather(other, sources));
        }
    }
}

/// The (row, expert) pairs of a shard, in the order of its reply.
pub(crate) fn pairs(plan: &ShardPlan) -> impl Iterator<Item = (u32, ExpertId)> + '_ {
    let counted = plan.experts.iter().zip(&plan.counts);
    let experts = counted.flat_map(|(&expert, &count)| std::iter::repeat_n(expert, count as usize));
    plan.indices.iter().map(|&index| plan.rows[index as usize]).zip(experts)
}
