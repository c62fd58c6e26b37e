//! A mean of recent samples, robust against outliers: a step may wait for a worker or a core.

/// An exponentially weighted mean.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Smoothed(f64);

impl Smoothed {
    /// Adds a sample; the first one is the mean.
    pub(crate) fn take(estimate: &mut Option<Self>, sample: f64) {
        /// Weight of a new sample.
        const WEIGHT: f64 = 0.125;
        /// Most of a sample that counts, as a multiple of the mean.
        const OUTLIER: f64 = 2.0;
        *estimate = Some(Self(
            estimate.map_or(sample, |Self(mean)| mean + WEIGHT * (sample.min(mean * OUTLIER) - mean)),
        ));
    }

    pub(crate) const fn get(self) -> f64 {
        self.0
    }
}

/// Size class of a count: powers of two, the largest ones together. `None` for 0.
pub(crate) fn size_class(count: usize) -> Option<usize> {
    count.checked_ilog2().map(|power| (power as usize).min(SIZE_CLASSES - 1))
}

/// Number of size classes.
pub(crate) const SIZE_CLASSES: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_follows_many_samples_and_no_single_one() {
        let mut mean = None;
        Smoothed::take(&mut mean, 8.0);
        assert_eq!(mean.map(Smoothed::get), Some(8.0));
        Smoothed::take(&mut mean, 1e9);
        assert_eq!(mean.map(Smoothed::get), Some(9.0), "as if it were twice the mean");
        (0..100).for_each(|_| Smoothed::take(&mut mean, 2.0));
        assert!(mean.is_some_and(|mean| (2.0..2.01).contains(&mean.get())));
    }

    #[test]
    fn sizes_go_by_powers_of_two() {
        assert_eq!(
            [0, 1, 2, 3, 4, 7, 8].map(size_class),
            [None, Some(0), Some(1), Some(1), Some(2), Some(2), Some(3)]
        );
        assert!(size_class(usize::MAX).is_some_and(|class| class < SIZE_CLASSES));
    }
}
