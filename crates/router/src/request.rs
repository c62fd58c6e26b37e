//! Requests, their events and their errors: the vocabulary between the API edges and the engine.
//!
//! Edges build a [`GenerateRequest`] from their protocol's message; [`Service`](crate::service::Service) checks it.
//! Nothing here is serialisable.

use std::fmt;
use std::time::Duration;

use muster_engine::dispatch::DispatchError;
use muster_model::sampler::RawSampling;
use muster_text::Chat;
use muster_types::{BindingName, ClassSet, Retry};

/// A request for tokens, not yet checked.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Name of the model, where the protocol has one. `None`: the served one.
    pub model: Option<String>,
    /// The prompt.
    pub prompt: Prompt,
    /// Most tokens to generate per choice. `None`: up to the end of the context.
    pub max_tokens: Option<u32>,
    /// Treatment of a `max_tokens` that exceeds the context.
    pub over_context: OverContext,
    /// Sampling settings. Their `seed` field is overruled by [`Self::seed`].
    pub sampling: RawSampling,
    /// Key of the random numbers; `None` lets the router choose.
    pub seed: Option<u64>,
    /// Conditions that end the generation.
    pub stop: Stop,
    /// Log-probabilities. `None`: none. `Some(n)`: of the chosen token and the `n` likeliest.
    pub top_logprobs: Option<u32>,
    /// Number of independent completions.
    pub choices: u32,
    /// State of a stream that broke off; `None` begins one.
    pub resume: Option<Resume>,
}

/// Client's state of a stream that broke off.
#[derive(Debug, Clone, Default)]
pub struct Resume {
    /// Received token ids, for each choice.
    pub choices: Vec<Vec<u32>>,
    /// [`Started::resume_key`] of the stream; `None` skips the comparison.
    pub key: Option<String>,
}

/// A prompt.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// Text; the tokenizer adds its begin-of-text token.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
    /// A conversation for the model's chat template.
    Chat(Chat),
}

/// Treatment of a `max_tokens` that exceeds the context.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OverContext {
    /// The request is refused.
    #[default]
    Refused,
    /// `max_tokens` is cut to the context.
    Cut,
}

/// Conditions that end generation before `max_tokens`.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Strings that end the text where they appear, without being part of it.
    pub strings: Vec<String>,
    /// Tokens that end the output when chosen, without being part of the text.
    pub token_ids: Vec<u32>,
    /// Meaning of the model's end-of-text tokens.
    pub eos: Eos,
}

/// Meaning of the model's end-of-text tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Eos {
    /// They end the output.
    #[default]
    Stops,
    /// They are tokens like any other.
    Ignored,
}

/// Facts known once a request is admitted.
#[derive(Debug, Clone)]
pub struct Started {
    /// Unique name of the request.
    pub id: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// The seed in use; choice i samples with seed + i.
    pub seed: u64,
    /// Equal on all routers that send the same stream for the same settings.
    pub resume_key: String,
    /// Expert binding of the request.
    pub binding: BindingName,
}

/// An event of a choice.
#[derive(Debug, Clone)]
pub enum Event {
    /// A token.
    Token(TokenFrame),
    /// End of the choice; its last event.
    Finished(Finished),
}

/// One generated token.
#[derive(Debug, Clone)]
pub struct TokenFrame {
    /// Number of the choice.
    pub choice: u32,
    /// Position in the output, from 0 without gaps.
    pub index: u32,
    /// The token.
    pub token_id: u32,
    /// Text that became certain with it.
    pub text: String,
    /// Log-probabilities, if requested.
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probabilities at one position, from the unmodified logits.
#[derive(Debug, Clone)]
pub struct TokenLogprobs {
    /// The chosen token's.
    pub chosen: TokenLogprob,
    /// The likeliest tokens, best first.
    pub top: Vec<TokenLogprob>,
}

/// A token, as text and bytes, with its natural log-probability.
#[derive(Debug, Clone)]
pub struct TokenLogprob {
    /// The token.
    pub token_id: u32,
    /// As text; bytes that are not UTF-8 are replaced.
    pub text: String,
    /// Raw bytes.
    pub bytes: Vec<u8>,
    /// The log-probability.
    pub logprob: f32,
}

/// The end of a choice.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Number of the choice.
    pub choice: u32,
    /// Reason of the end.
    pub reason: FinishReason,
    /// Tokens generated; an end-of-text or stop token counts, though it has no frame.
    pub output_tokens: u32,
    /// Prompt tokens of this choice whose keys and values came from the prefix cache.
    pub cached_prompt_tokens: u32,
    /// Numerics classes of the workers that contributed.
    pub classes: ClassSet,
    /// Text that was held back for a stop string that did not follow.
    pub text: String,
}

