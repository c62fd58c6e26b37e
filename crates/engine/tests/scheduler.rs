//! The scheduler's rules, one small scene each.
#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::num::NonZero;

use muster_engine::NO_BLOCK;
use muster_engine::scheduler::{
    AdmitError, ConfigError, NewSequence, PrefixCache, Progress, Scheduler, SchedulerConfig, UnknownSequence,
};
use muster_engine::step::{Step, StepItem};
use muster_types::Reach;
use muster_types::{Retry, SeqId, TokenId};

/// Room for everything; scenes tighten what they are about.
fn roomy() -> SchedulerConfig {
    SchedulerConfig {
        block_tokens: NonZero::new(4).unwrap(),
        groups: vec![Reach::All],
        blocks: 100,
        context: 100,
        max_running: 8,
        max_waiting: 8,
        step_tokens: 16,
        prefill_chunk: 16,
        prefix_cache: PrefixCache::Off,
    }
}

/// The same, with blocks that keep their content.
fn caching() -> SchedulerConfig {
    SchedulerConfig { prefix_cache: PrefixCache::On, ..roomy() }
}

fn sequence(id: u64, prompt: u32, max_tokens: u32) -> NewSequence {
    NewSequence { id: SeqId::new(id), prompt: TokenId::all(prompt).collect(), max_tokens }
}

fn token(number: u32) -> TokenId {
    TokenId::new(number, u32::MAX).unwrap()
}

fn with(config: SchedulerConfig, sequences: &[(u64, u32, u32)]) -> Scheduler {
    let mut scheduler = Scheduler::new(config).unwrap();
    for &(id, prompt, max_tokens) in sequences {
        scheduler.admit(sequence(id, prompt, max_tokens)).unwrap();
    }
    scheduler
}

/// (sequence, start, tokens, sample) of every item.
fn items(step: &Step) -> Vec<(u64, u32, usize, bool)> {
    step.items.iter().map(|item| (item.seq.get(), item.start, item.tokens.len(), item.sample)).collect()
}

/// Runs a step, with token 9 for every sample, and ends what has reached its length.
fn run(scheduler: &mut Scheduler) -> Step {
    let step = scheduler.schedule(u32::MAX);
    for item in step.items.iter().filter(|item| item.sample) {
        if scheduler.append(item.seq, token(9)).unwrap() == Progress::LengthReached {
            assert!(scheduler.finish(item.seq));
        }
    }
    step
}

#[test]
fn one_sequence_from_prompt_to_length() {
    let mut scheduler = with(roomy(), &[(1, 5, 3)]);
    let step = run(&mut scheduler);
    assert_eq!(items(&step), [(1, 0, 5, true)]);
    assert_eq!(step.items[0].tokens, TokenId::all(5).collect::<Vec<_>>());
    assert_eq!(step.items[0].blocks.len(), 2);
    let step = run(&mut scheduler);
    assert_eq!((items(&step), &step.items[0].tokens[..]), (vec![(1, 5, 1, true)], &[token(9)][..]));
    assert_eq!(items(&run(&mut scheduler)), [(1, 6, 1, true)]);
    assert!(scheduler.is_idle());
    assert_eq!(scheduler.schedule(u32::MAX), Step::default());
    assert_eq!(scheduler.stats().blocks_free, 100);
}

#[test]
fn a_long_prompt_does_not_hold_up_a_stream() {
    let config = SchedulerConfig { prefill_chunk: 6, step_tokens: 8, ..roomy() };
    let mut scheduler = with(config, &[(1, 2, 9)]);
    run(&mut scheduler);
    scheduler.admit(sequence(2, 14, 1)).unwrap();
    assert_eq!(items(&run(&mut scheduler)), [(1, 2, 1, true), (2, 0, 6, false)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 3, 1, true), (2, 6, 6, false)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 4, 1, true), (2, 12, 2, true)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 5, 1, true)]);
}

