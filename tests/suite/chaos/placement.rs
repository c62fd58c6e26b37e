//! Workers come, go and die, routers die or stand still, and what workers hold changes meanwhile. Workers here know a
//! router's address and no model, unless a test says otherwise.

use std::time::{Duration, Instant};

use muster_proto::cluster::v1::status_reply::Health;
use muster_proto::cluster::v1::{StatusReply, WorkerStatus};
use muster_proto::expert::v1::AssignRequest;
use muster_tests::client::greedy;
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::demo_model;
use muster_tests::disturbed::say;
use muster_tests::elastic::{Elastic, Observer, copies, serving};
use muster_tests::load::{Load, Work};
use muster_tests::process::{eventually, run};
use muster_tests::skewed::{HOT, skewed_model};
use serde_json::Value;
use tonic::Code;

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap()
}

/// Polls a router's status until dropped or checked by [`Self::was_so`].
struct Watch(tokio::task::JoinHandle<()>);

impl Watch {
    /// Asserts that every expert is always held.
    fn covered(observer: Observer) -> Self {
        Self(tokio::spawn(async move {
            loop {
                let status = observer.status().await;
                assert_eq!(status.missing_experts, 0, "{:?}", status.workers);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }))
    }

    /// Ends the watch; panics if its assertion failed.
    fn was_so(self) {
        assert!(!self.0.is_finished(), "see above");
        self.0.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_of_a_dead_sole_holder_are_held_by_others_soon() {
    let work = Work::long().await;
    let mut cluster = Elastic::start(&demo_model(), 1, &[]);
    for _ in 0..3 {
        cluster.join(&[]);
    }
    let before = cluster.settled(3).await;
    let load = Load::start(&work, &cluster.grpc()).await;
    let observer = cluster.observer(0).await;
    let of_the_dead =
        observer.status().await.workers.iter().find(|w| w.worker_id == "worker-1").unwrap().experts;
    assert!(copies(&before) < before.experts + of_the_dead, "some of its experts nobody else holds");

    let killed = Instant::now();
    cluster.workers[1].kill();
    // Experts are missing for a moment, perhaps too short to observe.
    held_by_others(&observer, 2).await;
    let served_again = millis(killed);
    load.goes_on(32).await;
    let outcome = load.finish().await;
    assert_eq!(outcome.resumed, 0, "the router let go of a stream");
    assert!(cluster.metric(0, "muster_steps_repeated_total") > 0.0, "somebody had to wait");
    assert_eq!(cluster.metric(0, "muster_requests_failed_total"), 0.0);
    say(
        "SIGKILL of the only holder, memory elsewhere, not started again",
        &outcome.pauses,
        &[("served_again_ms", served_again)],
    );
}

/// Two routers over three workers, and which of them leads.
async fn two_routers() -> (Elastic, usize, usize) {
    let mut cluster = Elastic::start(&demo_model(), 2, &[]);
    for _ in 0..3 {
        cluster.join(&[]);
    }
    cluster.settled(3).await;
    let leader = cluster.leader().await;
    let other = 1 - leader;
    let observer = cluster.observer(other).await;
    eventually("the other one knows all workers too", async || {
        let status = observer.status().await;
        (serving(&status) == 3 && status.missing_experts == 0).then_some(())
    })
    .await;
    (cluster, leader, other)
}

async fn leads(observer: &Observer) {
    eventually("it leads", async || observer.status().await.leads.then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_leader_is_followed_by_another_and_streams_do_not_notice() {
    let work = Work::long().await;
    let (mut cluster, leader, other) = two_routers().await;
    let observer = cluster.observer(other).await;
    let load = Load::start(&work, &cluster.grpc()[other..=other]).await;
    let covered = Watch::covered(observer.clone());
    let before = cluster.status(leader).await;
    assert!(before.leads && !observer.status().await.leads);

    let killed = Instant::now();
    cluster.routers[leader].kill();
    leads(&observer).await;
    let led_again = millis(killed);
    assert!(observer.status().await.term > before.term);
    load.goes_on(32).await;
    let outcome = load.finish().await;
    covered.was_so();
    assert_eq!(outcome.resumed, 0, "the other router let go of a stream");
    assert_eq!(cluster.metric(other, "muster_requests_failed_total"), 0.0);
    let led_again = [("led_again_ms", led_again)];
    say("SIGKILL of the leading router, streams at another", &outcome.pauses, &led_again);
    does_as_leaders_do(&mut cluster, &observer).await;
}

/// Checks that the leader has a dead worker's experts loaded by others.
async fn does_as_leaders_do(cluster: &mut Elastic, observer: &Observer) {
    cluster.workers[0].kill();
    held_by_others(observer, 2).await;
}

async fn held_by_others(observer: &Observer, others: usize) {
    eventually("every expert is held by the others", async || {
        let status = observer.status().await;
        (serving(&status) == others && status.missing_experts == 0).then_some(())
    })
    .await;
}

/// Sends an order in the name of a former leader to every worker; each obeys another leader and refuses it.
async fn refuse_orders_of(cluster: &Elastic, name: &str, term: u64) {
    for worker in 0..cluster.workers.len() {
        let stale = AssignRequest {
            router_id: name.to_owned(),
            term,
            operation_id: u64::MAX,
            seen_epoch: u64::MAX,
            ..AssignRequest::default()
        };
        let refused = cluster.control(worker).await.assign(stale).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains("obeys another router"), "{refused}");
    }
}

/// Name and term of the worker's latest leader, from its log.
fn obeyed(log: &str) -> (String, u64) {
    let line = log.lines().rfind(|line| line.contains("obeying a new leader")).expect("it obeys somebody");
    let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap();
    (field("router=").to_owned(), field("term=").parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stood_still_is_not_obeyed_any_more() {
    let work = Work::long().await;
    let (mut cluster, leader, other) = two_routers().await;
    let observer = cluster.observer(other).await;
    let load = Load::start(&work, &cluster.grpc()[other..=other]).await;
    let covered = Watch::covered(observer.clone());
    let (name, term) = obeyed(&cluster.workers[0].log());
    assert!(name.starts_with(&format!("router-{leader}/")), "{name}");

    let stopped = Instant::now();
    cluster.routers[leader].signal(libc::SIGSTOP);
    eventually("it stands still", async || (cluster.routers[leader].state() == 'T').then_some(())).await;
    leads(&observer).await;
    let led_again = millis(stopped);
    assert_eq!(cluster.routers[leader].state(), 'T', "it stood still all the time");
    assert!(observer.status().await.term > term);
    refuse_orders_of(&cluster, &name, term).await;

    cluster.routers[leader].signal(libc::SIGCONT);
    eventually("it knows that it does not lead any more", async || {
        cluster.routers[leader].log().contains("another router leads the placement, or none").then_some(())
    })
    .await;
    refuse_orders_of(&cluster, &name, term).await;
    load.goes_on(32).await;
    let outcome = load.finish().await;
    covered.was_so();
    assert!(!cluster.status(leader).await.leads && observer.status().await.leads);
    assert_eq!(outcome.resumed, 0, "the other router let go of a stream");
    assert_eq!(cluster.metric(other, "muster_requests_failed_total"), 0.0);
    let led_again = [("led_again_ms", led_again)];
    say("SIGSTOP of the leading router until another leads, streams there", &outcome.pauses, &led_again);
    does_as_leaders_do(&mut cluster, &observer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_dead_router_go_on_at_another() {
    let work = Work::long().await;
    let (mut cluster, leader, other) = two_routers().await;
    let load = Load::start(&work, &cluster.grpc()).await;
    let taken = cluster.metric(leader, "muster_sequences_running");
    assert!(taken > 0.0, "the fault hits nobody");
    cluster.routers[leader].kill();
    load.goes_on(64).await;
    let outcome = load.finish().await;
    assert!(outcome.resumed > 0, "the fault hit nobody");
    assert!(cluster.metric(other, "muster_requests_resumed_total") >= outcome.resumed as f64);
    assert_eq!(cluster.metric(other, "muster_requests_failed_total"), 0.0);
    let resumed = [("resumed", outcome.resumed)];
    say("SIGKILL of the leading router, half of the streams there", &outcome.pauses, &resumed);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_come_and_go_and_every_expert_is_always_held() {
    let work = Work::long().await;
    let mut cluster = Elastic::start(&demo_model(), 1, &[]);
    cluster.join(&[]);
    cluster.settled(1).await;
    let load = Load::start(&work, &cluster.grpc()).await;
    let covered = Watch::covered(cluster.observer(0).await);
    for workers in 2..=4 {
        cluster.join(&[]);
        cluster.settled(workers).await;
    }
    load.goes_on(32).await;
    // Worker 0 is the source of all others' experts.
    for (gone, stay) in [(0, 3), (2, 2)] {
        cluster.leave(gone);
        cluster.settled(stay).await;
    }
    load.goes_on(32).await;
    let outcome = load.finish().await;
    covered.was_so();
    assert_eq!(outcome.resumed, 0, "the router let go of a stream");
    assert_eq!(cluster.metric(0, "muster_steps_repeated_total"), 0.0, "a step had to be made again");
    assert_eq!(cluster.metric(0, "muster_requests_failed_total"), 0.0);
    let longest = outcome.pauses.iter().max().unwrap().as_millis();
    say(
        "1, 2, 3, 4, 3, 2 workers, by joining and SIGTERM",
        &outcome.pauses,
        &[("longest_pause_ms", u64::try_from(longest).unwrap())],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_is_restarted_in_turn_and_no_request_fails() {
    let work = Work::short().await;
    let mut cluster = Elastic::start(&demo_model(), 2, &[]);
    for _ in 0..3 {
        cluster.join(&[]);
    }
    cluster.settled(3).await;
    let load = Load::start(&work, &cluster.grpc()).await;
    for worker in 0..3 {
        let before = cluster.workers[worker].pid();
        cluster.leave(worker);
        cluster.restart_worker(worker);
        assert_ne!(cluster.workers[worker].pid(), before);
        cluster.settled(3).await;
    }
    for router in 0..2 {
        let before = cluster.routers[router].pid();
        cluster.routers[router].signal(libc::SIGTERM);
        assert!(cluster.routers[router].wait().expect("it ends").success());
        cluster.restart_router(router);
        assert_ne!(cluster.routers[router].pid(), before);
        let observer = cluster.observer(router).await;
        eventually("workers are back at the router", async || {
            let status = observer.status().await;
            (serving(&status) == 3 && status.missing_experts == 0).then_some(())
        })
        .await;
    }
    load.goes_on(2000_u64.saturating_sub(load.ended())).await;
    load.goes_on(32).await;
    let outcome = load.finish().await;
    assert!(outcome.requests >= 2000);
    let figures = [("requests", outcome.requests), ("resumed", outcome.resumed)];
    say("SIGTERM and start of each of three workers and two routers", &outcome.pauses, &figures);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_a_model_has_it_from_others() {
    let work = Work::long().await;
    let mut cluster = Elastic::start(&demo_model(), 1, &[]);
    let model = demo_model().display().to_string();
    // Worker 0 loads from its own files, worker 1 from the router or from worker 0.
    cluster.join(&["--model", &model, "--share", "all"]);
    let all = cluster.settled(1).await;
    let bytes = all.workers[0].resident_bytes;
    let load = Load::start(&work, &cluster.grpc()).await;
    cluster.join(&["--log", "info,muster_worker=debug"]);
    cluster.settled(2).await;
    cluster.leave(0);
    let alone = cluster.settled(1).await;
    let other = alone.workers.iter().find(|worker| worker.worker_id == "worker-1").unwrap();
    assert_eq!((other.experts, other.resident_bytes), (all.experts, bytes));
    let loaded = |from: &str| {
        let source = format!("source=\"{from}\"");
        let log = cluster.workers[1].log();
        log.lines().filter(|line| line.contains("loaded") && line.contains(&source)).count() as u64
    };
    assert!(loaded("peer") + loaded("router") >= u64::from(all.experts), "{}", cluster.workers[1].log());
    assert!(loaded("peer") > 0);
    load.goes_on(32).await;
    let outcome = load.finish().await;
    assert_eq!(cluster.metric(0, "muster_requests_failed_total"), 0.0);
    let size = bytes / u64::from(all.experts);
    let figures =
        [("bytes_from_peers", loaded("peer") * size), ("bytes_from_routers", loaded("router") * size)];
    say("the only worker leaves, after one without a model has joined", &outcome.pauses, &figures);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_a_limit_and_what_does_not_fit_is_told() {
    let work = Work::long().await;
    let mut cluster = Elastic::start(&demo_model(), 1, &[]);
    let expert = expert_bytes();
    let half = expert * 24;
    assert!(half.is_multiple_of(1024));
    let memory = format!("{}KiB", half / 1024);
    for _ in 0..2 {
        cluster.join(&["--memory", &memory]);
    }
    let full = cluster.settled(2).await;
    let within = |status: &StatusReply| {
        let fits = |worker: &WorkerStatus| {
            worker.resident_bytes <= half && worker.capacity_bytes == half && worker.experts <= 24
        };
        assert!(status.workers.iter().all(fits), "{:?}", status.workers);
    };
    within(&full);
    assert_eq!(copies(&full), full.experts, "no expert twice: all memory is used");
    let load = Load::start(&work, &cluster.grpc()).await;

    let observer = cluster.observer(0).await;
    let (told, repeated) = (cluster.routers[0].log().len(), cluster.metric(0, "muster_steps_repeated_total"));
    cluster.workers[0].kill();
    let missing = eventually("it says what is missing", async || {
        let status = observer.status().await;
        within(&status);
        (status.missing_experts > 0).then_some(status)
    })
    .await;
    assert_eq!((missing.missing_experts, missing.health()), (24, Health::NotReady));
    assert!(missing.reasons[0].contains("24 experts have no live worker"), "{:?}", missing.reasons);
    eventually("the leader names the remedy", async || {
        let log = cluster.routers[0].log().split_off(told);
        log.contains("no worker has memory for some experts; add workers or raise their --memory")
            .then_some(())
    })
    .await;
    eventually("streams wait", async || {
        (cluster.metric(0, "muster_steps_repeated_total") > repeated).then_some(())
    })
    .await;
    let joins = Instant::now();
    cluster.join(&["--memory", &memory]);
    let again = cluster.settled(2).await;
    let served_again = millis(joins);
    within(&again);
    load.goes_on(32).await;
    let outcome = load.finish().await;
    assert_eq!(cluster.metric(0, "muster_requests_failed_total"), 0.0);
    let figures = [("served_again_after_join_ms", served_again)];
    say(
        "SIGKILL of one of two holders with no memory to spare, until another joins",
        &outcome.pauses,
        &figures,
    );
}

/// Packed bytes of one expert of the demo model: all have the same.
fn expert_bytes() -> u64 {
    let output = run(&["check-model", &demo_model().display().to_string(), "--json"]);
    let model: Value = serde_json::from_slice(&output.stdout).unwrap();
    model["layers"][0]["expert_bytes"].as_u64().unwrap()
}

/// Rows that each worker got of layer 0, and of these the rows of the hot expert.
async fn rows(cluster: &Elastic) -> Vec<(u64, u64)> {
    let mut rows = Vec::new();
    for worker in 0..cluster.workers.len() {
        let experts = cluster.rows(worker, 0).await;
        rows.push((experts.iter().sum(), experts.get(HOT).copied().unwrap_or(0)));
    }
    rows
}

/// Rows of the busiest worker between two counts, in percent of the mean, and the hot expert's share of all rows, in
/// percent.
fn uneven(before: &[(u64, u64)], after: &[(u64, u64)]) -> (u64, u64) {
    let more: Vec<(u64, u64)> = before.iter().zip(after).map(|(b, a)| (a.0 - b.0, a.1 - b.1)).collect();
    let all: u64 = more.iter().map(|(rows, _)| rows).sum();
    let hot: u64 = more.iter().map(|(_, hot)| hot).sum();
    let most = more.iter().map(|(rows, _)| *rows).max().unwrap();
    (most * 100 * more.len() as u64 / all, hot * 100 / all)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expert_that_gets_half_of_all_rows_is_spread_over_workers() {
    let model = skewed_model();
    // Prompts are most of the work: that is where rows are many.
    let request =
        |n: u32| greedy(&(0..500).map(|i| 3 + (n * 131 + i * (17 + n)) % 300).collect::<Vec<_>>(), 1);
    let work = Work::alone(&Cluster::start(Setup::new(model.path())), (0..32).map(request).collect()).await;
    let mut cluster = Elastic::start(model.path(), 1, &["--prefix-cache", "false"]);
    for _ in 0..3 {
        cluster.join(&[]);
    }
    let first = cluster.settled(3).await;
    let planned = |what: &str| cluster.metric(0, &format!("muster_placement_{what}_total"));
    let (plans, bytes) = (planned("plans"), planned("bytes_planned"));

    let load = Load::start(&work, &cluster.grpc()).await;
    let begin = rows(&cluster).await;
    load.goes_on(64).await;
    let (uneven_before, hot) = uneven(&begin, &rows(&cluster).await);
    assert!((45..=55).contains(&hot), "it gets {hot} % of all rows");
    assert_eq!(planned("plans"), plans, "nothing was known yet");
    eventually("there is a plan by what was counted", async || (planned("plans") > plans).then_some(()))
        .await;
    eventually("it is carried out", async || {
        let status = cluster.settled(3).await;
        (copies(&status) > copies(&first)).then_some(())
    })
    .await;
    let then = cluster.settled(3).await;
    let begin = rows(&cluster).await;
    load.goes_on(96).await;
    let (uneven_after, hot) = uneven(&begin, &rows(&cluster).await);
    let outcome = load.finish().await;
    assert!((45..=55).contains(&hot), "it gets {hot} % of all rows");
    assert!(uneven_before >= 130, "{uneven_before} %: this would be even enough as it is");
    assert!(uneven_after <= 115, "{uneven_before} % of the mean before, {uneven_after} % after");
    let resident =
        |status: &StatusReply| status.workers.iter().map(|worker| worker.resident_bytes).sum::<u64>();
    let moved = resident(&then).saturating_sub(resident(&first));
    assert!(0 < moved && moved as f64 <= planned("bytes_planned") - bytes, "{moved} bytes");
    say(
        "one expert gets half of all rows",
        &outcome.pauses,
        &[
            ("busiest_of_mean_before_percent", uneven_before),
            ("busiest_of_mean_after_percent", uneven_after),
            ("moved_bytes", moved),
        ],
    );
}
