//! The handle that API edges hold: checks requests, tokenizes off the async threads, admits, streams.

use std::collections::BTreeSet;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use muster_model::sampler::{RawSampling, Sampling};
use muster_text::{Chat, CivilDate, GenerationPrompt, Special, SpecialText, TextError, Tokenizer};
use muster_types::{Combine, Compute, Fingerprint, Limits, TokenId, WeightDType};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use uuid::Uuid;

use crate::engine::{Admission, Command, NewChoice};
use crate::health::Health;
use crate::output::Output;
use crate::request::{Eos, Event, GenerateRequest, Prompt, RequestError, Started};
use crate::resume::{self, Standing};

/// What clients may know of the model and the cluster.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// Name it is served under.
    pub name: String,
    /// `model_type` of its configuration.
    pub family: String,
    /// Its identity.
    pub fingerprint: Fingerprint,
    /// All parameters.
    pub parameters: u64,
    /// Parameters that take part in one token.
    pub active_parameters: u64,
    /// Decoder layers.
    pub layers: u32,
    /// Those with routed experts.
    pub moe_layers: u32,
    /// Routed experts of a MoE layer.
    pub experts_per_layer: u32,
    /// Experts per token.
    pub experts_per_token: u32,
    /// Width of a hidden row.
    pub hidden: u32,
    /// Vocabulary size.
    pub vocabulary: u32,
    /// Longest sequence served, prompt and output together.
    pub context: u32,
    /// What activations are rounded to.
    pub compute: Compute,
    /// How the weights of routed experts are held.
    pub experts: WeightDType,
    /// How the trunk's linears are held.
    pub trunk: WeightDType,
    /// How expert outputs are combined.
    pub combine: Combine,
    /// Whether chat requests can be served.
    pub has_chat_template: bool,
    /// Workers the router was told of; 0 when experts are in the router.
    pub workers: u32,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
}

/// How a [`Service`] learns whether experts can be reached.
pub type HealthProbe = Arc<dyn Fn() -> Health + Send + Sync>;

/// Cheap to clone; all clones are the same router.
#[derive(Clone)]
pub struct Service {
    inner: Arc<Inner>,
}

struct Inner {
    model: ModelInfo,
    limits: Limits,
    tokenizer: Option<Tokenizer>,
    /// Variables of the chat template that requests may set.
    template_variables: BTreeSet<String>,
    eos: Vec<u32>,
    health: HealthProbe,
    commands: mpsc::Sender<Command>,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("model", &self.inner.model.name).finish_non_exhaustive()
    }
}

/// An admitted request: what is known of it, then its events.
///
/// For each choice any number of tokens, then one `Finished`; or, at any point, one error and the end. Dropping it
/// takes the request's rows out of the batch before the next step.
#[derive(Debug)]
pub struct Generation {
    /// What was known at admission.
    pub started: Started,
    events: mpsc::Receiver<Result<Event, RequestError>>,
    open_choices: u32,
    ended: bool,
}

impl Service {
    pub(crate) fn new(
        model: ModelInfo,
        limits: Limits,
        tokenizer: Option<Tokenizer>,
        template_variables: BTreeSet<String>,
        eos: Vec<u32>,
        health: HealthProbe,
        commands: mpsc::Sender<Command>,
    ) -> Self {
        let inner = Inner { model, limits, tokenizer, template_variables, eos, health, commands };
        Self { inner: Arc::new(inner) }
    }

    /// The model served.
    #[must_use]
    pub fn model(&self) -> &ModelInfo {
        &self.inner.model
    }

    /// Caps on what a request may ask.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// Whether requests can be served now.
    #[must_use]
    pub fn health(&self) -> Health {
        if self.inner.commands.is_closed() {
            return Health::NotReady { reason: "the engine has stopped".into() };
        }
        (self.inner.health)()
    }

