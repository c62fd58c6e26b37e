//! Quantised weights against their rules written out, to the bit, and against the original weights.

mod common;

use common::{CLAMPED, Numbers, assert_same, cpu, cpus, gated};
use muster_kernels::{
    Biases, Expert, ExpertRows, FfnScratch, Isa, KernelError, Matrix, grouped_ffn, linear, to_bf16,
};
use muster_types::{Compute, Gating, Packing};
use proptest::prelude::*;

const KINDS: [Packing; 2] = [Packing::Q8, Packing::Q4];
const SHAPES: [(usize, usize); 10] =
    [(1, 1), (16, 32), (17, 33), (48, 64), (40, 95), (100, 257), (64, 288), (33, 600), (80, 31), (7, 1024)];

/// A stored group: its scale and small integers.
#[derive(Clone)]
struct Group {
    scale: f32,
    values: Vec<i32>,
}

fn to_bf16_value(v: f32) -> f32 {
    let mut bits = [0];
    to_bf16(&[v], &mut bits);
    f32::from_bits(u32::from(bits[0]) << 16)
}

fn divided(w: &[f32], scale: f32, least: f32, most: f32) -> Vec<i32> {
    let value = |v: f32| (v / scale).clamp(least, most).round_ties_even() as i32;
    w.iter().map(|&v| if scale == 0.0 { 0 } else { value(v) }).collect()
}

fn q8(w: &[f32]) -> Group {
    let largest = w.iter().fold(0.0_f32, |largest, v| largest.max(v.abs()));
    let scale = to_bf16_value(largest / 127.0);
    Group { scale, values: divided(w, scale, -127.0, 127.0) }
}

fn q4(w: &[f32]) -> Group {
    let mut extreme = 0.0_f32;
    for &v in w {
        if v.abs() > extreme.abs() {
            extreme = v;
        }
    }
    let unit = if extreme == 0.0 { 1.0 } else { extreme };
    let (mut best, mut least) = (0.0, 0.0);
    for step in 0..9 {
        let level = -(7.0 + step as f32 / 4.0);
        let (mut along, mut square) = (0.0_f32, 0.0_f32);
        for v in w {
            let rounded = (v / unit * level).clamp(-8.0, 7.0).round_ties_even();
            along = (v / unit).mul_add(rounded, along);
            square = rounded.mul_add(rounded, square);
        }
        let scale = to_bf16_value(along / if square == 0.0 { 1.0 } else { square } * unit);
        let relative = scale / unit;
        let error = relative * (relative * square - (along + along));
        if error < least {
            (best, least) = (scale, error);
        }
    }
    Group { scale: best, values: divided(w, best, -8.0, 7.0) }
}

fn groups(kind: Packing, w: &[f32]) -> Vec<Group> {
    let group = |w: &[f32]| match kind {
        Packing::Q8 => q8(w),
        _ => q4(w),
    };
    w.chunks(32).map(group).collect()
}

/// The input's groups: like those of q8 weights, but with the scale in f32.
fn inputs(x: &[f32]) -> Vec<Group> {
    let group = |x: &[f32]| {
        let largest = x.iter().fold(0.0_f32, |largest, v| largest.max(v.abs()));
        let finite = x.iter().all(|v| v.is_finite());
        let scale = if finite { largest / 127.0 } else { f32::NAN };
        Group { scale, values: divided(x, if finite { scale } else { 1.0 }, -127.0, 127.0) }
    };
    x.chunks(32).map(group).collect()
}

fn dot(x: &[Group], w: &[Group]) -> f32 {
    x.iter().zip(w).fold(0.0, |total: f32, (x, w)| {
        let sum: i32 = x.values.iter().zip(&w.values).map(|(x, w)| x * w).sum();
        (sum as f32).mul_add(w.scale * x.scale, total)
    })
}

/// A weight's rows in groups.
fn rows(kind: Packing, w: &[f32], k: usize) -> Vec<Vec<Group>> {
    w.chunks(k).map(|row| groups(kind, row)).collect()
}

fn want(x: &[f32], w: &[Vec<Group>], k: usize) -> Vec<f32> {
    x.chunks(k)
        .flat_map(|x| {
            let x = inputs(x);
            w.iter().map(move |w| dot(&x, w)).collect::<Vec<_>>()
        })
        .collect()
}

