//! Bringing a micro-batch to its end: waiting, checking, asking others where somebody fails, adding up.
//!
//! What must hold: nothing is added up that was not checked; whatever a worker does, the engine thread waits no longer
//! than the deadline; a failure is an error only when nobody is left to ask.

use std::time::{Duration, Instant};

use bytes::Bytes;
use muster_engine::dispatch::{DispatchError, Ticket};
use muster_kernels::{NotFinite, Outputs, combine};
use muster_proto::frame;
use muster_proto::reply::{Fault, FaultKind};
use muster_types::DType;

use super::board::{Arrived, Failure, Unsent};
use super::dispatch::GrpcDispatch;
use super::flight::{Flight, NewPart, Part, Standing};
use super::handle::Sample;
use crate::busy::BusyPoll;

impl GrpcDispatch {
    /// Brings a micro-batch to its end, whoever fails on the way as long as somebody else can stand in.
    pub(super) fn complete(
        &mut self,
        ticket: Ticket,
        flight: &mut Flight,
        deadline: Instant,
        out: &mut [f32],
    ) -> Result<(), DispatchError> {
        let away = flight.sent.elapsed();
        let mut busy = BusyPoll::start(self.busy_poll);
        // Nobody drove the network for certain before, so this is where waiting begins.
        flight.began = Instant::now();
        let mut now = flight.began;
        loop {
            if flight.standing() == Standing::Complete {
                match self.finish(flight, now, away, out) {
                    Ok(()) => return Ok(()),
                    Err((part, reason)) => self.lied(flight, part, reason),
                }
            }
            flight.look_again(self.board.version());
            self.replace(ticket, flight, now)?;
            if let Standing::Lost(part) = flight.standing() {
                return Err(self.lost(flight, part));
            }
            if now >= deadline {
                metrics::counter!("muster_dispatch_deadlines_total").increment(1);
                return Err(DispatchError::Deadline { layer: flight.layer });
            }
            let until = self.next_late(flight).map_or(deadline, |late| late.min(deadline));
            let news = self.reins.drive(self.board.wait(ticket, flight.version, until, &mut busy));
            let news = news.unwrap_or(Err(DispatchError::Closed))?;
            now = Instant::now();
            for (part, outcome) in news {
                self.take(flight, part, outcome);
            }
        }
    }

    /// When a part becomes late.
    fn late_at(&self, flight: &Flight, part: &Part) -> Instant {
        part.sent.max(flight.began) + self.patience.of(part.plan.rows.len())
    }

    /// When the next part does.
    fn next_late(&self, flight: &Flight) -> Option<Instant> {
        flight.waiting().map(|part| self.late_at(flight, part)).min()
    }

