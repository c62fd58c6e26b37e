//! Ledger of the copies that a leader may count on while orders and announcements are in flight.
//!
//! An announcement says what a worker held when it was sent. Orders that it had not carried out by then may have taken
//! some of it away since; a leader that counted on it, with a new target in mind, could give up the last other copy. So
//! here a copy counts only if the worker has granted the leader's term, announced the copy after that, and every order
//! of that term which the announcement does not reflect lets it stay. Always holds: what counts, the worker holds, or
//! has died.
//!
//! Orders are numbered, so that workers can tell which of two is newer, and say which announcement they were made with:
//! a worker gives up nothing that it announced later, since the leader may not know of another copy. It answers an order
//! with the epoch of its holdings once those include no copy that it takes away. Knows no clock and no messages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use muster_types::{Epoch, ExpertKey, WorkerId};

use crate::Orders;
use crate::lease::Term;

/// Accounts of all workers under one leader.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger {
    term: Term,
    accounts: BTreeMap<WorkerId, Account>,
}

/// Number and basis of orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Stamp {
    /// Number, ascending per worker and term.
    pub(super) number: u64,
    /// Epoch of the last announcement whose copies all counted. On these orders the worker keeps every copy that it announced later.
    pub(super) seen: Epoch,
}

#[derive(Debug, Clone, Default)]
struct Account {
    /// Epoch of the holdings when this term was granted; later announcements count.
    granted: Option<(Term, Epoch)>,
    announced: Option<(Epoch, BTreeSet<ExpertKey>)>,
    /// The orders sent last.
    last: Option<(Stamp, Orders)>,
    /// Orders that the announcement may not reflect yet, with everything that they let the worker hold.
    open: VecDeque<(Stamp, BTreeSet<ExpertKey>)>,
    /// The last orders carried out, and the epoch that shows it.
    obeyed: Option<(u64, Epoch)>,
}

impl Ledger {
    /// Orders to one worker that are kept apart until it answers; older ones are merged.
    const MOST_OPEN: usize = 8;

    /// Starts a term. In a new term no copy counts until its worker grants it, since another leader may have given orders
    /// meanwhile; workers that granted it carry out no orders of older terms.
    pub(super) fn lead(&mut self, term: Term) {
        if self.term == term {
            return;
        }
        self.term = term;
        for account in self.accounts.values_mut() {
            account.last = None;
            account.open.clear();
            account.obeyed = None;
        }
    }

    /// Records a worker's grant of `term`, first or repeated, and the epoch of its holdings then.
    pub(super) fn granted(&mut self, worker: &WorkerId, term: Term, epoch: Epoch) {
        let account = self.account(worker);
        if account.granted.is_none_or(|(before, _)| before < term) {
            account.granted = Some((term, epoch));
        }
    }

    /// Records a worker's holdings. Announcements older than the last are ignored.
    pub(super) fn announced(&mut self, worker: &WorkerId, epoch: Epoch, held: &BTreeSet<ExpertKey>) {
        let account = self.account(worker);
        if account.announced.as_ref().is_none_or(|&(before, _)| before < epoch) {
            account.announced = Some((epoch, held.clone()));
            account.settle();
        }
    }

    /// Records the end of a worker's session. It counts again after a new grant and a new announcement, even as another process of
    /// that name; orders that may still reach it are kept.
    pub(super) fn lost(&mut self, worker: &WorkerId) {
        let account = self.account(worker);
        (account.granted, account.announced, account.obeyed) = (None, None, None);
        // Epochs of another process say nothing.
        account.open.iter_mut().for_each(|(stamp, _)| stamp.seen = Epoch::default());
    }

    /// Records and stamps orders before they are sent. The same orders on the same announcement get the same stamp.
    pub(super) fn order(&mut self, worker: &WorkerId, orders: &Orders) -> Stamp {
        let account = self.account(worker);
        // With open orders not every announced copy counts, and a copy that did not count must not be given up.
        let announced = account.announced.as_ref().map(|&(epoch, _)| epoch);
        let seen = account.open.front().map(|(stamp, _)| stamp.seen).or(announced).unwrap_or_default();
        let number = match &account.last {
            Some((stamp, last)) if last == orders && stamp.seen == seen => return *stamp,
            Some((stamp, _)) => stamp.number + 1,
            None => 1,
        };
        let stamp = Stamp { number, seen };
        account.last = Some((stamp, orders.clone()));
        account.open.push_back((stamp, orders.hold()));
        if account.open.len() > Self::MOST_OPEN
            && let (Some((first, older)), Some((stamp, newer))) =
                (account.open.pop_front(), account.open.front_mut())
        {
            stamp.seen = first.seen;
            newer.retain(|key| older.contains(key));
        }
        stamp
    }

