//! Accepted connections with the identity of their peers, behind a TLS handshake where there is an identity.
//!
//! Always holds: up to [`HANDSHAKES`] handshakes run at once, each for at most [`HANDSHAKE`]; at that number the oldest
//! gives way, so that peers which stall in them keep no others out; a failure ends its own connection alone; a connection
//! that its peer floods with frames ends. Knows nothing else of a connection's contents.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use muster_identity::{PeerId, Role, peer_of};
use muster_net::{Meter, Socket};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tonic::service::Interceptor;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use crate::crossed::{Answer, Crossed};

pub use crate::crossed::Speaks;

/// Handshakes at once.
const HANDSHAKES: usize = 256;
/// Longest time of a handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Age below which a handshake never gives way: two long round trips.
const GOES_ON: Duration = Duration::from_millis(500);

/// The peer of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// Its identity, from its certificate.
    pub peer: Option<PeerId>,
    /// Its address; `None` over a Unix socket.
    pub address: Option<IpAddr>,
}

/// An accepted connection.
pub struct Connection<I> {
    io: Layer<I>,
    caller: Caller,
    speaks: Speaks,
    meter: Option<Meter>,
    /// Whether the peer has sent anything.
    has_begun: bool,
    /// Answer to a peer at the wrong port; the server behind never sees such a peer.
    wrong: Option<Told>,
}

/// State of the answer to a peer at the wrong port.
enum Told {
    /// Pending until its request.
    Soon(Answer),
    /// Sent.
    All,
}

enum Layer<I> {
    Plain(Socket<I>),
    Tls(Box<TlsStream<Socket<I>>>),
}

impl<I> Connection<I> {
    fn new(io: Layer<I>, caller: Caller, speaks: Speaks) -> Self {
        let meter = (speaks == Speaks::Http2).then(Meter::default);
        Self { io, caller, speaks, meter, has_begun: false, wrong: None }
    }

    /// The connection itself, below TLS.
    #[must_use]
    pub fn get_ref(&self) -> &I {
        match &self.io {
            Layer::Plain(io) => io.get_ref(),
            Layer::Tls(stream) => stream.get_ref().0.get_ref(),
        }
    }

    /// The peer.
    #[must_use]
    pub fn caller(&self) -> Caller {
        self.caller.clone()
    }
}

impl<I> Connected for Connection<I> {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller()
    }
}

/// Connections of a listener, with their handshakes done if there is a TLS configuration.
pub fn secured<S, I>(incoming: S, tls: Option<Arc<ServerConfig>>, speaks: Speaks) -> Secured<S, I>
where
    S: Stream<Item = io::Result<Socket<I>>> + Unpin,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (tls, running, begun) = (tls.map(TlsAcceptor::from), JoinSet::new(), VecDeque::new());
    Secured { incoming, tls, speaks, running, begun, wait: None, is_over: false }
}

/// See [`secured`].
pub struct Secured<S, I> {
    incoming: S,
    tls: Option<TlsAcceptor>,
    speaks: Speaks,
    running: JoinSet<Option<Connection<I>>>,
    /// Running handshakes that were not told to end, oldest first.
    begun: VecDeque<(Instant, AbortHandle)>,
    /// Time until the oldest gives way.
    wait: Option<Pin<Box<Sleep>>>,
    is_over: bool,
}

impl<S, I> Secured<S, I> {
    /// Waits until there is room for another handshake.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.begun.len() >= HANDSHAKES {
            self.begun.retain(|(_, handshake)| !handshake.is_finished());
            let Some((since, oldest)) = self.begun.front().filter(|_| self.begun.len() >= HANDSHAKES) else {
                break;
            };
            let until = *since + GOES_ON;
            let wait = self.wait.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
            if wait.deadline() != until {
                wait.as_mut().reset(until);
            }
            ready!(wait.as_mut().poll(cx));
            oldest.abort();
            metrics::counter!("muster_connections_evicted_total").increment(1);
            self.begun.pop_front();
        }
        Poll::Ready(())
    }
}

