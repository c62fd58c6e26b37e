//! Many streams at once, and clients that vanish.

use muster_tests::client::{Output, generate, greedy, read, sampled};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::demo_model;
use muster_tests::http;
use muster_tests::process::eventually;
use tokio::task::JoinSet;

fn metric(cluster: &Cluster, name: &str) -> f64 {
    let text = http::get(&cluster.http(), "/metrics").text();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is missing from:\n{text}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_of_mixed_lengths_equal_their_lone_runs() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let client = cluster.client().await;
    let requests: Vec<_> = (0..64u32)
        .map(|n| {
            let prompt: Vec<u32> = (0..1 + (n * 29) % 90).map(|i| 6 + (n * 131 + i * 17) % 4000).collect();
            let length = 1 + (n * 7) % 48;
            if n % 3 == 0 { sampled(&prompt, length, u64::from(n)) } else { greedy(&prompt, length) }
        })
        .collect();
    let mut alone: Vec<Vec<Output>> = Vec::new();
    for request in &requests {
        alone.push(generate(&client, request.clone()).await.unwrap());
    }
    let mut running = JoinSet::new();
    for (n, request) in requests.iter().cloned().enumerate() {
        let client = client.clone();
        running.spawn(async move { (n, generate(&client, request).await) });
    }
    let mut finished = 0;
    while let Some(done) = running.join_next().await {
        let (n, output) = done.unwrap();
        let output = output.unwrap_or_else(|status| panic!("request {n}: {status}"));
        assert_eq!(output[0].ids.len(), requests[n].max_tokens.unwrap() as usize, "request {n}");
        assert_eq!(output, alone[n], "request {n}");
        finished += 1;
    }
    assert_eq!(finished, 64);
    eventually("an idle router that says so", async || {
        let idle = metric(&cluster, "muster_kv_blocks_free") == metric(&cluster, "muster_kv_blocks")
            && metric(&cluster, "muster_sequences_running") == 0.0
            && metric(&cluster, "muster_sequences_waiting") == 0.0;
        idle.then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_vanish_leave_nothing_behind() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let client = cluster.client().await;
    let mut streams = Vec::new();
    for n in 0..16 {
        // 400 tokens: far more than are read below.
        let mut stream = client.clone().generate(greedy(&[1, 844 + n, 265], 400)).await.unwrap().into_inner();
        // Mid-stream: the first event and the first token are there.
        stream.message().await.unwrap().unwrap();
        stream.message().await.unwrap().unwrap();
        streams.push(stream);
    }
    let total = metric(&cluster, "muster_kv_blocks");
    assert!(metric(&cluster, "muster_kv_blocks_free") < total, "nothing was running when the clients went");
    drop(streams);
    eventually("freeing every block", async || {
        (metric(&cluster, "muster_kv_blocks_free") == total
            && metric(&cluster, "muster_sequences_running") == 0.0)
            .then_some(())
    })
    .await;
    assert!(metric(&cluster, "muster_sequences_cancelled_total") >= 16.0);
    generate(&client, greedy(&[1, 844], 4)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_sheds_with_a_retryable_error_and_loses_nothing() {
    let args = ["--max-running", "2", "--max-queue", "2"];
    let cluster = Cluster::start(Setup::new(&demo_model()).router_args(&args));
    let client = cluster.client().await;
    let mut running = JoinSet::new();
    for n in 0..32 {
        let client = client.clone();
        running.spawn(async move { generate(&client, greedy(&[1, 844 + n], 100)).await });
    }
    let (mut served, mut shed) = (0, 0);
    while let Some(done) = running.join_next().await {
        match done.unwrap() {
            Ok(output) => {
                assert_eq!(output[0].ids.len(), 100);
                served += 1;
            }
            Err(status) => {
                assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}");
                shed += 1;
            }
        }
    }
    assert!(served >= 2 && shed >= 1, "{served} served, {shed} shed");
    generate(&client, greedy(&[1, 844], 4)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_queue_refuses_nobody_whom_the_batch_has_room_for() {
    let cluster = Cluster::start(Setup::new(&demo_model()).router_args(&["--max-queue", "1"]));
    let client = cluster.client().await;
    let mut running = JoinSet::new();
    for n in 0..32 {
        let client = client.clone();
        running.spawn(async move { generate(&client, greedy(&[1, 844 + n], 40)).await });
    }
    while let Some(done) = running.join_next().await {
        assert_eq!(done.unwrap().unwrap()[0].ids.len(), 40);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_taken_to_wait_longer_than_is_allowed() {
    let args = ["--max-running", "1", "--max-queue-wait", "1ms"];
    let cluster = Cluster::start(Setup::new(&demo_model()).router_args(&args));
    let client = cluster.client().await;
    // The rate of free places is known after the first one. The first request may find its place taken by the start's
    // test token.
    eventually("a first place", async || generate(&client, greedy(&[1, 844], 40)).await.ok()).await;
    let mut stream = client.clone().generate(greedy(&[1, 845], 400)).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    stream.message().await.unwrap().unwrap();
    let refused = generate(&client, greedy(&[1, 846], 4)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("would wait"), "{refused}");
    assert!(refused.metadata().contains_key("retry-after-ms"));
    drop(stream);
    eventually("a place that is free", async || generate(&client, greedy(&[1, 846], 4)).await.ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_choices_have_one_end_each() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let mut request = sampled(&[1, 844, 624], 16, 5);
    request.choices = Some(4);
    let stream = cluster.client().await.generate(request).await.unwrap().into_inner();
    let outputs = read(stream, 4).await.unwrap();
    assert!(outputs.iter().all(|output| output.ids.len() == 16));
    // Choice i samples with seed + i.
    let client = cluster.client().await;
    for (n, output) in outputs.iter().enumerate() {
        let mut alone = generate(&client, sampled(&[1, 844, 624], 16, 5 + n as u64)).await.unwrap();
        alone[0].frames.iter_mut().for_each(|frame| frame.choice = n as u32);
        assert_eq!(alone[0], *output, "choice {n}");
    }
}
