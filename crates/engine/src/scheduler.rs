//! Continuous batching: which sequences run in a step, on which tokens, with which KV blocks.
//!
//! Owns every sequence from admission to its end. Always holds:
//! - running sequences, then waiting ones, are in order of admission: only the oldest waiting one is admitted to the
//!   batch, only the youngest running one is preempted, and none overtakes another;
//! - the oldest sequence advances in every step, so every sequence ends;
//! - every block is free, cached or in the tables of running sequences, in more than one only as a full block of a
//!   common prefix, which is never written again;
//! - a running sequence holds every block that a later position sees, and gives up the others before a step;
//! - a step has at most `step_tokens` tokens.
//!
//! Tokens that were just sampled go first, one per sequence, and what is left of the budget goes to prefill
//! chunks, oldest first. The caller bounds the prefill beside sampled tokens, which delays their streams, for every
//! step. Blocks of ended or preempted sequences keep their content while there is room, and
//! a sequence that begins with the same tokens starts behind them. When a sequence finds no free
//! block, the youngest running one gives up its blocks, waits at the front of the queue and later computes its
//! prompt and output again. The youngest itself keeps its blocks until others come free: giving them up would help no
//! older sequence and lose its work.
//!
//! Knows nothing of sampling, stop conditions, text, deadlines or experts.

use std::collections::VecDeque;
use std::num::NonZero;

use muster_types::{BindingName, Reach, Retry, SeqId, TokenId};

use crate::kv::{BlockPool, Keep};
use crate::prefix::BlockKey;
use crate::reach::most_held;
use crate::sequence::Sequence;
use crate::step::{Step, StepItem};
use crate::table::Group;

/// Sizes of a [`Scheduler`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens per KV block.
    pub block_tokens: NonZero<u32>,
    /// What each group of layers sees; see [`LayerGroups`](crate::reach::LayerGroups). A block holds tokens of one group.
    pub groups: Vec<Reach>,
    /// KV blocks, shared by all sequences and groups.
    pub blocks: u32,
    /// Most tokens of one sequence, prompt and output together.
    pub context: u32,
    /// Most sequences in a step.
    pub max_running: usize,
    /// Most sequences that wait for admission to a step. Those sent back by preemption come on top.
    pub max_waiting: usize,
    /// Most tokens in a step.
    pub step_tokens: u32,
    /// Most tokens of one sequence's prefill in a step.
    pub prefill_chunk: u32,
    /// Whether keys and values are reused between sequences.
    pub prefix_cache: PrefixCache,
}

/// Whether keys and values are reused between sequences that begin with the same tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrefixCache {
    /// Blocks keep their content until their room is needed.
    #[default]
    On,
    /// Every sequence computes all of its own.
    Off,
}

/// Sizes that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A size that must be positive is not.
    #[error("{field} is 0; at least 1 is needed")]
    Zero {
        /// The field of [`SchedulerConfig`].
        field: &'static str,
    },
    /// No sequence fits: one has at least a prompt token and an output token.
    #[error("context is {0}; at least 2 is needed, for one prompt and one output token")]
    Context(u32),
    /// `step_tokens` is below `max_running`: a running sequence could get no token of a step.
    #[error(
        "step_tokens is {step_tokens}, below max_running ({max_running}); every running sequence needs one"
    )]
    StepTokens {
        /// The step's tokens.
        step_tokens: u32,
        /// The step's sequences.
        max_running: usize,
    },
}

/// A sequence to generate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSequence {
    /// Its name. Must not be that of another sequence in the scheduler.
    pub id: SeqId,
    /// Tokens to start from; at least one.
    pub prompt: Vec<TokenId>,
    /// Tokens to generate at most; at least one. The end of the context cuts it short.
    pub max_tokens: u32,
}

