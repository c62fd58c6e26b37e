//! A connected worker, and control calls to it beside the data plane: for the placement leader.
//!
//! Every call has a deadline. Knows nothing of the purpose of a call.

use std::sync::Arc;
use std::time::Duration;

use muster_proto::control::{Assignment, LeadAnswer, LeadAsk, rows_from_wire};
use muster_proto::description::Description;
use muster_proto::expert::v1;
use muster_proto::expert::v1::control_client::ControlClient;
use muster_types::{Epoch, WorkerId};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// Deadline of a worker's answer: short, so that a leader does not lose its lease while it waits for a stalled worker.
const ANSWER: Duration = Duration::from_millis(400);

/// Client of control calls, beside the lanes.
pub(super) type Control = ControlClient<Channel>;

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
