//! Weighted sums of expert outputs, and outputs as bytes of the wire.
//!
//! What must hold: a sum starts at 0.0 and takes its terms in the order given; each product and each sum is rounded to
//! f32, with no fused multiply-add, which would round once and give other bits. An output is rounded to the wire dtype
//! whether it was sent or not. An output or a sum that is not finite is found in the pass that reads or writes it, and
//! never returned as a result. Bytes are little-endian. It does not know what the rows mean or which request they
//! belong to.

use std::sync::atomic::{AtomicBool, Ordering};

use muster_types::{DType, Term};

use crate::cpu::Cpu;
use crate::disjoint::Disjoint;
use crate::kernel::{Kernel, run_on};
use crate::simd::{LANES, Simd, lanes, padded};

/// Vectors of a row that are summed at a time.
const BLOCK: usize = 4;
/// Elements that one task works on, all terms counted.
const TASK_ELEMENTS: usize = 1 << 16;

/// Output rows `[_, hidden]` of one origin.
#[derive(Debug, Clone, Copy)]
pub enum Outputs<'a> {
    /// Outputs of a kernel in f32; each value is rounded to the dtype where it is used.
    Computed(&'a [f32], DType),
    /// f32 off the wire.
    WireF32(&'a [[u8; 4]]),
    /// bf16 off the wire.
    WireBf16(&'a [[u8; 2]]),
}

/// An output row, or a sum of them, has a NaN or an infinity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotFinite {
    /// Row `row` of the outputs `source`.
    Output {
        /// Index of the [`Outputs`].
        source: usize,
        /// Row of these outputs.
        row: usize,
    },
    /// The sums in these rows, ascending, though all their terms are finite.
    Sums(Vec<u32>),
}

/// Writes `sum of weight * output` for every row of `out` (`[rows, hidden]`). Row `r` has the terms
/// `starts[r]..starts[r + 1]`.
///
/// # Errors
/// The first term whose output is not finite; else all rows whose sums are not, as after an overflow. `out` is
/// unspecified then.
///
/// # Panics
/// If `starts` does not fit `terms` and `out`, or a term is outside its source.
pub fn combine(
    cpu: &Cpu,
    hidden: usize,
    sources: &[Outputs<'_>],
    starts: &[u32],
    terms: &[Term],
    out: &mut [f32],
) -> Result<(), NotFinite> {
    let sums = Sums::new(hidden, sources, starts, terms);
    assert_eq!(out.len(), sums.rows * hidden, "out: it must be [rows, hidden]");
    let out = Disjoint::new(out);
    sums.write(cpu, &|row| {
        // SAFETY: every row is one task's.
        Target::F32(unsafe { out.piece(row * hidden, hidden) })
    })
}

/// The sums of [`combine`], rounded to `wire` and written as bytes.
///
/// # Errors
/// As [`combine`], for the rounded sums.
///
/// # Panics
/// As [`combine`].
pub fn combine_to_wire(
    cpu: &Cpu,
    hidden: usize,
    sources: &[Outputs<'_>],
    starts: &[u32],
    terms: &[Term],
    wire: DType,
    out: &mut [u8],
) -> Result<(), NotFinite> {
    let sums = Sums::new(hidden, sources, starts, terms);
    let width = hidden * wire.size();
    assert_eq!(out.len(), sums.rows * width, "out: it must be [rows, hidden] in the wire's type");
    let out = Disjoint::new(out);
    sums.write(cpu, &|row| {
        // SAFETY: every row is one task's.
        target(wire, unsafe { out.piece(row * width, width) })
    })
}

/// The sums of all rows, checked to fit each other.
struct Sums<'a> {
    hidden: usize,
    sources: &'a [Outputs<'a>],
    starts: &'a [u32],
    terms: &'a [Term],
    rows: usize,
}

impl<'a> Sums<'a> {
    fn new(hidden: usize, sources: &'a [Outputs<'a>], starts: &'a [u32], terms: &'a [Term]) -> Self {
        assert!(hidden > 0, "hidden: it must not be 0");
        let ends = starts.last().map(|&end| end as usize);
        assert_eq!(ends, Some(terms.len()), "starts: the last must be the number of terms");
        assert!(starts.is_sorted(), "starts: they must ascend");
        for term in terms {
            let len = sources[term.source as usize].len();
            assert!((term.row as usize + 1) * hidden <= len, "terms: a row must lie in its source");
        }
        Self { hidden, sources, starts, terms, rows: starts.len() - 1 }
    }

    /// Writes every row to its `target`.
    fn write<'out>(
        &self,
        cpu: &Cpu,
        target: &(dyn Fn(usize) -> Target<'out> + Sync),
    ) -> Result<(), NotFinite> {
        let &Self { hidden, sources, starts, terms, rows } = self;
        let sum = |row: usize| {
            let terms = &terms[starts[row] as usize..starts[row + 1] as usize];
            run_on(cpu.isa(), SumRow { hidden, sources, terms, out: target(row) })
        };
        if over_rows(cpu, hidden, rows, terms.len(), &sum) {
            return Ok(());
        }
        // Errors are rare: the rows are summed once more to find the bad ones.
        let bad = || (0..).zip(0..rows).filter(|&(_, row)| !sum(row)).map(|(number, _)| number).collect();
        Err(find(hidden, sources, terms).unwrap_or_else(|| NotFinite::Sums(bad())))
    }
}