/// Why a sequence was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// The prompt is empty.
    #[error("the prompt is empty; at least one token is needed")]
    EmptyPrompt,
    /// `max_tokens` is 0.
    #[error("max_tokens is 0; at least 1 is needed")]
    ZeroMaxTokens,
    /// The prompt leaves no room for an output token.
    #[error("the prompt has {prompt} tokens; at most {max} are allowed in a context of {context}")]
    TooLong {
        /// The prompt's tokens.
        prompt: usize,
        /// Most that are allowed.
        max: u32,
        /// Tokens of the context.
        context: u32,
    },
    /// All KV blocks together are too few for it.
    #[error(
        "prompt and output need {needed} KV blocks, the cache has {have}; shorten the prompt or max_tokens"
    )]
    NeverFits {
        /// Blocks it may come to need at once.
        needed: u64,
        /// Blocks there are.
        have: u32,
    },
    /// A sequence of this id is here already.
    #[error("sequence {0} is already scheduled")]
    DuplicateId(SeqId),
    /// The queue is full.
    #[error("{limit} sequences are waiting already, as many as may; try again later")]
    QueueFull {
        /// Sequences that may wait.
        limit: usize,
    },
}

impl AdmitError {
    /// Whether trying again can help.
    #[must_use]
    pub const fn retry(&self) -> Retry {
        match self {
            Self::QueueFull { .. } => Retry::Later,
            Self::EmptyPrompt
            | Self::ZeroMaxTokens
            | Self::TooLong { .. }
            | Self::NeverFits { .. }
            | Self::DuplicateId(_) => Retry::Never,
        }
    }
}

/// A token for a sequence that expects none: it has ended, or its last item did not ask for a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("sequence {0} does not expect a token")]
pub struct UnknownSequence(pub SeqId);

/// State of a sequence after a new token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// It goes on in the next step.
    Continue,
    /// `max_tokens` or the end of the context is reached. It is left out of further steps and keeps its blocks
    /// until [`Scheduler::finish`].
    LengthReached,
}

/// Counts for metrics and admission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Sequences without blocks.
    pub waiting: usize,
    /// Sequences with blocks.
    pub running: usize,
    /// KV blocks, free or not.
    pub blocks_total: u32,
    /// KV blocks that no sequence holds.
    pub blocks_free: u32,
    /// Free blocks whose content is cached for later sequences.
    pub blocks_cached: u32,
    /// Preemptions since the start.
    pub preemptions: u64,
    /// Tokens found in the prefix cache when their sequence was admitted to the batch, since the start.
    pub prefix_hits: u64,
    /// Tokens not found there, since the start.
    pub prefix_misses: u64,
}

/// Sequences and the KV blocks they share.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    groups: Vec<Group>,
    pool: BlockPool,
    /// Oldest first; all older than those waiting.
    running: Vec<Sequence>,
    /// Oldest first.
    waiting: VecDeque<Sequence>,
    /// Of sequences that are admitted now.
    origin: Option<BlockKey>,
    preemptions: u64,
    prefix_hits: u64,
    prefix_misses: u64,
}

/// Budget of the step that an item is charged to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Decode,
    Prefill,
}

/// A step in the making.
struct Draft {
    decodes: Vec<StepItem>,
    prefills: Vec<StepItem>,
    preempted: Vec<SeqId>,
    prefill_budget: u32,
}

impl SchedulerConfig {
    /// Most tokens of one sequence in a step.
    fn chunk(&self) -> u32 {
        self.prefill_chunk.min(self.step_tokens)
    }
}

