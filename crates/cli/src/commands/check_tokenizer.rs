//! The tokenizer section of `muster check-model`: special tokens with their sources, and the roles that its chat
//! template renders.

use muster_text::{RoleTrial, SpecialToken, Tokenizer};
use serde::Serialize;

/// Most special tokens printed; `--json` has all.
const SHOWN: usize = 24;

/// JSON of `--json`.
#[derive(Serialize)]
pub(super) struct TokenizerReport {
    vocabulary: u32,
    /// Tokens with ids beyond `vocabulary`; prompts with one are refused.
    tokens_beyond: usize,
    special_tokens: Vec<SpecialTokenReport>,
    /// Reason why there is no usable chat template.
    chat_template_problem: Option<String>,
    /// Outcome of rendering each role with the template.
    chat_template_roles: Vec<RoleReport>,
}

#[derive(Serialize)]
struct SpecialTokenReport {
    id: u32,
    text: String,
    /// Names by which templates refer to the token.
    names: Vec<String>,
    /// File and key that define the token.
    source: String,
}

#[derive(Serialize)]
struct RoleReport {
    role: &'static str,
    /// Reason why the template refuses the role.
    problem: Option<String>,
}

impl TokenizerReport {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let role =
            |RoleTrial { role, outcome }| RoleReport { role, problem: outcome.err().map(|e| e.to_string()) };
        let roles: Vec<RoleReport> = tokenizer.try_roles().into_iter().map(role).collect();
        let of_users = roles.iter().find(|role| role.role == "user").and_then(|role| role.problem.clone());
        let special = |SpecialToken { id, text, names, source }: SpecialToken| SpecialTokenReport {
            id,
            text,
            names,
            source,
        };
        Self {
            vocabulary: tokenizer.vocab(),
            tokens_beyond: tokenizer.tokens_beyond(),
            special_tokens: tokenizer.special_tokens().iter().cloned().map(special).collect(),
            chat_template_problem: tokenizer
                .chat_template()
                .err()
                .map(|error| error.to_string())
                .or(of_users),
            chat_template_roles: roles,
        }
    }

    /// Rows of the table of facts.
    pub(super) fn facts(&self) -> Vec<(&'static str, String)> {
        let beyond = match self.tokens_beyond {
            0 => "yes".to_owned(),
            tokens => format!(
                "yes; {tokens} of its tokens have ids of {} and more, and prompts with one are refused",
                self.vocabulary
            ),
        };
        let mut facts = vec![("tokenizer", beyond)];
        // Named tokens first: some models have thousands of others.
        let (mut shown, others): (Vec<_>, Vec<_>) =
            self.special_tokens.iter().partition(|token| !token.names.is_empty());
        shown.extend(others);
        let more = shown.len().saturating_sub(SHOWN);
        facts.extend(shown.into_iter().take(SHOWN).map(|token| ("special tokens", token.in_words())));
        if more > 0 {
            facts.push(("special tokens", format!("and {more} more (--json)")));
        }
        facts.extend(self.chat_facts().into_iter().map(|words| ("chat template", words)));
        facts
    }

    fn chat_facts(&self) -> Vec<String> {
        if let Some(problem) = &self.chat_template_problem {
            return vec![format!("unusable: {problem}")];
        }
        let taken = self.chat_template_roles.iter().filter(|role| role.problem.is_none());
        let taken: Vec<&str> = taken.map(|role| role.role).collect();
        let refused =
            self.chat_template_roles.iter().filter_map(|role| Some((role.role, role.problem.as_ref()?)));
        let refused = refused.map(|(role, problem)| format!("refuses a conversation with {role}: {problem}"));
        std::iter::once(format!("yes: {}", taken.join(", "))).chain(refused).collect()
    }
}

impl SpecialTokenReport {
    fn in_words(&self) -> String {
        let Self { id, text, names, source } = self;
        let names = if names.is_empty() { String::new() } else { format!(" {}", names.join(", ")) };
        format!("{id} {text:?}{names} ({source})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_text::TokenizerFiles;

    fn facts(config: &str, vocab: u32) -> Vec<(&'static str, String)> {
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../text/tests/fixtures/mixtral/tokenizer.json");
        let json = std::fs::read(fixture).unwrap();
        let files = TokenizerFiles { config: Some(config.as_bytes()), ..TokenizerFiles::alone(&json) };
        TokenizerReport::of(&Tokenizer::from_files(&files, vocab).unwrap()).facts()
    }

    #[test]
    fn tokens_are_told_with_where_they_come_from_named_ones_first() {
        let config = r#"{"bos_token": "<s>", "image_token": "<image>", "extra_special_tokens": ["<x>"],
            "chat_template": "{{ messages[0].content }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"}"#;
        let facts = facts(config, 320);
        let words: Vec<&str> = facts.iter().map(|(_, words)| words.as_str()).collect();
        assert!(words[0].starts_with("yes; 2 of its tokens have ids of 320 and more"), "{words:?}");
        assert_eq!(
            words[1..4],
            [
                "1 \"<s>\" bos_token (tokenizer.json)",
                "320 \"<image>\" image_token (tokenizer_config.json: image_token)",
                "0 \"<pad>\" (tokenizer.json)",
            ]
        );
        assert!(words.contains(&"321 \"<x>\" (tokenizer_config.json: extra_special_tokens[0])"), "{words:?}");
        let [.., ("chat template", taken), ("chat template", system), ("chat template", tool)] = &facts[..]
        else {
            panic!("{facts:?}")
        };
        assert_eq!(taken, "yes: user, assistant");
        assert_eq!(system, "refuses a conversation with system: no system");
        assert!(tool.starts_with("refuses a conversation with tool: "), "{tool}");
    }

    #[test]
    fn a_template_that_fails_for_users_is_unusable() {
        let facts = facts(r#"{"chat_template": "{{ bos_token + messages[0].content }}"}"#, 320);
        let ("chat template", words) = facts.last().unwrap() else { panic!("{facts:?}") };
        assert!(words.starts_with("unusable: ") && words.contains("chat template"), "{words}");
    }

    #[test]
    fn of_many_special_tokens_some_are_shown() {
        let many: Vec<String> = (0..100).map(|at| format!("\"<r{at}>\"")).collect();
        let config = format!("{{\"extra_special_tokens\": [{}], \"eos_token\": \"<r99>\"}}", many.join(","));
        let facts = facts(&config, 512);
        let special: Vec<&String> =
            facts.iter().filter(|(name, _)| *name == "special tokens").map(|(_, words)| words).collect();
        assert!(
            special.len() == SHOWN + 1 && special[0].starts_with("320 \"<r99>\" eos_token"),
            "{special:?}"
        );
        assert_eq!(special[SHOWN], "and 81 more (--json)");
    }
}
