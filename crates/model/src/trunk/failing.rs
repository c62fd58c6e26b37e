//! Steps whose experts fail: which sequences fail, and which rows are still sent.

use std::collections::BTreeMap;

use muster_engine::dispatch::RowsMut;
use muster_types::{ExpertId, TokenId};

use super::tests::Model;
use super::*;
use crate::local::Local;
use crate::step::WantLogits;

const SEQUENCES: usize = 8;
const TOKENS: usize = 2;

/// Failures of an expert of one layer.
#[derive(Clone, Copy, PartialEq)]
enum How {
    /// Its outputs are not finite.
    Loses,
    /// No worker holds it.
    HasNoOwner,
    /// The whole micro-batch is refused.
    Closes,
}

struct Failing<'a> {
    local: Local,
    layer: LayerId,
    expert: ExpertId,
    how: How,
    lost: BTreeMap<Ticket, Vec<u32>>,
    /// Layer and number of rows of every accepted micro-batch.
    taken: &'a mut Vec<(LayerId, usize)>,
}

impl ExpertDispatch for Failing<'_> {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        let choices = batch.choices;
        let rows = (0..).zip(choices.experts().chunks(choices.k()));
        let its: Vec<u32> = rows.filter(|(_, ids)| ids.contains(&self.expert)).map(|(row, _)| row).collect();
        let (layer, expert) = (self.layer, self.expert);
        match self.how {
            How::HasNoOwner if batch.layer == layer && !its.is_empty() => {
                return Err(DispatchError::NoOwner { layer, expert });
            }
            How::Closes if batch.layer == layer => return Err(DispatchError::Closed),
            _ => {}
        }
        let ticket = self.local.submit(batch)?;
        self.taken.push((batch.layer, choices.rows()));
        if self.how == How::Loses && batch.layer == layer && !its.is_empty() {
            self.lost.insert(ticket, its);
        }
        Ok(ticket)
    }

    fn collect(
        &mut self,
        ticket: Ticket,
        deadline: Instant,
        out: RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError> {
        let out = out.into_f32().unwrap();
        assert_eq!(self.local.collect(ticket, deadline, RowsMut::of_f32(out)), Ok(Vec::new()));
        let Some(rows) = self.lost.remove(&ticket) else { return Ok(Vec::new()) };
        // NaN exposes any use of a lost row's output.
        let hidden = out.len() / self.taken.last().map_or(1, |(_, rows)| *rows);
        rows.iter().for_each(|&row| out[row as usize * hidden..][..hidden].fill(f32::NAN));
        let error = DispatchError::NonFinite { layer: self.layer, expert: self.expert };
        Ok(vec![Loss { rows, error }])
    }

    fn cancel(&mut self, ticket: Ticket) {
        self.local.cancel(ticket);
    }

    fn close(&mut self) {
        self.local.close();
    }
}

/// Bits of the logits of every sequence, or its error.
type Outcomes = Vec<Result<Vec<u32>, StepError>>;

fn run(model: &Model, dispatch: &mut dyn ExpertDispatch, observe: &mut dyn FnMut(View<'_>)) -> Outcomes {
    let token = |at: usize| TokenId::new((at * 37 + 5) as u32 % 320, 320).unwrap();
    let tokens: Vec<Vec<TokenId>> =
        (0..SEQUENCES).map(|n| (0..TOKENS).map(|at| token(n * TOKENS + at)).collect()).collect();
    let blocks: Vec<[u32; 1]> = (0..).take(SEQUENCES).map(|block| [block]).collect();
    let input = |(tokens, blocks)| SeqInput { start: 0, tokens, blocks, logits: WantLogits::All };
    let inputs: Vec<SeqInput<'_>> =
        tokens.iter().map(Vec::as_slice).zip(blocks.iter().map(<[u32; 1]>::as_slice)).map(input).collect();
    let mut kv = model.trunk.new_kv(SEQUENCES).unwrap();
    let timeout = Duration::from_secs(60);
    let mut ctx = StepContext { kv: &mut kv, dispatch, timeout, observe: Some(observe) };
    let mut state = StepState::default();
    model.trunk.forward(&mut ctx, [&inputs, &[]], &mut state);
    let outcome = |n| state.logits(0, n, 320).map(|logits| logits.iter().map(|x| x.to_bits()).collect());
    (0..SEQUENCES).map(outcome).collect()
}

#[test]
fn a_failing_expert_costs_the_sequences_that_chose_it() {
    let model = Model::plain();
    // Per layer and sequence: the chosen experts.
    let mut chosen: Vec<Vec<Vec<ExpertId>>> = Vec::new();
    let undisturbed = run(&model, &mut model.dispatch(), &mut |view| {
        if let View::Gate(view) = view {
            let per_sequence = TOKENS * view.choices.k();
            chosen.push(view.choices.experts().chunks(per_sequence).map(<[ExpertId]>::to_vec).collect());
        }
    });
    let layers: Vec<LayerId> = LayerId::all(chosen.len() as u32).collect();
    let mut partly = 0;
    for &layer in &layers {
        let chosen = &chosen[layer.index()];
        for expert in ExpertId::all(model.trunk.spec.moe(layer.index()).unwrap().experts) {
            let hit: Vec<bool> = chosen.iter().map(|ids| ids.contains(&expert)).collect();
            let left = hit.iter().filter(|hit| !**hit).count();
            partly += usize::from((1..SEQUENCES).contains(&left));
            for how in [How::Loses, How::HasNoOwner, How::Closes] {
                let mut taken = Vec::new();
                let (local, lost) = (model.dispatch(), BTreeMap::new());
                let mut failing = Failing { local, layer, expert, how, lost, taken: &mut taken };
                let outcomes = run(&model, &mut failing, &mut |_| {});
                let left = if how == How::Closes { 0 } else { left };
                for (n, (outcome, expected)) in outcomes.iter().zip(&undisturbed).enumerate() {
                    match how {
                        How::Closes => {
                            assert_eq!(*outcome, Err(StepError::Dispatch(DispatchError::Closed)));
                        }
                        _ if !hit[n] => assert_eq!(outcome, expected, "sequence {n} was not touched"),
                        How::Loses => {
                            let error = DispatchError::NonFinite { layer, expert };
                            assert_eq!(*outcome, Err(StepError::Dispatch(error)));
                        }
                        How::HasNoOwner => {
                            let error = DispatchError::NoOwner { layer, expert };
                            assert_eq!(*outcome, Err(StepError::Dispatch(error)));
                        }
                    }
                }
                // A failed sequence sends no more rows; a lane without sequences sends nothing.
                let rows = |at: LayerId| match () {
                    () if at < layer || (at == layer && how == How::Loses) => SEQUENCES,
                    () => left,
                };
                let expected: Vec<(LayerId, usize)> =
                    layers.iter().map(|&at| (at, rows(at) * TOKENS)).filter(|(_, rows)| *rows > 0).collect();
                assert_eq!(taken, expected, "{layer} {expert}");
            }
        }
    }
    assert!(partly > 0, "some experts are chosen by some");
}
