//! `generation_config.json`: the sampling settings of a model's authors.
//!
//! Types are checked here, ranges by the sampler. Settings that transformers follows and this build does not are listed by
//! name, to be reported.

use serde_json::Value;

use crate::config::{Config, ConfigError};
use crate::untrusted::clip;

/// Name of the file.
pub(crate) const GENERATION_FILE: &str = "generation_config.json";

/// What the file says of sampling. `None` for a field that is absent or null.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Whether tokens are drawn; `false` asks for the likeliest.
    pub do_sample: Option<bool>,
    /// Divides logits.
    pub temperature: Option<f32>,
    /// Most likely tokens that are kept; 0 keeps all, and so does the -1 that some write.
    pub top_k: Option<u32>,
    /// Probability that the kept tokens reach together.
    pub top_p: Option<f32>,
    /// Probability of a kept token, relative to the likeliest.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens that were there before.
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate at most.
    pub max_new_tokens: Option<u32>,
    /// Settings that would change answers and are not implemented, as `key` is value; and unknown keys.
    pub not_followed: Vec<String>,
}

/// Read elsewhere, or nothing that changes an answer: ids of special tokens, ways to compute the same, and what a call of
/// transformers returns. `early_stopping` and `length_penalty` matter to beams alone, which `num_beams` asks for.
const WITHOUT_EFFECT: [&str; 35] = [
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "_from_model_config",
    "_commit_hash",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_legacy_cache",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "low_memory",
    "continuous_batching_config",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "use_mtp",
    "early_stopping",
    "length_penalty",
    "trust_remote_code",
    "attn_implementation",
];

/// Keys of transformers' `GenerationConfig` that are not followed, and the number at which each changes nothing.
const NEUTRAL: [(&str, f64); 14] = [
    ("max_length", 20.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("num_beams", 1.0),
    ("num_beam_groups", 1.0),
    ("num_return_sequences", 1.0),
    ("diversity_penalty", 0.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("guidance_scale", 1.0),
];

/// Keys that are followed.
const FOLLOWED: [&str; 7] =
    ["do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"];

impl GenerationConfig {
    /// Reads the file's text.
    ///
    /// # Errors
    /// When it is no JSON object, or a field has the wrong type; see [`ConfigError`].
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let config = Config::parse(bytes)?;
        Ok(Self {
            do_sample: config.get("do_sample").map(|_| config.flag("do_sample", true)).transpose()?,
            temperature: number(&config, "temperature")?,
            top_k: top_k(&config)?,
            top_p: number(&config, "top_p")?,
            min_p: number(&config, "min_p")?,
            repetition_penalty: number(&config, "repetition_penalty")?,
            max_new_tokens: max_new_tokens(&config)?,
            not_followed: config
                .entries()
                .filter(|(key, value)| changes_answers(key, value))
                .map(|(key, value)| format!("`{}` is {}", clip(key), clip(&value.to_string())))
                .collect(),
        })
    }
}

/// A number that an f32 can hold.
fn number(config: &Config, key: &str) -> Result<Option<f32>, ConfigError> {
    let Some(value) = config.get(key) else { return Ok(None) };
    let number = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
    number.map(Some).ok_or_else(|| config.bad(key, value, "a finite number".to_owned()))
}

fn top_k(config: &Config) -> Result<Option<u32>, ConfigError> {
    if config.get("top_k").and_then(Value::as_i64) == Some(-1) {
        return Ok(Some(0));
    }
    let most = u32::MAX as usize;
    let top_k = config.optional_size("top_k", 0..=most)?;
    Ok(top_k.and_then(|top_k| u32::try_from(top_k).ok()))
}

fn max_new_tokens(config: &Config) -> Result<Option<u32>, ConfigError> {
    let most = u32::MAX as usize;
    let tokens = config.optional_size("max_new_tokens", 1..=most)?;
    Ok(tokens.and_then(|tokens| u32::try_from(tokens).ok()))
}

/// Whether transformers would answer otherwise because of this entry, as far as that can be known.
fn changes_answers(key: &str, value: &Value) -> bool {
    if FOLLOWED.contains(&key) || WITHOUT_EFFECT.contains(&key) {
        return false;
    }
    let neutral = NEUTRAL.iter().find(|(known, _)| *known == key);
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Number(number) => neutral.is_none_or(|(_, neutral)| number.as_f64() != Some(*neutral)),
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        Value::Bool(true) | Value::String(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> GenerationConfig {
        GenerationConfig::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn every_field_is_read() {
        let read = parsed(
            r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05,
                "repetition_penalty": 1.05, "max_new_tokens": 2048, "eos_token_id": [1, 2]}"#,
        );
        let expected = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            min_p: Some(0.05),
            repetition_penalty: Some(1.05),
            max_new_tokens: Some(2048),
            not_followed: Vec::new(),
        };
        assert_eq!(read, expected);
        assert_eq!(parsed("{}"), GenerationConfig::default());
        assert_eq!(parsed(r#"{"temperature": null, "top_k": null}"#), GenerationConfig::default());
        assert_eq!(parsed(r#"{"top_k": -1}"#).top_k, Some(0));
        assert_eq!(parsed(r#"{"temperature": 1}"#).temperature, Some(1.0));
    }

    #[test]
    fn wrong_types_are_named() {
        for (key, value) in [
            ("do_sample", "1"),
            ("temperature", "\"hot\""),
            ("temperature", "1e+300"),
            ("top_k", "-2"),
            ("top_k", "1.5"),
            ("top_p", "true"),
            ("min_p", "[0.1]"),
            ("repetition_penalty", "{}"),
            ("max_new_tokens", "0"),
            ("max_new_tokens", "4294967296"),
        ] {
            let error = GenerationConfig::parse(format!("{{\"{key}\": {value}}}").as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with(&format!("`{key}` is {value}; allowed: ")), "{error}");
        }
    }

    #[test]
    fn what_is_not_done_is_told_and_what_changes_nothing_is_not() {
        let read = parsed(
            r#"{"num_beams": 1, "no_repeat_ngram_size": 0, "guidance_scale": 1.0, "suppress_tokens": [], "max_length": 20,
                "renormalize_logits": false, "watermarking_config": null, "use_cache": true, "pad_token_id": 0,
                "transformers_version": "5.23.0", "output_scores": true}"#,
        );
        assert_eq!(read.not_followed, [""; 0]);
        for entry in [
            r#""no_repeat_ngram_size": 3"#,
            r#""num_beams": 4"#,
            r#""typical_p": 0.9"#,
            r#""suppress_tokens": [7]"#,
            r#""bad_words_ids": [[1, 2]]"#,
            r#""max_length": 4096"#,
            r#""min_new_tokens": 5"#,
            r#""stop_strings": "END""#,
            r#""renormalize_logits": true"#,
            r#""exponential_decay_length_penalty": [10, 1.1]"#,
            r#""chat_format": "chatml""#,
        ] {
            let told = parsed(&format!("{{{entry}}}")).not_followed;
            let (key, _) = entry.split_once(':').unwrap();
            let key = key.trim_matches('"');
            assert!(matches!(told.as_slice(), [one] if one.starts_with(&format!("`{key}` is "))), "{told:?}");
        }
    }
}
