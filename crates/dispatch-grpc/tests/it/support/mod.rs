//! Workers for tests: real servers over fake experts on real sockets, and a raw client to speak to them with.

#![allow(unreachable_pub, reason = "shared by the modules of one test program")]

pub mod lying;

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use muster_dispatch_grpc::{
    Address, Bound, ConnectConfig, Custody, Dialer, Digests, ExpertServer, GrpcDispatch, Handed, Held,
    Reference, ServerConfig, Start, WeightSource,
};
use muster_engine::compute::{ComputeError, ExpertCompute, Segment, SegmentAnswer};
use muster_engine::dispatch::{Choices, DispatchError, ExpertDispatch, LayerBatch, Rows, RowsMut, Ticket};
use muster_kernels::Cpu;
use muster_placement::{Shape, split};
use muster_proto::control::Assignment;
use muster_proto::description::{Description, Phase};
use muster_testkit::fake::FakeExperts;
use muster_types::{
    Combine, Compute, Epoch, ExpertId, ExpertKey, Fingerprint, LayerId, Numerics, NumericsClass, Speed,
    WeightDType, WeightDigest, WorkerId,
};
use tokio::runtime::Runtime;

pub const HIDDEN: usize = 16;
pub const TOP_K: u32 = 3;
pub const MAX_ROWS: u32 = 64;
pub const FINGERPRINT: Fingerprint = Fingerprint::new([0xab; 32]);

pub fn shape() -> Shape {
    Shape::new(vec![8, 0, 4, 8])
}

pub fn all() -> Vec<ExpertKey> {
    shape().keys().collect()
}

pub fn share(index: u32, count: u32) -> Vec<ExpertKey> {
    split(&shape(), NonZeroU32::new(count).unwrap(), index).unwrap()
}

pub fn layer(number: u32) -> LayerId {
    LayerId::new(number, 4).unwrap()
}

pub fn expert(number: u32) -> ExpertId {
    ExpertId::new(number, 8).unwrap()
}

/// That of the weights that an expert of this model has.
pub fn digest(key: ExpertKey) -> WeightDigest {
    WeightDigest::of([key.to_string().as_bytes()])
}

pub fn reference() -> Reference {
    let mut layers = vec![Vec::new(); shape().experts().len()];
    for key in all() {
        layers[key.layer.index()].push((digest(key), "model.safetensors".into()));
    }
    Reference::new(layers)
}

pub fn describe(name: &str, holdings: Vec<ExpertKey>, compute: Compute) -> Description {
    Description {
        digests: holdings.iter().copied().map(digest).collect(),
        worker: WorkerId::new(name).unwrap(),
        fingerprint: FINGERPRINT,
        numerics: NumericsClass::CpuCanonical,
        compute,
        experts: WeightDType::Native,
        epoch: Epoch::new(1),
        holdings,
        resident_bytes: 1,
        phase: Phase::Serving,
        max_rows: NonZeroU32::new(MAX_ROWS).unwrap(),
        capacity: 1,
        speed: Speed::ONE,
        domain: None,
        loading: 0,
        useful: None,
        full: None,
        trouble: None,
    }
}

/// Holds what it is said to hold, and takes note of orders. Whoever locks `held` makes it slow.
#[derive(Default)]
pub struct Ledger {
    /// How often it was asked what is held or told what to hold.
    pub asked: AtomicU32,
    pub held: Mutex<Vec<ExpertKey>>,
    pub orders: Mutex<Vec<Assignment>>,
    pub experts: Mutex<BTreeMap<ExpertKey, Handed>>,
    /// Experts whose weights are others than they must be.
    pub damaged: Mutex<BTreeSet<ExpertKey>>,
}

