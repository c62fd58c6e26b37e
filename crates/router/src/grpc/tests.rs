//! The server as a gRPC client sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use muster_proto::v1;
use muster_proto::v1::generate_event::Event;
use muster_proto::v1::generate_request::Prompt;
use muster_proto::v1::inference_client::InferenceClient;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_check_response::ServingStatus as Reported;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

use muster_telemetry::{MetricsHandle, Process};
use muster_testkit::flood::{Flood, flood};

use super::*;
use crate::fake;

const SOON: Duration = Duration::from_secs(10);

struct Running {
    address: String,
    channel: Channel,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), GrpcError>>,
}

async fn start(service: Service) -> Running {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(serve(service, None, Door::open(listener), shutdown.clone()));
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    Running { address: address.to_string(), channel, shutdown, task }
}

fn ask(ids: &[u32], max_tokens: u32) -> v1::GenerateRequest {
    let prompt = Some(Prompt::Tokens(v1::TokenIds { ids: ids.to_vec() }));
    v1::GenerateRequest { prompt, max_tokens: Some(max_tokens), ..Default::default() }
}

#[tokio::test]
async fn a_generation_streams_started_tokens_finished() {
    let server = start(fake::service(fake::echo)).await;
    let mut client = InferenceClient::new(server.channel.clone());
    let sampling = Some(v1::Sampling { seed: Some(9), ..Default::default() });
    let request = v1::GenerateRequest { top_logprobs: Some(1), sampling, ..ask(&[5, 6], 3) };
    let stream = client.generate(request).await.unwrap().into_inner();
    let events: Vec<_> = stream.map(|event| event.unwrap().event.unwrap()).collect().await;
    let Event::Started(started) = &events[0] else { panic!("{events:?}") };
    assert_eq!((started.prompt_tokens, started.seed, started.combine.as_str()), (2, 9, "exact"));
    let ids: Vec<_> = events[1..4]
        .iter()
        .map(|event| match event {
            Event::Token(token) => (token.index, token.token_id, token.logprob, token.top.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ids, [(0, 5, Some(-0.5), 1), (1, 6, Some(-0.5), 1), (2, 5, Some(-0.5), 1)]);
    let Event::Finished(finished) = &events[4] else { panic!("{events:?}") };
    assert_eq!((finished.reason(), finished.output_tokens), (v1::finished::Reason::Length, 3));
    assert_eq!((finished.text.as_str(), events.len()), ("!", 5));
}

#[tokio::test]
async fn a_call_has_a_name() {
    let server = start(fake::service(fake::echo)).await;
    let mut client = InferenceClient::new(server.channel.clone());
    let mut named = async |name: Option<&'static str>| {
        let mut request = tonic::Request::new(v1::GetModelRequest {});
        if let Some(name) = name {
            request.metadata_mut().insert("x-request-id", name.parse().unwrap());
        }
        let answer = client.get_model(request).await.unwrap();
        answer.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned()
    };
    assert_eq!(named(Some("abc-1")).await, "abc-1");
    assert_eq!(named(None).await.len(), 32);
}

#[tokio::test]
async fn failures_are_statuses() {
    let server = start(fake::service(fake::break_off)).await;
    let mut client = InferenceClient::new(server.channel.clone());
    let cases = [
        (v1::GenerateRequest::default(), "prompt: "),
        (ask(&[], 1), "prompt: "),
        (ask(&[fake::VOCABULARY], 1), "prompt: "),
        (ask(&[1], 0), "max_tokens: "),
        (ask(&[1], u32::MAX), "max_tokens: "),
        (v1::GenerateRequest { choices: Some(0), ..ask(&[1], 1) }, "choices: "),
        (v1::GenerateRequest { choices: Some(u32::MAX), ..ask(&[1], 1) }, "choices: "),
        (v1::GenerateRequest { top_logprobs: Some(u32::MAX), ..ask(&[1], 1) }, "top_logprobs: "),
    ];
    for (request, start) in cases {
        let status = client.generate(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(start), "{status}");
    }
    for bad in [f32::NAN, f32::INFINITY, -1.0, 1e38] {
        let sampling = Some(v1::Sampling { temperature: Some(bad), ..Default::default() });
        let status = client.generate(v1::GenerateRequest { sampling, ..ask(&[1], 1) }).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{bad}: {status}");
    }
    let other = v1::GenerateRequest { model: "other".into(), ..ask(&[1], 1) };
    assert_eq!(client.generate(other).await.unwrap_err().code(), Code::NotFound);
    let status = client.tokenize(v1::TokenizeRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "there is no tokenizer");

    let mut stream = client.generate(ask(&[1], 2)).await.unwrap().into_inner();
    assert!(matches!(stream.next().await.unwrap().unwrap().event, Some(Event::Started(_))));
    assert!(matches!(stream.next().await.unwrap().unwrap().event, Some(Event::Token(_))));
    let status = stream.next().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.metadata().get("retry-after-ms").unwrap(), "1000");
    assert!(stream.next().await.is_none());
}

