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

use super::board::{Board, Give, Nearness, Origin};

/// Workers that are considered for an exchange with a busy one, the least busy first.
const PARTNERS: usize = 4;

/// How much lower the peaks shall be after each pass over the layers.
const PASS: f64 = 0.75;

/// Evens out the layers, in passes: layers share the workers' memory, so none goes far ahead of the others.
pub(super) fn rebalance(board: &mut Board<'_>, budget: u64) {
    let calm = 1.0 + board.hysteresis / 2.0;
    let uneven = |layer: &usize| board.excess(*layer) > calm;
    let mut layers: Vec<_> = (0..board.layers.len()).filter(uneven).collect();
    let mut level = layers.iter().map(|&layer| board.excess(layer)).fold(calm, f64::max);
    while level > calm {
        level = (level * PASS).max(calm);
        layers.sort_by(|&a, &b| board.excess(b).total_cmp(&board.excess(a)).then(a.cmp(&b)));
        for &layer in &layers {
            improve(board, layer, level, budget);
        }
    }
}

/// Evens out one layer until its busiest worker is at `level` in terms of the mean, if that is worth it.
fn improve(board: &mut Board<'_>, layer: usize, level: f64, budget: u64) {
    if board.moved_bytes().saturating_add(board.least_bytes(layer)) > budget {
        return;
    }
    board.commit();
    let before = board.peak(layer);
    let mut affordable = 0;
    let mut full = vec![[false; 2]; board.bins.len()];
    for _ in 0..board.layers[layer].experts.len() + board.bins.len() {
        if board.excess(layer) <= level || !take_step(board, layer, &mut full) {
            break;
        }
        board.relax(layer, 2);
        if board.moved_bytes() <= budget {
            affordable = board.mark();
        }
    }
    let gain = before - board.peak(layer);
    let worth_it = gain > 0.0 && gain >= before * board.hysteresis;
    board.undo_to(if worth_it { affordable } else { 0 });
}

/// Workers that could not make room: for a copy beyond what the goals ask for, and for one that they do.
type Full = Vec<[bool; 2]>;

/// Takes the step that relieves a busiest worker most. False when there is none.
fn take_step(board: &mut Board<'_>, layer: usize, full: &mut Full) -> bool {
    let sources = sources(board, layer);
    for &source in &sources {
        while let Some(Addition { key, to, .. }) = best_addition(board, layer, source, full) {
            let is_asked_for = board.is_asked_for(key, to);
            let give = if is_asked_for { Give::Cold } else { Give::Idle };
            if board.make_room(to, board.bytes(key, to), give) {
                board.add(key, to, Origin::Moved);
                return true;
            }
            full[to][usize::from(is_asked_for)] = true;
        }
    }
    for &source in &sources {
        if let Some(Exchange { out, back, with, .. }) = best_exchange(board, layer, source) {
            board.remove(out, source);
            board.remove(back, with);
            board.add(out, with, Origin::Moved);
            board.add(back, source, Origin::Moved);
            return true;
        }
    }
    false
}

/// The busiest worker, and those as busy that share an expert's load with it: to relieve one relieves all.
fn sources(board: &Board<'_>, layer: usize) -> Vec<usize> {
    let ratio = |worker: usize| board.ratio(layer, worker, 0.0);
    let workers = 0..board.bins.len();
    let Some(busiest) = workers.max_by(|&a, &b| ratio(a).total_cmp(&ratio(b)).then(b.cmp(&a))) else {
        return Vec::new();
    };
    let near = ratio(busiest) - least_gain(board, layer, busiest);
    let experts = board.layers[layer].experts.iter();
    let shared = experts.filter(|expert| expert.on(busiest).is_some_and(|copy| copy.load > 0.0));
    let others = shared.flat_map(|expert| &expert.copies).map(|copy| copy.worker);
    let mut others: Vec<_> = others.filter(|&other| other != busiest && ratio(other) >= near).collect();
    others.sort_unstable();
    others.dedup();
    others.insert(0, busiest);
    others
}

