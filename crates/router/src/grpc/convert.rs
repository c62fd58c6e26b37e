//! Conversions between messages and the router's own types. Absent fields get the defaults of the `.proto` comments; a
//! missing field without a default is an error that names it.

use muster_model::defaults::SamplingDefaults;
use muster_model::sampler::RawSampling;
use muster_proto::v1;
use muster_text::ChatMessage;
use muster_types::Limits;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::model_info::ModelInfo;
use crate::request::{
    Eos, Event, FinishReason, Finished, GenerateRequest, OverContext, Prompt, RequestError, Resume, Started,
    Stop, TokenFrame, TokenLogprob,
};
use crate::service::check_bias;

/// Advised delay before a client's retry.
const RETRY_AFTER_MS: u32 = 1000;

/// Characters of a role that an error quotes.
const QUOTED: usize = 32;

/// The request of a message.
///
/// # Errors
/// When no prompt is set, a message has an unknown role, or there are too many biases. The service checks everything
/// else.
pub(super) fn request(asked: v1::GenerateRequest, limits: &Limits) -> Result<GenerateRequest, RequestError> {
    let v1::GenerateRequest {
        model,
        prompt,
        max_tokens,
        sampling,
        stop,
        top_logprobs,
        choices,
        resume_from,
        cut_to_context,
    } = asked;
    let sampling = sampling.unwrap_or_default();
    let seed = sampling.seed;
    Ok(GenerateRequest {
        model: Some(model).filter(|name| !name.is_empty()),
        prompt: self::prompt(prompt)?,
        max_tokens,
        over_context: if cut_to_context { OverContext::Cut } else { OverContext::Refused },
        sampling: self::sampling(sampling, limits)?,
        seed,
        stop: stop.map(self::stop).unwrap_or_default(),
        top_logprobs,
        choices: choices.unwrap_or(1),
        resume: resume_from.map(resume),
    })
}

fn resume(asked: v1::Resume) -> Resume {
    let choices = asked.choices.into_iter().map(|tokens| tokens.ids).collect();
    Resume { choices, key: asked.key }
}

fn prompt(prompt: Option<v1::generate_request::Prompt>) -> Result<Prompt, RequestError> {
    use v1::generate_request::Prompt as Asked;
    match prompt {
        None => Err(RequestError::invalid("prompt", "is absent; set text, tokens or chat")),
        Some(Asked::Text(text)) => Ok(Prompt::Text(text)),
        Some(Asked::Tokens(tokens)) => Ok(Prompt::Tokens(tokens.ids)),
        Some(Asked::Chat(chat)) => {
            let messages = chat.messages.into_iter().map(message).collect::<Result<Vec<_>, _>>()?;
            Ok(Prompt::Chat(messages.into()))
        }
    }
}

fn message(message: v1::ChatMessage) -> Result<ChatMessage, RequestError> {
    let v1::ChatMessage { role, content } = message;
    if !matches!(role.as_str(), "system" | "user" | "assistant") {
        let role: String = role.chars().take(QUOTED).collect();
        let message = format!("has the role {role:?}; it must be \"system\", \"user\" or \"assistant\"");
        return Err(RequestError::invalid("chat.messages", message));
    }
    Ok(ChatMessage::new(role, content))
}

fn sampling(asked: v1::Sampling, limits: &Limits) -> Result<RawSampling, RequestError> {
    let default = RawSampling::default();
    // Checked before sorting, which a huge map would make slow.
    check_bias(asked.logit_bias.len(), limits)?;
    let mut bias: Vec<(u32, f32)> = asked.logit_bias.into_iter().collect();
    // Sorted, because a map's order is random and the first error should always name the same id.
    bias.sort_unstable_by_key(|&(id, _)| id);
    Ok(RawSampling {
        temperature: asked.temperature.unwrap_or(default.temperature),
        top_k: asked.top_k.unwrap_or(default.top_k),
        top_p: asked.top_p.unwrap_or(default.top_p),
        min_p: asked.min_p.unwrap_or(default.min_p),
        repetition_penalty: asked.repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: asked.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: asked.frequency_penalty.unwrap_or(default.frequency_penalty),
        seed: default.seed,
        bias,
    })
}

fn stop(asked: v1::Stop) -> Stop {
    let eos = if asked.ignore_eos { Eos::Ignored } else { Eos::Stops };
    Stop { strings: asked.strings, token_ids: asked.token_ids, eos }
}

