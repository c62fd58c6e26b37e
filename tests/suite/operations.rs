//! What the machine around a process asks of it: whether it is ready and why not, to drain, how it started.

use std::net::TcpListener;
use std::path::Path;

use muster_tests::process::{Process, eventually, run};
use muster_tests::{demo_model, http};

fn start(args: &[&str]) -> Process {
    Process::start(&args.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
}

fn router(more: &[&str]) -> Process {
    let model = demo_model().display().to_string();
    let args = [
        "router",
        "--model",
        &model,
        "--http",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
    ];
    start(&[&args, more].concat())
}

fn worker(router: &Process, more: &[&str]) -> Process {
    let grpc = router.address("grpc");
    let args = ["worker", "--join", &grpc, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    start(&[&args, more].concat())
}

/// Output of `muster probe`, and whether it succeeded.
fn probe(address: &str) -> (bool, String) {
    let probed = run(&["probe", "--admin", address]);
    (probed.status.success(), String::from_utf8(probed.stdout).unwrap())
}

async fn ready(process: &Process) {
    let address = process.address("admin");
    eventually("ready", async || probe(&address).0.then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_is_asked_for_ends_when_it_is_safe_and_the_process_waits() {
    let mut router = router(&["--leave-after", "250ms"]);
    let mut leaving = worker(&router, &[]);
    ready(&router).await;
    let staying = worker(&router, &[]);
    eventually("both hold something", async || {
        (http::metric(&staying.address("admin"), "muster_worker_experts") > 0.0).then_some(())
    })
    .await;

    let drained = run(&["drain", "--admin", &leaving.address("admin")]);
    assert_eq!(String::from_utf8_lossy(&drained.stdout), "safe to terminate\n");
    assert_eq!(probe(&leaving.address("admin")), (false, "not ready: it drains\n".to_owned()));
    // The gauge is updated once a second.
    eventually("the other holds all", async || {
        (http::metric(&staying.address("admin"), "muster_worker_experts") == 48.0).then_some(())
    })
    .await;
    assert!(probe(&router.address("admin")).0, "nothing is missing");
    assert_eq!(leaving.state(), 'S', "it waits for its end");
    leaving.signal(libc::SIGTERM);
    assert!(leaving.wait().is_some_and(|status| status.success()));

    // A leaving router reports not ready at once, and still accepts a request.
    let (admin, serving) = (router.address("admin"), router.address("http"));
    let draining = {
        let admin = admin.clone();
        tokio::task::spawn_blocking(move || run(&["drain", "--admin", &admin]))
    };
    eventually("it leaves", async || {
        let (is_ready, said) = probe(&admin);
        assert!(is_ready || said.starts_with("not ready: "), "{said}");
        (!is_ready).then_some(())
    })
    .await;
    assert_eq!(String::from_utf8_lossy(&draining.await.unwrap().stdout), "safe to terminate\n");
    assert!(std::net::TcpStream::connect(&serving).is_err(), "it takes no connections any more");
    router.signal(libc::SIGTERM);
    assert!(router.wait().is_some_and(|status| status.success()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_worker_reads_what_it_needs_and_no_more_from_workers_where_it_can() {
    let router = router(&["--replicas", "2"]);
    let first = worker(&router, &["--domain", "a"]);
    ready(&router).await;
    let second = worker(&router, &["--domain", "b"]);
    let (one, other) = (first.address("admin"), second.address("admin"));
    eventually("it holds a copy of everything", async || {
        (http::metric(&other, "muster_worker_experts") == 48.0).then_some(())
    })
    .await;
    for (address, source) in [(&one, "router"), (&other, "peer")] {
        let resident = http::metric(address, "muster_worker_resident_bytes");
        let loaded = http::metric(address, "muster_worker_expert_bytes_loaded_total");
        let page = http::get(address, "/metrics").text();
        assert_eq!(loaded, resident, "bytes read are bytes needed");
        assert!(
            page.contains(&format!("muster_worker_expert_bytes_loaded_total{{source=\"{source}\"}}")),
            "{page}"
        );
        let after = |until: &str| -> f64 {
            let line = format!("muster_worker_start_seconds{{until=\"{until}\"}} ");
            page.lines().find_map(|found| found.strip_prefix(&line)).unwrap().parse().unwrap()
        };
        assert!(0.0 < after("useful") && after("useful") <= after("full"), "{page}");
    }
    let status = run(&["status", "--json", "--grpc", &format!("http://{}", router.address("grpc"))]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    for worker in status[0]["workers"].as_array().unwrap() {
        assert!(0 < worker["useful_ms"].as_u64().unwrap(), "{worker}");
        assert!(worker["useful_ms"].as_u64() <= worker["full_ms"].as_u64(), "{worker}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_led_leads_again_when_all_workers_have_stood_still() {
    let router = router(&[]);
    let workers = [worker(&router, &[]), worker(&router, &[])];
    ready(&router).await;
    let leads = async |is: f64| {
        let admin = router.address("admin");
        eventually("the lead", async || (http::metric(&admin, "muster_placement_leads") == is).then_some(()))
            .await;
    };
    leads(1.0).await;
    for _ in 0..3 {
        // Until no worker counts for the majority.
        workers.iter().for_each(|worker| worker.signal(libc::SIGSTOP));
        leads(0.0).await;
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        workers.iter().for_each(|worker| worker.signal(libc::SIGCONT));
        leads(1.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_told_and_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("model");
    // The port must be known in advance; a port that was free a moment ago is unlikely to be taken.
    let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let args = [
        "router",
        "--http",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
        "--fallback",
        "local",
        "--admin",
        &admin,
    ];
    let args: Vec<String> =
        args.iter().map(ToString::to_string).chain(["--model".into(), model.display().to_string()]).collect();
    let starting = tokio::task::spawn_blocking(move || Process::start(&args).unwrap());
    let said = eventually("it says what is missing", async || {
        let (is_ready, said) = probe(&admin);
        assert!(!is_ready);
        said.contains(&model.display().to_string()).then_some(said)
    })
    .await;
    assert!(said.starts_with("not ready: "), "{said}");
    assert!(http::get(&admin, "/healthz").status == 200);
    std::os::unix::fs::symlink(demo_model(), &model).unwrap();
    eventually("it goes on by itself", async || probe(&admin).0.then_some(())).await;
    let log = starting.await.unwrap().log();
    assert_eq!(log.matches("trying again until it is mended").count(), 1, "{log}");

    // Without an admin address the process exits and prints the reason.
    let absent = Path::new("/absent/model").display().to_string();
    let ended = run(&["router", "--model", &absent, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]);
    assert_eq!(ended.status.code(), Some(2));
}
