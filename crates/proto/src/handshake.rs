//! The handshake: terms that both ends of a stream must agree on before the first row is sent.

use std::fmt;

use muster_types::{Combine, Compute, Fingerprint, NumericsClass, WeightDType};

use crate::convert::{
    RouterName, WireError, combine_from_wire, combine_to_wire, compute_from_wire, compute_to_wire,
    dtype_from_wire, dtype_to_wire, expert_dtype_from_wire, expert_dtype_to_wire, numerics_from_wire,
    numerics_to_wire,
};
use crate::expert::v1;
use crate::version::{OURS, Versions};

/// Micro-batch lanes between one router and one worker; each has a stream of its own.
pub const LANES: usize = 2;

/// The terms of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The model.
    pub fingerprint: Fingerprint,
    /// Elements of a hidden row.
    pub hidden: u32,
    /// Rounding of activations; determines the wire dtype.
    pub compute: Compute,
    /// Packing of experts.
    pub experts: WeightDType,
    /// Numerics class of this process's experts.
    pub numerics: NumericsClass,
}

/// One of the terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Term {
    /// The protocol's version.
    Version,
    /// The model.
    Fingerprint,
    /// Elements of a hidden row.
    Hidden,
    /// Rounding of activations.
    Compute,
    /// Packing of experts.
    Experts,
    /// The numerics class.
    Numerics,
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "protocol version",
            Self::Fingerprint => "model fingerprint",
            Self::Hidden => "hidden size",
            Self::Compute => "compute mode",
            Self::Experts => "expert dtype",
            Self::Numerics => "numerics class",
        })
    }
}

/// Two processes that cannot work together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{term} differs: ours is {ours}, the peer's is {theirs}")]
pub struct Disagreement {
    /// The term that differs.
    pub term: Term,
    /// This process's value.
    pub ours: String,
    /// The peer's value.
    pub theirs: String,
}

/// Reason why a peer was not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The peer's message breaks the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer is a Muster process on other terms.
    #[error(transparent)]
    Disagreement(#[from] Disagreement),
}

fn same<T: PartialEq + fmt::Display>(term: Term, ours: &T, theirs: &T) -> Result<(), Disagreement> {
    if ours == theirs {
        Ok(())
    } else {
        Err(Disagreement { term, ours: ours.to_string(), theirs: theirs.to_string() })
    }
}

impl Terms {
    /// The greeting that opens a stream on these terms, to a worker that describes itself as of class `numerics`. The
    /// router chooses the combine mode of the outputs.
    #[must_use]
    pub fn to_hello(
        &self,
        router: &RouterName,
        lane: u32,
        combine: Combine,
        numerics: NumericsClass,
    ) -> v1::Hello {
        let (protocol_version, newest_protocol_version) = OURS.to_wire();
        v1::Hello {
            protocol_version,
            newest_protocol_version,
            fingerprint: self.fingerprint.as_bytes().to_vec().into(),
            router_id: router.as_str().to_owned(),
            lane,
            hidden: self.hidden,
            wire_dtype: dtype_to_wire(self.compute.wire_dtype()).into(),
            combine: combine_to_wire(combine).into(),
            numerics: numerics_to_wire(numerics).into(),
            compute: compute_to_wire(self.compute).into(),
            expert_dtype: expert_dtype_to_wire(self.experts).into(),
        }
    }

