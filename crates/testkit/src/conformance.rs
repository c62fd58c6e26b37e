//! Contract of every expert dispatch, on any transport. Each clause panics with its name when it does not hold.

use std::time::{Duration, Instant};

use muster_engine::dispatch::{
    Choices, DeviceSlice, DispatchError, ExpertDispatch, LayerBatch, Loss, Place, Rows, RowsMut, Ticket,
};
use muster_types::{Compute, ExpertId, LayerId};

use crate::fake::round;

/// Gives the output row `[hidden]` of one expert for one hidden row, rounded to the wire dtype.
pub type Oracle = Box<dyn Fn(LayerId, ExpertId, &[f32]) -> Vec<f32>>;

/// Worker that runs an expert, by its index in the placement.
pub type Owner = Box<dyn Fn(LayerId, ExpertId) -> usize>;

/// How expert outputs are combined.
pub enum Sums {
    /// One sum over all experts.
    Exact,
    /// A sum on every worker, rounded to the wire dtype, and the sum of those. Every expert has one owner.
    Partial(Owner),
}

/// The model behind the dispatch under test.
pub struct Model {
    /// Elements of a hidden row.
    pub hidden: usize,
    /// Experts per row; at least 2.
    pub top_k: usize,
    /// Dtype to which rows are rounded.
    pub compute: Compute,
    /// Routed experts of every layer: 0 for a dense layer, else at least `top_k`. At least one dense layer shows the
    /// refusal of rows for it.
    pub experts: Vec<u32>,
    /// Expected output of each expert.
    pub oracle: Oracle,
    /// Expected way of combining.
    pub sums: Sums,
}

/// A fresh dispatch and the model behind it.
pub struct Harness<D> {
    /// The dispatch under test. Every expert is held somewhere.
    pub dispatch: D,
    /// Its model.
    pub model: Model,
}

/// Runs every clause, each on a dispatch of its own.
///
/// # Panics
/// When a clause does not hold.
pub fn run<D: ExpertDispatch>(mut make: impl FnMut() -> Harness<D>) {
    sums_are_the_reference_to_the_bit(&mut make());
    one_expert_alone_is_counted_once(&mut make());
    a_row_does_not_depend_on_its_company(&mut make());
    no_rows_are_no_work(&mut make());
    lanes_interleave_and_collect_in_any_order(&mut make());
    wrong_shapes_are_refused(&mut make());
    wrong_dtypes_are_refused(&mut make());
    layers_and_experts_that_do_not_exist_are_refused(&mut make());
    a_deadline_in_the_past_is_missed(&mut make());
    a_row_that_overflows_is_lost_alone(&mut make());
    memory_that_is_not_taken_is_named(&mut make());
    cancelled_work_is_gone(&mut make());
    rows_may_change_once_their_ticket_is_spent(&mut make());
    a_ticket_is_spent_by_collecting(&mut make());
    closing_is_final_and_may_be_repeated(&mut make());
}

/// A deadline that only a dispatch that lost something reaches.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A small deterministic source of numbers (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }
}

/// Rows and choices of a batch, owned.
struct Batch {
    layer: LayerId,
    hidden: usize,
    rows: Vec<f32>,
    bits: Vec<u16>,
    choices: Choices,
}

impl Batch {
    /// `rows` random rows, each for `k` random experts of `layer`. All values are exact in bf16.
    fn random(model: &Model, layer: LayerId, rows: usize, k: usize, seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let values = (0..rows * model.hidden).map(|_| (numbers.below(257) as f32 - 128.0) / 16.0).collect();
        let all: Vec<ExpertId> = ExpertId::all(model.experts[layer.index()]).collect();
        let mut experts = Vec::with_capacity(rows * k);
        for _ in 0..rows {
            let mut left = all.clone();
            let mut picked: Vec<ExpertId> =
                (0..k).map(|_| left.swap_remove(numbers.below(left.len()))).collect();
            picked.sort_unstable();
            experts.extend(picked);
        }
        // Weights whose products and sums need rounding.
        let weights = (0..rows * k).map(|_| (numbers.below(1000) + 1) as f32 / 997.0).collect();
        let choices = Choices::new(k, experts, weights).expect("choices are made to be valid");
        Self::new(layer, model.hidden, values, choices)
    }

