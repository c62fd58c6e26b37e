//! Recent load of each expert: decayed counts of rows.
//!
//! Owns the counts. Every count is finite and not negative, and a layer without counts is taken to be
//! loaded evenly. Knows no time: its owner says how much to decay.

use std::time::Duration;

use muster_types::{ExpertKey, LayerId};

use crate::Shape;

/// Rows per (layer, expert), older ones counting less.
#[derive(Debug, Clone, PartialEq)]
pub struct Loads {
    /// By layer and expert.
    layers: Vec<Vec<f64>>,
}

impl Loads {
    /// Most rows one expert counts for, so that sums stay finite.
    const MOST: f64 = 1e18;
    /// A count that fell below this many rows is forgotten.
    const LEAST: f64 = 1e-6;

    /// Loads without counts.
    #[must_use]
    pub fn new(shape: &Shape) -> Self {
        Self { layers: shape.experts().iter().map(|&experts| vec![0.0; experts as usize]).collect() }
    }

    /// Adds `rows` that were sent to an expert. A key that the model does not have is ignored.
    pub fn observe(&mut self, key: ExpertKey, rows: u64) {
        let count =
            self.layers.get_mut(key.layer.index()).and_then(|layer| layer.get_mut(key.expert.index()));
        if let Some(count) = count {
            *count = (*count + rows as f64).min(Self::MOST);
        }
    }

    /// Multiplies every count by `factor`, taken as the nearest number between 0 and 1; not a number changes
    /// nothing.
    pub fn decay(&mut self, factor: f64) {
        if factor.is_nan() {
            return;
        }
        let factor = factor.clamp(0.0, 1.0);
        for count in self.layers.iter_mut().flatten() {
            *count *= factor;
            if *count < Self::LEAST {
                *count = 0.0;
            }
        }
    }

    /// Decays by `elapsed` with a half-life of `half_life`. With a half-life of zero any time at all forgets everything.
    pub fn decay_over(&mut self, elapsed: Duration, half_life: Duration) {
        if elapsed.is_zero() {
            return;
        }
        let halvings = elapsed.as_secs_f64() / half_life.as_secs_f64();
        self.decay((-halvings).exp2());
    }

