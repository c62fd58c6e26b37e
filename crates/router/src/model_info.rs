//! What clients may know of the model and the cluster.

use muster_model::defaults::SamplingDefaults;
use muster_types::{Combine, Compute, Fingerprint, WeightDType};

/// What clients may know of the model and the cluster.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// Served name.
    pub name: String,
    /// `model_type` of its configuration.
    pub family: String,
    /// Identity of the checkpoint.
    pub fingerprint: Fingerprint,
    /// All parameters.
    pub parameters: u64,
    /// Parameters that take part in one token.
    pub active_parameters: u64,
    /// Decoder layers.
    pub layers: u32,
    /// Decoder layers with routed experts.
    pub moe_layers: u32,
    /// Routed experts of a MoE layer.
    pub experts_per_layer: u32,
    /// Experts per token.
    pub experts_per_token: u32,
    /// Width of a hidden row.
    pub hidden: u32,
    /// Vocabulary size.
    pub vocabulary: u32,
    /// Longest sequence served, prompt and output together.
    pub context: u32,
    /// Dtype to which activations are rounded.
    pub compute: Compute,
    /// Dtype of the routed experts' weights as held.
    pub experts: WeightDType,
    /// Dtype of the trunk's linears as held.
    pub trunk: WeightDType,
    /// Where and how expert outputs are added.
    pub combine: Combine,
    /// Whether prompts and answers can be text.
    pub has_tokenizer: bool,
    /// Whether chat requests can be served.
    pub has_chat_template: bool,
    /// Sampling defaults over OpenAI HTTP.
    pub defaults: SamplingDefaults,
    /// Workers in the router's settings; 0 when the router holds the experts.
    pub workers: u32,
    /// Load time, seconds since 1970.
    pub created: u64,
}
