//! The expert worker: bind, load, announce, serve, change, drain.
//!
//! Owns the order of a worker's life. An address that cannot be bound is reported before anything is loaded, and
//! nothing is served before every expert of the share it starts with is read, checked and packed. From then on the
//! leading router assigns its experts, and it serves meanwhile. Keeps nothing about a request after its reply. Knows
//! routers only through [`muster_dispatch_grpc`], and nothing of signals, flags or files other than the model's.

mod holder;
mod load;
mod loader;
#[cfg(test)]
mod long_call;
mod membership;
mod memory;
mod report;

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use muster_admin::Admin;
use muster_checkpoint::{CheckpointError, Source};
use muster_dispatch_grpc::{
    Address, BindError, Bound, Custody, Dialer, ExpertServer, Held, JoinError, ServeError, ServerConfig,
};
use muster_identity::{Identity, IdentityError, Role};
use muster_kernels::KernelError;
use muster_model::card::CardError;
use muster_model::experts::{CpuExperts, ExpertStore};
use muster_model::{LoadProgress, ModelError};
use muster_placement::{Share, ShareError};
use muster_proto::description::{Description, Phase};
use muster_types::{Compute, Epoch, Speed, WeightDType, WorkerId};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use holder::Holder;
use load::Loaded;
use loader::Loader;
use membership::{Applicant, Routers};
use report::Standing;

pub use memory::{PART_FOR_EXPERTS, memory_for_experts};

/// Longest time a router may ask for; longer deadlines are cut to it.
const MAX_DEADLINE: Duration = Duration::from_secs(300);
/// Time for streams to end, and for the experts' thread to finish its shard, once everything is answered.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval of a draining worker's checks whether it is still needed.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Time without shards after which a worker without a leader is not needed.
const QUIET: Duration = Duration::from_millis(150);

/// A worker's settings, checked.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Address to listen on. Port 0 lets the system pick one.
    pub listen: Address,
    /// The worker's name; no two workers of a cluster share one.
    pub worker_id: WorkerId,
    /// The model; `None` takes the model and its weights from a router to join.
    pub source: Option<Source>,
    /// Routers to join; a name stands for those at all its addresses.
    pub join: Vec<Address>,
    /// Address for others, if it differs from `listen`.
    pub advertise: Option<Address>,
    /// Share of the model's experts to start with.
    pub share: Share,
    /// Bytes for experts; `None` takes most of what is free.
    pub memory: Option<u64>,
    /// Speed relative to other workers; `None` counts threads.
    pub speed: Option<Speed>,
    /// Failure domain, such as a host or a rack.
    pub domain: Option<String>,
    /// Bytes a second that other workers may fetch from it.
    pub fetch_rate: NonZeroUsize,
    /// Rounding of activations; `None` takes the checkpoint's dtype.
    pub compute: Option<Compute>,
    /// Packing of the experts.
    pub experts: WeightDType,
    /// Compute threads.
    pub threads: NonZeroUsize,
    /// Most rows of one shard.
    pub max_rows: NonZeroU32,
    /// Most shards waiting for the experts; excess ones are refused.
    pub queue: NonZeroUsize,
    /// Most streams open at once; a router needs three.
    pub streams: NonZeroUsize,
    /// Time to poll for the next shard after an answer before sleeping.
    pub busy_poll: Duration,
    /// Longest drain: time to serve experts without another owner.
    pub drain_timeout: Duration,
    /// Its identity; `None` speaks plaintext.
    pub identity: Option<Identity>,
}

/// A worker that accepts rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// Address it listens on, with the port that the system picked.
    pub address: Address,
    /// Number of experts it holds.
    pub experts: usize,
    /// Bytes of their packed weights.
    pub bytes: u64,
}

/// Hooks of the process around a worker.
pub struct Hooks {
    /// Called while experts are loaded.
    pub progress: Box<dyn FnMut(LoadProgress) + Send>,
    /// Called once, when it accepts rows.
    pub ready: Box<dyn FnOnce(Ready) + Send>,
    /// The admin interface.
    pub admin: Admin,
}

