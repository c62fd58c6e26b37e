//! The worker's side: admits routers, checks shards, feeds the experts' thread, announces holdings.
//!
//! What always holds: a shard reaches the experts only after every rule of the protocol was checked; it has its
//! place in the reply stream reserved before it is queued, so the experts' thread never waits for a reader; and
//! every shard that was read gets exactly one answer as long as its stream lives.

mod call;
mod control;
mod listen;
mod pressure;
mod queue;
mod stream;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use muster_placement::Shape;
use muster_proto::WireError;
use muster_proto::control::{Assignment, LeadAsk, rows_to_wire};
use muster_proto::description::{Description, Phase};
use muster_proto::expert::v1;
use muster_proto::expert::v1::control_server::{Control, ControlServer};
use muster_proto::expert::v1::experts_server::{Experts, ExpertsServer};
use muster_proto::expert::v1::weights_server::WeightsServer;
use muster_proto::handshake::{HandshakeError, Terms};
use muster_proto::limits::MessageLimits;
use muster_proto::shard::ShardRules;
use muster_types::{Epoch, ExpertKey};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub(crate) use call::Call;
pub use control::{Custody, Held};
use control::{Obedience, RowCounts};
pub use listen::{BindError, Bound, ServeError};
pub use pressure::{Pressure, Smoothed};
use queue::Jobs;
pub use queue::{ComputeQueue, Network};
pub use stream::Replies;
pub use weights::{Handed, WeightSource, WeightTerms, WeightsService};

/// Time a router has to say hello on a new stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Model shapes and limits of a server.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Routed experts of every layer of the model.
    pub shape: Shape,
    /// Elements of a hidden row.
    pub hidden: NonZeroU32,
    /// Most experts that one row goes to.
    pub top_k: NonZeroU32,
    /// Shards that wait for the experts; one more is refused as overloaded.
    pub queue: NonZeroUsize,
    /// Dispatch and watch streams open at once, over all connections.
    pub streams: NonZeroUsize,
    /// Longer deadlines are cut to this.
    pub max_deadline: Duration,
    /// How long the experts' thread looks for the next shard after an answer before it sleeps.
    pub busy_poll: Duration,
    /// Bytes a second that other workers may fetch from this one.
    pub fetch_rate: NonZeroUsize,
}

/// The gRPC service of a worker. Clones share one state.
#[derive(Clone)]
pub struct ExpertServer {
    shared: Arc<Shared>,
}

/// What all streams of a server share.
struct Shared {
    terms: Terms,
    rules: ShardRules,
    limits: MessageLimits,
    description: watch::Sender<Description>,
    /// Epoch since which each expert of the description is announced. Locked during a change of the announcement, including the
    /// call of the custody, and so never on the network's thread.
    since: Mutex<BTreeMap<ExpertKey, Epoch>>,
    jobs: Arc<Jobs>,
    in_flight: watch::Sender<usize>,
    streams: Arc<Semaphore>,
    capacity: usize,
    custody: Arc<dyn Custody>,
    obedience: Obedience,
    /// Serialises grants of the lead and the carrying out of orders.
    turn: Arc<tokio::sync::Mutex<()>>,
    rows: Arc<RowCounts>,
    weights: WeightsService,
    /// New shards are refused.
    is_leaving: AtomicBool,
    stop: CancellationToken,
}

impl Shared {
    fn since(&self) -> MutexGuard<'_, BTreeMap<ExpertKey, Epoch>> {
        // A change that panicked announced nothing; the next one compares with the holdings anyway.
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces the current holdings. The caller has `since` locked, so that the last announcement has the last holdings; the
    /// description, which every shard reads, is not locked during the call of the custody.
    fn refresh(&self, since: &mut BTreeMap<ExpertKey, Epoch>) {
        let Held { mut experts, mut digests, resident_bytes, loading, useful, full, mut trouble } =
            self.custody.held();
        let loading = u32::try_from(loading).unwrap_or(u32::MAX);
        let new: Vec<ExpertKey> = experts.iter().filter(|key| !since.contains_key(key)).copied().collect();
        let before = since.len();
        since.retain(|key, _| experts.binary_search(key).is_ok());
        let same = new.is_empty() && since.len() == before;
        let epoch = self.describe(|description| {
            let figures = (resident_bytes, loading, useful, full);
            let before =
                (description.resident_bytes, description.loading, description.useful, description.full);
            if same && figures == before && digests == description.digests && trouble == description.trouble {
                return false;
            }
            if !same {
                std::mem::swap(&mut description.holdings, &mut experts);
            }
            std::mem::swap(&mut description.digests, &mut digests);
            std::mem::swap(&mut description.trouble, &mut trouble);
            description.resident_bytes = resident_bytes;
            description.capacity = description.capacity.max(resident_bytes);
            description.loading = loading;
            (description.useful, description.full) = (useful, full);
            true
        });
        since.extend(new.into_iter().map(|key| (key, epoch)));
    }

