//! Finds workers, and decides which router may lead: DNS, and Kubernetes' EndpointSlices, Leases and Secrets.
//!
//! Every result is the latest state in a [`tokio::sync::watch`] channel; the task behind it ends with the last receiver.
//! Always holds: known workers stay while their source does not answer, and the state says so; every wait has a deadline and
//! every answer a bound. Knows nothing of routers, workers or placement.

mod api;
mod dns;
mod endpoints;
#[cfg(test)]
mod fake;
mod lease;
mod pause;
pub mod secrets;
mod seen;
mod slice;
mod source;

pub use api::{Api, ApiError};
pub use lease::{Held, LeaseTimes, Tenure};
pub use seen::{Place, Seen};
pub use source::{ObjectName, Source, SourceError};

use tokio::sync::watch;

/// Starts to look for the workers of a source.
///
/// # Panics
/// Outside of a tokio runtime.
#[must_use]
pub fn watch(source: &Source, api: &Api) -> watch::Receiver<Seen> {
    match source {
        Source::Dns { host, port } => dns::watch(host.clone(), *port),
        Source::Service(service) => endpoints::watch(api.clone(), service.clone()),
    }
}

/// Starts to look for all addresses of a name.
///
/// # Panics
/// Outside of a tokio runtime.
#[must_use]
pub fn watch_name(host: &str, port: u16) -> watch::Receiver<Seen> {
    dns::watch(host.to_owned(), port)
}
