//! The engine thread: schedule, compute, emit, over and over.
//!
//! It owns scheduler, model with KV cache, and dispatch, so none of them is shared. Requests come through one bounded
//! channel; events leave through one bounded channel per request, sized so that sending never waits. A request
//! whose reader is gone is dropped before the next step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use metrics::{counter, gauge, histogram};
use muster_engine::dispatch::{Bound, DispatchError, ExpertDispatch};
use muster_engine::microbatch;
use muster_engine::scheduler::{AdmitError, NewSequence, Progress, Scheduler};
use muster_engine::step::{Step, StepItem};
use muster_model::sampler::{self, History, Sampling};
use muster_model::step::{Draw, SeqInput, StepError, StepModel, WantLogits};
use muster_text::Tokenizer;
use muster_types::{BindingName, ClassSet, Retry, SeqId, TokenId};
use tokio::sync::{mpsc, oneshot};

use crate::lanes::{LaneChoice, Lanes};
use crate::output::{End, Output, Taken};
use crate::pace::Pace;
use crate::pulse::Pulse;
use crate::queue::{Queue, QueuePlace};
use crate::request::{
    Event, FinishReason, Finished, Overload, RequestError, TokenFrame, TokenLogprob, TokenLogprobs,
};
use crate::turns::{Batch, Turns};

/// Rows of a step from which two lanes may pay: below, splitting only makes the messages smaller.
const LANE_MIN_ROWS: usize = 4;

/// Longest park of sequences whose experts are missing, unless the dispatch changes before.
const PARKED_FOR: Duration = Duration::from_millis(50);
/// Polling interval while all sequences are parked.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Commands to the engine thread.
pub(crate) enum Command {
    /// Queue a request, all of its choices or none.
    Start(Admission),
}

/// A checked request on its way into the queue.
pub(crate) struct Admission {
    pub(crate) choices: Vec<NewChoice>,
    pub(crate) admitted: oneshot::Sender<Result<(), RequestError>>,
}

/// One choice of a checked request.
pub(crate) struct NewChoice {
    pub(crate) choice: u32,
    /// Queue place, released when the choice first runs.
    pub(crate) place: Option<QueuePlace>,
    /// Expert binding, fixed for the whole choice.
    pub(crate) binding: BindingName,
    pub(crate) prompt: Vec<TokenId>,
    /// Token history: the prompt and the tokens of `had`.
    pub(crate) history: History,
    /// Resumed tokens, which the client already has; at most `max_tokens`, and fewer when `ended` is `None`.
    pub(crate) had: Vec<TokenId>,
    /// Output state after the tokens of `had`.
    pub(crate) output: Output,
    /// Set when `had` already ends the output.
    pub(crate) ended: Option<End>,
    /// Output limit, the tokens of `had` included.
    pub(crate) max_tokens: u32,
    pub(crate) sampling: Sampling,
    pub(crate) top_logprobs: Option<u32>,
    pub(crate) events: mpsc::Sender<Result<Event, RequestError>>,
    /// Log span of the request.
    pub(crate) span: tracing::Span,
}

/// Parts that the engine thread owns.
pub(crate) struct Engine {
    pub(crate) scheduler: Scheduler,
    pub(crate) model: Box<dyn StepModel>,
    pub(crate) dispatch: Box<dyn ExpertDispatch>,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) expert_timeout: Duration,
    pub(crate) commands: mpsc::Receiver<Command>,
    /// Admission queue; the engine publishes the batch's room to it.
    pub(crate) queue: Arc<Queue>,
    /// Set when shutdown stops waiting for running requests.
    pub(crate) abort: Arc<AtomicBool>,
    /// Beats with every generated token.
    pub(crate) pulse: Arc<Pulse>,
}

/// A choice in the scheduler.
struct Active {
    /// Number of the request, shared by its choices.
    request: u64,
    choice: u32,
    /// Queue place, released when the choice first runs.
    place: Option<QueuePlace>,
    /// Expert binding, fixed for the whole choice.
    binding: BindingName,
    /// Numerics classes of the workers that contributed.
    classes: ClassSet,
    prompt_tokens: u32,
    cached_prompt_tokens: u32,
    generated: u32,
    sampling: Sampling,
    history: History,
    output: Output,
    top_logprobs: Option<u32>,
    events: mpsc::Sender<Result<Event, RequestError>>,
    span: tracing::Span,
    admitted_at: Instant,
    last_token_at: Option<Instant>,
    /// Start of the wait for missing experts; `None` while steps succeed.
    stalled: Option<Instant>,
}