    /// Changes the description; `change` returns whether it did. Returns the epoch.
    fn describe(&self, change: impl FnOnce(&mut Description) -> bool) -> Epoch {
        let mut epoch = None;
        self.description.send_if_modified(|description| {
            let changed = change(description);
            if changed {
                description.epoch = description.epoch.next();
            }
            epoch = Some(description.epoch);
            changed
        });
        epoch.unwrap_or_else(|| self.description.borrow().epoch)
    }
}

impl ExpertServer {
    /// A server for a worker with this description and custody, and the queue that its experts' thread must run.
    #[must_use]
    pub fn new(
        config: &ServerConfig,
        description: Description,
        custody: Arc<dyn Custody>,
    ) -> (Self, ComputeQueue) {
        let wire = description.compute.wire_dtype();
        let terms = Terms {
            fingerprint: description.fingerprint,
            hidden: config.hidden.get(),
            compute: description.compute,
            experts: description.experts,
            numerics: description.numerics,
        };
        let rules = ShardRules {
            hidden: terms.hidden,
            wire,
            experts: config.shape.experts().into(),
            top_k: config.top_k.get(),
            max_rows: description.max_rows,
            max_deadline: config.max_deadline,
        };
        let most = config.shape.experts().iter().copied().max().unwrap_or(0);
        let limits = MessageLimits::new(rules.hidden, wire, rules.max_rows, rules.top_k, most);
        let capacity = config.streams.get().min(Semaphore::MAX_PERMITS);
        let rows = Arc::new(RowCounts::new(config.shape.experts()));
        let (jobs, queue) =
            ComputeQueue::new(config.queue, config.busy_poll, rules.clone(), Arc::clone(&rows));
        let weights = WeightTerms {
            fingerprint: terms.fingerprint,
            compute: terms.compute,
            experts: terms.experts,
            shape: config.shape.experts().to_vec(),
            rate: config.fetch_rate,
        };
        let shared = Shared {
            weights: WeightsService::new(weights, custody.clone()),
            terms,
            rules,
            limits,
            since: Mutex::new(description.holdings.iter().map(|key| (*key, description.epoch)).collect()),
            description: watch::Sender::new(description),
            jobs,
            in_flight: watch::Sender::new(0),
            streams: Arc::new(Semaphore::new(capacity)),
            capacity,
            custody,
            obedience: Obedience::new(),
            turn: Arc::default(),
            rows,
            is_leaving: AtomicBool::new(false),
            stop: CancellationToken::new(),
        };
        (Self { shared: Arc::new(shared) }, queue)
    }

    /// Announces the current holdings. Blocks while an order is carried out.
    pub fn announce(&self) {
        self.shared.refresh(&mut self.shared.since());
    }

    /// Carries out an order. Returns the epoch of the description that shows it. Blocks as long as the custody does.
    fn obey(&self, mut assignment: Assignment) -> Epoch {
        let mut since = self.shared.since();
        // Experts that the leader may not know of.
        let asked: BTreeSet<ExpertKey> = assignment.load.iter().map(|load| load.key).collect();
        let unknown = since.iter().filter(|(key, at)| **at > assignment.seen && !asked.contains(key));
        assignment.keep.extend(unknown.map(|(key, _)| *key));
        assignment.keep.sort_unstable();
        assignment.keep.dedup();
        self.shared.custody.assign(assignment);
        self.shared.refresh(&mut since);
        drop(since);
        self.shared.description.borrow().epoch
    }

    /// Announces a drain. The worker serves as before.
    pub fn drain(&self) {
        self.shared.describe(|description| {
            std::mem::replace(&mut description.phase, Phase::Draining) == Phase::Serving
        });
    }

    /// Refuses all further shards.
    pub fn refuse(&self) {
        self.shared.is_leaving.store(true, Ordering::Release);
    }

    /// Whether this worker has a leader now.
    #[must_use]
    pub fn is_led(&self) -> bool {
        self.shared.obedience.is_led()
    }

    /// Waits until no shard is queued or computed.
    pub async fn idle(&self) {
        // Fails only when the sender is gone, and this holds it.
        let _ = self.shared.in_flight.subscribe().wait_for(|shards| *shards == 0).await;
    }

    /// Shards taken so far.
    #[must_use]
    pub fn shards_taken(&self) -> u64 {
        self.shared.jobs.taken()
    }

    /// Dispatch and watch streams that are open.
    #[must_use]
    pub fn open_streams(&self) -> usize {
        self.shared.capacity - self.shared.streams.available_permits()
    }

