//! The router's side: one connection per worker, one stream per worker and lane, driven by one thread.
//!
//! Three parts: `connect` makes links and the delivery over them; `links` has the connected workers, their announcements and
//! the shards in flight, under one lock; `link` keeps one worker connected. `muster_engine::delivery` decides about shards;
//! [`Carrier`] is its transport. The network's tasks move bytes and keep links alive; the engine thread waits in the
//! carrier. They meet in `links` alone.

#[cfg(test)]
mod announcing;
mod carrier;
mod cluster;
mod config;
mod connect;
mod digests;
mod handle;
mod here;
mod link;
mod links;
mod peer;

pub use carrier::{Carrier, WireRows, WireSums};
pub use cluster::{ClusterHandle, ConnectedWorker, ControlError, Crowded, Joined};
pub use config::{ConnectConfig, ConnectError, LinkError, Start};
pub use connect::{GrpcDispatch, connect, connect_with};
pub use digests::{Digests, DigestsTeller, OtherWeights, Reference};
pub use handle::{Counted, DispatchStats, HealthHandle, StatsHandle, WorkerHealth, WorkerState};
pub use here::Fallback;
