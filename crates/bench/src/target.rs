//! The interface to a measured token generator.

use std::fmt::Display;
use std::future::Future;

/// A token generator. Clones generate concurrently.
pub trait Target: Clone + Send + 'static {
    /// One generation.
    type Tokens: Tokens;

    /// Starts a generation that ignores end-of-text tokens.
    fn generate(&mut self, request: Request)
    -> impl Future<Output = Result<Self::Tokens, BenchError>> + Send;
}

/// A running generation, which ends when dropped.
pub trait Tokens: Send {
    /// Id of the next token; `None` after the last.
    fn next(&mut self) -> impl Future<Output = Result<Option<u32>, BenchError>> + Send;
}

/// A request for tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Prompt, as token ids.
    pub prompt: Vec<u32>,
    /// Number of tokens to generate.
    pub tokens: u32,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Seed of the sampling.
    pub seed: Option<u64>,
}

/// Facts about a target's model.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// Name of the model.
    pub name: String,
    /// Size of the vocabulary.
    pub vocabulary: u32,
    /// Longest sequence, tokens.
    pub context: u32,
    /// Workers that hold its experts.
    pub workers: u32,
    /// Dtype to which activations are rounded.
    pub compute: String,
    /// Dtype of the experts' weights as held.
    pub experts: String,
    /// Dtype of the trunk's linears as held.
    pub trunk: String,
}

/// Failure of a measurement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BenchError {
    /// Bad input.
    #[error("{0}")]
    Input(String),
    /// An error at run time.
    #[error("{0}")]
    Runtime(String),
}

impl BenchError {
    pub(crate) fn runtime(error: impl Display) -> Self {
        Self::Runtime(error.to_string())
    }
}