    /// Records that a worker has carried out the orders of this number in `term`, as its holdings of `epoch` show.
    pub(super) fn obeyed(&mut self, worker: &WorkerId, term: Term, number: u64, epoch: Epoch) {
        if term != self.term {
            return;
        }
        let account = self.account(worker);
        if account.obeyed.is_none_or(|(before, _)| before < number) {
            account.obeyed = Some((number, epoch));
            account.settle();
        }
    }

    /// The copies on a worker that count; `None` while none can be known, when it must get no orders.
    pub(super) fn held(&self, worker: &WorkerId) -> Option<BTreeSet<ExpertKey>> {
        let account = self.accounts.get(worker)?;
        let (term, since) = account.granted?;
        let (epoch, held) = account.announced.as_ref()?;
        if term != self.term || *epoch < since {
            return None;
        }
        let stays = |key: &&ExpertKey| account.open.iter().all(|(_, hold)| hold.contains(key));
        Some(held.iter().filter(stays).copied().collect())
    }

    fn account(&mut self, worker: &WorkerId) -> &mut Account {
        self.accounts.entry(worker.clone()).or_default()
    }
}

impl Account {
    /// Drops the open orders that the announcement reflects.
    fn settle(&mut self) {
        if let (Some((obeyed, shown)), Some((epoch, _))) = (self.obeyed, &self.announced)
            && *epoch >= shown
        {
            self.open.retain(|(stamp, _)| stamp.number > obeyed);
        }
    }
}

#[cfg(test)]
mod tests {
    use muster_types::{ExpertId, LayerId};

    use super::*;

    fn keys(experts: &[u32]) -> BTreeSet<ExpertKey> {
        let layer = LayerId::new(0, 1).unwrap();
        experts.iter().map(|&e| ExpertKey { layer, expert: ExpertId::new(e, 100).unwrap() }).collect()
    }

    fn orders(keep: &[u32], load: &[u32]) -> Orders {
        Orders { keep: keys(keep), load: keys(load).into_iter().collect() }
    }

    fn worker() -> WorkerId {
        WorkerId::new("w").unwrap()
    }

