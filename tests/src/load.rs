//! Continuous load: 32 concurrent streams that repeat their requests, and every answer compared with the undisturbed
//! one. So a fault and its consequences may take any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use muster_client::{Client, Event, Policy};
use muster_proto::v1::GenerateRequest;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::client::{generate, greedy};
use crate::cluster::{Cluster, Setup};
use crate::demo_model;
use crate::disturbed;
use crate::process::eventually;

/// Tokens after which a stream counts as well under way.
const UNDER_WAY: usize = 10;

/// Requests, with their undisturbed outputs.
#[derive(Clone)]
pub struct Work(pub(crate) Arc<Vec<(GenerateRequest, Vec<u32>)>>);

impl Work {
    /// Runs each of these requests alone on `cluster`.
    ///
    /// # Panics
    /// When one fails.
    pub async fn alone(cluster: &Cluster, requests: Vec<GenerateRequest>) -> Self {
        let client = cluster.client().await;
        let mut known = Vec::new();
        for request in requests {
            let ids = generate(&client, request.clone()).await.expect("undisturbed").remove(0).ids;
            known.push((request, ids));
        }
        Self(Arc::new(known))
    }

    /// Long streams of the demo model. Computed once per process, on an undisturbed cluster.
    pub async fn long() -> Self {
        static LONG: OnceCell<Work> = OnceCell::const_new();
        let run = async || {
            let cluster = Cluster::start(Setup::new(&demo_model()));
            Self::alone(&cluster, disturbed::requests()).await
        };
        LONG.get_or_init(run).await.clone()
    }

    /// Streams of a few tokens.
    pub async fn short() -> Self {
        static SHORT: OnceCell<Work> = OnceCell::const_new();
        let run = async || {
            let cluster = Cluster::start(Setup::new(&demo_model()));
            let request = |n: u32| greedy(&[6 + n * 113, 844 + n, 265], 6 + n % 5);
            Self::alone(&cluster, (0..disturbed::STREAMS).map(request).collect()).await
        };
        SHORT.get_or_init(run).await.clone()
    }
}

/// Outcome of a load. No request failed or differed.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Completed requests.
    pub requests: u64,
    /// Resumptions of streams at another router.
    pub resumed: u64,
    /// Longest time without a token for each concurrent stream, from its first request on.
    pub pauses: Vec<Duration>,
}

/// A running load.
pub struct Load {
    stop: Arc<AtomicBool>,
    ended: Arc<AtomicU64>,
    streams: JoinSet<Outcome>,
}

impl Load {
    /// Starts the load on these routers, and waits until all streams are well under way. Half of them ask the second
    /// router first, if there is one.
    ///
    /// # Panics
    /// When a router cannot be reached.
    pub async fn start(work: &Work, routers: &[String]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (under_way, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let mut streams = JoinSet::new();
        for n in 0..work.0.len() {
            let mut routers = routers.to_vec();
            let first = n % routers.len();
            routers.rotate_left(first);
            let client = Client::connect(&routers, Policy::default()).await.expect("a router listens");
            let (work, stop, under_way, ended) =
                (work.clone(), stop.clone(), under_way.clone(), ended.clone());
            streams.spawn(async move {
                let mut outcome = Outcome { pauses: vec![Duration::ZERO], ..Outcome::default() };
                while !stop.load(Ordering::SeqCst) {
                    let (request, expected) = &work.0[n];
                    let enough = if outcome.requests == 0 { UNDER_WAY.min(expected.len()) } else { 0 };
                    let ids = run(&client, request, &mut outcome, enough, &under_way).await;
                    assert_eq!(ids, *expected, "stream {n}");
                    outcome.requests += 1;
                    ended.fetch_add(1, Ordering::SeqCst);
                }
                outcome
            });
        }
        let all = work.0.len() as u64;
        eventually("all streams run", async || (under_way.load(Ordering::SeqCst) == all).then_some(())).await;
        Self { stop, ended, streams }
    }

    /// Completed requests so far.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::SeqCst)
    }

    /// Waits for `requests` more completed requests.
    pub async fn goes_on(&self, requests: u64) {
        let before = self.ended();
        eventually("requests end", async || (self.ended() >= before + requests).then_some(())).await;
    }

    /// Waits for the running requests.
    ///
    /// # Panics
    /// When a stream failed or differed.
    pub async fn finish(mut self) -> Outcome {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Outcome::default();
        while let Some(done) = self.streams.join_next().await {
            let one = done.expect("no stream fails");
            all.requests += one.requests;
            all.resumed += one.resumed;
            all.pauses.extend(one.pauses);
        }
        all
    }
}

/// Runs one request; counts in `under_way` when `enough` of its tokens have come.
async fn run(
    client: &Client,
    request: &GenerateRequest,
    outcome: &mut Outcome,
    enough: usize,
    under_way: &AtomicU64,
) -> Vec<u32> {
    let mut last = Instant::now();
    let mut generation = client.generate(request.clone()).await.expect("it is taken");
    let (mut ids, mut finished) = (Vec::new(), 0);
    while let Some(event) = generation.next().await.expect("the stream goes on") {
        match event {
            Event::Token(frame) => {
                assert_eq!(frame.index as usize, ids.len(), "token indices have no gaps");
                ids.push(frame.token_id);
                let now = Instant::now();
                let pause = now - std::mem::replace(&mut last, now);
                outcome.pauses[0] = outcome.pauses[0].max(pause);
                if ids.len() == enough {
                    under_way.fetch_add(1, Ordering::SeqCst);
                }
            }
            Event::Finished(_) => finished += 1,
        }
    }
    assert_eq!(finished, 1, "every stream ends once");
    outcome.resumed += u64::from(generation.resumed());
    ids
}
