//! Certificates and keys: who is let in where, who is not, and that what is secret stays so.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use muster_client::{Client, Credentials, Policy};
use muster_proto::v1::GenerateRequest;
use muster_tests::client::greedy;
use muster_tests::process::{Process, eventually, run};
use muster_tests::{demo_model, http};
use prost::Message;
use tempfile::TempDir;
use tonic::Code;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// A cluster's certificates and keys.
struct Secrets {
    directory: TempDir,
    /// A good key.
    key: String,
}

impl Secrets {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let made = run(&["certs", "init", &path("certs")]);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let made = run(&["keys", "new", "tester", "--file", &path("keys")]);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let key = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        Self { directory, key }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path("certs").join(name)).unwrap()
    }

    /// Flags of a process with that role's certificate.
    fn flags(&self, role: &str) -> Vec<String> {
        let file = |name: &str| self.path("certs").join(role).join(name).display().to_string();
        let flags =
            ["--tls-cert", &file("tls.crt"), "--tls-key", &file("tls.key"), "--tls-ca", &file("ca.crt")];
        flags.map(String::from).into()
    }

    fn credentials(&self) -> Credentials {
        Credentials { ca: Some(self.read("ca.crt")), ..Credentials::default() }
    }

    /// As one with that role's certificate, or without any.
    async fn channel(&self, grpc: &str, role: Option<&str>) -> Result<Channel, tonic::transport::Error> {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.read("ca.crt")));
        if let Some(role) = role {
            let (cert, key) = (self.read(&format!("{role}/tls.crt")), self.read(&format!("{role}/tls.key")));
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        let port = grpc.rsplit(':').next().unwrap();
        Endpoint::from_shared(format!("https://localhost:{port}"))?.tls_config(tls)?.connect().await
    }
}

fn start(args: &[&str], more: &[String]) -> Process {
    let args = args.iter().map(ToString::to_string).chain(more.iter().cloned());
    Process::start(&args.collect::<Vec<_>>()).unwrap()
}

fn router(model: &Path, secrets: &Secrets, more: &[&str]) -> Process {
    let (model, keys) = (model.display().to_string(), secrets.path("keys").display().to_string());
    let args =
        ["router", "--model", &model, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--api-keys", &keys];
    start(&[&args, more].concat(), &secrets.flags("router"))
}

fn worker(router: &Process, secrets: &Secrets, more: &[&str]) -> Process {
    let grpc = router.address("grpc");
    start(
        &[&["worker", "--join", &grpc, "--listen", "127.0.0.1:0"][..], more].concat(),
        &secrets.flags("worker"),
    )
}

async fn ready(router: &Process, secrets: &Secrets) {
    let (address, ca) = (router.address("http"), secrets.read("ca.crt"));
    eventually("ready", async || {
        (get(&address, &ca, "/readyz", Some(&secrets.key)).status == 200).then_some(())
    })
    .await;
}

fn get(address: &str, ca: &str, path: &str, key: Option<&str>) -> http::Response {
    ask("GET", address, ca, path, key)
}

fn ask(method: &str, address: &str, ca: &str, path: &str, key: Option<&str>) -> http::Response {
    let key = key.map_or_else(String::new, |key| format!("Authorization: Bearer {key}\r\n"));
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n{key}\r\n"
    );
    http::secure(address, ca, request.as_bytes())
}