#[derive(Default)]
struct Table {
    active: BTreeMap<SeqId, Active>,
    next: u64,
    /// Expert binding at the last check.
    bound: Bound,
    /// Numerics classes of all workers used so far: cached keys and values may come from any of them.
    classes: ClassSet,
    /// Set while sequences are parked for missing experts.
    parked: Option<Parked>,
    /// Sequences that left the batch since the last observation of turns.
    ended: usize,
}

/// End of a park: a new version of the dispatch, or `until`.
struct Parked {
    version: u64,
    until: Instant,
}

impl Engine {
    /// Runs until all senders are gone and all sequences have ended, or `abort` is set.
    pub(crate) fn run(mut self) {
        let mut table = Table::default();
        let (mut pace, mut lane_choice, mut turns) =
            (Pace::default(), LaneChoice::default(), Turns::default());
        while self.receive(&mut table) {
            let began = Instant::now();
            self.drop_abandoned(&mut table);
            self.rebind(&mut table);
            self.unpark(&mut table);
            let decodes = self.scheduler.decoding();
            let step = self.scheduler.schedule(pace.limit(decodes));
            let batch = self.let_in(&step, &turns, &mut table);
            if step.items.is_empty() {
                if table.parked.is_some() {
                    std::thread::sleep(LOOK_AGAIN);
                }
            } else {
                let started = Instant::now();
                let rows = step.tokens();
                let splits = step.items.len() > 1 && rows >= LANE_MIN_ROWS;
                let lanes = if splits { lane_choice.lanes(rows) } else { Lanes::One };
                let split = self.compute(&step, lanes);
                self.note_classes(&step, &mut table);
                let whole = if self.dispatch.bound() == table.bound {
                    self.emit(&step, &split, started, &mut table)
                } else {
                    // The binding changed during the step: its outputs may mix numerics classes.
                    step.items.iter().for_each(|item| self.scheduler.undo(item));
                    false
                };
                let took = started.elapsed();
                // The duration of a failed step says nothing about the cost of a whole one.
                if whole && splits {
                    lane_choice.observe(rows, lanes, took);
                }
                if whole {
                    pace.observe(decodes, rows.saturating_sub(decodes), took);
                }
                histogram!("muster_step_seconds").record(took.as_secs_f64());
                counter!("muster_tokens_computed_total").increment(rows as u64);
            }
            turns.observe(began.elapsed(), batch, std::mem::take(&mut table.ended));
            self.queue.publish(self.scheduler.room(), turns.between());
            self.report();
        }
        for (_, active) in std::mem::take(&mut table.active) {
            let _ = active.events.try_send(Err(RequestError::ShuttingDown));
        }
        self.dispatch.close();
    }

