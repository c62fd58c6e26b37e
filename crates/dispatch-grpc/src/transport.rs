//! How sockets are set up, on both sides: windows, frames, keepalive, delays.
//!
//! The numbers are measured: 1 MiB frames are what matters on loopback, 32/64 MiB windows once there is a round
//! trip to fill. Both sides ping, so that a silent peer is noticed when no deadline is running.

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Server, Uri};

use crate::address::Address;

const STREAM_WINDOW: u32 = 32 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const FRAME: u32 = 1 << 20;
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// A router opens two dispatch streams, one watch and short calls on each connection.
const STREAMS_PER_CONNECTION: u32 = 32;

/// Opens a connection. The only place that knows how.
pub(crate) async fn connect(
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
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    match address {
        Address::Tcp { .. } => endpoint.connect().await,
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

/// A server whose sockets match.
pub(crate) fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
}

/// The innermost cause, which is where the system's own words are.
pub(crate) fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
