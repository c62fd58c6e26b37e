//! Experts of this process as a transport of delivery: the reference for all other transports, to the bit.

use std::sync::Arc;
use std::time::Instant;

use muster_engine::batcher::Rank;
use muster_engine::compute::{ComputeError, ExpertCompute, Segment, SegmentAnswer};
use muster_engine::delivery::{
    Arrived, Closed, Contract, Delivery, Event, Fleet, Hop, Outgoing, Outputs, Route, Sums, Transport,
    Unsent, Unsound, Wanted,
};
use muster_engine::dispatch::{DispatchError, Place, Rows, RowsMut};
use muster_kernels::{Cpu, NotFinite, combine};
use muster_placement::{Binding, Shape};
use muster_types::{Combine, DType, Epoch, Fault, Numerics, Term, WorkerId};

use crate::experts::{CpuExperts, CpuStore, ExpertSet, ExpertStore as _};

/// Delivery to the experts of this process.
pub type Local = Delivery<InProcess, HostSums>;

/// The one worker.
const HOP: Hop = Hop { link: 0, session: 1 };
/// Its name in errors.
const NAME: &str = "local";
/// Micro-batch lanes of a trunk.
const LANES: usize = 2;

/// Delivery to these experts, computed on the caller's thread when rows are sent.
///
/// # Errors
/// When they exceed the limits of a placement.
pub fn local(cpu: Arc<Cpu>, experts: &ExpertSet) -> Result<Local, DispatchError> {
    let keys = experts.keys();
    let layers = keys.last().map_or(0, |key| key.layer.index() + 1);
    let mut counts = vec![0; layers];
    for key in &keys {
        counts[key.layer.index()] = key.expert.get() + 1;
    }
    let (hidden, wire) = (experts.hidden(), experts.compute().wire_dtype());
    let store = Arc::new(CpuStore::new(experts.clone(), u64::MAX));
    let class = store.numerics();
    let route = Route { hop: HOP, epoch: Epoch::new(1), rank: Rank::Good, class };
    let name = WorkerId::new(NAME).map_err(|error| DispatchError::Invalid(error.to_string()))?;
    let workers = [(&name, &keys[..], route)];
    let shape = Shape::new(counts.clone());
    let binding = Binding::new(Numerics::Exact, &shape).after([(class, &keys[..])].into_iter());
    let fleet = Fleet::new(Epoch::new(1), &shape, &workers, Arc::new(binding))
        .map_err(|error| DispatchError::Invalid(error.to_string()))?;
    let transport =
        InProcess { experts: Box::new(CpuExperts::new(Arc::clone(&cpu), store)), hidden, told: Vec::new() };
    let contract = Contract {
        experts: counts,
        hidden,
        wire,
        top_k: usize::MAX,
        max_rows: usize::MAX,
        lanes: LANES,
        combine: Combine::Exact,
    };
    Ok(Delivery::new(contract, Arc::new(fleet), transport, HostSums { cpu, hidden, wire }, ()))
}

/// See the module.
pub struct InProcess {
    experts: Box<dyn ExpertCompute>,
    hidden: usize,
    told: Vec<Event<HostRows>>,
}

/// Hidden rows in host memory.
pub enum HostLoad {
    /// Single precision.
    F32(Vec<f32>),
    /// Bit patterns.
    Bf16(Vec<u16>),
}

impl HostLoad {
    fn rows(&self, hidden: usize) -> Result<Rows<'_>, ComputeError> {
        let rows = match self {
            Self::F32(values) => Rows::of_f32(values, hidden),
            Self::Bf16(bits) => Rows::of_bf16(bits, hidden),
        };
        rows.map_err(|error| ComputeError::Internal(error.to_string()))
    }
}

/// The picked rows, one behind the other.
fn pick<T: Copy>(rows: &[T], hidden: usize, picked: &[u32]) -> Vec<T> {
    picked.iter().flat_map(|&row| &rows[row as usize * hidden..][..hidden]).copied().collect()
}

impl Transport for InProcess {
    type Load = HostLoad;
    type Outputs = HostRows;

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn gather(&self, rows: Rows<'_>, picked: &[u32]) -> Result<HostLoad, DispatchError> {
        match (rows.f32(), rows.bf16()) {
            (Some(rows), _) => Ok(HostLoad::F32(pick(rows, self.hidden, picked))),
            (_, Some(rows)) => Ok(HostLoad::Bf16(pick(rows, self.hidden, picked))),
            (None, None) => Err(DispatchError::misplaced("rows", rows.place(), Place::Host)),
        }
    }

