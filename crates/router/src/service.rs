//! The API edges' handle of a router: checks requests, gives them a place, prepares them off the async threads,
//! streams.
//!
//! Always holds: checks without work come first; then a place in the queue is taken, or the request is refused; only
//! then is work done for it, on threads with a bounded backlog.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use muster_model::sampler::{History, RawSampling, Sampling};
use muster_text::{Special, SpecialText};
use muster_types::{BindingName, Limits, TokenId};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use uuid::Uuid;

use crate::engine::{Admission, Command, NewChoice};
use crate::health::Health;
use crate::model_info::ModelInfo;
use crate::output::Output;
use crate::prompt::Prompts;
use crate::queue::{Queue, QueuePlace};
use crate::request::{Eos, Event, GenerateRequest, OverContext, Overload, Prompt, RequestError, Started};
use crate::resume::{self, Beginnings, Standing};
use crate::text_pool::{TextPool, Wanted};

/// Most bytes of ids processed in place, in some ten microseconds.
const FEW: usize = 4 << 10;

/// Source of a [`Service`]'s health.
pub type HealthProbe = Arc<dyn Fn() -> Health + Send + Sync>;

/// Source of a [`Service`]'s expert binding.
pub type BoundProbe = Arc<dyn Fn() -> BindingName + Send + Sync>;

/// Handle of a router. Cheap to clone; all clones are the same router.
#[derive(Clone)]
pub struct Service {
    inner: Arc<Inner>,
}

struct Inner {
    model: ModelInfo,
    limits: Limits,
    prompts: Arc<Prompts>,
    eos: Vec<u32>,
    health: HealthProbe,
    bound: BoundProbe,
    way: Way,
}

/// Path of a request to the engine.
pub(crate) struct Way {
    /// Channel to the engine. Holds as many requests as the queue gives places.
    pub(crate) commands: mpsc::Sender<Command>,
    /// Admission queue in front of it.
    pub(crate) queue: Arc<Queue>,
    /// Threads for the work before it.
    pub(crate) text: TextPool,
}

/// A request, ready for the engine.
struct Prepared {
    prompt: Vec<TokenId>,
    max_tokens: u32,
    /// Expert binding of the request.
    binding: BindingName,
    resume_key: String,
    /// State and history of each choice.
    standings: Vec<(Standing, History)>,
}

/// A checked request, before any work.
struct Checked {
    raw: Raw,
    seed: u64,
    top_logprobs: Option<u32>,
    choices: u32,
}

/// A request ready to be admitted.
struct Ready {
    generation: Generation,
    choices: Vec<NewChoice>,
    /// Whether the request resumes a stream.
    resumes: bool,
}

/// Inputs of the preparation.
struct Raw {
    prompt: Prompt,
    max_tokens: Option<u32>,
    over_context: OverContext,
    stop_strings: Vec<String>,
    stop_ids: Vec<TokenId>,
    had: Beginnings,
    sampling: Sampling,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("model", &self.inner.model.name).finish_non_exhaustive()
    }
}

/// An admitted request: its facts, then its events.
///
/// For each choice any number of tokens, then one `Finished`; or, at any point, one error and the end. Dropping it
/// takes the request's rows out of the batch before the next step.
#[derive(Debug)]
pub struct Generation {
    /// Facts known at admission.
    pub started: Started,
    events: mpsc::Receiver<Result<Event, RequestError>>,
    open_choices: u32,
    ended: bool,
}

impl Service {
    pub(crate) fn new(
        model: ModelInfo,
        limits: Limits,
        prompts: Prompts,
        eos: Vec<u32>,
        health: HealthProbe,
        bound: BoundProbe,
        way: Way,
    ) -> Self {
        let inner = Inner { model, limits, prompts: Arc::new(prompts), eos, health, bound, way };
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
        if self.inner.way.commands.is_closed() {
            return Health::NotReady { reason: "the engine has stopped".into() };
        }
        (self.inner.health)()
    }

