//! The gRPC edge: `muster.v1.Inference`, `grpc.health.v1.Health` and server reflection; where there are workers, also what
//! those need that join, and what people ask of the cluster.
//!
//! Messages, streams, connections and the time a peer may be silent are bounded; a client that goes away cancels
//! its request. Decides nothing: messages become a [`GenerateRequest`](crate::request::GenerateRequest), events
//! become messages.

mod access;
pub(crate) mod cluster;
mod convert;
mod inference;
mod joins;
mod reflection;
#[cfg(test)]
mod tests;

use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderValue;
use axum::middleware;
use axum::response::Response;
use muster_dispatch_grpc::WeightsService;
use muster_dispatch_grpc::secured::{Only, Speaks, secured};
use muster_identity::Access;
use muster_net::{Acceptor, Patience};
use muster_proto::cluster::v1::cluster_server::{ClusterServer, SERVICE_NAME as CLUSTER};
use muster_proto::expert::v1::weights_server::SERVICE_NAME as WEIGHTS;
use muster_proto::symbols::NotDescriptors;
use muster_proto::v1::inference_server::{InferenceServer, SERVICE_NAME};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tonic_reflection::pb;

use self::access::ClientsOnly;
use self::inference::Api;
pub(crate) use self::joins::Joins;
use self::reflection::Reflection;
use crate::door::Door;
use crate::health::Health;
use crate::request_id;
use crate::service::Service;

/// What reflection lists: the services that are here, not all that are described.
const LISTED: [&str; 4] = [
    SERVICE_NAME,
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// How often health is looked at.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);

/// Streams of one connection at once.
const STREAMS: u32 = 256;

/// A request has to be received, checked and admitted within this time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// An idle connection is pinged this often, and closed when an answer takes as long.
const PING: Duration = Duration::from_secs(10);

/// Flow control: one full request in flight per stream, and a few per connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Of one request, as HTTP/2 counts them.
const HEADER_BYTES: u32 = 16 << 10;

/// A client that answers pings is never silent for long.
const PATIENCE: Patience =
    Patience { stall: Duration::from_secs(30), silence: Some(Duration::from_secs(25)) };

/// The edge could not start or run.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The descriptors for reflection do not fit together.
    #[error("server reflection: {0}")]
    Reflection(#[from] NotDescriptors),
    /// The server failed.
    #[error("gRPC server: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves until `shutdown`, then finishes the calls under way and returns.
///
/// Health turns to NOT_SERVING and its watchers are let go at once. A call that never ends by itself, which only
/// a reflection client can make, keeps this from returning: bound the wait.
///
/// # Errors
/// When the server cannot be set up. Nothing a client does is an error here.
pub(crate) async fn serve(
    service: Service,
    workers: Option<Workers>,
    door: Door,
    shutdown: CancellationToken,
) -> Result<(), GrpcError> {
    let reporter = HealthReporter::new();
    report(&reporter, serving(&service)).await;
    let Door { listener, tls, access } = door;
    let routes = routes(&service, workers, &reporter, &access)?;
    let health = follow_health(service, reporter, shutdown.clone());
    let sockets = Acceptor::new(listener, PATIENCE).into_stream(shutdown.clone());
    let sockets = secured(sockets, tls, Speaks::Http2);
    let server = Server::builder()
        .timeout(REQUEST_TIMEOUT)
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(HEADER_BYTES)
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PING))
        .add_routes(routes)
        .serve_with_incoming_shutdown(sockets, shutdown.cancelled_owned());
    let (served, ()) = tokio::join!(server, health);
    Ok(served?)
}

/// What a router with workers serves beside inference.
pub struct Workers {
    pub(crate) cluster: cluster::Api,
    pub(crate) weights: WeightsService,
    /// Who may fetch them.
    pub(crate) weights_only: Only,
}

fn routes(
    service: &Service,
    workers: Option<Workers>,
    reporter: &HealthReporter,
    access: &Access,
) -> Result<Routes, GrpcError> {
    let clients_only = ClientsOnly(access.clone());
    let message_bytes = service.limits().body_bytes;
    let inference = InferenceServer::new(Api::new(service.clone()))
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(message_bytes);
    let health = tonic_health::pb::health_server::HealthServer::new(
        tonic_health::server::HealthService::from_health_reporter(reporter.clone()),
    )
    .accept_compressed(CompressionEncoding::Gzip);
    let mut listed = LISTED.to_vec();
    if workers.is_some() {
        listed.extend([CLUSTER, WEIGHTS]);
    }
    let reflection = Reflection::new(&listed)?;
    let final_version = pb::v1::server_reflection_server::ServerReflectionServer::new(reflection.clone())
        .accept_compressed(CompressionEncoding::Gzip);
    // Older tools ask for the version before it was final.
    let alpha_version = pb::v1alpha::server_reflection_server::ServerReflectionServer::new(reflection)
        .accept_compressed(CompressionEncoding::Gzip);
    let mut routes = Routes::new(InterceptedService::new(inference, clients_only.clone()));
    if let Some(Workers { cluster, weights, weights_only }) = workers {
        let weights = InterceptedService::new(weights.into_service(), weights_only);
        // Its methods are for different callers, and look by themselves.
        routes = routes.add_service(ClusterServer::new(cluster)).add_service(weights);
    }
    // Health is open: it is how others find out whether this router lives.
    routes = routes.add_service(health);
    routes = routes.add_service(InterceptedService::new(final_version, clients_only.clone()));
    routes = routes.add_service(InterceptedService::new(alpha_version, clients_only));
    Ok(routes
        .into_axum_router()
        .layer(middleware::map_response_with_state(listed.join(", "), explain))
        .layer(middleware::from_fn(request_id::name))
        .into())
}

/// A call of what is not here is told what is; the library says nothing.
async fn explain(State(served): State<String>, mut response: Response) -> Response {
    let headers = response.headers_mut();
    let is_unimplemented = headers.get(Status::GRPC_STATUS).is_some_and(|code| code == "12");
    if is_unimplemented && !headers.contains_key(Status::GRPC_MESSAGE) {
        let text = format!("there is no such method here; served are the methods of {served}");
        // Names of services and spaces are as they are in the header's encoding.
        if let Ok(text) = HeaderValue::from_str(&text) {
            headers.insert(Status::GRPC_MESSAGE, text);
        }
    }
    response
}

fn serving(service: &Service) -> ServingStatus {
    let health = service.health();
    metrics::gauge!("muster_router_health").set(match health {
        Health::Ready => 2.0,
        Health::Degraded { .. } => 1.0,
        Health::NotReady { .. } => 0.0,
    });
    if health.is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing }
}

async fn report(reporter: &HealthReporter, status: ServingStatus) {
    for name in ["", SERVICE_NAME] {
        reporter.set_service_status(name, status).await;
    }
}

/// Reports changes until `shutdown`, then that this router serves no more.
async fn follow_health(service: Service, mut reporter: HealthReporter, shutdown: CancellationToken) {
    let mut reported = serving(&service);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            () = tokio::time::sleep(HEALTH_INTERVAL) => {}
        }
        let status = serving(&service);
        if status != reported {
            report(&reporter, status).await;
            reported = status;
        }
    }
    report(&reporter, ServingStatus::NotServing).await;
    // Ends the streams of watchers, which would keep their connections open. Who asks now is still told.
    for name in ["", SERVICE_NAME] {
        reporter.clear_service_status(name).await;
    }
    report(&reporter, ServingStatus::NotServing).await;
}
