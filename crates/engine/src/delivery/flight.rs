//! A micro-batch between `submit` and `collect`: its shards, and the state of every (row, expert) pair.
//!
//! A micro-batch leaves in *parts*, one shard each. When a part fails, is late, or marks outputs that are not finite, the pairs
//! it owes are sent to other owners as further parts, its *stand-ins*; stand-ins can fail in turn. What always holds: one part
//! is responsible for a pair at a time; every pair is taken from exactly one part, or its row is lost; no worker is asked
//! twice for the same pair; what one worker says that others could contradict is final only when a second one agrees or nobody
//! else can be asked. Workers of different numerics classes do not contradict each other: what overflows in one need not in another. It does not know how parts are sent, nor how long they may take.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use muster_placement::WorkerIx;
use muster_types::{
    ClassSet, Combine, Epoch, ExpertId, Fault, FaultKind, LayerId, NumericsClass, Retry, Term, WorkerId,
    terms_by_row,
};

use super::conduct::Workers;
use super::transport::{Arrived, Hop, Outgoing, Outputs, Unsent};
use crate::batcher::{Rank, ShardPlan, Slot, StandIn, StandIns, stand_ins};
use crate::dispatch::{Choices, DispatchError, LayerBatch, Loss};

/// See the module.
pub(super) struct Flight<L, O> {
    pub(super) layer: LayerId,
    pub(super) lane: usize,
    pub(super) rows: usize,
    combine: Combine,
    /// Experts of a row.
    k: usize,
    /// Expert and weight of every pair, row by row.
    experts: Vec<ExpertId>,
    weights: Vec<f32>,
    pairs: Vec<Pair>,
    /// Number of open pairs.
    open: usize,
    parts: Vec<Part<L, O>>,
    claims: Vec<Claim>,
    /// Parts whose worker made a claim that another worker contradicted.
    contradicted: Vec<usize>,
    /// Rows that have no sum.
    lost: BTreeMap<u32, DispatchError>,
    /// Version of the fleet at the last search for stand-ins.
    pub(super) version: u64,
    pub(super) submitted: Instant,
    pub(super) sent: Instant,
    /// When waiting for it began.
    begun: Option<Instant>,
    /// Any answer ends the wait, not only the last.
    is_eager: bool,
}

/// A (row, expert) pair.
struct Pair {
    /// The part that is responsible for it.
    part: usize,
    state: PairState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PairState {
    Open,
    /// It is in that output row of that part.
    Answered {
        part: usize,
        row: u32,
    },
    /// Its row is lost.
    Lost,
}

/// A worker's claim that no worker can compute a pair.
struct Claim {
    pair: usize,
    part: usize,
    error: DispatchError,
}

impl Failure {
    /// Short name, for the observer.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Fault(fault) => fault.kind.name(),
            Self::Lost(_) | Self::Unsent(_) => "lost",
            Self::Lied(_) => "bad",
        }
    }
}

/// A shard to be sent.
pub(super) struct Shard<L> {
    pub(super) id: u64,
    pub(super) hop: Hop,
    pub(super) epoch: Epoch,
    pub(super) worker: WorkerId,
    /// Of the worker's device.
    pub(super) class: NumericsClass,
    pub(super) plan: ShardPlan,
    /// The hidden rows.
    pub(super) load: L,
    /// Weights of the outputs, if the worker combines them.
    pub(super) weights: Vec<f32>,
}

/// A shard that was sent.
pub(super) struct Part<L, O> {
    pub(super) shard: Shard<L>,
    /// Start of the wait for it.
    pub(super) since: Instant,
    /// When it is late.
    due: Instant,
    state: State<O>,
    /// The pair of each of its outputs.
    pairs: Vec<usize>,
    /// Open pairs that it is responsible for.
    owes: usize,
    /// The pairs that it owes have no other owner.
    alone: bool,
    /// It was late, and its pairs were hedged.
    pub(super) hedged: bool,
    /// It was late without hedge budget, and got an extension.
    pub(super) deferred: bool,
    /// The part that it stands in for, and the original part at the root of that chain.
    of: Option<usize>,
    first: usize,
}

