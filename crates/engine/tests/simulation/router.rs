//! A router: schedules and attends as `router::engine` and the trunk do it, has delivery do the rest, and ends requests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use muster_engine::batcher::Rank;
use muster_engine::delivery::{
    Arrived, Contract, Delivery, Ended, Event as Tale, Fleet, Hop, Progress, Route, Strikes,
};
use muster_engine::dispatch::{
    Bound, Choices, DispatchError, ExpertDispatch, LayerBatch, Loss, Rows, RowsMut, Ticket,
};
use muster_engine::reach::LayerPlace;
use muster_engine::scheduler::{NewSequence, Scheduler};
use muster_engine::step::{Step, StepItem};
use muster_engine::{NO_BLOCK, microbatch};
use muster_placement::{Binding, Placement};
use muster_types::{
    BindingName, DType, Epoch, ExpertId, ExpertKey, Fault, FaultKind, Numerics, NumericsClass, Reach, Retry,
    SeqId, TokenId,
};

use crate::leader::Leader;
use crate::toy::Toy;
use crate::wire::{Tally, Told, ToyRows, ToySums, Wire, from_floats, to_floats};
use crate::world::{
    EXPERT_TIMEOUT, Event, MS, Process, RETRY, Request, RouterTimer, Spec, Time, ToRouter, ToWorker, World,
};

/// How long a worker in doubt may say nothing.
const SIGN_OF_LIFE: Time = 600 * MS;
/// How long sequences without experts wait before they are tried again, unless something changes.
const PARKED_FOR: Time = 50 * MS;
/// How much later than planned a step may end: for what is between two events.
const SLACK: Time = 500 * MS;

pub(crate) struct Router {
    pub(crate) process: Process,
    pub(crate) name: String,
    pub(crate) scheduler: Scheduler,
    /// Keys and values: by layer in its group, block and place in it.
    cache: BTreeMap<(usize, u32, u32), u64>,
    active: BTreeMap<SeqId, Active>,
    next_sequence: u64,
    running: Option<Running>,
    steps: u64,
    delivery: Delivery<Wire, ToySums, Tally>,
    pub(crate) peers: Vec<Peer>,
    placement: Arc<Placement>,
    /// What experts are bound to in the fleet that delivery knows.
    pub(crate) binding: Arc<Binding>,
    /// The same, when sequences were last looked at for it.
    bound: Bound,
    /// How often a worker connected.
    connections: u64,
    /// A fleet that is being built.
    building: Option<Arc<Fleet>>,
    /// That of the last fleet, built or being built.
    epoch: u64,
    /// Of those in doubt, by when a sign of life is due.
    doubts: BTreeMap<Hop, Time>,
    parked: Option<(u64, Time)>,
    poke_at: Option<Time>,
    pub(crate) leader: Leader,
    /// When it last stood still, or lived on: what it took then says nothing.
    pub(crate) woke: Time,
}

/// What a router knows of a worker.
#[derive(Debug, Clone, Default)]
pub(crate) struct Peer {
    pub(crate) up: bool,
    pub(crate) session: u64,
    /// Which life it is connected to; for checks only.
    pub(crate) life: u64,
    pub(crate) epoch: u64,
    pub(crate) held: BTreeSet<ExpertKey>,
    pub(crate) draining: bool,
    strikes: Strikes,
}

#[derive(Debug)]
struct Active {
    request: usize,
    /// What experts were bound to when it was taken in.
    binding: BindingName,
    /// The prompt, then what was generated.
    tokens: Vec<TokenId>,
    prompt: usize,
    /// Positions that are in the cache, those of the current step included.
    computed: u32,
    /// KV blocks, group by group.
    tables: Vec<Vec<u32>>,
    stalled: Option<Time>,
}

#[derive(Debug)]
struct Running {
    number: u64,
    started: Time,
    step: Step,
    lanes: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    items: Vec<usize>,
    /// Item, position and value of every row.
    rows: Vec<(usize, u32, u64)>,
    layer: usize,
    flight: Option<Open>,
    done: bool,
    /// Items that left the lane, and whether trying again can help.
    failed: BTreeMap<usize, Retry>,
}

/// A micro-batch with the workers.
#[derive(Debug)]
struct Open {
    ticket: Ticket,
    deadline: Time,
    /// Who was asked for what: worker, row and expert.
    asked: BTreeSet<(usize, u32, ExpertKey)>,
    /// Workers that had connected, and the fleet, when it was submitted.
    world: (u64, u64),
    /// Shards that were sent for it: to whom, and for which rows.
    shards: BTreeMap<u64, (Hop, BTreeSet<u32>)>,
    /// Shards whose worker says that nobody can compute any of their pairs.
    refused: BTreeSet<u64>,
}

impl Lane {
    /// Items leave, with their rows.
    fn lose(&mut self, items: &BTreeSet<usize>, retry: Retry) {
        self.failed.extend(items.iter().map(|&item| (item, retry)));
        self.rows.retain(|row| !items.contains(&row.0));
    }
}

