//! Subcommands that are clients of a cluster: `status`, `chat`, `generate`, `bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use muster_config::parse_duration;

use super::shared::{ComputeArgs, CredentialArgs, SamplingArgs, TargetArgs};
use crate::backend::DEFAULT_GRPC;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  muster status --grpc http://127.0.0.1:50051")]
pub(crate) struct StatusArgs {
    /// Where routers' gRPC listens; several separated by commas or each with a --grpc of its own.
    #[arg(long, value_name = "URL", default_value = DEFAULT_GRPC, value_delimiter = ',')]
    pub(crate) grpc: Vec<String>,
    /// Print one line of JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) credentials: CredentialArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Type a line and press Enter. The conversation is remembered; /new begins a new one, /exit or Ctrl-D ends it.\n\n\
                        Example:\n  muster chat --system \"Answer in one sentence.\" --temperature 0.7"
)]
pub(crate) struct ChatArgs {
    /// Where the router's gRPC listens. Several routers of one model, separated by commas or each with a --grpc of its
    /// own: when one is lost, another goes on with the answer.
    #[arg(long, default_value = DEFAULT_GRPC, value_name = "URL", value_delimiter = ',')]
    pub(crate) grpc: Vec<String>,
    /// Instructions for the model, before the conversation.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,
    /// Tokens of one answer at most [default: the model's, as far as the context leaves them].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    #[command(flatten)]
    pub(crate) credentials: CredentialArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  muster generate \"Once upon a time\" --model demo\n  \
                        muster generate --chat \"What is 37 + 45?\" --model demo\n  \
                        muster generate \"Once upon a time\" --grpc http://127.0.0.1:50051 --temperature 0.8 --seed 7\n  \
                        muster generate --model ./my-moe --workers 2 --prompt-tokens 1,844,624 --json")]
pub(crate) struct GenerateArgs {
    /// The text to continue.
    #[arg(
        value_name = "PROMPT",
        required_unless_present = "prompt_tokens",
        conflicts_with = "prompt_tokens"
    )]
    pub(crate) prompt: Option<String>,
    /// Ask PROMPT as a message of a chat, with the model's chat template, instead of continuing it.
    #[arg(long, requires = "prompt", conflicts_with = "prompt_tokens")]
    pub(crate) chat: bool,
    /// Token ids to continue, separated by commas, instead of a text.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub(crate) prompt_tokens: Vec<u32>,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Tokens to generate at most [default: the model's, else 64; or what the context leaves].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// Print one JSON object: token_ids, text, finish_reason, prompt_token_ids (not with --chat), usage.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Prompts are random token ids. Prefill: prompt tokens per second until every sequence has its first \
                        token. Decode: tokens per second of all sequences together while all of them decode. Dispatch: what sending the rows \
                        of one MoE layer to the workers, waiting for them and adding up cost the engine while decoding, without \
                        the time the experts took (of several workers, the longest); waiting in a worker's queue is in it.\n\n\
                        Examples:\n  muster bench --model demo --workers 2\n  \
                        muster bench --grpc http://127.0.0.1:50051 --metrics http://127.0.0.1:8080 --concurrency 1,4,16\n  \
                        muster bench --grpc http://127.0.0.1:50051 --prompt-tokens 512 --output-tokens 1 --json > before.json\n  \
                        muster bench --grpc http://127.0.0.1:50051 --prompt-tokens 512 --output-tokens 1 --against before.json"
)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Tokens of every prompt.
    #[arg(long, default_value = "256", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) prompt_tokens: u32,
    /// Tokens generated for every prompt; 1 measures prefill alone.
    #[arg(long, default_value = "64", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) output_tokens: u32,
    /// Requests at a time, several values separated by commas [default: 1,8; with --chaos 32].
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) concurrency: Vec<u32>,
    /// How often each is measured; rates are medians, latencies are over all.
    #[arg(long, default_value = "3", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// The router's HTTP address, to read dispatch times from its metrics; needs --grpc.
    #[arg(long, value_name = "URL", requires = "grpc")]
    pub(crate) metrics: Option<String>,
    /// Inject faults into a private cluster instead (demo, unless --model is given) while streams run, and report how
    /// long they stood still.
    #[arg(long, conflicts_with_all = ["grpc", "against", "metrics"])]
    pub(crate) chaos: bool,
    /// Run streams against the running cluster for this long (--concurrency at a time, 16 by default), and compare each
    /// with its first run; SIGTERM ends it sooner.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, conflicts_with_all = ["chaos", "model", "against", "metrics"])]
    pub(crate) soak: Option<Duration>,
    /// Print this run's rates and times as multiples of those in a file that --json wrote.
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(crate) against: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}
