//! A worker's description of itself.

use std::num::NonZeroU32;
use std::time::Duration;

use muster_types::{
    Compute, Epoch, ExpertId, ExpertKey, Fingerprint, LayerId, NumericsClass, OutOfRange, Speed, WeightDType,
    WeightDigest, WorkerId,
};

use crate::convert::{
    WireError, compute_from_wire, compute_to_wire, expert_dtype_from_wire, expert_dtype_to_wire,
    numerics_from_wire, numerics_to_wire, worker_id_error,
};
use crate::expert::v1;
use crate::handshake::fingerprint_from_wire;
use crate::version::OURS;

/// Whether a worker takes shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It takes shards.
    Serving,
    /// It was asked to stop: it serves its experts until other workers hold them.
    Draining,
}

/// A worker's announcement.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// Its name.
    pub worker: WorkerId,
    /// The model it serves.
    pub fingerprint: Fingerprint,
    /// Numerics class of its kernels.
    pub numerics: NumericsClass,
    /// Rounding of activations.
    pub compute: Compute,
    /// Packing of its experts.
    pub experts: WeightDType,
    /// Epoch of this description; at least 1, grows with every change.
    pub epoch: Epoch,
    /// The experts it holds, strictly ascending.
    pub holdings: Vec<ExpertKey>,
    /// Digests of the weights of `holdings`, in their order; empty without holdings, or in a version without digests.
    pub digests: Vec<WeightDigest>,
    /// Bytes of resident weights.
    pub resident_bytes: u64,
    /// Whether it takes shards.
    pub phase: Phase,
    /// Largest number of rows it takes in one shard.
    pub max_rows: NonZeroU32,
    /// Bytes it has for experts; not below `resident_bytes`.
    pub capacity: u64,
    /// Its relative speed.
    pub speed: Speed,
    /// Its failure domain.
    pub domain: Option<String>,
    /// Number of assigned experts that are not loaded yet.
    pub loading: u32,
    /// Time from its start to its first expert.
    pub useful: Option<Duration>,
    /// Time from its start to all experts of its first assignment.
    pub full: Option<Duration>,
    /// The last source of weights that it passed over for damaged or different weights.
    pub trouble: Option<String>,
}

/// Longest name of a failure domain, bytes.
const LONGEST_DOMAIN: usize = 253;
/// Most characters of a trouble; the rest is cut off.
const LONGEST_TROUBLE: usize = 512;

impl Description {
    /// Converts to a message.
    #[must_use]
    pub fn to_wire(&self) -> v1::WorkerDescription {
        let mut held = holdings_to_wire(&self.holdings);
        let mut digests = self.digests.iter();
        for entry in &mut held {
            let of_layer = digests.by_ref().take(entry.experts.len());
            entry.digests = of_layer.flat_map(WeightDigest::as_bytes).copied().collect::<Vec<u8>>().into();
        }
        let (protocol_version, newest_protocol_version) = OURS.to_wire();
        v1::WorkerDescription {
            protocol_version,
            newest_protocol_version,
            worker_id: self.worker.as_str().to_owned(),
            fingerprint: self.fingerprint.as_bytes().to_vec().into(),
            numerics: numerics_to_wire(self.numerics).into(),
            epoch: self.epoch.get(),
            held,
            resident_bytes: self.resident_bytes,
            draining: self.phase == Phase::Draining,
            max_rows: self.max_rows.get(),
            compute: compute_to_wire(self.compute).into(),
            expert_dtype: expert_dtype_to_wire(self.experts).into(),
            capacity_bytes: self.capacity,
            speed: self.speed.get(),
            domain: self.domain.clone().unwrap_or_default(),
            loading: self.loading,
            useful_ms: millis_to_wire(self.useful),
            full_ms: millis_to_wire(self.full),
            trouble: self.trouble.as_deref().map_or_else(String::new, printable),
        }
    }