/// The least by which a step must lower a worker's load over speed.
fn least_gain(board: &Board<'_>, layer: usize, worker: usize) -> f64 {
    board.ratio(layer, worker, 0.0) * (board.hysteresis / 16.0).max(1e-4)
}

/// A copy of `key` on the worker `to`.
struct Addition {
    worth: f64,
    key: ExpertKey,
    to: usize,
}

fn best_addition(board: &Board<'_>, layer: usize, source: usize, full: &Full) -> Option<Addition> {
    let before = board.ratio(layer, source, 0.0);
    let least = least_gain(board, layer, source);
    let mut best: Option<Addition> = None;
    for expert in &board.layers[layer].experts {
        let Some(load) = expert.on(source).map(|copy| copy.load).filter(|&load| load > 0.0) else { continue };
        let is_replicated = board.is_replicated(expert.key);
        let others = (0..board.bins.len()).filter(|&to| board.may_join(expert.key, to));
        for to in others.filter(|&to| expert.on(to).is_none()) {
            let room = board.bins[to].has_room(board.bytes(expert.key, to));
            if !room && full[to][usize::from(!is_replicated && board.is_asked_for(expert.key, to))] {
                continue;
            }
            let shift = load.min(even_shift(board, layer, source, to));
            let after = board.ratio(layer, source, -shift).max(board.ratio(layer, to, shift));
            let gain = before - after;
            // Better to use spare memory than to make others give way, and to spread over failure domains.
            let worth = gain
                * if room { 1.0 } else { 0.8 }
                * match board.nearness(expert.key, to) {
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
fn even_shift(board: &Board<'_>, layer: usize, from: usize, to: usize) -> f64 {
    let (speed, other) = (board.bins[from].speed, board.bins[to].speed);
    (board.busy(layer, from) * other - board.busy(layer, to) * speed) / (speed + other)
}

/// The copy of `out` goes to the worker `with`, whose copy of `back` comes in return.
struct Exchange {
    gain: f64,
    out: ExpertKey,
    back: ExpertKey,
    with: usize,
}

fn best_exchange(board: &Board<'_>, layer: usize, source: usize) -> Option<Exchange> {
    let before = board.ratio(layer, source, 0.0);
    let least = least_gain(board, layer, source);
    let pool = board.bins[source].pool;
    let is_other = |&with: &usize| with != source && board.bins[with].pool == pool;
    let mut partners: Vec<_> = (0..board.bins.len()).filter(is_other).collect();
    let ratio = |worker: usize| board.ratio(layer, worker, 0.0);
    partners.sort_by(|&a, &b| ratio(a).total_cmp(&ratio(b)).then(a.cmp(&b)));
    partners.truncate(PARTNERS);

    let mut best: Option<Exchange> = None;
    for &with in &partners {
        let out = only_on(board, layer, source, with);
        let back = only_on(board, layer, with, source);
        for &(out, heavy) in &out {
            for &(back, light) in &back {
                let shift = heavy - light;
                let after = board.ratio(layer, source, -shift).max(board.ratio(layer, with, shift));
                let gain = before - after;
                let better = best.as_ref().is_none_or(|best| gain > best.gain);
                let allowed = || board.can_move(out, source, with) && board.can_move(back, with, source);
                if shift > 0.0 && gain >= least && better && allowed() {
                    best = Some(Exchange { gain, out, back, with });
                }
            }
        }
    }
    best
}

/// Experts that one worker has and the other has not, with the load they put on it.
fn only_on(board: &Board<'_>, layer: usize, on: usize, not_on: usize) -> Vec<(ExpertKey, f64)> {
    let experts = board.layers[layer].experts.iter().filter(|expert| expert.on(not_on).is_none());
    experts.filter_map(|expert| expert.on(on).map(|copy| (expert.key, copy.load))).collect()
}
