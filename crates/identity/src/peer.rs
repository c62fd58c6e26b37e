//! The name in a certificate: `spiffe://<trust domain>/muster/<role>`.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// Longest trust domain, bytes; SPIFFE allows 255.
const LONGEST_DOMAIN: usize = 255;

/// Role of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// It serves requests, and asks workers.
    Router,
    /// It holds experts.
    Worker,
    /// It sends requests.
    Client,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Router, Self::Worker, Self::Client];

    /// Its name in certificates and directories.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Worker => "worker",
            Self::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A peer's identity, from its certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerId {
    trust_domain: String,
    role: Role,
}

/// A certificate without a name of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdError {
    /// It cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// It has none, or more than one.
    #[error(
        "the certificate has {0} URI names of the form spiffe://DOMAIN/muster/ROLE where it must have one"
    )]
    Count(usize),
    /// The text is none.
    #[error("{0:?} is not spiffe://DOMAIN/muster/ROLE with role router, worker or client")]
    Form(String),
}

impl PeerId {
    /// The identity of a role in a cluster.
    ///
    /// # Errors
    /// When the trust domain is invalid.
    pub fn new(trust_domain: &str, role: Role) -> Result<Self, PeerIdError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        if trust_domain.is_empty()
            || trust_domain.len() > LONGEST_DOMAIN
            || !trust_domain.chars().all(allowed)
        {
            return Err(PeerIdError::Form(trust_domain.chars().take(LONGEST_DOMAIN).collect()));
        }
        Ok(Self { trust_domain: trust_domain.to_owned(), role })
    }

    /// Which cluster it belongs to.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Its role.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }

    /// The name in a certificate. Says nothing about who issued it.
    ///
    /// # Errors
    /// When there is not exactly one.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, PeerIdError> {
        let certificate = EndEntityCert::try_from(certificate)
            .map_err(|error| PeerIdError::Unreadable(error.to_string()))?;
        let names: Vec<Self> = certificate.valid_uri_names().filter_map(|name| name.parse().ok()).collect();
        match <[Self; 1]>::try_from(names) {
            Ok([name]) => Ok(name),
            Err(names) => Err(PeerIdError::Count(names.len())),
        }
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/muster/{}", self.trust_domain, self.role)
    }
}

impl FromStr for PeerId {
    type Err = PeerIdError;

    fn from_str(text: &str) -> Result<Self, PeerIdError> {
        let wrong = || PeerIdError::Form(text.chars().take(LONGEST_DOMAIN).collect());
        let (domain, path) =
            text.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')).ok_or_else(wrong)?;
        let role = path.strip_prefix("muster/").ok_or_else(wrong)?;
        let role = Role::ALL.into_iter().find(|known| known.as_str() == role).ok_or_else(wrong)?;
        Self::new(domain, role).map_err(|_| wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_round_trip_and_others_are_refused() {
        for role in Role::ALL {
            let id = PeerId::new("prod.example-1", role).unwrap();
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        for text in [
            "",
            "spiffe://",
            "spiffe://muster",
            "spiffe://muster/muster",
            "spiffe:///muster/worker",
            "spiffe://m/muster/Worker",
            "spiffe://m/muster/worker/",
            "spiffe://m/muster/worker/2",
            "spiffe://M/muster/worker",
            "spiffe://m x/muster/worker",
            "https://m/muster/worker",
        ] {
            assert!(text.parse::<PeerId>().is_err(), "{text}");
        }
        assert!(PeerId::new(&"x".repeat(256), Role::Client).is_err());
    }
}
