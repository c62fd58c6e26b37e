//! What is common to the settings of a router and of a worker.

use std::net::SocketAddr;

use muster_telemetry::Process;

use crate::group::Role;
use crate::layers::{Loaded, Sources};
use crate::problem::ConfigError;
use crate::shared::LogSettings;

/// What a process is told.
pub trait RoleSettings: Clone {
    /// All there is.
    const ROLE: &'static Role;
    /// Whose they are.
    const PROCESS: Process;

    /// Reads and checks all layers.
    ///
    /// # Errors
    /// Everything that is wrong.
    fn load(sources: &Sources<'_>) -> Result<Loaded<Self>, ConfigError>;

    /// What it logs.
    fn log(&self) -> &LogSettings;

    /// Where the machine around it asks.
    fn admin(&self) -> Option<SocketAddr>;
}