    fn new(layer: LayerId, hidden: usize, rows: Vec<f32>, choices: Choices) -> Self {
        let bits = rows.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
        Self { layer, hidden, rows, bits, choices }
    }

    fn rows(&self, compute: Compute) -> Rows<'_> {
        let rows = match compute {
            Compute::F32 => Rows::of_f32(&self.rows, self.hidden),
            Compute::Bf16 | Compute::Bf16Pairs => Rows::of_bf16(&self.bits, self.hidden),
        };
        rows.expect("rows are whole")
    }

    fn view(&self, compute: Compute, lane: usize) -> LayerBatch<'_> {
        LayerBatch { layer: self.layer, lane, rows: self.rows(compute), choices: &self.choices }
    }

    /// The sum of the contract, computed in the plainest way.
    fn reference(&self, model: &Model) -> Vec<f32> {
        let Sums::Partial(owner) = &model.sums else { return self.sum_where(model, &|_| true) };
        let layer = self.layer;
        let mut owners: Vec<usize> =
            self.choices.experts().iter().map(|&expert| owner(layer, expert)).collect();
        owners.sort_unstable();
        owners.dedup();
        let mut sums = vec![0.0f32; self.rows.len()];
        for worker in owners {
            let part = self.sum_where(model, &|expert| owner(layer, expert) == worker);
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += round(model.compute, part));
        }
        sums
    }

    fn sum_where(&self, model: &Model, counts: &dyn Fn(ExpertId) -> bool) -> Vec<f32> {
        let mut sums = vec![0.0f32; self.rows.len()];
        let k = self.choices.k();
        for (pair, (&expert, &weight)) in
            self.choices.experts().iter().zip(self.choices.weights()).enumerate()
        {
            if !counts(expert) {
                continue;
            }
            let at = pair / k * model.hidden;
            let output = (model.oracle)(self.layer, expert, &self.rows[at..at + model.hidden]);
            for (sum, y) in sums[at..].iter_mut().zip(output) {
                *sum += weight * y;
            }
        }
        sums
    }
}

fn moe_layers(model: &Model) -> Vec<LayerId> {
    let layers = LayerId::all(u32::try_from(model.experts.len()).expect("few layers"));
    let moe: Vec<LayerId> = layers.filter(|layer| model.experts[layer.index()] > 0).collect();
    assert!(!moe.is_empty(), "the harness's model has no experts");
    moe
}

fn first_batch(model: &Model, seed: u64) -> Batch {
    Batch::random(model, moe_layers(model)[0], 5, model.top_k, seed)
}

fn submit<D: ExpertDispatch>(harness: &mut Harness<D>, batch: &Batch, lane: usize) -> Ticket {
    harness.dispatch.submit(&batch.view(harness.model.compute, lane)).expect("a valid batch is taken")
}

fn collect<D: ExpertDispatch>(
    harness: &mut Harness<D>,
    ticket: Ticket,
    batch: &Batch,
) -> Result<Vec<f32>, DispatchError> {
    // Not zero, so that adding instead of overwriting shows.
    let mut out = vec![7.0; batch.rows.len()];
    let lost = harness.dispatch.collect(ticket, soon(), RowsMut::of_f32(&mut out))?;
    assert_eq!(lost, [], "nothing fails");
    Ok(out)
}

fn assert_reference(model: &Model, batch: &Batch, got: &[f32], clause: &str) {
    let want = batch.reference(model);
    assert_eq!(got.len(), want.len(), "{clause}");
    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
        let (row, column) = (at / model.hidden, at % model.hidden);
        assert!(
            got.to_bits() == want.to_bits(),
            "{clause}: layer {} row {row} column {column}: {got} instead of {want}",
            batch.layer
        );
    }
}

/// A dispatch works as before after a refusal.
fn assert_still_works<D: ExpertDispatch>(harness: &mut Harness<D>, clause: &str) {
    let batch = first_batch(&harness.model, 99);
    let ticket = submit(harness, &batch, 0);
    let got = collect(harness, ticket, &batch).expect(clause);
    assert_reference(&harness.model, &batch, &got, clause);
}

