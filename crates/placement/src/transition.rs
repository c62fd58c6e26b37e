//! The way from what is held to the target: make before break.
//!
//! Owns what each worker is told to hold now. An expert that a live worker holds is never left without one by what is
//! assigned here, and keeps the copies it needs except where that would stop everything; such copies are named. A
//! worker is never told to hold more than it has memory for. Nothing is remembered between calls: what workers
//! announce and the target say it all, so a new leader goes on where the old one ended, and a worker that loads
//! only some of what it is told, or comes back empty, just gets its orders again.
//!
//! Workers are expected to unload what they are not told to hold before they load, and to load in the order given.
//!
//! When workers wait for each other's memory in a circle, it is opened by the first of these that is possible: a
//! copy that is not wanted goes although it leaves its expert with fewer than needed; a wanted copy of an expert
//! that another worker has as well goes, to be loaded again later; a copy that blocks goes by way of a worker with
//! memory to spare. If none is, the keys that wait are reported as stuck, and the way out is more memory or another
//! target.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;

use muster_types::{ExpertKey, NumericsClass, WorkerId};

use crate::plan::Holdings;
use crate::{Binding, ExpertSizes, Loads};

/// A live worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    /// Of its device.
    pub class: NumericsClass,
    /// Bytes it has for experts.
    pub capacity: u64,
    /// What it announces.
    pub held: BTreeSet<ExpertKey>,
}

/// Orders of a worker: it holds `keep` and `load`, and unloads all else.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Orders {
    /// Experts to keep.
    pub keep: BTreeSet<ExpertKey>,
    /// Experts to load, the most urgent first: those without an owner, then those that wait to leave another worker, then further
    /// copies; the hottest first within each.
    pub load: Vec<ExpertKey>,
}

impl Orders {
    /// All experts to hold.
    pub(crate) fn hold(&self) -> BTreeSet<ExpertKey> {
        self.keep.iter().chain(&self.load).copied().collect()
    }
}

/// One step towards the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// For every live worker.
    pub orders: BTreeMap<WorkerId, Orders>,
    /// Copies that are given up although their expert has fewer than needed then, so that something moves at all.
    /// Another live worker keeps it.
    pub forced: Vec<(WorkerId, ExpertKey)>,
    /// Experts that live workers shall hold but cannot, since memory for them would cost the last copy of another; ascending.
    pub stuck: Vec<ExpertKey>,
}

impl Transition {
    /// Whether there is nothing left to do: nothing to load, nothing stuck, and nothing but the target held.
    #[must_use]
    pub fn is_settled(&self, target: &Holdings) -> bool {
        let at_target = |(id, orders): (&WorkerId, &Orders)| match target.get(id) {
            Some(wanted) => orders.load.is_empty() && orders.keep == *wanted,
            None => orders.load.is_empty() && orders.keep.is_empty(),
        };
        self.stuck.is_empty() && self.orders.iter().all(at_target)
    }
}

/// What every live worker is to hold now, on the way to `target`.
///
/// A copy that is not wanted goes as soon as enough of those wanted are announced: `min_replicas`, or as many as the
/// target has. It goes earlier if its memory is needed for something wanted and enough other copies, wanted or not,
/// stay; enough is one if the other is an expert that nobody holds. Experts that go to another class than they are bound to
/// leave their workers together, when all are where they shall be: what runs is disturbed once.
#[must_use]
pub fn transition(
    sizes: &ExpertSizes,
    present: &BTreeMap<WorkerId, Present>,
    target: &Holdings,
    loads: &Loads,
    min_replicas: NonZero<u32>,
    binding: &Binding,
) -> Transition {
    let mut state = State::new(sizes, present, target, min_replicas.get() as usize, binding);
    state.retire();
    for site in 0..state.sites.len() {
        state.relieve(site);
    }
    for (site, key) in state.wanted_loads(loads) {
        if !state.admit(site, key) {
            state.sites[site].waiting.push(key);
        }
    }
    state.break_circles();
    state.finish()
}

/// A live worker and its orders in the making.
struct Site<'a> {
    id: &'a WorkerId,
    class: NumericsClass,
    capacity: u64,
    want: Option<&'a BTreeSet<ExpertKey>>,
    keep: BTreeSet<ExpertKey>,
    load: Vec<ExpertKey>,
    /// What it shall hold but has no memory for yet, the most urgent first.
    waiting: Vec<ExpertKey>,
    /// Bytes of `keep` and `load`.
    used: u64,
}

