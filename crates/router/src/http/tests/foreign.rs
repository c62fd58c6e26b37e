//! Behaviour of foreign clients: half-closed connections, other origins, names of requests, wrong paths.

use muster_identity::Access;
use muster_identity::NewKey;

use super::super::Cors;
use super::*;

/// Sends a request, closes this half, and reads to the end.
async fn half_closed(server: &Server, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(request).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn a_client_that_closes_its_half_gets_its_answer() {
    let server = Server::start(fake::service(fake::echo)).await;
    for stream in [false, true] {
        let request = post("/v1/completions", &json!({"prompt": [5], "max_tokens": 3, "stream": stream}));
        let answer = half_closed(&server, &request).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        assert_eq!(answer.matches("<5>").count(), 3, "{answer}");
        assert_eq!(answer.contains("data: [DONE]"), stream);
    }
    let answer = half_closed(&server, b"GET /healthz HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK"), "{answer}");
    let cut = half_closed(&server, &post("/v1/completions", &json!({"prompt": [5]}))[..120]).await;
    assert!(cut.is_empty() || cut.starts_with("HTTP/1.1 400"), "{cut}");
}

#[tokio::test]
async fn a_client_that_closed_its_half_and_waits_is_told_to() {
    let (sender, mut choices) = mpsc::channel(1);
    let server = Server::start(fake::service(move |choice| sender.try_send(choice).unwrap())).await;
    let mut client = TcpStream::connect(server.address).await.unwrap();
    client.write_all(&post("/v1/completions", &json!({"prompt": [5], "max_tokens": 3}))).await.unwrap();
    client.shutdown().await.unwrap();
    let choice = timeout(SOON, choices.recv()).await.unwrap().unwrap();
    let mut interim = [0; 25];
    timeout(SOON, client.read_exact(&mut interim)).await.expect("it is looked for").unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    fake::echo(choice);
    let mut answer = String::new();
    timeout(SOON, client.read_to_string(&mut answer)).await.unwrap().unwrap();
    let answer = answer.replace("HTTP/1.1 100 Continue\r\n\r\n", "");
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("<5><5><5>"), "{answer}");
}

#[tokio::test]
async fn a_client_that_closed_its_half_and_went_cancels() {
    let request = json!({"prompt": [5]}).to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{request}",
        request.len()
    );
    // Bytes behind the request, which wait until it is answered.
    for behind in ["", "\r\n", "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", &"GET / HTTP/1.1\r\n".repeat(200)]
    {
        let (sender, mut choices) = mpsc::channel(1);
        let server = Server::start(fake::service(move |choice| sender.try_send(choice).unwrap())).await;
        let mut client = TcpStream::connect(server.address).await.unwrap();
        client.write_all(request.as_bytes()).await.unwrap();
        let choice = timeout(SOON, choices.recv()).await.unwrap().unwrap();
        client.write_all(behind.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        assert!(!choice.events.is_closed());
        drop(client);
        timeout(SOON, choice.events.closed()).await.expect("the generation is dropped");
    }
}

/// A request sent by a page of `origin`.
fn from(origin: &str, method: &str, path: &str, more: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nhost: x\r\norigin: {origin}\r\nconnection: close\r\n{more}\r\n")
        .into_bytes()
}

const PREFLIGHT: &str = "access-control-request-method: POST\r\n\
    access-control-request-headers: authorization,content-type,x-stainless-lang\r\n";

#[tokio::test]
async fn pages_of_other_origins_are_told_whether_they_may() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys");
    std::fs::write(&file, NewKey::generate("a").unwrap().line).unwrap();
    let access = Access::by_keys(file).unwrap();
    let start = async |cors: Cors| {
        let edge = Edge { cors, ..Edge::default() };
        Server::start_with(fake::service(fake::echo), edge, access.clone()).await
    };
    let origin = |head: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix("access-control-allow-origin: "));
        line.map(str::to_owned)
    };
    let local = start(Cors::new(Vec::new(), true)).await;
    let page = "http://localhost:3000";
    let (status, head, _) = local.raw(&from(page, "OPTIONS", "/v1/chat/completions", PREFLIGHT)).await;
    assert_eq!((status, origin(&head).as_deref()), (200, Some(page)), "before keys are asked for: {head}");
    assert!(
        head.contains("access-control-allow-headers: authorization,content-type,x-stainless-lang"),
        "{head}"
    );
    assert!(head.contains("access-control-allow-methods: get,post"), "{head}");
    let (status, head, _) = local.raw(&from(page, "GET", "/v1/models", "")).await;
    assert_eq!((status, origin(&head).as_deref()), (401, Some(page)), "errors can be read, too");
    assert!(head.contains("access-control-expose-headers: x-muster-ignored,x-request-id"), "{head}");
    let (_, head, _) = local.raw(&from("https://evil.example", "OPTIONS", "/v1/models", PREFLIGHT)).await;
    assert_eq!(origin(&head), None, "{head}");

    let named = start(Cors::new(vec!["https://a.example".to_owned()], false)).await;
    for (page, told) in [("https://a.example", Some("https://a.example")), ("http://localhost:3000", None)] {
        let (_, head, _) = named.raw(&from(page, "OPTIONS", "/v1/models", PREFLIGHT)).await;
        assert_eq!(origin(&head).as_deref(), told, "{page}: {head}");
    }
    let all = start(Cors::new(vec!["*".to_owned()], false)).await;
    let (_, head, _) = all.raw(&from("https://b.example", "OPTIONS", "/v1/models", PREFLIGHT)).await;
    assert_eq!(origin(&head).as_deref(), Some("*"));
    let off = start(Cors::new(Vec::new(), false)).await;
    let (status, head, _) = off.raw(&from(page, "OPTIONS", "/v1/models", PREFLIGHT)).await;
    assert_eq!((status, origin(&head)), (401, None));
}

