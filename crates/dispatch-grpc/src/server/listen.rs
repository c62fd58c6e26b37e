//! Listening sockets, and serving on them until told to stop.

use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use muster_identity::{Clients, Identity, Role};
use muster_net::{Acceptor, Patience};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;

use super::{ExpertServer, Network};
use crate::address::Address;
use crate::driver::Driver;
use crate::secured::{Only, Speaks, secured};
use crate::transport;

/// Routers ping regularly, so a silent peer is gone.
const PATIENCE: Patience =
    Patience { stall: Duration::from_secs(30), silence: Some(Duration::from_secs(25)) };

/// A socket that cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process listens there.
    #[error("{address} is already in use; stop the process that listens there or choose another address")]
    InUse {
        /// The address.
        address: Address,
    },
    /// The file at a socket's path is something else.
    #[error("{} exists and is not a socket; choose another path or remove it", .0.display())]
    NotASocket(PathBuf),
    /// The network thread could not be started.
    #[error("cannot start the network thread: {0}; check the limit on processes and threads")]
    Thread(io::Error),
    /// Anything else.
    #[error("cannot listen on {address}: {source}; check that it is an address of this machine")]
    Io {
        /// The address.
        address: Address,
        /// What the system says.
        source: io::Error,
    },
}

/// Serving ended with an error.
#[derive(Debug, thiserror::Error)]
#[error("serving on {address} failed: {source}")]
pub struct ServeError {
    address: Address,
    source: Box<dyn std::error::Error + Send + Sync>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// Removes the socket's file when the listener is gone.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may be removed already.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A socket that listens, and the network it is part of; connections wait until it is served.
pub struct Bound {
    listener: Listener,
    address: Address,
    driver: Driver,
}

impl Bound {
    /// Listens on an address. A Unix socket left behind by a process that died is replaced.
    ///
    /// # Errors
    /// See [`BindError`].
    pub async fn bind(address: &Address) -> Result<Self, BindError> {
        let driver = Driver::start("muster-network").map_err(BindError::Thread)?;
        // Sockets belong to the runtime in which they are made.
        let wanted = address.clone();
        let listening = driver.spawn(async move { listen(&wanted).await });
        let (listener, address) = listening.await.unwrap_or_else(|error| {
            let source = io::Error::other(error);
            Err(BindError::Io { address: address.clone(), source })
        })?;
        Ok(Self { listener, address, driver })
    }

    /// Where it listens, with the port that the system picked for port 0.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// The network, for the experts' thread to drive.
    #[must_use]
    pub fn network(&self) -> Network {
        Network(self.driver.reins())
    }

    /// Serves until `shutdown` completes and every stream has ended; [`ExpertServer::close`] ends them. Dropped before
    /// that, it closes every connection at once. With an identity, only routers of its cluster are served, and other
    /// workers as far as weights go.
    ///
    /// # Errors
    /// When the listener fails as a whole; a failure of one connection is none.
    pub async fn serve(
        self,
        server: &ExpertServer,
        identity: Option<&Identity>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let Self { listener, address, driver } = self;
        let failed = |source| ServeError { address: address.clone(), source };
        // A Unix socket is guarded by the system.
        let identity = identity.filter(|_| matches!(listener, Listener::Tcp(_)));
        let tls = identity.map(|identity| identity.server(Clients::WithCertificate, "h2"));
        let tls = tls.transpose().map_err(|error| failed(error.into()))?;
        let only = |roles| Only(tls.is_some().then_some(roles));
        let router = transport::server()
            .add_service(InterceptedService::new(server.service(), only(&[Role::Router])))
            .add_service(InterceptedService::new(server.control(), only(&[Role::Router])))
            .add_service(InterceptedService::new(server.weights(), only(&[Role::Router, Role::Worker])));
        // Stops also when this future is dropped.
        let stop = CancellationToken::new();
        let stopping = stop.clone().drop_guard();
        let mut serving = driver.spawn(async move {
            match listener {
                Listener::Tcp(listener) => {
                    let incoming = Acceptor::new(listener, PATIENCE).into_stream(stop.clone());
                    let incoming = incoming.map(|socket| {
                        let socket = socket?;
                        transport::resend_soon(socket.get_ref());
                        Ok(socket)
                    });
                    let incoming = secured(incoming, tls, Speaks::Http2);
                    router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await
                }
                Listener::Unix(listener, _file) => {
                    let incoming = Acceptor::new(listener, PATIENCE).into_stream(stop.clone());
                    let incoming = secured(incoming, None, Speaks::Http2);
                    router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await
                }
            }
        });
        let mut shutdown = pin!(shutdown);
        let served = tokio::select! {
            served = &mut serving => served,
            () = &mut shutdown => {
                drop(stopping);
                serving.await
            }
        };
        match served {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(failed(source.into())),
            Err(source) => Err(failed(source.into())),
        }
    }
}

async fn listen(address: &Address) -> Result<(Listener, Address), BindError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse { address: address.clone() },
        _ => BindError::Io { address: address.clone(), source },
    };
    match address {
        Address::Tcp { host, port } => {
            let listener = muster_net::listen::tcp_named(host, *port).await.map_err(failed)?;
            let address = listener.local_addr().map_err(failed)?.into();
            Ok((Listener::Tcp(listener), address))
        }
        Address::Unix(path) => {
            remove_stale(path, address).await?;
            let listener = muster_net::listen::unix(path).map_err(failed)?;
            Ok((Listener::Unix(listener, SocketFile(path.clone())), address.clone()))
        }
    }
}

/// Removes a socket at `path` that no process serves.
async fn remove_stale(path: &Path, address: &Address) -> Result<(), BindError> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(BindError::InUse { address: address.clone() });
    }
    std::fs::remove_file(path).map_err(|source| BindError::Io { address: address.clone(), source })
}
