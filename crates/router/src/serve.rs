//! The router process: bind, load, connect, serve, drain.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use muster_admin::{Admin, Readiness};
use muster_checkpoint::digests::Places;
use muster_checkpoint::{Checkpoint, CheckpointError, Source};
use muster_discovery::{Api as KubernetesApi, ObjectName, Source as WorkerSource};
use muster_dispatch_grpc::secured::Only;
use muster_dispatch_grpc::{
    ClusterHandle, ConnectConfig, ConnectError, Dialer, Fallback, Start, WeightTerms, WeightsService,
};
use muster_identity::{Access, Clients, Identity, IdentityError, Role};
use muster_kernels::{Cpu, KernelError};
use muster_model::card::{CardError, card, expert_sizes};
use muster_model::experts::faster_mode;
use muster_model::trunk::{CpuDevice, Trunk};
use muster_model::{LoadProgress, ModelError};
use muster_placement::{Shape, SizesError};
use muster_proto::card::ModelCard;
use muster_proto::convert::RouterName;
use muster_types::{Combine, Compute, Numerics, WeightDType};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cluster::digests::{self, Checking};
use crate::cluster::{CheckpointWeights, Cluster, ColdExperts, Discovery, Leader, LeaderConfig};
use crate::door::Door;
use crate::health::Health;
pub use crate::http::{Cors, Edge};
use crate::service::Service;
use crate::start::{
    Ending, EngineHandle, EngineSettings, ModelDefaults, Parts, Pulse, StartError, check_kv, start,
};
use crate::{canary, grpc, http};

/// Bytes per second of weights handed out to workers without a model.
const HAND_OUT: NonZeroUsize = NonZeroUsize::new(256 << 20).expect("it is not zero");

/// Most time for resigning the lead.
const RESIGN: Duration = Duration::from_secs(3);

/// A router's settings, checked.
pub struct RouterConfig {
    /// The model.
    pub source: Source,
    /// Places for digest files, beside the model's own directory.
    pub digests: Places,
    /// Name to serve it under; `None` takes the checkpoint's.
    pub model_name: Option<String>,
    /// Name of this router in workers' logs.
    pub router_id: String,
    /// Worker addresses, as `host:port` or `unix:/path`. Further workers can join.
    pub workers: Vec<String>,
    /// Sources for discovering further workers.
    pub discover: Vec<WorkerSource>,
    /// Lease to hold before campaigning for the lead; `None`: no condition.
    pub lease: Option<ObjectName>,
    /// Whether this router may lead the placement.
    pub placement: Placement,
    /// Wanted replicas of each expert.
    pub replicas: NonZeroU32,
    /// Whether this router itself computes experts that no worker can.
    pub fallback: bool,
    /// Address of OpenAI HTTP, probes and metrics.
    pub http: SocketAddr,
    /// Address of gRPC.
    pub grpc: SocketAddr,
    /// Dtype to which activations are rounded; `None` takes the checkpoint's.
    pub compute: Option<Compute>,
    /// Dtype of the experts' weights on workers.
    pub experts: WeightDType,
    /// Dtype of the trunk's linears.
    pub trunk: WeightDType,
    /// Compute threads of the trunk.
    pub threads: NonZeroUsize,
    /// Longest wait for all workers at the start.
    pub connect_timeout: Duration,
    /// Longest time for running requests after a stop.
    pub drain_timeout: Duration,
    /// Where expert outputs are added.
    pub combine: Combine,
    /// Whether workers of several numerics classes may compute one expert.
    pub numerics: Numerics,
    /// Time for which the engine thread polls for an answer before it sleeps.
    pub busy_poll: Duration,
    /// Use of the model's own sampling settings.
    pub defaults: ModelDefaults,
    /// Sizes and times of the engine.
    pub engine: EngineSettings,
    /// Certificate of this router; `None` speaks plaintext.
    pub identity: Option<Identity>,
    /// Access control of the public APIs.
    pub access: Access,
    /// Time after a stop in which requests are still accepted, so that load balancers notice.
    pub leave_after: Duration,
    /// Settings of the HTTP edge.
    pub edge: Edge,
}