    /// Parses a message, for a model with `experts[layer]` routed experts in each layer (0 in a dense one).
    ///
    /// # Errors
    /// The first field that breaks a rule. The caller checks the terms first: ids of another model have no meaning.
    pub fn parse(message: &v1::WorkerDescription, experts: &[u32]) -> Result<Self, WireError> {
        let worker = WorkerId::new(&message.worker_id).map_err(worker_id_error)?;
        if message.epoch == 0 {
            return Err(WireError::Missing("epoch"));
        }
        Ok(Self {
            worker,
            fingerprint: fingerprint_from_wire(&message.fingerprint)?,
            numerics: numerics_from_wire(message.numerics)?,
            compute: compute_from_wire(message.compute)?,
            experts: expert_dtype_from_wire(message.expert_dtype)?,
            epoch: Epoch::new(message.epoch),
            holdings: parse_holdings("held", &message.held, experts)?,
            digests: parse_digests(&message.held)?,
            resident_bytes: message.resident_bytes,
            phase: if message.draining { Phase::Draining } else { Phase::Serving },
            max_rows: NonZeroU32::new(message.max_rows).ok_or(WireError::Missing("max_rows"))?,
            capacity: message.capacity_bytes.max(message.resident_bytes),
            speed: parse_speed(message.speed)?,
            domain: parse_domain(&message.domain)?,
            loading: message.loading,
            useful: millis_from_wire(message.useful_ms),
            full: millis_from_wire(message.full_ms),
            trouble: (!message.trouble.is_empty()).then(|| printable(&message.trouble)),
        })
    }
}

/// The text as a log line of bounded length: control characters become spaces.
fn printable(text: &str) -> String {
    text.chars().take(LONGEST_TROUBLE).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Parses digests: one per expert, or none at all.
fn parse_digests(held: &[v1::HeldExperts]) -> Result<Vec<WeightDigest>, WireError> {
    let field = "held.digests";
    if held.iter().all(|entry| entry.digests.is_empty()) {
        return Ok(Vec::new());
    }
    let mut digests = Vec::new();
    for v1::HeldExperts { layer, experts, digests: bytes } in held {
        let (whole, rest) = bytes.as_chunks::<{ WeightDigest::BYTES }>();
        if whole.len() != experts.len() || !rest.is_empty() {
            let reason = format!("layer {layer} has {} bytes for {} experts", bytes.len(), experts.len());
            return Err(WireError::rule(field, reason));
        }
        digests.extend(whole.iter().copied().map(WeightDigest::new));
    }
    Ok(digests)
}

/// Milliseconds, at least 1: 0 stands for `None`.
fn millis_to_wire(time: Option<Duration>) -> u64 {
    time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1))
}

fn millis_from_wire(millis: u64) -> Option<Duration> {
    (millis > 0).then(|| Duration::from_millis(millis))
}

fn parse_speed(speed: f64) -> Result<Speed, WireError> {
    if speed == 0.0 {
        return Ok(Speed::ONE);
    }
    Speed::new(speed).map_err(|error| WireError::rule("speed", error.to_string()))
}

fn parse_domain(domain: &str) -> Result<Option<String>, WireError> {
    let field = "domain";
    if domain.len() > LONGEST_DOMAIN {
        let reason = format!("{} bytes long; at most {LONGEST_DOMAIN} are allowed", domain.len());
        return Err(WireError::Name { field, reason });
    }
    if let Some(bad) = domain.chars().find(|c| c.is_control() || c.is_whitespace()) {
        return Err(WireError::Name { field, reason: format!("has the character {bad:?}") });
    }
    Ok((!domain.is_empty()).then(|| domain.to_owned()))
}

/// The layer with this number, and its number of routed experts.
pub(crate) fn layer_of(layer: u32, experts: &[u32]) -> Result<(LayerId, u32), OutOfRange> {
    let count = u32::try_from(experts.len()).unwrap_or(u32::MAX);
    let id = LayerId::new(layer, count)?;
    Ok((id, experts.get(id.index()).copied().unwrap_or(0)))
}

