//! Hedging: the deadline after which a shard is sent to another replica too.
//!
//! Owns a worker's latencies, and the budget of hedges. A deadline lies between its floor and its cap; it comes from shards
//! of the same size, with too few of them from the nearest sizes, and without any it is fixed. The number of hedges is
//! bounded whatever happens, so that hedging never makes an overload worse. Nothing here allocates once it is made, and every
//! update takes the same few operations (on a rare few, all buckets of one table are scaled down).
//!
//! A latency is counted in a bucket of a fixed table, an octave being four buckets, with new ones weighing more than
//! old ones; a quantile is read off the table. This forgets a slow start, knows tails that an average would not, and
//! is off by a quarter at most.

use std::time::Duration;

/// When to hedge.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    /// The shortest deadline.
    pub floor: Duration,
    /// The longest deadline.
    pub cap: Duration,
    /// The deadline while too little is known.
    pub unknown: Duration,
    /// Quantile of recent latencies that deadlines start from; between 0 and 1.
    pub quantile: f64,
    /// Factor of the deadline to that quantile.
    pub factor: f64,
}

impl Default for Rules {
    /// 2 to 150 ms, 150 without data; one and a half times the 99 % quantile.
    fn default() -> Self {
        Self {
            floor: Duration::from_millis(2),
            cap: Duration::from_millis(150),
            unknown: Duration::from_millis(150),
            quantile: 0.99,
            factor: 1.5,
        }
    }
}

/// Outcome of a hedge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The hedge answered first.
    Won,
    /// The original shard answered first after all.
    Wasted,
}

/// The classes of shard sizes, by rows: up to 4, 16, 64, 256, 1024, and more.
const CLASSES: usize = 6;
/// Ratio of shard sizes between neighbouring classes.
const PER_CLASS: f64 = 4.0;

/// One worker's latencies, by class of shard size.
#[derive(Debug, Clone, PartialEq)]
pub struct Hedge {
    rules: Rules,
    classes: [Class; CLASSES],
}

impl Hedge {
    /// A worker without data.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self { rules, classes: [Class::NEW; CLASSES] }
    }

    /// Counts the latency of a shard of `rows`. A shard that is no longer waited for counts with its waiting time, or the
    /// deadline would be learned from the quick ones alone.
    pub fn observe(&mut self, rows: u32, latency: Duration) {
        self.classes[class(rows)].observe(latency);
    }

    /// Counts the outcome of a hedge of a shard of `rows`. Deadlines grow while hedges are wasted, and shrink again while they
    /// win.
    pub fn hedged(&mut self, rows: u32, outcome: Outcome) {
        self.classes[class(rows)].hedged(outcome);
    }

    /// Time to wait for a shard of `rows` before it is hedged.
    #[must_use]
    pub fn deadline(&self, rows: u32) -> Duration {
        let (rules, own) = (&self.rules, &self.classes[class(rows)]);
        let seconds = own.known(rules).or_else(|| self.borrowed(class(rows)));
        let seconds = seconds.unwrap_or(rules.unknown.as_secs_f64()) * f64::from(own.stretch);
        let cap = rules.cap.max(rules.floor);
        Duration::try_from_secs_f64(seconds).map_or(cap, |deadline| deadline.clamp(rules.floor, cap))
    }

    /// Deadline in seconds, inferred from other sizes: a larger shard takes at least as long as a smaller one, and at most in
    /// proportion to its rows.
    fn borrowed(&self, own: usize) -> Option<f64> {
        let known = |at: usize| self.classes[at].known(&self.rules);
        let smaller = (0..own).rev().find_map(|at| Some(known(at)? * PER_CLASS.powi((own - at) as i32)));
        let larger = (own + 1..CLASSES).find_map(known);
        match (smaller, larger) {
            (Some(smaller), Some(larger)) => Some(smaller.min(larger)),
            (Some(smaller), None) => Some(smaller),
            (None, Some(larger)) => Some(larger.min(self.rules.unknown.as_secs_f64())),
            (None, None) => None,
        }
    }
}

