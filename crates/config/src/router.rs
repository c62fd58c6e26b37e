//! The router's settings.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use muster_discovery::{ObjectName, Source};
use muster_dispatch_grpc::Address;
use muster_telemetry::Process;
use muster_types::{Combine, Numerics, WeightDType};

use crate::declare::settings;
use crate::edge::EdgeSettings;
use crate::group::DefaultTo::{Nothing, Value, Words};
use crate::group::{ADDR, BOOL, DTYPE, FILE, Form, Group, MODE, NAME, NUMBER, Role, SIZE, SWITCH, TIME};
use crate::layers::{Loaded, Reader, Sources, load};
use crate::problem::ConfigError;
use crate::role::RoleSettings;
use crate::shared::{self, ComputeSettings, LogSettings, TlsSettings, off_loopback};
use crate::value::{self, one_of, parse_duration, parse_size, parse_socket, parse_weight_dtype, parsed};

const COUNT: u64 = 1 << 20;

settings! {
    /// Settings of a router.
    pub struct RouterSettings, RouterRead {
        /// Directory of the model, org/name of a pulled one, or demo for the built-in one.
        model: String = required(value::text), Form::text("MODEL"), Nothing;

        /// Name to serve the model under.
        model_name: Option<String> = optional(model_name), NAME, Words("that of its directory");

        /// File with digests of the experts' weights, which workers must have. It is made where there is none or where
        /// it is not of the model's files as they are.
        ///
        /// `muster check-model --digests` makes one in the model's directory ([security](security.md#weights)).
        digests: Option<PathBuf> = optional(value::path), FILE,
            Words("one in `.muster/` of the model's directory, else one in the user's cache");

        /// A worker to use from the start, as host:port or unix:/path; others can join while it runs.
        workers: Vec<Address> = list(parsed), Form::list("ADDR"), Nothing;

        /// Where to look for more workers, all the time: kubernetes:SERVICE, kubernetes:NAMESPACE/SERVICE or
        /// dns:HOST:PORT.
        ///
        /// The first two are a Service's EndpointSlices, the last all addresses of the name; see
        /// [discovery](discovery.md).
        discover: Vec<Source> = list(parsed), Form::list("SOURCE"), Nothing;

        /// A Lease of Kubernetes, as kubernetes:NAME or kubernetes:NAMESPACE/NAME: only who holds it leads the
        /// placement.
        lease: Option<ObjectName> = optional(parsed), Form::text("LEASE"), Nothing;

        /// Whether the router that leads tells workers which experts to hold (auto), or workers keep those they start
        /// with (static).
        ///
        /// See [placement](placement.md).
        placement: PlacementMode = required(placement), MODE, Value("auto");

        /// Copies of every expert on different workers, 1 to 64, as far as their memory allows.
        replicas: NonZeroU32 = required(value::parse_replicas), NUMBER, Value("1");

        /// What becomes of rows whose experts no worker holds: none lets them wait, local has the router compute them
        /// from the checkpoint, slowly.
        ///
        /// It keeps up to 1 GiB of such experts.
        fallback: Fallback = required(fallback), MODE, Value("none");

        /// Where OpenAI HTTP, probes and metrics listen.
        http: SocketAddr = required(parse_socket), ADDR, Value("127.0.0.1:8080");

        /// Where gRPC listens.
        ///
        /// It serves `muster.v1.Inference`, and workers join here.
        grpc: SocketAddr = required(parse_socket), ADDR, Value("127.0.0.1:50051");

        /// Name of this router in the workers' logs.
        id: String = required(value::name), NAME, Value("router");

        /// How attention's linears, dense MLPs and the head are held: native, q8 or q4.
        trunk_dtype: WeightDType = required(parse_weight_dtype), DTYPE, Value("native");

        /// Memory for the KV cache, as in 512MiB or 4GiB.
        ///
        /// Keys and values of all running requests.
        kv_memory: Option<u64> = optional(parse_size), SIZE,
            Words("what `max_running` needs, at most 512MiB");

        /// Most tokens in one step of the batch.
        step_tokens: u32 = required(value::up_to(COUNT)), NUMBER, Value("1024");

        /// Most prompt tokens of one sequence in one step.
        ///
        /// Beside requests that are generating, the router takes as many as make the step about 2.5 times as long as
        /// without, but 16 at least.
        prefill_chunk: u32 = required(value::up_to(COUNT)), NUMBER, Value("512");

        /// Whether requests that begin with the same tokens share keys and values: true or false.
        ///
        /// See [below](#the-prefix-cache).
        prefix_cache: bool = required(value::switch), BOOL, Value("true");

        /// A variable of the chat template that requests may set (chat_template_kwargs), such as enable_thinking.
        /// Others are refused.
        ///
        /// See [the OpenAI API](openai.md).
        template_variables: Vec<String> = list(variable), Form::list("NAME"), Nothing;

        /// Whether the sampling settings in the model's generation_config.json hold where a request says nothing
        /// (auto), or are ignored (ignore).
        ///
        /// See [the OpenAI API](openai.md#where-a-request-says-nothing).
        generation_config: GenerationMode = required(parsed), MODE, Value("auto");

        /// Most sequences in the batch.
        max_running: usize = required(value::up_to(COUNT)), NUMBER, Value("256");

        /// Most sequences waiting; one more is refused.
        ///
        /// They wait beside those that the batch has room for; the refusal is a retryable error, at once.
        max_queue: usize = required(value::up_to(COUNT)), NUMBER, Value("1024");

        /// Longest wait for a place in the batch that requests are taken for; who would wait longer is refused.
        ///
        /// The refusal is a retryable error, at once. The wait (of several choices, the first's) is reckoned from how
        /// often a place in a full batch came free of late; before the first has come free, as many wait as the batch
        /// holds.
        max_queue_wait: Duration = required(parse_duration), TIME, Value("5s");

        /// How long to wait for the experts of one layer.
        expert_timeout: Duration = required(parse_duration), TIME, Value("30s");

        /// How long to wait for the workers at the start.
        connect_timeout: Duration = required(parse_duration), TIME, Value("60s");

        /// How long running requests may go on after SIGTERM.
        drain_timeout: Duration = required(parse_duration), TIME, Value("30s");

        /// Where experts' outputs are added: exact (in the router) gives the same bits for every placement, partial
        /// (first on each worker) sends less.
        ///
        /// See [numerics](numerics.md).
        combine: Combine = required(parsed), MODE, Value("exact");

        /// Devices of several numerics classes: exact binds each expert to one class, so that a request always gives
        /// the same bits; any uses all workers. The same on every router.
        ///
        /// See [numerics](numerics.md#numerics-classes).
        numerics: Numerics = required(parsed), MODE, Value("exact");

        /// Microseconds to look for an answer of the workers before sleeping; 0 sleeps at once.
        ///
        /// At most 1000000; see [below](#busy-polling).
        busy_poll_us: Duration = required(value::busy_poll), NUMBER, Value("50");

        /// How long requests are still taken after SIGTERM, while the router says that it is not ready: time for
        /// whoever sends them to learn of it.
        leave_after: Duration = required(pause), TIME, Value("0s");
    }
    with {
        /// Settings of its edges.
        edge: EdgeSettings;
        /// Settings of access to the router.
        access: AccessSettings;
        /// Settings of computing.
        compute: ComputeSettings;
        /// Settings of certificates and of the admin interface.
        tls: TlsSettings;
        /// Settings of logs.
        log: LogSettings;
    }
}

