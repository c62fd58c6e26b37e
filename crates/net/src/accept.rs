//! Connections: accepted one at a time, counted, and ended when the peer makes no progress.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

/// Connections of one listener at once, given enough descriptors. More wait in the system's backlog.
const CONNECTIONS: usize = 8192;

/// Part of a process's descriptors that one listener's connections may take; the rest is for other listeners, peers and
/// files.
const SHARE: usize = 4;

/// Pause after `accept` failed for want of descriptors or memory; trying at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bytes a peer has to send within its first silence, at whatever pace: the length of HTTP/2's preface.
const OPENING_BYTES: usize = 24;

/// Longest times without progress of a peer.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Without reading a byte that waits to be sent.
    pub stall: Duration,
    /// Without sending a byte. `None` where the protocol has its own timers.
    pub silence: Option<Duration>,
}

/// A socket that listens.
pub trait Listener: Send + Sync + 'static {
    /// Its connections.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection and its address. Nothing is lost when the future is dropped.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Io, Option<IpAddr>)>> + Send;
}

impl Listener for TcpListener {
    type Io = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Option<IpAddr>)> {
        let (stream, peer) = Self::accept(self).await?;
        // A socket that is gone already says so at its first read.
        let _ = stream.set_nodelay(true);
        Ok((stream, Some(peer.ip().to_canonical())))
    }
}

impl Listener for UnixListener {
    type Io = UnixStream;

    async fn accept(&self) -> io::Result<(UnixStream, Option<IpAddr>)> {
        Ok((Self::accept(self).await?.0, None))
    }
}

/// A listener that hands out [`Socket`]s.
pub struct Acceptor<L> {
    listener: L,
    places: Arc<Semaphore>,
    patience: Patience,
}

impl<L: Listener> Acceptor<L> {
    /// With as many places as the process's descriptors allow.
    #[must_use]
    pub fn new(listener: L, patience: Patience) -> Self {
        Self::with_places(listener, patience, places())
    }

    /// With at most so many connections at once.
    #[must_use]
    pub fn with_places(listener: L, patience: Patience, places: usize) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(places)), patience }
    }

    /// The next connection. Nothing is lost when this future is dropped.
    pub async fn next(&mut self) -> Socket<L::Io> {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
                // The semaphore is never closed.
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, peer)) => return Socket::new(stream, peer, place, self.patience),
                Err(error) if is_of_one_peer(&error) => {}
                Err(error) => {
                    metrics::counter!("muster_accept_errors_total").increment(1);
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// All connections until `shutdown`; the listener is closed then, whatever the reader of the stream does.
    pub fn into_stream(mut self, shutdown: CancellationToken) -> ReceiverStream<io::Result<Socket<L::Io>>> {
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let socket = tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = sender.closed() => return,
                    socket = self.next() => socket,
                };
                if sender.send(Ok(socket)).await.is_err() {
                    return;
                }
            }
        });
        ReceiverStream::new(receiver)
    }
}

/// Connections that one listener of this process may have. Shells give a process few descriptors, but let it take more.
fn places() -> usize {
    let wanted = CONNECTIONS * SHARE;
    let mut limit = getrlimit(Resource::Nofile);
    let may_have =
        |most: Option<u64>| most.map_or(wanted, |most| usize::try_from(most).unwrap_or(wanted).min(wanted));
    if may_have(limit.current) < may_have(limit.maximum) {
        limit.current = Some(may_have(limit.maximum) as u64);
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::debug!(%error, "the limit on descriptors stays as it is");
            limit = getrlimit(Resource::Nofile);
        }
    }
    (may_have(limit.current) / SHARE).max(1)
}

fn is_of_one_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// One accepted connection. Holds its listener's place, and fails with `TimedOut` when the peer takes no bytes for
/// [`Patience::stall`] or, where asked for, sends none for [`Patience::silence`].
pub struct Socket<S> {
    stream: S,
    peer: Option<IpAddr>,
    _place: OwnedSemaphorePermit,
    reads: Option<Timer>,
    writes: Timer,
    received: usize,
    /// The first byte, peeked at and still to be read.
    first: Option<u8>,
}

impl<S> Socket<S> {
    fn new(stream: S, peer: Option<IpAddr>, place: OwnedSemaphorePermit, patience: Patience) -> Self {
        Self {
            stream,
            peer,
            _place: place,
            reads: patience.silence.map(Timer::new),
            writes: Timer::new(patience.stall),
            received: 0,
            first: None,
        }
    }

    /// The peer's address; `None` on Unix sockets.
    #[must_use]
    pub const fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// The connection itself, to set it up.
    #[must_use]
    pub const fn get_ref(&self) -> &S {
        &self.stream
    }
}

impl<S: Unpin> Socket<S> {
    fn write_with(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match write(Pin::new(&mut self.stream), cx) {
            Poll::Ready(done) => {
                self.writes.progress();
                Poll::Ready(done)
            }
            Poll::Pending => self.writes.expired(cx).map(Err),
        }
    }
}

