//! The connected workers, and control calls to them beside the data plane: for the placement leader and for joining workers.
//!
//! Every call has a deadline. Knows nothing of the purpose of a call.

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_placement::Binding;
use muster_proto::control::{Assignment, LeadAnswer, LeadAsk, rows_from_wire};
use muster_proto::description::Description;
use muster_proto::expert::v1;
use muster_types::{Epoch, WorkerId};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tonic::{Code, Response, Status};

use super::link::{self, LinkConfig};
use super::links::Links;
use super::peer::Control;
use crate::address::Address;

/// Deadline of a worker's answer: short, so that a leader does not lose its lease while it waits for a stalled worker.
const ANSWER: Duration = Duration::from_millis(400);

/// Other threads' handle to the workers of a dispatch.
#[derive(Clone)]
pub struct ClusterHandle {
    pub(super) links: Arc<Links>,
    pub(super) link: Arc<LinkConfig>,
    pub(super) runtime: Handle,
}

/// The router knows its maximum of workers already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this router knows as many workers as it may")]
pub struct Crowded;

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

/// A control call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The worker obeys another router.
    #[error("it obeys another router: {0}")]
    NotLeader(String),
    /// No answer within the deadline.
    #[error("it gave no answer within {0:?}")]
    Silent(Duration),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

impl From<Status> for ControlError {
    fn from(status: Status) -> Self {
        let text = status.message().to_owned();
        match status.code() {
            Code::FailedPrecondition => Self::NotLeader(text),
            code => Self::Failed(format!("{code}: {text}")),
        }
    }
}

/// A worker that is connected.
#[derive(Clone)]
pub struct ConnectedWorker {
    /// Where it is.
    pub address: String,
    /// Number of its session; another for each connection.
    pub session: u64,
    /// What it announces.
    pub description: Arc<Description>,
    /// Failure domain: as the worker announces it, else as its discovery or join says.
    pub domain: Option<String>,
    pub(super) control: Control,
}

impl ConnectedWorker {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &WorkerId {
        &self.description.worker
    }

    /// Asks it to obey this router.
    ///
    /// # Errors
    /// When it does not answer as it should.
    pub async fn lead(&self, ask: &LeadAsk, patience: Duration) -> Result<LeadAnswer, ControlError> {
        let mut control = self.control.clone();
        let reply = within(patience, control.lead(ask.to_wire())).await?;
        LeadAnswer::parse(&reply).map_err(|error| ControlError::Failed(error.to_string()))
    }

    /// Orders what it shall hold. Returns the epoch of the first description without the experts that the order takes away.
    ///
    /// # Errors
    /// When it does not take that order.
    pub async fn assign(&self, assignment: &Assignment) -> Result<Epoch, ControlError> {
        let mut control = self.control.clone();
        Ok(Epoch::new(within(ANSWER, control.assign(assignment.to_wire())).await?.epoch))
    }

    /// Rows of its experts since its start, by layer and expert, for a model with `experts` experts in each layer.
    ///
    /// # Errors
    /// When it does not answer as it should.
    pub async fn count_rows(&self, experts: &[u32]) -> Result<Vec<Vec<u64>>, ControlError> {
        let mut control = self.control.clone();
        let reply = within(ANSWER, control.count_rows(v1::CountRowsRequest {})).await?;
        rows_from_wire(&reply, experts).map_err(|error| ControlError::Failed(error.to_string()))
    }
}

async fn within<T>(
    patience: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, ControlError> {
    match tokio::time::timeout(patience, call).await {
        Ok(reply) => Ok(reply?.into_inner()),
        Err(_) => Err(ControlError::Silent(patience)),
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