    /// Admits new requests; blocks while no sequence is active. False: the engine is to end.
    fn receive(&mut self, table: &mut Table) -> bool {
        loop {
            if self.abort.load(Ordering::Acquire) {
                return false;
            }
            let command = if table.active.is_empty() {
                match self.commands.blocking_recv() {
                    Some(command) => command,
                    None => return false,
                }
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    // Empty or disconnected: running sequences go on.
                    Err(_) => return true,
                }
            };
            let Command::Start(admission) = command;
            self.admit(admission, table);
        }
    }

    /// Applies a changed expert binding and ends sequences that were admitted under another.
    fn rebind(&mut self, table: &mut Table) {
        let bound = self.dispatch.bound();
        if bound == table.bound {
            return;
        }
        table.bound = bound;
        self.scheduler.bind(bound.name);
        let of_others = |(_, active): &(&SeqId, &Active)| active.binding != bound.name;
        let others: Vec<SeqId> = table.active.iter().filter(of_others).map(|(&id, _)| id).collect();
        counter!("muster_requests_failed_total").increment(others.len() as u64);
        for id in others {
            self.end(id, RequestError::NumericsChanged, table);
        }
    }

    /// Records the numerics classes of the workers that contributed to a step.
    fn note_classes(&mut self, step: &Step, table: &mut Table) {
        let classes = self.dispatch.take_classes();
        table.classes.extend(classes);
        for item in &step.items {
            if let Some(active) = table.active.get_mut(&item.seq) {
                active.classes.extend(classes);
            }
        }
    }

    fn admit(&mut self, admission: Admission, table: &mut Table) {
        self.rebind(table);
        let request = table.next;
        let mut ids = Vec::with_capacity(admission.choices.len());
        let mut outcome = Ok(());
        for mut choice in admission.choices {
            if choice.binding != table.bound.name {
                outcome = Err(RequestError::NumericsChanged);
                break;
            }
            let id = SeqId::new(table.next);
            table.next += 1;
            let (ended, sequence) = (choice.ended.take(), choice.sequence(id));
            let active = Active::new(request, choice);
            if let Some(end) = ended {
                let _ = active.events.try_send(Ok(Event::Finished(active.finished(end))));
                continue;
            }
            if let Err(error) = self.scheduler.admit(sequence) {
                outcome = Err(refusal(&error));
                break;
            }
            ids.push(id);
            table.active.insert(id, active);
        }
        if outcome.is_err() {
            ids.iter().for_each(|&id| self.remove(id, table));
        }
        // A client that is gone is noticed by its closed event channel.
        let _ = admission.admitted.send(outcome);
    }

    /// Publishes the room left beside the step, then releases the queue places of its sequences.
    fn let_in(&self, step: &Step, turns: &Turns, table: &mut Table) -> Batch {
        self.queue.publish(self.scheduler.room(), turns.between());
        for item in &step.items {
            if let Some(active) = table.active.get_mut(&item.seq) {
                active.place = None;
            }
        }
        if self.scheduler.has_place() { Batch::HasRoom } else { Batch::Full }
    }

    fn remove(&mut self, id: SeqId, table: &mut Table) {
        self.scheduler.finish(id);
        if table.active.remove(&id).is_some_and(|active| active.place.is_none()) {
            table.ended += 1;
        }
    }

    fn drop_abandoned(&mut self, table: &mut Table) {
        let gone: Vec<SeqId> =
            table.active.iter().filter(|(_, active)| active.events.is_closed()).map(|(&id, _)| id).collect();
        counter!("muster_sequences_cancelled_total").increment(gone.len() as u64);
        gone.into_iter().for_each(|id| self.remove(id, table));
    }

    /// Runs the step; returns the indices of the items in each lane.
    fn compute(&mut self, step: &Step, lanes: Lanes) -> [Vec<usize>; 2] {
        let lanes = match lanes {
            Lanes::One => [(0..step.items.len()).collect(), Vec::new()],
            Lanes::Two => microbatch::split(step),
        };
        let inputs = [0, 1].map(|lane: usize| -> Vec<SeqInput<'_>> {
            let items = lanes[lane].iter().map(|&item| &step.items[item]);
            items
                .map(|item| SeqInput {
                    start: item.start,
                    tokens: &item.tokens,
                    blocks: &item.blocks,
                    logits: if item.sample { WantLogits::Last } else { WantLogits::None },
                })
                .collect()
        });
        self.model.step([&inputs[0], &inputs[1]], &mut *self.dispatch, self.expert_timeout);
        lanes
    }

    /// Sends the step's tokens to clients. False if the step failed for any sequence.
    fn emit(&mut self, step: &Step, lanes: &[Vec<usize>; 2], started: Instant, table: &mut Table) -> bool {
        let mut whole = true;
        let mut sampled = Vec::with_capacity(step.items.len());
        for (lane, items) in lanes.iter().enumerate() {
            for (place, &item) in items.iter().enumerate() {
                let item = &step.items[item];
                let outcome = self.model.logits(lane, place).map(|_| ());
                match outcome {
                    Ok(()) if item.sample => sampled.push((item.seq, lane, place)),
                    Ok(()) => {
                        if let Some(active) = table.active.get_mut(&item.seq) {
                            active.stalled = None;
                        }
                    }
                    Err(error) => {
                        whole = false;
                        self.set_back(item, &error, started, table);
                    }
                }
            }
        }
        // A failed choice has ended its whole request, other choices of this step included.
        sampled.retain(|(seq, ..)| table.active.contains_key(seq));
        let draw = |&(seq, lane, place)| Some(table.active.get(&seq)?.draw(lane, place));
        let draws: Vec<Draw<'_>> = sampled.iter().filter_map(draw).collect();
        let tokens = self.model.sample(&draws);
        drop(draws);
        match tokens {
            Ok(tokens) => {
                for ((seq, lane, place), token) in sampled.into_iter().zip(tokens) {
                    self.advance(seq, token, (lane, place), table);
                }
            }
            Err(error) => {
                whole = false;
                sampled.iter().for_each(|(seq, ..)| self.fail(*seq, &error, table));
            }
        }
        whole
    }

    /// Handles a sequence whose step, begun at `started`, failed: parks it for a retry while its experts may come back
    /// within the timeout, else fails its request.
    fn set_back(&mut self, item: &StepItem, error: &StepError, started: Instant, table: &mut Table) {
        let Some(active) = table.active.get_mut(&item.seq) else { return };
        let since = *active.stalled.get_or_insert(started);
        let patient = since.elapsed() < self.expert_timeout;
        match error {
            StepError::Dispatch(DispatchError::Closed) => self.fail(item.seq, error, table),
            StepError::Dispatch(error) if patient && error.retry() != Retry::Never => {
                tracing::debug!(sequence = %item.seq, %error, "waiting for experts");
                counter!("muster_steps_repeated_total").increment(1);
                self.scheduler.undo(item);
                self.scheduler.park(item.seq);
                table.parked.get_or_insert_with(|| Parked {
                    version: self.dispatch.version(),
                    until: Instant::now() + PARKED_FOR,
                });
            }
            _ => self.fail(item.seq, error, table),
        }
    }

    /// Unparks sequences once the dispatch has changed or the park is over.
    fn unpark(&mut self, table: &mut Table) {
        let over =
            |parked: &mut Parked| parked.version != self.dispatch.version() || Instant::now() >= parked.until;
        if table.parked.take_if(over).is_some() {
            self.scheduler.unpark();
        }
    }

    /// Appends a sampled token, sends its frame, and ends the choice if it is complete.
    fn advance(&mut self, id: SeqId, token: TokenId, (lane, place): (usize, usize), table: &mut Table) {
        let Some(active) = table.active.get_mut(&id) else { return };
        let Ok(logits) = self.model.logits(lane, place) else { return };
        active.observe_latency();
        active.stalled = None;
        counter!("muster_tokens_generated_total").increment(1);
        self.pulse.beat();
        active.cached_prompt_tokens = self.scheduler.cached_prompt_tokens(id);
        if active.binding == BindingName::Any && active.cached_prompt_tokens > 0 {
            active.classes.extend(table.classes);
        }
        // Appended even if the token ends the sequence, so that the prefix cache keeps what this step computed.
        let progress = self.scheduler.append(id, token);
        let end = active.take(token, logits, self.tokenizer.as_ref()).map(Ok);
        let end = end.or_else(|| match progress {
            Ok(Progress::Continue) => None,
            Ok(Progress::LengthReached) => Some(Ok(active.end(FinishReason::Length))),
            Err(error) => {
                tracing::error!(%error, "the scheduler lost a sequence");
                Some(Err(RequestError::Internal))
            }
        });
        if let Some(end) = end {
            let _ = active.events.try_send(end.map(Event::Finished));
            self.remove(id, table);
        }
    }

    /// Ends a whole request because its step failed.
    fn fail(&mut self, id: SeqId, error: &StepError, table: &mut Table) {
        let Some(active) = table.active.get(&id) else { return };
        tracing::warn!(parent: &active.span, sequence = %id, %error, "request failed");
        counter!("muster_requests_failed_total").increment(1);
        let error = match error {
            StepError::Dispatch(error) => RequestError::from_dispatch(error),
            StepError::Gate { .. } | StepError::Hidden { .. } | StepError::Logits => RequestError::NonFinite,
            StepError::Device(_) => RequestError::Internal,
        };
        self.end(id, error, table);
    }

    /// Ends a whole request with an error, once.
    fn end(&mut self, id: SeqId, error: RequestError, table: &mut Table) {
        let Some(active) = table.active.get(&id) else { return };
        let _ = active.events.try_send(Err(error));
        let request = active.request;
        let siblings: Vec<SeqId> =
            table.active.iter().filter(|(_, a)| a.request == request).map(|(&id, _)| id).collect();
        siblings.into_iter().for_each(|id| self.remove(id, table));
    }

    fn report(&self) {
        let stats = self.scheduler.stats();
        gauge!("muster_sequences_running").set(stats.running as f64);
        gauge!("muster_sequences_waiting").set(stats.waiting as f64);
        gauge!("muster_kv_blocks").set(f64::from(stats.blocks_total));
        gauge!("muster_kv_blocks_free").set(f64::from(stats.blocks_free));
        gauge!("muster_kv_blocks_cached").set(f64::from(stats.blocks_cached));
        counter!("muster_preemptions_total").absolute(stats.preemptions);
        counter!("muster_prefix_hit_tokens_total").absolute(stats.prefix_hits);
        counter!("muster_prefix_miss_tokens_total").absolute(stats.prefix_misses);
    }
}

