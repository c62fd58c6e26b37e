//! A lane of a step: the rows of its sequences and their buffers.
//!
//! All matrices are `[rows, …]`, row-major. Rows are those of the sequences that have not failed, one sequence after
//! the other.

use std::ops::Range;

use muster_checkpoint::spec::WeightOn;
use muster_engine::dispatch::{Choices, DispatchError, InvalidChoices, Loss, Ticket};
use muster_kernels::{KvSlot, Rope};
use muster_types::{ExpertId, TokenId};

use super::attention;
use super::device::{Choice, Device, DeviceError};
use crate::step::{SeqInput, StepError, WantLogits};

/// Input of a lane.
pub(super) struct Run<'a> {
    /// Number of the lane.
    pub(super) number: usize,
    pub(super) sequences: &'a [SeqInput<'a>],
    /// Slots of the rows still in the step, one group of layers after the other.
    pub(super) slots: Vec<KvSlot<'a>>,
}

/// Rows and buffers of a lane.
pub(super) struct Lane<D: Device> {
    pub(super) rows: usize,
    /// Tokens of all rows at the start of the step.
    pub(super) tokens: Vec<TokenId>,
    pub(super) positions: Vec<u32>,
    /// Angles of every rotary embedding.
    pub(super) angles: Vec<D::Angles>,
    /// The residual stream, always f32.
    pub(super) residual: D::Buffer,
    pub(super) normed: D::Buffer,
    pub(super) attention: attention::Buffers<D>,
    pub(super) choice: Choice,
    pub(super) weighted: Weighted<D>,
    pub(super) wire: D::Wire,
    pub(super) mlp_out: D::Buffer,
    /// Rows of `mlp_out` that are summed to one.
    pub(super) copies: usize,
    /// Output of shared experts, added to that of the routed ones.
    pub(super) shared_out: D::Buffer,
    pub(super) has_shared: bool,
    pub(super) scratch: D::Scratch,
    /// Empty between steps; kept for its memory.
    pub(super) slots: Vec<KvSlot<'static>>,
    pub(super) in_flight: Option<InFlight>,
    /// Ranges of rows whose logits are wanted.
    pub(super) wanted: Vec<Range<usize>>,
    pub(super) head_rows: D::Buffer,
    /// `[wanted rows, vocab]`; between layers, the residual stream for observers.
    pub(super) logits: Vec<f32>,
    /// Per sequence: its rows in `logits`, or why there are none.
    pub(super) outcomes: Vec<Result<Range<usize>, StepError>>,
}

/// A submitted micro-batch that is not collected yet.
pub(super) struct InFlight {
    pub(super) ticket: Ticket,
    pub(super) weight_on: WeightOn,
}

/// Rows for experts whose weights multiply their input: one for every choice, which goes to its expert alone, with
/// weight one.
pub(super) struct Weighted<D: Device> {
    pub(super) rows: D::Buffer,
    ids: Vec<ExpertId>,
    ones: Vec<f32>,
}

impl<D: Device> Default for Lane<D> {
    fn default() -> Self {
        Self {
            rows: 0,
            tokens: Vec::new(),
            positions: Vec::new(),
            angles: Vec::new(),
            residual: D::Buffer::default(),
            normed: D::Buffer::default(),
            attention: attention::Buffers::default(),
            choice: Choice::default(),
            weighted: Weighted { rows: D::Buffer::default(), ids: Vec::new(), ones: Vec::new() },
            wire: D::Wire::default(),
            mlp_out: D::Buffer::default(),
            copies: 1,
            shared_out: D::Buffer::default(),
            has_shared: false,
            scratch: D::Scratch::default(),
            slots: Vec::new(),
            in_flight: None,
            wanted: Vec::new(),
            head_rows: D::Buffer::default(),
            logits: Vec::new(),
            outcomes: Vec::new(),
        }
    }
}

