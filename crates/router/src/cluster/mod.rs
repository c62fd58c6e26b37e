//! The workers of a router beside the data plane: who leads, what they shall hold, and how they come in.

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
