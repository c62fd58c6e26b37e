//! A router: schedules, attends, dispatches, combines, and ends requests, as `router::engine` does it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use muster_engine::batcher::{Rank, ShardPlan, group};
use muster_engine::dispatch::{Choices, DispatchError};
use muster_engine::reach::{LayerPlace, Reach};
use muster_engine::scheduler::{NewSequence, Scheduler, Step, StepItem};
use muster_engine::{NO_BLOCK, microbatch};
use muster_placement::hedge::{Budget, Hedge, Outcome, Rules};
use muster_placement::{Placement, WorkerIx};
use muster_types::{Epoch, ExpertKey, SeqId, TokenId};

use crate::flight::{Flight, Part, Standing, State, pairs};
use crate::leader::Leader;
use crate::toy::Toy;
use crate::world::{
    EXPERT_TIMEOUT, Event, MS, Process, RETRY, Request, RouterTimer, SECOND, Shard, Spec, Time, ToRouter,
    ToWorker, World,
};

/// How long a worker that lied is left alone.
const BAN: Time = SECOND;
/// How long sequences without experts wait before they are tried again, unless something changes.
const PARKED_FOR: Time = 50 * MS;
/// How much later than planned a step may end: for what is between two events.
const SLACK: Time = 500 * MS;

#[derive(Debug)]
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
    flights: u64,
    /// Shards that are waited for: the lane and part they are.
    calls: BTreeMap<u64, (usize, usize)>,
    next_shard: u64,
    pub(crate) peers: Vec<Peer>,
    placement: Placement,
    /// The workers of the placement: number, session and epoch.
    hops: Vec<(usize, u64, u64)>,
    pub(crate) version: u64,
    parked: Option<(u64, Time)>,
    poke_at: Option<Time>,
    hedges: Vec<Hedge>,
    budget: Budget,
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
    banned_until: Time,
    /// Shards that are late.
    late: BTreeSet<u64>,
}

