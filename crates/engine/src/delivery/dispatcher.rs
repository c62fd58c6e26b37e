//! Shards in flight: sends them, hedges late ones, and records each worker's conduct.
//!
//! Always holds: a shard is accounted for from its sending until it is answered, its hop is lost, or its flight is over and it
//! is not late. Knows flights one at a time, and nothing of how outputs are combined.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use muster_placement::hedge::Outcome;
use muster_types::{LayerId, WorkerId};

use super::conduct::{Doubt, Workers};
use super::flight::{Failure, Flight, Part, Shard};
use super::hedges::Hedges;
use super::observer::{Note, Observer};
use super::transport::{Fleet, Hop, Route, Transport};
use crate::batcher::StandIn;
use crate::dispatch::Ticket;

/// A flight over a transport.
pub(super) type FlightOver<T> = Flight<<T as Transport>::Load, <T as Transport>::Outputs>;

/// A shard that awaits its answer.
#[derive(Debug)]
struct Out {
    /// `None` after its flight is over: its answer then only clears the worker's late count.
    ticket: Option<Ticket>,
    part: usize,
    hop: Hop,
    is_late: bool,
}

/// See the module.
pub(super) struct Dispatcher<T, O> {
    pub(super) transport: T,
    pub(super) observer: O,
    pub(super) workers: Workers,
    hedges: Hedges,
    out: BTreeMap<u64, Out>,
    /// The last shard id given out.
    issued: u64,
    /// Parts lost with their hop whose flights do not know it yet.
    fallen: Vec<(Ticket, usize, Failure)>,
}

impl<T: Transport, O: Observer> Dispatcher<T, O> {
    pub(super) fn new(transport: T, observer: O, fleet: Arc<Fleet>) -> Self {
        Self {
            transport,
            observer,
            workers: Workers::new(fleet),
            hedges: Hedges::default(),
            out: BTreeMap::new(),
            issued: 0,
            fallen: Vec::new(),
        }
    }

    /// The next shard id.
    pub(super) const fn issue(&mut self) -> u64 {
        self.issued += 1;
        self.issued
    }

    /// Sends a part of a flight. A part that cannot be sent has failed.
    pub(super) fn send(&mut self, ticket: Ticket, flight: &mut FlightOver<T>, part: usize) {
        let shard = &flight.parts()[part].shard;
        let Shard { id, hop, .. } = *shard;
        match self.transport.send(hop, flight.lane, &shard.outgoing(flight.layer)) {
            Ok(()) => {
                self.out.insert(id, Out { ticket: Some(ticket), part, hop, is_late: false });
            }
            Err(unsent) => flight.fail(part, Failure::Unsent(unsent)),
        }
    }

    /// Starts the wait for a flight, unless it has started.
    pub(super) fn begin(&self, flight: &mut FlightOver<T>, now: Instant) {
        flight.begin(now, |shard| self.hedges.patience(shard));
    }

    /// Sends stand-ins for failed and late parts to other owners, where there are any.
    pub(super) fn replace(&mut self, ticket: Ticket, flight: &mut FlightOver<T>, now: Instant) {
        loop {
            let parts = flight.to_replace(now);
            let mut has_sent = false;
            for number in parts {
                let is_late = flight.is_waiting(number);
                if is_late && !self.is_given_up(flight, number) {
                    continue;
                }
                has_sent |= self.stand_in(ticket, flight, number, now);
            }
            if !has_sent {
                return;
            }
            self.transport.flush();
        }
    }

    /// Records a late part; true when it is to be hedged now.
    fn is_given_up(&mut self, flight: &mut FlightOver<T>, number: usize) -> bool {
        flight.is_late();
        let Part { shard, deferred, .. } = &flight.parts()[number];
        if let Some(out) = self.out.get_mut(&shard.id)
            && !std::mem::replace(&mut out.is_late, true)
        {
            self.observer.note(Note::Late { worker: &shard.worker, layer: flight.layer });
            let doubt = self.workers.late(shard.hop);
            self.tell(shard.hop, doubt);
        }
        // With everything late, hedges would only add load.
        if !deferred && !self.hedges.afford() {
            let more = self.hedges.extension(shard);
            flight.defer(number, more);
            return false;
        }
        true
    }

