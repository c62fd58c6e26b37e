//! The answer of `muster plan`, before it is said. Knows no model and no words.

use serde::Serialize;

use crate::numbers::Unit;

/// What `--json` prints. Sizes are in bytes.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    /// What `muster router --model` takes for it.
    pub(super) loaded_from: String,
    pub(super) family: String,
    /// Whether the facts are those of a preset, and not of a directory.
    pub(super) preset: bool,
    pub(super) parameters: u64,
    pub(super) active_parameters: u64,
    pub(super) layers: usize,
    pub(super) moe_layers: usize,
    pub(super) experts_per_layer: u32,
    pub(super) experts_per_token: u32,
    pub(super) hidden: usize,
    pub(super) stored_bytes: u64,
    /// What the index of the directory says, when it says another size.
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
    /// Workers that are given by number.
    pub(super) given: Vec<Given>,
    /// Copies of all experts that those can hold.
    pub(super) given_copies: u64,
    /// Experts' copies for which they have no place.
    pub(super) given_missing: u64,
    /// Sizes of which any number may be added; each by itself.
    pub(super) sizes: Vec<Size>,
    pub(super) combine: String,
    pub(super) wire_dtype: String,
    pub(super) rate: u32,
    pub(super) wire: Vec<Wire>,
}

/// Workers that are there.
#[derive(Serialize)]
pub(super) struct Given {
    pub(super) memory_bytes: u64,
    pub(super) expert_memory_bytes: u64,
    pub(super) workers: u32,
    /// Experts that each can hold.
    pub(super) experts_each: u64,
    pub(super) gpu: bool,
    /// What its memory is told in.
    #[serde(skip)]
    pub(super) unit: Unit,
}

/// A size of workers, and how many are needed.
#[derive(Serialize)]
pub(super) struct Size {
    pub(super) memory_bytes: u64,
    pub(super) expert_memory_bytes: u64,
    pub(super) experts_each: u64,
    /// For 1 copy of every expert, for 2, and for as many as asked if that is more; beside the workers given.
    pub(super) workers_by_copies: Vec<(u32, u64)>,
    /// For as many copies as asked, and with more than one copy a worker more: one can be lost, and all copies come back.
    pub(super) workers: u64,
    pub(super) gpu: bool,
    /// What its memory is told in.
    #[serde(skip)]
    pub(super) unit: Unit,
}

/// What goes over the network, on average, with so many workers. Bytes of rows, without framing.
#[derive(Serialize)]
pub(super) struct Wire {
    pub(super) workers: u64,
    /// Workers that a token's row is sent to, in one layer.
    pub(super) workers_per_row: f64,
    pub(super) sent_per_layer: f64,
    pub(super) returned_per_layer: f64,
    pub(super) returned_per_layer_partial: f64,
    /// Of a token, over all layers.
    pub(super) sent_per_token: f64,
    pub(super) returned_per_token: f64,
    /// Bytes a second at the rate asked for.
    pub(super) sent_per_second: f64,
    pub(super) returned_per_second: f64,
}
