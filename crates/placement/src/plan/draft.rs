//! The state of a plan in the making.
//!
//! Owns the copies and the split of loads over them. What a worker uses is the sum of its copies' bytes; the loads
//! of an expert's copies add up to its own, and each worker's load at a layer is the sum of its copies' there. Only
//! workers that stay are on the draft, by position in ascending order of ids. Changes are logged, and can be undone.
//!
//! Workers are in pools, those of one numerics class together, or all of them where classes may be mixed. All copies of an
//! expert are in one pool.

use std::collections::{BTreeMap, BTreeSet};

use muster_types::{ClassSet, ExpertKey, LayerId, Numerics, NumericsClass, WorkerId};

use super::{Figures, Goals, Holdings, Member};
use crate::binding::rebind;
use crate::{Binding, ExpertSizes, Loads, Shape};

/// The part of a layer's load that is taken to be spread evenly, whatever was counted.
const EVEN_PART: f64 = 0.1;

/// Why a worker has a copy on the draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// It holds it already.
    Held,
    /// The expert's first copy.
    First,
    /// Another copy; its bytes count against the budget.
    Moved,
}

/// Kinds of copies that may be given up for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Give {
    /// Not needed for the goals, nor for an even load.
    Idle,
    /// Not the last, nor needed for an even load.
    Cold,
    /// Not needed for the goals.
    Surplus,
    /// Not the last.
    Shared,
}

/// A copy of an expert.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replica {
    pub(super) worker: usize,
    /// The part of the expert's load that it takes.
    pub(super) load: f64,
    origin: Origin,
}

/// One expert.
#[derive(Debug)]
pub(super) struct Expert {
    pub(super) key: ExpertKey,
    pub(super) load: f64,
    /// The pool to keep it in, if there is one.
    pub(super) home: Option<usize>,
    /// Ascending by worker.
    pub(super) copies: Vec<Replica>,
}

impl Expert {
    pub(super) fn on(&self, worker: usize) -> Option<&Replica> {
        self.copies.iter().find(|copy| copy.worker == worker)
    }
}

/// One layer.
#[derive(Debug)]
pub(super) struct Layer {
    /// Bytes of one expert, by class.
    bytes: [u64; NumericsClass::ALL.len()],
    pub(super) experts: Vec<Expert>,
    /// Load by worker.
    busy: Vec<f64>,
}

/// A value for a zone and for a machine in it. For a name without a `/` both are the same.
pub(super) type Domains<T> = [T; 2];

/// Distance of a worker from the copies of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Nearness {
    /// None is in its zone.
    OtherZone,
    /// One is in its zone, none on its machine.
    SameZone,
    /// One is on its machine.
    SameMachine,
}

/// Copies of an expert, and the failure domains they are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spread {
    copies: usize,
    domains: Domains<usize>,
}

/// One worker that stays.
#[derive(Debug)]
pub(super) struct Bin<'a> {
    class: NumericsClass,
    pub(super) pool: usize,
    pub(super) capacity: u64,
    pub(super) used: u64,
    pub(super) speed: f64,
    /// Its failure domains, the widest first.
    pub(super) domains: Domains<usize>,
    pub(super) keys: BTreeSet<ExpertKey>,
    pub(super) held: &'a BTreeSet<ExpertKey>,
}

/// Workers that may share an expert.
#[derive(Debug, Clone, Copy, Default)]
struct Pool {
    workers: usize,
    /// How many failure domains they have.
    domains: Domains<usize>,
}

impl Bin<'_> {
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.used.checked_add(bytes).is_some_and(|used| used <= self.capacity)
    }
}

/// A change that can be undone.
#[derive(Debug, Clone, Copy)]
enum Change {
    Added(ExpertKey, usize),
    Dropped(ExpertKey, usize, Origin),
}

