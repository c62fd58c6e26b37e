//! Expert dispatch over gRPC: the router's client and the worker's server.
//!
//! Owns the streams between them: who may speak, in what order, how much may be in flight, and what a broken
//! stream means for the rows that were on it. [`GrpcDispatch`] implements the dispatch seam; [`ExpertServer`]
//! feeds one compute thread. Bits are decided elsewhere: rows go out as the caller gave them, come back as the
//! expert rounded them, and are added by [`muster_engine::combine`].
//!
//! Knows nothing of weights, kernels, tokens or requests.

mod address;
pub mod client;
mod compute;
pub mod server;
mod transport;

pub use address::{Address, AddressError};
pub use client::{
    ConnectConfig, ConnectError, DispatchStats, GrpcDispatch, HealthHandle, LinkError, Sample, Start,
    StatsHandle, WorkerHealth, WorkerState,
};
pub use compute::{ComputeError, ExpertCompute, Rows};
pub use server::{BindError, Bound, ComputeQueue, ExpertServer, ServeError, ServerConfig};