/// Writes rows of computed outputs as bytes, rounded to `wire`: the rows of `ranges`, one range after another.
///
/// # Errors
/// The first row, by its number in `outputs`, with a value that is not finite once rounded.
///
/// # Panics
/// If a range is outside `outputs` or `out` is not as long as all of them.
pub fn to_wire(
    cpu: &Cpu,
    hidden: usize,
    outputs: &[f32],
    ranges: &[std::ops::Range<usize>],
    wire: DType,
    out: &mut [u8],
) -> Result<(), usize> {
    let width = hidden * wire.size();
    let mut rest = out;
    for range in ranges {
        let (mine, others) = rest.split_at_mut(range.len() * width);
        rest = others;
        let mine = Disjoint::new(mine);
        let finite = over_rows(cpu, hidden, range.len(), range.len(), &|row| {
            // SAFETY: every row is one task's.
            let out = unsafe { mine.piece(row * width, width) };
            let x = &outputs[(range.start + row) * hidden..][..hidden];
            run_on(cpu.isa(), WriteRow { x, out: target(wire, out) })
        });
        if !finite {
            let bad = |row: &usize| {
                let x = &outputs[row * hidden..][..hidden];
                x.iter().any(|&value| !rounded(wire, value).is_finite())
            };
            return Err(range.clone().find(bad).unwrap_or(range.start));
        }
    }
    assert!(rest.is_empty(), "out: it must be as long as all ranges");
    Ok(())
}

/// A value rounded to the wire dtype.
fn rounded(wire: DType, value: f32) -> f32 {
    match wire {
        DType::F32 => value,
        DType::Bf16 => crate::convert::bf16_to_f32(crate::convert::f32_to_bf16(value)),
    }
}

impl Outputs<'_> {
    const fn len(&self) -> usize {
        match self {
            Self::Computed(x, _) => x.len(),
            Self::WireF32(x) => x.len(),
            Self::WireBf16(x) => x.len(),
        }
    }

    /// One element, rounded to the wire dtype.
    fn value(&self, at: usize) -> f32 {
        match self {
            Self::Computed(x, wire) => rounded(*wire, x[at]),
            Self::WireF32(x) => f32::from_le_bytes(x[at]),
            Self::WireBf16(x) => crate::convert::bf16_to_f32(u16::from_le_bytes(x[at])),
        }
    }
}

