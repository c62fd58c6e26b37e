//! Making a cluster's own authority and the certificates of its roles.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};

use rustls::pki_types::ServerName;
use webpki::EndEntityCert;

use crate::material::{IdentityError, certificates, end_of, roots};
use crate::peer::{PeerId, PeerIdError, Role};

/// Validity of an authority.
const AUTHORITY: Duration = Duration::from_secs(3650 * 86_400);
/// Clocks differ.
const BEFORE: Duration = Duration::from_secs(3600);

/// A certificate that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The trust domain.
    #[error("the trust domain {0:?} is not made of lower-case letters, digits, dots, dashes and underscores")]
    TrustDomain(String),
    /// A name of the router.
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Name(String),
    /// The authority's key is invalid.
    #[error("the authority's key cannot be used")]
    Key,
    /// The library's own refusal.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

impl From<PeerIdError> for IssueError {
    fn from(error: PeerIdError) -> Self {
        match error {
            PeerIdError::Form(text) => Self::TrustDomain(text),
            other => Self::TrustDomain(other.to_string()),
        }
    }
}

/// A certificate with its key, both PEM.
pub struct Issued {
    /// The certificate.
    pub cert: String,
    /// The private key.
    pub key: String,
}

/// A cluster's authority.
pub struct Authority {
    trust_domain: String,
    issuer: Issuer<'static, KeyPair>,
    issued: Issued,
}

impl Authority {
    /// Makes a new one.
    ///
    /// # Errors
    /// When the trust domain is invalid.
    pub fn new(trust_domain: &str) -> Result<Self, IssueError> {
        PeerId::new(trust_domain, Role::Router)?;
        let key = KeyPair::generate()?;
        let params = authority(trust_domain);
        let issued = Issued { cert: params.self_signed(&key)?.pem(), key: key.serialize_pem() };
        Ok(Self { trust_domain: trust_domain.to_owned(), issuer: Issuer::new(params, key), issued })
    }

    /// An authority that [`Self::new`] made before.
    ///
    /// # Errors
    /// When the key cannot be read.
    pub fn again(trust_domain: &str, issued: Issued) -> Result<Self, IssueError> {
        PeerId::new(trust_domain, Role::Router)?;
        let key = KeyPair::from_pem(&issued.key).map_err(|_| IssueError::Key)?;
        // Certificates name their issuer by this alone, and it is the same every time.
        Ok(Self {
            trust_domain: trust_domain.to_owned(),
            issuer: Issuer::new(authority(trust_domain), key),
            issued,
        })
    }

    /// Its own certificate and key.
    #[must_use]
    pub const fn issued(&self) -> &Issued {
        &self.issued
    }

    /// A certificate for a role, with a new key, good until then. `names`, DNS names and IP addresses, are for clients that
    /// look at them.
    ///
    /// # Errors
    /// When a name is invalid.
    pub fn issue(&self, role: Role, names: &[String], until: SystemTime) -> Result<Issued, IssueError> {
        let id = PeerId::new(&self.trust_domain, role)?;
        let mut params =
            CertificateParams::new(names.to_vec()).map_err(|_| IssueError::Name(names.join(", ")))?;
        let uri =
            id.to_string().try_into().map_err(|_| IssueError::TrustDomain(self.trust_domain.clone()))?;
        params.subject_alt_names.push(SanType::URI(uri));
        params.distinguished_name = name(&format!("Muster {role}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        valid(&mut params, until);
        let key = KeyPair::generate()?;
        Ok(Issued { cert: params.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }
}

fn authority(trust_domain: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(&format!("Muster authority of {trust_domain}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, SystemTime::now() + AUTHORITY);
    params
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn valid(params: &mut CertificateParams, until: SystemTime) {
    params.not_before = (until.min(SystemTime::now()) - BEFORE).into();
    params.not_after = until.into();
}

/// Whether a certificate is for all of these DNS names and IP addresses.
#[must_use]
pub fn has_names(cert: &[u8], names: &[String]) -> bool {
    let Ok(chain) = certificates("the certificate".as_ref(), cert) else { return false };
    let Some(leaf) = chain.first().and_then(|leaf| EndEntityCert::try_from(leaf).ok()) else { return false };
    names.iter().all(|name| {
        let name = ServerName::try_from(name.as_str());
        name.is_ok_and(|name| leaf.verify_is_valid_for_subject_name(&name).is_ok())
    })
}

/// Whether a certificate ends within that time, or was not issued by that authority.
///
/// # Errors
/// When one of them cannot be read.
pub fn is_ending(cert: &[u8], ca: &[u8], within: Duration) -> Result<bool, IdentityError> {
    let (chain, roots) =
        (certificates("the certificate".as_ref(), cert)?, roots("the authority".as_ref(), ca)?);
    let ends = chain.split_first().and_then(|(leaf, rest)| end_of(leaf, rest, &roots));
    Ok(ends.is_none_or(|ends| ends < SystemTime::now() + within))
}