/// Reasons why a worker cannot run.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The model's files are unusable.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The experts' weights are unusable.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The compute threads could not be started.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The share to start with is invalid.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// TLS failed.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No router accepts the worker.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// There is neither a model nor a router with one to join.
    #[error("there is no model: give --model, or --join a router that has one")]
    NoModel,
    /// The share does not fit the memory.
    #[error(
        "the share takes {needed} bytes and there are {memory}; raise --memory or take a smaller --share"
    )]
    Memory {
        /// Bytes of the share.
        needed: u64,
        /// Bytes for experts.
        memory: u64,
    },
    /// A size of the model that the protocol cannot carry.
    #[error(transparent)]
    Card(#[from] CardError),
    /// A thread could not be started.
    #[error("cannot start the {name} thread: {source}; check the limit on processes and threads")]
    Thread {
        /// Its name.
        name: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The loading thread died.
    #[error("loading stopped unexpectedly; see the log above")]
    Loading,
    /// The server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The server ended by itself.
    #[error("the server stopped unexpectedly")]
    Server,
    /// The experts' thread died.
    #[error("the experts' thread stopped unexpectedly; see the log above")]
    Experts,
}

/// Runs a worker until a drain or an end is requested at [`Hooks::admin`], drains it, and returns once an end is
/// requested. During the drain it serves until its experts have other owners or no router uses them, at most for the
/// drain time.
///
/// # Errors
/// When it cannot start, or a part of it fails while it runs.
pub async fn run(config: WorkerConfig, hooks: Hooks) -> Result<(), WorkerError> {
    let started = Instant::now();
    // Bound first, so that a wrong address fails before minutes of loading.
    let bound = Bound::bind(&config.listen).await?;
    let address = bound.address().clone();
    let drain_timeout = config.drain_timeout;
    let Hooks { progress, ready, admin } = hooks;
    let identity = config.identity.clone();
    // Tasks that end with this function.
    let mut beside = JoinSet::new();
    if let Some(identity) = &identity {
        beside.spawn(identity.clone().keep_fresh());
    }

    let mut applicant = Applicant {
        worker: config.worker_id.clone(),
        listen: address.clone(),
        advertise: config.advertise.clone(),
        model: None,
        dialer: Dialer::new(identity.as_ref(), &[Role::Router])?,
        known: Arc::new(AtomicUsize::new(0)),
    };
    let routers: Vec<Routers> = config.join.iter().map(Routers::of).collect();
    let first = match &config.source {
        None if !routers.is_empty() => tokio::select! {
            first = applicant.first(&routers, |reason| admin.not_ready(format!("waiting for a router: {reason}"))) => Some(first?),
            () = admin.end_asked() => return Ok(()),
        },
        _ => None,
    };
    let card = first.as_ref().map(|membership| membership.card.clone());
    let loading = load::start(config.clone(), card, progress)?;
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(|_| WorkerError::Loading)??,
        () = admin.end_asked() => return Ok(()),
    };
    applicant.model = Some(loaded.sources.fingerprint);
    let mut description = describe(&config, &loaded);
    let (experts, bytes) = (description.holdings.len(), description.resident_bytes);
    let server_config = server_config(&config, &loaded);
    let Loaded { cpu, store, digests, sources, .. } = loaded;
    let holder = Arc::new(Holder::new(store.clone(), digests, started));
    let Held { useful, full, .. } = holder.held();
    (description.useful, description.full) = (useful, full);
    let (server, queue) = ExpertServer::new(&server_config, description, holder.clone());
    beside.spawn(report::measure(holder.clone(), store.capacity(), queue.pressure()));
    let network = bound.network();
    let mut computing =
        on_thread("muster-experts", move || queue.run(&network, &mut CpuExperts::new(cpu, store)))?;
    let runtime = tokio::runtime::Handle::current();
    let dialer = Dialer::new(identity.as_ref(), &[Role::Router, Role::Worker])?;
    let loader = Loader { holder: holder.clone(), server: server.clone(), sources, runtime, dialer };
    let mut loading = on_thread("muster-load", move || loader.run())?;

    let (stop, stopped) = oneshot::channel::<()>();
    let serving = server.clone();
    let mut serving = tokio::spawn(async move {
        let stopped = async {
            // An error means that the sender was dropped, which stops the server as well.
            let _ = stopped.await;
        };
        bound.serve(&serving, identity.as_ref(), stopped).await
    });
    for routers in routers {
        beside.spawn(applicant.clone().stay_with(routers));
    }
    // The first membership ends only after the others have begun, so that its router knows the worker throughout.
    drop(first);
    tracing::info!(worker = %config.worker_id, %address, experts, bytes, "serving experts");
    let standing =
        Standing { holder: holder.clone(), known: applicant.known, joins: !config.join.is_empty() };
    admin.ask(move || standing.readiness());
    ready(Ready { address, experts, bytes });

    let outcome = tokio::select! {
        () = admin.drain_asked() => Ok(()),
        _ = &mut computing => Err(WorkerError::Experts),
        _ = &mut loading => Err(WorkerError::Loading),
        ended = &mut serving => {
            holder.stop();
            server.close();
            return match ended {
                Ok(Ok(())) | Err(_) => Err(WorkerError::Server),
                Ok(Err(error)) => Err(error.into()),
            };
        }
    };
    if outcome.is_ok() {
        admin.not_ready("it drains");
        drain(&server, &holder, drain_timeout).await;
        admin.drained().await;
    }
    holder.stop();
    server.close();
    drop(stop);
    if tokio::time::timeout(CLOSE_TIMEOUT, &mut serving).await.is_err() {
        tracing::warn!("a router keeps its connection open; leaving it");
        serving.abort();
    }
    // The compute thread finishes its shard, the loader its current read.
    for thread in [&mut computing, &mut loading] {
        // A terminated thread was already awaited: its end stopped the worker.
        if !thread.is_terminated() {
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, thread).await;
        }
    }
    outcome
}

