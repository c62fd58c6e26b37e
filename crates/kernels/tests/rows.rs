//! Normalisation and rotary embedding against plain restatements.

mod common;

use common::{Numbers, assert_same, cpu, cpus, tree_sum};
use muster_kernels::{
    Angles, Isa, KernelError, Llama3, Rope, RopePairs, RopeScaling, Yarn, layer_norm, rms_norm,
    rms_norm_in_place, rotate,
};

/// The inverse root of a finite mean of squares; NaN for others.
fn inverse_root(mean: f32) -> f32 {
    if mean.is_finite() { 1.0 / mean.sqrt() } else { f32::NAN }
}

fn norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut lanes = [0.0_f32; 16];
    for (i, x) in x.iter().enumerate() {
        lanes[i % 16] = x.mul_add(*x, lanes[i % 16]);
    }
    let factor = inverse_root(tree_sum(lanes) / x.len() as f32 + eps);
    x.iter().zip(weight).map(|(x, weight)| (x * factor) * weight).collect()
}

/// Folds the elements with `add` in sixteen lanes and returns the tree sum of the lanes.
fn in_lanes(x: &[f32], add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; 16];
    x.iter().enumerate().for_each(|(i, x)| lanes[i % 16] = add(*x, lanes[i % 16]));
    tree_sum(lanes)
}

fn centred_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let mean = in_lanes(x, |x, sum| sum + x) / x.len() as f32;
    let centred: Vec<f32> = x.iter().map(|x| x - mean).collect();
    let factor = inverse_root(in_lanes(&centred, |d, sum| d.mul_add(d, sum)) / x.len() as f32 + eps);
    let scaled = centred.iter().zip(weight).map(|(d, weight)| (d * factor) * weight);
    scaled.zip(bias).map(|(y, bias)| y + bias).collect()
}

#[test]
fn layer_norms_follow_their_order_on_every_instruction_set_and_any_threads() {
    let mut numbers = Numbers(34);
    for width in [1, 8, 15, 16, 17, 64, 100, 1024] {
        let (weight, bias) = (numbers.vec(width), numbers.vec(width));
        for x in
            [numbers.vec(width * 70), numbers.odd_vec(width * 70, false), numbers.odd_vec(width * 70, true)]
        {
            let want: Vec<f32> =
                x.chunks(width).flat_map(|x| centred_norm(x, &weight, &bias, 1e-5)).collect();
            for cpu in cpus().into_iter().chain([2, 4].map(|threads| cpu(threads, Isa::detect()))) {
                let mut out = vec![f32::NAN; x.len()];
                layer_norm(&cpu, &x, &weight, &bias, 1e-5, &mut out);
                assert_same(&out, &want, &format!("{} {width}", cpu.isa()));
            }
        }
    }
}

