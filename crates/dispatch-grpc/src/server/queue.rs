//! The bounded queue between the network and the experts, and the loop of the experts' thread.
//!
//! The thread that computes also drives the network while it waits, so a shard and its answer cross no thread. Shards of
//! one layer that wait together are computed as one call and answered apart; a row's bits do not depend on that.

use std::collections::VecDeque;
use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Counter, Histogram};
use muster_engine::compute::ExpertCompute;
use muster_proto::expert::v1;
use muster_proto::reply::{OutputRows, Reply, Timing};
use muster_proto::shard::{ShardRules, ShardView};
use muster_proto::version::MARKS;
use muster_types::{Fault, FaultKind};
use tokio::sync::{Notify, mpsc, watch};
use tonic::Status;

use super::call::{self, Call};
use super::control::RowCounts;
use super::pressure::Pressure;
use crate::busy::BusyPoll;
use crate::driver::Reins;

/// Item of a reply stream.
pub(super) type Item = Result<v1::DispatchReply, Status>;

/// Rows up to which waiting shards are computed together. Larger shards use the weights well by themselves, and a merge would
/// only delay the first answer.
const MERGE_ROWS: usize = 128;
/// Bytes of input or output from which the keeper thread drives the network during the computation, which then takes long
/// enough to pay for the hand-over.
const LARGE_BYTES: usize = 256 << 10;

/// A shard's one answer, with its place in the reply stream. A drop without an answer, as when the experts panic, sends a
/// fault.
pub(super) struct Answer {
    id: NonZeroU64,
    place: Option<mpsc::OwnedPermit<Item>>,
    in_flight: watch::Sender<usize>,
}

impl Answer {
    pub(super) fn new(
        id: NonZeroU64,
        place: mpsc::OwnedPermit<Item>,
        in_flight: watch::Sender<usize>,
    ) -> Self {
        in_flight.send_modify(|shards| *shards += 1);
        Self { id, place: Some(place), in_flight }
    }

    pub(super) fn refuse(self, fault: Fault) {
        self.send(Err(fault), Timing::default());
    }

    /// Drops it without a reply, since its stream is gone.
    fn abandon(mut self) {
        metrics::counter!("muster_worker_shards_abandoned_total").increment(1);
        self.place = None;
    }

    fn send(mut self, outcome: Result<OutputRows, Fault>, timing: Timing) {
        self.put(outcome, timing);
    }

    fn put(&mut self, outcome: Result<OutputRows, Fault>, timing: Timing) {
        let Some(place) = self.place.take() else { return };
        let code = outcome.as_ref().map_or_else(|fault| fault.kind.name(), |_| "ok");
        metrics::counter!("muster_worker_shards_total", "code" => code).increment(1);
        place.send(Ok(Reply::Answer { id: self.id, outcome, timing }.into_wire()));
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.put(Err(Fault::new(FaultKind::Internal, "the worker's experts failed")), Timing::default());
        self.in_flight.send_modify(|shards| *shards -= 1);
    }
}

/// A checked shard on its way to the experts.
pub(super) struct Job {
    pub(super) view: ShardView,
    /// Protocol version of its stream.
    pub(super) version: u32,
    pub(super) received: Instant,
    /// Used only to see whether the stream is still open.
    pub(super) stream: mpsc::Sender<Item>,
    pub(super) answer: Answer,
}

/// Shards that wait, first come first served.
pub(super) struct Jobs {
    waiting: Mutex<Waiting>,
    arrived: Notify,
    depth: usize,
    taken: AtomicU64,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    /// No more shards are accepted; waiting ones are still computed.
    closed: bool,
}

/// Why a shard was not queued.
pub(super) enum Refused {
    /// The queue is full.
    Full(Job),
    /// The experts have stopped.
    Closed(Job),
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing panics while it holds the lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[expect(clippy::result_large_err, reason = "the job goes back to its one caller, which answers it")]
    pub(super) fn push(&self, job: Job) -> Result<(), Refused> {
        let mut waiting = self.lock();
        if waiting.closed {
            return Err(Refused::Closed(job));
        }
        if waiting.jobs.len() >= self.depth {
            return Err(Refused::Full(job));
        }
        waiting.jobs.push_back(job);
        drop(waiting);
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.arrived.notify_one();
        Ok(())
    }

    /// Shards accepted so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Lets the experts' thread end once the queue is empty.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_one();
    }

    /// Closes, and drops the waiting shards.
    fn abort(&self) {
        self.close();
        let jobs = std::mem::take(&mut self.lock().jobs);
        // Answers are given without the lock.
        drop(jobs);
    }

    /// The longest-waiting shard, with those of its layer that can be computed with it. `None`: closed and empty; no shards:
    /// empty.
    fn take(&self) -> Option<Vec<Job>> {
        let mut waiting = self.lock();
        let Some(first) = waiting.jobs.pop_front() else {
            return if waiting.closed { None } else { Some(Vec::new()) };
        };
        let (layer, mut rows) = (first.view.layer(), first.view.rows());
        let mut taken = vec![first];
        let mut at = 0;
        while let Some(job) = waiting.jobs.get(at) {
            let fits = job.view.layer() == layer && rows + job.view.rows() <= MERGE_ROWS;
            match if fits { waiting.jobs.remove(at) } else { None } {
                Some(job) => {
                    rows += job.view.rows();
                    taken.push(job);
                }
                None => at += 1,
            }
        }
        Some(taken)
    }

    /// Waits for shards; `None` once closed and empty.
    async fn next(&self, mut busy: BusyPoll) -> Option<Vec<Job>> {
        loop {
            match self.take() {
                Some(jobs) if jobs.is_empty() => {}
                jobs => return jobs,
            }
            if !busy.pause().await {
                self.arrived.notified().await;
            }
        }
    }
}

