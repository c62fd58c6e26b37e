//! A dispatch that reads rows at the last moment, when they must still be as submitted.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_checkpoint::{Checkpoint, Source};
use muster_engine::dispatch::RowsMut;
use muster_kernels::Cpu;
use muster_types::TokenId;

use super::*;
use crate::experts::ExpertSet;
use crate::local::{Local, local};
use crate::step::WantLogits;

/// Bytes of the submitted rows of every micro-batch in flight.
type Submitted = Arc<Mutex<BTreeMap<Ticket, Vec<u8>>>>;

struct Late {
    local: Local,
    submitted: Submitted,
}

fn lock(submitted: &Submitted) -> MutexGuard<'_, BTreeMap<Ticket, Vec<u8>>> {
    submitted.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ExpertDispatch for Late {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        let ticket = self.local.submit(batch)?;
        lock(&self.submitted).insert(ticket, batch.rows.host().unwrap().to_vec());
        Ok(ticket)
    }

    fn collect(
        &mut self,
        ticket: Ticket,
        deadline: Instant,
        out: RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError> {
        assert!(!lock(&self.submitted).contains_key(&ticket), "the rows were shown before");
        self.local.collect(ticket, deadline, out)
    }

    fn cancel(&mut self, ticket: Ticket) {
        lock(&self.submitted).remove(&ticket);
        self.local.cancel(ticket);
    }

    fn close(&mut self) {
        self.local.close();
    }
}

#[test]
fn rows_stay_as_they_are_until_they_are_collected() {
    let families = ["mixtral", "deepseek_v3", "llama4_top2", "granitemoe"];
    for (family, compute) in families.into_iter().flat_map(|f| [(f, Compute::F32), (f, Compute::Bf16)]) {
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden").join(family);
        let checkpoint = Checkpoint::open(&Source::Directory(directory)).unwrap();
        let dtype = WeightDType::Native;
        let cpu = Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap());
        let device = CpuDevice::new(Arc::clone(&cpu), compute);
        let trunk = Trunk::load(&device, &checkpoint, dtype, &mut |_| {}).unwrap();
        let keys = ExpertSet::all_keys(&checkpoint);
        let experts = Arc::new(ExpertSet::load(&checkpoint, &keys, compute, dtype, &mut |_| {}).unwrap());
        let submitted = Submitted::default();
        let local = local(Arc::clone(&cpu), &experts).unwrap();
        let mut dispatch = Late { local, submitted: Arc::clone(&submitted) };
        let groups = trunk.kv_groups().reaches().len() as u32;
        let mut kv = trunk.new_kv(2 * groups as usize).unwrap();
        let tokens: Vec<TokenId> = TokenId::all(checkpoint.spec().vocab).take(9).collect();
        let blocks = [0, 1].map(|of| (groups * of..groups * (of + 1)).collect::<Vec<u32>>());
        let input = |tokens, blocks| SeqInput { start: 0, tokens, blocks, logits: WantLogits::Last };
        let (long, short) = ([input(&tokens, &blocks[0])], [input(&tokens[..4], &blocks[1])]);
        let mut collected = 0;
        let mut observe = |view: View<'_>| {
            if let View::Collect { ticket, rows } = view {
                let before = lock(&submitted).remove(&ticket);
                assert!(
                    before.as_ref().is_some_and(|rows| !rows.is_empty()),
                    "{family}: {ticket:?} is in flight"
                );
                assert_eq!(before.as_deref(), rows.host(), "{family}, {compute}: rows changed in flight");
                collected += 1;
            }
        };
        let timeout = Duration::from_secs(60);
        let observe: Option<&mut dyn FnMut(View<'_>)> = Some(&mut observe);
        let mut ctx = StepContext { kv: &mut kv, dispatch: &mut dispatch, timeout, observe };
        trunk.forward(&mut ctx, [&long, &short], &mut StepState::default());
        assert_eq!(collected, 2 * checkpoint.spec().moe_layers().count());
    }
}
