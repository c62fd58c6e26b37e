//! The routers and the connections to them.
//!
//! A connection is made at its first use and again after it broke. The router that served last is tried first.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use muster_net::{Asked, Mismatch, mismatch};
use muster_proto::cluster::v1::cluster_client::ClusterClient;
use muster_proto::cluster::v1::{StatusReply, StatusRequest};
use muster_proto::v1::inference_client::InferenceClient;
use muster_proto::v1::{GetModelRequest, Model, TokenizeRequest};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

use crate::attempts::Attempts;
use crate::credentials::{Bearer, Credentials};
use crate::error::ClientError;
use crate::policy::Policy;
use crate::trouble::{Trouble, cause_of, root_cause};

/// A connection that carries a call is pinged this often, and given up when an answer takes as long: a router that
/// vanished without a word is noticed after twice this time.
const PING: Duration = Duration::from_secs(5);

/// Some routers that serve the same model. Cheap to clone; all clones share their connections.
#[derive(Debug, Clone)]
pub struct Client {
    routers: Arc<[Router]>,
    /// Index of the router to try first.
    preferred: Arc<AtomicUsize>,
    policy: Policy,
}

#[derive(Debug)]
struct Router {
    url: String,
    wire: Wire,
    /// Set once it answered, or its protocol was checked.
    is_known: AtomicBool,
    /// The other protocol there, if one was detected.
    mismatch: OnceLock<Mismatch>,
}

impl Router {
    fn new(url: String, wire: Wire) -> Self {
        Self { url, wire, is_known: AtomicBool::new(false), mismatch: OnceLock::new() }
    }

    /// Checks for another protocol there, given the error: once, and only if no router ever answered.
    async fn look(&self, cause: &str) -> Option<ClientError> {
        if !self.is_known.swap(true, Ordering::Relaxed)
            && let Some(found) = mismatch_at(&self.url, cause).await
        {
            self.mismatch.get_or_init(|| found);
        }
        let mismatch = *self.mismatch.get()?;
        Some(ClientError::Mismatch { router: self.url.clone(), mismatch })
    }
}

/// A connection with this client's credentials.
pub(crate) type Wire = InterceptedService<Channel, Bearer>;

impl Client {
    /// A client of the routers at these addresses (`host:port` or `http://host:port`), in order of preference. At least
    /// one of them has to answer now.
    ///
    /// # Errors
    /// When an address cannot be used, or nobody answers.
    pub async fn connect(addresses: &[String], policy: Policy) -> Result<Self, ClientError> {
        Self::connect_as(&Credentials::default(), addresses, policy).await
    }

    /// As [`Self::connect`], with credentials.
    ///
    /// # Errors
    /// When an address cannot be used, or nobody answers.
    pub async fn connect_as(
        credentials: &Credentials,
        addresses: &[String],
        policy: Policy,
    ) -> Result<Self, ClientError> {
        let bearer = credentials.bearer()?;
        let endpoints: Vec<(String, Endpoint)> = addresses
            .iter()
            .map(|address| endpoint(address, credentials, &policy))
            .collect::<Result<_, _>>()?;
        let mut routers: Vec<Router> = Vec::with_capacity(endpoints.len());
        for (url, endpoint) in &endpoints {
            let wire = InterceptedService::new(endpoint.connect_lazy(), bearer.clone());
            routers.push(Router::new(url.clone(), wire));
        }
        let (mut reason, mut other) = ("none is named".to_owned(), None);
        for (at, (url, endpoint)) in endpoints.iter().enumerate() {
            match endpoint.connect().await {
                Ok(channel) => {
                    if let Some(router) = routers.get_mut(at) {
                        router.wire = InterceptedService::new(channel, bearer);
                    }
                    let preferred = Arc::new(AtomicUsize::new(at));
                    return Ok(Self { routers: routers.into(), preferred, policy });
                }
                Err(error) => {
                    reason = root_cause(&error);
                    tracing::debug!(router = %url, %reason, "no connection");
                    if let (None, Some(router)) = (&other, routers.get(at)) {
                        other = router.look(&reason).await;
                    }
                }
            }
        }
        if let Some(other) = other {
            return Err(other);
        }
        let routers: Vec<&str> = endpoints.iter().map(|(url, _)| url.as_str()).collect();
        Err(ClientError::Unreachable { routers: routers.join(", "), reason })
    }

    /// The model that the routers serve.
    ///
    /// # Errors
    /// When no router answers in time.
    pub async fn model(&self) -> Result<Model, ClientError> {
        self.call(|mut client| async move { client.get_model(GetModelRequest {}).await }).await
    }