settings! {
    /// Settings of access to a router.
    pub struct AccessSettings, AccessRead {
        /// API keys that are good, a line each as `muster keys new` prints it; read again when it changes. Without, TLS
        /// takes clients' certificates.
        ///
        /// See [security](security.md).
        api_keys: Option<PathBuf> = optional(value::path), FILE, Nothing;

        /// Let everybody ask who reaches it, on addresses that other machines can reach.
        insecure_no_keys: bool = required(value::switch), SWITCH, Value("false");
    }
}

pub(crate) static ROLE: Role = Role {
    name: "router",
    groups: &[
        Group { heading: None, keys: RouterSettings::KEYS },
        Group { heading: Some("Requests"), keys: EdgeSettings::KEYS },
        Group { heading: Some("Security"), keys: AccessSettings::KEYS },
        Group { heading: None, keys: ComputeSettings::KEYS },
        Group { heading: Some("Security"), keys: TlsSettings::KEYS },
        Group { heading: Some(shared::LOGGING), keys: LogSettings::KEYS },
    ],
};

/// Clients that a router serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessMode {
    /// All clients.
    Open,
    /// Clients with a client certificate.
    Certificates,
    /// Clients with a key in this file, or with a client certificate.
    Keys(PathBuf),
}

/// Whether a router may assign experts to workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlacementMode {
    /// A router assigns experts while it leads.
    Auto,
    /// Workers keep the experts they start with.
    Static,
}

