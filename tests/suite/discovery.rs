//! Routers that find their workers in EndpointSlices, and lead only while they hold a Lease.

use std::process::{Command, Stdio};

use muster_proto::cluster::v1::StatusReply;
use muster_proto::cluster::v1::worker_status::State;
use muster_proto::expert::v1::control_client::ControlClient;
use muster_proto::expert::v1::{LeadReply, LeadRequest};
use muster_tests::elastic::{Observer, serving};
use muster_tests::kubernetes::ApiServer;
use muster_tests::process::{Process, eventually, muster};
use muster_tests::{demo_model, http};

/// As in a pod.
fn start(api: &ApiServer, role: &str, args: &[&str]) -> Process {
    let model = demo_model().display().to_string();
    let mut command = Command::new(muster());
    command.args([role, "--model", &model]).args(args);
    command.env("KUBECONFIG", api.kubeconfig()).env("KUBERNETES_SERVICE_HOST", "127.0.0.1");
    Process::start_by(&mut command).unwrap()
}

fn router(api: &ApiServer, id: &str, args: &[&str]) -> Process {
    let args = [&["--id", id, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"], args].concat();
    start(api, "router", &args)
}

fn worker(api: &ApiServer, id: &str) -> Process {
    start(api, "worker", &["--id", id, "--share", "none", "--listen", "127.0.0.1:0"])
}

fn readyz(router: &Process) -> String {
    http::get(&router.address("http"), "/readyz").text()
}

async fn status(observer: &Observer, what: &str, is: impl Fn(&StatusReply) -> bool) -> StatusReply {
    eventually(what, async || Some(observer.status().await).filter(&is)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_come_and_go_with_their_endpoints() {
    let api = ApiServer::start();
    api.denies(true);
    let router = router(&api, "router", &["--discover", "kubernetes:workers"]);
    eventually("it says what it lacks", async || {
        let reason = readyz(&router);
        let (what, remedy) =
            ("ServiceAccount ns/router may not use endpointslices", "the verbs list and watch");
        (reason.contains(what) && reason.contains(remedy)).then_some(())
    })
    .await;
    let mut workers = [worker(&api, "w0"), worker(&api, "w1")];
    api.add(&workers[0].address("listen"), "node-0");
    api.denies(false);
    let observer = Observer::of(&router).await;
    let is_full = |status: &StatusReply, workers| status.missing_experts == 0 && serving(status) == workers;
    let one = status(&observer, "the first has everything", |status| is_full(status, 1)).await;
    assert_eq!(one.workers[0].domain, "zone/node-0");

    api.add(&workers[1].address("listen"), "node-1");
    let two = status(&observer, "both have something", |status| {
        is_full(status, 2) && status.workers.iter().all(|worker| worker.experts > 0 && worker.loading == 0)
    })
    .await;
    assert!(two.workers.iter().any(|worker| worker.domain == "zone/node-1"));

    // The endpoint is removed first, as for a deleted pod: a live worker without an endpoint is still used.
    api.remove(&workers[1].address("listen"));
    eventually("it is no longer named", async || {
        (http::metric(&router.address("http"), "muster_discovery_workers") == 1.0).then_some(())
    })
    .await;
    assert_eq!(serving(&observer.status().await), 2);
    workers[1].kill();
    status(&observer, "it is forgotten", |status| status.workers.len() == 1 && is_full(status, 1)).await;
    // A dead worker whose endpoint remains is reported as down.
    workers[0].kill();
    status(&observer, "it is missed", |status| {
        status.workers.len() == 1 && status.workers[0].state() == State::Down && status.missing_experts > 0
    })
    .await;
    assert!(readyz(&router).contains("discovery by kubernetes:workers: it names 1 workers"));
}

/// A name, as far as this program is concerned, that every resolver knows without a network.
const NAME: &str = "127.1";

fn by_name(address: &str) -> String {
    format!("{NAME}:{}", address.rsplit_once(':').unwrap().1)
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_resolved_by_both_sides() {
    let api = ApiServer::start();
    let asked = worker(&api, "asked");
    let router =
        router(&api, "router", &["--discover", &format!("dns:{}", by_name(&asked.address("listen")))]);
    let observer = Observer::of(&router).await;
    let is_full = |status: &StatusReply, workers| status.missing_experts == 0 && serving(status) == workers;
    status(&observer, "the router finds the worker", |status| is_full(status, 1)).await;
    let args =
        ["worker", "--id", "asks", "--listen", "127.0.0.1:0", "--join", &by_name(&router.address("grpc"))];
    let asks = Process::start(&args.map(str::to_owned)).unwrap();
    status(&observer, "the worker finds the router", |status| is_full(status, 2)).await;
    assert!(asks.log().contains("joined"), "{}", asks.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_holds_the_lease_leads() {
    let api = ApiServer::start();
    let worker = worker(&api, "w0");
    api.add(&worker.address("listen"), "node-0");
    let args = ["--discover", "kubernetes:workers", "--lease", "kubernetes:leader"];
    let mut routers = [router(&api, "r0", &args), router(&api, "r1", &args)];
    let observers = [Observer::of(&routers[0]).await, Observer::of(&routers[1]).await];
    let leads = async |n: usize| observers[n].status().await.leads;
    let first = eventually("the holder leads", async || {
        let holder = api.holder()?;
        let n = usize::from(holder.starts_with("r1/"));
        leads(n).await.then_some(n)
    })
    .await;
    for _ in 0..100 {
        assert!(!leads(1 - first).await, "it leads without the Lease");
    }

    // With the Lease given to somebody else, the leader stops and the other router, which workers would obey, does not
    // begin.
    api.give("somebody");
    eventually("it stops leading", async || (!leads(first).await).then_some(())).await;
    assert_eq!(api.holder().as_deref(), Some("somebody"));
    assert!(!leads(0).await && !leads(1).await);
    api.give("");
    let second = eventually("one leads again", async || {
        let n = usize::from(api.holder()?.starts_with("r1/"));
        leads(n).await.then_some(n)
    })
    .await;

    // A leader that exits gives the Lease back.
    let left = 1 - second;
    routers[second].signal(libc::SIGTERM);
    assert!(routers[second].wait().unwrap().success());
    let log = routers[second].log();
    assert!(log.contains("given back"), "{log}");
    eventually("the other leads", async || leads(left).await.then_some(())).await;
    assert!(api.holder().unwrap().starts_with(&format!("r{left}/")));

    // With access denied, the last grant runs out and nobody leads; readiness tells the reason.
    api.denies(true);
    eventually("it stops leading when it may not renew", async || (!leads(left).await).then_some(())).await;
    assert!(readyz(&routers[left]).contains("may not use leases"), "{}", readyz(&routers[left]));
    api.denies(false);
    eventually("it leads when that is mended", async || leads(left).await.then_some(())).await;
}

/// A worker's answer to a campaign for a lease of 1 ms.
async fn lead(worker: &Process, term: u64) -> LeadReply {
    let mut control = ControlClient::connect(format!("http://{}", worker.address("listen"))).await.unwrap();
    let request = LeadRequest { router_id: "asks".into(), term, ttl_ms: 1 };
    control.lead(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_ends_before_it_serves_gives_the_lead_back_too() {
    let api = ApiServer::start();
    // Without memory, so that experts are missing for ever.
    let worker = start(
        &api,
        "worker",
        &["--id", "w0", "--share", "none", "--memory", "64KiB", "--listen", "127.0.0.1:0"],
    );
    let (model, listen) = (demo_model().display().to_string(), worker.address("listen"));
    let router = |patience: &str| {
        let mut command = Command::new(muster());
        command.args(["router", "--id", "r0", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        command.args(["--model", &model, "--worker", &listen, "--lease", "kubernetes:leader"]);
        command.args(["--connect-timeout", patience]);
        command.env("KUBECONFIG", api.kubeconfig()).env("KUBERNETES_SERVICE_HOST", "127.0.0.1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let leads = async |child: &mut std::process::Child| {
        eventually("it leads", async || {
            assert!(child.try_wait().unwrap().is_none(), "it ended first");
            let held = api.holder().is_some_and(|holder| holder.starts_with("r0/"));
            let obeyed = lead(&worker, 1).await;
            (held && obeyed.router_id.starts_with("r0/") && obeyed.left_ms > 0).then_some(obeyed.term)
        })
        .await
    };
    for (patience, is_told) in [("15s", false), ("600s", true)] {
        let mut child = router(patience).spawn().unwrap();
        let term = leads(&mut child).await;
        if is_told {
            // SAFETY: the process is a child that was not waited for.
            assert_eq!(unsafe { libc::kill(child.id().try_into().unwrap(), libc::SIGTERM) }, 0);
        }
        let output = tokio::task::spawn_blocking(|| child.wait_with_output()).await.unwrap().unwrap();
        let answer = lead(&worker, term + 1).await;
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), is_told, "{log}");
        assert!(is_told || log.contains("no worker holds"), "{log}");
        assert!(api.holder().is_none_or(|holder| holder.is_empty()), "{:?}\n{log}", api.holder());
        assert!(answer.granted, "the worker still waits for it: {answer:?}\n{log}");
    }
}
