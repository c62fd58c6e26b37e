//! Being known to routers: asks until it is, and again whenever one lets go.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use muster_dispatch_grpc::{Address, Dialer, JoinError, Membership, join, reached_at};
use muster_types::{Fingerprint, WorkerId};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A worker that makes itself known.
#[derive(Clone)]
pub(crate) struct Applicant {
    pub(crate) dialer: Dialer,
    pub(crate) worker: WorkerId,
    pub(crate) listen: Address,
    /// Where others reach it, if that is not where it listens.
    pub(crate) advertise: Option<Address>,
    /// Of the model it has, if it has one.
    pub(crate) model: Option<Fingerprint>,
    /// Routers that know it.
    pub(crate) known: Arc<AtomicUsize>,
}

impl Applicant {
    async fn ask(&self, router: &Address) -> Result<Membership, JoinError> {
        let me = self.advertise.clone().unwrap_or_else(|| reached_at(&self.listen, router));
        join(&self.dialer, router, &self.worker, &me, self.model).await
    }

    /// The first of these routers that takes it. Asks for as long as none does.
    ///
    /// # Errors
    /// When one refuses it: something is set up wrongly.
    pub(crate) async fn first(&self, routers: &[Address]) -> Result<Membership, JoinError> {
        let mut pause = FIRST_PAUSE;
        loop {
            for router in routers {
                match self.ask(router).await {
                    Err(error @ JoinError::Unreachable { .. }) => {
                        tracing::info!(%error, "waiting for a router");
                    }
                    outcome => return outcome,
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Keeps it known to a router, for as long as it is polled.
    pub(crate) async fn stay(self, router: Address) {
        let mut pause = FIRST_PAUSE;
        let mut complained = false;
        loop {
            match self.ask(&router).await {
                Ok(membership) => {
                    tracing::info!(%router, "joined");
                    (pause, complained) = (FIRST_PAUSE, false);
                    self.known.fetch_add(1, Ordering::Relaxed);
                    membership.ended().await;
                    self.known.fetch_sub(1, Ordering::Relaxed);
                    tracing::info!(%router, "the router let go");
                }
                Err(error) if complained => tracing::debug!(%error, "not joined"),
                Err(error) => {
                    tracing::warn!(%error, "not joined; asking again");
                    complained = true;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}
