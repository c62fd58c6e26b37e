//! Whether a worker may be sent to: its health, from how its answers came.
//!
//! Owns the state machine *closed → suspect → open → half-open → closed*. A worker that broke its stream or
//! answered wrongly is not sent to at all for a while (open), then gets one shard to show that it is well
//! (half-open). One that is late or refuses is doubted (suspect) and opens when it goes on. Between two openings at
//! least the first one's back-off passes, whatever happens; so health cannot flap faster than that. Time is what the
//! caller says, as a duration since any start; a clock that goes back only makes waits longer.

use std::time::Duration;

/// When to doubt a worker, and for how long to leave it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Late or refused shards in a row that open the breaker. At least one is needed in any case.
    pub lates: u32,
    /// An answer that took longer than this makes its worker suspect, though it never opens.
    pub slow: Duration,
    /// How long a suspect worker must do nothing wrong to be closed again without having answered.
    pub calm: Duration,
    /// The first back-off. Each that follows a failure in half-open, or comes soon after the breaker closed, is twice
    /// the one before.
    pub backoff: Duration,
    /// The longest back-off.
    pub longest: Duration,
    /// How long the one shard of a half-open worker may take before it counts as failed.
    pub patience: Duration,
}

impl Default for Rules {
    /// Three in a row; slow above 1 s; calm after 2 s; back-off of 500 ms to 30 s; patience of 5 s.
    fn default() -> Self {
        Self {
            lates: 3,
            slow: Duration::from_secs(1),
            calm: Duration::from_secs(2),
            backoff: Duration::from_millis(500),
            longest: Duration::from_secs(30),
            patience: Duration::from_secs(5),
        }
    }
}

/// How a worker failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Its stream ended or could not be opened.
    BrokenStream,
    /// It answered with what cannot be right: not finite, of the wrong shape or epoch, of another model.
    BadReply,
    /// It answered that it would not. It lives, so this counts like a late answer.
    Refused,
}

/// The state a worker is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Health {
    /// Well.
    Closed,
    /// Doubted, but sent to.
    Suspect,
    /// Not sent to.
    Open,
    /// Gets one shard to show that it is well.
    HalfOpen,
}

/// How gladly a worker is sent to; the better is the lesser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Preference {
    /// Like any other.
    Normal,
    /// Rather to others.
    Doubtful,
    /// Only if there is no other. Health alone never says so; it is for workers that are about to leave.
    Avoid,
    /// One shard, to see whether it is well.
    Probe,
    /// Not at all.
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Suspect { lates: u32, since: Duration },
    Open { until: Duration },
    HalfOpen { probe: Option<Duration> },
}

/// The health of one worker.
#[derive(Debug, Clone, PartialEq)]
pub struct Breaker {
    rules: Rules,
    /// Back-offs are this much longer than the rules say: at least 1.
    stretch: f64,
    state: State,
    /// The last back-off, before it was stretched; none if there was none yet.
    backoff: Option<Duration>,
    /// When the last back-off is forgotten if the breaker stays closed; none while it is open.
    forget: Option<Duration>,
}

impl Breaker {
    /// The part by which the longest jitter lengthens back-offs.
    const JITTER: f64 = 0.25;

    /// A worker that is well. With `jitter`, taken as the nearest number between 0 and 1, back-offs get longer by up
    /// to a quarter; give every router another one, so that they do not all come back at once.
    #[must_use]
    pub fn new(rules: Rules, jitter: f64) -> Self {
        let jitter = if jitter.is_nan() { 0.0 } else { jitter.clamp(0.0, 1.0) };
        Self {
            rules,
            stretch: 1.0 + jitter * Self::JITTER,
            state: State::Closed,
            backoff: None,
            forget: None,
        }
    }

    /// Forgets everything: the worker is another process now.
    pub fn reset(&mut self) {
        *self = Self { state: State::Closed, backoff: None, forget: None, ..*self };
    }

    /// A shard was sent. In half-open it is the one that decides.
    pub fn sent(&mut self, now: Duration) {
        self.tick(now);
        if let State::HalfOpen { probe: probe @ None } = &mut self.state {
            *probe = Some(now);
        }
    }