fn resume(ids: &[&[u32]], request: v1::GenerateRequest) -> v1::GenerateRequest {
    let choices = ids.iter().map(|ids| v1::TokenIds { ids: ids.to_vec() }).collect();
    v1::GenerateRequest { resume_from: Some(v1::Resume { choices, key: None }), ..request }
}

#[tokio::test]
async fn a_resumed_stream_goes_on_behind_what_the_client_has() {
    let server = start(fake::service(fake::echo)).await;
    let mut client = InferenceClient::new(server.channel.clone());
    let mut events = async |request: v1::GenerateRequest| -> Vec<Event> {
        let stream = client.generate(request).await.unwrap().into_inner();
        stream.map(|event| event.unwrap().event.unwrap()).collect().await
    };
    let whole = events(ask(&[5, 6], 3)).await;
    let rest = events(resume(&[&[5, 6]], ask(&[5, 6], 3))).await;
    assert_eq!(rest[1..], whole[3..]);
    let key = |events: &[Event]| match &events[0] {
        Event::Started(started) => started.resume_key.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!((key(&whole).len(), key(&whole)), (64, key(&rest)));
    let mut keyed = resume(&[&[5]], ask(&[5, 6], 3));
    keyed.resume_from.as_mut().unwrap().key = Some(key(&whole));
    assert_eq!(events(keyed).await[1..], whole[2..]);
    for other in [ask(&[5, 7], 3), ask(&[5, 6], 4), ask(&[5], 3)] {
        assert_ne!(key(&events(other).await), key(&whole));
    }
}

#[tokio::test]
async fn what_cannot_be_resumed_is_refused_by_name() {
    let server = start(fake::service(fake::echo)).await;
    let mut client = InferenceClient::new(server.channel.clone());
    let sampled = |seed| {
        let sampling = Some(v1::Sampling { temperature: Some(0.5), seed, ..Default::default() });
        v1::GenerateRequest { sampling, ..ask(&[1, 2], 4) }
    };
    let stop = Some(v1::Stop { token_ids: vec![9], ..Default::default() });
    let stops = v1::GenerateRequest { stop, ..ask(&[1, 2], 4) };
    let two = v1::GenerateRequest { choices: Some(2), ..ask(&[1, 2], 4) };
    let mut other_key = resume(&[&[1]], ask(&[1, 2], 4));
    other_key.resume_from.as_mut().unwrap().key = Some("0".repeat(64));
    let cases = [
        (resume(&[&[fake::VOCABULARY]], ask(&[1, 2], 4)), "resume_from: choices[0]: token id"),
        (resume(&[&[1; 5]], ask(&[1, 2], 4)), "resume_from: choices[0] has 5 tokens"),
        (resume(&[&[1; 70]], v1::GenerateRequest { max_tokens: None, ..ask(&[1], 1) }), "resume_from: "),
        // The prompt leaves room for one less than the context.
        (resume(&[&[1; 64]], v1::GenerateRequest { max_tokens: None, ..ask(&[1], 1) }), "resume_from: "),
        (resume(&[], ask(&[1, 2], 4)), "resume_from: choices has 0 entries"),
        (resume(&[&[1], &[1]], ask(&[1, 2], 4)), "resume_from: choices has 2 entries"),
        (resume(&[&[1]], two), "resume_from: choices has 1 entries"),
        (resume(&[&[1]], sampled(None)), "seed: is absent"),
        (resume(&[&[8, 9, 8]], stops), "resume_from: choices[0]: token 1 ends the output"),
        (other_key, "resume_from: key is that of another stream"),
    ];
    for (request, start) in cases {
        let status = client.generate(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(start), "{start:?}: {status}");
    }
    assert!(client.generate(resume(&[&[1]], sampled(Some(3)))).await.is_ok());
}

#[tokio::test]
async fn messages_above_the_limit_are_refused() {
    let server = start(fake::service(fake::echo)).await;
    let mut client = InferenceClient::new(server.channel.clone());
    let limit = muster_types::Limits::default().body_bytes;
    let request = v1::TokenizeRequest { text: "a".repeat(limit), without_special: false };
    let status = client.tokenize(request).await.unwrap_err();
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");
    assert!(client.get_model(v1::GetModelRequest {}).await.is_ok(), "the next good request is served");
}

#[tokio::test]
async fn the_model_is_described() {
    let server = start(fake::service(fake::echo)).await;
    let model = InferenceClient::new(server.channel.clone());
    let model = model.clone().get_model(v1::GetModelRequest {}).await.unwrap().into_inner();
    assert_eq!((model.name.as_str(), model.compute.as_str()), (fake::MODEL, "f32"));
    assert_eq!((model.expert_dtype.as_str(), model.trunk_dtype.as_str()), ("native", "native"));
    assert_eq!(
        (model.fingerprint.len(), model.vocabulary, model.context),
        (64, fake::VOCABULARY, fake::CONTEXT)
    );
}

#[tokio::test]
async fn a_dropped_stream_cancels() {
    let (sender, mut choices) = mpsc::channel(1);
    let server = start(fake::service(move |choice| sender.try_send(choice).unwrap())).await;
    let mut client = InferenceClient::new(server.channel.clone());
    let stream = client.generate(ask(&[1], 2)).await.unwrap().into_inner();
    let choice = timeout(SOON, choices.recv()).await.unwrap().unwrap();
    assert!(!choice.events.is_closed());
    drop(stream);
    timeout(SOON, choice.events.closed()).await.expect("the generation is dropped");
}

#[tokio::test]
async fn health_follows_the_service_and_ends_with_it() {
    let ready = Arc::new(AtomicBool::new(true));
    let probe = Arc::clone(&ready);
    let probe = move || match probe.load(Ordering::SeqCst) {
        true => Health::Ready,
        false => Health::NotReady { reason: "a test".into() },
    };
    let server = start(fake::service_with(Arc::new(probe), fake::echo)).await;
    let mut client = HealthClient::new(server.channel.clone());
    let request = HealthCheckRequest { service: "muster.v1.Inference".into() };
    let mut watch = client.watch(request).await.unwrap().into_inner();
    let mut next = async || timeout(SOON, watch.next()).await.unwrap().map(|r| r.unwrap().status());
    assert_eq!(next().await, Some(Reported::Serving));
    ready.store(false, Ordering::SeqCst);
    assert_eq!(next().await, Some(Reported::NotServing));
    ready.store(true, Ordering::SeqCst);
    assert_eq!(next().await, Some(Reported::Serving));
    server.shutdown.cancel();
    assert_eq!(next().await, Some(Reported::NotServing));
    assert_eq!(next().await, None);
    timeout(SOON, server.task).await.expect("a watcher does not hold it up").unwrap().unwrap();
}

#[tokio::test]
async fn overall_health_is_reported_from_the_first_moment() {
    let probe = || Health::NotReady { reason: "a test".into() };
    let server = start(fake::service_with(Arc::new(probe), fake::echo)).await;
    let mut client = HealthClient::new(server.channel.clone());
    let check: HealthCheckResponse = client.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(check.status(), Reported::NotServing);
}

#[tokio::test]
async fn reflection_lists_what_is_served() {
    let server = start(fake::service(fake::echo)).await;
    let mut client = ServerReflectionClient::new(server.channel.clone());
    let message_request = Some(MessageRequest::ListServices(String::new()));
    let request = ServerReflectionRequest { host: String::new(), message_request };
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer: ServerReflectionResponse = answers.next().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    let mut names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            "muster.v1.Inference"
        ]
    );
}

