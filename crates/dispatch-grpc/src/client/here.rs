//! Experts in the router itself, for rows that no worker can take: slow, but always there.
//!
//! To delivery they are one more worker, with the last rank. Their shards go to a thread instead of a stream, and the code
//! that workers run checks, computes and answers them, so that their bits are the same.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_engine::compute::ExpertCompute;
use muster_engine::delivery::Arrived;
use muster_proto::description::{Description, Phase};
use muster_proto::expert::v1;
use muster_proto::expert::v1::dispatch_request::Body;
use muster_proto::handshake::{LANES, Terms};
use muster_proto::reply::OutputRows;
use muster_proto::shard::{ShardRules, ShardView};
use muster_types::{Combine, Epoch, InvalidWorkerId, Speed, WorkerId};
use muster_types::{Fault, FaultKind};
use tokio::sync::mpsc;

use super::links::{Links, StreamKey};
use super::outputs::WireRows;
use crate::server::Call;

/// Name of this process among the workers. A worker of the same name is refused as any duplicate is.
const NAME: &str = "-/router/-";
/// Shards that may wait on one lane.
const WAITING: usize = 16;

/// The router's own experts.
pub struct Fallback {
    /// Every expert of the model.
    pub experts: Box<dyn ExpertCompute>,
}

/// Adds them to the links and starts their thread, which ends with the links.
pub(super) fn start(
    links: &Arc<Links>,
    terms: &Terms,
    fallback: Fallback,
    rules: ShardRules,
    combine: Combine,
) -> Result<(), std::io::Error> {
    let (lanes, mut shards): (Vec<_>, Vec<_>) = (0..LANES).map(|_| mpsc::channel(WAITING)).unzip();
    let Ok(lanes) = lanes.try_into() else { return Err(std::io::Error::other("lanes were miscounted")) };
    let description = describe(links, terms, rules.max_rows).map_err(std::io::Error::other)?;
    let epoch = description.epoch;
    let hop = links.here(description, lanes);
    // A strong reference would keep the links, and with them the lanes, for good.
    let links = Arc::downgrade(links);
    let run = move || {
        let Fallback { mut experts } = fallback;
        let mut call = Call::default();
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let Ok(runtime) = runtime else { return };
        loop {
            let next = runtime.block_on(async {
                let [first, second] = shards.as_mut_slice() else { return None };
                tokio::select! {
                    shard = first.recv() => shard.map(|shard| (0, shard)),
                    shard = second.recv() => shard.map(|shard| (1, shard)),
                }
            });
            let Some((lane, v1::DispatchRequest { body: Some(Body::Shard(shard)) })) = next else { return };
            let Some(links) = links.upgrade() else { return };
            metrics::counter!("muster_dispatch_fallback_shards_total").increment(1);
            let id = shard.id;
            let outcome = ShardView::parse(shard, &rules, combine, epoch)
                .and_then(|view| compute(&view, &mut call, &rules, experts.as_mut()))
                .map(|(rows, compute)| Arrived {
                    outputs: WireRows::new(rows, rules.hidden as usize, rules.wire),
                    compute,
                    at: Instant::now(),
                });
            // It was sent on this very lane.
            let _ = links.deliver(StreamKey { hop, lane }, id, outcome);
        }
    };
    std::thread::Builder::new().name("muster-fallback".into()).spawn(run)?;
    Ok(())
}

/// This process, as one more worker that holds everything.
fn describe(links: &Links, terms: &Terms, max_rows: NonZeroU32) -> Result<Description, InvalidWorkerId> {
    Ok(Description {
        worker: WorkerId::new(NAME)?,
        fingerprint: terms.fingerprint,
        numerics: terms.numerics,
        compute: terms.compute,
        experts: terms.experts,
        epoch: Epoch::new(1),
        holdings: links.keys(),
        digests: Vec::new(),
        resident_bytes: 0,
        phase: Phase::Serving,
        max_rows,
        capacity: 0,
        speed: Speed::ONE,
        domain: None,
        loading: 0,
        useful: None,
        full: None,
        trouble: None,
    })
}

fn compute(
    view: &ShardView,
    call: &mut Call,
    rules: &ShardRules,
    experts: &mut dyn ExpertCompute,
) -> Result<(OutputRows, Duration), Fault> {
    call.clear();
    call.admit(view, Duration::ZERO, rules)?;
    let outcome = call.run(&[view], rules, experts).pop();
    let missing = || Fault::new(FaultKind::Internal, "the experts gave nothing");
    let (outputs, compute) = outcome.ok_or_else(missing)?;
    Ok((outputs?, compute))
}