    /// Sends stand-ins for a part; false when it has no other owner.
    fn stand_in(&mut self, ticket: Ticket, flight: &mut FlightOver<T>, number: usize, now: Instant) -> bool {
        let stand_ins = flight.plan_stand_ins(number, &self.workers);
        if flight.needs(number) {
            let hop = flight.parts()[number].shard.hop;
            let doubt = self.workers.needed(hop);
            self.tell(hop, doubt);
        }
        let first = flight.parts().len();
        let mut shards = Vec::with_capacity(stand_ins.len());
        for stand_in in stand_ins {
            let weights = flight.weights_of(number, &stand_in);
            let StandIn { plan, picked, places } = stand_in;
            let Some((Route { hop, epoch, class, .. }, worker)) = self.workers.route(plan.worker) else {
                continue;
            };
            let (worker, load) =
                (worker.clone(), self.transport.pick(&flight.parts()[number].shard.load, &picked));
            shards.push((Shard { id: self.issue(), hop, epoch, worker, class, plan, load, weights }, places));
        }
        if shards.is_empty() {
            return false;
        }
        let is_hedge = flight.is_waiting(number);
        self.observer.note(Note::StandIns { shards: shards.len(), is_hedge });
        flight.replace(number, shards, now, |shard| self.hedges.patience(shard));
        (first..flight.parts().len()).for_each(|part| self.send(ticket, flight, part));
        true
    }

    /// Records the latency of an answered part.
    pub(super) fn observe(&mut self, flight: &FlightOver<T>, part: usize, at: Instant) {
        self.hedges.observe(&flight.parts()[part].shard, flight.waited(part, at));
    }

    /// Records the outcome of a flight's hedges.
    pub(super) fn learn(&mut self, flight: &FlightOver<T>, now: Instant) {
        for (number, part) in flight.parts().iter().enumerate().filter(|(_, part)| part.hedged) {
            let outcome = if flight.arrived(number).is_some() {
                Outcome::Wasted
            } else {
                self.hedges.observe(&part.shard, flight.waited(number, now));
                Outcome::Won
            };
            self.hedges.learn(&part.shard, outcome);
        }
    }

    /// Bans the worker of a part that lied.
    pub(super) fn lied(&mut self, flight: &FlightOver<T>, part: usize, reason: &str) {
        let Shard { worker, hop, .. } = &flight.parts()[part].shard;
        self.ban(*hop, worker, Some(flight.layer), reason);
    }

    fn ban(&mut self, hop: Hop, worker: &WorkerId, layer: Option<LayerId>, reason: &str) {
        // Several lies on one hop count once.
        if self.lost(hop, &Failure::Lied(reason.to_owned())) {
            self.observer.note(Note::Lied { worker, layer, reason });
            self.transport.ban(hop, reason);
        }
    }

    /// Loses a hop and the shards on it; false when it was lost before.
    pub(super) fn lost(&mut self, hop: Hop, failure: &Failure) -> bool {
        let fallen = &mut self.fallen;
        self.out.retain(|_, out| {
            let is_lost = out.hop == hop;
            if is_lost && let Some(ticket) = out.ticket {
                fallen.push((ticket, out.part, failure.clone()));
            }
            !is_lost
        });
        self.workers.lost(hop)
    }

    /// Parts lost with their hops since the last call.
    pub(super) fn take_fallen(&mut self) -> Vec<(Ticket, usize, Failure)> {
        std::mem::take(&mut self.fallen)
    }

    /// Whether there are such parts.
    pub(super) const fn has_fallen(&self) -> bool {
        !self.fallen.is_empty()
    }

    /// Accounts for an answered shard. Returns its flight and part, unless its flight is over or its hop is lost.
    pub(super) fn answered<A>(
        &mut self,
        id: u64,
        outcome: &Result<A, muster_types::Fault>,
    ) -> Option<(Ticket, usize)> {
        let Some(Out { ticket, part, hop, is_late }) = self.out.remove(&id) else {
            self.observer.note(Note::TooLate);
            return None;
        };
        if is_late {
            let doubt = self.workers.answered_late(hop);
            self.tell(hop, doubt);
        }
        if ticket.is_none() {
            self.observer.note(Note::TooLate);
        }
        if let Err(reason) = self.workers.judge(hop, outcome)
            && let Some(worker) = self.workers.name(hop).cloned()
        {
            self.ban(hop, &worker, None, &reason);
        }
        ticket.map(|ticket| (ticket, part))
    }

    /// Ends the wait for a flight's shards.
    pub(super) fn forget(&mut self, flight: &FlightOver<T>) {
        for id in flight.ids() {
            match self.out.get_mut(&id) {
                // Its answer will clear the worker's late count.
                Some(out) if out.is_late => out.ticket = None,
                _ => drop(self.out.remove(&id)),
            }
        }
    }

    pub(super) fn close(&mut self) {
        self.out.clear();
        self.fallen.clear();
        self.transport.close();
    }

    fn tell(&mut self, hop: Hop, doubt: Option<Doubt>) {
        if let Some(Doubt { late, in_doubt }) = doubt {
            self.transport.doubt(hop, late, in_doubt);
        }
    }
}
