//! Loads the wanted experts, one after the other, while the worker serves.
//!
//! An expert comes from a worker that holds it, if the order names one, else from the checkpoint, else from a router. A
//! source that fails, or whose weights have another digest than the order says, is passed over. Serving comes first:
//! the thread runs at a lower priority.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_checkpoint::Checkpoint;
use muster_dispatch_grpc::{Address, Dialer, ExpertServer, FetchError, Fetcher};
use muster_kernels::KernelError;
use muster_model::ModelError;
use muster_model::experts::{self, ExpertForm, PackedExpert};
use muster_proto::control::Fetch;
use muster_types::{Compute, ExpertKey, Fingerprint, WeightDType, WeightDigest};
use tokio::runtime::Handle;

use crate::holder::{Holder, LoadTask, Work};

/// Niceness of the thread.
const NICE: i32 = 10;
/// Pause after an expert that no source could give.
const PAUSE: Duration = Duration::from_secs(1);
/// Interval of announcements: experts loaded within it are announced together.
const ANNOUNCE_EVERY: Duration = Duration::from_millis(20);
/// Most remembered log messages, which are not repeated; above it, all are forgotten.
const SAID: usize = 1024;

/// Description and sources of the weights.
pub(crate) struct Sources {
    /// `None` if weights come only from other processes.
    pub(crate) checkpoint: Option<Checkpoint>,
    /// Routers that read their checkpoint for others.
    pub(crate) routers: Vec<Address>,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) compute: Compute,
    pub(crate) dtype: WeightDType,
    pub(crate) forms: Vec<Option<ExpertForm>>,
}

/// The loading thread; see the module.
pub(crate) struct Loader {
    pub(crate) holder: Arc<Holder>,
    pub(crate) server: ExpertServer,
    pub(crate) sources: Sources,
    pub(crate) runtime: Handle,
    /// Dialer of workers and routers.
    pub(crate) dialer: Dialer,
}

/// A source of weights.
enum Source<'a> {
    Peer(Address),
    Checkpoint(&'a Checkpoint),
    Router(Address),
}

impl Source<'_> {
    /// Label in metrics.
    const fn kind(&self) -> &'static str {
        match self {
            Self::Peer(_) => "peer",
            Self::Checkpoint(_) => "checkpoint",
            Self::Router(_) => "router",
        }
    }
}

impl fmt::Display for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(address) => write!(f, "the worker at {address}"),
            Self::Checkpoint(checkpoint) => write!(f, "this worker's own files of {}", checkpoint.name()),
            Self::Router(address) => write!(f, "the router at {address}"),
        }
    }
}

