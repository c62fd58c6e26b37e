//! Answers of experts in host memory: one grouped FFN for all segments of a call, then each segment's bytes.

use std::ops::Range;
use std::sync::Arc;

use muster_engine::compute::{ComputeError, ExpertCompute, Merged, Segment, SegmentAnswer};
use muster_engine::dispatch::Rows;
use muster_kernels::{Cpu, Outputs, combine_to_wire, to_wire};
use muster_types::{DType, ExpertId, LayerId, Term, terms_by_row};

use super::{CpuStore, ExpertError, ExpertScratch};

/// Computes with the experts of a store, in buffers of one thread.
pub struct CpuExperts {
    cpu: Arc<Cpu>,
    store: Arc<CpuStore>,
    scratch: ExpertScratch,
    outputs: Vec<f32>,
}

impl CpuExperts {
    /// Computes with the experts that `store` holds at each call.
    #[must_use]
    pub fn new(cpu: Arc<Cpu>, store: Arc<CpuStore>) -> Self {
        Self { cpu, store, scratch: ExpertScratch::default(), outputs: Vec::new() }
    }
}

impl From<ExpertError> for ComputeError {
    fn from(error: ExpertError) -> Self {
        match error {
            ExpertError::NotHeld(key) => Self::NotHeld(key),
            ExpertError::Shape(reason) => Self::Internal(reason),
        }
    }
}

impl ExpertCompute for CpuExperts {
    fn answer(
        &mut self,
        layer: LayerId,
        rows: Rows<'_>,
        segments: &[Segment<'_>],
    ) -> Result<Vec<SegmentAnswer>, ComputeError> {
        let merged = Merged::of(segments);
        let groups: Vec<(ExpertId, &[u32])> =
            merged.groups.iter().map(|(expert, rows)| (*expert, &rows[..])).collect();
        let picked = self.store.pick(layer, groups.iter().map(|&(expert, _)| expert))?;
        picked.forward(&self.cpu, &mut self.scratch, &groups, rows, &mut self.outputs)?;
        drop(picked);
        let outputs =
            Computed { cpu: &self.cpu, hidden: rows.hidden(), dtype: rows.dtype(), outputs: &self.outputs };
        Ok(segments
            .iter()
            .zip(&merged.places)
            .map(|(segment, places)| outputs.answer(segment, places))
            .collect())
    }
}

/// Outputs of a grouped FFN, neither rounded nor checked.
struct Computed<'a> {
    cpu: &'a Cpu,
    hidden: usize,
    /// Dtype of the wire.
    dtype: DType,
    outputs: &'a [f32],
}

impl Computed<'_> {
    /// A segment's outputs, or the sums of its weighted rows. Rows that are not finite are marked and zeroed.
    fn answer(&self, segment: &Segment<'_>, places: &[Range<usize>]) -> SegmentAnswer {
        let Self { cpu, hidden, dtype, outputs } = *self;
        let (wire, width) = (dtype, hidden * dtype.size());
        let mut data = vec![0; segment.answers() * width];
        let mut not_finite = Vec::new();
        // Called for one row or for all: where one is not finite, every row is tried alone.
        let mut mark = |row: u32, is_finite: bool, data: &mut [u8]| {
            if !is_finite {
                data.fill(0);
                not_finite.push(row);
            }
        };
        match segment.weights {
            None => {
                let write = |places: &[Range<usize>], data: &mut [u8]| {
                    to_wire(cpu, hidden, outputs, places, wire, data).is_ok()
                };
                if !write(&joined(places), &mut data) {
                    let alone = places.iter().cloned().flatten();
                    for ((row, place), data) in (0..).zip(alone).zip(data.chunks_exact_mut(width)) {
                        mark(row, write(std::slice::from_ref(&(place..place + 1)), data), data);
                    }
                }
            }
            Some(weights) => {
                let (starts, terms) = terms(segment, places, weights);
                let outputs = [Outputs::Computed(outputs, wire)];
                let write = |starts: &[u32], terms: &[Term], data: &mut [u8]| {
                    combine_to_wire(cpu, hidden, &outputs, starts, terms, wire, data).is_ok()
                };
                if !write(&starts, &terms, &mut data) {
                    let rows = data.chunks_exact_mut(width);
                    for ((row, bounds), data) in (0..).zip(starts.windows(2)).zip(rows) {
                        let terms = &terms[bounds[0] as usize..bounds[1] as usize];
                        mark(row, write(&[0, bounds[1] - bounds[0]], terms, data), data);
                    }
                }
            }
        }
        SegmentAnswer { data, not_finite }
    }
}

