//! The server as a client sees it, byte for byte, over sockets.

mod foreign;

use std::sync::Arc;
use std::time::Duration;

use muster_identity::Access;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Edge;
use crate::door::Door;
use crate::fake;
use crate::health::Health;
use crate::service::Service;

const SOON: Duration = Duration::from_secs(10);

struct Server {
    address: std::net::SocketAddr,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(service: Service) -> Self {
        Self::start_with(service, Edge::default(), Access::Open).await
    }

    async fn start_with(service: Service, edge: Edge, access: Access) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let metrics = Arc::new(|| "muster_up 1\n".to_owned());
        let task = tokio::spawn(super::serve(
            service,
            metrics,
            Door { access, ..Door::open(listener) },
            edge,
            shutdown.clone(),
        ));
        Self { address, shutdown, task }
    }

    /// Sends bytes, reads until the server closes, returns status, head and body.
    async fn raw(&self, request: &[u8]) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_lowercase(), body.to_owned())
    }

    async fn get(&self, method: &str, path: &str) -> (u16, String, String) {
        let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        self.raw(request.as_bytes()).await
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, String, String) {
        self.raw(&post(path, body)).await
    }
}

fn post(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n"
    );
    (head + &body).into_bytes()
}

/// The data of the events of a chunked SSE body.
fn events(body: &str) -> Vec<String> {
    body.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn a_completion_is_answered() {
    let server = Server::start(fake::service(fake::echo)).await;
    let body = json!({"model": fake::MODEL, "prompt": [[5, 6], [7]], "max_tokens": 2, "n": 2});
    let (status, head, body) = server.post("/v1/completions", &body).await;
    assert_eq!(status, 200, "{body}");
    assert!(head.contains("content-type: application/json"), "{head}");
    let answer = parse(&body);
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["model"], fake::MODEL);
    let texts: Vec<_> = (0..4).map(|i| answer["choices"][i]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["<5><6>!", "<5><6>!", "<7><7>!", "<7><7>!"]);
    assert_eq!(
        answer["usage"],
        json!({
            "prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 2},
        })
    );
}

