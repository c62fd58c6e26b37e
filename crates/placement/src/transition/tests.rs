//! What transitions promise: by example, and on simulated clusters that load, fail and come back.

use muster_types::{ExpertId, LayerId, Numerics, NumericsClass};
use proptest::prelude::*;

use super::*;
use crate::Shape;

const LAYERS: u32 = 3;
const EXPERTS: u32 = 4;

fn shape() -> Shape {
    Shape::new(vec![EXPERTS; LAYERS as usize])
}

fn key(layer: u32, expert: u32) -> ExpertKey {
    ExpertKey { layer: LayerId::new(layer, LAYERS).unwrap(), expert: ExpertId::new(expert, EXPERTS).unwrap() }
}

fn id(number: usize) -> WorkerId {
    WorkerId::new(&format!("w{number}")).unwrap()
}

/// Expert n of layer 0, where all is about who holds what.
fn set(experts: &[u32]) -> BTreeSet<ExpertKey> {
    experts.iter().map(|&expert| key(0, expert)).collect()
}

fn present(list: &[(u64, &[u32])]) -> BTreeMap<WorkerId, Present> {
    let class = NumericsClass::CpuCanonical;
    let worker = |&(capacity, held): &(u64, &[u32])| Present { class, capacity, held: set(held) };
    list.iter().enumerate().map(|(n, entry)| (id(n), worker(entry))).collect()
}

fn target(list: &[&[u32]]) -> Holdings {
    list.iter().enumerate().map(|(n, keys)| (id(n), set(keys))).collect()
}

/// With experts of one byte.
fn step(present: &BTreeMap<WorkerId, Present>, target: &Holdings, min_replicas: u32) -> Transition {
    let sizes = ExpertSizes::uniform(&shape(), 1).unwrap();
    let mut loads = Loads::new(&shape());
    (0..EXPERTS).for_each(|expert| loads.observe(key(0, expert), u64::from(10 - expert)));
    let binding = Binding::new(Numerics::Exact, &shape());
    transition(&sizes, present, target, &loads, NonZero::new(min_replicas).unwrap(), &binding)
}

/// (kept, to be loaded) of each worker.
fn orders(step: &Transition) -> Vec<(BTreeSet<ExpertKey>, Vec<ExpertKey>)> {
    step.orders.values().map(|orders| (orders.keep.clone(), orders.load.clone())).collect()
}

fn order(keep: &[u32], load: &[u32]) -> (BTreeSet<ExpertKey>, Vec<ExpertKey>) {
    (set(keep), load.iter().map(|&expert| key(0, expert)).collect())
}

#[test]
fn experts_that_change_class_leave_together() {
    let (old, new) = (NumericsClass::CpuCanonical, NumericsClass::CudaMma);
    let (sizes, loads) = (ExpertSizes::uniform(&shape(), 1).unwrap(), Loads::new(&shape()));
    let keys: Vec<_> = set(&[0, 1, 2]).into_iter().collect();
    let binding = Binding::new(Numerics::Exact, &shape()).after([(old, &keys[..])].into_iter());
    let target = target(&[&[2], &[0, 1]]);
    let step = |there: &[u32]| {
        let worker = |class, held: &[u32]| Present { class, capacity: 4, held: set(held) };
        let present = [(id(0), worker(old, &[0, 1, 2])), (id(1), worker(new, there))].into();
        transition(&sizes, &present, &target, &loads, NonZero::<u32>::MIN, &binding).orders
    };
    assert_eq!(step(&[0])[&id(0)].keep, set(&[0, 1, 2]), "1 is not there yet");
    assert_eq!(step(&[0])[&id(1)].load, [key(0, 1)]);
    assert_eq!(step(&[0, 1])[&id(0)].keep, set(&[2]));
}

