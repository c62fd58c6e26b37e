//! Grouped experts against one expert and one row at a time, written out, to the bit.

mod common;

use common::{CLAMPED, MODES, Numbers, assert_same, bf16_bits, cpu, cpus, gated, to_bf16_values};
use muster_kernels::{Biases, Expert, ExpertRows, FfnScratch, Isa, KernelError, Matrix, grouped_ffn};
use muster_types::{Compute, Gating};

/// An expert and its weights before packing.
struct Known {
    expert: Expert,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

impl Known {
    fn new(numbers: &mut Numbers, hidden: usize, intermediate: usize, compute: Compute) -> Self {
        let mut weight = || to_bf16_values(&numbers.vec(hidden * intermediate));
        let (gate, up, down) = (weight(), weight(), weight());
        let pack = |n, k, w: &[f32]| match compute {
            Compute::F32 => Matrix::pack_f32(n, k, w).expect("the shape fits"),
            Compute::Bf16 | Compute::Bf16Pairs => {
                Matrix::pack_bf16(n, k, &bf16_bits(w)).expect("the shape fits")
            }
        };
        let [g, u] = [&gate, &up].map(|w| pack(intermediate, hidden, w));
        let expert = Expert::new(g, u, pack(hidden, intermediate, &down)).expect("the shapes fit");
        Self { expert, gate, up, down }
    }

    fn with(self, gating: Gating, biases: Option<Biases>) -> Self {
        Self { expert: self.expert.with(gating, biases).expect("they fit"), ..self }
    }

