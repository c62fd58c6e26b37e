//! `POST /v1/completions`: parsing of requests.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Unexpected, Visitor};

use super::super::error::ApiError;
use super::common::{Asked, Common};
use super::fields::Level;
use super::json::{self, Bounds, Fields, Reading};
use super::values::count;
use crate::request::{Prompt, RequestError};

/// OpenAI's default for this endpoint.
const MAX_TOKENS: u32 = 16;

#[derive(Debug, Default)]
struct CompletionRequest {
    common: Common,
    prompt: Vec<Given>,
    logprobs: Option<u32>,
}

/// A prompt as given.
#[derive(Debug)]
enum Given {
    Text(String),
    Ids(Ids),
}

/// Token ids, kept up to the length of the context, and the count of all that were given.
#[derive(Debug, Default)]
struct Ids {
    kept: Vec<u32>,
    count: usize,
}

impl Ids {
    fn push(&mut self, id: u32, context: u32) {
        self.count += 1;
        if self.kept.len() < context as usize {
            self.kept.push(id);
        }
    }
}

impl Given {
    fn into_prompt(self, context: u32) -> Result<Prompt, ApiError> {
        match self {
            Self::Text(text) => Ok(Prompt::Text(text)),
            Self::Ids(ids) if ids.count > ids.kept.len() => {
                let tokens = format_args!("{} tokens", ids.count);
                Err(RequestError::prompt_too_long("prompt", tokens, context).into())
            }
            Self::Ids(ids) => Ok(Prompt::Tokens(ids.kept)),
        }
    }
}

/// Parses a body.
///
/// # Errors
/// 400, naming the field.
pub(crate) fn parse(body: &[u8], bounds: &Bounds) -> Result<Asked, ApiError> {
    let (asked, ignored) = json::parse::<CompletionRequest>(body, bounds)?;
    let CompletionRequest { common, prompt, logprobs } = asked;
    if prompt.is_empty() {
        return Err(ApiError::field("prompt", "is missing; give a string or an array of token ids"));
    }
    let prompts = prompt.into_iter().map(|given| given.into_prompt(bounds.context));
    let prompts = prompts.collect::<Result<_, _>>()?;
    let max_tokens = common.token_limit().0.unwrap_or(MAX_TOKENS);
    common.ask(prompts, Some(max_tokens), logprobs, bounds, ignored)
}

impl Fields for CompletionRequest {
    const LEVEL: Level = Level::Completions;

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        reading: &Reading<'_>,
    ) -> Result<(), A::Error> {
        match name {
            "prompt" => self.prompt = map.next_value_seed(Prompts(*reading.bounds))?,
            "logprobs" => self.logprobs = count(map, 0, reading.bounds.limits.top_logprobs)?,
            _ => return self.common.read(name, map, reading),
        }
        Ok(())
    }
}

/// A string, token ids, or an array of either.
struct Prompts(Bounds);

impl<'de> DeserializeSeed<'de> for Prompts {
    type Value = Vec<Given>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Given>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Prompts {
    type Value = Vec<Given>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, an array of token ids, or an array of strings or of arrays of token ids")
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<Given>, E> {
        Ok(Vec::new())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Vec<Given>, E> {
        Ok(vec![Given::Text(value.to_owned())])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Given>, A::Error> {
        let Self(Bounds { limits, context, .. }) = self;
        let mut prompts = Vec::new();
        let mut ids = Ids::default();
        while let Some(element) = seq.next_element_seed(Element { context })? {
            match element {
                Read::Id(id) => ids.push(id, context),
                Read::Prompt(prompt) => prompts.push(prompt),
            }
            if ids.count > 0 && !prompts.is_empty() {
                return Err(A::Error::custom("mixes token ids and prompts; give an array of one of them"));
            }
            if prompts.len() > limits.choices as usize {
                let most = limits.choices;
                return Err(A::Error::custom(format_args!(
                    "has more than {most} prompts (the router's max_choices)"
                )));
            }
        }
        match (prompts.is_empty(), ids.count == 0) {
            (true, true) => Err(A::Error::custom("is an empty array")),
            (true, false) => Ok(vec![Given::Ids(ids)]),
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
    Prompt(Given),
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
        Id.visit_u64(value).map(Read::Id)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Read, E> {
        Ok(Read::Prompt(Given::Text(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Read, A::Error> {
        let mut ids = Ids::default();
        while let Some(id) = seq.next_element_seed(Id)? {
            ids.push(id, self.context);
        }
        Ok(Read::Prompt(Given::Ids(ids)))
    }
}

/// A token id.
struct Id;

impl<'de> DeserializeSeed<'de> for Id {
    type Value = u32;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u32, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Id {
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token id")
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<u32, E> {
        u32::try_from(value).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
    }
}
