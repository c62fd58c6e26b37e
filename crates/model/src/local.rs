//! Dispatch inside one process: the reference every other transport must equal to the bit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use muster_engine::dispatch::{
    Choices, DispatchError, ExpertDispatch, LayerBatch, Loss, Place, RowsMut, Ticket,
};
use muster_kernels::{Cpu, NotFinite, Outputs, combine};
use muster_types::{ExpertId, ExpertKey, LayerId, Term};

use crate::experts::{ExpertError, ExpertScratch, ExpertSet, precision};

/// Computes experts on the caller's thread, at `submit`.
pub struct Local {
    cpu: Arc<Cpu>,
    experts: Arc<ExpertSet>,
    scratch: ExpertScratch,
    done: BTreeMap<Ticket, Done>,
    spare: Vec<Vec<f32>>,
    next: u64,
    closed: bool,
}

/// A micro-batch whose experts have run.
struct Done {
    layer: LayerId,
    rows: usize,
    outputs: Vec<f32>,
    /// Terms of each row's sum.
    starts: Vec<u32>,
    terms: Vec<Term>,
    /// Whose the output rows are: an expert and the number of its first row, ascending.
    owners: Vec<(usize, ExpertId)>,
}

impl Local {
    /// Over these experts.
    #[must_use]
    pub fn new(cpu: Arc<Cpu>, experts: Arc<ExpertSet>) -> Self {
        Self {
            cpu,
            experts,
            scratch: ExpertScratch::default(),
            done: BTreeMap::new(),
            spare: Vec::new(),
            next: 1,
            closed: false,
        }
    }
}

impl ExpertDispatch for Local {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        if self.closed {
            return Err(DispatchError::Closed);
        }
        let choices = batch.choices;
        let hidden = self.experts.hidden();
        let rows = batch.rows;
        if rows.place() != Place::Host {
            return Err(DispatchError::misplaced("rows", rows.place(), Place::Host));
        }
        if (rows.count(), rows.hidden()) != (choices.rows(), hidden) {
            return Err(DispatchError::Invalid(format!(
                "{} rows of {} instead of {} of {hidden}",
                rows.count(),
                rows.hidden(),
                choices.rows()
            )));
        }
        let by_expert = by_expert(choices);
        let groups: Vec<(ExpertId, &[u32])> =
            by_expert.iter().map(|(id, rows)| (*id, rows.as_slice())).collect();
        let mut outputs = self.spare.pop().unwrap_or_default();
        self.experts
            .forward(&self.cpu, &mut self.scratch, batch.layer, &groups, rows, &mut outputs)
            .map_err(|error| refusal(&error))?;
        let owners = first_rows(&groups);
        let terms = terms(choices, &owners);
        let starts = (0..=choices.rows()).map(|row| (row * choices.k()) as u32).collect();
        let ticket = Ticket::new(self.next);
        self.next += 1;
        let (layer, rows) = (batch.layer, choices.rows());
        self.done.insert(ticket, Done { layer, rows, outputs, starts, terms, owners });
        Ok(ticket)
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
        let done = self
            .done
            .remove(&ticket)
            .ok_or_else(|| DispatchError::Invalid(format!("ticket {} is not in flight", ticket.get())))?;
        let place = out.place();
        let want = done.rows * self.experts.hidden();
        let outcome = match out.into_f32() {
            None => Err(DispatchError::misplaced("room", place, Place::Host)),
            Some(out) if out.len() != want => {
                Err(DispatchError::Invalid(format!("room for {} values of {want}", out.len())))
            }
            Some(_) if Instant::now() >= deadline => {
                let error = DispatchError::Deadline { layer: done.layer };
                Ok(vec![Loss { rows: (0..).take(done.rows).collect(), error }])
            }
            Some(out) => Ok(self.sum(&done, out)),
        };
        self.spare.push(done.outputs);
        outcome
    }

    fn cancel(&mut self, ticket: Ticket) {
        if let Some(done) = self.done.remove(&ticket) {
            self.spare.push(done.outputs);
        }
    }

    fn close(&mut self) {
        self.closed = true;
        self.done.clear();
    }
}

impl Local {
    /// Adds up a micro-batch. Where a row has no sum, every row is tried alone.
    fn sum(&self, done: &Done, out: &mut [f32]) -> Vec<Loss> {
        let hidden = self.experts.hidden();
        let outputs = [Outputs::Computed(&done.outputs, precision(self.experts.compute()))];
        if combine(&self.cpu, hidden, &outputs, &done.starts, &done.terms, out).is_ok() {
            return Vec::new();
        }
        let mut lost = Vec::new();
        for ((row, bounds), out) in (0..).zip(done.starts.windows(2)).zip(out.chunks_exact_mut(hidden)) {
            let terms = &done.terms[bounds[0] as usize..bounds[1] as usize];
            if let Err(bad) = combine(&self.cpu, hidden, &outputs, &[0, bounds[1] - bounds[0]], terms, out) {
                lost.push(Loss { rows: vec![row], error: done.error(&bad) });
            }
        }
        lost
    }
}

impl Done {
    fn error(&self, bad: &NotFinite) -> DispatchError {
        let layer = self.layer;
        match bad {
            NotFinite::Output { row, .. } => match self.owners.iter().rev().find(|(first, _)| first <= row) {
                Some(&(_, expert)) => DispatchError::NonFinite { layer, expert },
                None => DispatchError::Invalid("an output without an expert".into()),
            },
            NotFinite::Sums(_) => DispatchError::NonFiniteSum { layer },
        }
    }
}

/// Rows of each expert, ascending both.
fn by_expert(choices: &Choices) -> BTreeMap<ExpertId, Vec<u32>> {
    let mut groups: BTreeMap<ExpertId, Vec<u32>> = BTreeMap::new();
    for (row, ids) in (0u32..).zip(choices.experts().chunks_exact(choices.k())) {
        for &id in ids {
            groups.entry(id).or_default().push(row);
        }
    }
    groups
}

/// The number of each expert's first output row.
fn first_rows(groups: &[(ExpertId, &[u32])]) -> Vec<(usize, ExpertId)> {
    let mut start = 0;
    let first = |&(id, rows): &(ExpertId, &[u32])| {
        let first = start;
        start += rows.len();
        (first, id)
    };
    groups.iter().map(first).collect()
}

/// What every (row, choice) pair adds to its row's sum.
fn terms(choices: &Choices, owners: &[(usize, ExpertId)]) -> Vec<Term> {
    let mut next: BTreeMap<ExpertId, usize> = owners.iter().map(|&(first, id)| (id, first)).collect();
    let pairs = choices.experts().iter().zip(choices.weights());
    pairs
        .map(|(id, &weight)| {
            let row = next.get_mut(id).map_or(0, |at| {
                *at += 1;
                *at - 1
            });
            // Pairs of a step are counted in 32 bits.
            Term { source: 0, row: row as u32, weight }
        })
        .collect()
}

fn refusal(error: &ExpertError) -> DispatchError {
    match *error {
        ExpertError::NotHeld(ExpertKey { layer, expert }) => DispatchError::NoOwner { layer, expert },
        ExpertError::Shape(ref reason) => DispatchError::Invalid(reason.clone()),
    }
}