#[test]
fn the_caller_bounds_prefill_beside_streams_but_never_stops_it() {
    let mut scheduler = with(roomy(), &[(1, 2, 9)]);
    run(&mut scheduler);
    scheduler.admit(sequence(2, 14, 1)).unwrap();
    scheduler.admit(sequence(3, 3, 1)).unwrap();
    assert_eq!(scheduler.decoding(), 1);
    let mut bounded = |limit| {
        let step = scheduler.schedule(limit);
        for item in step.items.iter().filter(|item| item.sample) {
            if scheduler.append(item.seq, token(9)).unwrap() == Progress::LengthReached {
                scheduler.finish(item.seq);
            }
        }
        items(&step)
    };
    assert_eq!(bounded(5), [(1, 2, 1, true), (2, 0, 5, false)]);
    assert_eq!(bounded(0), [(1, 3, 1, true), (2, 5, 1, false)]);
    assert_eq!(bounded(10), [(1, 4, 1, true), (2, 6, 8, true), (3, 0, 2, false)]);
    scheduler.finish(SeqId::new(1));
    // Nobody waits for a token: the bound is not for this step.
    scheduler.admit(sequence(4, 9, 1)).unwrap();
    assert_eq!(scheduler.decoding(), 1, "the last token of sequence 3's prompt");
    scheduler.finish(SeqId::new(3));
    assert_eq!(items(&scheduler.schedule(0)), [(4, 0, 9, true)]);
}

#[test]
fn a_known_beginning_is_not_computed_again() {
    let mut scheduler = with(caching(), &[(1, 10, 2)]);
    run(&mut scheduler);
    run(&mut scheduler);
    assert!(scheduler.is_idle());
    let stats = scheduler.stats();
    assert_eq!((stats.blocks_free, stats.blocks_cached), (100, 2), "ten tokens fill two blocks");
    scheduler.admit(sequence(2, 10, 2)).unwrap();
    scheduler.admit(sequence(3, 8, 2)).unwrap();
    scheduler.admit(sequence(4, 3, 2)).unwrap();
    let step = run(&mut scheduler);
    // Of sequence 3's prompt everything is there, but its last token must run; it does so in a block of its own.
    assert_eq!(items(&step), [(2, 8, 2, true), (3, 4, 4, true), (4, 0, 3, true)]);
    assert_eq!(step.items[0].blocks[0], step.items[1].blocks[0]);
    assert_ne!(step.items[0].blocks[1], step.items[1].blocks[1]);
    assert_eq!([2, 3, 4].map(|id| scheduler.cached_prompt_tokens(SeqId::new(id))), [8, 4, 0]);
    let stats = scheduler.stats();
    assert_eq!((stats.prefix_hits, stats.prefix_misses), (12, 10 + 2 + 4 + 3));
    // Two shared blocks, then one block each for the rest.
    assert_eq!((stats.blocks_free, stats.blocks_cached), (95, 0));
}

#[test]
fn one_last_token_of_a_prompt_is_prefill() {
    // Sequence 2 decodes; sequence 3 comes with all but its last token in the cache.
    let config = SchedulerConfig { max_running: 2, step_tokens: 2, prefill_chunk: 2, ..caching() };
    let mut scheduler = with(config, &[(1, 5, 1), (2, 1, 9), (3, 5, 2)]);
    for _ in 0..2 {
        run(&mut scheduler);
    }
    assert_eq!(items(&run(&mut scheduler)), [(1, 4, 1, true), (2, 0, 1, true)]);
    assert_eq!(items(&run(&mut scheduler)), [(2, 1, 1, true), (3, 4, 1, true)]);
}

