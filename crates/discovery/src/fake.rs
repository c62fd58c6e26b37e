//! An API server in this process, for tests: what it answers is a function, and bodies can be streams.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::api::Api;

pub(crate) type Reply = http::Response<UnsyncBoxBody<Bytes, std::io::Error>>;

/// A request as the fake sees it.
pub(crate) struct Asked {
    pub(crate) method: http::Method,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) body: Value,
}

/// A client of an API server that answers like that; an error is one of the network.
pub(crate) fn api<F, R>(answer: F) -> Api
where
    F: Fn(Asked) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Reply, std::io::Error>> + Send + 'static,
{
    let answer = Arc::new(answer);
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let answer = answer.clone();
        async move {
            let (parts, body) = request.into_parts();
            let bytes = body.collect_bytes().await.map_err(std::io::Error::other)?;
            let asked = Asked {
                method: parts.method,
                path: parts.uri.path().to_owned(),
                query: parts.uri.query().unwrap_or_default().to_owned(),
                body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
            };
            answer(asked).await
        }
    });
    Api::of(Client::new(service, "ns"))
}

pub(crate) fn json(code: u16, value: &Value) -> Reply {
    let body = Full::new(Bytes::from(value.to_string())).map_err(|never| match never {});
    http::Response::builder().status(code).body(UnsyncBoxBody::new(body)).unwrap()
}

pub(crate) fn failure(code: u16, message: &str) -> Reply {
    json(code, &status(code, message))
}

pub(crate) fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "code": code})
}

/// A body of lines, as they are sent; an error breaks the connection.
pub(crate) fn lines(receiver: mpsc::Receiver<Result<Value, std::io::Error>>) -> Reply {
    let frames = ReceiverStream::new(receiver)
        .map(|line| line.map(|line| http_body::Frame::data(Bytes::from(format!("{line}\n")))));
    http::Response::builder().status(200).body(UnsyncBoxBody::new(StreamBody::new(frames))).unwrap()
}
