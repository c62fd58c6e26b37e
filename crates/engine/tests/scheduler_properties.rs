//! Thousands of random schedules against a model that knows only what a caller sees: admissions, steps, tokens
//! and cancellations under budgets so tight that preemption is common. The model also keeps what every position of every
//! block was last written with, so that a sequence that is given a wrong block shows, or lacks one that it looks at.
#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;

use muster_engine::NO_BLOCK;
use muster_engine::scheduler::{AdmitError, NewSequence, PrefixCache, Progress, Scheduler, SchedulerConfig};
use muster_engine::step::{Step, StepItem};
use muster_types::Reach;
use muster_types::{SeqId, TokenId};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

type Checked<T = ()> = Result<T, TestCaseError>;

#[derive(Debug, Clone)]
enum Op {
    Admit {
        prompt: u32,
        max_tokens: u32,
    },
    AdmitAgain(Index),
    Step {
        cancelled_midway: Option<Index>,
        undone: Option<Index>,
        stopped_early: Option<Index>,
        beside_decodes: u32,
    },
    Cancel(Index),
}

fn op() -> impl Strategy<Value = Op> {
    let rarely = || prop::option::weighted(0.1, any::<Index>());
    prop_oneof![
        5 => (0_u32..20, 0_u32..20).prop_map(|(prompt, max_tokens)| Op::Admit { prompt, max_tokens }),
        1 => any::<Index>().prop_map(Op::AdmitAgain),
        10 => (rarely(), rarely(), rarely(), 0_u32..20).prop_map(
            |(cancelled_midway, undone, stopped_early, beside_decodes)| {
                Op::Step { cancelled_midway, undone, stopped_early, beside_decodes }
            }
        ),
        1 => any::<Index>().prop_map(Op::Cancel),
    ]
}

fn reach() -> impl Strategy<Value = Reach> {
    let size = || (1_u32..16).prop_map(|size| NonZero::new(size).unwrap());
    prop_oneof![3 => Just(Reach::All), 3 => size().prop_map(Reach::Last), 2 => size().prop_map(Reach::Chunk)]
}

prop_compose! {
    fn config()(
        block_tokens in 1_u32..6,
        groups in prop_oneof![Just(vec![Reach::All]), prop::collection::vec(reach(), 1..4)],
        blocks in 1_u32..15,
        context in 2_u32..40,
        max_running in 1_usize..6,
        max_waiting in 1_usize..8,
        spare_tokens in 0_u32..12,
        prefill_chunk in 1_u32..12,
        prefix_cache in prop_oneof![Just(PrefixCache::Off), Just(PrefixCache::On)],
    ) -> SchedulerConfig {
        SchedulerConfig {
            block_tokens: NonZero::new(block_tokens).unwrap(),
            // As many for each group, so that what several groups need fits as often.
            blocks: blocks * groups.len() as u32,
            groups,
            context,
            max_running,
            max_waiting,
            step_tokens: max_running as u32 + spare_tokens,
            prefill_chunk,
            prefix_cache,
        }
    }
}

/// How often each interesting thing happened over all cases: a property that was never put to the test proves
/// nothing.
#[derive(Debug, Default)]
struct Coverage {
    preempted: u64,
    preempted_with_output: u64,
    stalled: u64,
    cut_for_blocks: u64,
    waited_for_blocks: u64,
    shared_prefill: u64,
    cancelled_midway: u64,
    cancelled_waiting: u64,
    length_reached: u64,
    bounded: u64,
    adopted: u64,
    adopted_after_preemption: u64,
    shared: u64,
    failed_writes: u64,
    undone: u64,
    forgotten: u64,
    adopted_less_than_all: u64,
    longer_than_the_cache: u64,
    refused: [u64; 6],
}

/// A sequence as its caller knows it.
#[derive(Debug)]
struct Live {
    id: SeqId,
    prompt: u32,
    known: Vec<TokenId>,
    limit: u32,
    /// Positions computed so far. Running sequences have some, waiting ones none.
    computed: u32,
    /// One for each group, all equally long.
    tables: Vec<Vec<u32>>,
    /// Number of the step in which it must have ended.
    deadline: u64,
    first_token: Option<u64>,
    was_preempted: bool,
}

