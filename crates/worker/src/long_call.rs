//! A long call beside all other tasks of a worker.

use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use muster_admin::Readiness;
use muster_dispatch_grpc::{
    Bound, ConnectConfig, Custody, Dialer, Digests, ExpertServer, GrpcDispatch, ServerConfig, Start,
};
use muster_engine::compute::{ComputeError, ExpertCompute, Segment, SegmentAnswer};
use muster_engine::dispatch::{Choices, ExpertDispatch, LayerBatch, Rows, RowsMut};
use muster_kernels::{Cpu, Expert, Matrix};
use muster_model::experts::{CpuExperts, CpuStore, ExpertSet, PackedExpert};
use muster_placement::Shape;
use muster_proto::control::{Assignment, LeadAsk, Load};
use muster_proto::convert::RouterName;
use muster_proto::description::{Description, Phase};
use muster_types::{
    Combine, Compute, Epoch, ExpertId, ExpertKey, Fingerprint, LayerId, Numerics, NumericsClass, Speed,
    WeightDType, WeightDigest, WorkerId,
};

use crate::holder::Holder;
use crate::report::Standing;

const HIDDEN: usize = 512;
/// Intermediate width of the slow expert.
const INTERMEDIATE: usize = 8192;
/// Rows of the long call: seconds of work on one thread.
const ROWS: usize = 4096;
const EXPERTS: u32 = 64;
/// Orders that must complete during one call.
const ORDERS: u32 = 40;
const PATIENCE: Duration = Duration::from_secs(60);

fn key(expert: u32) -> ExpertKey {
    ExpertKey { layer: LayerId::new(0, 1).unwrap(), expert: ExpertId::new(expert, EXPERTS).unwrap() }
}

fn expert(intermediate: usize) -> PackedExpert {
    let pack = |n, k| Matrix::pack_f32(n, k, &vec![0.01; n * k]).unwrap();
    Expert::new(pack(intermediate, HIDDEN), pack(intermediate, HIDDEN), pack(HIDDEN, intermediate))
        .unwrap()
        .into()
}