impl Site<'_> {
    fn wants(&self, key: ExpertKey) -> bool {
        self.want.is_some_and(|want| want.contains(&key))
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.used.checked_add(bytes).is_some_and(|used| used <= self.capacity)
    }

    /// Copies in its memory that are not wanted there.
    fn strays(&self) -> impl Iterator<Item = ExpertKey> {
        self.keep.iter().copied().filter(|&key| !self.wants(key))
    }
}

/// The copies of one expert.
#[derive(Default)]
struct Copies {
    /// Live workers that hold it and go on doing so, ascending.
    keepers: Vec<usize>,
    /// Live workers that the target gives it to.
    owners: Vec<usize>,
    /// Copies in the whole target, also on workers that are not live.
    wanted: usize,
    /// Workers that are told to load it.
    coming: usize,
}

struct State<'a> {
    sizes: &'a ExpertSizes,
    binding: &'a Binding,
    min_replicas: usize,
    sites: Vec<Site<'a>>,
    copies: BTreeMap<ExpertKey, Copies>,
    forced: Vec<(usize, ExpertKey)>,
    stuck: BTreeSet<ExpertKey>,
}

/// How urgent a load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// Nobody holds it.
    Uncovered,
    /// A worker holds it that shall not, and may have to until it is loaded.
    Moving,
    /// One more copy of what is where it shall be.
    Further,
}

impl<'a> State<'a> {
    fn new(
        sizes: &'a ExpertSizes,
        present: &'a BTreeMap<WorkerId, Present>,
        target: &'a Holdings,
        min_replicas: usize,
        binding: &'a Binding,
    ) -> Self {
        let mut copies: BTreeMap<ExpertKey, Copies> = BTreeMap::new();
        for &key in target.values().flatten() {
            copies.entry(key).or_default().wanted += 1;
        }
        let mut sites = Vec::with_capacity(present.len());
        for (n, (id, Present { class, capacity, held })) in present.iter().enumerate() {
            let want = target.get(id);
            for &key in held {
                copies.entry(key).or_default().keepers.push(n);
            }
            for &key in want.into_iter().flatten() {
                copies.entry(key).or_default().owners.push(n);
            }
            let used = held.iter().map(|key| sizes.get(*class, key.layer)).fold(0, u64::saturating_add);
            let (keep, load, waiting) = (held.clone(), Vec::new(), Vec::new());
            let (class, capacity) = (*class, *capacity);
            sites.push(Site { id, class, capacity, want, keep, load, waiting, used });
        }
        Self { sizes, binding, min_replicas, sites, copies, forced: Vec::new(), stuck: BTreeSet::new() }
    }

    fn bytes(&self, site: usize, key: ExpertKey) -> u64 {
        self.sizes.get(self.sites[site].class, key.layer)
    }

    fn keepers(&self, key: ExpertKey) -> &[usize] {
        self.copies.get(&key).map_or(&[], |copies| &copies.keepers)
    }

    /// Copies of an expert that must stay.
    fn floor(&self, key: ExpertKey) -> usize {
        self.copies.get(&key).map_or(1, |copies| self.min_replicas.min(copies.wanted).max(1))
    }

    fn drop_copy(&mut self, site: usize, key: ExpertKey) {
        if !self.sites[site].keep.remove(&key) {
            return;
        }
        self.sites[site].used = self.sites[site].used.saturating_sub(self.bytes(site, key));
        if let Some(copies) = self.copies.get_mut(&key) {
            copies.keepers.retain(|&keeper| keeper != site);
        }
        if self.keepers(key).len() < self.floor(key) {
            self.forced.push((site, key));
        }
    }

    fn start_load(&mut self, site: usize, key: ExpertKey) {
        let bytes = self.bytes(site, key);
        self.sites[site].used = self.sites[site].used.saturating_add(bytes);
        self.sites[site].load.push(key);
        if let Some(copies) = self.copies.get_mut(&key) {
            copies.coming += 1;
        }
    }

