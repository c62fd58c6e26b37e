//! The bounded queue between the network and the experts, and the loop of the compute thread.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use muster_engine::dispatch::Rows;
use muster_proto::expert::v1;
use muster_proto::frame::{self, FrameError, RowBuffer};
use muster_proto::reply::{Fault, FaultKind, Reply, Timing};
use muster_proto::shard::{ShardRules, ShardView};
use muster_types::DType;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use crate::compute::{ComputeError, ExpertCompute};

/// What goes down a reply stream.
pub(super) type Item = Result<v1::DispatchReply, Status>;

/// A shard's one answer, with its place in the reply stream. Dropped unanswered, as when the experts panic, it
/// says so itself.
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

    /// Nobody listens any more.
    fn abandon(mut self) {
        metrics::counter!("muster_worker_shards_abandoned_total").increment(1);
        self.place = None;
    }

    fn send(mut self, outcome: Result<(u32, Bytes), Fault>, timing: Timing) {
        self.put(outcome, timing);
    }

    fn put(&mut self, outcome: Result<(u32, Bytes), Fault>, timing: Timing) {
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
    pub(super) received: Instant,
    /// Only asked whether anybody still listens.
    pub(super) stream: mpsc::Sender<Item>,
    pub(super) answer: Answer,
}

/// The receiving end of the queue. Belongs to the compute thread.
pub struct ComputeQueue {
    jobs: Receiver<Job>,
    hidden: usize,
    wire: DType,
}

impl ComputeQueue {
    pub(super) fn new(depth: NonZeroUsize, rules: &ShardRules) -> (SyncSender<Job>, Self) {
        let (sender, jobs) = sync_channel(depth.get());
        (sender, Self { jobs, hidden: rules.hidden as usize, wire: rules.wire })
    }

    /// Computes shards, first come first served, until the server is closed. Shards whose deadline passed in the
    /// queue and shards whose router went away are not computed.
    pub fn run(self, experts: &mut dyn ExpertCompute) {
        let mut buffers = Buffers::default();
        while let Ok(Job { view, received, stream, answer }) = self.jobs.recv() {
            if stream.is_closed() {
                answer.abandon();
                continue;
            }
            let started = Instant::now();
            let queue = started.duration_since(received);
            let outcome = self.compute(&view, queue, experts, &mut buffers);
            let compute = started.elapsed();
            metrics::histogram!("muster_worker_queue_seconds").record(queue);
            if outcome.is_ok() {
                metrics::counter!("muster_worker_rows_total").increment(view.outputs().into());
                metrics::histogram!("muster_worker_compute_seconds").record(compute);
            }
            answer.send(outcome, Timing { compute, queue });
        }
    }

    fn compute(
        &self,
        view: &ShardView,
        waited: Duration,
        experts: &mut dyn ExpertCompute,
        buffers: &mut Buffers,
    ) -> Result<(u32, Bytes), Fault> {
        if waited >= view.deadline() {
            let reason = format!("waited {waited:?}; the deadline was {:?}", view.deadline());
            return Err(Fault::new(FaultKind::Deadline, reason));
        }
        let Buffers { input, output } = buffers;
        let rows = match self.wire {
            DType::F32 => input.read_f32(view.data(), view.rows(), self.hidden).map(Rows::HostF32),
            DType::Bf16 => input.read_bf16(view.data(), view.rows(), self.hidden).map(Rows::HostBf16),
        };
        let rows = rows.map_err(|error| input_fault(&error))?;
        experts.forward(view.layer(), &view.groups(), rows, output).map_err(|error| compute_fault(&error))?;
        let want = view.outputs() as usize * self.hidden;
        if output.len() != want {
            let reason = format!("experts gave {} values instead of {want}", output.len());
            return Err(Fault::new(FaultKind::Internal, reason));
        }
        let data = frame::write_rows(output, self.wire)
            .map_err(|error| Fault::new(FaultKind::Internal, error.to_string()))?;
        Ok((view.outputs(), data))
    }
}

/// Kept from shard to shard.
#[derive(Default)]
struct Buffers {
    input: RowBuffer,
    output: Vec<f32>,
}

fn input_fault(error: &FrameError) -> Fault {
    let kind = match error {
        FrameError::NonFinite { .. } => FaultKind::NonFinite,
        _ => FaultKind::BadRequest,
    };
    Fault::new(kind, format!("field data: {error}"))
}

fn compute_fault(error: &ComputeError) -> Fault {
    let text = error.to_string();
    match error {
        ComputeError::NotHeld(key) => Fault::of_expert(FaultKind::NotHeld, key.expert.get(), text),
        ComputeError::NonFinite(key) => Fault::of_expert(FaultKind::NonFinite, key.expert.get(), text),
        ComputeError::Internal(_) => Fault::new(FaultKind::Internal, text),
    }
}
