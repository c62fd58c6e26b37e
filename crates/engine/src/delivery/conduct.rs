//! How workers have behaved: what they owe, how often they failed, how long they are left alone.
//!
//! Always holds: there is an account of every hop of the fleet, and of no other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_placement::{Placement, WorkerIx};
use muster_types::{Fault, FaultKind, WorkerId};

use super::transport::{Fleet, Hop, Route};
use crate::batcher::Rank;

/// How long a worker that broke the protocol is left alone, the first time.
const FIRST_BAN: Duration = Duration::from_secs(1);
/// How often that time may double.
const MOST_STRIKES: u32 = 6;
/// After so long without another breach it begins anew.
const GOOD_CONDUCT: Duration = Duration::from_secs(300);
/// Faults in a row, with no outputs in between, that a worker is banned for.
const MOST_FAULTS: u32 = 16;

/// How long a worker is left alone that broke the protocol. Kept for as long as the worker is known, over all its hops.
#[derive(Debug, Clone, Default)]
pub struct Strikes {
    until: Option<Instant>,
    count: u32,
}

impl Strikes {
    /// Counts a breach: each doubles the time, unless the one before is long past.
    pub fn strike(&mut self, now: Instant) {
        let long_ago = self.until.is_none_or(|until| now.saturating_duration_since(until) > GOOD_CONDUCT);
        self.count = if long_ago { 0 } else { (self.count + 1).min(MOST_STRIKES) };
        self.until = Some(now + FIRST_BAN * (1 << self.count));
    }

    /// Time that is left.
    #[must_use]
    pub fn left(&self, now: Instant) -> Duration {
        self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }
}

/// One hop's account.
#[derive(Debug, Clone, Copy, Default)]
struct Account {
    /// Late shards that are not answered yet.
    late: usize,
    /// One of them nobody else can be asked for.
    in_doubt: bool,
    /// Faults since the last outputs.
    faults: u32,
    is_lost: bool,
}

/// The fleet, and the account of each of its hops.
#[derive(Debug)]
pub(super) struct Workers {
    fleet: Arc<Fleet>,
    accounts: BTreeMap<Hop, Account>,
    /// Preference for each worker of the fleet.
    ranks: Vec<Rank>,
}

/// What a transport is to be told of a hop.
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

    /// Takes a new fleet over; gives the one before.
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

    /// A hop is lost; false when that was known.
    pub(super) fn lost(&mut self, hop: Hop) -> bool {
        let Some(account) = self.accounts.get_mut(&hop) else { return false };
        if account.is_lost {
            return false;
        }
        *account = Account { is_lost: true, ..Account::default() };
        self.rank_all();
        true
    }

    /// A shard is late: until it is answered, others are preferred.
    pub(super) fn late(&mut self, hop: Hop) -> Option<Doubt> {
        self.change(hop, |account| account.late += 1)
    }

    /// A late shard was answered.
    pub(super) fn answered_late(&mut self, hop: Hop) -> Option<Doubt> {
        self.change(hop, |account| {
            account.late = account.late.saturating_sub(1);
            account.in_doubt &= account.late > 0;
        })
    }

    /// A late shard can be asked of nobody else.
    pub(super) fn needed(&mut self, hop: Hop) -> Option<Doubt> {
        self.change(hop, |account| account.in_doubt = true)
    }

    /// Changes an account; gives what there is to tell of it.
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

    /// Takes note of an answer.
    ///
    /// # Errors
    /// When a worker gives nothing but faults, in words.
    pub(super) fn judge<O>(&mut self, hop: Hop, outcome: &Result<O, Fault>) -> Result<(), String> {
        let Some(account) = self.accounts.get_mut(&hop) else { return Ok(()) };
        match outcome {
            Ok(_) => account.faults = 0,
            // It says so for its own good.
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
