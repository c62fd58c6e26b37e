//! The common interface of the settings of routers and workers.

use std::net::SocketAddr;

use muster_telemetry::Process;

use crate::group::Role;
use crate::layers::{Loaded, Sources};
use crate::problem::ConfigError;
use crate::shared::LogSettings;

/// Settings of a process.
pub trait RoleSettings: Clone {
    /// The role, with all its settings.
    const ROLE: &'static Role;
    /// The kind of process.
    const PROCESS: Process;

    /// Reads and checks all layers.
    ///
    /// # Errors
    /// All problems.
    fn load(sources: &Sources<'_>) -> Result<Loaded<Self>, ConfigError>;

    /// Settings of its logs.
    fn log(&self) -> &LogSettings;

    /// Address of its admin interface.
    fn admin(&self) -> Option<SocketAddr>;
}
