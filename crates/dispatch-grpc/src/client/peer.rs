//! What a router knows of one worker: where it is, what it announces, and how it has behaved.
//!
//! Always holds: a worker is connected over the lanes of one session at a time. Knows nothing of shards' contents.

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_engine::batcher::Rank;
use muster_proto::description::{Description, Phase};
use muster_proto::expert::v1;
use muster_proto::expert::v1::control_client::ControlClient;
use muster_proto::handshake::LANES;
use muster_proto::reply::{Fault, FaultKind};
use muster_types::WorkerId;
use tokio::sync::{Notify, mpsc};
use tonic::transport::Channel;

use super::cluster::ConnectedWorker;
use super::config::LinkError;
use super::handle::{WorkerHealth, WorkerState};
use super::routes::{Announced, Hop};
use crate::address::Address;

/// How long a worker that broke the protocol is left alone, the first time.
const FIRST_BAN: Duration = Duration::from_secs(1);
/// How often that time may double.
const MOST_STRIKES: u32 = 6;
/// After so long without another breach it begins anew.
const GOOD_CONDUCT: Duration = Duration::from_secs(300);
/// Errors in a row, with no outputs in between, after which a worker is left alone.
const MOST_FAULTS: u32 = 16;
/// How long a sign of life shows that a worker is there.
const CONFIRMED: Duration = Duration::from_secs(5);

pub(super) type Lanes = [mpsc::Sender<v1::DispatchRequest>; LANES];

/// For calls beside the lanes.
pub(super) type Control = ControlClient<Channel>;

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

/// How a worker came to be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// It was configured, and stays known whether it is there or not.
    Configured,
    /// It made itself known, and is forgotten when it is gone.
    Joined,
    /// It is this process, for what nobody else can be asked for.
    Here,
}

/// See the module.
pub(super) struct Peer {
    pub(super) address: Address,
    pub(super) announced: Option<Arc<Description>>,
    /// Its failure domain, as whoever made it known says.
    pub(super) place: Option<String>,
    pub(super) state: LinkState,
    /// Shards that were late and are not answered yet. While there are any, others are asked first.
    pub(super) late: usize,
    /// How it came to be known.
    origin: Origin,
    /// How many say that it is there.
    pub(super) joined: usize,
    /// One of them nobody else can be asked for.
    pub(super) doubted: bool,
    /// Told when doubt begins.
    pub(super) doubt: Arc<Notify>,
    /// When it last gave a sign of life because there was doubt.
    confirmed: Option<Instant>,
    /// Shards of its session that nobody waits for and that it has yet to answer.
    owed: usize,
    /// Errors since it last gave outputs.
    faults: u32,
    /// Its session gave outputs.
    useful: bool,
    /// Until when it is not connected again, because it broke the protocol.
    banned: Option<Instant>,
    /// How often it broke it.
    strikes: u32,
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

    /// Whether it is not connected, and nobody says any more that it is there.
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
            late: 0,
            origin: Origin::Configured,
            joined: 0,
            doubted: false,
            doubt: Arc::default(),
            confirmed: None,
            owed: 0,
            faults: 0,
            useful: false,
            banned: None,
            strikes: 0,
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

    /// It is connected.
    pub(super) fn up(&mut self, description: Description, session: u64, lanes: Lanes, control: Control) {
        self.announced = Some(Arc::new(description));
        self.state = LinkState::Up { session, lanes, control: Some(control) };
        (self.owed, self.useful, self.confirmed) = (0, false, None);
        self.all_answered();
    }

    /// Whether it announces itself by this name.
    pub(super) fn is_called(&self, worker: &WorkerId) -> bool {
        self.announced.as_ref().is_some_and(|announced| announced.worker == *worker)
    }