#[test]
fn the_old_copy_goes_when_the_new_one_is_announced() {
    let target = target(&[&[], &[0]]);
    let before = step(&present(&[(2, &[0]), (2, &[])]), &target, 2);
    assert_eq!(orders(&before), [order(&[0], &[]), order(&[], &[0])]);
    assert!(!before.is_settled(&target));
    let after = step(&present(&[(2, &[0]), (2, &[0])]), &target, 2);
    assert_eq!(orders(&after), [order(&[], &[]), order(&[0], &[])]);
    assert!(after.forced.is_empty() && after.is_settled(&target));
}

#[test]
fn as_many_copies_stay_as_were_asked_for() {
    let target = target(&[&[], &[], &[0], &[0]]);
    let two = step(&present(&[(1, &[0]), (1, &[0]), (1, &[0]), (1, &[])]), &target, 2);
    assert_eq!(orders(&two)[0], order(&[0], &[]));
    let one = step(&present(&[(1, &[0]), (1, &[0]), (1, &[0]), (1, &[])]), &target, 1);
    assert_eq!(orders(&one)[0], order(&[], &[]));
    // A worker that the target does not know keeps what nobody else has.
    let gone = step(&present(&[(1, &[0])]), &Holdings::from([(id(7), set(&[0]))]), 1);
    assert_eq!(orders(&gone), [order(&[0], &[])]);
}

#[test]
fn what_nobody_holds_is_loaded_first_and_then_the_hottest() {
    let target = target(&[&[0, 1, 2, 3], &[0, 1]]);
    let step = step(&present(&[(4, &[]), (4, &[0, 1])]), &target, 1);
    assert_eq!(orders(&step)[0], order(&[], &[2, 3, 0, 1]));
}

#[test]
fn what_has_no_room_yet_is_deferred() {
    // Worker 0 shall have 1 for 0, but the other only has room for 0 once it is loaded there.
    let target = target(&[&[1], &[0, 2]]);
    let first = step(&present(&[(1, &[0]), (3, &[1, 2])]), &target, 1);
    assert_eq!(orders(&first), [order(&[0], &[]), order(&[1, 2], &[0])]);
    let second = step(&present(&[(1, &[0]), (3, &[0, 1, 2])]), &target, 1);
    assert_eq!(orders(&second), [order(&[], &[1]), order(&[0, 1, 2], &[])]);
}

#[test]
fn a_copy_that_is_needed_stays_while_its_replacement_is_on_its_way() {
    let target = target(&[&[1], &[0, 1], &[0]]);
    let held = present(&[(1, &[0]), (2, &[0, 1]), (1, &[])]);
    let first = step(&held, &target, 2);
    assert_eq!(orders(&first), [order(&[0], &[]), order(&[0, 1], &[]), order(&[], &[0])]);
    assert!(first.forced.is_empty());
    // What nobody holds does not wait for that.
    let held = present(&[(1, &[0]), (2, &[0]), (1, &[])]);
    let first = step(&held, &target, 2);
    assert_eq!(orders(&first), [order(&[], &[1]), order(&[0], &[1]), order(&[], &[0])]);
    assert_eq!(first.forced, [(id(0), key(0, 0))]);
}

#[test]
fn full_workers_exchange_over_a_copy_that_another_has() {
    let target = target(&[&[1], &[0], &[0]]);
    // Both are full; of 0 there is another copy.
    let first = step(&present(&[(1, &[0]), (1, &[1]), (1, &[0])]), &target, 2);
    assert_eq!(orders(&first), [order(&[], &[1]), order(&[1], &[]), order(&[0], &[])]);
    assert_eq!(first.forced, [(id(0), key(0, 0))]);
    assert!(first.stuck.is_empty());
}

#[test]
fn full_workers_exchange_over_a_third() {
    let target = target(&[&[1], &[0], &[]]);
    let first = step(&present(&[(1, &[0]), (1, &[1]), (1, &[])]), &target, 1);
    assert_eq!(orders(&first), [order(&[0], &[]), order(&[1], &[]), order(&[], &[0])]);
    let second = step(&present(&[(1, &[0]), (1, &[1]), (1, &[0])]), &target, 1);
    assert_eq!(orders(&second), [order(&[], &[1]), order(&[1], &[]), order(&[0], &[])]);
    let third = step(&present(&[(1, &[1]), (1, &[1]), (1, &[0])]), &target, 1);
    assert_eq!(orders(&third), [order(&[1], &[]), order(&[], &[0]), order(&[0], &[])]);
}

