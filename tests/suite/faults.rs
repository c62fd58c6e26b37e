//! What happens when processes die, differ, or are not what they should be.

use std::net::TcpListener;

use muster_tests::client::{generate, greedy};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::damaged::{copy_of, poison};
use muster_tests::process::{Process, eventually};
use muster_tests::{demo_model, golden_model, http};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_dead_for_too_long_fails_requests_retryably_and_its_return_heals() {
    let mut cluster = Cluster::start(Setup::new(&demo_model()).router_args(&[
        "--expert-timeout",
        "1s",
        "--placement",
        "static",
    ]));
    let client = cluster.client().await;
    let expected = generate(&client, greedy(&[1, 844, 624], 32)).await.unwrap();
    let mut running = JoinSet::new();
    for n in 0..8 {
        let client = client.clone();
        running.spawn(async move { generate(&client, greedy(&[1, 844 + n], 400)).await });
    }
    eventually("running", async || {
        http::get(&cluster.http(), "/metrics").text().contains("muster_sequences_running 8").then_some(())
    })
    .await;
    cluster.workers[1].kill();
    let mut failed = 0;
    while let Some(done) = running.join_next().await {
        // A request that finished before the fault is fine; the rest end with a status that invites a retry.
        if let Err(status) = done.unwrap() {
            assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
            assert!(!status.message().contains("worker-"), "addresses stay inside: {status}");
            failed += 1;
        }
    }
    assert!(failed > 0, "the fault hit nobody");
    eventually("not ready", async || (http::get(&cluster.http(), "/readyz").status == 503).then_some(()))
        .await;
    assert_eq!(http::get(&cluster.http(), "/healthz").status, 200, "the router itself lives");
    let status = generate(&client, greedy(&[1], 4)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);

    cluster.restart_worker(1);
    eventually("ready again", async || (http::get(&cluster.http(), "/readyz").status == 200).then_some(()))
        .await;
    assert_eq!(generate(&client, greedy(&[1, 844, 624], 32)).await.unwrap(), expected);
}

fn worker(model: &std::path::Path, share: &str) -> Process {
    let model = model.display().to_string();
    Process::start(
        &["worker", "--model", &model, "--listen", "127.0.0.1:0", "--share", share].map(String::from),
    )
    .unwrap()
}

fn router_error(model: &std::path::Path, workers: &[String]) -> String {
    let setup = Setup::new(model).router_args(&["--connect-timeout", "2s"]);
    match Process::start(&setup.router_command(workers)) {
        Ok(_) => panic!("the router started over {workers:?}"),
        Err(error) => error,
    }
}

#[test]
fn a_worker_of_another_model_is_refused_by_fingerprint() {
    let ours = worker(&golden_model("mixtral"), "0/2");
    let theirs = worker(&golden_model("mixtral_top1"), "1/2");
    let error = router_error(&golden_model("mixtral"), &[ours.address("listen"), theirs.address("listen")]);
    assert!(error.contains("fingerprint"), "{error}");
    assert!(error.contains(&theirs.address("listen")), "{error}");
}

#[test]
fn missing_experts_are_named() {
    let only = worker(&golden_model("mixtral"), "0/2");
    let setup = Setup::new(&golden_model("mixtral")).router_args(&["--placement", "static"]);
    let error = Process::start(&setup.router_command(&[only.address("listen")])).err().expect("refused");
    assert!(error.contains("layer 0 expert"), "{error}");
}

#[test]
fn experts_that_are_missing_at_the_start_are_loaded_by_who_is_there() {
    let only = worker(&golden_model("mixtral"), "0/2");
    let setup = Setup::new(&golden_model("mixtral"));
    let router = Process::start(&setup.router_command(&[only.address("listen")])).expect("it leads");
    assert_eq!(http::get(&router.address("http"), "/readyz").status, 200);
}

#[test]
fn an_address_that_speaks_something_else_is_named() {
    let impostor = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = impostor.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in impostor.incoming().flatten() {
            use std::io::Write;
            let _ = (&stream).write_all(b"220 mail.example.org ESMTP\r\n");
        }
    });
    let error = router_error(&golden_model("mixtral"), std::slice::from_ref(&address));
    assert!(error.contains(&address), "{error}");
}

#[test]
fn an_address_where_nobody_listens_is_named() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let error = router_error(&golden_model("mixtral"), std::slice::from_ref(&free));
    assert!(error.contains(&free), "{error}");
}