/// The first event of a stream.
pub(super) fn started(started: &Started, model: &ModelInfo) -> v1::GenerateEvent {
    wrap(v1::generate_event::Event::Started(v1::Started {
        request_id: started.id.clone(),
        model: model.name.clone(),
        prompt_tokens: started.prompt_tokens,
        seed: started.seed,
        combine: model.combine.to_string(),
        resume_key: started.resume_key.clone(),
        numerics: started.binding.to_string(),
    }))
}

/// Any later one.
pub(super) fn event(event: Event) -> v1::GenerateEvent {
    wrap(match event {
        Event::Token(frame) => v1::generate_event::Event::Token(token(frame)),
        Event::Finished(finished) => v1::generate_event::Event::Finished(self::finished(finished)),
    })
}

fn wrap(event: v1::generate_event::Event) -> v1::GenerateEvent {
    v1::GenerateEvent { event: Some(event) }
}

fn token(frame: TokenFrame) -> v1::TokenFrame {
    let logprob = frame.logprobs.as_ref().map(|logprobs| logprobs.chosen.logprob);
    let top = frame.logprobs.map(|logprobs| logprobs.top).unwrap_or_default();
    v1::TokenFrame {
        choice: frame.choice,
        index: frame.index,
        token_id: frame.token_id,
        text: frame.text,
        logprob,
        top: top.into_iter().map(alternative).collect(),
    }
}

fn alternative(token: TokenLogprob) -> v1::TokenLogprob {
    v1::TokenLogprob { token_id: token.token_id, logprob: token.logprob, text: token.text }
}

fn finished(finished: Finished) -> v1::Finished {
    let reason = match finished.reason {
        FinishReason::Stop => v1::finished::Reason::Stop,
        FinishReason::Length => v1::finished::Reason::Length,
    };
    v1::Finished {
        choice: finished.choice,
        reason: reason.into(),
        output_tokens: finished.output_tokens,
        text: finished.text,
        cached_prompt_tokens: finished.cached_prompt_tokens,
        numerics: finished.classes.iter().map(|class| class.to_string()).collect(),
    }
}

/// The model served.
pub(super) fn model(model: &ModelInfo) -> v1::Model {
    v1::Model {
        name: model.name.clone(),
        family: model.family.clone(),
        fingerprint: model.fingerprint.to_string(),
        parameters: model.parameters,
        active_parameters: model.active_parameters,
        layers: model.layers,
        moe_layers: model.moe_layers,
        experts_per_layer: model.experts_per_layer,
        experts_per_token: model.experts_per_token,
        hidden: model.hidden,
        vocabulary: model.vocabulary,
        context: model.context,
        compute: model.compute.to_string(),
        has_tokenizer: model.has_tokenizer,
        has_chat_template: model.has_chat_template,
        workers: model.workers,
        expert_dtype: model.experts.to_string(),
        trunk_dtype: model.trunk.to_string(),
        default_sampling: Some(default_sampling(&model.defaults)),
        default_max_tokens: model.defaults.max_tokens,
    }
}

fn default_sampling(defaults: &SamplingDefaults) -> v1::Sampling {
    let &SamplingDefaults { temperature, top_k, top_p, min_p, repetition_penalty, max_tokens: _ } = defaults;
    v1::Sampling { temperature, top_k, top_p, min_p, repetition_penalty, ..v1::Sampling::default() }
}

/// gRPC status of a failure. Transient ones carry `retry-after-ms`, and `grpc-retry-pushback-ms`, which gRPC libraries
/// with a retry policy obey by themselves.
///
/// Values that are not finite and rows that experts refuse are FAILED_PRECONDITION: the request is well-formed, but
/// with this model it cannot succeed, however often it is tried.
pub(super) fn status(error: &RequestError) -> Status {
    let code = match error {
        RequestError::Invalid { .. } => Code::InvalidArgument,
        RequestError::UnknownModel { .. } => Code::NotFound,
        RequestError::Overloaded(_) => Code::ResourceExhausted,
        RequestError::ExpertsUnavailable(_) | RequestError::ShuttingDown => Code::Unavailable,
        // The stream cannot be resumed elsewhere; the client has to begin again.
        RequestError::NumericsChanged => Code::Aborted,
        RequestError::Refused(_) | RequestError::NonFinite => Code::FailedPrecondition,
        RequestError::Internal => Code::Internal,
    };
    let mut status = Status::new(code, text(error));
    if matches!(code, Code::ResourceExhausted | Code::Unavailable) {
        let wait = MetadataValue::from(RETRY_AFTER_MS);
        status.metadata_mut().insert("retry-after-ms", wait.clone());
        status.metadata_mut().insert("grpc-retry-pushback-ms", wait);
    }
    status
}

