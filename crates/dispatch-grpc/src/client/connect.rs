//! From a configuration to a delivery over gRPC: links to all workers, and the wait until they are there.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muster_engine::delivery::{Contract, Delivery};
use muster_proto::convert::RouterName;
use muster_proto::handshake::{LANES, Terms};
use muster_proto::limits::MessageLimits;
use muster_proto::shard::ShardRules;
use muster_types::NumericsClass;

use super::carrier::Carrier;
use super::cluster::ClusterHandle;
use super::config::{ConnectConfig, Start};
use super::error::ConnectError;
use super::handle::{Counted, Samples};
use super::here::{self, Fallback};
use super::link::{self, LinkConfig};
use super::links::{Gathered, Links};
use super::outputs::WireSums;
use crate::address::Address;
use crate::driver::Driver;

/// Longer times to connect are cut to this.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// Experts in other processes.
pub type GrpcDispatch = Delivery<Carrier, WireSums, Counted>;

/// Connects to all workers, checks that they fit this router and each other, and starts the thread
/// that keeps them connected while this one has other things to do. Blocks for at most the configured time, plus a
/// step in progress.
///
/// # Errors
/// See [`ConnectError`]. A worker that can never fit is an error whatever `config.start` says.
pub fn connect(config: ConnectConfig) -> Result<GrpcDispatch, ConnectError> {
    connect_with(config, None)
}

/// As [`connect`], with a fallback that computes in this process what no worker can. Experts held only by the fallback still
/// count as missing.
///
/// # Errors
/// As [`connect`].
pub fn connect_with(config: ConnectConfig, fallback: Option<Fallback>) -> Result<GrpcDispatch, ConnectError> {
    let addresses = parse_addresses(&config.workers)?;
    let peers = addresses.len();
    let router = RouterName::new(&config.router_id).map_err(ConnectError::RouterId)?;
    let experts = config.shape.experts().to_vec();
    let wire = config.compute.wire_dtype();
    let most = experts.iter().copied().max().unwrap_or(0);
    let hidden = size("hidden", config.hidden)?;
    let top_k = size("top_k", config.top_k as usize)?;
    let max_rows = size("max_rows", config.max_rows as usize)?;
    let link = LinkConfig {
        terms: Terms {
            fingerprint: config.fingerprint,
            hidden: hidden.get(),
            compute: config.compute,
            experts: config.experts,
            numerics: NumericsClass::CpuCanonical,
        },
        router,
        max_rows: max_rows.get(),
        limits: MessageLimits::new(hidden.get(), wire, max_rows, top_k.get(), most),
        experts: experts.clone(),
        combine: config.combine,
        dialer: config.dialer,
        digests: config.digests,
    };
    let links = Links::new(config.shape, config.numerics, addresses)
        .map_err(|source| ConnectError::Worker { address: "none".into(), source })?;
    let links = Arc::new(links);
    links.start()?;
    let (driver, link) = (Driver::start("muster-dispatch")?, Arc::new(link));
    for peer in 0..peers {
        drop(driver.spawn(link::keep(peer, links.clone(), link.clone())));
    }
    if let Some(fallback) = fallback {
        let rules = ShardRules {
            hidden: hidden.get(),
            wire,
            experts: experts.clone().into(),
            top_k: top_k.get(),
            max_rows,
            max_deadline: LONGEST_TIMEOUT,
        };
        here::start(&links, &link.terms, fallback, rules, config.combine)?;
    }
    let carrier = Carrier {
        cluster: ClusterHandle { links: links.clone(), link, runtime: driver.handle() },
        samples: Arc::new(Samples::default()),
        hidden: config.hidden,
        wire,
        combine: config.combine,
        deadline_ms: u32::try_from(config.shard_deadline.as_millis()).unwrap_or(u32::MAX).max(1),
        busy_poll: config.busy_poll,
        reins: driver.reins(),
        driver: Some(driver),
        largest: 0,
        links,
    };
    // Its drop closes what is open.
    gather(&carrier, config.connect_timeout, config.start)?;
    carrier.links.gathered();
    let contract = Contract {
        experts,
        hidden: config.hidden,
        wire,
        top_k: config.top_k as usize,
        max_rows: config.max_rows as usize,
        lanes: LANES,
        combine: config.combine,
    };
    let (fleet, counted) = (carrier.links.fleet(), Counted::new(Arc::clone(&carrier.samples)));
    let sums = WireSums { cpu: config.cpu, hidden: config.hidden };
    Ok(Delivery::new(contract, fleet, carrier, sums, counted))
}

fn gather(carrier: &Carrier, timeout: Duration, start: Start) -> Result<(), ConnectError> {
    let missing = match carrier.links.gather(Instant::now() + timeout.min(LONGEST_TIMEOUT)) {
        Gathered::All => Vec::new(),
        Gathered::Some(missing) => missing,
        Gathered::Fatal(address, source) => {
            return Err(ConnectError::Worker { address: address.to_string(), source });
        }
    };
    if start == Start::Degraded {
        return Ok(());
    }
    if let Some((address, source)) = missing.into_iter().next() {
        return Err(ConnectError::Worker { address: address.to_string(), source });
    }
    if start == Start::Assigned {
        return Ok(());
    }
    match carrier.links.elsewhere().missing() {
        missing if missing.is_empty() => Ok(()),
        missing => {
            let refused = carrier.cluster.link.digests.refusals();
            Err(ConnectError::MissingExperts { missing, refused })
        }
    }
}

fn size(what: &'static str, value: usize) -> Result<NonZeroU32, ConnectError> {
    u32::try_from(value).ok().and_then(NonZeroU32::new).ok_or(ConnectError::Size { what, value })
}

fn parse_addresses(workers: &[String]) -> Result<Vec<Address>, ConnectError> {
    let mut addresses: Vec<Address> = Vec::with_capacity(workers.len());
    for text in workers {
        let address = text.parse()?;
        if addresses.contains(&address) {
            return Err(ConnectError::DuplicateAddress(text.clone()));
        }
        addresses.push(address);
    }
    Ok(addresses)
}
