//! The HTTP edge: OpenAI's API, probes and metrics, over HTTP/1.1.
//!
//! Every answer to a request that was understood is JSON, errors in OpenAI's form. Headers, bodies, connections
//! and the time a peer may take are bounded; a client that goes away cancels its request. Decides nothing: bytes
//! become a [`GenerateRequest`](crate::request::GenerateRequest), events become JSON.

mod admin;
mod body;
mod cors;
mod error;
mod half_close;
mod linger;
mod openai;
mod paths;
mod places;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use muster_dispatch_grpc::secured::{Caller, Connection, Speaks, secured};
use muster_identity::Access;
use muster_net::{Acceptor, Patience, host};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

pub use self::cors::Cors;
use self::error::ApiError;
use self::half_close::{Attended, Waits};
use self::places::Large;
use crate::door::Door;
use crate::request_id;
use crate::service::Service;

/// Most bytes of a request's head; more is answered with 431.
const HEAD_BYTES: usize = 64 << 10;

/// Paths open to everybody, as gRPC's health is: liveness and readiness. Load balancers and load generators ask before
/// they have a key.
const OPEN: [&str; 3] = ["/healthz", "/health", "/ping"];

const PATIENCE: Patience = Patience { stall: Duration::from_secs(30), silence: None };

/// Settings of the HTTP edge.
#[derive(Debug, Clone)]
pub struct Edge {
    /// Time in which a request's head must be complete, and after which an idle connection is closed.
    pub keep_alive: Duration,
    /// Origins whose pages may read answers.
    pub cors: Cors,
}

impl Default for Edge {
    fn default() -> Self {
        Self { keep_alive: Duration::from_secs(30), cors: Cors::default() }
    }
}

/// State shared by handlers.
#[derive(Clone)]
struct App {
    service: Service,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
    large: Large,
    access: Access,
}

/// Serves until `shutdown`, then finishes the requests under way and returns. `metrics` renders Prometheus text.
///
/// Requests under way end with their generations; a caller that will not wait for them drops the future, which
/// closes every connection.
pub(crate) async fn serve(
    service: Service,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
    door: Door,
    edge: Edge,
    shutdown: CancellationToken,
) {
    let Door { listener, tls, access } = door;
    let Edge { keep_alive, cors } = edge;
    let routes = routes(App { service, metrics, large: Large::default(), access }, cors);
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(keep_alive).max_buf_size(HEAD_BYTES);
    // `Attended` detects clients that are gone.
    builder.http1().half_close(true);
    // Ends on `shutdown`, once pending handshakes are done.
    let sockets = Acceptor::new(listener, PATIENCE).into_stream(shutdown.clone());
    let mut accepted = secured(sockets, tls, Speaks::Http1);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            socket = accepted.next() => match socket {
                Some(Ok(socket)) => {
                    connections.spawn(connection(builder.clone(), socket, routes.clone(), shutdown.clone()));
                }
                Some(Err(_)) => {}
                None => break,
            },
            Some(_) = connections.join_next() => {}
        }
    }
    while connections.join_next().await.is_some() {}
}

async fn connection(
    builder: Builder<TokioExecutor>,
    socket: Connection<TcpStream>,
    routes: Router,
    shutdown: CancellationToken,
) {
    let waits = Waits::default();
    let routes = routes.layer(Extension(waits.clone())).layer(Extension(socket.caller()));
    let socket = TokioIo::new(Attended::new(socket, waits));
    let serving = builder.serve_connection(socket, TowerToHyperService::new(routes));
    let mut serving = std::pin::pin!(serving);
    let result = tokio::select! {
        result = serving.as_mut() => result,
        () = shutdown.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(error, "an HTTP connection ended early");
    }
}

fn routes(app: App, cors: Cors) -> Router {
    let routes = Router::new()
        .route("/v1/models", get(openai::models))
        .route("/v1/models/", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/healthz", get(admin::healthz))
        .route("/health", get(admin::health))
        .route("/ping", get(admin::health).post(admin::health))
        .route("/version", get(admin::version))
        .route("/readyz", get(admin::readyz))
        .route("/metrics", get(admin::metrics))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(app.clone(), let_in));
    // API keys already keep rebinding pages out.
    let routes = match &app.access {
        Access::Open => routes.layer(middleware::from_fn_with_state(cors.clone(), no_stranger)),
        Access::Known(_) => routes,
    };
    let routes = match cors.layer() {
        Some(layer) => routes.layer(middleware::from_fn_with_state(layer, cors::share)),
        None => routes,
    };
    routes
        .layer(middleware::from_fn(one_host))
        .layer(middleware::from_fn(request_id::name))
        .layer(middleware::from_fn(count))
        .layer(middleware::from_fn(linger::linger))
        .layer(middleware::from_fn(half_close::attend))
        .with_state(app)
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::status(StatusCode::NOT_FOUND, paths::nothing_at(&uri))
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::status(StatusCode::METHOD_NOT_ALLOWED, paths::not_taken(&method, &uri))
}

/// Requires a key or a certificate on all paths but [`OPEN`], if access is restricted at all.
async fn let_in(State(app): State<App>, request: Request, next: Next) -> Response {
    if OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let caller = request.extensions().get::<Caller>().and_then(|caller| caller.peer.as_ref());
    let shown = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    match app.access.client(caller, shown) {
        Ok(()) => next.run(request).await,
        Err(denied) => {
            metrics::counter!("muster_access_denied_total", "what" => "http").increment(1);
            let denied = denied.with_headers(|header| request.headers().contains_key(header));
            ApiError::denied(&denied).into_response()
        }
    }
}

/// Refuses pages that reached this host by DNS rebinding.
async fn no_stranger(State(cors): State<Cors>, request: Request, next: Next) -> Response {
    match request.headers().get(header::HOST) {
        Some(host) if cors.is_stranger(host) => ApiError::status(
            StatusCode::MISDIRECTED_REQUEST,
            "this router listens on a loopback address without keys, where a host header has to name localhost or an address: \
             a web page could have led its own name here; for a proxy that passes names on, give --cors-origin \
             https://NAME, or use keys",
        )
        .into_response(),
        _ => next.run(request).await,
    }
}

/// Refuses requests whose host is ambiguous.
async fn one_host(request: Request, next: Next) -> Response {
    match host::check(request.version(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(bad) => ApiError::status(StatusCode::BAD_REQUEST, bad.to_string()).into_response(),
    }
}

/// Counts answers by route template and status, both from small fixed sets.
async fn count(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let route = route.as_ref().map_or("other", MatchedPath::as_str).to_owned();
    let status = response.status().as_str().to_owned();
    metrics::counter!("muster_http_requests_total", "route" => route, "status" => status).increment(1);
    response
}