    fn apply(&self, x: &[f32], compute: Compute) -> Vec<f32> {
        let biased = |out: Vec<f32>, of: fn(&Biases) -> &[f32]| match self.expert.biases() {
            Some(biases) => common::biased(out, of(biases)),
            None => out,
        };
        let gate = biased(common::linear(x, &self.gate, x.len(), compute), |biases| &biases.gate);
        let up = biased(common::linear(x, &self.up, x.len(), compute), |biases| &biases.up);
        let pairs = gate.iter().zip(up);
        let mut between: Vec<f32> = pairs.map(|(&g, u)| gated(self.expert.gating(), g, u)).collect();
        if compute.rounds() {
            between = to_bf16_values(&between);
        }
        biased(common::linear(&between, &self.down, between.len(), compute), |biases| &biases.down)
    }
}

fn want(groups: &[(&Known, Vec<u32>)], x: &[f32], hidden: usize, compute: Compute) -> Vec<f32> {
    let rows = groups.iter().flat_map(|(known, rows)| rows.iter().map(move |&row| (known, row as usize)));
    rows.flat_map(|(known, row)| known.apply(&x[row * hidden..(row + 1) * hidden], compute)).collect()
}

#[test]
fn groups_of_any_size_match_single_rows_on_every_instruction_set() {
    let mut numbers = Numbers(11);
    let mut scratch = FfnScratch::default();
    for (hidden, widths) in [(64, [32, 32, 32]), (70, [48, 17, 130]), (33, [1, 300, 16])] {
        for compute in MODES {
            let known = widths.map(|width| Known::new(&mut numbers, hidden, width, compute));
            let x = to_bf16_values(&numbers.vec(90 * hidden));
            let groups = [
                (&known[0], vec![5]),
                (&known[1], vec![]),
                (&known[2], (0..90).rev().collect()),
                (&known[1], vec![1, 3, 3, 89]),
                (&known[0], vec![0, 2, 5]),
            ];
            let want = want(&groups, &x, hidden, compute);
            let asked: Vec<_> =
                groups.iter().map(|(known, rows)| ExpertRows { expert: &known.expert, rows }).collect();
            for cpu in cpus() {
                let mut out = vec![f32::NAN; want.len()];
                grouped_ffn(&cpu, &asked, &x, compute, &mut scratch, &mut out);
                assert_same(&out, &want, &format!("{} hidden {hidden} {compute:?}", cpu.isa()));
            }
        }
    }
}

/// Every activation with biases and without, side by side in one call.
#[test]
fn activations_and_biases_follow_their_order_on_every_instruction_set() {
    let mut numbers = Numbers(15);
    let mut scratch = FfnScratch::default();
    for (hidden, widths) in [(64, [32, 32, 32, 32]), (70, [48, 17, 131, 16]), (33, [1, 300, 16, 15])] {
        for compute in MODES {
            let styles = [(Gating::Silu, true), (CLAMPED, false), (CLAMPED, true), (Gating::Silu, false)];
            let known: Vec<_> = std::iter::zip(widths, styles)
                .map(|(width, (gating, biased))| {
                    let biases = biased.then(|| common::biases(&mut numbers, hidden, width));
                    Known::new(&mut numbers, hidden, width, compute).with(gating, biases)
                })
                .collect();
            let x = to_bf16_values(&numbers.vec(70 * hidden));
            let rows = [vec![5], (0..70).rev().collect(), vec![1, 3, 3, 69, 0, 7, 8, 9, 11], vec![0, 2, 5]];
            for shift in 0..known.len() {
                let groups: Vec<_> = (0..4).map(|i| (&known[(i + shift) % 4], rows[i].clone())).collect();
                let want = want(&groups, &x, hidden, compute);
                let asked: Vec<_> =
                    groups.iter().map(|(known, rows)| ExpertRows { expert: &known.expert, rows }).collect();
                for cpu in cpus().into_iter().chain([cpu(3, Isa::detect())]) {
                    let mut out = vec![f32::NAN; want.len()];
                    grouped_ffn(&cpu, &asked, &x, compute, &mut scratch, &mut out);
                    assert_same(&out, &want, &format!("{} hidden {hidden} {compute:?}", cpu.isa()));
                }
            }
        }
    }
}

/// The definition in f64, to check that the order written out above computes the right numbers.
#[test]
fn a_clamped_expert_with_biases_is_what_the_definition_says() {
    let mut numbers = Numbers(16);
    let (hidden, intermediate, alpha, limit) = (48, 40, 1.702_f32, 1.25_f32);
    let biases = common::biases(&mut numbers, hidden, intermediate);
    let known = Known::new(&mut numbers, hidden, intermediate, Compute::F32)
        .with(Gating::ClampedSwish { alpha, limit }, Some(biases.clone()));
    let x = numbers.vec(hidden);
    let linear = |w: &[f32], bias: &[f32], x: &[f64]| -> Vec<f64> {
        let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
        w.chunks(x.len()).zip(bias).map(|(w, bias)| dot(w) + f64::from(*bias)).collect()
    };
    let wide: Vec<f64> = x.iter().copied().map(f64::from).collect();
    let (alpha, limit) = (f64::from(alpha), f64::from(limit));
    let gate = linear(&known.gate, &biases.gate, &wide);
    let up = linear(&known.up, &biases.up, &wide);
    let (mut clamped, mut free) = (0, 0);
    let between: Vec<f64> = std::iter::zip(gate, up)
        .map(|(gate, up)| {
            if gate > limit || up.abs() > limit {
                clamped += 1;
            } else {
                free += 1;
            }
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            (up + 1.0) * gate / (1.0 + (-alpha * gate).exp())
        })
        .collect();
    assert!(clamped > 5 && free > 5, "{clamped} {free}");
    let want = linear(&known.down, &biases.down, &between);
    let groups = [ExpertRows { expert: &known.expert, rows: &[0] }];
    let mut out = vec![f32::NAN; hidden];
    let mut scratch = FfnScratch::default();
    grouped_ffn(&cpu(1, Isa::detect()), &groups, &x, Compute::F32, &mut scratch, &mut out);
    for (found, want) in out.iter().zip(want) {
        assert!((f64::from(*found) - want).abs() < 2e-5, "{found} {want}");
    }
}

/// Where the activation or its factors are subnormal, flushed or infinite, instruction sets are compared with each
/// other: there is no other reference.
#[test]
fn instruction_sets_agree_on_extreme_inputs() {
    let mut numbers = Numbers(13);
    let (hidden, intermediate, rows) = (40, 45, 70);
    let styles = [(Gating::Silu, false), (CLAMPED, false), (CLAMPED, true)];
    for (compute, (gating, biased)) in MODES.into_iter().flat_map(|p| styles.map(|style| (p, style))) {
        let biases = biased.then(|| common::biases(&mut numbers, hidden, intermediate));
        let known = Known::new(&mut numbers, hidden, intermediate, compute).with(gating, biases);
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
            grouped_ffn(&cpu, &groups, &x, compute, &mut FfnScratch::default(), &mut out);
            assert_same(&out, outs.first().unwrap_or(&out), &format!("{} {compute:?}", cpu.isa()));
            outs.push(out);
        }
        let count = |is: fn(&f32) -> bool| outs[0].iter().filter(|v| is(v)).count();
        let (zero, infinite, nan) = (count(|v| *v == 0.0), count(|v| v.is_infinite()), count(|v| v.is_nan()));
        // A clamped activation is finite, and a bias leaves no zeros.
        let clamped = gating != Gating::Silu;
        assert!(
            (zero > 0 || biased) && (infinite > 0 || clamped) && nan > 0,
            "{compute:?} {gating:?} {zero} {infinite} {nan}: inputs miss a case"
        );
    }
}