impl Active {
    /// Blocks with their group and place.
    fn held(&self) -> impl Iterator<Item = (usize, usize, u32)> + '_ {
        let of_group = |(group, table): (usize, &'_ Vec<u32>)| {
            table.iter().copied().enumerate().map(move |(at, block)| (group, at, block)).collect::<Vec<_>>()
        };
        let blocks = self.tables.iter().enumerate().flat_map(of_group);
        blocks.filter(|&(_, _, block)| block != NO_BLOCK)
    }

    /// What the scheduler is to do before a step: what no position to come sees is given up. Whether there
    /// was anything.
    fn forget(&mut self, reaches: &[Reach], block_tokens: u32) -> bool {
        let before = self.held().count();
        for (reach, table) in reaches.iter().zip(&mut self.tables) {
            let unseen = (reach.first_visible(self.computed) / block_tokens) as usize;
            table.iter_mut().take(unseen).for_each(|block| *block = NO_BLOCK);
        }
        self.held().count() < before
    }
}

impl Router {
    pub(crate) fn new(number: usize, spec: &Spec, workers: usize, life: u64) -> Self {
        let process = Process { life, ..Process::default() };
        // Another in every life.
        let name = format!("r{number}.{life}");
        let is_partial = spec.combine == muster_types::Combine::Partial;
        let contract = Contract {
            experts: spec.shape.experts().to_vec(),
            hidden: 2,
            wire: DType::F32,
            top_k: spec.toy.k,
            max_rows: usize::MAX,
            lanes: 2,
            combine: spec.combine,
        };
        let binding = Arc::new(Binding::new(spec.numerics, &spec.shape));
        let fleet = Fleet::new(Epoch::new(0), &spec.shape, &[], Arc::clone(&binding));
        let fleet = Arc::new(fleet.unwrap());
        let placement = Arc::clone(fleet.placement());
        Self {
            process,
            name: name.clone(),
            scheduler: Scheduler::new(spec.scheduler.clone()).unwrap(),
            cache: BTreeMap::new(),
            active: BTreeMap::new(),
            next_sequence: 0,
            running: None,
            steps: 0,
            delivery: Delivery::new(contract, fleet, Wire::new(is_partial), ToySums, Tally::default()),
            peers: vec![Peer::default(); workers],
            placement,
            binding,
            bound: Bound::default(),
            connections: 0,
            building: None,
            epoch: 0,
            doubts: BTreeMap::new(),
            parked: None,
            poke_at: None,
            leader: Leader::new(&name, spec),
            woke: 0,
        }
    }

    pub(crate) fn may_connect(&self, worker: usize, now: Time) -> bool {
        let now = self.delivery.transport().at(now);
        self.peers[worker].strikes.left(now).is_zero()
    }

    pub(crate) fn connected(&mut self, worker: usize, session: u64, life: u64) {
        let peer = &mut self.peers[worker];
        let strikes = std::mem::take(&mut peer.strikes);
        *peer = Peer { up: true, session, life, strikes, ..Peer::default() };
        self.delivery.transport_mut().up.insert(worker, session);
        self.connections += 1;
    }

    pub(crate) fn is_at_rest(&self) -> bool {
        let stats = self.scheduler.stats();
        self.active.is_empty()
            && self.running.is_none()
            && self.scheduler.is_idle()
            && stats.blocks_free == stats.blocks_total
            && self.delivery.transport().out.is_empty()
            && self.placement.is_complete()
    }

    /// What keeps it from being at rest.
    pub(crate) fn describe(&self) -> String {
        let Self { name, active, parked, leader, .. } = self;
        let (missing, out) = (self.placement.missing(), &self.delivery.transport().out);
        format!(
            "{name}: active {active:?} parked {parked:?} missing {missing:?} out {out:?} leader {leader:?}"
        )
    }

    /// Changes with the fleet that delivery knows.
    pub(crate) fn version(&self) -> u64 {
        self.delivery.version()
    }
}

impl World {
    pub(crate) fn start_router(&mut self, number: usize) {
        let life = self.routers[number].process.life;
        self.routers[number] = Router::new(number, &self.spec, self.workers.len(), life);
        let life = self.routers[number].process.start();
        self.note("router started", number, life, 0);
        for worker in 0..self.workers.len() {
            let delay = self.rng.between(100, 5 * MS);
            self.after(delay, Event::Connect { router: number, worker, life });
        }
        let phase = self.rng.between(0, 250 * MS);
        self.after(phase, Event::RouterTimer { router: number, life, timer: RouterTimer::Tick });
    }

    pub(crate) fn kill_router(&mut self, number: usize) {
        let life = self.routers[number].process.life;
        self.routers[number].process.die();
        self.links[number].iter_mut().for_each(|link| link.up = false);
        self.note("router gone", number, life, 0);
        self.lose_requests(number, life);
    }

    pub(crate) fn timer(&mut self, number: usize, at: Time, timer: RouterTimer) {
        let life = self.routers[number].process.life;
        self.at(at, Event::RouterTimer { router: number, life, timer });
    }

