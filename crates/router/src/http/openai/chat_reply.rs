//! `chat.completion` and `chat.completion.chunk`.

use serde::Serialize;

use super::reply::{Dialect, Part, finite};
use crate::request::{FinishReason, TokenLogprob, TokenLogprobs};

/// The chat endpoint's answers.
pub(crate) struct Chat;

#[derive(Default, Serialize)]
pub(crate) struct Logprobs {
    content: Vec<Entry>,
    refusal: (),
}

#[derive(Serialize)]
struct Entry {
    #[serde(flatten)]
    chosen: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl From<TokenLogprob> for Alternative {
    fn from(token: TokenLogprob) -> Self {
        Self { token: token.text, logprob: finite(token.logprob), bytes: token.bytes }
    }
}

#[derive(Serialize)]
pub(crate) struct Choice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<&'a Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: (),
}

#[derive(Serialize)]
pub(crate) struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<&'a Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl Dialect for Chat {
    const ID: &'static str = "chatcmpl-";
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    const OPENING: bool = true;

    type Logprobs = Logprobs;
    type Choice<'a> = Choice<'a>;
    type Delta<'a> = ChunkChoice<'a>;

    fn push(logprobs: &mut Logprobs, token: TokenLogprobs, _offset: usize) {
        let top_logprobs = token.top.into_iter().map(Alternative::from).collect();
        logprobs.content.push(Entry { chosen: token.chosen.into(), top_logprobs });
    }

    fn choice<'a>(
        index: u32,
        text: &'a str,
        logprobs: Option<&'a Logprobs>,
        reason: Option<FinishReason>,
    ) -> Choice<'a> {
        let message = Message { role: "assistant", content: text, refusal: () };
        Choice { index, message, logprobs, finish_reason: reason.map(FinishReason::as_str) }
    }

    fn delta<'a>(index: u32, part: Part<'a>, logprobs: Option<&'a Logprobs>) -> ChunkChoice<'a> {
        let (delta, finish_reason) = match part {
            Part::Opening => (Delta { role: Some("assistant"), content: Some("") }, None),
            Part::Text(text) => (Delta { content: Some(text), ..Delta::default() }, None),
            Part::End(reason) => (Delta::default(), Some(reason.as_str())),
        };
        ChunkChoice { index, delta, logprobs, finish_reason }
    }
}