impl NewChoice {
    /// The remaining work as the scheduler sees it: tokens of `had` are a part of the prompt.
    fn sequence(&self, id: SeqId) -> NewSequence {
        let had = u32::try_from(self.had.len()).unwrap_or(u32::MAX);
        let prompt = [&self.prompt[..], &self.had].concat();
        NewSequence { id, prompt, max_tokens: self.max_tokens.saturating_sub(had) }
    }
}

impl Active {
    fn new(request: u64, new: NewChoice) -> Self {
        Self {
            request,
            choice: new.choice,
            place: new.place,
            binding: new.binding,
            classes: ClassSet::EMPTY,
            prompt_tokens: u32::try_from(new.prompt.len()).unwrap_or(u32::MAX),
            cached_prompt_tokens: 0,
            generated: u32::try_from(new.had.len()).unwrap_or(u32::MAX),
            sampling: new.sampling,
            history: new.history,
            output: new.output,
            top_logprobs: new.top_logprobs,
            events: new.events,
            span: new.span,
            admitted_at: Instant::now(),
            last_token_at: None,
            stalled: None,
        }
    }

    /// Inputs for sampling the next token.
    fn draw(&self, lane: usize, sequence: usize) -> Draw<'_> {
        let position = self.prompt_tokens + self.generated;
        Draw { lane, sequence, sampling: &self.sampling, history: &self.history, position }
    }

    fn observe_latency(&mut self) {
        let now = Instant::now();
        match self.last_token_at.replace(now) {
            None => histogram!("muster_time_to_first_token_seconds").record(now - self.admitted_at),
            Some(last) => histogram!("muster_inter_token_seconds").record(now - last),
        }
    }

    /// Counts a token and sends its frame. `Some` when it ends the choice.
    fn take(&mut self, token: TokenId, logits: &[f32], tokenizer: Option<&Tokenizer>) -> Option<Finished> {
        let index = self.generated;
        self.generated += 1;
        self.history.push(token);
        let (text, stopped) = match self.output.take(token) {
            Taken::StopId => return Some(self.end(FinishReason::Stop)),
            Taken::Text(text) => (text, false),
            Taken::Stopped(text) => (text, true),
        };
        let logprobs = self.top_logprobs.map(|top| token_logprobs(logits, token, top, tokenizer));
        let frame = TokenFrame { choice: self.choice, index, token_id: token.get(), text, logprobs };
        let _ = self.events.try_send(Ok(Event::Token(frame)));
        stopped.then(|| self.finished(End { reason: FinishReason::Stop, text: String::new() }))
    }

    /// Ends the choice, with the text held back until now.
    fn end(&mut self, reason: FinishReason) -> Finished {
        let end = self.output.end(reason);
        self.finished(end)
    }

    fn finished(&self, End { reason, text }: End) -> Finished {
        let Self { choice, generated: output_tokens, .. } = *self;
        // A bound stream is the same frame for frame, wherever it was resumed.
        let classes = if self.binding == BindingName::Any { self.classes } else { ClassSet::EMPTY };
        // The scheduler counts resumed output tokens as prompt; they are left out here.
        let cached_prompt_tokens = self.cached_prompt_tokens.min(self.prompt_tokens);
        Finished { choice, reason, output_tokens, cached_prompt_tokens, classes, text }
    }
}

