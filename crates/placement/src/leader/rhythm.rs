use std::time::Duration;

use crate::lease;

/// How long a leader waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rhythm {
    /// How it campaigns.
    pub lease: lease::Rhythm,
    /// How long workers may take to answer before a round goes on without them.
    pub patience: Duration,
    /// A worker that says nothing for so long does not count.
    pub silence: Duration,
    /// Announcements that come this close together are answered together.
    pub gather: Duration,
    /// How often loads are counted, and moves considered.
    pub rebalance: Duration,
    /// A plan that was not reached after this long is made anew.
    pub plan_age: Duration,
    /// Orders that are not carried out yet are sent again after this long.
    pub repeat: Duration,
}

impl Default for Rhythm {
    /// Silent workers count for 1.2 s, moves are considered every 10 s, plans last a minute, orders are repeated every 5 s.
    fn default() -> Self {
        Self {
            lease: lease::Rhythm::default(),
            patience: Duration::from_millis(400),
            silence: Duration::from_millis(1200),
            gather: Duration::from_millis(5),
            rebalance: Duration::from_secs(10),
            plan_age: Duration::from_secs(60),
            repeat: Duration::from_secs(5),
        }
    }
}
