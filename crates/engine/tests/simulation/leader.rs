//! The control plane in a router: the campaign for the lease, and orders by plan and transition while it leads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use muster_placement::lease::{Campaign, Reply, Rhythm, Term, Verdict};
use muster_placement::{Goals, Holdings, Ledger, Member, Orders, Present, plan, transition};
use muster_types::{Epoch, ExpertKey};

use crate::world::{Event, MS, Order, Relied, RouterTimer, SECOND, Spec, Time, ToWorker, World};

/// Answers to an ask are counted after this long.
const ROUND: Time = 100 * MS;
/// How often the target is looked at again although nobody came or went.
const REBALANCE: Time = 2 * SECOND;

/// Workers, with session and whether they drain.
type Membership = BTreeMap<usize, (u64, bool)>;

#[derive(Debug)]
pub(crate) struct Leader {
    campaign: Campaign,
    pub(crate) ledger: Ledger,
    round: Round,
    membership: Membership,
    target: Option<Target>,
    /// Copies that were ordered away: whose else were counted on.
    relied: BTreeMap<(usize, ExpertKey), Relied>,
}

#[derive(Debug, Default)]
struct Round {
    number: u64,
    sent: Time,
    known: usize,
    replies: BTreeMap<usize, Reply>,
}

#[derive(Debug)]
struct Target {
    of: Membership,
    hold: Holdings,
    made: Time,
}

impl Leader {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            campaign: Campaign::new(name, Rhythm::default()),
            ledger: Ledger::default(),
            round: Round::default(),
            membership: Membership::new(),
            target: None,
            relied: BTreeMap::new(),
        }
    }

    pub(crate) fn leads(&self, now: Time) -> Option<Term> {
        self.campaign.leads(Duration::from_micros(now))
    }
}

impl World {
    pub(crate) fn tick(&mut self, number: usize) {
        let life = self.routers[number].process.life;
        let event = Event::RouterTimer { router: number, life, timer: RouterTimer::Tick };
        self.after(Rhythm::default().tick.as_micros() as Time, event);
        let now = Duration::from_micros(self.now);
        let router = &mut self.routers[number];
        router.loads.decay_over(Rhythm::default().tick, Duration::from_secs(2));
        if let Some(ask) = router.leader.campaign.tick(now) {
            let round = router.leader.round.number + 1;
            let up = router.peers.iter().enumerate().filter(|(_, peer)| peer.up);
            let up: Vec<_> = up.map(|(worker, peer)| (worker, peer.session)).collect();
            router.leader.round =
                Round { number: round, sent: self.now, known: up.len(), replies: BTreeMap::new() };
            for (worker, session) in up {
                self.send_to_worker(number, worker, session, ToWorker::Ask { round, ask });
            }
            let count = RouterTimer::Count { round };
            self.after(ROUND, Event::RouterTimer { router: number, life, timer: count });
        }
        if let Some(term) = self.routers[number].leader.leads(self.now) {
            self.lead(number, term);
        }
    }

    pub(crate) fn take_grant(&mut self, number: usize, worker: usize, round: u64, reply: Reply, epoch: u64) {
        let id = self.id(worker);
        let leader = &mut self.routers[number].leader;
        if reply.verdict == Verdict::Granted {
            leader.ledger.granted(&id, reply.term, Epoch::new(epoch));
        }
        if leader.round.number == round {
            leader.round.replies.insert(worker, reply);
        }
    }

    pub(crate) fn count(&mut self, number: usize, round: u64) {
        let now = self.now;
        let leader = &mut self.routers[number].leader;
        if leader.round.number != round {
            return;
        }
        let before = leader.leads(now);
        let Round { sent, known, ref mut replies, .. } = leader.round;
        let replies: Vec<_> = std::mem::take(replies).into_values().collect();
        leader.campaign.replies(Duration::from_micros(sent), known, &replies);
        let after = leader.leads(now);
        if let Some(term) = after.filter(|_| before != after) {
            self.counts.leaders += 1;
            self.note("leads", number, term.get(), 0);
        }
    }

