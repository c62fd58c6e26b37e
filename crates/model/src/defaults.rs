//! Default sampling settings, from the model's `generation_config.json`: interpreted as in vLLM, except that
//! `do_sample: false` means greedy, as in transformers.

use std::fmt;

use muster_checkpoint::{Checkpoint, CheckpointError, GenerationConfig};

use crate::sampler::{InvalidSampling, RawSampling, Sampling};

/// Settings for the fields that a request omits. All in the ranges of [`Sampling`]; `Default` has none.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SamplingDefaults {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 keeps all tokens.
    pub top_k: Option<u32>,
    /// 1 keeps all tokens.
    pub top_p: Option<f32>,
    /// 0 keeps all tokens.
    pub min_p: Option<f32>,
    /// 1 changes nothing.
    pub repetition_penalty: Option<f32>,
    /// Most tokens to generate, within what the context leaves; at least 1.
    pub max_tokens: Option<u32>,
}

/// Unusable defaults.
#[derive(Debug, thiserror::Error)]
pub enum DefaultsError {
    /// The file cannot be read or has fields of the wrong type.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// A field is out of range.
    #[error(
        "generation_config.json: {0}; correct it there, or serve without the file's sampling defaults by \
         --generation-config ignore"
    )]
    Range(InvalidSampling),
}

/// Sampling settings of a model's files.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// Settings that are followed.
    pub defaults: SamplingDefaults,
    /// Settings that are not followed, each as written in the file.
    pub not_followed: Vec<String>,
}

impl Wanted {
    /// Reads the settings of the model's files.
    ///
    /// # Errors
    /// When the file is damaged or a field is out of range.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, DefaultsError> {
        let file = checkpoint.generation_config()?;
        let defaults = SamplingDefaults::of(&file, checkpoint.spec().vocab).map_err(DefaultsError::Range)?;
        Ok(Self { defaults, not_followed: file.not_followed })
    }
}

impl SamplingDefaults {
    fn of(file: &GenerationConfig, vocab: u32) -> Result<Self, InvalidSampling> {
        let &GenerationConfig { temperature, top_k, top_p, min_p, repetition_penalty, .. } = file;
        let max_tokens = file.max_new_tokens;
        let written = Self { temperature, top_k, top_p, min_p, repetition_penalty, max_tokens };
        // Checked as written, so that an error names the file's own field.
        Sampling::new(written.over(RawSampling::default()), vocab)?;
        let temperature = match file.do_sample {
            Some(false) => Some(0.0),
            Some(true) => temperature.or(Some(1.0)),
            None => temperature,
        };
        Ok(Self { temperature, ..written })
    }

    /// These settings, completed by those of `rest`.
    #[must_use]
    pub fn over(&self, rest: RawSampling) -> RawSampling {
        RawSampling {
            temperature: self.temperature.unwrap_or(rest.temperature),
            top_k: self.top_k.unwrap_or(rest.top_k),
            top_p: self.top_p.unwrap_or(rest.top_p),
            min_p: self.min_p.unwrap_or(rest.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(rest.repetition_penalty),
            ..rest
        }
    }
}

impl fmt::Display for SamplingDefaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |name: &str, value: Option<f32>| value.map(|value| format!("{name} {value}"));
        let count = |name: &str, value: Option<u32>| value.map(|value| format!("{name} {value}"));
        let said = [
            number("temperature", self.temperature),
            count("top_k", self.top_k),
            number("top_p", self.top_p),
            number("min_p", self.min_p),
            number("repetition_penalty", self.repetition_penalty),
            count("max_tokens", self.max_tokens),
        ];
        let said: Vec<String> = said.into_iter().flatten().collect();
        f.write_str(if said.is_empty() { "none" } else { "" })?;
        f.write_str(&said.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults(file: &GenerationConfig) -> Result<SamplingDefaults, InvalidSampling> {
        SamplingDefaults::of(file, 100)
    }

    #[test]
    fn whether_to_sample_decides_the_temperature() {
        for (do_sample, temperature, expected) in [
            (Some(false), Some(0.6), Some(0.0)),
            (Some(false), None, Some(0.0)),
            (Some(true), Some(0.6), Some(0.6)),
            (Some(true), None, Some(1.0)),
            (None, Some(0.6), Some(0.6)),
            (None, None, None),
        ] {
            let file = GenerationConfig { do_sample, temperature, ..GenerationConfig::default() };
            assert_eq!(defaults(&file).unwrap().temperature, expected, "{do_sample:?} {temperature:?}");
        }
    }

    #[test]
    fn fields_out_of_range_are_named() {
        let file = GenerationConfig::default;
        for (file, message) in [
            (GenerationConfig { temperature: Some(-1.0), ..file() }, "temperature is -1; "),
            (
                GenerationConfig { do_sample: Some(false), temperature: Some(1e9), ..file() },
                "temperature is 1000000000; ",
            ),
            (GenerationConfig { top_p: Some(0.0), ..file() }, "top_p is 0; "),
            (GenerationConfig { min_p: Some(1.5), ..file() }, "min_p is 1.5; "),
            (GenerationConfig { repetition_penalty: Some(0.0), ..file() }, "repetition_penalty is 0; "),
        ] {
            let error = DefaultsError::Range(defaults(&file).unwrap_err()).to_string();
            assert!(error.starts_with(&format!("generation_config.json: {message}")), "{error}");
            assert!(error.ends_with("--generation-config ignore"), "{error}");
        }
    }

    #[test]
    fn what_is_in_force_is_said_by_the_names_of_requests() {
        assert_eq!(SamplingDefaults::default().to_string(), "none");
        let all = SamplingDefaults {
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            min_p: Some(0.05),
            repetition_penalty: Some(1.05),
            max_tokens: Some(200),
        };
        let said =
            "temperature 0.6, top_k 20, top_p 0.95, min_p 0.05, repetition_penalty 1.05, max_tokens 200";
        assert_eq!(all.to_string(), said);
    }
}