#[test]
fn what_a_failed_step_wrote_is_kept_for_nobody() {
    let config = SchedulerConfig { prefill_chunk: 8, ..caching() };
    let mut scheduler = with(config, &[(1, 14, 2)]);
    run(&mut scheduler);
    let step = scheduler.schedule(u32::MAX);
    assert_eq!(items(&step), [(1, 8, 6, true)]);
    scheduler.finish(SeqId::new(1));
    scheduler.admit(sequence(2, 14, 2)).unwrap();
    assert_eq!(items(&run(&mut scheduler)), [(2, 8, 6, true)]);
    assert_eq!(scheduler.stats().blocks_cached, 0);
}

#[test]
fn a_preempted_sequence_finds_what_nobody_needed() {
    let mut scheduler = with(SchedulerConfig { blocks: 5, ..caching() }, &[(1, 4, 9)]);
    let prompt: Vec<_> = (50..61).map(token).collect();
    scheduler.admit(NewSequence { id: SeqId::new(2), prompt, max_tokens: 5 }).unwrap();
    let preempted = (0..6).flat_map(|_| run(&mut scheduler).preempted).collect::<Vec<_>>();
    assert_eq!(preempted, [SeqId::new(2)]);
    // Sequence 1 took the last of its three full blocks; the two before it wait for it.
    assert_eq!((scheduler.stats().blocks_free, scheduler.stats().blocks_cached), (2, 2));
    while !items(&run(&mut scheduler)).contains(&(2, 8, 5, true)) {
        assert!(!scheduler.is_idle());
    }
    assert_eq!(scheduler.cached_prompt_tokens(SeqId::new(2)), 0, "at first there was nothing");
}

#[test]
fn prefills_share_a_step_oldest_first() {
    let config = SchedulerConfig { prefill_chunk: 6, step_tokens: 10, ..roomy() };
    let mut scheduler = with(config, &[(1, 9, 1), (2, 3, 1), (3, 4, 1)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 0, 6, false), (2, 0, 3, true), (3, 0, 1, false)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 6, 3, true), (3, 1, 3, true)]);
}

#[test]
fn nobody_overtakes_the_head_of_the_queue() {
    // Sequence 2 needs three blocks and two are left; sequence 3 would fit, but waits behind it.
    let config = SchedulerConfig { blocks: 4, ..roomy() };
    let mut scheduler = with(config, &[(1, 7, 2), (2, 9, 1), (3, 1, 1)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 0, 7, true)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 7, 1, true)]);
    assert_eq!(items(&run(&mut scheduler)), [(2, 0, 9, true), (3, 0, 1, true)]);
}

#[test]
fn blocks_promised_to_a_prefill_are_not_promised_again() {
    // After its first chunk sequence 1 holds one block of the three its prompt needs, so two of the three free
    // ones are spoken for; later one of two.
    let config = SchedulerConfig { blocks: 4, prefill_chunk: 4, ..roomy() };
    let mut scheduler = with(config, &[(1, 12, 1), (2, 5, 1)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 0, 4, false)]);
    assert_eq!((scheduler.stats().waiting, scheduler.stats().blocks_free), (1, 3));
    assert_eq!(items(&run(&mut scheduler)), [(1, 4, 4, false)]);
    assert_eq!((scheduler.stats().waiting, scheduler.stats().blocks_free), (1, 2));
}

#[test]
fn the_youngest_gives_way_and_computes_everything_again() {
    let config = SchedulerConfig { blocks: 3, ..roomy() };
    let mut scheduler = with(config, &[(1, 4, 6), (2, 3, 4)]);
    run(&mut scheduler);
    // Sequence 1 takes the last free block here, and sequence 2 fills up its own.
    assert_eq!(items(&run(&mut scheduler)), [(1, 4, 1, true), (2, 3, 1, true)]);
    // The youngest finds no block, and giving up its own would help nobody: it stays.
    let step = run(&mut scheduler);
    assert_eq!((items(&step), step.preempted.len()), (vec![(1, 5, 1, true)], 0));
    run(&mut scheduler);
    run(&mut scheduler);
    // Now sequence 1 needs a third block.
    let step = run(&mut scheduler);
    assert_eq!((items(&step), step.preempted), (vec![(1, 8, 1, true)], vec![SeqId::new(2)]));
    let stats = scheduler.stats();
    assert_eq!((stats.preemptions, stats.waiting, stats.running, stats.blocks_free), (1, 1, 0, 3));
    // Its prompt of three and its two tokens so far.
    let step = run(&mut scheduler);
    assert_eq!(items(&step), [(2, 0, 5, true)]);
    assert_eq!(step.items[0].tokens, [token(0), token(1), token(2), token(9), token(9)]);
    assert_eq!(items(&run(&mut scheduler)), [(2, 5, 1, true)]);
    assert!(scheduler.is_idle());
}

