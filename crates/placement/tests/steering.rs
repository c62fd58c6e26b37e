//! Plan and transition together, as a leader uses them: workers load in any order, go and come back, loads change,
//! and no expert that is held is ever lost by what the leader says.
#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::time::Instant;

use muster_placement::{
    Binding, ExpertSizes, Goals, Holdings, Loads, Member, Present, Shape, Target, Transition, plan,
    transition,
};
use muster_types::{ExpertId, ExpertKey, Numerics, NumericsClass, Speed, WorkerId};
use proptest::prelude::*;

const BYTES: u64 = 10;

fn id(number: usize) -> WorkerId {
    WorkerId::new(&format!("w{number:03}")).unwrap()
}

/// A leader and its workers.
#[derive(Debug, Clone)]
struct Cluster {
    shape: Shape,
    loads: Loads,
    goals: Goals,
    capacity: Vec<u64>,
    /// By worker; none while it is gone.
    held: Vec<Option<BTreeSet<ExpertKey>>>,
    /// The target that is being steered to.
    target: Option<Target>,
}

impl Cluster {
    fn sizes(&self) -> ExpertSizes {
        ExpertSizes::uniform(&self.shape, BYTES).unwrap()
    }

    fn binding(&self) -> Binding {
        Binding::new(Numerics::Exact, &self.shape)
    }

    fn live(&self) -> impl Iterator<Item = (usize, &BTreeSet<ExpertKey>)> {
        self.held.iter().enumerate().filter_map(|(n, held)| Some((n, held.as_ref()?)))
    }

    fn holders(&self, key: ExpertKey) -> usize {
        self.live().filter(|(_, held)| held.contains(&key)).count()
    }

    fn plan(&self) -> Target {
        let member = |(n, held): (usize, &BTreeSet<ExpertKey>)| {
            let (capacity, held) = (self.capacity[n], held.clone());
            let (class, speed) = (NumericsClass::CpuCanonical, Speed::ONE);
            (id(n), Member { class, capacity, speed, domain: None, draining: false, held })
        };
        let members = self.live().map(member).collect();
        plan(&self.shape, &self.sizes(), &members, &self.loads, &self.goals, &self.binding())
    }

    fn step(&self, target: &Holdings) -> Transition {
        let present = self.live().map(|(n, held)| {
            let (capacity, held) = (self.capacity[n], held.clone());
            (id(n), Present { class: NumericsClass::CpuCanonical, capacity, held })
        });
        let (sizes, replicas) = (self.sizes(), self.goals.min_replicas);
        transition(&sizes, &present.collect(), target, &self.loads, replicas, &self.binding())
    }

    /// One round: a new plan if there is need for one, and a step, of which each worker loads what `picks` says.
    /// True when there was nothing to do.
    fn round(&mut self, picks: impl Fn(usize, usize) -> Vec<usize>) -> bool {
        let target = self.target.take().unwrap_or_else(|| self.plan());
        assert!(target.figures.moved_bytes <= self.goals.budget);
        let step = self.step(&target.hold);
        let before: BTreeMap<_, _> = self.shape.keys().map(|key| (key, self.holders(key))).collect();
        for (n, held) in self.held.iter_mut().enumerate().filter_map(|(n, held)| Some((n, held.as_mut()?))) {
            let orders = &step.orders[&id(n)];
            assert!((orders.keep.len() + orders.load.len()) as u64 * BYTES <= self.capacity[n]);
            held.clone_from(&orders.keep);
        }
        for (key, before) in before {
            assert!(before == 0 || self.holders(key) > 0, "{key} was lost");
        }
        for (n, held) in self.held.iter_mut().enumerate().filter_map(|(n, held)| Some((n, held.as_mut()?))) {
            let load = &step.orders[&id(n)].load;
            held.extend(picks(n, load.len()).into_iter().map(|at| load[at]));
        }
        let is_settled = step.is_settled(&target.hold);
        // A target that is reached, or cannot be, makes way for a new one.
        if !is_settled && step.stuck.is_empty() {
            self.target = Some(target);
            return false;
        }
        is_settled && target.figures.first_bytes + target.figures.moved_bytes == 0
    }
}

#[derive(Debug, Clone)]
enum Event {
    /// Workers load of their lists what these pick.
    Loads(Vec<Vec<usize>>),
    /// A worker goes, or comes back with nothing.
    Turns(usize),
    /// This expert is asked for much more than others now.
    Hot(usize),
}

