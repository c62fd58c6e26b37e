//! The placement leader: brings the workers' holdings to the target placement.
//!
//! Owns a leader's decisions: the requests for the lead, the workers that count, the time of plans, and the orders to each
//! worker. Every router has one; of those that share workers, one leads at a time ([`lease`](crate::lease)). Its only state is
//! its plan; the workers' announcements say the rest, so that another router can take over at any moment. Always holds:
//!
//! - a copy counts only as the ledger lets it, and orders go only to workers that answer and whose copies count;
//! - orders are repeated until they are known to be carried out;
//! - a plan is made once two looks in a row show the same workers, and anew when these change.
//!
//! Times count from any fixed origin of the caller's. Facts go in, a decision comes out, and its outcome goes in: the caller
//! asks, counts, plans and sends, one step after the other.

mod decision;
mod election;
mod evidence;
mod ledger;
mod reign;
mod request;
mod rhythm;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use muster_types::{Epoch, Numerics, WorkerId};

use crate::lease::Term;
use crate::{Binding, ExpertSizes, Goals, Loads, Member, Present, Shape, Target, Transition, transition};
pub use decision::{Decision, Order, OrderId, Step};
use election::Election;
pub use election::{Answer, Round};
use evidence::Evidence;
use ledger::{Ledger, Stamp};
use reign::{Reign, Told};
pub use request::{Cause, Plan, PlanRequest};
pub use rhythm::Rhythm;

/// A worker that is connected now.
#[derive(Debug, Clone, PartialEq)]
pub struct Connected {
    /// Its name.
    pub name: WorkerId,
    /// Changes whenever it is connected anew.
    pub session: u64,
    /// Of what it announces.
    pub epoch: Epoch,
    /// What it announces.
    pub member: Member,
}

/// A worker that takes orders.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// Of its connection.
    pub session: u64,
    /// What it announces, with the copies that count.
    pub member: Member,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Leader {
    shape: Shape,
    sizes: ExpertSizes,
    goals: Goals,
    rhythm: Rhythm,
    election: Election,
    evidence: Evidence,
    /// When loads were counted last.
    counted: Duration,
    /// What of the announcements counts.
    ledger: Ledger,
    /// By worker: the session that the ledger knows.
    sessions: BTreeMap<WorkerId, u64>,
    /// What the router's experts were bound to at the last look.
    binding: Arc<Binding>,
    /// Those of the last look.
    subjects: BTreeMap<WorkerId, Subject>,
    /// Plans asked for so far.
    plans: u64,
    /// What is worked towards, as long as this router leads.
    reign: Option<Reign>,
}

impl Subject {
    /// Whether it is as a plan took it to be: all but what it holds.
    fn is_like(&self, other: &Self) -> bool {
        let traits = |subject: &Self| {
            let Member { class, capacity, speed, domain: _, draining, held: _ } = subject.member;
            (subject.session, class, capacity, speed, draining)
        };
        traits(self) == traits(other) && self.member.domain == other.member.domain
    }
}

impl Leader {
    /// Of a router of this name, which no other process ever has.
    #[must_use]
    pub fn new(name: &str, shape: Shape, sizes: ExpertSizes, goals: Goals, rhythm: Rhythm) -> Self {
        Self {
            election: Election::new(name, &rhythm),
            evidence: Evidence::new(&shape),
            sizes,
            goals,
            rhythm,
            counted: Duration::ZERO,
            ledger: Ledger::default(),
            sessions: BTreeMap::new(),
            binding: Arc::new(Binding::new(Numerics::Exact, &shape)),
            subjects: BTreeMap::new(),
            plans: 0,
            reign: None,
            shape,
        }
    }

    // The lead.

    /// The term this router leads, if it does.
    #[must_use]
    pub fn leads(&self, now: Duration) -> Option<Term> {
        self.election.leads(now)
    }

    /// The term in which it gave orders last, until it is known to be over.
    #[must_use]
    pub fn reigns(&self) -> Option<Term> {
        self.reign.as_ref().map(|reign| reign.term)
    }

    /// What to ask of the workers of these sessions now, if anything; to be called once every tick. Answers to the round
    /// before count no more.
    pub fn tick(&mut self, now: Duration, sessions: &BTreeSet<u64>) -> Option<Round> {
        self.election.tick(now, sessions)
    }