    pub(crate) fn at_router(&mut self, number: usize, worker: usize, message: ToRouter) {
        match message {
            ToRouter::Announce { epoch, held, draining } => {
                self.take_announcement(number, worker, epoch, &held, draining);
            }
            ToRouter::Answer { id, outcome } => self.take_answer(number, worker, id, outcome),
            ToRouter::Granted { round, reply, epoch } => self.take_grant(number, worker, round, reply, epoch),
            ToRouter::Obeyed { id, epoch } => self.take_receipt(number, &id, epoch),
        }
    }

    pub(crate) fn router_timer(&mut self, number: usize, timer: RouterTimer) {
        match timer {
            RouterTimer::Poke => {
                self.routers[number].poke_at = None;
                self.poke(number);
            }
            RouterTimer::Attended { step, lane } => {
                if self.routers[number].running.as_ref().is_some_and(|running| running.number == step) {
                    self.dispatch(number, lane);
                }
            }
            RouterTimer::Due { ticket, lane } => {
                if self.flight(number, lane).is_some_and(|open| open.ticket == ticket) {
                    self.advance(number, lane);
                }
            }
            RouterTimer::Fleet => self.fleet_built(number),
            RouterTimer::Silence { hop } => self.silence(number, hop),
            RouterTimer::Tick => self.tick(number),
            RouterTimer::CloseRound => self.close_round(number),
            RouterTimer::Stirred => self.stirred(number),
            RouterTimer::Send { orders } => self.send_orders(number, orders),
        }
    }

    fn flight(&mut self, number: usize, lane: usize) -> Option<&mut Open> {
        self.routers[number].running.as_mut()?.lanes.get_mut(lane)?.flight.as_mut()
    }

    // What is known of workers.

    fn take_announcement(
        &mut self,
        number: usize,
        worker: usize,
        epoch: u64,
        held: &BTreeSet<ExpertKey>,
        draining: bool,
    ) {
        let peer = &mut self.routers[number].peers[worker];
        if epoch <= peer.epoch {
            self.counts.overtaken_announcements += 1;
            return;
        }
        (peer.epoch, peer.draining) = (epoch, draining);
        peer.held.clone_from(held);
        let life = peer.life;
        let known = self.announced.get(&(worker, life, epoch));
        assert_eq!(
            known,
            Some(held),
            "epochs-monotone: worker {worker} did not announce this in epoch {epoch}"
        );
        self.stir(number);
        self.routes_changed(number);
    }

    pub(crate) fn broken(&mut self, number: usize, worker: usize, session: u64) {
        let router = &mut self.routers[number];
        let life = router.process.life;
        if !router.process.alive || !router.peers[worker].up || router.peers[worker].session != session {
            return;
        }
        router.peers[worker].up = false;
        self.stir(number);
        self.note("broken", number, worker as u64, session);
        self.lost(number, Hop { link: worker, session }, Ended::Gone("its link broke".into()));
        self.after(RETRY, Event::Connect { router: number, worker, life });
        self.routes_changed(number);
    }

    /// Delivery hears that a session is over.
    fn lost(&mut self, number: usize, hop: Hop, how: Ended) {
        let wire = self.routers[number].delivery.transport_mut();
        if wire.up.get(&hop.link) == Some(&hop.session) {
            wire.up.remove(&hop.link);
            wire.out.retain(|_, of| *of != hop);
            self.routers[number].doubts.remove(&hop);
            self.tell_delivery(number, hop, Tale::Lost { hop, how });
        }
    }

    /// Another fleet is built of who is connected now.
    fn routes_changed(&mut self, number: usize) {
        let ids: Vec<_> = self.workers.iter().map(|worker| worker.id.clone()).collect();
        let classes: Vec<_> = self.workers.iter().map(|worker| worker.class).collect();
        let router = &mut self.routers[number];
        let live = router.peers.iter().enumerate().filter(|(_, peer)| peer.up && peer.epoch > 0);
        let live: Vec<(usize, Vec<ExpertKey>, Route)> = live
            .map(|(n, peer)| {
                let rank = if peer.draining { Rank::Poor } else { Rank::Good };
                let hop = Hop { link: n, session: peer.session };
                let (epoch, class) = (Epoch::new(peer.epoch), classes[n]);
                (n, peer.held.iter().copied().collect(), Route { hop, epoch, rank, class })
            })
            .collect();
        let live: Vec<_> = live.iter().map(|(n, held, route)| (&ids[*n], &held[..], *route)).collect();
        router.epoch += 1;
        let binding = router.binding.after(live.iter().map(|&(_, held, route)| (route.class, held)));
        let fleet = Fleet::new(Epoch::new(router.epoch), &self.spec.shape, &live, Arc::new(binding)).unwrap();
        let was_building = router.building.replace(Arc::new(fleet)).is_some();
        if self.spec.building == 0 {
            self.fleet_built(number);
        } else if !was_building {
            self.timer(number, self.now + self.spec.building, RouterTimer::Fleet);
        }
    }

    /// Delivery hears of another fleet, and what becomes possible, or impossible, by that is seen.
    fn fleet_built(&mut self, number: usize) {
        let router = &mut self.routers[number];
        let Some(fleet) = router.building.take() else { return };
        router.placement = Arc::clone(fleet.placement());
        router.binding = Arc::clone(fleet.binding());
        router.delivery.transport_mut().version = fleet.placement().epoch().get();
        self.tell_delivery(number, Hop { link: 0, session: 0 }, Tale::Announced(fleet));
        self.poke(number);
    }

