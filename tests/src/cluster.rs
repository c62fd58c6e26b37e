//! A router and its workers, as separate processes.

use std::path::Path;
use std::process::Command;

use muster_proto::v1::inference_client::InferenceClient;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::network::Network;
use crate::process::{Process, muster};

/// Settings of a cluster.
#[derive(Clone, Debug)]
pub struct Setup {
    model: String,
    shares: Vec<String>,
    common: Vec<String>,
    router: Vec<String>,
    /// Host that workers listen on, and the command that starts them there; `None` for Unix sockets.
    tcp: Option<(String, Vec<String>)>,
}

impl Setup {
    /// Two workers on `model`.
    #[must_use]
    pub fn new(model: &Path) -> Self {
        let model = model.display().to_string();
        let setup = Self { model, shares: Vec::new(), common: Vec::new(), router: Vec::new(), tcp: None };
        setup.workers(2)
    }

    /// Sets the number of workers.
    #[must_use]
    pub fn workers(self, workers: usize) -> Self {
        let shares: Vec<String> = (0..workers).map(|index| format!("{index}/{workers}")).collect();
        self.shares(&shares.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Sets one worker for each of `shares`.
    #[must_use]
    pub fn shares(mut self, shares: &[&str]) -> Self {
        self.shares = shares.iter().map(ToString::to_string).collect();
        self
    }

    /// Sets the dtype to which activations are rounded.
    #[must_use]
    pub fn compute(mut self, compute: &str) -> Self {
        self.common.extend(["--compute".into(), compute.into()]);
        self
    }

    /// Sets the dtype of the experts' weights.
    #[must_use]
    pub fn expert_dtype(mut self, dtype: &str) -> Self {
        self.common.extend(["--expert-dtype".into(), dtype.into()]);
        self
    }

    /// Workers listen on free TCP ports of the loopback instead of Unix sockets.
    #[must_use]
    pub fn tcp(mut self) -> Self {
        self.tcp = Some(("127.0.0.1".into(), Vec::new()));
        self
    }

    /// Workers run in `network` and listen there.
    #[must_use]
    pub fn across(mut self, network: &Network) -> Self {
        self.tcp = Some((network.far_host(), network.enter()));
        self
    }

    /// Adds flags for the router.
    #[must_use]
    pub fn router_args(mut self, args: &[&str]) -> Self {
        self.router.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Arguments of worker `index`, listening at `listen`.
    #[must_use]
    pub fn worker_args(&self, index: usize, listen: &str) -> Vec<String> {
        let share = &self.shares[index];
        let mut args: Vec<String> =
            ["worker", "--model", &self.model, "--listen", listen, "--share", share].map(Into::into).into();
        // Unique names, even for equal shares.
        args.extend(["--id".into(), format!("worker-{index}")]);
        args.extend(self.common.iter().cloned());
        if self.tcp.is_some() {
            args.push("--insecure-plaintext".into());
        }
        args
    }

    fn start_worker(&self, index: usize, listen: &str) -> Process {
        let args = self.worker_args(index, listen);
        let enter = self.tcp.as_ref().map_or(&[][..], |(_, enter)| enter);
        let mut command = match enter.split_first() {
            None => Command::new(muster()),
            Some((program, rest)) => {
                let mut command = Command::new(program);
                command.args(rest).arg(muster());
                command
            }
        };
        Process::start_by(command.args(args)).expect("worker")
    }

    /// Arguments of a router over workers at these addresses.
    #[must_use]
    pub fn router_command(&self, workers: &[String]) -> Vec<String> {
        let mut args: Vec<String> =
            ["router", "--model", &self.model, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
                .map(Into::into)
                .into();
        args.extend(workers.iter().flat_map(|address| ["--worker".to_owned(), address.clone()]));
        args.extend(self.common.iter().chain(&self.router).cloned());
        args
    }
}

/// Running processes. All are killed when dropped.
pub struct Cluster {
    /// Settings with which it was started.
    pub setup: Setup,
    /// Workers in order of their share.
    pub workers: Vec<Process>,
    /// The router.
    pub router: Process,
    // Holds the workers' sockets.
    _directory: TempDir,
}

impl Cluster {
    /// Starts workers on Unix sockets, then a router.
    ///
    /// # Panics
    /// When one of them does not become ready.
    #[must_use]
    pub fn start(setup: Setup) -> Self {
        let (workers, directory) = start_workers(&setup);
        let addresses = addresses(&workers);
        Self::routed(setup, workers, &addresses, directory)
    }

    /// Starts workers, then a router with other addresses for them: those of proxies set up by `between`.
    ///
    /// # Panics
    /// When one of them does not become ready.
    pub async fn start_through(setup: Setup, between: impl AsyncFnOnce(Vec<String>) -> Vec<String>) -> Self {
        let (workers, directory) = start_workers(&setup);
        let told = between(addresses(&workers)).await;
        // Blocks until the router is ready, for which the proxies must forward.
        tokio::task::block_in_place(|| Self::routed(setup, workers, &told, directory))
    }

    fn routed(setup: Setup, workers: Vec<Process>, addresses: &[String], directory: TempDir) -> Self {
        let router = Process::start(&setup.router_command(addresses)).expect("router");
        Self { setup, workers, router, _directory: directory }
    }

    /// Restarts the worker of this share at the same address.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn restart_worker(&mut self, index: usize) {
        let listen = self.workers[index].address("listen");
        self.workers[index] = self.setup.start_worker(index, &listen);
    }

    /// `host:port` of the HTTP API.
    #[must_use]
    pub fn http(&self) -> String {
        self.router.address("http")
    }

    /// `host:port` of the gRPC API.
    #[must_use]
    pub fn grpc(&self) -> String {
        self.router.address("grpc")
    }

    /// A client of the router.
    ///
    /// # Panics
    /// When it cannot connect.
    pub async fn client(&self) -> InferenceClient<Channel> {
        let url = format!("http://{}", self.grpc());
        InferenceClient::connect(url).await.expect("the router listens")
    }
}

fn addresses(workers: &[Process]) -> Vec<String> {
    workers.iter().map(|worker| worker.address("listen")).collect()
}

fn start_workers(setup: &Setup) -> (Vec<Process>, TempDir) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let listen = |index| match &setup.tcp {
        Some((host, _)) => format!("{host}:0"),
        None => format!("unix:{}", directory.path().join(format!("worker-{index}.sock")).display()),
    };
    let workers = (0..setup.shares.len()).map(|index| setup.start_worker(index, &listen(index))).collect();
    (workers, directory)
}