    /// What to ask of them to give the lead up, so that another router has it at once; `None` when there is none.
    pub fn resign(&mut self, now: Duration, sessions: &BTreeSet<u64>) -> Option<Round> {
        self.election.resign(now, sessions)
    }

    /// Until when answers to the last round are waited for; `None` when they are no more.
    #[must_use]
    pub fn round_ends(&self) -> Option<Duration> {
        self.election.round_ends()
    }

    /// A worker's answer to a round, or that there will be none. The last one that is waited for ends it.
    pub fn answered(&mut self, session: u64, round: u64, answer: Option<Answer>) {
        self.election.answered(session, round, answer);
    }

    /// Ends the round with the answers that came.
    pub fn close_round(&mut self) {
        self.election.close();
    }

    // Its use.

    /// The workers that take orders, as of the last [`Self::step`].
    #[must_use]
    pub const fn subjects(&self) -> &BTreeMap<WorkerId, Subject> {
        &self.subjects
    }

    /// What is worked towards.
    #[must_use]
    pub fn target(&self) -> Option<&Target> {
        self.reign.as_ref()?.target.as_ref()
    }

    /// Rows that those who take orders counted last, by session.
    pub fn rows(&self) -> impl Iterator<Item = (u64, u64)> {
        self.subjects.values().map(|subject| (subject.session, self.evidence.rows_of(subject.session)))
    }

    /// Looks at the workers that are connected, and at what the router's experts are bound to, and says what to do.
    pub fn step(
        &mut self,
        now: Duration,
        workers: impl IntoIterator<Item = Connected>,
        binding: Arc<Binding>,
    ) -> Decision {
        self.binding = binding;
        let Some(term) = self.leads(now) else {
            self.reign = None;
            self.subjects.clear();
            return Decision::Wait;
        };
        let before = self.take_stock(now, term, workers);
        let is_new = self.reigns() != Some(term);
        let alike = |(name, subject): (&WorkerId, &Subject)| {
            before.get(name).is_some_and(|before| before.is_like(subject))
        };
        let changed = is_new || before.len() != self.subjects.len() || !self.subjects.iter().all(alike);
        let reign = match &mut self.reign {
            Some(reign) if !is_new => reign,
            reign => reign.insert(Reign::new(term)),
        };
        reign.is_stale |= changed;
        let is_first = reign.target.is_none();
        if is_first && changed {
            // Workers come one by one to a new leader: none is to load what the next one holds.
            return Decision::Wait;
        }
        // The first count is what later ones are compared with.
        if is_first || now.saturating_sub(self.counted) >= self.rhythm.rebalance {
            return Decision::Count;
        }
        self.decide(now, false)
    }

    /// Rows that workers counted since they started, by session, layer and expert; none of those that do not answer.
    pub fn counted(&mut self, now: Duration, rows: BTreeMap<u64, Vec<Vec<u64>>>) -> Decision {
        self.evidence.observe(now.saturating_sub(self.counted), rows);
        self.counted = now;
        self.decide(now, true)
    }

    /// A plan is made. It counts if it is the one that was asked for last; the lease may have run out meanwhile, since
    /// workers obey until another router leads.
    pub fn planned(&mut self, now: Duration, plan: Plan) -> Decision {
        let Some(reign) = self.reign.as_mut().filter(|reign| reign.making == Some(plan.number)) else {
            return Decision::Wait;
        };
        (reign.target, reign.planned, reign.making) = (Some(plan.target), now, None);
        reign.is_stale = false;
        let transition = self.transition();
        self.order(now, transition)
    }

    /// A worker carried out its orders, which its holdings of `epoch` show.
    pub fn obeyed(&mut self, now: Duration, id: &OrderId, epoch: Epoch) {
        // Epochs of another life say nothing.
        if self.sessions.get(&id.worker) != Some(&id.session) {
            return;
        }
        self.ledger.obeyed(&id.worker, id.term, id.number, epoch);
        if let Some(told) = self.reign.as_mut().and_then(|reign| reign.told(id)) {
            (told.at, told.has_answered) = (now, true);
        }
    }

    /// A worker did not take its orders, for all that is known.
    pub fn failed(&mut self, id: &OrderId) {
        if let Some(reign) = &mut self.reign
            && reign.told(id).is_some()
        {
            reign.told.remove(&id.worker);
        }
    }

