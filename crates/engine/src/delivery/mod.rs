//! The life of a micro-batch between the trunk and the workers: plan, send, hedge, stand in, doubt, ban, combine or fail.
//!
//! [`Delivery`] is the one implementation of [`ExpertDispatch`]. It decides and keeps accounts; a [`Transport`] carries, a
//! [`Sums`] adds up, an [`Observer`] counts. It has no socket, lock, thread or clock: the time is passed in. Callers drive it
//! as a whole, by [`ExpertDispatch`]'s `submit` and `collect`, which wait in the transport, or step by step, by
//! [`Delivery::take`] and [`Delivery::advance`], which never wait.
//!
//! Always holds: only checked outputs are added up; `collect` waits no longer than its deadline, whatever workers do; a
//! failure costs only the rows of experts that have no other owner left.
//!
//! - `transport`: the seam to a transport, its calls and its events;
//! - `dispatcher`: shards in flight;
//! - `flight`: the state of each (row, expert) pair of a micro-batch;
//! - `conduct`: each worker's conduct: late shards, faults, bans;
//! - `hedges`: when a shard is late;
//! - `observer`: the events to count.

mod conduct;
mod dispatcher;
mod flight;
mod hedges;
mod observer;
mod transport;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_types::{ClassSet, Combine, DType, Fault, Term};

pub use self::conduct::Strikes;
use self::dispatcher::{Dispatcher, FlightOver};
use self::flight::{Failure, Flight, Shard};
pub use self::observer::{Note, Observer, Summed};
pub use self::transport::{
    Arrived, Closed, Ended, Event, Fleet, Hop, Outgoing, Outputs, Route, Transport, Unsent, Wanted,
};
use crate::batcher::{BatchPlan, group};
use crate::dispatch::{Bound, DispatchError, ExpertDispatch, LayerBatch, Loss, Place, RowsMut, Ticket};

/// Limits and shapes that every micro-batch must meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contract {
    /// Routed experts of every layer.
    pub experts: Vec<u32>,
    /// Elements of a hidden row.
    pub hidden: usize,
    /// What hidden rows and outputs are rounded to.
    pub wire: DType,
    /// Most experts per row.
    pub top_k: usize,
    /// Most rows of a micro-batch.
    pub max_rows: usize,
    /// Number of lanes.
    pub lanes: usize,
    /// Where outputs are added up.
    pub combine: Combine,
}

/// Outputs that cannot be combined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unsound {
    /// A source has a value that is not finite and not marked.
    Source {
        /// Its place among the sources.
        source: usize,
        /// The row in it.
        row: usize,
    },
    /// Outputs are finite, and the sums of these rows are not.
    Sums(Vec<u32>),
}

/// Combines outputs into sums.
pub trait Sums<O>: Send {
    /// Memory that sums are written to.
    fn place(&self) -> Place;

    /// Writes `sum of weight * output` for every row of `out`. Row `r` has the terms `starts[r]..starts[r + 1]`, in that
    /// order; each product and each sum is rounded to f32.
    ///
    /// # Errors
    /// [`Unsound`] names the rows, or the source, with a value that is not finite. `out` is unspecified in those rows, and wholly
    /// for a source.
    fn sum(
        &mut self,
        sources: &[&O],
        starts: &[u32],
        terms: &[Term],
        out: &mut RowsMut<'_>,
    ) -> Result<(), Unsound>;
}

/// State of a micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Complete; these rows have no sum.
    Done(Vec<Loss>),
    /// Answers are outstanding.
    Waits(Wanted),
}

/// See the module.
pub struct Delivery<T: Transport, S, O = ()> {
    contract: Contract,
    flights: BTreeMap<Ticket, FlightOver<T>>,
    tickets: u64,
    dispatcher: Dispatcher<T, O>,
    sums: S,
    /// Of the workers that outputs came from since this was last asked.
    classes: ClassSet,
    events: Vec<Event<T::Outputs>>,
    is_closed: bool,
}

