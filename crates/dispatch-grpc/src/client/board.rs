//! The state that the engine thread and the network's tasks share: links, shards in flight, tickets, routes.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use muster_engine::dispatch::{DispatchError, Ticket};
use muster_placement::{Placement, Shape};
use muster_proto::description::{Description, Phase};
use muster_proto::expert::v1;
use muster_proto::handshake::LANES;
use muster_proto::reply::{Fault, Timing};
use muster_types::{Epoch, ExpertKey, WorkerId};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout_at;

use super::config::LinkError;
use super::handle::{WorkerHealth, WorkerState};
use crate::address::Address;
use crate::busy::BusyPoll;

/// Who can be sent what, as of one moment.
pub(super) struct Routes {
    pub(super) placement: Placement,
    /// For every worker of the placement.
    pub(super) hops: Vec<Hop>,
}

/// The way to a worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hop {
    peer: usize,
    session: u64,
    /// Epoch of the description that these routes were made from.
    pub(super) epoch: Epoch,
}

/// The stream that a shard went down on. One that is opened later is another, even to the same worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StreamKey {
    pub(super) peer: usize,
    pub(super) session: u64,
    pub(super) lane: usize,
}

/// What came back for one shard.
pub(super) struct Arrived {
    pub(super) rows: u32,
    pub(super) data: Bytes,
    pub(super) timing: Timing,
}

/// Why a shard gave nothing.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// The worker said why.
    Fault(Fault),
    /// Its link broke.
    Lost(String),
    /// It broke the protocol.
    Bad(String),
}

/// How a link ended.
#[derive(Debug, Clone)]
pub(super) enum Ended {
    /// The connection or the worker went away.
    Lost(String),
    /// The worker broke the protocol.
    Bad(String),
}

/// A shard ready to be sent.
pub(super) struct Outgoing {
    /// Position in the ticket's plan.
    pub(super) index: usize,
    pub(super) worker: WorkerId,
    pub(super) hop: Hop,
    pub(super) request: v1::LayerShard,
}

struct Pending {
    ticket: Ticket,
    index: usize,
    stream: StreamKey,
}

/// A ticket's shards: those that are there, and the first that never will be.
pub(super) struct Progress {
    pub(super) arrived: Vec<Option<Arrived>>,
    waiting: usize,
    pub(super) failure: Option<(usize, Failure)>,
}

type Lanes = [mpsc::Sender<v1::DispatchRequest>; LANES];

enum LinkState {
    Up { session: u64, lanes: Lanes },
    Down { since: Instant, error: Option<LinkError>, reason: String },
}

struct Peer {
    address: Address,
    announced: Option<Description>,
    state: LinkState,
}

struct State {
    peers: Vec<Peer>,
    routes: Arc<Routes>,
    shards: HashMap<u64, Pending>,
    tickets: HashMap<Ticket, Progress>,
    /// The last shard id given out.
    issued: u64,
    sessions: u64,
    late_replies: u64,
    closed: bool,
}

/// How waiting for the first connections went.
pub(super) enum Gathered {
    /// Every worker is connected.
    All,
    /// Time is over; these are missing.
    Some(Vec<(Address, LinkError)>),
    /// One can never be connected.
    Fatal(Address, LinkError),
}

/// See the module.
pub(super) struct Board {
    shape: Shape,
    state: Mutex<State>,
    /// A link came or went; for `gather`.
    links: Condvar,
    /// A ticket may have come to its end; for `wait`, of which there is one at a time.
    answered: Notify,
}

