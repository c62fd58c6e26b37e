//! TLS 1.3 between processes, which are authenticated by role.
//!
//! Always holds: a connection of ours is to a peer with a certificate of the cluster's authority, of the same trust
//! domain, with one of the wanted roles. Every handshake checks the certificate anew, with the files in use then; sessions
//! are not resumed.

use std::fmt;
use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    ServerConfig, SignatureScheme,
};
use webpki::KeyUsage;

use crate::material::{IdentityError, Material, TlsFiles, in_words, provider, verify};
use crate::peer::{PeerId, Role};
use crate::reloaded::Reloaded;

/// This process's identity, kept up to date.
#[derive(Debug, Clone)]
pub struct Identity(Arc<Reloaded<Material>>);

/// Peers that a server admits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// Peers with a certificate of the cluster.
    WithCertificate,
    /// Also peers without a certificate. A wrong one is refused.
    Any,
}

impl Identity {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn load(files: TlsFiles) -> Result<Self, IdentityError> {
        Ok(Self(Arc::new(Reloaded::load(files.paths())?)))
    }

    /// What is in use.
    #[must_use]
    pub fn material(&self) -> Arc<Material> {
        self.0.current()
    }

    /// Takes changed files into use, for ever.
    pub async fn keep_fresh(self) {
        self.0.keep_fresh().await;
    }

    /// For connections to peers with one of these roles. Names and addresses of peers are not checked.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn client(&self, roles: &'static [Role]) -> Result<Arc<ClientConfig>, IdentityError> {
        let verifier = Verifier { identity: self.0.clone(), roles, provider: provider(), mandatory: true };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| IdentityError::Setup(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(Own(self.0.clone())));
        config.resumption = rustls::client::Resumption::disabled();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// For a server that speaks one protocol, such as `h2`. Its services check roles: see [`peer_of`].
    ///
    /// # Errors
    /// When the library refuses.
    pub fn server(&self, clients: Clients, protocol: &str) -> Result<Arc<ServerConfig>, IdentityError> {
        let mandatory = clients == Clients::WithCertificate;
        let verifier =
            Verifier { identity: self.0.clone(), roles: &Role::ALL, provider: provider(), mandatory };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| IdentityError::Setup(error.to_string()))?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(Own(self.0.clone())));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        Ok(Arc::new(config))
    }
}

/// The peer of a connection after its handshake.
#[must_use]
pub fn peer_of(certificates: Option<&[CertificateDer<'_>]>) -> Option<PeerId> {
    PeerId::of_certificate(certificates?.first()?).ok()
}

/// Presents this process's certificate.
#[derive(Debug)]
struct Own(Arc<Reloaded<Material>>);

impl ResolvesServerCert for Own {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().key.clone())
    }
}

impl ResolvesClientCert for Own {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Verifies the peer's certificate.
#[derive(Debug)]
struct Verifier {
    identity: Arc<Reloaded<Material>>,
    roles: &'static [Role],
    provider: Arc<CryptoProvider>,
    mandatory: bool,
}

/// A peer with a valid certificate of the wrong role or trust domain.
#[derive(Debug)]
struct Wrong(String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

fn refused(reason: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Wrong(reason)))))
}

impl Verifier {
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<(), Error> {
        let ours = self.identity.current();
        verify(leaf, intermediates, &ours.roots, usage, now).map_err(|error| match error {
            // Alerts of their own, so that the peer can read the reason.
            webpki::Error::CertExpired { .. } => CertificateError::Expired.into(),
            webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet.into(),
            // An authority with the same name and another key is another.
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                CertificateError::UnknownIssuer.into()
            }
            error => refused(format!("the peer's certificate is refused: {}", in_words(&error))),
        })?;
        let peer = PeerId::of_certificate(leaf)
            .map_err(|error| refused(format!("the peer is nobody here: {error}")))?;
        if peer.trust_domain() != ours.id.trust_domain() {
            return Err(refused(format!("the peer is {peer}, of another trust domain than {}", ours.id)));
        }
        if !self.roles.contains(&peer.role()) {
            let wanted: Vec<&str> = self.roles.iter().map(|role| role.as_str()).collect();
            return Err(refused(format!(
                "the peer is a {} ({peer}), not a {}",
                peer.role(),
                wanted.join(" or ")
            )));
        }
        Ok(())
    }

    fn tls13(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }
}

const ONLY_TLS13: Error = Error::PeerIncompatible(rustls::PeerIncompatible::ServerDoesNotSupportTls12Or13);

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, intermediates, KeyUsage::server_auth(), now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(ONLY_TLS13)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.tls13(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client of ours has one certificate; hints would only make handshakes longer.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, intermediates, KeyUsage::client_auth(), now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(ONLY_TLS13)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.tls13(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