enum State<O> {
    Waiting,
    Arrived(Arrived<O>),
    Failed(Failure),
}

/// Why a shard failed.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// The worker answered with a fault.
    Fault(Fault),
    /// Its hop was lost.
    Lost(String),
    /// It broke the protocol.
    Lied(String),
    /// It was never sent.
    Unsent(Unsent),
}

/// The sums of a flight's rows.
pub(super) struct Sum {
    /// Numbers of the parts that are the sources.
    pub(super) sources: Vec<usize>,
    /// Start of each row's terms. Lost rows have none.
    pub(super) starts: Vec<u32>,
    pub(super) terms: Vec<Term>,
}

impl<L, O: Outputs> Flight<L, O> {
    /// A micro-batch in these shards; `slots` has the position of each output.
    pub(super) fn new(
        batch: &LayerBatch<'_>,
        slots: &[Slot],
        combine: Combine,
        shards: Vec<Shard<L>>,
        version: u64,
        submitted: Instant,
        sent: Instant,
    ) -> Self {
        let LayerBatch { layer, lane, choices, .. } = *batch;
        let outputs = |shard: &Shard<L>| vec![0; shard.plan.indices.len()];
        let mut pairs_of: Vec<Vec<usize>> = shards.iter().map(outputs).collect();
        for (pair, slot) in slots.iter().enumerate() {
            pairs_of[slot.shard as usize][slot.position as usize] = pair;
        }
        let pair = |slot: &Slot| Pair { part: slot.shard as usize, state: PairState::Open };
        let parts = shards.into_iter().zip(pairs_of).enumerate();
        Self {
            layer,
            lane,
            rows: choices.rows(),
            combine,
            k: choices.k(),
            experts: choices.experts().to_vec(),
            weights: choices.weights().to_vec(),
            pairs: slots.iter().map(pair).collect(),
            open: slots.len(),
            parts: parts
                .map(|(number, (shard, pairs))| Part::new(shard, pairs, sent, sent, None, number))
                .collect(),
            claims: Vec::new(),
            contradicted: Vec::new(),
            lost: BTreeMap::new(),
            version,
            submitted,
            sent,
            begun: None,
            is_eager: false,
        }
    }

    /// Starts the wait for it, unless it has started: before, the network may not have been driven.
    pub(super) fn begin(&mut self, now: Instant, patience: impl Fn(&Shard<L>) -> Duration) {
        if self.begun.is_none() {
            self.begun = Some(now);
            for part in &mut self.parts {
                (part.since, part.due) = (now, now + patience(&part.shard));
            }
        }
    }

    /// Time between sending it and waiting for it.
    pub(super) fn away(&self) -> Duration {
        self.begun.map_or(Duration::ZERO, |begun| begun.saturating_duration_since(self.sent))
    }

    /// Waiting time of a part that arrived at `at`: zero if it arrived before the wait began.
    pub(super) fn waited(&self, part: usize, at: Instant) -> Duration {
        self.begun.map_or(Duration::ZERO, |_| at.saturating_duration_since(self.parts[part].since))
    }

    /// Answers that end the wait: all, or any one after a failed or late part.
    pub(super) fn wanted(&self) -> usize {
        let waiting = self.parts.iter().filter(|part| matches!(part.state, State::Waiting)).count();
        if self.is_eager { 1 } else { waiting }
    }

    pub(super) fn parts(&self) -> &[Part<L, O>] {
        &self.parts
    }

    /// Ids of all its shards, stand-ins included.
    pub(super) fn ids(&self) -> impl Iterator<Item = u64> {
        self.parts.iter().map(|part| part.shard.id)
    }

