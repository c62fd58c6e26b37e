//! A whole cluster in one thread: workers, routers, leases, orders and messages on a virtual clock, with the real
//! scheduler, delivery, plans and transitions, under faults drawn from a seed. `docs/invariants.md` lists what is checked.
//!
//! `MUSTER_SIM_SEED=7 cargo test --release -p muster-engine --test simulation -- one_seed --nocapture` runs seed 7 and
//! prints its trace; `MUSTER_SIM_SEEDS=20000` runs so many in place of the usual number.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "the lints spare test functions, but not their helpers"
)]

mod faults;
mod leader;
mod rng;
mod router;
mod toy;
mod wire;
mod worker;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use faults::Counts;
use world::{END, World};

/// Seeds of a usual run.
const SEEDS: u64 = 2000;

/// Runs a world to its end, checks that all is well there, and says what happened.
fn run(seed: u64, print: bool) -> (u64, Counts) {
    let mut world = World::new(seed, print);
    while !world.is_well() {
        world.step();
        assert!(world.now < END, "progress: {}", describe(&world));
    }
    (world.trace.hash, world.counts)
}

/// What is not well.
fn describe(world: &World) -> String {
    let waiting: Vec<usize> =
        (0..world.requests.len()).filter(|&request| !world.requests[request].ended).collect();
    let uncovered: Vec<String> =
        world.spec.shape.keys().filter(|&key| !world.is_held(key)).map(|key| key.to_string()).collect();
    let routers: Vec<String> =
        world.routers.iter().filter(|router| !router.is_at_rest()).map(|router| router.describe()).collect();
    format!("requests {waiting:?} wait, nobody holds {uncovered:?}\n{}", routers.join("\n"))
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().expect("a number"))
}

#[test]
fn every_invariant_holds_whatever_fails() {
    let mut counts = Counts::default();
    let seeds = number("MUSTER_SIM_SEEDS").unwrap_or(SEEDS);
    let mut failed = Vec::new();
    for seed in 0..seeds {
        match catch_unwind(AssertUnwindSafe(|| run(seed, false))) {
            Ok((_, more)) => counts.add(&more),
            Err(_) => failed.push(seed),
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {seeds} seeds failed: {failed:?}; to see what happened: MUSTER_SIM_SEED={} cargo test --release \
         -p muster-engine --test simulation -- one_seed --nocapture",
        failed.len(),
        failed[0]
    );
    println!("{:?}", counts.all());
    for (what, times) in counts.all() {
        assert!(times >= 5, "{what}: only {times} times in {seeds} seeds");
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let hashes = || (0..60).map(|seed| run(seed, false).0).collect::<Vec<_>>();
    let once = hashes();
    assert_eq!(once, hashes(), "same-seed-same-trace");
    assert!(once.windows(2).all(|pair| pair[0] != pair[1]), "seeds differ");
}

#[test]
fn one_seed() {
    let seed = number("MUSTER_SIM_SEED");
    run(seed.unwrap_or(0), seed.is_some());
}
