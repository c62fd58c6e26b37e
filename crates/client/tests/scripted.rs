//! The client over routers that do what a script says: break off, refuse, lie.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use muster_client::{Client, ClientError, Event, Policy};
use muster_proto::v1::finished::Reason;
use muster_proto::v1::generate_event::Event as Sent;
use muster_proto::v1::generate_request::Prompt;
use muster_proto::v1::inference_server::{Inference, InferenceServer};
use muster_proto::v1::{
    DetokenizeRequest, DetokenizeResponse, Finished, GenerateEvent, GenerateRequest, GetModelRequest, Model,
    Sampling, Started, TokenFrame, TokenIds, TokenizeRequest, TokenizeResponse,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

/// Tokens of every stream, unless a script says otherwise.
const TOKENS: u32 = 6;

/// What a router does with one call.
enum Act {
    /// Refuses it.
    Refuse(Status),
    /// Sends what is left of the stream, but no more than so many tokens; then this status, or nothing more.
    Serve { tokens: u32, then: Option<Status> },
    /// Sends these events.
    Send(Vec<Sent>),
    /// Starts, and then is silent for ever.
    Hang,
}

/// A router. Calls beyond its script are served whole.
#[derive(Clone, Default)]
struct Scripted {
    acts: Arc<Mutex<VecDeque<Act>>>,
    calls: Arc<Mutex<Vec<GenerateRequest>>>,
}

type Events = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for Scripted {
    type GenerateStream = Events;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        self.calls.lock().unwrap().push(request.clone());
        let act = self.acts.lock().unwrap().pop_front();
        let (events, end): (Vec<Sent>, Events) =
            match act.unwrap_or(Act::Serve { tokens: u32::MAX, then: None }) {
                Act::Refuse(status) => return Err(status),
                Act::Serve { tokens, then } => {
                    (stream(&request, tokens), Box::pin(tokio_stream::iter(then.map(Err))))
                }
                Act::Send(events) => (events, Box::pin(tokio_stream::empty())),
                Act::Hang => (stream(&request, 0), Box::pin(tokio_stream::pending())),
            };
        let wrap = |event| Ok(GenerateEvent { event: Some(event) });
        Ok(Response::new(Box::pin(tokio_stream::iter(events.into_iter().map(wrap)).chain(end))))
    }

    async fn tokenize(&self, _: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        match self.acts.lock().unwrap().pop_front() {
            Some(Act::Refuse(status)) => Err(status),
            _ => Ok(Response::new(TokenizeResponse { ids: vec![1, 2] })),
        }
    }

    async fn detokenize(
        &self,
        _: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn get_model(&self, _: Request<GetModelRequest>) -> Result<Response<Model>, Status> {
        Err(Status::unimplemented("not scripted"))
    }
}

fn started(seed: u64) -> Sent {
    Sent::Started(Started { seed, prompt_tokens: 2, resume_key: "key".into(), ..Started::default() })
}

fn token(choice: u32, index: u32) -> Sent {
    let token_id = 100 * choice + index;
    Sent::Token(TokenFrame {
        choice,
        index,
        token_id,
        text: format!("<{token_id}>"),
        ..TokenFrame::default()
    })
}

/// What a router sends that would have sent `TOKENS` tokens for each choice: no more than `most` now, choices in turn,
/// and the end of those that have all.
fn stream(request: &GenerateRequest, most: u32) -> Vec<Sent> {
    let choices = request.choices.unwrap_or(1);
    let seed = request.sampling.as_ref().and_then(|sampling| sampling.seed).unwrap_or(77);
    let mut had: Vec<u32> = match &request.resume_from {
        None => vec![0; choices as usize],
        Some(resume) => resume.choices.iter().map(|choice| choice.ids.len() as u32).collect(),
    };
    let mut events = vec![started(seed)];
    let mut left = most;
    for index in 0..TOKENS {
        for choice in 0..choices {
            let had = &mut had[choice as usize];
            if *had == index && left > 0 {
                events.push(token(choice, index));
                *had += 1;
                left -= 1;
            }
        }
    }
    let ends = (0..choices).filter(|&choice| had[choice as usize] == TOKENS).map(|choice| {
        let reason = Reason::Length.into();
        Sent::Finished(Finished { choice, reason, output_tokens: TOKENS, ..Finished::default() })
    });
    events.extend(ends);
    events
}

/// A router that does this, and where it listens.
async fn router(acts: impl IntoIterator<Item = Act>) -> (Scripted, String) {
    let scripted = Scripted { acts: Arc::new(Mutex::new(acts.into_iter().collect())), ..Scripted::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tonic::transport::Server::builder().add_service(InferenceServer::new(scripted.clone()));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (scripted, address)
}

fn request(choices: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Tokens(TokenIds { ids: vec![1, 2] })),
        choices: Some(choices),
        sampling: Some(Sampling { temperature: Some(0.5), ..Sampling::default() }),
        ..GenerateRequest::default()
    }
}

