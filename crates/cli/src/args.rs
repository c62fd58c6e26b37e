//! The command line: what can be asked for, and what that looks like in `--help`.
//!
//! Settings of `router` and `worker` stay text here, because a file and the environment give the same settings and
//! `muster-config` parses whichever wins. Everything else is parsed on the spot.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use muster_config::{Flags, parse_duration, parse_size, parse_socket, parse_weight_dtype};
use muster_telemetry::LogFormat;
use muster_types::{Combine, Compute, WeightDType};

use crate::backend::DEFAULT_GRPC;
use crate::numbers::{Machines, chunk, fraction, machines, not_negative, threads, worker_count};
use crate::plain_http::DEFAULT_ADMIN;

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

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine: one router and N workers as child processes.
    Up(UpArgs),
    /// Run a router: requests, attention, KV cache and gates; its experts are in workers.
    Router(Box<RouterArgs>),
    /// Run an expert worker.
    Worker(Box<WorkerArgs>),
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

/// What a router's edges take.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Requests")]
pub(crate) struct EdgeArgs {
    /// Most choices of one request: its prompts times n [default: 256].
    #[arg(long, value_name = "N")]
    pub(crate) max_choices: Option<String>,
    /// Most stop strings, or stop ids, of one request [default: 16].
    #[arg(long, value_name = "N")]
    pub(crate) max_stops: Option<String>,
    /// Most entries of one request's logit_bias [default: 1024].
    #[arg(long, value_name = "N")]
    pub(crate) max_bias: Option<String>,
    /// Largest request; the text of a prompt may have half of it [default: 8MiB].
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_body: Option<String>,
    /// How long an HTTP connection may wait for its next request [default: 30s].
    #[arg(long, value_name = "TIME")]
    pub(crate) keep_alive: Option<String>,
    /// An origin whose web pages may ask, as in https://example.org, or * for all; given once for each [default: pages of
    /// this host where --http is a loopback address, else none].
    #[arg(long = "cors-origin", value_name = "ORIGIN")]
    pub(crate) cors_origins: Vec<String>,
}

impl EdgeArgs {
    /// As settings.
    pub(crate) fn flags(&self, flags: Flags) -> Flags {
        flags
            .text("max_choices", self.max_choices.as_deref())
            .text("max_stops", self.max_stops.as_deref())
            .text("max_bias", self.max_bias.as_deref())
            .text("max_body", self.max_body.as_deref())
            .text("keep_alive", self.keep_alive.as_deref())
            .list("cors_origins", &self.cors_origins)
    }
}

/// Certificates, and what the machine around a process asks.
#[derive(Debug, Clone, Args)]
pub(crate) struct RoleTlsArgs {
    /// This process's certificate, PEM, with its role as URI name; read again when it changes. `muster certs init` makes
    /// one.
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    pub(crate) tls_cert: Option<String>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    pub(crate) tls_key: Option<String>,
    /// The cluster's authority, PEM: other processes must have certificates of it.
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    pub(crate) tls_ca: Option<String>,
    /// Where /healthz, /readyz and /metrics are answered in plain HTTP, for a kubelet and a collector, and POST /drain for
    /// this host [default: nowhere].
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin: Option<String>,
}

