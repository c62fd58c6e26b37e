//! Grouped experts against one expert and one row at a time, written out, to the bit.

mod common;

use common::{Numbers, assert_same, bf16_bits, cpu, cpus, to_bf16_values};
use muster_kernels::{
    Expert, ExpertRows, FfnScratch, Isa, KernelError, Matrix, Precision, grouped_ffn, math,
};

/// An expert and its weights as they were.
struct Known {
    expert: Expert,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

impl Known {
    fn new(numbers: &mut Numbers, hidden: usize, intermediate: usize, precision: Precision) -> Self {
        let mut weight = || to_bf16_values(&numbers.vec(hidden * intermediate));
        let (gate, up, down) = (weight(), weight(), weight());
        let pack = |n, k, w: &[f32]| match precision {
            Precision::F32 => Matrix::pack_f32(n, k, w).expect("the shape fits"),
            Precision::Bf16 => Matrix::pack_bf16(n, k, &bf16_bits(w)).expect("the shape fits"),
        };
        let [g, u] = [&gate, &up].map(|w| pack(intermediate, hidden, w));
        let expert = Expert::new(g, u, pack(hidden, intermediate, &down)).expect("the shapes fit");
        Self { expert, gate, up, down }
    }

    fn apply(&self, x: &[f32], precision: Precision) -> Vec<f32> {
        let gate = common::linear(x, &self.gate, x.len());
        let up = common::linear(x, &self.up, x.len());
        let mut between: Vec<f32> = gate.iter().zip(up).map(|(&g, u)| math::silu(g) * u).collect();
        if precision == Precision::Bf16 {
            between = to_bf16_values(&between);
        }
        common::linear(&between, &self.down, between.len())
    }
}

fn want(groups: &[(&Known, Vec<u32>)], x: &[f32], hidden: usize, precision: Precision) -> Vec<f32> {
    let rows = groups.iter().flat_map(|(known, rows)| rows.iter().map(move |&row| (known, row as usize)));
    rows.flat_map(|(known, row)| known.apply(&x[row * hidden..(row + 1) * hidden], precision)).collect()
}

#[test]
fn groups_of_any_size_match_single_rows_on_every_instruction_set() {
    let mut numbers = Numbers(11);
    let mut scratch = FfnScratch::default();
    for (hidden, widths) in [(64, [32, 32, 32]), (70, [48, 17, 130]), (33, [1, 300, 16])] {
        for precision in [Precision::F32, Precision::Bf16] {
            let known = widths.map(|width| Known::new(&mut numbers, hidden, width, precision));
            let x = to_bf16_values(&numbers.vec(90 * hidden));
            let groups = [
                (&known[0], vec![5]),
                (&known[1], vec![]),
                (&known[2], (0..90).rev().collect()),
                (&known[1], vec![1, 3, 3, 89]),
                (&known[0], vec![0, 2, 5]),
            ];
            let want = want(&groups, &x, hidden, precision);
            let asked: Vec<_> =
                groups.iter().map(|(known, rows)| ExpertRows { expert: &known.expert, rows }).collect();
            for cpu in cpus() {
                let mut out = vec![f32::NAN; want.len()];
                grouped_ffn(&cpu, &asked, &x, precision, &mut scratch, &mut out);
                assert_same(&out, &want, &format!("{} hidden {hidden} {precision:?}", cpu.isa()));
            }
        }
    }
}

#[test]
fn threads_do_not_show() {
    let mut numbers = Numbers(12);
    let (hidden, intermediate) = (256, 300);
    for precision in [Precision::F32, Precision::Bf16] {
        let known: Vec<_> =
            (0..4).map(|_| Known::new(&mut numbers, hidden, intermediate, precision)).collect();
        let x = to_bf16_values(&numbers.vec(80 * hidden));
        for rows in [1, 3, 80] {
            let rows: Vec<u32> = (0..rows).collect();
            let groups: Vec<_> =
                known.iter().map(|known| ExpertRows { expert: &known.expert, rows: &rows }).collect();
            let [alone, two, four] = [1, 2, 4].map(|threads| {
                let mut out = vec![f32::NAN; groups.len() * rows.len() * hidden];
                let cpu = cpu(threads, Isa::detect());
                grouped_ffn(&cpu, &groups, &x, precision, &mut FfnScratch::default(), &mut out);
                out
            });
            assert_same(&two, &alone, "two threads");
            assert_same(&four, &alone, "four threads");
        }
    }
}

#[test]
fn sizes_are_reported_and_misfits_refused() {
    let matrix = |n, k| Matrix::pack_f32(n, k, &vec![0.0; n * k]).unwrap();
    let expert = Expert::new(matrix(32, 64), matrix(32, 64), matrix(64, 32)).unwrap();
    assert_eq!((expert.hidden(), expert.intermediate(), expert.bytes()), (64, 32, 3 * 64 * 32 * 4));
    let refused = Expert::new(matrix(32, 64), matrix(32, 64), matrix(32, 64)).unwrap_err().to_string();
    assert_eq!(refused, "expert's down is [32, 64], its gate asks for [64, 32]");
    let refused = Expert::new(matrix(32, 64), matrix(31, 64), matrix(64, 32)).unwrap_err().to_string();
    assert_eq!(refused, "expert's up is [31, 64], its gate asks for [32, 64]");
    let mixed = Expert::new(matrix(1, 1), Matrix::pack_bf16(1, 1, &[0]).unwrap(), matrix(1, 1));
    assert!(matches!(mixed, Err(KernelError::ExpertTypes)));
}

#[test]
#[should_panic(expected = "groups: row 2 is outside x, which has 2 rows")]
fn a_row_outside_is_refused() {
    let matrix = || Matrix::pack_f32(4, 4, &[0.0; 16]).unwrap();
    let expert = Expert::new(matrix(), matrix(), matrix()).unwrap();
    let groups = [ExpertRows { expert: &expert, rows: &[2] }];
    let cpu = cpu(1, Isa::Portable);
    grouped_ffn(&cpu, &groups, &[0.0; 8], Precision::F32, &mut FfnScratch::default(), &mut [0.0; 4]);
}
