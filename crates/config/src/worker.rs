//! The worker's settings.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use muster_dispatch_grpc::Address;
use muster_identity::TlsFiles;
use muster_types::{Compute, Speed, WeightDType};

use crate::file::Role;
use crate::layers::{Key, Loaded, Reader, Sources, ValueKind};
use crate::problem::ConfigError;
use crate::router::{log, name, off_loopback, text, tls};
use crate::value::{
    self, LogSettings, Share, parse_compute, parse_duration, parse_socket, parse_weight_dtype,
};

const KEYS: &[Key] = &[
    Key { name: "model", kind: ValueKind::Text, default: None },
    Key { name: "listen", kind: ValueKind::Text, default: Some("127.0.0.1:7070") },
    Key { name: "join", kind: ValueKind::List, default: None },
    Key { name: "advertise", kind: ValueKind::Text, default: None },
    Key { name: "share", kind: ValueKind::Text, default: None },
    Key { name: "memory", kind: ValueKind::Text, default: Some("auto") },
    Key { name: "speed", kind: ValueKind::NumberOrText, default: Some("auto") },
    Key { name: "domain", kind: ValueKind::Text, default: None },
    Key { name: "fetch_rate", kind: ValueKind::Text, default: Some("256MiB") },
    Key { name: "id", kind: ValueKind::Text, default: None },
    Key { name: "compute", kind: ValueKind::Text, default: Some("auto") },
    Key { name: "expert_dtype", kind: ValueKind::Text, default: Some("native") },
    Key { name: "threads", kind: ValueKind::NumberOrText, default: Some("auto") },
    Key { name: "max_rows", kind: ValueKind::Number, default: Some("8192") },
    Key { name: "max_queue", kind: ValueKind::Number, default: Some("64") },
    Key { name: "max_streams", kind: ValueKind::Number, default: Some("256") },
    Key { name: "drain_timeout", kind: ValueKind::Text, default: Some("30s") },
    Key { name: "busy_poll_us", kind: ValueKind::Number, default: Some("50") },
    Key { name: "tls_cert", kind: ValueKind::Text, default: None },
    Key { name: "tls_key", kind: ValueKind::Text, default: None },
    Key { name: "tls_ca", kind: ValueKind::Text, default: None },
    Key { name: "admin", kind: ValueKind::Text, default: None },
    Key { name: "allow_links", kind: ValueKind::Switch, default: Some("false") },
    Key { name: "insecure_plaintext", kind: ValueKind::Switch, default: Some("false") },
    Key { name: "log", kind: ValueKind::Text, default: Some("info") },
    Key { name: "log_format", kind: ValueKind::Text, default: Some("human") },
];

pub(crate) const ROLE: Role = ("worker", KEYS);

/// What a worker is told.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerSettings {
    /// Directory or name of the model; `None`, only where there is a router to join, has weights fetched.
    pub model: Option<String>,
    /// Whether the model's files may be links to elsewhere.
    pub allow_links: bool,
    /// Where it listens.
    pub listen: Address,
    /// Routers to make itself known to.
    pub join: Vec<Address>,
    /// Where routers and other workers reach it; `None`: where it listens.
    pub advertise: Option<Address>,
    /// Which experts it starts with.
    pub share: Share,
    /// Bytes for experts; `None` takes most of what is free.
    pub memory: Option<u64>,
    /// How fast it is, compared with other workers; `None` counts threads.
    pub speed: Option<Speed>,
    /// What it shares its fate with; `None` is the host.
    pub domain: Option<String>,
    /// Bytes a second that other workers may fetch from it.
    pub fetch_rate: NonZeroUsize,
    /// What it calls itself; `None` makes a name from where it listens.
    pub id: Option<String>,
    /// What activations are rounded to; `None` as the checkpoint says.
    pub compute: Option<Compute>,
    /// How experts are held.
    pub experts: WeightDType,
    /// Compute threads; `None` for all cores.
    pub threads: Option<NonZeroUsize>,
    /// Most rows of one shard. Routers whose steps are larger are refused.
    pub max_rows: NonZeroU32,
    /// Shards that wait for the experts; one more is refused.
    pub max_queue: NonZeroUsize,
    /// Streams open at once; a router needs three.
    pub max_streams: NonZeroUsize,
    /// How long shards under way may go on after a stop was asked for.
    pub drain_timeout: Duration,
    /// How long to look for the next message after an answer before sleeping; zero sleeps at once.
    pub busy_poll: Duration,
    /// Certificates; `None` speaks plaintext.
    pub tls: Option<TlsFiles>,
    /// Where probes and metrics are answered without TLS.
    pub admin: Option<SocketAddr>,
    /// What is logged.
    pub log: LogSettings,
}