    /// Checks a request, tokenizes its prompt and waits until the engine has taken it into its queue.
    ///
    /// # Errors
    /// Every kind of [`RequestError`]. Nothing was started then.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        self.check(&request)?;
        let seed = request.seed.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0);
        let sampling = self.sampling(&request, seed)?;
        let stop_ids = self.stop_ids(&request)?;
        let model = &self.inner.model;
        let had = resume::tokens(&request, model.vocabulary, model.context)?;
        let answers = matches!(request.prompt, Prompt::Chat(_));
        let prompt = self.prompt_tokens(request.prompt).await?;
        let max_tokens = self.max_tokens(request.max_tokens, prompt.len())?;
        // The text of an answer stands by itself; that of a continuation goes on from the prompt's last tokens.
        let tail = if answers { &[][..] } else { &prompt[prompt.len().saturating_sub(4)..] };
        let tail: Vec<u32> = tail.iter().map(|token| token.get()).collect();
        let resume_key = resume::key(model, &prompt, max_tokens);
        resume::check_key(request.resume.as_ref(), &resume_key)?;
        let output = Output::new(self.inner.tokenizer.as_ref(), &tail, request.stop.strings, stop_ids);
        let standings = replayed(had, output, max_tokens).await?;
        // No more can ever be in the channel, so the engine never waits for a slow reader.
        let frames = (max_tokens as usize + 2) * request.choices as usize;
        let (sender, events) = mpsc::channel(frames.min(tokio::sync::Semaphore::MAX_PERMITS));
        let choices = (0..request.choices)
            .zip(standings)
            .map(|(choice, Standing { had, output, ended })| NewChoice {
                choice,
                prompt: prompt.clone(),
                had,
                output,
                ended,
                max_tokens,
                sampling: sampling.for_choice(choice),
                top_logprobs: request.top_logprobs,
                events: sender.clone(),
            })
            .collect();
        let (admitted, admission) = oneshot::channel();
        let command = Command::Start(Admission { choices, admitted });
        self.inner.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => RequestError::Overloaded { limit: self.inner.limits.queue },
            mpsc::error::TrySendError::Closed(_) => RequestError::ShuttingDown,
        })?;
        admission.await.map_err(|_| RequestError::ShuttingDown)??;
        if request.resume.is_some() {
            metrics::counter!("muster_requests_resumed_total").increment(1);
        }
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let started = Started { id: Uuid::new_v4().simple().to_string(), prompt_tokens, seed, resume_key };
        Ok(Generation { started, events, open_choices: request.choices, ended: false })
    }

    /// Text to token ids.
    ///
    /// # Errors
    /// When the text is over the byte cap or the model has no tokenizer.
    pub async fn tokenize(&self, text: String, special: Special) -> Result<Vec<u32>, RequestError> {
        self.check_bytes("text", text.len())?;
        self.blocking("text", move |tokenizer| tokenizer.encode(&text, special)).await
    }

    /// Token ids to text.
    ///
    /// # Errors
    /// When an id is out of range or the model has no tokenizer.
    pub async fn detokenize(&self, ids: Vec<u32>, special: SpecialText) -> Result<String, RequestError> {
        self.blocking("ids", move |tokenizer| tokenizer.decode(&ids, special)).await
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), RequestError> {
        let Inner { model, limits, .. } = &*self.inner;
        if let Some(asked) = &request.model
            && *asked != model.name
        {
            let asked = asked.chars().take(64).collect();
            return Err(RequestError::UnknownModel { asked, served: model.name.clone() });
        }
        if !(1..=limits.choices).contains(&request.choices) {
            let message = format!("is {}; 1 to {} are allowed", request.choices, limits.choices);
            return Err(RequestError::invalid("n", message));
        }
        let stops = request.stop.strings.len() + request.stop.token_ids.len();
        if stops > limits.stops {
            let message = format!("has {stops} entries; at most {} are allowed", limits.stops);
            return Err(RequestError::invalid("stop", message));
        }
        if request.stop.strings.iter().any(String::is_empty) {
            return Err(RequestError::invalid("stop", "has an empty string; leave it out"));
        }
        if let Some(long) = request.stop.strings.iter().find(|s| s.len() > limits.stop_bytes) {
            let message =
                format!("has a string of {} bytes; at most {} are allowed", long.len(), limits.stop_bytes);
            return Err(RequestError::invalid("stop", message));
        }
        if let Some(top) = request.top_logprobs.filter(|&top| top > limits.top_logprobs) {
            let message = format!("is {top}; at most {} are allowed", limits.top_logprobs);
            return Err(RequestError::invalid("top_logprobs", message));
        }
        if request.max_tokens == Some(0) {
            return Err(RequestError::invalid("max_tokens", "is 0; at least 1 is needed"));
        }
        Ok(())
    }

    fn sampling(&self, request: &GenerateRequest, seed: u64) -> Result<Sampling, RequestError> {
        let raw = RawSampling { seed, ..request.sampling.clone() };
        Sampling::new(raw, self.inner.model.vocabulary)
            .map_err(|error| RequestError::invalid(error.field, error.problem))
    }

    fn stop_ids(&self, request: &GenerateRequest) -> Result<Vec<TokenId>, RequestError> {
        let eos = if request.stop.eos == Eos::Stops { self.inner.eos.as_slice() } else { &[] };
        let check = |&id| {
            TokenId::new(id, self.inner.model.vocabulary)
                .map_err(|error| RequestError::invalid("stop", error.to_string()))
        };
        eos.iter().chain(&request.stop.token_ids).map(check).collect()
    }

    async fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<TokenId>, RequestError> {
        let (field, ids) = match prompt {
            Prompt::Tokens(ids) => ("prompt", ids),
            Prompt::Text(text) => {
                self.check_bytes("prompt", text.len())?;
                ("prompt", self.blocking("prompt", move |t| t.encode(&text, Special::Add)).await?)
            }
            Prompt::Chat(messages) => ("messages", self.chat_tokens(messages).await?),
        };
        if ids.is_empty() {
            return Err(RequestError::invalid(field, "is empty; at least one token is needed"));
        }
        let context = self.inner.model.context as usize;
        if ids.len() >= context {
            let message = format!(
                "has {} tokens; the model's context of {context} leaves no room for output",
                ids.len()
            );
            return Err(RequestError::invalid(field, message));
        }
        let check = |id| {
            TokenId::new(id, self.inner.model.vocabulary)
                .map_err(|error| RequestError::invalid(field, error.to_string()))
        };
        ids.into_iter().map(check).collect()
    }

    async fn chat_tokens(&self, chat: Chat) -> Result<Vec<u32>, RequestError> {
        let limit = self.inner.limits.messages;
        if chat.messages.is_empty() || chat.messages.len() > limit {
            let message = format!("has {} entries; 1 to {limit} are allowed", chat.messages.len());
            return Err(RequestError::invalid("messages", message));
        }
        if !self.inner.model.has_chat_template {
            let message = "this model has no chat template; use completions with a prompt instead";
            return Err(RequestError::invalid("messages", message));
        }
        let allowed = &self.inner.template_variables;
        if let Some(name) = chat.variables.keys().find(|name| !allowed.contains(*name)) {
            let which = match allowed.is_empty() {
                true => "requests may set none here".to_owned(),
                false => format!(
                    "requests may set {}",
                    allowed.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
                ),
            };
            let message = format!("has {name:?}; {which} (the router's template_variables)");
            return Err(RequestError::invalid("chat_template_kwargs", message));
        }
        let (today, limit) = (today(), self.inner.limits.prompt_bytes);
        let render = move |tokenizer: &Tokenizer| {
            let bytes = chat.bytes();
            if bytes > limit {
                return Err(TextError::TextTooLong { bytes, limit });
            }
            let template = tokenizer.chat_template()?;
            tokenizer.encode_chat(&template.render(&chat, GenerationPrompt::Add, today)?)
        };
        self.blocking("messages", render).await
    }

    fn check_bytes(&self, field: &'static str, bytes: usize) -> Result<(), RequestError> {
        let limit = self.inner.limits.prompt_bytes;
        if bytes > limit {
            return Err(RequestError::invalid(
                field,
                format!("has {bytes} bytes; at most {limit} are allowed"),
            ));
        }
        Ok(())
    }

    fn max_tokens(&self, asked: Option<u32>, prompt: usize) -> Result<u32, RequestError> {
        let context = self.inner.model.context;
        let room = context.saturating_sub(u32::try_from(prompt).unwrap_or(u32::MAX));
        match asked {
            None => Ok(room),
            Some(asked) if asked <= room => Ok(asked),
            Some(asked) => Err(RequestError::invalid(
                "max_tokens",
                format!(
                    "is {asked}; after a prompt of {prompt} tokens the context of {context} leaves {room}"
                ),
            )),
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        field: &'static str,
        work: impl FnOnce(&Tokenizer) -> Result<T, TextError> + Send + 'static,
    ) -> Result<T, RequestError> {
        let Some(tokenizer) = self.inner.tokenizer.clone() else {
            return Err(RequestError::invalid(field, "this model has no tokenizer; send token ids instead"));
        };
        tokio::task::spawn_blocking(move || work(&tokenizer))
            .await
            .map_err(|_| RequestError::Internal)?
            .map_err(|error| RequestError::invalid(to_blame(&error, field), error.to_string()))
    }
}

