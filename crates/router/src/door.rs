//! A public listener with its TLS and access rules.

use std::sync::Arc;

use muster_identity::Access;
use rustls::ServerConfig;
use tokio::net::TcpListener;

/// A public listener with its TLS and access rules.
pub(crate) struct Door {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<Arc<ServerConfig>>,
    pub(crate) access: Access,
}

impl Door {
    /// A listener without TLS and without access control.
    #[cfg(test)]
    pub(crate) const fn open(listener: TcpListener) -> Self {
        Self { listener, tls: None, access: Access::Open }
    }
}