/// Handling of rows whose experts have no owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Rows wait for an owner.
    None,
    /// The router reads the expert from the checkpoint and computes it itself.
    Local,
}

fn placement(text: &str) -> Result<PlacementMode, String> {
    one_of(text, [("auto", PlacementMode::Auto), ("static", PlacementMode::Static)])
}

fn fallback(text: &str) -> Result<Fallback, String> {
    one_of(text, [("none", Fallback::None), ("local", Fallback::Local)])
}

/// Use of the sampling settings in a model's `generation_config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationMode {
    /// They are the defaults of fields that a request omits.
    Auto,
    /// They are ignored.
    Ignore,
}

impl FromStr for GenerationMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        one_of(text, [("auto", Self::Auto), ("ignore", Self::Ignore)])
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

impl RoleSettings for RouterSettings {
    const ROLE: &'static Role = &ROLE;
    const PROCESS: Process = Process::Router;

    fn load(sources: &Sources<'_>) -> Result<Loaded<Self>, ConfigError> {
        load(&ROLE, sources, check)
    }

    fn log(&self) -> &LogSettings {
        &self.log
    }

    fn admin(&self) -> Option<SocketAddr> {
        self.tls.admin
    }
}

impl RouterSettings {
    /// The clients that it serves.
    #[must_use]
    pub fn access(&self) -> AccessMode {
        match &self.access.api_keys {
            Some(file) => AccessMode::Keys(file.clone()),
            None if self.tls.files().is_some() && !self.access.insecure_no_keys => AccessMode::Certificates,
            None => AccessMode::Open,
        }
    }
}

/// Checks the rules that span several settings.
fn check(read: &RouterRead, reader: &mut Reader) {
    if matches!(read.lease, Some(Some(_))) && read.placement == Some(PlacementMode::Static) {
        reader.problem(
            "lease",
            "says who leads, but with placement = static nobody does; remove one".to_owned(),
        );
    }
    let workers = read.workers.iter().flatten();
    if workers.clone().any(|worker| matches!(worker, Address::Tcp { port: 0, .. })) {
        reader.problem("workers", "port 0 is nowhere; give the port the worker listens on".to_owned());
    }
    reader.each_once("workers", workers);
    reader.each_once("discover", read.discover.iter().flatten());
    if let (Some(chunk), Some(step)) = (read.prefill_chunk, read.step_tokens)
        && chunk > step
    {
        reader.problem("prefill_chunk", format!("is {chunk}, more than step_tokens, which is {step}"));
    }
    if read.http.is_some_and(|http| http.port() != 0) && read.http == read.grpc {
        reader.problem("grpc", "is the same address as http; give each a port of its own".to_owned());
    }
    read.tls.check(reader);
    check_access(read, reader);
}

/// Checks that every address reachable from other machines is guarded, or left unguarded by an explicit setting.
fn check_access(read: &RouterRead, reader: &mut Reader) {
    let has_tls = read.tls.has_files();
    let has_keys = matches!(read.access.api_keys, Some(Some(_)));
    let plaintext = read.tls.insecure_plaintext == Some(true);
    let no_keys = read.access.insecure_no_keys == Some(true);
    for (key, address) in [("http", read.http), ("grpc", read.grpc)] {
        let Some(address) = address.filter(|address| !address.ip().is_loopback()) else { continue };
        match (has_tls, plaintext) {
            (true, _) => {}
            (false, false) => reader.problem(key, off_loopback(&address.to_string())),
            (false, true) if has_keys && key == "grpc" => {
                reader.problem(key, keys_do_not_guard(&address.to_string()));
            }
            (false, true) if !has_keys && !no_keys => {
                reader.problem(key, without_keys(&address.to_string()));
            }
            (false, true) => {}
        }
    }
    if no_keys && has_keys {
        let problem = "is given although there are api_keys; leave one of them out".to_owned();
        reader.problem("insecure_no_keys", problem);
    }
}

/// Template variables that requests may not set.
const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// Checks the name of a template variable.
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

fn model_name(text: &str) -> Result<String, String> {
    let fits = text.len() <= 256 && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned())
        .ok_or_else(|| "must be at most 256 bytes without control characters".to_owned())
}

/// A duration that may be zero.
fn pause(text: &str) -> Result<Duration, String> {
    if text == "0s" { Ok(Duration::ZERO) } else { parse_duration(text) }
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
