//! A micro-batch between `submit` and `collect`: the shards that carry it, and those that stand in for them.
//!
//! A micro-batch leaves in *parts*, one shard each. When a part fails, or is late, its (row, expert) pairs are sent to
//! other owners as further parts, its *stand-ins*; stand-ins can fail in turn. What always holds: a part counts as
//! resolved when it has arrived itself or all its stand-ins are resolved, and only resolved parts are combined; every
//! (row, expert) pair is taken from exactly one arrived part; no worker is asked twice for the same pair. It does not
//! know how parts are sent, nor how long they may take.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use bytes::Bytes;
use muster_engine::batcher::{Rank, ShardPlan, Slot, StandIn, stand_ins};
use muster_engine::dispatch::{Choices, LayerBatch};
use muster_kernels::{Term, terms_by_row};
use muster_placement::{Placement, WorkerIx};
use muster_proto::expert::v1;
use muster_types::{Combine, ExpertId, LayerId, Retry, WorkerId};

use super::board::{Arrived, Failure};
use super::routes::Hop;

/// See the module.
pub(super) struct Flight {
    pub(super) layer: LayerId,
    pub(super) lane: usize,
    pub(super) rows: usize,
    combine: Combine,
    /// Terms of each row's sum; sources are the parts that were sent first. Empty where workers add up.
    starts: Vec<u32>,
    terms: Vec<Term>,
    parts: Vec<Part>,
    /// Parts that were sent first; the others stand in for one of these or for another stand-in.
    first: usize,
    /// Version of the routes that stand-ins were last looked for in.
    pub(super) version: u64,
    pub(super) submitted: Instant,
    pub(super) sent: Instant,
}

/// A shard to be sent.
pub(super) struct Shard {
    pub(super) id: u64,
    pub(super) hop: Hop,
    pub(super) worker: WorkerId,
    pub(super) plan: ShardPlan,
    /// The hidden rows.
    pub(super) data: Bytes,
    /// Weights of the outputs, where the worker adds them up.
    pub(super) weights: Vec<f32>,
}

/// A shard that was sent.
pub(super) struct Part {
    pub(super) shard: Shard,
    /// When waiting for it began.
    pub(super) since: Instant,
    /// When it is late.
    due: Instant,
    state: State,
    stand_ins: Vec<usize>,
    /// Nobody else can be asked.
    alone: bool,
    /// Others were asked because it was late.
    pub(super) hedged: bool,
    /// It was late when no hedge could be afforded, and was given more time.
    pub(super) deferred: bool,
    /// The part that this one stands in for, and the places of its outputs there.
    of: Option<(usize, Vec<u32>)>,
}

enum State {
    Waiting,
    Arrived(Arrived),
    Failed(Failure),
}

/// The sums that a flight's rows are.
pub(super) struct Sum<'a> {
    /// Numbers of the parts that are the sources.
    pub(super) sources: Vec<usize>,
    /// Where each row's terms begin.
    pub(super) starts: Cow<'a, [u32]>,
    pub(super) terms: Cow<'a, [Term]>,
}

/// How a flight stands.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Everything is there.
    Complete,
    /// Something is still to come.
    Open,
    /// This part will never be there, nor a stand-in.
    Lost(usize),
}

impl Flight {
    /// A micro-batch that left in these shards; `slots` says where each output will be.
    pub(super) fn new(
        batch: &LayerBatch<'_>,
        slots: &[Slot],
        combine: Combine,
        shards: Vec<Shard>,
        version: u64,
        submitted: Instant,
    ) -> Self {
        let LayerBatch { layer, lane, choices, .. } = *batch;
        let (starts, terms) = match combine {
            Combine::Exact => by_pair(choices, slots),
            Combine::Partial => (Vec::new(), Vec::new()),
        };
        let sent = Instant::now();
        let parts: Vec<Part> = shards.into_iter().map(|shard| Part::new(shard, sent, sent, None)).collect();
        let (rows, first) = (choices.rows(), parts.len());
        Self { layer, lane, rows, combine, starts, terms, parts, first, version, submitted, sent }
    }

