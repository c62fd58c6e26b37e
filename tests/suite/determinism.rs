//! Promise 3 on a running cluster: a request's tokens do not depend on its company.

use std::path::Path;

use muster_proto::v1::GenerateRequest;
use muster_tests::client::{generate, greedy, sampled};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::golden::{Tensors, logits};
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

async fn alone_and_together(setup: Setup, vocab: u32) {
    let cluster = Cluster::start(setup);
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
    let setup =
        |model: &Path, compute| Setup::new(model).compute(compute).router_args(&["--prefill-chunk", "7"]);
    alone_and_together(setup(&demo_model(), "bf16"), 4096).await;
    alone_and_together(setup(&golden_model("qwen3_moe"), "f32"), 304).await;
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
async fn the_number_of_workers_does_not_matter_for_few_bit_experts_either() {
    let mut texts = Vec::new();
    for dtype in ["native", "q8", "q4"] {
        let mut seen = Vec::new();
        for workers in [1, 2, 4] {
            let setup = Setup::new(&demo_model()).workers(workers).expert_dtype(dtype);
            let cluster = Cluster::start(setup);
            let client = cluster.client().await;
            let mut outputs = Vec::new();
            for (n, prompt) in prompts(3, 4096).iter().enumerate() {
                // Log-probabilities show what the choice of tokens may hide.
                let request = GenerateRequest { top_logprobs: Some(1), ..sampled(prompt, 32, n as u64) };
                outputs.push(generate(&client, request).await.unwrap());
            }
            seen.push(outputs);
        }
        assert_eq!(seen[0], seen[1], "{dtype}: two workers");
        assert_eq!(seen[0], seen[2], "{dtype}: four workers");
        texts.push(seen.remove(0));
    }
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2]);
}

#[test]
fn few_bit_weights_give_the_same_logits_here_and_in_workers() {
    for family in ["granitemoe", "mixtral_bf16"] {
        let directory = golden_model(family);
        let tokens = Tensors::read(&directory.join("golden.safetensors")).ids("prompt1.input_ids");
        let bits = |dtype, more: &[&str]| -> Vec<u32> {
            let args = [&["--expert-dtype", dtype, "--trunk-dtype", dtype], more].concat();
            logits(&directory, &tokens, &args).f32s("logits").iter().map(|logit| logit.to_bits()).collect()
        };
        let [q8, q4] = ["q8", "q4"].map(|dtype| {
            let local = bits(dtype, &[]);
            assert!(local == bits(dtype, &["--workers", "2"]), "{family} {dtype}: workers differ from local");
            local
        });
        assert!(q8 != q4 && q8 != bits("native", &[]), "{family}: the flag does nothing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn few_bit_weights_give_the_same_alone_and_in_company() {
    for dtype in ["q8", "q4"] {
        let router = ["--prefill-chunk", "7", "--trunk-dtype", dtype];
        let setup = Setup::new(&demo_model()).expert_dtype(dtype).router_args(&router);
        alone_and_together(setup, 4096).await;
    }
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
