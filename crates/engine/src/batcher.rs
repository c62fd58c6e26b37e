//! Groups the rows of a micro-batch by the workers that will compute them.
//!
//! Owns the choice of a replica and the layout of shards, also of those that take the place of one that failed.
//! Every (row, expert) is in exactly one shard, and a worker gets a row at most once, however many of its experts want it.
//! All rows of an expert are in the same shard, unless they are so many that `spread` divides them. Knows nothing
//! of row contents or transports, and of the workers' health only their [`Rank`].

use std::cmp::Reverse;

use muster_placement::{Placement, WorkerIx};
use muster_types::{Combine, ExpertId, ExpertKey, LayerId};

use crate::dispatch::{Choices, DispatchError};
use crate::spread::{Part, spread};

/// What one worker computes for a micro-batch at one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// The worker, in the placement the plan was made with.
    pub worker: WorkerIx,
    /// Rows of the micro-batch to send, ascending, each once.
    pub rows: Vec<u32>,
    /// Experts to run, strictly ascending.
    pub experts: Vec<ExpertId>,
    /// Rows for each of `experts`; at least one each.
    pub counts: Vec<u32>,
    /// Positions in `rows`, expert after expert, strictly ascending within an expert. The reply has one output
    /// row for each, in this order.
    pub indices: Vec<u32>,
}

impl ShardPlan {
    /// Rows of its reply.
    #[must_use]
    pub const fn answers(&self, combine: Combine) -> usize {
        match combine {
            Combine::Exact => self.indices.len(),
            Combine::Partial => self.rows.len(),
        }
    }
}

/// Position of an output row in the replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// Index into [`BatchPlan::shards`].
    pub shard: u32,
    /// Row of that shard's reply: the place in its `indices`.
    pub position: u32,
}

/// A micro-batch at one layer, by worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchPlan {
    /// One per worker that has something to do, in ascending order of workers.
    pub shards: Vec<ShardPlan>,
    /// `[rows, k]`: position of the output of a row's j-th expert.
    pub slots: Vec<Slot>,
}

/// Preference order for choosing a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rank {
    /// Healthy.
    Good,
    /// Late or draining: chosen only without a better owner.
    Poor,
    /// Chosen only as the last owner left.
    Last,
    /// Never chosen.
    Unusable,
}

/// Plans the dispatch of a micro-batch at `layer`.
///
/// Of several owners one is chosen per expert: one of the best rank there is, of these the one with
/// the fewest experts to run so far, then the fewest rows, then the lowest index. With few rows per expert a worker's time goes into
/// reading weights, hence experts before rows. Experts with the fewest owners choose first, then those with the
/// most rows. Where a worker then has far more rows than others, equally ranked owners take part of an expert's rows.
///
/// # Errors
/// `NoOwner` when no usable worker holds a chosen expert, `Invalid` when there are more (row, expert) pairs than 32
/// bits can count.
pub fn group(
    layer: LayerId,
    choices: &Choices,
    placement: &Placement,
    rank: &dyn Fn(WorkerIx) -> Rank,
) -> Result<BatchPlan, DispatchError> {
    let active = count_rows(layer, choices, placement)?;
    let owners = choose_owners(layer, &active, placement, rank)?;
    let one = |(expert, (active, &worker)): (usize, (&Active, &WorkerIx))| Part {
        expert,
        worker,
        rows: active.rows,
    };
    let mut parts: Vec<Part> = active.iter().zip(&owners).enumerate().map(one).collect();
    spread(&mut parts, placement.workers().len(), |at| {
        let key = ExpertKey { layer, expert: active[at].expert };
        let best = rank(owners[at]);
        placement.owners(key).iter().copied().filter(move |&owner| rank(owner) == best)
    });
    let (mut shards, mut routes, mut firsts) = lay_out(&active, &parts, placement.experts(layer));

    let mut slots = Vec::with_capacity(choices.experts().len());
    // Row by row, so that rows are ascending in each shard and, per expert, in its indices.
    for (row, experts) in (0..).zip(choices.experts().chunks_exact(choices.k())) {
        for expert in experts {
            let route = &mut routes[firsts[expert.index()]];
            let Slot { shard, position } = route.slot;
            route.slot.position += 1;
            route.left -= 1;
            if route.left == 0 {
                firsts[expert.index()] += 1;
            }
            let plan = &mut shards[shard as usize];
            if plan.rows.last() != Some(&row) {
                plan.rows.push(row);
            }
            plan.indices[position as usize] = plan.rows.len() as u32 - 1;
            slots.push(Slot { shard, position });
        }
    }
    Ok(BatchPlan { shards, slots })
}

