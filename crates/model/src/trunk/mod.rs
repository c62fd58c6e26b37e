//! The trunk: everything but the routed experts, and the path of a step through all layers.
//!
//! [`Trunk::forward`] is the path of a token: embed; per layer attend, gate, dispatch; combine; head. A step comes in
//! up to two lanes. At every layer a lane first collects its experts' output of the layer before, then attends and
//! submits the next rows, so one lane's attention overlaps the other lane's experts. A [`Device`] owns the buffers and
//! computes.
//!
//! What always holds: a row's bits depend on its own sequence only, never on the lane, the batch, the chunking or the
//! transport. A sequence fails alone, whatever the cause: it leaves the step at once, and the others go on.

#[cfg(test)]
mod apart;
mod attention;
mod cpu;
pub mod device;
#[cfg(test)]
mod failing;
mod lane;
#[cfg(test)]
mod late;
mod latent;
mod load;
mod moe;
mod stepper;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_checkpoint::spec::{ModelSpec, WeightOn};
use muster_engine::dispatch::{
    Choices, DispatchError, ExpertDispatch, InvalidChoices, LayerBatch, Loss, Rows, Ticket,
};
use muster_engine::reach::{LayerGroups, LayerPlace};
use muster_kernels::{KvShape, KvSlot, KvValues, Rope, all_finite};
use muster_types::{Compute, LayerId, WeightDType};

pub use self::cpu::CpuDevice;
pub use self::stepper::Stepper;

use self::attention::Attention;
use self::device::{Choice, Device, DeviceError, Head, Norm, Unusable};
use self::lane::{InFlight, Lane, Run, emptied, slots_of};
use self::moe::Moe;
use crate::step::{SeqInput, StepError};

/// A loaded trunk.
pub struct Trunk<D: Device = CpuDevice> {
    device: Arc<D>,
    spec: ModelSpec,
    kv_groups: LayerGroups,
    dtype: WeightDType,
    embedding: D::Matrix,
    /// The rotary embeddings of all layers, each once.
    ropes: Vec<Rope>,
    layers: Vec<Layer<D>>,
    final_norm: Norm<D>,
    /// `None` when the embedding is the head.
    head: Option<D::Matrix>,
    head_bias: Option<D::Vector>,
    bytes: u64,
}

struct Layer<D: Device> {
    attention: Attention<D>,
    mlp_norm: Norm<D>,
    mlp: Mlp<D>,
}

enum Mlp<D: Device> {
    /// A layer with routed experts, which dispatch reaches.
    Moe(Box<Moe<D>>),
    Dense(Box<D::Mlp>),
}

/// Events of a step for an observer.
pub enum View<'a> {
    /// A gate's choices.
    Gate(GateView<'a>),
    /// The rows of a micro-batch, before it is collected.
    Collect {
        /// Its ticket.
        ticket: Ticket,
        /// The submitted rows.
        rows: Rows<'a>,
    },
    /// The residual stream of a lane after a layer.
    Hidden {
        /// The layer.
        layer: LayerId,
        /// `[rows, hidden]`.
        rows: &'a [f32],
    },
}

/// Choices of a gate.
pub struct GateView<'a> {
    /// The layer.
    pub layer: LayerId,
    /// Number of the lane.
    pub lane: usize,
    /// Experts and weights of every row of the lane.
    pub choices: &'a Choices,
}

/// Resources of a step.
pub struct StepContext<'a, D: Device = CpuDevice> {
    /// The KV cache of the step's blocks.
    pub kv: &'a mut D::Kv,
    /// Dispatch to the experts.
    pub dispatch: &'a mut dyn ExpertDispatch,
    /// Longest wait for one layer's experts.
    pub timeout: Duration,
    /// Called after every gate, before every collect, and after every layer.
    pub observe: Option<&'a mut dyn FnMut(View<'_>)>,
}