impl<S: AsyncRead + Unpin> Socket<S> {
    /// The first byte that the peer sends, which stays to be read; `None` when it sends nothing. For a connection that
    /// nothing was read of.
    ///
    /// # Errors
    /// Those of reading.
    pub async fn first(&mut self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        let read = self.read(&mut byte).await?;
        self.first = (read > 0).then_some(byte[0]);
        Ok(self.first)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buf.remaining() > 0
            && let Some(byte) = this.first.take()
        {
            buf.put_slice(&[byte]);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let poll = Pin::new(&mut this.stream).poll_read(cx, buf);
        let Some(timer) = &mut this.reads else { return poll };
        if poll.is_ready() {
            this.received = this.received.saturating_add(buf.filled().len() - before);
            if this.received >= OPENING_BYTES {
                timer.progress();
            }
            return poll;
        }
        timer.expired(cx).map(Err)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.write_with(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write_with(cx, |stream, cx| stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Runs while one direction makes no progress.
struct Timer {
    limit: Duration,
    /// Start of the time without progress.
    since: Option<Instant>,
    /// Set for no later than the limit after that; looked at again when it is over. A read of a busy connection so costs
    /// no change of the timer wheel.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    fn new(limit: Duration) -> Self {
        Self { limit, since: None, sleep: None }
    }

    fn progress(&mut self) {
        self.since = None;
    }

    fn expired(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let deadline = *self.since.get_or_insert_with(Instant::now) + self.limit;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        ready!(sleep.as_mut().poll(cx));
        if sleep.deadline() < deadline {
            sleep.as_mut().reset(deadline);
            ready!(sleep.as_mut().poll(cx));
        }
        metrics::counter!("muster_connections_evicted_total").increment(1);
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::listen;

    const PATIENCE: Patience =
        Patience { stall: Duration::from_millis(200), silence: Some(Duration::from_millis(200)) };

    async fn pair() -> (Socket<TcpStream>, TcpStream) {
        let listener = listen::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let client = tokio::spawn(TcpStream::connect(address));
        let server = Acceptor::new(listener, PATIENCE).next().await;
        (server, client.await.unwrap().unwrap())
    }

    #[tokio::test]
    async fn a_peer_that_takes_nothing_is_given_up_on() {
        let (mut server, _client) = pair().await;
        let error = server.write_all(&vec![0; 64 << 20]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_peer_that_sends_nothing_is_given_up_on() {
        let (mut server, _client) = pair().await;
        let error = server.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn the_first_byte_is_looked_at_and_stays() {
        let (mut server, mut client) = pair().await;
        client.write_all(b"GET").await.unwrap();
        assert_eq!(server.first().await.unwrap(), Some(b'G'));
        let mut read = [0; 3];
        server.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"GET");
        drop(client);
        let (mut server, client) = pair().await;
        drop(client);
        assert_eq!(server.first().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_peer_of_a_unix_socket_is_given_up_on_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut acceptor = Acceptor::new(listen::unix(&path).unwrap(), PATIENCE);
        let _client = UnixStream::connect(&path).await.unwrap();
        let mut server = acceptor.next().await;
        assert_eq!(server.peer(), None);
        assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_goes_on_is_waited_for_and_then_no_longer() {
        let (mut server, mut client) = pair().await;
        let started = Instant::now();
        for _ in 0..5 {
            client.write_all(&[0; OPENING_BYTES]).await.unwrap();
            server.read_exact(&mut [0; OPENING_BYTES]).await.unwrap();
            sleep(Duration::from_millis(150)).await;
        }
        // Silence counts from the moment that something is waited for.
        let before = Instant::now();
        assert_eq!(before - started, Duration::from_millis(750));
        assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!((200..210).contains(&before.elapsed().as_millis()), "{:?}", before.elapsed());
    }

    #[tokio::test]
    async fn a_trickled_opening_does_not_buy_time() {
        let (mut server, mut client) = pair().await;
        let trickle = tokio::spawn(async move {
            while client.write_all(b"P").await.is_ok() {
                sleep(Duration::from_millis(50)).await;
            }
        });
        let mut read = Vec::new();
        let error = server.read_to_end(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(read.len() < OPENING_BYTES, "{} bytes were waited for", read.len());
        drop(server);
        trickle.await.unwrap();
    }

    #[tokio::test]
    async fn places_are_few_and_come_back() {
        let listener = listen::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let mut acceptor = Acceptor::with_places(listener, PATIENCE, 2);
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let (first, _second) = (acceptor.next().await, acceptor.next().await);
        let third = tokio::spawn(async move { acceptor.next().await });
        tokio::task::yield_now().await;
        assert!(!third.is_finished());
        drop(first);
        assert_eq!(third.await.unwrap().peer(), Some(address.ip()));
    }

    #[test]
    fn descriptors_are_taken_as_far_as_the_system_gives_them() {
        let given = getrlimit(Resource::Nofile);
        let few = given.maximum.map_or(1024, |most| most.min(1024));
        setrlimit(Resource::Nofile, rustix::process::Rlimit { current: Some(few), ..given }).unwrap();
        let places = places();
        let most = given.maximum.map_or(usize::MAX, |most| most as usize);
        assert_eq!(places, (most / SHARE).min(CONNECTIONS));
        assert!(getrlimit(Resource::Nofile).current.is_none_or(|now| now as usize >= places * SHARE));
    }

    #[tokio::test]
    async fn the_listener_closes_on_shutdown() {
        let listener = listen::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let mut sockets = Acceptor::new(listener, PATIENCE).into_stream(shutdown.clone());
        shutdown.cancel();
        assert!(tokio_stream::StreamExt::next(&mut sockets).await.is_none());
        assert!(TcpStream::connect(address).await.is_err());
    }
}
