//! Orders of a leader to a worker: its lead, and the experts to hold.

use std::collections::HashSet;
use std::num::NonZeroU64;
use std::time::Duration;

use muster_types::{Compute, Epoch, ExpertKey, Fingerprint, WeightDType, WeightDigest};

use crate::convert::{
    RouterName, WireError, compute_from_wire, compute_to_wire, expert_dtype_from_wire, expert_dtype_to_wire,
};
use crate::description::{holdings_to_wire, key_of, parse_holdings};
use crate::expert::v1;
use crate::handshake::{agree, fingerprint_from_wire};
use crate::version::{OURS, WITH_DIGESTS};

/// Peers of one assignment.
const MOST_PEERS: usize = 1024;
/// Longest address of a peer, bytes.
const LONGEST_ADDRESS: usize = 512;

/// A router's request for the lead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeadAsk {
    /// Its name.
    pub router: RouterName,
    /// Its term.
    pub term: NonZeroU64,
    /// Duration of the lead. Zero gives it up.
    pub ttl: Duration,
}

impl LeadAsk {
    /// Converts to a message.
    #[must_use]
    pub fn to_wire(&self) -> v1::LeadRequest {
        v1::LeadRequest {
            router_id: self.router.as_str().to_owned(),
            term: self.term.get(),
            ttl_ms: millis(self.ttl),
        }
    }

    /// Parses a message.
    ///
    /// # Errors
    /// When the name is invalid or there is no term.
    pub fn parse(message: &v1::LeadRequest) -> Result<Self, WireError> {
        Ok(Self {
            router: RouterName::new(&message.router_id)?,
            term: NonZeroU64::new(message.term).ok_or(WireError::Missing("term"))?,
            ttl: Duration::from_millis(message.ttl_ms.into()),
        })
    }
}

/// A worker's answer to a [`LeadAsk`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeadAnswer {
    /// Whether the worker grants the lead to the requesting router.
    pub granted: bool,
    /// The router that holds the lead, or held it last.
    pub holder: Option<RouterName>,
    /// Term of that lead; 0 before the first.
    pub term: u64,
    /// Remaining time of the lead.
    pub left: Duration,
    /// Epoch of the worker's description at the answer.
    pub epoch: Epoch,
}

impl LeadAnswer {
    /// Converts to a message.
    #[must_use]
    pub fn to_wire(&self) -> v1::LeadReply {
        v1::LeadReply {
            granted: self.granted,
            router_id: self.holder.as_ref().map_or_else(String::new, |holder| holder.as_str().to_owned()),
            term: self.term,
            left_ms: millis(self.left),
            epoch: self.epoch.get(),
        }
    }

    /// Parses a message.
    ///
    /// # Errors
    /// When the holder's name is invalid.
    pub fn parse(message: &v1::LeadReply) -> Result<Self, WireError> {
        let holder =
            if message.router_id.is_empty() { None } else { Some(RouterName::new(&message.router_id)?) };
        let left = Duration::from_millis(message.left_ms.into());
        let epoch = Epoch::new(message.epoch);
        Ok(Self { granted: message.granted, holder, term: message.term, left, epoch })
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// An order to a worker: the experts to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The leading router.
    pub router: RouterName,
    /// Term of its lead.
    pub term: NonZeroU64,
    /// Number of the assignment, growing within the term.
    pub operation: NonZeroU64,
    /// Epoch of the worker's last description that the leader had seen.
    pub seen: Epoch,
    /// Experts to keep, strictly ascending.
    pub keep: Vec<ExpertKey>,
    /// Experts to load, in this order; none of `keep` and none twice.
    pub load: Vec<Load>,
    /// Addresses of workers that hold experts of `load`.
    pub peers: Vec<String>,
}

/// An expert to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Key of the expert.
    pub key: ExpertKey,
    /// Workers that hold it: indices into [`Assignment::peers`].
    pub peers: Vec<u32>,
    /// Digest of its weights; `None` from a leader of a version without digests.
    pub digest: Option<WeightDigest>,
}

