//! Faults under load: 32 streams run, something dies or stands still, and every stream gives the tokens of the
//! undisturbed run. Every test proves that its fault happened.

mod network;
mod placement;

use muster_tests::cluster::{Cluster, Setup};
use muster_tests::damaged::{copy_of, flip_a_bit};
use muster_tests::disturbed::{disturbed, metric, replicated, say};
use muster_tests::load::{Load, Work};
use muster_tests::process::{Process, eventually};
use muster_tests::{demo_model, http};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_with_replicas_is_not_noticed() {
    // Every expert is on two of three workers: the dead worker's experts are split over both others.
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
    let setup = Setup::new(&demo_model()).router_args(&["--placement", "static"]);
    let mut cluster = Cluster::start(setup);
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
async fn a_router_that_may_computes_what_no_worker_holds() {
    let flags = ["--placement", "static", "--fallback", "local"];
    let mut cluster = Cluster::start(Setup::new(&demo_model()).router_args(&flags));
    assert_eq!(metric(&cluster, "muster_dispatch_fallback_shards_total"), 0.0, "workers come first");
    disturbed("SIGKILL of the only holder, the router computes", &mut cluster, async |cluster| {
        cluster.workers[1].kill();
        eventually("the router computes", async || {
            (metric(cluster, "muster_dispatch_fallback_shards_total") > 0.0).then_some(())
        })
        .await;
    })
    .await;
    let ready = http::get(&cluster.http(), "/readyz");
    assert_eq!(ready.status, 200);
    assert_eq!(ready.json()["status"], "degraded");
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_restarted_one_after_another_under_load() {
    let work = Work::long().await;
    let mut cluster = Cluster::start(replicated());
    let load = Load::start(&work, &[cluster.grpc()]).await;
    for index in 0..3 {
        let others = async |count: f64| {
            eventually("a worker came or went", async || {
                (metric(&cluster, "muster_dispatch_workers") == count).then_some(())
            })
            .await;
        };
        others(3.0).await;
        cluster.workers[index].signal(libc::SIGTERM);
        assert!(cluster.workers[index].wait().expect("it ends").success());
        cluster.restart_worker(index);
    }
    let outcome = load.finish().await;
    assert_eq!(outcome.resumed, 0, "the router let go of a stream");
    assert_eq!(metric(&cluster, "muster_requests_failed_total"), 0.0);
    say("rolling restart of three workers, replicas exist", &outcome.pauses, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_weights_are_damaged_is_refused_under_load() {
    let damaged = copy_of(&demo_model());
    for (layer, expert) in (0..6).flat_map(|layer| (0..8).map(move |expert| (layer, expert))) {
        flip_a_bit(damaged.path(), layer, expert);
    }
    let model = damaged.path().display().to_string();
    let mut cluster = Cluster::start(replicated());
    let mut worker = None;
    disturbed("a worker with a flipped bit in every expert joins", &mut cluster, async |cluster| {
        let grpc = cluster.grpc();
        let args = [
            "worker",
            "--model",
            &model,
            "--join",
            &grpc,
            "--share",
            "all",
            "--listen",
            "127.0.0.1:0",
            "--id",
            "bad",
        ];
        worker = Some(Process::start(&args.map(String::from)).expect("it starts"));
        eventually("it is refused", async || {
            (metric(cluster, "muster_dispatch_workers_refused_total") > 0.0).then_some(())
        })
        .await;
    })
    .await;
    assert_eq!(metric(&cluster, "muster_dispatch_workers"), 3.0, "the others serve");
}
