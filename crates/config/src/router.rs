//! The router's settings.

use std::fmt;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use muster_discovery::{ObjectName, Source};
use muster_dispatch_grpc::Address;
use muster_identity::TlsFiles;
use muster_telemetry::LogFormat;
use muster_types::{Combine, Compute, WeightDType, WorkerId};

use crate::edge::{self, EdgeSettings};
use crate::file::Role;
use crate::layers::{Key, Loaded, Reader, Sources, ValueKind};
use crate::problem::ConfigError;
use crate::value::{
    self, LogSettings, parse_compute, parse_duration, parse_size, parse_socket, parse_weight_dtype,
};

const KEYS: &[Key] = &[
    Key { name: "model", kind: ValueKind::Text, default: None },
    Key { name: "model_name", kind: ValueKind::Text, default: None },
    Key { name: "digests", kind: ValueKind::Text, default: None },
    Key { name: "workers", kind: ValueKind::List, default: None },
    Key { name: "discover", kind: ValueKind::List, default: None },
    Key { name: "lease", kind: ValueKind::Text, default: None },
    Key { name: "placement", kind: ValueKind::Text, default: Some("auto") },
    Key { name: "replicas", kind: ValueKind::Number, default: Some("1") },
    Key { name: "fallback", kind: ValueKind::Text, default: Some("none") },
    Key { name: "http", kind: ValueKind::Text, default: Some("127.0.0.1:8080") },
    Key { name: "grpc", kind: ValueKind::Text, default: Some("127.0.0.1:50051") },
    Key { name: "id", kind: ValueKind::Text, default: Some("router") },
    Key { name: "compute", kind: ValueKind::Text, default: Some("auto") },
    Key { name: "expert_dtype", kind: ValueKind::Text, default: Some("native") },
    Key { name: "trunk_dtype", kind: ValueKind::Text, default: Some("native") },
    Key { name: "threads", kind: ValueKind::NumberOrText, default: Some("auto") },
    Key { name: "kv_memory", kind: ValueKind::Text, default: None },
    Key { name: "step_tokens", kind: ValueKind::Number, default: Some("1024") },
    Key { name: "prefill_chunk", kind: ValueKind::Number, default: Some("512") },
    Key { name: "prefix_cache", kind: ValueKind::Switch, default: Some("true") },
    Key { name: "template_variables", kind: ValueKind::List, default: None },
    Key { name: "generation_config", kind: ValueKind::Text, default: Some("auto") },
    Key { name: "max_running", kind: ValueKind::Number, default: Some("256") },
    Key { name: "max_queue", kind: ValueKind::Number, default: Some("1024") },
    Key { name: "max_queue_wait", kind: ValueKind::Text, default: Some("5s") },
    edge::MAX_CHOICES,
    edge::MAX_STOPS,
    edge::MAX_BIAS,
    edge::MAX_BODY,
    edge::KEEP_ALIVE,
    edge::CORS_ORIGINS,
    Key { name: "expert_timeout", kind: ValueKind::Text, default: Some("30s") },
    Key { name: "connect_timeout", kind: ValueKind::Text, default: Some("60s") },
    Key { name: "drain_timeout", kind: ValueKind::Text, default: Some("30s") },
    Key { name: "combine", kind: ValueKind::Text, default: Some("exact") },
    Key { name: "busy_poll_us", kind: ValueKind::Number, default: Some("50") },
    Key { name: "tls_cert", kind: ValueKind::Text, default: None },
    Key { name: "tls_key", kind: ValueKind::Text, default: None },
    Key { name: "tls_ca", kind: ValueKind::Text, default: None },
    Key { name: "admin", kind: ValueKind::Text, default: None },
    Key { name: "api_keys", kind: ValueKind::Text, default: None },
    Key { name: "leave_after", kind: ValueKind::Text, default: Some("0s") },
    Key { name: "allow_links", kind: ValueKind::Switch, default: Some("false") },
    Key { name: "insecure_plaintext", kind: ValueKind::Switch, default: Some("false") },
    Key { name: "insecure_no_keys", kind: ValueKind::Switch, default: Some("false") },
    Key { name: "log", kind: ValueKind::Text, default: Some("info") },
    Key { name: "log_format", kind: ValueKind::Text, default: Some("human") },
];

pub(crate) const ROLE: Role = ("router", KEYS);

