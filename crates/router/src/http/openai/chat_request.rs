//! `POST /v1/chat/completions`: what may be asked.
//!
//! Tools, calls, answers of tools and `chat_template_kwargs` go into the model's chat template, which decides what
//! they read like. What the model says to it comes back as text: no call is looked for in it, so a call cannot be
//! asked for either. `developer` is what OpenAI now calls `system`, and is taken for it.

use std::fmt;

use muster_text::{BoundedJson, Chat, ChatMessage, Content, ToolCall};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::super::error::ApiError;
use super::common::{Asked, Common};
use super::json::{self, AtMost, Bounds, Fields, Known, Unsupported};
use crate::request::Prompt;

/// Tools of one request, and calls of one message.
const TOOLS: usize = 128;
/// Variables for the template.
const VARIABLES: usize = 32;

#[derive(Debug, Default)]
struct ChatRequest {
    common: Common,
    messages: Vec<Message>,
    tools: Vec<Value>,
    tool_choice: ToolChoice,
    variables: Map<String, Value>,
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
    let messages = asked.messages.into_iter().enumerate().map(|(at, message)| {
        message.into_chat().map_err(|problem| ApiError::field("messages", format_args!("[{at}]: {problem}")))
    });
    let messages = messages.collect::<Result<_, _>>()?;
    let tools = if asked.tool_choice == ToolChoice::None { Vec::new() } else { asked.tools };
    let chat = Chat { messages, tools, variables: asked.variables };
    asked.common.ask(vec![Prompt::Chat(chat)], max_tokens, top_logprobs, bounds)
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
            "tools" => self.tools = map.next_value_seed(Tools)?,
            "tool_choice" => self.tool_choice = map.next_value()?,
            "chat_template_kwargs" => self.variables = map.next_value_seed(Variables)?,
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
    #[serde(default)]
    content: Said,
    name: Option<String>,
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Calls,
    tool_call_id: Option<String>,
    #[serde(default, rename = "refusal")]
    _refusal: Unsupported,
    #[serde(default, rename = "annotations")]
    _annotations: Unsupported,
    #[serde(default, rename = "audio")]
    _audio: Unsupported,
    #[serde(default, rename = "function_call")]
    _function_call: Unsupported,
}

impl Message {
    fn into_chat(self) -> Result<ChatMessage, String> {
        let Self { role, content: Said(content), name, reasoning_content, tool_calls, tool_call_id, .. } =
            self;
        if content == Content::Absent && tool_calls.0.is_empty() {
            return Err("content is missing".into());
        }
        if role != Role::Assistant {
            for (field, is_there) in
                [("tool_calls", !tool_calls.0.is_empty()), ("reasoning_content", reasoning_content.is_some())]
            {
                if is_there {
                    return Err(format!("{field} is only allowed in a message of the role \"assistant\""));
                }
            }
        }
        match (role == Role::Tool, &tool_call_id) {
            (true, None) => return Err("tool_call_id is missing; it says which call is answered".into()),
            (false, Some(_)) => {
                return Err("tool_call_id is only allowed in a message of the role \"tool\"".into());
            }
            _ => {}
        }
        let role = match role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        };
        let tool_calls = tool_calls.0.into_iter().map(Call::into_chat).collect::<Result<_, _>>()?;
        Ok(ChatMessage {
            role: role.into(),
            content,
            reasoning: reasoning_content,
            name,
            tool_calls,
            tool_call_id,
        })
    }
}

/// Calls of a message; `null` is none.
#[derive(Debug, Default)]
struct Calls(Vec<Call>);

impl<'de> Deserialize<'de> for Calls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        AtMost::new(TOOLS).deserialize(deserializer).map(Self)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    id: Option<String>,
    #[serde(default, rename = "type")]
    _kind: FunctionKind,
    #[serde(default, rename = "index")]
    _index: IgnoredAny,
    function: CalledFunction,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CalledFunction {
    name: String,
    /// JSON in a text, as the model wrote it.
    arguments: String,
}

impl Call {
    fn into_chat(self) -> Result<ToolCall, String> {
        let CalledFunction { name, arguments } = self.function;
        ToolCall::new(self.id, name, arguments).map_err(|error| format!("tool_calls: {error}"))
    }
}

/// The only kind of tool.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FunctionKind {
    #[default]
    Function,
}

/// What the model is to do with its tools.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ToolChoice {
    #[default]
    Auto,
    /// It is not told of them.
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

/// A list of tools, each as it was given.
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

/// Whether a tool is a function with what templates read of one.
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// Parts of one message.
const PARTS: usize = 1024;

#[derive(Debug, Default)]
struct Said(Content);

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum Part {
    Text { text: String },
}

impl<'de> Deserialize<'de> for Said {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SaidVisitor)
    }
}

struct SaidVisitor;

impl<'de> Visitor<'de> for SaidVisitor {
    type Value = Said;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("content: a string or an array of text parts")
    }

    fn visit_unit<E: Error>(self) -> Result<Said, E> {
        Ok(Said(Content::Absent))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Said, E> {
        Ok(Said(Content::Text(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Said, A::Error> {
        let parts = AtMost::<Part>::new(PARTS).visit_seq(seq)?;
        if parts.is_empty() {
            return Err(A::Error::custom("content is an empty array"));
        }
        Ok(Said(Content::Parts(parts.into_iter().map(|Part::Text { text }| text).collect())))
    }
}