impl RoleTlsArgs {
    /// As settings.
    pub(crate) fn flags(&self, flags: Flags) -> Flags {
        flags
            .text("tls_cert", self.tls_cert.as_deref())
            .text("tls_key", self.tls_key.as_deref())
            .text("tls_ca", self.tls_ca.as_deref())
            .text("admin", self.admin.as_deref())
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
    /// 0 always takes the likeliest token; higher values take more risks.
    #[arg(long, default_value_t = 0.0, value_parser = not_negative, value_name = "T")]
    pub(crate) temperature: f32,
    /// Keep only the K likeliest tokens; 0 keeps all.
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub(crate) top_k: u32,
    /// Keep the smallest set of tokens whose probabilities reach P.
    #[arg(long, default_value_t = 1.0, value_parser = fraction, value_name = "P")]
    pub(crate) top_p: f32,
    /// Keep tokens at least P times as likely as the likeliest.
    #[arg(long, default_value_t = 0.0, value_parser = fraction, value_name = "P")]
    pub(crate) min_p: f32,
    /// The same seed, prompt and settings give the same tokens [default: chosen anew every time].
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// End where this text appears; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Do not end at the model's end-of-text token.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
}

impl SamplingArgs {
    /// The likeliest token, every time.
    pub(crate) const fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: None,
            stop: Vec::new(),
            ignore_eos: false,
        }
    }
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  muster up\n  muster up --prompt \"Once upon a time\" --max-tokens 40\n  \
                        muster up --model ./Mixtral-8x7B-v0.1 --workers 4 --kv-memory 2GiB"
)]
pub(crate) struct UpArgs {
    /// Directory of a model, org/name of a pulled one, or demo for the built-in one.
    #[arg(long, default_value = crate::models::DEMO, value_name = "MODEL")]
    pub(crate) model: String,
    /// How many worker processes share the experts.
    #[arg(long, default_value = "2", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) workers: u32,
    /// On how many workers every expert is; with 2 or more a worker can die unnoticed.
    #[arg(long, default_value = "1", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) replicas: u32,
    /// Continue this text once, print the answer and stop everything.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// Tokens to generate for --prompt [default: 64, or what the context leaves].
    #[arg(long, value_name = "N", requires = "prompt")]
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

#[derive(Debug, Args)]
#[command(
    after_help = "Every setting can also stand in the [router] table of the file given with --config, with \
                        underscores (kv_memory = \"4GiB\"), and in the environment (MUSTER_ROUTER_KV_MEMORY).\n\n\
                        SIGTERM ends it once running requests are done; a second one ends it at once.\n\n\
                        Example:\n  muster router --model demo --worker 127.0.0.1:7070 --worker 127.0.0.1:7071"
)]
pub(crate) struct RouterArgs {
    /// Directory of the model, org/name of a pulled one, or demo for the built-in one.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Name to serve the model under [default: that of its directory].
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// File with digests of the experts' weights, which workers must have. It is made where there is none or where it is
    /// not of the model's files as they are [default: one in the model's directory, made by `muster check-model --digests`,
    /// else one in the user's cache].
    #[arg(long, value_name = "FILE")]
    pub(crate) digests: Option<String>,
    /// A worker, as host:port or unix:/path; given once for each. Others can join while it runs.
    #[arg(long = "worker", value_name = "ADDR")]
    pub(crate) workers: Vec<String>,
    /// Where to look for workers: kubernetes:SERVICE, kubernetes:NAMESPACE/SERVICE or dns:HOST:PORT; given once for each.
    #[arg(long = "discover", value_name = "SOURCE")]
    pub(crate) discover: Vec<String>,
    /// A Lease of Kubernetes, as kubernetes:NAME or kubernetes:NAMESPACE/NAME: only who holds it leads the placement.
    #[arg(long, value_name = "LEASE")]
    pub(crate) lease: Option<String>,
    /// Whether routers tell workers which experts to hold, or workers keep those they start with: auto or static
    /// [default: auto].
    #[arg(long, value_name = "MODE")]
    pub(crate) placement: Option<String>,
    /// Copies of every expert on different workers, as far as their memory allows [default: 1].
    #[arg(long, value_name = "N")]
    pub(crate) replicas: Option<String>,
    /// What becomes of rows whose experts no worker holds: none lets them wait, local has the router compute them from
    /// the checkpoint, slowly [default: none].
    #[arg(long, value_name = "MODE")]
    pub(crate) fallback: Option<String>,
    /// Where OpenAI HTTP, probes and metrics listen [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDR")]
    pub(crate) http: Option<String>,
    /// Where gRPC listens [default: 127.0.0.1:50051].
    #[arg(long, value_name = "ADDR")]
    pub(crate) grpc: Option<String>,
    /// Name of this router in the workers' logs [default: router].
    #[arg(long, value_name = "NAME")]
    pub(crate) id: Option<String>,
    /// What activations are rounded to: auto, f32, bf16 or bf16-pairs [default: auto].
    #[arg(long, value_name = "MODE")]
    pub(crate) compute: Option<String>,
    /// How the workers hold experts: native, q8 or q4 [default: native].
    #[arg(long, value_name = "DTYPE")]
    pub(crate) expert_dtype: Option<String>,
    /// How attention's linears, dense MLPs and the head are held: native, q8 or q4 [default: native].
    #[arg(long, value_name = "DTYPE")]
    pub(crate) trunk_dtype: Option<String>,
    /// Compute threads [default: all cores].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<String>,
    /// Memory for the KV cache, as in 512MiB or 4GiB [default: as needed, at most 512MiB].
    #[arg(long, value_name = "SIZE")]
    pub(crate) kv_memory: Option<String>,
    /// Most tokens in one step of the batch [default: 1024].
    #[arg(long, value_name = "N")]
    pub(crate) step_tokens: Option<String>,
    /// Most prompt tokens of one sequence in one step [default: 512].
    #[arg(long, value_name = "N")]
    pub(crate) prefill_chunk: Option<String>,
    /// Whether requests that begin alike share keys and values: true or false [default: true].
    #[arg(long, value_name = "BOOL")]
    pub(crate) prefix_cache: Option<String>,
    /// A variable of the chat template that requests may set (chat_template_kwargs), such as enable_thinking; given once
    /// for each. Others are refused.
    #[arg(long = "template-variable", value_name = "NAME")]
    pub(crate) template_variables: Vec<String>,
    /// Most sequences in the batch [default: 256].
    #[arg(long, value_name = "N")]
    pub(crate) max_running: Option<String>,
    /// Most sequences waiting; one more is refused [default: 1024].
    #[arg(long, value_name = "N")]
    pub(crate) max_queue: Option<String>,
    /// Longest wait for a place in the batch that requests are taken for; who would wait longer is refused [default: 5s].
    #[arg(long, value_name = "TIME")]
    pub(crate) max_queue_wait: Option<String>,
    #[command(flatten)]
    pub(crate) edge: EdgeArgs,
    /// How long to wait for the experts of one layer [default: 30s].
    #[arg(long, value_name = "TIME")]
    pub(crate) expert_timeout: Option<String>,
    /// How long to wait for the workers at the start [default: 60s].
    #[arg(long, value_name = "TIME")]
    pub(crate) connect_timeout: Option<String>,
    /// How long running requests may go on after SIGTERM [default: 30s].
    #[arg(long, value_name = "TIME")]
    pub(crate) drain_timeout: Option<String>,
    /// Where experts' outputs are added: exact gives the same bits for every placement, partial sends less [default: exact].
    #[arg(long, value_name = "MODE")]
    pub(crate) combine: Option<String>,
    /// Microseconds to look for an answer of the workers before sleeping; 0 sleeps at once [default: 50].
    #[arg(long, value_name = "N")]
    pub(crate) busy_poll_us: Option<String>,
    /// How long requests are still taken after SIGTERM, while the router says that it is not ready: time for whoever sends
    /// them to learn of it [default: 0s].
    #[arg(long, value_name = "TIME")]
    pub(crate) leave_after: Option<String>,
    /// API keys that are good, a line each as `muster keys new` prints it; read again when it changes. Without, TLS takes
    /// clients' certificates.
    #[arg(long, value_name = "FILE", help_heading = "Security")]
    pub(crate) api_keys: Option<String>,
    #[command(flatten)]
    pub(crate) tls: RoleTlsArgs,
    /// Allow addresses that other machines can reach, without TLS.
    #[arg(long, help_heading = "Security")]
    pub(crate) insecure_plaintext: bool,
    /// Let everybody ask who reaches it, on addresses that other machines can reach.
    #[arg(long, help_heading = "Security")]
    pub(crate) insecure_no_keys: bool,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
}

