//! Bringing a micro-batch to its end: waiting, checking, asking others where somebody fails, adding up.
//!
//! What must hold: nothing is added up that was not checked; whatever a worker does, the engine thread waits no longer
//! than the deadline; a failure costs only the rows that nobody is left to ask for.

use std::time::{Duration, Instant};

use bytes::Bytes;
use muster_engine::dispatch::{DispatchError, Loss, Ticket};
use muster_kernels::{NotFinite, Outputs, combine};
use muster_placement::hedge::{Hedge, Outcome, Rules};
use muster_proto::frame;
use muster_proto::reply::OutputRows;
use muster_types::DType;

use super::board::{Arrived, Failure, Unsent};
use super::dispatch::GrpcDispatch;
use super::flight::{Flight, Part, Shard, Sum};
use super::handle::Sample;
use crate::busy::BusyPoll;

/// When a shard is late. A busy core must not be taken for a dead worker, and large shards may take long.
const HEDGE: Rules = Rules {
    floor: Duration::from_millis(20),
    cap: Duration::from_secs(5),
    unknown: Duration::from_millis(150),
    quantile: 0.99,
    factor: 2.0,
};
/// How many times longer a late shard is waited for when no hedge can be afforded.
const DEFERRED: u32 = 4;
/// Workers whose latencies are kept.
const MOST_KNOWN: usize = 4096;

/// Why what came cannot be used.
enum Unsound {
    /// A part has something in it that is no number.
    Part(usize, String),
    /// Outputs are numbers and the sums of these rows are none.
    Sums(Vec<u32>),
}

/// What a shard's time depends on: its outputs.
fn size(shard: &Shard) -> u32 {
    u32::try_from(shard.plan.indices.len()).unwrap_or(u32::MAX)
}

impl GrpcDispatch {
    /// Brings a micro-batch to its end, whoever fails on the way as long as somebody else can stand in. Gives the rows for
    /// which nobody could.
    pub(super) fn complete(
        &mut self,
        ticket: Ticket,
        flight: &mut Flight,
        deadline: Instant,
        out: &mut [f32],
    ) -> Result<Vec<Loss>, DispatchError> {
        let away = flight.sent.elapsed();
        let mut busy = BusyPoll::start(self.busy_poll);
        // Nobody drove the network for certain before, so this is where waiting begins.
        let mut now = Instant::now();
        flight.begin(now, |shard| self.patience(shard));
        loop {
            for part in flight.take_contradicted() {
                self.lied(flight, part, "another worker contradicts its error");
            }
            if flight.is_complete() {
                match self.finish(flight, now, away, out) {
                    Ok(()) => {
                        self.learn(flight, now);
                        return Ok(flight.losses());
                    }
                    Err(Unsound::Part(part, reason)) => {
                        self.lied(flight, part, &reason);
                        flight.disown(part, reason);
                    }
                    Err(Unsound::Sums(rows)) => {
                        let error = DispatchError::NonFiniteSum { layer: flight.layer };
                        rows.into_iter().for_each(|row| flight.lose(row, error.clone()));
                        continue;
                    }
                }
            }
            flight.look_again(self.board.version());
            self.replace(ticket, flight, now)?;
            if flight.is_complete() {
                continue;
            }
            if now >= deadline {
                metrics::counter!("muster_dispatch_deadlines_total").increment(1);
                flight.expire();
                continue;
            }
            let until = flight.next_due().map_or(deadline, |due| due.min(deadline));
            let news = self.reins.drive(self.board.wait(ticket, flight.version, until, &mut busy));
            let news = news.unwrap_or(Err(DispatchError::Closed))?;
            now = Instant::now();
            for (part, outcome) in news {
                self.take(flight, part, outcome);
            }
        }
    }

    /// How long a shard may take before it is late.
    fn patience(&self, shard: &Shard) -> Duration {
        self.hedges.get(&shard.worker).map_or(HEDGE.unknown, |hedge| hedge.deadline(size(shard)))
    }

