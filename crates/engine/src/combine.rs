//! Adds the experts' weighted outputs up to one row again.
//!
//! Owns the order and the rounding of that sum, which [`ExpertDispatch`](crate::dispatch::ExpertDispatch) states
//! and every implementation of it must share: this is the one place where it is written. Knows nothing of where
//! outputs were computed or in which order they came.

use crate::dispatch::Choices;

/// Writes the combined rows `[rows, hidden]` to `out`, whatever was there.
///
/// `output(row * k + j)` is the output `[hidden]` of the row's j-th expert. A sum starts at 0.0 and takes the
/// experts in ascending id; each product and each sum is rounded to f32. There is no fused multiply-add, which
/// would round once and give other bits.
///
/// # Panics
/// When `out` or an output is not as long as stated.
pub fn combine<'a>(choices: &Choices, hidden: usize, output: impl Fn(usize) -> &'a [f32], out: &mut [f32]) {
    assert_eq!(out.len(), choices.rows() * hidden, "out must be [rows, hidden]");
    out.fill(0.0);
    for (pair, &weight) in choices.weights().iter().enumerate() {
        let output = output(pair);
        assert_eq!(output.len(), hidden, "an output must be [hidden]");
        let row = pair / choices.k();
        for (sum, &y) in out[row * hidden..(row + 1) * hidden].iter_mut().zip(output) {
            *sum += weight * y;
        }
    }
}

#[cfg(test)]
mod tests {
    use muster_types::ExpertId;
    use proptest::prelude::*;

    use super::*;

    fn choices(k: usize, weights: Vec<f32>) -> Choices {
        let experts = (0..weights.len() / k).flat_map(|_| ExpertId::all(k as u32)).collect();
        Choices::new(k, experts, weights).unwrap()
    }

    fn combined(k: usize, weights: Vec<f32>, hidden: usize, outputs: &[f32]) -> Vec<f32> {
        let choices = choices(k, weights);
        let mut out = vec![f32::NAN; choices.rows() * hidden];
        combine(&choices, hidden, |pair| &outputs[pair * hidden..(pair + 1) * hidden], &mut out);
        out
    }

    #[test]
    fn rows_are_weighted_sums_of_their_own_outputs() {
        let out = combined(2, vec![0.5, 2.0, 1.0, -1.0], 2, &[2.0, 4.0, 1.0, 3.0, 5.0, 6.0, 7.0, 9.0]);
        assert_eq!(out, [3.0, 8.0, -2.0, -3.0]);
    }

    #[test]
    fn terms_are_added_in_ascending_order() {
        // 2^24 + 1 rounds to 2^24, so only this order loses the 1.
        let big = (1 << 24) as f32;
        assert_eq!(combined(3, vec![1.0; 3], 1, &[big, 1.0, -big]), [0.0]);
        assert_eq!(combined(3, vec![1.0; 3], 1, &[big, -big, 1.0]), [1.0]);
    }

    #[test]
    fn products_are_rounded_before_they_are_added() {
        // (1 + e)^2 = 1 + 2e + e^2 loses its e^2 in f32; a fused sum would keep it.
        let x = 1.0 + f32::EPSILON;
        let rounded = x * x;
        assert_eq!(combined(2, vec![1.0, x], 1, &[-rounded, x]), [0.0]);
        assert_ne!(x.mul_add(x, -rounded), 0.0);
    }

    #[test]
    fn a_sum_of_negative_zeros_is_positive() {
        let out = combined(2, vec![1.0, 1.0], 1, &[-0.0, -0.0]);
        assert_eq!(out[0].to_bits(), 0.0_f32.to_bits());
    }

    proptest! {
        #[test]
        fn bits_are_those_of_one_element_at_a_time(
            (k, weights) in (1_usize..9, 0_usize..6).prop_flat_map(|(k, rows)| {
                (Just(k), prop::collection::vec(-2.0_f32..2.0, k * rows))
            }),
            hidden in 0_usize..40,
            values in prop::collection::vec(-1e3_f32..1e3, 48 * 40),
        ) {
            let out = combined(k, weights.clone(), hidden, &values);
            let mut expected = Vec::new();
            for (row, weights) in weights.chunks_exact(k).enumerate() {
                for element in 0..hidden {
                    let mut acc = 0.0_f32;
                    for (j, weight) in weights.iter().enumerate() {
                        let product = weight * values[(row * k + j) * hidden + element];
                        acc += product;
                    }
                    expected.push(acc.to_bits());
                }
            }
            prop_assert_eq!(out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected);
        }
    }
}
