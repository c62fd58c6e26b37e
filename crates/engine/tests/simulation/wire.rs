//! The transport of a simulated router: delivery's shards become messages, and messages its events.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use muster_engine::delivery::{
    Closed, Event, Hop, Note, Observer, Outgoing, Outputs, Sums, Transport, Unsent, Unsound, Wanted,
};
use muster_engine::dispatch::{DispatchError, Place, Rows, RowsMut};
use muster_types::{ExpertKey, FaultKind, Term};

use crate::world::{Shard, Time};

/// What delivery asked of its transport, in order.
#[derive(Debug)]
pub(crate) enum Told {
    Shard {
        hop: Hop,
        lane: usize,
        shard: Shard,
        /// Rows of the micro-batch and their experts, output by output.
        pairs: Vec<(u32, ExpertKey)>,
    },
    Doubt {
        hop: Hop,
        in_doubt: bool,
    },
    Ban {
        hop: Hop,
    },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Wire {
    origin: Instant,
    now: Time,
    pub(crate) told: Vec<Told>,
    /// Sessions that are not over.
    pub(crate) up: BTreeMap<usize, u64>,
    /// Shards that are out.
    pub(crate) out: BTreeMap<u64, Hop>,
    /// Sessions that delivery knows to be over.
    lost: BTreeSet<Hop>,
    /// What delivery thinks of each session: shards that are late, and whether there is doubt.
    doubts: BTreeMap<Hop, (usize, bool)>,
    /// Faults of a session since its last outputs.
    faults: BTreeMap<Hop, u32>,
    /// Bans for faults alone.
    pub(crate) banned_for_faults: u64,
    /// That of the fleet that was told.
    pub(crate) version: u64,
    is_partial: bool,
}

impl Wire {
    pub(crate) fn new(is_partial: bool) -> Self {
        Self {
            origin: Instant::now(),
            now: 0,
            told: Vec::new(),
            up: BTreeMap::new(),
            out: BTreeMap::new(),
            lost: BTreeSet::new(),
            doubts: BTreeMap::new(),
            faults: BTreeMap::new(),
            banned_for_faults: 0,
            version: 0,
            is_partial,
        }
    }

    /// Delivery is about to hear this.
    pub(crate) fn note(&mut self, tale: &Event<ToyRows>, hop: Hop) {
        match tale {
            Event::Lost { hop, .. } => {
                self.lost.insert(*hop);
                self.doubts.remove(hop);
            }
            Event::Answer { outcome: Ok(_), .. } => drop(self.faults.remove(&hop)),
            Event::Answer { outcome: Err(fault), .. } => {
                let is_own = matches!(fault.kind, FaultKind::Overloaded | FaultKind::Draining);
                *self.faults.entry(hop).or_default() += u32::from(!is_own);
            }
            Event::Announced(_) => {}
        }
    }

    /// What delivery thinks of workers fits what they did.
    pub(crate) fn check(&self) {
        for (hop, faults) in &self.faults {
            let is_over = self.lost.contains(hop) || self.up.get(&hop.link) != Some(&hop.session);
            // Answers that nobody waits for any more are not held against a worker.
            assert!(is_over || *faults < 40, "conduct: {hop:?} gives nothing but faults and is not banned");
        }
        for (hop, &(late, in_doubt)) in &self.doubts {
            let out = self.out.values().filter(|of| *of == hop).count();
            let is_up = self.up.get(&hop.link) == Some(&hop.session);
            assert!(!is_up || late <= out, "conduct: {late} shards of {hop:?} are late, {out} are out");
            assert!(!is_up || late > 0 || !in_doubt, "conduct: {hop:?} is in doubt for nothing");
        }
    }

    /// It is this late; the same as delivery knows it.
    pub(crate) fn set(&mut self, now: Time) -> Instant {
        self.now = now;
        self.at(now)
    }

    pub(crate) fn at(&self, time: Time) -> Instant {
        self.origin + Duration::from_micros(time)
    }

    /// The first time that is not before.
    pub(crate) fn time(&self, at: Instant) -> Time {
        at.saturating_duration_since(self.origin).as_nanos().div_ceil(1000) as Time
    }
}

/// Rows as whole numbers, each in the place of two floats.
pub(crate) fn to_floats(rows: impl Iterator<Item = u64>) -> Vec<f32> {
    rows.flat_map(|row| [row as u32, (row >> 32) as u32].map(f32::from_bits)).collect()
}

pub(crate) fn from_floats(floats: &[f32]) -> Vec<u64> {
    let bits = |float: f32| u64::from(float.to_bits());
    floats.as_chunks().0.iter().map(|&[low, high]| bits(low) | bits(high) << 32).collect()
}

impl Transport for Wire {
    type Load = Vec<u64>;
    type Outputs = ToyRows;

    fn now(&self) -> Instant {
        self.at(self.now)
    }

    fn gather(&self, rows: Rows<'_>, picked: &[u32]) -> Result<Vec<u64>, DispatchError> {
        let rows = from_floats(rows.f32().expect("rows are in host memory here"));
        Ok(picked.iter().map(|&row| rows[row as usize]).collect())
    }

    fn pick(&self, load: &Vec<u64>, picked: &[u32]) -> Vec<u64> {
        picked.iter().map(|&row| load[row as usize]).collect()
    }