#[test]
fn experts_of_both_types_in_one_call_keep_their_orders() {
    let mut numbers = Numbers(14);
    let hidden = 50;
    let f32 = Known::new(&mut numbers, hidden, 30, Compute::F32);
    let bf16 = Known::new(&mut numbers, hidden, 70, Compute::Bf16);
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
            want.extend(known.apply(x, if pairs { Compute::Bf16Pairs } else { Compute::Bf16 }));
        }
    }
    for cpu in cpus() {
        let mut out = vec![f32::NAN; want.len()];
        grouped_ffn(&cpu, &groups, &x, Compute::Bf16Pairs, &mut FfnScratch::default(), &mut out);
        assert_same(&out, &want, &cpu.isa().to_string());
    }
}

#[test]
fn threads_do_not_show() {
    let mut numbers = Numbers(12);
    let (hidden, intermediate) = (256, 300);
    for compute in MODES {
        let known: Vec<_> = (0..4).map(|_| Known::new(&mut numbers, hidden, intermediate, compute)).collect();
        let x = to_bf16_values(&numbers.vec(80 * hidden));
        for rows in [1, 3, 80] {
            let rows: Vec<u32> = (0..rows).collect();
            let groups: Vec<_> =
                known.iter().map(|known| ExpertRows { expert: &known.expert, rows: &rows }).collect();
            let [alone, two, four] = [1, 2, 4].map(|threads| {
                let mut out = vec![f32::NAN; groups.len() * rows.len() * hidden];
                let cpu = cpu(threads, Isa::detect());
                grouped_ffn(&cpu, &groups, &x, compute, &mut FfnScratch::default(), &mut out);
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
fn biases_are_counted_and_unusable_ones_refused() {
    let matrix = |n, k| Matrix::pack_f32(n, k, &vec![0.0; n * k]).unwrap();
    let expert = || Expert::new(matrix(32, 64), matrix(32, 64), matrix(64, 32)).unwrap();
    let biases = |gate, up, down| Biases { gate: vec![0.5; gate], up: vec![0.5; up], down: vec![0.5; down] };
    let plain = expert();
    assert_eq!((plain.gating(), plain.biases()), (Gating::Silu, None));
    let dressed = expert().with(CLAMPED, Some(biases(32, 32, 64))).unwrap();
    assert_eq!((dressed.gating(), dressed.biases()), (CLAMPED, Some(&biases(32, 32, 64))));
    assert_eq!(dressed.bytes(), plain.bytes() + 4 * (32 + 32 + 64));
    let refused = |gating, biases| expert().with(gating, biases).unwrap_err().to_string();
    for (wrong, message) in [
        (biases(31, 32, 64), "expert's gate bias has 31 elements: its linear has 32 outputs"),
        (biases(32, 33, 64), "expert's up bias has 33 elements: its linear has 32 outputs"),
        (biases(32, 32, 32), "expert's down bias has 32 elements: its linear has 64 outputs"),
    ] {
        assert_eq!(refused(Gating::Silu, Some(wrong)), message);
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut wrong = biases(32, 32, 64);
        wrong.down[7] = bad;
        assert_eq!(
            refused(Gating::Silu, Some(wrong)),
            "expert's down bias is not finite at 7: check the checkpoint"
        );
        assert!(matches!(
            expert().with(Gating::ClampedSwish { alpha: bad, limit: 1.0 }, None),
            Err(KernelError::Gating { .. })
        ));
    }
    for limit in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let message = refused(Gating::ClampedSwish { alpha: 1.702, limit }, None);
        assert!(
            message.starts_with(&format!("activation's alpha is 1.702, its limit {limit}:")),
            "{message}"
        );
    }
}

#[test]
#[should_panic(expected = "groups: row 2 is outside x, which has 2 rows")]
fn a_row_outside_is_refused() {
    let matrix = || Matrix::pack_f32(4, 4, &[0.0; 16]).unwrap();
    let expert = Expert::new(matrix(), matrix(), matrix()).unwrap();
    let groups = [ExpertRows { expert: &expert, rows: &[2] }];
    let cpu = cpu(1, Isa::Portable);
    grouped_ffn(&cpu, &groups, &[0.0; 8], Compute::F32, &mut FfnScratch::default(), &mut [0.0; 4]);
}
