//! Request names, over HTTP and gRPC: the client's `x-request-id` or a generated one, in the answer and on the
//! request's log lines.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tonic::Status;
use tracing::Instrument;
use uuid::Uuid;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Most bytes of a client's name.
const LONGEST: usize = 128;

/// Names a request: keeps the client's name or makes one.
pub(crate) async fn name(request: Request, next: Next) -> Response {
    let id = given(request.headers()).unwrap_or_else(made);
    let shown = id.to_str().unwrap_or_default();
    let span =
        tracing::info_span!("request", id = shown, method = %request.method(), path = request.uri().path());
    let answered = async {
        let response = next.run(request).await;
        let status = response.status().as_u16();
        // gRPC's status is in a header of its own; `INTERNAL` is 13.
        let is_internal = response.headers().get(Status::GRPC_STATUS).is_some_and(|code| code == "13");
        if response.status().is_server_error() || is_internal {
            tracing::warn!(status, "a request failed");
        } else {
            tracing::debug!(status, "a request was answered");
        }
        response
    };
    let mut response = answered.instrument(span).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The client's name, if it is fit for a log: short, and of visible characters.
fn given(headers: &HeaderMap) -> Option<HeaderValue> {
    let id = headers.get(REQUEST_ID)?;
    let is_one = (1..=LONGEST).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    is_one.then(|| id.clone())
}

fn made() -> HeaderValue {
    let id = Uuid::new_v4().simple().to_string();
    HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_can_stand_in_a_log_are_taken_over() {
        let given = |id: &[u8]| {
            let headers = HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_bytes(id).unwrap())]);
            given(&headers)
        };
        assert_eq!(given(b"req_1-2.3").unwrap(), "req_1-2.3");
        assert_eq!(given(&[b'x'; LONGEST]).unwrap().len(), LONGEST);
        for wrong in [&b""[..], b"a b", b"\xc3\xa9", &[b'x'; LONGEST + 1]] {
            assert_eq!(given(wrong), None, "{wrong:?}");
        }
        assert_ne!(made(), made());
    }
}