impl WorkerSettings {
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

fn read(reader: &mut Reader) -> Option<WorkerSettings> {
    let address = |text: &str| text.parse::<Address>().map_err(|error| error.to_string());
    let listen = reader.required("listen", address);
    let join = reader.list("join", address);
    let advertise = reader.optional("advertise", address);
    // A worker that joins has its experts chosen and brought by the cluster.
    let joins = reader.has_entries("join");
    let model = reader.optional("model", text);
    if model.is_none() && !joins && !reader.has_entries("model") {
        let problem = "is missing; give --join HOST:PORT, a router's --grpc, to be brought experts, or --model, \
                       MUSTER_WORKER_MODEL, or model in [worker] to load them";
        reader.problem("model", problem.to_owned());
    }
    let share = reader.optional("share", str::parse::<Share>);
    let share = share.unwrap_or(if joins { Share::None } else { Share::All });
    if model.is_none() && share != Share::None {
        reader.problem("share", "needs a --model to load from".to_owned());
    }
    let memory = reader.required("memory", value::size_or_auto);
    let speed = reader.required("speed", speed);
    let domain = reader.optional("domain", name);
    let fetch_rate = reader.required("fetch_rate", value::parse_size);
    let id = reader.optional("id", name);
    let compute = reader.required("compute", parse_compute);
    let experts = reader.required("expert_dtype", parse_weight_dtype);
    let threads = reader.required("threads", value::threads);
    let mut count = |key, most| {
        let number = reader.required(key, |text| value::count(text, 1, most));
        number.and_then(|number| u32::try_from(number).ok()).and_then(NonZeroU32::new)
    };
    let (max_rows, max_queue, max_streams) =
        (count("max_rows", 1 << 20), count("max_queue", 4096), count("max_streams", 1 << 16));
    let drain_timeout = reader.required("drain_timeout", parse_duration);
    let busy_poll = reader.required("busy_poll_us", value::busy_poll);
    let log = log(reader);
    let tls = tls(reader);
    let admin = reader.optional("admin", parse_socket);
    let plaintext = reader.switch("insecure_plaintext");
    if let Some(address) = &listen
        && tls.is_none()
        && !plaintext
        && !is_local(address)
    {
        reader.problem("listen", off_loopback(&address.to_string()));
    }
    let allow_links = reader.switch("allow_links");
    Some(WorkerSettings {
        model,
        allow_links,
        listen: listen?,
        join,
        advertise,
        share,
        memory: memory?,
        speed: speed?,
        domain,
        fetch_rate: fetch_rate.and_then(|rate| usize::try_from(rate).ok()).and_then(NonZeroUsize::new)?,
        id,
        compute: compute?,
        experts: experts?,
        threads: threads?,
        max_rows: max_rows?,
        max_queue: NonZeroUsize::try_from(max_queue?).ok()?,
        max_streams: NonZeroUsize::try_from(max_streams?).ok()?,
        drain_timeout: drain_timeout?,
        busy_poll: busy_poll?,
        tls,
        admin,
        log: log?,
    })
}

/// A speed, or `auto`.
fn speed(text: &str) -> Result<Option<Speed>, String> {
    if text == "auto" {
        return Ok(None);
    }
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is neither a number nor auto"))?;
    Speed::new(number).map(Some).map_err(|error| error.to_string())
}

/// Whether only this machine can reach it. A name may mean anything, so only `localhost` and loopback addresses count.
fn is_local(address: &Address) -> bool {
    match address {
        Address::Unix(_) => true,
        Address::Tcp { host, .. } => {
            let localhost = (host == "localhost").then_some(IpAddr::V4(Ipv4Addr::LOCALHOST));
            localhost.or_else(|| host.parse().ok()).is_some_and(|ip| ip.is_loopback())
        }
    }
}