    /// Gives up the copies that have been replaced by those wanted.
    fn retire(&mut self) {
        let (mut gone, mut leaving, mut all_there) = (Vec::new(), Vec::new(), true);
        for (&key, copies) in &self.copies {
            let (wanted, strays): (Vec<_>, Vec<_>) =
                copies.keepers.iter().copied().partition(|&site| self.sites[site].wants(key));
            let is_bound = |site: &usize| Some(self.sites[*site].class) == self.binding.of(key);
            let changes_class = strays.iter().any(is_bound) && !copies.owners.iter().any(is_bound);
            let is_there = wanted.len() >= self.floor(key);
            all_there &= is_there || !changes_class;
            let list = if changes_class { &mut leaving } else { &mut gone };
            if is_there {
                list.extend(strays.into_iter().map(|site| (site, key)));
            }
        }
        if all_there {
            gone.append(&mut leaving);
        }
        for (site, key) in gone {
            self.drop_copy(site, key);
        }
    }

    /// Gives up what exceeds a worker's memory, as far as other copies stay.
    fn relieve(&mut self, site: usize) {
        for least in [self.min_replicas, 1] {
            while !self.sites[site].has_room(0) {
                let spare = |&key: &ExpertKey| self.is_spare(key, least);
                let strays = self.sites[site].strays().find(spare);
                let Some(key) = strays.or_else(|| self.sites[site].keep.iter().copied().find(spare)) else {
                    break;
                };
                self.drop_copy(site, key);
            }
        }
    }

    /// Whether one copy may go and as many stay as the expert needs, or `least` if that is fewer.
    fn is_spare(&self, key: ExpertKey, least: usize) -> bool {
        self.keepers(key).len() > self.floor(key).min(least)
    }