const fn class(rows: u32) -> usize {
    match rows {
        0..=4 => 0,
        5..=16 => 1,
        17..=64 => 2,
        65..=256 => 3,
        257..=1024 => 4,
        _ => 5,
    }
}

/// Buckets of a table. The last begins at about 3 s and has all that is longer.
const BUCKETS: usize = 64;
/// Resolution: microseconds of the shortest bucket.
const UNIT: u64 = 64;

/// Latencies of shards of about one size.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Class {
    /// Answers so far, counted up to `ENOUGH`.
    seen: u16,
    /// Weight of the next answer.
    weight: f32,
    /// Factor of the deadline beyond the one from latencies alone.
    stretch: f32,
    /// Weight of the answers in each bucket.
    buckets: [f32; BUCKETS],
}

impl Class {
    const NEW: Self = Self { seen: 0, weight: 1.0, stretch: 1.0, buckets: [0.0; BUCKETS] };

    /// The first answers of a worker, which are not counted: caches and connections are cold.
    const WARMUP: u16 = 8;
    /// Answers that say enough for a deadline.
    const ENOUGH: u16 = 40;
    /// Ratio of an answer's weight to the one before: a hundred back, it has a fifth less.
    const GROWTH: f32 = 1.0 + 1.0 / 512.0;
    /// Weight at which all are scaled down, as 32-bit floats grow coarse.
    const HEAVY: f32 = 1024.0;

    const MORE: f32 = 1.25;
    const LESS: f32 = 0.95;
    const MOST: f32 = 16.0;

    fn observe(&mut self, latency: Duration) {
        if self.seen < Self::ENOUGH {
            self.seen += 1;
        }
        if self.seen <= Self::WARMUP {
            return;
        }
        self.buckets[bucket(latency)] += self.weight;
        self.weight *= Self::GROWTH;
        if self.weight >= Self::HEAVY {
            self.buckets.iter_mut().for_each(|bucket| *bucket /= self.weight);
            self.weight = 1.0;
        }
    }

    fn hedged(&mut self, outcome: Outcome) {
        let change = match outcome {
            Outcome::Won => Self::LESS,
            Outcome::Wasted => Self::MORE,
        };
        self.stretch = (self.stretch * change).clamp(1.0, Self::MOST);
    }

    /// Deadline in seconds from latencies alone, once there are enough.
    fn known(&self, rules: &Rules) -> Option<f64> {
        (self.seen >= Self::ENOUGH).then(|| self.quantile(rules.quantile).as_secs_f64() * rules.factor)
    }

    /// The end of the bucket that the quantile is in.
    fn quantile(&self, quantile: f64) -> Duration {
        let total: f32 = self.buckets.iter().sum();
        let above = f64::from(total) * (1.0 - quantile);
        let mut sum = 0.0;
        // From the sparse top, so that sums are exact enough.
        let at = (0..BUCKETS).rev().find(|&at| {
            sum += f64::from(self.buckets[at]);
            sum > above
        });
        bucket_end(at.unwrap_or(0))
    }
}

/// The bucket of a latency: below one unit 0, then four to an octave.
fn bucket(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    let units = micros / UNIT;
    let Some(octave) = units.checked_ilog2() else { return 0 };
    let quarters = (u128::from(micros) << 2) / u128::from(UNIT);
    // The two bits below the highest.
    let quarter = (quarters >> octave) as usize & 3;
    (octave as usize * 4 + quarter + 1).min(BUCKETS - 1)
}

/// Where a bucket ends and the next begins.
fn bucket_end(bucket: usize) -> Duration {
    let (octave, quarter) = (bucket / 4, bucket % 4);
    let quarters = (4 + quarter as u64) << octave;
    Duration::from_micros(quarters * UNIT / 4)
}

/// Budget of hedges: a fraction of all shards, plus a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    permille: u32,
    burst: u32,
    /// Thousandths of hedges that may be sent now.
    left: u64,
}

impl Budget {
    /// Thousandths of a hedge that one takes.
    const ONE: u64 = 1000;