impl Custody for Ledger {
    fn assign(&self, assignment: Assignment) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut held = self.held.lock().unwrap();
        held.clone_from(&assignment.keep);
        held.extend(assignment.load.iter().map(|load| load.key));
        held.sort_unstable();
        self.orders.lock().unwrap().push(assignment);
    }

    fn held(&self) -> Held {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let experts = self.held.lock().unwrap().clone();
        let damaged = self.damaged.lock().unwrap();
        let other = |key: &ExpertKey| {
            if damaged.contains(key) { WeightDigest::new([0xdd; 32]) } else { digest(*key) }
        };
        Held {
            digests: experts.iter().map(other).collect(),
            experts,
            trouble: None,
            resident_bytes: 1,
            loading: 0,
            useful: None,
            full: None,
        }
    }
}

impl WeightSource for Ledger {
    fn get(&self, key: ExpertKey) -> Option<Handed> {
        self.experts.lock().unwrap().get(&key).cloned()
    }
}

pub fn server_config() -> ServerConfig {
    ServerConfig {
        shape: shape(),
        hidden: NonZeroU32::new(HIDDEN as u32).unwrap(),
        top_k: NonZeroU32::new(TOP_K).unwrap(),
        queue: NonZeroUsize::new(16).unwrap(),
        streams: NonZeroUsize::new(64).unwrap(),
        max_deadline: Duration::from_secs(60),
        busy_poll: Duration::from_micros(50),
        fetch_rate: NonZeroUsize::new(1 << 30).unwrap(),
    }
}

pub fn connect_config(workers: &[&str], compute: Compute) -> ConnectConfig {
    ConnectConfig {
        dialer: Dialer::default(),
        workers: workers.iter().map(ToString::to_string).collect(),
        router_id: "test-router".into(),
        fingerprint: FINGERPRINT,
        hidden: HIDDEN,
        compute,
        experts: WeightDType::Native,
        digests: Digests::known(reference()),
        shape: shape(),
        top_k: TOP_K,
        max_rows: MAX_ROWS,
        connect_timeout: Duration::from_secs(20),
        shard_deadline: Duration::from_secs(20),
        start: Start::Complete,
        combine: Combine::Exact,
        numerics: Numerics::Exact,
        busy_poll: Duration::from_micros(50),
        cpu: cpu(),
    }
}

pub fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap())
}

/// Fake experts of a worker.
pub fn fakes(held: &[ExpertKey], compute: Compute) -> FakeExperts {
    FakeExperts { compute, hidden: HIDDEN, held: held.iter().copied().collect() }
}

/// Experts that wait to be let through, shard by shard.
pub struct Gated {
    inner: FakeExperts,
    entered: Sender<()>,
    release: Receiver<()>,
}

/// The other side of [`Gated`].
pub struct Gate {
    entered: Receiver<()>,
    release: Sender<()>,
}

impl Gated {
    pub fn new(inner: FakeExperts) -> (Self, Gate) {
        let (entered, seen) = channel();
        let (release, released) = channel();
        (Self { inner, entered, release: released }, Gate { entered: seen, release })
    }
}

impl Gate {
    /// Waits until a shard is at the experts.
    pub fn wait(&self) {
        self.entered.recv_timeout(Duration::from_secs(20)).expect("a shard reaches the experts");
    }

    pub fn no_other(&self) {
        assert!(self.entered.try_recv().is_err(), "one more shard reached the experts");
    }

    pub fn release(&self) {
        self.release.send(()).expect("the experts are there");
    }
}

impl ExpertCompute for Gated {
    fn answer(
        &mut self,
        layer: LayerId,
        rows: Rows<'_>,
        segments: &[Segment<'_>],
    ) -> Result<Vec<SegmentAnswer>, ComputeError> {
        // Fails when the test is over.
        let _ = self.entered.send(());
        let _ = self.release.recv();
        self.inner.answer(layer, rows, segments)
    }
}

/// A server on a thread of its own.
pub struct TestWorker {
    pub address: String,
    pub server: ExpertServer,
    pub ledger: Arc<Ledger>,
    runtime: Option<Runtime>,
    compute: Option<JoinHandle<()>>,
}

impl TestWorker {
    pub fn start(name: &str, held: Vec<ExpertKey>, compute: Compute) -> Self {
        let experts = fakes(&held, compute);
        Self::with("127.0.0.1:0", &server_config(), describe(name, held, compute), experts)
    }