/// The state of a plan in the making.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    pub(super) layers: Vec<Layer>,
    pub(super) bins: Vec<Bin<'a>>,
    pub(super) hysteresis: f64,
    min_replicas: usize,
    pools: [Pool; NumericsClass::ALL.len()],
    /// Speed of all bins.
    speed: f64,
    first_bytes: u64,
    moved_bytes: u64,
    log: Vec<Change>,
    /// Reused: (load over speed, load, speed) of an expert's owners.
    fill: Vec<(f64, f64, f64)>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(
        shape: &Shape,
        sizes: &ExpertSizes,
        members: &'a BTreeMap<WorkerId, Member>,
        loads: &Loads,
        goals: &Goals,
        binding: &Binding,
    ) -> Self {
        let bins = bins(members, binding.numerics());
        let layers = shape.layers().map(|(layer, _)| Layer {
            bytes: NumericsClass::ALL.map(|class| sizes.get(class, layer)),
            experts: experts(shape, layer, loads),
            busy: vec![0.0; bins.len()],
        });
        let hysteresis = if goals.hysteresis.is_nan() { 0.0 } else { goals.hysteresis.clamp(0.0, 1.0) };
        let mut draft = Self {
            layers: layers.collect(),
            hysteresis,
            min_replicas: goals.min_replicas.get() as usize,
            pools: pools(&bins),
            speed: bins.iter().map(|bin| bin.speed).sum(),
            first_bytes: 0,
            moved_bytes: 0,
            log: Vec::new(),
            fill: Vec::new(),
            bins,
        };
        if binding.numerics() == Numerics::Exact {
            draft.settle(members, binding);
        }
        for worker in 0..draft.bins.len() {
            let held = draft.bins[worker].held;
            for &key in held.iter().filter(|&&key| shape.contains(key)) {
                if draft.is_at_home(key, worker) {
                    draft.insert(key, worker, Origin::Held);
                }
            }
        }
        draft.relax_all();
        draft.log.clear();
        draft
    }

    /// Gives every expert the pool of the class that it is bound to, or else of one that holds it.
    fn settle(&mut self, members: &BTreeMap<WorkerId, Member>, binding: &Binding) {
        let mut holders: BTreeMap<ExpertKey, ClassSet> = BTreeMap::new();
        for member in members.values() {
            for &key in &member.held {
                holders.entry(key).or_default().insert(member.class);
            }
        }
        for expert in self.layers.iter_mut().flat_map(|layer| &mut layer.experts) {
            let holders = holders.get(&expert.key).copied().unwrap_or_default();
            expert.home = rebind(binding.of(expert.key), holders).map(NumericsClass::index);
        }
    }

    /// Whether a worker is in the pool that an expert is to stay in, or there is none.
    pub(super) fn is_at_home(&self, key: ExpertKey, worker: usize) -> bool {
        self.expert(key).home.is_none_or(|home| self.bins[worker].pool == home)
    }

    /// The pool that an expert's copies are in.
    fn pool(&self, key: ExpertKey) -> Pool {
        self.expert(key)
            .copies
            .first()
            .map_or_else(Pool::default, |copy| self.pools[self.bins[copy.worker].pool])
    }

    /// Whether a worker may have a copy of an expert beside those there are.
    pub(super) fn may_join(&self, key: ExpertKey, worker: usize) -> bool {
        let first = self.expert(key).copies.first();
        first.is_none_or(|copy| self.bins[copy.worker].pool == self.bins[worker].pool)
    }

    pub(super) fn expert(&self, key: ExpertKey) -> &Expert {
        &self.layers[key.layer.index()].experts[key.expert.index()]
    }

    fn expert_mut(&mut self, key: ExpertKey) -> &mut Expert {
        &mut self.layers[key.layer.index()].experts[key.expert.index()]
    }

    /// What an expert takes of a worker's memory.
    pub(super) fn bytes(&self, key: ExpertKey, worker: usize) -> u64 {
        self.layers[key.layer.index()].bytes[self.bins[worker].class.index()]
    }

    /// What an expert takes on a worker of the class where it takes most.
    pub(super) fn most_bytes(&self, key: ExpertKey) -> u64 {
        self.bins.iter().map(|bin| self.layers[key.layer.index()].bytes[bin.class.index()]).max().unwrap_or(0)
    }

    /// What an expert of a layer takes on a worker of the class where it takes least.
    pub(super) fn least_bytes(&self, layer: usize) -> u64 {
        self.bins.iter().map(|bin| self.layers[layer].bytes[bin.class.index()]).min().unwrap_or(0)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &Expert> {
        self.layers.iter().flat_map(|layer| &layer.experts)
    }

    /// Load over speed of a worker at a layer, if it had `more` load.
    pub(super) fn ratio(&self, layer: usize, worker: usize, more: f64) -> f64 {
        (self.layers[layer].busy[worker] + more) / self.bins[worker].speed
    }

    /// Load of a worker at a layer.
    pub(super) fn busy(&self, layer: usize, worker: usize) -> f64 {
        self.layers[layer].busy[worker]
    }

    /// Load over speed of the layer's busiest worker.
    pub(super) fn peak(&self, layer: usize) -> f64 {
        (0..self.bins.len()).map(|worker| self.ratio(layer, worker, 0.0)).fold(0.0, f64::max)
    }

    /// What `peak` would be if the layer's load were even.
    pub(super) fn mean(&self, layer: usize) -> f64 {
        let load: f64 = self.layers[layer].busy.iter().sum();
        if self.speed > 0.0 { load / self.speed } else { 0.0 }
    }

    /// `peak` in terms of `mean`; 1 is even.
    pub(super) fn excess(&self, layer: usize) -> f64 {
        let mean = self.mean(layer);
        if mean > 0.0 { self.peak(layer) / mean } else { 1.0 }
    }

    pub(super) const fn moved_bytes(&self) -> u64 {
        self.moved_bytes
    }

    // Copies.

    /// Copies of an expert and the failure domains they are on, with the copy on `without` left out.
    fn spread(&self, key: ExpertKey, without: Option<usize>) -> Spread {
        let mut spread = Spread { copies: 0, domains: [0, 0] };
        let owners = &self.expert(key).copies;
        let counted = |copy: &Replica| Some(copy.worker) != without;
        for (n, copy) in owners.iter().enumerate().filter(|(_, copy)| counted(copy)) {
            spread.copies += 1;
            for (level, domains) in spread.domains.iter_mut().enumerate() {
                let domain = self.bins[copy.worker].domains[level];
                let seen =
                    |other: &Replica| counted(other) && self.bins[other.worker].domains[level] == domain;
                *domains += usize::from(!owners[..n].iter().any(seen));
            }
        }
        spread
    }

    /// Whether an expert's copies are on as many domains of each kind as asked, and as there are.
    fn is_spread(&self, key: ExpertKey, domains: Domains<usize>) -> bool {
        self.at_least(domains, self.pool(key).domains)
    }

    /// Whether there are as many domains of each kind as before, or as asked.
    fn at_least(&self, after: Domains<usize>, before: Domains<usize>) -> bool {
        after.iter().zip(before).all(|(&after, before)| after >= self.min_replicas.min(before))
    }

    /// Whether an expert has the copies that were asked for, as far as there are workers for them.
    pub(super) fn is_replicated(&self, key: ExpertKey) -> bool {
        let Spread { copies, domains } = self.spread(key, None);
        copies >= self.min_replicas.min(self.pool(key).workers) && self.is_spread(key, domains)
    }

    /// Whether another copy would help the goals only on a failure domain of its own.
    pub(super) fn needs_domain(&self, key: ExpertKey) -> bool {
        self.expert(key).copies.len() >= self.min_replicas.min(self.pool(key).workers)
    }

    /// Whether a copy on this worker would bring an expert nearer to what was asked for.
    pub(super) fn is_asked_for(&self, key: ExpertKey, worker: usize) -> bool {
        if !self.needs_domain(key) {
            return !self.is_replicated(key);
        }
        let (domains, pool) = (self.spread(key, None).domains, self.pool(key));
        (0..domains.len()).any(|level| {
            domains[level] < self.min_replicas.min(pool.domains[level]) && !self.shares(key, worker, level)
        })
    }

    /// Whether a copy is on this worker's domain of that level.
    fn shares(&self, key: ExpertKey, worker: usize, level: usize) -> bool {
        let domain = self.bins[worker].domains[level];
        self.expert(key).copies.iter().any(|copy| self.bins[copy.worker].domains[level] == domain)
    }

    pub(super) fn nearness(&self, key: ExpertKey, worker: usize) -> Nearness {
        match () {
            () if self.shares(key, worker, 1) => Nearness::SameMachine,
            () if self.shares(key, worker, 0) => Nearness::SameZone,
            () => Nearness::OtherZone,
        }
    }

    /// Whether the goals do without this worker's copy. It may stand for a domain only if that is not missed.
    pub(super) fn can_spare(&self, key: ExpertKey, worker: usize) -> bool {
        if self.expert(key).copies.len() <= self.min_replicas {
            return false;
        }
        self.at_least(self.spread(key, Some(worker)).domains, self.spread(key, None).domains)
    }

    /// Whether a copy may go from one worker to another without fewer failure domains than asked for or before.
    pub(super) fn can_move(&self, key: ExpertKey, from: usize, to: usize) -> bool {
        let mut after = self.spread(key, Some(from)).domains;
        for (level, domains) in after.iter_mut().enumerate() {
            let domain = self.bins[to].domains[level];
            let mut others = self.expert(key).copies.iter().filter(|copy| copy.worker != from);
            *domains += usize::from(others.all(|copy| self.bins[copy.worker].domains[level] != domain));
        }
        self.at_least(after, self.spread(key, None).domains)
    }

    /// Gives a worker a copy and a part of the expert's load.
    pub(super) fn add(&mut self, key: ExpertKey, worker: usize, origin: Origin) {
        let held = self.bins[worker].held.contains(&key);
        self.insert(key, worker, if held { Origin::Held } else { origin });
        self.log.push(Change::Added(key, worker));
        self.refill(key);
    }

    /// Takes a copy from a worker; its load goes to the other copies.
    pub(super) fn remove(&mut self, key: ExpertKey, worker: usize) {
        if let Some(origin) = self.take(key, worker) {
            self.log.push(Change::Dropped(key, worker, origin));
            self.refill(key);
        }
    }

    /// The copy exists, but takes no load yet.
    fn insert(&mut self, key: ExpertKey, worker: usize, origin: Origin) {
        let bytes = self.bytes(key, worker);
        let copies = &mut self.expert_mut(key).copies;
        let at = copies.partition_point(|copy| copy.worker < worker);
        copies.insert(at, Replica { worker, load: 0.0, origin });
        let bin = &mut self.bins[worker];
        bin.used += bytes;
        bin.keys.insert(key);
        match origin {
            Origin::Held => {}
            Origin::First => self.first_bytes += bytes,
            Origin::Moved => self.moved_bytes += bytes,
        }
    }

    /// The copy is gone, and so is its load.
    fn take(&mut self, key: ExpertKey, worker: usize) -> Option<Origin> {
        let bytes = self.bytes(key, worker);
        let copies = &mut self.expert_mut(key).copies;
        let at = copies.iter().position(|copy| copy.worker == worker)?;
        let Replica { load, origin, .. } = copies.remove(at);
        let busy = &mut self.layers[key.layer.index()].busy[worker];
        *busy = (*busy - load).max(0.0);
        let bin = &mut self.bins[worker];
        bin.used -= bytes;
        bin.keys.remove(&key);
        match origin {
            Origin::Held => {}
            Origin::First => self.first_bytes -= bytes,
            Origin::Moved => self.moved_bytes -= bytes,
        }
        Some(origin)
    }

    /// Where the log is now.
    pub(super) const fn mark(&self) -> usize {
        self.log.len()
    }

    /// Forgets what could be undone.
    pub(super) fn commit(&mut self) {
        self.log.clear();
    }

    /// Takes back all changes since `mark`, and splits the loads of the layers concerned anew.
    pub(super) fn undo_to(&mut self, mark: usize) {
        let mut touched = BTreeSet::new();
        while self.log.len() > mark {
            let Some(change) = self.log.pop() else { break };
            let key = match change {
                Change::Added(key, worker) => {
                    self.take(key, worker);
                    key
                }
                Change::Dropped(key, worker, origin) => {
                    self.insert(key, worker, origin);
                    key
                }
            };
            self.refill(key);
            touched.insert(key.layer.index());
        }
        for layer in touched {
            self.relax(layer, SWEEPS);
        }
    }

    // Loads.

    /// Splits an expert's load over its copies so that the busiest of them is as little busy as can be. Returns the
    /// load that went from one copy to another.
    fn refill(&mut self, key: ExpertKey) -> f64 {
        let mut shifted = 0.0;
        let level = self.level(key, None);
        let Layer { experts, busy, .. } = &mut self.layers[key.layer.index()];
        for copy in &mut experts[key.expert.index()].copies {
            let base = (busy[copy.worker] - copy.load).max(0.0);
            let load = (level * self.bins[copy.worker].speed - base).max(0.0);
            shifted += (load - copy.load).max(0.0);
            copy.load = load;
            busy[copy.worker] = base + load;
        }
        shifted
    }

    /// Load over speed of the busiest worker that takes of an expert's load, when that is split as evenly as the
    /// workers' other load allows; the copy on `without` left out. Infinite when there is no copy.
    fn level(&mut self, key: ExpertKey, without: Option<usize>) -> f64 {
        let Self { layers, bins, fill, .. } = self;
        let Layer { experts, busy, .. } = &layers[key.layer.index()];
        let expert = &experts[key.expert.index()];
        fill.clear();
        for copy in expert.copies.iter().filter(|copy| Some(copy.worker) != without) {
            let base = (busy[copy.worker] - copy.load).max(0.0);
            let speed = bins[copy.worker].speed;
            fill.push((base / speed, base, speed));
        }
        fill.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let (mut load, mut speed, mut level) = (expert.load, 0.0, f64::INFINITY);
        // Like water: owners are filled up from the emptiest, as far as the load goes.
        for &(ratio, base, owner_speed) in fill.iter() {
            if level <= ratio {
                break;
            }
            load += base;
            speed += owner_speed;
            level = load / speed;
        }
        level
    }

    /// Splits the loads of a layer, one expert after the other, until that hardly changes anything.
    pub(super) fn relax(&mut self, layer: usize, sweeps: usize) {
        for _ in 0..sweeps {
            let mut shifted = 0.0;
            for n in 0..self.layers[layer].experts.len() {
                let expert = &self.layers[layer].experts[n];
                if expert.copies.len() > 1 {
                    shifted += self.refill(expert.key);
                }
            }
            // The load of a layer is 1.
            if shifted <= 1e-5 {
                break;
            }
        }
    }

    pub(super) fn relax_all(&mut self) {
        for layer in 0..self.layers.len() {
            for n in 0..self.layers[layer].experts.len() {
                self.refill(self.layers[layer].experts[n].key);
            }
            self.relax(layer, SWEEPS);
        }
    }

    // Room.

    /// Takes what exceeds a worker's memory: the dispensable first, then the cold.
    pub(super) fn shed_overflow(&mut self) {
        for worker in 0..self.bins.len() {
            if self.bins[worker].has_room(0) {
                continue;
            }
            let rank = |key: ExpertKey| {
                let last = self.expert(key).copies.len() == 1;
                (last, !self.can_spare(key, worker), self.load_on(key, worker))
            };
            let mut keys: Vec<_> = self.bins[worker].keys.iter().map(|&key| (rank(key), key)).collect();
            keys.sort_by(|((last, needed, load), key), (rank, other)| {
                (last, needed).cmp(&(&rank.0, &rank.1)).then(load.total_cmp(&rank.2)).then(key.cmp(other))
            });
            for (_, key) in keys {
                if self.bins[worker].has_room(0) {
                    break;
                }
                self.remove(key, worker);
            }
        }
    }

    fn load_on(&self, key: ExpertKey, worker: usize) -> f64 {
        self.expert(key).on(worker).map_or(0.0, |copy| copy.load)
    }

    /// Makes room for `bytes` on a worker by giving up copies of the kind allowed: those that the goals do without
    /// first, then the least loaded. Changes nothing if that is not enough.
    pub(super) fn make_room(&mut self, worker: usize, bytes: u64, give: Give) -> bool {
        let bin = &self.bins[worker];
        if bytes > bin.capacity || bin.has_room(bytes) {
            return bytes <= bin.capacity;
        }
        let may_give = |&key: &ExpertKey| match give {
            Give::Idle | Give::Surplus => self.can_spare(key, worker),
            Give::Cold | Give::Shared => self.expert(key).copies.len() > 1,
        };
        let victims = bin.keys.iter().copied().filter(may_give);
        let given: u64 = victims.clone().map(|key| self.bytes(key, worker)).sum();
        if bin.used - given > bin.capacity - bytes {
            return false;
        }
        let rank = |key| (!self.can_spare(key, worker), self.load_on(key, worker));
        let mut victims: Vec<_> = victims.map(|key| (rank(key), key)).collect();
        victims.sort_by(|(a, key), (b, other)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(key.cmp(other)));
        let mark = self.mark();
        let mut limits = vec![None; self.layers.len()];
        for (_, key) in victims {
            if self.bins[worker].has_room(bytes) {
                break;
            }
            let layer = key.layer.index();
            let may_rise = match give {
                Give::Idle | Give::Cold => *limits[layer].get_or_insert_with(|| self.may_rise(layer)),
                Give::Surplus | Give::Shared => f64::INFINITY,
            };
            if self.level(key, Some(worker)) <= may_rise {
                self.remove(key, worker);
            }
        }
        let done = self.bins[worker].has_room(bytes);
        if !done {
            self.undo_to(mark);
        }
        done
    }

    /// How busy a worker may get at a layer when others give up copies: even enough, or at least less than the
    /// busiest is by the hysteresis.
    fn may_rise(&self, layer: usize) -> f64 {
        let calm = self.mean(layer) * (1.0 + self.hysteresis / 2.0);
        calm.max(self.peak(layer) * (1.0 - self.hysteresis))
    }

    // The end.

    pub(super) fn figures(&self, uncovered: Vec<ExpertKey>) -> Figures {
        let layers = 0..self.layers.len();
        let mean: f64 = layers.clone().map(|layer| self.mean(layer)).sum();
        let peaks: f64 = layers.clone().map(|layer| self.peak(layer)).sum();
        let sum = |worker| layers.clone().map(|layer| self.ratio(layer, worker, 0.0)).sum::<f64>();
        let peak = (0..self.bins.len()).map(sum).fold(0.0, f64::max);
        let in_means = |peak: f64| if mean > 0.0 { peak / mean } else { 1.0 };
        let is_short = |expert: &&Expert| {
            let Spread { copies, domains } = self.spread(expert.key, None);
            copies > 0 && (copies < self.min_replicas || !self.is_spread(expert.key, domains))
        };
        Figures {
            imbalance: in_means(peak),
            layer_imbalance: in_means(peaks),
            first_bytes: self.first_bytes,
            moved_bytes: self.moved_bytes,
            uncovered,
            under_replicated: self.keys().filter(is_short).map(|expert| expert.key).collect(),
        }
    }

    pub(super) fn into_holdings(self, members: &BTreeMap<WorkerId, Member>) -> Holdings {
        let mut keys = self.bins.into_iter().map(|bin| bin.keys);
        let mut next = |member: &Member| if member.draining { None } else { keys.next() };
        members.iter().map(|(id, member)| (id.clone(), next(member).unwrap_or_default())).collect()
    }
}

