//! The trunk: everything but the routed experts, and the walk of a step through all layers.
//!
//! [`Trunk::forward`] is the path of a token: embed; per layer attend, gate, dispatch; combine; head. A step comes
//! in up to two lanes. At every layer a lane first takes home its experts' output of the layer before, then
//! attends and sends the next rows off, so one lane's attention overlaps the other lane's experts.
//!
//! What always holds: a row's bits depend on its own sequence only, never on the lane, the batch, the chunking or
//! the transport. A sequence fails alone, whatever fails it: it leaves the step at once, and the others go on.

mod attention;
#[cfg(test)]
mod failing;
#[cfg(test)]
mod late;
mod latent;
mod load;
mod moe;
mod norm;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::{Duration, Instant};

use muster_checkpoint::spec::{ModelSpec, WeightOn};
use muster_engine::dispatch::{
    Choices, DispatchError, ExpertDispatch, InvalidChoices, LayerBatch, Loss, Rows, RowsMut, Ticket,
    UnevenRows,
};
use muster_engine::reach::{LayerGroups, LayerPlace};
use muster_kernels::{
    Angles, Cpu, Expert, FfnScratch, KernelError, KvCache, KvShape, KvSlot, KvValues, Matrix, Rope,
    add_scaled, all_finite, linear, round_bf16, to_bf16,
};
use muster_types::{Compute, DType, ExpertId, LayerId, TokenId, WeightDType};

use crate::experts::precision;
use crate::gate::{self, GateError, GateScratch};
use attention::Attention;
use moe::{Moe, gated_mlp};
use norm::Norm;

/// A loaded trunk.
pub struct Trunk {
    spec: ModelSpec,
    kv_groups: LayerGroups,
    compute: Compute,
    dtype: WeightDType,
    embedding: Matrix,
    /// The rotary embeddings of all layers, each once.
    ropes: Vec<Rope>,
    layers: Vec<Layer>,
    final_norm: Norm,
    /// `None` when the embedding is the head.
    head: Option<Matrix>,
    head_bias: Option<Vec<f32>>,
    bytes: u64,
}

struct Layer {
    attention: Attention,
    mlp_norm: Norm,
    mlp: Mlp,
}

enum Mlp {
    /// Its routed experts are elsewhere.
    Moe(Box<Moe>),
    Dense(Box<Expert>),
}

/// A sequence's part of a step.
#[derive(Debug, Clone, Copy)]
pub struct SeqInput<'a> {
    /// Absolute position of `tokens[0]`.
    pub start: u32,
    /// Tokens to run; at least one, each below the vocabulary's size.
    pub tokens: &'a [TokenId],
    /// KV blocks: for one of [`Trunk::kv_groups`] after the other a table that covers positions `0 .. start +
    /// tokens.len()`, all equally long. What the group's layers do not see from `start` on may be anything.
    pub blocks: &'a [u32],
    /// Which logits are wanted.
    pub logits: WantLogits,
}

/// Positions whose logits a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantLogits {
    /// None: the prompt goes on in a later step.
    None,
    /// Those after the last token, to sample from.
    Last,
    /// Those after every token.
    All,
}

/// A sequence that gets no logits from this step. Its KV rows of the step are to be thrown away.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StepError {
    /// The gate had no usable choice for one of its tokens.
    #[error("layer {layer}: {source}")]
    Gate {
        /// The layer.
        layer: LayerId,
        /// What was wrong.
        source: GateError,
    },
    /// An input of the gate is NaN or infinite.
    #[error("layer {layer}: hidden values are not finite")]
    Hidden {
        /// The layer.
        layer: LayerId,
    },
    /// Its experts gave nothing.
    #[error(transparent)]
    Dispatch(#[from] DispatchError),
    /// A logit is NaN or infinite.
    #[error("logits are not finite")]
    Logits,
}

