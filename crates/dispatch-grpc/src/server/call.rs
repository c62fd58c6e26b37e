//! One grouped call of the experts for one or several shards of a layer.

use std::time::{Duration, Instant};

use muster_engine::compute::{ExpertCompute, Segment, SegmentAnswer};
use muster_engine::dispatch::Rows;
use muster_proto::frame::{FrameError, RowBuffer, byte_len};
use muster_proto::reply::OutputRows;
use muster_proto::shard::{ShardRules, ShardView};
use muster_types::{DType, ExpertId, ExpertKey, Fault, FaultKind, LayerId};

/// A shard's outputs or fault, and the experts' time.
pub(crate) type Outcome = (Result<OutputRows, Fault>, Duration);

/// The rows of a call, in a buffer that calls reuse.
#[derive(Default)]
pub(crate) struct Call {
    input: RowBuffer,
}

impl Call {
    pub(crate) fn clear(&mut self) {
        self.input.clear();
    }

    /// Appends a shard's rows.
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
    pub(crate) fn run<'v>(
        &self,
        views: &[&'v ShardView],
        rules: &ShardRules,
        experts: &mut dyn ExpertCompute,
    ) -> Vec<Outcome> {
        let Some(layer) = views.first().map(|view| view.layer()) else { return Vec::new() };
        let firsts = views.iter().scan(0, |next, view| {
            let first = *next;
            *next += view.rows();
            Some(first)
        });
        let segment = |(view, first): (&&'v ShardView, usize)| Segment {
            first,
            rows: view.rows(),
            groups: view.groups(),
            weights: view.weights(),
        };
        let segments: Vec<Segment<'_>> = views.iter().zip(firsts).map(segment).collect();
        match self.answer(layer, &segments, rules, experts) {
            (Ok(answers), compute) => answers.into_iter().map(|answer| (Ok(answer), compute)).collect(),
            (Err(fault), compute) if segments.len() == 1 => vec![(Err(fault), compute)],
            (Err(_), _) => {
                let alone = |segment| {
                    let (outcome, compute) =
                        self.answer(layer, std::slice::from_ref(segment), rules, experts);
                    (outcome.map(|mut answers| answers.pop().unwrap_or_default()), compute)
                };
                segments.iter().map(alone).collect()
            }
        }
    }

    /// The experts' answers as replies, and their time.
    fn answer(
        &self,
        layer: LayerId,
        segments: &[Segment<'_>],
        rules: &ShardRules,
        experts: &mut dyn ExpertCompute,
    ) -> (Result<Vec<OutputRows>, Fault>, Duration) {
        let hidden = rules.hidden as usize;
        let rows = match rules.wire {
            DType::F32 => Rows::of_f32(self.input.f32(), hidden),
            DType::Bf16 => Rows::of_bf16(self.input.bf16(), hidden),
        };
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => return (Err(internal(error.to_string())), Duration::ZERO),
        };
        let started = Instant::now();
        let answers = experts.answer(layer, rows, segments);
        let compute = started.elapsed();
        let replies = answers.map_err(|error| Fault::from(&error)).and_then(|answers| {
            if answers.len() != segments.len() {
                let reason = format!("experts gave {} answers instead of {}", answers.len(), segments.len());
                return Err(internal(reason));
            }
            let answered = segments.iter().zip(answers);
            answered.map(|(segment, answer)| reply(segment, answer, rules)).collect()
        });
        (replies, compute)
    }
}

/// A segment's answer as a reply, if it has the right size.
fn reply(segment: &Segment<'_>, answer: SegmentAnswer, rules: &ShardRules) -> Result<OutputRows, Fault> {
    let SegmentAnswer { data, not_finite } = answer;
    let rows = segment.answers();
    let want =
        byte_len(rows, rules.hidden as usize, rules.wire).map_err(|error| internal(error.to_string()))?;
    if data.len() != want {
        return Err(internal(format!("experts gave {} bytes instead of {want}", data.len())));
    }
    // Outputs are at most as many as a message has bytes.
    Ok(OutputRows { rows: rows as u32, data: data.into(), not_finite })
}

/// Reply to a router whose version has no marks: a mark fails its whole shard.
pub(crate) fn unmarked(view: &ShardView, rows: OutputRows) -> Result<OutputRows, Fault> {
    let Some(&first) = rows.not_finite.first() else { return Ok(rows) };
    let mut end = 0;
    let of = |(expert, indices): (ExpertId, &[u32])| {
        end += indices.len();
        ((first as usize) < end).then_some(expert)
    };
    match view.groups().into_iter().find_map(of) {
        // A row that the worker combined is not one expert's.
        Some(expert) if view.weights().is_none() => {
            let key = ExpertKey { layer: view.layer(), expert };
            Err(Fault::of_expert(FaultKind::NonFinite, expert.get(), format!("{key}: output is not finite")))
        }
        _ => Err(Fault::new(FaultKind::NonFinite, format!("output row {first} is not finite"))),
    }
}

fn input_fault(error: &FrameError) -> Fault {
    let kind = match error {
        FrameError::NonFinite { .. } => FaultKind::NonFinite,
        _ => FaultKind::BadRequest,
    };
    Fault::new(kind, format!("field data: {error}"))
}

fn internal(reason: String) -> Fault {
    Fault::new(FaultKind::Internal, reason)
}
