//! The seam between a worker's transport and its experts.
//!
//! A call is one layer's rows with one or several [`Segment`]s: shards that are computed together and answered apart. The
//! compute side owns all numerics: the experts, rounding to the wire dtype, partial sums, and the search for values that are
//! not finite. A transport sees bytes and marks.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use muster_types::{ExpertId, ExpertKey, Fault, FaultKind, LayerId};

use crate::rows::Rows;

/// Experts, on the thread that computes.
pub trait ExpertCompute: Send {
    /// Runs experts of one layer over rows in the wire dtype. Gives one [`SegmentAnswer`] for every segment, in their order.
    ///
    /// A sum is that of the seam ([`ExpertDispatch`](crate::dispatch::ExpertDispatch)) over the segment's own outputs. Outputs
    /// and sums are rounded to the dtype of `rows`. The bits of an answer do not depend on the other segments.
    ///
    /// # Errors
    /// See [`ComputeError`]; no segment has an answer then.
    fn answer(
        &mut self,
        layer: LayerId,
        rows: Rows<'_>,
        segments: &[Segment<'_>],
    ) -> Result<Vec<SegmentAnswer>, ComputeError>;
}

/// One shard of a call.
#[derive(Debug, Clone)]
pub struct Segment<'a> {
    /// Number of its first row in the call.
    pub first: usize,
    /// Number of its rows.
    pub rows: usize,
    /// Row numbers of every expert, counted from `first` and in range; experts strictly ascending.
    pub groups: Vec<(ExpertId, &'a [u32])>,
    /// Weight of every output, in the order of `groups`, where one sum per row is wanted; `None` where every output is.
    pub weights: Option<&'a [f32]>,
}

impl Segment<'_> {
    /// Output rows of its experts: one per (row, expert).
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.groups.iter().map(|(_, rows)| rows.len()).sum()
    }

    /// Rows of its answer: its outputs in the order of `groups`, or the sums in the order of its rows.
    #[must_use]
    pub fn answers(&self) -> usize {
        if self.weights.is_some() { self.rows } else { self.outputs() }
    }
}

/// Answer to a segment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SegmentAnswer {
    /// [`Segment::answers`] rows in the wire dtype, little-endian.
    pub data: Vec<u8>,
    /// Numbers of rows with a value that is not finite: zeros in `data`. Strictly ascending.
    pub not_finite: Vec<u32>,
}

/// Why experts gave no answers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ComputeError {
    /// The expert is not held.
    #[error("{0} is not held here")]
    NotHeld(ExpertKey),
    /// Anything else.
    #[error("experts failed: {0}")]
    Internal(String),
}

impl From<&ComputeError> for Fault {
    fn from(error: &ComputeError) -> Self {
        match error {
            ComputeError::NotHeld(key) => {
                Self::of_expert(FaultKind::NotHeld, key.expert.get(), error.to_string())
            }
            ComputeError::Internal(_) => Self::new(FaultKind::Internal, error.to_string()),
        }
    }
}

/// Segments as one grouped call.
#[derive(Debug)]
pub struct Merged<'a> {
    /// Experts of all segments, ascending, each with the numbers of its rows in the call.
    pub groups: Vec<(ExpertId, Cow<'a, [u32]>)>,
    /// For every segment and each of its experts: the rows of the grouped call's output that are its own.
    pub places: Vec<Vec<Range<usize>>>,
}

impl<'a> Merged<'a> {
    /// An expert's rows are those of one segment after another. Row numbers of a segment alone are not copied.
    #[must_use]
    pub fn of(segments: &[Segment<'a>]) -> Self {
        let mut groups: BTreeMap<ExpertId, Cow<'a, [u32]>> = BTreeMap::new();
        // Ranges within an expert's group, until it is known where that begins.
        let mut within: Vec<Vec<(ExpertId, Range<usize>)>> = Vec::with_capacity(segments.len());
        for segment in segments {
            let own = segment.groups.iter().map(|&(expert, rows)| {
                let group = groups.entry(expert).or_default();
                let start = group.len();
                if start == 0 && segment.first == 0 {
                    *group = Cow::Borrowed(rows);
                } else {
                    // Rows of a call are counted in 32 bits.
                    group.to_mut().extend(rows.iter().map(|row| row + segment.first as u32));
                }
                (expert, start..start + rows.len())
            });
            within.push(own.collect());
        }
        let mut next = 0;
        let starts: BTreeMap<ExpertId, usize> = groups
            .iter()
            .map(|(&expert, rows)| {
                let start = next;
                next += rows.len();
                (expert, start)
            })
            .collect();
        let place = |(expert, range): (ExpertId, Range<usize>)| {
            let start = starts.get(&expert).copied().unwrap_or(0);
            start + range.start..start + range.end
        };
        let places = within.into_iter().map(|own| own.into_iter().map(place).collect()).collect();
        Self { groups: groups.into_iter().collect(), places }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expert(number: u32) -> ExpertId {
        ExpertId::new(number, 8).unwrap()
    }

    fn segment<'a>(first: usize, rows: usize, groups: &[(u32, &'a [u32])]) -> Segment<'a> {
        let groups = groups.iter().map(|&(number, rows)| (expert(number), rows)).collect();
        Segment { first, rows, groups, weights: None }
    }

    #[test]
    fn parts_share_experts_and_find_their_own_outputs() {
        let segments = [
            segment(0, 2, &[(1, &[0, 1]), (4, &[1])]),
            segment(2, 1, &[(0, &[0]), (7, &[0])]),
            segment(3, 3, &[(1, &[2]), (4, &[0, 1, 2]), (5, &[1])]),
        ];
        let merged = Merged::of(&segments);
        let groups: Vec<(u32, &[u32])> =
            merged.groups.iter().map(|(id, rows)| (id.get(), &rows[..])).collect();
        let expected: [(u32, &[u32]); 5] =
            [(0, &[2]), (1, &[0, 1, 5]), (4, &[1, 3, 4, 5]), (5, &[4]), (7, &[2])];
        assert_eq!(groups, expected);
        assert_eq!(merged.places, [vec![1..3, 4..5], vec![0..1, 9..10], vec![3..4, 5..8, 8..9]]);
        // Each output row is one segment's.
        let outputs: usize = segments.iter().map(Segment::outputs).sum();
        let mut own: Vec<usize> = merged.places.into_iter().flatten().flatten().collect();
        own.sort_unstable();
        assert!(own.into_iter().eq(0..outputs));
    }

    #[test]
    fn a_part_alone_is_not_copied() {
        let segments = [segment(0, 3, &[(2, &[0, 2]), (3, &[1])])];
        let merged = Merged::of(&segments);
        assert!(merged.groups.iter().all(|(_, rows)| matches!(rows, Cow::Borrowed(_))));
        assert_eq!(merged.places, [vec![0..2, 2..3]]);
        // One that is tried alone, of several.
        let merged = Merged::of(&[segment(4, 1, &[(2, &[0]), (3, &[0])])]);
        assert!(merged.groups.iter().all(|(_, rows)| rows[..] == [4]));
        assert_eq!(merged.places, [vec![0..1, 1..2]]);
    }

    #[test]
    fn an_answer_has_a_row_per_output_or_per_sum() {
        let outputs = segment(0, 2, &[(2, &[0, 1]), (3, &[1])]);
        let sums = Segment { weights: Some(&[0.5; 3]), ..outputs.clone() };
        assert_eq!((outputs.answers(), sums.answers(), sums.outputs()), (3, 2, 3));
    }
}
