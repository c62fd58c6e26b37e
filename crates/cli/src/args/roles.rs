//! What runs: `up`, `router`, `worker`. Settings of the last two stay text here, because a file and the environment give the
//! same settings and `muster-config` parses whichever wins.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use clap::Args;
use muster_config::{parse_replicas, parse_size, parse_socket};

use super::shared::{ComputeArgs, ConfigArgs, EdgeArgs, LinkArgs, RoleTlsArgs, SamplingArgs};

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
    /// On how many workers every expert is; with 2 or more a worker can die unnoticed.
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
    #[command(flatten)]
    pub(crate) links: LinkArgs,
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
    /// Whether the sampling settings in the model's generation_config.json hold where a request says nothing (auto), or are
    /// ignored (ignore) [default: auto].
    #[arg(long, value_name = "MODE")]
    pub(crate) generation_config: Option<String>,
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
    #[command(flatten)]
    pub(crate) links: LinkArgs,
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
