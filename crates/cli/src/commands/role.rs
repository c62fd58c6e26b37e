//! The life of a router or worker process: settings, logs, signals, probes, and retries of a failed start.

use std::time::Duration;

use muster_admin::Admin;
use muster_config::{Environment, Flags, Loaded, LogSettings, RoleSettings, Sources};
use muster_model::LoadProgress;
use muster_telemetry::{init_logs, install_metrics};
use tokio::runtime::Builder;

use super::{runtime, warn_of_strangers};
use crate::args::{LogArgs, RoleArgs};
use crate::children::{Listening, exit_with_parent};
use crate::failure::Failure;
use crate::out;
use crate::outlet::Outlet;
use crate::signals::Signals;

/// Interval of start retries.
const MENDED: Duration = Duration::from_secs(3);

/// Callbacks and admin address around a server.
pub(crate) struct Around {
    /// Called while weights are loaded.
    pub(crate) progress: Box<dyn FnMut(LoadProgress) + Send>,
    /// Called once it serves.
    pub(crate) ready: Box<dyn FnOnce(Listening) + Send>,
    /// Probes, drain and end, as asked through the admin address.
    pub(crate) admin: Admin,
}

/// Runs a process of this role: `serve` until the first SIGINT or SIGTERM, which starts the drain. The second signal
/// ends the process at once.
pub(crate) fn run<R: RoleSettings>(
    args: &RoleArgs<R>,
    log: &LogArgs,
    serve: impl AsyncFn(R, Around) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let flags = with_log(args.settings.flags.clone(), log);
    let environment = Environment::of_process();
    let sources = Sources { file: args.config.config.as_deref(), environment: &environment, flags: &flags };
    let Loaded { settings, effective } = R::load(&sources).map_err(Failure::input)?;
    if args.config.print_config {
        return out::write(&effective);
    }
    if args.config.exit_with_parent {
        exit_with_parent()?;
    }
    let outlet = Outlet::of(&args.config, R::ROLE.name);
    let LogSettings { log, log_format } = settings.log();
    init_logs(*log_format, log).map_err(Failure::input)?;
    warn_of_strangers();
    let runtime = runtime(Builder::new_multi_thread().worker_threads(2).thread_name("muster-io"))?;
    let outcome = runtime.block_on(async {
        let signals = Signals::listen()?;
        let metrics = install_metrics(R::PROCESS).map_err(Failure::runtime)?;
        let admin = Admin::new(move || metrics.render());
        signals.drain_then_exit(admin.clone());
        let address = match settings.admin() {
            Some(address) => Some(admin.listen(address).await.map_err(Failure::input)?),
            None => None,
        };
        persist(&admin, address.is_some(), async || {
            let ready = outlet.ready();
            let around = Around {
                progress: outlet.progress(),
                ready: Box::new(move |listening| ready(Listening { admin: address, ..listening })),
                admin: admin.clone(),
            };
            serve(settings.clone(), around).await
        })
        .await
    });
    runtime.shutdown_background();
    outcome
}

/// Runs a server until its end is asked for. With an admin address, a start that fails on bad input (such as missing
/// files) is retried, and probes report the reason: restarts of the process would not help.
async fn persist(
    admin: &Admin,
    is_asked: bool,
    attempt: impl AsyncFn() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut said = String::new();
    loop {
        let reason = match attempt().await {
            Err(Failure::Input(reason)) if is_asked => reason,
            outcome => return outcome,
        };
        if reason != said {
            tracing::error!(reason, "cannot start; trying again until it is mended");
            admin.not_ready(reason.clone());
            said = reason;
        }
        tokio::select! {
            () = admin.end_asked() => return Ok(()),
            () = tokio::time::sleep(MENDED) => {}
        }
    }
}

/// A role's settings with the logging flags, which every command has.
fn with_log(flags: Flags, log: &LogArgs) -> Flags {
    let format = log.log_format.map(|format| format.to_string());
    flags.text("log", log.log.as_deref()).text("log_format", format.as_deref())
}