/// Runs `row` for every row and returns whether all returned true.
fn over_rows(
    cpu: &Cpu,
    hidden: usize,
    rows: usize,
    terms: usize,
    row: &(dyn Fn(usize) -> bool + Sync),
) -> bool {
    let elements = terms.max(rows) * hidden;
    let per_task = (rows * TASK_ELEMENTS).div_ceil(elements.max(1)).max(1);
    let finite = AtomicBool::new(true);
    cpu.run(rows.div_ceil(per_task), elements, &|task| {
        let all = (task * per_task..rows.min((task + 1) * per_task)).fold(true, |all, at| all & row(at));
        if !all {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

/// The first term with a value that is not finite.
fn find(hidden: usize, sources: &[Outputs<'_>], terms: &[Term]) -> Option<NotFinite> {
    terms.iter().find_map(|term| {
        let (source, row) = (term.source as usize, term.row as usize);
        let bad = (row * hidden..(row + 1) * hidden).any(|at| !sources[source].value(at).is_finite());
        bad.then_some(NotFinite::Output { source, row })
    })
}

/// Destination of a row.
enum Target<'a> {
    F32(&'a mut [f32]),
    WireF32(&'a mut [[u8; 4]]),
    WireBf16(&'a mut [[u8; 2]]),
}

fn target(wire: DType, out: &mut [u8]) -> Target<'_> {
    match wire {
        DType::F32 => Target::WireF32(out.as_chunks_mut().0),
        DType::Bf16 => Target::WireBf16(out.as_chunks_mut().0),
    }
}

impl Target<'_> {
    /// Writes up to sixteen elements from `at` on and returns the rounded values.
    #[inline(always)]
    fn store<S: Simd>(&mut self, s: S, at: usize, len: usize, v: S::V) -> S::V {
        match self {
            Self::F32(out) => {
                match out[at..at + len].as_mut_array::<LANES>() {
                    Some(whole) => s.store(v, whole),
                    None => out[at..at + len].copy_from_slice(&lanes(s, v)[..len]),
                }
                v
            }
            Self::WireF32(out) => {
                for (to, value) in out[at..at + len].iter_mut().zip(lanes(s, v)) {
                    *to = value.to_le_bytes();
                }
                v
            }
            Self::WireBf16(out) => {
                let rounded = s.round_bf16(v);
                let values = lanes(s, rounded).map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes());
                match out[at..at + len].as_mut_array::<LANES>() {
                    Some(whole) => *whole = values,
                    None => out[at..at + len].copy_from_slice(&values[..len]),
                }
                rounded
            }
        }
    }
}

impl Outputs<'_> {
    /// Up to sixteen elements from `at` on; zeros beyond `len`.
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, at: usize, len: usize) -> S::V {
        match self {
            Self::Computed(x, dtype) => {
                let x = &x[at..at + len];
                let v = match x.as_array::<LANES>() {
                    Some(whole) => s.load(whole),
                    None => s.load(&padded(x, 0.0)),
                };
                match dtype {
                    DType::F32 => v,
                    DType::Bf16 => s.round_bf16(v),
                }
            }
            Self::WireF32(x) => {
                let x = &x[at..at + len];
                match x.as_array::<LANES>() {
                    Some(whole) => s.load(&whole.map(f32::from_le_bytes)),
                    None => {
                        let mut values = [0.0; LANES];
                        values.iter_mut().zip(x).for_each(|(to, &bytes)| *to = f32::from_le_bytes(bytes));
                        s.load(&values)
                    }
                }
            }
            Self::WireBf16(x) => {
                let x = &x[at..at + len];
                match x.as_array::<LANES>() {
                    Some(whole) => s.load_bf16(&whole.map(u16::from_le_bytes)),
                    None => {
                        let mut values = [0; LANES];
                        values.iter_mut().zip(x).for_each(|(to, &bytes)| *to = u16::from_le_bytes(bytes));
                        s.load_bf16(&values)
                    }
                }
            }
        }
    }
}

struct SumRow<'a> {
    hidden: usize,
    sources: &'a [Outputs<'a>],
    terms: &'a [Term],
    out: Target<'a>,
}

impl Kernel for SumRow<'_> {
    /// Whether every value read and written is finite.
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> bool {
        let zero = s.splat(0.0);
        // 0 * x is 0 for every finite x and NaN for the others.
        let mut finite = zero;
        let mut at = 0;
        while at + BLOCK * LANES <= self.hidden {
            let mut sums = [zero; BLOCK];
            for term in self.terms {
                let (source, weight) = (&self.sources[term.source as usize], s.splat(term.weight));
                let from = term.row as usize * self.hidden + at;
                for (index, sum) in sums.iter_mut().enumerate() {
                    let y = source.load(s, from + index * LANES, LANES);
                    finite = s.fma(y, zero, finite);
                    *sum = s.add(*sum, s.mul(weight, y));
                }
            }
            for (index, sum) in sums.into_iter().enumerate() {
                let written = self.out.store(s, at + index * LANES, LANES, sum);
                finite = s.fma(written, zero, finite);
            }
            at += BLOCK * LANES;
        }
        while at < self.hidden {
            let len = LANES.min(self.hidden - at);
            let mut sum = zero;
            for term in self.terms {
                let source = &self.sources[term.source as usize];
                let y = source.load(s, term.row as usize * self.hidden + at, len);
                finite = s.fma(y, zero, finite);
                sum = s.add(sum, s.mul(s.splat(term.weight), y));
            }
            let written = self.out.store(s, at, len, sum);
            finite = s.fma(written, zero, finite);
            at += len;
        }
        lanes(s, finite).into_iter().fold(true, |all, lane| all & (lane == 0.0))
    }
}