#[test]
fn a_wanted_copy_makes_way_if_that_opens_the_circle() {
    // All are full; 2 is on two workers, where it shall be.
    let target = target(&[&[1, 2], &[0], &[2]]);
    let held = present(&[(2, &[0, 2]), (1, &[1]), (1, &[2])]);
    let first = step(&held, &target, 1);
    assert_eq!(orders(&first)[0], order(&[0], &[1]));
    // It is not loaded again before what it made way for.
    let second = step(&present(&[(2, &[0]), (1, &[1]), (1, &[2])]), &target, 1);
    assert_eq!(orders(&second)[0], order(&[0], &[1]));
}

#[test]
fn what_cannot_be_exchanged_safely_is_stuck() {
    let target = target(&[&[1], &[0]]);
    let step = step(&present(&[(1, &[0]), (1, &[1])]), &target, 1);
    assert_eq!(orders(&step), [order(&[0], &[]), order(&[1], &[])]);
    assert_eq!(step.stuck, [key(0, 0), key(0, 1)]);
    assert!(!step.is_settled(&target));
}

#[test]
fn a_worker_that_is_overfull_gives_up_what_others_have() {
    let target = target(&[&[1], &[0]]);
    let step = step(&present(&[(1, &[0, 1, 2]), (1, &[0])]), &target, 1);
    assert_eq!(orders(&step), [order(&[1, 2], &[]), order(&[0], &[])]);
}

/// A cluster that is simulated step by step.
#[derive(Debug, Clone)]
struct Cluster {
    sizes: Vec<u64>,
    capacity: Vec<u64>,
    /// By worker; none while it is gone.
    held: Vec<Option<BTreeSet<ExpertKey>>>,
    target: Vec<BTreeSet<ExpertKey>>,
    min_replicas: u32,
}

impl Cluster {
    fn sizes(&self) -> ExpertSizes {
        ExpertSizes::new(&shape(), self.sizes.clone()).unwrap()
    }

    fn bytes<'a>(&self, keys: impl IntoIterator<Item = &'a ExpertKey>) -> u64 {
        keys.into_iter().map(|key| self.sizes[key.layer.index()]).sum()
    }

    fn target(&self) -> Holdings {
        self.target.iter().enumerate().map(|(n, keys)| (id(n), keys.clone())).collect()
    }

    fn holders(&self, key: ExpertKey) -> usize {
        self.held.iter().flatten().filter(|held| held.contains(&key)).count()
    }

    fn step(&self) -> Transition {
        let live = self.held.iter().enumerate();
        let present = live.filter_map(|(n, held)| {
            let held = held.clone()?;
            Some((id(n), Present { class: NumericsClass::CpuCanonical, capacity: self.capacity[n], held }))
        });
        let min_replicas = NonZero::new(self.min_replicas).unwrap();
        let (loads, binding) = (Loads::new(&shape()), Binding::new(Numerics::Exact, &shape()));
        transition(&self.sizes(), &present.collect(), &self.target(), &loads, min_replicas, &binding)
    }

    /// Carries out a step: worker n loads what `loads` picks of its list. Checks what must hold at every moment.
    fn carry_out(&mut self, step: &Transition, loads: impl Fn(usize, usize) -> Vec<usize>) {
        let before: BTreeMap<_, _> = shape().keys().map(|key| (key, self.holders(key))).collect();
        for (n, capacity) in self.capacity.clone().into_iter().enumerate() {
            let Some(held) = &mut self.held[n] else { continue };
            let Orders { keep, load } = &step.orders[&id(n)];
            assert!(keep.is_subset(held), "only what is there can be kept");
            let new: BTreeSet<_> = load.iter().copied().collect();
            assert!(new.len() == load.len() && new.is_disjoint(held));
            held.clone_from(keep);
            let all = self.bytes(keep) + self.bytes(load);
            assert!(all <= capacity, "worker {n} is to hold {all} of {capacity} bytes");
        }
        for (key, before) in before {
            let wanted = self.target.iter().filter(|keys| keys.contains(&key)).count();
            let floor = before.min(wanted.min(self.min_replicas as usize).max(1));
            let forced = step.forced.iter().any(|(_, other)| *other == key);
            let floor = if forced { 1 } else { floor };
            assert!(self.holders(key) >= floor, "{key} has {} of {before} copies", self.holders(key));
        }
        for (n, held) in self.held.iter_mut().enumerate() {
            let Some(held) = held else { continue };
            let load = &step.orders[&id(n)].load;
            for at in loads(n, load.len()) {
                held.insert(load[at % load.len()]);
            }
        }
    }

    /// Steps on without faults, every worker loading at least one expert of its list each time, until nothing
    /// changes any more. True if the target was reached.
    fn finish(&mut self, pick: impl Fn(usize, usize) -> usize) -> bool {
        self.held.iter_mut().for_each(|held| *held = Some(held.take().unwrap_or_default()));
        let copies: usize = self.target.iter().map(BTreeSet::len).sum();
        for round in 0..20 + 10 * copies {
            let step = self.step();
            let before = self.held.clone();
            self.carry_out(&step, |n, len| if len == 0 { vec![] } else { vec![pick(round, n) % len] });
            if self.held == before {
                let settled = step.is_settled(&self.target());
                assert!(settled == step.stuck.is_empty(), "neither done nor stuck: {step:?}");
                return settled;
            }
        }
        panic!("no end: {self:?}");
    }
}