impl Assignment {
    /// Converts to a message.
    #[must_use]
    pub fn to_wire(&self) -> v1::AssignRequest {
        let load = |load: &Load| v1::LoadExpert {
            layer: load.key.layer.get(),
            expert: load.key.expert.get(),
            peers: load.peers.clone(),
            digest: load.digest.map_or_else(Vec::new, |digest| digest.as_bytes().to_vec()).into(),
        };
        v1::AssignRequest {
            router_id: self.router.as_str().to_owned(),
            term: self.term.get(),
            operation_id: self.operation.get(),
            seen_epoch: self.seen.get(),
            keep: holdings_to_wire(&self.keep),
            load: self.load.iter().map(load).collect(),
            peers: self.peers.clone(),
        }
    }

    /// Parses a message, for a model with `experts[layer]` routed experts in each layer.
    ///
    /// # Errors
    /// The first field that breaks a rule.
    pub fn parse(message: &v1::AssignRequest, experts: &[u32]) -> Result<Self, WireError> {
        let router = RouterName::new(&message.router_id)?;
        let term = NonZeroU64::new(message.term).ok_or(WireError::Missing("term"))?;
        let operation = NonZeroU64::new(message.operation_id).ok_or(WireError::Missing("operation_id"))?;
        let keep = parse_holdings("keep", &message.keep, experts)?;
        if message.peers.len() > MOST_PEERS {
            let reason = format!("{} of them; at most {MOST_PEERS} are allowed", message.peers.len());
            return Err(WireError::rule("peers", reason));
        }
        if let Some(long) = message.peers.iter().find(|peer| peer.len() > LONGEST_ADDRESS) {
            let reason = format!("an address of {} bytes; at most {LONGEST_ADDRESS} are allowed", long.len());
            return Err(WireError::rule("peers", reason));
        }
        let mut seen = HashSet::new();
        let mut load = Vec::new();
        for entry in &message.load {
            let key = key_of("load", entry.layer, entry.expert, experts)?;
            if !seen.insert(key) || keep.binary_search(&key).is_ok() {
                return Err(WireError::rule("load", format!("{key} is listed twice")));
            }
            if let Some(bad) = entry.peers.iter().find(|&&peer| peer as usize >= message.peers.len()) {
                let reason = format!("{key} is said to be with peer {bad} of {}", message.peers.len());
                return Err(WireError::rule("load.peers", reason));
            }
            let digest = (!entry.digest.is_empty()).then(|| WeightDigest::from_slice(&entry.digest));
            let digest =
                digest.transpose().map_err(|error| WireError::rule("load.digest", error.to_string()))?;
            load.push(Load { key, peers: entry.peers.clone(), digest });
        }
        let (seen, peers) = (Epoch::new(message.seen_epoch), message.peers.clone());
        Ok(Self { router, term, operation, seen, keep, load, peers })
    }
}

/// Converts the numbers of rows that experts got, by layer and expert, to a message.
#[must_use]
pub fn rows_to_wire(rows: &[Vec<u64>]) -> v1::CountRowsReply {
    let layers = (0..).zip(rows).filter(|(_, rows)| rows.iter().any(|&count| count > 0));
    v1::CountRowsReply {
        layers: layers.map(|(layer, rows)| v1::LayerRows { layer, rows: rows.clone() }).collect(),
    }
}

/// Parses the numbers of rows that experts got, by layer and expert, of a model with `experts[layer]` routed experts in
/// each layer.
///
/// # Errors
/// When a layer is not one of the model, is listed twice, or has another number of experts.
pub fn rows_from_wire(message: &v1::CountRowsReply, experts: &[u32]) -> Result<Vec<Vec<u64>>, WireError> {
    let mut rows: Vec<Vec<u64>> = experts.iter().map(|&count| vec![0; count as usize]).collect();
    let mut before = None;
    for layer in &message.layers {
        if before.replace(layer.layer) >= Some(layer.layer) {
            return Err(WireError::rule("layers", "layers are told twice or out of order"));
        }
        match rows.get_mut(layer.layer as usize) {
            Some(known) if known.len() == layer.rows.len() => known.clone_from(&layer.rows),
            _ => {
                let reason = format!("layer {} does not have {} experts", layer.layer, layer.rows.len());
                return Err(WireError::rule("layers", reason));
            }
        }
    }
    Ok(rows)
}

