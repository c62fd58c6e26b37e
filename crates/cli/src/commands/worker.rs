//! `muster worker`: settings to a running worker.

use muster_admin::Admin;
use muster_config::{Environment, Flags, Share, Sources, WorkerSettings};
use muster_dispatch_grpc::Address;
use muster_telemetry::Process;
use muster_types::WorkerId;
use muster_worker::{Hooks, Ready, WorkerConfig, WorkerError, run as run_worker};

use super::{identity, log_settings, persist, serve};
use crate::args::{LogArgs, WorkerArgs};
use crate::children::{Listening, exit_with_parent};
use crate::engine::cores;
use crate::failure::Failure;
use crate::models::Links;
use crate::outlet::Outlet;
use crate::signals::Signals;
use crate::{models, out};

pub(crate) fn run(args: &WorkerArgs, log: &LogArgs) -> Result<(), Failure> {
    let flags = flags(args, log);
    let environment = Environment::of_process();
    let sources = Sources { file: args.config.config.as_deref(), environment: &environment, flags: &flags };
    let loaded = WorkerSettings::load(&sources).map_err(Failure::input)?;
    if args.config.print_config {
        return out::write(&loaded.effective);
    }
    let settings = loaded.settings;
    if args.config.exit_with_parent {
        exit_with_parent()?;
    }
    let log = settings.log.clone();
    let outlet = Outlet::of(&args.config, "worker");
    serve(&log, async move {
        let signals = Signals::listen()?;
        let stop = signals.drain_then_exit();
        let metrics = muster_telemetry::install_metrics(Process::Worker).map_err(Failure::runtime)?;
        let admin = Admin::new(move || metrics.render());
        let address = match settings.admin {
            Some(address) => Some(admin.listen(address).await.map_err(Failure::input)?),
            None => None,
        };
        persist(&admin, address.is_some(), &stop, async || {
            let (progress, ready) = (outlet.progress(), outlet.ready());
            let hooks = Hooks {
                progress,
                ready: Box::new(move |state: Ready| {
                    let listen = Some(state.address.to_string());
                    ready(Listening { listen, admin: address, ..Listening::default() });
                }),
                admin: admin.clone(),
            };
            let config = config(settings.clone())?;
            run_worker(config, hooks, stop.clone().cancelled_owned()).await.map_err(|error| failure(&error))
        })
        .await
    })
}

fn flags(args: &WorkerArgs, log: &LogArgs) -> Flags {
    let flags = Flags::new()
        .text("model", args.model.as_deref())
        .text("listen", args.listen.as_deref())
        .list("join", &args.join)
        .text("advertise", args.advertise.as_deref())
        .text("share", args.share.as_deref())
        .text("memory", args.memory.as_deref())
        .text("speed", args.speed.as_deref())
        .text("domain", args.domain.as_deref())
        .text("fetch_rate", args.fetch_rate.as_deref())
        .text("id", args.id.as_deref())
        .text("compute", args.compute.as_deref())
        .text("expert_dtype", args.expert_dtype.as_deref())
        .text("threads", args.threads.as_deref())
        .text("max_rows", args.max_rows.as_deref())
        .text("max_queue", args.max_queue.as_deref())
        .text("max_streams", args.max_streams.as_deref())
        .text("drain_timeout", args.drain_timeout.as_deref())
        .text("busy_poll_us", args.busy_poll_us.as_deref());
    let flags = if args.insecure_plaintext { flags.on("insecure_plaintext") } else { flags };
    let flags = if args.links.allow_links { flags.on("allow_links") } else { flags };
    let flags = args.tls.flags(flags);
    log_settings(flags, log)
}

fn config(settings: WorkerSettings) -> Result<WorkerConfig, Failure> {
    let links = Links::of(settings.allow_links);
    let id = settings.id.unwrap_or_else(|| name_of(&settings.listen, std::process::id()));
    Ok(WorkerConfig {
        worker_id: WorkerId::new(&id).map_err(|error| Failure::input(format!("--id: {error}")))?,
        listen: settings.listen,
        source: settings.model.as_deref().map(|model| models::source(model, links)).transpose()?,
        join: settings.join,
        advertise: settings.advertise,
        share: match settings.share {
            Share::None => muster_worker::Share::None,
            Share::All => muster_worker::Share::All,
            Share::Part { index, of, replicas } => muster_worker::Share::Part { index, count: of, replicas },
        },
        memory: settings.memory,
        speed: settings.speed,
        domain: settings.domain.or_else(|| if in_pod() { None } else { host() }),
        fetch_rate: settings.fetch_rate,
        compute: settings.compute,
        experts: settings.experts,
        threads: settings.threads.unwrap_or(cores()),
        max_rows: settings.max_rows,
        queue: settings.max_queue,
        streams: settings.max_streams,
        drain_timeout: settings.drain_timeout,
        busy_poll: settings.busy_poll,
        identity: identity(settings.tls)?,
    })
}

/// A worker's name when nobody gives one: where it listens, as far as that fits into a name. Where the system picks the
/// port, the process id tells workers apart.
fn name_of(address: &Address, process: u32) -> String {
    const LONGEST: usize = 100;
    let text = match address {
        Address::Tcp { host, port: 0 } => format!("{host}-{process}"),
        address => address.to_string(),
    };
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "._:/-".contains(c) { c } else { '-' };
    let name: String = text.chars().map(allowed).collect();
    // All characters are one byte long now. The end of a path tells more than its beginning.
    name[name.len().saturating_sub(LONGEST)..].to_owned()
}

/// Whether this is a pod, whose host name is its own: its routers know better what it shares its fate with.
fn in_pod() -> bool {
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}

/// The name of this machine, as far as it can be a failure domain's.
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
        | WorkerError::EmptyShare { .. }
        | WorkerError::Memory { .. }
        | WorkerError::NoModel
        | WorkerError::Join(_)
        | WorkerError::Size { .. } => Failure::input(error),
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