/// Converts ascending keys, grouped by layer.
pub(crate) fn holdings_to_wire<'a>(keys: impl IntoIterator<Item = &'a ExpertKey>) -> Vec<v1::HeldExperts> {
    let mut held: Vec<v1::HeldExperts> = Vec::new();
    for key in keys {
        let layer = key.layer.get();
        match held.last_mut().filter(|last| last.layer == layer) {
            Some(last) => last.experts.push(key.expert.get()),
            None => held.push(v1::HeldExperts {
                layer,
                experts: vec![key.expert.get()],
                ..v1::HeldExperts::default()
            }),
        }
    }
    held
}

/// The key of an expert of a model with `experts[layer]` routed experts in each layer.
pub(crate) fn key_of(
    field: &'static str,
    layer: u32,
    expert: u32,
    experts: &[u32],
) -> Result<ExpertKey, WireError> {
    let out_of_range = |source| WireError::OutOfRange { field, source };
    let (layer, count) = layer_of(layer, experts).map_err(out_of_range)?;
    let expert = ExpertId::new(expert, count).map_err(out_of_range)?;
    Ok(ExpertKey { layer, expert })
}

/// Parses keys grouped by layer, strictly ascending.
pub(crate) fn parse_holdings(
    field: &'static str,
    held: &[v1::HeldExperts],
    experts: &[u32],
) -> Result<Vec<ExpertKey>, WireError> {
    let mut keys: Vec<ExpertKey> = Vec::new();
    for entry in held {
        if entry.experts.is_empty() {
            let reason = format!("layer {} lists none; leave the layer out", entry.layer);
            return Err(WireError::rule(field, reason));
        }
        for &number in &entry.experts {
            let key = key_of(field, entry.layer, number, experts)?;
            if keys.last().is_some_and(|last| *last >= key) {
                return Err(WireError::rule(field, format!("{key} is listed twice or out of order")));
            }
            keys.push(key);
        }
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXPERTS: [u32; 3] = [4, 0, 8];

    fn digest(key: &ExpertKey) -> WeightDigest {
        WeightDigest::of([&[key.layer.get() as u8, key.expert.get() as u8][..]])
    }

    fn description(holdings: Vec<ExpertKey>) -> Description {
        Description {
            digests: holdings.iter().map(digest).collect(),
            worker: WorkerId::new("w0").unwrap(),
            fingerprint: Fingerprint::new([1; 32]),
            numerics: NumericsClass::CpuCanonical,
            compute: Compute::F32,
            experts: WeightDType::Q4,
            epoch: Epoch::new(3),
            holdings,
            resident_bytes: 1 << 40,
            phase: Phase::Draining,
            max_rows: NonZeroU32::MIN,
            capacity: 1 << 41,
            speed: Speed::new(2.5).unwrap(),
            domain: Some("rack-7".into()),
            loading: 3,
            useful: Some(Duration::from_millis(40)),
            full: None,
            trouble: Some("from its checkpoint: it changed".into()),
        }
    }

    fn wire(held: &[(u32, &[u32])]) -> v1::WorkerDescription {
        let held = held.iter().map(|&(layer, e)| v1::HeldExperts {
            layer,
            experts: e.to_vec(),
            ..v1::HeldExperts::default()
        });
        let held = held.collect();
        v1::WorkerDescription { held, ..description(vec![]).to_wire() }
    }

    fn all_keys() -> Vec<ExpertKey> {
        let layers = LayerId::all(3).zip(EXPERTS);
        layers
            .flat_map(|(layer, n)| ExpertId::all(n).map(move |expert| ExpertKey { layer, expert }))
            .collect()
    }

    proptest! {
        #[test]
        fn any_holdings_survive_the_round_trip(keys in prop::sample::subsequence(all_keys(), 0..=12)) {
            let before = description(keys);
            prop_assert_eq!(Description::parse(&before.to_wire(), &EXPERTS).unwrap(), before);
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(message) = <v1::WorkerDescription as prost::Message>::decode(bytes.as_slice()) {
                let _ = Description::parse(&message, &EXPERTS);
            }
        }
    }

    #[test]
    fn holdings_outside_the_model_or_out_of_order_are_refused() {
        let bad: [&[(u32, &[u32])]; 8] = [
            &[(3, &[0])],
            &[(u32::MAX, &[0])],
            &[(1, &[0])],
            &[(0, &[4])],
            &[(0, &[])],
            &[(0, &[1, 1])],
            &[(0, &[2, 1])],
            &[(2, &[0]), (0, &[0])],
        ];
        for held in bad {
            assert!(Description::parse(&wire(held), &EXPERTS).is_err(), "{held:?}");
        }
        assert!(Description::parse(&wire(&[(0, &[0, 3]), (2, &[7])]), &EXPERTS).is_ok());
    }

    #[test]
    fn digests_are_one_for_each_expert_or_none_at_all() {
        let key = |expert| ExpertKey {
            layer: LayerId::new(0, 3).unwrap(),
            expert: ExpertId::new(expert, 4).unwrap(),
        };
        let good = description(vec![key(0), key(3)]);
        let mut message = good.to_wire();
        assert_eq!(message.held[0].digests.len(), 64);
        assert_eq!(Description::parse(&message, &EXPERTS).unwrap().digests, good.digests);
        // The announcement of a version without digests.
        message.held[0].digests.clear();
        assert!(Description::parse(&message, &EXPERTS).unwrap().digests.is_empty());
        for bytes in [32, 63, 65, 96] {
            message.held[0].digests = vec![1; bytes].into();
            let error = Description::parse(&message, &EXPERTS).unwrap_err().to_string();
            assert!(error.contains("held.digests"), "{error}");
        }
        message.held[0].digests = vec![1; 64].into();
        message.held.push(v1::HeldExperts { layer: 2, experts: vec![1], ..v1::HeldExperts::default() });
        assert!(Description::parse(&message, &EXPERTS).is_err(), "of some layers only");
    }

    #[test]
    fn what_a_worker_says_of_its_trouble_cannot_break_a_log_line() {
        let message =
            v1::WorkerDescription { trouble: format!("a\nb{}", "x".repeat(9999)), ..wire(&[(0, &[0])]) };
        let trouble = Description::parse(&message, &EXPERTS).unwrap().trouble.unwrap();
        assert!(trouble.starts_with("a b") && trouble.len() == LONGEST_TROUBLE, "{trouble}");
    }

    #[test]
    fn speeds_and_domains_that_cannot_be_are_refused() {
        let good = || wire(&[(0, &[0])]);
        for bad in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
            let message = v1::WorkerDescription { speed: bad, ..good() };
            assert!(Description::parse(&message, &EXPERTS).is_err(), "{bad}");
        }
        for bad in ["x".repeat(254), "a b".into(), "a\nb".into()] {
            let message = v1::WorkerDescription { domain: bad, ..good() };
            assert!(Description::parse(&message, &EXPERTS).is_err());
        }
        let message = v1::WorkerDescription {
            speed: 0.0,
            domain: String::new(),
            capacity_bytes: 0,
            resident_bytes: 7,
            ..good()
        };
        let parsed = Description::parse(&message, &EXPERTS).unwrap();
        assert_eq!((parsed.speed, parsed.domain, parsed.capacity), (Speed::ONE, None, 7));
    }

    #[test]
    fn each_absent_field_is_named() {
        let good = || wire(&[(0, &[0])]);
        let cases: [(&str, v1::WorkerDescription); 7] = [
            ("worker_id", v1::WorkerDescription { worker_id: String::new(), ..good() }),
            ("fingerprint", v1::WorkerDescription { fingerprint: Default::default(), ..good() }),
            ("numerics", v1::WorkerDescription { numerics: 0, ..good() }),
            ("compute", v1::WorkerDescription { compute: 0, ..good() }),
            ("expert_dtype", v1::WorkerDescription { expert_dtype: 0, ..good() }),
            ("epoch", v1::WorkerDescription { epoch: 0, ..good() }),
            ("max_rows", v1::WorkerDescription { max_rows: 0, ..good() }),
        ];
        for (field, message) in cases {
            assert_eq!(Description::parse(&message, &EXPERTS), Err(WireError::Missing(field)));
        }
    }
}