fn sums_are_the_reference_to_the_bit<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let mut seed = 0;
    for layer in moe_layers(&harness.model) {
        for rows in [1, 2, 7, 33] {
            for k in 1..=harness.model.top_k {
                seed += 1;
                let batch = Batch::random(&harness.model, layer, rows, k, seed);
                let ticket = submit(harness, &batch, 0);
                let got = collect(harness, ticket, &batch).expect("outputs come");
                assert_reference(&harness.model, &batch, &got, "sums are the reference");
            }
        }
    }
}

fn one_expert_alone_is_counted_once<D: ExpertDispatch>(harness: &mut Harness<D>) {
    for layer in moe_layers(&harness.model) {
        for expert in ExpertId::all(harness.model.experts[layer.index()]) {
            let mut batch = Batch::random(&harness.model, layer, 3, 1, 5);
            batch.choices = Choices::new(1, vec![expert; 3], vec![1.0; 3]).expect("one expert per row");
            let ticket = submit(harness, &batch, 1);
            let got = collect(harness, ticket, &batch).expect("outputs come");
            assert_reference(&harness.model, &batch, &got, "one expert alone is counted once");
        }
    }
}

fn a_row_does_not_depend_on_its_company<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let layer = moe_layers(&harness.model)[0];
    let (hidden, k) = (harness.model.hidden, harness.model.top_k);
    let batch = Batch::random(&harness.model, layer, 9, k, 11);
    let ticket = submit(harness, &batch, 0);
    let together = collect(harness, ticket, &batch).expect("outputs come");
    for row in 0..9 {
        let experts = batch.choices.experts()[row * k..][..k].to_vec();
        let weights = batch.choices.weights()[row * k..][..k].to_vec();
        let choices = Choices::new(k, experts, weights).expect("a row of valid choices");
        let single = Batch::new(layer, hidden, batch.rows[row * hidden..][..hidden].to_vec(), choices);
        let ticket = submit(harness, &single, 0);
        let alone = collect(harness, ticket, &single).expect("outputs come");
        let same = alone.iter().zip(&together[row * hidden..]).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "a row does not depend on its company: row {row}");
    }
}

fn no_rows_are_no_work<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let choices = Choices::new(1, Vec::new(), Vec::new()).expect("no rows are valid");
    let (layer, hidden) = (moe_layers(&harness.model)[0], harness.model.hidden);
    let batch = Batch::new(layer, hidden, Vec::new(), choices);
    let ticket = submit(harness, &batch, 0);
    assert_eq!(collect(harness, ticket, &batch), Ok(Vec::new()), "no rows are no work");
}

fn lanes_interleave_and_collect_in_any_order<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let layers = moe_layers(&harness.model);
    let k = harness.model.top_k;
    let batches: Vec<Batch> =
        (0..6).map(|n| Batch::random(&harness.model, layers[n % layers.len()], n + 1, k, n as u64)).collect();
    let tickets: Vec<Ticket> =
        batches.iter().enumerate().map(|(n, batch)| submit(harness, batch, n % 2)).collect();
    for at in [3, 0, 5, 1, 4, 2] {
        let got = collect(harness, tickets[at], &batches[at]).expect("outputs come");
        assert_reference(&harness.model, &batches[at], &got, "tickets are collected in any order");
    }
}

fn assert_invalid<T: std::fmt::Debug>(outcome: &Result<T, DispatchError>, clause: &str) {
    assert!(matches!(outcome, Err(DispatchError::Invalid(_))), "{clause}: {outcome:?}");
}

