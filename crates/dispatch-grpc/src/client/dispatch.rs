//! The dispatch seam over gRPC, on the engine thread, which drives the network itself while it sends and waits.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use metrics::Histogram;
use muster_engine::batcher::{BatchPlan, ShardPlan, Slot, group};
use muster_engine::dispatch::{Choices, DispatchError, ExpertDispatch, LayerBatch, Rows, RowsMut, Ticket};
use muster_kernels::{Cpu, NotFinite, Outputs, Term, combine};
use muster_proto::convert::RouterName;
use muster_proto::expert::v1;
use muster_proto::frame;
use muster_proto::handshake::{LANES, Terms};
use muster_proto::limits::MessageLimits;
use muster_proto::reply::{Fault, FaultKind};
use muster_types::{Combine, DType, ExpertId, LayerId, NumericsClass, WorkerId};

use super::board::{Arrived, Board, Failure, Gathered, Outgoing};
use super::config::{ConnectConfig, ConnectError, Start};
use super::handle::{HealthHandle, Sample, Samples, StatsHandle};
use super::link::{self, LinkConfig};
use crate::address::Address;
use crate::busy::BusyPoll;
use crate::driver::{Driver, Reins};

/// Longer times to connect are cut to this.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes out or back from which another thread drives the network until they are collected: this many do not fit the
/// sockets' buffers, and the engine thread may have something else to compute meanwhile.
const LARGE_BYTES: usize = 256 << 10;

/// Experts in other processes.
pub struct GrpcDispatch {
    experts: Vec<u32>,
    hidden: usize,
    wire: DType,
    top_k: usize,
    max_rows: usize,
    deadline_ms: u32,
    combine: Combine,
    busy_poll: Duration,
    cpu: Arc<Cpu>,
    board: Arc<Board>,
    samples: Arc<Samples>,
    seconds: Histogram,
    overhead_seconds: Histogram,
    flights: HashMap<Ticket, Flight>,
    tickets: u64,
    reins: Reins,
    /// `None` once closed.
    driver: Option<Driver>,
}

/// A micro-batch between `submit` and `collect`.
struct Flight {
    layer: LayerId,
    rows: usize,
    /// Terms of each row's sum; sources are shards.
    starts: Vec<u32>,
    terms: Vec<Term>,
    shards: Vec<Sent>,
    submitted: Instant,
    sent: Instant,
}

/// What is kept of a shard until it is answered.
struct Sent {
    id: u64,
    worker: WorkerId,
    experts: Vec<ExpertId>,
    /// Rows it must bring back.
    answers: usize,
}