impl<T: Transport, S: Sums<T::Outputs>, O: Observer> Delivery<T, S, O> {
    /// A delivery over `transport` to `fleet`.
    pub fn new(contract: Contract, fleet: Arc<Fleet>, transport: T, sums: S, observer: O) -> Self {
        Self {
            contract,
            flights: BTreeMap::new(),
            tickets: 0,
            dispatcher: Dispatcher::new(transport, observer, fleet),
            sums,
            classes: ClassSet::EMPTY,
            events: Vec::new(),
            is_closed: false,
        }
    }

    /// The transport.
    pub const fn transport(&self) -> &T {
        &self.dispatcher.transport
    }

    /// The transport.
    pub const fn transport_mut(&mut self) -> &mut T {
        &mut self.dispatcher.transport
    }

    /// The observer.
    pub const fn observer_mut(&mut self) -> &mut O {
        &mut self.dispatcher.observer
    }

    /// Groups a micro-batch by worker over the current fleet and sends its shards.
    ///
    /// # Errors
    /// As [`ExpertDispatch::submit`].
    pub fn submit_at(&mut self, now: Instant, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        if self.is_closed {
            return Err(DispatchError::Closed);
        }
        self.contract.check(batch)?;
        let workers = &self.dispatcher.workers;
        let version = workers.version();
        let rank = |worker| workers.rank(worker);
        let BatchPlan { shards: plans, slots } =
            group(batch.layer, batch.choices, workers.placement(), &rank)?;
        let weights = match self.contract.combine {
            Combine::Exact => vec![Vec::new(); plans.len()],
            Combine::Partial => flight::weights(batch.choices, &plans, &slots),
        };
        let mut shards = Vec::with_capacity(plans.len());
        for (plan, weights) in plans.into_iter().zip(weights) {
            let route = self.dispatcher.workers.route(plan.worker);
            let Some((Route { hop, epoch, class, .. }, worker)) = route else {
                return Err(DispatchError::Invalid("a plan names no worker of the placement".into()));
            };
            let worker = worker.clone();
            let load = self.dispatcher.transport.gather(batch.rows, &plan.rows)?;
            shards.push(Shard {
                id: self.dispatcher.issue(),
                hop,
                epoch,
                worker,
                class,
                plan,
                load,
                weights,
            });
        }
        self.tickets += 1;
        let (ticket, count) = (Ticket::new(self.tickets), shards.len());
        let sent = self.dispatcher.transport.now();
        let mut flight = Flight::new(batch, &slots, self.contract.combine, shards, version, now, sent);
        (0..count).for_each(|part| self.dispatcher.send(ticket, &mut flight, part));
        self.dispatcher.transport.flush();
        self.flights.insert(ticket, flight);
        Ok(ticket)
    }

    /// Handles one event of the transport.
    pub fn take(&mut self, event: Event<T::Outputs>) {
        match event {
            Event::Announced(fleet) => drop(self.dispatcher.workers.announced(fleet)),
            Event::Lost { hop, how: Ended::Gone(reason) } => {
                let _ = self.dispatcher.lost(hop, &Failure::Lost(reason));
            }
            Event::Lost { hop, how: Ended::Lied(reason) } => {
                let _ = self.dispatcher.lost(hop, &Failure::Lied(reason));
            }
            Event::Answer { id, outcome } => {
                if let Some((ticket, part)) = self.dispatcher.answered(id, &outcome) {
                    self.answered(ticket, part, outcome);
                }
            }
        }
        self.tell_fallen();
    }

    fn tell_fallen(&mut self) {
        for (ticket, part, failure) in self.dispatcher.take_fallen() {
            self.failed(ticket, part, failure);
        }
    }

    fn failed(&mut self, ticket: Ticket, part: usize, failure: Failure) {
        self.dispatcher.observer.note(Note::Fault(failure.name()));
        if let Some(flight) = self.flights.get_mut(&ticket) {
            flight.fail(part, failure);
        }
    }

    fn answered(&mut self, ticket: Ticket, part: usize, outcome: Result<Arrived<T::Outputs>, Fault>) {
        let arrived = match outcome {
            Ok(arrived) => arrived,
            Err(fault) => return self.failed(ticket, part, Failure::Fault(fault)),
        };
        let Some(flight) = self.flights.get_mut(&ticket) else { return };
        self.dispatcher.observe(flight, part, arrived.at);
        match arrived.outputs.check(flight.answers(part)) {
            Ok(()) => flight.arrive(part, arrived),
            Err(reason) => {
                self.dispatcher.lied(flight, part, &reason);
                flight.fail(part, Failure::Lied(reason));
            }
        }
    }

