//! A certificate, its key, and the authority that others must have: read from PEM files and checked together.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use webpki::{EndEntityCert, KeyUsage};

use crate::peer::{PeerId, PeerIdError};
use crate::reloaded::Reload;

/// Where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// This process's certificate, and those between it and the authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Certificates of the authority.
    pub ca: PathBuf,
}

impl TlsFiles {
    pub(crate) fn paths(self) -> Vec<PathBuf> {
        vec![self.cert, self.key, self.ca]
    }
}

/// Files that are no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// One cannot be read.
    #[error("{} cannot be read: {reason}", path.display())]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// One lacks its contents.
    #[error("{}: {reason}", path.display())]
    Content {
        /// Which one.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// Every user of this machine can read the key.
    #[error("{} can be read by everybody on this machine; take that away with `chmod o-r`, and make a new key if others may have read it", .0.display())]
    OpenKey(PathBuf),
    /// The key is another certificate's.
    #[error("the key in {} is not that of the certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's.
        cert: PathBuf,
    },
    /// The certificate has no name of ours.
    #[error("{}: {source}; `muster certs init` makes certificates that have one", path.display())]
    Name {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        source: PeerIdError,
    },
    /// The certificate is not valid under the authority.
    #[error("the certificate in {} would be refused by others with the authority in {}: {reason}", cert.display(), ca.display())]
    Untrusted {
        /// Its file.
        cert: PathBuf,
        /// The authority's.
        ca: PathBuf,
        /// Why.
        reason: String,
    },
    /// The library's own refusal.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

/// A whole identity.
#[derive(Debug)]
pub struct Material {
    pub(crate) id: PeerId,
    pub(crate) key: Arc<CertifiedKey>,
    pub(crate) roots: RootCertStore,
    ends: SystemTime,
}

impl Material {
    /// This process's identity.
    #[must_use]
    pub const fn id(&self) -> &PeerId {
        &self.id
    }

    /// When the certificate ends.
    #[must_use]
    pub const fn ends(&self) -> SystemTime {
        self.ends
    }
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Whether a certificate chain leads to the authority, now and for that use.
pub(crate) fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    usage: KeyUsage,
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let provider = provider();
    let leaf = EndEntityCert::try_from(leaf)?;
    leaf.verify_for_usage(
        provider.signature_verification_algorithms.all,
        &roots.roots,
        intermediates,
        now,
        usage,
        None,
        None,
    )?;
    Ok(())
}

/// When a certificate ends; `None` when that is not what keeps it from being good for ever.
pub(crate) fn end_of(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
) -> Option<SystemTime> {
    // Long after all of them: the refusal says since when.
    let far = UnixTime::since_unix_epoch(Duration::from_secs(250_000_000_000));
    match verify(leaf, intermediates, roots, KeyUsage::server_auth(), far) {
        Err(webpki::Error::CertExpired { not_after, .. }) => {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(not_after.as_secs()))
        }
        _ => None,
    }
}

pub(crate) fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let wrong = |reason: String| IdentityError::Content { path: path.to_owned(), reason };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(format!("it is not PEM: {error}")))?;
    if certificates.is_empty() {
        return Err(wrong("there is no certificate in it (-----BEGIN CERTIFICATE-----)".to_owned()));
    }
    Ok(certificates)
}

pub(crate) fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|error| IdentityError::Content {
            path: path.to_owned(),
            reason: format!("a certificate in it is no authority's: {error}"),
        })?;
    }
    Ok(roots)
}

impl Reload for Material {
    type Error = IdentityError;
    const WHAT: &'static str = "certificates";

    fn make(paths: &[PathBuf], contents: &[Vec<u8>]) -> Result<Self, IdentityError> {
        let ([cert, key, ca], [cert_pem, key_pem, ca_pem]) = (paths, contents) else {
            return Err(IdentityError::Setup("there are three files".into()));
        };
        let open = std::fs::metadata(key).is_ok_and(|metadata| metadata.permissions().mode() & 0o004 != 0);
        if open {
            return Err(IdentityError::OpenKey(key.clone()));
        }
        let chain = certificates(cert, cert_pem)?;
        let private = PrivateKeyDer::from_pem_slice(key_pem).map_err(|error| IdentityError::Content {
            path: key.clone(),
            // Never what is in it.
            reason: match error {
                rustls::pki_types::pem::Error::NoItemsFound => {
                    "there is no private key in it (-----BEGIN PRIVATE KEY-----)".to_owned()
                }
                _ => "it is not PEM".to_owned(),
            },
        })?;
        let roots = roots(ca, ca_pem)?;
        let certified =
            CertifiedKey::from_der(chain.clone(), private, &provider()).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => {
                    IdentityError::Mismatch { key: key.clone(), cert: cert.clone() }
                }
                _ => IdentityError::Content {
                    path: key.clone(),
                    reason: "the key is of a kind that TLS cannot use".to_owned(),
                },
            })?;
        let Some((leaf, intermediates)) = chain.split_first() else {
            return Err(IdentityError::Setup("there is no certificate".into()));
        };
        let id = PeerId::of_certificate(leaf)
            .map_err(|source| IdentityError::Name { path: cert.clone(), source })?;
        let untrusted =
            |reason: String| IdentityError::Untrusted { cert: cert.clone(), ca: ca.clone(), reason };
        for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
            verify(leaf, intermediates, &roots, usage, UnixTime::now())
                .map_err(|error| untrusted(in_words(&error)))?;
        }
        let ends = end_of(leaf, intermediates, &roots).unwrap_or(SystemTime::UNIX_EPOCH);
        Ok(Self { id, key: Arc::new(certified), roots, ends })
    }

    fn unreadable(path: &Path, reason: String) -> IdentityError {
        IdentityError::Unreadable { path: path.to_owned(), reason }
    }

    fn report(&self) {
        let ends = self.ends.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        metrics::gauge!("muster_certificate_end_seconds").set(ends.as_secs_f64());
    }
}

/// The common refusals.
pub(crate) fn in_words(error: &webpki::Error) -> String {
    match error {
        webpki::Error::CertExpired { .. } => "it has expired; renew it".to_owned(),
        webpki::Error::CertNotValidYet { .. } => "it is not valid yet; check the clocks".to_owned(),
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            "it was issued by another authority".to_owned()
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => {
            "it may not be used by both ends of a connection (extended key usages clientAuth and serverAuth)"
                .to_owned()
        }
        error => error.to_string(),
    }
}
