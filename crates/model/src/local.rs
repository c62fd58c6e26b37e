//! Dispatch inside one process: the reference every other transport must equal to the bit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use muster_engine::combine::combine;
use muster_engine::dispatch::{DispatchError, ExpertDispatch, LayerBatch, RowsMut, Ticket};
use muster_kernels::Cpu;
use muster_types::{ExpertId, ExpertKey, LayerId};

use crate::experts::{ExpertError, ExpertScratch, ExpertSet};

/// Computes experts on the caller's thread, at `submit`.
pub struct Local {
    cpu: Arc<Cpu>,
    experts: Arc<ExpertSet>,
    scratch: ExpertScratch,
    done: BTreeMap<Ticket, (LayerId, Vec<f32>)>,
    spare: Vec<Vec<f32>>,
    next: u64,
    closed: bool,
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
        if batch.rows.len() != choices.rows() * hidden {
            return Err(DispatchError::Invalid(format!(
                "{} values for {} rows of {hidden}",
                batch.rows.len(),
                choices.rows()
            )));
        }
        let (groups, positions) = by_expert(choices.experts(), choices.k());
        let groups: Vec<(ExpertId, &[u32])> =
            groups.iter().map(|(id, rows)| (*id, rows.as_slice())).collect();
        let mut outputs = self.spare.pop().unwrap_or_default();
        self.experts
            .forward(&self.cpu, &mut self.scratch, batch.layer, &groups, batch.rows, &mut outputs)
            .map_err(|error| refusal(&error))?;
        let mut combined = self.spare.pop().unwrap_or_default();
        combined.resize(choices.rows() * hidden, 0.0);
        combine(choices, hidden, |slot| &outputs[positions[slot] * hidden..][..hidden], &mut combined);
        self.spare.push(outputs);
        let ticket = Ticket::new(self.next);
        self.next += 1;
        self.done.insert(ticket, (batch.layer, combined));
        Ok(ticket)
    }

    fn collect(&mut self, ticket: Ticket, deadline: Instant, out: RowsMut<'_>) -> Result<(), DispatchError> {
        if self.closed {
            return Err(DispatchError::Closed);
        }
        let (layer, combined) = self
            .done
            .remove(&ticket)
            .ok_or_else(|| DispatchError::Invalid(format!("ticket {} is not in flight", ticket.get())))?;
        let RowsMut::HostF32(out) = out;
        let outcome = if out.len() != combined.len() {
            Err(DispatchError::Invalid(format!("room for {} values of {}", out.len(), combined.len())))
        } else if Instant::now() >= deadline {
            Err(DispatchError::Deadline { layer })
        } else {
            out.copy_from_slice(&combined);
            Ok(())
        };
        self.spare.push(combined);
        outcome
    }

    fn cancel(&mut self, ticket: Ticket) {
        if let Some((_, rows)) = self.done.remove(&ticket) {
            self.spare.push(rows);
        }
    }

    fn close(&mut self) {
        self.closed = true;
        self.done.clear();
    }
}

/// Rows of each expert, and for every (row, choice) slot the number of its output row.
fn by_expert(experts: &[ExpertId], k: usize) -> (BTreeMap<ExpertId, Vec<u32>>, Vec<usize>) {
    let mut groups: BTreeMap<ExpertId, Vec<u32>> = BTreeMap::new();
    for (row, ids) in (0u32..).zip(experts.chunks_exact(k)) {
        for &id in ids {
            groups.entry(id).or_default().push(row);
        }
    }
    let mut next: BTreeMap<ExpertId, usize> = BTreeMap::new();
    let mut start = 0;
    for (&id, rows) in &groups {
        next.insert(id, start);
        start += rows.len();
    }
    let positions = experts
        .iter()
        .map(|id| {
            next.get_mut(id).map_or(0, |at| {
                *at += 1;
                *at - 1
            })
        })
        .collect();
    (groups, positions)
}

fn refusal(error: &ExpertError) -> DispatchError {
    match *error {
        ExpertError::NotHeld(ExpertKey { layer, expert }) => DispatchError::NoOwner { layer, expert },
        ExpertError::NonFinite(ExpertKey { layer, expert }) => DispatchError::NonFinite { layer, expert },
        ExpertError::Shape(ref reason) => DispatchError::Invalid(reason.clone()),
    }
}