#[tokio::test]
async fn a_request_has_a_name() {
    let server = Server::start(fake::service(fake::echo)).await;
    let name = async |header: &str| {
        let request = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}\r\n");
        let (_, head, _) = server.raw(request.as_bytes()).await;
        let names: Vec<String> =
            head.lines().filter_map(|line| line.strip_prefix("x-request-id: ")).map(str::to_owned).collect();
        assert_eq!(names.len(), 1, "{head}");
        names[0].clone()
    };
    assert_eq!(name("x-request-id: abc-1\r\n").await, "abc-1");
    let (made, other) = (name("").await, name(&format!("x-request-id: {}\r\n", "x".repeat(1000))).await);
    assert!(made.len() == 32 && other.len() == 32 && made != other, "{made} {other}");
    let (_, head, _) = server.get("GET", "/nothing").await;
    assert!(head.contains("x-request-id: "), "{head}");
}

#[tokio::test]
async fn wrong_paths_and_keys_are_told_what_to_use() {
    let server = Server::start(fake::service(fake::echo)).await;
    for (method, path, told) in [
        ("POST", "/chat/completions", "use /v1/chat/completions"),
        ("POST", "/v1/completions/", "use /v1/completions, without the slash"),
        ("GET", "/v1/model", "did you mean /v1/models?"),
        ("GET", "/v1/completions", "it takes POST"),
        ("DELETE", "/v1/models/org/tiny-moe", "it takes GET"),
        ("GET", "/v1/models/org/tiny-moe/", "use /v1/models/org/tiny-moe"),
        ("GET", "/v1", "/v1/models"),
    ] {
        let (_, _, body) = server.get(method, path).await;
        let message = parse(&body)["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(path) && message.contains(told), "{message}");
    }
    let (_, _, body) = server.get("GET", "/version").await;
    assert_eq!(parse(&body)["version"], env!("CARGO_PKG_VERSION"));

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys");
    let key = NewKey::generate("a").unwrap();
    std::fs::write(&file, &key.line).unwrap();
    let access = Access::by_keys(file).unwrap();
    let server = Server::start_with(fake::service(fake::echo), Edge::default(), access).await;
    let ask = async |path: &str, header: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}\r\n");
        server.raw(request.as_bytes()).await
    };
    for header in [
        format!("authorization: {}\r\n", key.key),
        "authorization: Basic eDp5\r\n".to_owned(),
        format!("x-api-key: {}\r\n", key.key),
        format!("api-key: {}\r\n", key.key),
    ] {
        let (status, _, body) = ask("/v1/models", &header).await;
        assert_eq!(status, 401);
        assert!(body.contains("send authorization: Bearer KEY"), "{body}");
        assert!(!body.contains(&key.key), "the key is not repeated");
    }
    assert_eq!(ask("/v1/models", &format!("authorization: Bearer {}\r\n", key.key)).await.0, 200);
    for path in ["/healthz", "/health", "/ping"] {
        assert_eq!(ask(path, "").await.0, 200, "{path} is open");
    }
    assert_eq!(ask("/version", "").await.0, 401);
}

#[tokio::test]
async fn a_batch_of_sixteen_prompts_is_answered() {
    let server = Server::start(fake::service(fake::echo)).await;
    let prompts: Vec<[u32; 1]> = (1..=16).map(|id| [id]).collect();
    let (status, _, body) =
        server.post("/v1/completions", &json!({"prompt": prompts, "max_tokens": 1})).await;
    assert_eq!(status, 200, "{body}");
    let choices = parse(&body)["choices"].as_array().unwrap().clone();
    let texts: Vec<&str> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    let expected: Vec<String> = (1..=16).map(|id| format!("<{id}>!")).collect();
    assert_eq!(texts, expected);
}

#[tokio::test]
async fn a_page_that_led_its_name_here_is_told_nothing() {
    let edge = || Edge { cors: Cors::new(Vec::new(), true), ..Edge::default() };
    let open = Server::start_with(fake::service(fake::echo), edge(), Access::Open).await;
    let ask = |host: &str| {
        format!("GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").into_bytes()
    };
    assert_eq!(open.raw(&ask("localhost:8080")).await.0, 200);
    let (status, _, body) = open.raw(&ask("evil.example:8080")).await;
    assert!(status == 421 && body.contains("--cors-origin"), "{status} {body}");
}
