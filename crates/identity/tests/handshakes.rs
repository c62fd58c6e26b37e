//! Handshakes between processes with good, wrong and changing certificates, in memory.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, but not their helpers")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use muster_identity::{
    Authority, Clients, Identity, IdentityError, Issued, PeerId, Role, TlsFiles, is_ending, peer_of,
};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use tempfile::TempDir;

const DAY: Duration = Duration::from_secs(86_400);

fn write(directory: &Path, issued: &Issued, ca: &str) -> TlsFiles {
    let files = TlsFiles {
        cert: directory.join("tls.crt"),
        key: directory.join("tls.key"),
        ca: directory.join("ca.crt"),
    };
    std::fs::write(&files.cert, &issued.cert).unwrap();
    std::fs::write(&files.key, &issued.key).unwrap();
    std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&files.ca, ca).unwrap();
    files
}

struct Cluster {
    authority: Authority,
    directory: TempDir,
}

impl Cluster {
    fn new(trust_domain: &str) -> Self {
        Self { authority: Authority::new(trust_domain).unwrap(), directory: tempfile::tempdir().unwrap() }
    }

    fn files(&self, role: Role, until: SystemTime) -> TlsFiles {
        let directory = self.directory.path().join(role.as_str());
        std::fs::create_dir_all(&directory).unwrap();
        let issued =
            self.authority.issue(role, &["router.example".into(), "127.0.0.1".into()], until).unwrap();
        write(&directory, &issued, &self.authority.issued().cert)
    }

    fn identity(&self, role: Role) -> Identity {
        Identity::load(self.files(role, SystemTime::now() + DAY)).unwrap()
    }
}

/// Who the server sees, or what each end says.
fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<Option<PeerId>, (String, String)> {
    let mut client =
        ClientConnection::new(client, ServerName::try_from("whatever.example").unwrap()).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    let (mut client_says, mut server_says) = (String::new(), String::new());
    for _ in 0..10 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            if let Err(error) = server.process_new_packets() {
                server_says = error.to_string();
                rest = &[];
            }
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            if let Err(error) = client.process_new_packets() {
                client_says = error.to_string();
                rest = &[];
            }
        }
    }
    if client_says.is_empty() && server_says.is_empty() {
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok(peer_of(server.peer_certificates()))
    } else {
        Err((client_says, server_says))
    }
}

#[test]
fn peers_of_one_cluster_know_each_other_by_role() {
    let cluster = Cluster::new("one");
    let (router, worker) = (cluster.identity(Role::Router), cluster.identity(Role::Worker));
    let server = worker.server(Clients::WithCertificate, "h2").unwrap();
    let seen = shake(router.client(&[Role::Worker]).unwrap(), server.clone()).unwrap();
    assert_eq!(seen, Some(PeerId::new("one", Role::Router).unwrap()));
    // The server's role is wrong: both ends say so.
    let (client, server) = shake(router.client(&[Role::Router]).unwrap(), server).unwrap_err();
    assert!(client.contains("the peer is a worker (spiffe://one/muster/worker), not a router"), "{client}");
    assert!(server.contains("alert"), "{server}");
}