    // Delivery.

    /// Delivery hears something, of that session if it is about one.
    fn tell_delivery(&mut self, number: usize, hop: Hop, tale: Tale<ToyRows>) {
        let now = self.now;
        let delivery = &mut self.routers[number].delivery;
        delivery.transport_mut().set(now);
        delivery.transport_mut().note(&tale, hop);
        delivery.take(tale);
        self.carry(number);
        self.routers[number].delivery.transport().check();
        for lane in 0..2 {
            if self.flight(number, lane).is_some() {
                self.advance(number, lane);
            }
        }
    }

    /// Does what delivery asked of its transport.
    fn carry(&mut self, number: usize) {
        for told in std::mem::take(&mut self.routers[number].delivery.transport_mut().told) {
            match told {
                Told::Shard { hop, lane, shard, pairs } => self.check_shard(number, hop, lane, shard, &pairs),
                Told::Doubt { hop, in_doubt: false } => drop(self.routers[number].doubts.remove(&hop)),
                Told::Doubt { hop, in_doubt: true } => {
                    let due = self.now + SIGN_OF_LIFE;
                    if self.routers[number].doubts.insert(hop, due).is_none() {
                        self.counts.doubts += 1;
                        self.timer(number, due, RouterTimer::Silence { hop });
                    }
                }
                Told::Ban { hop } => {
                    self.ban(number, hop);
                    let wire = self.routers[number].delivery.transport_mut();
                    if wire.up.get(&hop.link) == Some(&hop.session) {
                        wire.up.remove(&hop.link);
                        wire.out.retain(|_, of| *of != hop);
                    }
                }
            }
        }
        self.count_notes(number);
    }

    fn count_notes(&mut self, number: usize) {
        let Tally { too_late, lied, lost, stand_ins, hedged, expired } =
            std::mem::take(self.routers[number].delivery.observer_mut());
        let banned = &mut self.routers[number].delivery.transport_mut().banned_for_faults;
        self.counts.banned_for_faults += std::mem::take(banned);
        self.counts.late_replies += too_late;
        self.counts.refused_replies += lied;
        self.counts.parts_lost += lost;
        self.counts.stand_ins += stand_ins;
        self.counts.hedged += hedged;
        self.counts.deadlines += expired;
    }

    fn check_shard(
        &mut self,
        number: usize,
        hop: Hop,
        lane: usize,
        shard: crate::world::Shard,
        pairs: &[(u32, ExpertKey)],
    ) {
        let worker = hop.link;
        let life = self.routers[number].peers[worker].life;
        let announced = &self.announced[&(worker, life, shard.epoch)];
        for (_, key) in pairs {
            let is_there = announced.contains(key);
            let is_bound = self.routers[number].binding.admits(*key, self.workers[worker].class);
            assert!(
                is_bound,
                "one-class: rows for {key} go to worker {worker}, whose class it is not bound to"
            );
            assert!(
                is_there,
                "holder-only: rows for {key} go to worker {worker}, which does not announce it"
            );
        }
        if let Some(open) = self.flight(number, lane) {
            open.shards.insert(shard.id, (hop, pairs.iter().map(|pair| pair.0).collect()));
            for &(row, key) in pairs {
                let is_new = open.asked.insert((worker, row, key));
                assert!(is_new, "every-pair-once: worker {worker} is asked twice for row {row}, {key}");
            }
        }
        self.send_to_worker(number, worker, hop.session, ToWorker::Shard(shard));
    }

    /// A worker broke the protocol: nothing it says is used for a while.
    fn ban(&mut self, number: usize, hop: Hop) {
        let (worker, session) = (hop.link, hop.session);
        let router = &mut self.routers[number];
        if router.delivery.transport().up.get(&worker) == Some(&session) {
            let now = router.delivery.transport().at(self.now);
            router.peers[worker].strikes.strike(now);
            router.doubts.remove(&hop);
            self.links[number][worker].up = false;
            self.note("banned", number, worker as u64, session);
            self.at(self.now, Event::Broken { router: number, worker, session });
        }
    }

    /// A worker that is still in doubt, and cannot give a sign of life, is given up.
    fn silence(&mut self, number: usize, hop: Hop) {
        let Some(&due) = self.routers[number].doubts.get(&hop) else { return };
        let worker = hop.link;
        let is_silent = self.workers[worker].process.stopped || self.links[number][worker].held > due;
        if is_silent {
            self.counts.given_up += 1;
            self.cut(number, worker);
            self.routers[number].doubts.remove(&hop);
        } else {
            let next = self.now + SIGN_OF_LIFE;
            self.routers[number].doubts.insert(hop, next);
            self.timer(number, next, RouterTimer::Silence { hop });
        }
    }