/// A part of a shard, for another worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandIn {
    /// What to send; `rows` are of the micro-batch, as in the shard itself.
    pub plan: ShardPlan,
    /// Its rows: positions in the shard's `rows`, ascending.
    pub picked: Vec<u32>,
    /// For each output row, the place of the shard's output row that it stands in for.
    pub places: Vec<u32>,
}

/// Plan of the stand-ins for a shard's outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandIns {
    /// One per worker, in ascending order of workers.
    pub plans: Vec<StandIn>,
    /// Places whose expert no usable worker holds, ascending.
    pub orphans: Vec<u32>,
}

/// Plans outputs of one shard of `layer` again, with other workers or other ranks. `places` are the positions of the outputs
/// in the shard, ascending. Each place is in exactly one plan or an orphan.
#[must_use]
pub fn stand_ins(
    layer: LayerId,
    shard: &ShardPlan,
    places: &[u32],
    placement: &Placement,
    rank: &dyn Fn(WorkerIx) -> Rank,
) -> StandIns {
    let usable = |expert: ExpertId| {
        let owners = placement.owners(ExpertKey { layer, expert });
        owners.iter().any(|&owner| rank(owner) != Rank::Unusable)
    };
    let (mut wanted, mut orphans) = (Vec::new(), Vec::new());
    let (mut left, mut end) = (places, 0);
    for (&expert, &count) in shard.experts.iter().zip(&shard.counts) {
        end += count;
        let (its, rest) = left.split_at(left.partition_point(|&place| place < end));
        left = rest;
        match usable(expert) {
            _ if its.is_empty() => {}
            true => wanted.push((expert, its)),
            false => orphans.extend_from_slice(its),
        }
    }
    // Counted in 32 bits by the shard.
    let rows = |its: &[u32]| its.len() as u32;
    let active: Vec<Active> =
        wanted.iter().map(|&(expert, its)| Active { expert, rows: rows(its) }).collect();
    // Every one of them has a usable owner.
    let owners = choose_owners(layer, &active, placement, rank).unwrap_or_default();
    let mut workers = owners.clone();
    workers.sort_unstable();
    workers.dedup();
    let plan = |worker| {
        let its = wanted.iter().zip(&owners).filter(|(_, owner)| **owner == worker).map(|(its, _)| *its);
        stand_in(shard, worker, its)
    };
    StandIns { plans: workers.into_iter().map(plan).collect(), orphans }
}

/// What `worker` computes for `shard`: experts and the places of their outputs.
fn stand_in<'a>(
    shard: &ShardPlan,
    worker: WorkerIx,
    wanted: impl Iterator<Item = (ExpertId, &'a [u32])>,
) -> StandIn {
    let mut experts = Vec::new();
    let mut counts = Vec::new();
    let mut places = Vec::new();
    for (expert, its) in wanted {
        experts.push(expert);
        counts.push(its.len() as u32);
        places.extend_from_slice(its);
    }
    let indices: Vec<u32> = places.iter().map(|&place| shard.indices[place as usize]).collect();
    let mut picked = indices.clone();
    picked.sort_unstable();
    picked.dedup();
    // Every index is among those picked.
    let indices = indices.iter().map(|index| picked.partition_point(|row| row < index) as u32).collect();
    let rows = picked.iter().map(|&row| shard.rows[row as usize]).collect();
    StandIn { plan: ShardPlan { worker, rows, experts, counts, indices }, picked, places }
}

/// An expert that was chosen, and by how many rows.
struct Active {
    expert: ExpertId,
    rows: u32,
}

/// The experts that were chosen, ascending.
fn count_rows(
    layer: LayerId,
    choices: &Choices,
    placement: &Placement,
) -> Result<Vec<Active>, DispatchError> {
    let pairs = choices.experts().len();
    if u32::try_from(pairs).is_err() {
        return Err(DispatchError::Invalid(format!("{pairs} (row, expert) pairs in one micro-batch")));
    }
    let mut counts = vec![0; placement.experts(layer)];
    for &expert in choices.experts() {
        let count = counts.get_mut(expert.index()).ok_or(DispatchError::NoOwner { layer, expert })?;
        *count += 1;
    }
    let all = ExpertId::all(counts.len() as u32).zip(counts);
    Ok(all.filter(|&(_, rows)| rows > 0).map(|(expert, rows)| Active { expert, rows }).collect())
}