/// Reason why a source was passed over.
#[derive(Debug, thiserror::Error)]
enum Passed {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Unpack(#[from] KernelError),
    #[error(transparent)]
    Read(#[from] ModelError),
    #[error("its weights have digest {theirs} and must have {ours}")]
    Others { ours: WeightDigest, theirs: WeightDigest },
    #[error("it is no longer to be loaded")]
    CalledOff,
}

impl Passed {
    /// Whether the source is damaged and needs an operator, not only busy or unreachable.
    const fn is_damage(&self) -> bool {
        match self {
            Self::Fetch(FetchError::Others { .. } | FetchError::Damaged(_)) => true,
            Self::Fetch(FetchError::Refused(_) | FetchError::Silent) | Self::CalledOff => false,
            Self::Unpack(_) | Self::Read(_) | Self::Others { .. } => true,
        }
    }
}

/// State of the loading thread between experts.
struct Hands {
    fetcher: Fetcher,
    /// Messages logged already.
    said: HashSet<String>,
}

impl Hands {
    /// Whether a message is new.
    fn is_news(&mut self, text: &str) -> bool {
        if self.said.len() >= SAID {
            self.said.clear();
        }
        self.said.insert(text.to_owned())
    }
}

impl Loader {
    /// Loads until the holder is stopped.
    pub(crate) fn run(self) {
        if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE) {
            tracing::debug!(%error, "the loader has the same priority as others");
        }
        let mut hands = Hands { fetcher: Fetcher::new(self.dialer.clone()), said: HashSet::new() };
        let mut announced = Instant::now();
        loop {
            let outcome = match self.holder.next() {
                Work::Stop => return,
                Work::Released => Ok(()),
                Work::Load(task) => self.load(&mut hands, &task).inspect_err(|_| self.holder.defer(task.key)),
            };
            let is_done = self.holder.loading() == 0;
            if is_done || outcome.is_err() || announced.elapsed() >= ANNOUNCE_EVERY {
                self.server.announce();
                announced = Instant::now();
            }
            if let Err(later) = outcome {
                self.holder.pause(later);
            }
        }
    }

    /// Loads an expert, or returns the time of the next attempt.
    fn load(&self, hands: &mut Hands, task: &LoadTask) -> Result<(), Instant> {
        let later = Instant::now() + PAUSE;
        let Some((form, bytes)) = self.form(task.key) else {
            tracing::error!(expert = %task.key, "told to load an expert that the model does not have");
            return Err(later);
        };
        if bytes as u64 > self.holder.room() {
            return Err(self.holder.next_release().unwrap_or_else(|| {
                tracing::warn!(expert = %task.key, bytes, "no memory left for an expert; raise --memory");
                later
            }));
        }
        let started = Instant::now();
        let Some((expert, digest, source)) = self.find(hands, task, &form, bytes) else {
            // An expert that is no longer wanted has not failed.
            return if self.holder.is_asked_for(task.key) { Err(later) } else { Ok(()) };
        };
        if let Err(error) = self.holder.take_in(task.key, expert, digest) {
            tracing::warn!(%error, "an expert that was loaded cannot be stored");
            return Err(later);
        }
        metrics::counter!("muster_worker_experts_loaded_total", "source" => source).increment(1);
        metrics::counter!("muster_worker_expert_bytes_loaded_total", "source" => source)
            .increment(bytes as u64);
        tracing::debug!(expert = %task.key, source, seconds = started.elapsed().as_secs_f64(), "loaded");
        Ok(())
    }

    fn form(&self, key: ExpertKey) -> Option<(ExpertForm, usize)> {
        let form = (*self.sources.forms.get(key.layer.index())?)?;
        Some((form, form.bytes()?))
    }

    /// The expert from the first source with the expected weights, and the kind of source; `None` also once it is not
    /// wanted.
    fn find(
        &self,
        hands: &mut Hands,
        task: &LoadTask,
        form: &ExpertForm,
        bytes: usize,
    ) -> Option<(PackedExpert, WeightDigest, &'static str)> {
        let peers = task.peers.iter().filter_map(|peer| peer.parse().ok()).map(Source::Peer);
        let own = self.sources.checkpoint.iter().map(Source::Checkpoint);
        let routers = self.sources.routers.iter().cloned().map(Source::Router);
        let mut reasons = Vec::new();
        for source in peers.chain(own).chain(routers) {
            if !self.holder.is_asked_for(task.key) {
                return None;
            }
            let passed = match self.take_from(&mut hands.fetcher, &source, task, form, bytes) {
                Ok((expert, digest)) => return Some((expert, digest, source.kind())),
                Err(passed) => passed,
            };
            let text = format!("{} from {source}: {passed}", task.key);
            if passed.is_damage() {
                metrics::counter!("muster_worker_expert_load_errors_total").increment(1);
                if hands.is_news(&text) {
                    tracing::error!(expert = %task.key, %source, reason = %passed, "a source of weights is passed over");
                }
                self.holder.trouble(text);
            } else {
                tracing::debug!(expert = %task.key, %source, reason = %passed, "not fetched");
            }
            reasons.push(format!("{source}: {passed}"));
        }
        let reasons =
            if reasons.is_empty() { "nobody is named that has it".to_owned() } else { reasons.join("; ") };
        if hands.is_news(&format!("{} {reasons}", task.key)) {
            tracing::warn!(expert = %task.key, reasons, "an expert cannot be had anywhere; trying again");
        }
        None
    }

    fn take_from(
        &self,
        fetcher: &mut Fetcher,
        source: &Source<'_>,
        task: &LoadTask,
        form: &ExpertForm,
        bytes: usize,
    ) -> Result<(PackedExpert, WeightDigest), Passed> {
        let Sources { fingerprint, compute, dtype, .. } = self.sources;
        match source {
            Source::Peer(address) | Source::Router(address) => {
                let fetch = Fetch { fingerprint, compute, experts: dtype, key: task.key };
                let fetching = fetcher.fetch(address, &fetch, bytes, task.digest);
                let fetched = self.runtime.block_on(async {
                    tokio::select! {
                        biased;
                        () = self.holder.called_off(task.key) => Err(Passed::CalledOff),
                        fetched = fetching => Ok(fetched?),
                    }
                });
                let (packed, digest) = fetched?;
                Ok((form.unpack(&packed)?, digest))
            }
            Source::Checkpoint(checkpoint) => {
                let expert = experts::read_one(checkpoint, task.key, compute, dtype)?;
                let theirs = expert.digest();
                match task.digest {
                    Some(ours) if ours != theirs => Err(Passed::Others { ours, theirs }),
                    _ => Ok((expert, theirs)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};

    use muster_dispatch_grpc::{Custody, ServerConfig};
    use muster_model::experts::{CpuStore, ExpertSet};
    use muster_placement::Shape;
    use muster_proto::control::{Assignment, Load};
    use muster_proto::convert::RouterName;
    use muster_proto::description::{Description, Phase};
    use muster_types::{Epoch, ExpertId, Gating, LayerId, NumericsClass, Packing, Speed, WorkerId};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn key() -> ExpertKey {
        ExpertKey { layer: LayerId::new(0, 1).unwrap(), expert: ExpertId::new(3, 8).unwrap() }
    }

    fn loader(runtime: Handle) -> Loader {
        let (compute, dtype, fingerprint) = (Compute::F32, WeightDType::Native, Fingerprint::new([1; 32]));
        let store = Arc::new(CpuStore::new(ExpertSet::new(16, compute, dtype), 1 << 20));
        let holder = Arc::new(Holder::new(store, [].into(), Instant::now()));
        let config = ServerConfig {
            shape: Shape::new(vec![8]),
            hidden: NonZeroU32::new(16).unwrap(),
            top_k: NonZeroU32::MIN,
            queue: NonZeroUsize::MIN,
            streams: NonZeroUsize::MIN,
            max_deadline: PATIENCE,
            busy_poll: Duration::ZERO,
            fetch_rate: NonZeroUsize::MIN,
        };
        let description = Description {
            worker: WorkerId::new("w").unwrap(),
            fingerprint,
            numerics: NumericsClass::CpuCanonical,
            compute,
            experts: dtype,
            epoch: Epoch::new(1),
            holdings: Vec::new(),
            digests: Vec::new(),
            resident_bytes: 0,
            phase: Phase::Serving,
            max_rows: NonZeroU32::MIN,
            capacity: 1 << 20,
            speed: Speed::ONE,
            domain: None,
            loading: 0,
            useful: None,
            full: None,
            trouble: None,
        };
        let (server, _) = ExpertServer::new(&config, description, holder.clone());
        let packings = [Packing::F32; 3];
        let form = ExpertForm { hidden: 16, intermediate: 16, packings, gating: Gating::Silu, biases: false };
        let forms = vec![Some(form)];
        let sources = Sources { checkpoint: None, routers: Vec::new(), fingerprint, compute, dtype, forms };
        Loader { holder, server, sources, runtime, dialer: Dialer::default() }
    }

    #[test]
    fn a_stop_ends_a_fetch_and_nobody_else_is_asked() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let silent = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let next = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        next.set_nonblocking(true).unwrap();
        let loader = loader(runtime.handle().clone());
        let holder = loader.holder.clone();
        holder.assign(Assignment {
            router: RouterName::new("r").unwrap(),
            term: NonZeroU64::MIN,
            operation: NonZeroU64::MIN,
            seen: Epoch::new(1),
            keep: Vec::new(),
            load: vec![Load { key: key(), peers: vec![0, 1], digest: None }],
            peers: [silent.local_addr(), next.local_addr()].map(|peer| peer.unwrap().to_string()).to_vec(),
        });
        let loading = std::thread::spawn(move || loader.run());
        let asked = runtime.block_on(async { tokio::time::timeout(PATIENCE, silent.accept()).await });
        let _says_nothing = asked.expect("the first is asked").unwrap();
        holder.stop();
        loading.join().expect("the loader ends");
        let error = next.accept().expect_err("the next one was asked although all was over");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
}