async fn tokens(client: &Client, request: GenerateRequest) -> Vec<u32> {
    let mut generation = client.generate(request).await.unwrap();
    let mut ids = Vec::new();
    while let Some(event) = generation.next().await.unwrap() {
        if let muster_client::Event::Token(frame) = event {
            ids.push(frame.token_id);
        }
    }
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_behind_tls_gives_the_same_tokens_to_who_is_let_in() {
    let secrets = Secrets::new();
    let router = router(&demo_model(), &secrets, &[]);
    let workers: Vec<Process> = (0..2).map(|_| worker(&router, &secrets, &[])).collect();
    ready(&router, &secrets).await;

    // Without TLS, in one process.
    let prompt = [1_u32, 844, 624];
    let plain = run(&[
        "generate",
        "--model",
        "demo",
        "--prompt-tokens",
        "1,844,624",
        "--max-tokens",
        "24",
        "--ignore-eos",
        "--json",
    ]);
    let plain: serde_json::Value = serde_json::from_slice(&plain.stdout).unwrap();
    let expected: Vec<u32> = serde_json::from_value(plain["token_ids"].clone()).unwrap();
    assert_eq!(expected.len(), 24);

    let url = [format!("https://{}", router.address("grpc"))];
    let by_key = Credentials { api_key: Some(secrets.key.clone()), ..secrets.credentials() };
    let client = Client::connect_as(&by_key, &url, Policy::default()).await.unwrap();
    assert_eq!(tokens(&client, greedy(&prompt, 24)).await, expected);
    let identity = Some((secrets.read("client/tls.crt"), secrets.read("client/tls.key")));
    let by_certificate = Credentials { identity, ..secrets.credentials() };
    let other = Client::connect_as(&by_certificate, &url, Policy::default()).await.unwrap();
    assert_eq!(tokens(&other, greedy(&prompt, 24)).await, expected);
    // A client that trusts other authorities refuses the router.
    let error = Client::connect_as(&Credentials::default(), &url, Policy::default()).await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");

    // A key removed from the file is revoked, in a running router and for a connected client.
    std::fs::write(secrets.path("keys"), "# nobody\n").unwrap();
    eventually("revoked", async || match client.model().await {
        Ok(_) => None,
        Err(error) => {
            assert!(error.to_string().contains("revoked"), "{error}");
            Some(())
        }
    })
    .await;
    assert_eq!(tokens(&other, greedy(&prompt, 24)).await, expected, "the certificate is as good as before");
    drop(workers);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_route_or_method_but_liveness_is_open() {
    let secrets = Secrets::new();
    let router = router(&demo_model(), &secrets, &["--fallback", "local"]);
    ready(&router, &secrets).await;
    let (address, ca) = (router.address("http"), secrets.read("ca.crt"));
    let wrong = "muster-0000000000000000000000000000000000000000000000000000000000000000";
    for (method, path) in [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/demo"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/healthz/"),
        ("GET", "/health/"),
        ("OPTIONS", "/v1/models"),
        ("GET", "/nothing"),
        ("DELETE", "/v1/models"),
    ] {
        for key in [None, Some(wrong), Some("")] {
            let answer = ask(method, &address, &ca, path, key);
            assert_eq!(answer.status, 401, "{method} {path} {key:?}");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
        }
        assert_ne!(ask(method, &address, &ca, path, Some(&secrets.key)).status, 401, "{method} {path}");
    }
    for path in ["/healthz", "/health", "/ping"] {
        assert_eq!(get(&address, &ca, path, None).status, 200, "{path}");
    }

    let stranger = secrets.channel(&router.address("grpc"), None).await.unwrap();
    let worker = secrets.channel(&router.address("grpc"), Some("worker")).await.unwrap();
    let mut asked = 0;
    for method in methods() {
        let is_for_workers = method.ends_with("/Join") || method.ends_with("/Fetch");
        for key in [None, Some(wrong)] {
            let code = call(&stranger, &method, key).await;
            assert_eq!(code, Code::Unauthenticated, "{method} {key:?}");
        }
        let by_worker = call(&worker, &method, None).await;
        assert_eq!(by_worker == Code::PermissionDenied, !is_for_workers, "{method}: {by_worker:?}");
        assert_ne!(by_worker, Code::Unauthenticated, "{method}");
        let by_key = call(&stranger, &method, Some(&secrets.key)).await;
        assert_eq!(by_key == Code::Unauthenticated, is_for_workers, "{method}: {by_key:?}");
        asked += 1;
    }
    assert!(asked >= 8, "{asked} methods");
    assert_eq!(call(&stranger, "/grpc.health.v1.Health/Check", None).await, Code::Ok);
}

/// Methods open without credentials, for every way to start a router.
#[tokio::test(flavor = "multi_thread")]
async fn what_stands_open_was_asked_for_by_name() {
    let secrets = Secrets::new();
    let (model, keys) = (demo_model().display().to_string(), secrets.path("keys").display().to_string());
    let start = |grpc: &str, tls: bool, more: &[&str]| {
        let args =
            ["router", "--model", &model, "--http", "127.0.0.1:0", "--grpc", grpc, "--fallback", "local"];
        let files = if tls { secrets.flags("router") } else { Vec::new() };
        let args = args.iter().chain(more).map(ToString::to_string).chain(files);
        Process::start(&args.collect::<Vec<_>>())
    };
    let (near, far) = ("127.0.0.1:0", "0.0.0.0:0");
    let (plain, no_keys, keys) = ("--insecure-plaintext", "--insecure-no-keys", ["--api-keys", &keys]);
    // Address, TLS, flags; whether clients' methods and workers' methods are open.
    let served: [(&str, bool, &[&str], bool, bool); 9] = [
        (near, false, &[], true, true),
        (near, false, &keys, false, true),
        (near, true, &[], false, false),
        (near, true, &keys, false, false),
        (near, true, &[no_keys], true, false),
        (far, false, &[plain, no_keys], true, true),
        (far, true, &[], false, false),
        (far, true, &keys, false, false),
        (far, true, &[no_keys], true, false),
    ];
    for (grpc, tls, flags, clients, workers) in served {
        let router = start(grpc, tls, flags).unwrap();
        let address = router.address("grpc");
        let channel = if tls {
            secrets.channel(&address, None).await
        } else {
            let port = address.rsplit(':').next().unwrap().to_owned();
            Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap().connect().await
        };
        let channel = channel.unwrap();
        for method in methods() {
            let is_for_workers = method.ends_with("/Join") || method.ends_with("/Fetch");
            let is_open = if is_for_workers { workers } else { clients };
            let code = call(&channel, &method, None).await;
            assert_eq!(
                code != Code::Unauthenticated,
                is_open,
                "{grpc} tls {tls} {flags:?} {method}: {code:?}"
            );
        }
    }
    let refused: [(&str, bool, &[&str], &str); 5] = [
        (far, false, &[], "ask for plaintext by name with --insecure-plaintext"),
        (far, false, &keys, "ask for plaintext by name with --insecure-plaintext"),
        (far, false, &[no_keys], "ask for plaintext by name with --insecure-plaintext"),
        (far, false, &[plain], "ask for that by name with --insecure-no-keys"),
        (far, false, &[plain, keys[0], keys[1]], "everybody may join and fetch the experts' weights"),
    ];
    for (grpc, tls, flags, reason) in refused {
        let error = start(grpc, tls, flags).map(drop).unwrap_err();
        assert!(error.contains(reason), "{grpc} tls {tls} {flags:?}: {error}");
    }
}

/// What a router serves and its interface describes, but for health.
fn methods() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(muster_proto::DESCRIPTORS).unwrap();
    let mut methods = vec!["/grpc.reflection.v1.ServerReflection/ServerReflectionInfo".to_owned()];
    for file in &set.file {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            if !["muster.expert.v1.Experts", "muster.expert.v1.Control"].contains(&name.as_str()) {
                methods.extend(service.method.iter().map(|method| format!("/{name}/{}", method.name())));
            }
        }
    }
    methods
}

