//! One grouped call of the experts for one or several shards of a layer, and what each shard gets of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use muster_engine::dispatch::Rows;
use muster_kernels::{Cpu, Outputs, Precision, combine_to_wire, to_wire};
use muster_proto::frame::{FrameError, RowBuffer, byte_len};
use muster_proto::reply::OutputRows;
use muster_proto::shard::{ShardRules, ShardView};
use muster_types::{DType, ExpertId, ExpertKey, Term, terms_by_row};
use muster_types::{Fault, FaultKind};

use crate::compute::{ComputeError, ExpertCompute};

/// What a shard gets, and how long the experts took.
pub(crate) type Outcome = (Result<OutputRows, Fault>, Duration);

/// Buffers of a call, kept from one to the next.
#[derive(Default)]
pub(crate) struct Call {
    input: RowBuffer,
    output: Vec<f32>,
}

/// Where the outputs of one shard are: for each of its experts, rows of the call's output.
type Places = Vec<Range<usize>>;

impl Call {
    pub(crate) fn clear(&mut self) {
        self.input.clear();
    }

    /// Takes in a shard's rows, behind those of the shards before it.
    pub(crate) fn admit(
        &mut self,
        view: &ShardView,
        waited: Duration,
        rules: &ShardRules,
    ) -> Result<(), Fault> {
        if waited >= view.deadline() {
            let reason = format!("waited {waited:?}; the deadline was {:?}", view.deadline());
            return Err(Fault::new(FaultKind::Deadline, reason));
        }
        let read = self.input.append(view.data(), rules.wire, view.rows(), rules.hidden as usize);
        read.map_err(|error| input_fault(&error))
    }

    /// Computes the shards that were admitted; all are of one layer. When the experts fail for several at once, each is
    /// tried alone, so that a shard fails only for reasons of its own.
    pub(crate) fn run(
        &mut self,
        views: &[&ShardView],
        cpu: &Cpu,
        rules: &ShardRules,
        experts: &mut dyn ExpertCompute,
    ) -> Vec<Outcome> {
        let offsets = views.iter().scan(0, |next, view| {
            let start = *next;
            *next += view.rows();
            Some(start)
        });
        let members: Vec<(&ShardView, usize)> = views.iter().copied().zip(offsets).collect();
        let (outcome, compute) = self.forward(&members, rules, experts);
        match outcome {
            Ok(places) => {
                let answers = members.iter().zip(places);
                answers.map(|((view, _), places)| (self.answer(view, &places, cpu, rules), compute)).collect()
            }
            Err(fault) if members.len() == 1 => vec![(Err(fault), compute)],
            Err(_) => {
                let alone = |member| {
                    let (outcome, compute) = self.forward(&[member], rules, experts);
                    let places = outcome.map(|mut places| places.pop().unwrap_or_default());
                    (places.and_then(|places| self.answer(member.0, &places, cpu, rules)), compute)
                };
                members.iter().copied().map(alone).collect()
            }
        }
    }

    /// Runs the experts; says where each shard's outputs are.
    fn forward(
        &mut self,
        members: &[(&ShardView, usize)],
        rules: &ShardRules,
        experts: &mut dyn ExpertCompute,
    ) -> (Result<Vec<Places>, Fault>, Duration) {
        let Some((first, _)) = members.first() else { return (Ok(Vec::new()), Duration::ZERO) };
        let hidden = rules.hidden as usize;
        let (first_row, count, merged, places) = match members {
            [(view, offset)] => (*offset, view.rows(), Vec::new(), vec![one_range(view)]),
            _ => {
                let (merged, places) = merge(members);
                (0, members.iter().map(|(view, _)| view.rows()).sum(), merged, places)
            }
        };
        let part = first_row * hidden..(first_row + count) * hidden;
        let rows = match rules.wire {
            DType::F32 => Rows::of_f32(&self.input.f32()[part], hidden),
            DType::Bf16 => Rows::of_bf16(&self.input.bf16()[part], hidden),
        };
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => return (Err(Fault::new(FaultKind::Internal, error.to_string())), Duration::ZERO),
        };
        let groups: Vec<(ExpertId, &[u32])> = match merged.as_slice() {
            [] => first.groups(),
            merged => merged.iter().map(|(expert, rows)| (*expert, rows.as_slice())).collect(),
        };
        let outputs: usize = members.iter().map(|(view, _)| view.outputs()).sum();
        let started = Instant::now();
        let computed = experts.forward(first.layer(), &groups, rows, &mut self.output);
        let compute = started.elapsed();
        let want = outputs * hidden;
        let outcome = match computed {
            Err(error) => Err(compute_fault(&error)),
            Ok(()) if self.output.len() != want => {
                let reason = format!("experts gave {} values instead of {want}", self.output.len());
                Err(Fault::new(FaultKind::Internal, reason))
            }
            Ok(()) => Ok(places),
        };
        (outcome, compute)
    }

    /// A shard's reply: its outputs, or the sums of their weighted rows. Those that are not finite are marked and zero.
    fn answer(
        &self,
        view: &ShardView,
        places: &[Range<usize>],
        cpu: &Cpu,
        rules: &ShardRules,
    ) -> Result<OutputRows, Fault> {
        let (hidden, wire) = (rules.hidden as usize, precision(rules.wire));
        let rows = view.answers();
        let bytes = byte_len(rows as usize, hidden, rules.wire)
            .map_err(|error| Fault::new(FaultKind::Internal, error.to_string()))?;
        let mut data = vec![0; bytes];
        let mut not_finite = Vec::new();
        // One row, or all: where something is not finite, every row is tried alone.
        let mut mark = |row: u32, is_finite: bool, data: &mut [u8]| {
            if !is_finite {
                data.fill(0);
                not_finite.push(row);
            }
        };
        match view.weights() {
            None => {
                let write = |places: &[Range<usize>], data: &mut [u8]| {
                    to_wire(cpu, hidden, &self.output, places, wire, data).is_ok()
                };
                if !write(&joined(places), &mut data) {
                    let alone = places.iter().cloned().flatten();
                    for ((row, place), data) in
                        (0..).zip(alone).zip(data.chunks_exact_mut(bytes / rows as usize))
                    {
                        mark(row, write(std::slice::from_ref(&(place..place + 1)), data), data);
                    }
                }
            }
            Some(weights) => {
                let (starts, terms) = terms(view, places, weights);
                let outputs = [Outputs::Computed(&self.output, wire)];
                let write = |starts: &[u32], terms: &[Term], data: &mut [u8]| {
                    combine_to_wire(cpu, hidden, &outputs, starts, terms, wire, data).is_ok()
                };
                if !write(&starts, &terms, &mut data) {
                    let rows_of = data.chunks_exact_mut(bytes / rows as usize);
                    for ((row, bounds), data) in (0..).zip(starts.windows(2)).zip(rows_of) {
                        let terms = &terms[bounds[0] as usize..bounds[1] as usize];
                        mark(row, write(&[0, bounds[1] - bounds[0]], terms, data), data);
                    }
                }
            }
        }
        Ok(OutputRows { rows, data: data.into(), not_finite })
    }
}

