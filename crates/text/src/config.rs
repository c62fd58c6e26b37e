//! `tokenizer_config.json`: special tokens, the add-bos and add-eos flags, the chat template.
//!
//! Reads only what serving needs. Which ids these tokens have is the tokenizer's business.

use serde::Deserialize;

use crate::TextError;

/// Name of the file, for messages.
pub(crate) const FILE: &str = "tokenizer_config.json";
/// Cap on its size; published ones stay below 1 MiB.
const MAX_BYTES: usize = 16 << 20;

/// The texts of a model's special tokens, as its chat template sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin of sequence (`bos_token`).
    pub bos: Option<String>,
    /// End of sequence (`eos_token`).
    pub eos: Option<String>,
    /// Padding (`pad_token`).
    pub pad: Option<String>,
    /// Unknown (`unk_token`).
    pub unk: Option<String>,
    /// Between two texts (`sep_token`).
    pub sep: Option<String>,
    /// Begin of a text to classify (`cls_token`).
    pub cls: Option<String>,
    /// A blank to fill in (`mask_token`).
    pub mask: Option<String>,
}

impl SpecialTokens {
    /// Those that the model has, under the names that templates know them by.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all = [
            ("bos_token", &self.bos),
            ("eos_token", &self.eos),
            ("unk_token", &self.unk),
            ("sep_token", &self.sep),
            ("pad_token", &self.pad),
            ("cls_token", &self.cls),
            ("mask_token", &self.mask),
        ];
        all.into_iter().filter_map(|(name, token)| Some((name, token.as_deref()?)))
    }
}

/// What serving takes from the file.
#[derive(Debug, Default)]
pub(crate) struct TokenizerConfig {
    pub(crate) special: SpecialTokens,
    pub(crate) add_bos: Option<bool>,
    pub(crate) add_eos: Option<bool>,
    pub(crate) templates: Templates,
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
    /// The file is too large, is not JSON, or one of the fields has the wrong type.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, TextError> {
        if bytes.len() > MAX_BYTES {
            return Err(TextError::FileTooLarge { file: FILE, bytes: bytes.len(), limit: MAX_BYTES });
        }
        let raw: RawConfig = serde_json::from_slice(bytes)
            .map_err(|e| TextError::InvalidFile { file: FILE, reason: e.to_string() })?;
        Ok(Self {
            special: SpecialTokens {
                bos: raw.bos_token.map(RawToken::text),
                eos: raw.eos_token.map(RawToken::text),
                pad: raw.pad_token.map(RawToken::text),
                unk: raw.unk_token.map(RawToken::text),
                sep: raw.sep_token.map(RawToken::text),
                cls: raw.cls_token.map(RawToken::text),
                mask: raw.mask_token.map(RawToken::text),
            },
            add_bos: raw.add_bos_token,
            add_eos: raw.add_eos_token,
            templates: raw.chat_template.map(RawTemplate::read).unwrap_or_default(),
        })
    }
}

#[derive(Deserialize)]
struct RawConfig {
    bos_token: Option<RawToken>,
    eos_token: Option<RawToken>,
    pad_token: Option<RawToken>,
    unk_token: Option<RawToken>,
    sep_token: Option<RawToken>,
    cls_token: Option<RawToken>,
    mask_token: Option<RawToken>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    chat_template: Option<RawTemplate>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawToken {
    Text(String),
    Added { content: String },
}

impl RawToken {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Added { content: text } => text,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawTemplate {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl RawTemplate {
    /// Templates of other names are for tasks that a client cannot ask for.
    fn read(self) -> Templates {
        let mut templates = Templates::default();
        match self {
            Self::One(source) => templates.default = Some(source),
            Self::Named(all) => {
                for NamedTemplate { name, template } in all {
                    match name.as_str() {
                        "default" => templates.default = Some(template),
                        "tool_use" => templates.tool_use = Some(template),
                        _ => {}
                    }
                }
            }
        }
        templates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_strings_or_objects_and_templates_one_or_named() {
        let config = TokenizerConfig::from_bytes(
            br#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "unk_token": null,
                 "add_bos_token": true, "chat_template": [{"name": "tool_use", "template": "t"},
                 {"name": "default", "template": "d"}], "model_max_length": 1e30}"#,
        )
        .unwrap();
        assert_eq!(config.special.bos.as_deref(), Some("<s>"));
        assert_eq!(config.special.eos.as_deref(), Some("</s>"));
        assert_eq!(config.special.unk, None);
        assert_eq!((config.add_bos, config.add_eos), (Some(true), None));
        let templates = Templates { default: Some("d".into()), tool_use: Some("t".into()) };
        assert_eq!(config.templates, templates);
    }

    #[test]
    fn wrong_types_are_refused_with_the_files_name() {
        for bytes in [&b"[]"[..], b"", b"{\"bos_token\": 3}", b"{\"add_bos_token\": \"yes\"}", b"\xff"] {
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
