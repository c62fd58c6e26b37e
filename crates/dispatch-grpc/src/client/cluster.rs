//! Other threads' handle to the connected workers: who they are, and who joins.

use std::sync::Arc;
use std::time::Instant;

use muster_placement::Binding;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::control::ConnectedWorker;
use super::link::{self, LinkConfig};
use super::links::{Crowded, Links};
use crate::address::Address;

/// Other threads' handle to the workers of a dispatch.
#[derive(Clone)]
pub struct ClusterHandle {
    pub(super) links: Arc<Links>,
    pub(super) link: Arc<LinkConfig>,
    pub(super) runtime: Handle,
}

/// Membership of a joined worker. After its drop, an unconnected worker is forgotten.
pub struct Joined {
    links: Arc<Links>,
    address: Address,
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.links.leave(&self.address);
    }
}

impl ClusterHandle {
    /// What experts are bound to.
    #[must_use]
    pub fn binding(&self) -> Arc<Binding> {
        self.links.binding()
    }

    /// The workers that are connected now.
    #[must_use]
    pub fn workers(&self) -> Vec<ConnectedWorker> {
        self.links.members()
    }

    /// Notifies of every worker that connects, ends or announces something.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.links.versions()
    }

    /// Waits until every expert has a connected worker; false at the deadline. Blocks.
    #[must_use]
    pub fn await_coverage(&self, deadline: Instant) -> bool {
        self.links.await_coverage(deadline)
    }

    /// Adds a worker. It is connected and kept connected, unless it is known already.
    ///
    /// # Errors
    /// When there are too many.
    pub fn join(&self, address: Address) -> Result<Joined, Crowded> {
        self.join_in(address, None)
    }

    /// As [`Self::join`], in the failure domain `domain` unless the worker announces another.
    ///
    /// # Errors
    /// When there are too many.
    pub fn join_in(&self, address: Address, domain: Option<String>) -> Result<Joined, Crowded> {
        if let Some(peer) = self.links.join(&address, domain)? {
            tracing::info!(%address, "a worker joins");
            drop(self.runtime.spawn(link::keep(peer, self.links.clone(), self.link.clone())));
        }
        Ok(Joined { links: self.links.clone(), address })
    }
}
