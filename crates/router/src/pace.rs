//! Limit on prefill tokens beside decoding in a step, so that running streams hardly feel a long prompt.
//!
//! A cost model, fed with measured steps: a step with decoding takes its decoding time plus a time per prefill token.
//! The limit is the prefill that stretches a decode step by [`STRETCH`]. Has no clock of its own; the same observations
//! give the same answers. The limit changes when tokens are computed, never their bits.

use std::time::Duration;

use crate::smoothed::{SIZE_CLASSES, Smoothed, size_class};

/// Longest step with prefill beside decoding, as a multiple of decoding alone.
const STRETCH: f64 = 2.5;
/// Prefill tokens that every step may have, so that prompts make progress.
const LEAST: u32 = 16;
/// Mixed steps per probe, a step with next to no prefill that measures decoding alone.
const PROBE_EVERY: u32 = 64;
/// Prefill tokens of a probe. The scheduler wants at least one, and it costs no more than one more sequence.
const PROBE: u32 = 1;

/// Measured costs of steps.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Seconds of a step that only decodes, by the size class of its sequences.
    decode: [Option<Smoothed>; SIZE_CLASSES],
    /// Seconds per prefill token beside decoding.
    prefill_token: Option<Smoothed>,
    /// Steps with prefill beside decoding since the last one without.
    mixed: u32,
}

impl Pace {
    /// Most prefill tokens of a step with `decodes` decoding sequences.
    pub(crate) fn limit(&self, decodes: usize) -> u32 {
        let Some(decode) = size_class(decodes).and_then(|class| self.decode[class]) else {
            // Nothing decodes, so no limit applies; or a first sample of decoding is wanted.
            return PROBE;
        };
        if self.mixed >= PROBE_EVERY {
            return PROBE;
        }
        let Some(token) = self.prefill_token else { return LEAST };
        let tokens = decode.get() * (STRETCH - 1.0) / token.get();
        // A multiple of the kernels' row groups; the cast saturates.
        (tokens as u32 / LEAST).max(1) * LEAST
    }

    /// Records the duration of a step with `decodes` decoding sequences and `prefill` prefill tokens.
    pub(crate) fn observe(&mut self, decodes: usize, prefill: usize, took: Duration) {
        let Some(class) = size_class(decodes) else { return };
        let took = took.as_secs_f64();
        let decode = &mut self.decode[class];
        if prefill <= PROBE as usize {
            self.mixed = 0;
            Smoothed::take(decode, took);
            return;
        }
        self.mixed = self.mixed.saturating_add(1);
        if let Some(decode) = decode {
            // Never zero: a prefill token that seemed free would lift the limit.
            let extra = (took - decode.get()).max(decode.get() / 16.0);
            Smoothed::take(&mut self.prefill_token, extra / prefill as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with fixed microseconds for the start of a step, for decoding and per prefill token.
    struct Machine {
        decode: u64,
        start: u64,
        token: u64,
    }

    impl Machine {
        fn step(&self, decodes: usize, prefill: u32) -> Duration {
            let prefill = u64::from(prefill);
            let started = if prefill > 1 { self.start } else { 0 };
            Duration::from_micros(self.decode * decodes as u64 + started + self.token * prefill)
        }

        /// Runs steps with an endless prompt, and returns their prefill tokens.
        fn run(&self, pace: &mut Pace, decodes: usize, steps: usize) -> Vec<u32> {
            let step = |_| {
                let prefill = pace.limit(decodes);
                pace.observe(decodes, prefill as usize, self.step(decodes, prefill));
                prefill
            };
            (0..steps).map(step).collect()
        }
    }

    #[test]
    fn prefill_grows_to_what_the_stretch_allows() {
        let mut pace = Pace::default();
        let machine = Machine { decode: 10_000, start: 8_000, token: 250 };
        let prefill = machine.run(&mut pace, 4, 60);
        assert_eq!(prefill[..2], [PROBE, LEAST], "carefully at first");
        // 60 ms more than the 40 ms of decoding, 8 of them for the start, at 0.25 ms: 208.
        assert!(prefill[40..].iter().all(|tokens| (192..=224).contains(tokens)), "{prefill:?}");
        let longest = prefill.iter().map(|&tokens| machine.step(4, tokens)).max();
        assert!(longest < Some(Duration::from_millis(40 * 11 / 4)), "{longest:?}");
    }

    #[test]
    fn prompts_get_on_however_dear_they_are() {
        let machine = Machine { decode: 100, start: 0, token: 100_000 };
        let prefill = machine.run(&mut Pace::default(), 1, 50);
        assert!(prefill[1..].iter().all(|&tokens| tokens == LEAST), "{prefill:?}");
    }

    #[test]
    fn what_decoding_costs_is_looked_at_again() {
        let mut pace = Pace::default();
        let slow = Machine { decode: 10_000, start: 0, token: 100 };
        slow.run(&mut pace, 4, 50);
        let fast = Machine { decode: 1_000, ..slow };
        let prefill = fast.run(&mut pace, 4, 2000);
        let probes = prefill.iter().filter(|&&tokens| tokens == PROBE).count();
        assert!((28..=33).contains(&probes), "{probes}");
        // 6 ms of prefill at 0.1 ms each.
        assert!(matches!(prefill[1990..].iter().max(), Some(48..=64)), "{:?}", &prefill[1990..]);
    }

    #[test]
    fn batches_of_other_sizes_have_estimates_of_their_own() {
        let mut pace = Pace::default();
        let machine = Machine { decode: 1_000, start: 0, token: 100 };
        machine.run(&mut pace, 4, 100);
        let prefill = machine.run(&mut pace, 64, 3);
        assert_eq!(prefill[0], PROBE);
        assert!(prefill[2] > 500, "{prefill:?}");
    }

    #[test]
    fn one_slow_step_changes_little() {
        let mut pace = Pace::default();
        let machine = Machine { decode: 10_000, start: 0, token: 250 };
        machine.run(&mut pace, 4, 50);
        let before = pace.limit(4);
        pace.observe(4, 0, Duration::from_secs(10));
        assert!(pace.limit(4) <= before * 5 / 4, "{} {before}", pace.limit(4));
        pace.observe(4, before as usize, Duration::from_secs(10));
        assert!(pace.limit(4) >= before * 3 / 4, "{} {before}", pace.limit(4));
        // A step without decoding changes no limit.
        let before = pace.limit(4);
        pace.observe(0, 1024, Duration::from_secs(10));
        assert_eq!(pace.limit(4), before);
    }
}
