//! The table of fields, with one class for each at every level of both endpoints: honoured, refused because it would
//! change the answer, or ignored and reported. `docs/openai.md` shows it; a test compares the two.

use muster_types::nearest;

/// An object of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// The body of `/v1/completions`.
    Completions,
    /// The body of `/v1/chat/completions`.
    Chat,
    /// `stream_options` of either.
    StreamOptions,
    /// `messages[]`.
    Message,
    /// `messages[].content[]`.
    Part,
    /// `messages[].tool_calls[]`.
    Call,
    /// `messages[].tool_calls[].function`.
    Called,
}

/// Treatment of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// The field takes effect.
    Honoured,
    /// The field would change the answer and is not supported. These values, written as JSON, ask for nothing: they are
    /// ignored and reported.
    Refused(&'static [&'static str]),
    /// A hint or bookkeeping: ignored and reported.
    Told,
}

/// Fields of one level.
struct Table {
    honoured: &'static [&'static str],
    refused: &'static [(&'static [&'static str], &'static [&'static str])],
    told: &'static [&'static str],
}

/// Values that ask for nothing, for fields without a default of their own.
const NOTHING: &[&str] = &["false", "\"\"", "\"none\"", "\"auto\"", "[]", "{}"];
const OFF: &[&str] = &["false"];
const ON: &[&str] = &["true"];
const ZERO: &[&str] = &["0"];
const ONE: &[&str] = &["1"];

/// Fields of both endpoints.
const SHARED: Table = Table {
    honoured: &[
        "model",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "best_of",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "logit_bias",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "stream",
        "stream_options",
        "logprobs",
    ],
    refused: &[
        (
            &["functions", "function_call", "audio", "prediction", "reasoning_effort", "suffix", "echo"],
            NOTHING,
        ),
        (&["guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"], NOTHING),
        (
            &["bad_words", "allowed_token_ids", "logits_processors", "mm_processor_kwargs", "cache_salt"],
            NOTHING,
        ),
        (&["modalities"], &["[]", "[\"text\"]"]),
        (&["response_format"], &["{\"type\":\"text\"}"]),
        (&["web_search_options", "include_stop_str_in_output", "use_beam_search"], OFF),
        (&["return_token_ids", "return_tokens_as_token_ids", "return_routed_experts"], OFF),
        (&["skip_special_tokens", "spaces_between_special_tokens", "include_reasoning"], ON),
        (&["min_tokens", "top_a", "mirostat", "xtc_probability", "dry_multiplier", "dynatemp_range"], ZERO),
        (&["length_penalty", "typical_p", "tfs_z"], ONE),
        (&["prompt_logprobs", "truncate_prompt_tokens"], &[]),
    ],
    told: &[
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "verbosity",
        "request_id",
        "priority",
        "cache_prompt",
        "timings_per_token",
    ],
};

const COMPLETIONS: Table = Table {
    honoured: &["prompt"],
    refused: &[(&["tools", "tool_choice"], NOTHING), (&["add_special_tokens"], ON)],
    told: &[],
};

const CHAT: Table = Table {
    honoured: &["messages", "tools", "tool_choice", "chat_template_kwargs", "top_logprobs"],
    refused: &[
        (&["chat_template", "documents"], NOTHING),
        (&["add_generation_prompt"], ON),
        (&["continue_final_message", "add_special_tokens"], OFF),
    ],
    told: &[],
};

const STREAM_OPTIONS: Table = Table {
    honoured: &["include_usage"],
    refused: &[],
    told: &["include_obfuscation", "continuous_usage_stats"],
};

const MESSAGE: Table = Table {
    honoured: &["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"],
    refused: &[
        (&["refusal", "audio", "function_call", "images", "attachments"], NOTHING),
        (&["prefix", "partial"], OFF),
    ],
    told: &["type", "id", "annotations", "cache_control", "provider_specific_fields"],
};

const PART: Table = Table { honoured: &["type", "text"], refused: &[], told: &["cache_control"] };

const CALL: Table = Table { honoured: &["id", "type", "function"], refused: &[], told: &["index"] };

const CALLED: Table = Table { honoured: &["name", "arguments"], refused: &[], told: &[] };

/// Names of fields in other APIs, too different to be recognised as typos.
const ELSEWHERE: &[(&str, &str)] = &[
    ("max_new_tokens", "max_tokens"),
    ("max_output_tokens", "max_tokens"),
    ("max_gen_toks", "max_tokens"),
    ("n_predict", "max_tokens"),
    ("num_predict", "max_tokens"),
    ("stop_sequences", "stop"),
    ("random_seed", "seed"),
    ("num_return_sequences", "n"),
    ("repeat_penalty", "repetition_penalty"),
];

impl Level {
    #[cfg(test)]
    pub(super) const ALL: [Self; 7] = [
        Self::Completions,
        Self::Chat,
        Self::StreamOptions,
        Self::Message,
        Self::Part,
        Self::Call,
        Self::Called,
    ];

