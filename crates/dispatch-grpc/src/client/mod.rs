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
mod control;
mod digests;
mod error;
mod handle;
mod health;
mod here;
mod link;
mod links;
mod outputs;
mod peer;

pub use carrier::Carrier;
pub use cluster::{ClusterHandle, Joined};
pub use config::{ConnectConfig, Start};
pub use connect::{GrpcDispatch, connect, connect_with};
pub use control::{ConnectedWorker, ControlError};
pub use digests::{Digests, DigestsTeller, Reference};
pub use error::{ConnectError, LinkError, OtherWeights};
pub use handle::{Counted, DispatchStats, HealthHandle, StatsHandle};
pub use health::{WorkerHealth, WorkerState};
pub use here::Fallback;
pub use links::Crowded;
pub use outputs::{WireRows, WireSums};