    /// Whether every pair is answered or lost.
    pub(super) const fn is_complete(&self) -> bool {
        self.open == 0
    }

    /// Takes the outputs of a part, whose number was checked.
    pub(super) fn arrive(&mut self, part: usize, arrived: Arrived<O>) {
        self.parts[part].state = State::Arrived(arrived);
        self.absorb(part);
    }

    /// Settles open pairs with a part's outputs, and its marks as claims.
    fn absorb(&mut self, number: usize) {
        let part = &mut self.parts[number];
        let State::Arrived(arrived) = &part.state else { return };
        let marked = arrived.outputs.marks().to_vec();
        let pairs = std::mem::take(&mut part.pairs);
        match self.combine {
            Combine::Exact => {
                for (row, pair) in (0..).zip(&pairs) {
                    self.settle(number, row, &[*pair], &marked);
                }
            }
            Combine::Partial => {
                for (row, pairs) in (0..).zip(by_row(&self.parts[number].shard.plan, &pairs)) {
                    self.settle(number, row, &pairs, &marked);
                }
            }
        }
        self.parts[number].pairs = pairs;
    }

    /// Settles these pairs with one output row.
    fn settle(&mut self, part: usize, row: u32, pairs: &[usize], marked: &[u32]) {
        if marked.binary_search(&row).is_ok() {
            for &pair in pairs {
                let error = DispatchError::NonFinite { layer: self.layer, expert: self.experts[pair] };
                self.claim(Claim { pair, part, error });
            }
        } else if pairs.iter().all(|&pair| self.pairs[pair].state == PairState::Open) {
            for &pair in pairs {
                self.close(pair, PairState::Answered { part, row });
            }
        }
    }

    /// Closes a pair in its final state.
    fn close(&mut self, pair: usize, state: PairState) {
        let Pair { part, state: before } = &mut self.pairs[pair];
        if std::mem::replace(before, state) == PairState::Open {
            self.open -= 1;
            self.parts[*part].owes -= 1;
        }
        if let PairState::Answered { part, .. } = state {
            let class = self.parts[part].shard.class;
            let is_alike = |claim: &&Claim| self.parts[claim.part].shard.class == class;
            let others = self.claims.iter().filter(|claim| claim.pair == pair && claim.part != part);
            let others = others.filter(is_alike);
            self.contradicted.extend(others.map(|claim| claim.part));
        }
    }

    /// Records a claim. It is final when another worker made the same.
    fn claim(&mut self, claim: Claim) {
        match self.pairs[claim.pair].state {
            PairState::Answered { part, .. } if part != claim.part => {
                let class = |part: usize| self.parts[part].shard.class;
                if class(part) == class(claim.part) {
                    self.contradicted.push(claim.part);
                }
            }
            PairState::Open => {
                let worker = |part: usize| &self.parts[part].shard.worker;
                let known = self.claims.iter().find(|known| known.pair == claim.pair);
                match known.map(|known| worker(known.part) != worker(claim.part)) {
                    Some(true) => self.lose(self.row_of(claim.pair), claim.error),
                    Some(false) => {}
                    None => self.claims.push(claim),
                }
            }
            PairState::Answered { .. } | PairState::Lost => {}
        }
    }