    fn tables(self) -> &'static [&'static Table] {
        match self {
            Self::Completions => &[&COMPLETIONS, &SHARED],
            Self::Chat => &[&CHAT, &SHARED],
            Self::StreamOptions => &[&STREAM_OPTIONS],
            Self::Message => &[&MESSAGE],
            Self::Part => &[&PART],
            Self::Call => &[&CALL],
            Self::Called => &[&CALLED],
        }
    }

    /// All fields with their classes.
    pub(super) fn fields(self) -> impl Iterator<Item = (&'static str, Class)> {
        self.tables().iter().flat_map(|table| {
            let honoured = table.honoured.iter().map(|&name| (name, Class::Honoured));
            let refused = table
                .refused
                .iter()
                .flat_map(|&(names, nothing)| names.iter().map(move |&name| (name, Class::Refused(nothing))));
            let told = table.told.iter().map(|&name| (name, Class::Told));
            honoured.chain(refused).chain(told)
        })
    }

    /// The class of a field; `None` refuses it. Unknown fields are hints in a message and its parts, where clients send
    /// back other servers' answers; in a body and its options one could be a typo that changes the answer.
    pub(super) fn class(self, name: &str) -> Option<Class> {
        let known = self.fields().find(|(known, _)| *known == name).map(|(_, class)| class);
        known.or_else(|| self.takes_unknown().then_some(Class::Told))
    }

    /// Whether unknown fields are ignored and reported.
    pub(super) const fn takes_unknown(self) -> bool {
        match self {
            Self::Completions | Self::Chat | Self::StreamOptions => false,
            Self::Message | Self::Part | Self::Call | Self::Called => true,
        }
    }

    /// Suggested field for an unknown name.
    pub(super) fn meant(self, unknown: &str) -> Option<String> {
        let elsewhere = ELSEWHERE.iter().find(|(name, _)| *name == unknown).map(|(_, here)| *here);
        let near = elsewhere.or_else(|| nearest(unknown, self.fields().map(|(name, _)| name)));
        if let Some(name) = near {
            return Some(format!("did you mean {name}?"));
        }
        let (other, path) = match self {
            Self::Completions => (Self::Chat, "/v1/chat/completions"),
            Self::Chat => (Self::Completions, "/v1/completions"),
            _ => return None,
        };
        let is_there = other.fields().any(|(name, _)| name == unknown);
        is_there.then(|| format!("it is a field of {path}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn every_field_has_one_class() {
        for level in Level::ALL {
            let names: Vec<&str> = level.fields().map(|(name, _)| name).collect();
            let different: BTreeSet<&str> = names.iter().copied().collect();
            assert_eq!(names.len(), different.len(), "{level:?}");
        }
        for (name, here) in ELSEWHERE {
            assert!(Level::Chat.class(here) == Some(Class::Honoured) && Level::Chat.class(name).is_none());
        }
    }

    #[test]
    fn values_that_ask_for_nothing_are_json() {
        for (name, class) in Level::ALL.into_iter().flat_map(Level::fields) {
            let Class::Refused(nothing) = class else { continue };
            for value in nothing {
                assert!(serde_json::from_str::<serde_json::Value>(value).is_ok(), "{name}: {value}");
            }
        }
    }

    #[test]
    fn an_unknown_name_is_told_what_it_may_mean() {
        let meant = |level: Level, name| level.meant(name).unwrap_or_default();
        assert_eq!(meant(Level::Chat, "temprature"), "did you mean temperature?");
        assert_eq!(meant(Level::Completions, "max_token"), "did you mean max_tokens?");
        assert_eq!(meant(Level::Chat, "max_new_tokens"), "did you mean max_tokens?");
        assert_eq!(meant(Level::StreamOptions, "include_useage"), "did you mean include_usage?");
        assert_eq!(meant(Level::Completions, "messages"), "it is a field of /v1/chat/completions");
        assert_eq!(meant(Level::Chat, "frobnicate"), "");
    }

    /// The table as the documentation shows it.
    fn shown() -> String {
        let list = |names: &[&str]| match names {
            [] => String::new(),
            names => names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
        };
        let rows = [
            ("both", &SHARED, false),
            ("`/v1/completions`", &COMPLETIONS, false),
            ("`/v1/chat/completions`", &CHAT, false),
            ("`stream_options`", &STREAM_OPTIONS, false),
            ("`messages[]`", &MESSAGE, true),
            ("`messages[].content[]`", &PART, true),
            ("`messages[].tool_calls[]`", &CALL, true),
            ("`messages[].tool_calls[].function`", &CALLED, true),
        ];
        let mut text =
            "| where | honoured | refused by name | taken without effect and told |\n|---|---|---|---|\n"
                .to_owned();
        for (place, table, is_open) in rows {
            let refused: Vec<&str> =
                table.refused.iter().flat_map(|(names, _)| names.iter().copied()).collect();
            let told = match (list(table.told), is_open) {
                (told, false) => told,
                (told, true) if told.is_empty() => "whatever else there is".to_owned(),
                (told, true) => format!("{told}, and whatever else there is"),
            };
            let (honoured, refused) = (list(table.honoured), list(&refused));
            let _ = writeln!(text, "| {place} | {honoured} | {refused} | {told} |");
        }
        text
    }

    #[test]
    fn the_documentation_shows_the_table() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openai.md");
        let page = std::fs::read_to_string(page).unwrap();
        let section = page
            .split("<!-- fields:begin -->\n")
            .nth(1)
            .and_then(|rest| rest.split("<!-- fields:end -->").next());
        let shown = shown();
        assert_eq!(section, Some(shown.as_str()), "docs/openai.md must say:\n{shown}");
    }
}