fn wrong_shapes_are_refused<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let compute = harness.model.compute;
    let batch = first_batch(&harness.model, 1);
    let hidden = batch.hidden;
    let of = |hidden, rows: &[f32]| Batch::new(batch.layer, hidden, rows.to_vec(), batch.choices.clone());
    let (short, none) = (of(hidden, &batch.rows[hidden..]), of(hidden, &[]));
    let long = of(hidden, &[&batch.rows[..], &batch.rows[..hidden]].concat());
    let (flat, wide) = (of(1, &batch.rows), of(2 * hidden, &batch.rows.repeat(2)));
    for wrong in [short, long, none, flat, wide] {
        assert_invalid(&harness.dispatch.submit(&wrong.view(compute, 0)), "rows that do not fit are refused");
    }
    for wrong in [0, batch.rows.len() - 1, batch.rows.len() + 1] {
        let ticket = submit(harness, &batch, 0);
        let mut out = vec![0.0; wrong];
        let outcome = harness.dispatch.collect(ticket, soon(), RowsMut::of_f32(&mut out));
        assert_invalid(&outcome, "an output that does not fit is refused");
        assert_invalid(&collect(harness, ticket, &batch), "and the ticket is spent");
    }
    assert_still_works(harness, "after wrong shapes");
}

fn wrong_dtypes_are_refused<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let other = match harness.model.compute {
        Compute::F32 => Compute::Bf16,
        Compute::Bf16 | Compute::Bf16Pairs => Compute::F32,
    };
    let batch = first_batch(&harness.model, 2);
    assert_invalid(&harness.dispatch.submit(&batch.view(other, 0)), "rows of another dtype are refused");
    assert_still_works(harness, "after a wrong dtype");
}

fn layers_and_experts_that_do_not_exist_are_refused<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let compute = harness.model.compute;
    let mut batch = first_batch(&harness.model, 3);
    let real = batch.layer;
    let layers = u32::try_from(harness.model.experts.len()).expect("few layers");
    let dense = LayerId::all(layers).find(|layer| harness.model.experts[layer.index()] == 0);
    let beyond = LayerId::new(layers, layers + 1).ok();
    for layer in [dense, beyond].into_iter().flatten() {
        batch.layer = layer;
        refused_at_submit(&harness.dispatch.submit(&batch.view(compute, 0)), "a layer without experts");
    }
    let count = harness.model.experts[real.index()];
    let expert = ExpertId::new(count, count + 1).expect("in range by one");
    let choices = Choices::new(1, vec![expert], vec![1.0]).expect("valid in themselves");
    let hidden = harness.model.hidden;
    let batch = Batch::new(real, hidden, vec![0.0; hidden], choices);
    refused_at_submit(&harness.dispatch.submit(&batch.view(compute, 0)), "an expert that does not exist");
    assert_still_works(harness, "after a layer and an expert that do not exist");
}

/// A dispatch without the model's shape finds no owner; one with the shape names the problem.
fn refused_at_submit(outcome: &Result<Ticket, DispatchError>, clause: &str) {
    let refused = matches!(outcome, Err(DispatchError::Invalid(_) | DispatchError::NoOwner { .. }));
    assert!(refused, "{clause} is refused at submit: {outcome:?}");
}

fn a_deadline_in_the_past_is_missed<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let batch = first_batch(&harness.model, 4);
    let ticket = submit(harness, &batch, 0);
    let mut out = vec![0.0; batch.rows.len()];
    let outcome = harness.dispatch.collect(ticket, Instant::now(), RowsMut::of_f32(&mut out));
    let lost = Loss {
        rows: (0..).take(batch.choices.rows()).collect(),
        error: DispatchError::Deadline { layer: batch.layer },
    };
    assert_eq!(outcome, Ok(vec![lost]), "a deadline in the past is missed by every row");
    assert_invalid(&collect(harness, ticket, &batch), "a missed ticket is spent");
    assert_still_works(harness, "after a missed deadline");
}

/// Close to the largest bf16: an expert that multiplies it gets values that are not finite.
const HUGE: f32 = f32::from_bits(0x7f60_0000);