    /// In term 1, with a worker that granted it at epoch 3 and then announced these.
    fn ledger(held: &[u32]) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.lead(Term::new(1));
        ledger.granted(&worker(), Term::new(1), Epoch::new(3));
        ledger.announced(&worker(), Epoch::new(3), &keys(held));
        ledger
    }

    fn number(ledger: &mut Ledger, keep: &[u32], load: &[u32]) -> u64 {
        ledger.order(&worker(), &orders(keep, load)).number
    }

    fn obeyed(ledger: &mut Ledger, number: u64, epoch: u64) {
        ledger.obeyed(&worker(), Term::new(1), number, Epoch::new(epoch));
    }

    #[test]
    fn what_is_ordered_away_counts_no_more() {
        let mut ledger = ledger(&[0, 1]);
        assert_eq!(number(&mut ledger, &[0], &[2]), 1);
        assert_eq!(ledger.held(&worker()), Some(keys(&[0])));
        // Told to hold it again: it may have gone meanwhile, and then has to be loaded.
        assert_eq!(number(&mut ledger, &[0], &[1]), 2);
        assert_eq!(ledger.held(&worker()), Some(keys(&[0])));
        ledger.announced(&worker(), Epoch::new(4), &keys(&[0, 1]));
        assert_eq!(
            ledger.held(&worker()),
            Some(keys(&[0])),
            "announced before it obeyed, for all that is known"
        );
        obeyed(&mut ledger, 1, 5);
        assert_eq!(ledger.held(&worker()), Some(keys(&[0])));
        ledger.announced(&worker(), Epoch::new(6), &keys(&[0, 1]));
        assert_eq!(ledger.held(&worker()), Some(keys(&[0, 1])));
    }

    #[test]
    fn what_is_loaded_counts_when_it_is_announced() {
        let mut ledger = ledger(&[0]);
        ledger.order(&worker(), &orders(&[0], &[1, 2]));
        ledger.announced(&worker(), Epoch::new(4), &keys(&[0, 1]));
        assert_eq!(ledger.held(&worker()), Some(keys(&[0, 1])));
        // What an earlier leader had it load does not, until the order that takes it away is carried out.
        ledger.announced(&worker(), Epoch::new(5), &keys(&[0, 1, 7]));
        assert_eq!(ledger.held(&worker()), Some(keys(&[0, 1])));
    }

    #[test]
    fn the_same_orders_keep_their_stamp() {
        let mut ledger = ledger(&[0]);
        let numbers = [&[0][..], &[0], &[], &[0]].map(|keep| number(&mut ledger, keep, &[]));
        assert_eq!(numbers, [1, 1, 2, 3]);
        // They may take away what was announced since only after it could be counted on.
        ledger.announced(&worker(), Epoch::new(5), &keys(&[0, 1]));
        let stamp = ledger.order(&worker(), &orders(&[0], &[]));
        assert_eq!(stamp, Stamp { number: 3, seen: Epoch::new(3) });
        obeyed(&mut ledger, 3, 5);
        let stamp = ledger.order(&worker(), &orders(&[0], &[]));
        assert_eq!(stamp, Stamp { number: 4, seen: Epoch::new(5) });
        ledger.lead(Term::new(2));
        assert_eq!(number(&mut ledger, &[0], &[]), 1);
    }

    #[test]
    fn nothing_counts_that_may_be_older_than_the_term() {
        let mut ledger = ledger(&[0]);
        assert_eq!(ledger.held(&WorkerId::new("other").unwrap()), None);
        ledger.lead(Term::new(2));
        assert_eq!(ledger.held(&worker()), None);
        ledger.granted(&worker(), Term::new(2), Epoch::new(5));
        // A renewal changes nothing, though more was announced meanwhile.
        ledger.granted(&worker(), Term::new(2), Epoch::new(9));
        ledger.announced(&worker(), Epoch::new(4), &keys(&[0]));
        assert_eq!(ledger.held(&worker()), None);
        ledger.announced(&worker(), Epoch::new(5), &keys(&[1]));
        ledger.announced(&worker(), Epoch::new(4), &keys(&[0]));
        assert_eq!(ledger.held(&worker()), Some(keys(&[1])));
        // What was carried out of an older term's orders says nothing about those of this one.
        ledger.order(&worker(), &orders(&[], &[]));
        obeyed(&mut ledger, 1, 5);
        assert_eq!(ledger.held(&worker()), Some(keys(&[])));
    }

    #[test]
    fn what_was_carried_out_in_another_term_settles_nothing_in_this_one() {
        let mut ledger = ledger(&[0, 1]);
        let last = number(&mut ledger, &[0, 1], &[]);
        obeyed(&mut ledger, last, 3);
        ledger.lead(Term::new(2));
        ledger.granted(&worker(), Term::new(2), Epoch::new(4));
        ledger.announced(&worker(), Epoch::new(4), &keys(&[0, 1]));
        assert_eq!(number(&mut ledger, &[0], &[]), last);
        ledger.announced(&worker(), Epoch::new(5), &keys(&[0, 1]));
        assert_eq!(ledger.held(&worker()), Some(keys(&[0])));
    }

    #[test]
    fn a_worker_that_comes_back_starts_anew_and_old_orders_may_still_reach_it() {
        let mut ledger = ledger(&[0, 1]);
        ledger.order(&worker(), &orders(&[0], &[]));
        ledger.lost(&worker());
        assert_eq!(ledger.held(&worker()), None);
        ledger.granted(&worker(), Term::new(1), Epoch::new(1));
        ledger.announced(&worker(), Epoch::new(1), &keys(&[0, 1]));
        assert_eq!(ledger.held(&worker()), Some(keys(&[0])));
        let stamp = ledger.order(&worker(), &orders(&[0], &[1]));
        assert_eq!(stamp, Stamp { number: 2, seen: Epoch::default() });
        obeyed(&mut ledger, 2, 1);
        assert_eq!(ledger.held(&worker()), Some(keys(&[0, 1])));
    }

    #[test]
    fn orders_that_are_never_answered_take_no_more_and_no_more_memory() {
        let mut ledger = ledger(&[0, 1, 2]);
        ledger.order(&worker(), &orders(&[0, 1], &[]));
        for _ in 0..50 {
            ledger.order(&worker(), &orders(&[0], &[1, 2]));
            ledger.order(&worker(), &orders(&[0, 1], &[2]));
        }
        assert_eq!(ledger.accounts[&worker()].open.len(), Ledger::MOST_OPEN);
        assert_eq!(ledger.held(&worker()), Some(keys(&[0, 1])));
        obeyed(&mut ledger, 101, 3);
        assert_eq!(ledger.held(&worker()), Some(keys(&[0, 1, 2])));
    }
}