/// Weights with groups of zeros, of one value, of tiny and of huge ones among plain ones.
fn odd_weights(numbers: &mut Numbers, len: usize) -> Vec<f32> {
    let mut w = numbers.vec(len);
    for chunk in w.chunks_mut(16) {
        let factor = match numbers.below(12) {
            0 => 0.0,
            1 => 1e-39,
            2 => 1e-42,
            3 => 1e30,
            4 => f32::MAX,
            5 => {
                chunk.fill(0.25);
                1.0
            }
            _ => 1.0,
        };
        chunk.iter_mut().for_each(|v| *v *= factor);
    }
    w
}

#[test]
fn weights_come_back_as_the_rules_have_them() {
    let mut numbers = Numbers(21);
    for kind in KINDS {
        for (n, k) in SHAPES {
            let w = odd_weights(&mut numbers, n * k);
            let matrix = Matrix::round_f32(kind, n, k, &w).unwrap();
            let mut row = vec![f32::NAN; k];
            for (index, w) in rows(kind, &w, k).iter().enumerate() {
                matrix.row(index, &mut row);
                let want: Vec<f32> =
                    w.iter().flat_map(|g| g.values.iter().map(|&v| g.scale * v as f32)).collect();
                // Zero times a negative scale is zero all the same.
                let unsigned = |v: &[f32]| v.iter().map(|v| v + 0.0).collect::<Vec<_>>();
                assert_same(&unsigned(&row), &unsigned(&want), &format!("{matrix:?} row {index}"));
            }
            let (bytes, padded) = (matrix.bytes(), n.next_multiple_of(16) * k.next_multiple_of(64));
            let per_group = if kind == Packing::Q8 { 34 } else { 18 };
            assert_eq!(bytes, padded / 32 * per_group);
        }
    }
}

#[test]
fn linears_follow_the_fixed_order_on_every_instruction_set_for_any_rows() {
    let mut numbers = Numbers(22);
    for kind in KINDS {
        for (n, k) in SHAPES {
            let w = numbers.vec(n * k);
            let x = numbers.vec(40 * k);
            let matrix = Matrix::round_f32(kind, n, k, &w).unwrap();
            let want = want(&x, &rows(kind, &w, k), k);
            for cpu in cpus() {
                for rows in 1..=40 {
                    let mut out = vec![f32::NAN; rows * n];
                    linear(&cpu, &matrix, &x[..rows * k], Compute::F32, &mut out);
                    assert_same(&out, &want[..rows * n], &format!("{} {matrix:?} {rows} rows", cpu.isa()));
                }
            }
        }
    }
}

#[test]
fn zeros_subnormals_huge_numbers_and_infinities_follow_it_too() {
    let mut numbers = Numbers(23);
    let (mut zero, mut subnormal, mut infinite, mut nan) = (0, 0, 0, 0);
    for kind in KINDS {
        for ends in [false, true] {
            for (n, k) in SHAPES {
                let w = odd_weights(&mut numbers, n * k);
                let mut x = numbers.odd_vec(12 * k, ends);
                // Rows of tiny values, of zeros, and of the greatest magnitudes.
                x[..k].iter_mut().for_each(|v| *v = v.clamp(-1e-20, 1e-20) * 1e-19);
                x[k..2 * k].fill(0.0);
                x[2 * k..3 * k].iter_mut().for_each(|v| *v = 1.0_f32.copysign(*v));
                let want = want(&x, &rows(kind, &w, k), k);
                zero += want.iter().filter(|v| **v == 0.0).count();
                subnormal += want.iter().filter(|v| v.is_subnormal()).count();
                infinite += want.iter().filter(|v| v.is_infinite()).count();
                nan += want.iter().filter(|v| v.is_nan()).count();
                let matrix = Matrix::round_f32(kind, n, k, &w).unwrap();
                for cpu in cpus() {
                    let mut out = vec![0.0; 12 * n];
                    linear(&cpu, &matrix, &x, Compute::F32, &mut out);
                    assert_same(&out, &want, &format!("{} {matrix:?}", cpu.isa()));
                }
            }
        }
    }
    assert!(zero > 0 && subnormal > 0 && infinite > 0 && nan > 0, "{zero} {subnormal} {infinite} {nan}");
}

