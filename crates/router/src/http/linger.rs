//! Lingering close: the rest of a refused request's body is read and discarded.
//!
//! A client that writes its whole request before it reads would see a reset instead of the refusal. Always holds:
//! discarded bytes are not kept, at most [`LEFT`] are read, for at most [`PATIENCE`] and only while they come; then the
//! connection closes.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header::EXPECT;
use axum::middleware::Next;
use axum::response::Response;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt};

/// Most bytes of a body that are discarded.
const LEFT: usize = 64 << 20;
/// Silence after which the client has surely read the refusal.
const SILENCE: Duration = Duration::from_secs(2);
/// Most time for discarding, the same as for reading a body.
const PATIENCE: Duration = super::body::PATIENCE;

/// Discards the part of a request's body that no handler read. Bodies behind `Expect` are skipped: the client has not
/// sent them.
pub(super) async fn linger(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() || request.headers().contains_key(EXPECT) {
        return next.run(request).await;
    }
    next.run(request.map(|body| Body::from_stream(Lent { body: Some(body.into_data_stream()) }))).await
}

/// A body lent to a handler; when dropped, its rest is discarded.
struct Lent {
    /// `None` when it has ended.
    body: Option<BodyDataStream>,
}

impl Stream for Lent {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_next(cx);
        if !matches!(polled, Poll::Pending | Poll::Ready(Some(Ok(_)))) {
            self.body = None;
        }
        polled
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(body), Ok(runtime)) = (self.body.take(), Handle::try_current()) {
            // The task ends with the connection.
            runtime.spawn(timeout(PATIENCE, leave(body)));
        }
    }
}

async fn leave(mut body: BodyDataStream) {
    let mut left = 0;
    while let Ok(Some(Ok(bytes))) = timeout(SILENCE, body.next()).await {
        left += bytes.len();
        if left > LEFT {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_no_more_is_not_waited_for() {
        let began = tokio::time::Instant::now();
        let silent = tokio_stream::pending::<Result<Bytes, std::io::Error>>();
        leave(Body::from_stream(silent).into_data_stream()).await;
        assert_eq!(began.elapsed(), SILENCE);
    }

    #[tokio::test]
    async fn no_more_is_left_than_allowed() {
        let chunk = Bytes::from(vec![b' '; 1 << 20]);
        let taken = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = taken.clone();
        let endless = tokio_stream::iter(std::iter::repeat_with(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok::<_, std::io::Error>(chunk.clone())
        }));
        leave(Body::from_stream(endless).into_data_stream()).await;
        assert_eq!(taken.load(std::sync::atomic::Ordering::Relaxed), (LEFT >> 20) + 1);
    }
}