/// The error's text, with this API's names for fields.
fn text(error: &RequestError) -> String {
    match error {
        RequestError::Invalid { field: "n", message, .. } => format!("choices: {message}"),
        RequestError::Invalid { field: "stop_token_ids", message, .. } => {
            format!("stop.token_ids: {message}")
        }
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(asked: v1::GenerateRequest) -> Result<GenerateRequest, RequestError> {
        super::request(asked, &Limits::default())
    }
    use crate::request::Overload;

    fn chat(role: &str) -> v1::GenerateRequest {
        let messages = vec![v1::ChatMessage { role: role.into(), content: "hi".into() }];
        v1::GenerateRequest {
            prompt: Some(v1::generate_request::Prompt::Chat(v1::Chat { messages })),
            ..Default::default()
        }
    }

    #[test]
    fn absent_fields_are_what_the_proto_says() {
        let prompt = Some(v1::generate_request::Prompt::Tokens(v1::TokenIds { ids: vec![1, 2] }));
        let request = request(v1::GenerateRequest { prompt, ..Default::default() }).unwrap();
        assert_eq!(request.model, None);
        assert!(matches!(request.prompt, Prompt::Tokens(ids) if ids == [1, 2]));
        assert_eq!((request.max_tokens, request.top_logprobs, request.choices), (None, None, 1));
        assert_eq!(request.seed, None);
        assert_eq!(request.sampling.temperature, 0.0);
        assert_eq!(request.sampling.top_p, 1.0);
        assert_eq!(request.sampling.repetition_penalty, 1.0);
        assert_eq!(request.stop.eos, Eos::Stops);
        assert_eq!(request.over_context, OverContext::Refused);
    }

    #[test]
    fn zero_is_not_absent() {
        let sampling = v1::Sampling { top_p: Some(0.0), seed: Some(0), ..Default::default() };
        let asked = v1::GenerateRequest {
            sampling: Some(sampling),
            max_tokens: Some(0),
            choices: Some(0),
            top_logprobs: Some(0),
            ..chat("user")
        };
        let request = request(asked).unwrap();
        assert_eq!(request.sampling.top_p, 0.0);
        assert_eq!(request.seed, Some(0));
        assert_eq!((request.max_tokens, request.top_logprobs, request.choices), (Some(0), Some(0), 0));
    }

    #[test]
    fn more_biases_than_are_taken_are_refused() {
        let asked = |count| {
            let logit_bias = (0..count).map(|id| (id, 1.0)).collect();
            request(v1::GenerateRequest {
                sampling: Some(v1::Sampling { logit_bias, ..Default::default() }),
                ..chat("user")
            })
        };
        assert!(asked(1024).is_ok());
        assert_eq!(
            asked(1025).unwrap_err().to_string(),
            "logit_bias: has 1025 entries; at most 1024 are allowed"
        );
    }

    #[test]
    fn a_prompt_and_known_roles_are_needed() {
        let error = request(v1::GenerateRequest::default()).unwrap_err();
        assert!(error.to_string().starts_with("prompt: is absent"), "{error}");
        assert!(request(chat("assistant")).is_ok());
        for role in ["", "tool", "System", &"x".repeat(1 << 20)] {
            let error = request(chat(role)).unwrap_err();
            assert!(error.to_string().starts_with("chat.messages: "), "{error}");
            assert!(error.to_string().len() < 200);
        }
    }

    #[test]
    fn every_request_error_has_its_code() {
        let unknown = RequestError::UnknownModel { asked: "b".into(), served: "a".into() };
        let cases = [
            (RequestError::invalid("n", "is 0"), Code::InvalidArgument, false),
            (unknown, Code::NotFound, false),
            (RequestError::Overloaded(Overload::Queue { limit: 3 }), Code::ResourceExhausted, true),
            (RequestError::Overloaded(Overload::Text), Code::ResourceExhausted, true),
            (RequestError::ExpertsUnavailable("a worker was lost".into()), Code::Unavailable, true),
            (RequestError::ShuttingDown, Code::Unavailable, true),
            (RequestError::NumericsChanged, Code::Aborted, false),
            (RequestError::Refused("a worker refused it".into()), Code::FailedPrecondition, false),
            (RequestError::NonFinite, Code::FailedPrecondition, false),
            (RequestError::Internal, Code::Internal, false),
        ];
        for (error, code, hint) in cases {
            let status = status(&error);
            assert_eq!(status.code(), code, "{error}");
            assert_eq!(status.metadata().contains_key("retry-after-ms"), hint, "{error}");
        }
        assert_eq!(status(&RequestError::invalid("n", "is 0")).message(), "choices: is 0");
    }
}
