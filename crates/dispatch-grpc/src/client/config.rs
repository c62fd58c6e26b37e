//! A router's configuration of its workers.

use std::sync::Arc;
use std::time::Duration;

use muster_kernels::Cpu;
use muster_placement::Shape;
use muster_types::{Combine, Compute, Fingerprint, Numerics, WeightDType};

use super::digests::Digests;
use crate::transport::Dialer;

/// Whether to start without some of the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Wait for every worker, and refuse when an expert is nowhere.
    Complete,
    /// Wait for every worker; missing experts are assigned to workers later.
    Assigned,
    /// Wait as long, then start with the workers there are. Rows for missing experts fail with `NoOwner`.
    Degraded,
}

/// How to reach the workers and what they must be.
#[derive(Debug, Clone)]
pub struct ConnectConfig {
    /// `host:port` or `unix:/path` of every worker that is known at the start. Without any, nothing is waited for.
    pub workers: Vec<String>,
    /// This router's name in the workers' logs.
    pub router_id: String,
    /// The model.
    pub fingerprint: Fingerprint,
    /// Elements of a hidden row.
    pub hidden: usize,
    /// What activations are rounded to.
    pub compute: Compute,
    /// How the workers hold experts.
    pub experts: WeightDType,
    /// Digests that the experts' weights must have. No worker is connected before they are known.
    pub digests: Digests,
    /// Routed experts of every layer.
    pub shape: Shape,
    /// Most experts per token.
    pub top_k: u32,
    /// Most rows of one micro-batch. Every worker must take that many in one shard.
    pub max_rows: u32,
    /// How long to wait for workers at the start.
    pub connect_timeout: Duration,
    /// Deadline of a shard at its worker.
    pub shard_deadline: Duration,
    /// Whether to start without some of the experts.
    pub start: Start,
    /// Where outputs are added.
    pub combine: Combine,
    /// Whether workers of several numerics classes may compute one expert.
    pub numerics: Numerics,
    /// How long the engine thread looks for an answer before it sleeps.
    pub busy_poll: Duration,
    /// Where the engine thread adds outputs.
    pub cpu: Arc<Cpu>,
    /// How workers are reached.
    pub dialer: Dialer,
}