    /// What live workers shall hold but do not, the most urgent first.
    fn wanted_loads(&self, loads: &Loads) -> Vec<(usize, ExpertKey)> {
        let mut wanted = Vec::new();
        for (&key, copies) in &self.copies {
            let lacking = copies.owners.iter().filter(|owner| !copies.keepers.contains(owner));
            let (urgency, heat) = (self.urgency(key), loads.get(key));
            wanted.extend(lacking.map(|&site| (urgency, heat, key, site)));
        }
        wanted.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)).then((a.2, a.3).cmp(&(b.2, b.3))));
        wanted.into_iter().map(|(_, _, key, site)| (site, key)).collect()
    }

    fn urgency(&self, key: ExpertKey) -> Urgency {
        match self.keepers(key) {
            [] => Urgency::Uncovered,
            keepers if keepers.iter().any(|&site| !self.sites[site].wants(key)) => Urgency::Moving,
            _ => Urgency::Further,
        }
    }

    /// Has a worker load a key if there is memory for it, or if copies that are not wanted can make room.
    fn admit(&mut self, site: usize, key: ExpertKey) -> bool {
        let least = if self.keepers(key).is_empty() { 1 } else { self.min_replicas };
        let strays = self.sites[site].strays().filter(|&stray| self.is_spare(stray, least)).collect();
        self.admit_over(site, key, strays)
    }

    /// Has a worker load a key in place of as many of `victims` as it takes, or changes nothing.
    fn admit_over(&mut self, site: usize, key: ExpertKey, mut victims: Vec<ExpertKey>) -> bool {
        let Some(mut missing) = self.missing(site, key) else { return false };
        let given = victims.iter().map(|&victim| self.bytes(site, victim)).fold(0, u64::saturating_add);
        if given < missing {
            return false;
        }
        victims.reverse();
        while missing > 0 {
            let Some(victim) = victims.pop() else { break };
            missing = missing.saturating_sub(self.bytes(site, victim));
            self.drop_copy(site, victim);
        }
        self.start_load(site, key);
        true
    }

    /// Bytes that must be freed on a worker before it can load a key; none if it never can.
    fn missing(&self, site: usize, key: ExpertKey) -> Option<u64> {
        let Site { capacity, used, .. } = self.sites[site];
        let bytes = self.bytes(site, key);
        (bytes <= capacity).then(|| (used.saturating_add(bytes)).saturating_sub(capacity))
    }

    // Circles.

    /// Breaks circles of workers that would otherwise wait for ever, until there are none.
    fn break_circles(&mut self) {
        loop {
            let dead = self.dead();
            if dead.is_empty() {
                return;
            }
            // Any way that is forced may help the others too.
            if !dead.iter().any(|&site| self.force(site)) {
                self.stuck = dead.iter().flat_map(|&site| &self.sites[site].waiting).copied().collect();
                return;
            }
        }
    }

    /// Workers that wait, load nothing themselves, and are blocked by nothing that is on its way to its place.
    fn dead(&self) -> Vec<usize> {
        let mut dead: BTreeSet<usize> = (0..self.sites.len())
            .filter(|&site| !self.sites[site].waiting.is_empty() && self.sites[site].load.is_empty())
            .collect();
        let moves = |dead: &BTreeSet<usize>, key: ExpertKey| {
            self.copies.get(&key).is_some_and(|copies| {
                let lacks = |owner: &usize| !self.sites[*owner].keep.contains(&key) && !dead.contains(owner);
                copies.coming > 0 || copies.owners.iter().any(lacks)
            })
        };
        loop {
            let alive = |&&site: &&usize| self.sites[site].strays().any(|key| moves(&dead, key));
            let alive: Vec<_> = dead.iter().filter(alive).copied().collect();
            if alive.is_empty() {
                return dead.into_iter().collect();
            }
            for site in alive {
                dead.remove(&site);
            }
        }
    }

    /// Opens a way for a worker that waits. False when there is none.
    fn force(&mut self, site: usize) -> bool {
        for n in 0..self.sites[site].waiting.len() {
            let key = self.sites[site].waiting[n];
            if self.force_over(site, key) {
                self.sites[site].waiting.remove(n);
                return true;
            }
            if self.detour(site, key) {
                return true;
            }
        }
        false
    }

    /// Makes room by giving up copies of experts that another worker keeps too: such as are not wanted here; then,
    /// if a key could leave another worker by that, wanted ones. These count as further copies when they are to be
    /// loaded again, so what is loaded now goes before them.
    fn force_over(&mut self, site: usize, key: ExpertKey) -> bool {
        let mut victims: Vec<_> =
            self.sites[site].strays().filter(|&stray| self.is_spare(stray, 1)).collect();
        if self.urgency(key) != Urgency::Further {
            let is_further = |key: ExpertKey| self.urgency(key) == Urgency::Further && self.is_spare(key, 1);
            let here = self.sites[site].keep.iter().copied();
            victims.extend(here.filter(|&other| self.sites[site].wants(other) && is_further(other)));
        }
        self.admit_over(site, key, victims)
    }

    /// Has other workers, complete and with spare memory, load the copies in the way, so that the copies here can go in the next
    /// steps.
    fn detour(&mut self, site: usize, key: ExpertKey) -> bool {
        let Some(mut missing) = self.missing(site, key) else { return false };
        let mut strays: Vec<_> = self.sites[site].strays().collect();
        // What other workers keep too needs no detour.
        strays.sort_by_key(|&stray| (self.keepers(stray).len() < 2, stray));
        let mut spare: Vec<_> = (0..self.sites.len())
            .filter(|&other| other != site && self.sites[other].waiting.is_empty())
            .map(|other| (other, self.sites[other].capacity.saturating_sub(self.sites[other].used)))
            .collect();
        // Workers that shall hold nothing come last: they may be about to leave.
        spare.sort_by_key(|&(other, _)| self.sites[other].want.is_none_or(BTreeSet::is_empty));
        let mut detours = Vec::new();
        for stray in strays {
            if missing == 0 {
                break;
            }
            if self.keepers(stray).len() < 2 {
                let fits = spare.iter_mut().find(|(other, room)| {
                    self.binding.admits(stray, self.sites[*other].class) && *room >= self.bytes(*other, stray)
                });
                let Some((other, room)) = fits else { continue };
                *room -= self.bytes(*other, stray);
                detours.push((*other, stray));
            }
            missing = missing.saturating_sub(self.bytes(site, stray));
        }
        if missing > 0 || detours.is_empty() {
            return false;
        }
        for (other, stray) in detours {
            self.start_load(other, stray);
        }
        true
    }

    fn finish(self) -> Transition {
        let Self { sites, forced, stuck, .. } = self;
        let forced = forced.into_iter().map(|(site, key)| (sites[site].id.clone(), key)).collect();
        let orders = sites.into_iter().map(|site| {
            let Site { id, keep, load, .. } = site;
            (id.clone(), Orders { keep, load })
        });
        Transition { orders: orders.collect(), forced, stuck: stuck.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests;
