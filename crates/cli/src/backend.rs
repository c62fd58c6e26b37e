//! Token generators: a running router, or an engine in this process, behind one interface.

use std::path::PathBuf;
use std::pin::Pin;

use muster_bench::{self as bench, BenchError, Target, Tokens};
use muster_client::{Client, ClientError, Credentials, Event as ClientEvent, Policy};
use muster_config::GenerationMode;
use muster_model::defaults::SamplingDefaults;
use muster_model::sampler::RawSampling;
use muster_proto::v1;
use muster_proto::v1::finished::Reason;
use muster_proto::v1::generate_request::Prompt as WirePrompt;
use muster_router::request::{Eos, Event, GenerateRequest, OverContext, Prompt, RequestError, Stop};
use muster_router::service::{Generation, Service};
use muster_text::{ChatMessage, Special};
use tokio_stream::Stream;

use crate::args::{CredentialArgs, SamplingArgs};
use crate::failure::Failure;

/// Default address of a router's gRPC.
pub(crate) const DEFAULT_GRPC: &str = "http://127.0.0.1:50051";

/// Environment variable with an API key, used when no file is given.
const API_KEY: &str = "MUSTER_API_KEY";

/// A token generator.
#[derive(Clone)]
pub(crate) enum Backend {
    /// Over gRPC; another router takes over when one is lost.
    Router(Client),
    /// In this process.
    Here(Service),
}

/// A prompt.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Tokens(Vec<u32>),
    Chat(Vec<v1::ChatMessage>),
}

/// Sampling settings and limits. The default takes the likeliest token, to the end of the text.
#[derive(Debug, Clone, Default)]
pub(crate) struct Manner {
    pub(crate) sampling: RawSampling,
    pub(crate) seed: Option<u64>,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    /// Tokens to generate by default, as far as the context leaves them.
    pub(crate) default_tokens: Option<u32>,
}

impl Manner {
    /// Settings from the flags, and from the model's defaults where no flag is given.
    fn of(asked: &SamplingArgs, model: &SamplingDefaults) -> Self {
        let &SamplingArgs { temperature, top_k, top_p, min_p, repetition_penalty, .. } = asked;
        let given =
            SamplingDefaults { temperature, top_k, top_p, min_p, repetition_penalty, max_tokens: None };
        Self {
            sampling: given.over(model.over(RawSampling::default())),
            seed: asked.seed,
            stop: asked.stop.clone(),
            ignore_eos: asked.ignore_eos,
            default_tokens: model.max_tokens,
        }
    }
}

/// A piece of a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    Token {
        id: u32,
        text: String,
    },
    /// End of the generation; the last piece.
    Finished {
        reason: &'static str,
        text: String,
        output_tokens: u32,
    },
}

/// Stream of the pieces of one generation.
pub(crate) enum Pieces {
    Router(Box<muster_client::Generation>),
    Here(Generation),
}

/// Facts about a backend's model.
#[derive(Default)]
pub(crate) struct About {
    pub(crate) model: bench::About,
    pub(crate) has_chat_template: bool,
    /// The model's own defaults, if its router uses them.
    defaults: SamplingDefaults,
}

/// A client of the routers at these addresses.
pub(crate) async fn connect(addresses: &[String], shown: &CredentialArgs) -> Result<Client, Failure> {
    let credentials = credentials(shown)?;
    Client::connect_as(&credentials, addresses, Policy::default()).await.map_err(failed)
}

fn credentials(args: &CredentialArgs) -> Result<Credentials, Failure> {
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path).map_err(|error| Failure::input(format!("{}: {error}", path.display())))
    };
    let identity = match (&args.cert, &args.key) {
        (Some(cert), Some(key)) => Some((read(cert)?, read(key)?)),
        _ => None,
    };
    let api_key = match &args.api_key_file {
        Some(file) => Some(read(file)?.trim_start_matches('\u{feff}').trim().to_owned()),
        None => std::env::var(API_KEY).ok().filter(|key| !key.is_empty()),
    };
    Ok(Credentials { ca: args.ca.as_ref().map(read).transpose()?, identity, api_key })
}

impl Backend {
    pub(crate) async fn about(&mut self) -> Result<About, Failure> {
        Ok(match self {
            Self::Router(client) => {
                let model = client.model().await.map_err(failed)?;
                let defaults = defaults(&model);
                let has_chat_template = model.has_chat_template;
                let v1::Model { name, vocabulary, context, workers, compute, .. } = model;
                let (experts, trunk) = (model.expert_dtype, model.trunk_dtype);
                let model = bench::About { name, vocabulary, context, workers, compute, experts, trunk };
                About { model, has_chat_template, defaults }
            }
            Self::Here(service) => {
                let model = service.model();
                About {
                    model: bench::About {
                        name: model.name.clone(),
                        vocabulary: model.vocabulary,
                        context: model.context,
                        workers: model.workers,
                        compute: model.compute.to_string(),
                        experts: model.experts.to_string(),
                        trunk: model.trunk.to_string(),
                    },
                    has_chat_template: model.has_chat_template,
                    defaults: model.defaults,
                }
            }
        })
    }