/// What whoever wants to look gets to see.
pub enum View<'a> {
    /// What a gate decided.
    Gate(GateView<'a>),
    /// The rows of a micro-batch that is about to be collected.
    Collect {
        /// Its ticket.
        ticket: Ticket,
        /// As they were submitted.
        rows: Rows<'a>,
    },
    /// The residual stream of a lane behind a layer.
    Hidden {
        /// The layer.
        layer: LayerId,
        /// `[rows, hidden]`.
        rows: &'a [f32],
    },
}

/// What the gate decided.
pub struct GateView<'a> {
    /// The layer.
    pub layer: LayerId,
    /// Which lane.
    pub lane: usize,
    /// Experts and weights of every row of the lane.
    pub choices: &'a Choices,
}

/// What a step needs beside its input.
pub struct StepContext<'a> {
    /// Where to compute.
    pub cpu: &'a Cpu,
    /// The cache that the blocks are numbers in.
    pub kv: &'a mut KvCache,
    /// The way to the experts.
    pub dispatch: &'a mut dyn ExpertDispatch,
    /// How long to wait for one layer's experts.
    pub timeout: Duration,
    /// Called with every gate decision, before every collecting, and behind every layer.
    pub observe: Option<&'a mut dyn FnMut(View<'_>)>,
}

/// Logits of a step, and buffers kept for the next.
#[derive(Default)]
pub struct StepState {
    lanes: [Lane; 2],
}

/// What a lane was given.
struct Run<'a> {
    /// Number of the lane.
    number: usize,
    sequences: &'a [SeqInput<'a>],
    /// Of the rows that are in the step, for one group of layers after the other.
    slots: Vec<KvSlot<'a>>,
}

/// One lane's rows and buffers. All matrices are `[rows, …]`, row-major. Rows are those of the sequences that have not
/// failed, one sequence after the other.
#[derive(Default)]
struct Lane {
    rows: usize,
    positions: Vec<u32>,
    /// Of every rotary embedding.
    angles: Vec<Angles>,
    /// The residual stream, always f32.
    residual: Vec<f32>,
    normed: Vec<f32>,
    attention: attention::Buffers,
    gate_logits: Vec<f32>,
    weighted: WeightedInputs,
    wire: Vec<u16>,
    moe_out: Vec<f32>,
    /// Rows of `moe_out` that are added up to one.
    copies: usize,
    /// What shared experts add to the output of those in flight; empty where there are none.
    shared_out: Vec<f32>,
    shared_scales: Vec<f32>,
    gate: GateScratch,
    ffn: FfnScratch,
    ids: Vec<ExpertId>,
    weights: Vec<f32>,
    /// `0 .. rows`, for an MLP that takes them all.
    every_row: Vec<u32>,
    /// Empty between steps; kept for its memory.
    slots: Vec<KvSlot<'static>>,
    in_flight: Option<InFlight>,
    head_rows: Vec<f32>,
    /// `[wanted rows, vocab]`.
    logits: Vec<f32>,
    /// Per sequence: its rows in `logits`, or why there are none.
    outcomes: Vec<Result<Range<usize>, StepError>>,
}

/// A micro-batch that was submitted and not collected.
struct InFlight {
    ticket: Ticket,
    weight_on: WeightOn,
}

/// Rows for experts whose weights multiply their input.
#[derive(Default)]
struct WeightedInputs {
    /// A row for every choice, multiplied by the choice's weight.
    rows: Vec<f32>,
    ids: Vec<ExpertId>,
    ones: Vec<f32>,
}

impl StepState {
    /// Logits `[wanted, vocab]` of one sequence of the last step.
    ///
    /// # Errors
    /// Why the sequence has none.
    ///
    /// # Panics
    /// When the last step had no such lane or sequence.
    pub fn logits(&self, lane: usize, sequence: usize, vocab: usize) -> Result<&[f32], StepError> {
        let lane = &self.lanes[lane];
        lane.outcomes[sequence].clone().map(|rows| &lane.logits[rows.start * vocab..rows.end * vocab])
    }
}

impl Trunk {
    /// The model.
    #[must_use]
    pub const fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What activations are rounded to.
    #[must_use]
    pub const fn compute(&self) -> Compute {
        self.compute
    }