#[test]
fn who_has_no_good_certificate_is_refused_with_a_reason_on_both_sides() {
    let (ours, theirs) = (Cluster::new("one"), Cluster::new("one"));
    let worker = ours.identity(Role::Worker);
    let strict = worker.server(Clients::WithCertificate, "h2").unwrap();

    // Another authority, whose name is the same.
    let foreign = theirs.identity(Role::Router);
    let (client, _) = shake(foreign.client(&[Role::Worker]).unwrap(), strict.clone()).unwrap_err();
    assert!(client.contains("UnknownIssuer"), "{client}");

    // One that does not look, as an attacker's.
    let careless = |identity: Option<TlsFiles>, versions: &[&'static rustls::SupportedProtocolVersion]| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone));
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(files) => {
                use rustls::pki_types::pem::PemObject;
                let cert = rustls::pki_types::CertificateDer::pem_file_iter(&files.cert).unwrap();
                let key = rustls::pki_types::PrivateKeyDer::from_pem_file(&files.key).unwrap();
                builder.with_client_auth_cert(cert.map(Result::unwrap).collect(), key).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    };
    let v13: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
    let tomorrow = SystemTime::now() + DAY;
    let (client, server) = shake(careless(None, v13), strict.clone()).unwrap_err();
    assert!(
        server.contains("no certificates") && client.contains("CertificateRequired"),
        "{client}; {server}"
    );
    let (client, server) =
        shake(careless(Some(theirs.files(Role::Router, tomorrow)), v13), strict.clone()).unwrap_err();
    assert!(!client.is_empty() && !server.is_empty(), "{client}; {server}");
    let expired = ours.files(Role::Router, SystemTime::now() - DAY);
    let (client, server) = shake(careless(Some(expired), v13), strict.clone()).unwrap_err();
    assert!(client.contains("Expired") && server.contains("xpired"), "{client}; {server}");
    let (client, server) =
        shake(careless(Some(ours.files(Role::Router, tomorrow)), &[&rustls::version::TLS12]), strict.clone())
            .unwrap_err();
    assert!(client.contains("ProtocolVersion") && server.contains("Tls12"), "{client}; {server}");

    // Another trust domain under the same authority.
    let other = Authority::again(
        "two",
        Issued { cert: ours.authority.issued().cert.clone(), key: ours.authority.issued().key.clone() },
    );
    let issued = other.unwrap().issue(Role::Router, &[], tomorrow).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let outsider = write(directory.path(), &issued, &ours.authority.issued().cert);
    assert!(shake(careless(Some(outsider), v13), strict).is_err());

    // A public server takes clients without a certificate, but none with a wrong one.
    let router = ours.identity(Role::Router);
    let public = router.server(Clients::Any, "h2").unwrap();
    assert_eq!(shake(careless(None, v13), public.clone()), Ok(None));
    assert!(shake(careless(Some(theirs.files(Role::Client, tomorrow)), v13), public).is_err());
}

#[test]
fn files_that_are_no_identity_are_refused_by_name() {
    let (cluster, other) = (Cluster::new("one"), Cluster::new("one"));
    let tomorrow = SystemTime::now() + DAY;
    let files = || cluster.files(Role::Worker, tomorrow);
    let load = |files: TlsFiles| Identity::load(files).unwrap_err();

    let good = files();
    std::fs::set_permissions(&good.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(load(good), IdentityError::OpenKey(_)));
    let error = load(cluster.files(Role::Worker, SystemTime::now() - DAY));
    assert!(error.to_string().contains("it has expired; renew it"), "{error}");
    let good = files();
    std::fs::write(&good.ca, &other.authority.issued().cert).unwrap();
    let error = load(good);
    assert!(matches!(error, IdentityError::Untrusted { .. }), "{error}");
    let good = files();
    let key = std::fs::read(&other.files(Role::Worker, tomorrow).key).unwrap();
    std::fs::write(&good.key, key).unwrap();
    assert!(matches!(load(good), IdentityError::Mismatch { .. }));
    let good = files();
    std::fs::write(&good.cert, &cluster.authority.issued().cert).unwrap();
    std::fs::write(&good.key, &cluster.authority.issued().key).unwrap();
    let error = load(good);
    assert!(
        matches!(error, IdentityError::Name { .. }) && error.to_string().contains("muster certs init"),
        "{error}"
    );
    for (content, said) in
        [("", "no certificate"), ("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n", "PEM")]
    {
        let good = files();
        std::fs::write(&good.cert, content).unwrap();
        let error = load(good);
        assert!(error.to_string().contains(said), "{error}");
    }
    let good = files();
    std::fs::write(&good.key, "a secret that must not be shown").unwrap();
    let error = load(good).to_string();
    assert!(error.contains("no private key") && !error.contains("secret"), "{error}");
    let good = files();
    std::fs::remove_file(&good.ca).unwrap();
    assert!(matches!(load(good), IdentityError::Unreadable { .. }));
}

#[tokio::test(start_paused = true)]
async fn renewed_certificates_are_used_without_a_restart() {
    let (old, new) = (Cluster::new("one"), Cluster::new("one"));
    let files = old.files(Role::Worker, SystemTime::now() + DAY);
    let worker = Identity::load(files.clone()).unwrap();
    let server = worker.server(Clients::WithCertificate, "h2").unwrap();
    let router = new.identity(Role::Router);
    let client = router.client(&[Role::Worker]).unwrap();
    assert!(shake(client.clone(), server.clone()).is_err());
    let fresh = tokio::spawn(worker.clone().keep_fresh());

    // Half of it: what was there stays.
    let issued = new.authority.issue(Role::Worker, &[], SystemTime::now() + 2 * DAY).unwrap();
    std::fs::write(&files.cert, &issued.cert).unwrap();
    let before = worker.material().ends();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(worker.material().ends(), before);
    std::fs::write(&files.key, &issued.key).unwrap();
    std::fs::write(&files.ca, &new.authority.issued().cert).unwrap();
    // Paused time runs ahead of the thread that reads.
    while worker.material().ends() == before {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(shake(client, server).is_ok());
    fresh.abort();
}

#[test]
fn an_ending_certificate_is_told_from_one_that_is_not() {
    let cluster = Cluster::new("one");
    let ca = cluster.authority.issued().cert.as_bytes();
    let issued = cluster.authority.issue(Role::Client, &[], SystemTime::now() + 40 * DAY).unwrap();
    assert!(!is_ending(issued.cert.as_bytes(), ca, 30 * DAY).unwrap());
    assert!(is_ending(issued.cert.as_bytes(), ca, 50 * DAY).unwrap());
    assert!(is_ending(b"x", ca, DAY).is_err());
}

/// Trusts everybody.
#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
