//! Whole workers with a real checkpoint: they pass the conformance kit, load exactly their share, and stop cleanly.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, like the tests")]

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use muster_admin::Admin;
use muster_checkpoint::{Checkpoint, Source};
use muster_dispatch_grpc::{Address, ConnectConfig, Dialer, Digests, GrpcDispatch, Start, WorkerState};
use muster_engine::dispatch::Rows;
use muster_kernels::Cpu;
use muster_model::experts::{ExpertScratch, ExpertSet};
use muster_model::local::local;
use muster_placement::{Shape, Share, split};
use muster_testkit::conformance::{self, Harness, Model, Sums};
use muster_testkit::fake::round;
use muster_types::{Combine, Compute, ExpertKey, Numerics, WeightDType, WorkerId};
use muster_worker::{Hooks, Ready, WorkerConfig, WorkerError, run};

const PATIENCE: Duration = Duration::from_secs(30);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden").join(name)
}

fn config(model: &str, share: Share) -> WorkerConfig {
    WorkerConfig {
        identity: None,
        listen: "127.0.0.1:0".parse().unwrap(),
        worker_id: WorkerId::new("w0").unwrap(),
        source: Some(Source::Directory(fixture(model))),
        join: Vec::new(),
        advertise: None,
        share,
        memory: None,
        speed: None,
        domain: None,
        fetch_rate: NonZeroUsize::new(1 << 30).unwrap(),
        compute: None,
        experts: WeightDType::Native,
        threads: NonZeroUsize::MIN,
        max_rows: NonZeroU32::new(64).unwrap(),
        queue: NonZeroUsize::new(16).unwrap(),
        streams: NonZeroUsize::new(64).unwrap(),
        busy_poll: Duration::from_micros(50),
        drain_timeout: PATIENCE,
    }
}

/// A worker on a separate thread.
struct Running {
    ready: Ready,
    admin: Admin,
    ended: mpsc::Receiver<Result<(), WorkerError>>,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

impl Running {
    fn start(config: WorkerConfig) -> Self {
        let admin = Admin::new(String::new);
        let (ready, became_ready) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let asked = admin.clone();
        std::thread::spawn(move || {
            let hooks = Hooks {
                admin: asked,
                progress: Box::new(|_| {}),
                ready: Box::new(move |now| ready.send(now).expect("the test waits for it")),
            };
            let _ = end.send(runtime().block_on(run(config, hooks)));
        });
        let ready = became_ready.recv_timeout(PATIENCE).expect("the worker becomes ready");
        Self { ready, admin, ended }
    }

    fn parts(model: &str, count: u32) -> Vec<Self> {
        let count = NonZeroU32::new(count).unwrap();
        let part = |index| {
            let worker_id = WorkerId::new(&format!("w{index}")).unwrap();
            Self::start(WorkerConfig {
                worker_id,
                ..config(model, Share::Part { index, count, replicas: NonZeroU32::MIN })
            })
        };
        (0..count.get()).map(part).collect()
    }

    /// Stops the worker, which must succeed whatever is connected.
    fn stop(self) {
        self.admin.end();
        let outcome = self.ended.recv_timeout(PATIENCE).expect("the worker ends");
        assert!(outcome.is_ok(), "{outcome:?}");
    }
}

/// The model for the kit, with the real experts as its oracle.
fn model(name: &str) -> (Arc<Cpu>, Arc<ExpertSet>, Model, ConnectConfig) {
    let checkpoint = Checkpoint::open(&Source::Directory(fixture(name))).unwrap();
    let spec = checkpoint.spec();
    let compute = Compute::default_for(spec.dtype);
    let experts: Vec<u32> =
        (0..spec.layers.len()).map(|at| spec.moe(at).map_or(0, |moe| moe.experts)).collect();
    let top_k = spec.most_experts_per_token();
    let set = ExpertSet::load(
        &checkpoint,
        &ExpertSet::all_keys(&checkpoint),
        compute,
        WeightDType::Native,
        &mut |_| {},
    )
    .unwrap();
    let (cpu, set) = (Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap()), Arc::new(set));
    let (oracle_cpu, oracle_set) = (cpu.clone(), set.clone());
    let oracle = Box::new(move |layer, expert, row: &[f32]| {
        let bits: Vec<u16> = row.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
        let rows = match compute {
            Compute::F32 => Rows::of_f32(row, row.len()).unwrap(),
            Compute::Bf16 | Compute::Bf16Pairs => Rows::of_bf16(&bits, row.len()).unwrap(),
        };
        let (mut scratch, mut out) = (ExpertScratch::default(), Vec::new());
        oracle_set.forward(&oracle_cpu, &mut scratch, layer, &[(expert, &[0])], rows, &mut out).unwrap();
        out.into_iter().map(|y| round(compute, y)).collect()
    });
    let connect = ConnectConfig {
        dialer: Dialer::default(),
        workers: Vec::new(),
        router_id: "test".into(),
        fingerprint: checkpoint.fingerprint(),
        hidden: spec.hidden,
        compute,
        experts: WeightDType::Native,
        digests: Digests::unchecked(),
        shape: Shape::new(experts.clone()),
        top_k,
        max_rows: 64,
        connect_timeout: PATIENCE,
        shard_deadline: PATIENCE,
        start: Start::Complete,
        combine: Combine::Exact,
        numerics: Numerics::Exact,
        busy_poll: Duration::from_micros(50),
        cpu: Arc::clone(&cpu),
    };
    let kit =
        Model { hidden: spec.hidden, top_k: top_k as usize, compute, experts, oracle, sums: Sums::Exact };
    (cpu, set, kit, connect)
}