/// What happens to a worker in a round.
#[derive(Debug, Clone)]
enum Event {
    /// It loads these of its list, in this order.
    Loads(Vec<usize>),
    /// It goes, or comes back with nothing.
    Turns,
}

fn rounds(workers: usize) -> impl Strategy<Value = Vec<Vec<Event>>> {
    let event = prop_oneof![
        10 => prop::collection::vec(0_usize..12, 0..5).prop_map(Event::Loads),
        1 => Just(Event::Turns),
    ];
    prop::collection::vec(prop::collection::vec(event, workers), 0..12)
}

/// Keys in any order, as far as they fit.
fn filled(order: Vec<ExpertKey>, sizes: &[u64], capacity: u64) -> BTreeSet<ExpertKey> {
    let mut left = capacity;
    let mut fits = |key: &ExpertKey| {
        let rest = left.checked_sub(sizes[key.layer.index()]);
        left = rest.unwrap_or(left);
        rest.is_some()
    };
    order.into_iter().filter(|key| fits(key)).collect()
}

fn some_keys() -> impl Strategy<Value = Vec<ExpertKey>> {
    let all: Vec<_> = shape().keys().collect();
    prop::sample::subsequence(all.clone(), 0..=all.len()).prop_shuffle()
}

/// Clusters with any holdings and any target that fit; what is held is in the target somewhere.
fn clusters(
    sizes: impl Strategy<Value = Vec<u64>>,
    spare: impl Strategy<Value = u64> + Clone + 'static,
) -> impl Strategy<Value = (Cluster, Vec<Vec<Event>>)> {
    (2_usize..6, sizes).prop_flat_map(move |(workers, sizes)| {
        let keys = || prop::collection::vec(some_keys(), workers);
        let capacity = prop::collection::vec(0_u64..16, workers);
        let spare = prop::collection::vec(spare.clone(), workers);
        (keys(), keys(), capacity, spare, 1_u32..4, rounds(workers)).prop_map(
            move |(held, target, capacity, spare, min_replicas, rounds)| {
                let fill = |keys: Vec<Vec<ExpertKey>>| -> Vec<_> {
                    keys.into_iter().zip(&capacity).map(|(keys, &room)| filled(keys, &sizes, room)).collect()
                };
                let target = fill(target);
                let wanted: BTreeSet<_> = target.iter().flatten().copied().collect();
                let held =
                    fill(held).into_iter().map(|held| Some(held.intersection(&wanted).copied().collect()));
                let cluster = Cluster {
                    held: held.collect(),
                    sizes: sizes.clone(),
                    capacity: capacity.iter().zip(spare).map(|(room, spare)| room + spare).collect(),
                    target,
                    min_replicas,
                };
                (cluster, rounds)
            },
        )
    })
}