    /// A budget of `permille` hedges in a thousand shards, and `burst` more; the burst is full at the start.
    #[must_use]
    pub const fn new(permille: u32, burst: u32) -> Self {
        Self { permille, burst, left: burst as u64 * Self::ONE }
    }

    /// Counts a sent shard; hedges do not count.
    pub fn sent(&mut self) {
        let full = u64::from(self.burst) * Self::ONE;
        self.left = self.left.saturating_add(u64::from(self.permille)).min(full);
    }

    /// Takes one hedge. False when none may be sent now.
    #[must_use]
    pub fn take(&mut self) -> bool {
        match self.left.checked_sub(Self::ONE) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

impl Default for Budget {
    /// Two in a hundred, and four.
    fn default() -> Self {
        Self::new(20, 4)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    fn learned(latencies: impl IntoIterator<Item = u64>) -> Hedge {
        let mut hedge = Hedge::new(Rules::default());
        for latency in latencies {
            hedge.observe(8, us(latency));
        }
        hedge
    }

    #[test]
    fn buckets_are_in_order_and_hold_what_they_say() {
        let mut last = 0;
        for micros in (0..8_000_000).step_by(7) {
            let at = bucket(us(micros));
            assert!(at == last || at == last + 1);
            last = at;
            assert!(us(micros) < bucket_end(at) || at == BUCKETS - 1);
            assert!(at == 0 || us(micros) >= bucket_end(at - 1));
        }
        assert_eq!((last, bucket(Duration::MAX)), (BUCKETS - 1, BUCKETS - 1));
        assert_eq!(bucket_end(0), us(UNIT));
    }

    #[test]
    fn the_cap_holds_until_enough_is_known() {
        let rules = Rules::default();
        let few = usize::from(Class::ENOUGH) - 1;
        let unknown = learned(vec![3000; few]);
        assert_eq!([1, 8, 17, 5000].map(|rows| unknown.deadline(rows)), [rules.cap; 4]);
        assert!(learned(vec![3000; few + 1]).deadline(8) < us(6000));
    }

    #[test]
    fn sizes_that_are_not_known_yet_are_judged_by_their_neighbours() {
        let rules = Rules { cap: us(5_000_000), ..Rules::default() };
        let mut hedge = Hedge::new(rules);
        (0..100).for_each(|_| hedge.observe(8, us(3000)));
        let known = hedge.deadline(8);
        assert_eq!(hedge.deadline(1), known, "a smaller one takes no longer");
        assert_eq!(hedge.deadline(17), known * 4, "a larger one not more than its size says");
        assert_eq!(hedge.deadline(65), known * 16);
        (0..100).for_each(|_| hedge.observe(300, us(5000)));
        assert_eq!(hedge.deadline(65), hedge.deadline(300), "nor longer than a still larger one");
        let before = hedge.deadline(17);
        hedge.hedged(17, Outcome::Wasted);
        assert!(hedge.deadline(17) > before && hedge.deadline(8) == known, "each has its own hedges");
        let mut large = Hedge::new(rules);
        (0..100).for_each(|_| large.observe(2000, us(900_000)));
        assert_eq!(large.deadline(1), rules.unknown, "a far larger one says little");
    }

    #[test]
    fn a_slow_start_is_forgotten() {
        let start = [900_000, 400_000, 300_000, 200_000, 100_000, 90_000];
        let hedge = learned(start.into_iter().chain(vec![2000; 34]));
        assert!(hedge.deadline(8) < us(4000), "{:?}", hedge.deadline(8));
    }

    #[test]
    fn a_tail_is_known_and_a_rare_one_is_not() {
        let tail = |every: u64| learned((0..4000).map(move |n| if n % every == 0 { 40_000 } else { 1000 }));
        assert!(tail(50).deadline(8) > us(40_000));
        assert!(tail(1000).deadline(8) < us(3000));
    }

    #[test]
    fn it_follows_a_machine_that_slows_down_and_recovers() {
        let mut hedge = learned(vec![2000; 2000]);
        for _ in 0..20 {
            hedge.observe(8, us(30_000));
        }
        assert!(hedge.deadline(8) > us(30_000));
        for _ in 0..3000 {
            hedge.observe(8, us(2000));
        }
        assert!(hedge.deadline(8) < us(4000));
    }

    #[test]
    fn wasted_hedges_make_it_wait_longer() {
        let mut hedge = learned(vec![4000; 100]);
        let first = hedge.deadline(8);
        hedge.hedged(8, Outcome::Wasted);
        assert!(hedge.deadline(8) > first.mul_f64(1.2));
        for _ in 0..100 {
            hedge.hedged(8, Outcome::Wasted);
        }
        assert!(hedge.deadline(8) > first.mul_f64(10.0) && hedge.deadline(8) <= Rules::default().cap);
        for _ in 0..100 {
            hedge.hedged(8, Outcome::Won);
        }
        assert_eq!(hedge.deadline(8), first);
    }

    #[test]
    fn rules_that_make_no_sense_do_no_harm() {
        for (quantile, factor) in [(f64::NAN, 1.0), (0.5, f64::NAN), (2.0, -3.0), (-1.0, f64::INFINITY)] {
            let mut hedge = Hedge::new(Rules { quantile, factor, ..Rules::default() });
            (0..100).for_each(|_| hedge.observe(1, us(3000)));
            let deadline = hedge.deadline(1);
            assert!(deadline >= us(2000) && deadline <= us(150_000));
        }
        let turned = Rules { floor: us(9000), cap: us(1000), ..Rules::default() };
        assert_eq!(Hedge::new(turned).deadline(1), us(9000));
    }

    proptest! {
        #[test]
        fn deadlines_keep_their_bounds(
            events in prop::collection::vec((0_u32..3000, 0_u64..10_000_000, 0..3), 0..400),
        ) {
            let mut hedge = Hedge::new(Rules::default());
            for (rows, latency, event) in events {
                match event {
                    0 => hedge.observe(rows, us(latency)),
                    1 => hedge.hedged(rows, Outcome::Won),
                    _ => hedge.hedged(rows, Outcome::Wasted),
                }
                let deadline = hedge.deadline(rows);
                prop_assert!(deadline >= us(2000) && deadline <= us(150_000));
            }
        }

        #[test]
        fn the_quantile_is_that_of_the_latencies(
            latencies in prop::collection::vec(64_u64..3_000_000, 100..300), quantile in 0.5..0.98,
        ) {
            let mut class = Class::NEW;
            latencies.iter().for_each(|&latency| class.observe(us(latency)));
            let mut counted = latencies[usize::from(Class::WARMUP)..].to_vec();
            counted.sort_unstable();
            // Newer answers weigh more, so the quantile may be another one, but not by much.
            let last = (counted.len() - 1) as f64;
            let at = |quantile: f64| counted[(last * quantile.clamp(0.0, 1.0)) as usize];
            let found = class.quantile(quantile);
            prop_assert!(found >= us(at(quantile - 0.2)), "{found:?} {}", at(quantile - 0.2));
            prop_assert!(found <= us(at(quantile + 0.2) * 5 / 4 + UNIT), "{found:?} {}", at(quantile + 0.2));
        }

        #[test]
        fn hedges_are_a_part_of_all_shards_plus_a_burst(
            events in prop::collection::vec(any::<bool>(), 0..3000),
            permille in 0_u32..100,
            burst in 0_u32..8,
        ) {
            let mut budget = Budget::new(permille, burst);
            let (mut sent, mut hedges) = (0_u64, 0);
            for hedge in events {
                if hedge {
                    hedges += u64::from(budget.take());
                } else {
                    budget.sent();
                    sent += 1;
                }
                prop_assert!(hedges * 1000 <= sent * u64::from(permille) + u64::from(burst) * 1000);
            }
        }

        #[test]
        fn a_budget_fills_again(shards in 0_u64..400) {
            let mut budget = Budget::default();
            while budget.take() {}
            (0..shards).for_each(|_| budget.sent());
            let mut hedges = 0;
            while budget.take() {
                hedges += 1;
            }
            prop_assert_eq!(hedges, (shards / 50).min(4));
        }
    }
}