impl<D: Device> Lane<D> {
    /// Begins a step with the rows of these sequences.
    pub(super) fn begin(&mut self, device: &D, ropes: &[Rope], sequences: &[SeqInput<'_>]) {
        self.in_flight = None;
        self.outcomes.clear();
        self.outcomes.resize(sequences.len(), Ok(0..0));
        self.tokens.clear();
        self.positions.clear();
        for sequence in sequences {
            self.tokens.extend_from_slice(sequence.tokens);
            self.positions.extend((sequence.start..).take(sequence.tokens.len()));
        }
        self.rows = self.positions.len();
        self.turn(device, ropes);
    }

    /// Recomputes the angles from the positions.
    fn turn(&mut self, device: &D, ropes: &[Rope]) {
        self.angles.resize_with(ropes.len(), D::Angles::default);
        for (rope, angles) in ropes.iter().zip(&mut self.angles) {
            device.angles(rope, &self.positions, angles);
        }
    }

    /// Records the rows whose logits are wanted, and the place of each sequence's logits.
    pub(super) fn want(&mut self, sequences: &[SeqInput<'_>]) {
        self.wanted.clear();
        let (mut first, mut count) = (0, 0);
        for (sequence, outcome) in sequences.iter().zip(&mut self.outcomes) {
            let Ok(range) = outcome else { continue };
            let end = first + sequence.tokens.len();
            let rows = match sequence.logits {
                WantLogits::None => end..end,
                WantLogits::Last => end - 1..end,
                WantLogits::All => first..end,
            };
            first = end;
            *range = count..count + rows.len();
            count = range.end;
            if !rows.is_empty() {
                self.wanted.push(rows);
            }
        }
    }

    /// Removes sequences from the step: those for whose rows `why` returns an error. Only buffers that the rest of the
    /// layer reads are compacted.
    pub(super) fn withdraw(
        &mut self,
        device: &D,
        ropes: &[Rope],
        hidden: usize,
        run: &mut Run<'_>,
        mut why: impl FnMut(Range<usize>) -> Option<StepError>,
    ) {
        let before = self.rows;
        let mut kept: Vec<Range<usize>> = Vec::new();
        let mut end = 0;
        for (sequence, outcome) in run.sequences.iter().zip(&mut self.outcomes) {
            if outcome.is_ok() {
                let rows = end..end + sequence.tokens.len();
                end = rows.end;
                match why(rows.clone()) {
                    Some(error) => *outcome = Err(error),
                    None => kept.push(rows),
                }
            }
        }
        self.rows = kept.iter().map(ExactSizeIterator::len).sum();
        let k = self.choice.experts.len() / before;
        keep(&kept, before, k, &mut self.choice.experts);
        keep(&kept, before, k, &mut self.choice.weights);
        device.keep(&kept, hidden, &mut self.residual);
        device.keep(&kept, hidden, &mut self.normed);
        keep(&kept, before, 1, &mut self.positions);
        keep(&kept, before, 1, &mut run.slots);
        self.turn(device, ropes);
    }

    /// Rows lost by a refused micro-batch: all, or where an expert has no owner, only those that chose it.
    pub(super) fn refused(&self, error: DispatchError) -> Loss {
        let k = self.choice.experts.len() / self.rows;
        let rows: Vec<u32> = match &error {
            DispatchError::NoOwner { expert, .. } => (0..)
                .zip(self.choice.experts.chunks(k))
                .filter(|(_, ids)| ids.contains(expert))
                .map(|(row, _)| row)
                .collect(),
            _ => Vec::new(),
        };
        if rows.is_empty() { self.all_lost(error) } else { Loss { rows, error } }
    }

    pub(super) fn all_lost(&self, error: DispatchError) -> Loss {
        // A step has fewer than 2^32 rows.
        Loss { rows: (0..self.rows as u32 * self.copies.max(1) as u32).collect(), error }
    }

    /// Fails every sequence of the lane: the device failed.
    pub(super) fn fail(&mut self, error: &DeviceError) {
        for outcome in self.outcomes.iter_mut().filter(|outcome| outcome.is_ok()) {
            *outcome = Err(StepError::Device(error.clone()));
        }
        self.rows = 0;
    }
}

impl<D: Device> Weighted<D> {
    /// Fills in the rows and returns the choice of each.
    pub(super) fn fill(
        &mut self,
        device: &D,
        choices: &Choices,
        x: &D::Buffer,
    ) -> Result<Choices, InvalidChoices> {
        device.weigh(x, choices.weights(), choices.k(), &mut self.rows);
        let (mut ids, mut ones) = (std::mem::take(&mut self.ids), std::mem::take(&mut self.ones));
        ids.clear();
        ids.extend_from_slice(choices.experts());
        ones.clear();
        ones.resize(ids.len(), 1.0);
        Choices::new(1, ids, ones)
    }

    /// Takes back the memory of `choices`.
    pub(super) fn reuse(&mut self, choices: Choices) {
        (self.ids, self.ones) = choices.into_parts();
    }
}

/// Keeps ranges of rows of `width` values in every block of `rows` rows, and drops the others.
pub(super) fn keep<T: Copy>(kept: &[Range<usize>], rows: usize, width: usize, values: &mut Vec<T>) {
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

/// Slots of a lane's rows, one group of layers after the other, in reused memory.
pub(super) fn slots_of<'a>(
    sequences: &[SeqInput<'a>],
    groups: usize,
    memory: Vec<KvSlot<'static>>,
) -> Vec<KvSlot<'a>> {
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

/// The memory of a list without its borrows: the standard library reuses it by collecting in place.
pub(super) fn emptied(mut slots: Vec<KvSlot<'_>>) -> Vec<KvSlot<'static>> {
    slots.clear();
    slots.into_iter().map(|slot| KvSlot { blocks: &[], ..slot }).collect()
}
