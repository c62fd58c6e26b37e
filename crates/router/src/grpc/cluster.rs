//! `muster.cluster.v1.Cluster`: workers join, operators ask for the status.

use std::sync::Arc;
use std::time::Duration;

use muster_dispatch_grpc::client::Joined;
use muster_dispatch_grpc::secured::{Caller, Only};
use muster_dispatch_grpc::{Address, ClusterHandle};
use muster_identity::Access;
use muster_proto::card::ModelCard;
use muster_proto::cluster::v1;
use muster_proto::cluster::v1::cluster_server::Cluster as ClusterApi;
use muster_proto::handshake::agree;
use muster_types::{Fingerprint, WorkerId};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::access::let_in;
use super::joins::{Joins, Reached, Stay};
use crate::cluster::Cluster;

/// Longest address of a worker, bytes.
const LONGEST_ADDRESS: usize = 512;
/// How long a connected worker keeps its place after its join stream ended: a restarted one joins again within it.
const LINGER: Duration = Duration::from_secs(2);

/// The service.
pub(crate) struct Api {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) workers: ClusterHandle,
    pub(crate) card: Arc<ModelCard>,
    pub(crate) stop: CancellationToken,
    /// Current joins.
    pub(crate) joins: Joins,
    /// Peers that may join.
    pub(crate) workers_only: Only,
    /// Callers that may ask for the status.
    pub(crate) access: Access,
}

#[tonic::async_trait]
impl ClusterApi for Api {
    type JoinStream = ReceiverStream<Result<v1::JoinReply, Status>>;

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<Self::JoinStream>, Status> {
        self.workers_only.check(request.extensions())?;
        let from = request.extensions().get::<Caller>().and_then(|caller| caller.address);
        let request = request.into_inner();
        let invalid = |text: String| Status::invalid_argument(text);
        agree(request.protocol_version, request.newest_protocol_version)
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        WorkerId::new(&request.worker_id).map_err(|error| invalid(format!("worker_id: {error}")))?;
        if request.address.len() > LONGEST_ADDRESS {
            return Err(invalid(format!("address: longer than {LONGEST_ADDRESS} bytes")));
        }
        let address: Address =
            request.address.parse().map_err(|error| invalid(format!("address: {error}")))?;
        if !request.fingerprint.is_empty() {
            let theirs = Fingerprint::from_slice(&request.fingerprint)
                .map_err(|error| invalid(format!("fingerprint: {error}")))?;
            if theirs != self.card.fingerprint {
                let text = format!(
                    "the worker's model is {theirs}, this router's is {}; start both with the same model, or the worker \
                     without one",
                    self.card.fingerprint
                );
                return Err(Status::failed_precondition(text));
            }
        }
        let exhausted = |text: String| Status::resource_exhausted(text);
        let stay = self.joins.enter(&address, from, || reached(&self.workers));
        let stay = stay.map_err(|error| exhausted(error.to_string()))?;
        let joined = self.workers.join(address.clone()).map_err(|error| {
            self.joins.make_room(&reached(&self.workers));
            exhausted(error.to_string())
        })?;
        let (replies, stream) = mpsc::channel(1);
        let first = v1::JoinReply { model: Some(self.card.to_wire()) };
        // Cannot fail: the channel is empty and its receiver is in scope.
        let _ = replies.send(Ok(first)).await;
        let guest = Guest { address, joined, stay, workers: self.workers.clone() };
        tokio::spawn(guest.stay(replies, self.stop.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        let_in(&self.access, request.metadata(), request.extensions())?;
        Ok(Response::new(self.cluster.status()))
    }
}

/// Addresses of connected workers.
fn reached(workers: &ClusterHandle) -> Reached {
    workers.workers().into_iter().map(|worker| worker.address).collect()
}

/// A worker that joined.
struct Guest {
    address: Address,
    joined: Joined,
    stay: Stay,
    workers: ClusterHandle,
}

impl Guest {
    /// Keeps a worker's place until its stream ends or the join gives way; then [`LINGER`] longer if the worker is
    /// connected.
    async fn stay(self, replies: mpsc::Sender<Result<v1::JoinReply, Status>>, stop: CancellationToken) {
        let Self { address, joined, stay, workers } = self;
        tokio::select! {
            () = replies.closed() => {}
            () = stay.gives_way() => {
                let text = format!("nobody was reached at {address}, and others wait; check --advertise");
                // The channel has room unless the worker does not read.
                let _ = replies.try_send(Err(Status::unavailable(text)));
                return;
            }
            () = stop.cancelled() => return,
        }
        drop(replies);
        if reached(&workers).contains(&address.to_string()) {
            tokio::select! {
                () = tokio::time::sleep(LINGER) => {}
                () = stop.cancelled() => {}
            }
        }
        drop((joined, stay));
    }
}
