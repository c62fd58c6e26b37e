//! Linears against their orders written out, to the bit.

mod common;

use common::{Numbers, assert_same, bf16_bits, cpu, cpus, to_bf16_values};
use muster_kernels::{Isa, Matrix, linear};
use muster_types::Compute;
use proptest::prelude::*;

/// A weight of bf16 values in every element type and compute that it is used with, and the order that results.
fn packed(n: usize, k: usize, w: &[f32]) -> Vec<(Matrix, Compute, Compute)> {
    let bf16 = || Matrix::pack_bf16(n, k, &bf16_bits(w)).expect("the shape fits");
    let f32 = || Matrix::pack_f32(n, k, w).expect("the shape fits");
    vec![
        (bf16(), Compute::F32, Compute::F32),
        (bf16(), Compute::Bf16, Compute::Bf16),
        (bf16(), Compute::Bf16Pairs, Compute::Bf16Pairs),
        (f32(), Compute::F32, Compute::F32),
        (f32(), Compute::Bf16Pairs, Compute::Bf16),
    ]
}

/// Inputs rounded for `compute`.
fn rounded(x: &[f32], compute: Compute) -> Vec<f32> {
    if compute.rounds() { to_bf16_values(x) } else { x.to_vec() }
}

const SHAPES: [(usize, usize); 9] =
    [(1, 1), (16, 32), (17, 33), (48, 64), (40, 95), (100, 257), (64, 288), (33, 600), (80, 31)];

#[test]
fn every_instruction_set_follows_the_order_for_any_rows() {
    let mut numbers = Numbers(1);
    let sizes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 66, 67, 96, 129, 130];
    for (n, k) in SHAPES {
        let w = to_bf16_values(&numbers.vec(n * k));
        let plain = numbers.vec(130 * k);
        for (matrix, compute, order) in packed(n, k, &w) {
            let x = rounded(&plain, compute);
            let want = common::linear(&x, &w, k, order);
            for cpu in cpus() {
                for rows in sizes {
                    let mut out = vec![f32::NAN; rows * n];
                    linear(&cpu, &matrix, &x[..rows * k], compute, &mut out);
                    let what = format!("{} {matrix:?} {compute:?} {rows} rows", cpu.isa());
                    assert_same(&out, &want[..rows * n], &what);
                }
            }
        }
    }
}

#[test]
fn zeros_huge_numbers_and_infinities_follow_it_and_subnormals_are_flushed() {
    let mut numbers = Numbers(2);
    let (mut flushed, mut infinite, mut nan) = (0, 0, 0);
    for ends in [false, true] {
        for (n, k) in SHAPES {
            let w = to_bf16_values(&numbers.odd_vec(n * k, ends));
            let mut x = numbers.odd_vec(9 * k, ends);
            // Rows so small that products, sums within a block or totals are subnormal.
            x[..k].iter_mut().for_each(|v| *v = v.clamp(-1e-20, 1e-20) * 1e-19);
            x[k..2 * k].iter_mut().for_each(|v| *v = v.clamp(-1.0, 1.0) * 1e-37);
            let x = to_bf16_values(&x);
            let want = common::linear(&x, &w, k, Compute::Bf16);
            let exact = |i: usize| -> f64 {
                let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
                x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
            };
            flushed += (0..2 * n).filter(|&i| want[i] == 0.0 && exact(i).abs() > 1e-44).count();
            infinite += want.iter().filter(|v| v.is_infinite()).count();
            nan += want.iter().filter(|v| v.is_nan()).count();
            assert!(!want.iter().any(|v| v.is_subnormal()));
            for (matrix, compute, order) in packed(n, k, &w) {
                let want = common::linear(&x, &w, k, order);
                for cpu in cpus() {
                    let mut out = vec![0.0; 9 * n];
                    linear(&cpu, &matrix, &x, compute, &mut out);
                    assert_same(&out, &want, &format!("{} {matrix:?} {compute:?}", cpu.isa()));
                }
            }
        }
    }
    assert!(flushed > 0 && infinite > 0 && nan > 0, "{flushed} {infinite} {nan}: the inputs miss a case");
}