/// Rows far from zero too, where the mean of squares less the square of the mean would lose all digits.
#[test]
fn layer_norms_are_close_to_f64() {
    let mut numbers = Numbers(35);
    for width in [16, 100, 4096] {
        for offset in [0.0, 3.0, 100.0] {
            let (weight, bias) = (numbers.vec(width), numbers.vec(width));
            let x: Vec<f32> = numbers.vec(width * 3).iter().map(|x| x + offset).collect();
            let mut out = vec![f32::NAN; x.len()];
            layer_norm(&cpu(1, Isa::detect()), &x, &weight, &bias, 1e-5, &mut out);
            for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                let mean = x.iter().copied().map(f64::from).sum::<f64>() / width as f64;
                let square: f64 = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
                let factor = 1.0 / (square / width as f64 + f64::from(1e-5_f32)).sqrt();
                // The mean is a number of about the offset's size in f32.
                let tolerance = 4e-6 + f64::from(offset) * 4e-7;
                for (i, found) in out.iter().enumerate() {
                    let want = (f64::from(x[i]) - mean) * factor * f64::from(weight[i]) + f64::from(bias[i]);
                    assert!((f64::from(*found) - want).abs() < tolerance, "{width} {offset}: {found} {want}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "bias: its length must be that of weight")]
fn a_short_bias_is_refused() {
    layer_norm(&cpu(1, Isa::Portable), &[1.0; 4], &[1.0; 4], &[1.0; 3], 1e-5, &mut [0.0; 4]);
}

#[test]
fn norms_follow_their_order_in_place_or_not() {
    let mut numbers = Numbers(31);
    for width in [1, 8, 15, 16, 17, 64, 100, 1024] {
        let weight = numbers.vec(width);
        let x = numbers.odd_vec(width * 7, false);
        let want: Vec<f32> = x.chunks(width).flat_map(|x| norm(x, &weight, 1e-6)).collect();
        for cpu in cpus() {
            let mut out = vec![f32::NAN; x.len()];
            rms_norm(&cpu, &x, &weight, 1e-6, &mut out);
            assert_same(&out, &want, &format!("{} {width}", cpu.isa()));
            let mut x = x.clone();
            rms_norm_in_place(&cpu, &mut x, &weight, 1e-6);
            assert_same(&x, &want, &format!("{} {width} in place", cpu.isa()));
        }
    }
}

#[test]
fn rows_whose_squares_overflow_become_nan_and_no_others() {
    // The first has a finite square; the others have not, and the last is infinite itself.
    for (large, finite) in [(1.8e19, true), (3e19, false), (f32::MAX, false), (f32::INFINITY, false)] {
        for width in [1, 5, 16, 37, 64] {
            let mut numbers = Numbers(35);
            let (mut x, weight, bias) = (numbers.vec(3 * width), numbers.vec(width), numbers.vec(width));
            x[width + width / 2] = large;
            for isa in Isa::available() {
                let (mut rms, mut layer) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                rms_norm(&cpu(1, isa), &x, &weight, 1e-6, &mut rms);
                layer_norm(&cpu(1, isa), &x, &weight, &bias, 1e-6, &mut layer);
                for (name, out) in [("rms", rms), ("layer", layer)] {
                    // An element alone in its row is its own mean, so it becomes zero.
                    let finite = finite || (name == "layer" && width == 1 && large.is_finite());
                    let rows: Vec<bool> =
                        out.chunks(width).map(|row| row.iter().all(|y| y.is_finite())).collect();
                    assert_eq!(rows, [true, finite, true], "{name}, {large} in {width}, {isa}");
                    assert!(finite || out[width..2 * width].iter().all(|y| y.is_nan()), "{name}, {large}");
                }
            }
        }
    }
}

#[test]
fn norm_threads_do_not_show_and_the_result_has_unit_mean_square() {
    let mut numbers = Numbers(32);
    let (width, rows) = (640, 450);
    let x = numbers.vec(width * rows);
    let weight = vec![1.0; width];
    let [alone, two, four] = [1, 2, 4].map(|threads| {
        let mut out = vec![f32::NAN; x.len()];
        rms_norm(&cpu(threads, Isa::detect()), &x, &weight, 1e-6, &mut out);
        out
    });
    assert_same(&two, &alone, "two threads");
    assert_same(&four, &alone, "four threads");
    for row in alone.chunks(width) {
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
        assert!((mean - 1.0).abs() < 1e-4, "{mean}");
    }
}

#[test]
fn angles_are_those_of_the_f32_product() {
    let rope = Rope::new(10_000.0, 8, RopePairs::Halves, &RopeScaling::None).unwrap();
    let mut angles = Angles::default();
    rope.angles(&[0, 1, 70_001], &mut angles);
    // theta^(-2i/8) for theta = 10,000 is a power of ten; its f32 is the nearest or a neighbour of it.
    for (row, position) in [0.0_f32, 1.0, 70_001.0].into_iter().enumerate() {
        for (i, frequency) in [1.0_f32, 0.1, 0.01, 0.001].into_iter().enumerate() {
            let at = row * 4 + i;
            let near = [frequency.next_down(), frequency, frequency.next_up()];
            assert!(near.iter().any(|frequency| {
                let angle = f64::from(position * frequency);
                let (sin, cos) = (f64::from(angles.sin()[at]), f64::from(angles.cos()[at]));
                (sin - angle.sin()).abs() < 6e-8 && (cos - angle.cos()).abs() < 6e-8
            }));
        }
    }
    assert_eq!((rope.dim(), angles.cos().len(), angles.sin().len()), (8, 12, 12));
}

#[test]
fn rotation_turns_pairs_and_leaves_the_rest() {
    let mut numbers = Numbers(33);
    for (dim, head_dim, heads) in [(8, 8, 3), (4, 10, 2), (64, 64, 1)] {
        for pairs in [RopePairs::Halves, RopePairs::Neighbours] {
            let mut angles = Angles::default();
            Rope::new(1e6, dim, pairs, &RopeScaling::None).unwrap().angles(&[3, 900], &mut angles);
            let x = numbers.vec(2 * heads * head_dim);
            let mut turned = x.clone();
            rotate(&angles, &mut turned, head_dim);
            for (index, (x, turned)) in x.chunks(head_dim).zip(turned.chunks(head_dim)).enumerate() {
                let row = index / heads;
                for i in 0..dim / 2 {
                    let (cos, sin) = (angles.cos()[row * dim / 2 + i], angles.sin()[row * dim / 2 + i]);
                    let [first, second] = match pairs {
                        RopePairs::Halves => [i, i + dim / 2],
                        RopePairs::Neighbours => [2 * i, 2 * i + 1],
                    };
                    let (a, b) = (x[first], x[second]);
                    assert_eq!(turned[first].to_bits(), (a * cos - b * sin).to_bits());
                    assert_eq!(turned[second].to_bits(), (b * cos + a * sin).to_bits());
                }
                assert_eq!(turned[dim..], x[dim..]);
            }
        }
    }
}

/// Cosines at position 1 reveal the frequencies.
#[test]
fn scaled_frequencies_follow_their_formulas() {
    const DIM: usize = 64;
    let (theta, context) = (5e5_f64, 4096.0_f64);
    let plain = |i: usize| theta.powf(-2.0 * i as f64 / DIM as f64);
    let turns = |i: usize| context * plain(i) / std::f64::consts::TAU;
    let divisors: Vec<f32> = (0..DIM / 2).map(|i| 1.0 + i as f32 / 4.0).collect();
    let yarn = |truncate| Yarn {
        factor: 32.0,
        original_context: context,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate,
        amplitude: 1.25,
    };
    let yarned = |truncate: bool| {
        let place =
            |turns: f64| DIM as f64 * (context / turns / std::f64::consts::TAU).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (place(32.0), place(1.0));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        move |i: usize| {
            let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            plain(i) * (1.0 - divided) + plain(i) / 32.0 * divided
        }
    };
    let llama = |i: usize| match turns(i) {
        turns if turns < 1.0 => plain(i) / 8.0,
        turns if turns > 4.0 => plain(i),
        turns => plain(i) / 8.0 * (4.0 - turns) / 3.0 + plain(i) * (turns - 1.0) / 3.0,
    };
    let llama_scaling = Llama3 { factor: 8.0, original_context: context, low: 1.0, high: 4.0 };
    type Formula<'f> = Box<dyn Fn(usize) -> f64 + 'f>;
    let cases: [(RopeScaling<'_>, f64, Formula<'_>); 5] = [
        (RopeScaling::Linear(2.5), 1.0, Box::new(move |i| plain(i) / 2.5)),
        (RopeScaling::Yarn(yarn(true)), 1.25, Box::new(yarned(true))),
        (RopeScaling::Yarn(yarn(false)), 1.25, Box::new(yarned(false))),
        (RopeScaling::Llama3(llama_scaling), 1.0, Box::new(llama)),
        (
            RopeScaling::Each { divisors: &divisors, amplitude: 0.75 },
            0.75,
            Box::new(move |i| plain(i) / (1.0 + i as f64 / 4.0)),
        ),
    ];
    for (scaling, amplitude, frequency) in cases {
        let rope = Rope::new(theta, DIM, RopePairs::Halves, &scaling).unwrap();
        let mut angles = Angles::default();
        rope.angles(&[1], &mut angles);
        for (i, (sin, cos)) in angles.sin().iter().zip(angles.cos()).enumerate() {
            let expected = frequency(i);
            let found = f64::from(*sin).atan2(f64::from(*cos));
            assert!((found / expected - 1.0).abs() < 1e-5, "{scaling:?} pair {i}: {found} for {expected}");
            let length = f64::from(*sin).hypot(f64::from(*cos));
            assert!((length / amplitude - 1.0).abs() < 1e-6, "{scaling:?}");
        }
    }
    // No pair lies between equal bounds, where the mix would be a division by zero.
    let equal = Llama3 { factor: 16.0, low: 2.0, high: 2.0, ..llama_scaling };
    let rope = Rope::new(theta, DIM, RopePairs::Halves, &RopeScaling::Llama3(equal)).unwrap();
    let mut angles = Angles::default();
    rope.angles(&[1], &mut angles);
    assert!(angles.cos().iter().all(|cos| cos.is_finite()));
    let short = RopeScaling::Each { divisors: &divisors[1..], amplitude: 1.0 };
    assert!(matches!(
        Rope::new(theta, DIM, RopePairs::Halves, &short),
        Err(KernelError::Size { field: "divisors", .. })
    ));
}

#[test]
fn position_zero_turns_nothing_and_memory_is_reused() {
    let rope = Rope::new(5e5, 6, RopePairs::Halves, &RopeScaling::None).unwrap();
    let mut angles = Angles::default();
    rope.angles(&[9, 9, 9], &mut angles);
    rope.angles(&[0], &mut angles);
    let mut x = [1.0, -2.0, 3.0, 4.0, -5.0, 6.0];
    rotate(&angles, &mut x, 6);
    assert_eq!(x, [1.0, -2.0, 3.0, 4.0, -5.0, 6.0]);
    rope.angles(&[], &mut angles);
    rotate(&angles, &mut [], 6);
}

#[test]
fn unusable_embeddings_are_refused() {
    assert!(matches!(
        Rope::new(0.0, 8, RopePairs::Halves, &RopeScaling::None),
        Err(KernelError::Theta { .. })
    ));
    assert!(matches!(
        Rope::new(f64::NAN, 8, RopePairs::Halves, &RopeScaling::None),
        Err(KernelError::Theta { .. })
    ));
    for dim in [0, 7, 65_536] {
        assert!(matches!(
            Rope::new(1e4, dim, RopePairs::Halves, &RopeScaling::None),
            Err(KernelError::Size { field: "dim", .. })
        ));
    }
}

#[test]
#[should_panic(expected = "head_dim: 4 is below the dimension of the angles, 8")]
fn a_head_below_the_angles_is_refused() {
    let mut angles = Angles::default();
    Rope::new(1e4, 8, RopePairs::Halves, &RopeScaling::None).unwrap().angles(&[1], &mut angles);
    rotate(&angles, &mut [0.0; 8], 4);
}