/// Merges adjacent ranges.
fn joined(places: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::with_capacity(places.len());
    for place in places {
        match joined.last_mut() {
            Some(last) if last.end == place.start => last.end = place.end,
            _ => joined.push(place.clone()),
        }
    }
    joined
}

/// The terms of each row's sum, in ascending expert id.
fn terms(segment: &Segment<'_>, places: &[Range<usize>], weights: &[f32]) -> (Vec<u32>, Vec<Term>) {
    let outputs =
        segment.groups.iter().zip(places).flat_map(|((_, rows), place)| rows.iter().zip(place.clone()));
    // A call has fewer than 2^32 outputs.
    let term = |((&row, output), &weight): ((&u32, usize), &f32)| {
        (row, Term { source: 0, row: output as u32, weight })
    };
    terms_by_row(segment.rows, outputs.zip(weights).map(term))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::path::Path;

    use muster_checkpoint::{Checkpoint, Source};
    use muster_kernels::{from_bf16, to_bf16};
    use muster_types::{Compute, ExpertKey, WeightDType};

    use super::*;
    use crate::experts::{ExpertSet, ExpertStore};

    const ROWS: usize = 7;
    /// A row for which every expert's output is not finite.
    const BAD: usize = 4;

    /// Experts of the first layer, and rows of bf16 values.
    struct Case {
        cpu: Arc<Cpu>,
        store: Arc<CpuStore>,
        keys: Vec<ExpertKey>,
        hidden: usize,
        wire: DType,
        values: Vec<f32>,
        bits: Vec<u16>,
    }

    impl Case {
        fn new(compute: Compute) -> Self {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden/mixtral");
            let checkpoint = Checkpoint::open(&Source::Directory(path)).unwrap();
            let keys = ExpertSet::all_keys(&checkpoint)[..4].to_vec();
            let dtype = WeightDType::Native;
            let set = ExpertSet::load(&checkpoint, &keys, compute, dtype, &mut |_| {}).unwrap();
            let hidden = set.hidden();
            let mut values: Vec<f32> =
                (0..ROWS * hidden).map(|at| (at * 37 % 257) as f32 / 16.0 - 8.0).collect();
            values[BAD * hidden..][..hidden].fill(f32::from_bits(0x7f60_0000));
            let bits = values.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            let (cpu, store) =
                (Arc::new(Cpu::new(NonZeroUsize::MIN).unwrap()), Arc::new(CpuStore::new(set, u64::MAX)));
            Self { cpu, store, keys, hidden, wire: compute.wire_dtype(), values, bits }
        }

        fn rows(&self) -> Rows<'_> {
            match self.wire {
                DType::F32 => Rows::of_f32(&self.values, self.hidden).unwrap(),
                DType::Bf16 => Rows::of_bf16(&self.bits, self.hidden).unwrap(),
            }
        }

        fn answer(&self, segments: &[Segment<'_>]) -> Result<Vec<SegmentAnswer>, ComputeError> {
            let mut experts = CpuExperts::new(Arc::clone(&self.cpu), Arc::clone(&self.store));
            experts.answer(self.keys[0].layer, self.rows(), segments)
        }

        /// One expert's output for one row of the call, rounded.
        fn output(&self, expert: ExpertId, row: u32) -> Vec<f32> {
            let picked = self.store.pick(self.keys[0].layer, std::iter::once(expert)).unwrap();
            let (mut scratch, mut out) = (ExpertScratch::default(), Vec::new());
            picked.forward(&self.cpu, &mut scratch, &[(expert, &[row])], self.rows(), &mut out).unwrap();
            self.rounded(out)
        }

        fn rounded(&self, mut values: Vec<f32>) -> Vec<f32> {
            if self.wire == DType::Bf16 {
                let mut bits = vec![0; values.len()];
                to_bf16(&values, &mut bits);
                from_bf16(&bits, &mut values);
            }
            values
        }

        /// A segment's answer, computed row by row.
        fn plain(&self, segment: &Segment<'_>) -> SegmentAnswer {
            let pairs =
                segment.groups.iter().flat_map(|&(expert, rows)| rows.iter().map(move |&row| (expert, row)));
            let outputs: Vec<(u32, Vec<f32>)> =
                pairs.map(|(expert, row)| (row, self.output(expert, row + segment.first as u32))).collect();
            let rows: Vec<Vec<f32>> = match segment.weights {
                None => outputs.into_iter().map(|(_, output)| output).collect(),
                Some(weights) => {
                    let mut sums = vec![vec![0.0_f32; self.hidden]; segment.rows];
                    for ((row, output), weight) in outputs.into_iter().zip(weights) {
                        sums[row as usize].iter_mut().zip(output).for_each(|(sum, y)| *sum += weight * y);
                    }
                    sums.into_iter().map(|sum| self.rounded(sum)).collect()
                }
            };
            let mut answer = SegmentAnswer::default();
            for (number, mut row) in (0..).zip(rows) {
                if row.iter().any(|y| !y.is_finite()) {
                    answer.not_finite.push(number);
                    row.fill(0.0);
                }
                match self.wire {
                    DType::F32 => answer.data.extend(row.iter().flat_map(|y| y.to_le_bytes())),
                    DType::Bf16 => answer
                        .data
                        .extend(row.iter().flat_map(|y| ((y.to_bits() >> 16) as u16).to_le_bytes())),
                }
            }
            answer
        }
    }

    #[test]
    fn parts_of_one_call_get_what_each_gets_row_by_row() {
        for compute in [Compute::F32, Compute::Bf16] {
            let case = Case::new(compute);
            let id = |number: usize| case.keys[number].expert;
            let weights = [0.7, 0.3, -0.25, 1.5, 0.125, 0.9];
            let segments = [
                Segment { first: 0, rows: 2, groups: vec![(id(0), &[0, 1]), (id(3), &[1])], weights: None },
                Segment {
                    first: 2,
                    rows: 4,
                    groups: vec![(id(0), &[0, 1, 2]), (id(1), &[2]), (id(3), &[0, 3])],
                    weights: Some(&weights),
                },
                Segment { first: 3, rows: 4, groups: vec![(id(1), &[0, 1]), (id(2), &[3])], weights: None },
            ];
            let plain: Vec<SegmentAnswer> = segments.iter().map(|segment| case.plain(segment)).collect();
            let marks: Vec<&[u32]> = plain.iter().map(|answer| &answer.not_finite[..]).collect();
            assert_eq!(marks, [&[][..], &[2], &[1]], "the bad row alone");
            assert_eq!(case.answer(&segments), Ok(plain.clone()), "{compute}");
            for (segment, plain) in segments.iter().zip(plain) {
                assert_eq!(case.answer(std::slice::from_ref(segment)), Ok(vec![plain]), "{compute}: alone");
            }
        }
    }

    #[test]
    fn an_expert_that_is_not_held_and_rows_that_do_not_fit_are_told() {
        let case = Case::new(Compute::F32);
        let segment = |expert| Segment { first: 0, rows: 1, groups: vec![(expert, &[0])], weights: None };
        case.store.remove(case.keys[1]);
        let outcome = case.answer(&[segment(case.keys[0].expert), segment(case.keys[1].expert)]);
        assert_eq!(outcome, Err(ComputeError::NotHeld(case.keys[1])));
        let beyond = Segment { first: ROWS, ..segment(case.keys[0].expert) };
        assert!(matches!(case.answer(&[beyond]), Err(ComputeError::Internal(_))));
        let mut experts = CpuExperts::new(Arc::clone(&case.cpu), Arc::clone(&case.store));
        for rows in [Rows::of_bf16(&case.bits, case.hidden), Rows::of_f32(&case.values, case.hidden / 2)] {
            let outcome = experts.answer(case.keys[0].layer, rows.unwrap(), &[segment(case.keys[0].expert)]);
            assert!(matches!(outcome, Err(ComputeError::Internal(_))), "{outcome:?}");
        }
    }
}
