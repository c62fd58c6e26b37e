//! Result of `muster plan`. Knows no model and no texts.

use serde::Serialize;

use crate::numbers::Unit;

/// JSON of `--json`. Sizes are in bytes.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    /// Value for `muster router --model`.
    pub(super) loaded_from: String,
    pub(super) family: String,
    /// Whether the facts come from a preset; false: from a directory.
    pub(super) preset: bool,
    pub(super) parameters: u64,
    pub(super) active_parameters: u64,
    pub(super) layers: usize,
    pub(super) moe_layers: usize,
    pub(super) experts_per_layer: u32,
    pub(super) experts_per_token: u32,
    pub(super) hidden: usize,
    pub(super) stored_bytes: u64,
    /// Total size in the directory's index, if it differs.
    pub(super) indexed_bytes: Option<u64>,
    pub(super) experts_stored_as: &'static str,
    pub(super) expert_dtype: String,
    pub(super) trunk_dtype: String,
    pub(super) trunk_bytes: u64,
    pub(super) expert_bytes: u64,
    pub(super) experts: u64,
    pub(super) all_experts_bytes: u64,
    pub(super) kv_token_bytes: u64,
    pub(super) context: u64,
    pub(super) sequences: u32,
    pub(super) kv_bytes: u64,
    pub(super) router_bytes: u64,
    pub(super) replicas: u32,
    pub(super) memory_for_experts_percent: u64,
    /// Workers given with a count.
    pub(super) given: Vec<Given>,
    /// Complete copies of all experts that the given workers hold.
    pub(super) given_copies: u64,
    /// Expert replicas that the given workers have no memory for.
    pub(super) given_missing: u64,
    /// Sizes of which any number may be added; each is an alternative.
    pub(super) sizes: Vec<Size>,
    pub(super) combine: String,
    pub(super) wire_dtype: String,
    pub(super) rate: u32,
    pub(super) wire: Vec<Wire>,
}

/// Given workers of one size.
#[derive(Serialize)]
pub(super) struct Given {
    pub(super) memory_bytes: u64,
    pub(super) expert_memory_bytes: u64,
    pub(super) workers: u32,
    /// Experts that each worker holds.
    pub(super) experts_each: u64,
    pub(super) gpu: bool,
    /// Unit for printing the memory.
    #[serde(skip)]
    pub(super) unit: Unit,
}

/// A size of workers, with the number needed.
#[derive(Serialize)]
pub(super) struct Size {
    pub(super) memory_bytes: u64,
    pub(super) expert_memory_bytes: u64,
    pub(super) experts_each: u64,
    /// Workers needed beside those given, as (copies, workers): for 1 copy of every expert, for 2, and for the
    /// requested copies if more.
    pub(super) workers_by_copies: Vec<(u32, u64)>,
    /// Workers for the requested copies, plus one spare if copies > 1: after a loss all copies can be restored.
    pub(super) workers: u64,
    pub(super) gpu: bool,
    /// Unit for printing the memory.
    #[serde(skip)]
    pub(super) unit: Unit,
}

/// Average network traffic with this many workers. Bytes of rows, without framing.
#[derive(Serialize)]
pub(super) struct Wire {
    pub(super) workers: u64,
    /// Workers that receive a token's row, in one layer.
    pub(super) workers_per_row: f64,
    pub(super) sent_per_layer: f64,
    pub(super) returned_per_layer: f64,
    pub(super) returned_per_layer_partial: f64,
    /// Bytes per token, over all layers.
    pub(super) sent_per_token: f64,
    pub(super) returned_per_token: f64,
    /// Bytes per second at the requested rate.
    pub(super) sent_per_second: f64,
    pub(super) returned_per_second: f64,
}