impl Live {
    fn known(&self) -> u32 {
        self.known.len() as u32
    }

    fn pending(&self) -> u32 {
        self.known() - self.computed
    }

    fn is_decoding(&self) -> bool {
        self.computed > 0 && self.pending() == 1
    }

    fn blocks(&self) -> impl Iterator<Item = u32> + '_ {
        self.tables.iter().flatten().copied().filter(|&block| block != NO_BLOCK)
    }
}

/// The definition, position by position.
fn first_visible(reach: Reach, position: u32) -> u32 {
    let sees = |&earlier: &u32| match reach {
        Reach::All => true,
        Reach::Last(count) => position - earlier < count.get(),
        Reach::Chunk(size) => position / size == earlier / size,
    };
    (0..=position).find(sees).unwrap()
}

/// The tables of an item, one for each group.
fn tables_of(item: &StepItem, groups: u32) -> Vec<Vec<u32>> {
    item.blocks.chunks(item.blocks.len() / groups as usize).map(<[u32]>::to_vec).collect()
}

/// What a position of a block was last written for: the group, and the sequence up to and including the token.
type Content = (usize, Vec<TokenId>);

struct Model<'a> {
    config: SchedulerConfig,
    scheduler: Scheduler,
    /// In order of admission.
    live: Vec<Live>,
    /// (prompt, step of the first token) of all that got one, in order of admission.
    first_tokens: Vec<(u64, u32, u64)>,
    next_id: u64,
    steps: u64,
    undone: bool,
    /// In the current step.
    adopted: bool,
    /// By block and position in it; `None` where a step wrote and failed.
    written: BTreeMap<(u32, u32), Option<Content>>,
    coverage: &'a mut Coverage,
}