async fn drain(server: &ExpertServer, holder: &Holder, timeout: Duration) {
    tracing::info!("draining: serving until no router needs the experts held here");
    let deadline = Instant::now() + timeout;
    server.drain();
    let (mut taken, mut since) = (server.shards_taken(), Instant::now());
    loop {
        let now = Instant::now();
        if server.shards_taken() != taken {
            (taken, since) = (server.shards_taken(), now);
        }
        if server.open_streams() == 0 || holder.is_unwanted() {
            break;
        }
        // With a leader, the drain waits for other workers to load the experts.
        if !server.is_led() && now - since >= QUIET {
            break;
        }
        if now >= deadline {
            let experts = holder.held().experts.len();
            tracing::warn!(
                ?timeout,
                experts,
                "the drain time is up; rows may have to wait for the experts held here"
            );
            break;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    server.refuse();
    if tokio::time::timeout(CLOSE_TIMEOUT, server.idle()).await.is_err() {
        tracing::warn!("shards are still being computed");
    }
}

fn describe(config: &WorkerConfig, loaded: &Loaded) -> Description {
    Description {
        worker: config.worker_id.clone(),
        fingerprint: loaded.sources.fingerprint,
        numerics: loaded.store.numerics(),
        compute: loaded.sources.compute,
        experts: loaded.sources.dtype,
        epoch: Epoch::new(1),
        holdings: loaded.digests.keys().copied().collect(),
        // In the order of the keys.
        digests: loaded.digests.values().copied().collect(),
        resident_bytes: loaded.store.resident_bytes(),
        phase: Phase::Serving,
        max_rows: config.max_rows,
        capacity: loaded.store.capacity(),
        speed: config.speed.unwrap_or_else(|| Speed::new(config.threads.get() as f64).unwrap_or(Speed::ONE)),
        domain: config.domain.clone(),
        loading: 0,
        useful: None,
        full: None,
        trouble: None,
    }
}

fn server_config(config: &WorkerConfig, loaded: &Loaded) -> ServerConfig {
    ServerConfig {
        shape: loaded.shape.clone(),
        hidden: loaded.hidden,
        top_k: loaded.top_k,
        queue: config.queue,
        streams: config.streams,
        max_deadline: MAX_DEADLINE,
        busy_poll: config.busy_poll,
        fetch_rate: config.fetch_rate,
    }
}

/// Runs `work` on a separate thread. The receiver gets its result, or an error when it panics.
fn on_thread<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<oneshot::Receiver<T>, WorkerError> {
    let (done, result) = oneshot::channel();
    let run = move || {
        // Fails when the receiver was dropped, which needs no handling.
        let _ = done.send(work());
    };
    match std::thread::Builder::new().name(name.to_owned()).spawn(run) {
        Ok(_) => Ok(result),
        Err(source) => Err(WorkerError::Thread { name, source }),
    }
}