fn connect(config: &ConnectConfig, workers: &[Running]) -> GrpcDispatch {
    let workers = workers.iter().map(|worker| worker.ready.address.to_string()).collect();
    muster_dispatch_grpc::connect(ConnectConfig { workers, ..config.clone() }).expect("the workers fit")
}

fn conforms_locally_and_over_grpc(name: &str) {
    conformance::run(|| {
        let (cpu, set, model, _) = model(name);
        Harness { dispatch: local(cpu, &set).unwrap(), model }
    });
    let workers = Running::parts(name, 3);
    conformance::run(|| {
        let (_, _, model, config) = model(name);
        Harness { dispatch: connect(&config, &workers), model }
    });
    conformance::run(|| {
        let (_, _, mut model, config) = model(name);
        let shape = config.shape.clone();
        let owner = move |layer, expert| {
            let parts = NonZeroU32::new(3).unwrap();
            let holds = |n: &u32| split(&shape, parts, *n).unwrap().contains(&ExpertKey { layer, expert });
            (0..3).find(holds).unwrap() as usize
        };
        model.sums = Sums::Partial(Box::new(owner));
        let config = ConnectConfig { combine: Combine::Partial, ..config };
        Harness { dispatch: connect(&config, &workers), model }
    });
    for worker in workers {
        worker.stop();
    }
}

#[test]
fn f32_experts_conform_locally_and_over_grpc() {
    conforms_locally_and_over_grpc("mixtral");
}

#[test]
fn bf16_experts_conform_locally_and_over_grpc() {
    conforms_locally_and_over_grpc("mixtral_bf16");
}

#[test]
fn a_share_is_all_that_is_loaded() {
    let whole = Running::start(config("mixtral", Share::All));
    let parts = Running::parts("mixtral", 2);
    let experts: usize = parts.iter().map(|part| part.ready.experts).sum();
    let bytes: u64 = parts.iter().map(|part| part.ready.bytes).sum();
    assert_eq!((experts, bytes), (whole.ready.experts, whole.ready.bytes));
    assert!(parts.iter().all(|part| part.ready.experts < experts));
}

#[test]
fn a_worker_that_is_told_to_stop_says_so_and_ends() {
    let workers = vec![Running::start(config("mixtral", Share::All))];
    let (_, _, _, config) = model("mixtral");
    let dispatch = connect(&config, &workers);
    let health = dispatch.transport().health();
    assert_eq!(health.missing(), []);
    for worker in workers {
        worker.stop();
    }
    let deadline = std::time::Instant::now() + PATIENCE;
    let is_noticed = || {
        // The fleet is built asynchronously to the links.
        matches!(health.workers()[0].state, WorkerState::Down { .. }) && health.missing_experts() > 0
    };
    while !is_noticed() {
        assert!(std::time::Instant::now() < deadline, "the router never noticed");
        std::thread::yield_now();
    }
}

/// The error of `run` when it cannot start.
fn refusal(config: WorkerConfig) -> String {
    let hooks = Hooks {
        progress: Box::new(|_| {}),
        ready: Box::new(|ready| panic!("it must not start: {ready:?}")),
        admin: Admin::new(String::new),
    };
    let outcome = runtime().block_on(run(config, hooks));
    outcome.expect_err("it must be refused").to_string()
}

#[test]
fn what_cannot_start_says_why() {
    let taken = Running::start(config("mixtral", Share::All));
    let address: Address = taken.ready.address.clone();
    let text = refusal(WorkerConfig { listen: address.clone(), ..config("mixtral", Share::All) });
    assert!(text.contains(&address.to_string()) && text.contains("already in use"), "{text}");

    let text = refusal(config("no such model", Share::All));
    assert!(text.contains("no such model"), "{text}");

    let count = NonZeroU32::new(1000).unwrap();
    let text = refusal(config("mixtral", Share::Part { index: 999, count, replicas: NonZeroU32::MIN }));
    assert!(text.contains("share 999 of 1000 is empty"), "{text}");
}

#[test]
fn a_stop_while_loading_is_obeyed() {
    let admin = Admin::new(String::new);
    admin.end();
    let hooks = Hooks { progress: Box::new(|_| {}), ready: Box::new(|_| {}), admin };
    let outcome = runtime().block_on(run(config("mixtral", Share::All), hooks));
    assert!(outcome.is_ok(), "{outcome:?}");
}