    /// Parts with a claim that was contradicted since the last call.
    pub(super) fn take_contradicted(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.contradicted)
    }

    /// Fails a part.
    pub(super) fn fail(&mut self, number: usize, failure: Failure) {
        (self.is_eager, self.parts[number].alone) = (true, false);
        if let Failure::Fault(fault) = &failure
            && fault.kind.retry() == Retry::Never
        {
            let (named, error) = self.accusation(number, fault);
            let part = &self.parts[number];
            let plan = &part.shard.plan;
            let of = plan.experts.iter().zip(&plan.counts);
            let of = of.flat_map(|(expert, &count)| std::iter::repeat_n(*expert, count as usize));
            let accused =
                part.pairs.iter().zip(of).filter(|(_, expert)| named.is_none_or(|named| named == *expert));
            let accused: Vec<usize> = accused.map(|(&pair, _)| pair).collect();
            for pair in accused {
                self.claim(Claim { pair, part: number, error: error.clone() });
            }
        }
        self.parts[number].state = State::Failed(failure);
    }

    /// The expert that a fault blames, and the error.
    fn accusation(&self, part: usize, fault: &Fault) -> (Option<ExpertId>, DispatchError) {
        let Shard { worker, plan, .. } = &self.parts[part].shard;
        let named = plan.experts.iter().copied().find(|known| Some(known.get()) == fault.expert);
        let error = match (fault.kind, named) {
            (FaultKind::NonFinite, Some(expert)) => DispatchError::NonFinite { layer: self.layer, expert },
            _ => {
                let (worker, reason) = (worker.clone(), fault.message.clone());
                DispatchError::Refused { worker, reason, retry: fault.kind.retry() }
            }
        };
        (named, error)
    }

    /// Discards the outputs of a part that lied, and the claims of its worker.
    pub(super) fn disown(&mut self, number: usize, reason: String) {
        self.parts[number].state = State::Failed(Failure::Lied(reason));
        self.claims.retain(|claim| claim.part != number);
        for pair in 0..self.pairs.len() {
            if matches!(self.pairs[pair].state, PairState::Answered { part, .. } if part == number) {
                let is_lost = self.lost.contains_key(&self.row_of(pair));
                let Pair { part, state } = &mut self.pairs[pair];
                *state = if is_lost { PairState::Lost } else { PairState::Open };
                if !is_lost {
                    self.open += 1;
                    self.parts[*part].owes += 1;
                }
            }
        }
        // A stand-in for it may have answered already.
        (0..self.parts.len()).for_each(|other| self.absorb(other));
    }

    fn row_of(&self, pair: usize) -> u32 {
        // Pairs are counted in 32 bits by the plan.
        (pair / self.k) as u32
    }

    /// Loses a row: its other pairs are no longer waited for.
    pub(super) fn lose(&mut self, row: u32, error: DispatchError) {
        let pairs = row as usize * self.k..(row as usize + 1) * self.k;
        for pair in pairs {
            if self.pairs[pair].state == PairState::Open {
                self.close(pair, PairState::Lost);
            }
        }
        self.lost.entry(row).or_insert(error);
    }

    /// Loses every row with an open pair.
    pub(super) fn expire(&mut self) {
        for pair in 0..self.pairs.len() {
            if self.pairs[pair].state == PairState::Open {
                self.lose(self.row_of(pair), DispatchError::Deadline { layer: self.layer });
            }
        }
    }

    /// Whether every row is lost.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.len() == self.rows
    }

    /// The lost rows, by reason.
    pub(super) fn losses(&self) -> Vec<Loss> {
        let mut losses: Vec<Loss> = Vec::new();
        for (&row, error) in &self.lost {
            match losses.iter_mut().find(|loss| loss.error == *error) {
                Some(loss) => loss.rows.push(row),
                None => losses.push(Loss { rows: vec![row], error: error.clone() }),
            }
        }
        losses
    }

    /// Whether a part is unanswered.
    pub(super) fn is_waiting(&self, part: usize) -> bool {
        matches!(self.parts[part].state, State::Waiting)
    }

    /// Clears the no-other-owner flags after a change of the fleet.
    pub(super) fn look_again(&mut self, version: u64) {
        if std::mem::replace(&mut self.version, version) != version {
            self.parts.iter_mut().for_each(|part| part.alone = false);
        }
    }

    /// Output rows of a part's answer.
    pub(super) fn answers(&self, part: usize) -> usize {
        self.parts[part].shard.plan.answers(self.combine)
    }

    /// Parts that need stand-ins now: answered or failed ones that still owe pairs, and late ones.
    pub(super) fn to_replace(&self, now: Instant) -> Vec<usize> {
        let is_due = |part: &usize| !self.is_waiting(*part) || now >= self.parts[*part].due;
        self.owing().filter(is_due).collect()
    }

    /// When the next part becomes late whose pairs may have other owners.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.owing().filter(|&part| self.is_waiting(part)).map(|part| self.parts[part].due).min()
    }

    fn owing(&self) -> impl Iterator<Item = usize> {
        (0..self.parts.len()).filter(|&part| self.parts[part].owes > 0 && !self.parts[part].alone)
    }

    /// Plans stand-ins for the pairs that a part owes, on workers that were not asked for them yet. Pairs without another owner
    /// stay with the part while it may still answer, and are lost otherwise.
    pub(super) fn plan_stand_ins(&mut self, number: usize, workers: &Workers) -> Vec<StandIn> {
        let part = &self.parts[number];
        let plan = &part.shard.plan;
        let asked: Vec<&WorkerId> = self.asked(number).collect();
        let of_others = |worker: WorkerIx| {
            let known = workers.placement().workers().get(worker.index());
            let is_new = known.is_some_and(|worker| !asked.contains(&worker));
            if is_new { workers.rank(worker) } else { Rank::Unusable }
        };
        let owed = |&(_, &pair): &(u32, &usize)| {
            let Pair { part, state } = &self.pairs[pair];
            *part == number && *state == PairState::Open
        };
        let owed: Vec<u32> = (0..).zip(&part.pairs).filter(owed).map(|(place, _)| place).collect();
        let StandIns { mut plans, orphans } =
            stand_ins(self.layer, plan, &owed, workers.placement(), &of_others);
        if orphans.is_empty() {
            return plans;
        }
        if self.is_waiting(number) {
            if self.combine == Combine::Partial {
                // A row's sum on one worker is of all its pairs there, or of none.
                let kept: Vec<u32> = orphans.iter().map(|&place| plan.indices[place as usize]).collect();
                let whole = |place: &u32| !kept.contains(&plan.indices[*place as usize]);
                let owed: Vec<u32> = owed.into_iter().filter(whole).collect();
                plans = stand_ins(self.layer, plan, &owed, workers.placement(), &of_others).plans;
            }
            self.parts[number].alone = true;
            return plans;
        }
        let orphans: Vec<usize> = orphans.iter().map(|&place| part.pairs[place as usize]).collect();
        // A claim about a row outranks a missing output in it.
        let is_claimed = |pair: usize| self.claims.iter().any(|claim| claim.pair == pair);
        let (claimed, missing): (Vec<usize>, Vec<usize>) =
            orphans.into_iter().partition(|&pair| is_claimed(pair));
        for pair in claimed.into_iter().chain(missing) {
            self.lose(self.row_of(pair), self.reason(number, pair));
        }
        // Rows lost just now are not planned; the next round plans the rest.
        if plans.iter().any(|plan| plan.places.iter().any(|&place| !self.is_open(number, place))) {
            return self.plan_stand_ins(number, workers);
        }
        plans
    }

    /// Whether a part is late and owes pairs without another owner.
    pub(super) fn needs(&self, part: usize) -> bool {
        let Part { alone, owes, .. } = &self.parts[part];
        *alone && *owes > 0 && self.is_waiting(part)
    }

    fn is_open(&self, part: usize, place: u32) -> bool {
        self.pairs[self.parts[part].pairs[place as usize]].state == PairState::Open
    }

    /// Error of a pair that its part cannot answer and that has no other owner.
    fn reason(&self, number: usize, pair: usize) -> DispatchError {
        let (layer, worker) = (self.layer, self.parts[number].shard.worker.clone());
        let failure = match &self.parts[number].state {
            State::Failed(failure) => Some(failure),
            State::Waiting | State::Arrived(_) => None,
        };
        // The worker that was not reached could have contradicted any claim.
        if let Some(Failure::Unsent(unsent)) = failure {
            return unsent.error(worker);
        }
        if let Some(claim) = self.claims.iter().find(|claim| claim.pair == pair) {
            return claim.error.clone();
        }
        match failure {
            None => DispatchError::Invalid(format!("part {number} owes nothing that is lost")),
            Some(Failure::Unsent(unsent)) => unsent.error(worker),
            Some(Failure::Lost(reason)) => DispatchError::WorkerLost { worker, reason: reason.clone() },
            Some(Failure::Lied(reason)) => DispatchError::BadReply { worker, reason: reason.clone() },
            Some(Failure::Fault(Fault { kind: FaultKind::Deadline, .. })) => {
                DispatchError::Deadline { layer }
            }
            Some(Failure::Fault(Fault { kind, message, .. })) => {
                // The fault is final only for the pairs that it names.
                let retry = if kind.retry() == Retry::Never { Retry::Later } else { kind.retry() };
                DispatchError::Refused { worker, reason: message.clone(), retry }
            }
        }
    }

    /// Workers that were asked for the pairs of `part`.
    fn asked(&self, part: usize) -> impl Iterator<Item = &WorkerId> {
        std::iter::successors(Some(part), |&at| self.parts[at].of).map(|at| &self.parts[at].shard.worker)
    }

    /// Weights of a stand-in's outputs, if workers combine.
    pub(super) fn weights_of(&self, part: usize, stand_in: &StandIn) -> Vec<f32> {
        match self.combine {
            Combine::Exact => Vec::new(),
            Combine::Partial => {
                let weights = &self.parts[part].shard.weights;
                stand_in.places.iter().map(|&place| weights[place as usize]).collect()
            }
        }
    }

    /// Hands the pairs of `part` to its stand-ins; the first of them becomes part number `parts().len()`.
    pub(super) fn replace(
        &mut self,
        part: usize,
        sent: Vec<(Shard<L>, Vec<u32>)>,
        now: Instant,
        patience: impl Fn(&Shard<L>) -> Duration,
    ) {
        self.parts[part].hedged = self.is_waiting(part);
        for (shard, places) in sent {
            let number = self.parts.len();
            let pairs: Vec<usize> =
                places.iter().map(|&place| self.parts[part].pairs[place as usize]).collect();
            for &pair in &pairs {
                self.pairs[pair].part = number;
            }
            self.parts[part].owes -= pairs.len();
            let due = now + patience(&shard);
            let first = self.parts[part].first;
            self.parts.push(Part::new(shard, pairs, now, due, Some(part), first));
        }
    }

    /// Records that a part is late.
    pub(super) const fn is_late(&mut self) {
        self.is_eager = true;
    }

    /// Extends the time of a late part, once.
    pub(super) fn defer(&mut self, part: usize, more: Duration) {
        let part = &mut self.parts[part];
        part.deferred = true;
        part.due += more;
    }

    /// The sums to combine once it is complete.
    pub(super) fn sum(&self) -> Sum {
        let mut sources: Vec<usize> =
            (0..self.parts.len()).filter(|&part| self.arrived(part).is_some()).collect();
        // A stand-in takes the position of its original part.
        sources.sort_by_key(|&part| (self.parts[part].first, part));
        let (starts, terms) = match self.combine {
            Combine::Exact => self.by_pair(&sources),
            Combine::Partial => self.by_part(&sources),
        };
        Sum { sources, starts, terms }
    }

    /// Exact combine: every output is a term.
    fn by_pair(&self, sources: &[usize]) -> (Vec<u32>, Vec<Term>) {
        let mut source_of = vec![0; self.parts.len()];
        for (source, &part) in (0..).zip(sources) {
            source_of[part] = source;
        }
        let (mut starts, mut terms) =
            (Vec::with_capacity(self.rows + 1), Vec::with_capacity(self.pairs.len()));
        starts.push(0);
        for (row, pairs) in (0..).zip(self.pairs.chunks_exact(self.k)) {
            if self.lost.is_empty() || !self.lost.contains_key(&row) {
                let weights = &self.weights[row as usize * self.k..];
                for (pair, &weight) in pairs.iter().zip(weights) {
                    let PairState::Answered { part, row } = pair.state else { continue };
                    terms.push(Term { source: source_of[part], row, weight });
                }
            }
            // Pairs are counted in 32 bits by the plan.
            starts.push(terms.len() as u32);
        }
        (starts, terms)
    }

    /// Partial combine: every part with the row gives one term, in the order of the parts.
    fn by_part(&self, sources: &[usize]) -> (Vec<u32>, Vec<Term>) {
        let mut terms: Vec<(u32, Term)> = Vec::new();
        for (source, &part) in (0..).zip(sources) {
            let Part { shard, pairs, .. } = &self.parts[part];
            for (position, pairs) in (0..).zip(by_row(&shard.plan, pairs)) {
                let taken = PairState::Answered { part, row: position };
                let row = shard.plan.rows[position as usize];
                if pairs.first().is_some_and(|&pair| self.pairs[pair].state == taken)
                    && !self.lost.contains_key(&row)
                {
                    terms.push((row, Term { source, row: position, weight: 1.0 }));
                }
            }
        }
        terms_by_row(self.rows, terms.into_iter())
    }

    /// Numerics classes of the workers that answered.
    pub(super) fn classes(&self) -> ClassSet {
        let arrived = self.parts.iter().filter(|part| matches!(part.state, State::Arrived(_)));
        arrived.map(|part| part.shard.class).collect()
    }

    /// What arrived as part `part`.
    pub(super) fn arrived(&self, part: usize) -> Option<&Arrived<O>> {
        match &self.parts[part].state {
            State::Arrived(arrived) => Some(arrived),
            State::Waiting | State::Failed(_) => None,
        }
    }
}

