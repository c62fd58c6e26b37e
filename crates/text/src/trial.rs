//! Whether a tokenizer's chat template works, tried with one short conversation for every role.
//!
//! A template may well refuse a role; one that fails on a user's message, or whose text the tokenizer refuses, serves no
//! chat at all.

use crate::{Chat, ChatMessage, CivilDate, GenerationPrompt, TextError, Tokenizer, probe};

/// Outcome of the conversation of one role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleTrial {
    /// `user`, `system`, `assistant` or `tool`.
    pub role: &'static str,
    /// It was rendered and tokenized, or why not.
    pub outcome: Result<(), TextError>,
}

impl Tokenizer {
    /// Tries the chat template with every role, `user` first; nothing where there is no template that can be compiled.
    #[must_use]
    pub fn try_roles(&self) -> Vec<RoleTrial> {
        let Ok(template) = self.chat_template() else { return Vec::new() };
        // What a template takes does not depend on the date.
        let day = Some(CivilDate::from_unix_seconds(0));
        let outcome = |chat: Chat| {
            let text = template.render(&chat, GenerationPrompt::Add, day)?;
            self.encode_chat(&text).map(drop)
        };
        conversations().map(|(role, chat)| RoleTrial { role, outcome: outcome(chat) }).collect()
    }
}

fn conversations() -> impl Iterator<Item = (&'static str, Chat)> {
    let say = |role: &str| ChatMessage::new(role, "Hello");
    let said = |roles: &[&str]| Chat::from(roles.iter().map(|role| say(role)).collect::<Vec<_>>());
    let chats = [
        ("user", said(&["user"])),
        ("system", said(&["system", "user"])),
        ("assistant", said(&["user", "assistant", "user"])),
    ];
    chats.into_iter().chain(probe::chat_with_a_call().map(|chat| ("tool", chat)))
}
