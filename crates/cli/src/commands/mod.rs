//! The subcommands, a file each.

mod admin;
mod bench;
mod bench_chaos;
mod bench_soak;
mod certs;
mod chat;
mod check_model;
mod check_tokenizer;
mod digests;
mod generate;
mod in_words;
mod keys;
mod logits;
mod plan;
mod plan_report;
mod plan_text;
mod pull;
mod quality;
mod role;
mod router;
mod status;
mod target;
mod token_file;
mod up;
mod worker;

use std::future::Future;

use muster_config::Environment;
use muster_identity::{Identity, TlsFiles};
use muster_telemetry::init_logs;
use tokio::runtime::{Builder, Runtime};

use crate::args::{Cli, Command};
use crate::failure::Failure;

/// Runs the chosen subcommand.
pub(crate) fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { log, command } = cli;
    // Servers log by their configuration, tools by their flags.
    match command {
        Command::Router(args) => return router::run(&args, &log),
        Command::Worker(args) => return worker::run(&args, &log),
        _ => {
            let filter = log.log.as_deref().unwrap_or(default_filter(&command));
            init_logs(log.log_format.unwrap_or_default(), filter).map_err(Failure::input)?;
            warn_of_strangers();
        }
    }
    match command {
        Command::Up(args) => on_main_thread(up::run(&args, &log)),
        Command::Chat(args) => on_main_thread(chat::run(&args)),
        Command::Generate(args) => on_main_thread(generate::run(&args, &log)),
        Command::Status(args) => on_main_thread(status::run(&args)),
        Command::CheckModel(args) => check_model::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Logits(args) => on_main_thread(logits::run(&args, &log)),
        Command::Bench(args) => on_main_thread(bench::run(&args, &log)),
        Command::Certs(command) => on_main_thread(certs::run(&command)),
        Command::Keys(command) => keys::run(&command),
        Command::Drain(args) => on_main_thread(admin::drain(&args)),
        Command::Probe(args) => on_main_thread(admin::probe(&args)),
        Command::Pull(args) => Err(pull::run(&args)),
        Command::Router(_) | Command::Worker(_) => Ok(()),
    }
}

/// Warns of environment variables that look misspelt.
fn warn_of_strangers() {
    for stranger in Environment::of_process().strangers() {
        tracing::warn!("{stranger}");
    }
}

/// Default log filter of a tool. Faults injected on purpose are not reported.
fn default_filter(command: &Command) -> &'static str {
    match command {
        Command::Bench(args) if args.chaos => "error",
        _ => "warn",
    }
}

/// Runs a command with all tasks, and so the children they spawn, on the main thread.
fn on_main_thread(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = runtime(&mut Builder::new_current_thread())?;
    let outcome = runtime.block_on(work);
    // A thread may block on the terminal; it is not waited for.
    runtime.shutdown_background();
    outcome
}

fn runtime(builder: &mut Builder) -> Result<Runtime, Failure> {
    builder
        .enable_all()
        .build()
        .map_err(|error| Failure::runtime(format!("cannot start the asynchronous runtime: {error}")))
}

/// TLS identity of this process.
fn identity(files: Option<TlsFiles>) -> Result<Option<Identity>, Failure> {
    let load = |files| Identity::load(files).map_err(|error| Failure::input(format!("TLS: {error}")));
    files.map(load).transpose()
}

/// Runs blocking work off the thread that serves children and signals.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(Failure::runtime(error)))
}