impl<L, O> Part<L, O> {
    fn new(
        shard: Shard<L>,
        pairs: Vec<usize>,
        since: Instant,
        due: Instant,
        of: Option<usize>,
        first: usize,
    ) -> Self {
        let owes = pairs.len();
        let (state, alone, hedged, deferred) = (State::Waiting, false, false, false);
        Self { shard, since, due, state, pairs, owes, alone, hedged, deferred, of, first }
    }
}

impl<L> Shard<L> {
    /// The shard in the transport's form.
    pub(super) fn outgoing(&self, layer: LayerId) -> Outgoing<'_, L> {
        let Self { id, epoch, plan, load, weights, .. } = self;
        Outgoing { id: *id, layer, epoch: *epoch, plan, load, weights }
    }
}

impl Unsent {
    fn error(self, worker: WorkerId) -> DispatchError {
        match self {
            Self::Broken => {
                DispatchError::WorkerLost { worker, reason: "its link broke before rows were sent".into() }
            }
            Self::Full => {
                let reason = "its send queue is full".into();
                DispatchError::Refused { worker, reason, retry: Retry::Later }
            }
        }
    }
}

/// The pairs of each row of a plan, given the pair of each output.
fn by_row(plan: &ShardPlan, pairs: &[usize]) -> Vec<Vec<usize>> {
    let mut rows = vec![Vec::new(); plan.rows.len()];
    for (&index, &pair) in plan.indices.iter().zip(pairs) {
        rows[index as usize].push(pair);
    }
    rows
}

/// The weights of each shard's outputs.
pub(super) fn weights(choices: &Choices, plans: &[ShardPlan], slots: &[Slot]) -> Vec<Vec<f32>> {
    let mut weights: Vec<Vec<f32>> = plans.iter().map(|plan| vec![0.0; plan.indices.len()]).collect();
    for (slot, &weight) in slots.iter().zip(choices.weights()) {
        weights[slot.shard as usize][slot.position as usize] = weight;
    }
    weights
}