impl GrpcDispatch {
    /// Connects to all workers, checks that they fit this router and each other, and starts the thread
    /// that keeps them connected while this one has other things to do. Blocks for at most the configured time, plus a step in progress.
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
                numerics: NumericsClass::CpuCanonical,
            },
            router,
            max_rows: max_rows.get(),
            limits: MessageLimits::new(hidden.get(), wire, max_rows, top_k.get(), most),
            experts: experts.clone(),
            combine: config.combine,
        };
        let board = Board::new(config.shape, addresses)
            .map_err(|source| ConnectError::Worker { address: "none".into(), source })?;
        let board = Arc::new(board);
        let (driver, link) = (Driver::start("muster-dispatch")?, Arc::new(link));
        for peer in 0..peers {
            drop(driver.spawn(link::keep(peer, board.clone(), link.clone())));
        }
        let mut dispatch = Self {
            experts,
            hidden: config.hidden,
            wire,
            top_k: config.top_k as usize,
            max_rows: config.max_rows as usize,
            deadline_ms: u32::try_from(config.shard_deadline.as_millis()).unwrap_or(u32::MAX).max(1),
            combine: config.combine,
            busy_poll: config.busy_poll,
            cpu: config.cpu,
            board,
            samples: Arc::default(),
            seconds: metrics::histogram!("muster_dispatch_seconds"),
            overhead_seconds: metrics::histogram!("muster_dispatch_overhead_seconds"),
            flights: HashMap::new(),
            tickets: 0,
            reins: driver.reins(),
            driver: Some(driver),
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

    /// Adds up what came.
    fn finish(&self, flight: &Flight, came: Came, out: &mut [f32]) -> Result<(), DispatchError> {
        let bad = |at: usize, reason: String| {
            metrics::counter!("muster_dispatch_bad_replies_total").increment(1);
            match flight.shards.get(at) {
                Some(shard) => DispatchError::BadReply { worker: shard.worker.clone(), reason },
                None => DispatchError::Invalid(reason),
            }
        };
        let Came { arrived, waited, away } = came;
        let arrived: Option<Vec<Arrived>> = arrived.into_iter().collect();
        let arrived = arrived.ok_or_else(|| bad(0, "it never came".into()))?;
        let mut sources = Vec::with_capacity(arrived.len());
        for (at, (shard, arrived)) in flight.shards.iter().zip(&arrived).enumerate() {
            if arrived.rows as usize != shard.answers {
                return Err(bad(at, format!("{} rows instead of {}", arrived.rows, shard.answers)));
            }
            frame::check_len(&arrived.data, shard.answers, self.hidden, self.wire)
                .map_err(|error| bad(at, error.to_string()))?;
            sources.push(match self.wire {
                DType::F32 => Outputs::WireF32(arrived.data.as_chunks().0),
                DType::Bf16 => Outputs::WireBf16(arrived.data.as_chunks().0),
            });
        }
        if flight.rows > 0 {
            let sums = combine(&self.cpu, self.hidden, &sources, &flight.starts, &flight.terms, out);
            sums.map_err(|error| match error {
                NotFinite::Output { source, row } => {
                    bad(source, format!("row {row} has a value that is not finite"))
                }
                NotFinite::Sum { row } => bad(0, format!("the sum of row {row} is not finite")),
            })?;
        }
        let sample = Sample {
            layer: flight.layer,
            rows: flight.rows,
            round_trip: waited.duration_since(flight.submitted),
            away,
            compute: arrived.iter().map(|arrived| arrived.timing.compute).max().unwrap_or_default(),
            combine: waited.elapsed(),
        };
        self.seconds.record(sample.round_trip);
        self.overhead_seconds.record(sample.overhead());
        self.samples.push(sample);
        Ok(())
    }
}

/// All that came for a micro-batch.
struct Came {
    arrived: Vec<Option<Arrived>>,
    /// When the last of it was here.
    waited: Instant,
    /// Time between `submit` and `collect`.
    away: Duration,
}