#[test]
fn a_chunk_is_cut_short_before_anyone_is_preempted() {
    let config = SchedulerConfig { blocks: 6, prefill_chunk: 8, ..roomy() };
    let mut scheduler = with(config, &[(1, 4, 9), (2, 16, 1), (3, 3, 9)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 0, 4, true), (2, 0, 8, false), (3, 0, 3, true)]);
    // Sequence 1 takes one of the two free blocks that sequence 2 wants.
    let step = run(&mut scheduler);
    assert_eq!(items(&step), [(1, 4, 1, true), (3, 3, 1, true), (2, 8, 4, false)]);
    // Without any block it could not go on at all.
    let step = run(&mut scheduler);
    assert_eq!(items(&step), [(1, 5, 1, true), (2, 12, 4, true)]);
    assert_eq!(step.preempted, [SeqId::new(3)]);
}

#[test]
fn a_sequence_may_end_in_the_middle_of_a_step() {
    let mut scheduler = with(roomy(), &[(1, 5, 3), (2, 5, 3)]);
    let step = scheduler.schedule(u32::MAX);
    assert!(scheduler.finish(SeqId::new(1)));
    assert_eq!(scheduler.stats().blocks_free, 98);
    assert_eq!(scheduler.append(step.items[0].seq, token(9)), Err(UnknownSequence(SeqId::new(1))));
    assert_eq!(scheduler.append(step.items[1].seq, token(9)), Ok(Progress::Continue));
    assert!(!scheduler.finish(SeqId::new(1)));
    assert_eq!(items(&run(&mut scheduler)), [(2, 5, 1, true)]);
}

#[test]
fn a_waiting_sequence_can_be_cancelled() {
    let mut scheduler = with(roomy(), &[(1, 5, 3), (2, 5, 3)]);
    assert!(scheduler.finish(SeqId::new(2)));
    assert_eq!(items(&run(&mut scheduler)), [(1, 0, 5, true)]);
}

#[test]
fn tokens_nobody_asked_for_are_refused() {
    let config = SchedulerConfig { prefill_chunk: 4, ..roomy() };
    let mut scheduler = with(config, &[(1, 5, 1)]);
    let unknown = Err(UnknownSequence(SeqId::new(1)));
    assert_eq!(scheduler.append(SeqId::new(1), token(9)), unknown, "still waiting");
    scheduler.schedule(u32::MAX);
    assert_eq!(scheduler.append(SeqId::new(1), token(9)), unknown, "half a prompt");
    scheduler.schedule(u32::MAX);
    assert_eq!(scheduler.append(SeqId::new(1), token(9)), Ok(Progress::LengthReached));
    assert_eq!(scheduler.append(SeqId::new(1), token(9)), unknown, "complete");
    assert_eq!(scheduler.schedule(u32::MAX), Step::default(), "complete, though not finished");
}

#[test]
fn a_sequence_without_its_token_is_left_out() {
    let mut scheduler = with(roomy(), &[(1, 5, 3)]);
    scheduler.schedule(u32::MAX);
    assert_eq!(scheduler.schedule(u32::MAX), Step::default());
    assert_eq!(scheduler.append(SeqId::new(1), token(9)), Ok(Progress::Continue));
    assert_eq!(items(&scheduler.schedule(u32::MAX)), [(1, 5, 1, true)]);
}

