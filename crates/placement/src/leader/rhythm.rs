use std::time::Duration;

use crate::lease;

/// Intervals and timeouts of a leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rhythm {
    /// Those of its campaign.
    pub lease: lease::Rhythm,
    /// Time for answers before a round goes on without the rest.
    pub patience: Duration,
    /// Silence after which a worker no longer counts.
    pub silence: Duration,
    /// Time over which announcements are gathered.
    pub gather: Duration,
    /// Interval of counting loads and considering moves.
    pub rebalance: Duration,
    /// Age after which an unreached plan is made anew.
    pub plan_age: Duration,
    /// Interval of repeating orders that are not carried out yet.
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