    /// Checks a request, has its prompt tokenized, and waits until the engine has queued it. Dropping the future gives
    /// its place back and ends the work.
    ///
    /// # Errors
    /// Every kind of [`RequestError`]. The request was not started then.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        let mut started = self.generate_all(vec![request]).await?;
        started.pop().ok_or(RequestError::Internal)
    }

    /// [`Self::generate`] for several requests, which get their places together or not at all.
    ///
    /// # Errors
    /// Every kind of [`RequestError`]. No request was started then.
    pub async fn generate_all(
        &self,
        requests: Vec<GenerateRequest>,
    ) -> Result<Vec<Generation>, RequestError> {
        let checked = requests.into_iter().map(|request| self.checked(request));
        let checked = checked.collect::<Result<Vec<_>, _>>()?;
        let choices = checked.iter().fold(0, |sum: u32, one| sum.saturating_add(one.choices));
        let mut places = self.inner.way.queue.take(choices)?.into_iter();
        let mut ready = Vec::with_capacity(checked.len());
        for one in checked {
            let places = places.by_ref().take(one.choices as usize).collect();
            ready.push(self.ready(one, places).await?);
        }
        let mut waiting = Vec::with_capacity(ready.len());
        for Ready { generation, choices, resumes } in ready {
            let (admitted, admission) = oneshot::channel();
            self.send(Command::Start(Admission { choices, admitted }))?;
            waiting.push((generation, admission, resumes));
        }
        let mut started = Vec::with_capacity(waiting.len());
        for (generation, admission, resumes) in waiting {
            admission.await.map_err(|_| RequestError::ShuttingDown)??;
            if resumes {
                metrics::counter!("muster_requests_resumed_total").increment(1);
            }
            started.push(generation);
        }
        Ok(started)
    }

    /// Checks that take no work.
    fn checked(&self, request: GenerateRequest) -> Result<Checked, RequestError> {
        self.check(&request)?;
        let seed = request.seed.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0);
        let sampling = self.sampling(&request, seed)?;
        let stop_ids = self.stop_ids(&request)?;
        let Inner { model, prompts, .. } = &*self.inner;
        let had = Beginnings::of(&request, model)?;
        prompts.check(&request.prompt)?;
        let GenerateRequest { prompt, max_tokens, over_context, stop, top_logprobs, choices, .. } = request;
        let raw =
            Raw { prompt, max_tokens, over_context, stop_strings: stop.strings, stop_ids, had, sampling };
        Ok(Checked { raw, seed, top_logprobs, choices })
    }

    /// Prepares a request that has its places.
    async fn ready(&self, checked: Checked, places: Vec<QueuePlace>) -> Result<Ready, RequestError> {
        let Checked { raw, seed, top_logprobs, choices } = checked;
        let (resumes, sampling) = (raw.had.resumes(), raw.sampling.clone());
        let Prepared { prompt, max_tokens, binding, resume_key, standings } = self.prepared(raw).await?;
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        // Capacity for all events of the request, so that the engine never waits for a slow reader.
        let frames = (max_tokens as usize + 2) * choices as usize;
        let (sender, events) = mpsc::channel(frames.min(tokio::sync::Semaphore::MAX_PERMITS));
        let choice = |((choice, place), (Standing { had, output, ended }, history))| NewChoice {
            choice,
            place: Some(place),
            binding,
            prompt: prompt.clone(),
            had,
            history,
            output,
            ended,
            max_tokens,
            sampling: sampling.for_choice(choice),
            top_logprobs,
            events: sender.clone(),
            span: tracing::Span::current(),
        };
        let choices_of_it = (0..choices).zip(places).zip(standings).map(choice).collect();
        let id = Uuid::new_v4().simple().to_string();
        let started = Started { id, prompt_tokens, seed, resume_key, binding };
        let generation = Generation { started, events, open_choices: choices, ended: false };
        Ok(Ready { generation, choices: choices_of_it, resumes })
    }

    fn send(&self, command: Command) -> Result<(), RequestError> {
        self.inner.way.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Overload::Queue { limit: self.inner.limits.queue }.refuse(),
            mpsc::error::TrySendError::Closed(_) => RequestError::ShuttingDown,
        })
    }

    /// Text to token ids, no more than the context holds.
    ///
    /// # Errors
    /// When the text is too long, too much of it waits, or the model has no tokenizer.
    pub async fn tokenize(&self, text: String, special: Special) -> Result<Vec<u32>, RequestError> {
        let prompts = Arc::clone(&self.inner.prompts);
        prompts.check_bytes("text", text.len())?;
        self.work(text.len(), move |wanted| prompts.tokenize(&text, special, wanted)).await
    }

    /// Token ids to text, no more than the context holds.
    ///
    /// # Errors
    /// When there are too many ids or one is out of range, too much waits, or the model has no tokenizer.
    pub async fn detokenize(&self, ids: Vec<u32>, special: SpecialText) -> Result<String, RequestError> {
        let context = self.inner.model.context as usize;
        if ids.len() > context {
            let message = format!("has {} entries; at most the context of {context} are allowed", ids.len());
            return Err(RequestError::invalid("ids", message));
        }
        let prompts = Arc::clone(&self.inner.prompts);
        let bytes = ids.len() * size_of::<u32>();
        self.work(bytes, move |_| prompts.detokenize(&ids, special)).await
    }

    /// Runs work before admission, on about `bytes` bytes, on the text pool.
    ///
    /// # Errors
    /// Those of the work; [`RequestError::Overloaded`] when the pool is full.
    pub(crate) async fn work<T: Send + 'static, E: From<RequestError> + Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&Wanted) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        self.inner.way.text.run(bytes, work).await?
    }

    async fn prepared(&self, raw: Raw) -> Result<Prepared, RequestError> {
        let cost = Prompts::cost(&raw.prompt) + raw.had.tokens() * size_of::<TokenId>();
        if matches!(raw.prompt, Prompt::Tokens(_)) && cost <= FEW {
            return self.inner.prepare(raw, &Wanted::default());
        }
        let inner = Arc::clone(&self.inner);
        self.work(cost, move |wanted| inner.prepare(raw, wanted)).await
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
            let (choices, most) = (request.choices, limits.choices);
            let message = format!("is {choices}; 1 to {most} are allowed (the router's max_choices)");
            return Err(RequestError::invalid("n", message));
        }
        let stops = request.stop.strings.len() + request.stop.token_ids.len();
        if stops > limits.stops {
            let message = format!("has {stops} entries; at most {} are allowed", limits.stops);
            return Err(RequestError::invalid("stop", message));
        }
        if !model.has_tokenizer && !request.stop.strings.is_empty() {
            let message =
                "this model has no tokenizer, so that no text can end an answer; use stop_token_ids";
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
        check_bias(request.sampling.bias.len(), limits)?;
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
                .map_err(|error| RequestError::invalid("stop_token_ids", format!("has a bad entry: {error}")))
        };
        eos.iter().chain(&request.stop.token_ids).map(check).collect()
    }
}