/// What a router is told.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSettings {
    /// Directory or name of the model.
    pub model: String,
    /// Whether the model's files may be links to elsewhere.
    pub allow_links: bool,
    /// Name to serve it under; `None` takes the checkpoint's.
    pub model_name: Option<String>,
    /// The file with digests of the experts' weights; `None` looks beside the model and in the user's cache.
    pub digests: Option<PathBuf>,
    /// Where the workers are, none twice; others may join.
    pub workers: Vec<Address>,
    /// Where to look for more, none twice.
    pub discover: Vec<Source>,
    /// What this router has to hold to be let to lead.
    pub lease: Option<ObjectName>,
    /// Whether this router may tell workers what to hold.
    pub placement: PlacementMode,
    /// Copies that each expert shall have, as far as memory allows.
    pub replicas: NonZeroU32,
    /// What becomes of rows whose experts no worker holds.
    pub fallback: Fallback,
    /// Where OpenAI HTTP, probes and metrics listen.
    pub http: SocketAddr,
    /// Where gRPC listens.
    pub grpc: SocketAddr,
    /// Name of this router in the workers' logs.
    pub id: String,
    /// What activations are rounded to; `None` as the checkpoint says.
    pub compute: Option<Compute>,
    /// How the workers hold experts.
    pub experts: WeightDType,
    /// How the trunk's linears are held.
    pub trunk: WeightDType,
    /// Compute threads; `None` for all cores.
    pub threads: Option<NonZeroUsize>,
    /// Bytes for the KV cache; `None` lets the router choose.
    pub kv_memory: Option<u64>,
    /// Most tokens in a step.
    pub step_tokens: u32,
    /// Most prompt tokens of one sequence in a step; at most `step_tokens`.
    pub prefill_chunk: u32,
    /// Whether keys and values are reused between requests that begin with the same tokens.
    pub prefix_cache: bool,
    /// Variables of the chat template that requests may set.
    pub template_variables: Vec<String>,
    /// What becomes of the sampling settings in the model's `generation_config.json`.
    pub generation_config: GenerationMode,
    /// Most sequences in the batch.
    pub max_running: usize,
    /// Most sequences that wait for a place in it.
    pub max_queue: usize,
    /// Longest wait for one that requests are taken for.
    pub max_queue_wait: Duration,
    /// What its edges take.
    pub edge: EdgeSettings,
    /// How long to wait for one layer's experts.
    pub expert_timeout: Duration,
    /// How long to wait for the workers at the start.
    pub connect_timeout: Duration,
    /// How long running requests may go on after a stop was asked for.
    pub drain_timeout: Duration,
    /// Where experts' outputs are added.
    pub combine: Combine,
    /// How long to look for an answer before sleeping; zero sleeps at once.
    pub busy_poll: Duration,
    /// Certificates; `None` speaks plaintext.
    pub tls: Option<TlsFiles>,
    /// Who may ask.
    pub access: AccessMode,
    /// Where probes and metrics are answered without TLS and keys, beside `http`.
    pub admin: Option<SocketAddr>,
    /// How long requests are still taken after a stop was asked for.
    pub leave_after: Duration,
    /// What is logged.
    pub log: LogSettings,
}

/// Who may ask a router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessMode {
    /// Everybody who reaches it.
    Open,
    /// Who has a client's certificate.
    Certificates,
    /// Who has a key in this file, or such a certificate.
    Keys(PathBuf),
}

/// Whether a router may tell workers what to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlacementMode {
    /// It may, when it leads.
    Auto,
    /// Workers hold what they start with.
    Static,
}

impl FromStr for PlacementMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "static" => Ok(Self::Static),
            _ => Err(format!("{text:?} is neither auto nor static")),
        }
    }
}

/// What becomes of rows whose experts no worker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// They wait until one does.
    None,
    /// The router reads the expert from the checkpoint and computes it itself.
    Local,
}

impl FromStr for Fallback {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "local" => Ok(Self::Local),
            _ => Err(format!("{text:?} is neither none nor local")),
        }
    }
}

/// What becomes of the sampling settings in a model's `generation_config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationMode {
    /// They hold where a request says nothing.
    Auto,
    /// They are ignored.
    Ignore,
}

impl FromStr for GenerationMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "ignore" => Ok(Self::Ignore),
            _ => Err(format!("{text:?} is neither auto nor ignore")),
        }
    }
}

impl fmt::Display for GenerationMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Ignore => "ignore",
        })
    }
}

impl RouterSettings {
    /// Reads and checks all layers.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn load(sources: &Sources<'_>) -> Result<Loaded<Self>, ConfigError> {
        let mut reader = Reader::new(ROLE, sources);
        let settings = read(&mut reader);
        reader.finish(settings)
    }
}