/// Kind of the digest sent with weights: the newest that both processes know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seal {
    /// SHA-256, of versions 1 and 2.
    Sha256,
    /// BLAKE3, as in [`WeightDigest`].
    Blake3,
}

impl Seal {
    /// The kind for the sender of this request.
    ///
    /// # Errors
    /// When there is no version in common.
    pub fn of(message: &v1::FetchRequest) -> Result<Self, WireError> {
        let common = common(message)?;
        Ok(if common >= WITH_DIGESTS { Self::Blake3 } else { Self::Sha256 })
    }
}

fn common(message: &v1::FetchRequest) -> Result<u32, WireError> {
    agree(message.protocol_version, message.newest_protocol_version)
        .map_err(|error| WireError::rule("protocol_version", error.to_string()))
}

/// A request for an expert's weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// Identity of the model.
    pub fingerprint: Fingerprint,
    /// Compute mode of the requesting process, which determines the packing of experts.
    pub compute: Compute,
    /// Packing of experts.
    pub experts: WeightDType,
    /// Key of the expert.
    pub key: ExpertKey,
}

impl Fetch {
    /// Converts to a message.
    #[must_use]
    pub fn to_wire(&self) -> v1::FetchRequest {
        let (protocol_version, newest_protocol_version) = OURS.to_wire();
        v1::FetchRequest {
            protocol_version,
            newest_protocol_version,
            fingerprint: self.fingerprint.as_bytes().to_vec().into(),
            compute: compute_to_wire(self.compute).into(),
            expert_dtype: expert_dtype_to_wire(self.experts).into(),
            layer: self.key.layer.get(),
            expert: self.key.expert.get(),
        }
    }

