//! The router's side: one connection per worker, one stream per worker and lane, driven by one thread.
//!
//! [`GrpcDispatch`] belongs to the engine thread; it groups, encodes, waits, decodes and adds. The network thread
//! moves bytes and keeps links alive. They meet in [`board::Board`], under one lock that is held for as long as a
//! few map operations take; routes are built beside it. What always holds: a shard is on the board before it can be answered, and leaves it
//! with its answer, its link or its ticket, whichever ends first; so a reply that nobody waits for changes nothing.

#[cfg(test)]
mod announcing;
mod board;
mod cluster;
mod complete;
mod config;
mod digests;
mod dispatch;
mod flight;
mod handle;
mod here;
mod link;
mod peer;
mod routes;

pub use cluster::{ClusterHandle, ConnectedWorker, ControlError, Crowded, Joined};
pub use config::{ConnectConfig, ConnectError, LinkError, Start};
pub use digests::{Digests, DigestsTeller, OtherWeights, Reference};
pub use dispatch::GrpcDispatch;
pub use handle::{DispatchStats, HealthHandle, Sample, StatsHandle, WorkerHealth, WorkerState};
pub use here::Fallback;