    fn pick(&self, load: &HostLoad, picked: &[u32]) -> HostLoad {
        match load {
            HostLoad::F32(rows) => HostLoad::F32(pick(rows, self.hidden, picked)),
            HostLoad::Bf16(rows) => HostLoad::Bf16(pick(rows, self.hidden, picked)),
        }
    }

    fn send(&mut self, _: Hop, _: usize, shard: &Outgoing<'_, HostLoad>) -> Result<(), Unsent> {
        let (began, plan) = (Instant::now(), shard.plan);
        let ends = plan.counts.iter().scan(0, |end, &count| {
            let start = *end;
            *end += count as usize;
            Some(start..*end)
        });
        let groups = plan.experts.iter().zip(ends).map(|(&expert, range)| (expert, &plan.indices[range]));
        let segment = Segment { first: 0, rows: plan.rows.len(), groups: groups.collect(), weights: None };
        let answer = shard.load.rows(self.hidden);
        let answer =
            answer.and_then(|rows| self.experts.answer(shard.layer, rows, std::slice::from_ref(&segment)));
        let missing = || ComputeError::Internal("they gave no answer".into());
        let answer = answer.and_then(|mut answers| answers.pop().ok_or_else(missing));
        let at = Instant::now();
        let outcome = answer
            .map(|answer| Arrived {
                outputs: HostRows { rows: segment.answers(), answer },
                compute: at.saturating_duration_since(began),
                at,
            })
            .map_err(|error| Fault::from(&error));
        self.told.push(Event::Answer { id: shard.id, outcome });
        Ok(())
    }

    fn flush(&mut self) {}

    fn poll(&mut self, events: &mut Vec<Event<HostRows>>) {
        events.append(&mut self.told);
    }

    fn wait(&mut self, _: &Wanted, events: &mut Vec<Event<HostRows>>) -> Result<(), Closed> {
        // Every sent shard is answered already, so nothing more can come.
        if self.told.is_empty() {
            return Err(Closed);
        }
        self.poll(events);
        Ok(())
    }

    fn version(&self) -> u64 {
        1
    }

    fn doubt(&mut self, _: Hop, _: usize, _: bool) {}

    fn ban(&mut self, _: Hop, _: &str) {}

    fn close(&mut self) {
        self.told.clear();
    }
}

/// Output rows in host memory.
pub struct HostRows {
    rows: usize,
    answer: SegmentAnswer,
}

impl HostRows {
    fn outputs(&self, wire: DType) -> muster_kernels::Outputs<'_> {
        match wire {
            DType::F32 => muster_kernels::Outputs::WireF32(self.answer.data.as_chunks().0),
            DType::Bf16 => muster_kernels::Outputs::WireBf16(self.answer.data.as_chunks().0),
        }
    }
}

impl Outputs for HostRows {
    fn check(&self, rows: usize) -> Result<(), String> {
        if self.rows == rows { Ok(()) } else { Err(format!("{} rows instead of {rows}", self.rows)) }
    }

    fn marks(&self) -> &[u32] {
        &self.answer.not_finite
    }
}

/// Adds up output rows in host memory.
pub struct HostSums {
    cpu: Arc<Cpu>,
    hidden: usize,
    wire: DType,
}

impl Sums<HostRows> for HostSums {
    fn place(&self) -> Place {
        Place::Host
    }

    fn sum(
        &mut self,
        sources: &[&HostRows],
        starts: &[u32],
        terms: &[Term],
        out: &mut RowsMut<'_>,
    ) -> Result<(), Unsound> {
        // By `place`, sums are in host memory.
        let Some(out) = out.f32_mut() else { return Ok(()) };
        let sources: Vec<_> = sources.iter().map(|source| source.outputs(self.wire)).collect();
        combine(&self.cpu, self.hidden, &sources, starts, terms, out).map_err(|error| match error {
            NotFinite::Output { source, row } => Unsound::Source { source, row },
            NotFinite::Sums(rows) => Unsound::Sums(rows),
        })
    }
}
