//! Reading a JSON body: checks its type, size and pace, and parses large ones off the async threads.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use tokio_stream::StreamExt;

use super::error::ApiError;
use super::places::{Large, Lost, Place};
use crate::service::Service;

/// Time in which a body must be complete.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Most bytes read without a [`Large`] place and parsed in place: at some 200 MB/s, less than half a millisecond.
const SMALL: usize = 64 << 10;

/// A complete body. Gives its place back when dropped.
pub(super) struct JsonBody {
    bytes: Vec<u8>,
    _place: Option<Place>,
}

impl JsonBody {
    /// Reads a body of at most `limit` bytes that is complete within `patience`.
    ///
    /// # Errors
    /// 415 for another content type or a compressed body, 413 above the limit, 408 when it takes too long or comes too
    /// slowly, 503 when too many large bodies are under way and this one is not faster, 400 when the client breaks off.
    pub(super) async fn read(
        headers: &HeaderMap,
        body: Body,
        limit: usize,
        large: &Large,
        patience: Duration,
    ) -> Result<Self, ApiError> {
        check_headers(headers, limit)?;
        tokio::time::timeout(patience, collect(body, limit, large)).await.unwrap_or_else(|_| {
            let message = format!("the body did not arrive within {} s", patience.as_secs());
            Err(ApiError::status(StatusCode::REQUEST_TIMEOUT, message))
        })
    }

    /// Parses the body, on the text pool if it is large.
    ///
    /// # Errors
    /// Those of `parse`; 429 when the text pool is full.
    pub(super) async fn parse<T: Send + 'static>(
        self,
        service: &Service,
        parse: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        match self.bytes.len() {
            0..=SMALL => parse(self.json()),
            // Counted twice: the body and the parsed value.
            bytes => service.work(bytes * 2, move |_| parse(self.json())).await,
        }
    }
}

impl JsonBody {
    /// Skips a byte order mark (RFC 8259, section 8.1).
    fn json(&self) -> &[u8] {
        self.bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&self.bytes)
    }
}

/// Runs `work` on about `bytes` bytes: here when that is quick, else on the blocking pool.
///
/// # Errors
/// 500 when the pool is shutting down.
pub(super) async fn off_thread<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= SMALL {
        return Ok(work());
    }
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| ApiError::from(crate::request::RequestError::Internal))
}

fn check_headers(headers: &HeaderMap, limit: usize) -> Result<(), ApiError> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media = text(header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim();
    if !media.eq_ignore_ascii_case("application/json") {
        let message = "the content-type must be application/json";
        return Err(ApiError::status(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    if headers.contains_key(header::CONTENT_ENCODING)
        && !text(header::CONTENT_ENCODING).eq_ignore_ascii_case("identity")
    {
        let message = "compressed bodies are not supported; send it without a content-encoding";
        return Err(ApiError::status(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    match text(header::CONTENT_LENGTH).parse::<u64>() {
        Ok(length) if length > limit as u64 => Err(too_large(limit)),
        _ => Ok(()),
    }
}

async fn collect(body: Body, limit: usize, large: &Large) -> Result<JsonBody, ApiError> {
    let mut bytes = Vec::new();
    let mut place: Option<Place> = None;
    let mut chunks = body.into_data_stream();
    loop {
        let chunk = match &place {
            Some(place) => place.keep(chunks.next()).await.map_err(lost)?,
            None => chunks.next().await,
        };
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(|_| ApiError::bad_body("the body ended before it was complete"))?;
        if chunk.len() > limit - bytes.len() {
            return Err(too_large(limit));
        }
        if let Some(place) = &mut place {
            place.pace(chunk.len()).await;
        } else if bytes.len() + chunk.len() > SMALL {
            let refused = || ApiError::busy("too many large requests are under way; try again in a moment");
            place = Some(large.take().ok_or_else(refused)?);
        }
        bytes.extend_from_slice(&chunk);
    }
    if let Some(place) = &place {
        place.complete();
    }
    Ok(JsonBody { bytes, _place: place })
}

fn lost(lost: Lost) -> ApiError {
    match lost {
        Lost::GaveWay => ApiError::busy(lost),
        Lost::TooSlow => ApiError::status(StatusCode::REQUEST_TIMEOUT, lost),
    }
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("the body is larger than {limit} bytes");
    ApiError::status(StatusCode::PAYLOAD_TOO_LARGE, message)
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use axum::http::HeaderValue;

    use super::*;
    use crate::http::places::PLACES;

    fn json() -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))])
    }

    fn chunks(chunk: usize, count: usize) -> Body {
        let chunk = Bytes::from(vec![b' '; chunk]);
        Body::from_stream(tokio_stream::iter(vec![chunk; count]).map(Ok::<_, std::io::Error>))
    }

    async fn status(headers: &HeaderMap, body: Body, limit: usize, large: &Large) -> Option<u16> {
        JsonBody::read(headers, body, limit, large, PATIENCE).await.err().map(|error| error.status.as_u16())
    }

    #[tokio::test]
    async fn the_limit_holds_whatever_the_header_says() {
        let large = Large::default();
        assert_eq!(status(&json(), chunks(10, 10), 100, &large).await, None);
        assert_eq!(status(&json(), chunks(10, 11), 100, &large).await, Some(413));
        let mut headers = json();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("101"));
        assert_eq!(status(&headers, chunks(1, 1), 100, &large).await, Some(413));
    }

    #[tokio::test]
    async fn only_plain_json_is_taken() {
        let large = Large::default();
        assert_eq!(status(&HeaderMap::new(), chunks(1, 1), 100, &large).await, Some(415));
        for (name, value, expected) in [
            ("content-type", "application/json; charset=utf-8", None),
            ("content-type", "Application/JSON", None),
            ("content-type", "text/plain", Some(415)),
            ("content-type", "application/jsonx", Some(415)),
            ("content-encoding", "gzip", Some(415)),
            ("content-encoding", "identity", None),
        ] {
            let mut headers = json();
            headers.insert(name, HeaderValue::from_static(value));
            assert_eq!(status(&headers, chunks(1, 1), 100, &large).await, expected, "{name}: {value}");
        }
    }

    #[tokio::test]
    async fn a_body_that_never_comes_times_out() {
        let body = Body::from_stream(tokio_stream::pending::<Result<Bytes, std::io::Error>>());
        let read = JsonBody::read(&json(), body, 100, &Large::default(), Duration::from_millis(20)).await;
        assert_eq!(read.err().unwrap().status, StatusCode::REQUEST_TIMEOUT);
    }

    #[tokio::test]
    async fn large_bodies_are_few() {
        let large = Large::default();
        let mut held = Vec::new();
        for _ in 0..PLACES {
            held.push(JsonBody::read(&json(), chunks(SMALL, 2), 1 << 20, &large, PATIENCE).await.unwrap());
        }
        assert_eq!(status(&json(), chunks(SMALL, 2), 1 << 20, &large).await, Some(503));
        assert_eq!(status(&json(), chunks(SMALL, 1), 1 << 20, &large).await, None);
        held.pop();
        assert_eq!(status(&json(), chunks(SMALL, 2), 1 << 20, &large).await, None);
    }
}