/// The worker for each of `active`.
fn choose_owners(
    layer: LayerId,
    active: &[Active],
    placement: &Placement,
    rank: &dyn Fn(WorkerIx) -> Rank,
) -> Result<Vec<WorkerIx>, DispatchError> {
    let owners = |at: usize| placement.owners(ExpertKey { layer, expert: active[at].expert });
    // Experts with the fewest owners first, so that the rest can even out the load.
    let mut order: Vec<_> = (0..active.len()).collect();
    order.sort_unstable_by_key(|&at| (owners(at).len(), Reverse(active[at].rows), at));

    let mut load = vec![(0_u32, 0_u32); placement.workers().len()];
    let mut chosen = Vec::with_capacity(active.len());
    for at in order {
        // The first of equals wins; owners are ascending.
        let usable = owners(at).iter().map(|&owner| (rank(owner), owner));
        let usable = usable.filter(|(rank, _)| *rank != Rank::Unusable);
        let best = usable.min_by_key(|&(rank, owner)| (rank, load[owner.index()]));
        let (_, owner) = best.ok_or(DispatchError::NoOwner { layer, expert: active[at].expert })?;
        let (experts, rows) = &mut load[owner.index()];
        *experts += 1;
        *rows += active[at].rows;
        chosen.push((at, owner));
    }
    chosen.sort_unstable();
    Ok(chosen.into_iter().map(|(_, owner)| owner).collect())
}

/// Position of a part's next row, and the number of rows left.
struct Route {
    slot: Slot,
    left: u32,
}

