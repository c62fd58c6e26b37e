//! A cluster whose workers join and leave: they know a router's address and, by default, no model.

use std::path::Path;

use muster_client::{Client, Policy};
use muster_proto::cluster::v1::{StatusReply, WorkerStatus, worker_status::State};
use muster_proto::expert::v1::CountRowsRequest;
use muster_proto::expert::v1::control_client::ControlClient;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use crate::http;
use crate::process::{Process, eventually};

/// Running processes. All are killed when dropped.
pub struct Elastic {
    model: String,
    router_args: Vec<String>,
    /// The routers.
    pub routers: Vec<Process>,
    /// Workers in the order in which they joined.
    pub workers: Vec<Process>,
    /// Command line of each worker.
    commands: Vec<Vec<String>>,
    // Holds the workers' sockets.
    directory: TempDir,
}

impl Elastic {
    /// `routers` routers of this model, each with these flags, and no workers yet.
    ///
    /// # Panics
    /// When one does not become ready.
    #[must_use]
    pub fn start(model: &Path, routers: usize, args: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let model = model.display().to_string();
        let router_args = args.iter().map(ToString::to_string).collect();
        let (workers, commands) = (Vec::new(), Vec::new());
        let mut cluster = Self { model, router_args, routers: Vec::new(), workers, commands, directory };
        for index in 0..routers {
            let router = cluster.router(index, "127.0.0.1:0", "127.0.0.1:0");
            cluster.routers.push(router);
        }
        cluster
    }

    fn router(&self, index: usize, grpc: &str, http: &str) -> Process {
        let id = format!("router-{index}");
        let args = ["router", "--model", &self.model, "--grpc", grpc, "--http", http, "--id", &id];
        let args = args.iter().map(ToString::to_string).chain(self.router_args.iter().cloned());
        Process::start(&args.collect::<Vec<_>>()).expect("router")
    }

    /// Restarts a router, which must have ended, at the same addresses.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn restart_router(&mut self, index: usize) {
        let router = &self.routers[index];
        self.routers[index] = self.router(index, &router.address("grpc"), &router.address("http"));
    }

    /// Starts one more worker, with additional flags, that joins all routers. Ready does not mean that it holds
    /// experts.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn join(&mut self, args: &[&str]) {
        let index = self.workers.len();
        let id = format!("worker-{index}");
        let listen = format!("unix:{}", self.directory.path().join(&id).display());
        let mut command: Vec<String> =
            ["worker", "--id", &id, "--listen", &listen].map(ToOwned::to_owned).into();
        for router in self.grpc() {
            command.extend(["--join".to_owned(), router]);
        }
        command.extend(args.iter().map(ToString::to_string));
        self.workers.push(Process::start(&command).expect("worker"));
        self.commands.push(command);
    }

    /// Restarts a worker, which must have ended, with the same command line.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn restart_worker(&mut self, index: usize) {
        self.workers[index] = Process::start(&self.commands[index]).expect("worker");
    }

    /// Drains a worker and waits for its exit.
    ///
    /// # Panics
    /// When it does not exit, or reports an error.
    pub fn leave(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        worker.signal(libc::SIGTERM);
        let status = worker.wait().expect("it ends");
        assert!(status.success(), "{}", worker.log());
        let log = worker.log();
        assert!(log.contains("safe to terminate"), "{log}");
        assert!(!log.contains("the drain time is up"), "{log}");
    }

    /// Addresses of the routers' gRPC APIs.
    #[must_use]
    pub fn grpc(&self) -> Vec<String> {
        self.routers.iter().map(|router| router.address("grpc")).collect()
    }

    /// An observer of one router's status.
    ///
    /// # Panics
    /// When it does not answer.
    pub async fn observer(&self, router: usize) -> Observer {
        Observer::of(&self.routers[router]).await
    }

    /// Status of a router.
    ///
    /// # Panics
    /// When it does not say.
    pub async fn status(&self, router: usize) -> StatusReply {
        self.observer(router).await.status().await
    }

    /// Waits until every expert is held, `workers` workers serve and hold experts, and none is loading.
    pub async fn settled(&self, workers: usize) -> StatusReply {
        let observer = self.observer(0).await;
        eventually("every worker has its experts", async || {
            let status = observer.status().await;
            let at_rest =
                |worker: &&WorkerStatus| serves(worker) && worker.experts > 0 && worker.loading == 0;
            let ready = status.workers.iter().filter(at_rest).count() == workers;
            (status.missing_experts == 0 && ready && serving(&status) == workers).then_some(status)
        })
        .await
    }

    /// Index of the leading router.
    pub async fn leader(&self) -> usize {
        eventually("a router leads", async || {
            for router in 0..self.routers.len() {
                if self.status(router).await.leads {
                    return Some(router);
                }
            }
            None
        })
        .await
    }

    /// The sum of a router's metric over its labels.
    #[must_use]
    pub fn metric(&self, router: usize, name: &str) -> f64 {
        http::metric(&self.routers[router].address("http"), name)
    }

    /// The control interface of a worker.
    ///
    /// # Panics
    /// When it cannot be reached.
    pub async fn control(&self, worker: usize) -> ControlClient<Channel> {
        // Both Muster and the client understand `unix:/path`.
        let endpoint = Endpoint::from_shared(self.workers[worker].address("listen")).expect("an address");
        ControlClient::new(endpoint.connect().await.expect("the worker listens"))
    }

    /// Rows received by a worker's experts of a layer since its start.
    ///
    /// # Panics
    /// When it does not say.
    pub async fn rows(&self, worker: usize, layer: u32) -> Vec<u64> {
        let counted = self.control(worker).await.count_rows(CountRowsRequest {}).await;
        let layers = counted.expect("it counts").into_inner().layers;
        // Layers without rows are not listed.
        layers.into_iter().find(|rows| rows.layer == layer).map_or_else(Vec::new, |rows| rows.rows)
    }
}

/// Queries a router's status.
#[derive(Clone)]
pub struct Observer(Client);

impl Observer {
    /// An observer of this router.
    ///
    /// # Panics
    /// When it does not answer.
    pub async fn of(router: &Process) -> Self {
        let client = Client::connect(&[router.address("grpc")], Policy::default()).await;
        Self(client.expect("the router listens"))
    }

    /// Current status.
    ///
    /// # Panics
    /// When it does not say.
    pub async fn status(&self) -> StatusReply {
        self.0.statuses().await.remove(0).1.expect("the router answers")
    }
}

fn serves(worker: &&WorkerStatus) -> bool {
    worker.state() == State::Serving
}

/// Workers that serve.
#[must_use]
pub fn serving(status: &StatusReply) -> usize {
    status.workers.iter().filter(serves).count()
}

/// Replicas of experts on all serving workers together.
#[must_use]
pub fn copies(status: &StatusReply) -> u32 {
    status.workers.iter().filter(serves).map(|worker| worker.experts).sum()
}
