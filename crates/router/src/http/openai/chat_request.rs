//! `POST /v1/chat/completions`: what may be asked.
//!
//! A message's content is text, or text parts, which are joined with line breaks. `developer` is what OpenAI now
//! calls `system`, and is taken for it. A message's `name` is dropped: chat templates do not use it.

use std::fmt;

use muster_text::ChatMessage;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::super::error::ApiError;
use super::common::{Asked, Common};
use super::json::{self, AtMost, Bounds, Fields, Known, Unsupported};
use crate::request::Prompt;

#[derive(Debug, Default)]
struct ChatRequest {
    common: Common,
    messages: Vec<Message>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    response_format: Option<ResponseFormat>,
}

/// Reads a body.
///
/// # Errors
/// 400, naming the field.
pub(crate) fn parse(body: &[u8], bounds: &Bounds) -> Result<Asked, ApiError> {
    let asked: ChatRequest = json::parse(body, bounds)?;
    if asked.messages.is_empty() {
        return Err(ApiError::field("messages", "is missing or empty; at least one message is needed"));
    }
    if asked.response_format.is_some_and(|format| format.kind != "text") {
        return Err(ApiError::field("response_format", "only {\"type\": \"text\"} is supported"));
    }
    let max_tokens = match (asked.max_completion_tokens, asked.common.max_tokens()) {
        (Some(_), Some(_)) => {
            let message = "and max_tokens are given; one of them is enough";
            return Err(ApiError::field("max_completion_tokens", message));
        }
        (one, other) => one.or(other),
    };
    let top_logprobs = match (asked.logprobs.unwrap_or(false), asked.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None) => None,
        (false, Some(_)) => {
            return Err(ApiError::field("top_logprobs", "is only allowed with logprobs: true"));
        }
    };
    let messages = asked.messages.into_iter().map(Message::into_chat).collect();
    asked.common.ask(vec![Prompt::Chat(messages)], max_tokens, top_logprobs, bounds)
}

impl Fields for ChatRequest {
    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        bounds: &Bounds,
    ) -> Result<Known, A::Error> {
        match name {
            "messages" => self.messages = map.next_value_seed(AtMost::new(bounds.limits.messages))?,
            "max_completion_tokens" => self.max_completion_tokens = map.next_value()?,
            "logprobs" => self.logprobs = map.next_value()?,
            "top_logprobs" => self.top_logprobs = map.next_value()?,
            "response_format" => self.response_format = map.next_value()?,
            _ => return self.common.read(name, map, bounds),
        }
        Ok(Known::Yes)
    }
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
}

/// A message. Fields of OpenAI's answers are taken when empty, so that an answer can be sent back as history.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    role: Role,
    content: Content,
    #[serde(default, rename = "name")]
    _name: IgnoredAny,
    #[serde(default, rename = "refusal")]
    _refusal: Unsupported,
    #[serde(default, rename = "annotations")]
    _annotations: Unsupported,
    #[serde(default, rename = "audio")]
    _audio: Unsupported,
    #[serde(default, rename = "tool_calls")]
    _tool_calls: Unsupported,
    #[serde(default, rename = "function_call")]
    _function_call: Unsupported,
}

impl Message {
    fn into_chat(self) -> ChatMessage {
        let role = match self.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        ChatMessage { role: role.to_owned(), content: self.content.0 }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
}

#[derive(Debug)]
struct Content(String);

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum Part {
    Text { text: String },
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("content: a string or an array of text parts")
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Content, E> {
        Ok(Content(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let Some(Part::Text { mut text }) = seq.next_element()? else {
            return Err(A::Error::custom("content is an empty array"));
        };
        while let Some(Part::Text { text: more }) = seq.next_element()? {
            text.push('\n');
            text.push_str(&more);
        }
        Ok(Content(text))
    }
}
