//! The placement leader of a router, driven: asks and orders become messages, which are delayed, overtaken and lost, and it
//! may be stopped between making orders and sending them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use muster_placement::leader::{self, Answer, Cause, Connected, Decision, Order, OrderId, Round, Step};
use muster_placement::lease::Reply;
use muster_placement::{Goals, Member, Transition};
use muster_types::{Epoch, ExpertKey};

use crate::router::Peer;
use crate::world::{self, MS, Relied, RouterTimer, Spec, Time, ToWorker, World};

#[derive(Debug)]
pub(crate) struct Leader {
    leader: leader::Leader,
    /// Whether it is about to look at its workers.
    is_stirred: bool,
    /// Copies that were ordered away: whose else were counted on.
    relied: BTreeMap<(usize, ExpertKey), Relied>,
}

impl Leader {
    pub(crate) fn new(name: &str, spec: &Spec) -> Self {
        let goals = Goals { min_replicas: spec.min_replicas, budget: 60, hysteresis: 0.1 };
        let (shape, sizes) = (spec.shape.clone(), spec.sizes.clone());
        let leader = leader::Leader::new(name, shape, sizes, goals, spec.rhythm);
        Self { leader, is_stirred: false, relied: BTreeMap::new() }
    }
}

const fn time(duration: Duration) -> Time {
    duration.as_micros() as Time
}

/// A session among those of all workers; links count their own.
const fn session(worker: usize, session: u64) -> u64 {
    session << 8 | worker as u64
}

