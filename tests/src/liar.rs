//! A dishonest worker: forwards everything to a real worker and, once it begins, corrupts the answers. Also a worker of
//! another numerics class, whose outputs differ in bits.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use muster_proto::expert::v1;
use muster_proto::expert::v1::dispatch_reply::Body;
use muster_proto::expert::v1::dispatch_request::Body as RequestBody;
use muster_proto::expert::v1::experts_client::ExpertsClient;
use muster_proto::expert::v1::experts_server::{Experts, ExpertsServer};
use muster_proto::expert::v1::shard_error::Code;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

/// More than any message of the tests' models.
const MESSAGE_BYTES: usize = 64 << 20;

/// Kind of a corrupted answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// A value that is NaN.
    NotANumber,
    /// A row is missing.
    RowMissing,
    /// A row too many.
    RowTooMany,
    /// The id of a shard that was never sent.
    IdOfNone,
    /// The id of another worker's shard, or of one answered before.
    IdOfAnother,
    /// Every output is marked as not finite.
    Marks,
    /// The lowest bit of every 4-byte element is flipped, which is legitimate in another numerics class.
    OtherBits,
    /// An error of this code, about no expert or about this one.
    Error(Code, Option<u32>),
}

impl Lie {
    /// Corrupted outputs.
    pub const OUTPUTS: [Self; 6] = [
        Self::NotANumber,
        Self::RowMissing,
        Self::RowTooMany,
        Self::IdOfNone,
        Self::IdOfAnother,
        Self::Marks,
    ];

    /// Errors instead of outputs.
    pub const ERRORS: [Self; 8] = [
        Self::Error(Code::NotHeld, None),
        Self::Error(Code::Draining, None),
        Self::Error(Code::Overloaded, None),
        Self::Error(Code::BadRequest, None),
        Self::Error(Code::Deadline, None),
        Self::Error(Code::NonFinite, None),
        Self::Error(Code::NonFinite, Some(1)),
        Self::Error(Code::Internal, None),
    ];

    fn tell(self, reply: &mut v1::DispatchReply) {
        let Some(Body::Rows(rows)) = &mut reply.body else { return };
        let row = rows.data.len() / (rows.rows as usize).max(1);
        let mut data = rows.data.to_vec();
        match self {
            // With 2-byte elements this covers two values.
            Self::NotANumber => data[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            Self::RowMissing => {
                rows.rows -= 1;
                data.truncate(data.len() - row);
            }
            Self::RowTooMany => {
                rows.rows += 1;
                data.extend_from_within(..row);
            }
            Self::IdOfNone => reply.id += 1 << 32,
            Self::IdOfAnother => reply.id -= 1,
            Self::OtherBits => data.chunks_mut(4).for_each(|element| element[0] ^= 1),
            Self::Marks => rows.not_finite = (0..rows.rows).collect(),
            Self::Error(code, expert) => {
                let error = v1::ShardError { code: code.into(), message: "a lie".into(), expert };
                reply.body = Some(Body::Error(error));
                return;
            }
        }
        rows.data = data.into();
    }
}

/// A running liar. Its connections end when it is dropped.
pub struct Liar {
    /// `host:port` where it listens.
    pub address: String,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

struct Shared {
    name: String,
    /// The announced numerics class, if not the real worker's.
    class: Option<v1::NumericsClass>,
    honest: ExpertsClient<Channel>,
    lies: AtomicBool,
    kinds: &'static [Lie],
    /// Index of the next lie.
    next: AtomicUsize,
    told: Vec<AtomicU64>,
}

impl Liar {
    /// Starts a worker named `name` in front of the one at `honest`; it will use `lies` in turn, from `first` on.
    ///
    /// # Errors
    /// When it cannot listen, or the real worker cannot be reached.
    pub async fn start(name: &str, honest: &str, lies: &'static [Lie], first: usize) -> io::Result<Self> {
        Self::of(name, None, honest, lies, first).await
    }

    /// Starts a worker named `name` of numerics class `class` in front of the one at `honest`, which rounds to f32.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn of_class(name: &str, class: v1::NumericsClass, honest: &str) -> io::Result<Self> {
        let device = Self::of(name, Some(class), honest, &[Lie::OtherBits], 0).await?;
        device.begin();
        Ok(device)
    }

    async fn of(
        name: &str,
        class: Option<v1::NumericsClass>,
        honest: &str,
        lies: &'static [Lie],
        first: usize,
    ) -> io::Result<Self> {
        let channel = ExpertsClient::connect(format!("http://{honest}")).await.map_err(io::Error::other)?;
        let honest =
            channel.max_decoding_message_size(MESSAGE_BYTES).max_encoding_message_size(MESSAGE_BYTES);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            class,
            honest,
            lies: AtomicBool::new(false),
            kinds: lies,
            next: AtomicUsize::new(first),
            told: lies.iter().map(|_| AtomicU64::new(0)).collect(),
        });
        let service = ExpertsServer::new(Service(Arc::clone(&shared)))
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES);
        let server =
            Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
        let serving = tokio::spawn(async {
            let _ = server.await;
        });
        Ok(Self { address, shared, serving })
    }

    /// Corrupts every answer from now on.
    pub fn begin(&self) {
        self.shared.lies.store(true, Ordering::Relaxed);
    }

    /// Number of times that each lie was told.
    #[must_use]
    pub fn told(&self) -> Vec<u64> {
        self.shared.told.iter().map(|told| told.load(Ordering::Relaxed)).collect()
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Shared {
    fn spoil(&self, reply: &mut v1::DispatchReply) {
        match &mut reply.body {
            Some(Body::Ack(ack)) => ack.worker_id.clone_from(&self.name),
            Some(Body::Rows(_)) if self.lies.load(Ordering::Relaxed) => {
                let number = self.next.fetch_add(1, Ordering::Relaxed) % self.kinds.len();
                self.kinds[number].tell(reply);
                self.told[number].fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    fn named(&self, mut description: v1::WorkerDescription) -> v1::WorkerDescription {
        description.worker_id.clone_from(&self.name);
        if let Some(class) = self.class {
            description.set_numerics(class);
        }
        description
    }

    /// The greeting for the real worker.
    fn greeting(&self, mut request: v1::DispatchRequest) -> v1::DispatchRequest {
        if let Some(RequestBody::Hello(hello)) = &mut request.body
            && self.class.is_some()
        {
            hello.set_numerics(v1::NumericsClass::CpuCanonical);
        }
        request
    }
}

struct Service(Arc<Shared>);

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Experts for Service {
    async fn describe(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::WorkerDescription>, Status> {
        let described = self.0.honest.clone().describe(request.into_inner()).await?;
        Ok(Response::new(self.0.named(described.into_inner())))
    }

    type WatchStream = Replies<v1::WorkerDescription>;

    async fn watch(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let watched = self.0.honest.clone().watch(request.into_inner()).await?.into_inner();
        let shared = Arc::clone(&self.0);
        Ok(Response::new(Box::pin(watched.map(move |described| described.map(|d| shared.named(d))))))
    }

    type DispatchStream = Replies<v1::DispatchReply>;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::DispatchRequest>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        // A stream that breaks on the router's side ends on the real worker's side.
        let shared = Arc::clone(&self.0);
        let shards = request.into_inner().map_while(move |shard| Some(shared.greeting(shard.ok()?)));
        let replies = self.0.honest.clone().dispatch(shards).await?.into_inner();
        let shared = Arc::clone(&self.0);
        Ok(Response::new(Box::pin(replies.map(move |reply| {
            reply.map(|mut reply| {
                shared.spoil(&mut reply);
                reply
            })
        }))))
    }
}