    fn take_answer(&mut self, number: usize, worker: usize, id: u64, outcome: Result<ToyRows, Fault>) {
        let wire = self.routers[number].delivery.transport_mut();
        let at = wire.at(self.now);
        let session = self.routers[number].peers[worker].session;
        let hop = Hop { link: worker, session };
        if self.routers[number].delivery.transport_mut().out.remove(&id) != Some(hop) {
            self.counts.refused_replies += 1;
            self.ban(number, hop);
            return self.lost(number, hop, Ended::Lied("it answered what nobody asked".into()));
        }
        if matches!(&outcome, Err(fault) if fault.kind == FaultKind::BadRequest) {
            for lane in 0..2 {
                let open = self.flight(number, lane).filter(|open| open.shards.contains_key(&id));
                if let Some(open) = open {
                    open.refused.insert(id);
                }
            }
        }
        let arrived = |outputs| Arrived { outputs, compute: std::time::Duration::ZERO, at };
        self.tell_delivery(number, hop, Tale::Answer { id, outcome: outcome.map(arrived) });
    }

    /// Brings a lane's micro-batch on as far as it gets.
    fn advance(&mut self, number: usize, lane: usize) {
        let now = self.now;
        let router = &mut self.routers[number];
        let Some(running) = &mut router.running else { return };
        let Lane { flight, rows, .. } = &mut running.lanes[lane];
        let Some(&mut Open { ticket, deadline, .. }) = flight.as_mut() else { return };
        let mut out = vec![0.0; rows.len() * 2];
        let (at, until) =
            (router.delivery.transport_mut().set(now), router.delivery.transport().at(deadline));
        let progress = router.delivery.advance(ticket, at, until, &mut RowsMut::of_f32(&mut out));
        match progress.expect("late-never-combined: a lane's ticket is unknown") {
            Progress::Waits(wanted) => {
                let due = router.delivery.transport().time(wanted.until);
                self.carry(number);
                self.timer(number, due, RouterTimer::Due { ticket, lane });
            }
            Progress::Done(lost) => {
                self.carry(number);
                self.collected(number, lane, &from_floats(&out), &lost);
            }
        }
    }

    // Steps.

    pub(crate) fn admit(&mut self, number: usize, request: usize) -> bool {
        self.rebind(number);
        let Request { prompt, max_tokens, .. } = &self.requests[request];
        let router = &mut self.routers[number];
        let id = SeqId::new(router.next_sequence);
        let new = NewSequence { id, prompt: prompt.clone(), max_tokens: *max_tokens };
        if router.scheduler.admit(new).is_err() {
            return false;
        }
        router.next_sequence += 1;
        let binding = &router.binding;
        let class_of = |key: ExpertKey| binding.class(key).unwrap_or(NumericsClass::CpuCanonical);
        let context = self.spec.scheduler.context;
        let expected = self.spec.toy.generate(prompt, *max_tokens, context, class_of);
        let (tokens, prompt) = (prompt.clone(), prompt.len());
        let tables = vec![Vec::new(); self.spec.groups.reaches().len()];
        let binding = router.bound.name;
        router
            .active
            .insert(id, Active { request, binding, tokens, prompt, computed: 0, tables, stalled: None });
        self.requests[request].expected = expected;
        self.requests[request].at = Some((number, router.process.life));
        self.note("admitted", number, request as u64, id.get());
        self.poke(number);
        true
    }

    /// A client goes away.
    pub(crate) fn cancel(&mut self, request: usize) {
        let Some((number, _)) = self.requests[request].at.take() else { return };
        let router = &mut self.routers[number];
        let found = router.active.iter().find(|(_, active)| active.request == request);
        let id = *found.expect("no-lost-request: the router does not know what it was given").0;
        self.remove(number, id);
        self.requests[request].ended = true;
        self.counts.cancelled += 1;
        self.note("cancelled", request, 0, 0);
        self.check_blocks(number);
    }

    fn remove(&mut self, number: usize, id: SeqId) -> usize {
        let router = &mut self.routers[number];
        assert!(router.scheduler.finish(id), "no-lost-request: the scheduler lost a sequence");
        router.active.remove(&id).expect("a sequence is active until it is removed").request
    }

    /// Looks at what experts are bound to; requests that were taken in when they were bound otherwise end, and begin anew.
    fn rebind(&mut self, number: usize) {
        let router = &mut self.routers[number];
        let bound = router.delivery.bound();
        if bound == router.bound || router.running.is_some() {
            return;
        }
        router.bound = bound;
        router.scheduler.bind(bound.name);
        let of_others = |(_, active): &(&SeqId, &Active)| active.binding != bound.name;
        let others: Vec<SeqId> = router.active.iter().filter(of_others).map(|(&id, _)| id).collect();
        for id in others {
            let request = self.remove(number, id);
            self.requests[request].at = None;
            self.counts.rebound += 1;
            self.note("rebound", number, request as u64, bound.changes);
            self.after(MS, Event::Client { request });
        }
    }

    pub(crate) fn poke_later(&mut self, number: usize, delay: Time) {
        let at = self.now + delay;
        if self.routers[number].poke_at.is_none_or(|planned| planned > at) {
            self.routers[number].poke_at = Some(at);
            self.timer(number, at, RouterTimer::Poke);
        }
    }