impl<S, I> Stream for Secured<S, I>
where
    S: Stream<Item = io::Result<Socket<I>>> + Unpin,
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
                Poll::Pending if this.is_over => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => {}
            }
            ready!(this.poll_room(cx));
            match Pin::new(&mut this.incoming).poll_next(cx) {
                Poll::Ready(Some(Ok(io))) => match &this.tls {
                    None => {
                        let caller = Caller { peer: None, address: io.peer() };
                        return Poll::Ready(Some(Ok(Connection::new(Layer::Plain(io), caller, this.speaks))));
                    }
                    Some(tls) => {
                        let handshake = this.running.spawn(handshake(tls.clone(), io, this.speaks));
                        this.begun.push_back((Instant::now(), handshake));
                    }
                },
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => this.is_over = true,
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

async fn handshake<I>(tls: TlsAcceptor, io: Socket<I>, speaks: Speaks) -> Option<Connection<I>>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let address = io.peer();
    let mut io = io;
    let first = tokio::time::timeout(HANDSHAKE, io.first()).await;
    if let Ok(Ok(Some(first))) = first
        && let Some(crossed) = Crossed::before_tls(first)
    {
        metrics::counter!("muster_access_denied_total", "what" => "handshake").increment(1);
        tracing::warn!(address = address.map(tracing::field::display), "{crossed}");
        crossed.tell(io, speaks).await;
        return None;
    }
    let reason = match tokio::time::timeout(HANDSHAKE, tls.accept(io)).await {
        Ok(Ok(stream)) => {
            let caller = Caller { peer: peer_of(stream.get_ref().1.peer_certificates()), address };
            return Some(Connection::new(Layer::Tls(Box::new(stream)), caller, speaks));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it was not done within {HANDSHAKE:?}"),
    };
    metrics::counter!("muster_access_denied_total", "what" => "handshake").increment(1);
    tracing::warn!(reason, address = address.map(tracing::field::display), "a TLS handshake failed");
    None
}

/// Admits callers with one of these roles; any caller where there is no TLS.
#[derive(Debug, Clone, Copy)]
pub struct Only(pub Option<&'static [Role]>);

impl Only {
    /// Checks the caller in a call's extensions.
    ///
    /// # Errors
    /// When the caller has another role.
    pub fn check(self, extensions: &tonic::Extensions) -> Result<(), Status> {
        let Some(roles) = self.0 else { return Ok(()) };
        let peer = extensions.get::<Caller>().and_then(|caller| caller.peer.as_ref());
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

impl<I> Connection<I> {
    fn sent(&mut self, bytes: &[u8]) {
        if let Some(meter) = &mut self.meter {
            meter.sent(bytes);
        }
    }

    /// Checks a peer's input before it goes on.
    fn received(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(meter) = &mut self.meter else { return Ok(()) };
        meter.received(bytes, std::time::Instant::now).map_err(|flood| {
            metrics::counter!("muster_connections_flooding_total").increment(1);
            let (peer, address) = (self.caller.peer.as_ref(), self.caller.address);
            let (peer, address) = (peer.map(tracing::field::display), address.map(tracing::field::display));
            tracing::warn!(address, peer, "a connection ends: {flood}");
            io::Error::other(flood)
        })
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Connection<I> {
    /// Checks the first bytes: a peer at the wrong port gets an answer and a log line.
    fn begun(&mut self, bytes: &[u8]) -> Option<Told> {
        if self.has_begun || bytes.is_empty() {
            return None;
        }
        self.has_begun = true;
        let Layer::Plain(_) = &self.io else { return None };
        let crossed = Crossed::without_tls(bytes, self.speaks)?;
        tracing::warn!(address = self.caller.address.map(tracing::field::display), "{crossed}");
        crossed.answer(self.speaks).map(Told::Soon)
    }

    /// Answers a peer at the wrong port, if these bytes complete its request.
    fn tell(&mut self, cx: &mut Context<'_>, bytes: &[u8]) {
        let Some(Told::Soon(answer)) = &mut self.wrong else { return };
        if answer.is_due(bytes)
            && let Layer::Plain(io) = &mut self.io
        {
            // It fits into an empty socket's buffer; a peer that does not take it is not waited for.
            let _ = Pin::new(io).poll_write(cx, answer.bytes());
            self.wrong = Some(Told::All);
        }
    }

    fn poll_io(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Layer::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Layer::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }

    /// Discards further input of a peer at the wrong port: an early close would reset the connection, and the answer with it.
    fn poll_leave(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut bytes = [0; 4096];
            let mut left = ReadBuf::new(&mut bytes);
            ready!(self.poll_io(cx, &mut left))?;
            let read = left.filled().len();
            if read == 0 {
                return Poll::Ready(Ok(()));
            }
            self.tell(cx, &bytes[..read]);
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for Connection<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.wrong.is_some() {
            return this.poll_leave(cx);
        }
        let before = buf.filled().len();
        ready!(this.poll_io(cx, buf))?;
        this.wrong = this.begun(&buf.filled()[before..]);
        if this.wrong.is_some() {
            this.tell(cx, &buf.filled()[before..]);
            buf.set_filled(before);
            return this.poll_leave(cx);
        }
        Poll::Ready(this.received(&buf.filled()[before..]))
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Connection<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(match &mut this.io {
            Layer::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Layer::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        })?;
        this.sent(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(match &mut this.io {
            Layer::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Layer::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        })?;
        let mut left = written;
        for buf in bufs {
            let taken = left.min(buf.len());
            this.sent(&buf[..taken]);
            left -= taken;
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Layer::Plain(io) => io.is_write_vectored(),
            Layer::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Layer::Plain(io) => Pin::new(io).poll_flush(cx),
            Layer::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Layer::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Layer::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
