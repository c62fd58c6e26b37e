//! Shared parts of both endpoints' answers: the envelope, usage, and the [`Dialect`] that fills in the rest.

use serde::Serialize;

use crate::request::{FinishReason, Finished, TokenLogprobs};

/// Facts known when the answer begins.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    /// Unique; the dialect puts its prefix before it.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Changes whenever the answer to the same request may change.
    pub(crate) system_fingerprint: String,
    /// Sum over all prompts.
    pub(crate) prompt_tokens: u64,
    /// Choices of all prompts.
    pub(crate) choices: u32,
}

/// Token usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u64,
}

/// Tokens of an answer so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Count {
    completion: u64,
    cached: u64,
}

impl Count {
    /// Adds a choice that has ended.
    pub(super) fn add(&mut self, finished: &Finished) {
        self.completion += u64::from(finished.output_tokens);
        self.cached += u64::from(finished.cached_prompt_tokens);
    }

    pub(super) const fn usage(self, head: &Head) -> Usage {
        Usage {
            prompt_tokens: head.prompt_tokens,
            completion_tokens: self.completion,
            total_tokens: head.prompt_tokens + self.completion,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: self.cached },
        }
    }
}

/// An answer, or one chunk of a streamed one.
#[derive(Serialize)]
pub(super) struct Envelope<'a, C> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) system_fingerprint: &'a str,
    pub(super) choices: &'a [C],
    /// `Some(None)` is `null`: a chunk before the usage chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Option<Usage>>,
}

impl<'a, C> Envelope<'a, C> {
    pub(super) fn new(
        head: &'a Head,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<Usage>>,
    ) -> Self {
        Self {
            id: &head.id,
            object,
            created: head.created,
            model: &head.model,
            system_fingerprint: &head.system_fingerprint,
            choices,
            usage,
        }
    }
}

/// Content of a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part<'a> {
    /// Begin of the choice.
    Opening,
    /// Next text of the choice.
    Text(&'a str),
    /// End of the choice.
    End(FinishReason),
}

/// How one endpoint writes its answers.
pub(crate) trait Dialect: Send + 'static {
    /// Prefix of ids.
    const ID: &'static str;
    /// `object` of a whole answer.
    const WHOLE: &'static str;
    /// `object` of a chunk.
    const CHUNK: &'static str;
    /// Whether the first chunk of a choice announces its begin.
    const OPENING: bool;

    /// Log-probabilities of a run of tokens.
    type Logprobs: Default + Serialize + Send;
    /// A choice of a whole answer.
    type Choice<'a>: Serialize;
    /// A choice of a chunk.
    type Delta<'a>: Serialize;

    /// Appends one token whose text begins `offset` characters into the choice's text.
    fn push(logprobs: &mut Self::Logprobs, token: TokenLogprobs, offset: usize);

    /// The finished choice of a whole answer.
    fn choice<'a>(
        index: u32,
        text: &'a str,
        logprobs: Option<&'a Self::Logprobs>,
        reason: Option<FinishReason>,
    ) -> Self::Choice<'a>;

    /// The choice of a chunk.
    fn delta<'a>(index: u32, part: Part<'a>, logprobs: Option<&'a Self::Logprobs>) -> Self::Delta<'a>;
}

/// Least log-probability written: JSON has no infinity, and OpenAI uses this value instead.
const FLOOR: f32 = -9999.0;

pub(super) fn finite(logprob: f32) -> f32 {
    // `max` turns NaN into the floor, too.
    logprob.max(FLOOR)
}

pub(super) fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| {
        // Only a map with keys that are not strings could fail, and answers have none.
        tracing::error!(%error, "an answer could not be written");
        String::new()
    })
}
