//! Detects the [`Forms`] of values that a template expects, by rendering a small conversation and searching the
//! outcome for it.
//!
//! The reference passes on its caller's values, and a caller in Python sees the outcome. A server's clients do
//! not, and send one form only: parts for text, JSON text for arguments, `null` for no content.

use serde_json::{Map, json};

use crate::TextError;
use crate::chat::{AbsentContent, Arguments, Chat, ChatMessage, Content, Forms, Parts, ToolCall};

const TOOL: &str = "muster-tool";
const FIRST: &str = "muster-first";
const SECOND: &str = "muster-second";

/// Whether parts of a content are to be a list. They are, where the template writes their texts and nothing
/// of the list itself.
pub(crate) fn parts(render: impl Fn(&Chat, Forms) -> Result<String, TextError>) -> Parts {
    let content = Content::Parts(vec![FIRST.into(), SECOND.into()]);
    let chat = Chat::from(vec![ChatMessage { content, ..ChatMessage::new("user", "") }]);
    match render(&chat, Forms::REFERENCE) {
        Ok(text) if shows_both(&text) && !text.contains("{'type'") => Parts::List,
        _ => Parts::Joined,
    }
}

/// The forms of calls, or `None` where the template writes no calls at all.
pub(crate) fn calls(
    render: impl Fn(&Chat, Forms) -> Result<String, TextError>,
) -> Option<(Arguments, AbsentContent)> {
    let reference = (Arguments::Object, AbsentContent::LeftOut);
    let Some(chat) = chat_with_a_call() else { return Some(reference) };
    let mut renders = false;
    for arguments in [Arguments::Object, Arguments::Text] {
        for absent in [AbsentContent::LeftOut, AbsentContent::None, AbsentContent::Empty] {
            let Ok(text) = render(&chat, Forms { arguments, absent, ..Forms::REFERENCE }) else { continue };
            renders = true;
            // No model was trained on a dictionary or `None` in Python's notation.
            let shows_python =
                text.contains("{'muster-first'") || (absent == AbsentContent::None && text.contains("None"));
            if shows_both(&text) && !shows_python {
                return Some((arguments, absent));
            }
        }
    }
    // A template that refuses this conversation whatever its form may still take another.
    (!renders).then_some(reference)
}

fn shows_both(text: &str) -> bool {
    text.contains(FIRST) && text.contains(SECOND)
}

/// A user's message, a call of a tool, and its answer.
pub(crate) fn chat_with_a_call() -> Option<Chat> {
    // Nine letters and digits, which some templates insist on.
    let id = || Some("muster123".to_owned());
    let call = ToolCall::new(id(), TOOL.into(), format!("{{\"{FIRST}\": \"{SECOND}\"}}")).ok()?;
    let messages = vec![
        ChatMessage::new("user", "call"),
        ChatMessage { role: "assistant".into(), tool_calls: vec![call], ..ChatMessage::default() },
        ChatMessage { name: Some(TOOL.into()), tool_call_id: id(), ..ChatMessage::new("tool", "called") },
    ];
    let function =
        json!({"name": TOOL, "description": TOOL, "parameters": {"type": "object", "properties": {}}});
    let tools = vec![json!({"type": "function", "function": function})];
    Some(Chat { messages, tools, variables: Map::new() })
}
