//! Arguments shared by subcommands: logging, certificates, credentials, sampling, computing, configuration, and the
//! target.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use muster_config::{GenerationMode, parse_weight_dtype};
use muster_telemetry::LogFormat;
use muster_types::{Combine, Compute, WeightDType};

use crate::models::Links;
use crate::numbers::{fraction, not_negative, seed, threads, worker_count};

/// What is logged, and how.
#[derive(Debug, Clone, Args)]
pub(crate) struct LogArgs {
    /// What to log, as `level` or `target=level`, separated by commas [default: info for router and worker, else warn].
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Logging")]
    pub(crate) log: Option<String>,
    /// Format of logs on standard error: human or json [default: human].
    #[arg(long, global = true, value_name = "FORMAT", help_heading = "Logging")]
    pub(crate) log_format: Option<LogFormat>,
}

/// Links in a model's directory.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct LinkArgs {
    /// Let files of the model's directory be links to anywhere on this machine [default: into the directory, or a hub
    /// cache's folder of the model].
    #[arg(long)]
    pub(crate) allow_links: bool,
}

impl LinkArgs {
    /// Allowed targets of links.
    pub(crate) const fn links(self) -> Links {
        Links::of(self.allow_links)
    }
}

/// What a client shows to a router, and whom it takes for one.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Security")]
pub(crate) struct CredentialArgs {
    /// For https: the authority that the router's certificate must be of, PEM [default: those that browsers trust].
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// For https: this client's certificate, PEM, instead of an API key.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub(crate) cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub(crate) key: Option<PathBuf>,
    /// A file with an API key [default: the environment variable MUSTER_API_KEY, if it is set].
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
}

/// How tokens are picked.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// 0 always takes the likeliest token; higher values take more risks [default: the model's, else 0].
    #[arg(long, value_parser = not_negative, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Keep only the K likeliest tokens; 0 keeps all [default: the model's, else 0].
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Keep the smallest set of tokens whose probabilities reach P [default: the model's, else 1].
    #[arg(long, value_parser = fraction, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the likeliest [default: the model's, else 0].
    #[arg(long, value_parser = fraction, value_name = "P")]
    pub(crate) min_p: Option<f32>,
    /// Divide positive and multiply negative logits of tokens seen before by R [default: the model's, else 1].
    #[arg(long, value_parser = not_negative, value_name = "R")]
    pub(crate) repetition_penalty: Option<f32>,
    /// Whether the model's own settings (generation_config.json) hold where no flag says otherwise: auto or ignore.
    #[arg(long, default_value = "auto", value_name = "MODE")]
    pub(crate) generation_config: GenerationMode,
    /// The same seed, prompt and settings give the same tokens; negative values mean the same as in the OpenAI API
    /// [default: random every time].
    #[arg(long, value_parser = seed, allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
    /// End where this text appears; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Do not end at the model's end-of-text token.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
}

impl SamplingArgs {
    /// Name of the first flag given that samples a single request, if any.
    pub(crate) fn of_a_request(&self) -> Option<&'static str> {
        let given = [
            ("--temperature", self.temperature.is_some()),
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
            ("--repetition-penalty", self.repetition_penalty.is_some()),
            ("--seed", self.seed.is_some()),
            ("--stop", !self.stop.is_empty()),
            ("--ignore-eos", self.ignore_eos),
        ];
        given.into_iter().find_map(|(flag, is_given)| is_given.then_some(flag))
    }
}

/// How and with how much of the machine to compute.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct ComputeArgs {
    /// What activations are rounded to; auto is the dtype of the model's weights.
    #[arg(long, default_value = "auto", value_name = "MODE")]
    pub(crate) compute: ComputeMode,
    /// How experts are held: native, or in groups of 32 weights as q8 or q4, which take half or a quarter of bf16.
    #[arg(long, default_value = "native", value_name = "DTYPE", value_parser = parse_weight_dtype)]
    pub(crate) expert_dtype: WeightDType,
    /// How attention's linears, dense MLPs and the head are held: native, q8 or q4.
    #[arg(long, default_value = "native", value_name = "DTYPE", value_parser = parse_weight_dtype)]
    pub(crate) trunk_dtype: WeightDType,
    /// Compute threads of each process [default: its share of the cores].
    #[arg(long, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Where workers' outputs are added: exact gives the same bits for every placement, partial sends less.
    #[arg(long, default_value = "exact", value_name = "MODE")]
    pub(crate) combine: Combine,
    /// Microseconds to look for messages between router and workers before sleeping; 0 sleeps at once.
    #[arg(long, default_value = "50", value_name = "N", value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub(crate) busy_poll_us: u32,
}

impl ComputeArgs {
    pub(crate) fn busy_poll(&self) -> Duration {
        Duration::from_micros(self.busy_poll_us.into())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeMode {
    /// As the weights are stored.
    Auto,
    /// Nothing is rounded: what reference outputs are compared with.
    F32,
    /// Inputs of linear layers are rounded to bf16.
    Bf16,
    /// As bf16, with other bits: faster on processors that have AVX512-BF16 and no AMX. Routers and workers must agree.
    Bf16Pairs,
}

impl ComputeMode {
    pub(crate) const fn get(self) -> Option<Compute> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(Compute::F32),
            Self::Bf16 => Some(Compute::Bf16),
            Self::Bf16Pairs => Some(Compute::Bf16Pairs),
        }
    }
}

/// Settings that a file and the environment can give as well.
#[derive(Debug, Args)]
#[command(next_help_heading = "Configuration")]
pub(crate) struct ConfigArgs {
    /// Read settings from this TOML file. The environment overrides it, flags override both.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print the settings in force and where each comes from, as TOML, and end.
    #[arg(long)]
    pub(crate) print_config: bool,
    /// Print a line of JSON on standard output when ready.
    #[arg(long, hide = true)]
    pub(crate) announce: bool,
    /// Print lines of JSON while loading, too.
    #[arg(long, hide = true, requires = "announce")]
    pub(crate) announce_loading: bool,
    /// End when standard input does.
    #[arg(long, hide = true)]
    pub(crate) exit_with_parent: bool,
}

/// A running router, or a model of one's own.
#[derive(Debug, Clone, Args)]
pub(crate) struct TargetArgs {
    /// A running router's gRPC address [default: http://127.0.0.1:50051, unless --model is given]. Several routers of
    /// one model, separated by commas or each with a --grpc of its own: when one is lost, another goes on.
    #[arg(long, value_name = "URL", value_delimiter = ',', conflicts_with = "model")]
    pub(crate) grpc: Vec<String>,
    /// Load this model instead: a directory, org/name of a pulled one, or demo.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) links: LinkArgs,
    /// With --model: put the experts into this many worker processes [default: all in this process].
    #[arg(long, value_name = "N", requires = "model", value_parser = worker_count)]
    pub(crate) workers: Option<NonZeroU32>,
    #[command(flatten)]
    pub(crate) credentials: CredentialArgs,
}