/// The receiving end of the queue. Belongs to the experts' thread.
pub struct ComputeQueue {
    jobs: Arc<Jobs>,
    rules: ShardRules,
    busy_poll: Duration,
    row_counts: Arc<RowCounts>,
    queue_seconds: Histogram,
    compute_seconds: Histogram,
    rows: Counter,
    merged: Counter,
    pressure: Arc<Pressure>,
}

/// An answer that is ready to be sent.
type Ready = (Answer, Result<OutputRows, Fault>, Timing);

impl ComputeQueue {
    pub(super) fn new(
        depth: NonZeroUsize,
        busy_poll: Duration,
        rules: ShardRules,
        row_counts: Arc<RowCounts>,
    ) -> (Arc<Jobs>, Self) {
        let (waiting, arrived, taken) = (Mutex::default(), Notify::new(), AtomicU64::new(0));
        let jobs = Arc::new(Jobs { waiting, arrived, depth: depth.get(), taken });
        let queue = Self {
            jobs: Arc::clone(&jobs),
            rules,
            busy_poll,
            row_counts,
            queue_seconds: metrics::histogram!("muster_worker_queue_seconds"),
            compute_seconds: metrics::histogram!("muster_worker_compute_seconds"),
            rows: metrics::counter!("muster_worker_rows_total"),
            merged: metrics::counter!("muster_worker_shards_merged_total"),
            pressure: Arc::default(),
        };
        (jobs, queue)
    }

    /// Pressure of the experts' thread.
    #[must_use]
    pub fn pressure(&self) -> Arc<Pressure> {
        Arc::clone(&self.pressure)
    }

    /// Computes shards, first come first served, until the server is closed or no longer serves; `network` is that of the
    /// socket it serves on, which this thread drives while it waits. Shards whose deadline passed in the queue and shards
    /// whose router went away are not computed.
    pub fn run(self, network: &Network, experts: &mut dyn ExpertCompute) {
        let mut call = Call::default();
        let mut ready: Vec<Ready> = Vec::new();
        loop {
            let mut large = ready.iter().any(|(_, outcome, _)| is_large(outcome));
            let answered = !ready.is_empty();
            let next = network.0.drive(async {
                for (answer, outcome, timing) in ready.drain(..) {
                    answer.send(outcome, timing);
                }
                if answered {
                    // Until the transport has taken what it can.
                    tokio::task::yield_now().await;
                }
                let busy_poll = if answered { self.busy_poll } else { Duration::ZERO };
                self.jobs.next(BusyPoll::start(busy_poll)).await
            });
            let Some(Some(jobs)) = next else { return };
            large |= jobs.iter().any(|job| job.view.data().len() >= LARGE_BYTES);
            if large {
                network.0.lend();
            }
            let began = Instant::now();
            self.compute(jobs, experts, &mut call, &mut ready);
            self.pressure.worked(began.elapsed());
        }
    }

    fn compute(
        &self,
        jobs: Vec<Job>,
        experts: &mut dyn ExpertCompute,
        call: &mut Call,
        ready: &mut Vec<Ready>,
    ) {
        let started = Instant::now();
        call.clear();
        let mut members = Vec::with_capacity(jobs.len());
        for Job { view, version, received, stream, answer } in jobs {
            if stream.is_closed() {
                answer.abandon();
                continue;
            }
            let queue = started.duration_since(received);
            self.queue_seconds.record(queue);
            match call.admit(&view, queue, &self.rules) {
                Ok(()) => members.push((view, version, answer, queue)),
                Err(fault) => ready.push((answer, Err(fault), Timing { queue, compute: Duration::ZERO })),
            }
        }
        let views: Vec<&ShardView> = members.iter().map(|(view, ..)| view).collect();
        let outcomes = call.run(&views, &self.rules, experts);
        if views.len() > 1 {
            self.merged.increment(views.len() as u64);
        }
        for ((view, version, answer, queue), (outcome, compute)) in members.into_iter().zip(outcomes) {
            if outcome.is_ok() {
                self.rows.increment(view.outputs() as u64);
                for (expert, rows) in view.row_counts() {
                    self.row_counts.add(view.layer(), expert, rows);
                }
                self.compute_seconds.record(compute);
            }
            let outcome = match version {
                MARKS.. => outcome,
                _ => outcome.and_then(|rows| call::unmarked(&view, rows)),
            };
            ready.push((answer, outcome, Timing { compute, queue }));
        }
    }
}

impl Drop for ComputeQueue {
    fn drop(&mut self) {
        self.jobs.abort();
    }
}

fn is_large(outcome: &Result<OutputRows, Fault>) -> bool {
    outcome.as_ref().is_ok_and(|rows| rows.data.len() >= LARGE_BYTES)
}

/// A bound socket's network, for the experts' thread to drive.
#[derive(Clone)]
pub struct Network(pub(super) Reins);