    /// For workers: parses a greeting and compares it with these terms.
    ///
    /// # Errors
    /// The first field that is malformed or differs. The version comes first: in another version, the other fields may
    /// have another meaning.
    pub fn admit(&self, hello: &v1::Hello) -> Result<Greeting, HandshakeError> {
        let version = agree(hello.protocol_version, hello.newest_protocol_version)?;
        let router = RouterName::new(&hello.router_id)?;
        if hello.lane as usize >= LANES {
            return Err(WireError::rule("lane", format!("{} is not one of 0 and 1", hello.lane)).into());
        }
        if hello.hidden == 0 {
            return Err(WireError::Missing("hidden").into());
        }
        let fingerprint = fingerprint_from_wire(&hello.fingerprint)?;
        let wire_dtype = dtype_from_wire("wire_dtype", hello.wire_dtype)?;
        let compute = compute_from_wire(hello.compute)?;
        let experts = expert_dtype_from_wire(hello.expert_dtype)?;
        let combine = combine_from_wire(hello.combine)?;
        let numerics = numerics_from_wire(hello.numerics)?;
        same(Term::Fingerprint, &self.fingerprint, &fingerprint)?;
        same(Term::Hidden, &self.hidden, &hello.hidden)?;
        same(Term::Compute, &self.compute, &compute)?;
        if wire_dtype != compute.wire_dtype() {
            let reason =
                format!("is {wire_dtype}; rows of compute mode {compute} are {}", compute.wire_dtype());
            return Err(WireError::rule("wire_dtype", reason).into());
        }
        same(Term::Experts, &self.experts, &experts)?;
        same(Term::Numerics, &self.numerics, &numerics)?;
        Ok(Greeting { router, lane: hello.lane, combine, version })
    }

    /// For routers: compares a worker's description with these terms. Its holdings are not checked, and its numerics
    /// class may be any.
    ///
    /// # Errors
    /// The first field that is malformed or differs.
    pub fn check_worker(&self, described: &v1::WorkerDescription) -> Result<(), HandshakeError> {
        agree(described.protocol_version, described.newest_protocol_version)?;
        let fingerprint = fingerprint_from_wire(&described.fingerprint)?;
        same(Term::Fingerprint, &self.fingerprint, &fingerprint)?;
        same(Term::Compute, &self.compute, &compute_from_wire(described.compute)?)?;
        same(Term::Experts, &self.experts, &expert_dtype_from_wire(described.expert_dtype)?)?;
        numerics_from_wire(described.numerics)?;
        Ok(())
    }
}

/// The protocol version to use with a peer whose message has these two fields.
///
/// # Errors
/// When there is no version in common.
pub fn agree(oldest: u32, newest: u32) -> Result<u32, HandshakeError> {
    let theirs = Versions::parse(oldest, newest)?;
    let disagreement =
        || Disagreement { term: Term::Version, ours: OURS.to_string(), theirs: theirs.to_string() };
    Ok(OURS.common(theirs).ok_or_else(disagreement)?)
}

pub(crate) fn fingerprint_from_wire(bytes: &[u8]) -> Result<Fingerprint, WireError> {
    if bytes.is_empty() {
        return Err(WireError::Missing("fingerprint"));
    }
    Ok(Fingerprint::from_slice(bytes)?)
}

