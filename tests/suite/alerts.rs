//! The rules of the chart in a real Prometheus: each alert fires on its fault, and none on a healthy cluster.
//!
//! Needs `prometheus` and `promtool` (Debian's package `prometheus`); without them these tests say that they were
//! skipped. Minutes that an alert has to last are seconds here.

use std::fmt::Write as _;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use muster_proto::v1::inference_client::InferenceClient;
use muster_tests::client::{generate, greedy};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::damaged::{copy_of, flip_a_bit, poison};
use muster_tests::elastic::Elastic;
use muster_tests::liar::{Liar, Lie};
use muster_tests::process::{PATIENCE, Process, eventually, muster, run, run_command};
use muster_tests::skewed::skewed_model;
use muster_tests::{demo_model, http, workspace_root};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;
use tokio::task::JoinSet;
use tonic::transport::Channel;

fn installed(program: &str) -> bool {
    let found =
        Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

/// A Prometheus over some jobs, each a list of processes by name and address.
struct Prometheus {
    child: Child,
    address: String,
    _directory: tempfile::TempDir,
}

impl Prometheus {
    fn start(jobs: &[(&str, Vec<(&str, String)>)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let rules = fs::read_to_string(workspace_root().join("helm/muster/rules/muster.yaml")).unwrap();
        let hasty = rules.lines().map(|line| {
            match line.trim().strip_prefix("for: ").and_then(|f| f.strip_suffix('m')) {
                Some(minutes) => format!("        for: {minutes}s\n"),
                None => format!("{line}\n"),
            }
        });
        fs::write(directory.path().join("rules.yaml"), hasty.collect::<String>()).unwrap();
        let mut config =
            "global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}\n\
            rule_files: [rules.yaml]\nscrape_configs:\n"
                .to_owned();
        for (job, targets) in jobs {
            writeln!(config, "  - job_name: {job}\n    static_configs:").unwrap();
            for (pod, address) in targets {
                writeln!(config, "      - {{targets: ['{address}'], labels: {{namespace: n, pod: {pod}}}}}")
                    .unwrap();
            }
        }
        fs::write(directory.path().join("prometheus.yaml"), config).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let child = Command::new("prometheus")
            .arg(format!("--web.listen-address={address}"))
            .args(["--config.file=prometheus.yaml", "--storage.tsdb.path=data"])
            .current_dir(directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < deadline, "Prometheus does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { child, address, _directory: directory }
    }

    /// Names and jobs of the alerts that fire now. A job is empty where an alert is about none.
    fn firing(&self) -> Option<Vec<(String, String)>> {
        let answer = http::get(&self.address, "/api/v1/alerts");
        let answer: Value = serde_json::from_str(&answer.text()).ok()?;
        let alerts = answer["data"]["alerts"].as_array()?.iter().filter(|alert| alert["state"] == "firing");
        let label = |alert: &Value, name: &str| alert["labels"][name].as_str().unwrap_or_default().to_owned();
        Some(alerts.map(|alert| (label(alert, "alertname"), label(alert, "job"))).collect())
    }

    async fn fires(&self, name: &str, job: &str) {
        let what = format!("{name} for {job:?}");
        eventually(&what, async || self.firing()?.contains(&(name.to_owned(), job.to_owned())).then_some(()))
            .await;
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Streams without end, a new one every so often; they end with the test.
fn load(running: &mut JoinSet<()>, client: &InferenceClient<Channel>, tokens: u32, every: Duration) {
    let client = client.clone();
    running.spawn(async move {
        let mut streams = JoinSet::new();
        for n in 0.. {
            let client = client.clone();
            streams.spawn(async move { generate(&client, greedy(&[1, 4 + n % 100], tokens)).await.is_ok() });
            tokio::time::sleep(every).await;
        }
    });
}

/// Long prompts, one after the other, none of which begins like another.
fn prefill(running: &mut JoinSet<()>, client: &InferenceClient<Channel>) {
    let client = client.clone();
    running.spawn(async move {
        for n in 0.. {
            let prompt: Vec<u32> = (0..400).map(|position| 300 + (n * 7919 + position * 31) % 1000).collect();
            if generate(&client, greedy(&prompt, 1)).await.is_err() {
                return;
            }
        }
    });
}

fn model_with_poison() -> tempfile::TempDir {
    let model = copy_of(&demo_model());
    (0..8).for_each(|expert| poison(model.path(), 0, expert));
    model
}

/// Start one process of `muster` with words that hold no blanks.
fn start(words: &str) -> Process {
    let args: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    Process::start(&args).unwrap()
}

/// Makes a new authority's certificates, and returns the flags for one role.
fn certificates(directory: &Path, role: &str) -> String {
    let certs = directory.display();
    assert!(run(&["certs", "init", &certs.to_string(), "--days", "7"]).status.success());
    format!(
        "--tls-cert {certs}/{role}/tls.crt --tls-key {certs}/{role}/tls.key --tls-ca {certs}/{role}/ca.crt"
    )
}

/// A model that computes almost only in its experts: one layer of the demo model, with experts many times as wide and
/// all zeros.
fn model_of_wide_experts() -> tempfile::TempDir {
    const WIDTH: usize = 18_432;
    let model = copy_of(&demo_model());
    let path = |name: &str| model.path().join(name);
    let mut config: Value = serde_json::from_slice(&fs::read(path("config.json")).unwrap()).unwrap();
    (config["num_hidden_layers"], config["intermediate_size"]) = (1.into(), WIDTH.into());
    fs::write(path("config.json"), config.to_string()).unwrap();
    let width = config["hidden_size"].as_u64().unwrap() as usize;
    let zeros = vec![0; 2 * WIDTH * width];
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"].map(path);
    let bytes = shards.each_ref().map(|shard| fs::read(shard).unwrap());
    let tensors = bytes.iter().flat_map(|bytes| SafeTensors::deserialize(bytes).unwrap().tensors());
    let kept = tensors.filter(|(name, _)| !name.contains(".layers.") || name.contains(".layers.0."));
    let views = kept.map(|(name, tensor)| {
        let widened =
            || tensor.shape().iter().map(|&size| if size == width { width } else { WIDTH }).collect();
        let is_expert = name.contains(".experts.");
        let view =
            if is_expert { TensorView::new(tensor.dtype(), widened(), &zeros).unwrap() } else { tensor };
        (name, view)
    });
    safetensors::serialize_to_file(views, None, &path("model.safetensors")).unwrap();
    shards
        .iter()
        .chain([&path("model.safetensors.index.json")])
        .for_each(|file| fs::remove_file(file).unwrap());
    model
}

/// A router with certificates that end in a week.
fn expiring(directory: &Path) -> Process {
    let certificates = certificates(directory, "router");
    start(&format!(
        "router --model demo --http 127.0.0.1:0 --grpc 127.0.0.1:0 --admin 127.0.0.1:0 {certificates}"
    ))
}

/// Memory for half of the experts of [`skewed_model`].
const HALF: &str = "480KiB";

/// Two full workers of a model that routes every token to one expert of one layer, so that no replica can be added.
async fn stuck(running: &mut JoinSet<()>, model: &Path) -> Elastic {
    let mut cluster = Elastic::start(model, 1, &[]);
    for share in ["0/2", "1/2"] {
        let model = model.display().to_string();
        cluster.join(&["--model", &model, "--share", share, "--memory", HALF]);
    }
    cluster.settled(2).await;
    let client = InferenceClient::connect(format!("http://{}", cluster.grpc()[0])).await.unwrap();
    load(running, &client, 60, Duration::from_millis(50));
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alert_fires_on_its_fault_and_none_without() {
    if !installed("prometheus") {
        return;
    }
    let mut running = JoinSet::new();
    let healthy = Cluster::start(Setup::new(&demo_model()));
    let empty = Elastic::start(&demo_model(), 1, &[]);
    let mut tight = Elastic::start(&demo_model(), 1, &[]);
    tight.join(&["--memory", "4MB"]);
    let mut single = Elastic::start(&demo_model(), 1, &["--replicas", "2"]);
    single.join(&[]);
    let mut two = [(); 2].map(|()| Elastic::start(&demo_model(), 1, &[]));
    two.iter_mut().for_each(|one| one.join(&[]));
    let skewed = skewed_model();
    let stuck = stuck(&mut running, skewed.path()).await;
    let poisoned_model = model_with_poison();
    let poisoned = Cluster::start(Setup::new(poisoned_model.path()));
    let directory = tempfile::tempdir().unwrap();
    let expiring = expiring(directory.path());
    let growing = Cluster::start(Setup::new(&demo_model()).router_args(&[
        "--max-running",
        "1",
        "--max-queue-wait",
        "1h",
    ]));
    let full =
        Cluster::start(Setup::new(&demo_model()).router_args(&["--max-running", "1", "--max-queue", "1"]));
    let strange = tempfile::tempdir().unwrap();
    let shunned = start(&format!(
        "worker --model demo --listen 127.0.0.1:0 --admin 127.0.0.1:0 {}",
        certificates(directory.path(), "worker")
    ));
    let damaged_model = copy_of(&demo_model());
    flip_a_bit(damaged_model.path(), 0, 3);
    let mut damaged = Elastic::start(&demo_model(), 1, &[]);
    damaged.join(&[]);
    let wide_model = model_of_wide_experts();
    let wide = wide_model.path().display();
    let busy_worker =
        start(&format!("worker --model {wide} --listen 127.0.0.1:0 --admin 127.0.0.1:0 --threads 1"));
    let busy = start(&format!(
        "router --model {wide} --http 127.0.0.1:0 --grpc 127.0.0.1:0 --worker {} --placement static",
        busy_worker.address("listen")
    ));
    let client = InferenceClient::connect(format!("http://{}", busy.address("grpc"))).await.unwrap();
    (0..8).for_each(|_| prefill(&mut running, &client));
    let honest = [(); 2].map(|()| start("worker --model demo --listen 127.0.0.1:0"));
    let liar = Liar::start("liar", &honest[0].address("listen"), &[Lie::RowMissing], 0).await.unwrap();
    let lied_to = start(&format!(
        "router --model demo --http 127.0.0.1:0 --grpc 127.0.0.1:0 --worker {} --worker {} --placement static",
        liar.address,
        honest[1].address("listen")
    ));
    // The queue is not empty at Prometheus' first scrape.
    load(&mut running, &growing.client().await, 400, Duration::from_millis(300));

    let of = |process: &Process| process.address("http");
    let prometheus = Prometheus::start(&[
        ("healthy", vec![("router-0", of(&healthy.router))]),
        ("empty", vec![("router-0", of(&empty.routers[0]))]),
        ("tight", vec![("router-0", of(&tight.routers[0]))]),
        ("single", vec![("router-0", of(&single.routers[0]))]),
        ("two", vec![("router-0", of(&two[0].routers[0])), ("router-1", of(&two[1].routers[0]))]),
        ("stuck", vec![("router-0", of(&stuck.routers[0]))]),
        ("poisoned", vec![("router-0", of(&poisoned.router))]),
        ("expiring", vec![("router-0", expiring.address("admin"))]),
        ("growing", vec![("router-0", of(&growing.router))]),
        ("full", vec![("router-0", of(&full.router))]),
        ("shunned", vec![("worker-0", shunned.address("admin"))]),
        ("busy", vec![("worker-0", busy_worker.address("admin"))]),
        ("lied-to", vec![("router-0", of(&lied_to))]),
        ("damaged", vec![("router-0", of(&damaged.routers[0]))]),
    ]);
    eventually("Prometheus has looked twice", async || {
        let seen = http::get(&prometheus.address, "/api/v1/query?query=min(count_over_time(up[1m]))");
        let seen: Value = serde_json::from_str(&seen.text()).ok()?;
        (seen["data"]["result"][0]["value"][1].as_str()?.parse::<u32>().ok()? >= 2).then_some(())
    })
    .await;
    // Counters must not begin with their first event, which Prometheus would not see as growth.
    liar.begin();
    load(&mut running, &full.client().await, 400, Duration::from_millis(300));
    let client = InferenceClient::connect(format!("http://{}", lied_to.address("grpc"))).await.unwrap();
    load(&mut running, &client, 400, Duration::from_secs(2));
    damaged.join(&["--model", &damaged_model.path().display().to_string(), "--share", "all"]);
    let stranger = format!(
        "router --model demo --http 127.0.0.1:0 --grpc 127.0.0.1:0 --worker {} --connect-timeout 3s {}",
        shunned.address("listen"),
        certificates(strange.path(), "router")
    );
    assert!(!run_command(Command::new(muster()).args(stranger.split_whitespace())).status.success());

    for (name, job) in [
        ("MusterRouterNotReady", "empty"),
        ("MusterNoLeader", "empty"),
        ("MusterExpertsWithoutMemory", "tight"),
        ("MusterRouterDegraded", "single"),
        ("MusterExpertsUnderReplicated", "single"),
        ("MusterTwoLeaders", "two"),
        ("MusterCanaryFails", "poisoned"),
        ("MusterRequestsFail", "poisoned"),
        ("MusterCertificateEnds", "expiring"),
        ("MusterQueueGrows", "growing"),
        ("MusterRequestsRefused", "full"),
        ("MusterHandshakesRefused", "shunned"),
        ("MusterWorkerRefused", "damaged"),
        ("MusterWorkerBanned", "lied-to"),
        ("MusterExpertsStuck", "stuck"),
        ("MusterWorkersBusy", "busy"),
    ] {
        prometheus.fires(name, job).await;
    }
    let firing = prometheus.firing().unwrap();
    assert!(!firing.iter().any(|(name, job)| job == "healthy" || name == "MusterNoRouter"), "{firing:?}");
    drop((
        healthy, empty, tight, single, two, stuck, poisoned, expiring, growing, full, lied_to, busy, damaged,
    ));
    prometheus.fires("MusterNoRouter", "").await;
}

#[test]
fn promtool_finds_nothing_to_say_about_the_metrics() {
    if !installed("promtool") {
        return;
    }
    let cluster = Cluster::start(Setup::new(&demo_model()).tcp());
    let worker = start("worker --model demo --listen 127.0.0.1:0 --admin 127.0.0.1:0");
    for address in [cluster.http(), worker.address("admin")] {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("metrics");
        let text = http::get(&address, "/metrics").text();
        let again = http::get(&address, "/metrics").text();
        let mut known = series(&again);
        known.retain(|name| series(&text).contains(name));
        assert!(known == series(&text), "series come in another order");
        fs::write(&file, text).unwrap();
        let output = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(fs::File::open(&file).unwrap())
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    }
}

/// What is counted, in its order.
fn series(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| Some(line.rsplit_once(' ')?.0))
        .filter(|line| !line.starts_with('#'))
        .collect()
}
