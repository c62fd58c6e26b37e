//! Streams that break off and go on elsewhere: what comes is what would have come.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use muster_client::{Client, Event, Policy};
use muster_proto::v1::finished::Reason;
use muster_proto::v1::generate_event::Event as Sent;
use muster_proto::v1::generate_request::Prompt;
use muster_proto::v1::inference_client::InferenceClient;
use muster_proto::v1::{
    Chat, ChatMessage, Finished, GenerateRequest, Resume, Sampling, Started, Stop, TokenFrame, TokenIds,
};
use muster_tests::client::{greedy, sampled};
use muster_tests::cluster::{Cluster, Setup};
use muster_tests::process::{Process, eventually, run};
use muster_tests::{demo_model, http};
use serde_json::Value;
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;

type Grpc = InferenceClient<Channel>;

/// The frames and the end of every choice.
#[derive(Debug, Clone, PartialEq)]
struct Whole {
    started: Started,
    choices: Vec<(Vec<TokenFrame>, Option<Finished>)>,
}

async fn whole(client: &Grpc, request: GenerateRequest) -> Whole {
    let choices = request.choices.unwrap_or(1) as usize;
    let mut stream = client.clone().generate(request).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap().event.unwrap();
    let Sent::Started(started) = first else { panic!("{first:?}") };
    let mut whole = Whole { started, choices: vec![(Vec::new(), None); choices] };
    while let Some(event) = stream.message().await.unwrap() {
        match event.event.unwrap() {
            Sent::Started(_) => panic!("started twice"),
            Sent::Token(frame) => whole.choices[frame.choice as usize].0.push(frame),
            // What was cached depends on what ran before.
            Sent::Finished(mut end) => {
                end.cached_prompt_tokens = 0;
                let place = &mut whole.choices[end.choice as usize].1;
                assert!(place.is_none(), "finished twice");
                *place = Some(end);
            }
        }
    }
    assert!(whole.choices.iter().all(|(_, end)| end.is_some()), "a choice without an end");
    whole
}

fn ids(frames: &[TokenFrame]) -> Vec<u32> {
    frames.iter().map(|frame| frame.token_id).collect()
}

/// The request to go on after `cuts` tokens of its choices.
fn resume(request: &GenerateRequest, whole: &Whole, cuts: &[usize]) -> GenerateRequest {
    let had = whole.choices.iter().zip(cuts).map(|((frames, _), &cut)| TokenIds { ids: ids(&frames[..cut]) });
    let key = Some(whole.started.resume_key.clone());
    let mut request = request.clone();
    request.sampling.get_or_insert_default().seed = Some(whole.started.seed);
    GenerateRequest { resume_from: Some(Resume { choices: had.collect(), key }), ..request }
}

/// A second router over the same workers.
fn another_router(cluster: &Cluster) -> Process {
    let workers: Vec<String> = cluster.workers.iter().map(|worker| worker.address("listen")).collect();
    Process::start(&cluster.setup.router_command(&workers)).expect("router")
}

async fn connect(router: &Process) -> Grpc {
    InferenceClient::connect(format!("http://{}", router.address("grpc"))).await.unwrap()
}

