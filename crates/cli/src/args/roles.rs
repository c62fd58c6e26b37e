//! Subcommands that serve: `up`, `router`, `worker`. The last two take the settings of `muster-config`.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use clap::Args;
use muster_config::{RoleSettings, parse_replicas, parse_size, parse_socket};

use super::settings::SettingArgs;
use super::shared::{ComputeArgs, ConfigArgs, LinkArgs, SamplingArgs};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  muster up\n  muster up --prompt \"Once upon a time\" --max-tokens 40\n  \
                        muster up --model ./Mixtral-8x7B-v0.1 --workers 4 --kv-memory 2GiB"
)]
pub(crate) struct UpArgs {
    /// Directory of a model, org/name of a pulled one, or demo for the built-in one.
    #[arg(long, default_value = crate::models::DEMO, value_name = "MODEL")]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) links: LinkArgs,
    /// How many worker processes share the experts.
    #[arg(long, default_value = "2", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) workers: u32,
    /// Replicas of every expert, each on another worker; with 2 or more a worker can die unnoticed.
    #[arg(long, default_value = "1", value_name = "N", value_parser = parse_replicas)]
    pub(crate) replicas: NonZeroU32,
    /// Continue this text once, print the answer and stop everything.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// Tokens to generate for --prompt [default: the model's, else 64; or what the context leaves].
    #[arg(long, value_name = "N", requires = "prompt", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// Where OpenAI HTTP, probes and metrics listen [default: 127.0.0.1:8080; with --prompt, a free port].
    #[arg(long, value_name = "ADDR", value_parser = parse_socket)]
    pub(crate) http: Option<SocketAddr>,
    /// Where gRPC listens [default: 127.0.0.1:50051; with --prompt, a free port].
    #[arg(long, value_name = "ADDR", value_parser = parse_socket)]
    pub(crate) grpc: Option<SocketAddr>,
    /// Allow addresses that other machines can reach, without TLS.
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,
    /// Let everybody ask who reaches it, on addresses that other machines can reach.
    #[arg(long)]
    pub(crate) insecure_no_keys: bool,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Memory for the KV cache, as in 512MiB or 4GiB [default: as needed, at most 512MiB].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) kv_memory: Option<u64>,
    /// Print a line of JSON on standard output when ready, instead of the welcome.
    #[arg(long, hide = true)]
    pub(crate) announce: bool,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// A router or a worker, as its settings say.
#[derive(Debug, Args)]
pub(crate) struct RoleArgs<R: RoleSettings> {
    #[command(flatten)]
    pub(crate) settings: SettingArgs<R>,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
}
