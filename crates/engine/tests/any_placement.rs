//! The promise that dispatch rests on: wherever experts lie, a row's outputs come back in the same places.
#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use muster_engine::batcher::{Rank, ShardPlan, group};
use muster_engine::dispatch::Choices;
use muster_placement::{Placement, Shape};
use muster_types::{Epoch, ExpertId, ExpertKey, LayerId, WorkerId};
use proptest::prelude::*;

const EXPERTS: u32 = 9;
const HIDDEN: usize = 5;

/// An "expert": anything that depends on the row and the expert alone.
fn run_expert(expert: ExpertId, row: &[f32]) -> Vec<f32> {
    row.iter().map(|x| (x * (expert.get() as f32 + 1.1)).sin() * 1e3).collect()
}

/// What a worker makes of its shard: one output row per index.
fn reply(shard: &ShardPlan, rows: &[f32]) -> Vec<Vec<f32>> {
    let counted = shard.experts.iter().zip(&shard.counts);
    let experts = counted.flat_map(|(&expert, &count)| std::iter::repeat_n(expert, count as usize));
    experts
        .zip(&shard.indices)
        .map(|(expert, &index)| {
            let row = shard.rows[index as usize] as usize;
            run_expert(expert, &rows[row * HIDDEN..(row + 1) * HIDDEN])
        })
        .collect()
}

fn layer() -> LayerId {
    LayerId::new(0, 1).unwrap()
}

fn placement(owners: &[Vec<usize>], workers: usize) -> Placement {
    let held = |worker| {
        let mine = ExpertId::all(EXPERTS).filter(|expert| owners[expert.index()].contains(&worker));
        mine.map(|expert| ExpertKey { layer: layer(), expert }).collect()
    };
    let holdings: Vec<_> =
        (0..workers).map(|worker| (WorkerId::new(&format!("w{worker}")).unwrap(), held(worker))).collect();
    Placement::from_holdings(Epoch::new(1), &Shape::new(vec![EXPERTS]), &holdings).unwrap()
}

fn placements() -> impl Strategy<Value = Placement> {
    (1_usize..6).prop_flat_map(|workers| {
        let replicas = prop::sample::subsequence((0..workers).collect::<Vec<_>>(), 1..=workers);
        prop::collection::vec(replicas, EXPERTS as usize).prop_map(move |owners| placement(&owners, workers))
    })
}

fn batches() -> impl Strategy<Value = (Choices, Vec<f32>)> {
    // Few rows of an expert stay together, many are divided.
    let rows = prop_oneof![3 => 0_usize..20, 1 => 100_usize..200];
    (1_usize..5, rows).prop_flat_map(|(k, rows)| {
        let chosen = prop::sample::subsequence(ExpertId::all(EXPERTS).collect::<Vec<_>>(), k);
        let weights = prop::collection::vec(0.0_f32..1.0, rows * k);
        let values = prop::collection::vec(-3.0_f32..3.0, rows * HIDDEN);
        (prop::collection::vec(chosen, rows), weights, values).prop_map(move |(experts, weights, values)| {
            (Choices::new(k, experts.concat(), weights).unwrap(), values)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.max(2000)))]

    #[test]
    fn outputs_do_not_depend_on_the_placement((choices, rows) in batches(), placement in placements()) {
        let plan = group(layer(), &choices, &placement, &|_| Rank::Good).unwrap();
        let replies: Vec<_> = plan.shards.iter().map(|shard| reply(shard, &rows)).collect();

        for (pair, (&expert, slot)) in choices.experts().iter().zip(&plan.slots).enumerate() {
            let row = pair / choices.k();
            let direct = run_expert(expert, &rows[row * HIDDEN..(row + 1) * HIDDEN]);
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&replies[slot.shard as usize][slot.position as usize]), bits(&direct));
        }
    }
}
