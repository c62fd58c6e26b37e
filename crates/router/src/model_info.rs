//! What clients may know of the model and the cluster.

use muster_model::defaults::SamplingDefaults;
use muster_types::{Combine, Compute, Fingerprint, WeightDType};

/// What clients may know of the model and the cluster.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// Name it is served under.
    pub name: String,
    /// `model_type` of its configuration.
    pub family: String,
    /// Its identity.
    pub fingerprint: Fingerprint,
    /// All parameters.
    pub parameters: u64,
    /// Parameters that take part in one token.
    pub active_parameters: u64,
    /// Decoder layers.
    pub layers: u32,
    /// Those with routed experts.
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
    /// What activations are rounded to.
    pub compute: Compute,
    /// How the weights of routed experts are held.
    pub experts: WeightDType,
    /// How the trunk's linears are held.
    pub trunk: WeightDType,
    /// How expert outputs are combined.
    pub combine: Combine,
    /// Whether prompts can be text, and answers are.
    pub has_tokenizer: bool,
    /// Whether chat requests can be served.
    pub has_chat_template: bool,
    /// Where a request over OpenAI HTTP says nothing.
    pub defaults: SamplingDefaults,
    /// Workers the router was told of; 0 when experts are in the router.
    pub workers: u32,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
}
