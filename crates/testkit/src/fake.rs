//! Experts without weights. Every expert of every layer computes a different function of a row, so an output shows
//! where it was made, and the same row gives the same bits on any worker.

use std::collections::BTreeSet;

use muster_engine::compute::{ComputeError, ExpertCompute, Segment, SegmentAnswer};
use muster_engine::dispatch::Rows;
use muster_types::{Compute, ExpertId, ExpertKey, LayerId};

/// Output of a fake expert for a hidden row: `x * (1 + expert / 4) + 64 * layer + expert + 1`, rounded to the wire
/// dtype.
#[must_use]
pub fn output(compute: Compute, layer: LayerId, expert: ExpertId, row: &[f32]) -> Vec<f32> {
    let factor = 1.0 + expert.get() as f32 / 4.0;
    let offset = (64 * layer.get() + expert.get() + 1) as f32;
    row.iter().map(|x| round(compute, x * factor + offset)).collect()
}

/// A finite value rounded to the wire dtype: for bf16 to the nearest, ties to even.
#[must_use]
pub fn round(compute: Compute, value: f32) -> f32 {
    match compute {
        Compute::F32 => value,
        Compute::Bf16 | Compute::Bf16Pairs => {
            let bits = value.to_bits();
            let half = 0x7fff + ((bits >> 16) & 1);
            f32::from_bits(bits.wrapping_add(half) & 0xffff_0000)
        }
    }
}

/// Fake experts of one worker.
#[derive(Debug, Clone)]
pub struct FakeExperts {
    /// Dtype to which rows are rounded.
    pub compute: Compute,
    /// Elements of a hidden row.
    pub hidden: usize,
    /// Experts held by the worker.
    pub held: BTreeSet<ExpertKey>,
}

impl FakeExperts {
    /// Rows `[hidden]` of a call, widened to f32.
    ///
    /// # Panics
    /// When they are not in the wire dtype or have another width.
    fn read(&self, rows: Rows<'_>) -> Vec<f32> {
        assert_eq!(rows.hidden(), self.hidden, "rows of another model");
        match (rows.f32(), rows.bf16(), self.compute) {
            (Some(x), _, Compute::F32) => x.to_vec(),
            (_, Some(x), Compute::Bf16 | Compute::Bf16Pairs) => {
                x.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect()
            }
            _ => panic!("rows are not in the wire dtype of {}", self.compute),
        }
    }

    /// Outputs of a segment, or their weighted sums: row by row, in the plainest way.
    fn rows_of(
        &self,
        layer: LayerId,
        input: &[f32],
        segment: &Segment<'_>,
    ) -> Result<Vec<Vec<f32>>, ComputeError> {
        let mut outputs: Vec<(usize, Vec<f32>)> = Vec::new();
        for &(expert, numbers) in &segment.groups {
            let key = ExpertKey { layer, expert };
            if !self.held.contains(&key) {
                return Err(ComputeError::NotHeld(key));
            }
            for &number in numbers {
                let number = number as usize;
                assert!(number < segment.rows, "row {number} of {}", segment.rows);
                let row = &input[(segment.first + number) * self.hidden..][..self.hidden];
                outputs.push((number, output(self.compute, layer, expert, row)));
            }
        }
        let Some(weights) = segment.weights else {
            return Ok(outputs.into_iter().map(|(_, output)| output).collect());
        };
        assert_eq!(weights.len(), outputs.len(), "one weight for every output");
        let mut sums = vec![vec![0.0_f32; self.hidden]; segment.rows];
        for ((number, output), weight) in outputs.into_iter().zip(weights) {
            for (sum, y) in sums[number].iter_mut().zip(output) {
                *sum += weight * y;
            }
        }
        Ok(sums.into_iter().map(|sum| sum.into_iter().map(|y| round(self.compute, y)).collect()).collect())
    }

    fn answer_of(&self, rows: Vec<Vec<f32>>) -> SegmentAnswer {
        let mut answer = SegmentAnswer::default();
        for (number, mut row) in (0..).zip(rows) {
            if row.iter().any(|y| !y.is_finite()) {
                answer.not_finite.push(number);
                row.fill(0.0);
            }
            for y in row {
                match self.compute {
                    Compute::F32 => answer.data.extend(y.to_le_bytes()),
                    Compute::Bf16 | Compute::Bf16Pairs => answer.data.extend(&y.to_le_bytes()[2..]),
                }
            }
        }
        answer
    }
}

impl ExpertCompute for FakeExperts {
    fn answer(
        &mut self,
        layer: LayerId,
        rows: Rows<'_>,
        segments: &[Segment<'_>],
    ) -> Result<Vec<SegmentAnswer>, ComputeError> {
        let input = self.read(rows);
        let answer = |segment| Ok(self.answer_of(self.rows_of(layer, &input, segment)?));
        segments.iter().map(answer).collect()
    }
}

/// Experts of another numerics class: flips the lowest bit of every element of an output.
#[derive(Debug, Clone)]
pub struct OtherBits<E> {
    /// The experts.
    pub inner: E,
    /// Dtype to which rows are rounded.
    pub compute: Compute,
}

/// Element of an output as [`OtherBits`] changes it.
#[must_use]
pub fn other_bits(compute: Compute, element: f32) -> f32 {
    let lowest = match compute {
        Compute::F32 => 1,
        Compute::Bf16 | Compute::Bf16Pairs => 1 << 16,
    };
    f32::from_bits(element.to_bits() ^ lowest)
}

impl<E: ExpertCompute> ExpertCompute for OtherBits<E> {
    fn answer(
        &mut self,
        layer: LayerId,
        rows: Rows<'_>,
        segments: &[Segment<'_>],
    ) -> Result<Vec<SegmentAnswer>, ComputeError> {
        let mut answers = self.inner.answer(layer, rows, segments)?;
        let size = self.compute.wire_dtype().size();
        for answer in &mut answers {
            answer.data.chunks_mut(size).for_each(|element| element[0] ^= 1);
        }
        Ok(answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_experts_do_the_same() {
        let mut seen = BTreeSet::new();
        for layer in LayerId::all(3) {
            for expert in ExpertId::all(8) {
                let bits: Vec<u32> =
                    output(Compute::Bf16, layer, expert, &[0.0, 1.5]).into_iter().map(f32::to_bits).collect();
                assert!(bits.iter().all(|b| b & 0xffff == 0), "not a bf16 value");
                assert!(seen.insert(bits), "layer {layer} expert {expert}");
            }
        }
    }

    #[test]
    fn bf16_ties_go_to_even() {
        let value = |bits: u32| f32::from_bits(bits);
        assert_eq!(round(Compute::Bf16, value(0x3f80_8000)).to_bits(), 0x3f80_0000);
        assert_eq!(round(Compute::Bf16, value(0x3f81_8000)).to_bits(), 0x3f82_0000);
        assert_eq!(round(Compute::Bf16, value(0x3f80_8001)).to_bits(), 0x3f81_0000);
    }
}
