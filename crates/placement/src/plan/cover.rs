//! Copies that are needed, whatever the load.
//!
//! Owns who gets the first copy of an expert that has none, and the further copies that the goals ask for. First
//! copies make others give way that are not the last of their expert; further copies only such as the goals do
//! without. A first copy goes to another pool than the expert's own only where that has no place for it.

use std::collections::BTreeSet;

use muster_types::ExpertKey;

use super::draft::{Draft, Give, Nearness, Origin};

/// Gives every expert without a copy its first, and returns those that nobody has the memory for, ascending.
///
/// When memory is scarce, experts that no worker serves come before those in `on_leave`, which draining workers still serve,
/// and the hottest first; else the largest come first, which find room only early.
pub(super) fn cover(draft: &mut Draft<'_>, on_leave: &BTreeSet<ExpertKey>) -> Vec<ExpertKey> {
    let bare = draft.keys().filter(|expert| expert.copies.is_empty());
    let mut keys: Vec<_> = bare.map(|expert| (expert.key, expert.load)).collect();
    let needed: u64 = keys.iter().map(|&(key, _)| draft.most_bytes(key)).sum();
    let free: u64 = draft.bins.iter().fold(0, |free, bin| free.saturating_add(bin.capacity - bin.used));
    let rank = |key: ExpertKey| {
        let bytes = draft.most_bytes(key);
        (if needed <= free { u64::MAX - bytes } else { 0 }, on_leave.contains(&key))
    };
    keys.sort_by(|&(a, load), &(b, other)| {
        rank(a).cmp(&rank(b)).then(other.total_cmp(&load)).then(a.cmp(&b))
    });

    let mut full = Full::new(draft);
    let mut left = Vec::new();
    for (key, load) in keys {
        let at_home = |worker: &usize| draft.is_at_home(key, *worker);
        let (home, abroad): (Vec<_>, Vec<_>) = (0..draft.bins.len()).partition(at_home);
        let held = abroad.iter().copied().filter(|&worker| draft.bins[worker].held.contains(&key)).collect();
        let gives = [Give::Surplus, Give::Shared];
        let place = [home, held, abroad]
            .into_iter()
            .find_map(|candidates| find_place(draft, key, load, candidates, &gives, &mut full));
        match place {
            Some(worker) => draft.add(key, worker, Origin::First),
            None => left.push(key),
        }
    }
    left.sort_unstable();
    left
}

/// Gives experts the further copies that the goals ask for: those with the fewest first, then the hottest. Copies in
/// another zone are preferred, then those on another machine; for an expert that has copies enough, only those help that
/// are on a failure domain of the kind that it lacks.
pub(super) fn replicate(draft: &mut Draft<'_>, budget: u64) {
    let lacking = draft.keys().filter(|expert| !expert.copies.is_empty() && !draft.is_replicated(expert.key));
    let mut keys: Vec<_> = lacking.map(|expert| (expert.copies.len(), expert.load, expert.key)).collect();
    keys.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)).then(a.2.cmp(&b.2)));

    let mut full = Full::new(draft);
    for (_, load, key) in keys {
        // All that may have a copy are of its class, or of any.
        let bytes = draft.expert(key).copies.first().map_or(0, |copy| draft.bytes(key, copy.worker));
        while !draft.is_replicated(key) && draft.moved_bytes().saturating_add(bytes) <= budget {
            let copies = draft.expert(key).copies.len();
            let share = load / (copies + 1) as f64;
            let others: Vec<_> = (0..draft.bins.len())
                .filter(|&worker| draft.expert(key).on(worker).is_none() && draft.may_join(key, worker))
                .filter(|&worker| draft.is_asked_for(key, worker))
                .map(|worker| (worker, draft.nearness(key, worker)))
                .collect();
            let mut tiers = [Nearness::OtherZone, Nearness::SameZone, Nearness::SameMachine].into_iter();
            let place = tiers.find_map(|tier| {
                let tier = others.iter().filter(|(_, nearness)| *nearness == tier).map(|(worker, _)| *worker);
                find_place(draft, key, share, tier.collect(), &[Give::Surplus], &mut full)
            });
            let Some(worker) = place else { break };
            draft.add(key, worker, Origin::Moved);
            // Of more copies than needed, those on a shared domain can be spared now.
            if draft.needs_domain(key) {
                full = Full::new(draft);
            }
        }
    }
}

/// Workers that could not make room, so that they are not tried again: the least bytes without room, by the kind of copies to
/// give up.
struct Full([Vec<u64>; 2]);

impl Full {
    fn new(draft: &Draft<'_>) -> Self {
        Self([vec![u64::MAX; draft.bins.len()], vec![u64::MAX; draft.bins.len()]])
    }

    fn least(&mut self, worker: usize, give: Give) -> &mut u64 {
        let [surplus, shared] = &mut self.0;
        if give == Give::Shared { &mut shared[worker] } else { &mut surplus[worker] }
    }
}

/// The worker among `candidates` that is least busy with `load` more, of those with room if there are any, else of
/// those that can make room by giving up what is in `gives`.
fn find_place(
    draft: &mut Draft<'_>,
    key: ExpertKey,
    load: f64,
    mut candidates: Vec<usize>,
    gives: &[Give],
    full: &mut Full,
) -> Option<usize> {
    let layer = key.layer.index();
    let order = |draft: &Draft<'_>, a: usize, b: usize| {
        let held = |worker: usize| draft.bins[worker].keys.len() as f64 / draft.bins[worker].speed;
        let ratio = |worker| draft.ratio(layer, worker, load);
        ratio(a).total_cmp(&ratio(b)).then(held(a).total_cmp(&held(b))).then(a.cmp(&b))
    };
    let has_room = |&worker: &usize| draft.bins[worker].has_room(draft.bytes(key, worker));
    let with_room = candidates.iter().copied().filter(has_room);
    if let Some(worker) = with_room.min_by(|&a, &b| order(draft, a, b)) {
        return Some(worker);
    }
    candidates.sort_by(|&a, &b| order(draft, a, b));
    for &give in gives {
        for &worker in &candidates {
            let bytes = draft.bytes(key, worker);
            let least = full.least(worker, give);
            if bytes >= *least {
                continue;
            }
            if draft.make_room(worker, bytes, give) {
                return Some(worker);
            }
            *least = bytes;
        }
    }
    None
}
