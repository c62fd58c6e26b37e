//! The dispatch seam over gRPC, on the engine thread, which drives the network itself while it sends and waits.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use metrics::Histogram;
use muster_engine::batcher::{BatchPlan, Rank, group};
use muster_engine::dispatch::{
    DispatchError, ExpertDispatch, LayerBatch, Loss, Place, Rows, RowsMut, Ticket,
};
use muster_kernels::Cpu;
use muster_placement::hedge::{Budget, Hedge};
use muster_proto::convert::RouterName;
use muster_proto::frame;
use muster_proto::handshake::{LANES, Terms};
use muster_proto::limits::MessageLimits;
use muster_proto::shard::ShardRules;
use muster_types::{Combine, DType, LayerId, NumericsClass, WorkerId};

use super::board::{Board, Gathered, Outgoing, Unsent};
use super::cluster::ClusterHandle;
use super::config::{ConnectConfig, ConnectError, Start};
use super::flight::{self, Flight, Shard, answers};
use super::handle::{HealthHandle, Samples, StatsHandle};
use super::here::{self, Fallback};
use super::link::{self, LinkConfig};
use crate::address::Address;
use crate::driver::{Driver, Reins};

/// Longer times to connect are cut to this.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes out or back from which another thread drives the network until they are collected: this many do not fit the
/// sockets' buffers, and the engine thread may have something else to compute meanwhile.
const LARGE_BYTES: usize = 256 << 10;
/// Experts in other processes.
pub struct GrpcDispatch {
    experts: Vec<u32>,
    pub(super) hidden: usize,
    pub(super) wire: DType,
    top_k: usize,
    max_rows: usize,
    deadline_ms: u32,
    combine: Combine,
    pub(super) busy_poll: Duration,
    pub(super) cpu: Arc<Cpu>,
    pub(super) board: Arc<Board>,
    pub(super) samples: Arc<Samples>,
    pub(super) seconds: Histogram,
    pub(super) overhead_seconds: Histogram,
    /// How long the answers of each worker take.
    pub(super) hedges: HashMap<WorkerId, Hedge>,
    pub(super) budget: Budget,
    cluster: ClusterHandle,
    flights: HashMap<Ticket, Flight>,
    tickets: u64,
    pub(super) reins: Reins,
    /// `None` once closed.
    driver: Option<Driver>,
}

impl GrpcDispatch {
    /// Connects to all workers, checks that they fit this router and each other, and starts the thread
    /// that keeps them connected while this one has other things to do. Blocks for at most the configured time, plus a
    /// step in progress.
    ///
    /// # Errors
    /// See [`ConnectError`]. A worker that can never fit is an error whatever `config.start` says.
    pub fn connect(config: ConnectConfig) -> Result<Self, ConnectError> {
        Self::connect_with(config, None)
    }

