//! A worker: grants the lease, carries out orders, loads, serves what it holds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZero;
use std::time::Duration;

use muster_placement::leader::OrderId;
use muster_placement::lease::{Grant, Term};
use muster_placement::split;
use muster_types::{Epoch, ExpertKey, Fault, FaultKind, NumericsClass, Speed, WorkerId};

use crate::toy::Toy;
use crate::wire::{ToyRows, weighted};
use crate::world::{Event, MS, Order, Process, QUIET, Shard, Time, ToRouter, ToWorker, WorkerTimer, World};

#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) process: Process,
    pub(crate) id: WorkerId,
    pub(crate) class: NumericsClass,
    pub(crate) capacity: u64,
    speed: u64,
    pub(crate) domain: Option<String>,
    /// How long an expert takes to load.
    load_time: Time,
    pub(crate) epoch: u64,
    copies: BTreeMap<ExpertKey, Copy>,
    /// What is being loaded, and the number of that.
    loading: Option<(ExpertKey, u64)>,
    loads: u64,
    to_load: VecDeque<ExpertKey>,
    pub(crate) grant: Grant,
    /// The last orders.
    last: Option<(Term, u64)>,
    /// Rows that experts got since it started, by layer and expert.
    pub(crate) rows: Vec<Vec<u64>>,
    pub(crate) draining: bool,
    told_to_hold_nothing: bool,
    busy_until: Time,
    pub(crate) lies_until: Time,
}

#[derive(Debug, Clone, Copy)]
enum Copy {
    /// Announced first in this epoch.
    Announced(u64),
    /// Announced to be held no more; released then.
    Withdrawn(Time),
}

impl Worker {
    pub(crate) fn new(
        number: usize,
        class: NumericsClass,
        capacity: u64,
        speed: u64,
        domain: Option<String>,
        load_time: Time,
    ) -> Self {
        Self {
            process: Process::default(),
            id: WorkerId::new(&format!("w{number}")).unwrap(),
            class,
            capacity,
            speed,
            domain,
            load_time,
            epoch: 0,
            copies: BTreeMap::new(),
            loading: None,
            loads: 0,
            to_load: VecDeque::new(),
            grant: Grant::default(),
            last: None,
            rows: Vec::new(),
            draining: false,
            told_to_hold_nothing: false,
            busy_until: 0,
            lies_until: 0,
        }
    }

    pub(crate) fn speed(&self) -> Speed {
        Speed::new(self.speed as f64).unwrap()
    }

    pub(crate) fn holds(&self, key: ExpertKey) -> bool {
        matches!(self.copies.get(&key), Some(Copy::Announced(_)))
    }

    /// Rows for an expert, if it serves that.
    pub(crate) fn count(&mut self, key: ExpertKey, rows: u64) {
        if self.holds(key) {
            self.rows[key.layer.index()][key.expert.index()] += rows;
        }
    }

    pub(crate) fn held(&self) -> BTreeSet<ExpertKey> {
        self.copies.keys().copied().filter(|&key| self.holds(key)).collect()
    }
}

impl World {
    pub(crate) fn start_worker(&mut self, number: usize) {
        let all = NonZero::new(self.workers.len() as u32).unwrap();
        let worker = &mut self.workers[number];
        let life = worker.process.start();
        worker.grant = Grant::default();
        (worker.epoch, worker.last, worker.draining, worker.told_to_hold_nothing) = (1, None, false, false);
        (worker.busy_until, worker.lies_until, worker.loading) = (self.now, 0, None);
        worker.to_load.clear();
        worker.copies.clear();
        worker.rows = self.spec.shape.experts().iter().map(|&of| vec![0; of as usize]).collect();
        if self.spec.starts_with_share {
            let share = split(&self.spec.shape, all, number as u32).unwrap();
            worker.copies = share.into_iter().map(|key| (key, Copy::Announced(1))).collect();
        }
        self.announced.insert((number, life, 1), self.workers[number].held());
        self.note("worker started", number, life, 0);
    }

