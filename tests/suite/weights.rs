//! Weights that are not those of the router's checkpoint: refused by name, or had from elsewhere, and never computed
//! with.

use std::path::Path;

use muster_proto::cluster::v1::status_reply::Health;
use muster_tests::client::{generate, greedy};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::damaged::{copy_of, flip_a_bit, touch};
use muster_tests::elastic::Elastic;
use muster_tests::process::{Process, eventually, run};
use muster_tests::{demo_model, http};

const PROMPT: [u32; 3] = [1, 844, 624];

/// A worker on this model that holds all of it.
fn worker(name: &str, model: &Path) -> Process {
    let model = model.display().to_string();
    let args = ["worker", "--model", &model, "--listen", "127.0.0.1:0", "--share", "all", "--id", name]
        .map(String::from);
    Process::start(&args).unwrap()
}

/// A refusal names the worker, the expert, both digests and the file to check.
fn is_a_refusal(text: &str, name: &str, layer: u32, expert: u32) {
    let key = format!("layer {layer} expert {expert}");
    for part in [&format!("worker {name} is refused"), &key, "sha256sum model-0000"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let is_hex = |word: &&str| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
    let digests: Vec<&str> = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(is_hex).collect();
    assert!(digests.len() >= 2 && digests[0] != digests[1], "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_flipped_bit_is_refused_by_name_and_a_replica_answers_rightly() {
    let clean = Cluster::start(Setup::new(&demo_model()));
    let expected = generate(&clean.client().await, greedy(&PROMPT, 48)).await.unwrap();
    let damaged = copy_of(&demo_model());
    flip_a_bit(damaged.path(), 2, 5);
    let workers = [worker("bad", damaged.path()), worker("good", &demo_model())];
    let addresses = workers.each_ref().map(|worker| worker.address("listen"));
    let setup = Setup::new(&demo_model()).router_args(&["--placement", "static"]);
    let router =
        Process::start(&setup.router_command(&addresses)).expect("the other worker has every expert");
    let ready = http::get(&router.address("http"), "/readyz");
    assert_eq!(ready.status, 200);
    is_a_refusal(&ready.text(), "bad", 2, 5);
    is_a_refusal(&router.log(), "bad", 2, 5);
    let status = run(&["status", "--grpc", &format!("http://{}", router.address("grpc"))]);
    is_a_refusal(&String::from_utf8(status.stdout).unwrap(), "bad", 2, 5);
    let cluster = muster_proto::v1::inference_client::InferenceClient::connect(format!(
        "http://{}",
        router.address("grpc")
    ));
    let client = cluster.await.unwrap();
    assert_eq!(generate(&client, greedy(&PROMPT, 48)).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_replica_the_cluster_is_not_ready_and_says_why() {
    let damaged = copy_of(&demo_model());
    flip_a_bit(damaged.path(), 0, 1);
    let mut cluster = Elastic::start(&demo_model(), 1, &["--placement", "static"]);
    let model = damaged.path().display().to_string();
    cluster.join(&["--model", &model, "--share", "all"]);
    let http = cluster.routers[0].address("http");
    let body = eventually("it is refused", async || {
        let ready = http::get(&http, "/readyz");
        (ready.status == 503 && ready.text().contains("refused")).then(|| ready.text())
    })
    .await;
    is_a_refusal(&body, "worker-0", 0, 1);
    let status = cluster.status(0).await;
    assert_eq!((status.health(), status.missing_experts), (Health::NotReady, status.experts));
    is_a_refusal(&status.workers[0].reason, "worker-0", 0, 1);
    // One intact worker suffices.
    cluster.join(&["--model", &demo_model().display().to_string(), "--share", "all"]);
    eventually("ready", async || (http::get(&http, "/readyz").status == 200).then_some(())).await;
}

#[test]
fn a_router_that_waits_for_its_workers_ends_with_the_reason() {
    let damaged = copy_of(&demo_model());
    flip_a_bit(damaged.path(), 1, 0);
    let only = worker("bad", damaged.path());
    let setup = Setup::new(&demo_model()).router_args(&["--placement", "static"]);
    let error = Process::start(&setup.router_command(&[only.address("listen")])).err().expect("refused");
    is_a_refusal(&error, "bad", 1, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_that_a_worker_s_own_files_cannot_give_come_from_elsewhere() {
    // Two faults that show only when an expert is loaded: files changed since they were opened, and damage.
    for fault in ["changed", "damaged"] {
        let copy = copy_of(&demo_model());
        let model = copy.path().display().to_string();
        let mut cluster = Elastic::start(&demo_model(), 1, &[]);
        cluster.routers[0].kill();
        // The worker has no orders yet: its only router is dead.
        cluster.join(&["--model", &model]);
        match fault {
            "changed" => touch(copy.path()),
            _ => drop(flip_a_bit(copy.path(), 3, 2)),
        }
        cluster.restart_router(0);
        let status = cluster.settled(1).await;
        let http = cluster.routers[0].address("http");
        eventually("ready", async || (http::get(&http, "/readyz").status == 200).then_some(())).await;
        let (trouble, log) = (&status.workers[0].trouble, cluster.workers[0].log());
        assert!(trouble.contains("own files"), "{fault}: {trouble}");
        assert!(log.contains("a source of weights is passed over"), "{fault}: {log}");
        if fault == "damaged" {
            assert!(trouble.contains("layer 3 expert 2") && trouble.contains("must have"), "{trouble}");
        }
        let clean = Cluster::start(Setup::new(&demo_model()));
        let expected = generate(&clean.client().await, greedy(&PROMPT, 32)).await.unwrap();
        let url = format!("http://{}", cluster.grpc()[0]);
        let client = muster_proto::v1::inference_client::InferenceClient::connect(url).await.unwrap();
        assert_eq!(generate(&client, greedy(&PROMPT, 32)).await.unwrap(), expected);
    }
}

#[test]
fn check_model_makes_digests_and_finds_what_changed_since() {
    let copy = copy_of(&demo_model());
    let model = copy.path().display().to_string();
    let made = run(&["check-model", &model, "--digests"]);
    let text = String::from_utf8(made.stdout).unwrap();
    assert!(made.status.success() && text.contains("GB/s"), "{text}");
    assert!(copy.path().join(".muster/experts-bf16-native.digests").exists(), "{text}");
    let sound = run(&["check-model", &model]);
    assert!(sound.status.success(), "{}", String::from_utf8_lossy(&sound.stderr));
    assert!(String::from_utf8(sound.stdout).unwrap().contains("digests        48 experts"));
    let shard = flip_a_bit(copy.path(), 4, 7);
    let damaged = run(&["check-model", &model]);
    let error = String::from_utf8(damaged.stderr).unwrap();
    assert_eq!(damaged.status.code(), Some(2), "{error}");
    let name = shard.file_name().unwrap().to_str().unwrap();
    assert!(error.contains("weights of 1 experts") && error.contains(name), "{error}");
    assert!(error.contains("layer 4 expert 7"), "{error}");
    // Each expert dtype has a digest file of its own.
    assert!(run(&["check-model", &model, "--digests", "--expert-dtype", "q8"]).status.success());
    assert!(copy.path().join(".muster/experts-bf16-q8.digests").exists());
}
