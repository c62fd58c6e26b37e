//! The command line: what can be asked for, and what that looks like in `--help`. A file for each kind of subcommand.

mod clients;
mod models;
mod operate;
mod roles;
mod settings;
mod shared;

use clap::{Parser, Subcommand};
use muster_config::{RouterSettings, WorkerSettings};

pub(crate) use self::clients::{BenchArgs, ChatArgs, GenerateArgs, StatusArgs};
pub(crate) use self::models::{CheckModelArgs, LogitsArgs, PlanArgs, PullArgs};
pub(crate) use self::operate::{
    CertsCommand, CertsInitArgs, DrainArgs, KeysCommand, KeysHashArgs, KeysNewArgs, ProbeArgs,
};
pub(crate) use self::roles::{RoleArgs, UpArgs};
pub(crate) use self::shared::{ComputeArgs, ConfigArgs, CredentialArgs, LogArgs, SamplingArgs, TargetArgs};

/// Serves Mixture-of-Experts language models with their experts spread over many processes.
#[derive(Debug, Parser)]
#[command(
    name = "muster",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "First steps:\n  muster up --prompt \"Once upon a time\"    one answer from the built-in model, then the end\n  \
                  muster up                                 a local cluster that stays\n  \
                  muster chat                               talk to it, from another terminal\n\n\
                  Exit codes: 0 done, 1 failed, 2 bad flags, configuration or input."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine: one router and N workers as child processes.
    Up(UpArgs),
    /// Run a router: requests, attention, KV cache and gates; its experts are in workers.
    #[command(
        after_help = "Every setting can also stand in the [router] table of the file given with --config, with \
                            underscores (kv_memory = \"4GiB\"), and in the environment (MUSTER_ROUTER_KV_MEMORY).\n\n\
                            SIGTERM ends it once running requests are done; a second one ends it at once.\n\n\
                            Example:\n  muster router --model demo --worker 127.0.0.1:7070 --worker 127.0.0.1:7071"
    )]
    Router(RoleArgs<RouterSettings>),
    /// Run an expert worker.
    #[command(
        after_help = "Every setting can also stand in the [worker] table of the file given with --config, with \
                            underscores (drain_timeout = \"1m\"), and in the environment (MUSTER_WORKER_DRAIN_TIMEOUT).\n\n\
                            SIGTERM ends it once others hold what is needed of it; a second one ends it at once.\n\n\
                            Example, one more worker for a running cluster:\n  \
                            muster worker --join 127.0.0.1:50051 --listen 127.0.0.1:0\n\n\
                            Example, two workers that share the experts and routers that are told of them:\n  \
                            muster worker --model demo --listen 127.0.0.1:7070 --share 0/2\n  \
                            muster worker --model demo --listen 127.0.0.1:7071 --share 1/2"
    )]
    Worker(RoleArgs<WorkerSettings>),
    /// Talk to the model of a running router.
    Chat(ChatArgs),
    /// Continue one prompt and print the text.
    Generate(GenerateArgs),
    /// Say how a running cluster is: who holds what, who leads, what is missing.
    Status(StatusArgs),
    /// Say what a model is, how big its parts are, and whether it loads.
    CheckModel(CheckModelArgs),
    /// Say what it takes to serve a model: memory, workers, network. Needs no weights, and for well-known models no file.
    Plan(PlanArgs),
    /// Write the logits and gate choices of every position, to compare with another implementation.
    Logits(LogitsArgs),
    /// Measure throughput and latency.
    Bench(BenchArgs),
    /// Make certificates for a cluster.
    #[command(subcommand)]
    Certs(CertsCommand),
    /// Make API keys.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Have a router or worker of this host drain, and wait until it is safe to end it.
    Drain(DrainArgs),
    /// Ask a router or worker of this host whether it is ready.
    Probe(ProbeArgs),
    /// Fetch a model from the Hugging Face hub (runs muster-pull).
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Pull(PullArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
