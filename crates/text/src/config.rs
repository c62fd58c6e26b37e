//! `tokenizer_config.json`: the keys that serving needs, each of the type that it must have.
//!
//! [`crate::added`] merges its tokens with those of other files, and the tokenizer gives them ids. A setting that would change
//! ids or text and is not implemented is refused by name.

use serde_json::{Map, Value};

use crate::TextError;
use crate::declared::Place;

/// Name of the file, for messages.
pub(crate) const FILE: &str = "tokenizer_config.json";
/// Cap on its size and on that of the other files beside `tokenizer.json`; published ones stay below 2 MiB.
const MAX_BYTES: usize = 16 << 20;

/// The keys that serving needs.
#[derive(Debug, Default)]
pub(crate) struct TokenizerConfig {
    /// Keys about tokens, as they are written.
    pub(crate) tokens: Map<String, Value>,
    pub(crate) add_bos: Option<bool>,
    pub(crate) add_eos: Option<bool>,
    /// Special tokens spelled out in a text are text.
    pub(crate) split_special: bool,
    pub(crate) clean_up: CleanUp,
    pub(crate) templates: Templates,
}

/// Of which tokenizers the reference takes spaces out of decoded text (`clean_up_tokenization_spaces`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum CleanUp {
    /// Of none.
    #[default]
    None,
    /// Of those that are not BPE.
    NotBpe,
    /// Of all.
    All,
}

/// The sources of chat templates that a model brings.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Templates {
    /// For every conversation.
    pub(crate) default: Option<String>,
    /// For those with tools.
    pub(crate) tool_use: Option<String>,
}

impl TokenizerConfig {
    /// Reads the file's bytes.
    ///
    /// # Errors
    /// The file is too large, is not the JSON of an object, one of the keys has the wrong type, or asks for what is not
    /// done here.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, TextError> {
        let mut keys = object(FILE, bytes)?;
        let place = |key: &str| Place::new(FILE, key);
        if let Some(files) = keys.get("fast_tokenizer_files")
            && !files.as_array().is_some_and(|files| files.iter().all(|file| file == "tokenizer.json"))
        {
            return Err(place("fast_tokenizer_files").wrong(format_args!(
                "is {files}: a tokenizer for some versions of transformers only is not read; put the one that is to be used \
                 into tokenizer.json and take the key out"
            )));
        }
        let templates = match keys.get_mut("chat_template").map(Value::take) {
            None | Some(Value::Null) => Templates::default(),
            Some(value) => Templates::read(value, &place("chat_template"))?,
        };
        let clean_up = match is_true(&keys, "clean_up_tokenization_spaces") {
            false => CleanUp::None,
            true if is_true(&keys, INSISTED) => CleanUp::All,
            true => CleanUp::NotBpe,
        };
        let split_special = match keys.get("split_special_tokens") {
            None => false,
            Some(Value::Bool(split)) => *split,
            Some(other) => {
                let reason = format_args!("is {other}; write true or false, or leave it out").to_string();
                return Err(place("split_special_tokens").wrong(reason));
            }
        };
        let (add_bos, add_eos) = (flag(&keys, "add_bos_token")?, flag(&keys, "add_eos_token")?);
        keys.retain(|key, _| is_about_tokens(key));
        Ok(Self { tokens: keys, add_bos, add_eos, split_special, clean_up, templates })
    }
}

const INSISTED: &str = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output";

/// Whether a key names a token, or tokens.
fn is_about_tokens(key: &str) -> bool {
    const LISTS: [&str; 4] = [
        "added_tokens_decoder",
        "additional_special_tokens",
        "extra_special_tokens",
        "model_specific_special_tokens",
    ];
    LISTS.contains(&key) || is_a_name(key)
}

/// Whether a key may name a token of its own: `bos_token`, `image_token`.
pub(crate) fn is_a_name(key: &str) -> bool {
    key.ends_with("_token") && !["add_bos_token", "add_eos_token"].contains(&key)
}

/// The object that a file consists of.
///
/// # Errors
/// The file is too large or is none.
pub(crate) fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, TextError> {
    if bytes.len() > MAX_BYTES {
        return Err(TextError::FileTooLarge { file, bytes: bytes.len(), limit: MAX_BYTES });
    }
    serde_json::from_slice(bytes).map_err(|e| TextError::InvalidFile { file, reason: e.to_string() })
}

fn flag(keys: &Map<String, Value>, key: &str) -> Result<Option<bool>, TextError> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(Place::new(FILE, key).wrong(format_args!("is {other}; write true or false"))),
    }
}

/// Whether Python takes the value for true.
fn is_true(keys: &Map<String, Value>, key: &str) -> bool {
    keys.get(key).is_some_and(|value| !is_falsy(value))
}

/// Whether Python takes the value for false.
pub(crate) fn is_falsy(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
    }
}

impl Templates {
    /// One text, a list of names and templates, or templates by name. Those of other names are for tasks that a client
    /// cannot ask for.
    fn read(value: Value, place: &Place) -> Result<Self, TextError> {
        let wrong =
            || place.wrong("must be text, a list of objects with `name` and `template`, or texts by name");
        let mut templates = Self::default();
        match value {
            Value::String(source) => templates.default = Some(source),
            Value::Array(all) => {
                for mut named in all {
                    let mut text = |key: &str| match named.get_mut(key).map(Value::take) {
                        Some(Value::String(text)) => Ok(text),
                        _ => Err(wrong()),
                    };
                    let name = text("name")?;
                    templates.take(&name, text("template")?);
                }
            }
            Value::Object(all) => {
                for (name, source) in all {
                    let Value::String(source) = source else { return Err(wrong()) };
                    templates.take(&name, source);
                }
            }
            _ => return Err(wrong()),
        }
        Ok(templates)
    }

    fn take(&mut self, name: &str, source: String) {
        match name {
            "default" => self.default = Some(source),
            "tool_use" => self.tool_use = Some(source),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_serving_needs_is_taken_and_templates_are_one_or_named() {
        let config = TokenizerConfig::from_bytes(
            br#"{"bos_token": {"content": "<s>", "lstrip": false}, "image_token": "</s>", "unk_token": null,
                 "add_bos_token": true, "chat_template": [{"name": "tool_use", "template": "t"},
                 {"name": "default", "template": "d"}], "model_max_length": 1e30}"#,
        )
        .unwrap();
        let names: Vec<&String> = config.tokens.keys().collect();
        assert_eq!(names, ["bos_token", "image_token", "unk_token"]);
        assert_eq!((config.add_bos, config.add_eos), (Some(true), None));
        let templates = Templates { default: Some("d".into()), tool_use: Some("t".into()) };
        assert_eq!(config.templates, templates);
    }

    #[test]
    fn wrong_types_are_refused_with_the_files_name() {
        for bytes in [
            &b"[]"[..],
            b"",
            b"{\"add_bos_token\": \"yes\"}",
            b"\xff",
            b"{\"chat_template\": 3}",
            b"{\"chat_template\": [\"t\"]}",
            b"{\"chat_template\": {\"default\": 3}}",
        ] {
            let error = TokenizerConfig::from_bytes(bytes).unwrap_err().to_string();
            assert!(error.starts_with("tokenizer_config.json: "), "{error}");
        }
    }

    #[test]
    fn a_huge_file_is_refused_unread() {
        let error = TokenizerConfig::from_bytes(&vec![b' '; MAX_BYTES + 1]).unwrap_err();
        assert!(matches!(error, TextError::FileTooLarge { .. }));
    }
}
