//! Accepted connections, behind a TLS handshake where there is an identity, and who is at their other end.
//!
//! Always holds: handshakes run beside each other, as many as [`HANDSHAKES`] and each for at most [`HANDSHAKE`], so that
//! a peer that stalls in one keeps nobody else out; what fails in one ends that connection alone. Knows nothing of what is
//! said on a connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use muster_identity::{PeerId, Role, peer_of};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tonic::service::Interceptor;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

/// Handshakes at once; who comes then waits in the kernel's backlog.
const HANDSHAKES: usize = 256;
/// How long one may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Who is at the other end, as far as a certificate says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller(pub Option<PeerId>);

/// An accepted connection.
pub enum Connection<I> {
    /// Without TLS.
    Plain(I),
    /// After its handshake.
    Tls(Box<TlsStream<I>>, Caller),
}

impl<I> Connection<I> {
    /// Who is at the other end.
    #[must_use]
    pub fn caller(&self) -> Caller {
        match self {
            Self::Plain(_) => Caller(None),
            Self::Tls(_, caller) => caller.clone(),
        }
    }
}

impl<I> Connected for Connection<I> {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller()
    }
}

/// Connections of a listener, with their handshakes done if there is a TLS configuration.
pub fn secured<S, I>(incoming: S, tls: Option<Arc<ServerConfig>>) -> Secured<S, I>
where
    S: Stream<Item = io::Result<I>> + Unpin,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    Secured { incoming, tls: tls.map(TlsAcceptor::from), running: JoinSet::new(), is_over: false }
}

/// See [`secured`].
pub struct Secured<S, I> {
    incoming: S,
    tls: Option<TlsAcceptor>,
    running: JoinSet<Option<Connection<I>>>,
    is_over: bool,
}

impl<S, I> Stream for Secured<S, I>
where
    S: Stream<Item = io::Result<I>> + Unpin,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Item = io::Result<Connection<I>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            match this.running.poll_join_next(cx) {
                Poll::Ready(Some(Ok(Some(connection)))) => return Poll::Ready(Some(Ok(connection))),
                Poll::Ready(Some(_)) => continue,
                Poll::Ready(None) if this.is_over => return Poll::Ready(None),
                Poll::Pending if this.is_over || this.running.len() >= HANDSHAKES => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => {}
            }
            match Pin::new(&mut this.incoming).poll_next(cx) {
                Poll::Ready(Some(Ok(io))) => match &this.tls {
                    None => return Poll::Ready(Some(Ok(Connection::Plain(io)))),
                    Some(tls) => drop(this.running.spawn(handshake(tls.clone(), io))),
                },
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => this.is_over = true,
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

async fn handshake<I>(tls: TlsAcceptor, io: I) -> Option<Connection<I>>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let reason = match tokio::time::timeout(HANDSHAKE, tls.accept(io)).await {
        Ok(Ok(stream)) => {
            let caller = Caller(peer_of(stream.get_ref().1.peer_certificates()));
            return Some(Connection::Tls(Box::new(stream), caller));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it was not done within {HANDSHAKE:?}"),
    };
    metrics::counter!("muster_access_denied_total", "what" => "handshake").increment(1);
    if is_worth_a_line() {
        tracing::warn!(reason, "a TLS handshake failed");
    }
    None
}

/// Whether a second has passed since the last line of this kind: anybody can cause them.
fn is_worth_a_line() -> bool {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = START.elapsed().as_secs();
    NEXT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| (now >= next).then_some(now + 1)).is_ok()
}

/// Lets in who has one of these roles; everybody, where there is no TLS to tell.
#[derive(Debug, Clone, Copy)]
pub struct Only(pub Option<&'static [Role]>);

impl Only {
    /// Looks at a call's extensions.
    ///
    /// # Errors
    /// When the caller is somebody else.
    pub fn check(self, extensions: &tonic::Extensions) -> Result<(), Status> {
        let Some(roles) = self.0 else { return Ok(()) };
        let peer = extensions.get::<Caller>().and_then(|caller| caller.0.as_ref());
        let wanted = || roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ");
        let denied = match peer {
            Some(peer) if roles.contains(&peer.role()) => return Ok(()),
            Some(peer) => Status::permission_denied(format!(
                "{peer} may not ask for this; it takes a certificate of a {}",
                wanted()
            )),
            None => {
                Status::unauthenticated(format!("this takes a certificate of a {} of this cluster", wanted()))
            }
        };
        metrics::counter!("muster_access_denied_total", "what" => "role").increment(1);
        tracing::warn!(reason = denied.message(), "a call was refused");
        Err(denied)
    }
}

impl Interceptor for Only {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.check(request.extensions())?;
        Ok(request)
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for Connection<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(stream, _) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Connection<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Self::Tls(stream, _) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Self::Tls(stream, _) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(io) => io.is_write_vectored(),
            Self::Tls(stream, _) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