    /// Parses a message, for a model with `experts[layer]` routed experts in each layer.
    ///
    /// # Errors
    /// The first field that breaks a rule. The caller checks that the two processes fit.
    pub fn parse(message: &v1::FetchRequest, experts: &[u32]) -> Result<Self, WireError> {
        common(message)?;
        Ok(Self {
            fingerprint: fingerprint_from_wire(&message.fingerprint)?,
            compute: compute_from_wire(message.compute)?,
            experts: expert_dtype_from_wire(message.expert_dtype)?,
            key: key_of("expert", message.layer, message.expert, experts)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use muster_types::{ExpertId, LayerId};
    use proptest::prelude::*;

    use super::*;

    const EXPERTS: [u32; 3] = [4, 0, 8];

    fn all_keys() -> Vec<ExpertKey> {
        LayerId::all(3)
            .zip(EXPERTS)
            .flat_map(|(layer, n)| ExpertId::all(n).map(move |expert| ExpertKey { layer, expert }))
            .collect()
    }

    fn one() -> NonZeroU64 {
        NonZeroU64::MIN
    }

    fn assignment(keep: Vec<ExpertKey>, load: Vec<Load>) -> Assignment {
        let router = RouterName::new("r0").unwrap();
        let peers = vec!["a:1".into(), "unix:/b".into()];
        Assignment { router, term: one(), operation: one(), seen: Epoch::new(9), keep, load, peers }
    }

    proptest! {
        #[test]
        fn any_assignment_survives_the_round_trip(
            keys in prop::sample::subsequence(all_keys(), 0..=12),
            split in any::<prop::sample::Index>(),
            peers in prop::collection::vec(0u32..2, 0..2),
        ) {
            let keep = keys[..split.index(keys.len() + 1)].to_vec();
            let load = keys[keep.len()..].iter().rev().map(|&key| Load {
                key,
                peers: peers.clone(),
                digest: (key.expert.get() % 2 == 0).then(|| WeightDigest::new([key.expert.get() as u8; 32])),
            });
            let before = assignment(keep, load.collect());
            prop_assert_eq!(Assignment::parse(&before.to_wire(), &EXPERTS).unwrap(), before);
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            use prost::Message;
            if let Ok(message) = v1::AssignRequest::decode(bytes.as_slice()) {
                let _ = Assignment::parse(&message, &EXPERTS);
            }
            if let Ok(message) = v1::CountRowsReply::decode(bytes.as_slice()) {
                let _ = rows_from_wire(&message, &EXPERTS);
            }
            if let Ok(message) = v1::FetchRequest::decode(bytes.as_slice()) {
                let _ = Fetch::parse(&message, &EXPERTS);
            }
            if let Ok(message) = v1::LeadRequest::decode(bytes.as_slice()) {
                let _ = LeadAsk::parse(&message);
            }
        }

        #[test]
        fn counts_survive_the_round_trip(rows in prop::collection::vec(any::<u64>(), 12)) {
            let rows = vec![rows[..4].to_vec(), vec![], rows[4..].to_vec()];
            prop_assert_eq!(rows_from_wire(&rows_to_wire(&rows), &EXPERTS).unwrap(), rows);
        }
    }

    #[test]
    fn assignments_that_contradict_themselves_are_refused() {
        let keys = all_keys();
        let load = |key| Load { key, peers: vec![], digest: None };
        let good = assignment(vec![keys[0]], vec![load(keys[1])]).to_wire();
        assert!(Assignment::parse(&good, &EXPERTS).is_ok());
        let bad = [
            ("load", assignment(vec![keys[0]], vec![load(keys[0])]).to_wire()),
            ("load", assignment(vec![], vec![load(keys[0]), load(keys[0])]).to_wire()),
            (
                "load.peers",
                assignment(vec![], vec![Load { key: keys[0], peers: vec![2], digest: None }]).to_wire(),
            ),
            ("load.digest", {
                let mut load = good.load.clone();
                load[0].digest = vec![1; 31].into();
                v1::AssignRequest { load, ..good.clone() }
            }),
            ("term", v1::AssignRequest { term: 0, ..good.clone() }),
            ("operation_id", v1::AssignRequest { operation_id: 0, ..good.clone() }),
            ("router_id", v1::AssignRequest { router_id: "a b".into(), ..good.clone() }),
            ("peers", v1::AssignRequest { peers: vec!["x".repeat(513)], load: vec![], ..good.clone() }),
            ("peers", v1::AssignRequest { peers: vec![String::new(); 1025], ..good.clone() }),
        ];
        for (field, message) in bad {
            let error = Assignment::parse(&message, &EXPERTS).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn weights_are_sealed_by_the_newest_digest_that_both_know() {
        let seal = |protocol_version, newest_protocol_version| {
            Seal::of(&v1::FetchRequest {
                protocol_version,
                newest_protocol_version,
                ..v1::FetchRequest::default()
            })
        };
        assert_eq!(seal(1, 2), Ok(Seal::Sha256));
        assert_eq!((seal(2, 3), seal(3, 4)), (Ok(Seal::Blake3), Ok(Seal::Blake3)));
        assert!(seal(0, 0).is_err() && seal(9, 9).is_err());
    }

    #[test]
    fn counts_of_another_model_are_refused() {
        let layer = |layer, rows: usize| v1::LayerRows { layer, rows: vec![1; rows] };
        for layers in
            [vec![layer(0, 3)], vec![layer(3, 1)], vec![layer(2, 8), layer(0, 4)], vec![layer(0, 4); 2]]
        {
            assert!(rows_from_wire(&v1::CountRowsReply { layers }, &EXPERTS).is_err());
        }
    }
}
