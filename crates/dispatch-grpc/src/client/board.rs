//! The state that the engine thread and the network's tasks share: links, shards in flight, tickets, routes.
//!
//! What always holds: the lock is held for a few map operations, whatever workers announce. Routes take longer: a thread of
//! their own builds them without the lock from what was announced, and swaps them in; until then a worker that is gone is
//! ranked unusable in those that are in force.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use muster_engine::batcher::Rank;
use muster_engine::dispatch::{DispatchError, Ticket};
use muster_placement::Shape;
use muster_proto::description::Description;
use muster_proto::expert::v1;
use muster_proto::reply::{Fault, OutputRows, Timing};
use muster_types::{Epoch, ExpertKey, WorkerId};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout_at;

use super::cluster::{ConnectedWorker, Crowded};
use super::config::LinkError;
use super::handle::WorkerHealth;
use super::peer::{Control, Lanes, LinkState, Peer};
use super::routes::{Announced, Hop, Routes};
use crate::address::Address;
use crate::busy::BusyPoll;

/// Workers that a router knows at most.
const MOST_PEERS: usize = 4096;
/// How often the lock is tried before the thread sleeps until it is free: for longer than anybody holds it. Waking up takes a
/// hundred times as long.
const SPINS: u32 = 1000;
/// How many times longer than building routes took nothing is built afterwards, and how long at most.
const ROUTES_REST: u32 = 4;
const LONGEST_REST: Duration = Duration::from_millis(50);

/// The stream that a shard went down on. One that is opened later is another, even to the same worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StreamKey {
    pub(super) peer: usize,
    pub(super) session: u64,
    pub(super) lane: usize,
}

/// What came back for one shard.
pub(super) struct Arrived {
    pub(super) outputs: OutputRows,
    pub(super) timing: Timing,
    /// When it was here.
    pub(super) at: Instant,
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
    /// Its number among the ticket's parts.
    pub(super) part: usize,
    pub(super) worker: WorkerId,
    pub(super) hop: Hop,
    pub(super) request: v1::LayerShard,
}

struct Pending {
    /// `None` once nobody waits for it: its answer only shows that the worker answers again.
    ticket: Option<Ticket>,
    part: usize,
    stream: StreamKey,
    /// Its time was up before it was answered.
    late: bool,
}

/// What came of some parts.
pub(super) type News = Vec<(usize, Result<Arrived, Failure>)>;

/// A ticket's shards that are still out, and what came of the others since the engine thread looked.
#[derive(Default)]
struct Progress {
    out: usize,
    news: News,
    /// Any answer may be the one that is waited for, not only the last.
    eager: bool,
}

impl Progress {
    fn take(&mut self, part: usize, outcome: Result<Arrived, Failure>) {
        self.out -= 1;
        self.eager |= outcome.is_err();
        self.news.push((part, outcome));
    }

    fn is_news(&self) -> bool {
        !self.news.is_empty() && (self.out == 0 || self.eager)
    }
}

/// Why a shard could not be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unsent {
    /// The dispatch is closed.
    Closed,
    /// The link to this worker is not there any more.
    Broken(WorkerId),
    /// As many shards wait for this worker's transport as may.
    Full(WorkerId),
}

struct State {
    /// By number, which none ever has again.
    peers: BTreeMap<usize, Peer>,
    next_peer: usize,
    announced: AllAnnounced,
    routes: Arc<Routes>,
    /// Routes were put in force, and what is known of their workers was not yet held against them.
    is_unranked: bool,
    freshness: Freshness,
    shards: HashMap<u64, Pending>,
    tickets: HashMap<Ticket, Progress>,
    /// The last shard id given out.
    issued: u64,
    sessions: u64,
    late_replies: u64,
    closed: bool,
}

/// What is announced, cheap to take away.
#[derive(Clone, Default)]
struct AllAnnounced {
    /// By workers that are connected, by their numbers.
    live: Arc<BTreeMap<usize, Announced>>,
    /// By this process.
    here: Option<Announced>,
}