    /// Ends every stream after its answers are sent, and lets the experts' thread finish.
    pub fn close(&self) {
        self.shared.stop.cancel();
        self.shared.jobs.close();
    }

    fn service(&self) -> ExpertsServer<Self> {
        ExpertsServer::new(self.clone())
            .max_decoding_message_size(self.shared.limits.request_bytes)
            .max_encoding_message_size(self.shared.limits.reply_bytes.max(self.description_bytes()))
    }

    fn control(&self) -> ControlServer<Self> {
        ControlServer::new(self.clone())
            .max_decoding_message_size(MessageLimits::assignment_bytes(self.experts()))
            .max_encoding_message_size(self.description_bytes())
    }

    fn weights(&self) -> WeightsServer<WeightsService> {
        self.shared.weights.clone().into_service()
    }

    /// Routed experts of the model.
    fn experts(&self) -> usize {
        self.shared.rules.experts.iter().map(|&count| count as usize).sum()
    }

    fn description_bytes(&self) -> usize {
        MessageLimits::description_bytes(self.experts())
    }

    fn stream_permit(&self) -> Result<tokio::sync::OwnedSemaphorePermit, Status> {
        let full = |_| Status::resource_exhausted("this worker has as many open streams as it allows");
        self.shared.streams.clone().try_acquire_owned().map_err(full)
    }
}

#[tonic::async_trait]
impl Experts for ExpertServer {
    async fn describe(
        &self,
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::WorkerDescription>, Status> {
        Ok(Response::new(self.shared.description.borrow().to_wire()))
    }

    type WatchStream = ReceiverStream<Result<v1::WorkerDescription, Status>>;

    async fn watch(&self, _: Request<v1::DescribeRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let permit = self.stream_permit()?;
        let mut changes = self.shared.description.subscribe();
        let stop = self.shared.stop.clone();
        let (updates, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            let _permit = permit;
            loop {
                let now = changes.borrow_and_update().to_wire();
                if updates.send(Ok(now)).await.is_err() {
                    return;
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = updates.closed() => return,
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type DispatchStream = Replies;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::DispatchRequest>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        let permit = self.stream_permit()?;
        let mut inbound = request.into_inner();
        let hello = tokio::time::timeout(HELLO_TIMEOUT, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello came"))??;
        let greeting = match hello.and_then(|message| message.body) {
            Some(v1::dispatch_request::Body::Hello(hello)) => {
                self.shared.terms.admit(&hello).map_err(|error| refusal(&error))?
            }
            _ => return Err(Status::invalid_argument("the first message of a stream must be hello")),
        };
        Ok(Response::new(stream::open(self.shared.clone(), greeting, inbound, permit).await))
    }
}

#[tonic::async_trait]
impl Control for ExpertServer {
    async fn lead(&self, request: Request<v1::LeadRequest>) -> Result<Response<v1::LeadReply>, Status> {
        let ask = LeadAsk::parse(request.get_ref()).map_err(|error| invalid(&error))?;
        // No order is carried out meanwhile, so that every later announcement follows the grant.
        let _turn = self.shared.turn.lock().await;
        let epoch = || self.shared.description.borrow().epoch;
        Ok(Response::new(self.shared.obedience.lead(&ask, epoch).to_wire()))
    }

    async fn assign(&self, request: Request<v1::AssignRequest>) -> Result<Response<v1::AssignReply>, Status> {
        let assignment = Assignment::parse(request.get_ref(), &self.shared.rules.experts);
        let assignment = assignment.map_err(|error| invalid(&error))?;
        // Moves with the order, which is carried out even if its caller no longer waits.
        let turn = self.shared.turn.clone().lock_owned().await;
        let disobeyed = |error: control::Disobeyed| Status::failed_precondition(error.to_string());
        self.shared.obedience.admit(&assignment).map_err(disobeyed)?;
        let server = self.clone();
        // The custody may block, which the network's thread must not.
        let carried = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            server.obey(assignment)
        });
        let failed = |_| Status::internal("the order was not carried out; see the worker's log");
        let epoch = carried.await.map_err(failed)?;
        Ok(Response::new(v1::AssignReply { epoch: epoch.get() }))
    }

    async fn count_rows(
        &self,
        _: Request<v1::CountRowsRequest>,
    ) -> Result<Response<v1::CountRowsReply>, Status> {
        Ok(Response::new(rows_to_wire(&self.shared.rows.snapshot())))
    }
}

fn invalid(error: &WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn refusal(error: &HandshakeError) -> Status {
    tracing::warn!(%error, "router refused");
    metrics::counter!("muster_worker_handshakes_refused_total").increment(1);
    match error {
        HandshakeError::Wire(error) => Status::invalid_argument(error.to_string()),
        HandshakeError::Disagreement(error) => Status::failed_precondition(error.to_string()),
    }
}