fn token_logprobs(logits: &[f32], token: TokenId, top: u32, tokenizer: Option<&Tokenizer>) -> TokenLogprobs {
    let (chosen, top) = sampler::logprobs(logits, token, top as usize);
    let describe = |entry: sampler::LogProb| {
        let token_id = entry.token.get();
        let text = tokenizer.map_or_else(String::new, |t| t.token_text(token_id));
        let bytes = tokenizer.map_or_else(Vec::new, |t| t.token_bytes(token_id));
        TokenLogprob { token_id, text, bytes, logprob: entry.logprob }
    };
    TokenLogprobs { chosen: describe(chosen), top: top.into_iter().map(describe).collect() }
}

fn refusal(error: &AdmitError) -> RequestError {
    match error {
        AdmitError::QueueFull { limit } => Overload::Queue { limit: *limit }.refuse(),
        AdmitError::EmptyPrompt | AdmitError::TooLong { .. } | AdmitError::NeverFits { .. } => {
            RequestError::invalid("prompt", error.to_string())
        }
        AdmitError::ZeroMaxTokens => RequestError::invalid("max_tokens", error.to_string()),
        AdmitError::DuplicateId(_) => RequestError::Internal,
    }
}

#[cfg(test)]
mod tests {
    use muster_model::sampler::{Pick, RawSampling};