fn a_row_that_overflows_is_lost_alone<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let clause = "a row that overflows is lost alone";
    const BAD: usize = 2;
    let model = &harness.model;
    let mut batch = first_batch(model, 11);
    batch.rows[BAD * model.hidden..][..model.hidden].fill(HUGE);
    let batch = Batch::new(batch.layer, batch.hidden, batch.rows, batch.choices);
    let overflows = |expert: &ExpertId| {
        let output = (model.oracle)(batch.layer, *expert, &vec![HUGE; model.hidden]);
        output.iter().any(|y| !y.is_finite())
    };
    let picked = &batch.choices.experts()[BAD * model.top_k..][..model.top_k];
    assert!(picked.iter().any(overflows), "the harness's experts do not overflow");
    let ticket = submit(harness, &batch, 0);
    let mut out = vec![7.0; batch.rows.len()];
    let lost = harness.dispatch.collect(ticket, soon(), RowsMut::of_f32(&mut out)).expect(clause);
    let [Loss { rows, error: DispatchError::NonFinite { layer, expert } }] = &lost[..] else {
        panic!("{clause}: {lost:?}")
    };
    assert_eq!((&rows[..], *layer), (&[BAD as u32][..], batch.layer), "{clause}");
    assert!(picked.contains(expert), "{clause}: expert {expert} is not the row's");
    let want = batch.reference(&harness.model);
    let hidden = harness.model.hidden;
    for (row, (got, want)) in out.chunks(hidden).zip(want.chunks(hidden)).enumerate() {
        let same = got.iter().zip(want).all(|(got, want)| got.to_bits() == want.to_bits());
        assert!(same || row == BAD, "{clause}: row {row} is not whole");
    }
    assert_still_works(harness, clause);
}

fn cancelled_work_is_gone<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let batch = first_batch(&harness.model, 5);
    let gone = submit(harness, &batch, 0);
    let kept = submit(harness, &batch, 1);
    harness.dispatch.cancel(gone);
    harness.dispatch.cancel(gone);
    harness.dispatch.cancel(Ticket::new(u64::MAX));
    assert_invalid(&collect(harness, gone, &batch), "a cancelled ticket is spent");
    let got = collect(harness, kept, &batch).expect("the other lane is not touched");
    assert_reference(&harness.model, &batch, &got, "after a cancel");
    assert_still_works(harness, "after a cancel");
}

/// A device number that no machine has.
const NO_DEVICE: u32 = u32::MAX;

fn memory_that_is_not_taken_is_named<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let clause = "memory that is not taken is named";
    let batch = first_batch(&harness.model, 8);
    let names = |outcome: Option<DispatchError>| match outcome {
        Some(DispatchError::Invalid(reason)) => reason.contains(&Place::Device(NO_DEVICE).to_string()),
        _ => false,
    };
    let rows = batch.rows(harness.model.compute);
    let bytes = rows.count() * rows.hidden() * rows.dtype().size();
    let slice = DeviceSlice::new(&batch, NO_DEVICE, 0, bytes, 0);
    let elsewhere = Rows::of_device(slice, rows.dtype(), rows.hidden()).expect("rows are whole");
    let outcome =
        harness.dispatch.submit(&LayerBatch { rows: elsewhere, ..batch.view(harness.model.compute, 0) });
    assert!(names(outcome.clone().err()), "{clause}: {outcome:?}");
    let ticket = submit(harness, &batch, 0);
    let room = DeviceSlice::new(&batch, NO_DEVICE, 0, batch.rows.len() * size_of::<f32>(), 0);
    let outcome = harness.dispatch.collect(ticket, soon(), RowsMut::of_device(room));
    assert!(names(outcome.clone().err()), "{clause}: {outcome:?}");
    assert_invalid(&collect(harness, ticket, &batch), "and the ticket is spent");
    assert_still_works(harness, clause);
}

fn rows_may_change_once_their_ticket_is_spent<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let clause = "rows may change once their ticket is spent";
    let mut batch = first_batch(&harness.model, 12);
    let kept = first_batch(&harness.model, 13);
    let other = submit(harness, &kept, 1);
    // The first batch is collected, the second cancelled, the third misses its deadline.
    for seed in 14..17 {
        let ticket = submit(harness, &batch, 0);
        match seed {
            14 => drop(collect(harness, ticket, &batch).expect(clause)),
            15 => harness.dispatch.cancel(ticket),
            _ => {
                let mut out = vec![0.0; batch.rows.len()];
                let missed = harness.dispatch.collect(ticket, Instant::now(), RowsMut::of_f32(&mut out));
                assert!(missed.is_ok_and(|lost| !lost.is_empty()), "{clause}");
            }
        }
        // Overwrites the rows in place, while a straggler may still read them.
        let next = first_batch(&harness.model, seed);
        batch.rows.copy_from_slice(&next.rows);
        batch.bits.copy_from_slice(&next.bits);
        let ticket = submit(harness, &batch, 0);
        let got = collect(harness, ticket, &batch).expect(clause);
        assert_reference(&harness.model, &batch, &got, clause);
    }
    let got = collect(harness, other, &kept).expect(clause);
    assert_reference(&harness.model, &kept, &got, clause);
}