    /// Begins a step if none runs and there is something to do.
    fn poke(&mut self, number: usize) {
        let router = &mut self.routers[number];
        if !router.process.alive
            || router.process.stopped
            || router.running.is_some()
            || router.active.is_empty()
        {
            return;
        }
        self.rebind(number);
        let router = &mut self.routers[number];
        let known = router.version();
        let over = |&mut (version, until): &mut (u64, Time)| version != known || self.now >= until;
        if router.parked.take_if(over).is_some() {
            router.scheduler.unpark();
        }
        let (reaches, block_tokens) = (self.spec.groups.reaches(), self.spec.scheduler.block_tokens.get());
        let forgot = router.active.values_mut().map(|active| active.forget(reaches, block_tokens));
        self.counts.forgotten += forgot.map(u64::from).sum::<u64>();
        let step = router.scheduler.schedule(4);
        self.check_step(number, &step);
        if step.items.is_empty() {
            self.poke_later(number, 10 * MS);
            return;
        }
        self.counts.preempted += step.preempted.len() as u64;
        let lanes = if self.spec.two_lanes && step.items.len() > 1 {
            microbatch::split(&step).to_vec()
        } else {
            vec![(0..step.items.len()).collect()]
        };
        let toy = &self.spec.toy;
        let lane = |items: Vec<usize>| {
            let of_item = |&item: &usize| {
                let StepItem { start, tokens, .. } = &step.items[item];
                (*start..).zip(tokens).map(move |(position, &token)| (item, position, toy.embed(token)))
            };
            let rows = items.iter().flat_map(of_item).collect();
            Lane { rows, items, layer: 0, flight: None, done: false, failed: BTreeMap::new() }
        };
        let lanes: Vec<_> = lanes.into_iter().map(lane).collect();
        let router = &mut self.routers[number];
        router.steps += 1;
        let (count, step_number) = (lanes.len(), router.steps);
        router.running = Some(Running { number: step_number, started: self.now, step, lanes });
        self.note("step", number, step_number, count as u64);
        for lane in 0..count {
            let at = self.now + self.spec.attention * (lane as u64 + 1);
            self.timer(number, at, RouterTimer::Attended { step: step_number, lane });
        }
    }

    /// Attention and gate of a lane's layer, and off to the workers.
    fn dispatch(&mut self, number: usize, at: usize) {
        let block_tokens = self.spec.scheduler.block_tokens.get();
        let toy = self.spec.toy.clone();
        let Router { running, cache, .. } = &mut self.routers[number];
        let Some(Running { step, lanes, .. }) = running else { return };
        let lane = &mut lanes[at];
        let layer = lane.layer;
        let LayerPlace { group: its_group, layer: in_group } = self.spec.groups.place(layer);
        let count = self.spec.groups.reaches().len();
        for (item, position, row) in &mut lane.rows {
            let blocks = &step.items[*item].blocks;
            let table = &blocks[its_group * (blocks.len() / count)..];
            let place = |position: u32| {
                (in_group, table[(position / block_tokens) as usize], position % block_tokens)
            };
            cache.insert(place(*position), Toy::entry(layer, *row));
            let first = toy.reaches[layer].first_visible(*position);
            let entries = (first..=*position).map(|before| {
                let entry = cache.get(&place(before));
                *entry.expect("blocks-conserved: a position is read that nobody has written")
            });
            *row = Toy::attend(*row, entries);
        }
        self.submit(number, at);
    }

