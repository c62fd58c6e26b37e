//! Grouped experts against one expert and one row at a time, written out, to the bit.

mod common;

use common::{Numbers, PRECISIONS, assert_same, bf16_bits, cpu, cpus, to_bf16_values};
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
            Precision::Bf16 | Precision::Bf16Pairs => {
                Matrix::pack_bf16(n, k, &bf16_bits(w)).expect("the shape fits")
            }
        };
        let [g, u] = [&gate, &up].map(|w| pack(intermediate, hidden, w));
        let expert = Expert::new(g, u, pack(hidden, intermediate, &down)).expect("the shapes fit");
        Self { expert, gate, up, down }
    }

    fn apply(&self, x: &[f32], precision: Precision) -> Vec<f32> {
        let gate = common::linear(x, &self.gate, x.len(), precision);
        let up = common::linear(x, &self.up, x.len(), precision);
        let mut between: Vec<f32> = gate.iter().zip(up).map(|(&g, u)| math::silu(g) * u).collect();
        if precision.rounds() {
            between = to_bf16_values(&between);
        }
        common::linear(&between, &self.down, between.len(), precision)
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
        for precision in PRECISIONS {
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

/// Where the activation or its factors are subnormal, flushed or infinite, nothing is left to compare with but the
/// instruction sets themselves.
#[test]
fn instruction_sets_agree_on_extreme_inputs() {
    let mut numbers = Numbers(13);
    let (hidden, intermediate, rows) = (40, 45, 70);
    for precision in PRECISIONS {
        let known = Known::new(&mut numbers, hidden, intermediate, precision);
        let mut x = numbers.odd_vec(rows * hidden, false);
        for (row, x) in x.chunks_mut(hidden).enumerate() {
            let scale = [1e-38, 1e-30, 1e-19, 1.0, 20.0, 60.0, 4e18][row % 7];
            x.iter_mut().for_each(|v| *v = v.clamp(-2.0, 2.0) * scale);
            x[0] = if row % 9 == 8 { f32::INFINITY } else { x[0] };
        }
        let x = to_bf16_values(&x);
        let all: Vec<u32> = (0..rows as u32).collect();
        let groups = [ExpertRows { expert: &known.expert, rows: &all }];
        let mut outs: Vec<Vec<f32>> = Vec::new();
        for cpu in cpus() {
            let mut out = vec![f32::NAN; rows * hidden];
            grouped_ffn(&cpu, &groups, &x, precision, &mut FfnScratch::default(), &mut out);
            assert_same(&out, outs.first().unwrap_or(&out), &format!("{} {precision:?}", cpu.isa()));
            outs.push(out);
        }
        let count = |is: fn(&f32) -> bool| outs[0].iter().filter(|v| is(v)).count();
        let (zero, infinite, nan) = (count(|v| *v == 0.0), count(|v| v.is_infinite()), count(|v| v.is_nan()));
        assert!(
            zero > 0 && infinite > 0 && nan > 0,
            "{precision:?} {zero} {infinite} {nan}: inputs miss a case"
        );
    }
}

#[test]
fn experts_of_both_types_in_one_call_keep_their_orders() {
    let mut numbers = Numbers(14);
    let hidden = 50;
    let f32 = Known::new(&mut numbers, hidden, 30, Precision::F32);
    let bf16 = Known::new(&mut numbers, hidden, 70, Precision::Bf16);
    let x = to_bf16_values(&numbers.vec(20 * hidden));
    let rows: Vec<u32> = (0..20).collect();
    let order = [(&bf16, 5), (&f32, 20), (&bf16, 20), (&f32, 1)];
    let groups: Vec<_> =
        order.iter().map(|(known, n)| ExpertRows { expert: &known.expert, rows: &rows[..*n] }).collect();
    let mut want = Vec::new();
    for (known, n) in order {
        for x in x.chunks(hidden).take(n) {
            // Rounded either way, but only bf16 weights are added in the order of pairs.
            let pairs = std::ptr::eq(known, &bf16);
            want.extend(known.apply(x, if pairs { Precision::Bf16Pairs } else { Precision::Bf16 }));
        }
    }
    for cpu in cpus() {
        let mut out = vec![f32::NAN; want.len()];
        grouped_ffn(&cpu, &groups, &x, Precision::Bf16Pairs, &mut FfnScratch::default(), &mut out);
        assert_same(&out, &want, &cpu.isa().to_string());
    }
}

#[test]
fn threads_do_not_show() {
    let mut numbers = Numbers(12);
    let (hidden, intermediate) = (256, 300);
    for precision in PRECISIONS {
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