#[test]
fn the_end_of_the_context_cuts_the_output_short() {
    let mut scheduler = with(SchedulerConfig { context: 6, ..roomy() }, &[(1, 4, u32::MAX)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 0, 4, true)]);
    assert_eq!(items(&run(&mut scheduler)), [(1, 4, 1, true)]);
    assert!(scheduler.is_idle());
}

#[test]
fn impossible_sequences_are_refused_for_good() {
    let config = SchedulerConfig { blocks: 3, context: 20, max_waiting: 1, ..roomy() };
    let mut scheduler = with(config, &[(1, 1, 1)]);
    let mut refuse = |id, prompt, max_tokens| {
        let error = scheduler.admit(sequence(id, prompt, max_tokens)).unwrap_err();
        (error.retry(), error)
    };
    assert_eq!(refuse(2, 0, 1), (Retry::Never, AdmitError::EmptyPrompt));
    assert_eq!(refuse(2, 1, 0), (Retry::Never, AdmitError::ZeroMaxTokens));
    let (retry, error) = refuse(2, 20, 1);
    assert_eq!(retry, Retry::Never);
    assert_eq!(error.to_string(), "the prompt has 20 tokens; at most 19 are allowed in a context of 20");
    // Twelve positions fit, and the thirteenth token is an output only.
    assert_eq!(refuse(2, 4, 10), (Retry::Never, AdmitError::NeverFits { needed: 4, have: 3 }));
    assert_eq!(refuse(1, 1, 1), (Retry::Never, AdmitError::DuplicateId(SeqId::new(1))));
    assert_eq!(refuse(2, 4, 9), (Retry::Later, AdmitError::QueueFull { limit: 1 }));
    scheduler.schedule(u32::MAX);
    assert_eq!(scheduler.admit(sequence(2, 4, 9)), Ok(()));
}

#[test]
fn sizes_that_cannot_work_are_refused() {
    for (field, config) in [
        ("blocks", SchedulerConfig { blocks: 0, ..roomy() }),
        ("max_running", SchedulerConfig { max_running: 0, ..roomy() }),
        ("max_waiting", SchedulerConfig { max_waiting: 0, ..roomy() }),
        ("prefill_chunk", SchedulerConfig { prefill_chunk: 0, ..roomy() }),
    ] {
        assert_eq!(Scheduler::new(config).err(), Some(ConfigError::Zero { field }));
    }
    let groups = SchedulerConfig { groups: Vec::new(), ..roomy() };
    assert_eq!(Scheduler::new(groups).err(), Some(ConfigError::Zero { field: "groups" }));
    let context = SchedulerConfig { context: 1, ..roomy() };
    assert_eq!(Scheduler::new(context).err(), Some(ConfigError::Context(1)));
    let starved = SchedulerConfig { step_tokens: 7, ..roomy() };
    assert_eq!(
        Scheduler::new(starved).unwrap_err().to_string(),
        "step_tokens is 7, below max_running (8); every running sequence needs one"
    );
}

#[test]
fn what_is_undone_is_done_again_and_kept_for_nobody() {
    let mut scheduler = with(caching(), &[(1, 8, 4)]);
    let step = scheduler.schedule(u32::MAX);
    assert_eq!(items(&step), [(1, 0, 8, true)]);
    scheduler.undo(&step.items[0]);
    assert!(scheduler.append(SeqId::new(1), token(9)).is_err(), "it expects no token");
    assert_eq!(scheduler.stats().blocks_free, 100, "blocks of what was undone are free");
    // The same tokens: nothing of the failed step is found in the cache.
    scheduler.admit(sequence(2, 9, 4)).unwrap();
    assert_eq!(items(&run(&mut scheduler)), [(1, 0, 8, true), (2, 0, 8, false)]);
    let step = scheduler.schedule(u32::MAX);
    assert_eq!(items(&step), [(1, 8, 1, true), (2, 8, 1, true)]);
    scheduler.undo(&step.items[0]);
    assert_eq!(scheduler.append(SeqId::new(2), token(9)), Ok(Progress::Continue));
    assert_eq!(items(&run(&mut scheduler)), [(1, 8, 1, true), (2, 9, 1, true)], "one goes on, one repeats");
    assert!(scheduler.finish(SeqId::new(1)) && scheduler.finish(SeqId::new(2)));
    scheduler.undo(&step.items[0]);
    assert_eq!(scheduler.stats().blocks_free, 100);
}