#[derive(Debug, Args)]
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
pub(crate) struct WorkerArgs {
    /// Directory of the model, org/name of a pulled one, or demo for the built-in one.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Where routers reach it, as host:port or unix:/path [default: 127.0.0.1:7070].
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,
    /// gRPC address of a router to make itself known to; given once for each. Routers then tell it what to hold, and
    /// without --model it fetches what it needs.
    #[arg(long, value_name = "ADDR")]
    pub(crate) join: Vec<String>,
    /// Where others reach it, if that is not where it listens.
    #[arg(long, value_name = "ADDR")]
    pub(crate) advertise: Option<String>,
    /// Which experts to start with: all, none, or share I of N counted from 0, as in 0/2; 0/3x2 has every expert on two
    /// of three workers [default: all; none with --join].
    #[arg(long, value_name = "I/N")]
    pub(crate) share: Option<String>,
    /// Memory for experts, as in 16GiB [default: most of what is free].
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<String>,
    /// How fast it is, compared with other workers: it is given as much of the load [default: its threads].
    #[arg(long, value_name = "NUMBER")]
    pub(crate) speed: Option<String>,
    /// What it shares its fate with, such as a host or a rack: copies of an expert lie apart [default: the host].
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: Option<String>,
    /// Bytes a second that other workers may fetch from it [default: 256MiB].
    #[arg(long, value_name = "SIZE")]
    pub(crate) fetch_rate: Option<String>,
    /// Name of this worker [default: made from where it listens].
    #[arg(long, value_name = "NAME")]
    pub(crate) id: Option<String>,
    /// What activations are rounded to: auto, f32, bf16 or bf16-pairs [default: auto].
    #[arg(long, value_name = "MODE")]
    pub(crate) compute: Option<String>,
    /// How to hold experts: native, or q8 or q4 to make them smaller [default: native].
    #[arg(long, value_name = "DTYPE")]
    pub(crate) expert_dtype: Option<String>,
    /// Compute threads [default: all cores].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<String>,
    /// Most rows of one message; at least the routers' --step-tokens [default: 8192].
    #[arg(long, value_name = "N")]
    pub(crate) max_rows: Option<String>,
    /// Messages waiting for the experts; one more is refused [default: 64].
    #[arg(long, value_name = "N")]
    pub(crate) max_queue: Option<String>,
    /// Streams open at once; a router needs three [default: 256].
    #[arg(long, value_name = "N")]
    pub(crate) max_streams: Option<String>,
    /// How long after SIGTERM it may go on serving what no other worker holds yet [default: 30s].
    #[arg(long, value_name = "TIME")]
    pub(crate) drain_timeout: Option<String>,
    /// Microseconds to look for the next rows after an answer before sleeping; 0 sleeps at once [default: 50].
    #[arg(long, value_name = "N")]
    pub(crate) busy_poll_us: Option<String>,
    #[command(flatten)]
    pub(crate) tls: RoleTlsArgs,
    /// Allow an address that other machines can reach, without TLS.
    #[arg(long, help_heading = "Security")]
    pub(crate) insecure_plaintext: bool,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Type a line and press Enter. The conversation is remembered; Ctrl-D ends it.\n\n\
                        Example:\n  muster chat --system \"Answer in one sentence.\" --temperature 0.7")]
