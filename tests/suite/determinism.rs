//! Promise 3 on a running cluster: a request's tokens do not depend on its company.

use muster_tests::client::{generate, greedy, sampled};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::{demo_model, golden_model};
use tokio::task::JoinSet;

/// Mixed prompts: lengths 1 to 60, reproducible, ids 6 and up.
fn prompts(count: u32, vocab: u32) -> Vec<Vec<u32>> {
    let mut word = 12345u32;
    let mut next = || {
        word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        word >> 8
    };
    (0..count)
        .map(|n| {
            let length = 1 + (n * 17 + next() % 13) % 60;
            (0..length).map(|_| 6 + next() % (vocab - 6)).collect()
        })
        .collect()
}

async fn alone_and_together(model: &std::path::Path, vocab: u32, compute: &str) {
    let cluster = Cluster::start(Setup::new(model).compute(compute).router_args(&["--prefill-chunk", "7"]));
    let client = cluster.client().await;
    let requests: Vec<_> = prompts(16, vocab)
        .iter()
        .enumerate()
        .map(|(n, prompt)| if n % 2 == 0 { greedy(prompt, 24) } else { sampled(prompt, 24, n as u64) })
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(generate(&client, request.clone()).await.unwrap());
    }
    let mut running = JoinSet::new();
    for (n, request) in requests.into_iter().enumerate() {
        let client = client.clone();
        running.spawn(async move { (n, generate(&client, request).await.unwrap()) });
    }
    while let Some(done) = running.join_next().await {
        let (n, together) = done.unwrap();
        assert_eq!(together, alone[n], "request {n} differs in company");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_one_equals_a_batch_of_sixteen() {
    alone_and_together(&demo_model(), 4096, "bf16").await;
    alone_and_together(&golden_model("qwen3_moe"), 304, "f32").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_workers_does_not_matter() {
    let mut seen = Vec::new();
    for workers in [1, 2, 4] {
        let cluster = Cluster::start(Setup::new(&demo_model()).workers(workers));
        let client = cluster.client().await;
        let mut outputs = Vec::new();
        for (n, prompt) in prompts(4, 4096).iter().enumerate() {
            outputs.push(generate(&client, sampled(prompt, 32, n as u64)).await.unwrap());
        }
        seen.push(outputs);
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_too_small_for_all_changes_nothing_but_time() {
    let model = demo_model();
    let roomy = Cluster::start(Setup::new(&model));
    // 40 blocks of 16 tokens: 16 sequences of up to 124 tokens cannot all have their KV at once.
    let tight = Cluster::start(Setup::new(&model).router_args(&["--kv-memory", "960KiB"]));
    let requests: Vec<_> = prompts(16, 4096).iter().map(|prompt| greedy(prompt, 64)).collect();
    let mut expected = Vec::new();
    let client = roomy.client().await;
    for request in &requests {
        expected.push(generate(&client, request.clone()).await.unwrap());
    }
    let client = tight.client().await;
    let mut running = JoinSet::new();
    for (n, request) in requests.into_iter().enumerate() {
        let client = client.clone();
        running.spawn(async move { (n, generate(&client, request).await.unwrap()) });
    }
    while let Some(done) = running.join_next().await {
        let (n, output) = done.unwrap();
        assert_eq!(output, expected[n], "request {n} after preemption");
    }
    let metrics = muster_tests::http::get(&tight.http(), "/metrics").text();
    let preemptions = metrics.lines().find_map(|line| line.strip_prefix("muster_preemptions_total "));
    assert!(preemptions.is_some_and(|count| count.parse::<f64>().unwrap() > 0.0), "nothing was preempted");
}
