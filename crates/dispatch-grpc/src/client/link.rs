//! One worker's link: connect, check, open the streams, carry replies, and reconnect when it breaks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_engine::delivery::{Arrived, Ended, Hop};
use muster_proto::WireError;
use muster_proto::convert::RouterName;
use muster_proto::description::Description;
use muster_proto::expert::v1;
use muster_proto::expert::v1::experts_client::ExpertsClient;
use muster_proto::handshake::{HandshakeError, LANES, Terms, agree};
use muster_proto::limits::MessageLimits;
use muster_proto::reply::Reply;
use muster_proto::version::WITH_DIGESTS;
use muster_types::Combine;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::control::Control;
use super::digests::Digests;
use super::error::LinkError;
use super::links::{Links, StreamKey};
use super::outputs::WireRows;
use crate::address::Address;
use crate::transport::{self, Dialer};

/// Longest time of each step of opening a link, absolute and in multiples of the pause before it: short after short pauses, so
/// that a healed network is found soon; longer later, so that a slow worker is found too.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
const STEP_IN_PAUSES: u32 = 20;
/// Time for a sign of life of a worker in doubt. It doubles with each link that ends soon, so that a worker which is only slow
/// gets something done.
const SIGN_OF_LIFE: Duration = Duration::from_millis(600);
const LONGEST_SIGN: Duration = Duration::from_secs(5);
/// Shorter links ended soon.
const LASTED: Duration = Duration::from_secs(60);
/// Links in a row that end soon without an output, from which on the worker is banned, longer each time.
const MOST_USELESS: u32 = 4;
/// Shards written to a stream and not yet taken by the transport.
const SEND_QUEUE: usize = 16;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Configuration that all links of a router share.
pub(super) struct LinkConfig {
    pub(super) terms: Terms,
    pub(super) router: RouterName,
    pub(super) max_rows: u32,
    pub(super) experts: Vec<u32>,
    pub(super) limits: MessageLimits,
    pub(super) combine: Combine,
    pub(super) dialer: Dialer,
    /// Expected digests of the experts' weights.
    pub(super) digests: Digests,
}