/// One shard per worker, complete but for its rows; where the rows of each part go; and for each expert of the layer the
/// first of its parts, which are next to each other.
fn lay_out(active: &[Active], parts: &[Part], experts: usize) -> (Vec<ShardPlan>, Vec<Route>, Vec<usize>) {
    let mut workers: Vec<WorkerIx> = parts.iter().map(|part| part.worker).collect();
    workers.sort_unstable();
    workers.dedup();
    let empty = |&worker| ShardPlan {
        worker,
        rows: Vec::new(),
        experts: Vec::new(),
        counts: Vec::new(),
        indices: Vec::new(),
    };
    let mut shards: Vec<_> = workers.iter().map(empty).collect();
    let mut routes = Vec::with_capacity(parts.len());
    // Experts that were not chosen keep this value, which is never read.
    let mut firsts = vec![usize::MAX; experts];
    for &Part { expert, worker, rows } in parts {
        let shard = workers.partition_point(|&before| before < worker);
        let plan = &mut shards[shard];
        let slot = Slot { shard: shard as u32, position: plan.indices.len() as u32 };
        let expert = active[expert].expert;
        let first = &mut firsts[expert.index()];
        *first = (*first).min(routes.len());
        routes.push(Route { slot, left: rows });
        plan.experts.push(expert);
        plan.counts.push(rows);
        plan.indices.resize(plan.indices.len() + rows as usize, 0);
    }
    (shards, routes, firsts)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use muster_placement::Shape;
    use muster_types::{Epoch, WorkerId};
    use proptest::prelude::*;

    use super::*;

    fn layer() -> LayerId {
        LayerId::new(1, 2).unwrap()
    }

    fn good(_: WorkerIx) -> Rank {
        Rank::Good
    }

    fn expert(number: u32) -> ExpertId {
        ExpertId::new(number, u32::MAX).unwrap()
    }

    /// Layer 1 of two has the experts; `held[w]` are those of worker w.
    fn placement(experts: u32, held: &[Vec<u32>]) -> Placement {
        let holdings: Vec<_> = held
            .iter()
            .enumerate()
            .map(|(worker, experts)| {
                let keys = experts.iter().map(|&e| ExpertKey { layer: layer(), expert: expert(e) });
                (WorkerId::new(&format!("w{worker}")).unwrap(), keys.collect())
            })
            .collect();
        Placement::from_holdings(Epoch::new(1), &Shape::new(vec![0, experts]), &holdings).unwrap()
    }

    fn choices(k: usize, experts: &[u32]) -> Choices {
        let weights = vec![1.0; experts.len()];
        Choices::new(k, experts.iter().map(|&e| expert(e)).collect(), weights).unwrap()
    }

    /// (worker, experts) of every shard.
    fn assignment(plan: &BatchPlan) -> Vec<(usize, Vec<u32>)> {
        let experts = |shard: &ShardPlan| shard.experts.iter().map(|e| e.get()).collect();
        plan.shards.iter().map(|shard| (shard.worker.index(), experts(shard))).collect()
    }

    #[test]
    fn a_row_is_sent_once_per_worker() {
        let placement = placement(4, &[vec![0, 2, 3], vec![], vec![1]]);
        let plan = group(layer(), &choices(2, &[2, 3, 0, 1, 0, 2]), &placement, &good).unwrap();
        assert_eq!(assignment(&plan), [(0, vec![0, 2, 3]), (2, vec![1])]);
        let [first, second] = &plan.shards[..] else { panic!("two shards") };
        assert_eq!((&first.rows[..], &first.counts[..]), (&[0, 1, 2][..], &[2, 2, 1][..]));
        assert_eq!(first.indices, [1, 2, 0, 2, 0]);
        assert_eq!(
            (&second.rows[..], &second.counts[..], &second.indices[..]),
            (&[1][..], &[1][..], &[0][..])
        );
        let slots: Vec<_> = plan.slots.iter().map(|slot| (slot.shard, slot.position)).collect();
        assert_eq!(slots, [(0, 2), (0, 4), (0, 0), (1, 0), (0, 1), (0, 3)]);
    }

    #[test]
    fn replicas_even_out_experts_before_rows() {
        let everywhere = vec![0, 1, 2, 3];
        // Expert 3 has most rows and goes first; the others make up for it in number and then in rows.
        let plan = group(
            layer(),
            &choices(1, &[0, 1, 2, 3, 3, 3]),
            &placement(4, &[everywhere.clone(), everywhere.clone()]),
            &good,
        );
        assert_eq!(assignment(&plan.unwrap()), [(0, vec![2, 3]), (1, vec![0, 1])]);
        // What only worker 0 holds is counted before the replicated expert 0 chooses.
        let plan = group(layer(), &choices(1, &[0, 0, 1]), &placement(4, &[vec![0, 1], vec![0]]), &good);
        assert_eq!(assignment(&plan.unwrap()), [(0, vec![1]), (1, vec![0])]);
        // As many experts on either side: the side with fewer rows.
        let plan =
            group(layer(), &choices(1, &[0, 0, 1, 2]), &placement(4, &[vec![0, 2], vec![1, 2]]), &good)
                .unwrap();
        assert_eq!(assignment(&plan), [(0, vec![0]), (1, vec![1, 2])]);
    }

    #[test]
    fn an_expert_without_owner_is_named() {
        let placement = placement(3, &[vec![0, 1]]);
        for missing in [2, 3, u32::MAX - 1] {
            let error = group(layer(), &choices(1, &[0, missing]), &placement, &good).unwrap_err();
            assert_eq!(error, DispatchError::NoOwner { layer: layer(), expert: expert(missing) });
        }
        let dense = LayerId::new(0, 2).unwrap();
        assert!(matches!(
            group(dense, &choices(1, &[0]), &placement, &good),
            Err(DispatchError::NoOwner { .. })
        ));
    }

    #[test]
    fn no_rows_need_no_workers() {
        let plan = group(layer(), &choices(2, &[]), &placement(3, &[]), &good).unwrap();
        assert_eq!(plan, BatchPlan { shards: vec![], slots: vec![] });
    }

    /// Owners of up to 12 experts on up to 6 workers, and rows of up to 4 of those experts.
    fn batches() -> impl Strategy<Value = (Placement, Choices)> {
        (1_u32..12, 1_usize..6).prop_flat_map(|(experts, workers)| {
            let owners = prop::collection::btree_set(0..workers, 1..=workers);
            let owners = prop::collection::vec(owners, experts as usize);
            let held = owners.prop_map(move |owners| -> Vec<Vec<u32>> {
                let held_by = |w| (0..experts).filter(|&e| owners[e as usize].contains(&w)).collect();
                (0..workers).map(held_by).collect()
            });
            let k = 1..=experts.min(4) as usize;
            let rows = k.prop_flat_map(move |k| {
                let row = prop::sample::subsequence((0..experts).collect::<Vec<_>>(), k);
                (Just(k), prop::collection::vec(row, 0..200))
            });
            (held, rows)
                .prop_map(move |(held, (k, rows))| (placement(experts, &held), choices(k, &rows.concat())))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.max(2000)))]

        #[test]
        fn every_pair_is_in_exactly_one_shard((placement, choices) in batches()) {
            let plan = group(layer(), &choices, &placement, &good).unwrap();
            prop_assert!(plan.shards.is_sorted_by_key(|shard| shard.worker));

            let mut replied = BTreeSet::new();
            let mut experts_seen = BTreeSet::new();
            for (number, shard) in plan.shards.iter().enumerate() {
                prop_assert!(shard.rows.is_sorted_by(|a, b| a < b));
                prop_assert!(shard.experts.is_sorted_by(|a, b| a < b));
                prop_assert_eq!(shard.experts.len(), shard.counts.len());
                prop_assert_eq!(shard.counts.iter().sum::<u32>() as usize, shard.indices.len());
                let used: BTreeSet<_> = shard.indices.iter().copied().collect();
                prop_assert_eq!(used.into_iter().collect::<Vec<_>>(), (0..shard.rows.len() as u32).collect::<Vec<_>>());

                let mut indices = &shard.indices[..];
                let mut position = 0;
                for (&expert, &count) in shard.experts.iter().zip(&shard.counts) {
                    prop_assert!(count > 0);
                    prop_assert!(experts_seen.insert((shard.worker, expert)), "one part per worker");
                    let key = ExpertKey { layer: layer(), expert };
                    prop_assert!(placement.owners(key).contains(&shard.worker));
                    let (mine, rest) = indices.split_at(count as usize);
                    indices = rest;
                    prop_assert!(mine.is_sorted_by(|a, b| a < b));
                    for &index in mine {
                        let row = shard.rows[index as usize];
                        replied.insert((row, expert, Slot { shard: number as u32, position }));
                        position += 1;
                    }
                }
            }
            let wanted: BTreeSet<_> = choices
                .experts()
                .iter()
                .zip(&plan.slots)
                .enumerate()
                .map(|(pair, (&expert, &slot))| ((pair / choices.k()) as u32, expert, slot))
                .collect();
            prop_assert_eq!(plan.slots.len(), choices.experts().len());
            prop_assert_eq!(replied, wanted);
        }

        #[test]
        fn stand_ins_cover_open_places_once_and_spare_the_unusable(
            (placement, choices) in batches(),
            seed in 0_usize..6,
            open in prop::collection::vec(any::<bool>(), 16),
        ) {
            let plan = group(layer(), &choices, &placement, &good).unwrap();
            for shard in &plan.shards {
                let rank = |worker: WorkerIx| match (worker.index() + seed) % 3 {
                    _ if worker == shard.worker => Rank::Unusable,
                    0 => Rank::Poor,
                    _ => Rank::Good,
                };
                let wanted: Vec<u32> = (0..shard.indices.len() as u32)
                    .filter(|&place| open[(place as usize + seed) % open.len()])
                    .collect();
                let StandIns { plans: parts, orphans } =
                    stand_ins(layer(), shard, &wanted, &placement, &rank);
                let mut places: Vec<u32> = parts.iter().flat_map(|part| part.places.clone()).collect();
                places.extend(&orphans);
                places.sort_unstable();
                prop_assert_eq!(places, wanted);
                // The expert of every output row of the shard.
                let experts: Vec<ExpertId> = shard
                    .experts
                    .iter()
                    .zip(&shard.counts)
                    .flat_map(|(&expert, &count)| std::iter::repeat_n(expert, count as usize))
                    .collect();
                for &orphan in &orphans {
                    let key = ExpertKey { layer: layer(), expert: experts[orphan as usize] };
                    prop_assert_eq!(placement.owners(key), &[shard.worker], "another holds it");
                }
                for part in &parts {
                    let StandIn { plan, picked, places } = part;
                    prop_assert!(plan.worker != shard.worker);
                    prop_assert_eq!(plan.rows.len(), picked.len());
                    prop_assert_eq!(plan.indices.len(), places.len());
                    let mut at = 0;
                    for (&expert, &count) in plan.experts.iter().zip(&plan.counts) {
                        let owners = placement.owners(ExpertKey { layer: layer(), expert });
                        prop_assert!(owners.contains(&plan.worker));
                        let better = owners.iter().any(|&owner| rank(owner) < rank(plan.worker));
                        prop_assert!(!better, "a better one holds it");
                        for _ in 0..count {
                            let place = places[at] as usize;
                            prop_assert_eq!(experts[place], expert);
                            let row = shard.rows[shard.indices[place] as usize];
                            prop_assert_eq!(plan.rows[plan.indices[at] as usize], row);
                            prop_assert_eq!(shard.rows[picked[plan.indices[at] as usize] as usize], row);
                            at += 1;
                        }
                    }
                    prop_assert_eq!(at, places.len());
                }
            }
        }

        #[test]
        fn full_replication_evens_out_experts(
            (workers, rows) in (1_usize..6, prop::collection::vec(0_u32..16, 1..40)),
        ) {
            let placement = placement(16, &vec![(0..16).collect(); workers]);
            let plan = group(layer(), &choices(1, &rows), &placement, &good).unwrap();
            let active = rows.iter().collect::<BTreeSet<_>>().len();
            let most = plan.shards.iter().map(|shard| shard.experts.len()).max();
            prop_assert_eq!(most, Some(active.div_ceil(workers)));
        }
    }
}