#[test]
fn a_port_in_use_is_named_with_the_flag_that_changes_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let model = golden_model("mixtral").display().to_string();
    let held = worker(&golden_model("mixtral"), "all");
    let listen = held.address("listen");
    for (flag, other) in [("--http", "--grpc"), ("--grpc", "--http")] {
        let args = ["router", "--model", &model, "--worker", &listen, flag, &address, other, "127.0.0.1:0"];
        let error = Process::start(&args.map(String::from)).err().expect("the port is taken");
        assert!(error.contains(&address) && error.contains(flag), "{error}");
    }
    let args = ["worker", "--model", &model, "--listen", &address].map(String::from);
    let error = Process::start(&args).err().expect("the port is taken");
    assert!(error.contains(&address) && error.contains("--listen"), "{error}");
}

#[test]
fn binding_beyond_loopback_must_be_asked_for_by_name() {
    let model = golden_model("mixtral").display().to_string();
    let args = ["worker", "--model", &model, "--listen", "0.0.0.0:0"].map(String::from);
    let error = Process::start(&args).err().expect("refused");
    assert!(error.contains("--insecure-plaintext"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_running_requests_finish() {
    let mut cluster = Cluster::start(Setup::new(&demo_model()));
    let client = cluster.client().await;
    let mut stream = client.clone().generate(greedy(&[1, 844], 200)).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    cluster.router.signal(libc::SIGTERM);
    let mut tokens = 0;
    let mut finished = 0;
    while let Some(event) = stream.message().await.unwrap() {
        match event.event.unwrap() {
            muster_proto::v1::generate_event::Event::Token(_) => tokens += 1,
            muster_proto::v1::generate_event::Event::Finished(_) => finished += 1,
            muster_proto::v1::generate_event::Event::Started(_) => panic!("started twice"),
        }
    }
    assert_eq!((tokens, finished), (200, 1));
    drop((stream, client));
    assert!(cluster.router.wait().expect("it ends").success(), "{}", cluster.router.log());
    for worker in &mut cluster.workers {
        worker.signal(libc::SIGTERM);
        assert!(worker.wait().expect("it ends").success(), "{}", worker.log());
    }
}

/// Workers' shares and combine modes: two full replicas, where a failed output needs a second opinion, and two halves,
/// whose partial sums do not depend on the batch.
const ARRANGEMENTS: [([&str; 2], &str); 2] = [(["all", "all"], "exact"), (["0/2", "1/2"], "partial")];

#[tokio::test(flavor = "multi_thread")]
async fn an_expert_poisoned_everywhere_ends_the_streams_that_choose_it_and_no_other() {
    const STREAMS: u32 = 32;
    // Short, so that some streams never choose the expert.
    let request = |n: u32| greedy(&[6 + n * 113, 900 + n], 3 + n % 3);
    let poisoned = copy_of(&demo_model());
    poison(poisoned.path(), 3, 5);
    for (shares, combine) in ARRANGEMENTS {
        let flags = ["--placement", "static", "--combine", combine];
        let start =
            |model: &std::path::Path| Cluster::start(Setup::new(model).shares(&shares).router_args(&flags));
        let healthy = start(&demo_model());
        let client = healthy.client().await;
        let mut expected = Vec::new();
        for n in 0..STREAMS {
            expected.push(generate(&client, request(n)).await.unwrap().remove(0).ids);
        }
        drop(healthy);
        let cluster = start(poisoned.path());
        let client = cluster.client().await;
        let mut alone = Vec::new();
        for n in 0..STREAMS {
            alone.push(generate(&client, request(n)).await.is_ok());
        }
        let whole = alone.iter().filter(|is_whole| **is_whole).count();
        assert!((4..=28).contains(&whole), "{whole} of {STREAMS} do not meet the expert");
        for _ in 0..5 {
            let mut running = JoinSet::new();
            for n in 0..STREAMS {
                let client = client.clone();
                running.spawn(async move { (n as usize, generate(&client, request(n)).await) });
            }
            while let Some(done) = running.join_next().await {
                match done.unwrap() {
                    (n, Ok(outputs)) => {
                        assert!(alone[n], "{combine}: stream {n} met the expert and ended well");
                        assert_eq!(outputs[0].ids, expected[n], "{combine}: stream {n}");
                    }
                    (n, Err(status)) => {
                        assert!(!alone[n], "{combine}: stream {n} failed for another: {status}");
                        assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status}");
                        assert!(status.message().contains("not finite"), "{status}");
                    }
                }
            }
        }
        let banned = http::metric(&cluster.http(), "muster_dispatch_workers_banned_total");
        assert_eq!(banned, 0.0, "{combine}: workers that tell the truth are not taken for liars");
    }
}