    /// Takes in what came of a part.
    fn take(&mut self, flight: &mut Flight, part: usize, outcome: Result<Arrived, Failure>) {
        match outcome {
            Ok(arrived) => {
                let Part { shard, since, .. } = &flight.parts()[part];
                self.observe(shard, arrived.at.saturating_duration_since(*since));
                let answers = flight.answers(part);
                let OutputRows { rows, data, .. } = &arrived.outputs;
                let checked = if *rows as usize == answers {
                    frame::check_len(data, answers, self.hidden, self.wire).map_err(|error| error.to_string())
                } else {
                    Err(format!("{rows} rows instead of {answers}"))
                };
                match checked {
                    Ok(()) => flight.arrive(part, arrived),
                    Err(reason) => {
                        self.lied(flight, part, &reason);
                        flight.fail(part, Failure::Bad(reason));
                    }
                }
            }
            Err(failure) => {
                let reason = match &failure {
                    Failure::Fault(fault) => fault.kind.name(),
                    Failure::Lost(_) => "lost",
                    Failure::Bad(_) => "bad",
                };
                metrics::counter!("muster_dispatch_faults_total", "code" => reason).increment(1);
                flight.fail(part, failure);
            }
        }
    }

    /// A reply is a lie: nothing else that its worker says is used for a while.
    fn lied(&self, flight: &Flight, part: usize, reason: &str) {
        metrics::counter!("muster_dispatch_bad_replies_total").increment(1);
        let Shard { worker, hop, .. } = &flight.parts()[part].shard;
        tracing::warn!(%worker, layer = %flight.layer, reason, "bad reply");
        self.board.ban(*hop, reason);
    }

    /// Sends what failed, and what is late, to other owners, as far as there are any.
    fn replace(&mut self, ticket: Ticket, flight: &mut Flight, now: Instant) -> Result<(), DispatchError> {
        for number in flight.to_replace(now) {
            if flight.is_waiting(number) {
                let Part { shard, deferred, .. } = &flight.parts()[number];
                tracing::debug!(worker = %shard.worker, layer = %flight.layer, "a shard is late");
                self.board.is_late(shard.id);
                // Where everything is late, asking twice makes it later.
                if !deferred && !self.budget.take() {
                    let more = self.patience(shard) * (DEFERRED - 1);
                    flight.defer(number, more);
                    continue;
                }
            }
            self.stand_in(ticket, flight, number)?;
        }
        Ok(())
    }

    /// Asks others for what is in a part, if there are any.
    fn stand_in(&self, ticket: Ticket, flight: &mut Flight, number: usize) -> Result<(), DispatchError> {
        let mut unreachable = Vec::new();
        loop {
            let routes = self.board.routes();
            let rank = |worker| routes.rank(worker);
            let stand_ins = flight.plan_stand_ins(number, &routes.placement, &rank, &unreachable);
            if flight.needs(number) {
                self.board.needs(flight.parts()[number].shard.id);
            }
            if stand_ins.is_empty() {
                return Ok(());
            }
            let first = self.board.issue(stand_ins.len());
            let mut shards = Vec::with_capacity(stand_ins.len());
            let mut places = Vec::with_capacity(stand_ins.len());
            for (id, stand_in) in (first..).zip(stand_ins) {
                let Some((hop, worker)) = routes.hop(stand_in.plan.worker) else { continue };
                let weights = flight.weights_of(number, &stand_in);
                let data = self.pick(&flight.parts()[number].shard.data, &stand_in.picked);
                shards.push(Shard { id, hop, worker: worker.clone(), plan: stand_in.plan, data, weights });
                places.push(stand_in.places);
            }
            match self.send(ticket, flight.layer, flight.lane, flight.parts().len(), &shards) {
                Ok(()) => {
                    metrics::counter!("muster_dispatch_resent_shards_total").increment(shards.len() as u64);
                    let sent = shards.into_iter().zip(places).collect();
                    flight.replace(number, sent, |shard| self.patience(shard));
                    return Ok(());
                }
                Err(Unsent::Closed) => return Err(DispatchError::Closed),
                // As often as there are workers.
                Err(Unsent::Broken(worker) | Unsent::Full(worker)) => unreachable.push(worker),
            }
        }
    }