    /// A worker is gone, with all it held.
    pub(crate) fn kill_worker(&mut self, number: usize) {
        for key in self.workers[number].held() {
            self.died_with.insert(key, self.now);
        }
        self.workers[number].process.die();
        (0..self.routers.len()).for_each(|router| self.cut(router, number));
        self.note("worker gone", number, 0, 0);
    }

    pub(crate) fn at_worker(&mut self, router: usize, number: usize, session: u64, message: ToWorker) {
        match message {
            ToWorker::Shard(shard) => self.compute(router, number, session, &shard),
            ToWorker::Ask { round, ask } => {
                let now = Duration::from_micros(self.now);
                let name = self.routers[router].name.clone();
                let worker = &mut self.workers[number];
                let reply = worker.grant.ask(now, &name, ask);
                let epoch = worker.epoch;
                self.send_to_router(router, number, session, ToRouter::Granted { round, reply, epoch });
            }
            ToWorker::Orders(order) => self.obey(router, number, session, &order),
        }
    }

    fn compute(&mut self, router: usize, number: usize, session: u64, shard: &Shard) {
        let lies = self.now < self.workers[number].lies_until;
        let worker = &mut self.workers[number];
        assert!(
            shard.epoch <= worker.epoch,
            "epochs-monotone: rows by an epoch that worker {number} never had"
        );
        let answer = |outcome| ToRouter::Answer { id: shard.id, outcome };
        let missing = shard.pairs.iter().find(|(_, key)| !worker.copies.contains_key(key));
        if let Some(&(_, key)) = missing {
            self.counts.not_held += 1;
            let fault = Fault::of_expert(FaultKind::NotHeld, key.expert.get(), format!("{key} is not held"));
            return self.send_to_router(router, number, session, answer(Err(fault)));
        }
        shard.pairs.iter().for_each(|&(_, key)| worker.count(key, 1));
        let experts: BTreeSet<_> = shard.pairs.iter().map(|&(_, key)| key).collect();
        let cost = (experts.len() as u64 * 900 + shard.pairs.len() as u64 * 60) / worker.speed + 100;
        worker.busy_until = worker.busy_until.max(self.now) + cost;
        let done = worker.busy_until;
        if worker.draining {
            self.counts.served_draining += 1;
        }
        let outputs = ToyRows { rows: outputs(shard, worker.class), marks: Vec::new(), is_sound: true };
        let message = if lies { self.lie(number, shard, outputs) } else { answer(Ok(outputs)) };
        let life = self.workers[number].process.life;
        let timer = WorkerTimer::Computed { router, session, message };
        self.at(done, Event::WorkerTimer { worker: number, life, timer });
    }

    /// What a worker says that lies.
    fn lie(&mut self, number: usize, shard: &Shard, mut outputs: ToyRows) -> ToRouter {
        self.counts.lies += 1;
        // One time in four it says nothing but that it fails.
        if self.workers[number].lies_until.is_multiple_of(4) {
            let fault = Fault::new(FaultKind::Internal, "as a lie");
            return ToRouter::Answer { id: shard.id, outcome: Err(fault) };
        }
        let (mut id, kind) = (shard.id, self.rng.below(6));
        match kind {
            0 => outputs.rows.truncate(outputs.rows.len() - 1),
            1 => outputs.is_sound = false,
            // Something that nobody asked for, and then nothing.
            2 => id += 1_000_000_000,
            3 => outputs.marks = vec![self.rng.below(outputs.rows.len()) as u32],
            4 => {
                let (_, key) = shard.pairs[self.rng.below(shard.pairs.len())];
                let fault = Fault::of_expert(FaultKind::NonFinite, key.expert.get(), "as a lie");
                return ToRouter::Answer { id, outcome: Err(fault) };
            }
            _ => {
                let kinds = [FaultKind::BadRequest, FaultKind::Internal, FaultKind::Overloaded];
                let kind = kinds[self.rng.below(kinds.len())];
                return ToRouter::Answer { id, outcome: Err(Fault::new(kind, "as a lie")) };
            }
        }
        ToRouter::Answer { id, outcome: Ok(outputs) }
    }

