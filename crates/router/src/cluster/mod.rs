//! The control plane of a router's workers: leadership, placement, and how workers join.

pub(crate) mod digests;
mod discovery;
mod fallback;
mod leader;
mod status;
mod weights;

pub(crate) use discovery::Discovery;
pub(crate) use fallback::ColdExperts;
pub(crate) use leader::{Leader, LeaderConfig};
pub(crate) use status::Cluster;
pub(crate) use weights::CheckpointWeights;