    /// A right answer came, `latency` after its shard was sent. While open it changes nothing: it was asked for
    /// before.
    pub fn success(&mut self, now: Duration, latency: Duration) {
        self.tick(now);
        let is_slow = latency > self.rules.slow;
        match self.state {
            State::Closed | State::Suspect { .. } if is_slow => {
                self.state = State::Suspect { lates: 0, since: now };
            }
            State::Suspect { .. } => self.state = State::Closed,
            State::HalfOpen { probe: Some(_) } => self.close(now),
            State::Closed | State::Open { .. } | State::HalfOpen { probe: None } => {}
        }
    }

    /// No answer came in time.
    pub fn late(&mut self, now: Duration) {
        self.tick(now);
        let lates = match self.state {
            State::Closed => 1,
            State::Suspect { lates, .. } => lates.saturating_add(1),
            State::HalfOpen { probe: Some(_) } => return self.open(now),
            State::Open { .. } | State::HalfOpen { probe: None } => return,
        };
        if lates >= self.rules.lates {
            self.open(now);
        } else {
            self.state = State::Suspect { lates, since: now };
        }
    }

    /// It failed. What fails while open changes nothing: it was sent before.
    pub fn failure(&mut self, now: Duration, failure: Failure) {
        if failure == Failure::Refused {
            return self.late(now);
        }
        self.tick(now);
        match self.state {
            State::Closed | State::Suspect { .. } | State::HalfOpen { .. } => self.open(now),
            State::Open { .. } => {}
        }
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) {
        if let State::HalfOpen { probe: Some(sent) } = self.state {
            let end = sent.saturating_add(self.rules.patience);
            if now >= end {
                self.open(end);
            }
        }
        match self.state {
            State::Suspect { since, .. } if now >= since.saturating_add(self.rules.calm) => {
                self.state = State::Closed;
            }
            State::Open { until } if now >= until => self.state = State::HalfOpen { probe: None },
            _ => {}
        }
        if self.forget.is_some_and(|forget| now >= forget) {
            (self.backoff, self.forget) = (None, None);
        }
    }

    /// The state at `now`.
    #[must_use]
    pub fn health(&self, now: Duration) -> Health {
        match self.at(now).state {
            State::Closed => Health::Closed,
            State::Suspect { .. } => Health::Suspect,
            State::Open { .. } => Health::Open,
            State::HalfOpen { .. } => Health::HalfOpen,
        }
    }

    /// How gladly the worker is sent to at `now`. A caller has to see to it that one for a probe gets its shard even
    /// if others could compute it, or it never gets well.
    #[must_use]
    pub fn preference(&self, now: Duration) -> Preference {
        match self.at(now).state {
            State::Closed => Preference::Normal,
            State::Suspect { .. } => Preference::Doubtful,
            State::HalfOpen { probe: None } => Preference::Probe,
            State::Open { .. } | State::HalfOpen { probe: Some(_) } => Preference::Never,
        }
    }

    /// Whether a shard may be sent at `now`.
    #[must_use]
    pub fn may_send(&self, now: Duration) -> bool {
        self.preference(now) != Preference::Never
    }

    /// When a back-off ends, for a caller that waits for it; none unless open.
    #[must_use]
    pub const fn open_until(&self) -> Option<Duration> {
        match self.state {
            State::Open { until } => Some(until),
            _ => None,
        }
    }

    fn at(&self, now: Duration) -> Self {
        let mut then = self.clone();
        then.tick(now);
        then
    }

    fn open(&mut self, now: Duration) {
        let next = self.backoff.map_or(self.rules.backoff, |last| last.saturating_mul(2));
        let next = next.min(self.rules.longest);
        (self.backoff, self.forget) = (Some(next), None);
        self.state = State::Open { until: now.saturating_add(self.stretched(next)) };
    }

    fn close(&mut self, now: Duration) {
        self.state = State::Closed;
        self.forget = self.backoff.map(|last| now.saturating_add(self.stretched(last)));
    }