/// Whether routes are those of what was announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freshness {
    Fresh,
    /// Something was announced since.
    Stale,
    /// Others are being built.
    Building,
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
    /// Epoch of the routes, to be read without the lock.
    version: AtomicU64,
    /// Tells those who wait for another.
    versions: watch::Sender<()>,
    state: Mutex<State>,
    /// A link came or went, or there are other routes; for `gather`.
    links: Condvar,
    /// Routes are out of date; for the thread that builds them.
    outdated: Condvar,
    /// A ticket may have come to its end; for `wait`, of which there is one at a time.
    answered: Notify,
}

impl Board {
    pub(super) fn new(shape: Shape, addresses: Vec<Address>) -> Result<Self, LinkError> {
        let routes = Arc::new(Routes::new(Epoch::new(1), &shape, std::iter::empty(), None)?);
        let peers: BTreeMap<usize, Peer> = addresses.into_iter().map(Peer::new).enumerate().collect();
        let state = State {
            next_peer: peers.len(),
            peers,
            announced: AllAnnounced::default(),
            routes,
            is_unranked: false,
            freshness: Freshness::Fresh,
            shards: HashMap::new(),
            tickets: HashMap::new(),
            issued: 0,
            sessions: 0,
            late_replies: 0,
            closed: false,
        };
        let (links, outdated, answered) = (Condvar::new(), Condvar::new(), Notify::new());
        let (version, versions) = (AtomicU64::new(1), watch::Sender::new(()));
        Ok(Self { shape, version, versions, state: Mutex::new(state), links, outdated, answered })
    }

