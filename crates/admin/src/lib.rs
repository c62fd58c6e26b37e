//! The admin interface of a process: liveness, readiness, metrics, drain and end.
//!
//! An end drains the process first; after a drain alone, the process waits for its end. Plain HTTP for a kubelet and a
//! collector of metrics, on an address of its own. It takes no input but paths, answers before anything is loaded, and
//! accepts a drain from this host alone. Does not know the process's work.

pub mod client;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use muster_net::{Acceptor, Patience, Socket, host};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Most connections at once.
const CONNECTIONS: usize = 64;
/// Longest time for a request's head; an idle connection is closed after it.
const HEAD: Duration = Duration::from_secs(10);
/// Most bytes of a request's head.
const HEAD_BYTES: usize = 16 << 10;
/// Longest life of a connection.
const LONGEST: Duration = Duration::from_secs(3600);
/// Stalls of a peer; its other delays are bounded by HTTP's own timers.
const PATIENCE: Patience = Patience { stall: Duration::from_secs(10), silence: None };

/// Readiness of the process, with the reason in a sentence where it is not fully ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// The process is ready.
    Ready,
    /// The process works, but something is missing.
    Degraded(String),
    /// The process is not ready.
    NotReady(String),
}

/// The address cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for probes and metrics: {source}; choose another with --admin")]
pub struct BindError {
    address: SocketAddr,
    source: io::Error,
}

type Probe = dyn Fn() -> Readiness + Send + Sync;
type Render = dyn Fn() -> String + Send + Sync;

/// Answers to the outside, and its requests. Clones share one state.
#[derive(Clone)]
pub struct Admin {
    shared: Arc<Shared>,
}

struct Shared {
    readiness: RwLock<Arc<Probe>>,
    metrics: Box<Render>,
    drain: CancellationToken,
    drained: CancellationToken,
    end: CancellationToken,
}

impl Admin {
    /// The interface of a starting process; `metrics` renders Prometheus text.
    pub fn new(metrics: impl Fn() -> String + Send + Sync + 'static) -> Self {
        let starting: Arc<Probe> = Arc::new(|| Readiness::NotReady("it is starting".to_owned()));
        Self {
            shared: Arc::new(Shared {
                readiness: RwLock::new(starting),
                metrics: Box::new(metrics),
                drain: CancellationToken::new(),
                drained: CancellationToken::new(),
                end: CancellationToken::new(),
            }),
        }
    }

    /// Sets the probe of readiness.
    pub fn ask(&self, probe: impl Fn() -> Readiness + Send + Sync + 'static) {
        *self.shared.readiness.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(probe);
    }

    /// Sets the process to not ready, for this reason.
    pub fn not_ready(&self, reason: impl Into<String>) {
        let reason = reason.into();
        self.ask(move || Readiness::NotReady(reason.clone()));
    }

    /// The current readiness.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let probe = self.shared.readiness.read().unwrap_or_else(PoisonError::into_inner).clone();
        probe()
    }

    /// Metrics in the Prometheus text format.
    #[must_use]
    pub fn metrics(&self) -> String {
        (self.shared.metrics)()
    }

    /// Requests the end of the process.
    pub fn end(&self) {
        self.shared.end.cancel();
    }

    /// Waits until an end is requested.
    pub async fn end_asked(&self) {
        self.shared.end.cancelled().await;
    }

    /// Waits until a drain or an end is requested.
    pub async fn drain_asked(&self) {
        tokio::select! {
            () = self.shared.drain.cancelled() => {}
            () = self.shared.end.cancelled() => {}
        }
    }

    /// Records that the process has drained, which answers requests for the drain, and waits until an end is requested.
    pub async fn drained(&self) {
        tracing::info!("safe to terminate");
        self.shared.drained.cancel();
        self.shared.end.cancelled().await;
    }

    /// Listens on `address` and answers in a separate task. Returns the bound address.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn listen(&self, address: SocketAddr) -> Result<SocketAddr, BindError> {
        let failed = |source| BindError { address, source };
        let listener = muster_net::listen::tcp(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        tokio::spawn(serve(listener, self.shared.clone()));
        Ok(bound)
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let routes = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/drain", post(drain))
        .layer(middleware::from_fn(one_host))
        .with_state(shared);
    let mut acceptor = Acceptor::with_places(listener, PATIENCE, CONNECTIONS);
    loop {
        let socket = acceptor.next().await;
        let routes = routes.clone().layer(Extension(Peer(socket.peer())));
        tokio::spawn(tokio::time::timeout(LONGEST, connection(socket, routes)));
    }
}