/// Keeps a worker connected, for as long as it is polled.
pub(super) async fn keep(peer: usize, links: Arc<Links>, config: Arc<LinkConfig>) {
    let Some(address) = links.address(peer) else { return };
    config.digests.settled().await;
    let (mut pause, mut sign, mut useless) = (FIRST_PAUSE, SIGN_OF_LIFE, 0);
    loop {
        let mut unverified = 0;
        let opened = match open(&address, &config, (pause * STEP_IN_PAUSES).min(STEP_TIMEOUT)).await {
            Ok(link) => {
                unverified = link.description.holdings.len() - link.description.digests.len();
                links
                    .up(peer, link.description, link.senders, link.control)
                    .map(|hop| (hop, link.client, link.inbound, link.watch))
            }
            Err(error) => Err(error),
        };
        tell(&config.digests, peer, opened.as_ref().map(|_| ()));
        match opened {
            Ok((hop, client, inbound, watch)) => {
                tracing::info!(%address, "worker connected");
                if unverified > 0 {
                    tracing::warn!(%address, experts = unverified, "its weights are not verified: it runs a version that tells no digests; upgrade it");
                }
                pause = FIRST_PAUSE;
                let since = Instant::now();
                let mut tasks = JoinSet::new();
                tasks.spawn(ask_in_doubt(hop, client, links.clone(), sign));
                let ended = carry(hop, tasks, inbound, watch, &links, &config).await;
                tracing::warn!(%address, ?ended, "worker lost");
                metrics::counter!("muster_dispatch_links_lost_total").increment(1);
                useless = if links.is_useful(peer) || since.elapsed() >= LASTED { 0 } else { useless + 1 };
                if matches!(ended, Ended::Lied(_)) || useless >= MOST_USELESS {
                    links.strike(peer);
                }
                links.down(hop, ended);
                sign = if since.elapsed() < LASTED { (sign * 2).min(LONGEST_SIGN) } else { SIGN_OF_LIFE };
            }
            Err(error) => {
                tracing::debug!(%address, %error, "worker not connected");
                links.unreachable(peer, error);
            }
        }
        if links.forget_peer(peer) {
            config.digests.note(peer, Ok(()));
            tracing::info!(%address, "worker left");
            return;
        }
        tokio::time::sleep(pause.max(links.banned_for(peer))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Records a worker's digest comparison, and logs a refusal once.
fn tell(digests: &Digests, peer: usize, outcome: Result<(), &LinkError>) {
    let is_news = digests.note(peer, outcome);
    if is_news && let Err(error) = outcome {
        tracing::error!(%error, "worker refused");
        metrics::counter!("muster_dispatch_workers_refused_total").increment(1);
    }
}

struct Link {
    client: ExpertsClient<Channel>,
    description: Description,
    senders: [mpsc::Sender<v1::DispatchRequest>; LANES],
    inbound: [Streaming<v1::DispatchReply>; LANES],
    watch: Streaming<v1::WorkerDescription>,
    control: Control,
}

async fn step<T>(
    patience: Duration,
    work: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    tokio::time::timeout(patience, work).await.unwrap_or(Err(LinkError::Silent(patience)))
}

async fn open(address: &Address, config: &LinkConfig, patience: Duration) -> Result<Link, LinkError> {
    let began = Instant::now();
    let opened = attempt(address, config, patience).await;
    // A silent peer shows no protocol to report.
    if began.elapsed() < patience
        && let Err(LinkError::Unreachable(cause) | LinkError::NotAWorker(cause)) = &opened
        && let Some(instead) = config.dialer.instead(address, cause).await
    {
        return Err(LinkError::Other(instead));
    }
    opened
}

async fn attempt(address: &Address, config: &LinkConfig, patience: Duration) -> Result<Link, LinkError> {
    let channel = step(patience, async {
        let unreachable =
            |error: tonic::transport::Error| LinkError::Unreachable(transport::root_cause(&error));
        config.dialer.connect(address, patience).await.map_err(unreachable)
    })
    .await?;
    let experts = config.experts.iter().map(|&count| count as usize).sum();
    let control = Control::new(channel.clone())
        .max_decoding_message_size(MessageLimits::description_bytes(experts))
        .max_encoding_message_size(MessageLimits::assignment_bytes(experts));
    let mut client = ExpertsClient::new(channel)
        .max_decoding_message_size(config.limits.reply_bytes.max(MessageLimits::description_bytes(experts)))
        .max_encoding_message_size(config.limits.request_bytes);
    let described = step(patience, async {
        let reply = client.describe(v1::DescribeRequest {}).await.map_err(|status| refused(&status))?;
        Ok(reply.into_inner())
    })
    .await?;
    let description = check(&described, config)?;
    let (first, first_in) = step(patience, open_lane(&mut client, config, &description, 0)).await?;
    let (second, second_in) = step(patience, open_lane(&mut client, config, &description, 1)).await?;
    let watch = step(patience, async {
        Ok(client.watch(v1::DescribeRequest {}).await.map_err(|status| refused(&status))?.into_inner())
    })
    .await?;
    let (senders, inbound) = ([first, second], [first_in, second_in]);
    Ok(Link { client, description, senders, inbound, watch, control })
}

/// Checks whether a worker with this description can work with this router.
fn check(described: &v1::WorkerDescription, config: &LinkConfig) -> Result<Description, LinkError> {
    config.terms.check_worker(described)?;
    let description = Description::parse(described, &config.experts).map_err(HandshakeError::Wire)?;
    let (ours, theirs) = (config.max_rows, description.max_rows.get());
    if theirs < ours {
        return Err(LinkError::MaxRows { ours, theirs });
    }
    let tells = agree(described.protocol_version, described.newest_protocol_version)? >= WITH_DIGESTS;
    if tells && description.digests.len() != description.holdings.len() {
        return Err(HandshakeError::Wire(WireError::Missing("held.digests")).into());
    }
    config.digests.compare(&description)?;
    Ok(description)
}

type Lane = (mpsc::Sender<v1::DispatchRequest>, Streaming<v1::DispatchReply>);

async fn open_lane(
    client: &mut ExpertsClient<Channel>,
    config: &LinkConfig,
    description: &Description,
    lane: u32,
) -> Result<Lane, LinkError> {
    let (sender, outbound) = mpsc::channel(SEND_QUEUE);
    let hello = config.terms.to_hello(&config.router, lane, config.combine, description.numerics);
    let message = v1::DispatchRequest { body: Some(v1::dispatch_request::Body::Hello(hello)) };
    // The channel is empty and its receiver is right here.
    let _ = sender.send(message).await;
    let reply = client.dispatch(ReceiverStream::new(outbound)).await.map_err(|status| refused(&status))?;
    let mut inbound = reply.into_inner();
    let first = inbound.message().await.map_err(|status| refused(&status))?;
    let first = first.ok_or_else(|| LinkError::Unreachable("it closed a stream before its ack".into()))?;
    match Reply::parse(first).map_err(HandshakeError::Wire)? {
        Reply::Ack { worker, .. } if worker == description.worker => Ok((sender, inbound)),
        Reply::Ack { worker, .. } => {
            let reason = format!("it describes itself as {} and answers as {worker}", description.worker);
            Err(LinkError::NotAWorker(reason))
        }
        Reply::Answer { .. } => Err(LinkError::NotAWorker("it answered a shard before its ack".into())),
    }
}

/// Asks a worker in doubt for signs of life, and returns when one is missing: its network may be silently gone.
async fn ask_in_doubt(
    hop: Hop,
    mut client: ExpertsClient<Channel>,
    links: Arc<Links>,
    patience: Duration,
) -> Ended {
    while links.doubted(hop).await {
        let asked = client.describe(v1::DescribeRequest {});
        match tokio::time::timeout(patience, asked).await {
            Ok(Ok(_)) => {
                links.is_alive(hop);
                tokio::time::sleep(patience).await;
            }
            Ok(Err(status)) => return Ended::Gone(describe(&status)),
            Err(_) => return Ended::Gone(format!("gave no sign of life within {patience:?}")),
        }
    }
    Ended::Gone("its session is over".into())
}

/// Carries replies and announcements to the links until one of the streams, or of the `tasks` beside them, ends.
async fn carry(
    hop: Hop,
    mut tasks: JoinSet<Ended>,
    inbound: [Streaming<v1::DispatchReply>; LANES],
    mut watch: Streaming<v1::WorkerDescription>,
    links: &Arc<Links>,
    config: &Arc<LinkConfig>,
) -> Ended {
    // Dropping the set aborts its tasks, which resets the other streams.
    for (lane, inbound) in inbound.into_iter().enumerate() {
        let (links, config) = (links.clone(), config.clone());
        tasks.spawn(receive(StreamKey { hop, lane }, inbound, links, config));
    }
    let (links, config) = (links.clone(), config.clone());
    tasks.spawn(async move {
        let mut known = links.announced(hop.link);
        loop {
            let message = match next(&mut watch).await {
                Ok(message) => message,
                Err(ended) => return ended,
            };
            match check(&message, &config).and_then(|new| news(known.as_deref(), new)) {
                Ok(Some(new)) => {
                    known = Some(Arc::clone(&new));
                    links.announce(hop.link, new);
                }
                Ok(None) => {}
                Err(error) => {
                    tell(&config.digests, hop.link, Err(&error));
                    return Ended::Lied(error.to_string());
                }
            }
        }
    });
    match tasks.join_next().await {
        Some(Ok(ended)) => ended,
        Some(Err(error)) => Ended::Gone(format!("its task failed: {error}")),
        None => Ended::Gone("its tasks ended".into()),
    }
}

/// A worker's announcement, if it differs from the last. The name must stay.
fn news(known: Option<&Description>, new: Description) -> Result<Option<Arc<Description>>, LinkError> {
    match known {
        Some(known) if *known == new => Ok(None),
        Some(known) if known.worker != new.worker => {
            let (before, now) = (&known.worker, &new.worker);
            Err(LinkError::NotAWorker(format!("it was called {before} and calls itself {now}")))
        }
        _ => Ok(Some(Arc::new(new))),
    }
}

async fn receive(
    stream: StreamKey,
    mut inbound: Streaming<v1::DispatchReply>,
    links: Arc<Links>,
    config: Arc<LinkConfig>,
) -> Ended {
    let (hidden, wire) = (config.terms.hidden as usize, config.terms.compute.wire_dtype());
    loop {
        let message = match next(&mut inbound).await {
            Ok(message) => message,
            Err(ended) => return ended,
        };
        let delivered = match Reply::parse(message) {
            Ok(Reply::Answer { id, outcome, timing }) => {
                let outcome = outcome.map(|rows| Arrived {
                    outputs: WireRows::new(rows, hidden, wire),
                    compute: timing.compute,
                    at: Instant::now(),
                });
                links.deliver(stream, id.get(), outcome)
            }
            Ok(Reply::Ack { .. }) => Err("it acknowledged a stream twice".into()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(reason) = delivered {
            metrics::counter!("muster_dispatch_bad_replies_total").increment(1);
            return Ended::Lied(reason);
        }
    }
}

async fn next<T>(stream: &mut Streaming<T>) -> Result<T, Ended> {
    match stream.message().await {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(Ended::Gone("it closed a stream".into())),
        // Errors raised on this side, such as a message over the limit or one that cannot be decoded, have these two codes.
        Err(status) if matches!(status.code(), Code::OutOfRange | Code::Internal) => {
            Err(Ended::Lied(describe(&status)))
        }
        Err(status) => Err(Ended::Gone(describe(&status))),
    }
}

fn refused(status: &Status) -> LinkError {
    let text = describe(status);
    // A status with a source is no worker's: the connection broke, and its library chose the code.
    let is_said = std::error::Error::source(status).is_none();
    match status.code() {
        Code::PermissionDenied if !is_said => LinkError::NotAWorker(text),
        Code::FailedPrecondition | Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated => {
            LinkError::Refused(text)
        }
        Code::Unimplemented | Code::Internal | Code::OutOfRange => LinkError::NotAWorker(text),
        _ => LinkError::Unreachable(text),
    }
}

/// Code, message and cause in one line of bounded length.
fn describe(status: &Status) -> String {
    let mut text = status.code().to_string();
    if !status.message().is_empty() {
        text = format!("{}: {text}", status.message());
    }
    if let Some(source) = std::error::Error::source(status) {
        text = format!("{text} ({})", transport::root_cause(source));
    }
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(256).map(printable).collect()
}
