//! Logs, metrics and their names.
//!
//! Owns the one log subscriber and the one metrics recorder of a process, and the names under which every crate
//! counts. A log event is one line, whatever values it carries, and no peer can cause lines without end. Knows
//! nothing about where settings come from: the caller passes the filter and the format.

mod escape;
mod limit;
mod logs;
mod metrics;
pub mod names;
mod sorted;

pub use crate::logs::{LogFormat, UnknownLogFormat, init_logs};
pub use crate::metrics::{MetricsHandle, install_metrics};
pub use crate::names::Process;

/// Logs or metrics that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not one.
    #[error("log filter {filter:?}: {reason}; an example is `info,muster_router=debug`")]
    Filter {
        /// As it was given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A subscriber is installed already.
    #[error("logs were set up twice in one process")]
    LogsTwice,
    /// The recorder could not be made or installed.
    #[error("metrics could not be set up: {0}")]
    Metrics(String),
    /// The thread that keeps histograms small could not be started.
    #[error("the metrics thread could not be started: {0}")]
    Thread(std::io::Error),
}