    /// How its linears are held.
    #[must_use]
    pub const fn dtype(&self) -> WeightDType {
        self.dtype
    }

    /// Resident bytes of packed weights.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The layers that share KV blocks.
    #[must_use]
    pub const fn kv_groups(&self) -> &LayerGroups {
        &self.kv_groups
    }

    /// The shape of a KV cache for this model: a block holds tokens of one group of layers.
    #[must_use]
    pub fn kv_shape(&self) -> KvShape {
        let attention = &self.spec.layers[0].attention;
        KvShape {
            layers: self.kv_groups.size(),
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim,
            value_dim: attention.cached_value(),
            values: if attention.latent.is_some() { KvValues::EndOfKey } else { KvValues::Apart },
        }
    }

    /// A KV cache of this many blocks.
    ///
    /// # Errors
    /// When it does not fit the address space or memory.
    pub fn new_kv(&self, blocks: usize) -> Result<KvCache, KernelError> {
        KvCache::new(self.kv_shape(), blocks, precision(self.compute))
    }

    /// Runs one step through all layers. Outcomes are in `state`, sequence by sequence.
    pub fn forward(&self, ctx: &mut StepContext<'_>, lanes: [&[SeqInput<'_>]; 2], state: &mut StepState) {
        let groups = self.kv_groups.reaches().len();
        let mut runs = [0, 1].map(|number: usize| {
            let sequences = lanes[number];
            let memory = std::mem::take(&mut state.lanes[number].slots);
            Run { number, sequences, slots: slots_of(sequences, groups, memory) }
        });
        for (lane, run) in state.lanes.iter_mut().zip(&runs) {
            self.embed(lane, run.sequences);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            for (lane, run) in state.lanes.iter_mut().zip(&mut runs) {
                self.take_home(ctx, lane, run, index);
                if lane.rows == 0 {
                    continue;
                }
                self.attend(ctx, index, layer, lane, &run.slots);
                match &layer.mlp {
                    Mlp::Moe(moe) => self.send_off(ctx, index, moe, lane, run),
                    Mlp::Dense(expert) => self.dense(ctx, expert, lane),
                }
            }
        }
        for (lane, run) in state.lanes.iter_mut().zip(&mut runs) {
            self.take_home(ctx, lane, run, self.layers.len());
            if lane.rows > 0 {
                self.head(ctx, lane, run.sequences);
            }
        }
        for (lane, run) in state.lanes.iter_mut().zip(runs) {
            lane.slots = emptied(run.slots);
        }
    }

    fn embed(&self, lane: &mut Lane, sequences: &[SeqInput<'_>]) {
        let hidden = self.spec.hidden;
        lane.in_flight = None;
        lane.outcomes.clear();
        lane.outcomes.resize(sequences.len(), Ok(0..0));
        lane.positions.clear();
        for sequence in sequences {
            lane.positions.extend((sequence.start..).take(sequence.tokens.len()));
        }
        lane.rows = lane.positions.len();
        lane.turn(&self.ropes);
        lane.residual.resize(lane.rows * hidden, 0.0);
        let tokens = sequences.iter().flat_map(|sequence| sequence.tokens);
        for (token, row) in tokens.zip(lane.residual.chunks_exact_mut(hidden)) {
            self.embedding.row(token.index(), row);
        }
        if self.spec.embedding_multiplier != 1.0 {
            lane.residual.iter_mut().for_each(|x| *x *= self.spec.embedding_multiplier);
        }
    }

    /// Residual += attention(norm(residual)), then `normed` = norm(residual) for what follows. `slots` are those of all
    /// groups.
    fn attend(
        &self,
        ctx: &mut StepContext<'_>,
        index: usize,
        weights: &Layer,
        lane: &mut Lane,
        slots: &[KvSlot<'_>],
    ) {
        let attention = &weights.attention;
        attention.norm.apply(ctx.cpu, &lane.residual, &mut lane.normed);
        self.round(&mut lane.normed);
        let LayerPlace { group, layer } = self.kv_groups.place(index);
        let slots = &slots[group * lane.rows..][..lane.rows];
        let out = attention.run(self, ctx, layer, &lane.normed, slots, &lane.angles, &mut lane.attention);
        add_scaled(&mut lane.residual, out, self.spec.residual_multiplier);
        weights.mlp_norm.apply(ctx.cpu, &lane.residual, &mut lane.normed);
        self.round(&mut lane.normed);
    }

    /// Gates the lane's rows and submits them; computes what they get from shared experts while they are away. Sequences
    /// whose experts nobody holds leave the step.
    fn send_off(
        &self,
        ctx: &mut StepContext<'_>,
        index: usize,
        moe: &Moe,
        lane: &mut Lane,
        run: &mut Run<'_>,
    ) {
        // Checked when the model was loaded: layers are counted in u32.
        let Ok(layer) = LayerId::new(index as u32, self.layers.len() as u32) else { return };
        let k = moe.spec.top_k as usize;
        self.choose(ctx.cpu, layer, moe, lane, run);
        let mut is_seen = false;
        while lane.rows > 0 {
            let choices = Choices::new(k, std::mem::take(&mut lane.ids), std::mem::take(&mut lane.weights));
            let submitted = choices.map_err(|error| invalid(&error)).and_then(|choices| {
                if let Some(observe) = &mut ctx.observe
                    && !std::mem::replace(&mut is_seen, true)
                {
                    observe(View::Gate(GateView { layer, lane: run.number, choices: &choices }));
                }
                let submitted = self.submit(ctx, layer, run.number, moe.spec.weight_on, lane, &choices);
                (lane.ids, lane.weights) = choices.into_parts();
                submitted
            });
            match submitted {
                Ok(in_flight) => {
                    lane.in_flight = Some(in_flight);
                    break;
                }
                Err(error) => self.lose(lane, run, &[lane.refused(error)]),
            }
        }
        lane.shared_out.clear();
        if let Some(shared) = &moe.shared
            && lane.in_flight.is_some()
        {
            lane.number_rows();
            let precision = precision(self.compute);
            let Lane { normed, every_row, ffn, shared_out, shared_scales, .. } = lane;
            shared.run(ctx.cpu, precision, normed, every_row, ffn, shared_scales, shared_out);
        }
    }

    /// Sends the lane's rows to the experts that were chosen for them.
    fn submit(
        &self,
        ctx: &mut StepContext<'_>,
        layer: LayerId,
        number: usize,
        weight_on: WeightOn,
        lane: &mut Lane,
        choices: &Choices,
    ) -> Result<InFlight, DispatchError> {
        let weighted = match weight_on {
            WeightOn::Output => None,
            WeightOn::Input => {
                Some(lane.weighted.fill(choices, &lane.normed).map_err(|error| invalid(&error))?)
            }
        };
        if self.compute.wire_dtype() == DType::Bf16 {
            let sent = match weight_on {
                WeightOn::Output => &lane.normed,
                WeightOn::Input => &lane.weighted.rows,
            };
            lane.wire.resize(sent.len(), 0);
            to_bf16(sent, &mut lane.wire);
        }
        let sent_choices = weighted.as_ref().unwrap_or(choices);
        lane.copies = sent_choices.rows() / choices.rows();
        let rows = self.rows_sent(lane, weight_on).map_err(DispatchError::from);
        let submitted = rows.and_then(|rows| {
            ctx.dispatch.submit(&LayerBatch { layer, lane: number, rows, choices: sent_choices })
        });
        if let Some(weighted) = weighted {
            (lane.weighted.ids, lane.weighted.ones) = weighted.into_parts();
        }
        submitted.map(|ticket| InFlight { ticket, weight_on })
    }

    /// The rows of a lane's micro-batch. They stay as they are until it is collected.
    fn rows_sent<'l>(&self, lane: &'l Lane, weight_on: WeightOn) -> Result<Rows<'l>, UnevenRows> {
        match (self.compute.wire_dtype(), weight_on) {
            (DType::F32, WeightOn::Output) => Rows::of_f32(&lane.normed, self.spec.hidden),
            (DType::F32, WeightOn::Input) => Rows::of_f32(&lane.weighted.rows, self.spec.hidden),
            (DType::Bf16, _) => Rows::of_bf16(&lane.wire, self.spec.hidden),
        }
    }

    /// The gate's choice for every row, into `ids` and `weights`. Sequences that have a row without a usable one leave the
    /// step.
    fn choose(&self, cpu: &Cpu, layer: LayerId, moe: &Moe, lane: &mut Lane, run: &mut Run<'_>) {
        let (experts, k) = (moe.spec.experts as usize, moe.spec.top_k as usize);
        lane.ids.clear();
        lane.weights.clear();
        if !all_finite(&lane.normed) {
            let hidden = self.spec.hidden;
            let bad: Vec<bool> = lane.normed.chunks_exact(hidden).map(|row| !all_finite(row)).collect();
            self.withdraw(lane, run, |rows| bad[rows].contains(&true).then_some(StepError::Hidden { layer }));
            if lane.rows == 0 {
                return;
            }
        }
        moe.gate.apply(cpu, &lane.normed, precision(self.compute), &mut lane.gate_logits);
        let mut bad = Vec::new();
        for (row, logits) in lane.gate_logits.chunks_exact(experts).enumerate() {
            let (ids, weights) = (&mut lane.ids, &mut lane.weights);
            let (recipe, bias) = (&moe.spec.gate, &moe.selection_bias);
            if let Err(source) = gate::choose(recipe, logits, bias, k, &mut lane.gate, ids, weights) {
                // In the place of its choice, which leaves with it.
                lane.ids.extend(ExpertId::all(moe.spec.experts).take(k));
                lane.weights.extend(std::iter::repeat_n(0.0, k));
                bad.push((row, source));
            }
        }
        if !bad.is_empty() {
            self.withdraw(lane, run, |rows| {
                let (_, source) = bad.iter().find(|(row, _)| rows.contains(row))?;
                Some(StepError::Gate { layer, source: *source })
            });
        }
    }

    /// Waits for the lane's experts, if any are out, and adds what they and shared ones say to the residual.
    /// `next` is the layer that comes then.
    fn take_home(&self, ctx: &mut StepContext<'_>, lane: &mut Lane, run: &mut Run<'_>, next: usize) {
        if let Some(InFlight { ticket, weight_on }) = lane.in_flight.take() {
            if let Some(observe) = &mut ctx.observe
                && let Ok(rows) = self.rows_sent(lane, weight_on)
            {
                observe(View::Collect { ticket, rows });
            }
            lane.moe_out.resize(lane.residual.len() * lane.copies, 0.0);
            let deadline = Instant::now() + ctx.timeout;
            let collected = ctx.dispatch.collect(ticket, deadline, RowsMut::of_f32(&mut lane.moe_out));
            add_up(&mut lane.moe_out, lane.copies, self.spec.hidden);
            if !lane.shared_out.is_empty() {
                add_scaled(&mut lane.moe_out, &lane.shared_out, 1.0);
            }
            add_scaled(&mut lane.residual, &lane.moe_out, self.spec.residual_multiplier);
            let mut lost = match collected {
                Ok(lost) => lost,
                Err(error) => vec![lane.all_lost(error)],
            };
            if !lost.is_empty() {
                let copies = lane.copies as u32;
                lost.iter_mut().flat_map(|loss| &mut loss.rows).for_each(|row| *row /= copies);
                self.lose(lane, run, &lost);
            }
        }
        if lane.rows == 0 {
            return;
        }
        let layer = next.checked_sub(1).map(|layer| LayerId::new(layer as u32, self.layers.len() as u32));
        if let (Some(observe), Some(Ok(layer))) = (&mut ctx.observe, layer) {
            observe(View::Hidden { layer, rows: &lane.residual });
        }
    }

    /// Takes sequences out of the step whose rows are lost.
    fn lose(&self, lane: &mut Lane, run: &mut Run<'_>, lost: &[Loss]) {
        self.withdraw(lane, run, |rows| {
            let has = |loss: &&Loss| loss.rows.iter().any(|&row| rows.contains(&(row as usize)));
            lost.iter().find(has).map(|loss| StepError::Dispatch(loss.error.clone()))
        });
    }

    /// Takes sequences out of the step: those for whose rows `why` has an error. What is kept of the rows is what the rest
    /// of the layer reads.
    fn withdraw(
        &self,
        lane: &mut Lane,
        run: &mut Run<'_>,
        mut why: impl FnMut(Range<usize>) -> Option<StepError>,
    ) {
        let (before, hidden) = (lane.rows, self.spec.hidden);
        let mut kept: Vec<Range<usize>> = Vec::new();
        let mut end = 0;
        for (sequence, outcome) in run.sequences.iter().zip(&mut lane.outcomes) {
            if outcome.is_ok() {
                let rows = end..end + sequence.tokens.len();
                end = rows.end;
                match why(rows.clone()) {
                    Some(error) => *outcome = Err(error),
                    None => kept.push(rows),
                }
            }
        }
        lane.rows = kept.iter().map(ExactSizeIterator::len).sum();
        let k = lane.ids.len() / before;
        retain(&mut lane.ids, before, k, &kept);
        retain(&mut lane.weights, before, k, &kept);
        retain(&mut lane.residual, before, hidden, &kept);
        retain(&mut lane.normed, before, hidden, &kept);
        retain(&mut lane.positions, before, 1, &kept);
        retain(&mut run.slots, before, 1, &kept);
        lane.turn(&self.ropes);
    }

    fn dense(&self, ctx: &mut StepContext<'_>, expert: &Expert, lane: &mut Lane) {
        lane.number_rows();
        let Lane { normed, every_row, ffn, moe_out, .. } = lane;
        gated_mlp(ctx.cpu, expert, normed, every_row, precision(self.compute), ffn, moe_out);
        add_scaled(&mut lane.residual, &lane.moe_out, self.spec.residual_multiplier);
    }

    fn head(&self, ctx: &mut StepContext<'_>, lane: &mut Lane, sequences: &[SeqInput<'_>]) {
        let (hidden, vocab) = (self.spec.hidden, self.spec.vocab as usize);
        lane.head_rows.clear();
        let mut first = 0;
        for (sequence, outcome) in sequences.iter().zip(&mut lane.outcomes) {
            let Ok(range) = outcome else { continue };
            let end = first + sequence.tokens.len();
            let wanted = match sequence.logits {
                WantLogits::None => end..end,
                WantLogits::Last => end - 1..end,
                WantLogits::All => first..end,
            };
            first = end;
            let start = lane.head_rows.len() / hidden;
            *range = start..start + wanted.len();
            lane.head_rows.extend_from_slice(&lane.residual[wanted.start * hidden..wanted.end * hidden]);
        }
        let rows = lane.head_rows.len() / hidden;
        self.final_norm.apply(ctx.cpu, &lane.head_rows, &mut lane.normed);
        self.round(&mut lane.normed);
        lane.logits.resize(rows * vocab, 0.0);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        linear(ctx.cpu, head, &lane.normed, precision(self.compute), &mut lane.logits);
        if let Some(bias) = &self.head_bias {
            for row in lane.logits.chunks_exact_mut(vocab) {
                row.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
            }
        }
        if self.spec.logits_divisor != 1.0 {
            lane.logits.iter_mut().for_each(|x| *x /= self.spec.logits_divisor);
        }
        for outcome in &mut lane.outcomes {
            if let Ok(range) = outcome
                && !all_finite(&lane.logits[range.start * vocab..range.end * vocab])
            {
                *outcome = Err(StepError::Logits);
            }
        }
    }

    /// In bf16 the input of every linear is rounded.
    fn round(&self, x: &mut [f32]) {
        if precision(self.compute).rounds() {
            round_bf16(x);
        }
    }
}