/// All events, and how often the stream was resumed.
async fn run(client: &Client, request: GenerateRequest) -> Result<(Vec<Event>, u32), ClientError> {
    let mut generation = client.generate(request).await?;
    let mut events = Vec::new();
    while let Some(event) = generation.next().await? {
        events.push(event);
    }
    Ok((events, generation.resumed()))
}

/// Indices and ends of one choice.
fn of_choice(events: &[Event], wanted: u32) -> (Vec<u32>, usize) {
    let (mut indices, mut ends) = (Vec::new(), 0);
    for event in events {
        match event {
            Event::Token(frame) if frame.choice == wanted => indices.push(frame.index),
            Event::Finished(end) if end.choice == wanted => ends += 1,
            _ => {}
        }
    }
    (indices, ends)
}

fn worker_lost() -> Status {
    Status::unavailable("experts are unavailable: a worker was lost")
}

#[tokio::test]
async fn a_stream_cut_anywhere_is_handed_out_once_and_whole() {
    for choices in [1, 3] {
        for tokens in 0..=TOKENS * choices {
            for then in [Some(worker_lost()), None] {
                let whole = tokens == TOKENS * choices;
                let (first, a) = router([Act::Serve { tokens, then }]).await;
                let (second, b) = router([]).await;
                let client = Client::connect(&[a, b], Policy::default()).await.unwrap();
                let (events, resumed) = run(&client, request(choices)).await.unwrap();
                for choice in 0..choices {
                    assert_eq!(of_choice(&events, choice), ((0..TOKENS).collect(), 1), "cut after {tokens}");
                }
                assert_eq!(resumed, u32::from(!whole));
                assert_eq!(first.calls.lock().unwrap()[0].resume_from, None);
                let calls = second.calls.lock().unwrap();
                assert_eq!(calls.len(), usize::from(!whole));
                for call in calls.iter() {
                    let had = call.resume_from.as_ref().unwrap();
                    assert_eq!(had.choices.iter().map(|c| c.ids.len() as u32).sum::<u32>(), tokens);
                    assert_eq!(had.key.as_deref(), Some("key"));
                    // The one that the first router chose.
                    assert_eq!(call.sampling.as_ref().unwrap().seed, Some(77));
                }
            }
        }
    }
}