fn events(workers: usize) -> impl Strategy<Value = Vec<Event>> {
    let picks = prop::collection::vec(prop::collection::vec(0_usize..12, 0..4), workers);
    let event = prop_oneof![
        6 => picks.prop_map(Event::Loads),
        1 => (0..workers).prop_map(Event::Turns),
        1 => (0_usize..100).prop_map(Event::Hot),
    ];
    prop::collection::vec(event, 0..24)
}

fn clusters() -> impl Strategy<Value = (Cluster, Vec<Event>)> {
    let cluster = (prop::collection::vec(0_u32..7, 1..4), 1_usize..6, 1_u32..3, 20_u64..100, 0.02..0.3);
    cluster.prop_flat_map(|(experts, workers, min_replicas, budget, hysteresis)| {
        let shape = Shape::new(experts);
        // Together they have room for all experts and at least one more.
        let least = shape.total() / workers as u64 + 1;
        let capacity =
            prop::collection::vec((0..least + 6).prop_map(move |more| (least + more) * BYTES), workers);
        let goals = Goals { min_replicas: NonZero::new(min_replicas).unwrap(), budget, hysteresis };
        (capacity, events(workers)).prop_map(move |(capacity, events)| {
            let cluster = Cluster {
                loads: Loads::new(&shape),
                shape: shape.clone(),
                goals,
                held: vec![Some(BTreeSet::new()); capacity.len()],
                capacity,
                target: None,
            };
            (cluster, events)
        })
    })
}

impl Cluster {
    fn suffer(&mut self, event: Event) {
        match event {
            Event::Loads(picks) => {
                let pick = |n: usize, len: usize| match len {
                    0 => vec![],
                    len => picks[n].iter().map(|at| at % len).collect(),
                };
                self.round(pick);
            }
            Event::Turns(n) => {
                self.held[n] = if self.held[n].is_some() { None } else { Some(BTreeSet::new()) };
                self.target = None;
            }
            Event::Hot(n) => {
                let keys: Vec<_> = self.shape.keys().collect();
                if let Some(&key) = keys.get(n % keys.len().max(1)) {
                    self.loads.decay(0.5);
                    keys.iter().for_each(|&key| self.loads.observe(key, 100));
                    self.loads.observe(key, 1000);
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn a_cluster_is_steered_to_rest_and_nothing_held_is_lost((cluster, events) in clusters()) {
        let mut cluster = cluster;
        events.into_iter().for_each(|event| cluster.suffer(event));

        cluster.held.iter_mut().for_each(|held| *held = Some(held.take().unwrap_or_default()));
        cluster.target = None;
        let mut rounds = 0;
        while !cluster.round(|_, len| (0..len.min(1)).collect()) {
            rounds += 1;
            prop_assert!(rounds < 400, "not at rest: {cluster:?}");
        }
        prop_assert!(cluster.shape.keys().all(|key| cluster.holders(key) > 0));
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "is timed, so it runs in release builds")]
fn a_step_of_a_large_cluster_takes_well_below_a_second() {
    let shape = Shape::new(vec![256; 64]);
    let mut loads = Loads::new(&shape);
    for key in shape.keys() {
        loads.observe(key, 10_000 / u64::from(key.expert.get() + 3));
    }
    let goals = Goals { budget: u64::MAX, ..Goals::default() };
    let held = vec![Some(BTreeSet::new()); 64];
    let mut cluster = Cluster { shape, loads, goals, capacity: vec![540 * BYTES; 64], held, target: None };
    // From nothing to a first target, and from there to one for other loads.
    for turned in [false, true] {
        if turned {
            let keys: Vec<_> = cluster.shape.keys().collect();
            for key in keys {
                let other = ExpertId::new(255 - key.expert.get(), 256).unwrap();
                cluster
                    .loads
                    .observe(ExpertKey { expert: other, ..key }, 100_000 / u64::from(key.expert.get() + 3));
            }
        }
        let target = cluster.plan();
        let times = [(); 3].map(|()| {
            let start = Instant::now();
            let step = cluster.step(&target.hold);
            assert!(step.stuck.is_empty());
            start.elapsed()
        });
        println!("step: {times:?}");
        assert!(times.iter().min().unwrap().as_millis() < 1000);
        cluster.target = Some(target);
        while cluster.target.is_some() {
            cluster.round(|_, len| (0..len).collect());
        }
    }
}
