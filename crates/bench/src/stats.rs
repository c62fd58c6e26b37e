//! Quantiles of measured times.

use std::time::Duration;

/// The value that a fraction `q` of the sorted `samples` does not exceed (nearest rank); `None` without samples.
pub(crate) fn quantile(samples: &mut [Duration], q: f64) -> Option<Duration> {
    samples.sort_unstable();
    let rank = (q * samples.len() as f64).ceil() as usize;
    samples.get(rank.saturating_sub(1)).copied()
}

/// The middle of an odd number of values, the lower middle of an even one; `None` without values.
pub(crate) fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let mut samples: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile(&mut samples, 0.5), Some(Duration::from_millis(50)));
        assert_eq!(quantile(&mut samples, 0.99), Some(Duration::from_millis(99)));
        assert_eq!(quantile(&mut samples[..1], 0.99), Some(Duration::from_millis(1)));
        assert_eq!(quantile(&mut [], 0.5), None);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&mut []), None);
    }
}