#[tokio::test]
async fn a_router_whose_experts_stay_away_is_asked_a_few_times() {
    let gives_up = || {
        let mut status = worker_lost();
        status.metadata_mut().insert("retry-after-ms", 1.into());
        Act::Serve { tokens: 0, then: Some(status) }
    };
    let (served, address) = router((0..10).map(|_| gives_up())).await;
    let client = Client::connect(&[address], Policy::default()).await.unwrap();
    let error = run(&client, request(1)).await.unwrap_err();
    assert!(error.to_string().contains("experts are unavailable"), "{error}");
    assert_eq!(served.calls.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn a_stream_may_break_after_every_token() {
    let cut = || Act::Serve { tokens: 1, then: Some(worker_lost()) };
    let (_, a) = router([cut(), cut(), cut()]).await;
    let (_, b) = router([cut(), cut(), cut()]).await;
    let client = Client::connect(&[a, b], Policy::default()).await.unwrap();
    let (events, resumed) = run(&client, request(1)).await.unwrap();
    assert_eq!(of_choice(&events, 0), ((0..TOKENS).collect(), 1));
    assert_eq!(resumed, TOKENS - 1);
}

#[tokio::test]
async fn a_full_queue_is_waited_for_and_a_refusal_is_not() {
    let full = || {
        let mut status = Status::resource_exhausted("the queue is full");
        status.metadata_mut().insert("retry-after-ms", 1.into());
        Act::Refuse(status)
    };
    let (router_of_full, address) = router([full(), full()]).await;
    let client = Client::connect(&[address], Policy::default()).await.unwrap();
    assert_eq!(run(&client, request(1)).await.unwrap().1, 0);
    assert_eq!(router_of_full.calls.lock().unwrap().len(), 3);

    let (refusing, address) = router([Act::Refuse(Status::invalid_argument("max_tokens: is 0"))]).await;
    let client = Client::connect(&[address], Policy::default()).await.unwrap();
    let error = run(&client, request(1)).await.unwrap_err();
    assert_eq!(error, ClientError::Refused { message: "max_tokens: is 0".into() });
    assert_eq!(refusing.calls.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_failure_that_will_not_pass_is_told_at_once() {
    let not_finite = Status::failed_precondition("the model gave values that are not finite");
    let (failing, a) = router([Act::Serve { tokens: 2, then: Some(not_finite) }]).await;
    let (other, b) = router([]).await;
    let client = Client::connect(&[a, b], Policy::default()).await.unwrap();
    let error = run(&client, request(1)).await.unwrap_err();
    assert!(matches!(&error, ClientError::Failed { code, .. } if code == "FailedPrecondition"), "{error}");
    assert_eq!((failing.calls.lock().unwrap().len(), other.calls.lock().unwrap().len()), (1, 0));
}

#[tokio::test]
async fn a_router_that_cannot_go_on_leaves_it_to_another() {
    let cut = Act::Serve { tokens: 2, then: Some(worker_lost()) };
    let refuse = || Act::Refuse(Status::invalid_argument("resume_from: key is that of another stream"));
    let (_, a) = router([cut, refuse()]).await;
    let (_, b) = router([refuse()]).await;
    let (third, c) = router([]).await;
    let client = Client::connect(&[a.clone(), b.clone(), c], Policy::default()).await.unwrap();
    let (events, _) = run(&client, request(1)).await.unwrap();
    assert_eq!(of_choice(&events, 0), ((0..TOKENS).collect(), 1));
    assert_eq!(third.calls.lock().unwrap().len(), 1);

    // A stream that begins with another seed is not this one.
    let cut = Act::Serve { tokens: 2, then: Some(worker_lost()) };
    let (_, a) = router([cut, refuse()]).await;
    let (_, b) = router([Act::Send(vec![started(78), token(0, 2)])]).await;
    let client = Client::connect(&[a, b], Policy::default()).await.unwrap();
    let error = run(&client, request(1)).await.unwrap_err();
    assert!(matches!(error, ClientError::Lost { tokens: 2, .. }), "{error}");
}

#[tokio::test]
async fn a_router_that_skips_or_repeats_is_found_out() {
    let cases = [
        vec![started(77), token(0, 1)],
        vec![started(77), token(0, 0), token(0, 0)],
        vec![started(77), token(1, 0)],
        vec![started(77), started(77)],
    ];
    for events in cases {
        let (_, address) = router([Act::Send(events)]).await;
        let client = Client::connect(&[address], Policy::default()).await.unwrap();
        let error = run(&client, request(1)).await.unwrap_err();
        assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
    }
}

#[tokio::test]
async fn patience_and_deadlines_end() {
    let cut = || Act::Serve { tokens: 0, then: Some(worker_lost()) };
    let (scripted, address) = router((0..100).map(|_| cut())).await;
    let policy = Policy { attempts: 4, ..Policy::default() };
    let client = Client::connect(&[address], policy).await.unwrap();
    let error = run(&client, request(1)).await.unwrap_err();
    assert!(matches!(&error, ClientError::Lost { tokens: 0, .. }), "{error}");
    assert!(error.to_string().contains("a worker was lost"), "{error}");
    assert_eq!(scripted.calls.lock().unwrap().len(), 4);

    let (_, address) = router([Act::Hang]).await;
    let limit = Duration::from_millis(20);
    let policy = Policy { generation: Some(limit), ..Policy::default() };
    let client = Client::connect(&[address], policy).await.unwrap();
    assert_eq!(run(&client, request(1)).await.unwrap_err(), ClientError::Deadline { limit });
}

#[tokio::test]
async fn a_dropped_wait_loses_nothing() {
    let (_, a) = router([Act::Serve { tokens: 2, then: Some(worker_lost()) }]).await;
    let (_, b) = router([]).await;
    let client = Client::connect(&[a, b], Policy::default()).await.unwrap();
    let mut generation = client.generate(request(1)).await.unwrap();
    let mut events = Vec::new();
    let mut drops = 0;
    loop {
        // Polled once and dropped, some times in the middle of the stream and some while it is resumed.
        let event = tokio::select! {
            biased;
            event = generation.next() => event.unwrap(),
            () = tokio::task::yield_now(), if drops < 10 => {
                drops += 1;
                continue;
            }
        };
        match event {
            Some(event) => events.push(event),
            None => break,
        }
    }
    assert_eq!(drops, 10);
    assert_eq!(of_choice(&events, 0), ((0..TOKENS).collect(), 1));
}

#[tokio::test]
async fn calls_turn_to_another_router_too() {
    let (_, a) = router([Act::Refuse(Status::unavailable("the router is shutting down"))]).await;
    let (_, b) = router([]).await;
    let client = Client::connect(&[a.clone(), b], Policy::default()).await.unwrap();
    assert_eq!(client.tokenize("x").await.unwrap(), [1, 2]);

    // Nobody listens at the first address.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let client = Client::connect(&[free.clone(), a], Policy::default()).await.unwrap();
    assert_eq!(client.tokenize("x").await.unwrap(), [1, 2]);
    let error = Client::connect(std::slice::from_ref(&free), Policy::default()).await.unwrap_err();
    assert!(matches!(&error, ClientError::Unreachable { routers, .. } if routers.contains(&free)), "{error}");
    for bad in ["ftp://127.0.0.1:1", "http://", "a b"] {
        let error = Client::connect(&[bad.to_owned()], Policy::default()).await.unwrap_err();
        assert!(matches!(error, ClientError::Address { .. }), "{bad}: {error}");
    }
}