    pub(crate) fn worker_timer(&mut self, number: usize, timer: WorkerTimer) {
        match timer {
            WorkerTimer::Computed { router, session, message } => {
                self.send_to_router(router, number, session, message);
            }
            WorkerTimer::Loaded { load } => {
                let worker = &mut self.workers[number];
                let Some((key, _)) = worker.loading.take_if(|(_, number)| *number == load) else { return };
                if self.now < QUIET && self.rng.chance(4) {
                    // Its source has gone; it waits to be told of another.
                    self.counts.failed_loads += 1;
                } else {
                    worker.copies.insert(key, Copy::Announced(worker.epoch + 1));
                    self.counts.loaded += 1;
                    self.announce(number);
                }
                self.load_next(number);
            }
            WorkerTimer::Released { key, at } => {
                let worker = &mut self.workers[number];
                if matches!(worker.copies.get(&key), Some(Copy::Withdrawn(until)) if *until == at) {
                    worker.copies.remove(&key);
                    self.note("released", number, u64::from(key.layer.get()), u64::from(key.expert.get()));
                }
                self.load_next(number);
                self.leave_if_done(number);
            }
        }
    }

    fn obey(&mut self, router: usize, number: usize, session: u64, order: &Order) {
        let Order { id, seen, orders, .. } = order;
        let OrderId { term, number: operation, .. } = *id;
        let worker = &self.workers[number];
        let name = &self.routers[router].name;
        let refusal = ToRouter::Obeyed { id: id.clone(), epoch: None };
        if !worker.grant.obeys(name, term) {
            self.counts.stale_orders += 1;
            self.note("stale orders", number, term.get(), router as u64);
            return self.send_to_router(router, number, session, refusal);
        }
        assert!(
            term == worker.grant.term() && worker.last.is_none_or(|(last, _)| last <= term),
            "terms-fenced: worker {number} follows orders of term {term} after those of a later one"
        );
        if worker.last.is_some_and(|last| last > (term, operation)) {
            self.counts.overtaken_orders += 1;
            return self.send_to_router(router, number, session, refusal);
        }
        self.counts.repeated_orders += u64::from(worker.last == Some((term, operation)));
        let desired: BTreeSet<_> = orders.keep.iter().chain(&orders.load).copied().collect();
        let bytes: u64 = desired.iter().map(|key| self.spec.sizes.get(worker.class, key.layer)).sum();
        assert!(bytes <= worker.capacity, "capacity: worker {number} is told to hold {bytes} bytes");
        let gone = |(&key, copy): (&ExpertKey, &Copy)| {
            let known = matches!(copy, Copy::Announced(since) if Epoch::new(*since) <= *seen);
            (known && !desired.contains(&key)).then_some(key)
        };
        let gone: Vec<_> = worker.copies.iter().filter_map(gone).collect();
        let back: Vec<_> = desired
            .iter()
            .copied()
            .filter(|key| worker.copies.contains_key(key) && !worker.holds(*key))
            .collect();
        for &key in &gone {
            self.check_release(number, key, order);
        }
        let (life, now, grace) = (self.workers[number].process.life, self.now, self.spec.grace);
        let worker = &mut self.workers[number];
        for &key in &gone {
            worker.copies.insert(key, Copy::Withdrawn(now + grace));
        }
        for &key in &back {
            worker.copies.insert(key, Copy::Announced(worker.epoch + 1));
        }
        worker.last = Some((term, operation));
        worker.to_load = orders.load.iter().copied().filter(|key| !worker.copies.contains_key(key)).collect();
        if worker.loading.is_some_and(|(key, _)| !desired.contains(&key)) {
            worker.loading = None;
        }
        worker.told_to_hold_nothing = desired.is_empty();
        for &key in &gone {
            let timer = WorkerTimer::Released { key, at: now + grace };
            self.after(grace, Event::WorkerTimer { worker: number, life, timer });
        }
        if !gone.is_empty() || !back.is_empty() {
            self.counts.withdrawn += gone.len() as u64;
            self.announce(number);
        }
        let epoch = self.workers[number].epoch;
        self.note("obeyed", number, term.get(), operation);
        self.tell(|| format!("w{number} at epoch {epoch}: {orders:?}, seen {seen}"));
        let message = ToRouter::Obeyed { id: id.clone(), epoch: Some(epoch) };
        self.send_to_router(router, number, session, message);
        self.load_next(number);
        self.leave_if_done(number);
    }

