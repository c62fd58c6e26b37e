//! `muster status`: the routers' view of their cluster, as a page or as JSON.

use muster_client::Client;
use muster_proto::cluster::v1::status_reply::Health;
use muster_proto::cluster::v1::worker_status::State;
use muster_proto::cluster::v1::{StatusReply, WorkerStatus};
use serde::Serialize;

use crate::args::StatusArgs;
use crate::backend;
use crate::failure::Failure;
use crate::{out, text};

/// JSON of `--json` for each router.
#[derive(Serialize)]
struct Report {
    router: String,
    address: String,
    health: &'static str,
    reasons: Vec<String>,
    epoch: u64,
    leads: bool,
    term: u64,
    imbalance: f64,
    experts: u32,
    missing_experts: u32,
    /// Numerics class of the expert binding, or a digest where it has several.
    numerics: String,
    workers: Vec<Worker>,
}

#[derive(Serialize)]
struct Worker {
    name: String,
    address: String,
    state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    experts: u32,
    loading: u32,
    resident_bytes: u64,
    capacity_bytes: u64,
    speed: f64,
    numerics: String,
    domain: String,
    epoch: u64,
    late_shards: u32,
    banned_ms: u32,
    rows: u64,
    /// Milliseconds from start to the first held expert; 0: not yet.
    useful_ms: u64,
    /// Milliseconds from start until it held everything first ordered; 0: not yet.
    full_ms: u64,
    /// Experts without a digest comparison, because the worker runs an older version.
    unverified_experts: u32,
    /// The last source of weights that was skipped, with the reason.
    #[serde(skip_serializing_if = "String::is_empty")]
    trouble: String,
}

pub(crate) async fn run(args: &StatusArgs) -> Result<(), Failure> {
    let client: Client = backend::connect(&args.grpc, &args.credentials).await?;
    let mut reports = Vec::new();
    for (address, status) in client.statuses().await {
        match status {
            Ok(status) => reports.push(report(address, status)),
            Err(error) => out::note(&format!("{address}: {error}")),
        }
    }
    if reports.is_empty() {
        return Err(Failure::runtime("no router told its status"));
    }
    if args.json {
        let json = serde_json::to_string(&reports).map_err(Failure::runtime)?;
        return out::line(&json);
    }
    let pages: Vec<String> = reports.iter().map(page).collect();
    out::write(&pages.join("\n"))
}

fn report(address: String, status: StatusReply) -> Report {
    let health = match status.health() {
        Health::Ready => "ready",
        Health::Degraded => "degraded",
        Health::NotReady => "not ready",
        Health::Unspecified => "unknown",
    };
    Report {
        router: status.router_id,
        address,
        health,
        reasons: status.reasons,
        epoch: status.epoch,
        leads: status.leads,
        term: status.term,
        imbalance: status.imbalance,
        experts: status.experts,
        missing_experts: status.missing_experts,
        numerics: status.numerics,
        workers: status.workers.into_iter().map(worker).collect(),
    }
}

fn worker(worker: WorkerStatus) -> Worker {
    let state = match worker.state() {
        State::Serving if worker.banned_ms > 0 => "banned",
        State::Serving if worker.late_shards > 0 => "late",
        State::Serving if worker.loading > 0 => "loading",
        State::Serving => "serving",
        State::Draining => "draining",
        State::Down if worker.banned_ms > 0 => "banned",
        State::Down => "down",
        State::Unspecified => "unknown",
    };
    Worker {
        name: if worker.worker_id.is_empty() { "?".into() } else { worker.worker_id },
        address: worker.address,
        state,
        reason: worker.reason,
        experts: worker.experts,
        loading: worker.loading,
        resident_bytes: worker.resident_bytes,
        capacity_bytes: worker.capacity_bytes,
        speed: worker.speed,
        numerics: worker.numerics,
        domain: worker.domain,
        epoch: worker.epoch,
        late_shards: worker.late_shards,
        banned_ms: worker.banned_ms,
        rows: worker.rows,
        useful_ms: worker.useful_ms,
        full_ms: worker.full_ms,
        unverified_experts: worker.unverified_experts,
        trouble: worker.trouble,
    }
}

fn page(report: &Report) -> String {
    let held = report.experts - report.missing_experts.min(report.experts);
    let mut page = format!(
        "{} at {}: {}; {held} of {} experts held",
        report.router, report.address, report.health, report.experts
    );
    if report.leads {
        page += &format!("; leads the placement (term {}, imbalance {:.2})", report.term, report.imbalance);
    }
    page.push('\n');
    for reason in &report.reasons {
        page += &format!("  {reason}\n");
    }
    let rows: Vec<Vec<String>> = report
        .workers
        .iter()
        .map(|worker| {
            vec![
                worker.name.clone(),
                worker.state.to_owned(),
                worker.experts.to_string(),
                worker.loading.to_string(),
                text::bytes(worker.resident_bytes),
                text::bytes(worker.capacity_bytes),
                worker.rows.to_string(),
                after(worker.useful_ms),
                after(worker.full_ms),
                or_dash(&worker.numerics),
                or_dash(&worker.domain),
                worker.address.clone(),
            ]
        })
        .collect();
    let header = [
        "worker", "state", "experts", "loading", "memory", "of", "rows", "useful", "full", "numerics",
        "domain", "address",
    ];
    page += &text::table(&header, &rows);
    page.push('\n');
    for worker in report.workers.iter().filter(|worker| !worker.reason.is_empty()) {
        page += &format!("  {}: {}\n", worker.address, worker.reason);
    }
    for Worker { name, unverified_experts, trouble, .. } in &report.workers {
        if *unverified_experts > 0 {
            page += &format!(
                "  {name}: its version tells no digests, so the weights of {unverified_experts} experts are not verified\n"
            );
        }
        if !trouble.is_empty() {
            page += &format!("  {name}: passed over a source of weights: {trouble}\n");
        }
    }
    page
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// Time since start.
fn after(millis: u64) -> String {
    match millis {
        0 => "-".to_owned(),
        1..10_000 => format!("{:.1} s", millis as f64 / 1e3),
        _ => format!("{} s", millis / 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_who_holds_what_and_what_is_wrong() {
        let status = StatusReply {
            router_id: "r".into(),
            health: Health::Degraded.into(),
            reasons: vec!["a worker cannot be reached".into()],
            leads: true,
            term: 4,
            imbalance: 1.04,
            experts: 32,
            missing_experts: 2,
            workers: vec![
                WorkerStatus {
                    worker_id: "w0".into(),
                    address: "a:1".into(),
                    state: State::Serving.into(),
                    experts: 30,
                    loading: 2,
                    resident_bytes: 3 << 20,
                    capacity_bytes: 4 << 30,
                    numerics: "cuda-mma".into(),
                    ..WorkerStatus::default()
                },
                WorkerStatus {
                    address: "b:2".into(),
                    state: State::Down.into(),
                    reason: "refused".into(),
                    ..WorkerStatus::default()
                },
            ],
            ..StatusReply::default()
        };
        let page = page(&report("http://x".into(), status));
        for part in [
            "r at http://x: degraded; 30 of 32 experts held; leads the placement (term 4, imbalance 1.04)",
            "a worker cannot be reached",
            "loading",
            "cuda-mma",
            "b:2: refused",
        ] {
            assert!(page.contains(part), "{part} in {page}");
        }
        assert_eq!(page.lines().count(), 6, "{page}");
    }
}