#[tokio::test]
async fn a_stream_is_server_sent_events() {
    let server = Server::start(fake::service(fake::echo)).await;
    let body = json!({"prompt": [5], "max_tokens": 2, "stream": true});
    let (status, head, body) = server.post("/v1/completions", &body).await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    let events = events(&body);
    assert_eq!(events.len(), 5, "{body}");
    assert_eq!(events[4], "[DONE]");
    let texts: Vec<Value> =
        events[..4].iter().map(|event| parse(event)["choices"][0]["text"].clone()).collect();
    assert_eq!(texts, ["<5>", "<5>", "!", ""]);
    assert_eq!(parse(&events[3])["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_failure_is_a_status_or_the_last_event() {
    let server = Server::start(fake::service(fake::break_off)).await;
    let (status, head, body) = server.post("/v1/completions", &json!({"prompt": [5]})).await;
    assert_eq!(status, 503);
    assert!(head.contains("retry-after: 1"), "{head}");
    assert_eq!(parse(&body)["error"]["code"], "experts_unavailable");

    let (status, _, body) = server.post("/v1/completions", &json!({"prompt": [5], "stream": true})).await;
    assert_eq!(status, 200);
    let events = events(&body);
    assert_eq!(events.len(), 2, "{body}");
    assert_eq!(parse(&events[1])["error"]["type"], "server_error");
}

#[tokio::test]
async fn what_the_service_refuses() {
    let server = Server::start(fake::service(fake::echo)).await;
    let cases = [
        (json!({"prompt": [5], "model": "../.."}), 404, "model"),
        (json!({"prompt": [5], "model": "x".repeat(1 << 20)}), 404, "model"),
        (json!({"prompt": [1000]}), 400, "prompt"),
        (json!({"prompt": "text"}), 400, "prompt"),
        (json!({"prompt": [5], "max_tokens": 0}), 400, "max_tokens"),
        (json!({"prompt": [5], "max_tokens": 64}), 400, "max_tokens"),
        (json!({"prompt": [5], "n": 0}), 400, "n"),
        (json!({"prompt": [5], "stop": ""}), 400, "stop"),
        (json!({"prompt": [5], "stop": ["\n"]}), 400, "stop"),
        (json!({"prompt": [5], "temperature": 1e308}), 400, "temperature"),
        (json!({"prompt": [5], "logit_bias": {"1000": 1}}), 400, "logit_bias"),
    ];
    for (request, expected, param) in cases {
        let (status, _, body) = server.post("/v1/completions", &request).await;
        assert_eq!(status, expected, "{body}");
        assert_eq!(parse(&body)["error"]["param"], param, "{body}");
        assert!(body.len() < 4096);
    }
    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    let (status, _, body) = server.post("/v1/chat/completions", &chat).await;
    assert_eq!(status, 400);
    assert!(body.contains("chat template"), "{body}");
    let (_, _, body) = server.post("/v1/completions", &json!({"prompt": [5], "stop": "x"})).await;
    assert!(body.contains("no tokenizer") && body.contains("stop_token_ids"), "{body}");
    let (status, ..) = server.post("/v1/completions", &json!({"prompt": [5]})).await;
    assert_eq!(status, 200, "the next good request is served");
    // As some programs begin UTF-8.
    let body = "\u{feff}{\"prompt\": [5]}";
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let (status, _, body) = server.raw(request.as_bytes()).await;
    assert_eq!(status, 200, "{body}");
}

#[tokio::test]
async fn tools_and_variables_go_into_the_template() {
    let template = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{{ extra }}{% for m in messages %}\
        {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments|tojson }}{% endfor %}{% endfor %}";
    let tokenizer = fake::tokenizer(template);
    let (service, mut prompts) = fake::chat_service(tokenizer.clone());
    let server = Server::start(service).await;
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}});
    let request = json!({
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "r"}
        ],
        "tools": [tool], "chat_template_kwargs": {"extra": "x"}, "max_tokens": 2
    });
    let (status, _, body) = server.post("/v1/chat/completions", &request).await;
    assert_eq!(status, 200, "{body}");
    let message = &parse(&body)["choices"][0]["message"];
    assert!(message["content"].is_string() && message.get("tool_calls").is_none(), "{body}");
    assert_eq!(prompts.recv().await.unwrap(), tokenizer.encode_chat("f;xq{\"a\": 1}r").unwrap());

    let messages = json!([{"role": "user", "content": "q"}]);
    let mut nested = json!(1);
    for _ in 0..47 {
        nested = json!([nested]);
    }
    for (fields, param) in [
        (json!({"chat_template_kwargs": {"tools": 1}}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"extra": 1, "not_allowed": 1}}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"a": [nested]}}), "chat_template_kwargs"),
        (json!({"tools": [tool], "tool_choice": "required"}), "tool_choice"),
    ] {
        let mut request = json!({ "messages": messages });
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (status, _, body) = server.post("/v1/chat/completions", &request).await;
        assert_eq!((status, &parse(&body)["error"]["param"]), (400, &json!(param)), "{body}");
    }

    let without_tools = fake::tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}");
    let (service, _prompts) = fake::chat_service(without_tools);
    let server = Server::start(service).await;
    let request = json!({"messages": messages, "tools": [tool]});
    let (status, _, body) = server.post("/v1/chat/completions", &request).await;
    assert_eq!((status, &parse(&body)["error"]["param"]), (400, &json!("tools")), "{body}");
    assert!(body.contains("does not take tools"), "{body}");
    let request = json!({"messages": messages, "tools": [tool], "tool_choice": "none", "max_tokens": 2});
    assert_eq!(server.post("/v1/chat/completions", &request).await.0, 200);
}