    /// A back-off with its jitter.
    fn stretched(&self, backoff: Duration) -> Duration {
        let more = backoff.as_secs_f64() * (self.stretch - 1.0);
        backoff.saturating_add(Duration::try_from_secs_f64(more).unwrap_or(Duration::ZERO))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FAST: Duration = Duration::from_millis(5);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn breaker() -> Breaker {
        Breaker::new(Rules::default(), 0.0)
    }

    #[test]
    fn lates_in_a_row_open() {
        let mut breaker = breaker();
        for round in 0..4 {
            breaker.late(ms(round * 100));
            breaker.failure(ms(round * 100 + 10), Failure::Refused);
            assert_eq!(breaker.health(ms(round * 100 + 10)), Health::Suspect);
            breaker.success(ms(round * 100 + 20), FAST);
            assert_eq!(breaker.health(ms(round * 100 + 20)), Health::Closed);
        }
        for _ in 0..3 {
            assert!(breaker.may_send(ms(500)));
            breaker.late(ms(500));
        }
        assert_eq!(breaker.health(ms(500)), Health::Open);
        assert_eq!(breaker.open_until(), Some(ms(1000)));
        assert!(!breaker.may_send(ms(999)));
    }

    #[test]
    fn a_broken_stream_and_a_bad_reply_open_at_once() {
        for failure in [Failure::BrokenStream, Failure::BadReply] {
            let mut breaker = breaker();
            breaker.failure(ms(10), failure);
            assert_eq!(breaker.preference(ms(10)), Preference::Never);
            // What else was under way fails or arrives too, and changes nothing.
            breaker.failure(ms(300), failure);
            breaker.late(ms(301));
            breaker.success(ms(302), FAST);
            assert_eq!(breaker.open_until(), Some(ms(510)));
        }
    }

    #[test]
    fn one_shard_decides_whether_an_open_worker_is_well() {
        let mut breaker = breaker();
        breaker.failure(ms(0), Failure::BrokenStream);
        assert_eq!(breaker.preference(ms(500)), Preference::Probe);
        // An answer to what was sent before says nothing of now.
        breaker.success(ms(500), FAST);
        assert_eq!(breaker.health(ms(500)), Health::HalfOpen);
        breaker.sent(ms(501));
        assert!(!breaker.may_send(ms(502)));
        breaker.success(ms(510), FAST);
        assert_eq!(breaker.preference(ms(510)), Preference::Normal);
    }

    #[test]
    fn back_off_doubles_up_to_its_bound_and_is_forgotten() {
        let mut breaker = breaker();
        let mut now = ms(0);
        breaker.failure(now, Failure::BadReply);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let until = breaker.open_until().unwrap();
            waits.push((until - now).as_millis());
            now = until;
            breaker.sent(now);
            breaker.late(now);
        }
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        now = breaker.open_until().unwrap();
        breaker.sent(now);
        breaker.success(now, FAST);
        // Soon after it closed, the next back-off is no shorter than the last.
        let mut soon = breaker.clone();
        soon.failure(now + ms(29_000), Failure::BrokenStream);
        assert_eq!(soon.open_until(), Some(now + ms(59_000)));
        breaker.failure(now + ms(30_000), Failure::BrokenStream);
        assert_eq!(breaker.open_until(), Some(now + ms(30_500)));
    }

    #[test]
    fn a_shard_that_is_lost_does_not_keep_a_worker_half_open() {
        let mut breaker = breaker();
        breaker.failure(ms(0), Failure::BrokenStream);
        breaker.sent(ms(600));
        breaker.tick(ms(5599));
        assert_eq!(breaker.health(ms(5599)), Health::HalfOpen);
        breaker.tick(ms(5600));
        assert_eq!(breaker.open_until(), Some(ms(6600)));
    }

    #[test]
    fn a_slow_answer_is_doubted_but_never_opens() {
        let mut breaker = breaker();
        for round in 0..20 {
            breaker.success(ms(round), ms(1001));
            assert_eq!(breaker.preference(ms(round)), Preference::Doubtful);
        }
        // Delays of 200 ms are nothing.
        breaker.success(ms(20), ms(200));
        assert_eq!(breaker.health(ms(20)), Health::Closed);
        breaker.late(ms(30));
        assert_eq!(breaker.health(ms(2029)), Health::Suspect);
        assert_eq!(breaker.health(ms(2030)), Health::Closed);
    }

