//! MXFP4 weights against the same numbers packed as bf16, to the bit, on every path.

mod common;

use common::{CLAMPED, MODES, Numbers, assert_same, bf16_bits, cpu, cpus, to_bf16_values};
use muster_kernels::{Expert, ExpertRows, FfnScratch, Isa, KernelError, Matrix, grouped_ffn, linear};
use muster_types::{Compute, Gating, Packing};
use proptest::prelude::*;

const NUMBERS: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// A weight as published.
struct Published {
    n: usize,
    k: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Published {
    /// A weight with every code, and scales between `least` and `most`.
    fn new(numbers: &mut Numbers, n: usize, k: usize, [least, most]: [u8; 2]) -> Self {
        let codes = (0..n * k / 2).map(|_| numbers.below(256) as u8).collect();
        let span = usize::from(most - least) + 1;
        let scales = (0..n * k / 32).map(|_| least + numbers.below(span) as u8).collect();
        Self { n, k, codes, scales }
    }

    /// Its numbers.
    fn values(&self) -> Vec<f64> {
        (0..self.n * self.k)
            .map(|i| {
                let code = usize::from(self.codes[i / 2] >> (i % 2 * 4) & 15);
                let sign = if code < 8 { 1.0 } else { -1.0 };
                let scale = 2.0_f64.powi(i32::from(self.scales[i / 32]) - 127);
                sign * f64::from(NUMBERS[code % 8]) * scale
            })
            .collect()
    }

    fn pack(&self) -> Matrix {
        Matrix::pack_mxfp4(self.n, self.k, &self.codes, &self.scales).expect("the shape fits")
    }

    fn pack_as_bf16(&self) -> Matrix {
        let values: Vec<f32> = self.values().iter().map(|value| *value as f32).collect();
        assert!(values.iter().all(|value| value.to_bits() & 0xffff == 0), "all are bf16 values");
        Matrix::pack_bf16(self.n, self.k, &bf16_bits(&values)).expect("the shape fits")
    }
}

const SHAPES: [(usize, usize); 8] =
    [(1, 32), (16, 32), (17, 64), (48, 96), (100, 288), (64, 576), (33, 160), (130, 320)];

/// Ranges of scales: around one, the lowest, the highest, and all.
const SCALES: [[u8; 2]; 4] = [[118, 130], [0, 3], [249, 252], [0, 252]];

#[test]
fn linears_have_the_bits_of_bf16_for_any_rows_on_every_path() {
    let mut numbers = Numbers(61);
    for (n, k) in SHAPES {
        for scales in SCALES {
            let counts: Vec<usize> = if scales == SCALES[0] {
                (1..=20).chain([31, 32, 33, 63, 64, 65, 70]).collect()
            } else {
                vec![1, 6, 33]
            };
            let published = Published::new(&mut numbers, n, k, scales);
            let (found, want) = (published.pack(), published.pack_as_bf16());
            let x = numbers.odd_vec(70 * k, false);
            for compute in MODES {
                let x = if compute.rounds() { to_bf16_values(&x) } else { x.clone() };
                for cpu in cpus() {
                    for &rows in &counts {
                        let [mut a, mut b] = [0, 1].map(|_| vec![f32::NAN; rows * n]);
                        linear(&cpu, &found, &x[..rows * k], compute, &mut a);
                        linear(&cpu, &want, &x[..rows * k], compute, &mut b);
                        assert_same(&a, &b, &format!("{} {found:?} {compute:?} {rows} rows", cpu.isa()));
                    }
                }
            }
        }
    }
}

/// Every code times every scale, one at a time, and infinite inputs, which tell a zero from a tiny weight.
#[test]
fn every_number_and_scale_decodes_to_its_bf16_on_every_instruction_set() {
    let codes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15].map(|code| code << 4 | (15 - code));
    for first in (0..=252_u8).step_by(16) {
        let scales: Vec<u8> = (0..16).map(|lane| (first + lane).min(252)).collect();
        let published = Published { n: 16, k: 32, codes: codes.repeat(16), scales };
        let (found, want) = (published.pack(), published.pack_as_bf16());
        for big in [1.0, f32::INFINITY] {
            let x: Vec<f32> = (0..32 * 32).map(|i| if i / 32 == i % 32 { big } else { 0.0 }).collect();
            for cpu in cpus() {
                for compute in MODES {
                    let [mut a, mut b] = [0, 1].map(|_| vec![f32::NAN; 32 * 16]);
                    linear(&cpu, &found, &x, compute, &mut a);
                    linear(&cpu, &want, &x, compute, &mut b);
                    assert_same(&a, &b, &format!("{} scales from {first}, {compute:?}", cpu.isa()));
                }
            }
        }
    }
}

