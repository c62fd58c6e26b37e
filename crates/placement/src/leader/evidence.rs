//! Recent load of each expert, from the workers' counts.

use std::collections::BTreeMap;
use std::time::Duration;

#[cfg(test)]
use muster_types::{ExpertId, ExpertKey, LayerId};

use crate::{Loads, Shape};

/// Half-life of counts.
const HALF_LIFE: Duration = Duration::from_secs(60);
/// Rows per expert from which on counts are evidence.
const ENOUGH: f64 = 20.0;

/// Counts of all workers. They count from their start, so each count is compared with the previous one.
#[derive(Debug, Clone)]
pub(super) struct Evidence {
    shape: Shape,
    loads: Loads,
    /// By session: the worker's last count.
    before: BTreeMap<u64, Vec<Vec<u64>>>,
    rows: f64,
}

impl Evidence {
    pub(super) fn new(shape: &Shape) -> Self {
        Self { shape: shape.clone(), loads: Loads::new(shape), before: BTreeMap::new(), rows: 0.0 }
    }

    /// Adds the workers' counts, by session, `elapsed` after the last ones. Absent sessions are over.
    pub(super) fn observe(&mut self, elapsed: Duration, counts: BTreeMap<u64, Vec<Vec<u64>>>) {
        self.loads.decay_over(elapsed, HALF_LIFE);
        self.rows *= (-elapsed.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2();
        for (session, rows) in &counts {
            // Counts from before this router's first look are not recent.
            let Some(before) = self.before.get(session) else { continue };
            for key in self.shape.keys() {
                let count = |rows: &Vec<Vec<u64>>| {
                    rows.get(key.layer.index()).and_then(|layer| layer.get(key.expert.index())).copied()
                };
                let more = count(rows).unwrap_or(0).saturating_sub(count(before).unwrap_or(0));
                self.loads.observe(key, more);
                self.rows += more as f64;
            }
        }
        self.before = counts;
    }

    /// The loads.
    pub(super) const fn loads(&self) -> &Loads {
        &self.loads
    }

    /// Whether there are enough rows to move experts for.
    pub(super) fn is_enough(&self) -> bool {
        self.rows >= ENOUGH * self.shape.total() as f64
    }

    /// Rows counted last for a worker's session.
    pub(super) fn rows_of(&self, session: u64) -> u64 {
        self.before.get(&session).map_or(0, |layers| layers.iter().flatten().sum())
    }

    /// The hottest expert of a layer and its part of the layer's rows.
    #[cfg(test)]
    fn share(&self, layer: LayerId, expert: ExpertId) -> f64 {
        self.loads.share(ExpertKey { layer, expert })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_counted_since_the_last_time_counts() {
        let shape = Shape::new(vec![2, 0, 2]);
        let (layer, expert) = (LayerId::new(0, 3).unwrap(), ExpertId::new(0, 2).unwrap());
        let mut evidence = Evidence::new(&shape);
        let counts = |n: u64| BTreeMap::from([(7, vec![vec![n, 100], vec![], vec![0, 0]])]);
        evidence.observe(Duration::ZERO, counts(1_000_000));
        assert_eq!(evidence.share(layer, expert), 0.5, "from before it was known");
        assert!(!evidence.is_enough());
        evidence.observe(Duration::ZERO, counts(1_000_300));
        assert_eq!(evidence.share(layer, expert), 1.0);
        assert!(evidence.is_enough());
        assert_eq!(evidence.rows_of(7), 1_000_400);
        // One that started again counts from zero: nothing is made of the difference.
        evidence.observe(Duration::ZERO, counts(5));
        assert_eq!(evidence.share(layer, expert), 1.0);
        evidence.observe(HALF_LIFE * 10, BTreeMap::new());
        assert!(!evidence.is_enough());
        assert_eq!(evidence.rows_of(7), 0);
    }
}
