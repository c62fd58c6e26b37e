//! Serves weights to processes that fetch experts.
//!
//! Always holds: the number of fetches at a time and the bytes a second are bounded, so that experts' compute does not
//! suffer; weights that are sent to their end have the digest that they were loaded with.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use muster_proto::control::{Fetch, Seal};
use muster_proto::expert::v1;
use muster_proto::expert::v1::weights_server::{Weights, WeightsServer};
use muster_types::{Compute, ExpertKey, Fingerprint, WeightDType, WeightDigest, WeightHasher};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Bytes of one message.
const PART: usize = 256 << 10;
/// Prepared parts that are not sent yet.
const PARTS_AHEAD: usize = 2;
/// Experts sent at the same time.
const FETCHES: usize = 2;

/// A source of packed experts.
pub trait WeightSource: Send + Sync {
    /// An expert, if held. May take as long as a read from disk.
    fn get(&self, key: ExpertKey) -> Option<Handed>;
}

/// An expert to send.
#[derive(Clone)]
pub struct Handed {
    /// Its packed matrices and then its biases, gate, up and down each time.
    pub packed: [Bytes; 6],
    /// Expected digest of its weights; `None` if not known.
    pub digest: Option<WeightDigest>,
}

/// Description of a process's weights.
#[derive(Debug, Clone)]
pub struct WeightTerms {
    /// The model.
    pub fingerprint: Fingerprint,
    /// What it rounds activations to.
    pub compute: Compute,
    /// How it holds experts.
    pub experts: WeightDType,
    /// Routed experts of every layer.
    pub shape: Vec<u32>,
    /// Bytes a second that are sent, all fetches together.
    pub rate: NonZeroUsize,
}

/// The gRPC service of a source of weights. Clones share one state.
#[derive(Clone)]
pub struct WeightsService {
    terms: Arc<WeightTerms>,
    source: Arc<dyn WeightSource>,
    places: Arc<Semaphore>,
}

impl WeightsService {
    /// A service over `source`.
    #[must_use]
    pub fn new(terms: WeightTerms, source: Arc<dyn WeightSource>) -> Self {
        Self { terms: Arc::new(terms), source, places: Arc::new(Semaphore::new(FETCHES)) }
    }

    /// For a gRPC server.
    #[must_use]
    pub fn into_service(self) -> WeightsServer<Self> {
        WeightsServer::new(self)
    }
}

#[tonic::async_trait]
impl Weights for WeightsService {
    type FetchStream = ReceiverStream<Result<v1::FetchReply, Status>>;

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let terms = &self.terms;
        let parsed = Fetch::parse(request.get_ref(), &terms.shape)
            .and_then(|fetch| Ok((fetch, Seal::of(request.get_ref())?)));
        let (fetch, seal) = parsed.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let differs =
            |what| Err(Status::failed_precondition(format!("{what} differs from what this process has")));
        match () {
            () if fetch.fingerprint != terms.fingerprint => return differs("the model"),
            () if fetch.compute != terms.compute => return differs("the compute mode"),
            () if fetch.experts != terms.experts => return differs("the experts' dtype"),
            () => {}
        }
        let full =
            |_| Status::resource_exhausted("as many experts as may are being fetched from here; try later");
        let place = self.places.clone().try_acquire_owned().map_err(full)?;
        let source = self.source.clone();
        let found = tokio::task::spawn_blocking(move || source.get(fetch.key)).await;
        let missing = || Status::not_found(format!("{} is not held here", fetch.key));
        let handed = found.ok().flatten().ok_or_else(missing)?;
        let rate = terms.rate.get().div_ceil(FETCHES);
        Ok(Response::new(ReceiverStream::new(send(fetch.key, handed, seal, rate, place))))
    }
}

/// Sends an expert from a thread of its own, at so many bytes a second.
fn send(
    key: ExpertKey,
    handed: Handed,
    seal: Seal,
    rate: usize,
    place: OwnedSemaphorePermit,
) -> mpsc::Receiver<Result<v1::FetchReply, Status>> {
    let (parts, receiver) = mpsc::channel(PARTS_AHEAD);
    tokio::task::spawn_blocking(move || {
        let _place = place;
        let (mut digest, mut older) = (WeightHasher::default(), (seal == Seal::Sha256).then(Sha256::new));
        let (started, mut sent) = (Instant::now(), 0_usize);
        for part in handed.packed.iter().flat_map(|bytes| bytes.chunks(PART)) {
            // Digest of the sent bytes, not of memory, which may change in between.
            let data = Bytes::copy_from_slice(part);
            digest.update(&data);
            if let Some(older) = &mut older {
                older.update(&data);
            }
            if parts.blocking_send(Ok(v1::FetchReply { data, ..v1::FetchReply::default() })).is_err() {
                // The fetch was abandoned.
                return;
            }
            sent += part.len();
            let due = Duration::from_secs_f64(sent as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
        let digest = digest.finish();
        let last = match handed.digest.filter(|expected| *expected != digest) {
            Some(expected) => {
                tracing::error!(expert = %key, %digest, %expected, "weights to be handed out are not what they must be");
                metrics::counter!("muster_experts_withheld_total").increment(1);
                let text = format!("the weights of {key} have digest {digest} here and must have {expected}");
                Err(Status::data_loss(text))
            }
            None => {
                metrics::counter!("muster_experts_sent_total").increment(1);
                Ok(match older {
                    Some(older) => {
                        let digest = older.finalize().to_vec().into();
                        v1::FetchReply { digest, ..v1::FetchReply::default() }
                    }
                    None => {
                        let weight_digest = digest.as_bytes().to_vec().into();
                        v1::FetchReply { weight_digest, ..v1::FetchReply::default() }
                    }
                })
            }
        };
        // The fetch may be abandoned.
        let _ = parts.blocking_send(last);
    });
    receiver
}