#[test]
fn extreme_sums_within_a_group_are_exact() {
    for kind in KINDS {
        for signs in [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]] {
            let (w, x) = (vec![signs[0]; 16 * 64], vec![signs[1]; 3 * 64]);
            let matrix = Matrix::round_f32(kind, 16, 64, &w).unwrap();
            let want = want(&x, &rows(kind, &w, 64), 64);
            assert!((want[0] - 64.0 * signs[0] * signs[1]).abs() < 0.3, "{}", want[0]);
            for cpu in cpus() {
                let mut out = vec![0.0; 3 * 16];
                linear(&cpu, &matrix, &x, Compute::F32, &mut out);
                assert_same(&out, &want, &format!("{} {matrix:?}", cpu.isa()));
            }
        }
    }
}

#[test]
fn rounding_is_within_its_bounds() {
    let mut numbers = Numbers(24);
    let (n, k) = (64, 512);
    // Sums of four numbers are distributed more like weights than single numbers are.
    let w: Vec<f32> = (0..n * k).map(|_| (0..4).map(|_| numbers.f32()).sum::<f32>() / 50.0).collect();
    // Relative root mean square errors; measured: 0.0051 and 0.0773.
    for (kind, most) in [(Packing::Q8, 0.0055), (Packing::Q4, 0.082)] {
        let matrix = Matrix::round_f32(kind, n, k, &w).unwrap();
        let mut row = vec![0.0; k];
        let (mut error, mut square) = (0.0, 0.0);
        for (index, w) in w.chunks(k).enumerate() {
            matrix.row(index, &mut row);
            for (group, w) in row.chunks(32).zip(w.chunks(32)) {
                let largest = w.iter().fold(0.0_f32, |largest, v| largest.max(v.abs()));
                // Half a step, and what the scale's own rounding cuts off at the ends; clipping may cost a whole one.
                let step = if kind == Packing::Q8 { 0.76 / 127.0 } else { 1.5 / 7.0 };
                for (found, w) in group.iter().zip(w) {
                    assert!((found - w).abs() <= step * largest, "{found} for {w} among {largest}");
                    error += f64::from(found - w).powi(2);
                    square += f64::from(*w).powi(2);
                }
            }
        }
        let relative = (error / square).sqrt();
        println!("{kind:?}: {relative:.4}");
        assert!(relative < most && relative > most / 2.0, "{kind:?}: {relative}");
    }
}

#[test]
fn bf16_weights_are_quantised_as_the_numbers_they_are() {
    let mut numbers = Numbers(25);
    let (n, k) = (20, 70);
    let w = common::to_bf16_values(&numbers.vec(n * k));
    for kind in KINDS {
        let wide = Matrix::round_f32(kind, n, k, &w).unwrap();
        let narrow = Matrix::round_bf16(kind, n, k, &common::bf16_bits(&w)).unwrap();
        let (mut a, mut b) = (vec![0.0; k], vec![1.0; k]);
        for row in 0..n {
            wide.row(row, &mut a);
            narrow.row(row, &mut b);
            assert_same(&a, &b, "row");
        }
    }
}

#[test]
fn weights_that_cannot_be_quantised_are_refused() {
    for kind in KINDS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut w = [1.0; 3 * 40];
            w[2 * 40 + 39] = bad;
            let refused = Matrix::round_f32(kind, 3, 40, &w).unwrap_err();
            assert!(matches!(refused, KernelError::NonFinite { n: 2 }), "{refused}");
        }
        assert!(matches!(Matrix::round_f32(kind, 0, 4, &[]), Err(KernelError::Size { field: "n", .. })));
        assert!(matches!(Matrix::round_bf16(kind, 2, 3, &[0; 5]), Err(KernelError::Elements { .. })));
    }
}

/// An expert and its weights in groups.
struct Known {
    expert: Expert,
    matrices: [Vec<Vec<Group>>; 3],
}