pub(crate) struct ChatArgs {
    /// Where the router's gRPC listens. Several routers of one model, separated by commas or each with a --grpc of its
    /// own: when one is lost, another goes on with the answer.
    #[arg(long, default_value = DEFAULT_GRPC, value_name = "URL", value_delimiter = ',')]
    pub(crate) grpc: Vec<String>,
    /// Instructions for the model, before the conversation.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,
    /// Tokens of one answer at most [default: what the context leaves].
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    #[command(flatten)]
    pub(crate) credentials: CredentialArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  muster generate \"Once upon a time\" --model demo\n  \
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
    /// Token ids to continue, separated by commas, instead of a text.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub(crate) prompt_tokens: Vec<u32>,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Tokens to generate at most [default: 64, or what the context leaves].
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// Print one JSON object: token_ids, text, finish_reason, prompt_token_ids, usage.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
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
    /// With --model: put the experts into this many worker processes [default: all in this process].
    #[arg(long, value_name = "N", requires = "model", value_parser = worker_count)]
    pub(crate) workers: Option<NonZeroU32>,
    #[command(flatten)]
    pub(crate) credentials: CredentialArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  muster check-model ./Mixtral-8x7B-v0.1\n  muster check-model demo --json\n  \
                        muster check-model demo --quality"
)]
pub(crate) struct CheckModelArgs {
    /// Directory of the model, org/name of a pulled one, or demo for the built-in one.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Check configuration and headers only; do not read the weights.
    #[arg(long, conflicts_with = "digests")]
    pub(crate) headers_only: bool,
    /// Compute a digest of each expert's weights and write them to this file, so that routers need not; without a name, to
    /// the model's directory. They depend on --compute and --expert-dtype.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub(crate) digests: Option<Option<PathBuf>>,
    /// With --digests: how routers and workers are to compute.
    #[arg(long, default_value = "auto", value_name = "MODE", requires = "digests")]
    pub(crate) compute: ComputeMode,
    /// With --digests: how workers are to hold experts, as they are computed (native), in 8 bits (q8) or in 4 bits (q4).
    #[arg(long, default_value = "native", value_name = "DTYPE", value_parser = parse_weight_dtype, requires = "digests")]
    pub(crate) expert_dtype: WeightDType,
    /// Also measure how far bf16 computation is from f32, and q8 and q4 experts from native ones: KL divergence and
    /// top-1 agreement.
    #[arg(long, conflicts_with = "headers_only")]
    pub(crate) quality: bool,
    /// With --quality: a JSON list of token ids, or a list of such lists [default: the model's own text].
    #[arg(long, value_name = "FILE", requires = "quality")]
    pub(crate) tokens: Option<PathBuf>,
    /// Compute threads for --quality [default: all cores].
    #[arg(long, value_name = "N", value_parser = threads, requires = "quality")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Experts are placed whole, and a worker takes four fifths of its memory for them unless told otherwise. Every router \
                        holds the trunk and the keys and values of its requests. What goes over the wire is computed for gates that \
                        choose all experts equally often and for experts spread evenly.\n\n\
                        Examples:\n  muster plan mixtral-8x7b --gpu 24GiB\n  \
                        muster plan qwen3-30b-a3b --worker 32GiB --replicas 2 --expert-dtype q8\n  \
                        muster plan ./my-moe --devices 64GiB,64GiB,32GiB --combine partial\n  \
                        muster plan mixtral-8x22b --worker 128GiBx2 --worker 48GiB --sequences 64 --context 8192 --rate 500\n\n\
                        Exit codes: 0 it fits, or nothing was said about workers; 1 it does not fit the workers given; 2 bad input."
)]
pub(crate) struct PlanArgs {
    /// Name of a well-known model, as in mixtral-8x7b (a wrong one lists them); or a directory with config.json, org/name of
    /// a pulled model, or demo.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Workers with this much memory, as in 64GiB, as many as needed; or as in 64GiBx2, so many. Given once for each size.
    #[arg(long = "worker", value_name = "SIZE[xN]", value_parser = machines)]
    pub(crate) workers: Vec<Machines>,
    /// The same, of GPUs with this much memory.
    #[arg(long = "gpu", value_name = "SIZE[xN]", value_parser = machines)]
    pub(crate) gpus: Vec<Machines>,
    /// Memory of workers that are there, one after another: does the model fit?
    #[arg(long, value_name = "SIZE,SIZE,...", value_delimiter = ',', value_parser = machines)]
    pub(crate) devices: Vec<Machines>,
    /// Copies of every expert on different workers.
    #[arg(long, default_value = "1", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) replicas: u32,
    /// How experts are held: native, q8 or q4.
    #[arg(long, default_value = "native", value_name = "DTYPE", value_parser = parse_weight_dtype)]
    pub(crate) expert_dtype: WeightDType,
    /// How attention's linears, dense MLPs and the head are held: native, q8 or q4.
    #[arg(long, default_value = "native", value_name = "DTYPE", value_parser = parse_weight_dtype)]
    pub(crate) trunk_dtype: WeightDType,
    /// Tokens of a sequence that the KV cache is to hold [default: 4096, or the model's context].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) context: Option<u32>,
    /// Sequences at once, in one router.
    #[arg(long, default_value = "16", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) sequences: u32,
    /// Where workers' outputs are added: exact or partial.
    #[arg(long, default_value = "exact", value_name = "MODE")]
    pub(crate) combine: Combine,
    /// Tokens a second, prompts included, that the network is to carry.
    #[arg(long, default_value = "100", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: u32,
    /// Print one line of JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The file has tensors `logits` (f32, [tokens, vocab]) and, per MoE layer N, `layer.N.experts` (i64, \
                        [tokens, k], ascending ids) and `layer.N.weights` (f32, same order).\n\n\
                        Example:\n  muster logits --model ./my-moe --tokens ids.json --out logits.safetensors --compute f32"
)]
pub(crate) struct LogitsArgs {
    /// Directory of the model, org/name of a pulled one, or demo for the built-in one.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: String,
    /// A JSON list of token ids.
    #[arg(long, value_name = "FILE")]
    pub(crate) tokens: PathBuf,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Put the experts into this many worker processes [default: all in this process].
    #[arg(long, value_name = "N", value_parser = worker_count)]
    pub(crate) workers: Option<NonZeroU32>,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Tokens per step. The outcome does not depend on it.
    #[arg(long, default_value = "1024", value_name = "N", value_parser = chunk)]
    pub(crate) chunk: NonZeroUsize,
    /// Use the plain f32 implementation that shares no compute code with the fast one.
    #[arg(long, conflicts_with_all = ["workers", "chunk", "compute", "expert_dtype", "trunk_dtype", "threads"])]
    pub(crate) reference: bool,
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
    /// Injure a cluster of one's own instead (demo, unless --model is given) while streams run, and tell how long they
    /// stood still.
    #[arg(long, conflicts_with_all = ["grpc", "against", "metrics"])]
    pub(crate) chaos: bool,
    /// Run streams against the running cluster for so long (--concurrency at a time, 16 by default), and compare each with
    /// what it gave at first; SIGTERM ends it sooner.
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

#[derive(Debug, Subcommand)]
pub(crate) enum CertsCommand {
    /// Make an authority, and a certificate of it for each role: router, worker, client.
    Init(CertsInitArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Writes ca.crt and ca.key, and in router/, worker/ and client/ each tls.crt, tls.key and ca.crt. Every router \
                        and worker takes its directory's three files; keep ca.key to yourself. Run again, it renews what ends \
                        within 30 days and leaves the rest alone.\n\n\
                        Example:\n  muster certs init certs --name muster.example.org --name 10.0.0.5\n  \
                        muster router --grpc 10.0.0.5:50051 --tls-cert certs/router/tls.crt --tls-key certs/router/tls.key \
                        --tls-ca certs/router/ca.crt ..."
)]
pub(crate) struct CertsInitArgs {
    /// Where to write them.
    #[arg(
        value_name = "DIR",
        required_unless_present = "kubernetes_secrets",
        conflicts_with = "kubernetes_secrets"
    )]
    pub(crate) dir: Option<PathBuf>,
    /// Write Kubernetes Secrets instead: PREFIX-ca, PREFIX-router, PREFIX-worker, PREFIX-client.
    #[arg(long, value_name = "PREFIX")]
    pub(crate) kubernetes_secrets: Option<String>,
    /// Of the Secrets [default: this pod's, or the current context's].
    #[arg(long, value_name = "NAME", requires = "kubernetes_secrets")]
    pub(crate) namespace: Option<String>,
    /// The cluster's name in certificates.
    #[arg(long, value_name = "NAME", default_value = "muster")]
    pub(crate) trust_domain: String,
    /// A DNS name or IP address by which clients reach the routers; may be given several times. localhost, 127.0.0.1 and
    /// ::1 are always there.
    #[arg(long = "name", value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// How many days certificates are good.
    #[arg(long, value_name = "N", default_value = "365", value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key: it is printed on standard output once, and its line for --api-keys is added to a file.
    New(KeysNewArgs),
    /// Print the line for --api-keys of a key that is read from standard input.
    Hash(KeysHashArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  muster keys new alice --file api-keys\n\nTake a line out of the file to revoke its key."
)]
pub(crate) struct KeysNewArgs {
    /// Whose it is.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// The file to add its line to; without, the line is printed on standard error.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct KeysHashArgs {
    /// Whose it is.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Its --admin address.
    #[arg(long, value_name = "URL", default_value = DEFAULT_ADMIN)]
    pub(crate) admin: String,
    /// How long to wait at most.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 when it is ready, 1 when it is not; standard output says why.")]
pub(crate) struct ProbeArgs {
    /// Its --admin address.
    #[arg(long, value_name = "URL", default_value = DEFAULT_ADMIN)]
    pub(crate) admin: String,
    /// How long to wait for an answer.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// What muster-pull takes: org/name, and its options.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "NAME")]
    pub(crate) arguments: Vec<std::ffi::OsString>,
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
