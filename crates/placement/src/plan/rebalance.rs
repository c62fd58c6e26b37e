//! Copies for an even load.
//!
//! Owns the search for better placements of one layer at a time, the least even layer first. It goes in steps, each of
//! which relieves a busiest worker: one of its experts gets a copy on another worker, or changes places with a
//! less loaded one there. All steps of a layer together must relieve its busiest worker by the hysteresis, or none
//! is made; of those that are worth it, as many are made as the budget allows, and no step makes a layer worse. So
//! under the same loads plan after plan comes nearer to an even load and then stops.
//!
//! A copy makes others give way only if the goals do without them; or else, where memory is too small for the goals,
//! if the copy serves the goals as much as what it replaces.

use muster_types::ExpertKey;

use super::draft::{Draft, Give, Nearness, Origin};

/// Workers that are considered for an exchange with a busy one, the least busy first.
const PARTNERS: usize = 4;

/// How much lower the peaks shall be after each pass over the layers.
const PASS: f64 = 0.75;

/// Evens out the layers, in passes: layers share the workers' memory, so none goes far ahead of the others.
pub(super) fn rebalance(draft: &mut Draft<'_>, budget: u64) {
    let calm = 1.0 + draft.hysteresis / 2.0;
    let uneven = |layer: &usize| draft.excess(*layer) > calm;
    let mut layers: Vec<_> = (0..draft.layers.len()).filter(uneven).collect();
    let mut level = layers.iter().map(|&layer| draft.excess(layer)).fold(calm, f64::max);
    while level > calm {
        level = (level * PASS).max(calm);
        layers.sort_by(|&a, &b| draft.excess(b).total_cmp(&draft.excess(a)).then(a.cmp(&b)));
        for &layer in &layers {
            improve(draft, layer, level, budget);
        }
    }
}

/// Evens out one layer until its busiest worker is at `level` in terms of the mean, if that is worth it.
fn improve(draft: &mut Draft<'_>, layer: usize, level: f64, budget: u64) {
    if draft.moved_bytes().saturating_add(draft.least_bytes(layer)) > budget {
        return;
    }
    draft.commit();
    let before = draft.peak(layer);
    let mut affordable = 0;
    let mut full = vec![[false; 2]; draft.bins.len()];
    for _ in 0..draft.layers[layer].experts.len() + draft.bins.len() {
        if draft.excess(layer) <= level || !take_step(draft, layer, &mut full) {
            break;
        }
        draft.relax(layer, 2);
        if draft.moved_bytes() <= budget {
            affordable = draft.mark();
        }
    }
    let gain = before - draft.peak(layer);
    let worth_it = gain > 0.0 && gain >= before * draft.hysteresis;
    draft.undo_to(if worth_it { affordable } else { 0 });
}

/// Workers that could not make room: for a copy beyond what the goals ask for, and for one that they do.
type Full = Vec<[bool; 2]>;

/// Takes the step that relieves a busiest worker most. False when there is none.
fn take_step(draft: &mut Draft<'_>, layer: usize, full: &mut Full) -> bool {
    let sources = sources(draft, layer);
    for &source in &sources {
        while let Some(Addition { key, to, .. }) = best_addition(draft, layer, source, full) {
            let is_asked_for = draft.is_asked_for(key, to);
            let give = if is_asked_for { Give::Cold } else { Give::Idle };
            if draft.make_room(to, draft.bytes(key, to), give) {
                draft.add(key, to, Origin::Moved);
                return true;
            }
            full[to][usize::from(is_asked_for)] = true;
        }
    }
    for &source in &sources {
        if let Some(Exchange { out, back, with, .. }) = best_exchange(draft, layer, source) {
            draft.remove(out, source);
            draft.remove(back, with);
            draft.add(out, with, Origin::Moved);
            draft.add(back, source, Origin::Moved);
            return true;
        }
    }
    false
}

/// The busiest worker, and those as busy that share an expert's load with it: to relieve one relieves all.
fn sources(draft: &Draft<'_>, layer: usize) -> Vec<usize> {
    let ratio = |worker: usize| draft.ratio(layer, worker, 0.0);
    let workers = 0..draft.bins.len();
    let Some(busiest) = workers.max_by(|&a, &b| ratio(a).total_cmp(&ratio(b)).then(b.cmp(&a))) else {
        return Vec::new();
    };
    let near = ratio(busiest) - least_gain(draft, layer, busiest);
    let experts = draft.layers[layer].experts.iter();
    let shared = experts.filter(|expert| expert.on(busiest).is_some_and(|copy| copy.load > 0.0));
    let others = shared.flat_map(|expert| &expert.copies).map(|copy| copy.worker);
    let mut others: Vec<_> = others.filter(|&other| other != busiest && ratio(other) >= near).collect();
    others.sort_unstable();
    others.dedup();
    others.insert(0, busiest);
    others
}