impl Model<'_> {
    fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.config.block_tokens.get())
    }

    fn groups(&self) -> u32 {
        self.config.groups.len() as u32
    }

    /// Blocks that a sequence of so many tokens holds at most at once, by group, wherever its chunks begin.
    fn most_held(&self, tokens: u32) -> Vec<u32> {
        let size = self.config.block_tokens.get();
        let chunk = self.config.prefill_chunk.min(self.config.step_tokens);
        let of_group = |reach: &Reach| {
            let seen_before = match reach {
                Reach::All => return self.blocks_for(tokens),
                Reach::Last(count) | Reach::Chunk(count) => count.get() - 1,
            };
            let widest = (0..size).map(|first| (first + seen_before + chunk).div_ceil(size)).max();
            self.blocks_for(tokens).min(widest.unwrap())
        };
        self.config.groups.iter().map(of_group).collect()
    }

    /// What a sequence of so many tokens holds when all before position `next` is computed and nothing after it.
    fn tables_at(&self, tables: &[Vec<u32>], next: u32) -> Vec<Vec<u32>> {
        let size = self.config.block_tokens.get();
        let of_group = |(reach, table): (&Reach, &Vec<u32>)| -> Vec<u32> {
            let is_seen = |&at: &u32| (at + 1) * size > first_visible(*reach, next);
            (0..).zip(table).map(|(at, &block)| if is_seen(&at) { block } else { NO_BLOCK }).collect()
        };
        self.config.groups.iter().zip(tables).map(of_group).collect()
    }

    /// Blocks that a running sequence comes to hold at most, beyond those that it has, until its known tokens are computed.
    fn wanted(&self, live: &Live) -> u32 {
        let most = self.most_held(u32::MAX / 2);
        let of_group = |(table, most): (&Vec<u32>, u32)| {
            let held = table.iter().filter(|&&block| block != NO_BLOCK).count() as u32;
            self.blocks_for(live.known()).saturating_sub(table.len() as u32).min(most.saturating_sub(held))
        };
        live.tables.iter().zip(most).map(of_group).sum()
    }

    fn running(&self) -> usize {
        self.live.iter().filter(|live| live.computed > 0).count()
    }

    fn blocks_free(&self) -> u32 {
        self.config.blocks - self.used().len() as u32
    }

    /// Blocks in tables.
    fn used(&self) -> BTreeSet<u32> {
        self.live.iter().flat_map(Live::blocks).collect()
    }

    fn token(&self, id: u64, position: u32) -> TokenId {
        // Without a cache no two sequences or positions share a token, so that a mix-up shows. With one there are
        // two kinds of beginnings.
        let kind = if self.caches() && position < 8 { id as u32 % 2 } else { id as u32 };
        TokenId::new(kind * 1000 + position, u32::MAX).unwrap()
    }

    fn caches(&self) -> bool {
        self.config.prefix_cache == PrefixCache::On
    }

    /// Prefill tokens that a step may have beside so many decodes.
    fn prefill_budget(&self, decodes: usize, beside_decodes: u32) -> u32 {
        let rest = self.config.step_tokens - decodes as u32;
        if decodes == 0 { rest } else { rest.min(beside_decodes.max(1)) }
    }

    fn admit(&mut self, id: u64, prompt: u32, max_tokens: u32) -> Checked {
        let context = self.config.context;
        let limit = (prompt + max_tokens).min(context);
        let needed = self.most_held(limit.saturating_sub(1)).iter().map(|&blocks| u64::from(blocks)).sum();
        let waiting = self.live.len() - self.running();
        let expected = if prompt == 0 {
            Err(AdmitError::EmptyPrompt)
        } else if max_tokens == 0 {
            Err(AdmitError::ZeroMaxTokens)
        } else if prompt >= context {
            Err(AdmitError::TooLong { prompt: prompt as usize, max: context - 1, context })
        } else if needed > u64::from(self.config.blocks) {
            Err(AdmitError::NeverFits { needed, have: self.config.blocks })
        } else if self.live.iter().any(|live| live.id.get() == id) {
            Err(AdmitError::DuplicateId(SeqId::new(id)))
        } else if waiting >= self.config.max_waiting {
            Err(AdmitError::QueueFull { limit: self.config.max_waiting })
        } else {
            Ok(())
        };
        let known: Vec<_> = (0..prompt).map(|position| self.token(id, position)).collect();
        let sequence = NewSequence { id: SeqId::new(id), prompt: known.clone(), max_tokens };
        prop_assert_eq!(&self.scheduler.admit(sequence), &expected);
        if let Err(error) = expected {
            let kind = match error {
                AdmitError::EmptyPrompt => 0,
                AdmitError::ZeroMaxTokens => 1,
                AdmitError::TooLong { .. } => 2,
                AdmitError::NeverFits { .. } => 3,
                AdmitError::DuplicateId(_) => 4,
                AdmitError::QueueFull { .. } => 5,
            };
            self.coverage.refused[kind] += 1;
            return Ok(());
        }
        let without_windows = u64::from(self.blocks_for(limit - 1) * self.groups());
        self.coverage.longer_than_the_cache += u64::from(without_windows > u64::from(self.config.blocks));
        // The oldest sequence computes at least one position per step and keeps it, so at worst everyone older
        // and then this one pass in single file.
        let deadline = self.steps + self.live.iter().map(|live| u64::from(live.limit)).sum::<u64>();
        self.live.push(Live {
            id: SeqId::new(id),
            prompt,
            known,
            limit,
            computed: 0,
            tables: vec![Vec::new(); self.config.groups.len()],
            deadline: deadline + u64::from(limit),
            first_token: None,
            was_preempted: false,
        });
        Ok(())
    }

    fn step(
        &mut self,
        cancelled_midway: Option<Index>,
        undone: Option<Index>,
        stopped_early: Option<Index>,
        beside_decodes: u32,
    ) -> Checked {
        self.steps += 1;
        let decodes = self.live.iter().filter(|live| live.is_decoding()).count();
        prop_assert_eq!(self.scheduler.decoding(), decodes);
        let budget = self.prefill_budget(decodes, beside_decodes);
        self.coverage.bounded += u64::from(budget < self.config.step_tokens - decodes as u32);
        for at in 0..self.live.len() {
            let live = &self.live[at];
            let kept = self.tables_at(&live.tables, live.computed);
            self.coverage.forgotten += u64::from(kept != live.tables);
            self.live[at].tables = kept;
        }
        self.adopted = false;
        let step = self.scheduler.schedule(beside_decodes);
        self.check_preemption(&step)?;
        self.check_order(&step)?;
        let decoding: BTreeSet<_> =
            self.live.iter().filter(|live| live.is_decoding()).map(|live| live.id).collect();
        for item in &step.items {
            self.check_item(item)?;
        }
        self.check_budget(&step, &decoding, budget)?;
        self.check_tables()?;

        if let Some(pick) = cancelled_midway.filter(|_| !self.live.is_empty()) {
            self.coverage.cancelled_midway += 1;
            let failed = self.live[pick.index(self.live.len())].id;
            if let Some(item) = step.items.iter().find(|item| item.seq == failed) {
                self.coverage.failed_writes += 1;
                self.spoil(item);
            }
            self.finish(pick.index(self.live.len()))?;
            self.check_tables()?;
        }
        let stopped =
            stopped_early.filter(|_| !step.items.is_empty()).map(|pick| pick.index(step.items.len()));
        let undone = undone.filter(|_| !step.items.is_empty()).map(|pick| pick.index(step.items.len()));
        for (at, item) in step.items.iter().enumerate() {
            // A sequence that has nothing computed is one that waits, to this model.
            if undone == Some(at) && item.start > 0 && self.undo(item)? {
                continue;
            }
            self.append(item, stopped == Some(at))?;
        }
        let late = self.live.iter().find(|live| live.deadline < self.steps);
        prop_assert!(late.is_none(), "starved: {late:?}");
        self.check_tables()
    }

    /// Preempted sequences are the youngest of those running, and only the want of blocks costs them theirs.
    fn check_preemption(&mut self, step: &Step) -> Checked {
        let free = self.blocks_free();
        let mut lost = Vec::new();
        for &id in &step.preempted {
            let running = self.running();
            prop_assert!(running > 1, "the oldest is never preempted");
            let youngest = &mut self.live[running - 1];
            prop_assert_eq!(youngest.id, id);
            self.coverage.preempted += 1;
            self.coverage.preempted_with_output += u64::from(youngest.known() > youngest.prompt);
            lost = youngest.blocks().collect();
            prop_assert!(step.items.iter().all(|item| item.seq != id), "preempted and run at once");
            youngest.was_preempted = true;
            youngest.tables.iter_mut().for_each(Vec::clear);
            youngest.computed = 0;
        }
        if !step.preempted.is_empty() {
            let held = self.used();
            let lost = lost.iter().filter(|block| !held.contains(block)).count() as u32;
            let used: BTreeSet<_> = step.items.iter().flat_map(|item| &item.blocks).collect();
            let taken =
                used.iter().filter(|&&&block| block != NO_BLOCK && !held.contains(&block)).count() as u32;
            // Without the last preemption there would not have been enough. Only a sequence whose step was undone may hold
            // nothing but what others hold, too; it has nothing to lose and nothing to give. Of several groups one needs a
            // block each, and who has just left its windows behind may have fewer.
            let had_nothing =
                if self.groups() == 1 { self.undone && lost == 0 } else { lost < self.groups() };
            prop_assert!(had_nothing || taken > self.blocks_free() - lost, "{taken} taken of {free} free");
        }
        Ok(())
    }

    /// Items are decodes and then prefills, each by age, and no sequence has two.
    fn check_order(&self, step: &Step) -> Checked {
        let key = |item: &StepItem| {
            let age = self.live.iter().position(|live| live.id == item.seq);
            age.map(|age| (!self.live[age].is_decoding(), age))
        };
        let keys: Option<Vec<_>> = step.items.iter().map(key).collect();
        prop_assert!(keys.is_some_and(|keys| keys.is_sorted_by(|a, b| a < b)), "{step:?}");
        Ok(())
    }

    /// An item goes on exactly where its sequence stands, with its tokens, in its blocks.
    fn check_item(&mut self, item: &StepItem) -> Checked {
        let end = item.start + item.tokens.len() as u32;
        let covering = self.blocks_for(end) * self.groups();
        let tables = tables_of(item, self.groups());
        let size = self.config.block_tokens.get();
        let mut adopted_less = false;
        let Some(live) = self.live.iter_mut().find(|live| live.id == item.seq) else {
            return Err(TestCaseError::fail("an item of nobody"));
        };
        if self.config.prefix_cache == PrefixCache::Off || live.computed > 0 {
            prop_assert_eq!(item.start, live.computed, "a gap or a repetition");
        } else {
            prop_assert!(item.start.is_multiple_of(size));
            adopted_less = item.start > 0 && tables.iter().any(|table| table[0] == NO_BLOCK);
            self.adopted |= item.start > 0;
            self.coverage.adopted += u64::from(item.start > 0);
            self.coverage.adopted_after_preemption += u64::from(item.start > 0 && live.was_preempted);
        }
        prop_assert!(item.start < end && end <= live.known());
        prop_assert_eq!(&item.tokens[..], &live.known[item.start as usize..end as usize]);
        prop_assert_eq!(item.sample, end == live.known());
        prop_assert_eq!(item.blocks.len() as u32, covering);
        let stay = |(now, before): (&Vec<u32>, &Vec<u32>)| now.starts_with(before);
        prop_assert!(tables.iter().zip(&live.tables).all(stay), "keys and values do not move");
        live.tables.clone_from(&tables);
        live.computed = end;
        self.coverage.adopted_less_than_all += u64::from(adopted_less);
        prop_assert_eq!(&self.tables_at(&tables, item.start), &tables, "what nothing sees is given up");
        let most = self.most_held(end);
        for (table, most) in tables.iter().zip(most) {
            prop_assert!(table.iter().filter(|&&block| block != NO_BLOCK).count() as u32 <= most);
        }
        self.check_content(item, &tables)
    }

    fn place(&self, table: &[u32], position: u32) -> (u32, u32) {
        let size = self.config.block_tokens.get();
        (table[(position / size) as usize], position % size)
    }

    /// What an item was to write cannot be relied on.
    fn spoil(&mut self, item: &StepItem) {
        for table in tables_of(item, self.groups()) {
            for position in (item.start..).take(item.tokens.len()) {
                self.written.insert(self.place(&table, position), None);
            }
        }
    }

    /// What an item attends to was written for the very same tokens in the same group, and it writes where nobody else
    /// looks.
    fn check_content(&mut self, item: &StepItem, tables: &[Vec<u32>]) -> Checked {
        let Some(live) = self.live.iter().find(|live| live.id == item.seq) else {
            return Err(TestCaseError::fail("an item of nobody"));
        };
        let known = live.known.clone();
        for (group, table) in tables.iter().enumerate() {
            for position in first_visible(self.config.groups[group], item.start)..item.start {
                let place = self.place(table, position);
                let found = self.written.get(&place).map(|content| content.as_ref());
                let expected = Some(Some(&(group, known[..=position as usize].to_vec())));
                prop_assert_eq!(found, expected, "position {} of group {} of {:?}", position, group, item);
            }
        }
        for (group, table) in tables.iter().enumerate() {
            for position in (item.start..).take(item.tokens.len()) {
                let place = self.place(table, position);
                let others =
                    self.live.iter().flat_map(Live::blocks).filter(|&block| block == place.0).count();
                prop_assert!(place.0 < self.config.blocks);
                prop_assert_eq!(others, 1, "a write to a block that others hold");
                self.written.insert(place, Some((group, known[..=position as usize].to_vec())));
            }
        }
        Ok(())
    }

    /// Limits are kept, and nobody who could have run was left out or cut short.
    fn check_budget(&mut self, step: &Step, decoding: &BTreeSet<SeqId>, budget: u32) -> Checked {
        let running = self.running();
        prop_assert!(step.tokens() as u32 <= self.config.step_tokens);
        prop_assert!(running <= self.config.max_running);
        prop_assert!(self.live[running..].iter().all(|live| live.computed == 0), "running before waiting");

        let prefills = step.items.iter().filter(|item| !decoding.contains(&item.seq));
        let sizes: Vec<_> = prefills.map(|item| item.tokens.len() as u32).collect();
        prop_assert!(sizes.iter().all(|&size| size <= self.config.prefill_chunk));
        self.coverage.shared_prefill += u64::from(sizes.len() > 1);
        prop_assert!(sizes.iter().sum::<u32>() <= budget);
        let spent = sizes.iter().sum::<u32>() >= budget;

        let free = self.blocks_free();
        for (age, live) in self.live[..running].iter().enumerate() {
            let item = step.items.iter().find(|item| item.seq == live.id);
            let size = item.map_or(0, |item| item.tokens.len() as u32);
            let full = size == self.config.prefill_chunk || (spent && !decoding.contains(&live.id));
            if live.pending() == 0 || full {
                continue;
            }
            // The blocks it holds are full, and there was no other when its turn came.
            prop_assert_eq!(live.computed % self.config.block_tokens, 0, "left out: {:?}", live);
            if size == 0 {
                self.coverage.stalled += 1;
                prop_assert!(free < self.groups() && age == running - 1, "an older one preempts instead");
            } else {
                self.coverage.cut_for_blocks += 1;
                prop_assert!(free < self.groups() || !step.preempted.is_empty(), "left out: {live:?}");
            }
        }
        prop_assert_eq!(step.items.is_empty(), self.live.is_empty());
        let wanted: u32 = self.live[..running].iter().map(|live| self.wanted(live)).sum();
        let claimed = self.used().len() as u32 + wanted;
        if step.items.iter().any(|item| item.start == 0) {
            prop_assert!(claimed <= self.config.blocks, "let in without room for all it brings");
        }
        // Whoever takes over a window that others hold is counted for as much again, which does not show in what it
        // holds.
        let counted_twice = self.adopted && self.config.groups.iter().any(|reach| *reach != Reach::All);
        if let Some(head) = self.live.get(running)
            && running < self.config.max_running
            && !spent
            && !counted_twice
            && step.preempted.is_empty()
        {
            let needed = self.most_held(head.known()).iter().sum::<u32>();
            prop_assert!(claimed + needed > self.config.blocks, "could have been let in: {:?}", head);
            self.coverage.waited_for_blocks += 1;
        }
        Ok(())
    }

    /// Every block is free or in one table, or in several of one group at the same place; and the counts say so.
    fn check_tables(&mut self) -> Checked {
        let mut places: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
        for live in &self.live {
            for (group, table) in live.tables.iter().enumerate() {
                for (at, &block) in table.iter().enumerate().filter(|&(_, &block)| block != NO_BLOCK) {
                    prop_assert!(block < self.config.blocks);
                    if let Some(other) = places.insert(block, (group, at)) {
                        prop_assert!(self.caches(), "a block in two tables");
                        prop_assert_eq!(other, (group, at));
                        self.coverage.shared += 1;
                    }
                }
            }
        }
        let stats = self.scheduler.stats();
        prop_assert!(stats.blocks_cached <= stats.blocks_free);
        prop_assert!(self.caches() || (stats.blocks_cached, stats.prefix_hits) == (0, 0));
        prop_assert_eq!(stats.blocks_total, self.config.blocks);
        prop_assert_eq!(stats.blocks_free, self.blocks_free());
        prop_assert_eq!((stats.running, stats.waiting), (self.running(), self.live.len() - self.running()));
        prop_assert_eq!(self.scheduler.is_idle(), self.live.is_empty());
        Ok(())
    }

    fn append(&mut self, item: &StepItem, stop: bool) -> Checked {
        let at = self.live.iter().position(|live| live.id == item.seq);
        let next = at.map_or(0, |at| self.live[at].known());
        let token = self.token(item.seq.get(), next);
        let Some(at) = at.filter(|_| item.sample) else {
            // Cancelled in the middle of the step, or not all of its prompt computed.
            prop_assert!(self.scheduler.append(item.seq, token).is_err());
            return Ok(());
        };
        let steps = self.steps;
        let live = &mut self.live[at];
        live.known.push(token);
        if live.first_token.is_none() {
            live.first_token = Some(steps);
            self.first_tokens.push((live.id.get(), live.prompt, steps));
        }
        let full = live.known() == live.limit;
        let progress = if full { Progress::LengthReached } else { Progress::Continue };
        prop_assert_eq!(self.scheduler.append(item.seq, token), Ok(progress));
        self.coverage.length_reached += u64::from(full);
        if full || stop { self.finish(at) } else { Ok(()) }
    }

    /// An item whose step failed is done again later. False when its sequence was cancelled meanwhile.
    fn undo(&mut self, item: &StepItem) -> Checked<bool> {
        self.scheduler.undo(item);
        self.spoil(item);
        let kept = self.blocks_for(item.start) as usize;
        let Some(live) = self.live.iter_mut().find(|live| live.id == item.seq) else { return Ok(false) };
        live.computed = item.start;
        live.tables.iter_mut().for_each(|table| table.truncate(kept));
        // Whoever comes later waits for as long as the lost work takes.
        let lost = item.tokens.len() as u64;
        self.live.iter_mut().for_each(|live| live.deadline += lost);
        self.coverage.undone += 1;
        self.undone = true;
        Ok(true)
    }

    fn finish(&mut self, at: usize) -> Checked {
        let live = self.live.remove(at);
        self.coverage.cancelled_waiting += u64::from(live.computed == 0);
        prop_assert!(self.scheduler.finish(live.id));
        prop_assert!(!self.scheduler.finish(live.id), "only once");
        Ok(())
    }

    /// Whoever came first is served first, unless a shorter prompt needs fewer chunks; and without a chunk size
    /// that bites, always.
    fn check_first_tokens(&mut self) -> Checked {
        self.first_tokens.sort_unstable();
        if self.caches() || self.undone {
            // Whoever finds more of its prompt computed may be done sooner, and whoever lost work later.
            return Ok(());
        }
        let strict = self.config.prefill_chunk >= self.config.step_tokens;
        for (at, &(id, prompt, step)) in self.first_tokens.iter().enumerate() {
            let overtaken = self.first_tokens[at..]
                .iter()
                .find(|&&(_, later_prompt, later)| later < step && (strict || prompt <= later_prompt));
            prop_assert!(
                overtaken.is_none(),
                "{overtaken:?} came before {id} (prompt {prompt}, step {step})"
            );
        }
        Ok(())
    }
}

