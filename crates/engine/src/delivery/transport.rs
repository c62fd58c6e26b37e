//! What delivery asks of a transport: to carry shards to workers, and to tell what came of them.
//!
//! A transport owns links, clocks and buffers, and knows none of delivery's rules. What it must keep: a shard that was taken
//! is answered at most once, on the hop that it went to, or its hop is told to be lost; a hop that is lost carries nothing
//! more; a lost hop's number is never used for another session.

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_placement::{Placement, PlacementError, Shape, WorkerIx};
use muster_types::{Epoch, ExpertKey, Fault, LayerId, WorkerId};

use crate::batcher::{Rank, ShardPlan};
use crate::dispatch::{DispatchError, Rows};

/// A session with a worker. Another session, even with the same worker, is another hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hop {
    /// The transport's number for the worker.
    pub link: usize,
    /// The session on that link.
    pub session: u64,
}

/// The way to one worker of a [`Fleet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The session.
    pub hop: Hop,
    /// Epoch of the holdings that the fleet has of it.
    pub epoch: Epoch,
    /// Preference by what the worker announces of itself.
    pub rank: Rank,
}

/// Who is connected and holds what, as of one moment.
#[derive(Debug)]
pub struct Fleet {
    placement: Arc<Placement>,
    /// For every worker of the placement.
    routes: Vec<Route>,
}

impl Fleet {
    /// Of workers with what they hold.
    ///
    /// # Errors
    /// When the holdings make no placement.
    pub fn new(
        epoch: Epoch,
        shape: &Shape,
        workers: &[(&WorkerId, &[ExpertKey], Route)],
    ) -> Result<Self, PlacementError> {
        let held: Vec<_> = workers.iter().map(|&(worker, held, _)| (worker, held)).collect();
        let placement = Arc::new(Placement::of(epoch, shape, &held)?);
        Ok(Self { placement, routes: workers.iter().map(|&(_, _, route)| route).collect() })
    }

    /// Who holds what.
    #[must_use]
    pub const fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    /// The ways to the placement's workers, in its order.
    #[must_use]
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// The way to a worker, and its name.
    #[must_use]
    pub fn route(&self, worker: WorkerIx) -> Option<(Route, &WorkerId)> {
        let at = worker.index();
        self.routes.get(at).copied().zip(self.placement.workers().get(at))
    }
}

/// A shard to be carried.
#[derive(Debug)]
pub struct Outgoing<'a, L> {
    /// Its number, which no other shard of this delivery has. Ascending from 1.
    pub id: u64,
    /// The layer.
    pub layer: LayerId,
    /// Epoch of the holdings that it was planned with.
    pub epoch: Epoch,
    /// Rows, experts, and which rows each expert gets.
    pub plan: &'a ShardPlan,
    /// The hidden rows.
    pub load: &'a L,
    /// Weights of the outputs where the worker adds them up, else empty.
    pub weights: &'a [f32],
}

/// Why a shard was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// The hop is lost.
    Broken,
    /// As many shards wait for its transport as may.
    Full,
}

/// What came back for a shard.
#[derive(Debug)]
pub struct Arrived<O> {
    /// Its output rows.
    pub outputs: O,
    /// Time in the experts, as the worker reports it.
    pub compute: Duration,
    /// When it was here.
    pub at: Instant,
}

/// How a hop was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The connection or the worker went away.
    Gone(String),
    /// The worker broke the protocol.
    Lied(String),
}

/// What a transport tells.
#[derive(Debug)]
pub enum Event<O> {
    /// A shard was answered.
    Answer {
        /// The shard.
        id: u64,
        /// Its outputs, or why there are none.
        outcome: Result<Arrived<O>, Fault>,
    },
    /// A hop is lost, with all that was sent there and not answered.
    Lost {
        /// The hop.
        hop: Hop,
        /// How.
        how: Ended,
    },
    /// Other workers are connected, or hold other experts.
    Announced(Arc<Fleet>),
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Answers on this lane are counted.
    pub lane: usize,
    /// So many with outputs end the wait; anything but an output ends it at once.
    pub answers: usize,
    /// Waiting ends then in any case.
    pub until: Instant,
}

/// Nothing is carried any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// Output rows of a shard, as a transport brings them.
pub trait Outputs {
    /// Whether there are exactly so many rows of the model's width.
    ///
    /// # Errors
    /// What is wrong, in words.
    fn check(&self, rows: usize) -> Result<(), String>;

    /// Rows that the worker says are not finite: strictly ascending and in range.
    fn marks(&self) -> &[u32];
}

/// Carries shards to workers, and their answers back.
pub trait Transport: Send {
    /// Hidden rows on their way.
    type Load: Send;
    /// Output rows.
    type Outputs: Outputs + Send;

    /// The time.
    fn now(&self) -> Instant;

    /// Takes rows of a micro-batch out, by their numbers.
    ///
    /// # Errors
    /// `Invalid` when they lie where this transport does not reach.
    fn gather(&self, rows: Rows<'_>, picked: &[u32]) -> Result<Self::Load, DispatchError>;

    /// Takes rows of a load out, by their places in it.
    fn pick(&self, load: &Self::Load, picked: &[u32]) -> Self::Load;

    /// Takes a shard for a hop. It may stay here until [`Self::flush`].
    ///
    /// # Errors
    /// When it will never get there.
    fn send(&mut self, hop: Hop, lane: usize, shard: &Outgoing<'_, Self::Load>) -> Result<(), Unsent>;

    /// Sees that what was taken leaves.
    fn flush(&mut self);

    /// Gives what happened since this was last asked.
    fn poll(&mut self, events: &mut Vec<Event<Self::Outputs>>);

    /// The same, once there is what is wanted.
    ///
    /// # Errors
    /// When nothing will ever come.
    fn wait(&mut self, wanted: &Wanted, events: &mut Vec<Event<Self::Outputs>>) -> Result<(), Closed>;

    /// Changes with the fleet, before that is told.
    fn version(&self) -> u64;

    /// So many shards of a hop are late. In doubt, its worker is to give signs of life until this says otherwise, or the
    /// hop is lost.
    fn doubt(&mut self, hop: Hop, late: usize, in_doubt: bool);

    /// A worker lied: its hop is lost, and it gets no other for a while.
    fn ban(&mut self, hop: Hop, reason: &str);

    /// Ends all hops.
    fn close(&mut self);
}