/// Requests of all kinds, each with its name.
fn requests() -> Vec<(&'static str, GenerateRequest)> {
    let prompt = [1, 844, 624, 265, 556];
    let mut penalised = sampled(&prompt, 24, 11);
    if let Some(sampling) = &mut penalised.sampling {
        sampling.repetition_penalty = Some(1.3);
        sampling.presence_penalty = Some(0.4);
        sampling.frequency_penalty = Some(0.7);
    }
    // Hot enough that pieces of characters come.
    let mut hot = sampled(&prompt, 40, 3);
    hot.sampling = Some(Sampling { temperature: Some(3.0), seed: Some(3), ..Sampling::default() });
    let chosen = Sampling { temperature: Some(0.9), ..Sampling::default() };
    let stop =
        Stop { strings: vec!["big smile".into(), "no such".into()], ignore_eos: true, ..Stop::default() };
    let message = ChatMessage { role: "user".into(), content: "What is 3 + 4?".into() };
    let chat = Prompt::Chat(Chat { messages: vec![message] });
    vec![
        ("greedy", GenerateRequest { top_logprobs: Some(2), ..greedy(&prompt, 24) }),
        ("sampled", GenerateRequest { top_logprobs: Some(0), ..sampled(&prompt, 24, 5) }),
        ("penalised", GenerateRequest { top_logprobs: Some(1), ..penalised }),
        ("hot", hot),
        ("seed of the router's choice", GenerateRequest { sampling: Some(chosen), ..greedy(&prompt, 12) }),
        ("stop string", GenerateRequest { stop: Some(stop), ..greedy(&prompt, 40) }),
        ("end of text", GenerateRequest { prompt: Some(chat), ..GenerateRequest::default() }),
        ("to the end of the context", GenerateRequest { max_tokens: None, ..greedy(&[7; 490], 1) }),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_cut_anywhere_goes_on_as_if_nothing_had_been() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let other = another_router(&cluster);
    let (here, there) = (cluster.client().await, connect(&other).await);
    for (name, request) in requests() {
        let undisturbed = whole(&here, request.clone()).await;
        let (frames, end) = &undisturbed.choices[0];
        assert!(!frames.is_empty(), "{name}: nothing to cut");
        let stops = ["stop string", "end of text"].contains(&name);
        let reason = if stops { Reason::Stop } else { Reason::Length };
        assert_eq!(end.as_ref().unwrap().reason(), reason, "{name}");
        for cut in 0..=frames.len() {
            // The other router has seen nothing of it.
            let client = if cut % 2 == 0 { &there } else { &here };
            let rest = whole(client, resume(&request, &undisturbed, &[cut])).await;
            assert_eq!(rest.choices[0].0, frames[cut..], "{name} cut after {cut}");
            assert_eq!(rest.choices[0].1, *end, "{name} cut after {cut}");
            let facts = |started: &Started| (started.prompt_tokens, started.seed, started.resume_key.clone());
            assert_eq!(facts(&rest.started), facts(&undisturbed.started), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_may_be_cut_at_different_places() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let client = cluster.client().await;
    let mut request = GenerateRequest { choices: Some(3), ..sampled(&[1, 844, 624], 16, 5) };
    request.top_logprobs = Some(1);
    let undisturbed = whole(&client, request.clone()).await;
    for cuts in [[0, 5, 16], [16, 16, 16], [1, 0, 15]] {
        let rest = whole(&client, resume(&request, &undisturbed, &cuts)).await;
        for ((rest, whole), cut) in rest.choices.iter().zip(&undisturbed.choices).zip(cuts) {
            assert_eq!((&rest.0[..], &rest.1), (&whole.0[cut..], &whole.1), "{cuts:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_last_token_that_ends_the_output_brings_only_the_end() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let client = cluster.client().await;
    let mut request = greedy(&[1, 844, 624, 265, 556], 24);
    let undisturbed = whole(&client, request.clone()).await;
    let frames = &undisturbed.choices[0].0;
    // A stop id has no frame, but a client may send it as a resumed token.
    request.stop = Some(Stop { token_ids: vec![frames[9].token_id], ignore_eos: true, ..Stop::default() });
    let first = frames.iter().position(|frame| frame.token_id == frames[9].token_id).unwrap();
    let stopped = whole(&client, request.clone()).await;
    assert_eq!(stopped.choices[0].0.len(), first);
    let had = TokenIds { ids: ids(&frames[..=first]) };
    request.resume_from = Some(Resume { choices: vec![had], key: None });
    let rest = whole(&client, request).await;
    assert_eq!((rest.choices[0].0.len(), &rest.choices[0].1), (0, &stopped.choices[0].1));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_resumes_are_refused_by_field() {
    let cluster = Cluster::start(Setup::new(&demo_model()));
    let client = cluster.client().await;
    let from = |ids: &[&[u32]], key: Option<&str>, request: GenerateRequest| {
        let choices = ids.iter().map(|ids| TokenIds { ids: ids.to_vec() }).collect();
        let resume = Resume { choices, key: key.map(ToOwned::to_owned) };
        GenerateRequest { resume_from: Some(resume), ..request }
    };
    let request = || greedy(&[1, 844], 8);
    let mut seedless = sampled(&[1, 844], 8, 0);
    seedless.sampling.as_mut().unwrap().seed = None;
    let stops = GenerateRequest { stop: Some(Stop { token_ids: vec![700], ..Stop::default() }), ..request() };
    let cases = [
        ("resume_from", from(&[&[4096]], None, request())),
        ("resume_from", from(&[&[u32::MAX]], None, request())),
        ("resume_from", from(&[&[7; 9]], None, request())),
        ("resume_from", from(&[&vec![7; 100_000]], None, request())),
        ("resume_from", from(&[&[7; 511]], None, GenerateRequest { max_tokens: None, ..request() })),
        ("resume_from", from(&[], None, request())),
        ("resume_from", from(&[&[7], &[7]], None, request())),
        ("resume_from", from(&[&[699, 700, 701]], None, stops)),
        ("resume_from", from(&[&[7]], Some("another"), request())),
        ("seed", from(&[&[7]], None, seedless)),
    ];
    for (field, request) in cases {
        let status = client.clone().generate(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(field), "{field:?} is not named: {status}");
    }
    assert_eq!(whole(&client, request()).await.choices[0].0.len(), 8);
}

/// The whole output of one choice, over as many streams as it takes.
async fn through(client: &Client, request: GenerateRequest, seen: &AtomicUsize) -> (Whole, u32) {
    let mut generation = client.generate(request).await.unwrap();
    let (mut frames, mut end) = (Vec::new(), None);
    while let Some(event) = generation.next().await.unwrap() {
        match event {
            Event::Token(frame) => {
                // A stream well under way counts once.
                if frame.index == 10 {
                    seen.fetch_add(1, Ordering::SeqCst);
                }
                frames.push(frame);
            }
            Event::Finished(finished) => end = Some(Finished { cached_prompt_tokens: 0, ..finished }),
        }
    }
    let started = generation.started().clone();
    (Whole { started, choices: vec![(frames, end)] }, generation.resumed())
}

fn counted(router: &Process, name: &str) -> u32 {
    let text = http::get(&router.address("http"), "/metrics").text();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_router_loses_no_stream() {
    let mut cluster = Cluster::start(Setup::new(&demo_model()));
    let other = another_router(&cluster);
    let addresses = [cluster.grpc(), other.address("grpc")];
    let seen = Arc::new(AtomicUsize::new(0));
    let request = |n: u32| {
        let prompt = [1, 844 + n, 624, 265];
        let mut request = if n.is_multiple_of(2) { greedy(&prompt, 300) } else { sampled(&prompt, 300, 0) };
        // Every fourth request leaves the seed to the router.
        if n % 4 == 3 {
            request.sampling.as_mut().unwrap().seed = None;
        }
        request.top_logprobs = Some(1);
        request
    };
    let mut running = JoinSet::new();
    for n in 0..16 {
        let client = Client::connect(&addresses, Policy::default()).await.unwrap();
        let (request, seen) = (request(n), Arc::clone(&seen));
        running.spawn(async move { (n, through(&client, request, &seen).await) });
    }
    eventually("all under way", async || (seen.load(Ordering::SeqCst) == 16).then_some(())).await;
    cluster.router.kill();
    let mut outcomes = Vec::new();
    while let Some(done) = running.join_next().await {
        outcomes.push(done.unwrap());
    }
    let resumed = outcomes.iter().filter(|(_, (_, resumed))| *resumed > 0).count();
    assert!(resumed > 0, "the fault hit nobody");
    assert!(counted(&other, "muster_requests_resumed_total") as usize >= resumed);
    assert_eq!(outcomes.len(), 16, "streams were lost");
    let client = connect(&other).await;
    for (n, (outcome, _)) in outcomes {
        let mut request = request(n);
        request.sampling.get_or_insert_default().seed = Some(outcome.started.seed);
        let undisturbed = whole(&client, request).await;
        assert_eq!(outcome.choices, undisturbed.choices, "stream {n}");
        assert_eq!(outcome.choices[0].0.len(), 300);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_router_may_come_back() {
    let mut cluster = Cluster::start(Setup::new(&demo_model()));
    let grpc = cluster.grpc();
    let workers: Vec<String> = cluster.workers.iter().map(|worker| worker.address("listen")).collect();
    let mut command = cluster.setup.router_command(&workers);
    let flag = command.iter().position(|arg| arg == "--grpc").unwrap();
    command[flag + 1].clone_from(&grpc);
    let client = Client::connect(&[grpc], Policy::default()).await.unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let request = sampled(&[1, 844, 624], 400, 9);
    let running = {
        let (request, seen) = (request.clone(), Arc::clone(&seen));
        tokio::spawn(async move { through(&client, request, &seen).await })
    };
    eventually("under way", async || (seen.load(Ordering::SeqCst) == 1).then_some(())).await;
    cluster.router.kill();
    cluster.router = Process::start(&command).expect("router");
    let (outcome, resumed) = running.await.unwrap();
    assert_eq!(resumed, 1);
    assert_eq!(outcome.choices, whole(&cluster.client().await, request).await.choices);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_names_several_routers() {
    let mut cluster = Cluster::start(Setup::new(&demo_model()));
    let other = another_router(&cluster);
    let (first, second) = (cluster.grpc(), other.address("grpc"));
    let generate = |grpc: &[&str]| {
        let fixed =
            ["generate", "--prompt-tokens", "1,844,624", "--max-tokens", "450", "--json", "--ignore-eos"];
        let args: Vec<String> = fixed.iter().chain(grpc).map(ToString::to_string).collect();
        tokio::task::spawn_blocking(move || {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let output = run(&args);
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{stderr}");
            (serde_json::from_slice::<Value>(&output.stdout).unwrap(), stderr)
        })
    };
    let (undisturbed, _) = generate(&["--grpc", &second]).await.unwrap();
    let answering = generate(&["--grpc", &first, "--grpc", &second]);
    eventually("answering", async || {
        (counted(&cluster.router, "muster_sequences_running") == 1).then_some(())
    })
    .await;
    cluster.router.kill();
    let (answer, stderr) = answering.await.unwrap();
    assert_eq!(answer, undisturbed);
    assert!(stderr.contains("asking for the rest of it"), "the fault hit nobody: {stderr}");
    assert_eq!(counted(&other, "muster_requests_resumed_total"), 1);
    // The first router is gone from the start.
    let (answer, _) = generate(&["--grpc", &format!("{first},{second}")]).await.unwrap();
    assert_eq!(answer, undisturbed);
}