fn uniform() -> impl Strategy<Value = Vec<u64>> {
    Just(vec![1; LAYERS as usize])
}

fn any_sizes() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(0_u64..5, LAYERS as usize)
}

fn suffer(cluster: &mut Cluster, rounds: Vec<Vec<Event>>) {
    for events in rounds {
        let step = cluster.step();
        cluster.carry_out(&step, |n, len| match &events[n] {
            Event::Loads(picks) if len > 0 => picks.clone(),
            _ => vec![],
        });
        for (held, event) in cluster.held.iter_mut().zip(&events) {
            if matches!(event, Event::Turns) {
                *held = if held.is_some() { None } else { Some(BTreeSet::new()) };
            }
        }
    }
}

proptest! {
    #[test]
    fn no_step_leaves_an_expert_without_holder_and_the_last_is_the_target_or_says_why(
        (cluster, rounds) in clusters(any_sizes(), 0_u64..3), picks in prop::collection::vec(0_usize..12, 7),
    ) {
        let mut cluster = cluster;
        suffer(&mut cluster, rounds);
        cluster.finish(|round, n| picks[(round + n) % picks.len()]);
    }

    #[test]
    fn with_a_free_place_on_any_worker_the_target_is_reached(
        (cluster, rounds) in clusters(uniform(), Just(0)), lucky in 0_usize..6,
        picks in prop::collection::vec(0_usize..12, 7),
    ) {
        let mut cluster = cluster;
        let lucky = lucky % cluster.capacity.len();
        cluster.capacity[lucky] += 1;
        suffer(&mut cluster, rounds);
        prop_assert!(cluster.finish(|round, n| picks[(round + n) % picks.len()]));
    }

    #[test]
    fn full_workers_pass_their_experts_on_over_one_free_place(
        workers in 2_usize..5, each in 1_usize..4, order in some_keys(), lucky in 0_usize..5, twice: bool,
        picks in prop::collection::vec(0_usize..12, 7), min_replicas in 1_u32..4,
    ) {
        let rest: Vec<_> = shape().keys().filter(|key| !order.contains(key)).collect();
        let order = [order, rest].concat();
        let mut held: Vec<BTreeSet<_>> =
            order.chunks(each).take(workers).map(|keys| keys.iter().copied().collect()).collect();
        let mut capacity: Vec<_> = held.iter().map(|held| held.len() as u64).collect();
        let mut target = held.clone();
        target.rotate_left(1);
        let lucky = lucky % held.len();
        match order.get(each * workers) {
            // The place is taken by a copy of what another worker has too, and both shall keep it.
            Some(&key) if twice => for n in [lucky, (lucky + 1) % held.len()] {
                held[n].insert(key);
                target[n].insert(key);
                capacity[n] += 1;
            },
            _ => capacity[lucky] += 1,
        }
        let held = held.into_iter().map(Some).collect();
        let mut cluster = Cluster { sizes: vec![1; LAYERS as usize], capacity, held, target, min_replicas };
        prop_assert!(cluster.finish(|round, n| picks[(round + n) % picks.len()]));
    }

    #[test]
    fn with_memory_for_old_and_new_nothing_is_forced((cluster, _) in clusters(any_sizes(), Just(60))) {
        let mut cluster = cluster;
        for _ in 0..3 {
            let step = cluster.step();
            prop_assert!(step.forced.is_empty() && step.stuck.is_empty());
            cluster.carry_out(&step, |_, len| (0..len).collect());
        }
        prop_assert!(cluster.step().is_settled(&cluster.target()));
    }
}