    /// Keeps routes up to date, on a thread of its own that ends with the board.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(super) fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let board = Arc::clone(self);
        std::thread::Builder::new().name("muster-routes".into()).spawn(move || board.keep_routes())?;
        Ok(())
    }

    fn keep_routes(&self) {
        // Routes that were in force. They are large, and whoever holds them last must not be who frees them.
        let mut retired: Vec<Arc<Routes>> = Vec::new();
        while let Some((epoch, announced)) = self.next_routes() {
            let began = Instant::now();
            let built = Routes::new(epoch, &self.shape, announced.live.values(), announced.here.as_ref());
            drop(announced);
            match built {
                Ok(routes) => retired.push(self.swap(routes)),
                // What is announced was checked, name by name.
                Err(error) => tracing::error!(%error, "workers that were compatible no longer are"),
            }
            self.links.notify_all();
            retired.retain(|routes| Arc::strong_count(routes) > 1);
            // What is announced meanwhile is built in one go.
            std::thread::sleep(began.elapsed().saturating_mul(ROUTES_REST).min(LONGEST_REST));
        }
    }

    /// Waits until other routes are to be built, and says of what; `None` once closed.
    fn next_routes(&self) -> Option<(Epoch, AllAnnounced)> {
        let fresh = |state: &mut State| state.freshness == Freshness::Fresh && !state.closed;
        let mut state = self.outdated.wait_while(self.lock(), fresh).unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        state.freshness = Freshness::Building;
        Some((state.routes.placement.epoch().next(), state.announced.clone()))
    }

    /// Puts routes in force; gives those that were.
    fn swap(&self, routes: Routes) -> Arc<Routes> {
        let version = routes.placement.epoch().get();
        let routes = Arc::new(routes);
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.routes, routes);
        // By who asks for them: this thread holds the lock for a moment only, since it may be stopped in it.
        state.is_unranked = true;
        if state.freshness == Freshness::Building {
            state.freshness = Freshness::Fresh;
        }
        self.version.store(version, Ordering::Release);
        drop(state);
        self.versions.send_replace(());
        self.answered.notify_one();
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

    pub(super) fn routes(&self) -> Arc<Routes> {
        let mut state = self.lock();
        if state.is_unranked {
            state.rank();
        }
        state.routes.clone()
    }

    /// Every expert of the model, ascending.
    pub(super) fn keys(&self) -> Vec<ExpertKey> {
        self.shape.keys().collect()
    }

    /// Changes with the routes.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub(super) fn late_replies(&self) -> u64 {
        self.lock().late_replies
    }

    pub(super) fn health(&self) -> Vec<WorkerHealth> {
        self.lock().peers.values().filter(|peer| !peer.is_here()).map(Peer::health).collect()
    }

    /// Waits until every worker is connected, one can never be, or `deadline` passes.
    pub(super) fn gather(&self, deadline: Instant) -> Gathered {
        let mut state = self.lock();
        loop {
            let mut missing = Vec::new();
            for peer in state.peers.values() {
                match &peer.state {
                    LinkState::Up { .. } => {}
                    // Waiting does not mend its files, and others may hold the same.
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

    /// Tells when the routes change.
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
            if state.routes.elsewhere.is_complete() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closed {
                return false;
            }
            state = self.links.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Somebody says that there is a worker, and in which failure domain, if that is known. Gives the number of a peer that
    /// is new and is to be connected.
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

    /// This process computes as well, for what nobody else can be asked for. Gives its number and session.
    pub(super) fn here(&self, description: Description, lanes: Lanes) -> (usize, u64) {
        let mut state = self.lock();
        let (number, session) = (state.next_peer, state.sessions + 1);
        (state.next_peer, state.sessions) = (number + 1, session);
        state.peers.insert(number, Peer::here(description, session, lanes));
        state.note(number);
        self.reroute(state);
        (number, session)
    }

    /// Who said so is gone.
    pub(super) fn leave(&self, address: &Address) {
        if let Some(peer) = self.lock().peers.values_mut().find(|peer| peer.address == *address) {
            peer.joined = peer.joined.saturating_sub(1);
        }
    }

    /// Forgets a worker that is not connected, if nobody says any more that it is there.
    pub(super) fn forget_peer(&self, number: usize) -> bool {
        let mut state = self.lock();
        let gone = state.closed || state.peers.get(&number).is_none_or(Peer::is_forgotten);
        if gone {
            state.peers.remove(&number);
        }
        gone
    }

    /// Ends all waiting; nothing is accepted afterwards.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.peers.retain(|_, peer| !peer.is_here());
        state.shards.clear();
        state.tickets.clear();
        self.links.notify_all();
        self.outdated.notify_all();
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

    /// Sends shards of a ticket, all or none.
    pub(super) fn send(&self, ticket: Ticket, lane: usize, shards: Vec<Outgoing>) -> Result<(), Unsent> {
        let mut state = self.lock();
        if state.closed {
            return Err(Unsent::Closed);
        }
        let state = &mut *state;
        for shard in &shards {
            let sender = state.sender(shard.hop, lane).ok_or_else(|| Unsent::Broken(shard.worker.clone()))?;
            if sender.capacity() == 0 {
                return Err(Unsent::Full(shard.worker.clone()));
            }
        }
        let mut sent = Vec::with_capacity(shards.len());
        for Outgoing { part, worker, hop, request } in shards {
            let id = request.id;
            let stream = StreamKey { peer: hop.peer, session: hop.session, lane };
            let message = v1::DispatchRequest { body: Some(v1::dispatch_request::Body::Shard(request)) };
            let put = state.sender(hop, lane).is_some_and(|sender| sender.try_send(message).is_ok());
            if !put {
                // The link broke this moment. What went out already is answered into nothing.
                sent.into_iter().for_each(|id| state.give_up(id));
                return Err(Unsent::Broken(worker));
            }
            state.shards.insert(id, Pending { ticket: Some(ticket), part, stream, late: false });
            sent.push(id);
        }
        let progress = state.tickets.entry(ticket).or_default();
        progress.out += sent.len();
        Ok(())
    }

    /// Waits until all that is out for a ticket has come to something, or one part of it that others may wait for, until
    /// `until` passes, or until the routes are no longer those of `version`; and takes what there is.
    pub(super) async fn wait(
        &self,
        ticket: Ticket,
        version: u64,
        until: Instant,
        busy: &mut BusyPoll,
    ) -> Result<News, DispatchError> {
        loop {
            // Who has answered in time is not late because another is.
            let over = Instant::now() >= until || self.version() != version;
            if let Some(news) = self.news(ticket, over)? {
                return Ok(news);
            }
            if !busy.pause().await {
                // Late or not is found out above.
                let _ = timeout_at(until.into(), self.answered.notified()).await;
            }
        }
    }

    fn news(&self, ticket: Ticket, over: bool) -> Result<Option<News>, DispatchError> {
        let mut state = self.lock();
        if state.closed {
            return Err(DispatchError::Closed);
        }
        match state.tickets.get_mut(&ticket) {
            Some(progress) if over || progress.is_news() => Ok(Some(std::mem::take(&mut progress.news))),
            Some(_) => Ok(None),
            None => Err(DispatchError::Invalid(format!("ticket {} is not in flight", ticket.get()))),
        }
    }

    /// Takes note that this shard's time is up: until it is answered, other workers are asked first. From now on each of
    /// its ticket's answers is told at once.
    pub(super) fn is_late(&self, id: u64) {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(pending) = state.shards.get_mut(&id) else { return };
        if std::mem::replace(&mut pending.late, true) {
            return;
        }
        if let Some(progress) = pending.ticket.and_then(|ticket| state.tickets.get_mut(&ticket)) {
            progress.eager = true;
        }
        if let Some(peer) = state.peers.get_mut(&pending.stream.peer) {
            peer.late += 1;
            if peer.late == 1 {
                state.rank();
            }
        }
    }

    /// A shard is late and nobody else can be asked for it: its worker is to give a sign of life.
    pub(super) fn needs(&self, id: u64) {
        let mut state = self.lock();
        let state = &mut *state;
        if let Some(pending) = state.shards.get(&id)
            && let Some(peer) = state.peers.get_mut(&pending.stream.peer)
        {
            peer.doubted = true;
            peer.doubt.notify_one();
        }
    }

    /// A worker's answer was a lie: its link ends, and it is let in again only after a while.
    pub(super) fn ban(&self, hop: Hop, reason: &str) {
        let mut state = self.lock();
        if let Some(peer) = state.peers.get_mut(&hop.peer)
            && peer.is_in(hop.session)
        {
            peer.strike();
            drop(state);
            self.down(hop.peer, hop.session, Ended::Bad(reason.to_owned()));
        }
    }

    /// Gives a ticket up.
    pub(super) fn forget(&self, ticket: Ticket, shards: impl Iterator<Item = u64>) {
        let mut state = self.lock();
        for id in shards {
            match state.shards.get_mut(&id) {
                // Its answer will tell that the worker answers again.
                Some(pending) if pending.late => pending.ticket = None,
                _ => state.give_up(id),
            }
        }
        state.tickets.remove(&ticket);
    }
}

/// What the network's tasks do.
impl Board {
    pub(super) fn address(&self, peer: usize) -> Option<Address> {
        self.lock().peers.get(&peer).map(|peer| peer.address.clone())
    }

    /// A worker is connected. Gives the number of its session.
    pub(super) fn up(
        &self,
        peer: usize,
        description: Description,
        lanes: Lanes,
        control: Control,
    ) -> Result<u64, LinkError> {
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
        Ok(session)
    }

    /// What a worker announced last.
    pub(super) fn announced(&self, peer: usize) -> Option<Arc<Description>> {
        self.lock().peers.get(&peer)?.announced.clone()
    }

    /// A connected worker says something new about itself.
    pub(super) fn announce(&self, peer: usize, description: Arc<Description>) {
        let mut state = self.lock();
        let Some(known) = state.peers.get_mut(&peer) else { return };
        let before = known.announced.replace(description);
        state.note(peer);
        self.reroute(state);
        // Freed without the lock.
        drop(before);
    }

    /// A worker that was in doubt has given a sign of life.
    pub(super) fn is_alive(&self, peer: usize, session: u64) {
        if let Some(peer) = self.lock().peers.get_mut(&peer)
            && peer.is_in(session)
        {
            peer.confirm();
        }
    }

    /// A worker could not be connected.
    pub(super) fn unreachable(&self, peer: usize, error: LinkError) {
        if let Some(peer) = self.lock().peers.get_mut(&peer) {
            peer.unreachable(error);
        }
        self.links.notify_all();
    }

    /// A link ended: so does everything in flight on it.
    pub(super) fn down(&self, peer: usize, session: u64, ended: Ended) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let (failure, reason) = match ended {
            Ended::Lost(reason) => (Failure::Lost(reason.clone()), reason),
            Ended::Bad(reason) => (Failure::Bad(reason.clone()), reason),
        };
        match state.peers.get_mut(&peer) {
            Some(peer) if peer.is_in(session) => peer.down(reason),
            // It was ended from this side before.
            _ => return,
        }
        let tickets = &mut state.tickets;
        state.shards.retain(|_, pending| {
            let broken = pending.stream.peer == peer && pending.stream.session == session;
            if broken && let Some(progress) = pending.ticket.and_then(|ticket| tickets.get_mut(&ticket)) {
                progress.take(pending.part, Err(failure.clone()));
            }
            !broken
        });
        state.note(peer);
        // At once, for routes that lead there are still in force.
        state.rank();
        state.count_workers();
        self.reroute(guard);
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
                state.count_late_reply();
                let owed = state.peers.get_mut(&stream.peer).is_some_and(|peer| peer.is_owed());
                return if owed { Ok(()) } else { Err(format!("it answered shard {id} twice")) };
            }
        }
        let state = &mut *state;
        let Some(pending) = state.shards.remove(&id) else { return Ok(()) };
        let conduct = state.peers.get_mut(&stream.peer).map_or(Ok(()), |peer| peer.judge(&outcome));
        if pending.late
            && let Some(peer) = state.peers.get_mut(&pending.stream.peer)
        {
            peer.late = peer.late.saturating_sub(1);
            if peer.late == 0 {
                peer.all_answered();
                state.rank();
            }
        }
        match pending.ticket.and_then(|ticket| state.tickets.get_mut(&ticket)) {
            Some(progress) => {
                progress.take(pending.part, outcome.map_err(Failure::Fault));
                if progress.is_news() {
                    self.answered.notify_one();
                }
            }
            None => state.count_late_reply(),
        }
        conduct
    }

    /// Waits until there is doubt whether a worker is there; false when its session is over.
    pub(super) async fn doubt(&self, peer: usize, session: u64) -> bool {
        loop {
            let doubt = match self.lock().peers.get(&peer) {
                Some(peer) if peer.is_in(session) && peer.doubted => return true,
                Some(peer) if peer.is_in(session) => peer.doubt.clone(),
                _ => return false,
            };
            doubt.notified().await;
        }
    }

    /// Whether a worker's last session brought anything.
    pub(super) fn is_useful(&self, peer: usize) -> bool {
        self.lock().peers.get(&peer).is_some_and(Peer::is_useful)
    }

    /// How long a worker that broke the protocol is still to be left alone.
    pub(super) fn banned_for(&self, peer: usize) -> Duration {
        self.lock().peers.get(&peer).map_or(Duration::ZERO, Peer::banned_for)
    }

    /// A link ended because the worker broke the protocol.
    pub(super) fn strike(&self, peer: usize) {
        if let Some(peer) = self.lock().peers.get_mut(&peer) {
            peer.strike();
        }
    }

    /// Has new routes made from what is known now.
    fn reroute(&self, mut state: MutexGuard<'_, State>) {
        let before = std::mem::replace(&mut state.freshness, Freshness::Stale);
        drop(state);
        // Whoever is woken finds the lock free; while others are being built, nobody sleeps.
        if before == Freshness::Fresh {
            self.outdated.notify_all();
        }
        self.links.notify_all();
    }
}