/// Logits of a step, and buffers kept for the next.
pub struct StepState<D: Device = CpuDevice> {
    lanes: [Lane<D>; 2],
}

impl<D: Device> Default for StepState<D> {
    fn default() -> Self {
        Self { lanes: [Lane::default(), Lane::default()] }
    }
}

impl<D: Device> StepState<D> {
    /// Logits `[wanted, vocab]` of one sequence of the last step.
    ///
    /// # Errors
    /// The reason why the sequence has none.
    ///
    /// # Panics
    /// When the last step had no such lane or sequence.
    pub fn logits(&self, lane: usize, sequence: usize, vocab: usize) -> Result<&[f32], StepError> {
        let lane = &self.lanes[lane];
        lane.outcomes[sequence].clone().map(|rows| &lane.logits[rows.start * vocab..rows.end * vocab])
    }
}

impl<D: Device> Trunk<D> {
    /// Description of the model.
    #[must_use]
    pub const fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its device.
    #[must_use]
    pub const fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// Rounding of activations.
    #[must_use]
    pub fn compute(&self) -> Compute {
        self.device.compute()
    }

    /// Packing of its linears.
    #[must_use]
    pub const fn dtype(&self) -> WeightDType {
        self.dtype
    }

    /// Resident bytes of packed weights.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Groups of layers that share KV blocks.
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
    /// When it does not fit the device.
    pub fn new_kv(&self, blocks: usize) -> Result<D::Kv, DeviceError> {
        self.device.kv(self.kv_shape(), blocks)
    }