/// The worker's experts, and whether their first call has begun and ended.
struct Noted {
    inner: CpuExperts,
    began: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl ExpertCompute for Noted {
    fn answer(
        &mut self,
        layer: LayerId,
        rows: Rows<'_>,
        segments: &[Segment<'_>],
    ) -> Result<Vec<SegmentAnswer>, ComputeError> {
        self.began.store(true, Ordering::SeqCst);
        let outcome = self.inner.answer(layer, rows, segments);
        self.ended.store(true, Ordering::SeqCst);
        outcome
    }
}

fn description() -> Description {
    Description {
        worker: WorkerId::new("w").unwrap(),
        fingerprint: Fingerprint::new([1; 32]),
        numerics: NumericsClass::CpuCanonical,
        compute: Compute::F32,
        experts: WeightDType::Native,
        epoch: Epoch::new(1),
        holdings: vec![key(0)],
        digests: vec![WeightDigest::new([0; 32])],
        trouble: None,
        resident_bytes: 1,
        phase: Phase::Serving,
        max_rows: NonZeroU32::new(ROWS as u32).unwrap(),
        capacity: 1,
        speed: Speed::ONE,
        domain: None,
        loading: 0,
        useful: None,
        full: None,
    }
}

fn connect(worker: String, cpu: Arc<Cpu>) -> GrpcDispatch {
    muster_dispatch_grpc::connect(ConnectConfig {
        dialer: Dialer::default(),
        digests: Digests::unchecked(),
        workers: vec![worker],
        router_id: "test".into(),
        fingerprint: Fingerprint::new([1; 32]),
        hidden: HIDDEN,
        compute: Compute::F32,
        experts: WeightDType::Native,
        shape: Shape::new(vec![EXPERTS]),
        top_k: 1,
        max_rows: ROWS as u32,
        connect_timeout: PATIENCE,
        shard_deadline: PATIENCE,
        start: Start::Assigned,
        combine: Combine::Exact,
        numerics: Numerics::Exact,
        busy_poll: Duration::from_micros(50),
        cpu,
    })
    .unwrap()
}

/// An order to load one more expert.
fn order(number: u32) -> Assignment {
    Assignment {
        router: RouterName::new("test").unwrap(),
        term: NonZeroU64::MIN,
        operation: NonZeroU64::new(u64::from(number)).unwrap(),
        seen: Epoch::new(1),
        keep: (0..number).map(key).collect(),
        load: vec![Load { key: key(number), peers: vec![], digest: None }],
        peers: vec![],
    }
}

/// Polls for a bounded time.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn orders_loads_and_other_shards_do_not_wait_for_a_call_that_takes_long() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let cpu = || Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap());
    let mut set = ExpertSet::new(HIDDEN, Compute::F32, WeightDType::Native);
    set.insert(key(0), expert(INTERMEDIATE));
    let store = Arc::new(CpuStore::new(set, u64::MAX));
    let digests = [(key(0), WeightDigest::new([0; 32]))].into();
    let holder = Arc::new(Holder::new(store.clone(), digests, Instant::now()));
    let config = ServerConfig {
        shape: Shape::new(vec![EXPERTS]),
        hidden: NonZeroU32::new(HIDDEN as u32).unwrap(),
        top_k: NonZeroU32::MIN,
        queue: NonZeroUsize::new(16).unwrap(),
        streams: NonZeroUsize::new(16).unwrap(),
        max_deadline: PATIENCE,
        busy_poll: Duration::ZERO,
        fetch_rate: NonZeroUsize::MIN,
    };
    let (server, queue) = ExpertServer::new(&config, description(), holder.clone());
    let bound = runtime.block_on(Bound::bind(&"127.0.0.1:0".parse().unwrap())).unwrap();
    let (address, network) = (bound.address().to_string(), bound.network());
    let serving = server.clone();
    runtime.spawn(async move { bound.serve(&serving, None, std::future::pending()).await });
    let (began, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let mut noted =
        Noted { inner: CpuExperts::new(cpu(), store), began: began.clone(), ended: ended.clone() };
    std::thread::spawn(move || queue.run(&network, &mut noted));

    let mut dispatch = connect(address, cpu());
    let known = dispatch.transport().cluster().workers().remove(0);
    let ask = LeadAsk { router: RouterName::new("test").unwrap(), term: NonZeroU64::MIN, ttl: PATIENCE };
    assert!(runtime.block_on(known.lead(&ask, PATIENCE)).unwrap().granted);
    let submit = |dispatch: &mut GrpcDispatch, lane, count: usize| {
        let ids = vec![key(0).expert; count];
        let choices = Choices::new(1, ids, vec![1.0; count]).unwrap();
        let rows = vec![0.01; count * HIDDEN];
        let (layer, rows) = (key(0).layer, Rows::of_f32(&rows, HIDDEN).unwrap());
        dispatch.submit(&LayerBatch { layer, lane, rows, choices: &choices }).unwrap()
    };
    let long = submit(&mut dispatch, 0, ROWS);
    eventually("the long call begins", || began.load(Ordering::SeqCst));
    let short = submit(&mut dispatch, 1, 1);

    let standing = Standing { holder: holder.clone(), known: Arc::default(), joins: false };
    for number in 1..=ORDERS {
        let carried = || runtime.block_on(known.assign(&order(number))).is_ok();
        eventually("the order is carried out", carried);
        assert!(matches!(standing.readiness(), Readiness::Degraded(_)));
        // Stores the expert like the loader.
        holder.take_in(key(number), expert(16), WeightDigest::new([number as u8; 32])).unwrap();
        server.announce();
        assert_eq!(standing.readiness(), Readiness::Ready);
        assert!(!ended.load(Ordering::SeqCst), "the call was over after {number} of {ORDERS} orders");
    }
    eventually("the short shard is taken in", || server.shards_taken() == 2);
    assert!(!ended.load(Ordering::SeqCst), "the call was over before the other shard was taken in");
    assert_eq!(holder.held().experts.len(), ORDERS as usize + 1);

    let mut outputs = [vec![0.0; ROWS * HIDDEN], vec![0.0; HIDDEN]];
    for (ticket, out) in [long, short].into_iter().zip(&mut outputs) {
        dispatch.collect(ticket, Instant::now() + PATIENCE, RowsMut::of_f32(out)).unwrap();
    }
    assert_eq!(outputs[0][..HIDDEN], outputs[1][..]);
    server.close();
}
