//! `text_completion`: the same object whole and in chunks.

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::reply::{Dialect, Part, finite};
use crate::request::{FinishReason, TokenLogprob, TokenLogprobs};

/// The completions endpoint's answers.
pub(crate) struct Completion;

/// Columns with one row per token. Offsets count characters of the choice's text.
#[derive(Default, serde::Serialize)]
pub(crate) struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Alternatives>,
    text_offset: Vec<usize>,
}

/// Written as `{text: logprob}`. Tokens whose bytes are not UTF-8 can share a text: the likeliest keeps it, the others are
/// written as `token_id:ID`, as all are where there is no tokenizer.
struct Alternatives(Vec<(String, f32)>);

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (text, logprob) in &self.0 {
            map.serialize_entry(text, logprob)?;
        }
        map.end()
    }
}

impl Alternatives {
    fn new(token: TokenLogprobs) -> Self {
        let mut entries: Vec<(String, f32)> = Vec::with_capacity(token.top.len() + 1);
        let chosen =
            (!token.top.iter().any(|entry| entry.token_id == token.chosen.token_id)).then_some(token.chosen);
        for TokenLogprob { token_id, text, logprob, .. } in token.top.into_iter().chain(chosen) {
            let is_taken = text.is_empty() || entries.iter().any(|(other, _)| *other == text);
            let text = if is_taken { format!("token_id:{token_id}") } else { text };
            entries.push((text, finite(logprob)));
        }
        Self(entries)
    }
}

#[derive(serde::Serialize)]
pub(crate) struct Choice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<&'a Logprobs>,
    finish_reason: Option<&'static str>,
}

impl Dialect for Completion {
    const ID: &'static str = "cmpl-";
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";
    const OPENING: bool = false;

    type Logprobs = Logprobs;
    type Choice<'a> = Choice<'a>;
    type Delta<'a> = Choice<'a>;

    fn push(logprobs: &mut Logprobs, token: TokenLogprobs, offset: usize) {
        let TokenLogprob { token_id, text, .. } = &token.chosen;
        logprobs.tokens.push(if text.is_empty() { format!("token_id:{token_id}") } else { text.clone() });
        logprobs.token_logprobs.push(finite(token.chosen.logprob));
        logprobs.text_offset.push(offset);
        logprobs.top_logprobs.push(Alternatives::new(token));
    }

    fn choice<'a>(
        index: u32,
        text: &'a str,
        logprobs: Option<&'a Logprobs>,
        reason: Option<FinishReason>,
    ) -> Choice<'a> {
        Choice { index, text, logprobs, finish_reason: reason.map(FinishReason::as_str) }
    }

    fn delta<'a>(index: u32, part: Part<'a>, logprobs: Option<&'a Logprobs>) -> Choice<'a> {
        let (text, reason) = match part {
            Part::Opening => ("", None),
            Part::Text(text) => (text, None),
            Part::End(reason) => ("", Some(reason)),
        };
        Self::choice(index, text, logprobs, reason)
    }
}
