//! Signals that ask a process to end.

use std::future::Future;

use muster_admin::Admin;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// SIGINT and SIGTERM since the creation of this value.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Starts listening. Must be called inside a runtime.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let listen = |kind| {
            signal(kind).map_err(|error| Failure::runtime(format!("cannot listen for signals: {error}")))
        };
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Runs `work`; a signal cancels it.
    pub(crate) async fn unless<T>(
        &mut self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            outcome = work => outcome,
            () = self.next() => Err(Failure::Interrupted),
        }
    }

    /// Drains a server on the first signal. The second ends the process at once.
    pub(crate) fn drain_then_exit(mut self, admin: Admin) {
        tokio::spawn(async move {
            self.next().await;
            admin.end();
            self.next().await;
            tracing::warn!("second signal: ending without waiting");
            std::process::exit(130);
        });
    }
}