#[test]
fn rows_come_back_as_published_but_for_what_linears_read_as_zero() {
    let mut numbers = Numbers(62);
    let (mut small, mut zero) = (0, 0);
    for (n, k) in SHAPES {
        for scales in SCALES {
            let published = Published::new(&mut numbers, n, k, scales);
            let matrix = published.pack();
            let mut row = vec![f32::NAN; k];
            for (index, want) in published.values().chunks(k).enumerate() {
                matrix.row(index, &mut row);
                for (found, want) in row.iter().zip(want) {
                    let want = *want as f32;
                    small += usize::from(want.is_subnormal());
                    zero += usize::from(want == 0.0);
                    let want = if want.is_subnormal() { 0.0_f32.copysign(want) } else { want };
                    assert_eq!(found.to_bits(), want.to_bits(), "{found} {want}");
                }
            }
        }
    }
    assert!(small > 100 && zero > 100, "{small} {zero}");
}

#[test]
fn four_bits_and_a_quarter_are_kept_of_every_weight() {
    let mut numbers = Numbers(63);
    let published = Published::new(&mut numbers, 64, 2880, SCALES[0]);
    let matrix = published.pack();
    assert_eq!(matrix.bytes() * 8, 64 * 2880 * 17 / 4);
    assert_eq!((matrix.packing(), matrix.packed().len()), (Packing::Mxfp4, matrix.bytes()));
    assert_eq!(format!("{matrix:?}"), "Matrix(mxfp4 [64, 2880])");
    assert_eq!(Matrix::packed_bytes(Packing::Mxfp4, 64, 2880), Some(matrix.bytes()));
    assert_eq!(Matrix::packed_bytes(Packing::Mxfp4, 64, 2881), None);
}

#[test]
fn weights_that_are_none_are_refused_by_name() {
    let refused =
        |n, k, codes: &[u8], scales: &[u8]| Matrix::pack_mxfp4(n, k, codes, scales).unwrap_err().to_string();
    let good = (vec![0x21; 3 * 32], vec![127_u8; 3 * 2]);
    assert!(Matrix::pack_mxfp4(3, 64, &good.0, &good.1).is_ok());
    assert_eq!(refused(3, 0, &[], &[]), "k is 0: it must be at least 1");
    assert_eq!(refused(3, 48, &[0; 72], &[0; 4]), "k is 48: it must be a multiple of 32");
    assert_eq!(
        refused(3, 64, &good.0[1..], &good.1),
        "weight of shape [3, 64] has 190 elements: it must have n * k"
    );
    assert_eq!(
        refused(3, 64, &good.0, &good.1[1..]),
        "weight of shape [3, 64] has 5 scales: it must have one per 32 inputs of a row"
    );
    for bad in [253, 254, 255] {
        let mut scales = good.1.clone();
        scales[5] = bad;
        let refused = Matrix::pack_mxfp4(3, 64, &good.0, &scales).unwrap_err();
        assert!(matches!(refused, KernelError::Scale { n: 2, group: 1, scale } if scale == bad), "{refused}");
    }
    assert!(refused(usize::MAX, 32, &[], &[]).contains("elements"));
}

/// Refuses bytes that packing never makes: a scale that is no number, and numbers too small for the lowest scale.
#[test]
fn packed_bytes_are_checked() {
    let published = Published { n: 16, k: 32, codes: vec![0; 256], scales: vec![100; 16] };
    let bytes = published.pack().packed().to_vec();
    assert!(Matrix::from_packed(Packing::Mxfp4, 16, 32, &bytes).is_ok());
    for (at, bad) in [(bytes.len() - 1, 255), (bytes.len() - 16, 253)] {
        let mut bytes = bytes.clone();
        bytes[at] = bad;
        assert!(matches!(
            Matrix::from_packed(Packing::Mxfp4, 16, 32, &bytes),
            Err(KernelError::Packed { .. })
        ));
    }
    let mut small = bytes;
    small[0] = 1;
    assert!(Matrix::from_packed(Packing::Mxfp4, 16, 32, &small).is_ok());
    small[256] = 0;
    assert!(matches!(Matrix::from_packed(Packing::Mxfp4, 16, 32, &small), Err(KernelError::Packed { .. })));
}