#[test]
fn a_parked_sequence_is_left_out_until_it_is_let_go_on() {
    let mut scheduler = with(roomy(), &[(1, 4, 9), (2, 4, 9)]);
    run(&mut scheduler);
    scheduler.park(SeqId::new(1));
    assert_eq!(scheduler.decoding(), 1);
    for position in 4..6 {
        assert_eq!(items(&run(&mut scheduler)), [(2, position, 1, true)]);
    }
    scheduler.park(SeqId::new(2));
    assert_eq!(scheduler.schedule(u32::MAX), Step::default());
    scheduler.unpark();
    assert_eq!(items(&run(&mut scheduler)), [(1, 4, 1, true), (2, 6, 1, true)]);
}

/// Steps until all sequences have ended.
fn run_all(scheduler: &mut Scheduler) -> Vec<Step> {
    let mut steps = Vec::new();
    while !scheduler.is_idle() {
        steps.push(run(scheduler));
        assert!(steps.len() < 1000, "no end: {:?}", scheduler.stats());
    }
    steps
}

/// Every other layer sees eight positions.
fn half_windowed() -> SchedulerConfig {
    let window = Reach::Last(NonZero::new(8).unwrap());
    SchedulerConfig { groups: vec![window, Reach::All], context: 200, prefill_chunk: 8, ..roomy() }
}

/// Blocks in each group's table.
fn held(item: &StepItem, groups: usize) -> Vec<usize> {
    let tables = item.blocks.chunks(item.blocks.len() / groups);
    tables.map(|table| table.iter().filter(|&&block| block != NO_BLOCK).count()).collect()
}

#[test]
fn a_long_sequence_holds_of_a_window_what_it_sees() {
    let mut scheduler = with(half_windowed(), &[(1, 60, 100)]);
    let mut longest = 0;
    for step in run_all(&mut scheduler) {
        for item in &step.items {
            let (covered, chunk) = (item.start as usize + item.tokens.len(), item.tokens.len());
            let [window, all] = held(item, 2)[..] else { panic!("two tables") };
            assert_eq!(all, covered.div_ceil(4));
            assert!(window <= 8 / 4 + chunk.div_ceil(4) + 1, "{window} blocks for {item:?}");
            // Nothing that the first row sees is missing, and everything before is given up.
            let seen = (item.start as usize).saturating_sub(7) / 4;
            assert!(item.blocks[..seen].iter().all(|&block| block == NO_BLOCK));
            assert!(item.blocks[seen..].iter().all(|&block| block != NO_BLOCK));
            longest = longest.max(covered);
        }
    }
    assert_eq!((longest, scheduler.stats().blocks_free), (159, 100));
}

#[test]
fn long_sequences_run_together_where_only_one_would_fit_without_windows() {
    // Each has 64 positions, 16 blocks: of the window's group it holds five at most.
    let together = |groups: Vec<Reach>| {
        let config = SchedulerConfig { groups, blocks: 16, step_tokens: 32, ..half_windowed() };
        let mut scheduler = with(config, &[(1, 40, 25), (2, 40, 25), (3, 40, 25)]);
        let most = run_all(&mut scheduler).iter().map(|step| step.items.len()).max();
        (most.unwrap(), scheduler.stats().preemptions)
    };
    assert_eq!(together(vec![Reach::Last(NonZero::new(8).unwrap())]), (3, 0));
    assert_eq!(together(vec![Reach::Chunk(NonZero::new(8).unwrap())]), (3, 0));
    assert_eq!(together(vec![Reach::All]), (1, 0));
}