/// One case per step that can meet a subnormal number: `x`, `w` (32 features) and the output's bits.
#[test]
fn each_step_flushes() {
    let least = f32::MIN_POSITIVE;
    let tiny = f32::from_bits(0x0040_0000);
    let cases: [(&str, &[f32], &[f32], f32); 9] = [
        ("subnormal activation", &[tiny], &[4.0], 0.0),
        ("subnormal weight", &[4.0], &[-tiny], 0.0),
        ("product below the least normal number", &[least], &[0.5], 0.0),
        ("each product below, their sum above", &[least, 0.0, least], &[0.75, 0.0, 0.75], 0.0),
        ("sum of a block's halves below", &[least, least], &[1.5, -1.0], 0.0),
        ("kept at the least normal number", &[least, least], &[2.0, -1.0], least),
        ("running sum of the even products below", &[least, 0.0, least], &[1.5, 0.0, -1.0], 0.0),
        ("subnormal times infinity", &[tiny], &[f32::INFINITY], f32::NAN),
        ("subnormal beside infinity", &[tiny, f32::INFINITY], &[1.0, -2.0], f32::NEG_INFINITY),
    ];
    for (case, x, w, want) in cases {
        for cpu in cpus() {
            for (matrix, compute, order) in packed(1, w.len(), w) {
                let mut out = [f32::NAN];
                linear(&cpu, &matrix, x, compute, &mut out);
                let want = if order == Compute::Bf16Pairs { common::dot_pairs(x, w) } else { want };
                assert_same(&out, &[want], &format!("{case} {} {matrix:?} {compute:?}", cpu.isa()));
            }
        }
    }
    // Below the least normal number in 24 bits, although the nearest subnormal step would be that number itself.
    let (mut x, mut w) = ([0.0; 3], [0.0; 3]);
    (x[0], w[0]) = (least, 1.0);
    (x[2], w[2]) = (f32::from_bits(0x1a00_0000), -f32::from_bits(0x1a00_0000));
    assert_eq!(x[2] * 2.0_f32.powi(75), 1.0);
    for cpu in cpus() {
        for (matrix, compute, _) in packed(1, 3, &w) {
            let mut out = [f32::NAN];
            linear(&cpu, &matrix, &x, compute, &mut out);
            assert_same(&out, &[0.0], &format!("{} {matrix:?} {compute:?}", cpu.isa()));
        }
    }
    // And between whole blocks: 1.5 in the first and -1 in the second.
    let (mut x, mut w) = ([0.0; 40], [0.0; 40]);
    (x[0], w[0], x[33], w[33]) = (least, 1.5, least, -1.0);
    for cpu in cpus() {
        for (matrix, compute, _) in packed(1, 40, &w) {
            let mut out = [f32::NAN];
            linear(&cpu, &matrix, &x, compute, &mut out);
            assert_same(&out, &[0.0], &format!("{} {matrix:?} {compute:?}", cpu.isa()));
        }
    }
}

#[test]
fn threads_do_not_show() {
    let mut numbers = Numbers(3);
    let (n, k) = (330, 545);
    let w = to_bf16_values(&numbers.vec(n * k));
    let x = to_bf16_values(&numbers.vec(150 * k));
    for (matrix, compute, _) in packed(n, k, &w) {
        for rows in [2, 5, 150] {
            let mut want = vec![0.0; rows * n];
            linear(&cpu(1, Isa::detect()), &matrix, &x[..rows * k], compute, &mut want);
            for threads in [2, 4] {
                let mut out = vec![f32::NAN; rows * n];
                linear(&cpu(threads, Isa::detect()), &matrix, &x[..rows * k], compute, &mut out);
                assert_same(&out, &want, &format!("{compute:?}, {threads} threads, {rows} rows"));
            }
        }
    }
}

#[test]
fn no_rows_are_no_work() {
    let matrix = Matrix::pack_f32(3, 2, &[1.0; 6]).unwrap();
    linear(&cpu(2, Isa::Portable), &matrix, &[], Compute::F32, &mut []);
}

#[test]
#[should_panic(expected = "x: its length must be a multiple of k = 2")]
fn a_torn_row_is_refused() {
    let matrix = Matrix::pack_f32(3, 2, &[1.0; 6]).unwrap();
    linear(&cpu(1, Isa::Portable), &matrix, &[1.0; 3], Compute::F32, &mut [0.0; 3]);
}

#[test]
#[should_panic(expected = "out: its length must be rows * n = 2 * 3")]
fn a_short_output_is_refused() {
    let matrix = Matrix::pack_f32(3, 2, &[1.0; 6]).unwrap();
    linear(&cpu(1, Isa::Portable), &matrix, &[1.0; 4], Compute::F32, &mut [0.0; 5]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A row in a batch is the row alone, whatever the shape, the instruction set and the threads.
    #[test]
    fn a_row_is_itself_in_any_batch(
        n in 1_usize..70, k in 1_usize..400, rows in 1_usize..70, pick in 0_usize..70, threads in 1_usize..4, seed: u64,
    ) {
        let mut numbers = Numbers(seed);
        let w = to_bf16_values(&numbers.odd_vec(n * k, false));
        let x = to_bf16_values(&numbers.odd_vec(rows * k, false));
        let pick = pick % rows;
        for (matrix, compute, _) in packed(n, k, &w) {
            let mut alone = vec![0.0; n];
            linear(&cpu(1, Isa::Portable), &matrix, &x[pick * k..(pick + 1) * k], compute, &mut alone);
            for isa in Isa::available() {
                let mut all = vec![0.0; rows * n];
                linear(&cpu(threads, isa), &matrix, &x, compute, &mut all);
                assert_same(&all[pick * n..(pick + 1) * n], &alone, "row in its batch");
            }
        }
    }
}
