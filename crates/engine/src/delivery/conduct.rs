//! Conduct of workers: late shards, faults in a row, bans.
//!
//! Always holds: every hop of the fleet has an account, and no other hop has one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_placement::{Binding, Placement, WorkerIx};
use muster_types::{Fault, FaultKind, WorkerId};

use super::transport::{Fleet, Hop, Route};
use crate::batcher::Rank;

/// First ban of a worker that broke the protocol.
const FIRST_BAN: Duration = Duration::from_secs(1);
/// Most doublings of the ban.
const MOST_STRIKES: u32 = 6;
/// Time without a breach after which bans start at the first one again.
const GOOD_CONDUCT: Duration = Duration::from_secs(300);
/// Faults in a row, without outputs in between, that get a worker banned.
const MOST_FAULTS: u32 = 16;

/// Ban of a worker that broke the protocol. Kept while the worker is known, over all its hops.
#[derive(Debug, Clone, Default)]
pub struct Strikes {
    until: Option<Instant>,
    count: u32,
}

impl Strikes {
    /// Counts a breach: each doubles the ban, unless the one before is [`GOOD_CONDUCT`] ago.
    pub fn strike(&mut self, now: Instant) {
        let long_ago = self.until.is_none_or(|until| now.saturating_duration_since(until) > GOOD_CONDUCT);
        self.count = if long_ago { 0 } else { (self.count + 1).min(MOST_STRIKES) };
        self.until = Some(now + FIRST_BAN * (1 << self.count));
    }

    /// Remaining time of the ban.
    #[must_use]
    pub fn left(&self, now: Instant) -> Duration {
        self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }
}

/// One hop's account.
#[derive(Debug, Clone, Copy, Default)]
struct Account {
    /// Number of unanswered late shards.
    late: usize,
    /// One of them has no other owner.
    in_doubt: bool,
    /// Faults since the last outputs.
    faults: u32,
    is_lost: bool,
}

/// The fleet, with an account of each hop.
#[derive(Debug)]
pub(super) struct Workers {
    fleet: Arc<Fleet>,
    accounts: BTreeMap<Hop, Account>,
    /// Preference for each worker of the fleet.
    ranks: Vec<Rank>,
}

/// A hop's late-shard count and doubt flag, for the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doubt {
    pub(super) late: usize,
    pub(super) in_doubt: bool,
}

impl Workers {
    pub(super) fn new(fleet: Arc<Fleet>) -> Self {
        let mut workers = Self { fleet: Arc::clone(&fleet), accounts: BTreeMap::new(), ranks: Vec::new() };
        workers.announced(fleet);
        workers
    }

    /// Adopts a new fleet; returns the previous one.
    pub(super) fn announced(&mut self, fleet: Arc<Fleet>) -> Arc<Fleet> {
        let mut before = std::mem::take(&mut self.accounts);
        let account = |route: &Route| (route.hop, before.remove(&route.hop).unwrap_or_default());
        self.accounts = fleet.routes().iter().map(account).collect();
        let before = std::mem::replace(&mut self.fleet, fleet);
        self.rank_all();
        before
    }

    pub(super) fn placement(&self) -> &Placement {
        self.fleet.placement()
    }

    pub(super) fn binding(&self) -> &Binding {
        self.fleet.binding()
    }

    /// Changes with the fleet.
    pub(super) fn version(&self) -> u64 {
        self.fleet.placement().epoch().get()
    }

    pub(super) fn route(&self, worker: WorkerIx) -> Option<(Route, &WorkerId)> {
        self.fleet.route(worker)
    }

    /// The worker at the end of a hop.
    pub(super) fn name(&self, hop: Hop) -> Option<&WorkerId> {
        let at = self.fleet.routes().iter().position(|route| route.hop == hop)?;
        self.fleet.placement().workers().get(at)
    }

    pub(super) fn rank(&self, worker: WorkerIx) -> Rank {
        self.ranks.get(worker.index()).copied().unwrap_or(Rank::Unusable)
    }

    fn rank_all(&mut self) {
        let rank = |route: &Route| match self.accounts.get(&route.hop) {
            None | Some(Account { is_lost: true, .. }) => Rank::Unusable,
            Some(account) if account.late > 0 => route.rank.max(Rank::Poor),
            Some(_) => route.rank,
        };
        self.ranks = self.fleet.routes().iter().map(rank).collect();
    }

    /// Loses a hop; false when it was lost before.
    pub(super) fn lost(&mut self, hop: Hop) -> bool {
        let Some(account) = self.accounts.get_mut(&hop) else { return false };
        if account.is_lost {
            return false;
        }
        *account = Account { is_lost: true, ..Account::default() };
        self.rank_all();
        true
    }

    /// Counts a late shard: other owners are preferred until it is answered.
    pub(super) fn late(&mut self, hop: Hop) -> Option<Doubt> {
        self.change(hop, |account| account.late += 1)
    }

    /// Clears one late shard.
    pub(super) fn answered_late(&mut self, hop: Hop) -> Option<Doubt> {
        self.change(hop, |account| {
            account.late = account.late.saturating_sub(1);
            account.in_doubt &= account.late > 0;
        })
    }

    /// Sets the doubt flag: a late shard has no other owner.
    pub(super) fn needed(&mut self, hop: Hop) -> Option<Doubt> {
        self.change(hop, |account| account.in_doubt = true)
    }

    /// Changes an account; returns the [`Doubt`] to report if it changed.
    fn change(&mut self, hop: Hop, change: impl FnOnce(&mut Account)) -> Option<Doubt> {
        let account = self.accounts.get_mut(&hop).filter(|account| !account.is_lost)?;
        let before = *account;
        change(account);
        let Account { late, in_doubt, .. } = *account;
        if (late > 0) != (before.late > 0) {
            self.rank_all();
        }
        ((late, in_doubt) != (before.late, before.in_doubt)).then_some(Doubt { late, in_doubt })
    }

    /// Counts an answer.
    ///
    /// # Errors
    /// The reason for a ban, when a worker gives nothing but faults.
    pub(super) fn judge<O>(&mut self, hop: Hop, outcome: &Result<O, Fault>) -> Result<(), String> {
        let Some(account) = self.accounts.get_mut(&hop) else { return Ok(()) };
        match outcome {
            Ok(_) => account.faults = 0,
            // Backpressure and drain are no misconduct.
            Err(Fault { kind: FaultKind::Overloaded | FaultKind::Draining, .. }) => {}
            Err(fault) => {
                account.faults += 1;
                if account.faults >= MOST_FAULTS {
                    return Err(format!("{MOST_FAULTS} errors in a row; the last: {fault}"));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ban_doubles_with_each_breach_up_to_a_minute_and_is_forgotten() {
        let (mut strikes, mut now) = (Strikes::default(), Instant::now());
        assert_eq!(strikes.left(now), Duration::ZERO);
        for seconds in [1, 2, 4, 8, 16, 32, 64, 64] {
            strikes.strike(now);
            assert_eq!(strikes.left(now), Duration::from_secs(seconds));
            now += Duration::from_secs(seconds) + GOOD_CONDUCT;
            assert_eq!(strikes.left(now), Duration::ZERO);
        }
        strikes.strike(now + Duration::from_millis(1));
        assert!(strikes.left(now) < Duration::from_secs(2));
    }
}
