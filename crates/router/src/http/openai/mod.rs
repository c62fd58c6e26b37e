//! OpenAI's endpoints: models, completions, chat.

mod chat_message;
mod chat_reply;
mod chat_request;
mod common;
mod completion_reply;
mod completion_request;
mod fields;
mod ignored;
mod json;
mod reply;
mod run;
mod stream;
#[cfg(test)]
mod tests;
mod values;
mod whole;

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::KeepAlive;
use axum::response::{IntoResponse, Response, Sse};
use serde::Serialize;
use tokio_stream::StreamExt;

use self::chat_reply::Chat;
use self::common::{Asked, Mode};
use self::completion_reply::Completion;
pub(super) use self::ignored::IGNORED;
use self::json::Bounds;
use self::reply::Dialect;
use self::stream::Chunks;
use self::whole::Whole;
use super::App;
use super::body::{JsonBody, PATIENCE, off_thread};
use super::error::ApiError;
use crate::model_info::ModelInfo;
use crate::request::RequestError;

/// Interval of keep-alive comments on a silent stream: proxies keep it open, and a client that is gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Longest sequence, under other servers' name for it.
    max_model_len: u32,
}

#[derive(Serialize)]
struct Models<'a> {
    object: &'static str,
    data: [Model<'a>; 1],
}

impl<'a> From<&'a ModelInfo> for Model<'a> {
    fn from(model: &'a ModelInfo) -> Self {
        Self {
            id: &model.name,
            object: "model",
            created: model.created,
            owned_by: "muster",
            max_model_len: model.context,
        }
    }
}

/// `GET /v1/models`
pub(super) async fn models(State(app): State<App>) -> Response {
    Json(Models { object: "list", data: [app.service.model().into()] }).into_response()
}

/// `GET /v1/models/{id}`; a name may contain slashes.
pub(super) async fn model(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let model = app.service.model();
    if id != model.name && id.trim_end_matches('/') == model.name {
        let message = format!(
            "there is nothing at /v1/models/{id}; use /v1/models/{}, without the slash at its end",
            model.name
        );
        return Err(ApiError::status(StatusCode::NOT_FOUND, message));
    }
    if id != model.name {
        let asked = id.chars().take(64).collect();
        return Err(RequestError::UnknownModel { asked, served: model.name.clone() }.into());
    }
    Ok(Json(Model::from(model)).into_response())
}

/// `POST /v1/completions`
pub(super) async fn completions(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    answer::<Completion>(&app, request, completion_request::parse).await
}

/// `POST /v1/chat/completions`
pub(super) async fn chat(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    answer::<Chat>(&app, request, chat_request::parse).await
}

async fn answer<D: Dialect>(
    app: &App,
    request: Request,
    parse: fn(&[u8], &Bounds) -> Result<Asked, ApiError>,
) -> Result<Response, ApiError> {
    let model = app.service.model();
    let bounds = Bounds { limits: *app.service.limits(), context: model.context, defaults: model.defaults };
    let (parts, body) = request.into_parts();
    let limit = bounds.limits.body_bytes;
    let body = JsonBody::read(&parts.headers, body, limit, &app.large, PATIENCE).await?;
    let asked = body.parse(&app.service, move |bytes| parse(bytes, &bounds)).await?;
    let Asked { requests, mode, ignored, token_limit } = asked;
    let started = run::start(&app.service, D::ID, requests).await;
    let (head, mut events) =
        started.map_err(|error| ApiError::from(error).about("max_tokens", token_limit))?;
    let mut response = match mode {
        Mode::Stream(usage) => {
            let chunks = Chunks::<D>::new(head, usage);
            let sse = Sse::new(stream::Sse::new(events, chunks));
            sse.keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
        }
        Mode::Whole => {
            let mut whole = Whole::<D>::new(head);
            while let Some(event) = events.next().await {
                whole.event(event?);
            }
            let json = off_thread(whole.size(), move || whole.into_json()).await?;
            let media = HeaderValue::from_static("application/json");
            ([(header::CONTENT_TYPE, media)], json).into_response()
        }
    };
    if let Some(names) = ignored.header() {
        response.headers_mut().insert(IGNORED, names);
    }
    Ok(response)
}