    pub(crate) async fn tokenize(&mut self, text: String) -> Result<Vec<u32>, Failure> {
        match self {
            Self::Router(client) => client.tokenize(&text).await.map_err(failed),
            Self::Here(service) => {
                service.tokenize(text, Special::Add).await.map_err(|error| refused(&error))
            }
        }
    }

    /// Sampling settings from the flags and the model's defaults.
    pub(crate) async fn manner(&mut self, asked: &SamplingArgs) -> Result<Manner, Failure> {
        Ok(match asked.generation_config {
            GenerationMode::Auto => Manner::of(asked, &self.about().await?.defaults),
            GenerationMode::Ignore => Manner::of(asked, &SamplingDefaults::default()),
        })
    }

    /// Starts a generation. Dropping the pieces ends it.
    pub(crate) async fn generate(
        &mut self,
        ask: Ask,
        max_tokens: Option<u32>,
        manner: &Manner,
    ) -> Result<Pieces, Failure> {
        match self {
            Self::Router(client) => {
                let generation = client.generate(wire_request(ask, max_tokens, manner)).await;
                generation.map(|generation| Pieces::Router(Box::new(generation))).map_err(failed)
            }
            Self::Here(service) => {
                let request = request(ask, max_tokens, manner);
                service.generate(request).await.map(Pieces::Here).map_err(|error| refused(&error))
            }
        }
    }
}

impl Pieces {
    /// Tokens of the prompt.
    pub(crate) fn prompt_tokens(&self) -> u32 {
        match self {
            Self::Router(generation) => generation.started().prompt_tokens,
            Self::Here(generation) => generation.started.prompt_tokens,
        }
    }

    /// The next piece; `None` after `Finished`.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>, Failure> {
        Ok(Some(match self {
            Self::Router(generation) => match generation.next().await.map_err(failed)? {
                None => return Ok(None),
                Some(ClientEvent::Token(frame)) => Piece::Token { id: frame.token_id, text: frame.text },
                Some(ClientEvent::Finished(end)) => {
                    let reason = match end.reason() {
                        Reason::Stop => "stop",
                        // The client passes on no other reason.
                        Reason::Length | Reason::Unspecified => "length",
                    };
                    Piece::Finished { reason, text: end.text, output_tokens: end.output_tokens }
                }
            },
            Self::Here(generation) => {
                let next = std::future::poll_fn(|cx| Pin::new(&mut *generation).poll_next(cx)).await;
                match next.transpose().map_err(|error| refused(&error))? {
                    None => return Ok(None),
                    Some(Event::Token(frame)) => Piece::Token { id: frame.token_id, text: frame.text },
                    Some(Event::Finished(end)) => Piece::Finished {
                        reason: end.reason.as_str(),
                        text: end.text,
                        output_tokens: end.output_tokens,
                    },
                }
            }
        }))
    }
}

impl Target for Backend {
    type Tokens = Pieces;

    async fn generate(&mut self, request: bench::Request) -> Result<Pieces, BenchError> {
        let bench::Request { prompt, tokens, temperature, seed } = request;
        let sampling = RawSampling { temperature, ..RawSampling::default() };
        let manner = Manner { sampling, seed, ignore_eos: true, ..Manner::default() };
        Ok(Self::generate(self, Ask::Tokens(prompt), Some(tokens), &manner).await?)
    }
}

impl Tokens for Pieces {
    async fn next(&mut self) -> Result<Option<u32>, BenchError> {
        Ok(match Self::next(self).await? {
            Some(Piece::Token { id, .. }) => Some(id),
            Some(Piece::Finished { .. }) | None => None,
        })
    }
}

/// A router's report of its model's defaults.
fn defaults(model: &v1::Model) -> SamplingDefaults {
    let v1::Sampling { temperature, top_k, top_p, min_p, repetition_penalty, .. } =
        model.default_sampling.clone().unwrap_or_default();
    let max_tokens = model.default_max_tokens;
    SamplingDefaults { temperature, top_k, top_p, min_p, repetition_penalty, max_tokens }
}