struct WriteRow<'a> {
    x: &'a [f32],
    out: Target<'a>,
}

impl Kernel for WriteRow<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> bool {
        let zero = s.splat(0.0);
        let mut finite = zero;
        let (chunks, rest) = self.x.as_chunks::<LANES>();
        for (index, chunk) in chunks.iter().enumerate() {
            let written = self.out.store(s, index * LANES, LANES, s.load(chunk));
            finite = s.fma(written, zero, finite);
        }
        if !rest.is_empty() {
            let v = s.load(&padded(rest, 0.0));
            let written = self.out.store(s, self.x.len() - rest.len(), rest.len(), v);
            finite = s.fma(written, zero, finite);
        }
        lanes(s, finite).into_iter().fold(true, |all, lane| all & (lane == 0.0))
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::isa::Isa;

    /// Values with all kinds of low mantissa bits, from a small generator.
    fn values(count: usize, mut state: u32) -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits((state & 0x8fff_ffff) | 0x3000_0000)
        };
        (0..count).map(|_| next()).collect()
    }

    fn cpus() -> Vec<Cpu> {
        let threads = [1, 3].map(|n| NonZeroUsize::new(n).unwrap());
        Isa::available().into_iter().flat_map(|isa| threads.map(|n| Cpu::with_isa(n, isa).unwrap())).collect()
    }

    fn bytes(x: &[f32], wire: DType) -> Vec<u8> {
        let element = |&value: &f32| match wire {
            DType::F32 => value.to_le_bytes().to_vec(),
            DType::Bf16 => ((rounded(wire, value).to_bits() >> 16) as u16).to_le_bytes().to_vec(),
        };
        x.iter().flat_map(element).collect()
    }

    /// The module's rule, one element at a time.
    fn plain(hidden: usize, sources: &[Outputs<'_>], starts: &[u32], terms: &[Term]) -> Vec<f32> {
        let mut out = Vec::new();
        for pair in starts.windows(2) {
            for element in 0..hidden {
                let mut sum = 0.0_f32;
                for term in &terms[pair[0] as usize..pair[1] as usize] {
                    let product = term.weight
                        * sources[term.source as usize].value(term.row as usize * hidden + element);
                    sum += product;
                }
                out.push(sum);
            }
        }
        out
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    /// Three sources of one kind, and rows with 0 to 4 terms from all over them.
    fn case(rows: usize) -> (Vec<u32>, Vec<Term>) {
        let (mut starts, mut terms) = (vec![0], Vec::new());
        for row in 0..rows {
            for n in 0..row % 5 {
                let (source, from) = (((row + n) % 3) as u32, ((row * 7 + n * 3) % 9) as u32);
                terms.push(Term { source, row: from, weight: (row * 3 + n + 1) as f32 / 7.0 - 1.0 });
            }
            starts.push(terms.len() as u32);
        }
        (starts, terms)
    }

    #[test]
    fn sums_are_the_plain_ones_on_every_instruction_set() {
        for hidden in [1, 15, 16, 17, 64, 100, 1024] {
            let rows = if hidden == 1024 { 300 } else { 12 };
            let (starts, terms) = case(rows);
            let x: Vec<Vec<f32>> = (0..3).map(|seed| values(9 * hidden, seed)).collect();
            let wide: Vec<Vec<u8>> = x.iter().map(|x| bytes(x, DType::F32)).collect();
            let narrow: Vec<Vec<u8>> = x.iter().map(|x| bytes(x, DType::Bf16)).collect();
            let kinds: [Vec<Outputs<'_>>; 4] = [
                x.iter().map(|x| Outputs::Computed(x, DType::F32)).collect(),
                wide.iter().map(|x| Outputs::WireF32(x.as_chunks().0)).collect(),
                x.iter().map(|x| Outputs::Computed(x, DType::Bf16)).collect(),
                narrow.iter().map(|x| Outputs::WireBf16(x.as_chunks().0)).collect(),
            ];
            let want: Vec<Vec<f32>> = kinds.iter().map(|k| plain(hidden, k, &starts, &terms)).collect();
            assert_eq!(bits(&want[2]), bits(&want[3]), "rounded here or there");
            assert_ne!(bits(&want[0]), bits(&want[2]), "rounding shows");
            for cpu in cpus() {
                for (sources, want) in kinds.iter().zip(&want) {
                    let mut out = vec![f32::NAN; rows * hidden];
                    combine(&cpu, hidden, sources, &starts, &terms, &mut out).unwrap();
                    assert_eq!(bits(&out), bits(want), "hidden {hidden}, {cpu:?}");
                    for wire in [DType::F32, DType::Bf16] {
                        let mut out = vec![7; rows * hidden * wire.size()];
                        combine_to_wire(&cpu, hidden, sources, &starts, &terms, wire, &mut out).unwrap();
                        assert_eq!(out, bytes(want, wire), "hidden {hidden}, {wire:?}, {cpu:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_become_the_bytes_that_were_asked_for() {
        let hidden = 37;
        let x = values(9 * hidden, 5);
        for cpu in cpus() {
            for wire in [DType::F32, DType::Bf16] {
                let mut out = vec![7; 5 * hidden * wire.size()];
                to_wire(&cpu, hidden, &x, &[6..9, 1..1, 0..2], wire, &mut out).unwrap();
                let want = [&x[6 * hidden..], &x[..2 * hidden]].concat();
                assert_eq!(out, bytes(&want, wire));
            }
        }
    }

    fn one(weights: &[f32], outputs: &[f32]) -> f32 {
        let cpu = Cpu::new(NonZeroUsize::MIN).unwrap();
        let terms: Vec<Term> =
            (0..).zip(weights).map(|(row, &weight)| Term { source: 0, row, weight }).collect();
        let (sources, mut out) = ([Outputs::Computed(outputs, DType::F32)], [7.0]);
        combine(&cpu, 1, &sources, &[0, terms.len() as u32], &terms, &mut out).unwrap();
        out[0]
    }

    #[test]
    fn order_rounding_and_the_first_zero() {
        // 2^24 + 1 rounds to 2^24, so only this order loses the 1.
        let big = (1 << 24) as f32;
        assert_eq!((one(&[1.0; 3], &[big, 1.0, -big]), one(&[1.0; 3], &[big, -big, 1.0])), (0.0, 1.0));
        // (1 + e)^2 = 1 + 2e + e^2 loses its e^2 in f32; a fused sum would keep it.
        let x = 1.0 + f32::EPSILON;
        assert_eq!(one(&[1.0, x], &[-(x * x), x]), 0.0);
        assert_ne!(x.mul_add(x, -(x * x)), 0.0);
        assert_eq!(one(&[1.0, 1.0], &[-0.0, -0.0]).to_bits(), 0.0_f32.to_bits());
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let (hidden, wire) = (100, DType::Bf16);
        let (starts, terms) = case(12);
        for cpu in cpus() {
            for (at, bad) in [(0, f32::NAN), (63, f32::INFINITY), (99, f32::NEG_INFINITY), (98, f32::MAX)] {
                let mut x: Vec<Vec<f32>> = (0..3).map(|seed| values(9 * hidden, seed)).collect();
                x[1][4 * hidden + at] = bad;
                let used = terms.iter().any(|term| (term.source, term.row) == (1, 4));
                assert!(used);
                let sources: Vec<_> = x.iter().map(|x| Outputs::Computed(x, wire)).collect();
                let named = Err(NotFinite::Output { source: 1, row: 4 });
                let mut out = vec![0.0; 12 * hidden];
                assert_eq!(
                    combine(&cpu, hidden, &sources, &starts, &terms, &mut out),
                    named,
                    "{bad} at {at}"
                );
                let mut out = vec![0; 12 * hidden * 2];
                let outcome = combine_to_wire(&cpu, hidden, &sources, &starts, &terms, wire, &mut out);
                assert_eq!(outcome, named, "{bad} at {at}");
                let mut out = vec![0; 7 * hidden * 2];
                assert_eq!(
                    to_wire(&cpu, hidden, &x[1], &[1..2, 3..9], wire, &mut out),
                    Err(4),
                    "{bad} at {at}"
                );
            }
        }
    }

    /// Rows of one term each, but for the last two: of two terms that overflow together, and of two that do so on the
    /// way and not in the end.
    fn overflowing(hidden: usize, at: usize, top: f32) -> (Vec<f32>, Vec<u32>, Vec<Term>) {
        let mut x = values(8 * hidden, 3);
        x[5 * hidden + at] = top;
        x[6 * hidden + at] = top;
        x[7 * hidden + at] = -top;
        let term = |row, weight| Term { source: 0, row, weight };
        let mut terms: Vec<Term> = (0..5).map(|row| term(row, 0.5)).collect();
        let mut starts: Vec<u32> = (0..=5).collect();
        terms.extend([term(5, 1.0), term(6, 1.0), term(5, 2.0), term(7, 2.0)]);
        starts.extend([7, 9]);
        (x, starts, terms)
    }

    #[test]
    fn a_sum_that_overflows_is_named_on_every_instruction_set() {
        // The greatest values of f32 and of bf16; the latter is smaller.
        let greatest = [(DType::F32, f32::MAX), (DType::Bf16, rounded(DType::Bf16, 3.38e38))];
        for hidden in [1, 15, 16, 17, 64, 100, 1024] {
            for (at, (dtype, top)) in [0, hidden / 2, hidden - 1].into_iter().zip(greatest.iter().cycle()) {
                let (x, starts, terms) = overflowing(hidden, at, *top);
                let (wide, narrow) = (bytes(&x, DType::F32), bytes(&x, DType::Bf16));
                let kinds = [
                    Outputs::Computed(&x, *dtype),
                    match dtype {
                        DType::F32 => Outputs::WireF32(wide.as_chunks().0),
                        DType::Bf16 => Outputs::WireBf16(narrow.as_chunks().0),
                    },
                ];
                for cpu in cpus() {
                    for source in kinds {
                        // The last row overflows even alone: its products do.
                        for (rows, bad) in [(5, vec![]), (6, vec![5]), (7, vec![5, 6])] {
                            let what = format!("hidden {hidden}, at {at}, {dtype:?}, {rows} rows, {cpu:?}");
                            let (starts, terms) = (&starts[..=rows], &terms[..starts[rows] as usize]);
                            let want = if bad.is_empty() { Ok(()) } else { Err(NotFinite::Sums(bad)) };
                            let mut out = vec![0.0; rows * hidden];
                            assert_eq!(
                                combine(&cpu, hidden, &[source], starts, terms, &mut out),
                                want,
                                "{what}"
                            );
                            for wire in [DType::F32, DType::Bf16] {
                                let mut out = vec![0; rows * hidden * wire.size()];
                                let outcome =
                                    combine_to_wire(&cpu, hidden, &[source], starts, terms, wire, &mut out);
                                assert_eq!(outcome, want, "{what} to {wire:?}");
                            }
                        }
                        let last = [Term { row: 5, ..terms[7] }, terms[8]];
                        let mut out = vec![0.0; hidden];
                        let outcome = combine(&cpu, hidden, &[source], &[0, 2], &last, &mut out);
                        assert_eq!(outcome, Err(NotFinite::Sums(vec![0])), "inf - inf, {cpu:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_output_that_is_not_finite_goes_before_a_sum_that_is_not() {
        for cpu in cpus() {
            let (mut x, starts, mut terms) = overflowing(64, 9, f32::MAX);
            x[7 * 64] = f32::NAN;
            let sources = [Outputs::Computed(&x, DType::F32)];
            let mut out = vec![0.0; 7 * 64];
            let named = Err(NotFinite::Output { source: 0, row: 7 });
            assert_eq!(combine(&cpu, 64, &sources, &starts, &terms, &mut out), named);
            // A weight of zero does not hide a bad output: the row has no sum.
            terms[8].weight = 0.0;
            assert_eq!(combine(&cpu, 64, &sources, &starts, &terms, &mut out), named);
        }
    }

    #[test]
    fn a_sum_that_is_finite_until_it_is_rounded_is_not_sent() {
        for cpu in cpus() {
            let x = [1.0, f32::MAX];
            let sources = [Outputs::Computed(&x, DType::F32)];
            let terms = [0, 1].map(|row| Term { source: 0, row, weight: 1.0 });
            let (mut sums, mut wire) = ([0.0; 2], [0; 4]);
            assert_eq!(combine(&cpu, 1, &sources, &[0, 1, 2], &terms, &mut sums), Ok(()));
            let outcome = combine_to_wire(&cpu, 1, &sources, &[0, 1, 2], &terms, DType::Bf16, &mut wire);
            assert_eq!(outcome, Err(NotFinite::Sums(vec![1])));
        }
    }
}