    /// Advances a micro-batch as far as it can go now, with stand-ins for failed and late shards. A complete micro-batch has
    /// spent its ticket.
    ///
    /// # Errors
    /// As [`ExpertDispatch::collect`].
    pub fn advance(
        &mut self,
        ticket: Ticket,
        now: Instant,
        deadline: Instant,
        out: &mut RowsMut<'_>,
    ) -> Result<Progress, DispatchError> {
        loop {
            self.tell_fallen();
            let Some(flight) = self.flights.get_mut(&ticket) else { return Err(unknown(ticket)) };
            self.dispatcher.begin(flight, now);
            for part in flight.take_contradicted() {
                self.dispatcher.lied(flight, part, "another worker contradicts its error");
            }
            if flight.is_complete() {
                match finish(&mut self.dispatcher, &mut self.sums, flight, now, out) {
                    Ok(()) => {
                        self.classes.extend(flight.classes());
                        self.dispatcher.learn(flight, now);
                        let lost = flight.losses();
                        self.cancel(ticket);
                        return Ok(Progress::Done(lost));
                    }
                    Err(Bad::Part(part, reason)) => {
                        self.dispatcher.lied(flight, part, &reason);
                        flight.disown(part, reason);
                    }
                    Err(Bad::Sums(rows)) => {
                        let error = DispatchError::NonFiniteSum { layer: flight.layer };
                        rows.into_iter().for_each(|row| flight.lose(row, error.clone()));
                        continue;
                    }
                }
            }
            flight.look_again(self.dispatcher.workers.version());
            self.dispatcher.replace(ticket, flight, now);
            if flight.is_complete() || self.dispatcher.has_fallen() {
                continue;
            }
            if now >= deadline {
                self.dispatcher.observer.note(Note::Expired);
                flight.expire();
                continue;
            }
            let until = flight.next_due().map_or(deadline, |due| due.min(deadline));
            return Ok(Progress::Waits(Wanted { lane: flight.lane, answers: flight.wanted(), until }));
        }
    }

    /// Handles the transport's pending events without waiting.
    pub fn catch_up(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        self.dispatcher.transport.poll(&mut events);
        self.take_all(events);
    }

    /// Waits for events and handles them.
    fn wait(&mut self, wanted: &Wanted) -> Result<(), Closed> {
        let mut events = std::mem::take(&mut self.events);
        let waited = self.dispatcher.transport.wait(wanted, &mut events);
        self.take_all(events);
        waited
    }

    /// Handles events and keeps their buffer for reuse.
    fn take_all(&mut self, mut events: Vec<Event<T::Outputs>>) {
        events.drain(..).for_each(|event| self.take(event));
        self.events = events;
    }

    fn bring_home(
        &mut self,
        ticket: Ticket,
        deadline: Instant,
        out: &mut RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError> {
        let flight = self.flights.get(&ticket).ok_or_else(|| unknown(ticket))?;
        if out.place() != self.sums.place() {
            return Err(DispatchError::misplaced("room", out.place(), self.sums.place()));
        }
        let (room, want) = (out.len(), flight.rows * self.contract.hidden);
        if room != want {
            return Err(DispatchError::Invalid(format!("room for {room} values of {want}")));
        }
        loop {
            let now = self.dispatcher.transport.now();
            match self.advance(ticket, now, deadline, out)? {
                Progress::Done(lost) => return Ok(lost),
                Progress::Waits(wanted) => self.wait(&wanted).map_err(|Closed| DispatchError::Closed)?,
            }
        }
    }
}

impl<T: Transport, S: Sums<T::Outputs>, O: Observer> ExpertDispatch for Delivery<T, S, O> {
    fn submit(&mut self, batch: &LayerBatch<'_>) -> Result<Ticket, DispatchError> {
        let now = self.dispatcher.transport.now();
        self.catch_up();
        self.submit_at(now, batch)
    }