    /// The same, with something that computes here what no worker can be asked for. Experts that are nowhere else are
    /// missing all the same.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn connect_with(config: ConnectConfig, fallback: Option<Fallback>) -> Result<Self, ConnectError> {
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
            dialer: config.dialer,
            digests: config.digests,
        };
        let board = Board::new(config.shape, addresses)
            .map_err(|source| ConnectError::Worker { address: "none".into(), source })?;
        let board = Arc::new(board);
        board.start()?;
        let (driver, link) = (Driver::start("muster-dispatch")?, Arc::new(link));
        for peer in 0..peers {
            drop(driver.spawn(link::keep(peer, board.clone(), link.clone())));
        }
        if let Some(fallback) = fallback {
            let rules = ShardRules {
                hidden: hidden.get(),
                wire,
                experts: experts.clone().into(),
                top_k: top_k.get(),
                max_rows,
                max_deadline: LONGEST_TIMEOUT,
            };
            here::start(&board, &link.terms, fallback, rules, config.combine)?;
        }
        let cluster = ClusterHandle { board: board.clone(), link, runtime: driver.handle() };
        let mut dispatch = Self {
            cluster,
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
            hedges: HashMap::new(),
            budget: Budget::default(),
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

    /// Lets other threads change which workers there are, and what they hold.
    #[must_use]
    pub fn cluster(&self) -> ClusterHandle {
        self.cluster.clone()
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
        if start == Start::Assigned {
            return Ok(());
        }
        match self.board.routes().elsewhere.missing() {
            missing if missing.is_empty() => Ok(()),
            missing => {
                let refused = self.cluster.link.digests.refusals();
                Err(ConnectError::MissingExperts { missing, refused })
            }
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
        if rows.place() != Place::Host {
            return Err(DispatchError::misplaced("rows", rows.place(), Place::Host));
        }
        let (count, hidden) = (rows.count(), rows.hidden());
        if (count, hidden) != (choices.rows(), self.hidden) {
            let (rows, wide) = (choices.rows(), self.hidden);
            return invalid(format!("{count} rows of {hidden} instead of {rows} of {wide}"));
        }
        if rows.dtype() != self.wire {
            return invalid(format!("rows are {}; the wire dtype is {}", rows.dtype(), self.wire));
        }
        Ok(())
    }

    /// Picked rows as a payload. What was checked is in host memory.
    fn gather_rows(&self, rows: Rows<'_>, picked: &[u32]) -> Bytes {
        match (rows.f32(), rows.bf16()) {
            (Some(values), _) => frame::gather_f32(values, self.hidden, picked),
            (_, Some(bits)) => frame::gather_bf16(bits, self.hidden, picked),
            (None, None) => Bytes::new(),
        }
    }

    /// Groups a micro-batch by worker and sends it off; again without a worker that cannot be sent anything.
    fn send_off(
        &mut self,
        batch: &LayerBatch<'_>,
        ticket: Ticket,
        submitted: Instant,
    ) -> Result<Flight, DispatchError> {
        let mut unsent: Vec<Unsent> = Vec::new();
        loop {
            let routes = self.board.routes();
            let rank = |worker| match routes.hop(worker) {
                Some((_, name)) if unsent.iter().any(|unsent| unsent.worker() == Some(name)) => {
                    Rank::Unusable
                }
                _ => routes.rank(worker),
            };
            let planned = group(batch.layer, batch.choices, &routes.placement, &rank);
            // What nobody else holds is told of the one that has it.
            let BatchPlan { shards: plans, slots } =
                planned.map_err(|error| unsent.pop().map_or(error, DispatchError::from))?;
            let mut weights = match self.combine {
                Combine::Exact => vec![Vec::new(); plans.len()],
                Combine::Partial => flight::weights(batch.choices, &plans, &slots),
            };
            let first = self.board.issue(plans.len());
            let mut shards = Vec::with_capacity(plans.len());
            for (index, (id, plan)) in (first..).zip(plans).enumerate() {
                let Some((hop, worker)) = routes.hop(plan.worker) else {
                    return Err(DispatchError::Invalid("a plan names no worker of the placement".into()));
                };
                let data = self.gather_rows(batch.rows, &plan.rows);
                let weights = std::mem::take(&mut weights[index]);
                shards.push(Shard { id, hop, worker: worker.clone(), plan, data, weights });
            }
            match self.send(ticket, batch.layer, batch.lane, 0, &shards) {
                Ok(()) => {
                    let version = routes.placement.epoch().get();
                    let flight = Flight::new(batch, &slots, self.combine, shards, version, submitted);
                    return Ok(flight);
                }
                Err(Unsent::Closed) => return Err(DispatchError::Closed),
                // As often as there are workers.
                Err(other) => unsent.push(other),
            }
        }
    }

    /// Sends shards of a micro-batch; the first of them is part number `number`.
    pub(super) fn send(
        &self,
        ticket: Ticket,
        layer: LayerId,
        lane: usize,
        number: usize,
        shards: &[Shard],
    ) -> Result<(), Unsent> {
        let outgoing = (number..).zip(shards).map(|(part, shard)| Outgoing {
            part,
            worker: shard.worker.clone(),
            hop: shard.hop,
            request: shard.request(layer, self.deadline_ms),
        });
        let outgoing = outgoing.collect();
        let sent = self.reins.drive(async {
            self.board.send(ticket, lane, outgoing)?;
            // Until the transport has taken what it can.
            tokio::task::yield_now().await;
            Ok(())
        });
        sent.unwrap_or(Err(Unsent::Closed))?;
        let rows = |shard: &Shard| shard.plan.rows.len().max(answers(&shard.plan, self.combine));
        let largest = shards.iter().map(rows).max().unwrap_or(0);
        if largest.saturating_mul(self.hidden * self.wire.size()) >= LARGE_BYTES {
            self.reins.lend();
        }
        Ok(())
    }
}

impl Unsent {
    /// Who could not be sent anything.
    const fn worker(&self) -> Option<&WorkerId> {
        match self {
            Self::Closed => None,
            Self::Broken(worker) | Self::Full(worker) => Some(worker),
        }
    }
}

impl From<Unsent> for DispatchError {
    fn from(unsent: Unsent) -> Self {
        match unsent {
            Unsent::Closed => Self::Closed,
            Unsent::Broken(worker) => {
                Self::WorkerLost { worker, reason: "its link broke before rows were sent".into() }
            }
            Unsent::Full(worker) => {
                let reason = "its send queue is full".into();
                Self::Refused { worker, reason, retry: muster_types::Retry::Later }
            }
        }
    }
}

impl ExpertDispatch for GrpcDispatch {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        let submitted = Instant::now();
        if self.driver.is_none() {
            return Err(DispatchError::Closed);
        }
        self.check(batch)?;
        self.tickets += 1;
        let ticket = Ticket::new(self.tickets);
        let flight = self.send_off(batch, ticket, submitted)?;
        self.flights.insert(ticket, flight);
        Ok(ticket)
    }

    fn collect(
        &mut self,
        ticket: Ticket,
        deadline: Instant,
        out: RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError> {
        if self.driver.is_none() {
            return Err(DispatchError::Closed);
        }
        let mut flight = self
            .flights
            .remove(&ticket)
            .ok_or_else(|| DispatchError::Invalid(format!("ticket {} is not in flight", ticket.get())))?;
        let place = out.place();
        let want = flight.rows * self.hidden;
        let outcome = match out.into_f32() {
            None => Err(DispatchError::misplaced("room", place, Place::Host)),
            Some(out) if out.len() != want => {
                Err(DispatchError::Invalid(format!("room for {} values of {want}", out.len())))
            }
            Some(out) => self.complete(ticket, &mut flight, deadline, out),
        };
        self.board.forget(ticket, flight.ids());
        outcome
    }

    fn version(&self) -> u64 {
        self.board.version()
    }

    fn cancel(&mut self, ticket: Ticket) {
        if let Some(flight) = self.flights.remove(&ticket) {
            self.board.forget(ticket, flight.ids());
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
    Ok(addresses)
}
