//! A worker that announces itself properly and then breaks the protocol in one way.

use std::sync::Arc;

use muster_proto::description::Description;
use muster_proto::expert::v1;
use muster_proto::expert::v1::experts_server::{Experts, ExpertsServer};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use super::{HIDDEN, runtime};

/// What it answers to a shard; `None` ends the stream.
pub type Lie = Box<dyn Fn(&v1::LayerShard) -> Option<Result<v1::DispatchReply, Status>> + Send + Sync>;

pub struct LyingWorker {
    pub address: String,
    _runtime: Runtime,
}

impl LyingWorker {
    /// A worker with this description that answers every shard with `lie`.
    pub fn start(description: &Description, lie: Lie) -> Self {
        Self::describing(description.to_wire(), lie)
    }

    pub fn describing(description: v1::WorkerDescription, lie: Lie) -> Self {
        let runtime = runtime();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = ExpertsServer::new(Service { description, lie: Arc::new(lie) });
        let router = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { address, _runtime: runtime }
    }
}

/// An answer with as many rows as were asked for, each value the same.
pub fn rows(shard: &v1::LayerShard, count: usize, value: f32) -> v1::DispatchReply {
    let data: Vec<u8> = std::iter::repeat_n(value.to_le_bytes(), count * HIDDEN).flatten().collect();
    let rows = v1::ExpertRows { rows: count as u32, data: data.into(), not_finite: Vec::new() };
    let body = Some(v1::dispatch_reply::Body::Rows(rows));
    v1::DispatchReply { id: shard.id, body, compute_us: 0, queue_us: 0 }
}

struct Service {
    description: v1::WorkerDescription,
    lie: Arc<Lie>,
}

#[tonic::async_trait]
impl Experts for Service {
    async fn describe(
        &self,
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::WorkerDescription>, Status> {
        Ok(Response::new(self.description.clone()))
    }

    type WatchStream = ReceiverStream<Result<v1::WorkerDescription, Status>>;

    async fn watch(&self, _: Request<v1::DescribeRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (updates, stream) = mpsc::channel(1);
        let description = self.description.clone();
        tokio::spawn(async move {
            let _ = updates.send(Ok(description)).await;
            updates.closed().await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type DispatchStream = ReceiverStream<Result<v1::DispatchReply, Status>>;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::DispatchRequest>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        let mut inbound = request.into_inner();
        let (replies, stream) = mpsc::channel(8);
        let worker_id = self.description.worker_id.clone();
        let lie = self.lie.clone();
        tokio::spawn(async move {
            let ack = v1::HelloAck { worker_id, epoch: 1 };
            let body = Some(v1::dispatch_reply::Body::Ack(ack));
            let _ = replies.send(Ok(v1::DispatchReply { id: 0, body, compute_us: 0, queue_us: 0 })).await;
            while let Ok(Some(message)) = inbound.message().await {
                let Some(v1::dispatch_request::Body::Shard(shard)) = message.body else { continue };
                let Some(reply) = lie(&shard) else { return };
                let _ = replies.send(reply).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
