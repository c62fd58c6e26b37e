//! The seam between delivery and a transport: it carries shards to workers and reports their answers.
//!
//! A transport owns links, clocks and buffers, and knows none of delivery's rules. It must keep: an accepted shard is
//! answered at most once, on the hop that it was sent to, or its hop is reported lost; a lost hop carries nothing more; the
//! number of a lost hop is never reused for another session.

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_placement::{Binding, Held, Placement, PlacementError, Shape, WorkerIx};
use muster_types::{Epoch, ExpertKey, Fault, LayerId, NumericsClass, WorkerId};

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

/// Route to one worker of a [`Fleet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The session.
    pub hop: Hop,
    /// Epoch of its holdings in the fleet.
    pub epoch: Epoch,
    /// Preference, from the worker's own announcement.
    pub rank: Rank,
    /// Of the worker's device.
    pub class: NumericsClass,
}

/// Connected workers and their holdings: an immutable snapshot.
#[derive(Debug)]
pub struct Fleet {
    placement: Arc<Placement>,
    binding: Arc<Binding>,
    /// For every worker of the placement.
    routes: Vec<Route>,
}

impl Fleet {
    /// Of workers with what they hold. For an expert only those are asked that are of the class which it is bound to.
    ///
    /// # Errors
    /// When the holdings make no placement.
    pub fn new(
        epoch: Epoch,
        shape: &Shape,
        workers: &[(&WorkerId, &[ExpertKey], Route)],
        binding: Arc<Binding>,
    ) -> Result<Self, PlacementError> {
        let held: Vec<Held<'_>> =
            workers.iter().map(|&(worker, held, route)| (worker, route.class, held)).collect();
        let placement = Arc::new(Placement::bound(epoch, shape, &held, &binding)?);
        Ok(Self { placement, binding, routes: workers.iter().map(|&(_, _, route)| route).collect() })
    }

    /// What experts are bound to.
    #[must_use]
    pub const fn binding(&self) -> &Arc<Binding> {
        &self.binding
    }

    /// Owners of every expert.
    #[must_use]
    pub const fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    /// Routes to the placement's workers, in its order.
    #[must_use]
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// A worker's route and name.
    #[must_use]
    pub fn route(&self, worker: WorkerIx) -> Option<(Route, &WorkerId)> {
        let at = worker.index();
        self.routes.get(at).copied().zip(self.placement.workers().get(at))
    }
}

/// A shard to send.
#[derive(Debug)]
pub struct Outgoing<'a, L> {
    /// Its number, unique in this delivery and ascending from 1.
    pub id: u64,
    /// The layer.
    pub layer: LayerId,
    /// Epoch of the holdings in its plan.
    pub epoch: Epoch,
    /// Rows, experts, and the rows of each expert.
    pub plan: &'a ShardPlan,
    /// The hidden rows.
    pub load: &'a L,
    /// Weights of the outputs if the worker combines them, else empty.
    pub weights: &'a [f32],
}

/// Why a shard was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// The hop is lost.
    Broken,
    /// Backpressure: its send queue is full.
    Full,
}

/// A shard's outputs.
#[derive(Debug)]
pub struct Arrived<O> {
    /// Its output rows.
    pub outputs: O,
    /// Time in the experts, as the worker reports it.
    pub compute: Duration,
    /// Time of arrival.
    pub at: Instant,
}

/// How a hop ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The connection or the worker went away.
    Gone(String),
    /// The worker broke the protocol.
    Lied(String),
}

/// An event of a transport.
#[derive(Debug)]
pub enum Event<O> {
    /// A shard was answered.
    Answer {
        /// The shard.
        id: u64,
        /// Its outputs, or the fault.
        outcome: Result<Arrived<O>, Fault>,
    },
    /// A hop is lost, with every unanswered shard on it.
    Lost {
        /// The hop.
        hop: Hop,
        /// How it ended.
        how: Ended,
    },
    /// The fleet changed: workers or their holdings.
    Announced(Arc<Fleet>),
}

/// Condition that ends a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Answers on this lane are counted.
    pub lane: usize,
    /// Number of outputs that end the wait; any other event ends it at once.
    pub answers: usize,
    /// Deadline of the wait.
    pub until: Instant,
}

/// The transport is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// Output rows of a shard, in the transport's own form.
pub trait Outputs {
    /// Checks for exactly `rows` rows of the model's width.
    ///
    /// # Errors
    /// The mismatch, in words.
    fn check(&self, rows: usize) -> Result<(), String>;

    /// Rows that the worker marked as not finite: strictly ascending and in range.
    fn marks(&self) -> &[u32];
}

/// Carries shards to workers, and their answers back.
pub trait Transport: Send {
    /// Hidden rows to send.
    type Load: Send;
    /// Output rows.
    type Outputs: Outputs + Send;

    /// The current time.
    fn now(&self) -> Instant;

    /// Copies out rows of a micro-batch, by number.
    ///
    /// # Errors
    /// `Invalid` when they lie in memory that this transport cannot read.
    fn gather(&self, rows: Rows<'_>, picked: &[u32]) -> Result<Self::Load, DispatchError>;

    /// Copies out rows of a load, by position.
    fn pick(&self, load: &Self::Load, picked: &[u32]) -> Self::Load;

    /// Queues a shard for a hop. It may stay queued until [`Self::flush`].
    ///
    /// # Errors
    /// [`Unsent`] when the shard cannot reach the hop.
    fn send(&mut self, hop: Hop, lane: usize, shard: &Outgoing<'_, Self::Load>) -> Result<(), Unsent>;

    /// Sends the queued shards.
    fn flush(&mut self);

    /// Appends the events since the last call.
    fn poll(&mut self, events: &mut Vec<Event<Self::Outputs>>);

    /// Waits for the `wanted` condition, then appends the events as [`Self::poll`] does.
    ///
    /// # Errors
    /// [`Closed`] when no event can come any more.
    fn wait(&mut self, wanted: &Wanted, events: &mut Vec<Event<Self::Outputs>>) -> Result<(), Closed>;

    /// Version of the fleet: changes before [`Event::Announced`] is delivered.
    fn version(&self) -> u64;

    /// Sets the late-shard count and the doubt flag of a hop. While in doubt, its worker must give signs of life, or the hop is
    /// lost.
    fn doubt(&mut self, hop: Hop, late: usize, in_doubt: bool);

    /// Ends the hop of a worker that lied, and refuses the worker a new one for a while.
    fn ban(&mut self, hop: Hop, reason: &str);

    /// Ends all hops.
    fn close(&mut self);
}