impl Known {
    fn new(numbers: &mut Numbers, kind: Packing, hidden: usize, intermediate: usize) -> Self {
        let shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)];
        let weights = shapes.map(|(n, k)| (n, k, numbers.vec(n * k)));
        let [gate, up, down] = [0, 1, 2].map(|i| {
            Matrix::round_f32(kind, weights[i].0, weights[i].1, &weights[i].2).expect("the shape fits")
        });
        let matrices = weights.map(|(_, k, w)| rows(kind, &w, k));
        Self { expert: Expert::new(gate, up, down).expect("the shapes fit"), matrices }
    }

    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let linear = |x: &[f32], w: &[Vec<Group>], bias: fn(&Biases) -> &[f32]| {
            let out = want(x, w, x.len());
            match self.expert.biases() {
                Some(biases) => out.iter().zip(bias(biases)).map(|(out, bias)| out + bias).collect(),
                None => out,
            }
        };
        let gate = linear(x, &self.matrices[0], |biases| &biases.gate);
        let up = linear(x, &self.matrices[1], |biases| &biases.up);
        let gating = self.expert.gating();
        let between: Vec<f32> = gate.iter().zip(up).map(|(&g, u)| gated(gating, g, u)).collect();
        linear(&between, &self.matrices[2], |biases| &biases.down)
    }

    fn with(self, gating: Gating, biases: Option<Biases>) -> Self {
        Self { expert: self.expert.with(gating, biases).expect("they fit"), ..self }
    }
}

#[test]
fn experts_of_any_rows_match_single_rows_on_every_instruction_set() {
    let mut numbers = Numbers(26);
    let mut scratch = FfnScratch::default();
    for kind in KINDS {
        for (hidden, widths) in [(64, [32, 32, 32]), (70, [48, 17, 130]), (33, [1, 300, 16])] {
            let styles = [(Gating::Silu, false), (CLAMPED, true), (CLAMPED, false)];
            let known: Vec<_> = std::iter::zip(widths, styles)
                .map(|(width, (gating, biased))| {
                    let biases = biased.then(|| common::biases(&mut numbers, hidden, width));
                    Known::new(&mut numbers, kind, hidden, width).with(gating, biases)
                })
                .collect();
            let x = numbers.vec(90 * hidden);
            let groups = [
                (&known[0], vec![5]),
                (&known[1], vec![]),
                (&known[2], (0..90).rev().collect()),
                (&known[1], vec![1, 3, 3, 89]),
                (&known[0], vec![0, 2, 5]),
            ];
            let row = |row: u32| &x[row as usize * hidden..(row as usize + 1) * hidden];
            let want: Vec<f32> = groups
                .iter()
                .flat_map(|(known, rows)| rows.iter().flat_map(|&r| known.apply(row(r))).collect::<Vec<_>>())
                .collect();
            let asked: Vec<_> =
                groups.iter().map(|(known, rows)| ExpertRows { expert: &known.expert, rows }).collect();
            for cpu in cpus() {
                // Nothing is rounded to bf16 within, so the compute does not matter.
                for compute in [Compute::F32, Compute::Bf16] {
                    let mut out = vec![f32::NAN; want.len()];
                    grouped_ffn(&cpu, &asked, &x, compute, &mut scratch, &mut out);
                    assert_same(&out, &want, &format!("{} {kind:?} hidden {hidden}", cpu.isa()));
                }
            }
        }
    }
}

#[test]
fn threads_do_not_show() {
    let mut numbers = Numbers(27);
    let (hidden, intermediate) = (256, 300);
    for kind in KINDS {
        let known: Vec<_> = (0..4).map(|_| Known::new(&mut numbers, kind, hidden, intermediate)).collect();
        let x = numbers.vec(80 * hidden);
        for rows in [1, 3, 80] {
            let rows: Vec<u32> = (0..rows).collect();
            let groups: Vec<_> =
                known.iter().map(|known| ExpertRows { expert: &known.expert, rows: &rows }).collect();
            let [alone, two, four] = [1, 2, 4].map(|threads| {
                let mut out = vec![f32::NAN; groups.len() * rows.len() * hidden];
                let cpu = cpu(threads, Isa::detect());
                grouped_ffn(&cpu, &groups, &x, Compute::Bf16, &mut FfnScratch::default(), &mut out);
                out
            });
            assert_same(&two, &alone, "two threads");
            assert_same(&four, &alone, "four threads");
        }
    }
}

