//! Faults under load: 32 streams run, something dies or stands still, and every stream gives the tokens of the
//! undisturbed run. Every test proves that its fault happened.

use std::time::{Duration, Instant};

use muster_proto::v1::GenerateRequest;
use muster_proto::v1::generate_event::Event;
use muster_proto::v1::inference_client::InferenceClient;
use muster_tests::client::{generate, greedy, sampled};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::process::eventually;
use muster_tests::{demo_model, http};
use tokio::task::JoinSet;
use tonic::transport::Channel;

const STREAMS: u32 = 32;
const TOKENS: u32 = 160;

/// Greedy and sampled requests of different lengths.
fn requests() -> Vec<GenerateRequest> {
    let request = |n: u32| {
        let prompt: Vec<u32> = (0..4 + n % 13).map(|i| 6 + (n * 131 + i * 17) % 4000).collect();
        if n.is_multiple_of(2) { greedy(&prompt, TOKENS) } else { sampled(&prompt, TOKENS, u64::from(n)) }
    };
    (0..STREAMS).map(request).collect()
}

/// The tokens of a stream, and the longest time between two of them.
type Run = (Vec<u32>, Duration);

async fn run(client: InferenceClient<Channel>, request: GenerateRequest) -> Run {
    let mut stream = client.clone().generate(request).await.expect("it is taken").into_inner();
    let (mut ids, mut longest, mut last) = (Vec::new(), Duration::ZERO, None::<Instant>);
    let mut finished = 0;
    while let Some(event) = stream.message().await.expect("the stream goes on") {
        match event.event.expect("an event has a body") {
            Event::Token(frame) => {
                assert_eq!(frame.index as usize, ids.len(), "token indices have no gaps");
                ids.push(frame.token_id);
                let now = Instant::now();
                longest = longest.max(last.replace(now).map_or(Duration::ZERO, |last| now - last));
            }
            Event::Finished(_) => finished += 1,
            Event::Started(_) => {}
        }
    }
    assert_eq!(finished, 1, "every stream ends once");
    (ids, longest)
}

/// Runs all requests at once, `fault` while all of them are under way, and compares every stream with the lone run.
/// Says how long each stream stood still at most, for `cargo xtask chaos`.
async fn disturbed(what: &str, cluster: &mut Cluster, fault: impl AsyncFnOnce(&mut Cluster)) {
    let client = cluster.client().await;
    let mut undisturbed = Vec::new();
    for request in requests() {
        undisturbed.push(generate(&client, request).await.expect("undisturbed").remove(0).ids);
    }
    let mut running = JoinSet::new();
    for (n, request) in requests().into_iter().enumerate() {
        let client = client.clone();
        running.spawn(async move { (n, run(client, request).await) });
    }
    let all_run = format!("muster_sequences_running {STREAMS}");
    eventually("all streams run", async || {
        http::get(&cluster.http(), "/metrics").text().contains(&all_run).then_some(())
    })
    .await;
    fault(cluster).await;
    let still = http::get(&cluster.http(), "/metrics").text();
    assert!(!still.contains("muster_sequences_running 0\n"), "the fault came too late to disturb anybody");
    let mut stalls = Vec::new();
    while let Some(done) = running.join_next().await {
        let (n, (ids, stall)) = done.expect("no stream fails");
        assert_eq!(ids, undisturbed[n], "stream {n}");
        stalls.push(stall);
    }
    let stalls: Vec<u128> = stalls.iter().map(Duration::as_millis).collect();
    eprintln!("\nchaos {}", serde_json::json!({ "fault": what, "stalls_ms": stalls }));
    let failed = metric(cluster, "muster_requests_failed_total");
    assert_eq!(failed, 0.0);
}

fn metric(cluster: &Cluster, name: &str) -> f64 {
    let text = http::get(&cluster.http(), "/metrics").text();
    let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    text.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Three workers that each hold every expert.
fn replicated() -> Setup {
    Setup::new(&demo_model()).shares(&["all", "all", "all"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_with_replicas_is_not_noticed() {
    // Every expert on two of three: what the dead one held is split over both others.
    let setup = Setup::new(&demo_model()).shares(&["0/3x2", "1/3x2", "2/3x2"]);
    let mut cluster = Cluster::start(setup);
    disturbed("SIGKILL of a worker, replicas exist", &mut cluster, async |cluster| cluster.workers[1].kill())
        .await;
    eventually("the loss is known", async || {
        (metric(&cluster, "muster_dispatch_workers") == 2.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stands_still_is_stood_in_for_and_its_late_replies_dropped() {
    let mut cluster = Cluster::start(replicated());
    disturbed("SIGSTOP of a worker, replicas exist", &mut cluster, async |cluster| {
        cluster.workers[2].signal(libc::SIGSTOP);
        eventually("it stands still", async || (cluster.workers[2].state() == 'T').then_some(())).await;
    })
    .await;
    assert_eq!(cluster.workers[2].state(), 'T', "it stood still all the time");
    assert!(
        metric(&cluster, "muster_dispatch_resent_shards_total") > 0.0,
        "it was asked, and others instead"
    );
    cluster.workers[2].signal(libc::SIGCONT);
    eventually("its late replies are dropped", async || {
        (metric(&cluster, "muster_dispatch_late_replies_total") > 0.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_wait_for_experts_that_nobody_else_holds() {
    let mut cluster = Cluster::start(Setup::new(&demo_model()));
    disturbed("SIGKILL of the only holder, started again", &mut cluster, async |cluster| {
        cluster.workers[1].kill();
        eventually("streams wait", async || {
            (metric(cluster, "muster_steps_repeated_total") > 0.0).then_some(())
        })
        .await;
        assert_eq!(http::get(&cluster.http(), "/readyz").status, 503, "it says that experts are missing");
        cluster.restart_worker(1);
    })
    .await;
    eventually("ready again", async || (http::get(&cluster.http(), "/readyz").status == 200).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_restarted_one_after_another_under_load() {
    let mut cluster = Cluster::start(replicated());
    disturbed("rolling restart of three workers, replicas exist", &mut cluster, async |cluster| {
        for index in 0..3 {
            let others = async |count: f64| {
                eventually("a worker came or went", async || {
                    (metric(cluster, "muster_dispatch_workers") == count).then_some(())
                })
                .await;
            };
            others(3.0).await;
            cluster.workers[index].signal(libc::SIGTERM);
            assert!(cluster.workers[index].wait().expect("it ends").success());
            cluster.restart_worker(index);
        }
    })
    .await;
}
