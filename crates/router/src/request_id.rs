//! A name for every request, over HTTP and gRPC: the client's `x-request-id` or one made here, in the answer and on the lines that
//! are logged while the request is worked on.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tonic::Status;
use tracing::Instrument;
use uuid::Uuid;

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Bytes of a name that is taken over.
const LONGEST: usize = 128;

/// Takes the name over, or makes one.
pub(crate) async fn name(request: Request, next: Next) -> Response {
    let id = given(request.headers()).unwrap_or_else(made);
    let shown = id.to_str().unwrap_or_default();
    let span =
        tracing::info_span!("request", id = shown, method = %request.method(), path = request.uri().path());
    let answered = async {
        let response = next.run(request).await;
        let status = response.status().as_u16();
        // gRPC says in a header of its own what came of a call; `INTERNAL` is 13.
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

/// A name that can stand in a log: short, and of characters that are seen.
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