async fn connection(socket: Socket<TcpStream>, routes: Router) {
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_BYTES);
    let serving = builder.serve_connection(TokioIo::new(socket), TowerToHyperService::new(routes));
    if let Err(error) = serving.await {
        tracing::debug!(error, "a connection for probes ended early");
    }
}

async fn one_host(request: Request, next: Next) -> Response {
    match host::check(request.version(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(bad) => (StatusCode::BAD_REQUEST, format!("{bad}\n")).into_response(),
    }
}

#[derive(Clone, Copy)]
struct Peer(Option<IpAddr>);

async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let admin = Admin { shared };
    match admin.readiness() {
        Readiness::Ready => "ready\n".into_response(),
        Readiness::Degraded(reason) => format!("degraded: {reason}\n").into_response(),
        Readiness::NotReady(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response()
        }
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let media = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, media)], Admin { shared }.metrics()).into_response()
}

async fn drain(State(shared): State<Arc<Shared>>, Extension(Peer(peer)): Extension<Peer>) -> Response {
    if !peer.is_some_and(|peer| peer.is_loopback()) {
        return (StatusCode::FORBIDDEN, "a drain can only be asked for on this host\n").into_response();
    }
    shared.drain.cancel();
    shared.drained.cancelled().await;
    "safe to terminate\n".into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn ask(address: SocketAddr, line: &str) -> String {
        send(address, &format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
    }

    async fn send(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn it_answers_while_the_process_starts_and_tells_why_it_is_not_ready() {
        let admin = Admin::new(|| "muster_x 1\n".to_owned());
        let address = admin.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        assert!(ask(address, "GET /healthz").await.starts_with("HTTP/1.1 200"));
        let answer = ask(address, "GET /readyz").await;
        assert!(
            answer.starts_with("HTTP/1.1 503") && answer.ends_with("not ready: it is starting\n"),
            "{answer}"
        );
        admin.not_ready("there is no model");
        assert!(ask(address, "GET /readyz").await.ends_with("not ready: there is no model\n"));
        admin.ask(|| Readiness::Degraded("two copies are missing".into()));
        let answer = ask(address, "GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("degraded: two copies are missing\n"));
        admin.ask(|| Readiness::Ready);
        assert!(ask(address, "GET /readyz").await.ends_with("\r\n\r\nready\n"));
        assert!(ask(address, "GET /metrics").await.ends_with("muster_x 1\n"));
        assert!(ask(address, "GET /drain").await.starts_with("HTTP/1.1 405"));
        assert!(ask(address, "GET /v1/models").await.starts_with("HTTP/1.1 404"));
        for hosts in ["", "host: x\r\nhost: y\r\n"] {
            let request = format!("GET /healthz HTTP/1.1\r\n{hosts}connection: close\r\n\r\n");
            assert!(send(address, &request).await.starts_with("HTTP/1.1 400"), "{hosts}");
        }
        let error = admin.listen(address).await.unwrap_err();
        assert!(error.to_string().contains("--admin"), "{error}");
    }

    #[tokio::test]
    async fn a_drain_is_answered_when_it_is_done() {
        let admin = Admin::new(String::new);
        let address = admin.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let asking = tokio::spawn(async move { ask(address, "POST /drain").await });
        admin.drain_asked().await;
        assert!(!asking.is_finished());
        let drained = tokio::spawn({
            let admin = admin.clone();
            async move { admin.drained().await }
        });
        assert!(asking.await.unwrap().ends_with("safe to terminate\n"));
        // A later request is answered at once.
        assert!(ask(address, "POST /drain").await.starts_with("HTTP/1.1 200"));
        assert!(!drained.is_finished(), "the process goes on until it is told to end");
        admin.end();
        drained.await.unwrap();
    }

    #[tokio::test]
    async fn an_end_is_a_drain_that_nobody_waits_for() {
        let admin = Admin::new(String::new);
        admin.end();
        admin.drain_asked().await;
        admin.drained().await;
        admin.end_asked().await;
    }
}
