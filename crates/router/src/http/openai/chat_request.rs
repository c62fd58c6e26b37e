//! `POST /v1/chat/completions`: parsing of requests.
//!
//! Tools, calls, answers of tools and `chat_template_kwargs` go into the model's chat template, which renders them. The
//! model's answer comes back as text: calls are not parsed out of it, so a call cannot be required either. `developer`
//! is OpenAI's newer name of `system`, and is treated as such.

use std::fmt;

use muster_text::{BoundedJson, Chat};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::super::error::ApiError;
use super::chat_message::{Message, TOOLS};
use super::common::{Asked, Common};
use super::fields::Level;
use super::json::{self, Bounds, Fields, Objects, Reading};
use super::values::{count, flag};
use crate::request::Prompt;

/// Most variables of the template.
const VARIABLES: usize = 32;

#[derive(Debug, Default)]
struct ChatRequest {
    common: Common,
    messages: Vec<Message>,
    tools: Vec<Value>,
    tool_choice: ToolChoice,
    variables: Map<String, Value>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
}

/// Parses a body.
///
/// # Errors
/// 400, naming the field.
pub(crate) fn parse(body: &[u8], bounds: &Bounds) -> Result<Asked, ApiError> {
    let (asked, mut ignored) = json::parse::<ChatRequest>(body, bounds)?;
    if asked.messages.is_empty() {
        return Err(ApiError::field("messages", "is missing or empty; at least one message is needed"));
    }
    let (max_tokens, _) = asked.common.token_limit();
    let top_logprobs = match (asked.logprobs.unwrap_or(false), asked.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None) => None,
        (false, Some(0)) => {
            ignored.push("top_logprobs");
            None
        }
        (false, Some(_)) => {
            return Err(ApiError::field("top_logprobs", "is only allowed with logprobs: true"));
        }
    };
    let messages = asked.messages.into_iter().enumerate().map(|(at, message)| {
        message.into_chat().map_err(|problem| ApiError::inside("messages", &format!("[{at}]"), problem))
    });
    let messages = messages.collect::<Result<_, _>>()?;
    let tools = if asked.tool_choice == ToolChoice::None { Vec::new() } else { asked.tools };
    let chat = Chat { messages, tools, variables: asked.variables };
    asked.common.ask(vec![Prompt::Chat(chat)], max_tokens, top_logprobs, bounds, ignored)
}

impl Fields for ChatRequest {
    const LEVEL: Level = Level::Chat;

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        reading: &Reading<'_>,
    ) -> Result<(), A::Error> {
        let limits = &reading.bounds.limits;
        match name {
            "messages" => self.messages = map.next_value_seed(Objects::new(limits.messages, reading))?,
            "tools" => self.tools = map.next_value_seed(Tools)?,
            "tool_choice" => self.tool_choice = map.next_value()?,
            "chat_template_kwargs" => self.variables = map.next_value_seed(Variables)?,
            "logprobs" => self.logprobs = flag(map)?,
            "top_logprobs" => self.top_logprobs = count(map, 0, limits.top_logprobs)?,
            _ => return self.common.read(name, map, reading),
        }
        Ok(())
    }
}

/// Values of `tool_choice`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ToolChoice {
    #[default]
    Auto,
    /// Tools are withheld from the template.
    None,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Choice;
        impl<'de> Visitor<'de> for Choice {
            type Value = ToolChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\" or \"none\"")
            }

            fn visit_unit<E: Error>(self) -> Result<ToolChoice, E> {
                Ok(ToolChoice::Auto)
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<ToolChoice, E> {
                match value {
                    "auto" => Ok(ToolChoice::Auto),
                    "none" => Ok(ToolChoice::None),
                    other => Err(E::custom(format_args!(
                        "{other:?} is not supported: the model is free to call or not; \"auto\" and \"none\" are"
                    ))),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<ToolChoice, A::Error> {
                Err(A::Error::custom(
                    "a named function is not supported: the model is free to call or not; \"auto\" and \"none\" are",
                ))
            }
        }
        deserializer.deserialize_any(Choice)
    }
}

/// A list of tools, each kept as given.
struct Tools;

impl<'de> DeserializeSeed<'de> for Tools {
    type Value = Vec<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Value>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tools {
    type Value = Vec<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of at most {TOOLS} tools")
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<Value>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Value>, A::Error> {
        let mut left = BoundedJson::VALUES;
        let mut tools = Vec::new();
        while let Some(tool) = seq.next_element_seed(BoundedJson::new(&mut left))? {
            if tools.len() == TOOLS {
                return Err(A::Error::custom(format_args!("more than {TOOLS} tools")));
            }
            check_tool(&tool)
                .map_err(|problem| A::Error::custom(format_args!("[{}]: {problem}", tools.len())))?;
            tools.push(tool);
        }
        Ok(tools)
    }
}

/// Checks that a tool is a function with the keys that templates read.
fn check_tool(tool: &Value) -> Result<(), String> {
    let function = &tool["function"];
    match tool["type"].as_str() {
        Some("function") => {}
        Some(other) => return Err(format!("the type {other:?} is not supported; only \"function\" is")),
        None => return Err("has no type; only \"function\" is supported".into()),
    }
    if function["name"].as_str().is_none_or(str::is_empty) {
        return Err("function.name is missing".into());
    }
    if !matches!(function["description"], Value::Null | Value::String(_)) {
        return Err("function.description is not a string".into());
    }
    if !matches!(function["parameters"], Value::Null | Value::Object(_)) {
        return Err("function.parameters is not a JSON schema in an object".into());
    }
    Ok(())
}

/// Variables for the template.
struct Variables;

impl<'de> DeserializeSeed<'de> for Variables {
    type Value = Map<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let mut left = BoundedJson::VALUES;
        match BoundedJson::new(&mut left).deserialize(deserializer)? {
            Value::Null => Ok(Map::new()),
            Value::Object(all) if all.len() <= VARIABLES => Ok(all),
            _ => Err(D::Error::custom(format_args!("is not an object of at most {VARIABLES} variables"))),
        }
    }
}
