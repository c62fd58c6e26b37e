//! Messages of a conversation: from clients' JSON, down to parts and calls, to the form of chat templates.
//!
//! Empty values count as absent, so that an answer, of this server or another, can be sent back as history.

use std::fmt;

use muster_text::{ChatMessage, Content, ToolCall};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::common::UNREAD;
use super::fields::Level;
use super::json::{Fields, Objects, Optional, Reading};

/// Most tools of a request, and most calls of a message.
pub(super) const TOOLS: usize = 128;
/// Most parts of a message.
const PARTS: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Message {
    role: Option<String>,
    content: Content,
    name: Option<String>,
    reasoning_content: Option<String>,
    /// Alias of `reasoning_content`.
    reasoning: Option<String>,
    tool_calls: Vec<Call>,
    tool_call_id: Option<String>,
}

impl Fields for Message {
    const LEVEL: Level = Level::Message;

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        reading: &Reading<'_>,
    ) -> Result<(), A::Error> {
        match name {
            "role" => self.role = map.next_value()?,
            "content" => self.content = map.next_value_seed(Said(reading))?,
            "name" => self.name = map.next_value()?,
            "reasoning_content" => self.reasoning_content = map.next_value()?,
            "reasoning" => self.reasoning = map.next_value()?,
            "tool_calls" => self.tool_calls = map.next_value_seed(Objects::new(TOOLS, reading))?,
            "tool_call_id" => self.tool_call_id = map.next_value()?,
            _ => return Err(A::Error::custom(UNREAD)),
        }
        Ok(())
    }
}

impl Message {
    /// The message in the form of chat templates.
    ///
    /// # Errors
    /// A text that says what is wrong with the message.
    pub(super) fn into_chat(self) -> Result<ChatMessage, String> {
        let reasoning = match (self.reasoning_content, self.reasoning) {
            (Some(one), Some(other)) if one != other => {
                return Err(
                    "reasoning and reasoning_content differ, but are two names of one field; give one".into(),
                );
            }
            (one, other) => one.or(other),
        };
        let Self { role, content, name, tool_calls, tool_call_id, .. } = self;
        let role = match role.as_deref() {
            Some("system" | "developer") => "system",
            Some("user") => "user",
            Some("assistant") => "assistant",
            Some("tool") => "tool",
            Some(other) => {
                return Err(format!(
                    "role is {other:?}; it must be \"system\", \"developer\", \"user\", \"assistant\" or \"tool\""
                ));
            }
            None => return Err("role is missing".into()),
        };
        if content == Content::Absent && tool_calls.is_empty() {
            return Err("content is missing".into());
        }
        let has_reasoning = reasoning.as_ref().is_some_and(|text| !text.is_empty());
        for (field, is_there) in
            [("tool_calls", !tool_calls.is_empty()), ("reasoning_content", has_reasoning)]
        {
            if is_there && role != "assistant" {
                return Err(format!("{field} is only allowed in a message of the role \"assistant\""));
            }
        }
        match (role == "tool", &tool_call_id) {
            (true, None) => return Err("tool_call_id is missing; it says which call is answered".into()),
            (false, Some(_)) => {
                return Err("tool_call_id is only allowed in a message of the role \"tool\"".into());
            }
            _ => {}
        }
        let tool_calls = tool_calls
            .into_iter()
            .enumerate()
            .map(|(at, call)| call.into_chat().map_err(|problem| format!("tool_calls[{at}]: {problem}")));
        let tool_calls = tool_calls.collect::<Result<_, _>>()?;
        Ok(ChatMessage { role: role.into(), content, reasoning, name, tool_calls, tool_call_id })
    }
}

/// A tool call made by the model.
#[derive(Debug, Default)]
struct Call {
    id: Option<String>,
    kind: Option<String>,
    function: Option<Called>,
}

#[derive(Debug, Default)]
struct Called {
    name: Option<String>,
    /// JSON as a string, as the model wrote it.
    arguments: Option<String>,
}

impl Fields for Call {
    const LEVEL: Level = Level::Call;

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        reading: &Reading<'_>,
    ) -> Result<(), A::Error> {
        match name {
            "id" => self.id = map.next_value()?,
            "type" => self.kind = map.next_value()?,
            "function" => self.function = map.next_value_seed(Optional::new(reading))?,
            _ => return Err(A::Error::custom(UNREAD)),
        }
        Ok(())
    }
}

impl Fields for Called {
    const LEVEL: Level = Level::Called;

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        _: &Reading<'_>,
    ) -> Result<(), A::Error> {
        match name {
            "name" => self.name = map.next_value()?,
            "arguments" => self.arguments = map.next_value()?,
            _ => return Err(A::Error::custom(UNREAD)),
        }
        Ok(())
    }
}

impl Call {
    fn into_chat(self) -> Result<ToolCall, String> {
        if let Some(kind) = self.kind.filter(|kind| kind != "function") {
            return Err(format!("the type {kind:?} is not supported; only \"function\" is"));
        }
        let Called { name, arguments } = self.function.ok_or("function is missing")?;
        let name = name.ok_or("function.name is missing")?;
        let arguments = arguments.ok_or("function.arguments is missing; it is JSON in a string")?;
        ToolCall::new(self.id, name, arguments).map_err(|error| error.to_string())
    }
}

/// A part of a message's content.
#[derive(Debug, Default)]
struct Part {
    kind: Option<String>,
    text: Option<String>,
}

impl Fields for Part {
    const LEVEL: Level = Level::Part;

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        _: &Reading<'_>,
    ) -> Result<(), A::Error> {
        match name {
            "type" => self.kind = map.next_value()?,
            "text" => self.text = map.next_value()?,
            _ => return Err(A::Error::custom(UNREAD)),
        }
        Ok(())
    }
}

impl Part {
    fn into_text(self) -> Result<String, String> {
        match (self.kind.as_deref(), self.text) {
            (Some("text"), Some(text)) => Ok(text),
            (Some("text"), None) => Err("text is missing".into()),
            (Some(other), _) => Err(format!("the type {other:?} is not supported; only \"text\" is")),
            (None, _) => Err("type is missing; only \"text\" is supported".into()),
        }
    }
}

/// The content of a message: a text, or parts of text.
struct Said<'a>(&'a Reading<'a>);

impl<'de> DeserializeSeed<'de> for Said<'_> {
    type Value = Content;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Said<'_> {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or an array of text parts")
    }

    fn visit_unit<E: Error>(self) -> Result<Content, E> {
        Ok(Content::Absent)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Content, E> {
        Ok(Content::Text(value.to_owned()))
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Content, E> {
        Ok(Content::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
        let parts = Objects::<Part>::new(PARTS, self.0).visit_seq(seq)?;
        if parts.is_empty() {
            return Err(A::Error::custom("is an empty array"));
        }
        let texts = parts.into_iter().enumerate().map(|(at, part)| {
            part.into_text().map_err(|problem| A::Error::custom(format_args!("[{at}]: {problem}")))
        });
        Ok(Content::Parts(texts.collect::<Result<_, _>>()?))
    }
}