impl Lane {
    fn number_rows(&mut self) {
        self.every_row.clear();
        self.every_row.extend((0..).take(self.rows));
    }

    /// Brings the angles up to date with the positions.
    fn turn(&mut self, ropes: &[Rope]) {
        self.angles.resize_with(ropes.len(), Angles::default);
        for (rope, angles) in ropes.iter().zip(&mut self.angles) {
            rope.angles(&self.positions, angles);
        }
    }

    /// What it means for the rows that their micro-batch was not taken: where an expert has no owner, only for those that
    /// chose it.
    fn refused(&self, error: DispatchError) -> Loss {
        let k = self.ids.len() / self.rows;
        let rows: Vec<u32> = match &error {
            DispatchError::NoOwner { expert, .. } => (0..)
                .zip(self.ids.chunks(k))
                .filter(|(_, ids)| ids.contains(expert))
                .map(|(row, _)| row)
                .collect(),
            _ => Vec::new(),
        };
        if rows.is_empty() { self.all_lost(error) } else { Loss { rows, error } }
    }

    fn all_lost(&self, error: DispatchError) -> Loss {
        // Rows of a step are counted in 32 bits.
        Loss { rows: (0..self.rows as u32 * self.copies.max(1) as u32).collect(), error }
    }
}

fn invalid(error: &InvalidChoices) -> DispatchError {
    DispatchError::Invalid(error.to_string())
}

