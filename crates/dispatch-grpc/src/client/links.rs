//! All links of a router: connected workers and their announcements, shards in flight, and events for delivery.
//!
//! The engine thread and the network's tasks share it. Always holds: the lock is held for a few map operations, whatever
//! workers announce; a thread of its own builds fleets from the announcements without the lock. A shard is in flight from
//! before it can be answered until its answer or the end of its link, whichever comes first. Pending events are bounded by
//! the shards in flight and the links of the fleet that delivery knows.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use muster_engine::delivery::{Arrived, Closed, Ended, Event, Fleet, Hop, Unsent, Wanted};
use muster_placement::{Binding, Placement, Shape};
use muster_proto::description::Description;
use muster_proto::expert::v1;
use muster_proto::handshake::LANES;
use muster_types::{Epoch, ExpertKey, Fault, Numerics, WorkerId};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, watch};
use tokio::time::timeout_at;

use super::control::{ConnectedWorker, Control};
use super::error::LinkError;
use super::health::WorkerHealth;
use super::outputs::WireRows;
use super::peer::{Announced, Lanes, LinkState, Peer};

use crate::address::Address;
use crate::busy::BusyPoll;

/// Workers that a router knows at most.
const MOST_PEERS: usize = 4096;
/// Tries of the lock before the thread sleeps until it is free: longer than any holder needs. A wake-up costs a hundred times
/// as much.
const SPINS: u32 = 1000;
/// Rest after building a fleet, as a factor of the time that building took, and its maximum.
const FLEET_REST: u32 = 4;
const LONGEST_REST: Duration = Duration::from_millis(50);

/// The router knows its maximum of workers already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this router knows as many workers as it may")]
pub struct Crowded;

/// Stream of a shard: one worker, session and lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StreamKey {
    pub(super) hop: Hop,
    pub(super) lane: usize,
}

/// Pending events for delivery.
struct Mail {
    /// The newest fleet, if delivery does not know it.
    fleet: Option<Arc<Fleet>>,
    events: Vec<Event<WireRows>>,
    /// Outputs among them, by lane.
    answers: [usize; LANES],
    /// An event other than outputs is pending.
    is_urgent: bool,
    /// Condition that delivery waits for.
    wanted: Option<Wanted>,
    /// The fleet that delivery knows.
    told: Arc<Fleet>,
}

impl Mail {
    /// Whether the wanted condition is met.
    fn is_due(&self) -> bool {
        self.is_urgent || self.wanted.is_some_and(|wanted| self.answers[wanted.lane] >= wanted.answers.max(1))
    }

    fn hand_over(&mut self, events: &mut Vec<Event<WireRows>>) {
        if let Some(fleet) = self.fleet.take() {
            self.told = Arc::clone(&fleet);
            events.push(Event::Announced(fleet));
        }
        events.append(&mut self.events);
        (self.answers, self.is_urgent) = ([0; LANES], false);
    }
}

struct State {
    /// By number, which is never reused.
    peers: BTreeMap<usize, Peer>,
    next_peer: usize,
    announced: AllAnnounced,
    fleet: Arc<Fleet>,
    /// Owners of every expert other than this process.
    elsewhere: Arc<Placement>,
    freshness: Freshness,
    /// Shards in flight.
    out: HashMap<u64, StreamKey>,
    /// The highest id of a shard that was sent.
    issued: u64,
    mail: Mail,
    sessions: u64,
    /// Workers are still waited for at the start: what experts are bound to depends on all of them, not on who came first.
    is_gathering: bool,
    closed: bool,
}

/// Announcements, cheap to clone.
#[derive(Clone, Default)]
struct AllAnnounced {
    /// Of connected workers, by number.
    live: Arc<BTreeMap<usize, Announced>>,
    /// Of this process.
    here: Option<Announced>,
}

/// Whether the fleet matches the announcements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freshness {
    Fresh,
    /// There are newer announcements.
    Stale,
    /// A newer fleet is being built.
    Building,
}