    /// A copy is about to go on orders: another must be there, unless whoever had it has died.
    fn check_release(&self, number: usize, key: ExpertKey, order: &Order) {
        let others = self.workers.iter().enumerate();
        let is_held = others
            .filter(|&(other, worker)| other != number && worker.process.alive)
            .any(|(_, worker)| worker.holds(key));
        if is_held {
            return;
        }
        let relied = order.relied.get(&key);
        let has_died = relied.is_some_and(|relied| {
            let gone = |&(other, life): &(usize, u64)| {
                let process = &self.workers[other].process;
                !process.alive || process.life != life
            };
            relied.on.iter().any(gone) || self.died_with.get(&key).is_some_and(|&died| died >= relied.at)
        });
        assert!(
            has_died,
            "one-holder-before-release: worker {number} is told to give up {key}, which nobody else holds; \
             the leader counted on {relied:?}"
        );
    }

    /// Loads what comes next, if there is memory for it by now.
    fn load_next(&mut self, number: usize) {
        let (life, sizes) = (self.workers[number].process.life, &self.spec.sizes);
        let worker = &mut self.workers[number];
        let mut used: u64 = worker.copies.keys().map(|key| sizes.get(worker.class, key.layer)).sum();
        if worker.loading.is_none()
            && let Some(&key) = worker.to_load.front()
            && used + sizes.get(worker.class, key.layer) <= worker.capacity
        {
            worker.to_load.pop_front();
            worker.loads += 1;
            worker.loading = Some((key, worker.loads));
            let (delay, load) = (worker.load_time, worker.loads);
            let timer = WorkerTimer::Loaded { load };
            self.after(delay, Event::WorkerTimer { worker: number, life, timer });
        }
        let worker = &self.workers[number];
        used += worker.loading.map_or(0, |(key, _)| self.spec.sizes.get(worker.class, key.layer));
        assert!(used <= worker.capacity, "capacity: worker {number} has {used} bytes in memory");
    }

    /// A draining worker that was told to hold nothing, and does not, goes.
    fn leave_if_done(&mut self, number: usize) {
        let worker = &self.workers[number];
        if worker.draining
            && worker.told_to_hold_nothing
            && worker.copies.is_empty()
            && worker.busy_until <= self.now
        {
            self.counts.left += 1;
            self.kill_worker(number);
            self.after(500 * MS, Event::Fault(crate::faults::Fault::StartWorker(number)));
        }
    }

    pub(crate) fn drain(&mut self, number: usize) {
        self.workers[number].draining = true;
        self.announce(number);
    }

    /// Tells all routers what it holds now.
    fn announce(&mut self, number: usize) {
        let worker = &mut self.workers[number];
        worker.epoch += 1;
        let (life, epoch) = (worker.process.life, worker.epoch);
        let held = worker.held();
        self.note("announced", number, epoch, held.len() as u64);
        self.announced.insert((number, life, epoch), held);
        (0..self.routers.len()).for_each(|router| self.announce_to(router, number));
    }

    pub(crate) fn announce_to(&mut self, router: usize, number: usize) {
        let Worker { epoch, draining, .. } = self.workers[number];
        let message = ToRouter::Announce { epoch, held: self.workers[number].held(), draining };
        let session = self.links[router][number].session;
        self.send_to_router(router, number, session, message);
    }
}

/// What a shard's experts make of its rows on a device of this class: every output, or their weighted sums row by row.
fn outputs(shard: &Shard, class: NumericsClass) -> Vec<u64> {
    let output = |&(index, key): &(u32, ExpertKey)| Toy::output(key, shard.rows[index as usize], class);
    if shard.weights.is_empty() {
        return shard.pairs.iter().map(output).collect();
    }
    let mut sums = vec![0_u64; shard.rows.len()];
    for (pair, &weight) in shard.pairs.iter().zip(&shard.weights) {
        let sum = &mut sums[pair.0 as usize];
        *sum = sum.wrapping_add(weighted(output(pair), weight));
    }
    sums
}
