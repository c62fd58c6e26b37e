//! A step of a shape that ran before allocates nothing in the trunk.
//!
//! Counted on the thread that runs the step, with one compute thread. Allocations of the dispatch inside `submit` and
//! `collect` are not counted: it may send messages.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_checkpoint::{Checkpoint, Source};
use muster_engine::dispatch::{DispatchError, ExpertDispatch, LayerBatch, Loss, RowsMut, Ticket};
use muster_kernels::Cpu;
use muster_model::experts::ExpertSet;
use muster_model::local::{Local, local};
use muster_model::sampler::{History, Pick, RawSampling, SampleScratch, Sampling, sample};
use muster_model::step::{SeqInput, WantLogits};
use muster_model::trunk::{CpuDevice, StepContext, StepState, Trunk};
use muster_types::{Compute, TokenId};

thread_local! {
    static COUNTED: Cell<Option<u64>> = const { Cell::new(None) };
}

struct Counting;

fn count() {
    // A thread that ends may still allocate.
    let _ = COUNTED.try_with(|counted| counted.set(counted.get().map(|count| count + 1)));
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract, which is that of `System`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread while `work` runs.
fn allocations(work: impl FnOnce()) -> u64 {
    COUNTED.set(Some(0));
    work();
    COUNTED.take().unwrap()
}

/// A dispatch whose allocations are not counted.
struct Apart(Local);

impl Apart {
    fn uncounted<T>(&mut self, work: impl FnOnce(&mut Local) -> T) -> T {
        let count = COUNTED.take();
        let result = work(&mut self.0);
        COUNTED.set(count);
        result
    }
}

impl ExpertDispatch for Apart {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        self.uncounted(|local| local.submit(batch))
    }
    fn collect(
        &mut self,
        ticket: Ticket,
        deadline: Instant,
        out: RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError> {
        self.uncounted(|local| local.collect(ticket, deadline, out))
    }
    fn cancel(&mut self, ticket: Ticket) {
        self.uncounted(|local| local.cancel(ticket));
    }
    fn close(&mut self) {
        self.uncounted(ExpertDispatch::close);
    }
}

#[test]
fn steps_after_the_first_allocate_nothing() {
    for family in [
        "mixtral_bf16",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
        "deepseek_v3",
        "gpt_oss",
        "llama4_top2",
        "phimoe",
    ] {
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden").join(family);
        let checkpoint = Checkpoint::open(&Source::Directory(directory)).unwrap();
        let compute = Compute::Bf16;
        let cpu = Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap());
        let device = CpuDevice::new(Arc::clone(&cpu), compute);
        let trunk =
            Trunk::load(&device, &checkpoint, muster_types::WeightDType::Native, &mut |_| {}).unwrap();
        let keys = ExpertSet::all_keys(&checkpoint);
        let experts = Arc::new(
            ExpertSet::load(&checkpoint, &keys, compute, muster_types::WeightDType::Native, &mut |_| {})
                .unwrap(),
        );
        let mut dispatch = Apart(local(Arc::clone(&cpu), &experts).unwrap());
        let vocab = checkpoint.spec().vocab;
        let tokens: Vec<TokenId> = TokenId::all(vocab).take(20).collect();
        // Every sequence has two blocks in each group of layers.
        let groups = trunk.kv_groups().reaches().len() as u32;
        let mut kv = trunk.new_kv(6 * groups as usize).unwrap();
        let blocks = [0, 1, 2].map(|of| (2 * groups * of..2 * groups * (of + 1)).collect::<Vec<u32>>());
        let mut state = StepState::default();
        let mut scratch = SampleScratch::default();
        let sampling =
            Sampling::new(RawSampling { temperature: 0.8, ..RawSampling::default() }, vocab).unwrap();
        let mut step = |start: usize, count: usize| {
            let input = |blocks| SeqInput {
                start: start as u32,
                tokens: &tokens[start..start + count],
                blocks,
                logits: WantLogits::Last,
            };
            let mut ctx = StepContext {
                kv: &mut kv,
                dispatch: &mut dispatch,
                timeout: Duration::from_secs(60),
                observe: None,
            };
            let [first, second] = [&[input(&blocks[0]), input(&blocks[1])][..], &[input(&blocks[2])]];
            trunk.forward(&mut ctx, [first, second], &mut state);
            for (lane, sequence) in [(0, 0), (0, 1), (1, 0)] {
                let logits = state.logits(lane, sequence, vocab as usize).unwrap();
                let (history, position) = (&History::default(), start as u32);
                let _ = sample(&Pick { sampling: &sampling, logits, history, position }, &mut scratch);
            }
        };
        step(0, 10);
        let steps = [(10, 1), (11, 1), (12, 1), (0, 10), (10, 3), (13, 1)];
        let counts = steps.map(|(start, count)| allocations(|| step(start, count)));
        assert_eq!(counts, [0; 6], "{family}");
        assert!(allocations(|| drop(std::hint::black_box(vec![0_u8; 100]))) > 0, "the counter counts");
    }
}
