//! A public listener, how its connections are secured, and who is let in.

use std::sync::Arc;

use muster_identity::Access;
use rustls::ServerConfig;
use tokio::net::TcpListener;

/// See the module.
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