/// What a router gets that knows of no marks: its whole shard is lost.
pub(crate) fn unmarked(view: &ShardView, rows: OutputRows) -> Result<OutputRows, Fault> {
    let Some(&first) = rows.not_finite.first() else { return Ok(rows) };
    let mut end = 0;
    let of = |(expert, indices): (ExpertId, &[u32])| {
        end += indices.len();
        ((first as usize) < end).then_some(expert)
    };
    match view.groups().into_iter().find_map(of) {
        // Where the worker adds up, an output is not one expert's.
        Some(expert) if view.weights().is_none() => {
            let key = ExpertKey { layer: view.layer(), expert };
            Err(Fault::of_expert(FaultKind::NonFinite, expert.get(), format!("{key}: output is not finite")))
        }
        _ => Err(Fault::new(FaultKind::NonFinite, format!("output row {first} is not finite"))),
    }
}

/// All outputs of a shard that is computed alone.
fn one_range(view: &ShardView) -> Places {
    let mut start = 0;
    let place = |(_, rows): (ExpertId, &[u32])| {
        let place = start..start + rows.len();
        start = place.end;
        place
    };
    view.groups().into_iter().map(place).collect()
}

/// The same rows in as few ranges as there can be.
fn joined(places: &[Range<usize>]) -> Places {
    let mut joined: Places = Vec::with_capacity(places.len());
    for place in places {
        match joined.last_mut() {
            Some(last) if last.end == place.start => last.end = place.end,
            _ => joined.push(place.clone()),
        }
    }
    joined
}

/// The experts of all shards in ascending order, each with the rows of all shards, and every shard's places.
fn merge(members: &[(&ShardView, usize)]) -> (Vec<(ExpertId, Vec<u32>)>, Vec<Places>) {
    let mut groups: BTreeMap<ExpertId, Vec<u32>> = BTreeMap::new();
    // Of each shard and expert: where its rows begin in the expert's group, and how many they are.
    let mut parts: Vec<Vec<(ExpertId, usize, usize)>> = Vec::with_capacity(members.len());
    for (view, offset) in members {
        let mut mine = Vec::new();
        for (expert, rows) in view.groups() {
            let group = groups.entry(expert).or_default();
            mine.push((expert, group.len(), rows.len()));
            // Merged rows are few.
            group.extend(rows.iter().map(|row| row + *offset as u32));
        }
        parts.push(mine);
    }
    let mut starts = BTreeMap::new();
    let mut next = 0;
    for (&expert, rows) in &groups {
        starts.insert(expert, next);
        next += rows.len();
    }
    let place = |(expert, at, len): (ExpertId, usize, usize)| {
        let start = starts.get(&expert).copied().unwrap_or(0) + at;
        start..start + len
    };
    let places = parts.into_iter().map(|mine| mine.into_iter().map(place).collect()).collect();
    (groups.into_iter().collect(), places)
}

/// The terms of each row's sum, in ascending expert id.
fn terms(view: &ShardView, places: &[Range<usize>], weights: &[f32]) -> (Vec<u32>, Vec<Term>) {
    let groups = view.groups();
    let outputs = groups.iter().zip(places).flat_map(|((_, rows), place)| rows.iter().zip(place.clone()));
    let term = |((&row, output), &weight): ((&u32, usize), &f32)| {
        (row, Term { source: 0, row: output as u32, weight })
    };
    terms_by_row(view.rows(), outputs.zip(weights).map(term))
}

const fn precision(wire: DType) -> Precision {
    match wire {
        DType::F32 => Precision::F32,
        DType::Bf16 => Precision::Bf16,
    }
}

fn input_fault(error: &FrameError) -> Fault {
    let kind = match error {
        FrameError::NonFinite { .. } => FaultKind::NonFinite,
        _ => FaultKind::BadRequest,
    };
    Fault::new(kind, format!("field data: {error}"))
}

fn compute_fault(error: &ComputeError) -> Fault {
    let text = error.to_string();
    match error {
        ComputeError::NotHeld(key) => Fault::of_expert(FaultKind::NotHeld, key.expert.get(), text),
        ComputeError::Internal(_) => Fault::new(FaultKind::Internal, text),
    }
}