#[test]
fn experts_are_quantised_whole_and_alike() {
    let plain = |n, k| Matrix::pack_f32(n, k, &vec![0.0; n * k]).unwrap();
    let few = |kind, n, k| Matrix::round_f32(kind, n, k, &vec![0.0; n * k]).unwrap();
    let [q8, q4] = KINDS;
    let refused = [
        Expert::new(few(q8, 2, 3), few(q4, 2, 3), few(q8, 3, 2)),
        Expert::new(few(q8, 2, 3), few(q8, 2, 3), few(q4, 3, 2)),
        Expert::new(few(q8, 2, 3), few(q8, 2, 3), plain(3, 2)),
        Expert::new(plain(2, 3), plain(2, 3), few(q4, 3, 2)),
        Expert::new(plain(2, 3), few(q4, 2, 3), plain(3, 2)),
    ];
    for refused in refused {
        assert!(matches!(refused, Err(KernelError::ExpertTypes)));
    }
    assert!(Expert::new(few(q4, 2, 3), few(q4, 2, 3), few(q4, 3, 2)).is_ok());
}

#[test]
fn calls_mix_kinds_and_each_expert_keeps_its_bits() {
    let mut numbers = Numbers(17);
    let mut matrix = |packing, n: usize, k: usize| {
        Matrix::round_f32(packing, n, k, &numbers.vec(n * k)).expect("the shape fits")
    };
    let (hidden, x) = (40, (0..9 * 40).map(|at| (at as f32 * 0.7).sin()).collect::<Vec<f32>>());
    let kinds = [Packing::Q8, Packing::Bf16, Packing::Q4, Packing::F32, Packing::Q4, Packing::Bf16];
    let experts: Vec<Expert> = kinds
        .into_iter()
        .zip([33, 64, 20, 20, 20, 7])
        .map(|(kind, width)| {
            let down = matrix(kind, hidden, width);
            Expert::new(matrix(kind, width, hidden), matrix(kind, width, hidden), down).expect("it fits")
        })
        .collect();
    let rows: [&[u32]; 6] = [&[0, 3], &[8, 1, 2], &[4], &[], &[5, 0, 7], &[6]];
    let groups: Vec<_> = experts.iter().zip(rows).map(|(expert, rows)| ExpertRows { expert, rows }).collect();
    let total: usize = rows.iter().map(|rows| rows.len()).sum();
    for isa in Isa::available() {
        for compute in [Compute::F32, Compute::Bf16, Compute::Bf16Pairs] {
            let (cpu, mut scratch) = (cpu(2, isa), FfnScratch::default());
            let x = if compute.rounds() { common::to_bf16_values(&x) } else { x.clone() };
            let mut all = vec![f32::NAN; total * hidden];
            grouped_ffn(&cpu, &groups, &x, compute, &mut scratch, &mut all);
            let mut apart = Vec::new();
            for group in &groups {
                let mut alone = vec![f32::NAN; group.rows.len() * hidden];
                grouped_ffn(&cpu, std::slice::from_ref(group), &x, compute, &mut scratch, &mut alone);
                apart.extend(alone);
            }
            assert_same(&all, &apart, &format!("{isa} {compute}"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// A row in a batch is the row alone, whatever the shape, the instruction set and the threads.
    #[test]
    fn a_row_is_itself_in_any_batch(
        n in 1_usize..70, k in 1_usize..400, rows in 1_usize..70, pick in 0_usize..70, threads in 1_usize..4, seed: u64,
    ) {
        let mut numbers = Numbers(seed);
        let w = odd_weights(&mut numbers, n * k);
        let x = numbers.odd_vec(rows * k, true);
        let pick = pick % rows;
        for kind in KINDS {
            let matrix = Matrix::round_f32(kind, n, k, &w).unwrap();
            let mut alone = vec![0.0; n];
            linear(&cpu(1, Isa::Portable), &matrix, &x[pick * k..(pick + 1) * k], Compute::F32, &mut alone);
            for isa in Isa::available() {
                let mut all = vec![0.0; rows * n];
                linear(&cpu(threads, isa), &matrix, &x, Compute::F32, &mut all);
                assert_same(&all[pick * n..(pick + 1) * n], &alone, "row in its batch");
            }
        }
    }
}