/// Outcome of the wait for the first connections.
pub(super) enum Gathered {
    /// Every worker is connected.
    All,
    /// The deadline passed; these are missing.
    Some(Vec<(Address, LinkError)>),
    /// One can never be connected.
    Fatal(Address, LinkError),
}

/// See the module.
pub(super) struct Links {
    shape: Shape,
    numerics: Numerics,
    /// Epoch of the fleet, to be read without the lock.
    version: AtomicU64,
    /// Notifies of each new fleet.
    versions: watch::Sender<()>,
    state: Mutex<State>,
    /// A link or the fleet changed; for `gather`.
    links: Condvar,
    /// The fleet is out of date; for the thread that builds it.
    outdated: Condvar,
    /// The wanted condition may be met; for `wait`, of which there is one at a time.
    arrived: Notify,
}

impl Links {
    pub(super) fn new(shape: Shape, numerics: Numerics, addresses: Vec<Address>) -> Result<Self, LinkError> {
        let binding = Binding::new(numerics, &shape);
        let (fleet, elsewhere) = build(Epoch::new(1), &shape, &AllAnnounced::default(), &binding)?;
        let fleet = Arc::new(fleet);
        let peers: BTreeMap<usize, Peer> = addresses.into_iter().map(Peer::new).enumerate().collect();
        let mail = Mail {
            fleet: None,
            events: Vec::new(),
            answers: [0; LANES],
            is_urgent: false,
            wanted: None,
            told: Arc::clone(&fleet),
        };
        let state = State {
            next_peer: peers.len(),
            peers,
            announced: AllAnnounced::default(),
            fleet,
            elsewhere,
            freshness: Freshness::Fresh,
            out: HashMap::new(),
            issued: 0,
            mail,
            sessions: 0,
            is_gathering: true,
            closed: false,
        };
        let (links, outdated, arrived) = (Condvar::new(), Condvar::new(), Notify::new());
        let (version, versions) = (AtomicU64::new(1), watch::Sender::new(()));
        Ok(Self { shape, numerics, version, versions, state: Mutex::new(state), links, outdated, arrived })
    }