    fn collect(
        &mut self,
        ticket: Ticket,
        deadline: Instant,
        mut out: RowsMut<'_>,
    ) -> Result<Vec<Loss>, DispatchError> {
        if self.is_closed {
            return Err(DispatchError::Closed);
        }
        let outcome = self.bring_home(ticket, deadline, &mut out);
        self.cancel(ticket);
        outcome
    }

    fn version(&self) -> u64 {
        self.dispatcher.transport.version()
    }

    fn bound(&mut self) -> Bound {
        self.catch_up();
        let binding = self.dispatcher.workers.binding();
        Bound { name: binding.name(), changes: binding.changes() }
    }

    fn take_classes(&mut self) -> ClassSet {
        std::mem::take(&mut self.classes)
    }

    fn cancel(&mut self, ticket: Ticket) {
        if let Some(flight) = self.flights.remove(&ticket) {
            self.dispatcher.forget(&flight);
        }
    }

    fn close(&mut self) {
        if !std::mem::replace(&mut self.is_closed, true) {
            self.flights.clear();
            self.dispatcher.close();
        }
    }
}

impl Contract {
    fn check(&self, batch: &LayerBatch<'_>) -> Result<(), DispatchError> {
        let LayerBatch { layer, lane, rows, choices } = *batch;
        let invalid = |reason| Err(DispatchError::Invalid(reason));
        if lane >= self.lanes {
            return invalid(format!("lane {lane} of {}", self.lanes));
        }
        let count = self.experts.get(layer.index()).copied().unwrap_or(0);
        if count == 0 {
            return invalid(format!("layer {layer} has no routed experts"));
        }
        if let Some(expert) = choices.experts().iter().find(|expert| expert.get() >= count) {
            return invalid(format!("layer {layer} has no expert {expert}: there are {count}"));
        }
        if choices.k() > self.top_k {
            return invalid(format!("{} experts per row; the model picks {}", choices.k(), self.top_k));
        }
        if choices.rows() > self.max_rows {
            return invalid(format!("{} rows; at most {} were announced", choices.rows(), self.max_rows));
        }
        let (count, hidden) = (rows.count(), rows.hidden());
        if (count, hidden) != (choices.rows(), self.hidden) {
            let (rows, wide) = (choices.rows(), self.hidden);
            return invalid(format!("{count} rows of {hidden} instead of {rows} of {wide}"));
        }
        if rows.dtype() != self.wire {
            return invalid(format!("rows are {}; the wire dtype is {}", rows.dtype(), self.wire));
        }
        Ok(())
    }
}

/// Why arrived outputs cannot be used.
enum Bad {
    /// A part has a value that is not finite.
    Part(usize, String),
    /// The sums of these rows are not finite.
    Sums(Vec<u32>),
}

/// Combines the arrived outputs.
fn finish<T: Transport, S: Sums<T::Outputs>, O: Observer>(
    dispatcher: &mut Dispatcher<T, O>,
    sums: &mut S,
    flight: &FlightOver<T>,
    now: Instant,
    out: &mut RowsMut<'_>,
) -> Result<(), Bad> {
    if flight.is_lost() {
        return Ok(());
    }
    let began = dispatcher.transport.now();
    let sum = flight.sum();
    let arrived: Vec<_> = sum.sources.iter().filter_map(|&part| flight.arrived(part)).collect();
    let sources: Vec<&T::Outputs> = arrived.iter().map(|arrived| &arrived.outputs).collect();
    sums.sum(&sources, &sum.starts, &sum.terms, out).map_err(|unsound| match unsound {
        Unsound::Source { source, row } => {
            Bad::Part(sum.sources[source], format!("row {row} has a value that is not finite"))
        }
        Unsound::Sums(rows) => Bad::Sums(rows),
    })?;
    let combine = dispatcher.transport.now().saturating_duration_since(began);
    dispatcher.observer.note(Note::Summed(Summed {
        layer: flight.layer,
        rows: flight.rows,
        round_trip: now.saturating_duration_since(flight.submitted),
        away: flight.away(),
        compute: arrived.iter().map(|arrived| arrived.compute).max().unwrap_or(Duration::ZERO),
        combine,
    }));
    Ok(())
}

fn unknown(ticket: Ticket) -> DispatchError {
    DispatchError::Invalid(format!("ticket {} is not in flight", ticket.get()))
}