/// The status of a call with an empty message.
async fn call(channel: &Channel, method: &str, key: Option<&str>) -> Code {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let mut request = tonic::Request::new(());
    request.set_timeout(std::time::Duration::from_secs(10));
    if let Some(key) = key {
        request
            .metadata_mut()
            .insert("authorization", MetadataValue::try_from(format!("Bearer {key}")).unwrap());
    }
    let path = PathAndQuery::try_from(method).unwrap();
    match grpc.server_streaming(request, path, tonic_prost::ProstCodec::<(), ()>::default()).await {
        Err(status) => status.code(),
        Ok(answer) => match answer.into_inner().message().await {
            Err(status) => status.code(),
            Ok(_) => Code::Ok,
        },
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_behind_tls_ends_and_others_are_served() {
    let secrets = Secrets::new();
    let router = router(&demo_model(), &secrets, &["--fallback", "local"]);
    let worker = worker(&router, &secrets, &["--admin", "127.0.0.1:0"]);
    ready(&router, &secrets).await;
    let ca = secrets.read("ca.crt");
    let pings = muster_testkit::flood::frame(6, 0, 0, &[7; 8]).repeat(1000);
    let mut peer = http::secured(&router.address("grpc"), &ca);
    peer.sock.set_write_timeout(Some(muster_tests::process::PATIENCE)).unwrap();
    peer.write_all(muster_testkit::flood::OPENING).unwrap();
    let rounds = (0..1_000_000).find(|_| peer.write_all(&pings).is_err());
    assert!(rounds.is_some(), "it goes on");
    let metrics = get(&router.address("http"), &ca, "/metrics", Some(&secrets.key)).text();
    assert!(metrics.contains("muster_connections_flooding_total 1\n"), "{metrics}");
    eventually("said", async || router.log().contains("more control frames").then_some(())).await;
    let channel = secrets.channel(&router.address("grpc"), None).await.unwrap();
    assert_eq!(call(&channel, "/muster.v1.Inference/GetModel", Some(&secrets.key)).await, Code::Ok);
    // Processes of the cluster never count as flooding.
    let of_worker = http::get(&worker.address("admin"), "/metrics").text();
    assert!(of_worker.contains("muster_connections_flooding_total 0\n"), "{of_worker}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_to_the_wrong_port_is_told() {
    let secrets = Secrets::new();
    let secured = router(&demo_model(), &secrets, &["--fallback", "local"]);
    ready(&secured, &secrets).await;
    let (address, ca) = (secured.address("http"), secrets.read("ca.crt"));
    let answer = http::get(&address, "/v1/models");
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("use https:// in its URL"), "{}", answer.text());
    assert_eq!(get(&address, &ca, "/healthz", None).status, 200, "and serving goes on");
    let plain = async |address: String| {
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        let mut client = muster_proto::v1::inference_client::InferenceClient::new(channel);
        let status = client.get_model(muster_proto::v1::GetModelRequest {}).await.unwrap_err();
        let mut reasons = status.to_string();
        let mut source = std::error::Error::source(&status);
        while let Some(error) = source {
            reasons += &error.to_string();
            source = error.source();
        }
        reasons
    };
    let reasons = plain(secured.address("grpc")).await;
    assert!(reasons.contains("use https:// in its URL"), "{reasons}");
    eventually("logged", async || secured.log().contains("this port speaks TLS").then_some(())).await;

    let (grpc, http) = (secured.address("grpc"), secured.address("http"));
    let port = http.rsplit(':').next().unwrap();
    let ca_file = secrets.path("certs").join("ca.crt");
    let ca_file = ca_file.to_str().unwrap();
    for (args, words) in [
        (&["status", "--grpc", &grpc][..], "speaks TLS; write https:// in its URL"),
        (&["generate", "x", "--grpc", &grpc], "speaks TLS; write https:// in its URL"),
        (&["status", "--grpc", &http], "speaks TLS; write https:// in its URL"),
        (
            &["status", "--ca", ca_file, "--grpc", &format!("https://localhost:{port}")],
            "speaks HTTP/1.1 and not gRPC",
        ),
        (&["status", "--grpc", &format!("https://{grpc}")], "--ca names the authority"),
        (&["probe", "--admin", &http], "it speaks TLS, and this is asked in plain HTTP"),
        (&["probe", "--admin", &grpc], "it speaks TLS, and this is asked in plain HTTP"),
    ] {
        let output = run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(words), "{args:?}: {said}");
    }

    let open = muster_tests::cluster::Cluster::start(muster_tests::cluster::Setup::new(&demo_model()));
    let reasons = plain(open.http()).await;
    assert!(reasons.contains("this is the HTTP port"), "{reasons}");
    assert_eq!(http::get(&open.http(), "/healthz").status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_stall_in_a_handshake_keep_nobody_out() {
    let secrets = Secrets::new();
    let router = router(&demo_model(), &secrets, &["--fallback", "local"]);
    ready(&router, &secrets).await;
    let mut peers: Vec<_> = (0..300).map(|_| TcpStream::connect(router.address("grpc")).unwrap()).collect();
    let channel = secrets.channel(&router.address("grpc"), None).await.unwrap();
    assert_eq!(call(&channel, "/muster.v1.Inference/GetModel", Some(&secrets.key)).await, Code::Ok);
    peers.retain_mut(|peer| {
        peer.set_nonblocking(true).unwrap();
        peer.read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    });
    // The oldest connections gave way; the others still have their time.
    assert!((200..300).contains(&peers.len()), "{} still stall", peers.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_with_the_wrong_certificate_is_refused_with_a_reason_on_both_sides() {
    let (secrets, others) = (Secrets::new(), Secrets::new());
    let router = router(&demo_model(), &secrets, &["--fallback", "local"]);
    let grpc = router.address("grpc");
    let join = |more: &[String]| {
        let args =
            ["worker", "--join", &grpc, "--listen", "127.0.0.1:0", "--model", "demo"].map(String::from);
        Process::start(&[&args[..], more].concat())
    };

    // With a client's certificate it may not join; both sides log the reason.
    let client = join(&secrets.flags("client")).unwrap();
    eventually("refused", async || client.log().contains("it takes a certificate of a worker").then_some(()))
        .await;
    eventually("and said", async || {
        router.log().contains("it takes a certificate of a worker").then_some(())
    })
    .await;
    // A foreign certificate or no TLS fails in the handshake.
    let foreign = join(&others.flags("worker")).unwrap();
    eventually("not trusted", async || foreign.log().contains("UnknownIssuer").then_some(())).await;
    let plain = join(&[]).unwrap();
    eventually("no TLS", async || plain.log().contains("speaks TLS and this process does not").then_some(()))
        .await;
    eventually("and said", async || router.log().contains("a TLS handshake failed").then_some(())).await;

    // A worker with a client's certificate: no router connects to it.
    let (address, model) = (client.address("listen"), demo_model().display().to_string());
    let args =
        ["router", "--model", &model, "--worker", &address, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let args =
        [&args.map(String::from)[..], &["--connect-timeout".into(), "2s".into()], &secrets.flags("router")]
            .concat();
    let error = Process::start(&args).map(drop).unwrap_err();
    assert!(error.contains("the peer is a client (spiffe://muster/muster/client), not a worker"), "{error}");

    // A router with a worker's certificate: no worker serves it.
    let honest = worker(&router, &secrets, &[]);
    let address = honest.address("listen");
    let args =
        ["router", "--model", &model, "--worker", &address, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let args =
        [&args.map(String::from)[..], &["--connect-timeout".into(), "2s".into()], &secrets.flags("worker")]
            .concat();
    let error = Process::start(&args).map(drop).unwrap_err();
    assert!(error.contains("it takes a certificate of a router"), "{error}");
    assert!(honest.log().contains("it takes a certificate of a router"), "{}", honest.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_secret_is_logged() {
    let secrets = Secrets::new();
    let router = router(&demo_model(), &secrets, &["--log", "trace"]);
    let worker = worker(&router, &secrets, &["--log", "trace"]);
    ready(&router, &secrets).await;
    let credentials = Credentials { api_key: Some(secrets.key.clone()), ..secrets.credentials() };
    let client =
        Client::connect_as(&credentials, &[format!("https://{}", router.address("grpc"))], Policy::default())
            .await;
    assert_eq!(tokens(&client.unwrap(), greedy(&[1, 844], 4)).await.len(), 4);
    let body_of = |role: &str| {
        let key = secrets.read(&format!("{role}/tls.key"));
        key.lines().find(|line| !line.starts_with("-----")).unwrap().to_owned()
    };
    let (hidden, keys) = (
        [secrets.key["muster-".len()..].to_owned(), body_of("router"), body_of("worker")],
        std::fs::read_to_string(secrets.path("keys")).unwrap(),
    );
    let hash = keys.trim().rsplit(':').next().unwrap();
    for process in [&router, &worker] {
        let log = process.log();
        assert!(log.len() > 1000, "it logs everything");
        for secret in hidden.iter().map(String::as_str).chain([hash]) {
            assert!(!log.contains(secret), "a secret is in the log");
        }
    }
}