    /// Waiting for it begins.
    pub(super) fn begin(&mut self, now: Instant, patience: impl Fn(&Shard) -> Duration) {
        for part in &mut self.parts {
            (part.since, part.due) = (now, now + patience(&part.shard));
        }
    }

    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Ids of all shards that were ever sent for it.
    pub(super) fn ids(&self) -> impl Iterator<Item = u64> {
        self.parts.iter().map(|part| part.shard.id)
    }

    pub(super) fn arrive(&mut self, part: usize, arrived: Arrived) {
        self.parts[part].state = State::Arrived(arrived);
    }

    pub(super) fn fail(&mut self, part: usize, failure: Failure) {
        self.parts[part].state = State::Failed(failure);
    }

    /// Whether a part is still to come.
    pub(super) fn is_waiting(&self, part: usize) -> bool {
        matches!(self.parts[part].state, State::Waiting)
    }

    /// Whether a part failed in a way that nobody else can mend.
    pub(super) fn is_final(&self, part: usize) -> bool {
        matches!(self.failure(part), Some(Failure::Fault(fault)) if fault.kind.retry() == Retry::Never)
    }

    /// Workers came or went: who was alone may not be any more.
    pub(super) fn look_again(&mut self, version: u64) {
        if std::mem::replace(&mut self.version, version) != version {
            self.parts.iter_mut().for_each(|part| part.alone = false);
        }
    }

    /// Output rows that a part must bring.
    pub(super) fn answers(&self, part: usize) -> usize {
        answers(&self.parts[part].shard.plan, self.combine)
    }

    /// How it stands.
    pub(super) fn standing(&self) -> Standing {
        let mut complete = true;
        for part in 0..self.first {
            if !self.is_resolved(part) {
                complete = false;
                if let Some(lost) = self.lost(part) {
                    return Standing::Lost(lost);
                }
            }
        }
        if complete { Standing::Complete } else { Standing::Open }
    }

    /// Why a part failed, if it has.
    pub(super) fn failure(&self, part: usize) -> Option<&Failure> {
        match &self.parts[part].state {
            State::Failed(failure) => Some(failure),
            State::Waiting | State::Arrived(_) => None,
        }
    }

    fn is_resolved(&self, part: usize) -> bool {
        let Part { state, stand_ins, .. } = &self.parts[part];
        matches!(state, State::Arrived(_))
            || (!stand_ins.is_empty() && stand_ins.iter().all(|&other| self.is_resolved(other)))
    }

    /// The part on account of which `part` can no longer be resolved; `None` while it can.
    fn lost(&self, part: usize) -> Option<usize> {
        let Part { state, stand_ins, .. } = &self.parts[part];
        if !matches!(state, State::Failed(_)) {
            return None;
        }
        if stand_ins.is_empty() {
            return Some(part);
        }
        stand_ins.iter().find_map(|&other| self.lost(other))
    }

    /// Parts whose place others should take now: those that failed, and those that are late.
    pub(super) fn to_replace(&self, now: Instant) -> Vec<usize> {
        let is_due = |part: &usize| !self.is_waiting(*part) || now >= self.parts[*part].due;
        self.open().filter(is_due).collect()
    }