impl State {
    fn sender(&self, hop: Hop, lane: usize) -> Option<&mpsc::Sender<v1::DispatchRequest>> {
        self.peers.get(&hop.peer)?.lane(hop.session, lane)
    }

    fn count_late_reply(&mut self) {
        self.late_replies += 1;
        metrics::counter!("muster_dispatch_late_replies_total").increment(1);
    }

    /// Tells how many workers are connected.
    fn count_workers(&self) {
        let live = self.peers.values().filter(|peer| peer.is_up() && !peer.is_here()).count();
        metrics::gauge!("muster_dispatch_workers").set(live as f64);
    }

    /// Ranks the workers of the routes anew.
    fn rank(&mut self) {
        self.is_unranked = false;
        let rank = |hop: &Hop| {
            let peer = self.peers.get(&hop.peer).filter(|peer| peer.is_in(hop.session));
            peer.map_or(Rank::Unusable, Peer::rank)
        };
        if let Some(ranked) = self.routes.ranked(rank) {
            self.routes = Arc::new(ranked);
        }
    }

    /// Nobody waits for a shard any more; its answer may still come.
    fn give_up(&mut self, id: u64) {
        if let Some(pending) = self.shards.remove(&id)
            && let Some(peer) = self.peers.get_mut(&pending.stream.peer)
            && peer.is_in(pending.stream.session)
        {
            peer.owe();
        }
    }

    /// Takes over what a worker announces, or that it is gone.
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
