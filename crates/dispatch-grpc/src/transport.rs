//! How sockets are set up, on both sides: TLS, windows, frames, keepalive, delays.
//!
//! The numbers are measured: 1 MiB frames are what matters on loopback, 32/64 MiB windows once there is a round
//! trip to fill. Both sides ping, so that a silent peer is noticed when no deadline is running. Packets that are lost are
//! sent again after milliseconds, where the system can be told so.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use muster_identity::{Identity, IdentityError, Role};
use muster_net::{Asked, Mismatch, mismatch};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_util::either::Either;
use tonic::transport::{Channel, Endpoint, Server, Uri};

use crate::address::Address;

const STREAM_WINDOW: u32 = 32 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const FRAME: u32 = 1 << 20;
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// A router opens two dispatch streams, one watch and short calls on each connection.
const STREAMS_PER_CONNECTION: u32 = 32;

/// Opens connections to processes of the same cluster. The only place that does.
///
/// With an identity every connection is TLS to a peer of the wanted roles, but for Unix sockets, which the system guards.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    tls: Option<Arc<ClientConfig>>,
}

impl Dialer {
    /// A dialer of peers with one of these roles.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(identity: Option<&Identity>, roles: &'static [Role]) -> Result<Self, IdentityError> {
        Ok(Self { tls: identity.map(|identity| identity.client(roles)).transpose()? })
    }

    /// The other protocol at an address, if that is the reason of `cause`.
    pub(crate) async fn instead(&self, address: &Address, cause: &str) -> Option<Instead> {
        let Address::Tcp { .. } = address else { return None };
        let asked = if self.tls.is_some() { Asked::Tls } else { Asked::Plain };
        mismatch(&address.to_string(), asked, cause).await.map(Instead)
    }

    pub(crate) async fn connect(
        &self,
        address: &Address,
        timeout: Duration,
    ) -> Result<Channel, tonic::transport::Error> {
        let uri = match address {
            Address::Tcp { .. } => format!("http://{address}"),
            // Only the authority of requests; the connector has the path.
            Address::Unix(_) => "http://localhost".to_owned(),
        };
        let endpoint = Endpoint::from_shared(uri)?
            .connect_timeout(timeout)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true);
        match address {
            Address::Tcp { host, port } => {
                let (host, port, tls) = (host.clone(), *port, self.tls.clone());
                let connector = tower::service_fn(move |_: Uri| {
                    let (host, tls) = (host.clone(), tls.clone());
                    async move {
                        let stream = TcpStream::connect((host, port)).await?;
                        prepare(&stream)?;
                        let Some(tls) = tls else { return Ok(TokioIo::new(Either::Left(stream))) };
                        let peer = ServerName::IpAddress(stream.peer_addr()?.ip().into());
                        let stream = TlsConnector::from(tls).connect(peer, stream).await?;
                        Ok::<_, io::Error>(TokioIo::new(Either::Right(stream)))
                    }
                });
                endpoint.connect_with_connector(connector).await
            }
            Address::Unix(path) => {
                let path = path.clone();
                let connector = tower::service_fn(move |_: Uri| {
                    let path = path.clone();
                    async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
                });
                endpoint.connect_with_connector(connector).await
            }
        }
    }
}

/// Another protocol at an address of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instead(Mismatch);

impl Instead {
    /// What to do about it.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self.0 {
            Mismatch::Tls => "give it --tls-cert, --tls-key and --tls-ca",
            Mismatch::Plain => "give --tls-cert, --tls-key and --tls-ca there too, or leave them out here",
            Mismatch::Http => "give the address of gRPC: a router's --grpc, a worker's --listen",
        }
    }
}

impl fmt::Display for Instead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = match self.0 {
            Mismatch::Tls => " and this process does not",
            Mismatch::Plain => " and this process does",
            Mismatch::Http => "",
        };
        write!(f, "{}{rest}", self.0)
    }
}

/// Sets up a connection of a client.
///
/// # Errors
/// When it is closed already.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    resend_soon(stream);
    Ok(())
}

/// The shortest time, beyond the round trip, after which a packet without an acknowledgement is sent again.
#[cfg(target_os = "linux")]
const RESEND_AFTER: Duration = Duration::from_millis(5);

/// A layer waits for each lost packet, and the system's 200 ms are meant for the Internet. The system adds the round trip and
/// its variation by itself, and acknowledges sooner than this, too.
#[cfg(target_os = "linux")]
pub(crate) fn resend_soon(stream: &TcpStream) {
    use std::os::fd::AsRawFd;

    /// `TCP_RTO_MIN_US` of linux/tcp.h, from Linux 6.15 on; others refuse it and keep their 200 ms.
    const TCP_RTO_MIN_US: libc::c_int = 45;
    let micros = RESEND_AFTER.as_micros() as libc::c_int;
    // SAFETY: the descriptor is open as long as `stream` is borrowed; the option's value is read only, from an integer of
    // ours whose size is given.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_RTO_MIN_US,
            (&raw const micros).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "lost packets are sent again late");
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) const fn resend_soon(_: &TcpStream) {}

/// A server with the matching settings.
pub(crate) fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
}

/// The innermost cause, which has the system's own words.
pub(crate) fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_set_up_whatever_the_system_knows() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        prepare(&stream).unwrap();
        assert!(stream.nodelay().unwrap());
    }
}