    /// Takes in who answers and may be given orders, and what of their announcements counts. Gives those of before.
    fn take_stock(
        &mut self,
        now: Duration,
        term: Term,
        workers: impl IntoIterator<Item = Connected>,
    ) -> BTreeMap<WorkerId, Subject> {
        let workers = workers.into_iter().filter(|worker| self.election.answers(now, worker.session));
        let workers: Vec<Connected> = workers.collect();
        self.ledger.lead(term);
        let sessions: BTreeMap<WorkerId, u64> =
            workers.iter().map(|worker| (worker.name.clone(), worker.session)).collect();
        for (worker, session) in &self.sessions {
            if sessions.get(worker) != Some(session) {
                self.ledger.lost(worker);
            }
        }
        self.sessions = sessions;
        let mut subjects = BTreeMap::new();
        for Connected { name, session, epoch, mut member } in workers {
            if let Some((term, epoch)) = self.election.grant(session) {
                self.ledger.granted(&name, term, epoch);
            }
            self.ledger.announced(&name, epoch, &member.held);
            if let Some(held) = self.ledger.held(&name) {
                member.held = held;
                subjects.insert(name, Subject { session, member });
            }
        }
        std::mem::replace(&mut self.subjects, subjects)
    }

    fn decide(&mut self, now: Duration, has_counted: bool) -> Decision {
        let transition = self.transition();
        let Some(reign) = &self.reign else { return Decision::Wait };
        let is_settled = reign.target.as_ref().is_some_and(|target| transition.is_settled(&target.hold));
        let is_aged = now.saturating_sub(reign.planned) > self.rhythm.plan_age;
        if reign.target.is_none() {
            self.request(Cause::First)
        } else if reign.is_stale {
            self.request(Cause::Members)
        } else if is_aged && !is_settled {
            self.request(Cause::Age)
        } else if has_counted && is_settled && self.evidence.is_enough() {
            self.request(Cause::Loads)
        } else {
            self.order(now, transition)
        }
    }

    fn request(&mut self, cause: Cause) -> Decision {
        self.plans += 1;
        if let Some(reign) = &mut self.reign {
            reign.making = Some(self.plans);
        }
        // Few counts say little; then experts are taken to be asked alike.
        let loads = match self.evidence.is_enough() {
            true => self.evidence.loads().clone(),
            false => Loads::new(&self.shape),
        };
        let member = |(name, subject): (&WorkerId, &Subject)| (name.clone(), subject.member.clone());
        Decision::Plan(PlanRequest {
            number: self.plans,
            cause,
            shape: self.shape.clone(),
            sizes: self.sizes.clone(),
            goals: self.goals,
            loads,
            members: self.subjects.iter().map(member).collect(),
            binding: Arc::clone(&self.binding),
        })
    }

    fn transition(&self) -> Transition {
        let present = |(name, subject): (&WorkerId, &Subject)| {
            let Member { class, capacity, ref held, .. } = subject.member;
            (name.clone(), Present { class, capacity, held: held.clone() })
        };
        let present = self.subjects.iter().map(present).collect();
        let nothing = BTreeMap::new();
        let hold = self.target().map_or(&nothing, |target| &target.hold);
        let (loads, replicas) = (self.evidence.loads(), self.goals.min_replicas);
        transition(&self.sizes, &present, hold, loads, replicas, &self.binding)
    }

    /// Each worker is told what it does not know yet.
    fn order(&mut self, now: Duration, transition: Transition) -> Decision {
        let mut send = Vec::new();
        let Some(reign) = &mut self.reign else { return Decision::Wait };
        for (worker, &Subject { session, .. }) in &self.subjects {
            let Some(orders) = transition.orders.get(worker) else { continue };
            if reign.is_told(now, self.rhythm.repeat, (worker, session), orders) {
                continue;
            }
            let Stamp { number, seen } = self.ledger.order(worker, orders);
            reign.told.insert(
                worker.clone(),
                Told { session, number, hold: orders.hold(), at: now, has_answered: false },
            );
            let id = OrderId { worker: worker.clone(), session, term: reign.term, number };
            send.push(Order { id, seen, orders: orders.clone() });
        }
        Decision::Order(Step { transition, send })
    }
}
