//! How long the token path waits for the links while a fleet announces itself. A benchmark:
//! `cargo test --release -p muster-dispatch-grpc --lib announcing -- --ignored --nocapture`.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use muster_placement::{Shape, split};
use muster_proto::description::{Description, Phase};
use muster_proto::handshake::LANES;
use muster_types::{
    Compute, Epoch, ExpertKey, Fingerprint, Numerics, NumericsClass, Speed, WeightDType, WeightDigest,
    WorkerId,
};
use tokio::sync::mpsc;
use tonic::transport::Endpoint;

use super::control::Control;
use super::links::Links;

const LAYERS: usize = 96;
const EXPERTS: u32 = 256;
const WORKERS: u32 = 64;
/// How often a worker that loads announces.
const EVERY: Duration = Duration::from_millis(20);
const LASTS: Duration = Duration::from_secs(10);

fn describe(worker: u32, holdings: Vec<ExpertKey>, epoch: u64) -> Description {
    Description {
        worker: WorkerId::new(&format!("w{worker}")).unwrap(),
        fingerprint: Fingerprint::new([1; 32]),
        numerics: NumericsClass::CpuCanonical,
        compute: Compute::Bf16,
        experts: WeightDType::Native,
        epoch: Epoch::new(epoch),
        resident_bytes: holdings.len() as u64,
        digests: vec![WeightDigest::new([7; 32]); holdings.len()],
        trouble: None,
        holdings,
        phase: Phase::Serving,
        max_rows: NonZeroU32::MIN,
        capacity: u64::MAX,
        speed: Speed::ONE,
        domain: None,
        loading: 1,
        useful: None,
        full: None,
    }
}

#[test]
#[ignore = "a benchmark: it prints figures"]
#[allow(clippy::print_stdout, reason = "figures are what it is for")]
fn the_token_path_while_64_workers_announce_24576_experts() {
    let shape = Shape::new(vec![EXPERTS; LAYERS]);
    let address = |worker: u32| format!("10.0.{}.{}:1", worker / 250, worker % 250).parse().unwrap();
    let links =
        Arc::new(Links::new(shape.clone(), Numerics::Exact, (0..WORKERS).map(address).collect()).unwrap());
    links.start().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let count = NonZeroU32::new(WORKERS).unwrap();
    let held: Vec<Vec<ExpertKey>> = (0..WORKERS).map(|n| split(&shape, count, n).unwrap()).collect();
    for (worker, held) in (0..).zip(&held) {
        let lanes: [_; LANES] = std::array::from_fn(|_| mpsc::channel(1).0);
        let control = Control::new(Endpoint::from_static("http://127.0.0.1:1").connect_lazy());
        links.up(worker as usize, describe(worker, held.clone(), 1), lanes, control).unwrap();
    }
    let (began, first) = (Instant::now(), links.version());
    let (mut waits, mut control, mut own) = (Vec::new(), Vec::new(), Vec::new());
    let alone = Mutex::new(0_u64);
    let (mut announced, mut due) = (0_u32, began);
    while began.elapsed() < LASTS {
        // As in a router, the thread that computes also takes in what the network brings.
        if Instant::now() >= due {
            due += EVERY / WORKERS;
            announced += 1;
            let (worker, epoch) = (announced % WORKERS, u64::from(announced / WORKERS) + 2);
            // One expert more or fewer each time.
            let all = &held[worker as usize];
            let held = all[..all.len() - announced as usize % 8].to_vec();
            let description = Arc::new(describe(worker, held, epoch));
            let asked = Instant::now();
            links.announce(worker as usize, description);
            own.push(asked.elapsed());
        }
        let asked = Instant::now();
        let fleet = links.fleet();
        links.poll(&mut Vec::new());
        waits.push(asked.elapsed());
        drop(fleet);
        // Baseline: the same time without the links, on an equally busy machine.
        let asked = Instant::now();
        *alone.lock().unwrap() += 1;
        control.push(asked.elapsed());
        // About as often as layers are submitted and answered.
        std::thread::sleep(Duration::from_micros(50));
    }
    let built = links.version() - first;
    links.close();
    println!("{announced} announcements, {built} fleets");
    let figures =
        [("looks at the links", waits), ("announcements", own), ("looks at a lock of its own", control)];
    for (what, mut waits) in figures {
        waits.sort_unstable();
        let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize];
        let over = waits.iter().filter(|wait| **wait > Duration::from_micros(100)).count();
        println!(
            "{} {what}: p50 {:?}, p99 {:?}, p99.9 {:?}, longest {:?}, {over} over 100 us",
            waits.len(),
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0)
        );
    }
}
