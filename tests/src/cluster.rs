//! A router and its workers, as separate processes.

use std::path::Path;

use muster_proto::v1::inference_client::InferenceClient;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::process::Process;

/// What to start.
#[derive(Clone, Debug)]
pub struct Setup {
    model: String,
    shares: Vec<String>,
    common: Vec<String>,
    router: Vec<String>,
}

impl Setup {
    /// Two workers on this model.
    #[must_use]
    pub fn new(model: &Path) -> Self {
        let model = model.display().to_string();
        let setup = Self { model, shares: Vec::new(), common: Vec::new(), router: Vec::new() };
        setup.workers(2)
    }

    /// Another number of workers.
    #[must_use]
    pub fn workers(self, workers: usize) -> Self {
        let shares: Vec<String> = (0..workers).map(|index| format!("{index}/{workers}")).collect();
        self.shares(&shares.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// One worker for each of these shares.
    #[must_use]
    pub fn shares(mut self, shares: &[&str]) -> Self {
        self.shares = shares.iter().map(ToString::to_string).collect();
        self
    }

    /// What to round activations to.
    #[must_use]
    pub fn compute(mut self, compute: &str) -> Self {
        self.common.extend(["--compute".into(), compute.into()]);
        self
    }

    /// How to hold experts.
    #[must_use]
    pub fn expert_dtype(mut self, dtype: &str) -> Self {
        self.common.extend(["--expert-dtype".into(), dtype.into()]);
        self
    }

    /// More flags for the router.
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
        // Names are told apart also where shares are not.
        args.extend(["--id".into(), format!("worker-{index}")]);
        args.extend(self.common.iter().cloned());
        args
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
    /// How it was started.
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
        let directory = tempfile::tempdir().expect("a temporary directory");
        let sockets: Vec<String> = (0..setup.shares.len())
            .map(|index| format!("unix:{}", directory.path().join(format!("worker-{index}.sock")).display()))
            .collect();
        let workers = sockets
            .iter()
            .enumerate()
            .map(|(index, socket)| Process::start(&setup.worker_args(index, socket)).expect("worker"))
            .collect();
        let router = Process::start(&setup.router_command(&sockets)).expect("router");
        Self { setup, workers, router, _directory: directory }
    }

    /// Starts the worker of this share again, at the address it had.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn restart_worker(&mut self, index: usize) {
        let listen = self.workers[index].address("listen");
        self.workers[index] = Process::start(&self.setup.worker_args(index, &listen)).expect("worker");
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
