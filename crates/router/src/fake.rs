//! A [`Service`] for tests of the edges: no model, and an engine that does what the test says.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use muster_model::defaults::SamplingDefaults;
use muster_text::{Tokenizer, TokenizerFiles};
use muster_types::{BindingName, ClassSet, Combine, Compute, Fingerprint, Limits, WeightDType};
use tokio::sync::mpsc;

use crate::engine::{Command, NewChoice};
use crate::health::Health;
use crate::model_info::ModelInfo;
use crate::prompt::Prompts;
use crate::queue::Queue;
use crate::request::{Event, FinishReason, Finished, RequestError, TokenFrame, TokenLogprob, TokenLogprobs};
use crate::service::{HealthProbe, Service, Way};
use crate::text_pool::TextPool;

pub(crate) const MODEL: &str = "org/tiny-moe";
pub(crate) const VOCABULARY: u32 = 1000;
pub(crate) const CONTEXT: u32 = 64;

/// A service that is ready and hands every admitted choice to `act`. Without a tokenizer: prompts are token ids.
pub(crate) fn service(act: impl FnMut(NewChoice) + Send + 'static) -> Service {
    service_with(Arc::new(|| Health::Ready), act)
}

/// [`service`] with a health probe of its own.
pub(crate) fn service_with(health: HealthProbe, mut act: impl FnMut(NewChoice) + Send + 'static) -> Service {
    let (commands, mut received) = mpsc::channel(4096);
    tokio::spawn(async move {
        while let Some(Command::Start(admission)) = received.recv().await {
            let _ = admission.admitted.send(Ok(()));
            admission.choices.into_iter().for_each(&mut act);
        }
    });
    assembled(model(), None, BTreeSet::new(), health, commands)
}

fn assembled(
    model: ModelInfo,
    tokenizer: Option<Tokenizer>,
    variables: BTreeSet<String>,
    health: HealthProbe,
    commands: mpsc::Sender<Command>,
) -> Service {
    let limits = Limits::default();
    let prompts = Prompts::new(&model, limits, tokenizer, variables);
    let queue = Queue::new(limits.queue, limits.running, Duration::from_secs(5));
    // A known, zero wait: no request is refused for a long one.
    queue.publish(limits.running, Some(Duration::ZERO));
    let way = Way { commands, queue, text: TextPool::start().unwrap() };
    Service::new(model, limits, prompts, Vec::new(), health, Arc::new(BindingName::default), way)
}

/// A service whose engine never answers, as during a long step; its requests stay in the channel.
pub(crate) fn deaf_service() -> (Service, mpsc::Receiver<Command>) {
    let (commands, received) = mpsc::channel(4096);
    (assembled(model(), None, BTreeSet::new(), Arc::new(|| Health::Ready), commands), received)
}

/// A tokenizer of 320 ids with `template` for chats.
pub(crate) fn tokenizer(template: &str) -> Tokenizer {
    let file = |name| {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../text/tests/fixtures/mixtral/");
        std::fs::read(format!("{directory}{name}")).unwrap()
    };
    let (json, config) = (file("tokenizer.json"), file("tokenizer_config.json"));
    let files = TokenizerFiles { config: Some(&config), ..TokenizerFiles::alone(&json) };
    Tokenizer::from_files(&files, VOCABULARY).unwrap().with_chat_templates(Some(template.as_bytes()), None)
}

/// A service for chats; the prompts of its choices come out of the channel.
pub(crate) fn chat_service(tokenizer: Tokenizer) -> (Service, mpsc::Receiver<Vec<u32>>) {
    let (commands, mut received) = mpsc::channel(16);
    let (prompts, seen) = mpsc::channel(16);
    tokio::spawn(async move {
        while let Some(Command::Start(admission)) = received.recv().await {
            let _ = admission.admitted.send(Ok(()));
            for choice in admission.choices {
                let _ = prompts.try_send(choice.prompt.iter().map(|token| token.get()).collect());
                echo(choice);
            }
        }
    });
    let model = ModelInfo { has_tokenizer: true, has_chat_template: true, ..model() };
    let ready: HealthProbe = Arc::new(|| Health::Ready);
    let variables = ["a", "extra", "tools"].map(str::to_owned).into();
    (assembled(model, Some(tokenizer), variables, ready, commands), seen)
}

fn model() -> ModelInfo {
    ModelInfo {
        name: MODEL.into(),
        family: "mixtral".into(),
        fingerprint: Fingerprint::new([7; 32]),
        parameters: 100,
        active_parameters: 40,
        layers: 2,
        moe_layers: 1,
        experts_per_layer: 4,
        experts_per_token: 2,
        hidden: 8,
        vocabulary: VOCABULARY,
        context: CONTEXT,
        compute: Compute::F32,
        experts: WeightDType::Native,
        trunk: WeightDType::Native,
        combine: Combine::Exact,
        has_tokenizer: false,
        has_chat_template: false,
        defaults: SamplingDefaults::default(),
        workers: 2,
        created: 1_700_000_000,
    }
}

/// Repeats the prompt as `max_tokens` tokens, each as `<id>`, without resumed ones, then ends for length with a
/// held-back "!".
pub(crate) fn echo(choice: NewChoice) {
    let NewChoice { choice, prompt, had, max_tokens, top_logprobs, events, .. } = choice;
    for (index, id) in (0..max_tokens).zip(prompt.iter().cycle()).skip(had.len()) {
        let _ = events.try_send(Ok(token(choice, index, id.get(), top_logprobs)));
    }
    let reason = FinishReason::Length;
    let finished = Finished {
        choice,
        reason,
        output_tokens: max_tokens,
        cached_prompt_tokens: 1,
        classes: ClassSet::EMPTY,
        text: "!".into(),
    };
    let _ = events.try_send(Ok(Event::Finished(finished)));
}

/// Sends one token, then an error for unavailable experts.
pub(crate) fn break_off(choice: NewChoice) {
    let NewChoice { choice, events, .. } = choice;
    let _ = events.try_send(Ok(token(choice, 0, 1, None)));
    let _ = events.try_send(Err(RequestError::ExpertsUnavailable("a worker was lost".into())));
}

pub(crate) fn token(choice: u32, index: u32, id: u32, top: Option<u32>) -> Event {
    let text = format!("<{id}>");
    let entry = |token_id: u32, logprob| {
        let text = format!("<{token_id}>");
        TokenLogprob { token_id, bytes: text.clone().into_bytes(), text, logprob }
    };
    let logprobs = top.map(|top| TokenLogprobs {
        chosen: entry(id, -0.5),
        top: (0..top).map(|rank| entry(id + rank, -0.5 - rank as f32)).collect(),
    });
    Event::Token(TokenFrame { choice, index, token_id: id, text, logprobs })
}
