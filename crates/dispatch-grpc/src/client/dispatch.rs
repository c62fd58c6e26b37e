//! The dispatch seam over gRPC, on the engine thread.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use muster_engine::batcher::{BatchPlan, ShardPlan, Slot, group};
use muster_engine::combine::combine;
use muster_engine::dispatch::{Choices, DispatchError, ExpertDispatch, LayerBatch, Rows, RowsMut, Ticket};
use muster_proto::convert::RouterName;
use muster_proto::expert::v1;
use muster_proto::frame;
use muster_proto::handshake::{LANES, Terms};
use muster_proto::limits::MessageLimits;
use muster_proto::reply::{Fault, FaultKind};
use muster_types::{Combine, DType, ExpertId, LayerId, NumericsClass, WorkerId};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::board::{Board, Failure, Gathered, Outgoing, Progress};
use super::config::{ConnectConfig, ConnectError, Start};
use super::handle::{HealthHandle, Sample, Samples, StatsHandle};
use super::link::{self, LinkConfig};
use crate::address::Address;

/// Longer times to connect are cut to this.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// What the network thread may take to end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Experts in other processes.
pub struct GrpcDispatch {
    experts: Vec<u32>,
    hidden: usize,
    wire: DType,
    top_k: usize,
    max_rows: usize,
    deadline_ms: u32,
    board: Arc<Board>,
    samples: Arc<Samples>,
    flights: HashMap<Ticket, Flight>,
    tickets: u64,
    /// Decoded outputs, kept from one `collect` to the next.
    outputs: Vec<f32>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// A micro-batch between `submit` and `collect`.
struct Flight {
    layer: LayerId,
    choices: Choices,
    slots: Vec<Slot>,
    shards: Vec<Sent>,
    submitted: Instant,
}

/// A shard as it was sent, whole, so that it could be sent again.
struct Sent {
    worker: WorkerId,
    experts: Vec<ExpertId>,
    request: v1::LayerShard,
}

impl GrpcDispatch {
    /// Connects to all workers, checks that they fit this router and each other, and starts the network thread
    /// that keeps them connected. Blocks for at most the configured time, plus a step in progress.
    ///
    /// # Errors
    /// See [`ConnectError`]. A worker that can never fit is an error whatever `config.start` says.
    pub fn connect(config: ConnectConfig) -> Result<Self, ConnectError> {
        let addresses = parse_addresses(&config.workers)?;
        let peers = addresses.len();
        let router = RouterName::new(&config.router_id).map_err(ConnectError::RouterId)?;
        let experts = config.shape.experts().to_vec();
        let wire = config.compute.wire_dtype();
        let most = experts.iter().copied().max().unwrap_or(0);
        let hidden = size("hidden", config.hidden)?;
        let top_k = size("top_k", config.top_k as usize)?;
        let max_rows = size("max_rows", config.max_rows as usize)?;
        let link = LinkConfig {
            terms: Terms {
                fingerprint: config.fingerprint,
                hidden: hidden.get(),
                compute: config.compute,
                experts: config.experts,
                combine: Combine::Exact,
                numerics: NumericsClass::CpuCanonical,
            },
            router,
            max_rows: max_rows.get(),
            limits: MessageLimits::new(hidden.get(), wire, max_rows, top_k.get(), most),
            experts: experts.clone(),
        };
        let board = Board::new(config.shape, addresses)
            .map_err(|source| ConnectError::Worker { address: "none".into(), source })?;
        let board = Arc::new(board);
        let stop = CancellationToken::new();
        let thread = start_network(peers, board.clone(), Arc::new(link), stop.clone())?;
        let mut dispatch = Self {
            experts,
            hidden: config.hidden,
            wire,
            top_k: config.top_k as usize,
            max_rows: config.max_rows as usize,
            deadline_ms: u32::try_from(config.shard_deadline.as_millis()).unwrap_or(u32::MAX).max(1),
            board,
            samples: Arc::default(),
            flights: HashMap::new(),
            tickets: 0,
            outputs: Vec::new(),
            stop,
            thread: Some(thread),
        };
        match dispatch.gather(config.connect_timeout, config.start) {
            Ok(()) => Ok(dispatch),
            Err(error) => {
                dispatch.close();
                Err(error)
            }
        }
    }

    /// Tells other threads how the workers are.
    #[must_use]
    pub fn health(&self) -> HealthHandle {
        HealthHandle(self.board.clone())
    }

    /// Tells other threads where time goes.
    #[must_use]
    pub fn stats(&self) -> StatsHandle {
        StatsHandle { board: self.board.clone(), samples: self.samples.clone() }
    }