/// An expert twice: as published where `published` says so, and all in bf16.
fn experts(numbers: &mut Numbers, hidden: usize, intermediate: usize, published: [bool; 3]) -> [Expert; 2] {
    let shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)];
    let weights = shapes.map(|(n, k)| Published::new(numbers, n, k, [120, 126]));
    let expert = |published: [bool; 3]| {
        let [gate, up, down] =
            [0, 1, 2].map(|i| if published[i] { weights[i].pack() } else { weights[i].pack_as_bf16() });
        Expert::new(gate, up, down).expect("they go together")
    };
    let both = [expert(published), expert([false; 3])];
    let biases = common::biases(numbers, hidden, intermediate);
    both.map(|expert| expert.with(CLAMPED, Some(biases.clone())).expect("they fit"))
}

#[test]
fn experts_have_the_bits_of_bf16_whole_or_in_part() {
    let mut numbers = Numbers(64);
    let (hidden, mut scratch) = (96, FfnScratch::default());
    let known: Vec<_> = [
        (64, [true, true, true]),
        (160, [true, true, false]),
        (32, [false, false, true]),
        (352, [true, true, true]),
    ]
    .into_iter()
    .map(|(width, published)| experts(&mut numbers, hidden, width, published))
    .collect();
    let x = to_bf16_values(&numbers.vec(70 * hidden));
    let rows = [vec![5], (0..70).rev().collect(), vec![1, 3, 3, 69, 0, 7, 8, 9, 11], vec![0, 2, 5]];
    for shift in 0..known.len() {
        for compute in MODES {
            for cpu in cpus().into_iter().chain([2, 3].map(|threads| cpu(threads, Isa::detect()))) {
                let [found, want] = [0, 1].map(|which| {
                    let groups: Vec<_> = std::iter::zip(0..4, &rows)
                        .map(|(i, rows)| ExpertRows { expert: &known[(i + shift) % 4][which], rows })
                        .collect();
                    let mut out = vec![f32::NAN; 83 * hidden];
                    grouped_ffn(&cpu, &groups, &x, compute, &mut scratch, &mut out);
                    out
                });
                assert_same(&found, &want, &format!("{} {compute:?}", cpu.isa()));
                assert!(muster_kernels::all_finite(&found));
            }
        }
    }
}

#[test]
fn experts_of_mixed_gate_and_up_or_partly_quantised_are_refused() {
    let few = |n, k| Matrix::pack_mxfp4(n, k, &vec![0; n * k / 2], &vec![127; n * k / 32]).unwrap();
    let wide = |n, k| Matrix::pack_bf16(n, k, &vec![0; n * k]).unwrap();
    let q4 = |n, k| Matrix::round_f32(Packing::Q4, n, k, &vec![0.0; n * k]).unwrap();
    for refused in [
        Expert::new(few(32, 64), wide(32, 64), few(64, 32)),
        Expert::new(wide(32, 64), few(32, 64), few(64, 32)),
        Expert::new(few(32, 64), few(32, 64), q4(64, 32)),
        Expert::new(q4(32, 64), q4(32, 64), few(64, 32)),
    ] {
        assert!(matches!(refused, Err(KernelError::ExpertTypes)));
    }
    let expert = Expert::new(few(32, 64), few(32, 64), few(64, 32)).unwrap();
    assert_eq!((expert.bytes(), expert.gating()), (3 * 32 * 64 * 17 / 32, Gating::Silu));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// A row in a batch is the row alone, whatever the shape, the instruction set and the threads.
    #[test]
    fn a_row_is_itself_in_any_batch(
        n in 1_usize..70, blocks in 1_usize..14, rows in 1_usize..70, pick in 0_usize..70, threads in 1_usize..4,
        seed: u64,
    ) {
        let (mut numbers, k, pick) = (Numbers(seed), 32 * blocks, pick % rows);
        let published = Published::new(&mut numbers, n, k, SCALES[3]);
        let x = to_bf16_values(&numbers.odd_vec(rows * k, true));
        for compute in [Compute::Bf16, Compute::Bf16Pairs] {
            let mut alone = vec![0.0; n];
            let row = &x[pick * k..(pick + 1) * k];
            linear(&cpu(1, Isa::Portable), &published.pack_as_bf16(), row, compute, &mut alone);
            for isa in Isa::available() {
                let mut all = vec![0.0; rows * n];
                linear(&cpu(threads, isa), &published.pack(), &x, compute, &mut all);
                assert_same(&all[pick * n..(pick + 1) * n], &alone, "row in its batch");
            }
        }
    }
}