impl Scheduler {
    /// An idle scheduler.
    ///
    /// # Errors
    /// When a size is 0, there is no group of layers, the context is below 2, or `step_tokens` is below `max_running`.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        let positive = [
            ("groups", !config.groups.is_empty()),
            ("blocks", config.blocks != 0),
            ("max_running", config.max_running != 0),
            ("max_waiting", config.max_waiting != 0),
            ("prefill_chunk", config.prefill_chunk != 0),
        ];
        if let Some(&(field, _)) = positive.iter().find(|(_, positive)| !positive) {
            return Err(ConfigError::Zero { field });
        }
        if config.context < 2 {
            return Err(ConfigError::Context(config.context));
        }
        if config.max_running > config.step_tokens as usize {
            return Err(ConfigError::StepTokens {
                step_tokens: config.step_tokens,
                max_running: config.max_running,
            });
        }
        let keep = match config.prefix_cache {
            PrefixCache::On => Keep::Prefixes,
            PrefixCache::Off => Keep::Nothing,
        };
        let pool = BlockPool::new(config.blocks, config.block_tokens, keep);
        let group = |&reach: &Reach| Group::new(reach, config.block_tokens, config.chunk());
        let groups = config.groups.iter().map(group).collect();
        Ok(Self {
            config,
            groups,
            pool,
            running: Vec::new(),
            waiting: VecDeque::new(),
            origin: None,
            preemptions: 0,
            prefix_hits: 0,
            prefix_misses: 0,
        })
    }

    /// Experts are bound so from now on: sequences to come share keys and values only with those that were admitted under the
    /// same name. Those there are keep theirs.
    pub fn bind(&mut self, binding: BindingName) {
        self.origin = BlockKey::origin(binding);
    }

    /// Puts a sequence at the end of the queue.
    ///
    /// # Errors
    /// See [`AdmitError`]. Errors of the sequence itself come before a full queue, so that no caller retries in vain.
    pub fn admit(&mut self, seq: NewSequence) -> Result<(), AdmitError> {
        let context = self.config.context;
        if seq.prompt.is_empty() {
            return Err(AdmitError::EmptyPrompt);
        }
        if seq.max_tokens == 0 {
            return Err(AdmitError::ZeroMaxTokens);
        }
        let prompt = u32::try_from(seq.prompt.len()).ok().filter(|&prompt| prompt < context);
        let Some(prompt) = prompt else {
            return Err(AdmitError::TooLong { prompt: seq.prompt.len(), max: context - 1, context });
        };
        let limit = prompt.saturating_add(seq.max_tokens).min(context);
        // The last token is only an output and needs no place in the cache.
        let SchedulerConfig { ref groups, block_tokens, .. } = self.config;
        let needed = most_held(groups, block_tokens, self.config.chunk(), limit - 1);
        if needed > u64::from(self.pool.total()) {
            return Err(AdmitError::NeverFits { needed, have: self.pool.total() });
        }
        if self.running.iter().chain(&self.waiting).any(|other| other.id() == seq.id) {
            return Err(AdmitError::DuplicateId(seq.id));
        }
        if self.waiting.len() >= self.config.max_waiting {
            return Err(AdmitError::QueueFull { limit: self.config.max_waiting });
        }
        self.waiting.push_back(Sequence::new(seq.id, seq.prompt, limit, &self.groups, self.origin));
        Ok(())
    }

    /// Forms the next step and counts its positions as computed. Empty when there is nothing to do.
    ///
    /// A step that decodes has at most `beside_decodes` prefill tokens, but at least one, so that every prompt
    /// comes to its end; one that only prefills has as many as the configuration allows.
    ///
    /// The step before must have run. Each of its items with `sample` must have had its [`append`] or its
    /// [`finish`]; a sequence that had neither is left out. Each sequence whose item failed must have had its
    /// [`finish`] or its [`undo`]: all other positions count as good from now on, for whoever begins with the same tokens, too.
    ///
    /// [`append`]: Self::append
    /// [`finish`]: Self::finish
    /// [`undo`]: Self::undo
    pub fn schedule(&mut self, beside_decodes: u32) -> Step {
        for sequence in &mut self.running {
            sequence.settle(&mut self.pool);
            sequence.forget_unseen(&mut self.pool);
        }
        // Charged to the budget first. The budget has a token for each of `max_running` sequences, so each sequence that
        // does not decode leaves one over, and the oldest prefill always gets some.
        let decodes = self.decoding();
        let rest = self.config.step_tokens - decodes as u32;
        let mut draft = Draft {
            decodes: Vec::new(),
            prefills: Vec::new(),
            preempted: Vec::new(),
            prefill_budget: if decodes == 0 { rest } else { rest.min(beside_decodes.max(1)) },
        };
        // Blocks go by age, whatever they are for. Preemption shortens the list from its far end, so it never
        // takes back what this step has handed out.
        let mut at = 0;
        while at < self.running.len() {
            let work = if self.running[at].is_decoding() { Work::Decode } else { Work::Prefill };
            self.plan(at, work, &mut draft);
            at += 1;
        }
        self.let_in(&mut draft);
        let Draft { decodes: mut items, prefills, preempted, .. } = draft;
        items.extend(prefills);
        Step { items, preempted }
    }

    /// Sequences that decode a token in the next step, if there are blocks.
    #[must_use]
    pub fn decoding(&self) -> usize {
        let decodes = |sequence: &&Sequence| sequence.is_decoding() && !sequence.is_parked();
        self.running.iter().filter(decodes).count()
    }

    /// Takes back an item of the current step whose keys and values are not good: its sequence returns to its state
    /// before the step, and a later step computes the same again. Does nothing for a finished or preempted sequence.
    pub fn undo(&mut self, item: &StepItem) {
        let Some(sequence) = self.running.iter_mut().find(|running| running.id() == item.seq) else { return };
        sequence.undo(&mut self.pool, item.start);
    }

    /// Leaves a running sequence out of steps until [`unpark`](Self::unpark). It keeps its blocks, unless older sequences
    /// need them.
    pub fn park(&mut self, seq: SeqId) {
        if let Some(sequence) = self.running.iter_mut().find(|running| running.id() == seq) {
            sequence.park(true);
        }
    }

    /// Lets all parked sequences go on.
    pub fn unpark(&mut self) {
        self.running.iter_mut().for_each(|sequence| sequence.park(false));
    }

    /// Adds the token sampled for an item of the current step, whose keys and values are good.
    ///
    /// # Errors
    /// When the sequence expects no token.
    pub fn append(&mut self, seq: SeqId, token: TokenId) -> Result<Progress, UnknownSequence> {
        let found = self.running.iter_mut().find(|running| running.id() == seq);
        let Some(sequence) = found.filter(|sequence| sequence.awaits_token()) else {
            return Err(UnknownSequence(seq));
        };
        sequence.settle(&mut self.pool);
        sequence.push(token);
        Ok(if sequence.is_full() { Progress::LengthReached } else { Progress::Continue })
    }

    /// Prompt tokens of a sequence that were in the cache when it first came into the batch. 0 before that, and
    /// when there is no such sequence.
    #[must_use]
    pub fn cached_prompt_tokens(&self, seq: SeqId) -> u32 {
        let mut all = self.running.iter().chain(&self.waiting);
        all.find(|sequence| sequence.id() == seq).map_or(0, Sequence::cached_prompt)
    }

    /// Removes a sequence in whatever state, because it is complete, has failed or was cancelled, and gives up its
    /// blocks. False when there is none of that id.
    ///
    /// Allowed between [`schedule`](Self::schedule) and the end of the step, too: positions that the step still writes are not
    /// cached, and the blocks get a new owner only in the next step, which writes each position before reading it.
    pub fn finish(&mut self, seq: SeqId) -> bool {
        if let Some(at) = self.running.iter().position(|running| running.id() == seq) {
            self.running.remove(at).reset(&mut self.pool);
            return true;
        }
        let waiting = self.waiting.iter().position(|waiting| waiting.id() == seq);
        waiting.is_some_and(|at| self.waiting.remove(at).is_some())
    }

    /// Counts at this moment.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            waiting: self.waiting.len(),
            running: self.running.len(),
            blocks_total: self.pool.total(),
            blocks_free: self.pool.available(),
            blocks_cached: self.pool.cached(),
            preemptions: self.preemptions,
            prefix_hits: self.prefix_hits,
            prefix_misses: self.prefix_misses,
        }
    }

    /// Whether the batch has room for another sequence and the queue is empty.
    #[must_use]
    pub fn has_place(&self) -> bool {
        self.waiting.is_empty() && self.running.len() < self.config.max_running
    }

    /// Number of sequences that the next steps can admit to the batch for the first time, those already waiting included: bounded
    /// by places in the batch and by blocks for their known tokens. Shared prefixes are not counted on.
    #[must_use]
    pub fn room(&self) -> usize {
        let places = self.config.max_running.saturating_sub(self.running.len());
        let claimed: u64 = self.running.iter().map(|sequence| sequence.blocks_wanted(&self.pool)).sum();
        let mut unclaimed = u64::from(self.pool.available()).saturating_sub(claimed);
        let mut room = 0;
        for sequence in self.waiting.iter().take(places) {
            let wanted = sequence.blocks_wanted(&self.pool);
            if wanted > unclaimed {
                return room;
            }
            unclaimed -= wanted;
            room += usize::from(!sequence.has_run());
        }
        // A further sequence takes at least one block of each group.
        let blocks = usize::try_from(unclaimed / self.groups.len() as u64).unwrap_or(usize::MAX);
        room + places.saturating_sub(self.waiting.len()).min(blocks)
    }

    /// Whether there is no sequence at all.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Adds the work of the running sequence at `at` to the draft.
    fn plan(&mut self, at: usize, work: Work, draft: &mut Draft) {
        if self.running[at].is_parked() {
            return;
        }
        let allowed = match work {
            Work::Decode => 1,
            Work::Prefill => self.config.prefill_chunk.min(draft.prefill_budget),
        };
        let wanted = self.running[at].pending().min(allowed);
        if wanted == 0 {
            return;
        }
        let granted = self.make_room(at, wanted, &mut draft.preempted);
        if granted == 0 {
            return;
        }
        let item = self.running[at].advance(granted);
        match work {
            Work::Decode => draft.decodes.push(item),
            Work::Prefill => {
                draft.prefill_budget -= granted;
                draft.prefills.push(item);
            }
        }
    }

    /// Finds blocks for up to `wanted` tokens of the sequence at `at` and returns the number of tokens they hold. Other
    /// sequences are preempted only for the first block: a shorter chunk costs less than a sequence computed again. 0 means
    /// that it is the youngest and must wait.
    fn make_room(&mut self, at: usize, wanted: u32, preempted: &mut Vec<SeqId>) -> u32 {
        loop {
            let granted = self.running[at].reserve(&mut self.pool, wanted);
            if granted > 0 || at + 1 == self.running.len() {
                return granted;
            }
            if let Some(mut youngest) = self.running.pop() {
                youngest.reset(&mut self.pool);
                preempted.push(youngest.id());
                self.preemptions += 1;
                self.waiting.push_front(youngest);
            }
        }
    }

    /// Moves waiting sequences into the step, oldest first, while there are tokens, places and blocks. All blocks
    /// that a sequence holds at once on the way to the end of its known tokens must be there, beyond what running
    /// prefills still need, though it takes only those of its first chunk now: half a prefill that is then preempted would be work for nothing.
    /// A step that preempted admits none: blocks are short, and the preempted sequence could be admitted again by its shared
    /// prefix, only to lose its blocks again.
    fn let_in(&mut self, draft: &mut Draft) {
        if !draft.preempted.is_empty() {
            return;
        }
        let claimed: u64 = self.running.iter().map(|sequence| sequence.blocks_wanted(&self.pool)).sum();
        let mut unclaimed = u64::from(self.pool.available()).saturating_sub(claimed);
        while draft.prefill_budget > 0 && self.running.len() < self.config.max_running {
            let fits = |next: &mut Sequence| next.cost(&self.pool) <= unclaimed;
            let Some(mut next) = self.waiting.pop_front_if(fits) else { break };
            unclaimed -= next.cost(&self.pool);
            let spared = next.adopt(&mut self.pool);
            self.prefix_hits += u64::from(spared);
            self.prefix_misses += u64::from(next.pending());
            self.running.push(next);
            self.plan(self.running.len() - 1, Work::Prefill, draft);
        }
    }
}
