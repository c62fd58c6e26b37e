//! The fields that both request types share, and what they mean.
//!
//! Defaults are the model's own (`generation_config.json`), else OpenAI's: temperature 1, top_p 1, one choice. `top_k`, `min_p`, `repetition_penalty`,
//! `ignore_eos` and `stop_token_ids` are extensions under the names other servers use. Ranges are checked by
//! [`Service`](crate::service::Service).

use std::fmt;

use muster_model::defaults::SamplingDefaults;
use muster_model::sampler::{MAX_BIAS, RawSampling};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::super::error::ApiError;
use super::json::{AtMost, Bounds, Fields, Known, Strings, Unsupported};
use crate::request::{Eos, GenerateRequest, OverContext, Prompt, Stop};

/// A request, ready to run.
#[derive(Debug)]
pub(crate) struct Asked {
    /// One per prompt, at least one.
    pub(crate) requests: Vec<GenerateRequest>,
    pub(crate) mode: Mode,
}

/// How the answer travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Whole,
    Stream(StreamUsage),
}

/// Whether a stream ends with a count of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamUsage {
    Included,
    Left,
}

/// The shared fields as they were given.
#[derive(Debug, Default)]
pub(super) struct Common {
    model: Option<String>,
    max_tokens: Option<u32>,
    n: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<u64>,
    logit_bias: Vec<(u32, f32)>,
    stop: Vec<String>,
    stop_token_ids: Vec<u32>,
    ignore_eos: Option<bool>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
    /// Padding against traffic analysis, which is not offered.
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: IgnoredAny,
}

impl Fields for Common {
    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        bounds: &Bounds,
    ) -> Result<Known, A::Error> {
        let stops = bounds.limits.stops;
        match name {
            "model" => self.model = map.next_value()?,
            "max_tokens" => self.max_tokens = map.next_value()?,
            "n" => self.n = map.next_value()?,
            "temperature" => self.temperature = map.next_value()?,
            "top_p" => self.top_p = map.next_value()?,
            "top_k" => self.top_k = map.next_value()?,
            "min_p" => self.min_p = map.next_value()?,
            "repetition_penalty" => self.repetition_penalty = map.next_value()?,
            "presence_penalty" => self.presence_penalty = map.next_value()?,
            "frequency_penalty" => self.frequency_penalty = map.next_value()?,
            // Unsigned: where a client means "any" by -1, taking it for a seed would fix what it wants random.
            "seed" => self.seed = map.next_value()?,
            "logit_bias" => self.logit_bias = map.next_value_seed(Biases)?,
            "stop" => self.stop = map.next_value_seed(Strings(stops))?,
            "stop_token_ids" => self.stop_token_ids = map.next_value_seed(AtMost::new(stops))?,
            "ignore_eos" => self.ignore_eos = map.next_value()?,
            "stream" => self.stream = map.next_value()?,
            "stream_options" => self.stream_options = map.next_value()?,
            // About bookkeeping, caching or tools that are not there: nothing depends on them.
            "user"
            | "metadata"
            | "store"
            | "service_tier"
            | "parallel_tool_calls"
            | "prompt_cache_key"
            | "prompt_cache_retention"
            | "safety_identifier" => {
                let IgnoredAny = map.next_value()?;
            }
            "tools" | "tool_choice" | "functions" | "function_call" | "modalities" | "audio"
            | "prediction" | "web_search_options" | "reasoning_effort" | "verbosity" | "suffix" | "echo" => {
                let Unsupported = map.next_value()?;
            }
            _ => return Ok(Known::No),
        }
        Ok(Known::Yes)
    }
}

impl Common {
    /// Choices per prompt.
    pub(super) fn choices(&self) -> u32 {
        self.n.unwrap_or(1)
    }

    /// The `max_tokens` field.
    pub(super) fn max_tokens(&self) -> Option<u32> {
        self.max_tokens
    }

    /// One request per prompt.
    ///
    /// # Errors
    /// 400 when the choices of all prompts together are too many, or when stream options come without a stream.
    pub(super) fn ask(
        self,
        prompts: Vec<Prompt>,
        max_tokens: Option<u32>,
        top_logprobs: Option<u32>,
        bounds: &Bounds,
    ) -> Result<Asked, ApiError> {
        let mode = self.mode()?;
        let choices = self.choices();
        let total = prompts.len() as u64 * u64::from(choices);
        let most = bounds.limits.choices;
        if total > u64::from(most) {
            let message =
                format!("{choices} for each of {} prompts; {most} in all are allowed", prompts.len());
            return Err(ApiError::field("n", message));
        }
        let (max_tokens, over_context) = match max_tokens {
            Some(asked) => (Some(asked), OverContext::Refused),
            None => (bounds.defaults.max_tokens, OverContext::Cut),
        };
        let request = |prompt| GenerateRequest {
            model: self.model.clone(),
            prompt,
            max_tokens,
            over_context,
            sampling: self.sampling(&bounds.defaults),
            seed: self.seed,
            stop: self.stop(),
            top_logprobs,
            choices,
            resume: None,
        };
        Ok(Asked { requests: prompts.into_iter().map(request).collect(), mode })
    }

    fn mode(&self) -> Result<Mode, ApiError> {
        let usage = self.stream_options.as_ref().map(|options| match options.include_usage {
            Some(true) => StreamUsage::Included,
            _ => StreamUsage::Left,
        });
        match (self.stream.unwrap_or(false), usage) {
            (true, usage) => Ok(Mode::Stream(usage.unwrap_or(StreamUsage::Left))),
            (false, None) => Ok(Mode::Whole),
            (false, Some(_)) => Err(ApiError::field("stream_options", "is only allowed with stream: true")),
        }
    }

    fn sampling(&self, defaults: &SamplingDefaults) -> RawSampling {
        let default = defaults.over(RawSampling { temperature: 1.0, ..RawSampling::default() });
        RawSampling {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
            seed: default.seed,
            bias: self.logit_bias.clone(),
        }
    }

    fn stop(&self) -> Stop {
        let eos = if self.ignore_eos == Some(true) { Eos::Ignored } else { Eos::Stops };
        Stop { strings: self.stop.clone(), token_ids: self.stop_token_ids.clone(), eos }
    }
}

/// `{"token id": bias}`.
struct Biases;

impl<'de> DeserializeSeed<'de> for Biases {
    type Value = Vec<(u32, f32)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Biases {
    type Value = Vec<(u32, f32)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of token ids and biases")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut biases = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let id = key.parse().map_err(|_| A::Error::custom(format_args!("{key:?} is not a token id")))?;
            if biases.len() == MAX_BIAS {
                return Err(A::Error::custom(format_args!("more than {MAX_BIAS} entries")));
            }
            biases.push((id, map.next_value()?));
        }
        Ok(biases)
    }
}