/// Owner of the placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The leading router.
    Led,
    /// None: workers hold what they start with.
    Static,
}

/// Bound addresses of a router.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// OpenAI HTTP, probes and metrics.
    pub http: SocketAddr,
    /// gRPC.
    pub grpc: SocketAddr,
}

/// Callbacks of the process around a router.
pub struct Hooks {
    /// Called while weights are loaded.
    pub progress: Box<dyn FnMut(LoadProgress) + Send>,
    /// Called once, when requests can be served.
    pub ready: Box<dyn FnOnce(Bound) + Send>,
    /// Probes, drain and end, as asked through the admin address.
    pub admin: Admin,
}

/// Why a router could not run.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// An address could not be bound.
    #[error("cannot listen on {address} ({what}): {source}; choose another with --{what}")]
    Bind {
        /// "http" or "grpc".
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// TLS.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The model's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model's weights.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Compute threads.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The workers.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Tokenizer, KV cache, sizes.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A server stopped.
    #[error("the {what} server failed: {reason}")]
    Server {
        /// "http" or "grpc".
        what: &'static str,
        /// Its reason.
        reason: String,
    },
    /// The experts are too large for a placement.
    #[error(transparent)]
    Sizes(#[from] SizesError),
    /// A size of the model is out of the protocol's range.
    #[error(transparent)]
    Card(#[from] CardError),
    /// A thread could not be started.
    #[error("cannot start the thread that checks weights: {0}; check the limit on processes and threads")]
    Thread(std::io::Error),
    /// The engine thread died.
    #[error("the engine stopped unexpectedly; see the log above")]
    Engine,
}

/// Runs a router until [`Hooks::admin`] is told to drain or to end, drains it, and returns when it is told to end.
///
/// # Errors
/// When it cannot start, or a part of it fails while it runs.
pub async fn run(config: RouterConfig, hooks: Hooks) -> Result<(), RouterError> {
    let http_listener = bind("http", config.http)?;
    let grpc_listener = bind("grpc", config.grpc)?;
    let bound = Bound { http: address(&http_listener, "http")?, grpc: address(&grpc_listener, "grpc")? };
    let (drain, leave_after) = (config.drain_timeout, config.leave_after);
    let (identity, access, edge) = (config.identity.clone(), config.access.clone(), config.edge.clone());
    let tls =
        |protocol| identity.as_ref().map(|identity| identity.server(Clients::Any, protocol)).transpose();
    let (http_tls, grpc_tls) = (tls("http/1.1")?, tls("h2")?);
    let Hooks { progress, ready, admin } = hooks;
    // Ends with this function.
    let mut beside = JoinSet::new();
    if let Some(identity) = &identity {
        beside.spawn(identity.clone().keep_fresh());
    }
    beside.spawn(access.clone().keep_fresh());

    let starting = admin.clone();
    let assembled = tokio::task::spawn_blocking(move || assemble(config, progress, &starting));
    let Assembled { parts, cluster, workers, leader, weights, wait } = tokio::select! {
        parts = assembled => parts.map_err(|_| RouterError::Engine)??,
        () = admin.end_asked() => return Ok(()),
    };
    // Before this router leads, so that what can fail by itself has.
    let (service, engine) = start(parts)?;
    let stop = CancellationToken::new();
    let leading = leader.map(|leader| {
        let leader = Leader::new(workers.clone(), leader, cluster.leader.clone());
        tokio::spawn(lead(leader, service.clone(), stop.clone()))
    });
    let doors = [
        Door { listener: http_listener, tls: http_tls, access: access.clone() },
        Door { listener: grpc_listener, tls: grpc_tls, access },
    ];
    let router =
        Router { service, engine, cluster, workers, weights, is_known: identity.is_some(), doors, edge };
    let times = Times { wait, leave_after, drain };
    let outcome = serve(router, times, bound, ready, &admin, &stop).await;
    // Whatever ended it: others need not wait until the lead runs out.
    stop.cancel();
    if let Some(leading) = leading {
        // A panic over there is in the log already.
        let _ = leading.await;
    }
    outcome?;
    admin.drained().await;
    Ok(())
}

/// Leads while permitted, until `stop`; then resigns, for at most [`RESIGN`]. Keeps the service, and with it the
/// connections to the workers, until then.
async fn lead(leader: Leader, service: Service, stop: CancellationToken) {
    let patience = async {
        stop.cancelled().await;
        tokio::time::sleep(RESIGN).await;
    };
    tokio::select! {
        () = leader.run(stop.clone()) => {}
        () = patience => tracing::warn!("the lead could not be given back in time; it runs out by itself"),
    }
    drop(service);
}

/// Parts of a router that serve.
struct Router {
    service: Service,
    engine: EngineHandle,
    cluster: Arc<Cluster>,
    workers: ClusterHandle,
    weights: HandedOut,
    /// Whether callers are known by certificates.
    is_known: bool,
    /// Listeners of HTTP and gRPC.
    doors: [Door; 2],
    edge: Edge,
}

/// Time limits of a router.
struct Times {
    /// Longest wait for every expert to have a worker, at the start; `None`: no wait.
    wait: Option<Duration>,
    leave_after: Duration,
    drain: Duration,
}

/// Serves until a drain or a failure, and drains.
async fn serve(
    router: Router,
    times: Times,
    bound: Bound,
    ready: Box<dyn FnOnce(Bound) + Send>,
    admin: &Admin,
    stop: &CancellationToken,
) -> Result<(), RouterError> {
    let Router { service, mut engine, cluster, workers, weights, is_known, doors, edge } = router;
    if let Some(timeout) = times.wait {
        let covering = workers.clone();
        let covered = tokio::task::spawn_blocking(move || covering.await_coverage(Instant::now() + timeout));
        let is_covered = tokio::select! {
            covered = covered => covered.unwrap_or(false),
            () = admin.end_asked() => return Ok(()),
        };
        if !is_covered {
            let (missing, refused) = (cluster.workers.missing(), cluster.digests.refusals());
            return Err(ConnectError::MissingExperts { missing, refused }.into());
        }
    }
    if cluster.is_covered() {
        // A test token precedes the announcement of readiness, so that it holds.
        canary::take(&service, &cluster.pulse).await;
    }
    let covered = cluster.clone();
    tokio::spawn(canary::keep(
        service.clone(),
        cluster.pulse.clone(),
        move || covered.is_covered(),
        stop.clone(),
    ));
    let [http_door, grpc_door] = doors;
    let api = grpc::cluster::Api {
        cluster: cluster.clone(),
        workers,
        card: weights.card,
        stop: stop.clone(),
        joins: grpc::Joins::default(),
        workers_only: Only(is_known.then_some(&[Role::Worker])),
        access: grpc_door.access.clone(),
    };
    let with_workers = grpc::Workers {
        cluster: api,
        weights: weights.service,
        weights_only: Only(is_known.then_some(&[Role::Worker, Role::Router])),
    };
    admin.ask(readiness(service.clone()));
    let rendered = admin.clone();
    let metrics = Arc::new(move || rendered.metrics());
    let mut http_server = tokio::spawn(http::serve(service.clone(), metrics, http_door, edge, stop.clone()));
    let mut grpc_server = tokio::spawn(grpc::serve(service, Some(with_workers), grpc_door, stop.clone()));
    tracing::info!(http = %bound.http, grpc = %bound.grpc, "serving");
    ready(bound);

    let outcome = tokio::select! {
        () = admin.drain_asked() => Ok(()),
        () = engine.ended() => return Err(RouterError::Engine),
        ended = &mut http_server => Err(failed("http", ended.err().map(|error| error.to_string()))),
        ended = &mut grpc_server => Err(failed("grpc", match ended {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        })),
    };
    if outcome.is_ok() && !times.leave_after.is_zero() {
        let leave_after = times.leave_after;
        tracing::info!(?leave_after, "leaving: not ready any more, new requests are taken for a while");
        cluster.leave();
        tokio::time::sleep(leave_after).await;
    }
    tracing::info!("draining: no new requests, running ones may finish");
    admin.not_ready("it drains");
    stop.cancel();
    // The servers hold the service until their last request is answered; then the engine ends by itself.
    if engine.stop(times.drain).await == Ending::CutOff {
        tracing::warn!(drain = ?times.drain, "requests were still running when the drain time was up");
    }
    outcome
}

/// The probes' readiness, from the health.
fn readiness(service: Service) -> impl Fn() -> Readiness {
    move || match service.health() {
        Health::Ready => Readiness::Ready,
        Health::Degraded { reasons } => Readiness::Degraded(reasons.join("; ")),
        Health::NotReady { reason } => Readiness::NotReady(reason),
    }
}

fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, RouterError> {
    muster_net::listen::tcp(address).map_err(|source| RouterError::Bind { what, address, source })
}

fn address(listener: &TcpListener, what: &'static str) -> Result<SocketAddr, RouterError> {
    listener.local_addr().map_err(|error| RouterError::Server { what, reason: error.to_string() })
}

fn failed(what: &'static str, reason: Option<String>) -> RouterError {
    RouterError::Server { what, reason: reason.unwrap_or_else(|| "it ended by itself".into()) }
}

/// All parts of a router.
struct Assembled {
    parts: Parts,
    cluster: Arc<Cluster>,
    workers: ClusterHandle,
    /// Settings of the leader, if this router may lead.
    leader: Option<LeaderConfig>,
    weights: HandedOut,
    /// Longest wait for every expert to have a worker; `None`: no wait.
    wait: Option<Duration>,
}

/// Model and weights for workers that join without a model.
struct HandedOut {
    card: Arc<ModelCard>,
    service: WeightsService,
}

/// Slow part of the start: reads and packs the trunk, connects to the workers.
fn assemble(
    config: RouterConfig,
    mut progress: Box<dyn FnMut(LoadProgress) + Send>,
    admin: &Admin,
) -> Result<Assembled, RouterError> {
    let checkpoint = Arc::new(Checkpoint::open(&config.source)?);
    let defaults = config.defaults.of(&checkpoint).map_err(StartError::Defaults)?;
    let spec = checkpoint.spec();
    let compute = checkpoint.compute(config.compute);
    let cpu = Arc::new(Cpu::new(config.threads)?);
    tracing::info!(model = checkpoint.name(), %compute, isa = %cpu.isa(), "loading the trunk");
    if let Some(hint) = faster_mode(compute, cpu.isa()) {
        tracing::info!("{hint}");
    }
    let model = config.source.directory().map(Path::to_owned);
    check_kv(&checkpoint, compute, config.engine.kv_bytes)?;
    let digests = digests::start(Checking {
        checkpoint: checkpoint.clone(),
        compute,
        dtype: config.experts,
        threads: config.threads,
        places: Places { model, ..config.digests },
    })
    .map_err(RouterError::Thread)?;
    let checking = digests.clone();
    admin
        .ask(move || Readiness::NotReady(checking.progress().unwrap_or_else(|| "it is starting".to_owned())));
    let card = Arc::new(card(&checkpoint, compute, config.experts)?);
    let shape = Shape::new(card.shape());
    // Unique among processes, so that a promise to another router is not taken for one to this router.
    let name = format!("{}/{}", config.router_id, &uuid::Uuid::new_v4().simple().to_string()[..12]);
    let kubernetes = KubernetesApi::infer();
    let leader = match config.placement {
        Placement::Static => None,
        Placement::Led => Some(LeaderConfig {
            name: RouterName::new(&name).map_err(ConnectError::RouterId)?,
            sizes: expert_sizes(&card)?,
            shape: shape.clone(),
            replicas: config.replicas,
            lease: config.lease.map(|lease| (kubernetes.clone(), lease)),
            digests: digests.clone(),
        }),
    };
    let trunk = Arc::new(Trunk::load(
        &CpuDevice::new(Arc::clone(&cpu), compute),
        &checkpoint,
        config.trunk,
        &mut progress,
    )?);
    let is_alone = config.workers.is_empty();
    if !is_alone {
        // Waiting starts only once the digests are known, as no worker can connect before.
        let total_bytes = checkpoint.inventory().total_bytes;
        digests.wait(|known, experts| {
            let done_bytes = total_bytes / experts.max(1) as u64 * known as u64;
            progress(LoadProgress { done_bytes, total_bytes });
        });
    }
    let is_told = !config.discover.is_empty();
    let workers = u32::try_from(config.workers.len()).unwrap_or(u32::MAX);
    let fallback = match config.fallback {
        false => None,
        true => {
            let cpu = Arc::new(Cpu::new(config.threads)?);
            let experts = ColdExperts::new(checkpoint.clone(), cpu, compute, config.experts, digests.clone());
            Some(Fallback { experts: Box::new(experts) })
        }
    };
    let has_fallback = fallback.is_some();
    let connect = ConnectConfig {
        workers: config.workers,
        router_id: config.router_id.clone(),
        fingerprint: checkpoint.fingerprint(),
        hidden: spec.hidden,
        compute,
        experts: config.experts,
        digests: digests.clone(),
        shape: shape.clone(),
        top_k: card.top_k.get(),
        max_rows: config.engine.step_tokens,
        start: if is_alone || has_fallback || leader.is_some() { Start::Assigned } else { Start::Complete },
        connect_timeout: config.connect_timeout,
        shard_deadline: config.engine.expert_timeout,
        combine: config.combine,
        numerics: config.numerics,
        busy_poll: config.busy_poll,
        cpu: Arc::clone(&cpu),
        dialer: Dialer::new(config.identity.as_ref(), &[Role::Worker])?,
    };
    let dispatch = muster_dispatch_grpc::connect_with(connect, fallback)?;
    let pulse = Arc::new(Pulse::default());
    let handle = dispatch.transport().cluster();
    let cluster = Arc::new(Cluster {
        router: config.router_id,
        workers: dispatch.transport().health(),
        digests: digests.clone(),
        leader: Arc::default(),
        pulse: Arc::clone(&pulse),
        discovery: Discovery::start(config.discover, &kubernetes, &handle),
        experts: u32::try_from(shape.total()).unwrap_or(u32::MAX),
        replicas: config.replicas,
        is_leaving: AtomicBool::new(false),
    });
    let terms = WeightTerms {
        fingerprint: checkpoint.fingerprint(),
        compute,
        experts: config.experts,
        shape: shape.experts().to_vec(),
        rate: HAND_OUT,
    };
    let source =
        CheckpointWeights { checkpoint: checkpoint.clone(), compute, dtype: config.experts, digests };
    let (probe, bound) = (Arc::clone(&cluster), Arc::clone(&cluster));
    let parts = Parts {
        checkpoint,
        trunk,
        dispatch: Box::new(dispatch),
        experts: config.experts,
        health: Arc::new(move || probe.health()),
        bound: Arc::new(move || bound.workers.bound()),
        pulse,
        workers,
        combine: config.combine,
        model_name: config.model_name,
        defaults,
        settings: config.engine,
    };
    if is_alone && !is_told {
        tracing::warn!("no workers yet: start some with `muster worker --join`, or name them with --worker");
    }
    let wait = (!is_alone && !has_fallback && leader.is_some()).then_some(config.connect_timeout);
    let weights = HandedOut { card, service: WeightsService::new(terms, Arc::new(source)) };
    Ok(Assembled { parts, cluster, workers: handle, leader, weights, wait })
}