#[tokio::test]
async fn what_reflection_does_not_find_ends_nothing() {
    use tonic_reflection::pb::v1alpha;
    use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest as Asked;
    use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse as Answer;

    let server = start(fake::service(fake::echo)).await;
    let symbol = |name: &str| MessageRequest::FileContainingSymbol(name.to_owned());
    let questions = [
        symbol("muster.v1.Nothing"),
        MessageRequest::FileByFilename("nothing.proto".into()),
        symbol("grpc.reflection.v1alpha.ServerReflection"),
        symbol("muster.v1.Inference.Generate"),
    ];
    let ask = |asked| ServerReflectionRequest { host: String::new(), message_request: Some(asked) };
    let questions = tokio_stream::iter(questions.map(ask));
    let mut client = ServerReflectionClient::new(server.channel.clone());
    let answers = client.server_reflection_info(questions).await.unwrap().into_inner();
    let answers: Vec<_> = answers.map(|answer| answer.unwrap().message_response.unwrap()).collect().await;
    let [MessageResponse::ErrorResponse(symbol), MessageResponse::ErrorResponse(file), found @ ..] =
        &answers[..]
    else {
        panic!("{answers:?}")
    };
    assert_eq!((symbol.error_code, file.error_code), (5, 5));
    assert!(symbol.error_message.contains("muster.v1.Nothing"), "{symbol:?}");
    assert_eq!(found.len(), 2);
    assert!(found.iter().all(|answer| matches!(answer, MessageResponse::FileDescriptorResponse(_))));

    let mut older = v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel.clone());
    let ask = |asked| v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(asked) };
    let questions = [Asked::FileContainingSymbol("x".into()), Asked::ListServices(String::new())].map(ask);
    let answers = older.server_reflection_info(tokio_stream::iter(questions)).await.unwrap().into_inner();
    let answers: Vec<_> = answers.map(|answer| answer.unwrap().message_response.unwrap()).collect().await;
    let [Answer::ErrorResponse(_), Answer::ListServicesResponse(list)] = &answers[..] else {
        panic!("{answers:?}")
    };
    assert!(list.service.iter().any(|service| service.name == "grpc.reflection.v1alpha.ServerReflection"));
}