    fn gather(&self, timeout: Duration, start: Start) -> Result<(), ConnectError> {
        let missing = match self.board.gather(Instant::now() + timeout.min(LONGEST_TIMEOUT)) {
            Gathered::All => Vec::new(),
            Gathered::Some(missing) => missing,
            Gathered::Fatal(address, source) => {
                return Err(ConnectError::Worker { address: address.to_string(), source });
            }
        };
        if start == Start::Degraded {
            return Ok(());
        }
        if let Some((address, source)) = missing.into_iter().next() {
            return Err(ConnectError::Worker { address: address.to_string(), source });
        }
        match self.board.routes().placement.missing() {
            missing if missing.is_empty() => Ok(()),
            missing => Err(ConnectError::MissingExperts { missing }),
        }
    }

    fn check(&self, batch: &LayerBatch<'_>) -> Result<(), DispatchError> {
        let LayerBatch { layer, lane, rows, choices } = *batch;
        let invalid = |reason| Err(DispatchError::Invalid(reason));
        if lane >= LANES {
            return invalid(format!("lane {lane} of {LANES}"));
        }
        let count = self.experts.get(layer.index()).copied().unwrap_or(0);
        if count == 0 {
            return invalid(format!("layer {layer} has no routed experts"));
        }
        if let Some(expert) = choices.experts().iter().find(|expert| expert.get() >= count) {
            return invalid(format!("layer {layer} has no expert {expert}: there are {count}"));
        }
        if choices.k() > self.top_k {
            return invalid(format!("{} experts per row; the model picks {}", choices.k(), self.top_k));
        }
        if choices.rows() > self.max_rows {
            return invalid(format!("{} rows; at most {} were announced", choices.rows(), self.max_rows));
        }
        if rows.len() != choices.rows() * self.hidden {
            return invalid(format!("{} values for {} rows of {}", rows.len(), choices.rows(), self.hidden));
        }
        match (rows, self.wire) {
            (Rows::HostF32(_), DType::F32) | (Rows::HostBf16(_), DType::Bf16) => Ok(()),
            _ => invalid(format!("rows are not in the wire dtype {}", self.wire)),
        }
    }

    fn gather_rows(&self, rows: Rows<'_>, picked: &[u32]) -> Bytes {
        match rows {
            Rows::HostF32(rows) => frame::gather_f32(rows, self.hidden, picked),
            Rows::HostBf16(rows) => frame::gather_bf16(rows, self.hidden, picked),
        }
    }

    /// Decodes what came and adds it up.
    fn finish(&mut self, flight: &Flight, progress: Progress, out: &mut [f32]) -> Result<(), DispatchError> {
        let started = Instant::now();
        self.outputs.clear();
        let mut starts = Vec::with_capacity(flight.shards.len());
        let mut last = (flight.submitted, Duration::ZERO);
        for (shard, arrived) in flight.shards.iter().zip(progress.arrived) {
            let bad = |reason| {
                metrics::counter!("muster_dispatch_bad_replies_total").increment(1);
                DispatchError::BadReply { worker: shard.worker.clone(), reason }
            };
            let arrived = arrived.ok_or_else(|| bad("it never came".into()))?;
            let want = shard.request.indices.len();
            if arrived.rows as usize != want {
                return Err(bad(format!("{} rows instead of {want}", arrived.rows)));
            }
            starts.push(self.outputs.len() / self.hidden);
            frame::append_f32(&arrived.data, self.wire, want, self.hidden, &mut self.outputs)
                .map_err(|error| bad(error.to_string()))?;
            last = last.max((arrived.at, arrived.timing.total()));
        }
        let row = |slot: usize| {
            let Slot { shard, position } = flight.slots[slot];
            let start = (starts[shard as usize] + position as usize) * self.hidden;
            &self.outputs[start..start + self.hidden]
        };
        combine(&flight.choices, self.hidden, row, out);
        let sample = Sample {
            layer: flight.layer,
            rows: flight.choices.rows(),
            round_trip: last.0.duration_since(flight.submitted),
            worker: last.1,
            combine: started.elapsed(),
        };
        metrics::histogram!("muster_dispatch_seconds").record(sample.round_trip);
        metrics::histogram!("muster_dispatch_overhead_seconds").record(sample.overhead());
        self.samples.push(sample);
        Ok(())
    }
}

impl ExpertDispatch for GrpcDispatch {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        let submitted = Instant::now();
        if self.thread.is_none() {
            return Err(DispatchError::Closed);
        }
        self.check(batch)?;
        let routes = self.board.routes();
        let BatchPlan { shards: plans, slots } = group(batch.layer, batch.choices, &routes.placement)?;
        let first = self.board.issue(plans.len());
        let mut shards = Vec::with_capacity(plans.len());
        let mut outgoing = Vec::with_capacity(plans.len());
        for (index, (id, plan)) in (first..).zip(plans).enumerate() {
            let ShardPlan { worker, rows, experts, counts, indices } = plan;
            let hop = routes.hops[worker.index()];
            let worker = routes.placement.workers()[worker.index()].clone();
            let request = v1::LayerShard {
                id,
                layer: batch.layer.get(),
                epoch: hop.epoch.get(),
                deadline_ms: self.deadline_ms,
                // Counted in 32 bits by the plan.
                rows: rows.len() as u32,
                data: self.gather_rows(batch.rows, &rows),
                experts: experts.iter().map(|expert| expert.get()).collect(),
                counts,
                indices,
            };
            outgoing.push(Outgoing { index, worker: worker.clone(), hop, request: request.clone() });
            shards.push(Sent { worker, experts, request });
        }
        self.tickets += 1;
        let ticket = Ticket::new(self.tickets);
        self.board.send(ticket, batch.lane, outgoing)?;
        let choices = batch.choices.clone();
        self.flights.insert(ticket, Flight { layer: batch.layer, choices, slots, shards, submitted });
        Ok(ticket)
    }

