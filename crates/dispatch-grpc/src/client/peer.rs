//! One worker as its links know it: address, connection and announcement.
//!
//! Always holds: a worker is connected over the lanes of one session at a time. Knows nothing of shards' contents.

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_engine::batcher::Rank;
use muster_engine::delivery::{Hop, Route, Strikes};
use muster_proto::description::{Description, Phase};
use muster_proto::expert::v1;
use muster_proto::handshake::LANES;
use muster_types::WorkerId;
use tokio::sync::{Notify, mpsc};

use super::control::{ConnectedWorker, Control};
use super::error::LinkError;
use super::health::{WorkerHealth, WorkerState};
use crate::address::Address;

/// Time for which a sign of life counts.
const CONFIRMED: Duration = Duration::from_secs(5);

/// A worker's route and announcement.
pub(super) type Announced = (Route, Arc<Description>);

pub(super) type Lanes = [mpsc::Sender<v1::DispatchRequest>; LANES];

/// A worker's link.
pub(super) enum LinkState {
    /// Without `control`: in this process.
    Up {
        session: u64,
        lanes: Lanes,
        control: Option<Control>,
    },
    Down {
        since: Instant,
        error: Option<LinkError>,
        reason: String,
    },
}

/// Origin of a worker's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// Configured: always known.
    Configured,
    /// Joined or discovered: forgotten when it is gone.
    Joined,
    /// This process, the last owner of every expert.
    Here,
}

/// See the module.
pub(super) struct Peer {
    pub(super) address: Address,
    pub(super) announced: Option<Arc<Description>>,
    /// Its failure domain, as its discovery or join says.
    pub(super) place: Option<String>,
    pub(super) state: LinkState,
    /// Unanswered shards of its session.
    pub(super) out: usize,
    /// Late ones among them, as delivery counted last.
    pub(super) late: usize,
    /// Doubt flag: a late shard has no other owner.
    in_doubt: bool,
    /// Another worker claims its name.
    is_contested: bool,
    /// Its origin.
    origin: Origin,
    /// Number of joins and discoveries that name it.
    pub(super) joined: usize,
    /// Notified when doubt begins and when the session ends.
    pub(super) doubt: Arc<Notify>,
    /// Time of its last sign of life in doubt.
    confirmed: Option<Instant>,
    /// Its session gave outputs.
    useful: bool,
    /// Bans for breaches of the protocol.
    strikes: Strikes,
}

impl Peer {
    /// A worker that joins.
    pub(super) fn joined(address: Address, place: Option<String>) -> Self {
        Self { origin: Origin::Joined, joined: 1, place, ..Self::new(address) }
    }

    /// This process.
    pub(super) fn here(description: Description, session: u64, lanes: Lanes) -> Self {
        // Nobody connects to it.
        let mut here = Self { origin: Origin::Here, ..Self::new(Address::Unix("/".into())) };
        here.announced = Some(Arc::new(description));
        here.state = LinkState::Up { session, lanes, control: None };
        here
    }

    /// Whether it is this process.
    pub(super) fn is_here(&self) -> bool {
        self.origin == Origin::Here
    }

    /// Whether it is unconnected and no join or discovery names it any more.
    pub(super) fn is_forgotten(&self) -> bool {
        self.origin == Origin::Joined && self.joined == 0 && !self.is_up()
    }

    /// A configured worker that was not connected yet.
    pub(super) fn new(address: Address) -> Self {
        let state =
            LinkState::Down { since: Instant::now(), error: None, reason: "not connected yet".into() };
        Self {
            address,
            announced: None,
            place: None,
            state,
            out: 0,
            late: 0,
            in_doubt: false,
            is_contested: false,
            origin: Origin::Configured,
            joined: 0,
            doubt: Arc::default(),
            confirmed: None,
            useful: false,
            strikes: Strikes::default(),
        }
    }

    pub(super) const fn is_up(&self) -> bool {
        matches!(self.state, LinkState::Up { .. })
    }

    /// Whether it is connected, and this is its session.
    pub(super) fn is_in(&self, session: u64) -> bool {
        matches!(self.state, LinkState::Up { session: now, .. } if now == session)
    }

    fn is_serving(&self) -> bool {
        self.is_up() && self.announced.as_ref().is_some_and(|d| d.phase == Phase::Serving)
    }

    /// Starts a session.
    pub(super) fn up(&mut self, description: Description, session: u64, lanes: Lanes, control: Control) {
        self.announced = Some(Arc::new(description));
        self.state = LinkState::Up { session, lanes, control: Some(control) };
        (self.out, self.useful, self.confirmed) = (0, false, None);
        self.is_trusted();
    }

    /// Whether it announces itself by this name.
    pub(super) fn is_called(&self, worker: &WorkerId) -> bool {
        self.announced.as_ref().is_some_and(|announced| announced.worker == *worker)
    }