fn read(reader: &mut Reader) -> Option<RouterSettings> {
    const COUNT: u64 = 1 << 20;
    // Everything is read before anything is given up, so that all problems are found.
    let model = reader.required("model", text);
    let allow_links = reader.switch("allow_links");
    let model_name = reader.optional("model_name", model_name);
    let digests = reader.optional("digests", text).map(PathBuf::from);
    let workers = workers(reader);
    let (discover, lease) = (discover(reader), reader.optional("lease", parsed));
    let placement = reader.required("placement", str::parse::<PlacementMode>);
    if lease.is_some() && placement == Some(PlacementMode::Static) {
        reader.problem(
            "lease",
            "says who leads, but with placement = static nobody does; remove one".to_owned(),
        );
    }
    let replicas = reader.required("replicas", value::parse_replicas);
    let fallback = reader.required("fallback", str::parse::<Fallback>);
    let http = reader.required("http", parse_socket);
    let grpc = reader.required("grpc", parse_socket);
    let id = reader.required("id", name);
    let compute = reader.required("compute", parse_compute);
    let experts = reader.required("expert_dtype", parse_weight_dtype);
    let trunk = reader.required("trunk_dtype", parse_weight_dtype);
    let threads = reader.required("threads", value::threads);
    let kv_memory = reader.optional("kv_memory", parse_size);
    let mut count = |key| {
        let number = reader.required(key, |text| value::count(text, 1, COUNT));
        number.and_then(|number| u32::try_from(number).ok())
    };
    let (step_tokens, prefill_chunk) = (count("step_tokens"), count("prefill_chunk"));
    let (max_running, max_queue) = (count("max_running"), count("max_queue"));
    let max_queue_wait = reader.required("max_queue_wait", parse_duration);
    let edge = edge::read(reader);
    let expert_timeout = reader.required("expert_timeout", parse_duration);
    let connect_timeout = reader.required("connect_timeout", parse_duration);
    let drain_timeout = reader.required("drain_timeout", parse_duration);
    let combine =
        reader.required("combine", |text| text.parse::<Combine>().map_err(|error| error.to_string()));
    let busy_poll = reader.required("busy_poll_us", value::busy_poll);
    let log = log(reader);
    if let (Some(chunk), Some(step)) = (prefill_chunk, step_tokens)
        && chunk > step
    {
        reader.problem("prefill_chunk", format!("is {chunk}, more than step_tokens, which is {step}"));
    }
    let prefix_cache = reader.switch("prefix_cache");
    let template_variables = reader.list("template_variables", variable);
    let generation_config = reader.required("generation_config", str::parse::<GenerationMode>);
    let tls = tls(reader);
    let admin = reader.optional("admin", parse_socket);
    let leave_after = reader.required("leave_after", pause);
    let api_keys = reader.optional("api_keys", text).map(PathBuf::from);
    let (plaintext, no_keys) = (reader.switch("insecure_plaintext"), reader.switch("insecure_no_keys"));
    for (key, address) in [("http", http), ("grpc", grpc)] {
        let Some(address) = address.filter(|address| !address.ip().is_loopback()) else { continue };
        if tls.is_none() && !plaintext {
            reader.problem(key, off_loopback(&address.to_string()));
        } else if tls.is_none() && api_keys.is_none() && !no_keys {
            reader.problem(key, without_keys(&address.to_string()));
        }
    }
    if let Some(address) = grpc.filter(|grpc| !grpc.ip().is_loopback())
        && tls.is_none()
        && plaintext
        && api_keys.is_some()
    {
        reader.problem("grpc", keys_do_not_guard(&address.to_string()));
    }
    if no_keys && api_keys.is_some() {
        let problem = "is given although there are api_keys; leave one of them out".to_owned();
        reader.problem("insecure_no_keys", problem);
    }
    let access = match api_keys {
        Some(file) => AccessMode::Keys(file),
        None if tls.is_some() && !no_keys => AccessMode::Certificates,
        None => AccessMode::Open,
    };
    if http.is_some_and(|http| http.port() != 0) && http == grpc {
        reader.problem("grpc", "is the same address as http; give each a port of its own".to_owned());
    }
    Some(RouterSettings {
        model: model?,
        allow_links,
        model_name,
        digests,
        workers,
        discover,
        lease,
        placement: placement?,
        replicas: replicas?,
        fallback: fallback?,
        http: http?,
        grpc: grpc?,
        id: id?,
        compute: compute?,
        experts: experts?,
        trunk: trunk?,
        threads: threads?,
        kv_memory,
        step_tokens: step_tokens?,
        prefill_chunk: prefill_chunk?,
        prefix_cache,
        template_variables,
        generation_config: generation_config?,
        max_running: max_running? as usize,
        max_queue: max_queue? as usize,
        max_queue_wait: max_queue_wait?,
        edge: edge?,
        expert_timeout: expert_timeout?,
        connect_timeout: connect_timeout?,
        drain_timeout: drain_timeout?,
        combine: combine?,
        busy_poll: busy_poll?,
        tls,
        access,
        admin,
        leave_after: leave_after?,
        log: log?,
    })
}

