//! `muster bench --chaos`: injects faults into a private cluster while streams run, and measures their pauses.
//!
//! Every stream is compared, token by token, with its undisturbed run.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use muster_bench::Streams;
use muster_bench::chaos::{Fault, Load, Outcome, table};
use muster_client::Client;
use muster_model::card::expert_shape;
use muster_proto::cluster::v1::status_reply::Health;
use tokio::task::LocalSet;

use crate::args::{BenchArgs, CredentialArgs, LogArgs};
use crate::backend::{self, Backend};
use crate::children;
use crate::cluster::{ClusterSpec, Workers};
use crate::failure::Failure;
use crate::kept::GRACE;
use crate::models::DEMO;
use crate::progress::Bars;
use crate::signals::Signals;
use crate::{models, out};

/// Default number of workers.
const WORKERS: NonZeroU32 = NonZeroU32::new(3).expect("it is not zero");
/// Replicas of every expert.
const REPLICAS: NonZeroU32 = NonZeroU32::new(2).expect("it is not zero");
/// Default number of concurrent streams.
const STREAMS: u32 = 32;
/// Deadline for the cluster's recovery.
const RECOVERY: Duration = Duration::from_secs(60);
/// Polling interval of the recovery.
const LOOK: Duration = Duration::from_millis(20);
/// Length of a worker's stop.
const STILL: Duration = Duration::from_secs(5);

pub(crate) async fn run(args: &BenchArgs, log: &LogArgs) -> Result<(), Failure> {
    // Deaths are injected on purpose, so warnings of them are not logged.
    let log = &LogArgs { log: Some(log.log.clone().unwrap_or_else(|| "error".to_owned())), ..log.clone() };
    let model = args.target.model.as_deref().unwrap_or(DEMO);
    let links = args.target.links.links();
    let experts_in_all = expert_shape(&models::open(model, links)?).total();
    let count = args.target.workers.unwrap_or(WORKERS);
    if count < REPLICAS {
        return Err(Failure::input("--workers: with fewer than 2 there is nobody to stand in for a worker"));
    }
    let streams = args.concurrency.iter().copied().max().unwrap_or(STREAMS);
    let mut signals = Signals::listen()?;
    let bars = Bars::new();
    let spec =
        ClusterSpec { model, links, count, experts_in_all, replicas: REPLICAS, compute: args.compute, log };
    let workers = signals.unless(Workers::start(&spec, &bars)).await?;
    let outcome =
        LocalSet::new().run_until(signals.unless(with_router(args, &spec, streams, &workers))).await;
    workers.stop().await;
    outcome
}

async fn with_router(
    args: &BenchArgs,
    spec: &ClusterSpec<'_>,
    streams: u32,
    workers: &Workers,
) -> Result<(), Failure> {
    let start = |grpc: String| {
        let mut arguments = spec.router_arguments(workers);
        arguments.extend(["--http", "127.0.0.1:0", "--grpc", &grpc].map(Into::into));
        children::spawn("the router", &arguments)
    };
    let mut router = start("127.0.0.1:0".to_owned())?;
    let listening = router.ready(|_| {}).await?;
    let grpc = listening.grpc.ok_or_else(|| Failure::runtime("the router did not say where it listens"))?;
    let client = backend::connect(&[grpc.to_string()], &CredentialArgs::default()).await?;
    whole(&client, workers).await?;
    let mut backend = Backend::Router(client.clone());
    let about = backend.about().await?.model;
    let kind = Streams::of(&about);
    let load = Load { target: backend, streams, kind };
    let mut undisturbed = Vec::new();
    for run in load.run(async || Ok::<_, Failure>(())).await?.0 {
        undisturbed.push(run?.0);
    }
    let mut outcomes = Vec::new();
    for fault in Fault::ALL {
        let (runs, disturbed) = load
            .run(async || match fault {
                Fault::KillWorker => {
                    let before = workers.pid(1);
                    signal(before, libc::SIGKILL);
                    changed(workers, 1, before).await
                }
                Fault::StopWorker => {
                    let pid = workers.pid(1);
                    signal(pid, libc::SIGSTOP);
                    tokio::time::sleep(STILL).await;
                    signal(pid, libc::SIGCONT);
                    Ok(())
                }
                Fault::RestartWorkers => {
                    for index in 0..workers.count().get() as usize {
                        whole(&client, workers).await?;
                        let before = workers.pid(index);
                        signal(before, libc::SIGTERM);
                        changed(workers, index, before).await?;
                    }
                    Ok(())
                }
                Fault::KillRouter => {
                    router.kill().await;
                    router = start(grpc.to_string())?;
                    router.ready(|_| {}).await.map(drop)
                }
            })
            .await?;
        let outcome = Outcome::of(fault, disturbed, runs, &undisturbed);
        for error in &outcome.errors {
            out::note(&format!("a stream failed: {error}"));
        }
        outcomes.push(outcome);
        out::note(&format!("done: {}", fault.name()));
        whole(&client, workers).await?;
    }
    router.stop(GRACE).await;
    if args.json {
        let json = serde_json::to_string(&outcomes).map_err(Failure::runtime)?;
        out::line(&json)?;
    } else {
        out::line(&format!(
            "{}, {} workers, every expert on {REPLICAS} of them, streams of {} tokens, compared with the undisturbed run\n\n{}",
            about.name,
            workers.count(),
            kind.tokens,
            table(&outcomes)
        ))?;
    }
    let bad: usize = outcomes.iter().map(Outcome::bad).sum();
    if bad > 0 {
        return Err(Failure::runtime(format!("{bad} streams failed or gave other tokens than undisturbed")));
    }
    Ok(())
}

/// Waits until all workers serve and every expert has its wanted replicas.
async fn whole(client: &Client, workers: &Workers) -> Result<(), Failure> {
    let deadline = Instant::now() + RECOVERY;
    let mut seen = "the router says nothing".to_owned();
    while Instant::now() < deadline {
        if let Some((_, Ok(status))) = client.statuses().await.pop() {
            if status.health() == Health::Ready && status.workers.len() == workers.count().get() as usize {
                return Ok(());
            }
            seen = status.reasons.join("; ");
        }
        tokio::time::sleep(LOOK).await;
    }
    Err(Failure::runtime(format!("the cluster is not whole again after {RECOVERY:?}: {seen}")))
}

/// Waits until a worker runs in a new process.
async fn changed(workers: &Workers, index: usize, before: u32) -> Result<(), Failure> {
    let deadline = Instant::now() + RECOVERY;
    while workers.pid(index) == before {
        if Instant::now() > deadline {
            return Err(Failure::runtime(format!("worker {index} did not come back within {RECOVERY:?}")));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

fn signal(pid: u32, signal: i32) {
    if let Ok(pid @ 1..) = i32::try_from(pid) {
        // SAFETY: kill takes two integers. The pid is that of a worker of this process's own, which is still being
        // waited for.
        unsafe { libc::kill(pid, signal) };
    }
}