    use super::*;

    fn token(id: u32) -> TokenId {
        TokenId::new(id, 8).unwrap()
    }

    fn choice(had: &[u32], sampling: RawSampling) -> NewChoice {
        let sampling = Sampling::new(sampling, 8).unwrap();
        let prompt = vec![token(1), token(2)];
        let had: Vec<TokenId> = had.iter().map(|&id| token(id)).collect();
        let mut history = History::new(&sampling, &prompt);
        had.iter().for_each(|&token| history.push(token));
        NewChoice {
            choice: 0,
            place: None,
            binding: BindingName::default(),
            prompt,
            had,
            history,
            output: Output::new(None, &[], Vec::new(), Vec::new()),
            ended: None,
            max_tokens: 6,
            sampling,
            top_logprobs: None,
            events: mpsc::channel(16).0,
            span: tracing::Span::none(),
        }
    }

    #[test]
    fn tokens_that_the_client_has_count_as_output() {
        let penalised =
            RawSampling { presence_penalty: 1.0, frequency_penalty: 1.0, ..RawSampling::default() };
        let resumed = Active::new(0, choice(&[5, 3, 5], penalised.clone()));
        let mut undisturbed = Active::new(0, choice(&[], penalised));
        for id in [5, 3, 5] {
            assert!(undisturbed.take(token(id), &[0.0; 8], None).is_none());
        }
        assert_eq!((resumed.prompt_tokens, resumed.generated), (2, 3));
        assert_eq!(undisturbed.generated, 3);
        // 5 was chosen twice and loses 3, 3 was chosen once and loses 2; 1 stood in the prompt and loses nothing.
        let logits = [0.0, 6.5, 0.0, 8.0, 0.0, 9.0, 0.0, 0.0];
        for active in [&resumed, &undisturbed] {
            let Draw { sampling, history, position, .. } = active.draw(0, 0);
            let pick = Pick { sampling, logits: &logits, history, position };
            let next = sampler::sample(&pick, &mut sampler::SampleScratch::default());
            assert_eq!(next, token(1));
        }
    }

    #[test]
    fn what_is_left_to_do_is_computed_behind_what_the_client_has() {
        let sequence = choice(&[5, 3], RawSampling::default()).sequence(SeqId::new(9));
        assert_eq!(sequence.prompt, [1, 2, 5, 3].map(token));
        assert_eq!(sequence.max_tokens, 4);
    }
}