/// Checks the number of logit biases.
///
/// # Errors
/// When there are more than a request may have.
pub(crate) fn check_bias(count: usize, limits: &Limits) -> Result<(), RequestError> {
    let most = limits.bias;
    if count > most {
        let message = format!("has {count} entries; at most {most} are allowed");
        return Err(RequestError::invalid("logit_bias", message));
    }
    Ok(())
}

impl Inner {
    /// All work for a request before the engine gets it.
    fn prepare(&self, raw: Raw, wanted: &Wanted) -> Result<Prepared, RequestError> {
        let Raw { prompt, max_tokens, over_context, stop_strings, stop_ids, had, sampling } = raw;
        let answers = matches!(prompt, Prompt::Chat(_));
        let prompt = self.prompts.tokens(prompt, wanted)?;
        let max_tokens = self.max_tokens(max_tokens, over_context, prompt.len())?;
        // The text of a chat's answer stands by itself; a continuation goes on from the prompt's last tokens.
        let tail = if answers { &[][..] } else { &prompt[prompt.len().saturating_sub(4)..] };
        let tail: Vec<u32> = tail.iter().map(|token| token.get()).collect();
        let binding = (self.bound)();
        let resume_key = resume::key(&self.model, binding, &prompt, max_tokens);
        let output = Output::new(self.prompts.tokenizer(), &tail, stop_strings, stop_ids);
        let seen = History::new(&sampling, &prompt);
        let with_history = |standing: Standing| {
            let mut history = seen.clone();
            standing.had.iter().for_each(|&token| history.push(token));
            (standing, history)
        };
        let standings =
            had.standings(&resume_key, &output, max_tokens)?.into_iter().map(with_history).collect();
        Ok(Prepared { prompt, max_tokens, binding, resume_key, standings })
    }

    fn max_tokens(&self, asked: Option<u32>, over: OverContext, prompt: usize) -> Result<u32, RequestError> {
        let context = self.model.context;
        let room = context.saturating_sub(u32::try_from(prompt).unwrap_or(u32::MAX));
        match asked {
            None => Ok(room),
            Some(asked) if asked <= room => Ok(asked),
            Some(_) if over == OverContext::Cut => Ok(room),
            Some(asked) => Err(RequestError::too_long(
                "max_tokens",
                format!(
                    "is {asked}; after a prompt of {prompt} tokens the context of {context} leaves {room}"
                ),
            )),
        }
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
            // The engine is gone: the client still gets its one terminal event.
            None => {
                self.ended = true;
                return Poll::Ready(Some(Err(RequestError::Internal)));
            }
        }
        Poll::Ready(item)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use muster_text::ChatMessage;
    use muster_types::Retry;
    use tokio::time::timeout;

    use super::*;
    use crate::fake;

    const MOMENT: Duration = Duration::from_secs(20);

    fn request(prompt: Prompt, choices: u32) -> GenerateRequest {
        GenerateRequest {
            model: None,
            prompt,
            max_tokens: Some(1),
            over_context: OverContext::Refused,
            sampling: RawSampling::default(),
            seed: None,
            stop: crate::request::Stop::default(),
            top_logprobs: None,
            choices,
            resume: None,
        }
    }

