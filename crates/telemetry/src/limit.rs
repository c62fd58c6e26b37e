//! Limit of log lines from one place in the code.
//!
//! A peer can cause a line with every frame, call or handshake. So each place in the code that logs has an account of its
//! own: a burst, filled up at a steady pace. What is left out is counted, and told with the next line from that place.
//! It holds for every line of `info` and above, also those of libraries, so that no place can be forgotten; what is below
//! was asked for by name and is written in full.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata};
use tracing_subscriber::layer::{Context, Filter};

/// Lines of one place at once.
const BURST: u32 = 50;
/// After that: one for each.
const PACE: Duration = Duration::from_secs(1);

/// The accounts of all places, of which there are as many as the code has. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Limits(Arc<Mutex<HashMap<Identifier, Account>>>);

struct Account {
    lines: u32,
    /// When the last line was added.
    filled: Instant,
    /// Lines left out and not yet told.
    left_out: u64,
}

impl Account {
    fn new(now: Instant) -> Self {
        Self { lines: BURST, filled: now, left_out: 0 }
    }

    fn takes(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.filled).as_millis() / PACE.as_millis();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned >= BURST - self.lines {
            (self.lines, self.filled) = (BURST, now);
        } else {
            self.lines += earned;
            self.filled += PACE * earned;
        }
        let takes = self.lines > 0;
        if takes {
            self.lines -= 1;
        } else {
            self.left_out += 1;
        }
        takes
    }
}

impl Limits {
    fn accounts(&self) -> MutexGuard<'_, HashMap<Identifier, Account>> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn takes(&self, metadata: &Metadata<'_>, now: Instant) -> bool {
        if *metadata.level() > Level::INFO {
            return true;
        }
        let mut accounts = self.accounts();
        accounts.entry(metadata.callsite()).or_insert_with(|| Account::new(now)).takes(now)
    }

    /// Lines of this place that were left out since the last call.
    pub(crate) fn left_out(&self, metadata: &Metadata<'_>) -> u64 {
        let mut accounts = self.accounts();
        accounts.get_mut(&metadata.callsite()).map_or(0, |account| std::mem::take(&mut account.left_out))
    }
}

impl<S> Filter<S> for Limits {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn callsite_enabled(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::always()
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let takes = self.takes(event.metadata(), Instant::now());
        if !takes {
            metrics::counter!("muster_log_lines_left_out_total").increment(1);
        }
        takes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_allows_a_burst_and_a_pace_and_counts_the_rest() {
        let mut now = Instant::now();
        let mut account = Account::new(now);
        let taken = |account: &mut Account, now| (0..1000).filter(|_| account.takes(now)).count();
        assert_eq!(taken(&mut account, now), 50);
        assert_eq!(account.left_out, 950);
        for _ in 0..4 {
            now += PACE / 2;
            let _ = account.takes(now);
        }
        assert_eq!(account.left_out, 952, "two of four lines at twice the pace");
        now += PACE * 10_000;
        assert_eq!(taken(&mut account, now), 50);
    }
}