    /// Who takes part and what each shall do now.
    fn lead(&mut self, number: usize, term: Term) {
        let ids: Vec<_> = self.workers.iter().map(|worker| worker.id.clone()).collect();
        let router = &mut self.routers[number];
        let leader = &mut router.leader;
        leader.ledger.lead(term);
        let counts = |&(worker, peer): &(usize, &crate::router::Peer)| {
            peer.up && leader.ledger.held(&ids[worker]).is_some()
        };
        let here = router.peers.iter().enumerate().filter(counts);
        let membership: Membership =
            here.map(|(worker, peer)| (worker, (peer.session, peer.draining))).collect();
        // A new leader hears of workers one by one; what it decided in between would be of no use.
        if membership != leader.membership {
            leader.membership = membership;
            return;
        }
        let held: BTreeMap<usize, BTreeSet<ExpertKey>> =
            membership.keys().filter_map(|&w| Some((w, leader.ledger.held(&ids[w])?))).collect();
        leader.relied.retain(|(worker, key), _| !held.get(worker).is_some_and(|held| held.contains(key)));

        let Spec { shape, sizes, min_replicas, .. } = &self.spec;
        let present: BTreeMap<_, _> = held
            .iter()
            .map(|(&w, held)| {
                (ids[w].clone(), Present { capacity: self.workers[w].capacity, held: held.clone() })
            })
            .collect();
        let step = |hold: &Holdings| transition(sizes, &present, hold, &router.loads, *min_replicas);
        let made = leader.target.as_ref().filter(|target| target.of == membership);
        let current = made.map(|target| (target.made, step(&target.hold)));
        let at_rest = |made: Time, orders: &BTreeMap<_, Orders>| {
            self.now >= made + REBALANCE && orders.values().all(|orders| orders.load.is_empty())
        };
        let is_current = current
            .as_ref()
            .is_some_and(|(made, step)| !at_rest(*made, &step.orders) && step.stuck.is_empty());
        let orders = match current {
            Some((_, step)) if is_current => step.orders,
            _ => {
                let member = |(&w, held): (&usize, &BTreeSet<ExpertKey>)| {
                    let worker = &self.workers[w];
                    let (capacity, speed, domain) = (worker.capacity, worker.speed(), worker.domain.clone());
                    let draining = membership[&w].1;
                    (ids[w].clone(), Member { capacity, speed, domain, draining, held: held.clone() })
                };
                let members = held.iter().map(member).collect();
                let goals = Goals { min_replicas: *min_replicas, budget: 60, hysteresis: 0.1 };
                let target = plan(shape, sizes, &members, &router.loads, &goals);
                let orders = step(&target.hold).orders;
                leader.target = Some(Target { of: membership.clone(), hold: target.hold, made: self.now });
                self.counts.plans += 1;
                orders
            }
        };

        let keepers = |key: &ExpertKey| -> Vec<(usize, u64)> {
            let keeps = |&&w: &&usize| orders[&ids[w]].keep.contains(key);
            membership.keys().filter(keeps).map(|&w| (w, router.peers[w].life)).collect()
        };
        let mut sent = Vec::new();
        for &worker in membership.keys() {
            let orders = &orders[&ids[worker]];
            let stamp = leader.ledger.order(&ids[worker], orders);
            let stays = |key: &ExpertKey| orders.keep.contains(key) || orders.load.contains(key);
            let gone = router.peers[worker].held.iter().filter(|key| !stays(key));
            let mut relied = BTreeMap::new();
            for key in gone {
                let why = leader.relied.entry((worker, *key));
                let why = why.or_insert_with(|| Relied { at: self.now, on: keepers(key) });
                relied.insert(*key, why.clone());
            }
            sent.push((worker, Order { term, stamp, orders: orders.clone(), relied }));
        }
        // Planning takes a moment, and the router may be stopped in it.
        let life = router.process.life;
        let timer = RouterTimer::Send { orders: sent };
        self.after(MS, Event::RouterTimer { router: number, life, timer });
        self.stop_before_sending(number);
    }

    pub(crate) fn send_orders(&mut self, number: usize, orders: Vec<(usize, Order)>) {
        for (worker, order) in orders {
            let session = self.routers[number].peers[worker].session;
            self.send_to_worker(number, worker, session, ToWorker::Orders(order));
        }
    }
}
