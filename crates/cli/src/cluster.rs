//! A private cluster's workers: child processes on Unix sockets in a private directory, restarted when they die.

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::args::{ComputeArgs, LogArgs};
use crate::cores::shares_of_cores;
use crate::failure::Failure;
use crate::kept::Kept;
use crate::models::Links;
use crate::numbers::MOST_ROWS;
use crate::progress::Bars;
use crate::sockets::SocketDirectory;

/// Settings of a private cluster.
pub(crate) struct ClusterSpec<'a> {
    pub(crate) model: &'a str,
    pub(crate) links: Links,
    pub(crate) count: NonZeroU32,
    /// Routed experts of the model, over all its layers.
    pub(crate) experts_in_all: u64,
    /// Replicas of every expert.
    pub(crate) replicas: NonZeroU32,
    pub(crate) compute: ComputeArgs,
    pub(crate) log: &'a LogArgs,
}

impl ClusterSpec<'_> {
    /// Checks that the workers are not too many for the experts.
    ///
    /// # Errors
    /// Names the flag with the excessive value.
    fn check(&self) -> Result<(), Failure> {
        let &Self { count, replicas, experts_in_all, .. } = self;
        if replicas > count {
            return Err(Failure::input(format!(
                "--replicas: {count} workers cannot hold {replicas} copies of an expert; use at most {count}"
            )));
        }
        if u64::from(count.get()) > experts_in_all {
            return Err(Failure::input(format!(
                "--workers: the model has {experts_in_all} experts, so some of {count} workers would hold none; use at most \
                 {experts_in_all}"
            )));
        }
        Ok(())
    }
}

impl ClusterSpec<'_> {
    /// Arguments of a router over these workers, without its listening addresses.
    pub(crate) fn router_arguments(&self, workers: &Workers) -> Vec<OsString> {
        let compute = self.compute;
        let threads = compute.threads.unwrap_or(shares_of_cores(self.count).0);
        let mut arguments: Vec<OsString> = vec![
            "router".into(),
            "--model".into(),
            self.model.into(),
            "--threads".into(),
            threads.to_string().into(),
            "--combine".into(),
            compute.combine.to_string().into(),
            "--busy-poll-us".into(),
            compute.busy_poll_us.to_string().into(),
            "--trunk-dtype".into(),
            compute.trunk_dtype.to_string().into(),
            "--replicas".into(),
            self.replicas.to_string().into(),
        ];
        arguments.extend(workers.addresses.iter().flat_map(|address| ["--worker".into(), address.into()]));
        arguments.extend(self.common_flags());
        arguments
    }

    /// Flags common to routers and workers.
    fn common_flags(&self) -> Vec<OsString> {
        let mut flags: Vec<OsString> = compute_flags(self.compute).into();
        if self.links == Links::Anywhere {
            flags.push("--allow-links".into());
        }
        flags.extend(log_flags(self.log));
        flags
    }
}

/// Running workers. Lives on the main thread.
pub(crate) struct Workers {
    count: NonZeroU32,
    addresses: Vec<String>,
    /// Process id of each worker's current or last process.
    pids: Vec<Arc<AtomicU32>>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    _directory: SocketDirectory,
}

/// Flags that pass this process's logging to a child.
fn log_flags(log: &LogArgs) -> Vec<OsString> {
    let mut flags = vec!["--log".into(), log.log.clone().unwrap_or_else(|| "warn".to_owned()).into()];
    if let Some(format) = log.log_format {
        flags.extend(["--log-format".into(), format.to_string().into()]);
    }
    flags
}

/// Flags that pass the compute mode and the experts' dtype to a child.
fn compute_flags(args: ComputeArgs) -> [OsString; 4] {
    let compute = args.compute.get().map_or_else(|| "auto".to_owned(), |compute| compute.to_string());
    ["--compute".into(), compute.into(), "--expert-dtype".into(), args.expert_dtype.to_string().into()]
}

impl Workers {
    /// Starts all workers and waits until they are ready. When one cannot start, all are stopped.
    pub(crate) async fn start(spec: &ClusterSpec<'_>, bars: &Bars) -> Result<Self, Failure> {
        spec.check()?;
        let directory = SocketDirectory::make()?;
        let mut workers = Self {
            count: spec.count,
            addresses: Vec::new(),
            pids: Vec::new(),
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
            _directory: directory,
        };
        let mut starting = Vec::new();
        for index in 0..spec.count.get() {
            let address =
                format!("unix:{}", workers._directory.path().join(format!("{index}.sock")).display());
            let pid = Arc::new(AtomicU32::new(0));
            let name = format!("worker {index}");
            let given = arguments(spec, index, &address);
            let worker = Kept { name, arguments: move |_: Option<&_>| given.clone(), pid: pid.clone() };
            workers.pids.push(pid);
            let (ready, is_ready) = oneshot::channel();
            let bar = bars.bar(worker.name.clone());
            workers.tasks.spawn(worker.keep(bar, ready, workers.stop.clone()));
            workers.addresses.push(address);
            starting.push(is_ready);
        }
        for is_ready in starting {
            // A task that ends without an answer was stopped.
            let outcome = is_ready.await.unwrap_or(Err(Failure::Interrupted));
            if let Err(failure) = outcome {
                workers.stop().await;
                return Err(failure);
            }
        }
        Ok(workers)
    }

    /// Number of workers.
    pub(crate) const fn count(&self) -> NonZeroU32 {
        self.count
    }

    /// Process id of the worker's current or last process.
    pub(crate) fn pid(&self, index: usize) -> u32 {
        self.pids.get(index).map_or(0, |pid| pid.load(Ordering::Relaxed))
    }

    /// Addresses of the workers.
    pub(crate) fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Stops all workers.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

fn arguments(spec: &ClusterSpec<'_>, index: u32, address: &str) -> Vec<OsString> {
    let threads = spec.compute.threads.unwrap_or(shares_of_cores(spec.count).1);
    let mut arguments: Vec<OsString> = vec![
        "worker".into(),
        "--model".into(),
        spec.model.into(),
        "--listen".into(),
        address.into(),
        "--share".into(),
        format!("{index}/{}x{}", spec.count, spec.replicas).into(),
        "--id".into(),
        format!("worker-{index}").into(),
        "--threads".into(),
        threads.to_string().into(),
        "--memory".into(),
        format!("{}B", (muster_worker::memory_for_experts() / u64::from(spec.count.get())).max(1)).into(),
        "--max-rows".into(),
        MOST_ROWS.to_string().into(),
        "--busy-poll-us".into(),
        spec.compute.busy_poll_us.to_string().into(),
    ];
    arguments.extend(spec.common_flags());
    arguments
}
