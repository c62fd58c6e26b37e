//! `muster worker`: from settings to a running worker.

use muster_config::WorkerSettings;
use muster_dispatch_grpc::Address;
use muster_types::WorkerId;
use muster_worker::{Hooks, Ready, WorkerConfig, WorkerError, run as run_worker};

use super::identity;
use super::role::{self, Around};
use crate::args::{LogArgs, RoleArgs};
use crate::children::Listening;
use crate::cores::cores;
use crate::failure::Failure;
use crate::models;
use crate::models::Links;

pub(crate) fn run(args: &RoleArgs<WorkerSettings>, log: &LogArgs) -> Result<(), Failure> {
    role::run(args, log, async |settings, Around { progress, ready, admin }| {
        let ready = |Ready { address, .. }: Ready| {
            ready(Listening { listen: Some(address.to_string()), ..Listening::default() });
        };
        let hooks = Hooks { progress, ready: Box::new(ready), admin };
        run_worker(config(settings)?, hooks).await.map_err(|error| failure(&error))
    })
}

fn config(settings: WorkerSettings) -> Result<WorkerConfig, Failure> {
    let links = Links::of(settings.compute.allow_links);
    let share = settings.share();
    let id = settings.id.unwrap_or_else(|| name_of(&settings.listen, std::process::id()));
    Ok(WorkerConfig {
        worker_id: WorkerId::new(&id).map_err(|error| Failure::input(format!("--id: {error}")))?,
        listen: settings.listen,
        source: settings.model.as_deref().map(|model| models::source(model, links)).transpose()?,
        join: settings.join,
        advertise: settings.advertise,
        share,
        memory: settings.memory,
        speed: settings.speed,
        domain: settings.domain.or_else(|| if in_pod() { None } else { host() }),
        fetch_rate: settings.fetch_rate,
        compute: settings.compute.compute,
        experts: settings.compute.expert_dtype,
        threads: settings.compute.threads.unwrap_or(cores()),
        max_rows: settings.max_rows,
        queue: settings.max_queue,
        streams: settings.max_streams,
        drain_timeout: settings.drain_timeout,
        busy_poll: settings.busy_poll_us,
        identity: identity(settings.tls.files())?,
    })
}

/// Default name of a worker: its listening address, cut to a name's length. The process id distinguishes workers on
/// system-chosen ports.
fn name_of(address: &Address, process: u32) -> String {
    const LONGEST: usize = 100;
    let text = match address {
        Address::Tcp { host, port: 0 } => format!("{host}-{process}"),
        address => address.to_string(),
    };
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "._:/-".contains(c) { c } else { '-' };
    let name: String = text.chars().map(allowed).collect();
    // All characters are ASCII now. The end of a path is its distinctive part.
    name[name.len().saturating_sub(LONGEST)..].to_owned()
}

/// Whether this process runs in a pod, whose host name is no failure domain: its routers know the node.
fn in_pod() -> bool {
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}

/// Host name, if it is a valid failure domain.
fn host() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    WorkerId::new(name.trim()).ok().map(|name| name.as_str().to_owned())
}

fn failure(error: &WorkerError) -> Failure {
    match error {
        WorkerError::Bind(_) => Failure::input(format!("--listen: {error}")),
        WorkerError::Checkpoint(_)
        | WorkerError::Model(_)
        | WorkerError::Share(_)
        | WorkerError::Memory { .. }
        | WorkerError::NoModel
        | WorkerError::Join(_)
        | WorkerError::Card(_) => Failure::input(error),
        _ => Failure::runtime(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_gives_a_name() {
        let long = format!("unix:/{}", "x".repeat(97));
        for (address, name) in [
            ("127.0.0.1:7070", "127.0.0.1:7070"),
            ("127.0.0.1:0", "127.0.0.1-42"),
            ("[::1]:7070", "-::1-:7070"),
            ("unix:/run/a b@c.sock", "unix:/run/a-b-c.sock"),
            (long.as_str(), &long[long.len() - 100..]),
        ] {
            let made = name_of(&address.parse().unwrap(), 42);
            assert_eq!(made, name);
            assert!(WorkerId::new(&made).is_ok());
        }
    }
}
