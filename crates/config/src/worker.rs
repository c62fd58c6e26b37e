//! The worker's settings.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use muster_dispatch_grpc::Address;
use muster_placement::Share;
use muster_telemetry::Process;
use muster_types::Speed;

use crate::declare::settings;
use crate::group::DefaultTo::{Nothing, Value, Words};
use crate::group::{ADDR, Form, Group, NAME, NUMBER, NUMBER_OR_WORD, Role, SIZE, TIME};
use crate::layers::{Loaded, Reader, Sources, load};
use crate::problem::ConfigError;
use crate::role::RoleSettings;
use crate::shared::{self, ComputeSettings, LogSettings, TlsSettings, off_loopback};
use crate::value::{self, parse_duration, parsed};

settings! {
    /// Settings of a worker.
    pub struct WorkerSettings, WorkerRead {
        /// Directory of the model, org/name of a pulled one, or demo for the built-in one; not needed with a router to
        /// join.
        ///
        /// Without one it fetches its experts from other workers or the router.
        model: Option<String> = optional(value::text), Form::text("MODEL"), Nothing;

        /// Where routers reach it, as host:port or unix:/path.
        listen: Address = required(parsed), ADDR, Value("127.0.0.1:7070");

        /// gRPC address of a router to make itself known to. Routers then tell it what to hold, and without a model it
        /// fetches what it needs.
        ///
        /// A name stands for the routers at all its addresses, and is asked again every 5 s.
        join: Vec<Address> = list(parsed), Form::list("ADDR"), Nothing;

        /// Where routers and other workers reach it, if that is not where it listens.
        advertise: Option<Address> = optional(parsed), ADDR,
            Words("where it listens; of all addresses, the one that this host speaks to the router from");

        /// Which experts to start with: all, none, or share I of N counted from 0, as in 0/2; 0/3x2 has every expert on
        /// two of three workers.
        ///
        /// `I/NxR` is the I-th of N equal shares and the R - 1 shares behind it, so that every expert is on R workers.
        share: Option<Share> = optional(parsed), Form::text("I/N"), Words("all; with `join`, none");

        /// Memory for experts, as in 16GiB; auto is 80 % of what is free, beside the share. It is never told to hold
        /// more.
        memory: Option<u64> = required(value::size_or_auto), SIZE, Value("auto");

        /// How fast it is, in any unit that is the same for all workers: it is given as much of the load. auto counts
        /// its threads.
        speed: Option<Speed> = required(speed), NUMBER_OR_WORD, Value("auto");

        /// What it shares its fate with, such as a host or a rack: copies of an expert lie in different ones.
        ///
        /// Of `zone/host`, zones come first.
        domain: Option<String> = optional(value::name), NAME,
            Words("the host's name; in a pod, what the routers' discovery says");

        /// Bytes a second that other workers may fetch from it.
        fetch_rate: NonZeroUsize = required(fetch_rate), SIZE, Value("256MiB");

        /// Name of this worker; no two workers of a cluster share one.
        id: Option<String> = optional(value::name), NAME, Words("made from address and process");

        /// Most rows of one message; at least the routers' step_tokens.
        max_rows: NonZeroU32 = required(value::positive(1 << 20)), NUMBER, Value("8192");

        /// Messages waiting for the experts; one more is refused.
        max_queue: NonZeroUsize = required(value::positive(1 << 12)), NUMBER, Value("64");

        /// Streams open at once; a router needs three.
        max_streams: NonZeroUsize = required(value::positive(1 << 16)), NUMBER, Value("256");

        /// How long after SIGTERM it may go on serving what no other worker holds yet.
        drain_timeout: Duration = required(parse_duration), TIME, Value("30s");

        /// Microseconds to look for the next rows after an answer before sleeping; 0 sleeps at once.
        ///
        /// At most 1000000; see [below](#busy-polling).
        busy_poll_us: Duration = required(value::busy_poll), NUMBER, Value("50");
    }
    with {
        /// Settings of computing.
        compute: ComputeSettings;
        /// Settings of certificates and of the admin interface.
        tls: TlsSettings;
        /// Settings of logs.
        log: LogSettings;
    }
}

pub(crate) static ROLE: Role = Role {
    name: "worker",
    groups: &[
        Group { heading: None, keys: WorkerSettings::KEYS },
        Group { heading: None, keys: ComputeSettings::KEYS },
        Group { heading: Some("Security"), keys: TlsSettings::KEYS },
        Group { heading: Some(shared::LOGGING), keys: LogSettings::KEYS },
    ],
};

impl RoleSettings for WorkerSettings {
    const ROLE: &'static Role = &ROLE;
    const PROCESS: Process = Process::Worker;

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

impl WorkerSettings {
    /// The share to start with: none for a worker that joins without one, whose experts the cluster assigns.
    #[must_use]
    pub fn share(&self) -> Share {
        self.share.unwrap_or(if self.join.is_empty() { Share::All } else { Share::None })
    }
}

/// Checks the rules that span several settings.
fn check(read: &WorkerRead, reader: &mut Reader) {
    let joins = reader.has_entries("join");
    if !joins && !reader.has_entries("model") {
        let problem = "is missing; give --join HOST:PORT, a router's --grpc, to be brought experts, or --model, \
                       MUSTER_WORKER_MODEL, or model in [worker] to load them";
        reader.problem("model", problem.to_owned());
    }
    let begins_empty = match read.share.flatten() {
        Some(share) => share == Share::None,
        None => joins,
    };
    if !matches!(read.model, Some(Some(_))) && !begins_empty {
        reader.problem("share", "needs a --model to load from".to_owned());
    }
    read.tls.check(reader);
    if let Some(listen) = read.listen.as_ref().filter(|listen| !is_local(listen))
        && !read.tls.has_files()
        && read.tls.insecure_plaintext != Some(true)
    {
        reader.problem("listen", off_loopback(&listen.to_string()));
    }
}

fn fetch_rate(text: &str) -> Result<NonZeroUsize, String> {
    let bytes = usize::try_from(value::parse_size(text)?).ok();
    bytes.and_then(NonZeroUsize::new).ok_or_else(|| value::too_many(text))
}

/// A speed, or `auto`.
fn speed(text: &str) -> Result<Option<Speed>, String> {
    if text == "auto" {
        return Ok(None);
    }
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is neither a number nor auto"))?;
    Speed::new(number).map(Some).map_err(|error| error.to_string())
}

/// Whether only this machine can reach an address. Other names may resolve to anything, so only `localhost` and
/// loopback addresses count.
fn is_local(address: &Address) -> bool {
    match address {
        Address::Unix(_) => true,
        Address::Tcp { host, .. } => {
            let localhost = (host == "localhost").then_some(IpAddr::V4(Ipv4Addr::LOCALHOST));
            localhost.or_else(|| host.parse().ok()).is_some_and(|ip| ip.is_loopback())
        }
    }
}
