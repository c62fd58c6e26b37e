//! Remarks on the end of an answer whose text does not show why it ended.

use crate::backend::{About, Manner};

/// An answer that has ended.
pub(crate) struct Answer<'a> {
    /// `stop` or `length`.
    pub(crate) reason: &'a str,
    pub(crate) text: &'a str,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    pub(crate) to: To,
}

/// Kind of the answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    /// A continued text.
    Text,
    /// One message.
    Message,
    /// A conversation that goes on.
    Conversation,
}

impl Answer<'_> {
    /// The remark, if any.
    pub(crate) fn remark(&self, manner: &Manner, model: &About) -> Option<String> {
        if self.text.trim().is_empty() {
            return Some(format!("[empty: {}]", self.why_empty(manner, model)));
        }
        (self.reason == "length").then(|| format!("[cut: {}]", self.why_cut(model)))
    }

    fn why_empty(&self, manner: &Manner, model: &About) -> String {
        let name = &model.model.name;
        match self.reason {
            "stop" if self.to == To::Text && model.has_chat_template => format!(
                "{name} ended the text at once, as models for chats do with a bare text; ask it with --chat"
            ),
            "stop" if !manner.stop.is_empty() => {
                format!("{name} ended the text at once, or began it with what --stop names")
            }
            "stop" => format!("{name} ended the text at once; --ignore-eos goes on"),
            _ if self.to == To::Conversation => {
                format!("the tokens of {name} have no text that can be seen")
            }
            _ => format!("the tokens of {name} have no text that can be seen; --json shows them"),
        }
    }

    fn why_cut(&self, model: &About) -> String {
        let (context, output) = (model.model.context, self.output_tokens);
        if self.prompt_tokens.saturating_add(output) < context {
            return format!("{output} tokens are all that it was to have; --max-tokens says how many");
        }
        let full = format!("the model's context of {context} tokens is full");
        match self.to {
            To::Conversation => format!("{full}; /new begins a new conversation"),
            To::Text | To::Message => full,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_the_text_does_not_show_is_told() {
        let mut model = About::default();
        (model.model.name, model.model.context, model.has_chat_template) = ("m".into(), 512, true);
        let manner = Manner::default();
        let remark = |reason, text, prompt_tokens, output_tokens, to| {
            Answer { reason, text, prompt_tokens, output_tokens, to }.remark(&manner, &model)
        };
        assert_eq!(remark("stop", "yes", 8, 2, To::Message), None);
        for (reason, text, prompt, output, to, said) in [
            ("stop", " ", 8, 1, To::Text, "[empty: m ended the text at once, as models for chats do"),
            ("stop", "", 8, 1, To::Conversation, "[empty: m ended the text at once; --ignore-eos goes on]"),
            ("length", "", 8, 4, To::Message, "have no text that can be seen; --json shows them]"),
            ("length", "", 8, 4, To::Conversation, "have no text that can be seen]"),
            (
                "length",
                "x",
                8,
                4,
                To::Conversation,
                "[cut: 4 tokens are all that it was to have; --max-tokens",
            ),
            ("length", "x", 8, 504, To::Conversation, "context of 512 tokens is full; /new begins a new"),
            ("length", "x", 8, 504, To::Text, "[cut: the model's context of 512 tokens is full]"),
        ] {
            let remark = remark(reason, text, prompt, output, to).unwrap();
            assert!(remark.contains(said), "{remark}");
        }
    }
}
