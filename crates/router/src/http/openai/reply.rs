//! What both endpoints' answers have in common: the envelope, usage, and how a [`Dialect`] fills in the rest.

use serde::Serialize;

use crate::request::{FinishReason, Finished, TokenLogprobs};

/// What is known when the answer begins.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    /// Unique; the dialect puts its prefix before it.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Changes when the answer to the same request may.
    pub(crate) system_fingerprint: String,
    /// Of all prompts.
    pub(crate) prompt_tokens: u64,
    /// Of all prompts.
    pub(crate) choices: u32,
}

/// Tokens in and out.
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
    /// Takes in a choice that has ended.
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
    /// `Some(None)` is `null`: a chunk before the one that counts.
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

/// What one chunk says about its choice.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part<'a> {
    /// It begins.
    Opening,
    /// More of its text.
    Text(&'a str),
    /// It has ended.
    End(FinishReason),
}

/// How one endpoint writes its answers.
pub(crate) trait Dialect: Send + 'static {
    /// What ids begin with.
    const ID: &'static str;
    /// `object` of a whole answer.
    const WHOLE: &'static str;
    /// `object` of a chunk.
    const CHUNK: &'static str;
    /// Whether a choice's first chunk says that it begins.
    const OPENING: bool;

    /// Log-probabilities of a run of tokens.
    type Logprobs: Default + Serialize + Send;
    /// A choice of a whole answer.
    type Choice<'a>: Serialize;
    /// A choice of a chunk.
    type Delta<'a>: Serialize;

    /// Appends one token, whose text begins `offset` characters into the choice's.
    fn push(logprobs: &mut Self::Logprobs, token: TokenLogprobs, offset: usize);

    /// A finished choice.
    fn choice<'a>(
        index: u32,
        text: &'a str,
        logprobs: Option<&'a Self::Logprobs>,
        reason: Option<FinishReason>,
    ) -> Self::Choice<'a>;

    /// A chunk's choice.
    fn delta<'a>(index: u32, part: Part<'a>, logprobs: Option<&'a Self::Logprobs>) -> Self::Delta<'a>;
}

/// The least log-probability written: JSON has no infinity, and this is the value OpenAI uses for it.
const FLOOR: f32 = -9999.0;

pub(super) fn finite(logprob: f32) -> f32 {
    // `max` gives the floor for NaN, too.
    logprob.max(FLOOR)
}

pub(super) fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| {
        // Only a map with keys that are not strings could fail, and there is none.
        tracing::error!(%error, "an answer could not be written");
        String::new()
    })
}