/// An admitted router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Its name.
    pub router: RouterName,
    /// The lane its stream carries.
    pub lane: u32,
    /// Combine mode of its outputs.
    pub combine: Combine,
    /// The protocol's version in common.
    pub version: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        Terms {
            fingerprint: Fingerprint::new([7; 32]),
            hidden: 64,
            compute: Compute::Bf16,
            experts: WeightDType::Q8,
            numerics: NumericsClass::CpuCanonical,
        }
    }

    fn hello() -> v1::Hello {
        terms().to_hello(&RouterName::new("r0").unwrap(), 1, Combine::Partial, NumericsClass::CpuCanonical)
    }

    #[test]
    fn a_router_on_the_same_terms_is_admitted() {
        let greeting = terms().admit(&hello()).unwrap();
        assert_eq!((greeting.router.as_str(), greeting.lane, greeting.combine), ("r0", 1, Combine::Partial));
    }

    #[test]
    fn routers_of_neighbouring_versions_are_admitted() {
        // One version, and ranges up to the previous, this and the next version.
        for (oldest, newest) in [(2, 0), (1, 2), (2, 3), (3, 4)] {
            let hello = v1::Hello { protocol_version: oldest, newest_protocol_version: newest, ..hello() };
            assert!(terms().admit(&hello).is_ok(), "{oldest} to {newest}");
        }
        let later = v1::Hello { protocol_version: 4, newest_protocol_version: 5, ..hello() };
        let text = terms().admit(&later).unwrap_err().to_string();
        assert_eq!(text, "protocol version differs: ours is 2 to 3, the peer's is 4 to 5");
        let first = v1::Hello { protocol_version: 1, newest_protocol_version: 0, ..hello() };
        assert!(terms().admit(&first).is_err(), "two versions back");
    }

    #[test]
    fn each_absent_field_is_named() {
        let cases: [(&str, v1::Hello); 9] = [
            ("protocol_version", v1::Hello { protocol_version: 0, ..hello() }),
            ("fingerprint", v1::Hello { fingerprint: Default::default(), ..hello() }),
            ("router_id", v1::Hello { router_id: String::new(), ..hello() }),
            ("hidden", v1::Hello { hidden: 0, ..hello() }),
            ("wire_dtype", v1::Hello { wire_dtype: 0, ..hello() }),
            ("combine", v1::Hello { combine: 0, ..hello() }),
            ("numerics", v1::Hello { numerics: 0, ..hello() }),
            ("compute", v1::Hello { compute: 0, ..hello() }),
            ("expert_dtype", v1::Hello { expert_dtype: 0, ..hello() }),
        ];
        for (field, message) in cases {
            assert_eq!(terms().admit(&message), Err(WireError::Missing(field).into()));
        }
        assert!(terms().admit(&v1::Hello { lane: 2, ..hello() }).is_err());
        assert!(terms().admit(&v1::Hello { fingerprint: vec![7; 31].into(), ..hello() }).is_err());
    }

    #[test]
    fn each_difference_names_both_values() {
        let cases: [(Term, v1::Hello); 7] = [
            (
                Term::Version,
                v1::Hello { protocol_version: 4, newest_protocol_version: 5, combine: 99, ..hello() },
            ),
            (Term::Fingerprint, v1::Hello { fingerprint: vec![8; 32].into(), ..hello() }),
            (Term::Hidden, v1::Hello { hidden: 65, ..hello() }),
            (Term::Compute, v1::Hello { compute: v1::ComputeMode::F32.into(), ..hello() }),
            (Term::Compute, v1::Hello { compute: v1::ComputeMode::Bf16Pairs.into(), ..hello() }),
            (Term::Experts, v1::Hello { expert_dtype: v1::ExpertDType::Native.into(), ..hello() }),
            (Term::Numerics, v1::Hello { numerics: v1::NumericsClass::CudaMma.into(), ..hello() }),
        ];
        for (term, message) in cases {
            match terms().admit(&message) {
                Err(HandshakeError::Disagreement(d)) => assert!(d.term == term && d.ours != d.theirs, "{d}"),
                other => panic!("{term}: {other:?}"),
            }
        }
        let text = terms().admit(&v1::Hello { hidden: 65, ..hello() }).unwrap_err().to_string();
        assert_eq!(text, "hidden size differs: ours is 64, the peer's is 65");
        let pairs = v1::Hello { compute: v1::ComputeMode::Bf16Pairs.into(), ..hello() };
        let text = terms().admit(&pairs).unwrap_err().to_string();
        assert_eq!(text, "compute mode differs: ours is bf16, the peer's is bf16-pairs");
        let torn = v1::Hello { wire_dtype: v1::DType::F32.into(), ..hello() };
        let text = terms().admit(&torn).unwrap_err().to_string();
        assert_eq!(text, "field wire_dtype: is f32; rows of compute mode bf16 are bf16");
    }

    #[test]
    fn workers_of_every_known_class_are_taken() {
        let described = |numerics| {
            let (protocol_version, newest_protocol_version) = OURS.to_wire();
            v1::WorkerDescription {
                protocol_version,
                newest_protocol_version,
                fingerprint: vec![7; 32].into(),
                compute: v1::ComputeMode::Bf16.into(),
                expert_dtype: v1::ExpertDType::Q8.into(),
                numerics,
                ..v1::WorkerDescription::default()
            }
        };
        for class in NumericsClass::ALL {
            assert_eq!(terms().check_worker(&described(numerics_to_wire(class).into())), Ok(()));
        }
        let refused = terms().check_worker(&described(9)).unwrap_err().to_string();
        assert_eq!(refused, "field numerics has the unknown value 9");
    }
}