    fn collect(&mut self, ticket: Ticket, deadline: Instant, out: RowsMut<'_>) -> Result<(), DispatchError> {
        if self.thread.is_none() {
            return Err(DispatchError::Closed);
        }
        let flight = self
            .flights
            .remove(&ticket)
            .ok_or_else(|| DispatchError::Invalid(format!("ticket {} is not in flight", ticket.get())))?;
        let ids = flight.shards.iter().map(|shard| shard.request.id);
        let RowsMut::HostF32(out) = out;
        let want = flight.choices.rows() * self.hidden;
        if out.len() != want {
            self.board.forget(ticket, ids);
            return Err(DispatchError::Invalid(format!("room for {} values of {want}", out.len())));
        }
        let Some(mut progress) = self.board.wait(ticket, ids, deadline)? else {
            metrics::counter!("muster_dispatch_deadlines_total").increment(1);
            return Err(DispatchError::Deadline { layer: flight.layer });
        };
        match progress.failure.take() {
            Some((index, failure)) => Err(flight.error(index, failure)),
            None => self.finish(&flight, progress, out),
        }
    }

    fn cancel(&mut self, ticket: Ticket) {
        if let Some(flight) = self.flights.remove(&ticket) {
            self.board.forget(ticket, flight.shards.iter().map(|shard| shard.request.id));
        }
    }

    fn close(&mut self) {
        self.flights.clear();
        self.board.close();
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic over there is in the log already.
            let _ = thread.join();
        }
    }
}

impl Drop for GrpcDispatch {
    fn drop(&mut self) {
        self.close();
    }
}

impl Flight {
    /// What a shard's failure means for the micro-batch.
    fn error(&self, index: usize, failure: Failure) -> DispatchError {
        let Some(shard) = self.shards.get(index) else {
            return DispatchError::Invalid(format!("shard {index} of {}", self.shards.len()));
        };
        let worker = shard.worker.clone();
        let fault = match failure {
            Failure::Lost(reason) => return DispatchError::WorkerLost { worker, reason },
            Failure::Bad(reason) => return DispatchError::BadReply { worker, reason },
            Failure::Fault(fault) => fault,
        };
        let Fault { kind, message, expert } = fault;
        metrics::counter!("muster_dispatch_faults_total", "code" => kind.name()).increment(1);
        let expert = shard.experts.iter().copied().find(|known| Some(known.get()) == expert);
        match (kind, expert) {
            (FaultKind::Deadline, _) => DispatchError::Deadline { layer: self.layer },
            (FaultKind::NonFinite, Some(expert)) => DispatchError::NonFinite { layer: self.layer, expert },
            _ => DispatchError::Refused { worker, reason: message, retry: kind.retry() },
        }
    }
}

fn size(what: &'static str, value: usize) -> Result<NonZeroU32, ConnectError> {
    u32::try_from(value).ok().and_then(NonZeroU32::new).ok_or(ConnectError::Size { what, value })
}

fn parse_addresses(workers: &[String]) -> Result<Vec<Address>, ConnectError> {
    let mut addresses: Vec<Address> = Vec::with_capacity(workers.len());
    for text in workers {
        let address = text.parse()?;
        if addresses.contains(&address) {
            return Err(ConnectError::DuplicateAddress(text.clone()));
        }
        addresses.push(address);
    }
    if addresses.is_empty() { Err(ConnectError::NoWorkers) } else { Ok(addresses) }
}

fn start_network(
    peers: usize,
    board: Arc<Board>,
    link: Arc<LinkConfig>,
    stop: CancellationToken,
) -> Result<JoinHandle<()>, std::io::Error> {
    // One thread: a shard is not handed from one to another on its way to the socket.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("muster-dispatch".into()).spawn(move || {
        runtime.block_on(async {
            let mut links = JoinSet::new();
            for peer in 0..peers {
                links.spawn(link::keep(peer, board.clone(), link.clone()));
            }
            stop.cancelled().await;
        });
        runtime.shutdown_timeout(CLOSE_TIMEOUT);
    })
}