impl Board {
    pub(super) fn new(shape: Shape, addresses: Vec<Address>) -> Result<Self, LinkError> {
        let routes = Arc::new(route(Epoch::new(1), &shape, &[])?);
        let down =
            || LinkState::Down { since: Instant::now(), error: None, reason: "not connected yet".into() };
        let peers =
            addresses.into_iter().map(|address| Peer { address, announced: None, state: down() }).collect();
        let state = State {
            peers,
            routes,
            shards: HashMap::new(),
            tickets: HashMap::new(),
            issued: 0,
            sessions: 0,
            late_replies: 0,
            closed: false,
        };
        Ok(Self { shape, state: Mutex::new(state), links: Condvar::new(), answered: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock between two halves of a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn routes(&self) -> Arc<Routes> {
        self.lock().routes.clone()
    }

    pub(super) fn late_replies(&self) -> u64 {
        self.lock().late_replies
    }

    pub(super) fn health(&self) -> Vec<WorkerHealth> {
        let health = |peer: &Peer| WorkerHealth {
            worker: peer.announced.as_ref().map(|d| d.worker.clone()),
            address: peer.address.to_string(),
            state: match &peer.state {
                LinkState::Down { since, reason, .. } => {
                    WorkerState::Down { since: *since, reason: reason.clone() }
                }
                LinkState::Up { .. } if peer.is_serving() => WorkerState::Connected,
                LinkState::Up { .. } => WorkerState::Draining,
            },
            experts: peer.announced.as_ref().map_or(0, |d| d.holdings.len()),
        };
        self.lock().peers.iter().map(health).collect()
    }

    /// Waits until every worker is connected, one can never be, or `deadline` passes.
    pub(super) fn gather(&self, deadline: Instant) -> Gathered {
        let mut state = self.lock();
        loop {
            let mut missing = Vec::new();
            for peer in &state.peers {
                match &peer.state {
                    LinkState::Up { .. } => {}
                    LinkState::Down { error: Some(error), .. } if error.is_fatal() => {
                        return Gathered::Fatal(peer.address.clone(), error.clone());
                    }
                    LinkState::Down { error, reason, .. } => {
                        let error = error.clone().unwrap_or_else(|| LinkError::Unreachable(reason.clone()));
                        missing.push((peer.address.clone(), error));
                    }
                }
            }
            if missing.is_empty() {
                return Gathered::All;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Gathered::Some(missing);
            };
            state = self.links.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends all waiting; nothing is accepted afterwards.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.shards.clear();
        state.tickets.clear();
        self.links.notify_all();
        self.answered.notify_one();
    }
}

/// What the engine thread does.
impl Board {
    /// Ids for this many shards, ascending; the first of them.
    pub(super) fn issue(&self, shards: usize) -> u64 {
        let mut state = self.lock();
        let first = state.issued + 1;
        state.issued += shards as u64;
        first
    }

    /// Sends a ticket's shards, all or none.
    pub(super) fn send(
        &self,
        ticket: Ticket,
        lane: usize,
        shards: Vec<Outgoing>,
    ) -> Result<(), DispatchError> {
        let mut state = self.lock();
        if state.closed {
            return Err(DispatchError::Closed);
        }
        let state = &mut *state;
        for shard in &shards {
            let sender = state.sender(shard.hop, lane).ok_or_else(|| lost(&shard.worker))?;
            if sender.capacity() == 0 {
                let (worker, reason) = (shard.worker.clone(), "its send queue is full".to_owned());
                return Err(DispatchError::Refused { worker, reason, retry: muster_types::Retry::Later });
            }
        }
        let mut sent = Vec::with_capacity(shards.len());
        for Outgoing { index, worker, hop, request } in shards {
            let id = request.id;
            let stream = StreamKey { peer: hop.peer, session: hop.session, lane };
            let message = v1::DispatchRequest { body: Some(v1::dispatch_request::Body::Shard(request)) };
            let put = state.sender(hop, lane).is_some_and(|sender| sender.try_send(message).is_ok());
            if !put {
                // The link broke this moment. What went out already is answered into nothing.
                for id in sent {
                    state.shards.remove(&id);
                }
                return Err(lost(&worker));
            }
            state.shards.insert(id, Pending { ticket, index, stream });
            sent.push(id);
        }
        let arrived = sent.iter().map(|_| None).collect();
        state.tickets.insert(ticket, Progress { arrived, waiting: sent.len(), failure: None });
        Ok(())
    }

    /// Waits until every shard of a ticket is there, one never will be, or `deadline` passes (`None`). Spends the
    /// ticket. `shards` are its shards' ids.
    pub(super) async fn wait(
        &self,
        ticket: Ticket,
        shards: impl Iterator<Item = u64>,
        deadline: Instant,
        mut busy: BusyPoll,
    ) -> Result<Option<Progress>, DispatchError> {
        loop {
            let late = Instant::now() >= deadline;
            if late || self.is_done(ticket)? {
                let progress = self.lock().forget(ticket, shards);
                return Ok(progress.filter(|_| !late));
            }
            if !busy.pause().await {
                // Late or not is found out above.
                let _ = timeout_at(deadline.into(), self.answered.notified()).await;
            }
        }
    }

    fn is_done(&self, ticket: Ticket) -> Result<bool, DispatchError> {
        let state = self.lock();
        if state.closed {
            return Err(DispatchError::Closed);
        }
        match state.tickets.get(&ticket) {
            Some(progress) => Ok(progress.waiting == 0 || progress.failure.is_some()),
            None => Err(DispatchError::Invalid(format!("ticket {} is not in flight", ticket.get()))),
        }
    }

    /// Gives a ticket up.
    pub(super) fn forget(&self, ticket: Ticket, shards: impl Iterator<Item = u64>) {
        self.lock().forget(ticket, shards);
    }
}

fn lost(worker: &WorkerId) -> DispatchError {
    DispatchError::WorkerLost {
        worker: worker.clone(),
        reason: "its link broke before rows were sent".into(),
    }
}

/// What the network's tasks do.
impl Board {
    pub(super) fn address(&self, peer: usize) -> Option<Address> {
        self.lock().peers.get(peer).map(|peer| peer.address.clone())
    }

    /// A worker is connected. Gives the number of its session.
    pub(super) fn up(&self, peer: usize, description: Description, lanes: Lanes) -> Result<u64, LinkError> {
        let mut state = self.lock();
        let state = &mut *state;
        let same_name = |(at, other): &(usize, &Peer)| {
            *at != peer
                && other.is_up()
                && other.announced.as_ref().is_some_and(|d| d.worker == description.worker)
        };
        if let Some((_, other)) = state.peers.iter().enumerate().find(same_name) {
            let worker = description.worker.to_string();
            return Err(LinkError::SameName { worker, other: other.address.to_string() });
        }
        state.sessions += 1;
        let session = state.sessions;
        if let Some(peer) = state.peers.get_mut(peer) {
            peer.announced = Some(description);
            peer.state = LinkState::Up { session, lanes };
        }
        state.reroute(&self.shape)?;
        self.links.notify_all();
        Ok(session)
    }

    /// A connected worker says something new about itself.
    pub(super) fn announce(&self, peer: usize, description: Description) -> Result<(), LinkError> {
        let mut state = self.lock();
        if let Some(peer) = state.peers.get_mut(peer) {
            if peer.announced.as_ref() == Some(&description) {
                return Ok(());
            }
            peer.announced = Some(description);
        }
        state.reroute(&self.shape)
    }

    /// A worker could not be connected.
    pub(super) fn unreachable(&self, peer: usize, error: LinkError) {
        let mut state = self.lock();
        if let Some(peer) = state.peers.get_mut(peer) {
            let since = match peer.state {
                LinkState::Down { since, .. } => since,
                LinkState::Up { .. } => Instant::now(),
            };
            peer.state = LinkState::Down { since, reason: error.to_string(), error: Some(error) };
        }
        self.links.notify_all();
    }

    /// A link ended: so does everything in flight on it.
    pub(super) fn down(&self, peer: usize, session: u64, ended: Ended) {
        let mut state = self.lock();
        let state = &mut *state;
        let (failure, reason) = match ended {
            Ended::Lost(reason) => (Failure::Lost(reason.clone()), reason),
            Ended::Bad(reason) => (Failure::Bad(reason.clone()), reason),
        };
        if let Some(peer) = state.peers.get_mut(peer) {
            peer.state = LinkState::Down { since: Instant::now(), error: None, reason };
        }
        let tickets = &mut state.tickets;
        state.shards.retain(|_, pending| {
            let broken = pending.stream.peer == peer && pending.stream.session == session;
            if broken && let Some(progress) = tickets.get_mut(&pending.ticket) {
                progress.failure.get_or_insert((pending.index, failure.clone()));
            }
            !broken
        });
        if let Err(error) = state.reroute(&self.shape) {
            tracing::error!(%error, "workers that were compatible no longer are");
        }
        self.links.notify_all();
        self.answered.notify_one();
    }

    /// A shard was answered.
    ///
    /// # Errors
    /// When it was not sent on that stream: then nothing the worker says can be trusted.
    pub(super) fn deliver(
        &self,
        stream: StreamKey,
        id: u64,
        outcome: Result<Arrived, Fault>,
    ) -> Result<(), String> {
        let mut state = self.lock();
        match state.shards.get(&id) {
            Some(pending) if pending.stream == stream => {}
            Some(_) => return Err(format!("it answered shard {id}, which went to another stream")),
            None if id > state.issued => return Err(format!("it answered shard {id}, which was never sent")),
            None => {
                state.late_replies += 1;
                metrics::counter!("muster_dispatch_late_replies_total").increment(1);
                return Ok(());
            }
        }
        let Some(pending) = state.shards.remove(&id) else { return Ok(()) };
        let Some(progress) = state.tickets.get_mut(&pending.ticket) else { return Ok(()) };
        match outcome {
            Ok(arrived) => {
                progress.arrived[pending.index] = Some(arrived);
                progress.waiting -= 1;
            }
            Err(fault) => {
                progress.failure.get_or_insert((pending.index, Failure::Fault(fault)));
            }
        }
        if progress.waiting == 0 || progress.failure.is_some() {
            self.answered.notify_one();
        }
        Ok(())
    }
}

impl Peer {
    const fn is_up(&self) -> bool {
        matches!(self.state, LinkState::Up { .. })
    }

    fn is_serving(&self) -> bool {
        self.is_up() && self.announced.as_ref().is_some_and(|d| d.phase == Phase::Serving)
    }
}

impl State {
    fn sender(&self, hop: Hop, lane: usize) -> Option<&mpsc::Sender<v1::DispatchRequest>> {
        match &self.peers.get(hop.peer)?.state {
            LinkState::Up { session, lanes } if *session == hop.session => lanes.get(lane),
            _ => None,
        }
    }

    fn forget(&mut self, ticket: Ticket, shards: impl Iterator<Item = u64>) -> Option<Progress> {
        for id in shards {
            self.shards.remove(&id);
        }
        self.tickets.remove(&ticket)
    }

    /// Makes new routes from the workers that are there now.
    fn reroute(&mut self, shape: &Shape) -> Result<(), LinkError> {
        let serving = self.peers.iter().enumerate().filter(|(_, peer)| peer.is_serving());
        let live: Vec<(Hop, &Description)> = serving
            .filter_map(|(at, peer)| match (&peer.state, &peer.announced) {
                (LinkState::Up { session, .. }, Some(announced)) => {
                    Some((Hop { peer: at, session: *session, epoch: announced.epoch }, announced))
                }
                _ => None,
            })
            .collect();
        metrics::gauge!("muster_dispatch_workers").set(live.len() as f64);
        let routes = route(self.routes.placement.epoch().next(), shape, &live)?;
        self.routes = Arc::new(routes);
        Ok(())
    }
}

fn route(epoch: Epoch, shape: &Shape, live: &[(Hop, &Description)]) -> Result<Routes, LinkError> {
    let holdings: Vec<(WorkerId, Vec<ExpertKey>)> =
        live.iter().map(|(_, d)| (d.worker.clone(), d.holdings.clone())).collect();
    let placement = Placement::from_holdings(epoch, shape, &holdings)
        .map_err(|error| LinkError::Placement(error.to_string()))?;
    Ok(Routes { placement, hops: live.iter().map(|(hop, _)| *hop).collect() })
}