    fn ids(choices: u32) -> GenerateRequest {
        request(Prompt::Tokens(vec![1, 2]), choices)
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_places_come_back() {
        let (service, mut engine) = fake::deaf_service();
        let Limits { queue, running, choices, .. } = *service.limits();
        let most = u32::try_from(queue + running).unwrap() / choices;
        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..most {
            let service = service.clone();
            waiting.spawn(async move { service.generate(ids(choices)).await.map(drop) });
        }
        let mut commands = Vec::new();
        for _ in 0..most {
            commands.push(timeout(MOMENT, engine.recv()).await.unwrap().unwrap());
        }
        let refused = timeout(MOMENT, service.generate(ids(1))).await.expect("it waits for the engine");
        let error = refused.unwrap_err();
        assert_eq!(error, RequestError::Overloaded(Overload::Queue { limit: queue }));
        assert_eq!(error.retry(), Retry::Later);
        // Errors of the request itself come before overload, so that nobody retries in vain.
        let wrong = request(Prompt::Tokens(vec![1; 64]), 1);
        assert!(matches!(service.generate(wrong).await, Err(RequestError::Invalid { field: "prompt", .. })));
        commands.pop();
        let next = tokio::spawn({
            let service = service.clone();
            async move { service.generate(ids(1)).await.map(drop) }
        });
        assert!(timeout(MOMENT, engine.recv()).await.unwrap().is_some(), "its place did not come back");
        next.abort();
    }

    #[tokio::test]
    async fn several_requests_get_their_places_together_or_not_at_all() {
        let (service, mut engine) = fake::deaf_service();
        let Limits { queue, running, .. } = *service.limits();
        let free = |service: &Service| service.inner.way.queue.take(1).is_ok();
        let refused = service.generate_all(vec![ids(1); queue + running + 1]).await.unwrap_err();
        assert_eq!(refused, RequestError::Overloaded(Overload::Queue { limit: queue }));
        assert!(engine.try_recv().is_err() && free(&service), "none was started");
        let mut one_is_wrong = vec![ids(1); 3];
        one_is_wrong[2].max_tokens = Some(1000);
        assert!(service.generate_all(one_is_wrong).await.is_err());
        assert!(engine.try_recv().is_err(), "none was started");
        let all = vec![ids(1); queue + running];
        let asked = tokio::spawn({
            let service = service.clone();
            async move { service.generate_all(all).await.map(|all| all.len()) }
        });
        for _ in 0..queue + running {
            let Command::Start(admission) = timeout(MOMENT, engine.recv()).await.unwrap().unwrap();
            admission.admitted.send(Ok(())).unwrap();
            std::mem::forget(admission.choices);
        }
        assert_eq!(timeout(MOMENT, asked).await.unwrap().unwrap().unwrap(), queue + running);
        assert!(!free(&service), "they hold all places");
    }

    #[tokio::test]
    async fn texts_that_cannot_fit_are_refused_and_leave_nothing() {
        let (service, _seen) = fake::chat_service(fake::tokenizer("{{ messages[0].content }}"));
        let long = "Once upon a time ".repeat(200_000);
        let message = |error: RequestError| error.to_string();
        for text in [long.clone(), "a".repeat(3 << 20), " ".repeat(3 << 20)] {
            let chat = Prompt::Chat(vec![ChatMessage::new("user", text.as_str())].into());
            for (prompt, field) in [(Prompt::Text(text), "prompt"), (chat, "messages")] {
                let error = message(service.generate(request(prompt, 1)).await.unwrap_err());
                assert!(error.starts_with(&format!("{field}: has ")), "{error}");
                assert!(
                    error.ends_with("tokens or more; the model's context of 64 leaves no room for output"),
                    "{error}"
                );
            }
        }
        let error = message(service.tokenize(long, Special::Add).await.unwrap_err());
        assert!(error.starts_with("text: has ") && error.ends_with("at most 64 are allowed"), "{error}");
        let error = message(service.detokenize(vec![9; 65], SpecialText::Keep).await.unwrap_err());
        assert_eq!(error, "ids: has 65 entries; at most the context of 64 are allowed");
        assert_eq!(service.inner.way.text.held(), 0);
        assert!(service.generate(request(Prompt::Text("hi".into()), 1)).await.is_ok());
    }

    #[tokio::test]
    async fn a_client_that_goes_while_its_text_is_read_gives_its_place_back() {
        let (service, _seen) = fake::chat_service(fake::tokenizer("{{ messages[0].content }}"));
        let Limits { queue, running, choices, .. } = *service.limits();
        for _ in 0..=(queue + running) / choices as usize {
            let generation = service.generate(request(Prompt::Text("hi".into()), choices));
            // Polled once: the request has its place, and its text is queued.
            let _ = timeout(Duration::ZERO, generation).await;
        }
        assert!(
            timeout(MOMENT, service.generate(request(Prompt::Text("hi".into()), 1))).await.unwrap().is_ok()
        );
    }
}