#[tokio::test]
async fn paths_methods_and_bodies() {
    let server = Server::start(fake::service(fake::echo)).await;
    let cases = [
        ("GET", "/v1/models", 200),
        ("HEAD", "/v1/models", 200),
        ("GET", "/v1/models/org/tiny-moe", 200),
        ("GET", "/v1/models/org%2Ftiny-moe", 200),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/", 200),
        ("GET", "/healthz", 200),
        ("GET", "/health", 200),
        ("GET", "/version", 200),
        ("GET", "/ping", 200),
        ("POST", "/ping", 200),
        ("POST", "/health", 405),
        ("POST", "/v1/completions/", 404),
        ("POST", "/chat/completions", 404),
        ("GET", "/readyz", 200),
        ("GET", "/metrics", 200),
        ("GET", "/", 404),
        ("GET", "/v1/../etc/passwd", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("POST", "/v1/completions", 415),
    ];
    for (method, path, expected) in cases {
        let (status, _, body) = server.get(method, path).await;
        assert_eq!(status, expected, "{method} {path}: {body}");
        if status >= 400 {
            assert_eq!(parse(&body)["error"]["type"], "invalid_request_error", "{method} {path}");
        }
    }
    let (_, _, body) = server.get("GET", "/v1/models").await;
    assert_eq!(parse(&body)["data"][0]["id"], fake::MODEL);
    let (_, _, body) = server.get("GET", "/metrics").await;
    assert_eq!(body, "muster_up 1\n");
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                content-type: application/json\r\ncontent-length: 100000000\r\n\r\n";
    assert_eq!(server.raw(head.as_bytes()).await.0, 413);
}

#[tokio::test]
async fn heads_that_are_too_large_or_wrong() {
    let server = Server::start(fake::service(fake::echo)).await;
    let many = "a: b\r\n".repeat(200);
    let long = format!("a: {}\r\n", "b".repeat(60 << 10));
    let cases = [
        (format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{many}\r\n"), 431),
        (format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{long}{long}\r\n"), 431),
        ("GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".into(), 400),
        ("GET /healthz HTTP/1.1\r\nno colon\r\n\r\n".into(), 400),
        ("\u{16}\u{3}\u{1}\u{2}\u{0}\r\n\r\n".into(), 400),
        ("GET /healthz HTTP/1.0\r\n\r\n".into(), 200),
    ];
    for (request, expected) in cases {
        let (status, ..) = server.raw(request.as_bytes()).await;
        assert_eq!(status, expected, "{:.60}", request);
    }
}

#[tokio::test]
async fn a_request_is_for_one_host() {
    let server = Server::start(fake::service(fake::echo)).await;
    for path in ["/healthz", "/v1/models", "/nothing"] {
        let expected = if path == "/nothing" { 404 } else { 200 };
        let target = format!("http://y{path}");
        let cases = [
            (path, "1.1", "", 400),
            (path, "1.1", "host: x\r\nhost: x\r\n", 400),
            (path, "1.1", "host: x\r\nhost: y\r\n", 400),
            (path, "1.1", "host: user@x\r\n", 400),
            (path, "1.1", "host: x/y\r\n", 400),
            (path, "1.1", "host: x:8080\r\n", expected),
            (path, "1.1", "host:\r\n", expected),
            (path, "1.0", "", expected),
            (path, "1.0", "host: x\r\nhost: y\r\n", 400),
            // The target's host takes precedence, but a host header is required.
            (&target, "1.1", "host: x\r\n", expected),
            (&target, "1.1", "", 400),
        ];
        for (target, version, host, expected) in cases {
            let request = format!("GET {target} HTTP/{version}\r\n{host}connection: close\r\n\r\n");
            let (status, _, body) = server.raw(request.as_bytes()).await;
            assert_eq!(status, expected, "{request}{body}");
            if status == 400 {
                assert_eq!(parse(&body)["error"]["type"], "invalid_request_error", "{body}");
            }
        }
    }
}

/// The status of an answer's first bytes.
fn status(answer: &[u8]) -> Option<u16> {
    std::str::from_utf8(answer).ok()?.split(' ').nth(1)?.parse().ok()
}

/// The status of an answer, even if it comes before the request was read.
async fn attempt(address: std::net::SocketAddr, request: &[u8]) -> Option<u16> {
    let (mut from, mut to) = TcpStream::connect(address).await.unwrap().into_split();
    let request = request.to_vec();
    let sending = tokio::spawn(async move { to.write_all(&request).await.map(|()| to) });
    let mut answer = [0; 12];
    let read = from.read_exact(&mut answer).await;
    let _ = sending.await;
    read.ok().and_then(|_| status(&answer))
}

#[tokio::test]
async fn peers_that_stall_with_large_bodies_keep_nobody_out() {
    let server = Server::start(fake::service(fake::echo)).await;
    let mut peers = Vec::new();
    for _ in 0..40 {
        let mut peer = TcpStream::connect(server.address).await.unwrap();
        let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                    content-length: 1000000\r\n\r\n";
        peer.write_all(head.as_bytes()).await.unwrap();
        peer.write_all(&[b' '; 100 << 10]).await.unwrap();
        peers.push(peer);
    }
    let mut body = json!({"prompt": [5], "max_tokens": 2}).to_string();
    body.insert_str(1, &" ".repeat(500 << 10));
    let length = body.len();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    );
    timeout(SOON, async {
        // At first all places are taken by stalled bodies that are too young to evict.
        while attempt(server.address, request.as_bytes()).await != Some(200) {}
    })
    .await
    .expect("a large body gets through");
    // Only the stalled bodies beyond the places were refused with a retry.
    let mut told = Vec::new();
    timeout(SOON, async {
        while told.len() < 8 {
            peers.retain(|peer| {
                let mut answer = [0; 12];
                let read = peer.try_read(&mut answer);
                told.extend(read.is_ok().then(|| status(&answer)));
                read.is_err()
            });
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("peers gave way");
    assert!(told.iter().all(|&status| status == Some(503)), "{told:?}");
    assert!(peers.len() >= 31, "{} still stall", peers.len());
}

#[tokio::test]
async fn readiness_tells_the_truth() {
    let probe = || Health::NotReady { reason: "layer 1 expert 2 has no live worker".into() };
    let server = Server::start(fake::service_with(Arc::new(probe), fake::echo)).await;
    let (status, _, body) = server.get("GET", "/readyz").await;
    assert_eq!(status, 503);
    assert_eq!(parse(&body)["reason"], "layer 1 expert 2 has no live worker");
    assert_eq!(server.get("GET", "/healthz").await.0, 200);
    for path in ["/health", "/ping"] {
        let (status, _, body) = server.get("GET", path).await;
        assert_eq!((status, parse(&body)), (503, json!({"status": "not ready"})), "open to all: no reasons");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_cancels() {
    for stream in [false, true] {
        let (sender, mut choices) = mpsc::channel(1);
        let server = Server::start(fake::service(move |choice| sender.try_send(choice).unwrap())).await;
        let mut client = TcpStream::connect(server.address).await.unwrap();
        client.write_all(&post("/v1/completions", &json!({"prompt": [5], "stream": stream}))).await.unwrap();
        let choice = timeout(SOON, choices.recv()).await.unwrap().unwrap();
        assert!(!choice.events.is_closed());
        drop(client);
        timeout(SOON, choice.events.closed()).await.expect("the generation is dropped");
    }
}

#[tokio::test]
async fn shutdown_finishes_what_is_under_way() {
    let (sender, mut choices) = mpsc::channel(1);
    let server = Server::start(fake::service(move |choice| sender.try_send(choice).unwrap())).await;
    let idle = TcpStream::connect(server.address).await.unwrap();
    let mut client = TcpStream::connect(server.address).await.unwrap();
    client.write_all(&post("/v1/completions", &json!({"prompt": [5], "stream": true}))).await.unwrap();
    let choice = timeout(SOON, choices.recv()).await.unwrap().unwrap();
    server.shutdown.cancel();
    while TcpStream::connect(server.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    fake::echo(choice);
    let mut answer = String::new();
    timeout(SOON, client.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.contains("data: [DONE]"), "{answer}");
    timeout(SOON, server.task).await.expect("an idle connection does not hold it up").unwrap();
    drop(idle);
}

#[tokio::test]
async fn a_client_that_writes_all_before_it_reads_learns_why_it_was_refused() {
    let server = Server::start(fake::service(fake::echo)).await;
    // Larger than the limit and than the buffers of a connection.
    let body = "x".repeat(32 << 20);
    let length = body.len();
    let json = "content-type: application/json";
    for (line, head, status) in [
        ("POST /v1/completions", json, 413),
        ("POST /v1/completions", "content-type: text/plain", 415),
        ("POST /v1/completion", json, 404),
        ("POST /v1/models", json, 405),
    ] {
        let request = format!(
            "{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        let (answered, ..) = server.raw(request.as_bytes()).await;
        assert_eq!(answered, status, "{line} {head}");
    }
    // A client with `expect: 100-continue` is refused before it sends.
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\n{json}\r\ncontent-length: {length}\r\nexpect: 100-continue\r\n\r\n"
    );
    let (answered, head, _) = server.raw(request.as_bytes()).await;
    assert_eq!(answered, 413, "{head}");
}