    /// Runs one step through all layers. Outcomes are in `state`, sequence by sequence.
    pub fn forward(
        &self,
        ctx: &mut StepContext<'_, D>,
        lanes: [&[SeqInput<'_>]; 2],
        state: &mut StepState<D>,
    ) {
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
                    Mlp::Dense(mlp) => self.dense(mlp, lane),
                }
            }
        }
        for (lane, run) in state.lanes.iter_mut().zip(&mut runs) {
            self.take_home(ctx, lane, run, self.layers.len());
            if lane.rows > 0 {
                self.head(lane, run.sequences);
            }
        }
        for (lane, run) in state.lanes.iter_mut().zip(runs) {
            lane.slots = emptied(run.slots);
        }
    }

    fn embed(&self, lane: &mut Lane<D>, sequences: &[SeqInput<'_>]) {
        lane.begin(&self.device, &self.ropes, sequences);
        let multiplier = self.spec.embedding_multiplier;
        self.device.embed(&self.embedding, &lane.tokens, multiplier, &mut lane.residual);
    }

    /// Residual += attention(norm(residual)), then `normed` = norm(residual) for the gate or the MLP. `slots` are those
    /// of all groups.
    fn attend(
        &self,
        ctx: &mut StepContext<'_, D>,
        index: usize,
        layer: &Layer<D>,
        lane: &mut Lane<D>,
        slots: &[KvSlot<'_>],
    ) {
        let device = &*self.device;
        device.norm(&layer.attention.norm, &lane.residual, &mut lane.normed);
        let LayerPlace { group, layer: in_group } = self.kv_groups.place(index);
        let slots = &slots[group * lane.rows..][..lane.rows];
        let at = &mut attention::At { kv: ctx.kv, layer: in_group, slots, angles: &lane.angles };
        let out = layer.attention.run(device, at, &lane.normed, &mut lane.attention, &mut lane.scratch);
        device.add_scaled(out, self.spec.residual_multiplier, &mut lane.residual);
        device.norm(&layer.mlp_norm, &lane.residual, &mut lane.normed);
    }

    /// Gates and submits the lane's rows, and computes their shared experts meanwhile. Sequences with an expert without
    /// an owner leave the step.
    fn send_off(
        &self,
        ctx: &mut StepContext<'_, D>,
        index: usize,
        moe: &Moe<D>,
        lane: &mut Lane<D>,
        run: &mut Run<'_>,
    ) {
        // In range: loading checked that the number of layers fits u32.
        let Ok(layer) = LayerId::new(index as u32, self.layers.len() as u32) else { return };
        self.choose(layer, moe, lane, run);
        let mut is_seen = false;
        while lane.rows > 0 {
            let Choice { experts, weights, .. } = &mut lane.choice;
            let k = moe.gate.top_k as usize;
            let choices = Choices::new(k, std::mem::take(experts), std::mem::take(weights));
            let submitted = choices.map_err(|error| invalid(&error)).and_then(|choices| {
                if let Some(observe) = &mut ctx.observe
                    && !std::mem::replace(&mut is_seen, true)
                {
                    observe(View::Gate(GateView { layer, lane: run.number, choices: &choices }));
                }
                let submitted = self.submit(ctx, layer, run.number, moe.weight_on, lane, &choices);
                (lane.choice.experts, lane.choice.weights) = choices.into_parts();
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
        lane.has_shared = moe.shared.is_some() && lane.in_flight.is_some();
        if let (Some(shared), true) = (&moe.shared, lane.has_shared) {
            let Lane { normed, scratch, shared_out, .. } = lane;
            shared.run(&*self.device, normed, scratch, shared_out);
        }
    }

    /// Submits the lane's rows to their chosen experts.
    fn submit(
        &self,
        ctx: &mut StepContext<'_, D>,
        layer: LayerId,
        number: usize,
        weight_on: WeightOn,
        lane: &mut Lane<D>,
        choices: &Choices,
    ) -> Result<InFlight, DispatchError> {
        let device = &*self.device;
        let weighted = match weight_on {
            WeightOn::Output => None,
            WeightOn::Input => {
                let filled = lane.weighted.fill(device, choices, &lane.normed);
                Some(filled.map_err(|error| invalid(&error))?)
            }
        };
        let Lane { normed, weighted: lane::Weighted { rows, .. }, wire, .. } = &mut *lane;
        device.to_wire(if weighted.is_some() { rows } else { normed }, wire);
        let sent = weighted.as_ref().unwrap_or(choices);
        lane.copies = sent.rows() / choices.rows();
        let submitted = self
            .rows_sent(lane, weight_on)
            .and_then(|rows| ctx.dispatch.submit(&LayerBatch { layer, lane: number, rows, choices: sent }));
        if let Some(weighted) = weighted {
            lane.weighted.reuse(weighted);
        }
        submitted.map(|ticket| InFlight { ticket, weight_on })
    }

    /// The rows of a lane's micro-batch, unchanged until it is collected.
    fn rows_sent<'l>(&self, lane: &'l Lane<D>, weight_on: WeightOn) -> Result<Rows<'l>, DispatchError> {
        let rows = match weight_on {
            WeightOn::Output => &lane.normed,
            WeightOn::Input => &lane.weighted.rows,
        };
        Ok(self.device.rows(rows, &lane.wire, self.spec.hidden)?)
    }

    /// Chooses experts for every row by the gate. Sequences with a row without a usable choice leave the step.
    fn choose(&self, layer: LayerId, moe: &Moe<D>, lane: &mut Lane<D>, run: &mut Run<'_>) {
        let Lane { normed, scratch, choice, .. } = &mut *lane;
        if let Err(error) = self.device.choose(&moe.gate, normed, scratch, choice) {
            lane.fail(&error);
            return;
        }
        let unusable = std::mem::take(&mut lane.choice.unusable);
        if !unusable.is_empty() {
            self.withdraw(lane, run, |rows| {
                let mut its = unusable.iter().filter(|(row, _)| rows.contains(row)).map(|(_, why)| *why);
                let first = its.clone().next()?;
                // A row that is not finite takes precedence over gate errors of other rows.
                Some(match its.find(|why| *why == Unusable::Hidden).unwrap_or(first) {
                    Unusable::Hidden => StepError::Hidden { layer },
                    Unusable::Gate(source) => StepError::Gate { layer, source },
                })
            });
        }
    }

    /// Collects the lane's micro-batch, if one is in flight, and adds the outputs of routed and shared experts to the
    /// residual stream. `next` is the number of the layer that follows.
    fn take_home(&self, ctx: &mut StepContext<'_, D>, lane: &mut Lane<D>, run: &mut Run<'_>, next: usize) {
        let (device, hidden) = (&*self.device, self.spec.hidden);
        if let Some(InFlight { ticket, weight_on }) = lane.in_flight.take() {
            if let Some(observe) = &mut ctx.observe
                && let Ok(rows) = self.rows_sent(lane, weight_on)
            {
                observe(View::Collect { ticket, rows });
            }
            let deadline = Instant::now() + ctx.timeout;
            let out = device.rows_mut(lane.rows * lane.copies * hidden, &mut lane.mlp_out);
            let collected = ctx.dispatch.collect(ticket, deadline, out);
            device.sum_copies(lane.copies, hidden, &mut lane.mlp_out);
            if lane.has_shared {
                device.add_scaled(&lane.shared_out, 1.0, &mut lane.mlp_out);
            }
            device.add_scaled(&lane.mlp_out, self.spec.residual_multiplier, &mut lane.residual);
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
        let layer = next.checked_sub(1).map(|layer| LayerId::new(layer as u32, self.layers.len() as u32));
        if let (Some(observe), Some(Ok(layer)), true) = (&mut ctx.observe, layer, lane.rows > 0) {
            match device.read(&lane.residual, &mut lane.logits) {
                Ok(()) => observe(View::Hidden { layer, rows: &lane.logits }),
                Err(error) => lane.fail(&error),
            }
        }
    }

    /// Removes sequences with lost rows from the step.
    fn lose(&self, lane: &mut Lane<D>, run: &mut Run<'_>, lost: &[Loss]) {
        self.withdraw(lane, run, |rows| {
            let has = |loss: &&Loss| loss.rows.iter().any(|&row| rows.contains(&(row as usize)));
            lost.iter().find(has).map(|loss| StepError::Dispatch(loss.error.clone()))
        });
    }

    /// Removes sequences from the step: those for whose rows `why` returns an error.
    fn withdraw(
        &self,
        lane: &mut Lane<D>,
        run: &mut Run<'_>,
        why: impl FnMut(Range<usize>) -> Option<StepError>,
    ) {
        lane.withdraw(&*self.device, &self.ropes, self.spec.hidden, run, why);
    }

    fn dense(&self, mlp: &D::Mlp, lane: &mut Lane<D>) {
        let Lane { normed, scratch, mlp_out, residual, .. } = lane;
        self.device.gated_mlp(mlp, normed, scratch, mlp_out);
        self.device.add_scaled(mlp_out, self.spec.residual_multiplier, residual);
    }

    fn head(&self, lane: &mut Lane<D>, sequences: &[SeqInput<'_>]) {
        let (device, vocab) = (&*self.device, self.spec.vocab as usize);
        lane.want(sequences);
        device.gather(&lane.residual, &lane.wanted, self.spec.hidden, &mut lane.head_rows);
        device.norm(&self.final_norm, &lane.head_rows, &mut lane.normed);
        let head = Head {
            weight: self.head.as_ref().unwrap_or(&self.embedding),
            bias: self.head_bias.as_ref(),
            divisor: self.spec.logits_divisor,
        };
        if let Err(error) = device.head(head, &lane.normed, &mut lane.scratch, &mut lane.logits) {
            lane.fail(&error);
        }
        for outcome in &mut lane.outcomes {
            if let Ok(range) = outcome
                && !all_finite(&lane.logits[range.start * vocab..range.end * vocab])
            {
                *outcome = Err(StepError::Logits);
            }
        }
    }
}

fn invalid(error: &InvalidChoices) -> DispatchError {
    DispatchError::Invalid(error.to_string())
}
