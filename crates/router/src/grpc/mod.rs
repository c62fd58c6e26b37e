//! The gRPC edge: `muster.v1.Inference`, `grpc.health.v1.Health` and server reflection; in a router with workers, also
//! the services that workers join by and operators ask.
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

/// Services that reflection lists: those served, not all that are described.
const LISTED: [&str; 4] = [
    SERVICE_NAME,
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// Polling interval of the health status.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);

/// Most concurrent streams of a connection.
const STREAMS: u32 = 256;

/// Time in which a request must be received, checked and admitted.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Interval of pings on an idle connection, and their timeout.
const PING: Duration = Duration::from_secs(10);

/// Flow control: one full request in flight per stream, and a few per connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Most bytes of a request's headers, as HTTP/2 counts them.
const HEADER_BYTES: u32 = 16 << 10;

/// How long a peer may be silent: a client that answers pings never is for long.
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

/// Services of a router with workers, beside inference.
pub struct Workers {
    pub(crate) cluster: cluster::Api,
    pub(crate) weights: WeightsService,
    /// Peers that may fetch weights.
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
        // No interceptor: its methods have different callers and check access themselves.
        routes = routes.add_service(ClusterServer::new(cluster)).add_service(weights);
    }
    // Health needs no access: others learn by it whether this router lives.
    routes = routes.add_service(health);
    routes = routes.add_service(InterceptedService::new(final_version, clients_only.clone()));
    routes = routes.add_service(InterceptedService::new(alpha_version, clients_only));
    Ok(routes
        .into_axum_router()
        .layer(middleware::map_response_with_state(listed.join(", "), explain))
        .layer(middleware::from_fn(request_id::name))
        .into())
}

/// Lists the served services in the answer to an unknown one; the library's answer has no text.
async fn explain(State(served): State<String>, mut response: Response) -> Response {
    let headers = response.headers_mut();
    let is_unimplemented = headers.get(Status::GRPC_STATUS).is_some_and(|code| code == "12");
    if is_unimplemented && !headers.contains_key(Status::GRPC_MESSAGE) {
        let text = format!("there is no such method here; served are the methods of {served}");
        // Service names and spaces need no escaping in `grpc-message`.
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

/// Publishes health changes until `shutdown`, then NOT_SERVING.
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
    // Ends watchers' streams, which would keep their connections open. Later checks are still answered.
    for name in ["", SERVICE_NAME] {
        reporter.clear_service_status(name).await;
    }
    report(&reporter, ServingStatus::NotServing).await;
}
