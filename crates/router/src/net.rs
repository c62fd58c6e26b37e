//! Sockets of the public side: accepted one at a time, counted, and given up on when the peer stops playing.
//!
//! A [`Socket`] holds one of a fixed number of places, has Nagle's algorithm off, and fails with `TimedOut` when
//! the peer takes no bytes for [`Patience::stall`] or, where asked for, sends none for [`Patience::silence`]. No
//! error of `accept` ends the loop. Knows nothing about HTTP or gRPC.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use muster_identity::Access;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

/// Connections of one listener at once. More wait in the kernel's backlog.
const CONNECTIONS: usize = 8192;

/// Pause after `accept` failed for want of descriptors or memory; trying at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bytes a peer has to send within its first silence, at whatever pace: the length of HTTP/2's preface.
const OPENING_BYTES: usize = 24;

/// How long a peer may do nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Without taking a byte that waits to be sent.
    pub(crate) stall: Duration,
    /// Without sending a byte. `None` where the protocol has its own timers.
    pub(crate) silence: Option<Duration>,
}

/// A public listener, how its connections are secured, and who is let in.
pub(crate) struct Door {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<Arc<ServerConfig>>,
    pub(crate) access: Access,
}

impl Door {
    /// Open to everybody, without TLS.
    #[cfg(test)]
    pub(crate) const fn open(listener: TcpListener) -> Self {
        Self { listener, tls: None, access: Access::Open }
    }
}

/// A listener that hands out [`Socket`]s.
pub(crate) struct Acceptor {
    listener: TcpListener,
    places: Arc<Semaphore>,
    patience: Patience,
}

impl Acceptor {
    pub(crate) fn new(listener: TcpListener, patience: Patience) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(CONNECTIONS)), patience }
    }

    /// The next connection. Nothing is lost when this future is dropped.
    pub(crate) async fn next(&mut self) -> Socket {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
                // The semaphore is never closed.
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    // A socket that is gone already says so at its first read.
                    let _ = stream.set_nodelay(true);
                    return Socket::new(stream, place, self.patience);
                }
                Err(error) if is_of_one_peer(&error) => {}
                Err(error) => {
                    metrics::counter!("muster_accept_errors_total").increment(1);
                    tracing::debug!(%error, "accept failed");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// All connections until `shutdown`; the listener is closed then, whatever the reader of the stream does.
    pub(crate) fn into_stream(mut self, shutdown: CancellationToken) -> ReceiverStream<io::Result<Socket>> {
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

fn is_of_one_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// One accepted connection.
pub(crate) struct Socket {
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
    reads: Option<Timer>,
    writes: Timer,
    received: usize,
}

impl Socket {
    fn new(stream: TcpStream, place: OwnedSemaphorePermit, patience: Patience) -> Self {
        Self {
            stream,
            _place: place,
            reads: patience.silence.map(Timer::new),
            writes: Timer::new(patience.stall),
            received: 0,
        }
    }

    fn write_with(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<usize>>,
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

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
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

impl AsyncWrite for Socket {
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
    sleep: Option<Pin<Box<Sleep>>>,
    running: bool,
}

impl Timer {
    fn new(limit: Duration) -> Self {
        Self { limit, sleep: None, running: false }
    }

    fn progress(&mut self) {
        self.running = false;
    }

    fn expired(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let deadline = Instant::now() + self.limit;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if !self.running {
            self.running = true;
            sleep.as_mut().reset(deadline);
        }
        ready!(sleep.as_mut().poll(cx));
        metrics::counter!("muster_connections_evicted_total").increment(1);
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PATIENCE: Patience =
        Patience { stall: Duration::from_millis(200), silence: Some(Duration::from_millis(200)) };

    async fn pair() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
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
    async fn the_listener_closes_on_shutdown() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let mut sockets = Acceptor::new(listener, PATIENCE).into_stream(shutdown.clone());
        shutdown.cancel();
        assert!(tokio_stream::StreamExt::next(&mut sockets).await.is_none());
        assert!(TcpStream::connect(address).await.is_err());
    }
}
