//! `POST /v1/completions`: what may be asked.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Unexpected, Visitor};

use super::super::error::ApiError;
use super::common::{Asked, Common};
use super::json::{self, AtMost, Bounds, Fields, Known};
use crate::request::Prompt;

/// OpenAI's default for this endpoint.
const MAX_TOKENS: u32 = 16;

#[derive(Debug, Default)]
struct CompletionRequest {
    common: Common,
    prompt: Vec<Prompt>,
    logprobs: Option<u32>,
    best_of: Option<u32>,
}

/// Reads a body.
///
/// # Errors
/// 400, naming the field.
pub(crate) fn parse(body: &[u8], bounds: &Bounds) -> Result<Asked, ApiError> {
    let CompletionRequest { common, prompt, logprobs, best_of } = json::parse(body, bounds)?;
    if prompt.is_empty() {
        return Err(ApiError::field("prompt", "is missing; give a string or an array of token ids"));
    }
    if best_of.is_some_and(|best_of| best_of != common.choices()) {
        return Err(ApiError::field("best_of", "other than n is not supported; leave it out"));
    }
    let most = bounds.limits.top_logprobs;
    if let Some(asked) = logprobs.filter(|&asked| asked > most) {
        return Err(ApiError::field("logprobs", format_args!("is {asked}; at most {most} are allowed")));
    }
    let max_tokens = common.max_tokens().unwrap_or(MAX_TOKENS);
    common.ask(prompt, Some(max_tokens), logprobs, bounds)
}

impl Fields for CompletionRequest {
    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        bounds: &Bounds,
    ) -> Result<Known, A::Error> {
        match name {
            "prompt" => self.prompt = map.next_value_seed(Prompts(*bounds))?,
            "logprobs" => self.logprobs = map.next_value()?,
            "best_of" => self.best_of = map.next_value()?,
            _ => return self.common.read(name, map, bounds),
        }
        Ok(Known::Yes)
    }
}

/// A string, token ids, or an array of either.
struct Prompts(Bounds);

impl<'de> DeserializeSeed<'de> for Prompts {
    type Value = Vec<Prompt>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Prompt>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Prompts {
    type Value = Vec<Prompt>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, an array of token ids, or an array of strings or of arrays of token ids")
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<Prompt>, E> {
        Ok(Vec::new())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Vec<Prompt>, E> {
        Ok(vec![Prompt::Text(value.to_owned())])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Prompt>, A::Error> {
        let Self(Bounds { limits, context, .. }) = self;
        let mut prompts = Vec::new();
        let mut ids = Vec::new();
        while let Some(element) = seq.next_element_seed(Element { context })? {
            match element {
                Read::Id(id) => ids.push(id),
                Read::Prompt(prompt) => prompts.push(prompt),
            }
            if !ids.is_empty() && !prompts.is_empty() {
                return Err(A::Error::custom("token ids and prompts are mixed"));
            }
            if ids.len() > context as usize {
                return Err(A::Error::custom(format_args!("more token ids than the context of {context}")));
            }
            if prompts.len() > limits.choices as usize {
                return Err(A::Error::custom(format_args!("more than {} prompts", limits.choices)));
            }
        }
        match (prompts.is_empty(), ids.is_empty()) {
            (true, true) => Err(A::Error::custom("an empty array")),
            (true, false) => Ok(vec![Prompt::Tokens(ids)]),
            (false, _) => Ok(prompts),
        }
    }
}

/// One element of a prompt array.
struct Element {
    context: u32,
}

enum Read {
    Id(u32),
    Prompt(Prompt),
}

impl<'de> DeserializeSeed<'de> for Element {
    type Value = Read;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Read, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Element {
    type Value = Read;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token id, a string or an array of token ids")
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Read, E> {
        let id = u32::try_from(value).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))?;
        Ok(Read::Id(id))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Read, E> {
        Ok(Read::Prompt(Prompt::Text(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Read, A::Error> {
        let ids = AtMost::new(self.context as usize).visit_seq(seq)?;
        Ok(Read::Prompt(Prompt::Tokens(ids)))
    }
}