/// Sweeps over a layer that split its loads well.
const SWEEPS: usize = 64;

fn bins<'a>(members: &'a BTreeMap<WorkerId, Member>, numerics: Numerics) -> Vec<Bin<'a>> {
    let mut names = [BTreeMap::new(), BTreeMap::new()];
    let mut counts = [0, 0];
    let staying = members.values().filter(|member| !member.draining);
    let bin = |member: &'a Member| {
        let Member { class, capacity, speed, domain, held, .. } = member;
        let pool = match numerics {
            Numerics::Exact => class.index(),
            Numerics::Any => 0,
        };
        let zone = domain.as_deref().map(|name| name.split_once('/').map_or(name, |(zone, _)| zone));
        let mut number = |level: usize, name: Option<&'a str>| {
            let fresh = counts[level];
            let domain = name.map_or(fresh, |name| *names[level].entry(name).or_insert(fresh));
            counts[level] += usize::from(domain == fresh);
            domain
        };
        let domains = [number(0, zone), number(1, domain.as_deref())];
        let (class, capacity, speed) = (*class, *capacity, speed.get());
        Bin { class, pool, capacity, used: 0, speed, domains, keys: BTreeSet::new(), held }
    };
    staying.map(bin).collect()
}

fn pools(bins: &[Bin<'_>]) -> [Pool; NumericsClass::ALL.len()] {
    NumericsClass::ALL.map(|class| {
        let its = bins.iter().filter(|bin| bin.pool == class.index());
        let count = |level: usize| its.clone().map(|bin| bin.domains[level]).collect::<BTreeSet<_>>().len();
        Pool { workers: its.clone().count(), domains: [count(0), count(1)] }
    })
}

fn experts(shape: &Shape, layer: LayerId, loads: &Loads) -> Vec<Expert> {
    let count = shape.experts().get(layer.index()).copied().unwrap_or(0);
    let even = 1.0 / f64::from(count);
    // Loads of another shape say nothing of the experts they lack.
    let mut shares = loads.shares(layer);
    let load = |share: f64| share * (1.0 - EVEN_PART) + even * EVEN_PART;
    let expert = |expert| {
        let load = load(shares.next().unwrap_or(0.0));
        Expert { key: ExpertKey { layer, expert }, load, home: None, copies: Vec::new() }
    };
    muster_types::ExpertId::all(count).map(expert).collect()
}
