//! Bodies that are refused before they have come: what still comes is read and left.
//!
//! A client that writes its whole request before it reads would find the connection reset, and never see why it was refused. What
//! must hold: nothing is kept of what is left, and no more than [`LEFT`] is read, for no longer than [`PATIENCE`] and only
//! while it comes; then the connection closes.

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

/// Bytes that are read of a body that nobody wants.
const LEFT: usize = 64 << 20;
/// A client that sends nothing for so long has read why.
const SILENCE: Duration = Duration::from_secs(2);
/// As long as a body that is wanted may take.
const PATIENCE: Duration = super::body::PATIENCE;

/// Leaves what no handler reads of a request's body, if it has one. A client that waits to be told to send it has not sent it.
pub(super) async fn linger(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() || request.headers().contains_key(EXPECT) {
        return next.run(request).await;
    }
    next.run(request.map(|body| Body::from_stream(Lent { body: Some(body.into_data_stream()) }))).await
}

/// A body in the hands of a handler; once they let go, the rest of it is left.
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
            // It ends with its connection.
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