    /// Adds another router's counts. Counts of experts that this model does not have are ignored.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.layers.iter_mut().zip(&other.layers) {
            for (count, more) in mine.iter_mut().zip(theirs) {
                *count = (*count + more).min(Self::MOST);
            }
        }
    }

    /// Rows counted for an expert; 0 when the model does not have it.
    #[must_use]
    pub fn get(&self, key: ExpertKey) -> f64 {
        let layer = self.layers.get(key.layer.index());
        layer.and_then(|layer| layer.get(key.expert.index())).copied().unwrap_or(0.0)
    }

    /// Share of its layer's rows for each expert, ascending. The shares add up to 1 and are even without counts; a layer that the
    /// model does not have, or a dense one, has none.
    pub fn shares(&self, layer: LayerId) -> impl Iterator<Item = f64> {
        let counts = self.layers.get(layer.index()).map_or(&[][..], Vec::as_slice);
        let total: f64 = counts.iter().sum();
        let even = 1.0 / counts.len() as f64;
        counts.iter().map(move |count| if total > 0.0 { count / total } else { even })
    }

    /// Share of its layer's rows for this expert; 0 when the model does not have it.
    #[must_use]
    pub fn share(&self, key: ExpertKey) -> f64 {
        self.shares(key.layer).nth(key.expert.index()).unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use muster_types::ExpertId;
    use proptest::prelude::*;

    use super::*;

    fn key(layer: u32, expert: u32) -> ExpertKey {
        ExpertKey { layer: LayerId::new(layer, 100).unwrap(), expert: ExpertId::new(expert, 1000).unwrap() }
    }

    #[test]
    fn shares_are_even_until_something_is_known() {
        let mut loads = Loads::new(&Shape::new(vec![0, 4, 2]));
        assert_eq!(loads.share(key(1, 3)), 0.25);
        loads.observe(key(1, 3), 3);
        loads.observe(key(1, 0), 1);
        assert_eq!(loads.shares(key(1, 0).layer).collect::<Vec<_>>(), [0.25, 0.0, 0.0, 0.75]);
        assert_eq!(loads.share(key(2, 1)), 0.5);
        assert_eq!(loads.shares(key(0, 0).layer).count(), 0);
    }

    #[test]
    fn what_the_model_does_not_have_is_ignored() {
        let mut loads = Loads::new(&Shape::new(vec![0, 2]));
        let nothing = loads.clone();
        for key in [key(0, 0), key(1, 2), key(9, 0)] {
            loads.observe(key, 5);
            assert_eq!((loads.get(key), loads.share(key)), (0.0, 0.0));
        }
        assert_eq!(loads, nothing);
        loads.merge(&Loads { layers: vec![vec![1.0], vec![2.0, 3.0, 4.0], vec![5.0]] });
        assert_eq!(loads, Loads { layers: vec![vec![], vec![2.0, 3.0]] });
    }

    #[test]
    fn half_is_forgotten_every_half_life_and_in_the_end_all() {
        let mut loads = Loads::new(&Shape::new(vec![2]));
        loads.observe(key(0, 0), 800);
        loads.decay_over(Duration::ZERO, Duration::ZERO);
        loads.decay(f64::NAN);
        loads.decay(7.0);
        assert_eq!(loads.get(key(0, 0)), 800.0);
        loads.decay_over(Duration::from_secs(30), Duration::from_secs(10));
        assert_eq!(loads.get(key(0, 0)), 100.0);
        loads.decay_over(Duration::from_secs(3600), Duration::from_secs(10));
        assert_eq!((loads.get(key(0, 0)), loads.share(key(0, 0))), (0.0, 0.5));
        loads.observe(key(0, 1), 5);
        loads.decay_over(Duration::from_nanos(1), Duration::ZERO);
        assert_eq!(loads.get(key(0, 1)), 0.0);
    }

    #[test]
    fn counts_stay_finite() {
        let mut loads = Loads::new(&Shape::new(vec![3]));
        for _ in 0..100 {
            loads.observe(key(0, 0), u64::MAX);
            loads.merge(&loads.clone());
        }
        assert_eq!(loads.share(key(0, 0)), 1.0);
    }

    /// Experts per layer, and rows seen by one router.
    fn report() -> impl Strategy<Value = Vec<(u32, u32, u64)>> {
        prop::collection::vec((0_u32..6, 0_u32..9, 0_u64..1 << 40), 0..30)
    }

    fn loads(shape: &Shape, report: &[(u32, u32, u64)]) -> Loads {
        let mut loads = Loads::new(shape);
        for &(layer, expert, rows) in report {
            loads.observe(key(layer, expert), rows);
        }
        loads
    }

    proptest! {
        #[test]
        fn shares_of_a_layer_add_up_to_one(
            experts in prop::collection::vec(0_u32..8, 0..6), report in report(), factor in 0.0..1.0,
        ) {
            let shape = Shape::new(experts);
            let mut loads = loads(&shape, &report);
            loads.decay(factor);
            for (layer, experts) in shape.layers() {
                let shares: Vec<_> = loads.shares(layer).collect();
                prop_assert_eq!(shares.len(), experts as usize);
                prop_assert!(shares.iter().all(|share| (0.0..=1.0).contains(share)));
                prop_assert!(experts == 0 || (shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            }
        }

        #[test]
        fn merging_reports_counts_every_row_once(
            experts in prop::collection::vec(0_u32..8, 0..6), one in report(), other in report(),
        ) {
            let shape = Shape::new(experts);
            let mut merged = loads(&shape, &one);
            merged.merge(&loads(&shape, &other));
            let mut turned = loads(&shape, &other);
            turned.merge(&loads(&shape, &one));
            prop_assert_eq!(&merged, &turned);
            // Sums below 2^53 are exact.
            prop_assert_eq!(merged, loads(&shape, &[one, other].concat()));
        }

        #[test]
        fn decay_depends_on_the_time_in_all(
            rows in 1_u64..1 << 40,
            first in 0_u64..20_000,
            second in 0_u64..20_000,
            half_life in 5_000_u64..60_000,
        ) {
            let half_life = Duration::from_millis(half_life);
            let shape = Shape::new(vec![1]);
            let mut twice = loads(&shape, &[(0, 0, rows)]);
            let mut once = twice.clone();
            twice.decay_over(Duration::from_millis(first), half_life);
            twice.decay_over(Duration::from_millis(second), half_life);
            once.decay_over(Duration::from_millis(first + second), half_life);
            let (twice, once) = (twice.get(key(0, 0)), once.get(key(0, 0)));
            prop_assert!((twice - once).abs() <= 1e-9 * rows as f64);
        }
    }
}