    /// Handles another worker's claim to its name, which the one that is alive keeps. Returns the other's error.
    pub(super) fn contest(&mut self, worker: &WorkerId) -> LinkError {
        let (worker, other) = (worker.to_string(), self.address.to_string());
        if self.is_here() || self.confirmed.is_some_and(|at| at.elapsed() < CONFIRMED) {
            return LinkError::SameName { worker, other };
        }
        self.is_contested = true;
        self.doubt.notify_one();
        LinkError::Contested { worker, other }
    }

    /// Records a sign of life; late shards stay late.
    pub(super) fn confirm(&mut self) {
        self.confirmed = Some(Instant::now());
        self.is_contested = false;
    }

    /// Whether it owes a sign of life.
    pub(super) const fn is_doubted(&self) -> bool {
        self.in_doubt || self.is_contested
    }

    /// Sets its late-shard count and doubt flag, as delivery says.
    pub(super) fn doubted(&mut self, late: usize, in_doubt: bool) {
        (self.late, self.in_doubt) = (late, in_doubt);
        if in_doubt {
            self.doubt.notify_one();
        }
    }

    /// Counts a sent shard.
    pub(super) const fn sent(&mut self) {
        self.out += 1;
    }

    /// Counts an answer. Without unanswered shards, clears the late-shard count and the doubt flag.
    pub(super) const fn answered(&mut self, with_outputs: bool) {
        self.useful |= with_outputs;
        self.out = self.out.saturating_sub(1);
        if self.out == 0 {
            // Delivery may poll much later.
            (self.late, self.in_doubt) = (0, false);
        }
    }

    /// Whether its session, or the one before, had any outputs.
    pub(super) const fn is_useful(&self) -> bool {
        self.useful
    }

    /// Ends its session.
    pub(super) fn down(&mut self, reason: String) {
        self.state = LinkState::Down { since: Instant::now(), error: None, reason };
        self.out = 0;
        self.is_trusted();
        // The link's task ends it.
        self.doubt.notify_one();
    }

    const fn is_trusted(&mut self) {
        (self.late, self.in_doubt, self.is_contested) = (0, false, false);
    }

    /// Records that it could not be connected.
    pub(super) fn unreachable(&mut self, error: LinkError) {
        let since = match self.state {
            LinkState::Down { since, .. } => since,
            LinkState::Up { .. } => Instant::now(),
        };
        self.state = LinkState::Down { since, reason: error.to_string(), error: Some(error) };
    }

    /// Its route as peer number `at`, and its announcement; `None` when it is not connected.
    pub(super) fn route(&self, at: usize) -> Option<Announced> {
        match (&self.state, &self.announced) {
            (LinkState::Up { session, .. }, Some(announced)) => {
                let hop = Hop { link: at, session: *session };
                let (epoch, class, rank) = (announced.epoch, announced.numerics, self.rank());
                Some((Route { hop, epoch, rank, class }, Arc::clone(announced)))
            }
            _ => None,
        }
    }

    /// A lane of its session.
    pub(super) fn lane(&self, session: u64, lane: usize) -> Option<&mpsc::Sender<v1::DispatchRequest>> {
        match &self.state {
            LinkState::Up { session: now, lanes, .. } if *now == session => lanes.get(lane),
            _ => None,
        }
    }

    fn domain(&self) -> Option<String> {
        self.announced.as_ref().and_then(|announced| announced.domain.clone()).or_else(|| self.place.clone())
    }

    pub(super) fn health(&self) -> WorkerHealth {
        let (state, session) = match &self.state {
            LinkState::Down { since, reason, .. } => {
                (WorkerState::Down { since: *since, reason: reason.clone() }, None)
            }
            LinkState::Up { session, .. } if self.is_serving() => (WorkerState::Connected, Some(*session)),
            LinkState::Up { session, .. } => (WorkerState::Draining, Some(*session)),
        };
        WorkerHealth {
            address: self.address.to_string(),
            state,
            session,
            announced: self.announced.clone(),
            domain: self.domain(),
            late_shards: self.late,
            banned: self.banned_for(),
        }
    }

    /// Preference, from its announcement: a draining worker comes later.
    fn rank(&self) -> Rank {
        match () {
            () if self.is_here() => Rank::Last,
            () if !self.is_serving() => Rank::Poor,
            () => Rank::Good,
        }
    }

    /// Its view for the placement leader; `None` when it is not connected.
    pub(super) fn connected(&self) -> Option<ConnectedWorker> {
        match (&self.state, &self.announced) {
            (LinkState::Up { session, control: Some(control), .. }, Some(announced)) => {
                Some(ConnectedWorker {
                    address: self.address.to_string(),
                    session: *session,
                    description: announced.clone(),
                    domain: self.domain(),
                    control: control.clone(),
                })
            }
            _ => None,
        }
    }

    /// Counts a breach of the protocol.
    pub(super) fn strike(&mut self) {
        self.strikes.strike(Instant::now());
        metrics::counter!("muster_dispatch_workers_banned_total").increment(1);
    }

    /// Remaining time of its ban.
    pub(super) fn banned_for(&self) -> Duration {
        self.strikes.left(Instant::now())
    }
}
