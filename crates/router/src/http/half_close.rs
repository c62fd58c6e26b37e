//! Clients that close their half of a connection after their request and wait for the answer (RFC 9112, section 9.6), told
//! apart from those that are gone.
//!
//! hyper is told that half a connection may be closed, and then looks at nothing while it answers; [`Attended`] does. What
//! must hold: a connection that was reset ends at once, with what runs for it; so does one whose client closed its half and
//! is gone, which an interim response finds out: a client that waits passes over it (RFC 9110, section 15.2), the system of
//! one that is gone resets the connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Extension;
use axum::extract::Request;
use axum::http::Version;
use axum::middleware::Next;
use axum::response::Response;
use muster_dispatch_grpc::secured::Connection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

/// After a client closed its half, it is left alone this long: most answers are there by then.
const FIRST: Duration = Duration::from_secs(2);
/// Then it is looked for this often.
const NEXT: Duration = Duration::from_secs(1);

const PROBE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Bytes read of what comes while a request is answered, to see whether more will.
const AHEAD: usize = 1024;

/// Whether a request of a connection waits for the head of its answer and may be sent an interim one.
#[derive(Debug, Clone, Default)]
pub(super) struct Waits(Arc<AtomicBool>);

/// Says so while a request waits.
pub(super) async fn attend(Extension(waits): Extension<Waits>, request: Request, next: Next) -> Response {
    // Clients of HTTP/1.0 know no interim responses.
    waits.0.store(request.version() == Version::HTTP_11, Ordering::Relaxed);
    let response = next.run(request).await;
    waits.0.store(false, Ordering::Relaxed);
    response
}

/// A connection that is looked after while hyper does not read from it.
pub(super) struct Attended {
    io: Connection<TcpStream>,
    waits: Waits,
    /// Read while hyper did not.
    ahead: Vec<u8>,
    has_ended: bool,
    /// Since it ended, until the client is looked for.
    look: Option<Pin<Box<Sleep>>>,
    /// What is still to be written of a probe, before anything else.
    probe: &'static [u8],
}

impl Attended {
    pub(super) fn new(io: Connection<TcpStream>, waits: Waits) -> Self {
        Self { io, waits, ahead: Vec::new(), has_ended: false, look: None, probe: &[] }
    }

    /// Sees what came, and whether the client is still there. Called when all that hyper wrote was handed over.
    fn attend(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if !self.has_ended && self.ahead.len() < AHEAD {
            let mut bytes = [0; AHEAD];
            let mut buf = ReadBuf::new(&mut bytes[self.ahead.len()..]);
            if let Poll::Ready(read) = Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                read?;
                self.has_ended = buf.filled().is_empty();
                self.ahead.extend_from_slice(buf.filled());
                // hyper may have been told that there is nothing.
                cx.waker().wake_by_ref();
            }
        }
        // Of a client that sends on without end, the end cannot be seen; it is looked for, too.
        if !self.has_ended && self.ahead.len() < AHEAD {
            return Ok(());
        }
        let look = self.look.get_or_insert_with(|| Box::pin(sleep(FIRST)));
        while look.as_mut().poll(cx).is_ready() {
            if let Some(error) = self.io.get_ref().take_error()? {
                return Err(error);
            }
            if self.probe.is_empty() && self.waits.0.load(Ordering::Relaxed) {
                self.probe = PROBE;
            }
            look.as_mut().reset(Instant::now() + NEXT);
        }
        Ok(())
    }

    fn poll_probe(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.probe.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, self.probe))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.probe = &self.probe[written..];
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Attended {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ahead.is_empty() {
            let count = buf.remaining().min(this.ahead.len());
            buf.put_slice(&this.ahead[..count]);
            this.ahead.drain(..count);
            return Poll::Ready(Ok(()));
        }
        if this.has_ended {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Attended {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_probe(cx))?;
        Pin::new(&mut this.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_probe(cx))?;
        Pin::new(&mut this.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.attend(cx)?;
        ready!(this.poll_probe(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