/// The field that `error` is about: most are about `field`.
fn to_blame(error: &TextError, field: &'static str) -> &'static str {
    match error {
        TextError::ToolsNotTaken => "tools",
        TextError::TooDeep { what, .. } if what == "tools" => "tools",
        TextError::TooDeep { .. } | TextError::Reserved { .. } => "chat_template_kwargs",
        _ => field,
    }
}

impl Stream for Generation {
    type Item = Result<Event, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended || self.open_choices == 0 {
            return Poll::Ready(None);
        }
        let item = std::task::ready!(self.events.poll_recv(cx));
        match &item {
            Some(Ok(Event::Finished(_))) => self.open_choices -= 1,
            Some(Ok(Event::Token(_))) => {}
            Some(Err(_)) => self.ended = true,
            // The engine went away without a word: the client still gets its one terminal event.
            None => {
                self.ended = true;
                return Poll::Ready(Some(Err(RequestError::Internal)));
            }
        }
        Poll::Ready(item)
    }
}

/// Takes the tokens that the client has; off the async threads, for there may be many.
async fn replayed(
    had: Vec<Vec<TokenId>>,
    output: Output,
    max_tokens: u32,
) -> Result<Vec<Standing>, RequestError> {
    if had.iter().all(Vec::is_empty) {
        return resume::replay(had, &output, max_tokens);
    }
    tokio::task::spawn_blocking(move || resume::replay(had, &output, max_tokens))
        .await
        .map_err(|_| RequestError::Internal)?
}

/// The date that chat templates may write, in UTC.
fn today() -> Option<CivilDate> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(CivilDate::from_unix_seconds(since.as_secs()))
}