/// Reasons for the end of a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop string, a stop id or an end-of-text token.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

impl FinishReason {
    /// Spelling of the public APIs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A request that was refused or failed. Texts go to clients: no internal names or addresses.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// A field has a value that is not supported.
    #[error("{field}: {message}")]
    Invalid {
        /// Name of the field in the public APIs.
        field: &'static str,
        /// The problem and its remedy.
        message: String,
        /// Kind of the problem, which some clients act on.
        fault: Fault,
    },
    /// Another model was asked for.
    #[error("model {asked:?} is not served here; this router serves {served:?}")]
    UnknownModel {
        /// Requested name, cut to 64 characters.
        asked: String,
        /// Served name.
        served: String,
    },
    /// The router is overloaded.
    #[error("{0}; try again in a moment")]
    Overloaded(Overload),
    /// Experts are unreachable.
    #[error("experts are unavailable: {0}; try again in a moment")]
    ExpertsUnavailable(String),
    /// Experts moved to devices of another numerics class, which cannot continue this output.
    #[error(
        "workers of another numerics class compute some experts from now on, and what they give does not go on with what \
         was computed before; send the request anew"
    )]
    NumericsChanged,
    /// Experts cannot compute this request, however often it is tried.
    #[error("the experts refused this request: {0}; trying again does not help")]
    Refused(String),
    /// The model's numbers are not finite for this input.
    #[error("the model gave values that are not finite for this input")]
    NonFinite,
    /// The router is stopping.
    #[error("the router is shutting down; try another")]
    ShuttingDown,
    /// A fault in the router.
    #[error("internal error")]
    Internal,
}

/// Kind of a field's problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The value itself.
    Value,
    /// Prompt and output together exceed the model's context.
    Length,
}

/// The resource that is overloaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Overload {
    /// The queue is full.
    #[error("the queue is full ({limit} requests wait)")]
    Queue {
        /// Most requests that may wait.
        limit: usize,
    },
    /// The expected wait is too long.
    #[error("a request would wait about {expected:.1?} for a place, longer than the {limit:.1?} it may")]
    Wait {
        /// Expected wait at the current rate.
        expected: Duration,
        /// Longest wait of an admitted request.
        limit: Duration,
    },
    /// Too many requests wait while the rate is unknown.
    #[error("{waiting} requests wait, and how long a place takes is not known before the first has ended")]
    Start {
        /// Waiting requests.
        waiting: usize,
    },
    /// The text pool is full.
    #[error("too much text waits to be read")]
    Text,
}

impl Overload {
    /// Counts the refusal and returns its error.
    pub(crate) fn refuse(self) -> RequestError {
        count_refusal(self.reason());
        RequestError::Overloaded(self)
    }

    const fn reason(&self) -> &'static str {
        match self {
            Self::Queue { .. } => "queue",
            Self::Wait { .. } => "wait",
            Self::Start { .. } => "start",
            Self::Text => "text",
        }
    }
}

/// Counts a request refused for overload.
pub(crate) fn count_refusal(reason: &'static str) {
    metrics::counter!("muster_requests_refused_total", "reason" => reason).increment(1);
}