fn wire_request(ask: Ask, max_tokens: Option<u32>, manner: &Manner) -> v1::GenerateRequest {
    let sampling = &manner.sampling;
    let prompt = match ask {
        Ask::Tokens(ids) => WirePrompt::Tokens(v1::TokenIds { ids }),
        Ask::Chat(messages) => WirePrompt::Chat(v1::Chat { messages }),
    };
    v1::GenerateRequest {
        prompt: Some(prompt),
        max_tokens: max_tokens.or(manner.default_tokens),
        cut_to_context: max_tokens.is_none(),
        sampling: Some(v1::Sampling {
            temperature: Some(sampling.temperature),
            top_k: Some(sampling.top_k),
            top_p: Some(sampling.top_p),
            min_p: Some(sampling.min_p),
            repetition_penalty: Some(sampling.repetition_penalty),
            seed: manner.seed,
            ..v1::Sampling::default()
        }),
        stop: Some(v1::Stop {
            strings: manner.stop.clone(),
            token_ids: Vec::new(),
            ignore_eos: manner.ignore_eos,
        }),
        ..v1::GenerateRequest::default()
    }
}

fn request(ask: Ask, max_tokens: Option<u32>, manner: &Manner) -> GenerateRequest {
    GenerateRequest {
        model: None,
        prompt: match ask {
            Ask::Tokens(ids) => Prompt::Tokens(ids),
            Ask::Chat(messages) => {
                let message = |v1::ChatMessage { role, content }| ChatMessage::new(role, content);
                Prompt::Chat(messages.into_iter().map(message).collect::<Vec<_>>().into())
            }
        },
        max_tokens: max_tokens.or(manner.default_tokens),
        over_context: if max_tokens.is_none() { OverContext::Cut } else { OverContext::Refused },
        sampling: manner.sampling.clone(),
        seed: manner.seed,
        stop: Stop {
            strings: manner.stop.clone(),
            token_ids: Vec::new(),
            eos: if manner.ignore_eos { Eos::Ignored } else { Eos::Stops },
        },
        top_logprobs: None,
        choices: 1,
        resume: None,
    }
}

/// A router's error as a failure of the command line.
pub(crate) fn failed(error: ClientError) -> Failure {
    match &error {
        ClientError::Refused { .. } => Failure::input(error),
        ClientError::Address { .. } | ClientError::Mismatch { .. } => {
            Failure::input(format!("--grpc: {error}"))
        }
        ClientError::Unreachable { reason, .. } if reason.to_lowercase().contains("certificate") => {
            let remedy =
                "--ca names the authority that routers must have, --cert and --key this client's own";
            Failure::input(format!("{error}; {remedy}"))
        }
        ClientError::Unreachable { .. } => {
            let remedy = "start one with `muster up`, or say where with --grpc";
            Failure::runtime(format!("{error}; {remedy}"))
        }
        _ => Failure::runtime(error),
    }
}

fn refused(error: &RequestError) -> Failure {
    match error {
        RequestError::Invalid { .. } | RequestError::UnknownModel { .. } => Failure::input(error),
        _ => Failure::runtime(error),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn flags(given: &[&str]) -> SamplingArgs {
        match Cli::parse_from([&["muster", "generate", "x"], given].concat()).command {
            Command::Generate(args) => args.sampling,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_overrule_the_models_settings_field_by_field() {
        let none = SamplingDefaults::default();
        let greedy = RawSampling::default;
        assert_eq!(Manner::of(&flags(&[]), &none).sampling, greedy());
        for (flag, model, expected) in [
            (
                "--temperature",
                SamplingDefaults { temperature: Some(0.5), ..none },
                RawSampling { temperature: 0.5, ..greedy() },
            ),
            ("--top-k", SamplingDefaults { top_k: Some(7), ..none }, RawSampling { top_k: 7, ..greedy() }),
            (
                "--top-p",
                SamplingDefaults { top_p: Some(0.5), ..none },
                RawSampling { top_p: 0.5, ..greedy() },
            ),
            (
                "--min-p",
                SamplingDefaults { min_p: Some(0.5), ..none },
                RawSampling { min_p: 0.5, ..greedy() },
            ),
            (
                "--repetition-penalty",
                SamplingDefaults { repetition_penalty: Some(1.5), ..none },
                RawSampling { repetition_penalty: 1.5, ..greedy() },
            ),
        ] {
            assert_eq!(Manner::of(&flags(&[]), &model).sampling, expected, "{flag}");
            let given = flags(&[flag, "1"]);
            assert_eq!(Manner::of(&given, &model).sampling, Manner::of(&given, &none).sampling, "{flag}");
        }
        let length = SamplingDefaults { max_tokens: Some(9), ..none };
        assert_eq!(Manner::of(&flags(&[]), &length).default_tokens, Some(9));
    }
}