impl World {
    fn elapsed(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    fn leader(&mut self, number: usize) -> &mut leader::Leader {
        &mut self.routers[number].leader.leader
    }

    /// Workers that a router has heard of on their session.
    fn connected(&self, number: usize) -> impl Iterator<Item = (usize, &Peer)> {
        self.routers[number].peers.iter().enumerate().filter(|(_, peer)| peer.up && peer.epoch > 0)
    }

    // The lead.

    pub(crate) fn tick(&mut self, number: usize) {
        if let Some(end) = self.leader(number).round_ends() {
            // Nothing else is done while answers are waited for.
            return self.timer(number, time(end), RouterTimer::Tick);
        }
        self.timer(number, self.now + time(self.spec.rhythm.lease.tick), RouterTimer::Tick);
        let workers: Vec<_> = self.connected(number).map(|(worker, peer)| (worker, peer.session)).collect();
        let sessions = workers.iter().map(|&(worker, of)| session(worker, of)).collect();
        let now = self.elapsed();
        let asked = self.leader(number).tick(now, &sessions);
        if let Some(Round { number: round, ask }) = asked {
            for (worker, session) in workers {
                self.send_to_worker(number, worker, session, ToWorker::Ask { round, ask });
            }
        }
        match self.leader(number).round_ends() {
            Some(end) => self.timer(number, time(end), RouterTimer::CloseRound),
            None => self.steer(number),
        }
    }

    pub(crate) fn take_grant(&mut self, number: usize, worker: usize, round: u64, reply: Reply, epoch: u64) {
        let session = session(worker, self.routers[number].peers[worker].session);
        let answer = Answer { reply, epoch: Epoch::new(epoch) };
        self.in_round(number, |leader| leader.answered(session, round, Some(answer)));
    }

    pub(crate) fn close_round(&mut self, number: usize) {
        if self.leader(number).round_ends().is_some_and(|end| time(end) <= self.now) {
            self.in_round(number, leader::Leader::close_round);
        }
    }

    /// Goes on if the round is over by this.
    fn in_round(&mut self, number: usize, event: impl FnOnce(&mut leader::Leader)) {
        let now = self.elapsed();
        let leader = self.leader(number);
        let (was_open, before) = (leader.round_ends().is_some(), leader.leads(now));
        event(leader);
        let (is_open, after) = (leader.round_ends().is_some(), leader.leads(now));
        if let Some(term) = after.filter(|_| before != after) {
            self.counts.leaders += 1;
            self.note("leads", number, term.get(), 0);
        }
        if was_open && !is_open {
            self.steer(number);
        }
    }

    // Its use.

    /// A worker came, went or announced something; who leads looks at it soon.
    pub(crate) fn stir(&mut self, number: usize) {
        let leader = &mut self.routers[number].leader;
        if leader.leader.reigns().is_some() && !std::mem::replace(&mut leader.is_stirred, true) {
            self.timer(number, self.now + time(self.spec.rhythm.gather), RouterTimer::Stirred);
        }
    }

    pub(crate) fn stirred(&mut self, number: usize) {
        self.routers[number].leader.is_stirred = false;
        if self.leader(number).round_ends().is_none() {
            self.steer(number);
        }
    }

    /// Does what the leader decides. Counting and planning take no time.
    fn steer(&mut self, number: usize) {
        let now = self.elapsed();
        let connected = |(worker, peer): (usize, &Peer)| {
            let of = &self.workers[worker];
            let (capacity, speed, domain) = (of.capacity, of.speed(), of.domain.clone());
            let (class, held) = (of.class, peer.held.clone());
            let member = Member { class, capacity, speed, domain, draining: peer.draining, held };
            let (name, session) = (of.id.clone(), session(worker, peer.session));
            Connected { name, session, epoch: Epoch::new(peer.epoch), member }
        };
        let workers: Vec<_> = self.connected(number).map(connected).collect();
        let binding = Arc::clone(&self.routers[number].binding);
        let mut decision = self.leader(number).step(now, workers, binding);
        loop {
            decision = match decision {
                Decision::Wait => return,
                Decision::Count => {
                    let rows = self.counted_rows(number);
                    self.leader(number).counted(now, rows)
                }
                Decision::Plan(request) => {
                    self.counts.plans += 1;
                    match request.cause() {
                        Cause::First | Cause::Members => {}
                        Cause::Age => self.counts.aged_plans += 1,
                        Cause::Loads => self.counts.load_plans += 1,
                    }
                    self.leader(number).planned(now, request.plan())
                }
                Decision::Order(step) => return self.order(number, step),
            }
        }
    }

    /// What those workers counted that can be asked.
    fn counted_rows(&self, number: usize) -> BTreeMap<u64, Vec<Vec<u64>>> {
        let answers = |&(worker, peer): &(usize, &Peer)| {
            let (link, process) = (&self.links[number][worker], &self.workers[worker].process);
            let is_through = link.up && link.session == peer.session && link.held <= self.now;
            is_through && process.alive && !process.stopped
        };
        let rows = |(worker, peer): (usize, &Peer)| {
            (session(worker, peer.session), self.workers[worker].rows.clone())
        };
        self.connected(number).filter(answers).map(rows).collect()
    }

    fn order(&mut self, number: usize, step: Step) {
        let Step { transition: Transition { orders: all, forced, stuck }, send } = step;
        self.counts.forced += forced.len() as u64;
        self.counts.stuck += stuck.len() as u64;
        let router = &mut self.routers[number];
        let Leader { leader, relied, .. } = &mut router.leader;
        let workers: Vec<_> = self.workers.iter().map(|worker| all.get(&worker.id)).collect();
        let keepers = |key: &ExpertKey| -> Vec<(usize, u64)> {
            let keeps =
                workers.iter().enumerate().filter(|(_, of)| of.is_some_and(|of| of.keep.contains(key)));
            keeps.map(|(worker, _)| (worker, router.peers[worker].life)).collect()
        };
        relied.retain(|&(worker, key), _| {
            let subject = leader.subjects().get(&self.workers[worker].id);
            !subject.is_some_and(|subject| subject.member.held.contains(&key))
        });
        let mut ordered_away: Vec<BTreeMap<ExpertKey, Relied>> = vec![BTreeMap::new(); workers.len()];
        for (worker, orders) in workers.iter().enumerate().filter_map(|(n, orders)| Some((n, (*orders)?))) {
            let stays = |key: &ExpertKey| orders.keep.contains(key) || orders.load.contains(key);
            for &key in router.peers[worker].held.iter().filter(|key| !stays(key)) {
                let why = relied.entry((worker, key));
                let why = why.or_insert_with(|| Relied { at: self.now, on: keepers(&key) });
                ordered_away[worker].insert(key, why.clone());
            }
        }
        if send.is_empty() {
            return;
        }
        let mut to_send = Vec::new();
        for Order { id, seen, orders } in send {
            let worker = self.workers.iter().position(|worker| worker.id == id.worker).unwrap();
            let relied = std::mem::take(&mut ordered_away[worker]);
            to_send.push((worker, world::Order { id, seen, orders, relied }));
        }
        // Planning takes a moment, and the router may be stopped in it.
        self.timer(number, self.now + MS, RouterTimer::Send { orders: to_send });
        self.stop_before_sending(number);
    }

    pub(crate) fn send_orders(&mut self, number: usize, orders: Vec<(usize, world::Order)>) {
        for (worker, order) in orders {
            let of = self.routers[number].peers[worker].session;
            if session(worker, of) == order.id.session {
                self.send_to_worker(number, worker, of, ToWorker::Orders(order));
            }
        }
    }

    /// What became of orders: the epoch that shows them, if they were carried out.
    pub(crate) fn take_receipt(&mut self, number: usize, id: &OrderId, epoch: Option<u64>) {
        let now = self.elapsed();
        match epoch {
            Some(epoch) => self.leader(number).obeyed(now, id, Epoch::new(epoch)),
            None => self.leader(number).failed(id),
        }
    }
}