fn a_ticket_is_spent_by_collecting<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let batch = first_batch(&harness.model, 6);
    let first = submit(harness, &batch, 0);
    collect(harness, first, &batch).expect("outputs come");
    assert_invalid(&collect(harness, first, &batch), "a ticket is collected once");
    assert_invalid(&collect(harness, Ticket::new(u64::MAX), &batch), "an unknown ticket is refused");
    let second = submit(harness, &batch, 0);
    assert_ne!(first, second, "tickets are not used again");
    harness.dispatch.cancel(second);
}

fn closing_is_final_and_may_be_repeated<D: ExpertDispatch>(harness: &mut Harness<D>) {
    let batch = first_batch(&harness.model, 7);
    let ticket = submit(harness, &batch, 0);
    harness.dispatch.close();
    harness.dispatch.close();
    let outcome = harness.dispatch.submit(&batch.view(harness.model.compute, 0));
    assert_eq!(outcome, Err(DispatchError::Closed), "nothing is taken after close");
    assert_eq!(collect(harness, ticket, &batch), Err(DispatchError::Closed), "nothing comes after close");
    harness.dispatch.cancel(ticket);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::fake;

    /// The plainest implementation of the seam, with one injected fault.
    struct Plain {
        fault: Fault,
        compute: Compute,
        experts: Vec<u32>,
        hidden: usize,
        done: BTreeMap<Ticket, Done>,
        /// The batch cancelled last.
        cancelled: Option<Done>,
        next: u64,
        closed: bool,
    }

    #[derive(Clone)]
    struct Done {
        layer: LayerId,
        sums: Vec<f32>,
        /// Rows with values that are not finite, each with its expert.
        lost: Vec<(u32, ExpertId)>,
    }

    #[derive(PartialEq, Clone, Copy)]
    enum Fault {
        None,
        CountsTwice,
        DescendingOrder,
        KeepsTickets,
        IgnoresClose,
        IgnoresDeadline,
        AddsToOutput,
        LosesAll,
        LosesNone,
        HidesPlaces,
        AnswersForCancelled,
    }

    impl ExpertDispatch for Plain {
        fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
            if self.closed && self.fault != Fault::IgnoresClose {
                return Err(DispatchError::Closed);
            }
            if batch.rows.place() != Place::Host {
                return Err(self.misplaced(batch.rows.place()));
            }
            let rows: Vec<f32> = match (batch.rows.f32(), batch.rows.bf16(), self.compute) {
                (Some(x), _, Compute::F32) => x.to_vec(),
                (_, Some(x), Compute::Bf16 | Compute::Bf16Pairs) => {
                    x.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect()
                }
                _ => return Err(DispatchError::Invalid("dtype".into())),
            };
            let count = self.experts.get(batch.layer.index()).copied().unwrap_or(0);
            let known = batch.choices.experts().iter().all(|e| e.get() < count);
            let shape = (batch.rows.count(), batch.rows.hidden());
            if shape != (batch.choices.rows(), self.hidden) || count == 0 || !known {
                return Err(DispatchError::Invalid("shape".into()));
            }
            let (mut sums, mut lost) = (vec![0.0f32; rows.len()], Vec::new());
            let k = batch.choices.k();
            let mut pairs: Vec<(usize, (&ExpertId, &f32))> =
                batch.choices.experts().iter().zip(batch.choices.weights()).enumerate().collect();
            match self.fault {
                Fault::CountsTwice => pairs.extend(pairs.clone()),
                Fault::DescendingOrder => pairs.reverse(),
                _ => {}
            }
            for (pair, (&expert, &weight)) in pairs {
                let at = pair / k * self.hidden;
                let y = fake::output(self.compute, batch.layer, expert, &rows[at..at + self.hidden]);
                if y.iter().any(|y| !y.is_finite()) && lost.iter().all(|&(row, _)| row != (pair / k) as u32) {
                    lost.push(((pair / k) as u32, expert));
                }
                for (sum, y) in sums[at..].iter_mut().zip(y) {
                    *sum += weight * y;
                }
            }
            self.next += 1;
            let made = Done { layer: batch.layer, sums, lost };
            let done =
                self.cancelled.take().filter(|_| self.fault == Fault::AnswersForCancelled).unwrap_or(made);
            self.done.insert(Ticket::new(self.next), done);
            Ok(Ticket::new(self.next))
        }

        fn collect(
            &mut self,
            ticket: Ticket,
            deadline: Instant,
            out: RowsMut<'_>,
        ) -> Result<Vec<Loss>, DispatchError> {
            if self.closed {
                return Err(DispatchError::Closed);
            }
            let unknown = DispatchError::Invalid("ticket".into());
            let Done { layer, sums, lost } = self.done.get(&ticket).cloned().ok_or(unknown)?;
            if self.fault != Fault::KeepsTickets {
                self.done.remove(&ticket);
            }
            let place = out.place();
            let out = out.into_f32().ok_or_else(|| self.misplaced(place))?;
            if out.len() != sums.len() {
                return Err(DispatchError::Invalid("room".into()));
            }
            if Instant::now() >= deadline && self.fault != Fault::IgnoresDeadline {
                let rows = (0..).take(sums.len() / self.hidden).collect();
                return Ok(vec![Loss { rows, error: DispatchError::Deadline { layer } }]);
            }
            if self.fault == Fault::AddsToOutput {
                out.iter_mut().zip(&sums).for_each(|(out, sum)| *out += sum);
            } else {
                out.copy_from_slice(&sums);
            }
            let rows: Vec<u32> = match self.fault {
                Fault::LosesAll if !lost.is_empty() => (0..).take(sums.len() / self.hidden).collect(),
                Fault::LosesNone => Vec::new(),
                _ => lost.iter().map(|(row, _)| *row).collect(),
            };
            let error = |expert| DispatchError::NonFinite { layer, expert };
            Ok(lost.first().map(|&(_, expert)| Loss { rows, error: error(expert) }).into_iter().collect())
        }

        fn cancel(&mut self, ticket: Ticket) {
            self.cancelled = self.done.remove(&ticket).or(self.cancelled.take());
        }

        fn close(&mut self) {
            self.closed = true;
        }
    }

    impl Plain {
        fn misplaced(&self, place: Place) -> DispatchError {
            match self.fault {
                Fault::HidesPlaces => DispatchError::Invalid("memory".into()),
                _ => DispatchError::misplaced("rows", place, Place::Host),
            }
        }
    }

    fn plain(fault: Fault, compute: Compute) -> Harness<Plain> {
        let (experts, hidden) = (vec![8, 0, 4], 6);
        let (done, cancelled, next, closed) = (BTreeMap::new(), None, 0, false);
        let experts_here = experts.clone();
        let dispatch = Plain { fault, compute, experts: experts_here, hidden, done, cancelled, next, closed };
        let oracle = Box::new(move |layer, expert, row: &[f32]| fake::output(compute, layer, expert, row));
        Harness { dispatch, model: Model { hidden, top_k: 3, compute, experts, oracle, sums: Sums::Exact } }
    }

    #[test]
    fn what_conforms_passes() {
        for compute in [Compute::F32, Compute::Bf16] {
            run(|| plain(Fault::None, compute));
        }
    }

    #[test]
    fn every_fault_is_found() {
        let faults = [
            Fault::CountsTwice,
            Fault::DescendingOrder,
            Fault::KeepsTickets,
            Fault::IgnoresClose,
            Fault::IgnoresDeadline,
            Fault::AddsToOutput,
            Fault::LosesAll,
            Fault::LosesNone,
            Fault::HidesPlaces,
            Fault::AnswersForCancelled,
        ];
        for fault in faults {
            let outcome = std::panic::catch_unwind(|| run(|| plain(fault, Compute::F32)));
            assert!(outcome.is_err(), "fault {} was not found", fault as u8);
        }
    }
}