impl ExpertDispatch for GrpcDispatch {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        let submitted = Instant::now();
        if self.driver.is_none() {
            return Err(DispatchError::Closed);
        }
        self.check(batch)?;
        let routes = self.board.routes();
        let BatchPlan { shards: plans, slots } = group(batch.layer, batch.choices, &routes.placement)?;
        let (starts, terms) = match self.combine {
            Combine::Exact => by_pair(batch.choices, &slots),
            Combine::Partial => by_shard(batch.choices.rows(), &plans),
        };
        let mut weights = match self.combine {
            Combine::Exact => vec![Vec::new(); plans.len()],
            Combine::Partial => weights(batch.choices, &plans, &slots),
        };
        let first = self.board.issue(plans.len());
        let mut shards = Vec::with_capacity(plans.len());
        let mut outgoing = Vec::with_capacity(plans.len());
        let mut largest = 0;
        for (index, (id, plan)) in (first..).zip(plans).enumerate() {
            let ShardPlan { worker, rows, experts, counts, indices } = plan;
            let hop = routes.hops[worker.index()];
            let worker = routes.placement.workers()[worker.index()].clone();
            let answers = match self.combine {
                Combine::Exact => indices.len(),
                Combine::Partial => rows.len(),
            };
            largest = largest.max(rows.len()).max(answers);
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
                weights: std::mem::take(&mut weights[index]),
            };
            outgoing.push(Outgoing { index, worker: worker.clone(), hop, request });
            shards.push(Sent { id, worker, experts, answers });
        }
        self.tickets += 1;
        let ticket = Ticket::new(self.tickets);
        let sent = self.reins.drive(async {
            self.board.send(ticket, batch.lane, outgoing)?;
            // Until the transport has taken what it can.
            tokio::task::yield_now().await;
            Ok(())
        });
        sent.unwrap_or(Err(DispatchError::Closed))?;
        if largest.saturating_mul(self.hidden * self.wire.size()) >= LARGE_BYTES {
            self.reins.lend();
        }
        let (layer, rows) = (batch.layer, batch.choices.rows());
        let sent = Instant::now();
        self.flights.insert(ticket, Flight { layer, rows, starts, terms, shards, submitted, sent });
        Ok(ticket)
    }

    fn collect(&mut self, ticket: Ticket, deadline: Instant, out: RowsMut<'_>) -> Result<(), DispatchError> {
        if self.driver.is_none() {
            return Err(DispatchError::Closed);
        }
        let flight = self
            .flights
            .remove(&ticket)
            .ok_or_else(|| DispatchError::Invalid(format!("ticket {} is not in flight", ticket.get())))?;
        let away = flight.sent.elapsed();
        let ids = flight.shards.iter().map(|shard| shard.id);
        let RowsMut::HostF32(out) = out;
        let want = flight.rows * self.hidden;
        if out.len() != want {
            self.board.forget(ticket, ids);
            return Err(DispatchError::Invalid(format!("room for {} values of {want}", out.len())));
        }
        let busy = BusyPoll::start(self.busy_poll);
        let waited = self.reins.drive(self.board.wait(ticket, ids, deadline, busy));
        let Some(mut progress) = waited.unwrap_or(Err(DispatchError::Closed))? else {
            metrics::counter!("muster_dispatch_deadlines_total").increment(1);
            return Err(DispatchError::Deadline { layer: flight.layer });
        };
        let waited = Instant::now();
        match progress.failure.take() {
            Some((index, failure)) => Err(flight.error(index, failure)),
            None => self.finish(&flight, Came { arrived: progress.arrived, waited, away }, out),
        }
    }

    fn cancel(&mut self, ticket: Ticket) {
        if let Some(flight) = self.flights.remove(&ticket) {
            self.board.forget(ticket, flight.shards.iter().map(|shard| shard.id));
        }
    }

    fn close(&mut self) {
        self.flights.clear();
        self.board.close();
        // Its tasks end with it.
        self.driver = None;
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

/// Exact combine: every output is a term.
fn by_pair(choices: &Choices, slots: &[Slot]) -> (Vec<u32>, Vec<Term>) {
    let term = |(slot, &weight): (&Slot, &f32)| Term { source: slot.shard, row: slot.position, weight };
    let terms = slots.iter().zip(choices.weights()).map(term).collect();
    // Pairs are counted in 32 bits by the plan.
    let starts = (0..=choices.rows()).map(|row| (row * choices.k()) as u32).collect();
    (starts, terms)
}

/// Partial combine: every shard with the row gives one term, in the order of the shards, which is that of the placement.
fn by_shard(rows: usize, plans: &[ShardPlan]) -> (Vec<u32>, Vec<Term>) {
    let mut starts = vec![0u32; rows + 1];
    for &row in plans.iter().flat_map(|plan| &plan.rows) {
        starts[row as usize + 1] += 1;
    }
    for row in 1..starts.len() {
        starts[row] += starts[row - 1];
    }
    let mut next = starts.clone();
    let count = starts.last().map_or(0, |&count| count as usize);
    let mut terms = vec![Term { source: 0, row: 0, weight: 1.0 }; count];
    for (source, plan) in (0..).zip(plans) {
        for (position, &row) in (0..).zip(&plan.rows) {
            let at = &mut next[row as usize];
            terms[*at as usize] = Term { source, row: position, weight: 1.0 };
            *at += 1;
        }
    }
    (starts, terms)
}

/// The weights of each shard's outputs.
fn weights(choices: &Choices, plans: &[ShardPlan], slots: &[Slot]) -> Vec<Vec<f32>> {
    let mut weights: Vec<Vec<f32>> = plans.iter().map(|plan| vec![0.0; plan.indices.len()]).collect();
    for (slot, &weight) in slots.iter().zip(choices.weights()) {
        weights[slot.shard as usize][slot.position as usize] = weight;
    }
    weights
}