    fn send(&mut self, hop: Hop, lane: usize, shard: &Outgoing<'_, Vec<u64>>) -> Result<(), Unsent> {
        assert!(!self.lost.contains(&hop), "holder-only: rows go to a session that is over");
        if self.up.get(&hop.link) != Some(&hop.session) {
            return Err(Unsent::Broken);
        }
        let Outgoing { id, layer, epoch, plan, load, weights } = *shard;
        let counted = plan.experts.iter().zip(&plan.counts);
        let experts = counted.flat_map(|(&expert, &count)| std::iter::repeat_n(expert, count as usize));
        let keys: Vec<ExpertKey> = experts.map(|expert| ExpertKey { layer, expert }).collect();
        assert_eq!(keys.len(), plan.indices.len(), "every-pair-once: a plan miscounts its pairs");
        assert_eq!(weights.is_empty(), !self.is_partial, "weights go where they are needed");
        let pairs = plan.indices.iter().zip(&keys).map(|(&index, &key)| (plan.rows[index as usize], key));
        let pairs = pairs.collect();
        let shard = Shard {
            id,
            epoch: epoch.get(),
            rows: load.clone(),
            pairs: plan.indices.iter().copied().zip(keys).collect(),
            weights: weights.to_vec(),
        };
        let before = self.out.insert(id, hop);
        assert!(before.is_none(), "late-never-combined: two shards have one number");
        self.told.push(Told::Shard { hop, lane, shard, pairs });
        Ok(())
    }

    fn flush(&mut self) {}

    fn poll(&mut self, _: &mut Vec<Event<ToyRows>>) {}

    fn wait(&mut self, _: &Wanted, _: &mut Vec<Event<ToyRows>>) -> Result<(), Closed> {
        panic!("the world waits for nobody")
    }

    fn version(&self) -> u64 {
        self.version
    }

    fn doubt(&mut self, hop: Hop, late: usize, in_doubt: bool) {
        self.doubts.insert(hop, (late, in_doubt));
        self.told.push(Told::Doubt { hop, in_doubt });
    }

    fn ban(&mut self, hop: Hop, reason: &str) {
        if reason.contains("errors in a row") {
            let faults = self.faults.get(&hop).copied().unwrap_or(0);
            assert!(faults >= 16, "conduct: {hop:?} is banned after {faults} faults");
            self.banned_for_faults += 1;
        }
        self.lost.insert(hop);
        self.doubts.remove(&hop);
        self.told.push(Told::Ban { hop });
    }

    fn close(&mut self) {}
}

/// Output rows of toy experts.
#[derive(Debug, Clone)]
pub(crate) struct ToyRows {
    pub(crate) rows: Vec<u64>,
    pub(crate) marks: Vec<u32>,
    /// There is no number in it that is none and not marked.
    pub(crate) is_sound: bool,
}

impl Outputs for ToyRows {
    fn check(&self, rows: usize) -> Result<(), String> {
        if self.rows.len() == rows {
            Ok(())
        } else {
            Err(format!("{} rows instead of {rows}", self.rows.len()))
        }
    }

    fn marks(&self) -> &[u32] {
        &self.marks
    }
}

/// Adds whole numbers up.
#[derive(Debug)]
pub(crate) struct ToySums;

impl Sums<ToyRows> for ToySums {
    fn place(&self) -> Place {
        Place::Host
    }

    fn sum(
        &mut self,
        sources: &[&ToyRows],
        starts: &[u32],
        terms: &[Term],
        out: &mut RowsMut<'_>,
    ) -> Result<(), Unsound> {
        if let Some(source) = sources.iter().position(|source| !source.is_sound) {
            return Err(Unsound::Source { source, row: 0 });
        }
        let value = |term: &Term| {
            let source = sources[term.source as usize];
            assert!(!source.marks.contains(&term.row), "every-pair-once: a marked row is combined");
            weighted(source.rows[term.row as usize], term.weight)
        };
        let sum = |bounds: &[u32]| {
            terms[bounds[0] as usize..bounds[1] as usize].iter().map(value).fold(0, u64::wrapping_add)
        };
        let out = out.f32_mut().expect("room is in host memory here");
        out.copy_from_slice(&to_floats(starts.windows(2).map(sum)));
        Ok(())
    }
}

/// A whole number times a weight, which is one, too.
pub(crate) fn weighted(value: u64, weight: f32) -> u64 {
    value.wrapping_mul(weight as u64)
}

/// How often delivery did what.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) too_late: u64,
    pub(crate) lied: u64,
    pub(crate) lost: u64,
    pub(crate) stand_ins: u64,
    pub(crate) hedged: u64,
    pub(crate) expired: u64,
}

impl Observer for Tally {
    fn note(&mut self, note: Note<'_>) {
        match note {
            Note::TooLate => self.too_late += 1,
            Note::Lied { .. } => self.lied += 1,
            Note::Fault("lost") => self.lost += 1,
            Note::StandIns { shards, is_hedge } => {
                self.stand_ins += shards as u64;
                self.hedged += u64::from(is_hedge);
            }
            Note::Expired => self.expired += 1,
            Note::Fault(_) | Note::Late { .. } | Note::Summed(_) => {}
        }
    }
}