    /// Takes in what came of a part.
    fn take(&mut self, flight: &mut Flight, part: usize, outcome: Result<Arrived, Failure>) {
        match outcome {
            Ok(arrived) => {
                let (answers, Part { sent, plan, .. }) = (flight.answers(part), &flight.parts()[part]);
                self.patience.observe(
                    plan.rows.len(),
                    arrived.at.saturating_duration_since((*sent).max(flight.began)),
                );
                let checked = if arrived.rows as usize == answers {
                    frame::check_len(&arrived.data, answers, self.hidden, self.wire)
                        .map_err(|error| error.to_string())
                } else {
                    Err(format!("{} rows instead of {answers}", arrived.rows))
                };
                match checked {
                    Ok(()) => flight.arrive(part, arrived),
                    Err(reason) => self.lied(flight, part, reason),
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

    /// A reply breaks the protocol: it is not used, nor is anything else that this worker says for a while.
    fn lied(&self, flight: &mut Flight, part: usize, reason: String) {
        metrics::counter!("muster_dispatch_bad_replies_total").increment(1);
        let Part { worker, hop, .. } = &flight.parts()[part];
        tracing::warn!(%worker, reason, "bad reply");
        self.board.ban(*hop, &reason);
        flight.fail(part, Failure::Bad(reason));
    }

    /// Sends what failed, and what is late, to other owners, as far as there are any.
    fn replace(&self, ticket: Ticket, flight: &mut Flight, now: Instant) -> Result<(), DispatchError> {
        let due = flight.to_replace(|part| now >= self.late_at(flight, part));
        for number in due {
            let Part { id, worker, .. } = &flight.parts()[number];
            if flight.is_waiting(number) {
                tracing::debug!(%worker, layer = %flight.layer, "a shard is late");
                self.board.is_late(*id);
            }
            if flight.is_final(number) {
                flight.leave_alone(number);
                continue;
            }
            let routes = self.board.routes();
            let rank = |worker| routes.rank(worker);
            let Some(stand_ins) = flight.plan_stand_ins(number, &routes.placement, &rank) else { continue };
            let first = self.board.issue(stand_ins.len());
            let mut parts = Vec::with_capacity(stand_ins.len());
            let mut places = Vec::with_capacity(stand_ins.len());
            for (id, stand_in) in (first..).zip(stand_ins) {
                let Some((hop, worker)) = routes.hop(stand_in.plan.worker) else { continue };
                let weights = flight.weights_of(number, &stand_in);
                let data = self.pick(&flight.parts()[number].data, &stand_in.picked);
                parts.push(NewPart { id, hop, worker: worker.clone(), plan: stand_in.plan, data, weights });
                places.push(stand_in.places);
            }
            match self.send(ticket, flight.layer, flight.lane, flight.parts().len(), &parts) {
                Ok(()) => {
                    metrics::counter!("muster_dispatch_resent_shards_total").increment(parts.len() as u64);
                    flight.replace(number, parts.into_iter().zip(places).collect());
                }
                Err(Unsent::Closed) => return Err(DispatchError::Closed),
                // The next round plans anew, or finds that nobody is left.
                Err(_) => {}
            }
        }
        Ok(())
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

    /// Adds up what came. An error names the part that cannot be used.
    fn finish(
        &self,
        flight: &Flight,
        waited: Instant,
        away: Duration,
        out: &mut [f32],
    ) -> Result<(), (usize, String)> {
        let sum = flight.sum();
        let arrived: Vec<&Arrived> = sum.sources.iter().filter_map(|&part| flight.arrived(part)).collect();
        let sources: Vec<Outputs<'_>> = arrived
            .iter()
            .map(|arrived| match self.wire {
                DType::F32 => Outputs::WireF32(arrived.data.as_chunks().0),
                DType::Bf16 => Outputs::WireBf16(arrived.data.as_chunks().0),
            })
            .collect();
        if flight.rows > 0 {
            let sums = combine(&self.cpu, self.hidden, &sources, &sum.starts, &sum.terms, out);
            sums.map_err(|error| match error {
                NotFinite::Output { source, row } => {
                    (sum.sources[source], format!("row {row} has a value that is not finite"))
                }
                NotFinite::Sum { row } => (sum.sources[0], format!("the sum of row {row} is not finite")),
            })?;
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

    /// What it means for the micro-batch that a part is lost.
    fn lost(&self, flight: &mut Flight, part: usize) -> DispatchError {
        let Some(failure) = flight.failure(part) else {
            return DispatchError::Invalid(format!("part {part} has not failed"));
        };
        let Part { worker, plan, .. } = &flight.parts()[part];
        let worker = worker.clone();
        let fault = match failure {
            Failure::Lost(reason) => return DispatchError::WorkerLost { worker, reason },
            Failure::Bad(reason) => return DispatchError::BadReply { worker, reason },
            Failure::Fault(fault) => fault,
        };
        let Fault { kind, message, expert } = fault;
        let expert = plan.experts.iter().copied().find(|known| Some(known.get()) == expert);
        match (kind, expert) {
            (FaultKind::Deadline, _) => DispatchError::Deadline { layer: flight.layer },
            (FaultKind::NonFinite, Some(expert)) => DispatchError::NonFinite { layer: flight.layer, expert },
            _ => DispatchError::Refused { worker, reason: message, retry: kind.retry() },
        }
    }
}