    /// Each router's address, with its view of the cluster or its error.
    pub async fn statuses(&self) -> Vec<(String, Result<StatusReply, ClientError>)> {
        let mut statuses = Vec::new();
        for router in self.routers.iter() {
            let mut client = ClusterClient::new(router.wire.clone());
            let asked = tokio::time::timeout(self.policy.answer, client.status(StatusRequest {})).await;
            let status = match asked {
                Ok(Ok(reply)) => Ok(reply.into_inner()),
                Ok(Err(status)) => match router.look(&cause_of(&status)).await {
                    Some(other) => Err(other),
                    None => Err(ClientError::of(&status, &router.url)),
                },
                Err(_) => Err(ClientError::Unreachable {
                    routers: router.url.clone(),
                    reason: format!("no answer within {:?}", self.policy.answer),
                }),
            };
            statuses.push((router.url.clone(), status));
        }
        statuses
    }

    /// Token ids of a text, as a router would use them for a prompt.
    ///
    /// # Errors
    /// When the text is refused, or no router answers in time.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<u32>, ClientError> {
        let request = TokenizeRequest { text: text.to_owned(), without_special: false };
        let tokenize = |mut client: InferenceClient<Wire>| {
            let request = request.clone();
            async move { client.tokenize(request).await }
        };
        Ok(self.call(tokenize).await?.ids)
    }

    /// Tries one router after the other.
    async fn call<T, F>(&self, ask: impl Fn(InferenceClient<Wire>) -> F) -> Result<T, ClientError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut attempts = self.attempts();
        let mut at = self.preferred();
        loop {
            let trouble = match tokio::time::timeout(self.policy.answer, ask(self.inference(at))).await {
                Ok(Ok(answer)) => {
                    self.prefer(at);
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) => status.into(),
                Err(_) => Trouble::passing(format!("no answer within {:?}", self.policy.answer)),
            };
            let (reason, hint) = match trouble {
                Trouble::Final(status) => return Err(ClientError::of(&status, self.url(at))),
                Trouble::Passing { reason, hint } => (reason, hint),
            };
            if let Some(other) = self.others(at, &reason).await {
                return Err(other);
            }
            let Some(next) = attempts.failed(Instant::now(), hint) else {
                return Err(ClientError::Unreachable { routers: self.url(at).to_owned(), reason });
            };
            tokio::time::sleep_until(next.into()).await;
            at = self.after(at);
        }
    }

    pub(crate) const fn policy(&self) -> &Policy {
        &self.policy
    }

    pub(crate) fn attempts(&self) -> Attempts {
        Attempts::new(self.routers.len(), &self.policy)
    }

    pub(crate) fn count(&self) -> usize {
        self.routers.len()
    }

    /// The router to try first.
    pub(crate) fn preferred(&self) -> usize {
        self.preferred.load(Ordering::Relaxed)
    }

    /// The other protocol at this router's address, once every address has one.
    pub(crate) async fn others(&self, at: usize, cause: &str) -> Option<ClientError> {
        let other = self.router(at).look(cause).await?;
        self.routers.iter().all(|router| router.mismatch.get().is_some()).then_some(other)
    }

    /// Records that this router serves.
    pub(crate) fn prefer(&self, at: usize) {
        self.router(at).is_known.store(true, Ordering::Relaxed);
        self.preferred.store(at, Ordering::Relaxed);
    }

    /// The router to try after this one.
    pub(crate) fn after(&self, at: usize) -> usize {
        (at + 1) % self.routers.len().max(1)
    }

    pub(crate) fn url(&self, at: usize) -> &str {
        &self.router(at).url
    }

    pub(crate) fn inference(&self, at: usize) -> InferenceClient<Wire> {
        InferenceClient::new(self.router(at).wire.clone())
    }

    fn router(&self, at: usize) -> &Router {
        // There is at least one, for one has answered; and indices come from `preferred` and `after`.
        &self.routers[at % self.routers.len()]
    }
}

async fn mismatch_at(url: &str, cause: &str) -> Option<Mismatch> {
    let uri = url.parse::<Uri>().ok()?;
    let (asked, port) =
        if uri.scheme_str() == Some("https") { (Asked::Tls, 443) } else { (Asked::Plain, 80) };
    let authority = format!("{}:{}", uri.host()?, uri.port_u16().unwrap_or(port));
    mismatch(&authority, asked, cause).await
}

fn endpoint(
    address: &str,
    credentials: &Credentials,
    policy: &Policy,
) -> Result<(String, Endpoint), ClientError> {
    let url = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let refused = |reason: String| ClientError::Address { address: address.to_owned(), reason };
    let endpoint = Endpoint::from_shared(url.clone()).map_err(|error| refused(error.to_string()))?;
    let endpoint = match endpoint.uri().scheme_str() {
        Some("http") => endpoint,
        Some("https") => {
            endpoint.tls_config(credentials.tls()).map_err(|error| refused(root_cause(&error)))?
        }
        _ => return Err(refused("this is neither http:// nor https://".into())),
    };
    let endpoint = endpoint
        .connect_timeout(policy.connect)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    Ok((url, endpoint))
}