/// Keeps ranges of rows, each of `width` values, in every block of `rows` rows.
fn retain<T: Copy>(values: &mut Vec<T>, rows: usize, width: usize, kept: &[Range<usize>]) {
    let block = rows * width;
    if block == 0 {
        return;
    }
    let mut to = 0;
    for start in (0..values.len()).step_by(block) {
        for range in kept {
            let from = start + range.start * width..start + range.end * width;
            let end = to + from.len();
            values.copy_within(from, to);
            to = end;
        }
    }
    values.truncate(to);
}

impl WeightedInputs {
    /// Makes the rows, and says where each goes: to its expert alone, with weight one.
    fn fill(&mut self, choices: &Choices, x: &[f32]) -> Result<Choices, InvalidChoices> {
        let hidden = x.len() / choices.rows();
        self.rows.clear();
        for (row, weights) in x.chunks_exact(hidden).zip(choices.weights().chunks_exact(choices.k())) {
            for weight in weights {
                self.rows.extend(row.iter().map(|x| x * weight));
            }
        }
        let (mut ids, mut ones) = (std::mem::take(&mut self.ids), std::mem::take(&mut self.ones));
        ids.clear();
        ids.extend_from_slice(choices.experts());
        ones.clear();
        ones.resize(ids.len(), 1.0);
        Choices::new(1, ids, ones)
    }
}

