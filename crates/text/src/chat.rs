//! A conversation and what goes with it: messages, tools, variables of the template.
//!
//! Always holds: the arguments of a [`ToolCall`] are a JSON object, and nothing here is nested deeper than
//! `MAX_DEPTH`. Knows in which forms templates take it ([`Forms`]), not which form a template wants.

use serde_json::{Map, Value, json};

use crate::TextError;
use crate::json::{BoundedJson, MAX_DEPTH};

/// Input of a template.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chat {
    /// The conversation, oldest message first.
    pub messages: Vec<ChatMessage>,
    /// What the model may call, as JSON schemas in OpenAI's form; none where it may call nothing.
    pub tools: Vec<Value>,
    /// More variables for the template, such as `enable_thinking`; they shadow special tokens.
    pub variables: Map<String, Value>,
}

impl Chat {
    /// Checks the rules that no type holds.
    ///
    /// # Errors
    /// A tool or a variable is nested too deeply, or a variable has a name that is not the caller's to set.
    pub fn check(&self) -> Result<(), TextError> {
        let tools = self.tools.iter().map(|tool| ("tools", tool));
        let variables = self.variables.iter().map(|(name, value)| (name.as_str(), value));
        if let Some((what, _)) = tools.chain(variables).find(|(_, value)| !is_within(value, MAX_DEPTH)) {
            let what = what.chars().take(64).collect();
            return Err(TextError::TooDeep { what, limit: MAX_DEPTH });
        }
        let taken = ["messages", "tools", "add_generation_prompt"];
        match self.variables.keys().find(|name| taken.contains(&name.as_str())) {
            Some(name) => Err(TextError::Reserved { name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Bytes of all texts and names, and one for every value beside them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let messages = self.messages.iter().map(ChatMessage::bytes);
        let tools = self.tools.iter().map(bytes_of);
        let variables = self.variables.iter().map(|(name, value)| name.len() + bytes_of(value));
        messages.chain(tools).chain(variables).sum()
    }

    pub(crate) fn has_parts(&self) -> bool {
        self.messages.iter().any(|message| matches!(message.content, Content::Parts(_)))
    }

    pub(crate) fn has_tool_calls(&self) -> bool {
        self.messages.iter().any(|message| !message.tool_calls.is_empty())
    }

    /// The messages as a template sees them.
    pub(crate) fn messages(&self, forms: Forms) -> Value {
        self.messages.iter().map(|message| message.to_json(forms)).collect()
    }
}

impl From<Vec<ChatMessage>> for Chat {
    fn from(messages: Vec<ChatMessage>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatMessage {
    /// Role: `system`, `user`, `assistant`, `tool`, or another that the template knows.
    pub role: String,
    /// Content.
    pub content: Content,
    /// The model's reasoning before the content.
    pub reasoning: Option<String>,
    /// Name of the speaker, or of the tool that answers.
    pub name: Option<String>,
    /// Calls that the model made.
    pub tool_calls: Vec<ToolCall>,
    /// Id of the call that a tool answers.
    pub tool_call_id: Option<String>,
}

/// Content of a message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Content {
    /// Nothing: the message is there for its calls.
    #[default]
    Absent,
    /// Text.
    Text(String),
    /// Text in parts.
    Parts(Vec<String>),
}

impl ChatMessage {
    /// A message of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Content::Text(content.into()), ..Self::default() }
    }

    /// Bytes of all its texts.
    fn bytes(&self) -> usize {
        let content = match &self.content {
            Content::Absent => 0,
            Content::Text(text) => text.len(),
            Content::Parts(parts) => parts.iter().map(String::len).sum(),
        };
        let of = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let calls: usize =
            self.tool_calls.iter().map(|call| call.name.len() + call.text.len() + of(&call.id)).sum();
        self.role.len() + content + of(&self.reasoning) + of(&self.name) + of(&self.tool_call_id) + calls
    }

    /// The reference's dictionary: keys without a value are left out, and reasoning has the names that
    /// templates read it under.
    fn to_json(&self, forms: Forms) -> Value {
        let mut message = Map::new();
        if let Some(reasoning) = &self.reasoning {
            message.insert("thinking".into(), reasoning.as_str().into());
        }
        message.insert("role".into(), self.role.as_str().into());
        match (&self.content, forms) {
            (Content::Absent, Forms { absent: AbsentContent::LeftOut, .. }) => {}
            (Content::Absent, Forms { absent: AbsentContent::None, .. }) => {
                message.insert("content".into(), Value::Null);
            }
            (Content::Absent, Forms { absent: AbsentContent::Empty, .. }) => {
                message.insert("content".into(), "".into());
            }
            (Content::Text(text), _) => {
                message.insert("content".into(), text.as_str().into());
            }
            (Content::Parts(parts), Forms { parts: Parts::Joined, .. }) => {
                message.insert("content".into(), parts.join("\n").into());
            }
            (Content::Parts(parts), Forms { parts: Parts::List, .. }) => {
                let parts = parts.iter().map(|text| json!({"type": "text", "text": text})).collect();
                message.insert("content".into(), parts);
            }
        }
        if let Some(name) = &self.name {
            message.insert("name".into(), name.as_str().into());
        }
        if !self.tool_calls.is_empty() {
            let calls = self.tool_calls.iter().map(|call| call.to_json(forms.arguments)).collect();
            message.insert("tool_calls".into(), calls);
        }
        if let Some(id) = &self.tool_call_id {
            message.insert("tool_call_id".into(), id.as_str().into());
        }
        if let Some(reasoning) = &self.reasoning {
            message.insert("reasoning_content".into(), reasoning.as_str().into());
        }
        Value::Object(message)
    }
}

/// A call of a function that the model made.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    id: Option<String>,
    name: String,
    text: String,
    arguments: Map<String, Value>,
}

impl ToolCall {
    /// `arguments` is the JSON text of an object, as OpenAI's API carries it; empty text stands for `{}`.
    ///
    /// # Errors
    /// The arguments are not the JSON of an object, or nested too deeply.
    pub fn new(id: Option<String>, name: String, arguments: String) -> Result<Self, TextError> {
        let wrong = |reason| TextError::Arguments { function: name.chars().take(64).collect(), reason };
        let text = if arguments.trim().is_empty() { "{}".to_owned() } else { arguments };
        match BoundedJson::read(&text).map_err(|e| wrong(e.to_string()))? {
            Value::Object(arguments) => Ok(Self { id, name, text, arguments }),
            _ => Err(wrong("it is not one".into())),
        }
    }

    fn to_json(&self, form: Arguments) -> Value {
        let mut call = Map::new();
        if let Some(id) = &self.id {
            call.insert("id".into(), id.as_str().into());
        }
        call.insert("type".into(), "function".into());
        let arguments = match form {
            Arguments::Object => Value::Object(self.arguments.clone()),
            Arguments::Text => self.text.as_str().into(),
        };
        call.insert("function".into(), json!({"name": self.name, "arguments": arguments}));
        Value::Object(call)
    }
}

/// The forms in which one template takes what others take differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forms {
    pub(crate) parts: Parts,
    pub(crate) arguments: Arguments,
    pub(crate) absent: AbsentContent,
}

impl Forms {
    /// The reference's own.
    pub(crate) const REFERENCE: Self =
        Self { parts: Parts::List, arguments: Arguments::Object, absent: AbsentContent::LeftOut };
}

/// Content in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parts {
    /// `[{"type": "text", "text": …}, …]`
    List,
    /// One text, with line breaks between the parts.
    Joined,
}

/// Arguments of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arguments {
    /// A dictionary.
    Object,
    /// Its JSON text.
    Text,
}

/// Content of a message that has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AbsentContent {
    /// No such key.
    LeftOut,
    /// `None`.
    None,
    /// The empty text.
    Empty,
}

fn bytes_of(value: &Value) -> usize {
    1 + match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(bytes_of).sum(),
        Value::Object(items) => items.iter().map(|(key, item)| key.len() + bytes_of(item)).sum(),
        _ => 0,
    }
}

/// Whether `value` is nested at most `depth` deep. Recurses no deeper than that.
fn is_within(value: &Value, depth: usize) -> bool {
    match value {
        Value::Array(items) => depth > 0 && items.iter().all(|item| is_within(item, depth - 1)),
        Value::Object(items) => depth > 0 && items.values().all(|item| is_within(item, depth - 1)),
        _ => true,
    }
}