    /// Another says that it has this one's name: whoever is alive keeps it. Says what the other is to do.
    pub(super) fn contest(&mut self, worker: &WorkerId) -> LinkError {
        let (worker, other) = (worker.to_string(), self.address.to_string());
        if self.is_here() || self.confirmed.is_some_and(|at| at.elapsed() < CONFIRMED) {
            return LinkError::SameName { worker, other };
        }
        self.doubted = true;
        self.doubt.notify_one();
        LinkError::Contested { worker, other }
    }

    /// It gave a sign of life. What is late still is.
    pub(super) fn confirm(&mut self) {
        self.confirmed = Some(Instant::now());
        self.doubted = self.late > 0;
    }

    /// Nobody waits for one of its shards any more.
    pub(super) const fn owe(&mut self) {
        self.owed += 1;
    }

    /// It answered a shard that nobody waits for; false when it had answered that before.
    pub(super) const fn is_owed(&mut self) -> bool {
        let owed = self.owed > 0;
        self.owed = self.owed.saturating_sub(1);
        owed
    }

    /// Takes note of an answer.
    ///
    /// # Errors
    /// When nothing but errors has come for long.
    pub(super) fn judge<T>(&mut self, outcome: &Result<T, Fault>) -> Result<(), String> {
        match outcome {
            Ok(_) => (self.faults, self.useful) = (0, true),
            // It says so for its own good.
            Err(Fault { kind: FaultKind::Overloaded | FaultKind::Draining, .. }) => {}
            Err(fault) => {
                self.faults += 1;
                if self.faults >= MOST_FAULTS {
                    self.faults = 0;
                    return Err(format!("{MOST_FAULTS} errors in a row; the last: {fault}"));
                }
            }
        }
        Ok(())
    }

    /// Whether its session, or the one before, gave any outputs.
    pub(super) const fn is_useful(&self) -> bool {
        self.useful
    }

    /// Its link ended.
    pub(super) fn down(&mut self, reason: String) {
        self.state = LinkState::Down { since: Instant::now(), error: None, reason };
        self.all_answered();
        // Whoever carries the link ends it.
        self.doubt.notify_one();
    }

    /// It has answered what was late, or nobody waits for that.
    pub(super) const fn all_answered(&mut self) {
        self.late = 0;
        self.doubted = false;
    }

    /// It could not be connected.
    pub(super) fn unreachable(&mut self, error: LinkError) {
        let since = match self.state {
            LinkState::Down { since, .. } => since,
            LinkState::Up { .. } => Instant::now(),
        };
        self.state = LinkState::Down { since, reason: error.to_string(), error: Some(error) };
    }

    /// The way to it as peer number `at`, and what it announces; `None` when it is not connected.
    pub(super) fn route(&self, at: usize) -> Option<Announced> {
        match (&self.state, &self.announced) {
            (LinkState::Up { session, .. }, Some(announced)) => {
                Some((Hop { peer: at, session: *session, epoch: announced.epoch }, Arc::clone(announced)))
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

    /// Whether another is to be asked first: it is late, or is about to leave.
    pub(super) fn rank(&self) -> Rank {
        match () {
            () if self.is_here() => Rank::Last,
            () if self.late > 0 || !self.is_serving() => Rank::Poor,
            () => Rank::Good,
        }
    }

    /// As a leader sees it; `None` when it is not connected.
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

    /// It broke the protocol: each time it is left alone for twice as long, unless it has behaved for long.
    pub(super) fn strike(&mut self) {
        let now = Instant::now();
        let long_ago = self.banned.is_none_or(|until| now.saturating_duration_since(until) > GOOD_CONDUCT);
        self.strikes = if long_ago { 0 } else { (self.strikes + 1).min(MOST_STRIKES) };
        self.banned = Some(now + FIRST_BAN * (1 << self.strikes));
        metrics::counter!("muster_dispatch_workers_banned_total").increment(1);
    }

    /// How long it is still to be left alone.
    pub(super) fn banned_for(&self) -> Duration {
        self.banned.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }
}