#[test]
fn what_a_sequence_holds_at_once_decides_whether_it_fits() {
    let config = SchedulerConfig { blocks: 12, ..half_windowed() };
    let mut scheduler = Scheduler::new(config.clone()).unwrap();
    // Five of the window's group and seven of the other.
    assert_eq!(scheduler.admit(sequence(1, 9, 20)), Ok(()));
    let refused = scheduler.admit(sequence(2, 10, 20)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "prompt and output need 13 KV blocks, the cache has 12; shorten the prompt or max_tokens"
    );
    run_all(&mut scheduler);
    // Of windows alone any length does.
    let windows = SchedulerConfig { groups: vec![config.groups[0]; 2], blocks: 10, ..config };
    let mut scheduler = with(windows, &[(1, 150, 50)]);
    run_all(&mut scheduler);
    assert_eq!(scheduler.stats().preemptions, 0);
}

#[test]
fn what_a_sequence_has_left_behind_serves_others() {
    let config = SchedulerConfig { prefix_cache: PrefixCache::On, blocks: 60, ..half_windowed() };
    let mut scheduler = with(config, &[(1, 41, 10)]);
    for _ in 0..7 {
        run(&mut scheduler);
    }
    // Position 41 sees from 34 on; what lies before is cached.
    let stats = scheduler.stats();
    assert_eq!((stats.running, stats.blocks_cached), (1, 8));
    scheduler.admit(sequence(2, 33, 2)).unwrap();
    let step = run(&mut scheduler);
    assert_eq!(items(&step), [(1, 42, 1, true), (2, 32, 1, true)]);
    // Position 32 sees from 25 on.
    assert_eq!(held(&step.items[1], 2), [3, 9]);
    assert_eq!(step.items[1].blocks[9..17], step.items[0].blocks[11..19], "shared where all is seen");
}

#[test]
fn room_is_what_places_and_blocks_are_there_for() {
    // Eight places and a hundred blocks of four tokens.
    let mut scheduler = with(roomy(), &[]);
    assert_eq!((scheduler.room(), scheduler.has_place()), (8, true));
    scheduler.admit(sequence(1, 8, 9)).unwrap();
    // The one that waits may run as soon as somebody looks.
    assert_eq!((scheduler.room(), scheduler.has_place()), (8, false));
    run(&mut scheduler);
    assert_eq!((scheduler.room(), scheduler.has_place()), (7, true));
    // Three of ten blocks are taken, and the first is about to take another; the second waits for four, and two are left.
    let mut scheduler = with(SchedulerConfig { blocks: 10, ..roomy() }, &[(1, 12, 9)]);
    run(&mut scheduler);
    scheduler.admit(sequence(2, 16, 9)).unwrap();
    assert_eq!(scheduler.room(), 1 + 2);
    scheduler.admit(sequence(3, 16, 9)).unwrap();
    assert_eq!(scheduler.room(), 1, "the third waits for blocks");
}

#[test]
fn whoever_was_sent_back_takes_room_and_is_none_of_it() {
    let config = SchedulerConfig { blocks: 6, ..roomy() };
    let mut scheduler = with(config, &[(1, 8, 9), (2, 8, 9)]);
    run(&mut scheduler);
    let mut preempted = Vec::new();
    while preempted.is_empty() {
        preempted = run(&mut scheduler).preempted;
    }
    assert_eq!(preempted, [SeqId::new(2)]);
    assert_eq!(scheduler.stats().waiting, 1);
    assert_eq!(scheduler.room(), 0, "its blocks come first");
}