fn workers(reader: &mut Reader) -> Vec<Address> {
    let workers = reader.list("workers", |text| text.parse::<Address>().map_err(|error| error.to_string()));
    let mut seen = std::collections::HashSet::new();
    for worker in &workers {
        if !seen.insert(worker) {
            reader.problem("workers", format!("{worker} is listed twice; remove one"));
        }
    }
    if workers.iter().any(|worker| matches!(worker, Address::Tcp { port: 0, .. })) {
        reader.problem("workers", "port 0 is nowhere; give the port the worker listens on".to_owned());
    }
    workers
}

/// Variables of a template that are no request's to set.
const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// The name of a variable.
fn variable(text: &str) -> Result<String, String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if text.is_empty() || text.len() > 64 || !text.chars().all(word) {
        return Err(format!("{text:?} is no name of letters, digits and _, 1 to 64 of them"));
    }
    if RESERVED.contains(&text) {
        return Err(format!("{text} is what the router itself gives the template; leave it out"));
    }
    Ok(text.to_owned())
}

fn discover(reader: &mut Reader) -> Vec<Source> {
    let sources: Vec<Source> = reader.list("discover", parsed);
    let mut seen = std::collections::HashSet::new();
    for source in &sources {
        if !seen.insert(source) {
            reader.problem("discover", format!("{source} is listed twice; remove one"));
        }
    }
    sources
}

fn parsed<T: FromStr<Err: ToString>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

pub(crate) fn log(reader: &mut Reader) -> Option<LogSettings> {
    let filter = reader.required("log", text);
    let parse = |text: &str| text.parse::<LogFormat>().map_err(|error| error.to_string());
    let format = reader.required("log_format", parse);
    Some(LogSettings { filter: filter?, format: format? })
}

pub(crate) fn text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

/// A name that may stand in logs and labels.
pub(crate) fn name(text: &str) -> Result<String, String> {
    WorkerId::new(text).map(|id| id.as_str().to_owned()).map_err(|error| error.to_string())
}

fn model_name(text: &str) -> Result<String, String> {
    let fits = text.len() <= 256 && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned())
        .ok_or_else(|| "must be at most 256 bytes without control characters".to_owned())
}

/// Certificates: all three files or none.
pub(crate) fn tls(reader: &mut Reader) -> Option<TlsFiles> {
    let mut file = |key| reader.optional(key, text).map(PathBuf::from);
    let files = [("tls_cert", file("tls_cert")), ("tls_key", file("tls_key")), ("tls_ca", file("tls_ca"))];
    let has_any = files.iter().any(|(_, file)| file.is_some());
    for (key, file) in &files {
        if has_any && file.is_none() {
            reader.problem(key, "is missing; TLS takes tls_cert, tls_key and tls_ca".to_owned());
        }
    }
    let [(_, cert), (_, key), (_, ca)] = files;
    Some(TlsFiles { cert: cert?, key: key?, ca: ca? })
}

/// A duration that may be none.
fn pause(text: &str) -> Result<Duration, String> {
    if text == "0s" { Ok(Duration::ZERO) } else { parse_duration(text) }
}

pub(crate) fn off_loopback(address: &str) -> String {
    format!(
        "{address} can be reached from other machines and there is no TLS; give --tls-cert, --tls-key and --tls-ca \
         (`muster certs init` makes them), listen on a loopback address, or ask for plaintext by name with \
         --insecure-plaintext"
    )
}

fn without_keys(address: &str) -> String {
    format!(
        "{address} can be reached from other machines and everybody may ask; give --api-keys (`muster keys new` makes \
         one), or ask for that by name with --insecure-no-keys"
    )
}

fn keys_do_not_guard(address: &str) -> String {
    format!(
        "{address} can be reached from other machines without TLS, and API keys guard only what clients ask there: workers \
         show certificates, so without TLS everybody may join and fetch the experts' weights; give --tls-cert, --tls-key \
         and --tls-ca (`muster certs init` makes them), listen with --grpc on a loopback address, or leave the keys out and \
         say --insecure-no-keys"
    )
}