    /// A worker took so long for a shard, or at least.
    fn observe(&mut self, shard: &Shard, took: Duration) {
        // No more than the router has workers, but they may change their names.
        if self.hedges.len() >= MOST_KNOWN && !self.hedges.contains_key(&shard.worker) {
            self.hedges.clear();
        }
        match self.hedges.get_mut(&shard.worker) {
            Some(hedge) => hedge.observe(size(shard), took),
            None => {
                let mut hedge = Hedge::new(HEDGE);
                hedge.observe(size(shard), took);
                self.hedges.insert(shard.worker.clone(), hedge);
            }
        }
        self.budget.sent();
    }

    /// Takes note of what came of asking twice.
    fn learn(&mut self, flight: &Flight, now: Instant) {
        for (number, part) in flight.parts().iter().enumerate().filter(|(_, part)| part.hedged) {
            let outcome = if flight.arrived(number).is_some() {
                Outcome::Wasted
            } else {
                self.observe(&part.shard, now.saturating_duration_since(part.since));
                Outcome::Won
            };
            if let Some(hedge) = self.hedges.get_mut(&part.shard.worker) {
                hedge.hedged(size(&part.shard), outcome);
            }
        }
    }

    /// Some of the rows in a payload.
    fn pick(&self, data: &Bytes, picked: &[u32]) -> Bytes {
        let width = self.hidden * self.wire.size();
        if picked.len() * width == data.len() {
            return data.clone();
        }
        let rows = picked.iter().filter_map(|&row| data.get(row as usize * width..)?.get(..width));
        rows.collect::<Vec<_>>().concat().into()
    }

    /// Adds up what came.
    fn finish(
        &self,
        flight: &Flight,
        waited: Instant,
        away: Duration,
        out: &mut [f32],
    ) -> Result<(), Unsound> {
        let sum = flight.sum();
        let arrived: Vec<&Arrived> = sum.sources.iter().filter_map(|&part| flight.arrived(part)).collect();
        let sources: Vec<Outputs<'_>> = arrived
            .iter()
            .map(|arrived| match self.wire {
                DType::F32 => Outputs::WireF32(arrived.outputs.data.as_chunks().0),
                DType::Bf16 => Outputs::WireBf16(arrived.outputs.data.as_chunks().0),
            })
            .collect();
        if !flight.is_lost() {
            let sums = combine(&self.cpu, self.hidden, &sources, &sum.starts, &sum.terms, out);
            sums.map_err(|error| match error {
                NotFinite::Output { source, row } => {
                    let reason = format!("row {row} has a value that is not finite");
                    Unsound::Part(sum.sources[source], reason)
                }
                NotFinite::Sum { .. } => Unsound::Sums(self.overflown(&sum, &sources, out)),
            })?;
        }
        // What was not added up says nothing of the time that takes.
        if flight.is_lost() {
            return Ok(());
        }
        let sample = Sample {
            layer: flight.layer,
            rows: flight.rows,
            round_trip: waited.duration_since(flight.submitted),
            away,
            compute: arrived.iter().map(|arrived| arrived.timing.compute).max().unwrap_or_default(),
            combine: waited.elapsed(),
        };
        self.seconds.record(sample.round_trip);
        self.overhead_seconds.record(sample.overhead());
        self.samples.push(sample);
        Ok(())
    }

    /// The rows whose sums are not finite: every row is added up alone.
    fn overflown(&self, sum: &Sum, sources: &[Outputs<'_>], out: &mut [f32]) -> Vec<u32> {
        let rows = (0..).zip(sum.starts.windows(2)).zip(out.chunks_exact_mut(self.hidden));
        let bad = rows.filter_map(|((row, bounds), out)| {
            let terms = &sum.terms[bounds[0] as usize..bounds[1] as usize];
            let alone = combine(&self.cpu, self.hidden, sources, &[0, bounds[1] - bounds[0]], terms, out);
            alone.is_err().then_some(row)
        });
        let bad: Vec<u32> = bad.collect();
        // What is not finite together and finite alone is not to be trusted.
        if bad.is_empty() { (0..).take(sum.starts.len() - 1).collect() } else { bad }
    }
}
