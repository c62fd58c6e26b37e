//! Linears against the canonical order written out, to the bit.

mod common;

use common::{Numbers, assert_same, bf16_bits, cpu, cpus, to_bf16_values};
use muster_kernels::{Isa, Matrix, linear};
use proptest::prelude::*;

/// The same weight, whose values are bf16 values, in both element types.
fn packed(n: usize, k: usize, w: &[f32]) -> [Matrix; 2] {
    [Matrix::pack_bf16(n, k, &bf16_bits(w)), Matrix::pack_f32(n, k, w)]
        .map(|matrix| matrix.expect("the shape fits"))
}

const SHAPES: [(usize, usize); 9] =
    [(1, 1), (16, 32), (17, 33), (48, 64), (40, 95), (100, 257), (64, 288), (33, 600), (80, 31)];

#[test]
fn every_instruction_set_follows_the_canonical_order_for_any_rows() {
    let mut numbers = Numbers(1);
    let sizes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17, 31, 63, 64, 65, 66, 67, 96, 129, 130];
    for (n, k) in SHAPES {
        let w = to_bf16_values(&numbers.vec(n * k));
        let x = numbers.vec(130 * k);
        let want = common::linear(&x, &w, k);
        for (cpu, matrix) in cpus().iter().flat_map(|cpu| packed(n, k, &w).map(|matrix| (cpu, matrix))) {
            for rows in sizes {
                let mut out = vec![f32::NAN; rows * n];
                linear(cpu, &matrix, &x[..rows * k], &mut out);
                assert_same(&out, &want[..rows * n], &format!("{} {matrix:?} {rows} rows", cpu.isa()));
            }
        }
    }
}

#[test]
fn zeros_subnormals_huge_numbers_and_infinities_follow_it_too() {
    let mut numbers = Numbers(2);
    let (mut subnormal, mut infinite, mut nan) = (0, 0, 0);
    for ends in [false, true] {
        for (n, k) in SHAPES {
            let w = to_bf16_values(&numbers.odd_vec(n * k, ends));
            let mut x = numbers.odd_vec(9 * k, ends);
            // A row small enough that its sums are subnormal.
            x[..k].iter_mut().for_each(|v| *v = v.clamp(-1e-20, 1e-20) * 1e-19);
            let want = common::linear(&x, &w, k);
            subnormal += want.iter().filter(|v| v.is_subnormal()).count();
            infinite += want.iter().filter(|v| v.is_infinite()).count();
            nan += want.iter().filter(|v| v.is_nan()).count();
            for (cpu, matrix) in cpus().iter().flat_map(|cpu| packed(n, k, &w).map(|matrix| (cpu, matrix))) {
                let mut out = vec![0.0; 9 * n];
                linear(cpu, &matrix, &x, &mut out);
                assert_same(&out, &want, &format!("{} {matrix:?}", cpu.isa()));
            }
        }
    }
    assert!(subnormal > 0 && infinite > 0 && nan > 0, "{subnormal} {infinite} {nan}: the inputs miss a case");
}

#[test]
fn threads_do_not_show() {
    let mut numbers = Numbers(3);
    let (n, k) = (330, 545);
    let w = to_bf16_values(&numbers.vec(n * k));
    let x = numbers.vec(150 * k);
    for matrix in packed(n, k, &w) {
        for rows in [2, 5, 150] {
            let mut want = vec![0.0; rows * n];
            linear(&cpu(1, Isa::detect()), &matrix, &x[..rows * k], &mut want);
            for threads in [2, 4] {
                let mut out = vec![f32::NAN; rows * n];
                linear(&cpu(threads, Isa::detect()), &matrix, &x[..rows * k], &mut out);
                assert_same(&out, &want, &format!("{threads} threads, {rows} rows"));
            }
        }
    }
}

#[test]
fn no_rows_are_no_work() {
    let matrix = Matrix::pack_f32(3, 2, &[1.0; 6]).unwrap();
    linear(&cpu(2, Isa::Portable), &matrix, &[], &mut []);
}

#[test]
#[should_panic(expected = "x: its length must be a multiple of k = 2")]
fn a_torn_row_is_refused() {
    let matrix = Matrix::pack_f32(3, 2, &[1.0; 6]).unwrap();
    linear(&cpu(1, Isa::Portable), &matrix, &[1.0; 3], &mut [0.0; 3]);
}

#[test]
#[should_panic(expected = "out: its length must be rows * n = 2 * 3")]
fn a_short_output_is_refused() {
    let matrix = Matrix::pack_f32(3, 2, &[1.0; 6]).unwrap();
    linear(&cpu(1, Isa::Portable), &matrix, &[1.0; 4], &mut [0.0; 5]);
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
        let x = numbers.odd_vec(rows * k, false);
        let pick = pick % rows;
        for matrix in packed(n, k, &w) {
            let mut alone = vec![0.0; n];
            linear(&cpu(1, Isa::Portable), &matrix, &x[pick * k..(pick + 1) * k], &mut alone);
            for isa in Isa::available() {
                let mut all = vec![0.0; rows * n];
                linear(&cpu(threads, isa), &matrix, &x, &mut all);
                assert_same(&all[pick * n..(pick + 1) * n], &alone, "row in its batch");
            }
        }
    }
}
