//! Routes for orchestrators and collectors: liveness, readiness, metrics.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::App;
use crate::health::Health;

#[derive(Serialize)]
struct Status {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Status {
    const fn of(status: &'static str) -> Self {
        Self { status, reason: None }
    }
}

/// The process answers; nothing more is claimed.
pub(super) async fn healthz() -> Response {
    Json(Status::of("ok")).into_response()
}

/// 200 when requests can be served, else 503, as load generators ask. Open to everybody, so without reasons.
pub(super) async fn health(State(app): State<App>) -> Response {
    match app.service.health().is_ready() {
        true => Json(Status::of("ok")).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, Json(Status::of("not ready"))).into_response(),
    }
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

/// The version of this build.
pub(super) async fn version() -> Response {
    Json(Version { version: env!("CARGO_PKG_VERSION") }).into_response()
}

/// 200 when requests can be served, else 503 with the reason.
pub(super) async fn readyz(State(app): State<App>) -> Response {
    match app.service.health() {
        Health::Ready => Json(Status::of("ready")).into_response(),
        Health::Degraded { reasons } => {
            Json(Status { status: "degraded", reason: Some(reasons.join("; ")) }).into_response()
        }
        Health::NotReady { reason } => {
            let status = Status { status: "not ready", reason: Some(reason) };
            (StatusCode::SERVICE_UNAVAILABLE, Json(status)).into_response()
        }
    }
}

/// Prometheus text.
pub(super) async fn metrics(State(app): State<App>) -> Response {
    let media = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, media)], (app.metrics)()).into_response()
}