/// The least by which a step must lower a worker's load over speed.
fn least_gain(draft: &Draft<'_>, layer: usize, worker: usize) -> f64 {
    draft.ratio(layer, worker, 0.0) * (draft.hysteresis / 16.0).max(1e-4)
}

/// A copy of `key` on the worker `to`.
struct Addition {
    worth: f64,
    key: ExpertKey,
    to: usize,
}

fn best_addition(draft: &Draft<'_>, layer: usize, source: usize, full: &Full) -> Option<Addition> {
    let before = draft.ratio(layer, source, 0.0);
    let least = least_gain(draft, layer, source);
    let mut best: Option<Addition> = None;
    for expert in &draft.layers[layer].experts {
        let Some(load) = expert.on(source).map(|copy| copy.load).filter(|&load| load > 0.0) else { continue };
        let is_replicated = draft.is_replicated(expert.key);
        let others = (0..draft.bins.len()).filter(|&to| draft.may_join(expert.key, to));
        for to in others.filter(|&to| expert.on(to).is_none()) {
            let room = draft.bins[to].has_room(draft.bytes(expert.key, to));
            if !room && full[to][usize::from(!is_replicated && draft.is_asked_for(expert.key, to))] {
                continue;
            }
            let shift = load.min(even_shift(draft, layer, source, to));
            let after = draft.ratio(layer, source, -shift).max(draft.ratio(layer, to, shift));
            let gain = before - after;
            // Better to use spare memory than to make others give way, and to spread over failure domains.
            let worth = gain
                * if room { 1.0 } else { 0.8 }
                * match draft.nearness(expert.key, to) {
                    Nearness::OtherZone => 1.0,
                    Nearness::SameZone => 0.98,
                    Nearness::SameMachine => 0.95,
                };
            if gain >= least && best.as_ref().is_none_or(|best| worth > best.worth) {
                best = Some(Addition { worth, key: expert.key, to });
            }
        }
    }
    best
}

/// The load that must go from one worker to another to leave both equally busy.
fn even_shift(draft: &Draft<'_>, layer: usize, from: usize, to: usize) -> f64 {
    let (speed, other) = (draft.bins[from].speed, draft.bins[to].speed);
    (draft.busy(layer, from) * other - draft.busy(layer, to) * speed) / (speed + other)
}

/// The copy of `out` goes to the worker `with`, whose copy of `back` comes in return.
struct Exchange {
    gain: f64,
    out: ExpertKey,
    back: ExpertKey,
    with: usize,
}

fn best_exchange(draft: &Draft<'_>, layer: usize, source: usize) -> Option<Exchange> {
    let before = draft.ratio(layer, source, 0.0);
    let least = least_gain(draft, layer, source);
    let pool = draft.bins[source].pool;
    let is_other = |&with: &usize| with != source && draft.bins[with].pool == pool;
    let mut partners: Vec<_> = (0..draft.bins.len()).filter(is_other).collect();
    let ratio = |worker: usize| draft.ratio(layer, worker, 0.0);
    partners.sort_by(|&a, &b| ratio(a).total_cmp(&ratio(b)).then(a.cmp(&b)));
    partners.truncate(PARTNERS);

    let mut best: Option<Exchange> = None;
    for &with in &partners {
        let out = only_on(draft, layer, source, with);
        let back = only_on(draft, layer, with, source);
        for &(out, heavy) in &out {
            for &(back, light) in &back {
                let shift = heavy - light;
                let after = draft.ratio(layer, source, -shift).max(draft.ratio(layer, with, shift));
                let gain = before - after;
                let better = best.as_ref().is_none_or(|best| gain > best.gain);
                let allowed = || draft.can_move(out, source, with) && draft.can_move(back, with, source);
                if shift > 0.0 && gain >= least && better && allowed() {
                    best = Some(Exchange { gain, out, back, with });
                }
            }
        }
    }
    best
}

/// Experts that one worker has and the other has not, with the load they put on it.
fn only_on(draft: &Draft<'_>, layer: usize, on: usize, not_on: usize) -> Vec<(ExpertKey, f64)> {
    let experts = draft.layers[layer].experts.iter().filter(|expert| expert.on(not_on).is_none());
    experts.filter_map(|expert| expert.on(on).map(|copy| (expert.key, copy.load))).collect()
}