#[tokio::test]
async fn methods_that_are_not_here_are_told_what_is() {
    let server = start(fake::service(fake::echo)).await;
    for path in ["/muster.v1.Inference/Nothing", "/no.such.Service/Method", "/x"] {
        let mut client = tonic::client::Grpc::new(server.channel.clone());
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<v1::GetModelRequest, v1::Model>::default();
        let request = tonic::Request::new(v1::GetModelRequest {});
        let status = client.unary(request, path.parse().unwrap(), codec).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
        assert!(status.message().contains("muster.v1.Inference"), "{path}: {status}");
    }
}

#[tokio::test]
async fn compressed_requests_are_taken() {
    let server = start(fake::service(fake::echo)).await;
    let mut client = InferenceClient::new(server.channel.clone()).send_compressed(CompressionEncoding::Gzip);
    let stream = client.generate(ask(&[5; 50], 3)).await.unwrap().into_inner();
    assert_eq!(stream.map(|event| event.unwrap()).fold(0, |count, _| count + 1).await, 5);
    // A message that decompresses beyond the limit is refused.
    let limit = muster_types::Limits::default().body_bytes;
    let status = client.generate(v1::GenerateRequest { model: "a".repeat(limit + 1), ..ask(&[5], 3) });
    assert_eq!(status.await.unwrap_err().code(), Code::ResourceExhausted);
    let mut health = HealthClient::new(server.channel.clone()).send_compressed(CompressionEncoding::Gzip);
    assert!(health.check(HealthCheckRequest::default()).await.is_ok());
}

/// Connections closed for flooding, so far.
fn floods(metrics: &MetricsHandle) -> u64 {
    let text = metrics.render();
    let line = text.lines().find_map(|line| line.strip_prefix("muster_connections_flooding_total "));
    line.map_or(0, |count| count.parse().unwrap())
}

/// One test for all kinds, because the metrics are process-wide.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_end_and_what_is_asked_for_goes_on() {
    let metrics = muster_telemetry::install_metrics(Process::Router).unwrap();
    let server = start(fake::service(fake::echo)).await;
    let mut client = InferenceClient::new(server.channel.clone());
    for kind in Flood::ALL {
        let before = floods(&metrics);
        flood(&server.address, "/muster.v1.Inference/Generate", kind, SOON).await;
        // The library has limits of its own for some kinds, which may be hit first.
        let may_end_otherwise =
            matches!(kind, Flood::RapidReset | Flood::Continuation | Flood::Resets | Flood::EmptyData);
        assert!(floods(&metrics) == before + 1 || may_end_otherwise, "{kind:?}");
        assert!(
            timeout(SOON, client.get_model(v1::GetModelRequest {})).await.unwrap().is_ok(),
            "after {kind:?}"
        );
    }

    // A working client is no flood, even over a long time with small windows and many pings.
    let before = floods(&metrics);
    let channel = Endpoint::from_shared(format!("http://{}", server.address)).unwrap();
    let channel = channel
        .initial_stream_window_size(64)
        .initial_connection_window_size(1 << 16)
        .http2_adaptive_window(false)
        .http2_keep_alive_interval(Duration::from_millis(1))
        .connect()
        .await
        .unwrap();
    let mut client = InferenceClient::new(channel);
    for _ in 0..3000 {
        let stream = client.generate(ask(&[5, 6], 16)).await.unwrap().into_inner();
        let events = stream.map(|event| event.unwrap()).fold(0, |count, _| count + 1);
        assert_eq!(events.await, 18);
    }
    assert_eq!(floods(&metrics), before);
}
