//! Expert dispatch over gRPC: the router's client and the worker's server.
//!
//! Owns the streams between them: their peers, their order, the bounds on shards in flight, and what a broken
//! stream means for its rows. [`client::Carrier`] is a transport of delivery; [`ExpertServer`]
//! feeds the experts' thread. It decides no bits: rows go out as the caller gave them, and outputs are rounded
//! and combined by [`ExpertCompute`](muster_engine::compute::ExpertCompute) and [`muster_kernels`].
//!
//! Knows nothing of weights, tokens or requests.

mod address;
mod busy;
pub mod client;
mod crossed;
mod driver;
mod fetch;
mod join;
pub mod secured;
pub mod server;
mod transport;

pub use address::{Address, AddressError};
pub use client::{
    ClusterHandle, ConnectConfig, ConnectError, Digests, DigestsTeller, DispatchStats, Fallback,
    GrpcDispatch, HealthHandle, LinkError, Reference, Start, StatsHandle, WorkerHealth, WorkerState, connect,
    connect_with,
};
pub use fetch::{FetchError, Fetcher};
pub use join::{JoinError, Membership, join, reached_at};
pub use server::{
    BindError, Bound, ComputeQueue, Custody, ExpertServer, Handed, Held, Network, Pressure, ServeError,
    ServerConfig, Smoothed, WeightSource, WeightTerms, WeightsService,
};
pub use transport::{Dialer, Instead};