    /// When the next part becomes late whose place others could take.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.open().filter(|&part| self.is_waiting(part)).map(|part| self.parts[part].due).min()
    }

    /// Parts that are not there, that nobody stands in for, and that others might.
    fn open(&self) -> impl Iterator<Item = usize> {
        (0..self.parts.len()).filter(|&part| {
            let Part { state, stand_ins, alone, .. } = &self.parts[part];
            let is_there = matches!(state, State::Arrived(_));
            !is_there && stand_ins.is_empty() && !alone && !self.is_settled(part)
        })
    }

    /// Whether something that `part` stands in for is there without it.
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

    /// Plans stand-ins for a part, on workers that were not asked for its pairs yet and are not `unreachable`. `None`:
    /// there is nobody, and the part is left to itself.
    pub(super) fn plan_stand_ins(
        &mut self,
        part: usize,
        placement: &Placement,
        rank: &dyn Fn(WorkerIx) -> Rank,
        unreachable: &[WorkerId],
    ) -> Option<Vec<StandIn>> {
        let asked: Vec<&WorkerId> = self.asked(part).chain(unreachable).collect();
        let of_others = |worker: WorkerIx| {
            let known = placement.workers().get(worker.index());
            if known.is_none_or(|worker| asked.contains(&worker)) { Rank::Unusable } else { rank(worker) }
        };
        let planned = stand_ins(self.layer, &self.parts[part].shard.plan, placement, &of_others);
        self.parts[part].alone = planned.is_err();
        planned.ok()
    }

    /// Workers that were asked for the pairs of `part`.
    fn asked(&self, part: usize) -> impl Iterator<Item = &WorkerId> {
        let next = |&at: &usize| self.parts[at].of.as_ref().map(|(of, _)| *of);
        std::iter::successors(Some(part), next).map(|at| &self.parts[at].shard.worker)
    }

    /// The weights that a stand-in's outputs have, where workers add up.
    pub(super) fn weights_of(&self, part: usize, stand_in: &StandIn) -> Vec<f32> {
        match self.combine {
            Combine::Exact => Vec::new(),
            Combine::Partial => {
                let weights = &self.parts[part].shard.weights;
                stand_in.places.iter().map(|&place| weights[place as usize]).collect()
            }
        }
    }

    /// Takes note of stand-ins that were sent for `part`; the first of them is part number `parts().len()`.
    pub(super) fn replace(
        &mut self,
        part: usize,
        sent: Vec<(Shard, Vec<u32>)>,
        patience: impl Fn(&Shard) -> Duration,
    ) {
        let now = Instant::now();
        self.parts[part].hedged = self.is_waiting(part);
        for (shard, places) in sent {
            let number = self.parts.len();
            self.parts[part].stand_ins.push(number);
            let due = now + patience(&shard);
            self.parts.push(Part::new(shard, now, due, Some((part, places))));
        }
    }

    /// A part that is late is given more time, once.
    pub(super) fn defer(&mut self, part: usize, more: Duration) {
        let part = &mut self.parts[part];
        part.deferred = true;
        part.due += more;
    }

    /// Nobody else can be asked for what is in `part`.
    pub(super) fn leave_alone(&mut self, part: usize) {
        self.parts[part].alone = true;
    }

    /// What is to be combined once it is complete.
    pub(super) fn sum(&self) -> Sum<'_> {
        let mut sources = Vec::with_capacity(self.first);
        for part in 0..self.first {
            self.gather_sources(part, &mut sources);
        }
        match self.combine {
            Combine::Partial => {
                let (starts, terms) =
                    by_shard(self.rows, sources.iter().map(|&part| &self.parts[part].shard.plan));
                Sum { sources, starts: Cow::Owned(starts), terms: Cow::Owned(terms) }
            }
            Combine::Exact => {
                let mut terms = Cow::Borrowed(&self.terms[..]);
                // Unless something stood in, every source is where it was planned to be.
                if !sources.iter().copied().eq(0..self.first) {
                    self.redirect(&sources, terms.to_mut());
                }
                Sum { sources, starts: Cow::Borrowed(&self.starts), terms }
            }
        }
    }

    /// The expert of an output row of a part; of a row that several experts are added up in, the first.
    pub(super) fn expert_of(&self, part: usize, row: u32) -> ExpertId {
        let plan = &self.parts[part].shard.plan;
        let mut ends = plan.counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end)
        });
        let at = match self.combine {
            Combine::Exact => ends.position(|end| row < end).unwrap_or(0),
            Combine::Partial => 0,
        };
        plan.experts[at]
    }

    /// What arrived as part `part`.
    pub(super) fn arrived(&self, part: usize) -> Option<&Arrived> {
        match &self.parts[part].state {
            State::Arrived(arrived) => Some(arrived),
            State::Waiting | State::Failed(_) => None,
        }
    }

    fn gather_sources(&self, part: usize, sources: &mut Vec<usize>) {
        let Part { state, stand_ins, .. } = &self.parts[part];
        if matches!(state, State::Arrived(_)) {
            sources.push(part);
        } else {
            stand_ins.iter().for_each(|&other| self.gather_sources(other, sources));
        }
    }

    /// Points terms at the parts that really arrived.
    fn redirect(&self, sources: &[usize], terms: &mut [Term]) {
        // For each of the first parts: source and row of each of its places.
        let mut found: Vec<Vec<(u32, u32)>> =
            self.parts[..self.first].iter().map(|part| vec![(0, 0); part.shard.plan.indices.len()]).collect();
        for (source, &part) in (0..).zip(sources) {
            let mut places: Vec<u32> = (0..).take(self.parts[part].shard.plan.indices.len()).collect();
            let mut at = part;
            while let Some((of, there)) = &self.parts[at].of {
                places.iter_mut().for_each(|place| *place = there[*place as usize]);
                at = *of;
            }
            for (row, place) in (0..).zip(places) {
                found[at][place as usize] = (source, row);
            }
        }
        for term in terms {
            (term.source, term.row) = found[term.source as usize][term.row as usize];
        }
    }
}