    #[test]
    fn jitter_only_lengthens() {
        for (jitter, millis) in [(0.0, 500), (1.0, 625), (9.0, 625), (-1.0, 500), (f64::NAN, 500)] {
            let mut breaker = Breaker::new(Rules::default(), jitter);
            breaker.failure(ms(0), Failure::BrokenStream);
            assert_eq!(breaker.open_until(), Some(ms(millis)));
            breaker.reset();
            assert_eq!(breaker, Breaker::new(Rules::default(), jitter));
        }
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Sent,
        Success(u64),
        Late,
        Failure(Failure),
        Tick,
    }

    fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
        let event = prop_oneof![
            3 => Just(Event::Sent),
            3 => (0_u64..2000).prop_map(Event::Success),
            2 => Just(Event::Late),
            1 => Just(Event::Failure(Failure::BrokenStream)),
            1 => Just(Event::Failure(Failure::BadReply)),
            1 => Just(Event::Failure(Failure::Refused)),
            2 => Just(Event::Tick),
        ];
        prop::collection::vec((prop_oneof![0_u64..50, 0_u64..3000], event), 0..200)
    }

    fn apply(breaker: &mut Breaker, now: Duration, event: Event) {
        match event {
            Event::Sent => breaker.sent(now),
            Event::Success(latency) => breaker.success(now, ms(latency)),
            Event::Late => breaker.late(now),
            Event::Failure(failure) => breaker.failure(now, failure),
            Event::Tick => breaker.tick(now),
        }
    }

    proptest! {
        #[test]
        fn it_opens_at_most_once_per_back_off(events in events(), jitter in 0.0..1.0) {
            let mut breaker = Breaker::new(Rules::default(), jitter);
            let mut now = Duration::ZERO;
            let mut window = Duration::ZERO;
            for (gap, event) in events {
                now += ms(gap);
                for event in [Event::Tick, event] {
                    let was = breaker.open_until();
                    apply(&mut breaker, now, event);
                    if let Some(until) = breaker.open_until().filter(|&until| was != Some(until)) {
                        prop_assert!(now >= window, "opened at {now:?}, before {window:?}");
                        prop_assert!(until - now <= ms(37_500));
                        prop_assert!(until - now >= ms(500) || matches!(event, Event::Tick));
                        window = until;
                    }
                }
            }
        }

        #[test]
        fn transitions_are_those_of_the_diagram(events in events()) {
            let mut breaker = breaker();
            let mut now = Duration::ZERO;
            for (gap, event) in events {
                now += ms(gap);
                // Time alone closes a suspect, half-opens what is open and gives up on a lost shard.
                let before = breaker.health(now);
                prop_assert_eq!(breaker.may_send(now), breaker.preference(now) != Preference::Never);
                let could_send = breaker.may_send(now);
                apply(&mut breaker, now, event);
                let after = breaker.health(now);
                let allowed = match (before, after) {
                    (Health::Closed | Health::Suspect, after) => after != Health::HalfOpen,
                    (Health::Open, after) => after == Health::Open,
                    // It closes only on the answer to its one shard.
                    (Health::HalfOpen, Health::Closed) => !could_send && matches!(event, Event::Success(_)),
                    (Health::HalfOpen, after) => after != Health::Suspect,
                };
                prop_assert!(allowed, "{before:?} to {after:?} on {event:?}");
                if let Event::Failure(Failure::BadReply | Failure::BrokenStream) = event {
                    prop_assert!(!breaker.may_send(now));
                }
            }
        }

        #[test]
        fn a_worker_that_is_well_again_is_soon_sent_to(events in events()) {
            let mut breaker = breaker();
            let mut now = Duration::ZERO;
            for (gap, event) in events {
                now += ms(gap);
                apply(&mut breaker, now, event);
            }
            let end = now + breaker.rules.longest + breaker.rules.patience + breaker.rules.calm;
            while breaker.health(now) != Health::Closed {
                prop_assert!(now <= end + breaker.rules.longest);
                if breaker.may_send(now) {
                    breaker.sent(now);
                    breaker.success(now, FAST);
                }
                now += ms(100);
            }
        }
    }
}