fn run_schedule(config: SchedulerConfig, ops: &[Op], coverage: &mut Coverage) -> Checked {
    let scheduler = Scheduler::new(config.clone()).unwrap();
    let mut model = Model {
        config,
        scheduler,
        live: Vec::new(),
        first_tokens: Vec::new(),
        next_id: 0,
        steps: 0,
        undone: false,
        adopted: false,
        written: BTreeMap::new(),
        coverage,
    };
    for op in ops {
        match *op {
            Op::Admit { prompt, max_tokens } => {
                model.next_id += 1;
                model.admit(model.next_id, prompt, max_tokens)?;
            }
            Op::AdmitAgain(pick) if !model.live.is_empty() => {
                let id = model.live[pick.index(model.live.len())].id;
                model.admit(id.get(), 1, 1)?;
            }
            Op::Cancel(pick) if !model.live.is_empty() => {
                model.finish(pick.index(model.live.len()))?;
                model.check_tables()?;
            }
            Op::AdmitAgain(_) | Op::Cancel(_) => {}
            Op::Step { cancelled_midway, undone, stopped_early, beside_decodes } => {
                model.step(cancelled_midway, undone, stopped_early, beside_decodes)?;
            }
        }
    }
    // Deadlines end this loop, should anything starve.
    while !model.live.is_empty() {
        model.step(None, None, None, u32::MAX)?;
    }
    prop_assert_eq!(model.scheduler.schedule(0), Step::default());
    prop_assert_eq!(model.scheduler.stats().blocks_free, model.config.blocks);
    model.check_first_tokens()
}

#[test]
fn random_schedules_keep_every_promise() {
    let coverage = std::cell::RefCell::new(Coverage::default());
    let schedules = (config(), prop::collection::vec(op(), 0..80));
    // More when asked for, but not so few that something never happens.
    let cases = Config::default().cases.max(20_000);
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    runner
        .run(&schedules, |(config, ops)| run_schedule(config, &ops, &mut coverage.borrow_mut()))
        .unwrap_or_else(|error| panic!("{error}"));

    let coverage = coverage.into_inner();
    let Coverage { refused, .. } = coverage;
    let happened = [
        coverage.preempted,
        coverage.preempted_with_output,
        coverage.stalled,
        coverage.cut_for_blocks,
        coverage.waited_for_blocks,
        coverage.shared_prefill,
        coverage.cancelled_midway,
        coverage.cancelled_waiting,
        coverage.length_reached,
        coverage.bounded,
        coverage.adopted,
        coverage.adopted_after_preemption,
        coverage.shared,
        coverage.failed_writes,
        coverage.undone,
        coverage.forgotten,
        coverage.adopted_less_than_all,
        coverage.longer_than_the_cache,
    ];
    assert!(happened.iter().chain(&refused).all(|&times| times > 20), "{coverage:?}");
}
