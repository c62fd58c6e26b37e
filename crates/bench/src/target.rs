//! Whoever is measured.

use std::fmt::Display;
use std::future::Future;

/// Generates tokens. Clones generate at the same time.
pub trait Target: Clone + Send + 'static {
    /// One generation.
    type Tokens: Tokens;

    /// Starts a generation that no end-of-text token ends.
    fn generate(&mut self, request: Request)
    -> impl Future<Output = Result<Self::Tokens, BenchError>> + Send;
}

/// A generation under way. Dropping it ends it.
pub trait Tokens: Send {
    /// The next token's id; `None` behind the last.
    fn next(&mut self) -> impl Future<Output = Result<Option<u32>, BenchError>> + Send;
}

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Ids to continue.
    pub prompt: Vec<u32>,
    /// Tokens to generate.
    pub tokens: u32,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Of the sampling.
    pub seed: Option<u64>,
}

/// What a target says of its model.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// Its name.
    pub name: String,
    /// Ids there are.
    pub vocabulary: u32,
    /// Tokens of the longest sequence.
    pub context: u32,
    /// Workers that hold its experts.
    pub workers: u32,
    /// What activations are rounded to.
    pub compute: String,
    /// How experts are held.
    pub experts: String,
    /// How the trunk's linears are held.
    pub trunk: String,
}

/// Why nothing was measured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BenchError {
    /// What was asked for cannot be.
    #[error("{0}")]
    Input(String),
    /// It could be, but did not work out.
    #[error("{0}")]
    Runtime(String),
}

impl BenchError {
    pub(crate) fn runtime(error: impl Display) -> Self {
        Self::Runtime(error.to_string())
    }
}
