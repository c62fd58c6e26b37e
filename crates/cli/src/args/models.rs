//! Subcommands on a model alone: `check-model`, `plan`, `logits`, `pull`.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::Args;
use muster_config::{parse_replicas, parse_weight_dtype};
use muster_types::{Combine, WeightDType};

use super::shared::{ComputeArgs, ComputeMode, LinkArgs};
use crate::numbers::{Machines, chunk, machines, threads, worker_count};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  muster check-model ./Mixtral-8x7B-v0.1\n  muster check-model demo --json\n  \
                        muster check-model demo --quality"
)]
pub(crate) struct CheckModelArgs {
    /// Directory of the model, org/name of a pulled one, or demo for the built-in one.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) links: LinkArgs,
    /// Check configuration and headers only; do not read the weights.
    #[arg(long, conflicts_with = "digests")]
    pub(crate) headers_only: bool,
    /// Compute a digest of each expert's weights and write them to this file, so that routers need not; without a name,
    /// to the model's directory. They depend on --compute and --expert-dtype.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub(crate) digests: Option<Option<PathBuf>>,
    /// With --digests: how routers and workers are to compute.
    #[arg(long, default_value = "auto", value_name = "MODE", requires = "digests")]
    pub(crate) compute: ComputeMode,
    /// With --digests: how workers are to hold experts, as they are computed (native), in 8 bits (q8) or in 4 bits
    /// (q4).
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
    /// Name of a well-known model, as in mixtral-8x7b (a wrong one lists them); or a directory with config.json,
    /// org/name of a pulled model, or demo.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) links: LinkArgs,
    /// Workers with this much memory: 64GiB for as many as needed, 64GiBx2 for exactly two. Given once for each size.
    #[arg(long = "worker", value_name = "SIZE[xN]", value_parser = machines)]
    pub(crate) workers: Vec<Machines>,
    /// GPU workers with this much memory, given as with --worker.
    #[arg(long = "gpu", value_name = "SIZE[xN]", value_parser = machines)]
    pub(crate) gpus: Vec<Machines>,
    /// Memory of each existing worker: does the model fit?
    #[arg(long, value_name = "SIZE,SIZE,...", value_delimiter = ',', value_parser = machines)]
    pub(crate) devices: Vec<Machines>,
    /// Copies of every expert on different workers.
    #[arg(long, default_value = "1", value_name = "N", value_parser = parse_replicas)]
    pub(crate) replicas: NonZeroU32,
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
    #[command(flatten)]
    pub(crate) links: LinkArgs,
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
pub(crate) struct PullArgs {
    /// What muster-pull takes: org/name, and its options.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "NAME")]
    pub(crate) arguments: Vec<std::ffi::OsString>,
}