impl Part {
    fn new(shard: Shard, since: Instant, due: Instant, of: Option<(usize, Vec<u32>)>) -> Self {
        Self {
            shard,
            since,
            due,
            state: State::Waiting,
            stand_ins: Vec::new(),
            alone: false,
            hedged: false,
            deferred: false,
            of,
        }
    }
}

impl Shard {
    /// The message that carries it.
    pub(super) fn request(&self, layer: LayerId, deadline_ms: u32) -> v1::LayerShard {
        v1::LayerShard {
            id: self.id,
            layer: layer.get(),
            epoch: self.hop.epoch.get(),
            deadline_ms,
            // Counted in 32 bits by the plan.
            rows: self.plan.rows.len() as u32,
            data: self.data.clone(),
            experts: self.plan.experts.iter().map(|expert| expert.get()).collect(),
            counts: self.plan.counts.clone(),
            indices: self.plan.indices.clone(),
            weights: self.weights.clone(),
        }
    }
}

/// Exact combine: every output is a term.
fn by_pair(choices: &Choices, slots: &[Slot]) -> (Vec<u32>, Vec<Term>) {
    let term = |(slot, &weight): (&Slot, &f32)| Term { source: slot.shard, row: slot.position, weight };
    let terms = slots.iter().zip(choices.weights()).map(term).collect();
    // Pairs are counted in 32 bits by the plan.
    let starts = (0..=choices.rows()).map(|row| (row * choices.k()) as u32).collect();
    (starts, terms)
}

/// Partial combine: every shard with the row gives one term, in the order of the shards.
fn by_shard<'a>(rows: usize, plans: impl Iterator<Item = &'a ShardPlan> + Clone) -> (Vec<u32>, Vec<Term>) {
    let terms = (0..).zip(plans).flat_map(|(source, plan)| {
        let term = move |(position, &row): (u32, &u32)| (row, Term { source, row: position, weight: 1.0 });
        (0..).zip(&plan.rows).map(term)
    });
    terms_by_row(rows, terms)
}

/// Output rows that a shard brings.
pub(super) fn answers(plan: &ShardPlan, combine: Combine) -> usize {
    match combine {
        Combine::Exact => plan.indices.len(),
        Combine::Partial => plan.rows.len(),
    }
}

/// The weights of each shard's outputs.
pub(super) fn weights(choices: &Choices, plans: &[ShardPlan], slots: &[Slot]) -> Vec<Vec<f32>> {
    let mut weights: Vec<Vec<f32>> = plans.iter().map(|plan| vec![0.0; plan.indices.len()]).collect();
    for (slot, &weight) in slots.iter().zip(choices.weights()) {
        weights[slot.shard as usize][slot.position as usize] = weight;
    }
    weights
}
