//! 32 concurrent streams during a fault, each compared with its undisturbed run.

use std::time::{Duration, Instant};

use muster_proto::v1::GenerateRequest;
use muster_proto::v1::generate_event::Event;
use muster_proto::v1::inference_client::InferenceClient;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::client::{greedy, sampled};
use crate::cluster::{Cluster, Setup};
use crate::load::Work;
use crate::process::eventually;
use crate::{demo_model, http};

pub(crate) const STREAMS: u32 = 32;
const TOKENS: u32 = 160;

/// Greedy and sampled requests of different lengths.
pub(crate) fn requests() -> Vec<GenerateRequest> {
    let request = |n: u32| {
        let prompt: Vec<u32> = (0..4 + n % 13).map(|i| 6 + (n * 131 + i * 17) % 4000).collect();
        if n.is_multiple_of(2) { greedy(&prompt, TOKENS) } else { sampled(&prompt, TOKENS, u64::from(n)) }
    };
    (0..STREAMS).map(request).collect()
}

/// Tokens of a stream, and its longest pause.
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

/// Runs all requests at once and `fault` while all of them are in progress, and compares every stream with its
/// undisturbed run. Reports the longest pause of each stream.
///
/// # Panics
/// When a stream fails or differs, and when the fault came too late.
pub async fn disturbed(what: &str, cluster: &mut Cluster, fault: impl AsyncFnOnce(&mut Cluster)) {
    let Work(work) = Work::alone(cluster, requests()).await;
    let client = cluster.client().await;
    let mut running = JoinSet::new();
    for (n, (request, _)) in work.iter().enumerate() {
        let (client, request) = (client.clone(), request.clone());
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
        assert_eq!(ids, work[n].1, "stream {n}");
        stalls.push(stall);
    }
    say(what, &stalls, &[]);
    let failed = metric(cluster, "muster_requests_failed_total");
    assert_eq!(failed, 0.0);
}

/// Prints the longest pause of each stream, and other figures, for `cargo xtask chaos`.
#[allow(clippy::print_stdout, reason = "this is what `cargo xtask chaos` reads")]
pub fn say(what: &str, stalls: &[Duration], others: &[(&str, u64)]) {
    let stalls: Vec<u128> = stalls.iter().map(Duration::as_millis).collect();
    let mut said = serde_json::json!({ "fault": what, "stalls_ms": stalls });
    for &(name, value) in others {
        said[name] = value.into();
    }
    println!("\nchaos {said}");
}

/// The sum of a metric's values over its labels.
#[must_use]
pub fn metric(cluster: &Cluster, name: &str) -> f64 {
    http::metric(&cluster.http(), name)
}

/// Three workers that each hold every expert.
#[must_use]
pub fn replicated() -> Setup {
    Setup::new(&demo_model()).shares(&["all", "all", "all"])
}