/// Every `copies` rows become one, added up in their order.
fn add_up(rows: &mut Vec<f32>, copies: usize, hidden: usize) {
    if copies == 1 {
        return;
    }
    let sums = rows.len() / copies / hidden;
    for to in 0..sums {
        let from = to * copies * hidden;
        rows.copy_within(from..from + hidden, to * hidden);
        for at in 0..(copies - 1) * hidden {
            rows[to * hidden + at % hidden] += rows[from + hidden + at];
        }
    }
    rows.truncate(sums * hidden);
}

/// Where every row of a lane stands, for one group of layers after the other, in memory that was used before.
fn slots_of<'a>(sequences: &[SeqInput<'a>], groups: usize, memory: Vec<KvSlot<'static>>) -> Vec<KvSlot<'a>> {
    let mut slots: Vec<KvSlot<'a>> = memory;
    for group in 0..groups {
        slots.extend(sequences.iter().flat_map(|sequence| {
            let places = sequence.blocks.len() / groups;
            let blocks = &sequence.blocks[group * places..][..places];
            (sequence.start..).take(sequence.tokens.len()).map(move |position| KvSlot { position, blocks })
        }));
    }
    slots
}

/// The memory of a list, without what it borrowed: the standard library reuses it when it collects in place.
fn emptied(mut slots: Vec<KvSlot<'_>>) -> Vec<KvSlot<'static>> {
    slots.clear();
    slots.into_iter().map(|slot| KvSlot { blocks: &[], ..slot }).collect()
}