#[derive(Debug)]
struct Active {
    request: usize,
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
    flight: Option<Flight>,
    done: bool,
    /// Items that got nothing: whether it was for want of their own experts.
    failed: BTreeMap<usize, Failure>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Experts,
    /// It was in the same lane.
    Interrupted,
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
        Self {
            process,
            name: name.clone(),
            scheduler: Scheduler::new(spec.scheduler.clone()).unwrap(),
            cache: BTreeMap::new(),
            active: BTreeMap::new(),
            next_sequence: 0,
            running: None,
            steps: 0,
            flights: 0,
            calls: BTreeMap::new(),
            next_shard: 0,
            peers: vec![Peer::default(); workers],
            placement: Placement::from_holdings(Epoch::new(0), &spec.shape, &[]).unwrap(),
            hops: Vec::new(),
            version: 0,
            parked: None,
            poke_at: None,
            hedges: vec![Hedge::new(Rules::default()); workers],
            budget: Budget::default(),
            leader: Leader::new(&name, spec),
            woke: 0,
        }
    }

    pub(crate) fn may_connect(&self, worker: usize, now: Time) -> bool {
        now >= self.peers[worker].banned_until
    }

    pub(crate) fn connected(&mut self, worker: usize, session: u64, life: u64) {
        let peer = &mut self.peers[worker];
        let banned_until = peer.banned_until;
        *peer = Peer { up: true, session, life, banned_until, ..Peer::default() };
    }

    pub(crate) fn is_at_rest(&self) -> bool {
        let stats = self.scheduler.stats();
        self.active.is_empty()
            && self.running.is_none()
            && self.scheduler.is_idle()
            && stats.blocks_free == stats.blocks_total
            && self.calls.is_empty()
            && self.placement.is_complete()
    }

    /// What keeps it from being at rest.
    pub(crate) fn describe(&self) -> String {
        let Self { name, active, parked, leader, hops, .. } = self;
        let missing = self.placement.missing();
        format!(
            "{name}: active {active:?} parked {parked:?} missing {missing:?} hops {hops:?} leader {leader:?}"
        )
    }

    fn rank(&self, worker: WorkerIx) -> Rank {
        let peer = &self.peers[self.hops[worker.index()].0];
        if peer.draining || !peer.late.is_empty() { Rank::Poor } else { Rank::Good }
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
            ToRouter::Outputs { id, flight, rows, finite } => {
                self.take_outputs(number, worker, id, flight, rows, finite);
            }
            ToRouter::NotHeld { id } => self.part_failed(number, id),
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
            RouterTimer::Due { flight, lane } => {
                if self.flight(number, lane).is_some_and(|open| open.number == flight) {
                    self.advance(number, lane);
                }
            }
            RouterTimer::Tick => self.tick(number),
            RouterTimer::CloseRound => self.close_round(number),
            RouterTimer::Stirred => self.stirred(number),
            RouterTimer::Send { orders } => self.send_orders(number, orders),
        }
    }

    fn flight(&mut self, number: usize, lane: usize) -> Option<&mut Flight> {
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
        let peer = &mut router.peers[worker];
        peer.up = false;
        peer.late.clear();
        self.stir(number);
        self.note("broken", number, worker as u64, session);
        let open =
            |part: &Part| part.worker == worker && part.session == session && part.state == State::Waiting;
        let router = &mut self.routers[number];
        let lanes = router.running.iter_mut().flat_map(|running| &mut running.lanes);
        for part in lanes.filter_map(|lane| lane.flight.as_mut()).flat_map(|flight| &mut flight.parts) {
            if open(part) {
                part.state = State::Failed;
                self.counts.parts_lost += 1;
            }
        }
        self.after(RETRY, Event::Connect { router: number, worker, life });
        self.routes_changed(number);
    }

    /// Makes the routes anew, and sees what becomes possible, or impossible, by that.
    fn routes_changed(&mut self, number: usize) {
        let ids: Vec<_> = self.workers.iter().map(|worker| worker.id.clone()).collect();
        let router = &mut self.routers[number];
        router.version += 1;
        let live = router.peers.iter().enumerate().filter(|(_, peer)| peer.up && peer.epoch > 0);
        let live: Vec<_> = live.collect();
        let holdings: Vec<_> =
            live.iter().map(|&(n, peer)| (ids[n].clone(), peer.held.iter().copied().collect())).collect();
        router.hops = live.iter().map(|&(n, peer)| (n, peer.session, peer.epoch)).collect();
        let epoch = Epoch::new(router.version);
        router.placement = Placement::from_holdings(epoch, &self.spec.shape, &holdings).unwrap();
        for lane in 0..2 {
            if self.flight(number, lane).is_some() {
                self.advance(number, lane);
            }
        }
        self.poke(number);
    }

    // Steps.

    pub(crate) fn admit(&mut self, number: usize, request: usize) -> bool {
        let Request { prompt, max_tokens, .. } = &self.requests[request];
        let router = &mut self.routers[number];
        let id = SeqId::new(router.next_sequence);
        let new = NewSequence { id, prompt: prompt.clone(), max_tokens: *max_tokens };
        if router.scheduler.admit(new).is_err() {
            return false;
        }
        router.next_sequence += 1;
        let (tokens, prompt) = (prompt.clone(), prompt.len());
        let tables = vec![Vec::new(); self.spec.groups.reaches().len()];
        router.active.insert(id, Active { request, tokens, prompt, computed: 0, tables, stalled: None });
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
        let over = |&mut (version, until): &mut (u64, Time)| version != router.version || self.now >= until;
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
        let chosen: Vec<_> = lane.rows.iter().flat_map(|&(_, _, row)| toy.choose(layer, row)).collect();
        let items: Vec<usize> = lane.rows.iter().map(|row| row.0).collect();
        let weights = vec![1.0; chosen.len()];
        let choices = Choices::new(toy.k, chosen, weights).unwrap();
        let deadline = self.now + EXPERT_TIMEOUT;
        let router = &self.routers[number];
        let planned = group(toy.layer(layer), &choices, &router.placement, &|worker| router.rank(worker));
        match planned {
            Ok(plan) => {
                let router = &mut self.routers[number];
                router.flights += 1;
                let flight =
                    Flight::new(router.flights, toy.layer(layer), choices, plan, deadline, router.version);
                let shards = flight.first_shards();
                let Some(running) = &mut router.running else { return };
                running.lanes[at].flight = Some(flight);
                for shard in shards {
                    self.send_shard(number, at, shard, None);
                }
                self.advance(number, at);
            }
            Err(DispatchError::NoOwner { expert, .. }) => {
                let rows = choices.experts().chunks(toy.k).zip(items);
                let wanting = rows.filter(|(experts, _)| experts.contains(&expert)).map(|(_, item)| item);
                let wanting = wanting.collect();
                self.fail_lane(number, at, Some(&wanting));
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn patience(&self, number: usize, worker: usize, rows: usize) -> Time {
        self.routers[number].hedges[worker].deadline(rows as u32).as_micros() as Time
    }

    /// Sends a shard; `of` says which part it stands in for, and at which places.
    fn send_shard(&mut self, number: usize, lane: usize, plan: ShardPlan, of: Option<(usize, Vec<u32>)>) {
        let (worker, session, epoch) = self.routers[number].hops[plan.worker.index()];
        let peer = &self.routers[number].peers[worker];
        let announced = &self.announced[&(worker, peer.life, epoch)];
        assert!(peer.epoch == epoch && peer.session == session, "holder-only: routes that are out of date");
        let router = &mut self.routers[number];
        router.next_shard += 1;
        let id = router.next_shard;
        let Some(running) = &router.running else { return };
        let rows = &running.lanes[lane].rows;
        let Some(flight) = &running.lanes[lane].flight else { return };
        let layer = flight.layer;
        let key = |expert| ExpertKey { layer, expert };
        let content = pairs(&plan).map(|(row, expert)| (rows[row as usize].2, key(expert))).collect();
        for &expert in &plan.experts {
            assert!(
                announced.contains(&key(expert)),
                "holder-only: rows for {} go to worker {worker}, which does not announce it",
                key(expert)
            );
        }
        let shard = Shard { id, flight: flight.number, epoch, pairs: content };
        let due = self.now + self.patience(number, worker, plan.rows.len());
        let (now, stand_in) = (self.now, of.as_ref().map(|(part, _)| *part));
        let Some(flight) = self.flight(number, lane) else { return };
        let part = flight.parts.len();
        flight.parts.push(Part {
            id,
            worker,
            session,
            plan,
            since: now,
            due,
            state: State::Waiting,
            stand_ins: Vec::new(),
            alone: false,
            hedged: false,
            deferred: false,
            of,
        });
        if let Some(of) = stand_in {
            let asked = flight.asked(of);
            assert!(!asked.contains(&worker), "every-pair-once: worker {worker} is asked twice for the same");
            flight.parts[of].stand_ins.push(part);
        }
        self.routers[number].calls.insert(id, (lane, part));
        self.send_to_worker(number, worker, session, ToWorker::Shard(shard));
    }

    fn take_outputs(
        &mut self,
        number: usize,
        worker: usize,
        id: u64,
        flight: u64,
        rows: Vec<u64>,
        finite: bool,
    ) {
        let now = self.now;
        self.routers[number].peers[worker].late.remove(&id);
        let Some(&(lane, part)) = self.routers[number].calls.get(&id) else {
            self.counts.late_replies += 1;
            return;
        };
        let Some(open) = self.flight(number, lane) else {
            panic!("late-never-combined: a call without a flight")
        };
        assert_eq!(open.number, flight, "late-never-combined: a reply to another flight");
        let Part { plan, since, state, .. } = &mut open.parts[part];
        if rows.len() != plan.indices.len() || !finite {
            self.counts.refused_replies += 1;
            return self.ban(number, worker, id);
        }
        let (size, took) = (plan.rows.len() as u32, Duration::from_micros(now - *since));
        if *state == State::Waiting {
            *state = State::Arrived(rows);
        }
        self.routers[number].hedges[worker].observe(size, took);
        self.routers[number].budget.sent();
        self.advance(number, lane);
    }

    /// A worker broke the protocol: nothing it says is used for a while.
    fn ban(&mut self, number: usize, worker: usize, id: u64) {
        let peer = &mut self.routers[number].peers[worker];
        peer.banned_until = self.now + BAN;
        let session = peer.session;
        self.links[number][worker].up = false;
        self.note("banned", number, worker as u64, id);
        self.broken(number, worker, session);
    }

    fn part_failed(&mut self, number: usize, id: u64) {
        let Some(&(lane, part)) = self.routers[number].calls.get(&id) else { return };
        let Some(flight) = self.flight(number, lane) else { return };
        flight.parts[part].state = State::Failed;
        self.advance(number, lane);
    }

    /// Sees how a lane's flight stands, and does what follows.
    fn advance(&mut self, number: usize, lane: usize) {
        let (now, version) = (self.now, self.routers[number].version);
        let Some(flight) = self.flight(number, lane) else { return };
        if flight.parts.len() < flight.first_shards().len() {
            // Still being sent.
            return;
        }
        if flight.standing() == Standing::Complete {
            return self.combine(number, lane);
        }
        flight.look_again(version);
        for part in flight.to_replace(now) {
            self.replace(number, lane, part);
        }
        let Some(flight) = self.flight(number, lane) else { return };
        if flight.standing() == Standing::Lost {
            self.counts.flights_lost += 1;
            return self.fail_lane(number, lane, None);
        }
        if now >= flight.deadline {
            self.counts.deadlines += 1;
            return self.fail_lane(number, lane, None);
        }
        let until = flight.next_due().map_or(flight.deadline, |due| due.min(flight.deadline));
        let due = RouterTimer::Due { flight: flight.number, lane };
        self.timer(number, until, due);
    }

    /// Asks others for what failed or is late.
    fn replace(&mut self, number: usize, lane: usize, part: usize) {
        let Some(flight) = self.flight(number, lane) else { return };
        let Part { id, worker, state, deferred, plan, .. } = &flight.parts[part];
        let (id, worker, deferred, size) = (*id, *worker, *deferred, plan.rows.len());
        let is_late = *state == State::Waiting;
        if is_late {
            self.routers[number].peers[worker].late.insert(id);
            if !deferred && !self.routers[number].budget.take() {
                let more = self.patience(number, worker, size) * 3;
                let Some(flight) = self.flight(number, lane) else { return };
                flight.parts[part].deferred = true;
                flight.parts[part].due += more;
                return;
            }
        }
        let router = &mut self.routers[number];
        let Router { running, placement, hops, peers, .. } = router;
        let names: Vec<usize> = hops.iter().map(|&(worker, ..)| worker).collect();
        let rank = |worker: WorkerIx| {
            let peer: &Peer = &peers[names[worker.index()]];
            if peer.draining || !peer.late.is_empty() { Rank::Poor } else { Rank::Good }
        };
        let Some(flight) = running.as_mut().and_then(|running| running.lanes[lane].flight.as_mut()) else {
            return;
        };
        let Some(planned) = flight.plan_stand_ins(part, placement, &names, &rank) else { return };
        flight.parts[part].hedged = is_late;
        self.counts.hedged += u64::from(is_late);
        self.counts.stand_ins += planned.len() as u64;
        for stand_in in planned {
            self.send_shard(number, lane, stand_in.plan, Some((part, stand_in.places)));
        }
    }

    /// Forgets a flight's calls; what still comes is late.
    fn close(&mut self, number: usize, lane: usize) -> Option<Flight> {
        let running = self.routers[number].running.as_mut()?;
        let flight = running.lanes[lane].flight.take()?;
        for part in &flight.parts {
            self.routers[number].calls.remove(&part.id);
        }
        Some(flight)
    }

    fn combine(&mut self, number: usize, at: usize) {
        let Some(flight) = self.close(number, at) else { return };
        for part in flight.parts.iter().filter(|part| part.hedged) {
            let arrived = matches!(part.state, State::Arrived(_));
            let outcome = if arrived { Outcome::Wasted } else { Outcome::Won };
            self.routers[number].hedges[part.worker].hedged(part.plan.rows.len() as u32, outcome);
        }
        let outputs = flight.outputs();
        let layers = self.spec.toy.layers();
        let Some(running) = &mut self.routers[number].running else { return };
        let (step, lane) = (running.number, &mut running.lanes[at]);
        for ((_, _, row), outputs) in lane.rows.iter_mut().zip(outputs) {
            *row = Toy::combine(*row, outputs.into_iter());
        }
        lane.layer += 1;
        if lane.layer == layers {
            lane.done = true;
            return self.emit_if_done(number);
        }
        let at_time = self.now + self.spec.attention;
        self.timer(number, at_time, RouterTimer::Attended { step, lane: at });
    }

    /// A lane ends without results; `wanting` are the items whose own experts nobody holds, where that is why.
    fn fail_lane(&mut self, number: usize, at: usize, wanting: Option<&BTreeSet<usize>>) {
        self.close(number, at);
        let Some(running) = &mut self.routers[number].running else { return };
        let lane = &mut running.lanes[at];
        let is_wanting = |item| wanting.is_none_or(|wanting| wanting.contains(&item));
        let failure =
            |&item: &usize| (item, if is_wanting(item) { Failure::Experts } else { Failure::Interrupted });
        lane.failed = lane.items.iter().map(failure).collect();
        lane.done = true;
        self.emit_if_done(number);
    }

    /// Once all lanes have ended: tokens, ends, and what is to be done again.
    fn emit_if_done(&mut self, number: usize) {
        let running = &mut self.routers[number].running;
        let Some(Running { started, step, lanes, .. }) =
            running.take_if(|running| running.lanes.iter().all(|lane| lane.done))
        else {
            return;
        };
        for lane in &lanes {
            for &at in &lane.items {
                let item = &step.items[at];
                if let Some(&failure) = lane.failed.get(&at) {
                    self.set_back(number, item, failure, started);
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
        assert_eq!(Some(&token), expected, "same-output: request {} of {}", active.request, router.name);
        if progress == muster_engine::scheduler::Progress::LengthReached {
            let request = self.remove(number, id);
            self.end(request, &tokens);
        }
    }

    /// A sequence that got nothing from a step: it waits, or its request has waited long enough.
    fn set_back(&mut self, number: usize, item: &StepItem, failure: Failure, started: Time) {
        let (now, block_tokens) = (self.now, self.spec.scheduler.block_tokens.get());
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
        if failure == Failure::Interrupted || stalled < EXPERT_TIMEOUT {
            let kept = item.start.div_ceil(block_tokens) as usize;
            active.tables.iter_mut().for_each(|table| table.truncate(kept));
            active.computed = item.start;
            router.scheduler.undo(item);
            if failure == Failure::Experts {
                router.scheduler.park(item.seq);
                let version = router.version;
                router.parked.get_or_insert((version, now + PARKED_FOR));
                self.counts.parked += 1;
            }
            return;
        }
        // The client is told to try again later.
        let request = self.remove(number, item.seq);
        self.requests[request].at = None;
        self.counts.out_of_patience += 1;
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