    pub fn with(
        listen: &str,
        config: &ServerConfig,
        description: Description,
        mut experts: impl ExpertCompute + 'static,
    ) -> Self {
        let runtime = runtime();
        let address: Address = listen.parse().unwrap();
        let bound = runtime.block_on(Bound::bind(&address)).expect("the address is free");
        let address = bound.address().to_string();
        let ledger = Arc::new(Ledger { held: Mutex::new(description.holdings.clone()), ..Ledger::default() });
        let (server, queue) = ExpertServer::new(config, description, ledger.clone());
        let (serving, network) = (server.clone(), bound.network());
        runtime.spawn(async move { bound.serve(&serving, None, std::future::pending()).await });
        let compute = std::thread::spawn(move || queue.run(&network, &mut experts));
        Self { address, server, ledger, runtime: Some(runtime), compute: Some(compute) }
    }

    /// As when the process dies: its sockets close, nobody says goodbye.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        self.server.close();
    }

    /// Whether the compute thread ends, now that the server is closed.
    pub fn join_compute(&mut self) -> bool {
        self.server.close();
        self.compute.take().is_some_and(|thread| thread.join().is_ok())
    }
}

impl Drop for TestWorker {
    fn drop(&mut self) {
        self.end();
    }
}

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A path for a socket that no other test uses.
pub fn socket() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let file = format!("muster-test-{}-{next}.sock", std::process::id());
    format!("unix:{}", std::env::temp_dir().join(file).display())
}

/// Polls until `done`, for a bounded time.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Far enough away that only something lost reaches it.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// One row for the given experts, in f32.
pub struct OneRow {
    pub layer: LayerId,
    pub row: Vec<f32>,
    pub choices: Choices,
}

impl OneRow {
    pub fn new(layer_number: u32, experts: &[u32]) -> Self {
        let ids = experts.iter().map(|&e| expert(e)).collect();
        let choices = Choices::new(experts.len(), ids, vec![1.0; experts.len()]).unwrap();
        Self { layer: layer(layer_number), row: vec![0.5; HIDDEN], choices }
    }

    pub fn batch(&self) -> LayerBatch<'_> {
        let rows = Rows::of_f32(&self.row, HIDDEN).unwrap();
        LayerBatch { layer: self.layer, lane: 0, rows, choices: &self.choices }
    }

    /// What fake experts make of it.
    pub fn sum(&self) -> Vec<f32> {
        self.sum_of(|_, y| y)
    }

    /// The same, of outputs that are changed before they are added up.
    pub fn sum_of(&self, change: impl Fn(ExpertId, f32) -> f32) -> Vec<f32> {
        let mut sum = vec![0.0; HIDDEN];
        for &expert in self.choices.experts() {
            let output = muster_testkit::fake::output(Compute::F32, self.layer, expert, &self.row);
            sum.iter_mut().zip(output).for_each(|(sum, y)| *sum += change(expert, y));
        }
        sum
    }
}

/// Takes home one row.
pub fn collect(dispatch: &mut GrpcDispatch, ticket: Ticket) -> Result<Vec<f32>, DispatchError> {
    let mut out = vec![0.0; HIDDEN];
    match dispatch.collect(ticket, soon(), RowsMut::of_f32(&mut out))?.pop() {
        None => Ok(out),
        Some(lost) => {
            assert_eq!(lost.rows, [0]);
            Err(lost.error)
        }
    }
}

/// Sends one row off and takes it home.
pub fn once(dispatch: &mut GrpcDispatch, row: &OneRow) -> Result<Vec<f32>, DispatchError> {
    let ticket = dispatch.submit(&row.batch())?;
    collect(dispatch, ticket)
}