impl RequestError {
    /// A refusal of one field.
    pub fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { field, message: message.into(), fault: Fault::Value }
    }

    /// A refusal of a field that exceeds the model's context.
    pub fn too_long(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { field, message: message.into(), fault: Fault::Length }
    }

    /// A refusal of a prompt of `tokens` tokens, which may be a lower bound.
    pub(crate) fn prompt_too_long(field: &'static str, tokens: impl fmt::Display, context: u32) -> Self {
        let message = format!("has {tokens}; the model's context of {context} leaves no room for output");
        Self::too_long(field, message)
    }

    /// Whether trying again can help.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Invalid { .. } | Self::UnknownModel { .. } | Self::Refused(_) | Self::NonFinite => {
                Retry::Never
            }
            Self::Overloaded(_) | Self::ExpertsUnavailable(_) | Self::NumericsChanged => Retry::Later,
            Self::ShuttingDown | Self::Internal => Retry::Elsewhere,
        }
    }

    /// The client's view of a failed dispatch: its kind, without worker names or addresses. The retry advice is the
    /// error's own.
    pub(crate) fn from_dispatch(error: &DispatchError) -> Self {
        let what = match error {
            DispatchError::NoOwner { layer, expert } => {
                format!("layer {layer} expert {expert} has no live worker")
            }
            DispatchError::WorkerLost { .. } => "a worker was lost".into(),
            DispatchError::BadReply { .. } => "a worker gave a bad reply".into(),
            DispatchError::Refused { .. } => "a worker refused it".into(),
            DispatchError::Deadline { .. } => "a worker did not answer in time".into(),
            DispatchError::NonFinite { .. } | DispatchError::NonFiniteSum { .. } => return Self::NonFinite,
            DispatchError::Invalid(_) => return Self::Internal,
            DispatchError::Closed => return Self::ShuttingDown,
        };
        match error.retry() {
            Retry::Never => Self::Refused(what),
            // Other routers ask the same workers.
            Retry::Later | Retry::Elsewhere => Self::ExpertsUnavailable(what),
        }
    }
}

#[cfg(test)]
mod tests {
    use muster_types::{ExpertId, LayerId, WorkerId};

    use super::*;

    #[test]
    fn reasons_of_refusals_are_there_from_the_start() {
        let wait = Duration::ZERO;
        let overloads = [
            Overload::Queue { limit: 1 },
            Overload::Wait { expected: wait, limit: wait },
            Overload::Start { waiting: 1 },
            Overload::Text,
        ];
        let known = muster_telemetry::names::label_values(muster_telemetry::names::REQUESTS_REFUSED);
        let reasons: Vec<&str> = overloads.iter().map(Overload::reason).chain(["body"]).collect();
        assert_eq!(reasons, known);
    }

    #[test]
    fn advice_is_that_of_the_failed_dispatch() {
        let (layer, expert) = (LayerId::new(1, 2).unwrap(), ExpertId::new(3, 4).unwrap());
        let worker = || WorkerId::new("w0").unwrap();
        let reason = String::new;
        let refused = |retry| DispatchError::Refused { worker: worker(), reason: reason(), retry };
        let unavailable = |what: &str| RequestError::ExpertsUnavailable(what.into());
        let cases = [
            (DispatchError::NoOwner { layer, expert }, unavailable("layer 1 expert 3 has no live worker")),
            (
                DispatchError::WorkerLost { worker: worker(), reason: reason() },
                unavailable("a worker was lost"),
            ),
            (
                DispatchError::BadReply { worker: worker(), reason: reason() },
                unavailable("a worker gave a bad reply"),
            ),
            (refused(Retry::Later), unavailable("a worker refused it")),
            (refused(Retry::Elsewhere), unavailable("a worker refused it")),
            (refused(Retry::Never), RequestError::Refused("a worker refused it".into())),
            (DispatchError::Deadline { layer }, unavailable("a worker did not answer in time")),
            (DispatchError::NonFinite { layer, expert }, RequestError::NonFinite),
            (DispatchError::Closed, RequestError::ShuttingDown),
        ];
        for (error, expected) in cases {
            let told = RequestError::from_dispatch(&error);
            assert_eq!(told, expected);
            let is_for_good = error.retry() == Retry::Never;
            assert_eq!(told.retry() == Retry::Never, is_for_good, "{error}");
            assert_eq!(
                told.to_string().contains("try again"),
                !is_for_good && told != RequestError::ShuttingDown,
                "{told}"
            );
        }
        // A fault of this router alone: another router may do without it.
        assert_eq!(RequestError::from_dispatch(&DispatchError::Invalid(reason())), RequestError::Internal);
    }
}
