//! Fields that both request types share, and their defaults.
//!
//! Defaults are the model's own (`generation_config.json`), else OpenAI's: temperature 1, top_p 1, one choice. `top_k`,
//! `min_p`, `repetition_penalty`, `ignore_eos` and `stop_token_ids` are extensions under the names other servers use.
//! [`Service`](crate::service::Service) checks ranges.

use muster_model::defaults::SamplingDefaults;
use muster_model::sampler::RawSampling;
use serde::de::{Error, MapAccess};

use super::super::error::ApiError;
use super::fields::Level;
use super::ignored::Ignored;
use super::json::{Bounds, Fields, Optional, Reading};
use super::values::{Biases, Integer, Integers, Number, Strings, count, flag};
use crate::request::{Eos, GenerateRequest, OverContext, Prompt, Stop};

/// A request, ready to run.
#[derive(Debug)]
pub(crate) struct Asked {
    /// One per prompt, at least one.
    pub(crate) requests: Vec<GenerateRequest>,
    pub(crate) mode: Mode,
    /// Fields that were given and have no effect.
    pub(crate) ignored: Ignored,
    /// Name of the field that limits the tokens.
    pub(crate) token_limit: &'static str,
}

/// Form of the answer: whole or streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Whole,
    Stream(StreamUsage),
}

/// Whether a stream ends with a usage chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamUsage {
    Included,
    Left,
}

/// The shared fields as given.
#[derive(Debug, Default)]
pub(super) struct Common {
    model: Option<String>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    n: Option<u32>,
    best_of: Option<u32>,
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

#[derive(Debug, Default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl Fields for StreamOptions {
    const LEVEL: Level = Level::StreamOptions;

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        _: &Reading<'_>,
    ) -> Result<(), A::Error> {
        match name {
            "include_usage" => self.include_usage = flag(map)?,
            _ => return Err(A::Error::custom(UNREAD)),
        }
        Ok(())
    }
}

/// Error for a field of the table that no code reads; a test looks for it.
pub(super) const UNREAD: &str = "is not read here";

impl Common {
    /// Reads a field of both endpoints.
    pub(super) fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        map: &mut A,
        reading: &Reading<'_>,
    ) -> Result<(), A::Error> {
        let limits = &reading.bounds.limits;
        match name {
            "model" => self.model = map.next_value()?,
            "max_tokens" => self.max_tokens = count(map, 1, u32::MAX)?,
            "max_completion_tokens" => self.max_completion_tokens = count(map, 1, u32::MAX)?,
            "n" => self.n = count(map, 1, limits.choices)?,
            "best_of" => {
                self.best_of = count(map, 0, u32::MAX)?;
                // `best_of` equal to `n` is taken; any other is refused.
                if self.best_of.is_some() {
                    reading.ignore();
                }
            }
            "temperature" => self.temperature = map.next_value_seed(Number)?,
            "top_p" => self.top_p = map.next_value_seed(Number)?,
            "top_k" => self.top_k = top_k(map, reading)?,
            "min_p" => self.min_p = map.next_value_seed(Number)?,
            "repetition_penalty" => self.repetition_penalty = map.next_value_seed(Number)?,
            "presence_penalty" => self.presence_penalty = map.next_value_seed(Number)?,
            "frequency_penalty" => self.frequency_penalty = map.next_value_seed(Number)?,
            // The same 64 bits whether written with a sign or, as in gRPC, without.
            "seed" => self.seed = map.next_value_seed(Integer::ANY)?.map(i64::cast_unsigned),
            "logit_bias" => self.logit_bias = map.next_value_seed(Biases(limits.bias))?,
            "stop" => self.stop = map.next_value_seed(Strings(limits.stops))?,
            "stop_token_ids" => self.stop_token_ids = map.next_value_seed(Integers(limits.stops))?,
            "ignore_eos" => self.ignore_eos = flag(map)?,
            "stream" => self.stream = flag(map)?,
            "stream_options" => self.stream_options = map.next_value_seed(Optional::new(reading))?,
            _ => return Err(A::Error::custom(UNREAD)),
        }
        Ok(())
    }

    /// Most tokens to generate: the smaller of both limits, and the name of its field.
    pub(super) fn token_limit(&self) -> (Option<u32>, &'static str) {
        match (self.max_tokens, self.max_completion_tokens) {
            (Some(old), Some(new)) if old <= new => (Some(old), "max_tokens"),
            (_, Some(new)) => (Some(new), "max_completion_tokens"),
            (old, None) => (old, "max_tokens"),
        }
    }

    /// One request per prompt.
    ///
    /// # Errors
    /// 400 when the prompts have too many choices in all, when `best_of` differs from `n`, or when stream options come
    /// without a stream.
    pub(super) fn ask(
        self,
        prompts: Vec<Prompt>,
        max_tokens: Option<u32>,
        top_logprobs: Option<u32>,
        bounds: &Bounds,
        ignored: Ignored,
    ) -> Result<Asked, ApiError> {
        let mode = self.mode()?;
        let choices = self.n.unwrap_or(1);
        if self.best_of.is_some_and(|best_of| best_of != choices) {
            return Err(ApiError::field("best_of", "other than n is not supported; leave it out"));
        }
        let total = prompts.len() as u64 * u64::from(choices);
        let most = bounds.limits.choices;
        if total > u64::from(most) {
            let prompts = prompts.len();
            let message = format!(
                "is {choices} for each of {prompts} prompts, {total} choices in all; {most} are allowed (the router's \
                 max_choices)"
            );
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
        let requests = prompts.into_iter().map(request).collect();
        Ok(Asked { requests, mode, ignored, token_limit: self.token_limit().1 })
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
        let &Self { temperature, top_k, top_p, min_p, repetition_penalty, .. } = self;
        let asked =
            SamplingDefaults { temperature, top_k, top_p, min_p, repetition_penalty, max_tokens: None };
        let rest = RawSampling::default();
        asked.over(defaults.over(RawSampling {
            temperature: 1.0,
            presence_penalty: self.presence_penalty.unwrap_or(rest.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(rest.frequency_penalty),
            bias: self.logit_bias.clone(),
            ..rest
        }))
    }

    fn stop(&self) -> Stop {
        let eos = if self.ignore_eos == Some(true) { Eos::Ignored } else { Eos::Stops };
        Stop { strings: self.stop.clone(), token_ids: self.stop_token_ids.clone(), eos }
    }
}

/// Other servers write -1 for all tokens, which is the default here.
fn top_k<'de, A: MapAccess<'de>>(map: &mut A, reading: &Reading<'_>) -> Result<Option<u32>, A::Error> {
    let given = map.next_value_seed(Integer::new(-1, i64::from(u32::MAX)))?;
    if given == Some(-1) {
        reading.ignore();
    }
    Ok(given.and_then(|value| u32::try_from(value).ok()))
}