    /// Keeps the fleet up to date, on a thread of its own that ends with the links.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(super) fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let links = Arc::clone(self);
        std::thread::Builder::new().name("muster-fleet".into()).spawn(move || links.keep_fleet())?;
        Ok(())
    }

    fn keep_fleet(&self) {
        // Former fleets. They are large, and are freed here, not by their last user.
        let mut retired: Vec<Arc<Fleet>> = Vec::new();
        while let Some((epoch, announced, binding)) = self.next_fleet() {
            let began = Instant::now();
            let built = build(epoch, &self.shape, &announced, &binding);
            drop(announced);
            match built {
                Ok((fleet, elsewhere)) => retired.push(self.swap(fleet, elsewhere)),
                // Announcements were checked one by one.
                Err(error) => tracing::error!(%error, "workers that were compatible no longer are"),
            }
            self.links.notify_all();
            retired.retain(|fleet| Arc::strong_count(fleet) > 1);
            // Announcements meanwhile go into one fleet.
            std::thread::sleep(began.elapsed().saturating_mul(FLEET_REST).min(LONGEST_REST));
        }
    }

    /// Waits until another fleet is to be built, and says of what, and what experts are bound to; `None` once closed.
    fn next_fleet(&self) -> Option<(Epoch, AllAnnounced, Arc<Binding>)> {
        let fresh = |state: &mut State| state.freshness == Freshness::Fresh && !state.closed;
        let mut state = self.outdated.wait_while(self.lock(), fresh).unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        state.freshness = Freshness::Building;
        let epoch = state.fleet.placement().epoch().next();
        let binding = match state.is_gathering {
            true => Arc::new(Binding::new(self.numerics, &self.shape)),
            false => Arc::clone(state.fleet.binding()),
        };
        Some((epoch, state.announced.clone(), binding))
    }

    /// Puts a fleet in force; returns the former one.
    fn swap(&self, fleet: Fleet, elsewhere: Arc<Placement>) -> Arc<Fleet> {
        let version = fleet.placement().epoch().get();
        let fleet = Arc::new(fleet);
        let mut state = self.lock();
        let untold = state.mail.fleet.replace(Arc::clone(&fleet));
        let before = std::mem::replace(&mut state.fleet, fleet);
        let placement = std::mem::replace(&mut state.elsewhere, elsewhere);
        state.mail.is_urgent = true;
        if state.freshness == Freshness::Building {
            state.freshness = Freshness::Fresh;
        }
        self.version.store(version, Ordering::Release);
        drop(state);
        // Freed without the lock.
        drop((untold, placement));
        self.versions.send_replace(());
        self.arrived.notify_one();
        before
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock between two halves of a change.
        for _ in 0..SPINS {
            match self.state.try_lock() {
                Ok(state) => return state,
                Err(TryLockError::Poisoned(error)) => return error.into_inner(),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fleet in force.
    pub(super) fn fleet(&self) -> Arc<Fleet> {
        Arc::clone(&self.lock().fleet)
    }

    /// Owners of every expert other than this process.
    pub(super) fn elsewhere(&self) -> Arc<Placement> {
        Arc::clone(&self.lock().elsewhere)
    }

    /// What experts are bound to.
    pub(super) fn binding(&self) -> Arc<Binding> {
        Arc::clone(self.lock().fleet.binding())
    }

    /// Every expert of the model, ascending.
    pub(super) fn keys(&self) -> Vec<ExpertKey> {
        self.shape.keys().collect()
    }

    /// Version of the fleet.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub(super) fn health(&self) -> Vec<WorkerHealth> {
        self.lock().peers.values().filter(|peer| !peer.is_here()).map(Peer::health).collect()
    }

    /// What experts are bound to is sticky from now on.
    pub(super) fn gathered(&self) {
        self.lock().is_gathering = false;
    }

    /// Waits until every worker is connected, one can never be, or `deadline` passes.
    pub(super) fn gather(&self, deadline: Instant) -> Gathered {
        let mut state = self.lock();
        loop {
            let mut missing = Vec::new();
            for peer in state.peers.values() {
                match &peer.state {
                    LinkState::Up { .. } => {}
                    // Waiting does not repair its files, and others may hold the same experts.
                    LinkState::Down { error: Some(LinkError::Weights(_)), .. } => {}
                    LinkState::Down { error: Some(error), .. } if error.is_fatal() => {
                        return Gathered::Fatal(peer.address.clone(), error.clone());
                    }
                    LinkState::Down { error, reason, .. } => {
                        let error = error.clone().unwrap_or_else(|| LinkError::Unreachable(reason.clone()));
                        missing.push((peer.address.clone(), error));
                    }
                }
            }
            if missing.is_empty() && state.freshness == Freshness::Fresh {
                return Gathered::All;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Gathered::Some(missing);
            };
            state = self.links.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Notifies of each new fleet.
    pub(super) fn versions(&self) -> watch::Receiver<()> {
        self.versions.subscribe()
    }

    /// The workers that are connected now.
    pub(super) fn members(&self) -> Vec<ConnectedWorker> {
        self.lock().peers.values().filter_map(Peer::connected).collect()
    }

    /// Waits until every expert has a worker or `deadline` passes; false then.
    pub(super) fn await_coverage(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        loop {
            if state.elsewhere.is_complete() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closed {
                return false;
            }
            state = self.links.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Adds a worker that joined or was discovered, with its failure domain if known. Returns the number of a new peer, which is to
    /// be connected.
    ///
    /// # Errors
    /// When there are as many as may be.
    pub(super) fn join(&self, address: &Address, domain: Option<String>) -> Result<Option<usize>, Crowded> {
        let mut state = self.lock();
        if let Some(peer) = state.peers.values_mut().find(|peer| peer.address == *address) {
            peer.joined += 1;
            if domain.is_some() && peer.place != domain {
                peer.place = domain;
                self.versions.send_replace(());
            }
            return Ok(None);
        }
        if state.peers.len() >= MOST_PEERS {
            return Err(Crowded);
        }
        let number = state.next_peer;
        state.next_peer += 1;
        state.peers.insert(number, Peer::joined(address.clone(), domain));
        Ok(Some(number))
    }

    /// Adds this process as the last owner of every expert. Returns its hop.
    pub(super) fn here(&self, description: Description, lanes: Lanes) -> Hop {
        let mut state = self.lock();
        let (number, session) = (state.next_peer, state.sessions + 1);
        (state.next_peer, state.sessions) = (number + 1, session);
        state.peers.insert(number, Peer::here(description, session, lanes));
        state.note(number);
        self.reroute(state);
        Hop { link: number, session }
    }

    /// Takes back one [`Self::join`].
    pub(super) fn leave(&self, address: &Address) {
        if let Some(peer) = self.lock().peers.values_mut().find(|peer| peer.address == *address) {
            peer.joined = peer.joined.saturating_sub(1);
        }
    }

    /// Forgets an unconnected worker without a join left.
    pub(super) fn forget_peer(&self, number: usize) -> bool {
        let mut state = self.lock();
        let gone = state.closed || state.peers.get(&number).is_none_or(Peer::is_forgotten);
        if gone {
            state.peers.remove(&number);
        }
        gone
    }

    /// Ends all waits; nothing is accepted afterwards.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.peers.retain(|_, peer| !peer.is_here());
        state.out.clear();
        state.mail.events.clear();
        self.links.notify_all();
        self.outdated.notify_all();
        self.arrived.notify_one();
    }
}

/// Calls of the engine thread.
impl Links {
    /// Puts a shard into the queue of its link.
    pub(super) fn send(&self, hop: Hop, lane: usize, shard: v1::LayerShard) -> Result<(), Unsent> {
        let mut state = self.lock();
        let state = &mut *state;
        let peer = state.peers.get_mut(&hop.link).filter(|_| !state.closed).ok_or(Unsent::Broken)?;
        let sender = peer.lane(hop.session, lane).ok_or(Unsent::Broken)?;
        let id = shard.id;
        let message = v1::DispatchRequest { body: Some(v1::dispatch_request::Body::Shard(shard)) };
        sender.try_send(message).map_err(|error| match error {
            TrySendError::Full(_) => Unsent::Full,
            TrySendError::Closed(_) => Unsent::Broken,
        })?;
        peer.sent();
        // It cannot be answered before the lock is free.
        state.out.insert(id, StreamKey { hop, lane });
        state.issued = state.issued.max(id);
        Ok(())
    }

    /// Takes the pending events.
    pub(super) fn poll(&self, events: &mut Vec<Event<WireRows>>) {
        self.lock().mail.hand_over(events);
    }

    /// Waits for the wanted condition, an event other than outputs, or the deadline; takes the pending events.
    pub(super) async fn wait(
        &self,
        wanted: &Wanted,
        busy: &mut BusyPoll,
        events: &mut Vec<Event<WireRows>>,
    ) -> Result<(), Closed> {
        while !self.look(wanted, events)? {
            if !busy.pause().await {
                // The look below decides whether it is late.
                let _ = timeout_at(wanted.until.into(), self.arrived.notified()).await;
            }
        }
        Ok(())
    }

    /// Takes the pending events if the wanted condition is met or the deadline passed.
    fn look(&self, wanted: &Wanted, events: &mut Vec<Event<WireRows>>) -> Result<bool, Closed> {
        let mut state = self.lock();
        if state.closed {
            return Err(Closed);
        }
        state.mail.wanted = Some(*wanted);
        // An answer that came in time counts even if another is late.
        let is_over = state.mail.is_due() || Instant::now() >= wanted.until;
        if is_over {
            state.mail.wanted = None;
            state.mail.hand_over(events);
        }
        Ok(is_over)
    }

    /// Sets a worker's late-shard count and doubt flag, as delivery says.
    pub(super) fn doubt(&self, hop: Hop, late: usize, in_doubt: bool) {
        if let Some(peer) = self.lock().peers.get_mut(&hop.link)
            && peer.is_in(hop.session)
        {
            peer.doubted(late, in_doubt);
        }
    }

    /// Ends the link of a worker that lied and bans the worker.
    pub(super) fn ban(&self, hop: Hop, reason: &str) {
        let mut state = self.lock();
        if let Some(peer) = state.peers.get_mut(&hop.link)
            && peer.is_in(hop.session)
        {
            peer.strike();
            drop(state);
            self.down(hop, Ended::Lied(reason.to_owned()));
        }
    }
}

/// Calls of the network's tasks.
impl Links {
    pub(super) fn address(&self, peer: usize) -> Option<Address> {
        self.lock().peers.get(&peer).map(|peer| peer.address.clone())
    }

    /// Adds a connected worker's session. Returns its hop.
    pub(super) fn up(
        &self,
        peer: usize,
        description: Description,
        lanes: Lanes,
        control: Control,
    ) -> Result<Hop, LinkError> {
        let mut state = self.lock();
        let worker = &description.worker;
        let same_name =
            |(at, other): &(&usize, &mut Peer)| **at != peer && other.is_up() && other.is_called(worker);
        if let Some((_, other)) = state.peers.iter_mut().find(same_name) {
            return Err(other.contest(worker));
        }
        state.sessions += 1;
        let session = state.sessions;
        let Some(known) = state.peers.get_mut(&peer) else {
            return Err(LinkError::Unreachable("nobody says any more that it is there".into()));
        };
        known.up(description, session, lanes, control);
        state.note(peer);
        state.count_workers();
        self.reroute(state);
        Ok(Hop { link: peer, session })
    }

    /// A worker's last announcement.
    pub(super) fn announced(&self, peer: usize) -> Option<Arc<Description>> {
        self.lock().peers.get(&peer)?.announced.clone()
    }

    /// Takes a connected worker's new announcement.
    pub(super) fn announce(&self, peer: usize, description: Arc<Description>) {
        let mut state = self.lock();
        let Some(known) = state.peers.get_mut(&peer) else { return };
        let before = known.announced.replace(description);
        state.note(peer);
        self.reroute(state);
        // Freed without the lock.
        drop(before);
    }

    /// Records a sign of life of a worker in doubt.
    pub(super) fn is_alive(&self, hop: Hop) {
        if let Some(peer) = self.lock().peers.get_mut(&hop.link)
            && peer.is_in(hop.session)
        {
            peer.confirm();
        }
    }

    /// Records that a worker could not be connected.
    pub(super) fn unreachable(&self, peer: usize, error: LinkError) {
        if let Some(peer) = self.lock().peers.get_mut(&peer) {
            peer.unreachable(error);
        }
        self.links.notify_all();
    }

    /// Ends a link, with the shards in flight on it.
    pub(super) fn down(&self, hop: Hop, how: Ended) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let (Ended::Gone(reason) | Ended::Lied(reason)) = &how;
        match state.peers.get_mut(&hop.link) {
            Some(peer) if peer.is_in(hop.session) => peer.down(reason.clone()),
            // This side ended it before.
            _ => return,
        }
        let before = state.out.len();
        state.out.retain(|_, stream| stream.hop != hop);
        let is_known = state.mail.told.routes().iter().any(|route| route.hop == hop);
        if is_known || state.out.len() < before {
            state.mail.events.push(Event::Lost { hop, how });
            state.mail.is_urgent = true;
        }
        state.note(hop.link);
        state.count_workers();
        self.reroute(guard);
        self.arrived.notify_one();
    }

    /// Takes a shard's answer.
    ///
    /// # Errors
    /// When it was not sent on that stream: the worker cannot be trusted then.
    pub(super) fn deliver(
        &self,
        stream: StreamKey,
        id: u64,
        outcome: Result<Arrived<WireRows>, Fault>,
    ) -> Result<(), String> {
        let mut state = self.lock();
        let state = &mut *state;
        match state.out.get(&id) {
            Some(sent) if *sent == stream => state.out.remove(&id),
            Some(_) => return Err(format!("it answered shard {id}, which went to another stream")),
            None if id > state.issued => return Err(format!("it answered shard {id}, which was never sent")),
            None => return Err(format!("it answered shard {id} twice")),
        };
        if let Some(peer) = state.peers.get_mut(&stream.hop.link) {
            peer.answered(outcome.is_ok());
        }
        let mail = &mut state.mail;
        match outcome {
            Ok(_) => mail.answers[stream.lane] += 1,
            Err(_) => mail.is_urgent = true,
        }
        mail.events.push(Event::Answer { id, outcome });
        if mail.is_due() {
            self.arrived.notify_one();
        }
        Ok(())
    }

    /// Waits until a worker is in doubt; false when its session is over.
    pub(super) async fn doubted(&self, hop: Hop) -> bool {
        loop {
            let doubt = match self.lock().peers.get(&hop.link) {
                Some(peer) if peer.is_in(hop.session) && peer.is_doubted() => return true,
                Some(peer) if peer.is_in(hop.session) => peer.doubt.clone(),
                _ => return false,
            };
            doubt.notified().await;
        }
    }

    /// Whether a worker's last session had any outputs.
    pub(super) fn is_useful(&self, peer: usize) -> bool {
        self.lock().peers.get(&peer).is_some_and(Peer::is_useful)
    }

    /// Remaining time of a worker's ban.
    pub(super) fn banned_for(&self, peer: usize) -> Duration {
        self.lock().peers.get(&peer).map_or(Duration::ZERO, Peer::banned_for)
    }

    /// Counts a breach of the protocol by a worker.
    pub(super) fn strike(&self, peer: usize) {
        if let Some(peer) = self.lock().peers.get_mut(&peer) {
            peer.strike();
        }
    }

    /// Marks the fleet as stale and wakes its builder.
    fn reroute(&self, mut state: MutexGuard<'_, State>) {
        let before = std::mem::replace(&mut state.freshness, Freshness::Stale);
        drop(state);
        // The builder wakes to a free lock; while it builds, it needs no wake-up.
        if before == Freshness::Fresh {
            self.outdated.notify_all();
        }
        self.links.notify_all();
    }
}

impl State {
    /// Sets the gauge of connected workers.
    fn count_workers(&self) {
        let live = self.peers.values().filter(|peer| peer.is_up() && !peer.is_here()).count();
        metrics::gauge!("muster_dispatch_workers").set(live as f64);
    }

    /// Updates a worker's announcement, or removes it.
    fn note(&mut self, number: usize) {
        let route = self.peers.get(&number).and_then(|peer| peer.route(number));
        match route {
            Some(route) if self.peers.get(&number).is_some_and(Peer::is_here) => {
                self.announced.here = Some(route);
            }
            Some(route) => drop(Arc::make_mut(&mut self.announced.live).insert(number, route)),
            None => drop(Arc::make_mut(&mut self.announced.live).remove(&number)),
        }
    }
}

/// The fleet of what was announced, and who holds what in it beside this process. What this process computes binds nothing: it
/// is used for what is bound to its class.
fn build(
    epoch: Epoch,
    shape: &Shape,
    announced: &AllAnnounced,
    before: &Binding,
) -> Result<(Fleet, Arc<Placement>), LinkError> {
    let mut all: Vec<&Announced> = announced.live.values().collect();
    let binding = before.after(all.iter().map(|(route, told)| (route.class, &told.holdings[..])));
    if binding.changes() != before.changes() {
        tracing::info!(before = %before.name(), now = %binding.name(), "experts are bound to other numerics classes");
    }
    let binding = Arc::new(binding);
    let fleet = |announced: &[&Announced]| {
        let workers: Vec<(&WorkerId, &[ExpertKey], _)> =
            announced.iter().map(|(route, told)| (&told.worker, &told.holdings[..], *route)).collect();
        let fleet = Fleet::new(epoch, shape, &workers, Arc::clone(&binding));
        fleet.map_err(|error| LinkError::Placement(error.to_string()))
    };
    let live = fleet(&all)?;
    let elsewhere = Arc::clone(live.placement());
    if announced.here.is_none() {
        return Ok((live, elsewhere));
    }
    all.extend(&announced.here);
    Ok((fleet(&all)?, elsewhere))
}
