//! Half-closed connections: clients that close their sending half after the request and wait for the answer (RFC 9112,
//! section 9.6), told apart from clients that are gone.
//!
//! With half-close enabled hyper does not read the connection while it answers, so [`Attended`] does. Always holds: a
//! reset connection ends at once, together with its request. So does a half-closed one whose client is gone: an interim
//! response probes it, which a waiting client skips (RFC 9110, section 15.2) and the system of a gone client answers
//! with a reset.

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

/// Delay of the first probe after a half-close: most answers are complete by then.
const FIRST: Duration = Duration::from_secs(2);
/// Interval of later probes.
const NEXT: Duration = Duration::from_secs(1);

const PROBE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Most bytes read ahead while a request is answered, to detect the end of the stream.
const AHEAD: usize = 1024;

/// Whether the connection's request waits for its response head and may get an interim response.
#[derive(Debug, Clone, Default)]
pub(super) struct Waits(Arc<AtomicBool>);

/// Sets [`Waits`] while a request is handled.
pub(super) async fn attend(Extension(waits): Extension<Waits>, request: Request, next: Next) -> Response {
    // HTTP/1.0 has no interim responses.
    waits.0.store(request.version() == Version::HTTP_11, Ordering::Relaxed);
    let response = next.run(request).await;
    waits.0.store(false, Ordering::Relaxed);
    response
}

/// A connection that is watched while hyper does not read from it.
pub(super) struct Attended {
    io: Connection<TcpStream>,
    waits: Waits,
    /// Bytes read ahead, before hyper asked for them.
    ahead: Vec<u8>,
    has_ended: bool,
    /// Timer of the next probe, set once the client's half has ended.
    look: Option<Pin<Box<Sleep>>>,
    /// Unsent rest of a probe, written before anything else.
    probe: &'static [u8],
}

impl Attended {
    pub(super) fn new(io: Connection<TcpStream>, waits: Waits) -> Self {
        Self { io, waits, ahead: Vec::new(), has_ended: false, look: None, probe: &[] }
    }

    /// Reads ahead and probes the client. Called when everything that hyper wrote is handed over.
    fn attend(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if !self.has_ended && self.ahead.len() < AHEAD {
            let mut bytes = [0; AHEAD];
            let mut buf = ReadBuf::new(&mut bytes[self.ahead.len()..]);
            if let Poll::Ready(read) = Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                read?;
                self.has_ended = buf.filled().is_empty();
                self.ahead.extend_from_slice(buf.filled());
                // Wakes hyper, which may have seen an empty socket.
                cx.waker().wake_by_ref();
            }
        }
        // A client that never stops sending hides its end, so a full read-ahead buffer is probed as well.
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
