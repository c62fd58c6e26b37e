//! The router's side: one connection per worker, one stream per worker and lane, driven by one thread.
//!
//! Three rooms: `connect` makes links and the delivery over them; `links` knows which workers are connected, what they
//! announce and which shards are out, under one lock; `link` keeps one worker connected. What becomes of shards is
//! `muster_engine::delivery`'s; [`Carrier`] is the transport that it is given. The network's tasks move bytes and keep links
//! alive; the engine thread waits in the carrier. They meet in `links` alone.

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
