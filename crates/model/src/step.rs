//! A step of a model: some tokens of some sequences, through all layers.
//!
//! [`StepModel`] is what an engine drives. It knows neither the device nor the experts' owners.

use std::time::Duration;

use muster_engine::dispatch::{DispatchError, ExpertDispatch};
use muster_types::{LayerId, TokenId};

use crate::gate::GateError;
use crate::sampler::{History, Sampling};
use crate::trunk::device::DeviceError;

/// A model that runs steps, with the KV cache of its sequences.
pub trait StepModel: Send {
    /// Tokens of the vocabulary.
    fn vocab(&self) -> usize;

    /// Runs one step, in up to two lanes. A sequence's outcome is available by its lane and its place there until the
    /// next step.
    fn step(&mut self, lanes: [&[SeqInput<'_>]; 2], dispatch: &mut dyn ExpertDispatch, timeout: Duration);

    /// Logits of the last step, `[wanted, vocab]`.
    ///
    /// # Errors
    /// The reason why the sequence has none.
    ///
    /// # Panics
    /// When the last step had no such lane or sequence.
    fn logits(&self, lane: usize, sequence: usize) -> Result<&[f32], StepError>;

    /// The next token of each draw's sequence, from the last of its logits.
    ///
    /// # Errors
    /// The reason why a sequence has none.
    fn sample(&self, draws: &[Draw<'_>]) -> Result<Vec<TokenId>, StepError>;
}

/// A sequence's part of a step.
#[derive(Debug, Clone, Copy)]
pub struct SeqInput<'a> {
    /// Absolute position of `tokens[0]`.
    pub start: u32,
    /// Tokens to run; at least one, each below the vocabulary's size.
    pub tokens: &'a [TokenId],
    /// KV blocks: for one group of layers after the other a table that covers positions `0 .. start + tokens.len()`,
    /// all equally long. Entries that the group's layers do not attend to from `start` on are not read.
    pub blocks: &'a [u32],
    /// Positions whose logits are wanted.
    pub logits: WantLogits,
}

/// Positions whose logits a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantLogits {
    /// None: the prompt goes on in a later step.
    None,
    /// Logits of the last token, to sample from.
    Last,
    /// Logits of every token.
    All,
}

/// One token to pick.
#[derive(Clone, Copy)]
pub struct Draw<'a> {
    /// Lane of the sequence in the step.
    pub lane: usize,
    /// Its place in the lane.
    pub sequence: usize,
    /// Its sampling settings.
    pub sampling: &'a Sampling,
    /// The sequence's token counts.
    pub history: &'a History,
    /// The absolute position the token will have.
    pub position: u32,
}

/// A sequence that gets no logits from this step. Its KV rows of the step must be discarded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StepError {
    /// The gate had no usable choice for one of its tokens.
    #[error("layer {layer}: {source}")]
    Gate {
        /// The layer.
        layer: LayerId,
        /// The gate's error.
        source: GateError,
    },
    /// An input of the gate is NaN or infinite.
    #[error("layer {layer}: hidden values are not finite")]
    Hidden {
        /// The layer.
        layer: LayerId,
    },
    /// Its experts gave no output.
    #[error(transparent)]
    Dispatch(#[from] DispatchError),
    /// A logit is NaN or infinite.
    #[error("logits are not finite")]
    Logits,
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