    /// A lane's rows go to their experts; those whose experts nobody holds leave it.
    fn submit(&mut self, number: usize, at: usize) {
        let (now, toy) = (self.now, self.spec.toy.clone());
        let router = &mut self.routers[number];
        let instant = router.delivery.transport_mut().set(now);
        loop {
            let Some(running) = &mut router.running else { return };
            let lane = &mut running.lanes[at];
            if lane.rows.is_empty() {
                lane.done = true;
                return self.emit_if_done(number);
            }
            let chosen = |&(_, _, row): &(usize, u32, u64)| {
                let chosen = toy.choose(lane.layer, row).into_iter();
                chosen.map(move |expert| (expert, Toy::weight(expert, row))).collect::<Vec<_>>()
            };
            let (experts, weights) = lane.rows.iter().flat_map(chosen).unzip();
            let choices = Choices::new(toy.k, experts, weights).unwrap();
            let floats = to_floats(lane.rows.iter().map(|row| row.2));
            let (layer, rows) = (toy.layer(lane.layer), Rows::of_f32(&floats, 2).unwrap());
            let batch = LayerBatch { layer, lane: at, rows, choices: &choices };
            match router.delivery.submit_at(instant, &batch) {
                Ok(ticket) => {
                    let deadline = now + EXPERT_TIMEOUT;
                    let world = (router.connections, router.delivery.version());
                    let (asked, shards, refused) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
                    lane.flight = Some(Open { ticket, deadline, asked, world, shards, refused });
                    self.carry(number);
                    return self.advance(number, at);
                }
                Err(DispatchError::NoOwner { expert, .. }) => {
                    let rows = choices.experts().chunks(toy.k).zip(&lane.rows);
                    let wanting = rows.filter(|(experts, _)| experts.contains(&expert)).map(|(_, row)| row.0);
                    let wanting = wanting.collect();
                    lane.lose(&wanting, Retry::Later);
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// A lane's sums are here, but for the rows that are lost.
    fn collected(&mut self, number: usize, at: usize, sums: &[u64], lost: &[Loss]) {
        let (layers, toy) = (self.spec.toy.layers(), self.spec.toy.clone());
        let Router { running, placement, binding, bound, delivery, connections, .. } =
            &mut self.routers[number];
        let is_rebound = delivery.bound() != *bound;
        let Some(running) = running else { return };
        let (step, lane) = (running.number, &mut running.lanes[at]);
        let Some(Open { asked, world, shards, refused, .. }) = lane.flight.take() else { return };
        let is_lost = |row: usize| lost.iter().any(|loss| loss.rows.contains(&(row as u32)));
        let wire = delivery.transport();
        for (hop, rows) in refused.iter().map(|id| &shards[id]) {
            // Another class is no witness.
            let is_of_two = is_rebound || binding.numerics() == Numerics::Any;
            let is_contradicted = !is_of_two && rows.iter().any(|&row| !is_lost(row as usize));
            let is_up = wire.up.get(&hop.link) == Some(&hop.session);
            assert!(!is_contradicted || !is_up, "second-opinion: {hop:?} was contradicted and goes on");
        }
        let expired = lost.iter().filter(|loss| matches!(loss.error, DispatchError::Deadline { .. }));
        for &row in expired.flat_map(|loss| &loss.rows) {
            let is_out =
                shards.iter().any(|(id, (_, rows))| rows.contains(&row) && wire.out.contains_key(id));
            assert!(is_out, "bounded-patience: row {row} was waited for, and nobody was to answer");
        }
        // Who came since may have come too late to be asked.
        let is_as_before = world == (*connections, delivery.version());
        // A claim is the truth when two make it, or when nobody is left who could contradict.
        let is_final = |row: u32, expert: ExpertId| {
            let key = ExpertKey { layer: toy.layer(lane.layer), expert };
            let asked: Vec<usize> =
                asked.iter().filter(|of| (of.1, of.2) == (row, key)).map(|&(worker, ..)| worker).collect();
            let owners =
                placement.owners(key).iter().map(|owner| placement.workers()[owner.index()].as_str());
            let number = |name: &str| name.trim_start_matches('w').parse::<usize>().unwrap();
            let mut left = owners.map(number).filter(|owner| delivery.transport().up.contains_key(owner));
            asked.len() > 1 || left.all(|owner| asked.contains(&owner))
        };
        for loss in lost.iter().filter(|loss| is_as_before && loss.error.retry() == Retry::Never) {
            for &row in &loss.rows {
                let chosen = toy.choose(lane.layer, lane.rows[row as usize].2);
                let is_final = chosen.into_iter().any(|expert| is_final(row, expert));
                assert!(is_final, "second-opinion: {} although others could be asked", loss.error);
            }
        }
        let (cpu, classes) = (NumericsClass::CpuCanonical, self.spec.classes);
        for (number, (row, sum)) in lane.rows.iter_mut().zip(sums).enumerate() {
            if !is_lost(number) {
                let expected = toy.sum(lane.layer, row.2, |key| binding.class(key).unwrap_or(cpu));
                let is_sum = match binding.numerics() {
                    // What is made of both classes is thrown away.
                    Numerics::Exact => *sum == expected || is_rebound,
                    Numerics::Any => toy.sums(lane.layer, row.2, classes).contains(sum),
                };
                assert!(is_sum, "every-pair-once: row {number} has another sum");
                let alone = |class| toy.sum(lane.layer, row.2, |_| class);
                let is_mixed = classes[0] != classes[1] && !classes.map(alone).contains(sum);
                self.counts.mixed += u64::from(is_mixed && binding.numerics() == Numerics::Any);
                self.counts.bound_apart += u64::from(is_mixed && *sum == expected);
                row.2 = Toy::combine(row.2, *sum);
            }
        }
        self.counts.flights_lost += u64::from(!lost.is_empty());
        for loss in lost {
            let items = loss.rows.iter().map(|&row| lane.rows[row as usize].0);
            lane.failed.extend(items.map(|item| (item, loss.error.retry())));
            self.counts.believed += u64::from(loss.error.retry() == Retry::Never);
        }
        let failed: BTreeSet<usize> = lane.failed.keys().copied().collect();
        lane.rows.retain(|row| !failed.contains(&row.0));
        lane.layer += 1;
        if lane.layer == layers || lane.rows.is_empty() {
            lane.done = true;
            return self.emit_if_done(number);
        }
        let at_time = self.now + self.spec.attention;
        self.timer(number, at_time, RouterTimer::Attended { step, lane: at });
    }

    /// Once all lanes have ended: tokens, ends, and what is to be done again.
    fn emit_if_done(&mut self, number: usize) {
        let running = &mut self.routers[number].running;
        let Some(Running { started, step, lanes, .. }) =
            running.take_if(|running| running.lanes.iter().all(|lane| lane.done))
        else {
            return;
        };
        let router = &mut self.routers[number];
        if router.delivery.bound() != router.bound {
            self.counts.discarded += 1;
            step.items.iter().for_each(|item| self.undo(number, item));
            self.check_blocks(number);
            return self.poke_later(number, 100);
        }
        for lane in &lanes {
            for &at in &lane.items {
                let item = &step.items[at];
                if let Some(&retry) = lane.failed.get(&at) {
                    self.set_back(number, item, retry, started);
                } else if let Some(active) = self.routers[number].active.get_mut(&item.seq) {
                    active.stalled = None;
                    if item.sample {
                        let last = lane.rows.iter().rfind(|row| row.0 == at).expect("an item has rows").2;
                        self.append(number, item.seq, last);
                    }
                }
            }
        }
        self.check_blocks(number);
        self.poke_later(number, 100);
    }

    fn append(&mut self, number: usize, id: SeqId, row: u64) {
        let token = self.spec.toy.token(row);
        let router = &mut self.routers[number];
        let progress =
            router.scheduler.append(id, token).expect("blocks-conserved: a sample that nobody awaits");
        let Some(active) = router.active.get_mut(&id) else { return };
        active.tokens.push(token);
        let tokens = active.tokens[active.prompt..].to_vec();
        let request = &self.requests[active.request];
        let expected = request.expected.get(tokens.len() - 1);
        if self.spec.numerics == Numerics::Exact {
            assert_eq!(Some(&token), expected, "same-output: request {} of {}", active.request, router.name);
        }
        if progress == muster_engine::scheduler::Progress::LengthReached {
            let request = self.remove(number, id);
            self.end(request, &tokens);
        }
    }

    /// A sequence stands where it stood before the step.
    fn undo(&mut self, number: usize, item: &StepItem) {
        let kept = item.start.div_ceil(self.spec.scheduler.block_tokens.get()) as usize;
        let router = &mut self.routers[number];
        if let Some(active) = router.active.get_mut(&item.seq) {
            active.tables.iter_mut().for_each(|table| table.truncate(kept));
            active.computed = item.start;
        }
        router.scheduler.undo(item);
    }

    /// A sequence that got nothing from a step: it waits, or its request has waited long enough.
    fn set_back(&mut self, number: usize, item: &StepItem, retry: Retry, started: Time) {
        let now = self.now;
        let router = &mut self.routers[number];
        let Some(active) = router.active.get_mut(&item.seq) else { return };
        let since = *active.stalled.get_or_insert(started);
        let stalled = now - since;
        // It is looked at after a step of its own, which may have had to wait for one of others; and in a step every layer
        // may take its time.
        let bound = (1 + 2 * self.spec.toy.layers() as u64) * EXPERT_TIMEOUT + SLACK;
        assert!(
            stalled <= bound || router.woke >= since,
            "bounded-patience: {} waited {stalled} us",
            item.seq
        );
        if retry != Retry::Never && stalled < EXPERT_TIMEOUT {
            self.undo(number, item);
            let router = &mut self.routers[number];
            router.scheduler.park(item.seq);
            let version = router.version();
            router.parked.get_or_insert((version, now + PARKED_FOR));
            self.counts.parked += 1;
            return;
        }
        // The client is told to try again later.
        let request = self.remove(number, item.seq);
        self.requests[request].at = None;
        self.counts.out_of_patience += u64::from(retry != Retry::Never);
        self.note("out of patience", number, request as u64, stalled);
        self.after(200 * MS, Event::Client { request });
    }

    // KV blocks.

    fn check_step(&mut self, number: usize, step: &Step) {
        let router = &mut self.routers[number];
        for id in &step.preempted {
            if let Some(active) = router.active.get_mut(id) {
                active.tables.iter_mut().for_each(Vec::clear);
                active.computed = 0;
            }
        }
        for item in &step.items {
            let active = router.active.get_mut(&item.seq).expect("no-lost-request: a step for nobody");
            let known = &active.tokens[item.start as usize..][..item.tokens.len()];
            assert_eq!(known, item.tokens, "same-output: a step with other tokens than the sequence has");
            let places = item.blocks.len() / active.tables.len();
            active.tables = item.blocks.chunks(places).map(<[u32]>::to_vec).collect();
            active.computed = item.start + item.tokens.len() as u32;
        }
        self.check_blocks(number);
    }

    /// Every block is free or in a table, and in several tables only as a full block of a common beginning, of one group.
    fn check_blocks(&self, number: usize) {
        let block_tokens = self.spec.scheduler.block_tokens.get() as usize;
        let router = &self.routers[number];
        let mut holders: BTreeMap<u32, (usize, usize, &Active)> = BTreeMap::new();
        for active in router.active.values() {
            for (group, at, block) in active.held() {
                if let Some((its_group, place, other)) = holders.insert(block, (group, at, active)) {
                    let end = (at + 1) * block_tokens;
                    let common = (its_group, place) == (group, at)
                        && end <= active.tokens.len().min(other.tokens.len())
                        && active.tokens[..end] == other.tokens[..end];
                    assert!(common, "blocks-conserved: block {block} is in two tables");
                }
            }
        }
        let stats = router.scheduler.stats();
        assert_eq!(
            stats.blocks_free as usize + holders.len(),
            stats.blocks_total as usize,
            "blocks-conserved: free and used are not all"
        );
    }
}
