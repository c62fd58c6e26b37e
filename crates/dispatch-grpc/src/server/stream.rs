//! One dispatch stream: reads shards, checks them, queues them for the experts.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;

use muster_proto::expert::v1;
use muster_proto::handshake::Greeting;
use muster_proto::reply::Reply;
use muster_proto::shard::{ShardIds, ShardView};
use muster_types::{Fault, FaultKind};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use super::Shared;
use super::queue::{Answer, Item, Job, Refused};

/// Shards of one stream that are read and not yet answered. A router has one or two; more wait in the network.
const WINDOW: usize = 8;

/// Acknowledges the greeting and serves the stream from a task of its own.
pub(super) async fn open(
    shared: Arc<Shared>,
    greeting: Greeting,
    inbound: Streaming<v1::DispatchRequest>,
    permit: OwnedSemaphorePermit,
) -> Replies {
    let (replies, receiver) = mpsc::channel(WINDOW);
    let (worker, epoch) = {
        let description = shared.description.borrow();
        (description.worker.clone(), description.epoch)
    };
    // The channel is empty and its receiver is right here.
    let _ = replies.send(Ok(Reply::Ack { worker, epoch }.into_wire())).await;
    tokio::spawn(async move {
        tracing::info!(router = %greeting.router, lane = greeting.lane, combine = %greeting.combine, "stream opened");
        let end = read(&shared, &greeting, inbound, &replies).await;
        let reason = end.as_ref().map_or_else(Status::message, |()| "closed by the router");
        tracing::info!(router = %greeting.router, lane = greeting.lane, reason, "stream ended");
        if let Err(status) = end {
            let _ = replies.send(Err(status)).await;
        }
    });
    Replies { receiver, _permit: permit }
}

/// The answering side of a stream. Holds the stream's place in the count of open ones: when that is free again, the
/// router is known to be gone, and its queued shards are dropped.
pub struct Replies {
    // Before the permit: fields are dropped in order.
    receiver: mpsc::Receiver<Item>,
    _permit: OwnedSemaphorePermit,
}

impl Stream for Replies {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        self.receiver.poll_recv(cx)
    }
}

/// Reads until the router closes its side or goes away (`Ok`), or the stream must be ended with a status.
async fn read(
    shared: &Arc<Shared>,
    greeting: &Greeting,
    mut inbound: Streaming<v1::DispatchRequest>,
    replies: &mpsc::Sender<Item>,
) -> Result<(), Status> {
    let mut ids = ShardIds::default();
    loop {
        let next = async {
            // The reply's place first: a router that does not read its replies is not read from either.
            let Ok(place) = replies.clone().reserve_owned().await else { return Ok(None) };
            Ok::<_, Status>(inbound.message().await?.map(|message| (place, message)))
        };
        let next = tokio::select! {
            () = shared.stop.cancelled() => return Err(Status::unavailable("the worker is stopping")),
            () = replies.closed() => return Ok(()),
            next = next => next?,
        };
        let Some((place, message)) = next else { return Ok(()) };
        let Some(v1::dispatch_request::Body::Shard(shard)) = message.body else {
            return Err(Status::invalid_argument("after hello a message must be a shard"));
        };
        let id = ids.accept(shard.id).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let answer = Answer::new(id, place, shared.in_flight.clone());
        if let Err((answer, fault)) = accept(shared, greeting, shard, answer, replies) {
            answer.refuse(fault);
        }
    }
}

/// Checks a shard and queues it; gives the answer back with a fault when that cannot be.
fn accept(
    shared: &Shared,
    greeting: &Greeting,
    shard: v1::LayerShard,
    answer: Answer,
    replies: &mpsc::Sender<Item>,
) -> Result<(), (Answer, Fault)> {
    if shared.is_leaving.load(Ordering::Acquire) {
        return Err((answer, Fault::new(FaultKind::Draining, "the worker is about to stop")));
    }
    let epoch = shared.description.borrow().epoch;
    let view = match ShardView::parse(shard, &shared.rules, greeting.combine, epoch) {
        Ok(view) => view,
        Err(fault) => return Err((answer, fault)),
    };
    let (version, stream) = (greeting.version, replies.clone());
    let job = Job { view, version, received: Instant::now(), stream, answer };
    shared.jobs.push(job).map_err(|refused| match refused {
        Refused::Full(job) => (job.answer, Fault::new(FaultKind::Overloaded, "the worker's queue is full")),
        Refused::Closed(job) => {
            (job.answer, Fault::new(FaultKind::Internal, "the worker's experts have stopped"))
        }
    })
}
