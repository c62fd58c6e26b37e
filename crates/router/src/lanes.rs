//! Chooses one lane or two for a step.
//!
//! Two lanes hide the experts' time behind the router's own, but read weights twice and send twice as many messages.
//! Which is faster depends on the machine, the network and the size of the step, so it is measured: each size class
//! uses its faster choice, and now and then the other, in case the order has changed. Has no clock of its own. Lanes
//! never change a bit of a result.

use std::time::Duration;

use crate::smoothed::{SIZE_CLASSES, Smoothed, size_class};

/// Steps of a size class per trial of the slower choice.
const TRY_EVERY: u32 = 128;
/// Steps measured with each choice before they are compared.
const FIRST: u32 = 4;

/// Lanes that a step may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lanes {
    One,
    Two,
}

/// Measured durations of both choices.
#[derive(Debug, Default)]
pub(crate) struct LaneChoice {
    classes: [Class; SIZE_CLASSES],
}

#[derive(Debug, Default)]
struct Class {
    /// Seconds per row.
    one: Option<Smoothed>,
    two: Option<Smoothed>,
    steps: u32,
}

impl LaneChoice {
    /// The lanes for a splittable step of `rows` rows.
    pub(crate) fn lanes(&self, rows: usize) -> Lanes {
        let Some(class) = size_class(rows).map(|class| &self.classes[class]) else { return Lanes::One };
        let (Some(one), Some(two)) = (class.one, class.two) else {
            return if class.steps < FIRST { Lanes::One } else { Lanes::Two };
        };
        if class.steps < 2 * FIRST {
            return Lanes::Two;
        }
        match (two.get() < one.get(), class.steps.is_multiple_of(TRY_EVERY)) {
            (true, false) | (false, true) => Lanes::Two,
            (true, true) | (false, false) => Lanes::One,
        }
    }

    /// Records the duration of a splittable step.
    pub(crate) fn observe(&mut self, rows: usize, lanes: Lanes, took: Duration) {
        let Some(class) = size_class(rows).map(|class| &mut self.classes[class]) else { return };
        class.steps = class.steps.wrapping_add(1);
        let seconds = match lanes {
            Lanes::One => &mut class.one,
            Lanes::Two => &mut class.two,
        };
        Smoothed::take(seconds, took.as_secs_f64() / rows as f64);
        if class.steps.is_multiple_of(TRY_EVERY)
            && let (Some(one), Some(two)) = (class.one, class.two)
        {
            let [one, two] = [one, two].map(|seconds| seconds.get() * 1e6);
            tracing::debug!(rows, one_lane_us_per_row = one, two_lanes_us_per_row = two, "lanes");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(choice: &mut LaneChoice, rows: usize, steps: usize, [one, two]: [u64; 2]) -> Vec<Lanes> {
        let step = |_| {
            let lanes = choice.lanes(rows);
            let took = if lanes == Lanes::One { one } else { two };
            choice.observe(rows, lanes, Duration::from_micros(took));
            lanes
        };
        (0..steps).map(step).collect()
    }

    fn twos(lanes: &[Lanes]) -> usize {
        lanes.iter().filter(|&&lanes| lanes == Lanes::Two).count()
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_tried() {
        let mut choice = LaneChoice::default();
        assert_eq!(twos(&run(&mut choice, 8, 8, [100, 120])), 4, "both, to begin with");
        assert_eq!(twos(&run(&mut choice, 8, 1280, [100, 120])), 10);
        let mut choice = LaneChoice::default();
        run(&mut choice, 8, 8, [120, 100]);
        assert_eq!(twos(&run(&mut choice, 8, 1280, [120, 100])), 1270);
    }

    #[test]
    fn a_change_is_noticed() {
        let mut choice = LaneChoice::default();
        run(&mut choice, 8, 100, [100, 130]);
        run(&mut choice, 8, 8 * TRY_EVERY as usize, [100, 50]);
        assert!(twos(&run(&mut choice, 8, 256, [100, 50])) >= 254);
    }

    #[test]
    fn sizes_are_judged_apart_and_nothing_is_no_size() {
        let mut choice = LaneChoice::default();
        run(&mut choice, 4, 20, [100, 130]);
        run(&mut choice, 64, 20, [1000, 700]);
        assert_eq!((choice.lanes(5), choice.lanes(100)), (Lanes::One, Lanes::Two));
        choice.observe(0, Lanes::One, Duration::ZERO);
        assert_eq!(choice.lanes(0), Lanes::One);
    }
}
